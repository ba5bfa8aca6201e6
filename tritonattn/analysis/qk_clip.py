"""QK-clip: shrink a head's projections of q and k when its logits have grown too large."""

from __future__ import annotations

import itertools
import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.hints import shortened
from ..core.torch_distributed import is_dtensor, local, rows_of_rank, twin, whole
from ..integrations.torch_modules import MultiheadAttention
from ..nn import ScaledAttention
from ..scaling import Scaling
from ..scaling.base import reads_distances
from .alarms import Alarm
from .over_ranks import gathered, rank_and_size

_NORM = re.compile(r"(q|k|qk|query|key)_?(layer)?_?norm(alization)?")
_PAIRS = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"))


@dataclass(frozen=True, eq=False)
class Rows:
    """Weight and bias of a linear layer, outputs first, and the factor of each output: fp64, of ones at first.

    A weight may be a DTensor, sharded in any way: factors are whole on every rank.
    """

    tensors: tuple[Tensor, ...]
    factor: Tensor

    @classmethod
    def of(cls, *tensors: Tensor) -> Rows:
        return cls(tensors, torch.ones(tensors[0].shape[0], dtype=torch.float64, device="cpu"))

    def multiply(self) -> None:
        """Multiply in place, with one rounding to the tensors' dtype."""
        if bool((self.factor == 1).all()):
            return
        for x in self.tensors:
            factor, x = rows_of_rank(x, self.factor), local(x)
            x.copy_(x.double() * factor.to(x.device).reshape(-1, *(1,) * (x.dim() - 1)))


@dataclass(frozen=True)
class Projections:
    """The projections of q and k in one attention module.

    rows           of all the layers that project q and k
    query, key     views of the rows' factors by head, [H, d]
    scaling        as in `tritonattn.attention`; None is the model's factor
    query_alone    more of q: features that meet keys which all heads share
    """

    rows: tuple[Rows, ...]
    query: tuple[Tensor, ...]
    key: tuple[Tensor, ...]
    scaling: Any
    query_alone: tuple[Tensor, ...] = ()


