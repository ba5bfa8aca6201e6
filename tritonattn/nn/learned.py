"""Scalings with learned parameters, one value per query head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..calls.checks import check_bool, check_count, check_dtype
from ..calls.dispatch import scales_of
from ..core.hints import hinted, type_of
from ..core.statistics import Statistics, counts_of
from ..core.torch_distributed import local
from ..core.visibility import Visibility
from ..scaling import Scales, Scaling, cosine
from ..scaling.base import NO_BASE, check_positive, warn_without_base
from ..scaling.names import named_scaling, refuse_scaling


class ScalingModule(nn.Module, Scaling):
    """A scaling that is a module: an argument of a call, and itself not callable."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: expected to be an argument, attention(q, k, v, scaling=...), got a call of itself"
        )


@dataclass(frozen=True, eq=False)
class Tie:
    """A parameter of a module that a scaling has in the place of one of its own.

    axes   1 flattens it, [1, heads, 1, 1] to [heads]
    """

    owner: nn.Module
    attribute: str
    axes: int

    @property
    def parameter(self) -> Any:
        return self.owner._parameters[self.attribute]

    def value(self) -> Any:
        x = self.parameter
        return x if x is None or x.dim() == self.axes else x.flatten()


class Learned(ScalingModule):
    """A scaling whose parameters have one value for every query head: shape [heads], in float32 unless `dtype` says so.

    They act in float64 and the resulting scale in float32, whatever the dtype of q. A subclass defines `scales` and
    `multiplier`, as every `Scaling`.

    heads   Hq, the heads of q; another number of heads in a call raises ValueError
    ties    the parameters that belong to a model and are registered there alone
    """

    _starts: Mapping[str, float] = MappingProxyType({})
    ties: Mapping[str, Tie] = MappingProxyType({})  # of a pickle that has none

    def __init__(self, heads: int) -> None:
        super().__init__()
        check_count("heads", heads, 1)
        self.heads, self.ties = heads, {}

    def _learn(self, device: torch.device | str | None, dtype: torch.dtype | None, **starts: float) -> None:
        """Make parameters of these names, [heads] where there are none yet, and start each from its value."""
        check_dtype(dtype)
        self._starts = starts
        for name in starts:
            if name not in self._parameters:
                self.register_parameter(name, nn.Parameter(torch.empty(self.heads, device=device, dtype=dtype)))
        self.reset_parameters()

    def tie(self, name: str, tie: Tie) -> None:
        """Have a parameter of a model in the place of an own one."""
        del self._parameters[name]
        self.ties = {**self.ties, name: tie}

    def __getattr__(self, name: str) -> Any:
        ties = self.__dict__.get("ties")
        return ties[name].value() if ties and name in ties else super().__getattr__(name)

    def reset_parameters(self) -> None:
        """Start again, exactly from the mode or the values given; a model's parameters stay as they are."""
        for name, start in self._starts.items():
            if name not in self.ties:
                nn.init.constant_(getattr(self, name), start)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"

    def per_head(self, parameter: Tensor, q: Tensor) -> Tensor:
        """A parameter [heads] as fp64 [heads, 1], for q [B, heads, Sq, D]; of a DTensor this rank's heads.

        Raises ValueError where q has other heads or lies on another device.
        """
        parameter, whole = local(parameter), parameter.shape[0]
        if q.shape[1] != parameter.shape[0]:
            there = "" if parameter.shape[0] == whole else f" of {whole} on this rank"
            raise ValueError(
                f"scaling: expected q of {type(self).__name__}'s {parameter.shape[0]} heads{there}, got {q.shape[1]};"
                " under tensor parallelism tritonattn.distributed.HeadParallel shards them as q"
                if q.shape[1] < whole
                else f"scaling: expected q of {type(self).__name__}'s {whole} heads, got {q.shape[1]}"
            )
        if parameter.device != q.device:
            raise ValueError(
                f"scaling: expected {type(self).__name__} on q's device {q.device}, got {parameter.device}"
            )
        return parameter.double()[:, None]


