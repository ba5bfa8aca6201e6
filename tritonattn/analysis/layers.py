"""The attention layers of a model, each with the operands of a call, to be diagnosed with any mode."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.checks import INTEGERS
from ..core.norms import key_norms_of
from ..core.observation import ObservedCall
from ..core.visibility import Visibility
from ..integrations.finder import Finder, evaluating
from ..nn import ScaledAttention
from ..nn.registry import grows_with_keys, largest_base
from ..scaling import Given, Scaling
from ..scaling.names import named_scaling
from .diagnosis import Diagnosis, diagnose
from .gaps import layer_power, power_of
from .operands import is_normalised, rotary_of
from .rules import Reading
from .tally import counted_rows
from .watch import Calls

VISIBLE = ("causal", "window", "key_lengths", "key_ranges", "mask")
# The norm of the keys in transformers' models: Qwen 3, Gemma 3, OLMo 2; Phi; HunYuan; Idefics 2; Llama 4.
_KEY_NORMS = {"k_norm", "k_layernorm", "key_layernorm", "k_layer_norm", "qk_norm"}
_CONSTANT = {"sqrt_dim", "dim", "none", "cosine"}


@dataclass(frozen=True)
class Kind:
    """A layer as its model describes it; `Reading` has the words.

    window       the most keys that its rows attend to; None of other layers, and where that is not said
    qk_norm      it normalises q and k before the call
    has_factor   the model's code multiplies q by a factor that grows with n
    """

    rotary: bool | None = None
    windowed: bool = False
    window: int | None = None
    qk_norm: bool = False
    has_factor: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """The operands of one attention call, to be diagnosed with any mode.

    relative    the model's factor with any mode, see `huggingface.patch`; None is 1
    untrained   the model is at its start; `Reading` has the words
    """

    name: str
    q: Tensor
    k: Tensor
    scaling: Any
    gain: Any
    relative: Any
    visible: dict[str, Any]
    context: int | None
    softcap: float | None = None
    kind: Kind = Kind()
    untrained: bool = False

    @cached_property
    def seen(self) -> Visibility:
        return Visibility.of(self.q, self.k, **self.visible)

    def read(self, mode: str | None) -> Reading:
        """Diagnose the layer with a mode; None is its present scaling."""
        scaling, gain = self.scaling, self.gain
        if mode is not None:
            scaling = named_scaling(mode)
            gain = None if scaling.normalises_query else self.relative
        found = diagnose(self.q, self.k, scaling=scaling, gain=gain, softcap=self.softcap, **self.visible)
        longest = int(self.seen.counts().max())
        name = _name(self.scaling) if mode is None else mode
        scaling = named_scaling(scaling) if isinstance(scaling, str) else scaling
        return Reading(
            layer=self.name,
            mode=name,
            **_means(found),
            key_norm_between=_between_sequences(self.k, self.seen),
            causal=_is_causal(self.seen),
            longest=longest,
            context=self.context,
            power=power_of(*layer_power(found.count_power, found.count_power_error)),
            bounded=self._bounded(scaling),
            windowed=self.kind.windowed or int(self.seen.seen_keys().sum(-1).max()) > longest,
            window=self.kind.window,
            base=largest_base(scaling),
            rotary=self.kind.rotary,
            constant=not self.kind.has_factor and name.partition("(")[0].partition(":")[0] in _CONSTANT,
            grows=self.kind.has_factor or grows_with_keys(scaling),
            untrained=self.untrained,
        )

    def _bounded(self, scaling: Any) -> str:
        """Name what bounds the logits."""
        if getattr(scaling, "normalises_query", False):
            return "cosine"
        return "QK-norm" if self.kind.qk_norm else "" if self.softcap is None else f"softcap {self.softcap:g}"


def read_layers(model: Any, tokens: Any, context: int | None, each: Callable[[Layer], None]) -> None:
    """Run a model on tokens in evaluation, and hand on every attention that tritonattn, or transformers, computes.

    context   the length of the model's training; None is its config's max_position_embeddings
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, or q of one layer, got {type(model).__name__}")
    if context is None:
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    is_ours, untrained, found = not _can_be_patched(model), _is_untrained(model), 0
    inputs = _inputs(tokens, is_ours)

    def hand_on(module: nn.Module, q: Tensor, k: Tensor, arguments: dict[str, Any], kind: Kind) -> None:
        nonlocal found
        found += 1
        visible = without_padding(q, k, {part: arguments[part] for part in arguments.keys() & set(VISIBLE)})
        scaling, gain, softcap = (arguments.get(name) for name in ("scaling", "gain", "softcap"))
        relative = gain
        if not isinstance(scaling, (str, Scaling)):  # a float of the model's
            relative = scaling * q.shape[-1] ** 0.5 * (1.0 if gain is None else gain)
        each(Layer(names[id(module)], q, k, scaling, gain, relative, visible, context, softcap, kind, untrained))

    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    for calls_of_torch in (nullcontext(), Finder(model, "sqrt_dim", None, "auto").finding([])):
        with evaluating(model), calls_of_torch:
            if is_ours:
                observed = _observed_calls(model, _positions(model, inputs), hand_on)
            else:
                observed = _observed_transformers(model, hand_on)
            with observed:
                _run(model, inputs)
        if found:
            return
    raise ValueError(
        "model: expected attention by tritonattn.attention, by F.scaled_dot_product_attention, or by layers that"
        " huggingface.patch takes, got none from these inputs"
    )