class QKClip:
    """QK-clip of a model, see `qk_clip`: a function of a Monitor's alarms, or of logits by `clip`.

    skipped   the layers that cannot be clipped, with the reason

    >>> import tritonattn
    >>> from tritonattn.analysis import qk_clip
    >>> qk_clip(tritonattn.nn.ScaledAttention(32, heads=4)).skipped
    {}
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        self.model, self.threshold = model, threshold
        self.skipped: dict[str, str] = {}
        layers = _attention_layers(model)
        for name, module in layers.items():
            try:
                _plan(module, None)
            except (NotImplementedError, ValueError) as error:
                self.skipped[name] = str(error)
        if len(self.skipped) == len(layers):
            reasons = _by_reason(self.skipped) or f"it holds no {_KNOWN} and no attention of transformers"
            raise NotImplementedError(f"model: QK-clip cannot clip a layer of this {type(model).__name__}: {reasons}")
        if self.skipped:
            warnings.warn(f"qk_clip: these layers will not be clipped: {_by_reason(self.skipped)}", stacklevel=3)

    def __call__(self, alarms: Sequence[Alarm]) -> dict[str, Tensor]:
        """Clip the layers whose alarm is of max_logit, and return what `clip` returns.

        Alarms of a Monitor are the same on every rank.
        It never ends a training: a layer that cannot be clipped is left as it is, with one warning.
        """
        clipped = {}
        for one in alarms:
            if one.measure != "max_logit" or one.layer in self.skipped:
                continue
            try:
                clipped.update(self._clip({one.layer: one.heads}))
            except (NotImplementedError, ValueError) as error:
                self.skipped[one.layer] = str(error)
                warnings.warn(f"qk_clip: a layer will not be clipped: {error}", RuntimeWarning, stacklevel=2)
        return clipped

    def clip(self, max_logits: Mapping[str, Any]) -> dict[str, Tensor]:
        """Clip layers by name, as a Monitor names them, from the largest logit [Hq] of each head.

        None, NaN and infinity leave a head as it is. Under torch.distributed every rank calls, and the largest logit is
        that of all ranks.

        Returns:
            gamma, fp64 [Hq], of the layers in which a head was clipped.

        Raises (before any weight is changed):
            NotImplementedError: A layer that cannot be clipped, and why.
            ValueError: A name that no module has, or another number of logits.
        """
        everyone = gathered(dict(max_logits)) if rank_and_size()[1] > 1 else [max_logits]
        names = dict.fromkeys(name for one in everyone for name in one)
        return self._clip({name: _largest([one[name] for one in everyone if name in one]) for name in names})

    @torch.no_grad()
    def _clip(self, max_logits: Mapping[str, Any]) -> dict[str, Tensor]:
        modules = {name: _module(self.model, name) for name in max_logits}
        found = {name: self._gamma(values) for name, values in max_logits.items()}
        found = {name: gamma for name, gamma in found.items() if bool((gamma < 1).any())}
        plans = []
        for name, gamma in found.items():
            try:
                plans += _plan(modules[name], gamma)
            except (NotImplementedError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
        for rows in plans:
            rows.multiply()
        return found

    def _gamma(self, values: Any) -> Tensor:
        largest = torch.tensor([math.nan if value is None else float(value) for value in values]).double()
        gamma = (self.threshold / largest).clamp(max=1)
        return torch.where((largest > self.threshold) & largest.isfinite(), gamma, 1.0)


def qk_clip(model: nn.Module, threshold: float = 100.0) -> QKClip:
    """QK-clip (Kimi K2, arXiv:2507.20534), as `Monitor(..., on_alarm=qk_clip(model, threshold))`.

        gamma_h = min(1, threshold / S_h)        S_h the largest logit of head h in the step
        W_q, W_k of head h  *=  sqrt(gamma_h)    and their biases; with shared key heads W_q *= gamma_h, W_k is left

    Afterwards the logits of head h are gamma_h times what they were, and those of the other heads are as they were.
    Query heads that share a key head (GQA, MQA) would all shrink with its W_k, so W_q alone gives each its
    gamma. The same holds for scalings that divide by the norms of keys (key_norm_sum and its like): their logits do
    not depend on the size of W_k.

    Latent attention (DeepSeek's) has both features, and is clipped as in the paper: where each head has its keys
    (nope), W_q and W_k *= sqrt(gamma_h); where they share one (rope), W_q *= gamma_h.

    Several ranks (DDP, FSDP2, tensor parallelism): all clip alike, from the largest logits of all, whatever part of the
    weights each holds.

    Weights only: the optimizer's state stays, as in the paper. Give the Monitor a threshold of no more than this one:
    `Thresholds(max_logit=threshold)`.

    Layers: `tritonattn.nn.ScaledAttention`, `integrations.torch_modules.MultiheadAttention`, and those of transformers
    with q_proj and k_proj (Llama, Mistral, OPT, Whisper, ...), query and key (BERT, ViT), q_lin and k_lin (DistilBERT),
    qkv_proj (Phi-3), c_attn (GPT-2) or kv_b_proj (latent attention: DeepSeek-V2 and V3, Kimi K2).

    Layers that cannot be clipped are named in a warning here, and are left as they are later: QK-norm, whose result
    does not depend on the size of the weights before it; a scaling whose factor depends on q (cosine,
    QueryAdaptiveSSMax, ...); projections that are quantised, adapted, gated or of another layout.

    Raises:
        NotImplementedError: A model without a layer that can be clipped, and why.
        TypeError: A model that is not a module.
        ValueError: A threshold that is not positive.

    >>> import torch, tritonattn
    >>> from tritonattn.analysis import qk_clip
    >>> model = torch.nn.ModuleDict({"attention": tritonattn.nn.ScaledAttention(32, heads=4)})
    >>> qk_clip(model, 50.0).clip({"attention": [10.0, 100.0, 50.0, 200.0]})
    {'attention': tensor([1.0000, 0.5000, 1.0000, 0.2500], dtype=torch.float64)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
        raise ValueError(f"threshold: expected a positive number, got {threshold!r}")
    return QKClip(model, threshold)


_KNOWN = "tritonattn.nn.ScaledAttention, no tritonattn.integrations.torch_modules.MultiheadAttention"


def _attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that a Monitor watches and whose class is known, by its names."""
    known = (ScaledAttention, MultiheadAttention)
    found: dict[str, nn.Module] = {
        _name(name, module): module for name, module in model.named_modules() if isinstance(module, known)
    }
    if "transformers" in sys.modules:
        from ..huggingface.architecture import attention_modules

        modules = [one for one in attention_modules(model) if one.obstacle is None]
        found.update({_name(one.name, one.module): one.module for one in modules})
    return found


def _name(name: str, module: nn.Module) -> str:
    return name or type(module).__name__  # as a Monitor names the root


def _module(model: nn.Module, name: str) -> nn.Module:
    if name == type(model).__name__:
        return model
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"max_logits: expected names of layers, got {name!r}") from error


def _by_reason(skipped: dict[str, str]) -> str:
    """Layers and reasons in a line, each reason once."""
    layers: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        layers.setdefault(reason, []).append(name)
    return "; ".join(f"{shortened(names)}: {reason}" for reason, names in layers.items())


def _largest(values: list[Any]) -> list[float]:
    """The largest number per head that a rank has seen; NaN where none has. Ranks with another number keep all."""
    rows = [[math.nan if x is None else float(x) for x in one] for one in values]
    longest = max(rows, key=len)
    known = [[x for x in column if not math.isnan(x)] for column in itertools.zip_longest(*rows, fillvalue=math.nan)]
    return [max(column, default=math.nan) for column in known][: len(longest)]


def _plan(module: nn.Module, gamma: Tensor | None) -> tuple[Rows, ...]:
    """The rows to multiply, with their factors; none without gamma. Raises for a layer that cannot be clipped."""
    found = _projections(module)
    degree = _degree_in_keys(found)
    if gamma is None:
        return ()
    heads, kv_heads = found.query[0].shape[0], found.key[0].shape[0]
    if gamma.shape[0] != heads:
        raise ValueError(f"expected {heads} largest logits, got {gamma.shape[0]}")
    both = degree == 1 and heads == kv_heads
    for factors in (*found.query, *(found.key if both else ())):
        factors.mul_((gamma.sqrt() if both else gamma)[:, None])
    for factors in found.query_alone:
        factors.mul_(gamma[:, None])
    return found.rows


def _degree_in_keys(found: Projections) -> int:
    """The degree of the logits in k, by the formula: 1 if doubling k doubles them, 0 if it leaves them unchanged.

    Raises NotImplementedError if the logits are not proportional to q, or depend on the size of k in another way.
    """
    scaling: Any = found.scaling
    if isinstance(scaling, nn.Module) and is_dtensor(*scaling.parameters()):
        scaling = twin(scaling, whole)
    if not isinstance(scaling, Scaling):
        return 1
    parameters = list(scaling.parameters()) if isinstance(scaling, nn.Module) else []
    device = parameters[0].device if parameters else "cpu"
    generator = torch.Generator().manual_seed(0)
    sizes = 1, found.query[0].shape[0], 4, sum(rows[0].shape[1] for rows in (found.query, found.query_alone) if rows)
    q, k = (torch.randn(sizes, dtype=torch.float64, generator=generator).to(device) for _ in range(2))
    visible = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=device).tril()

    def factor(q: Tensor, k: Tensor) -> Tensor:
        found = torch.as_tensor(scaling.multiplier(q, k, visible), dtype=torch.float64, device=device)
        return torch.where(visible, found, 0)  # factors of invisible pairs may be anything

    with torch.enable_grad():
        one = factor(q.requires_grad_(), k)
        by_q = torch.autograd.grad(one.sum(), q, allow_unused=True)[0] if one.requires_grad else None
    other_q, other_k = factor(2 * q, k), factor(q, 2 * k)
    is_biased = scaling.addend(q, k, visible) is not None or reads_distances(scaling, q)
    if by_q is None and not is_biased and torch.allclose(other_q, one, rtol=1e-4):  # a weight of q may still be 0
        if torch.allclose(other_k, one, rtol=1e-4):
            return 1
        if torch.allclose(2 * other_k, one, rtol=1e-4):
            return 0
    raise NotImplementedError(
        f"QK-clip does not work with the scaling {getattr(scaling, 'name', type(scaling).__name__)}: its logits"
        " are not proportional to q"
    )


def _projections(module: Any) -> Projections:
    _refuse_norms(module)
    if isinstance(module, MultiheadAttention):
        return _of_multihead_attention(module)
    heads, kv_heads, head_dim, scaling = _description(module)
    sizes = heads * head_dim, kv_heads * head_dim
    for query, key in _PAIRS:
        if hasattr(module, query) and hasattr(module, key):
            q, k = _rows(module, query, sizes[0]), _rows(module, key, sizes[1])
            return Projections((q, k), _by_head(q.factor, heads), _by_head(k.factor, kv_heads), scaling)
    if hasattr(module, "kv_b_proj"):
        return _of_latent_attention(module, heads, scaling)
    for fused in ("qkv_proj", "c_attn"):
        if hasattr(module, fused):
            rows = _rows(module, fused, sizes[0] + 2 * sizes[1])
            q, k = rows.factor[: sizes[0]], rows.factor[sizes[0] : sum(sizes)]
            return Projections((rows,), _by_head(q, heads), _by_head(k, kv_heads), scaling)
    raise NotImplementedError(
        "expected projections named q_proj and k_proj, query and key, q_lin and k_lin, qkv_proj, c_attn or"
        f" kv_b_proj, got a {type(module).__name__} without them"
    )


def _description(module: Any) -> tuple[int, int, int, Any]:
    """Hq, Hkv, D and the scaling of an attention module."""
    if isinstance(module, ScaledAttention):
        return module.heads, module.kv_heads, module.head_dim, module.scaling
    if "transformers" in sys.modules:
        from ..huggingface import Settings
        from ..huggingface.architecture import head_dim, interface_keywords, key_heads, query_heads

        if interface_keywords(type(module)) is not None and (dim := head_dim(module)) is not None:
            return query_heads(module), key_heads(module), dim, Settings.of(module).scaling
    raise NotImplementedError(f"QK-clip does not know the layout of {type(module).__name__}")


def _refuse_norms(module: nn.Module) -> None:
    for child, norm in module.named_children():
        if _NORM.fullmatch(child) and not isinstance(norm, nn.Identity):
            raise NotImplementedError(
                f"QK-clip does nothing before a norm of q and k, got {child} ({type(norm).__name__}); lower"
                " that norm's weight, or give the layer a gain"
            )


def _rows(module: Any, child: str, outputs: int) -> Rows:
    """The rows of a linear layer with that number of outputs. Raises NotImplementedError for any other layer."""
    layer: Any = getattr(module, child, None)
    name_of_type = type(layer).__name__
    if type(layer) is nn.Linear:
        weight = layer.weight
    elif name_of_type == "Conv1D" and isinstance(layer.weight, nn.Parameter):  # transformers': [in, out]
        weight = layer.weight.t()
    else:
        raise NotImplementedError(f"QK-clip: expected a plain linear layer as {child}, got {name_of_type}")
    if not weight.is_floating_point():
        raise NotImplementedError(f"QK-clip: expected floating weights in {child}, got {weight.dtype}")
    if weight.shape[0] != outputs:
        raise NotImplementedError(
            f"QK-clip: expected {outputs} outputs of {child}, got {weight.shape[0]}: it holds more than heads"
        )
    return Rows.of(weight) if layer.bias is None else Rows.of(weight, layer.bias)


def _by_head(factor: Tensor, heads: int) -> tuple[Tensor]:
    return (factor.unflatten(0, (heads, -1)),)


def _of_latent_attention(module: Any, heads: int, scaling: Any) -> Projections:
    """Each head has `nope` rows of W_q for its keys, which kv_b_proj makes; its other rows meet a shared key."""
    query = "q_b_proj" if getattr(module, "q_b_proj", None) is not None else "q_proj"
    nope = module.qk_nope_head_dim
    q = _rows(module, query, heads * (nope + module.qk_rope_head_dim))
    kv = _rows(module, "kv_b_proj", heads * (nope + module.v_head_dim))
    (of_q,), (of_kv,) = _by_head(q.factor, heads), _by_head(kv.factor, heads)
    return Projections((q, kv), (of_q[:, :nope],), (of_kv[:, :nope],), scaling, (of_q[:, nope:],))


def _of_multihead_attention(module: Any) -> Projections:
    """q and k of one fused weight or of two; a bias is fused."""
    width, heads = module.embed_dim, module.num_heads
    fused = [x for x in (module.in_proj_weight, module.in_proj_bias) if x is not None]
    apart = () if module.in_proj_weight is not None else (module.q_proj_weight, module.k_proj_weight)
    rows = (*((Rows.of(*fused),) if fused else ()), *map(Rows.of, apart))
    of_q, of_k = [rows[0].factor[:width]] if fused else [], [rows[0].factor[width : 2 * width]] if fused else []
    if apart:
        of_q, of_k = [*of_q, rows[-2].factor], [*of_k, rows[-1].factor]
    query, key = (tuple(x for one in views for x in _by_head(one, heads)) for views in (of_q, of_k))
    return Projections(rows, query, key, module.scaling)