@hinted
class PerHead(Learned):
    """factor = exp(theta_h) * (the factor of a mode): a learned temperature for every head.

    Args:
        mode: A name in `SCALINGS` or a `Scaling`, itself learned or not.
        heads: Hq.
        device, dtype: The device and dtype of theta [heads], which starts at 0: exactly the mode.

    Raises:
        TypeError, ValueError: An invalid mode, number of heads or dtype.

    >>> import torch, tritonattn
    >>> scaling = tritonattn.nn.PerHead("key_count", heads=4)
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> tritonattn.attention(q, k, v, scaling=scaling, causal=True).sum().backward()
    >>> scaling.theta.grad.shape
    torch.Size([4])
    """

    name = "per_head"
    theta: nn.Parameter

    def __init__(
        self,
        mode: str | Scaling = "sqrt_dim",
        *,
        heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(heads)
        self.mode = as_mode(mode)
        self._learn(device, dtype, theta=0.0)

    @property
    def reads_keys(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mode.reads_keys

    @property
    def normalises_query(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mode.normalises_query

    def extra_repr(self) -> str:
        return f"{listed(self.mode)}heads={self.heads}"

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        gain = self.per_head(self.theta, q).exp()
        return scales_of(self.mode, gain, q, k, visibility, statistics)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        temperature = self.per_head(self.theta, q).exp()[..., None]  # [Hq, 1, 1]
        return self.mode.multiplier(q, k, visible) * temperature

    def addend(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor | None:
        return self.mode.addend(q, k, visible)

    def relative_multiplier(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor | None:
        return self.mode.relative_multiplier(q, k, distance)

    def relative_addend(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor | None:
        return self.mode.relative_addend(q, k, distance)


@hinted
class LearnedCosine(PerHead):
    """factor = tau_h / (||q|| * ||k||), tau_h = tau * exp(theta_h): cosine attention with a learned temperature.

    At D = 1 every cosine is 1 or -1: the gradients of q and k are 0 but for rounding. Use D of at least 2.

    Args:
        heads: Hq.
        tau: Where every head starts; None is sqrt(D), as for the mode "cosine". Swin V2 starts at 10. With tau=1
            theta is Swin V2's logit_scale.
        device, dtype: The device and dtype of theta [heads], which starts at 0.

    Source: Liu et al. 2021, "Swin Transformer V2", arXiv:2111.09883, equation 2 (a learned tau per head, without weight
    decay); Henry et al. 2020, "Query-key normalization for transformers", arXiv:2010.04245, equation 4.

    Raises:
        TypeError, ValueError: An invalid tau, number of heads or dtype.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> tritonattn.attention(q, k, v, scaling=tritonattn.nn.LearnedCosine(heads=4), causal=True).shape
    torch.Size([1, 4, 16, 8])
    """

    name = "learned_cosine"
    reads_keys = PerHead.reads_keys

    def __init__(
        self,
        heads: int,
        tau: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(cosine.Cosine(tau), heads=heads, device=device, dtype=dtype)


@hinted
class SSMax(Learned):
    """factor = (s_h * ln(n) + b_h) / sqrt(D), n = the number of visible keys: Scalable-Softmax.

    softmax(s ln(n) z) = n^(s z) / sum n^(s z), for logits z = q . k / sqrt(D). A head's s and b take any sign.

    Args:
        heads: Hq.
        base: s starts at 1 / ln(base), which is `LogKeyCount(base)`: with the length of training as base, rows of that
            many keys start as sqrt_dim's. Without one it is e, the paper's, and warns.
        bias: Learn b [heads] too, from 0.
        mode: Where every head starts. None is the paper's start, above; "sqrt_dim" is exactly that mode, for a model
            that was trained with it: s = 0 and b = 1, both learned whatever bias says.
        device, dtype: The device and dtype of s and b.

    Source: Nakanishi 2025, "Scalable-Softmax is superior for attention", arXiv:2501.19399: s learned for every layer
    and head; the bias is a variant that it compares. With it, the factor is that of Mistral Large 4, whose layers
    have s and b as softmax_scaling.scale and .bias.

    Raises:
        TypeError, ValueError: An invalid number of heads, bias, mode or dtype; a base that is not finite and above 1.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> tritonattn.attention(q, k, v, scaling=tritonattn.nn.SSMax(heads=4, base=16), causal=True).shape
    torch.Size([1, 4, 16, 8])
    """

    name = "ssmax"
    reads_keys = False
    trained_length = "base"
    s: nn.Parameter
    b: nn.Parameter | None
    base, bias, mode = math.e, False, None  # of a pickle that has none

    def __init__(
        self,
        heads: int,
        base: float = NO_BASE,
        *,
        bias: bool = False,
        mode: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(heads)
        check_positive("base", base, above=1.0)
        check_bool("bias", bias)
        self.base, self.bias, self.mode = base, bias, mode
        if starts_at_sqrt_dim(mode):
            if base != math.e:
                raise ValueError(f"base: expected none with mode='sqrt_dim', which starts at b = 1, got {base}")
            self._learn(device, dtype, s=0.0, b=1.0)
            return
        warn_without_base(self.name, base)
        if bias:
            self._learn(device, dtype, s=1 / math.log(base), b=0.0)
        else:
            self._learn(device, dtype, s=1 / math.log(base))
            self.register_parameter("b", None)

    def extra_repr(self) -> str:
        start = f"base={self.base:g}" if self.mode is None else f"mode={self.mode!r}"
        return f"heads={self.heads}, {start}, bias={self.b is not None}"

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        query = self.per_head(self.s, q) * counts_of(visibility).clamp(min=1).log()  # [B, Hq, Sq]
        if self.b is not None:
            query = query + self.per_head(self.b, q)
        return Scales(q.shape[-1] ** -0.5, query=query)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        n = visible.sum(-1, keepdim=True).double()
        s = self.per_head(self.s, q)[..., None]  # [Hq, 1, 1]
        b = 0 if self.b is None else self.per_head(self.b, q)[..., None]
        return (s * math.log(2) * torch.where(n > 0, n, 1).log2() + b) / math.sqrt(k.shape[-1])


def scaling_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of every `Scaling` inside a module, each once: those to optimise without weight decay.

    A model's own parameters that `parameters=` has tied to a scaling are among them.

    Raises:
        TypeError: A value that is not a module.

    >>> import tritonattn
    >>> layer = tritonattn.nn.ScaledAttention(64, heads=4, scaling="ssmax:64")
    >>> [tuple(parameter.shape) for parameter in tritonattn.nn.scaling_parameters(layer)]
    [(4,)]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type_of(module)}")
    seen: set[nn.Parameter] = set()
    for part in module.modules():
        if isinstance(part, Scaling):
            ties = part.ties.values() if isinstance(part, Learned) else ()
            for parameter in (*part.parameters(), *(tie.parameter for tie in ties)):
                if parameter is not None and parameter not in seen:
                    seen.add(parameter)
                    yield parameter


def starts_at_sqrt_dim(mode: Any) -> bool:
    """True for "sqrt_dim", False for None, the paper's start. Raises ValueError for anything else."""
    if mode is not None and not (isinstance(mode, str) and mode == "sqrt_dim"):
        raise ValueError(f"mode: expected 'sqrt_dim' or None, got {mode!r}")
    return mode is not None


def as_mode(mode: str | Scaling) -> Scaling:
    """A name in SCALINGS, or a Scaling, as a Scaling."""
    if isinstance(mode, str):
        return named_scaling(mode)
    if not isinstance(mode, Scaling):
        refuse_scaling(mode, "a name or a Scaling")
    return mode


def describe(mode: Scaling) -> str:
    """A mode as an argument in a module's repr: its name, or its repr where it has settings."""
    plain = type(mode).__repr__ is object.__repr__
    return getattr(mode, "name", type(mode).__name__) if plain else repr(mode)


def listed(*modes: Scaling) -> str:
    """Modes at the head of a module's repr, without those that are modules, which have lines themselves."""
    return "".join(f"{describe(mode)}, " for mode in modes if not isinstance(mode, nn.Module))