def _can_be_patched(model: nn.Module) -> bool:
    """True of a model of transformers without layers of ours. Raises NotImplementedError where no layer can be."""
    is_ours = any(isinstance(one, ScaledAttention) for one in model.modules())
    if is_ours or "transformers" not in sys.modules:  # then no model is one of transformers
        return False
    from ..huggingface.architecture import attention_modules, refuse_unsupported

    found = [one for one in attention_modules(model) if one.inner is not None or one.obstacle is None]
    refuse_unsupported(model, found)
    return bool(found)


@contextmanager
def _observed_transformers(model: Any, hand_on: Callable[..., None]) -> Iterator[None]:
    from ..huggingface import patch, patched
    from ..huggingface.architecture import attention_modules
    from ..huggingface.kinds import is_global, is_rotary, window_size
    from ..huggingface.scalings import modes_in_model

    with ExitStack() as contexts:
        handle = patched(model)
        if handle is None:
            handle = contexts.enter_context(patch(model, "sqrt_dim"))
        found = {id(one.module): one for one in attention_modules(model)}

        def observe(module: nn.Module, q: Tensor, k: Tensor, arguments: dict[str, Any], aux: Any) -> None:
            one = found[id(module)]
            kind = Kind(
                rotary=is_rotary(one),
                windowed=is_global(one) is False,
                window=window_size(one),
                qk_norm=_has_key_norm(module),
                has_factor=bool(modes_in_model(one.config)),
            )
            hand_on(module, q, k, arguments, kind)

        contexts.enter_context(handle.watch(observe))
        yield


@contextmanager
def _observed_calls(model: nn.Module, rotary: list[bool | None], hand_on: Callable[..., None]) -> Iterator[None]:
    """Hand on the calls of tritonattn in their order, with what `rotary` says of each."""
    count = itertools.count()

    def observe(name: str, module: nn.Module, one: ObservedCall) -> None:
        number, visible = next(count), one.visibility
        if visible.sequences is not None:
            raise NotImplementedError("tokens: expected sequences in rows of their own, got packed ones")
        kind = Kind(
            rotary=rotary[number] if number < len(rotary) else None,
            windowed=visible.left is not None,
            window=_keys_of_window(visible),
            qk_norm=_has_key_norm(module) or (is_normalised(one.q) and is_normalised(one.k)),
        )
        terms = {
            "scaling": _constant_or(one.request.scaling),
            "gain": one.request.gain,
            "softcap": one.request.terms.softcap,
        }
        masks = {name: getattr(visible, name) for name in ("key_lengths", "key_ranges", "mask")}
        hand_on(module, one.q, one.k, {**terms, **masks, "window": (visible.left, visible.right)}, kind)

    with Calls(model, observe):
        yield


def _positions(model: nn.Module, inputs: Any) -> list[bool | None]:
    """Say of every call of a model whether q and k are turned by positions, from a run on one token repeated.

    Tokens that are not ids may bring positions along: there a layer has none only where others are rotary.
    """
    found: list[bool | None] = []

    def observe(name: str, module: nn.Module, one: ObservedCall) -> None:
        known = isinstance(module, ScaledAttention) and module.rotary is not None
        found.append(True if known else rotary_of(one))

    repeated, are_ids = _repeated(inputs)
    with Calls(model, observe):
        _run(model, repeated)
    return found if are_ids or True in found else [True if one else None for one in found]


def _is_causal(seen: Visibility) -> bool:
    """True where no row attends to keys of later positions."""
    if seen.mask is not None:
        return not bool(seen.dense().triu(1 + seen.k_len - seen.q_len).any())
    lo, hi = seen.ranges()
    last = torch.arange(1, hi.shape[-1] + 1, device=hi.device) + seen.k_len - seen.q_len
    return bool((hi <= last)[hi > lo].all())


def _keys_of_window(visible: Visibility) -> int | None:
    """The most keys of a row in a window of two sides; None without."""
    return None if visible.left is None or visible.right is None else 1 + visible.left + visible.right


def _has_key_norm(module: nn.Module) -> bool:
    children = module.named_children()
    return any(name in _KEY_NORMS and not isinstance(child, nn.Identity) for name, child in children)


def _is_untrained(model: nn.Module) -> bool:
    """True where each norm's weights, some of which are trained, are alike, as all are made; False without such."""
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    weights = [weight for norm in norms for weight in norm.parameters(recurse=False) if weight.numel() > 1]
    return any(one.requires_grad for one in weights) and all(bool((one == one.flatten()[0]).all()) for one in weights)


def _constant_or(scaling: Any) -> Any:
    """The float of a call with one; other scalings as they are."""
    if isinstance(scaling, Given) and scaling.given.query is None and scaling.given.key is None:
        return scaling.given.constant
    return scaling


def _inputs(tokens: Any, is_ours: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if is_ours and not isinstance(tokens, Mapping):
        return (tokens,), {}
    inputs = dict(tokens) if isinstance(tokens, Mapping) else {"input_ids": tokens}
    for name in ("cu_seqlens", "cache"):
        if is_ours and inputs.get(name) is not None:
            raise NotImplementedError(f"tokens: expected sequences in rows of their own, got {name}")
    ids = inputs.get("input_ids")
    if "input_ids" in inputs and (not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in INTEGERS):
        raise TypeError(f"tokens: expected token ids, int [B, S], or inputs by name, got {_described(ids)}")
    return (), inputs


def _repeated(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, bool]:
    """The inputs with the first of the tokens, their first tensor, at all positions; True where they are ids."""
    args, keywords = inputs
    named: dict[Any, Any] = {**dict(enumerate(args)), **keywords}
    first = next((name for name, x in named.items() if isinstance(x, Tensor) and x.dim() > 1), None)
    if first is None:
        return inputs, False
    x = named[first]
    named[first] = x[:, :1].expand_as(x).contiguous()
    return (tuple(named.pop(number) for number in range(len(args))), named), x.dtype in INTEGERS


def _run(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Run a model on its inputs; an error of the model names them."""
    args, keywords = inputs
    try:
        model(*args, **keywords)
    except (NotImplementedError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        got = ", ".join([*map(_described, args), *(f"{name} {_described(x)}" for name, x in keywords.items())])
        raise ValueError(f"tokens: expected inputs that {type(model).__name__} takes, got {got}: {error}") from error


def _described(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def without_padding(q: Tensor, k: Tensor, visible: dict[str, Any]) -> dict[str, Any]:
    """Visibility arguments that hide all keys from rows of padding."""
    seen = Visibility.of(q, k, **visible)
    rows = counted_rows(seen)
    if seen.depends_on_sizes_only or rows.shape[1] > 1:
        return visible
    lo, hi = seen.ranges()
    hi = torch.where(rows[:, 0], hi, lo)
    ranges = torch.stack(torch.broadcast_tensors(lo, hi), dim=-1).expand(q.shape[0], -1, -1)
    return {name: x for name, x in visible.items() if name == "mask"} | {"key_ranges": ranges}


def _means(found: Diagnosis) -> dict[str, float]:
    names = [field.name for field in dataclasses.fields(Reading) if hasattr(found, field.name)]
    means = {name: float(getattr(found, name).mean()) for name in names}
    return {**means, "max_logit": float(found.max_logit.amax()), "gap": float(found.gap.amax())}


def _between_sequences(k: Tensor, seen: Visibility) -> float:
    """Standard deviation over mean of the sequences' mean key norms, averaged over the heads."""
    visible = seen.seen_keys().expand(seen.keys)  # [B, Hkv, Sk]
    norms = key_norms_of(k, visible).double()
    count = visible.sum(-1)
    means = torch.where(visible, norms, 0).sum(-1) / count.clamp(min=1)  # [B, Hkv]
    means = means[(count > 0).all(1)]
    if means.shape[0] < 2:
        return 0.0
    return float((means.std(0, correction=0) / means.mean(0)).nan_to_num().mean())


def _name(scaling: Any) -> str:
    if isinstance(scaling, str):
        return scaling
    return scaling.name if isinstance(scaling, Scaling) else "sqrt_dim"  # a float is the model's factor
