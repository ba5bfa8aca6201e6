"""The attention layers of a model, each with the operands of a call, to be diagnosed with any mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.checks import INTEGERS
from ..core.errors import install
from ..core.norms import key_norms_of
from ..core.visibility import Visibility
from ..nn import ScaledAttention
from ..scaling import Scaling
from ..scaling.names import named_scaling
from .diagnosis import Diagnosis, diagnose
from .gaps import layer_power, power_of
from .rules import Reading
from .tally import counted_rows

VISIBLE = ("causal", "window", "key_lengths", "key_ranges", "mask")
# The norm of the keys in transformers' models: Qwen 3, Gemma 3, OLMo 2; Phi; HunYuan; Idefics 2; Llama 4.
_KEY_NORMS = {"k_norm", "k_layernorm", "key_layernorm", "k_layer_norm", "qk_norm"}
_CONSTANT = {"sqrt_dim", "dim", "none", "cosine"}


@dataclass(frozen=True)
class Kind:
    """A layer as its model describes it; `Reading` has the words.

    qk_norm      it normalises q and k before the call
    has_factor   the model's code multiplies q by a factor that grows with n
    """

    rotary: bool | None = None
    windowed: bool = False
    qk_norm: bool = False
    has_factor: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """The operands of one attention call, to be diagnosed with any mode.

    relative   the model's factor with any mode, see `huggingface.patch`; None is 1
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
        lo, hi = self.seen.ranges()
        last = torch.arange(1, hi.shape[-1] + 1, device=hi.device) + self.seen.k_len - self.seen.q_len
        name = _name(self.scaling) if mode is None else mode
        return Reading(
            layer=self.name,
            mode=name,
            **_means(found),
            key_norm_between=_between_sequences(self.k, self.seen),
            causal=bool((hi <= last)[hi > lo].all()),
            longest=longest,
            context=self.context,
            power=power_of(*layer_power(found.count_power, found.count_power_error)),
            bounded=self._bounded(scaling),
            windowed=self.kind.windowed or int(self.seen.seen_keys().sum(-1).max()) > longest,
            rotary=self.kind.rotary,
            constant=not self.kind.has_factor and name.partition("(")[0].partition(":")[0] in _CONSTANT,
        )

    def _bounded(self, scaling: Any) -> str:
        """Name what bounds the logits."""
        mode = named_scaling(scaling) if isinstance(scaling, str) else scaling
        if getattr(mode, "normalises_query", False):
            return "cosine"
        return "QK-norm" if self.kind.qk_norm else "" if self.softcap is None else f"softcap {self.softcap:g}"


def read_layers(model: Any, tokens: Any, context: int | None, each: Callable[[Layer], None]) -> None:
    """Run a model on tokens in evaluation, and hand on every attention layer: ours, or transformers'.

    context   the length of the model's training; None is its config's max_position_embeddings
    """
    if context is None:
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    is_ours = isinstance(model, nn.Module) and any(isinstance(one, ScaledAttention) for one in model.modules())
    observed = _observed_ours if is_ours else _observed_transformers
    found = 0

    def hand_on(module: nn.Module, q: Tensor, k: Tensor, arguments: dict[str, Any], kind: Kind) -> None:
        nonlocal found
        found += 1
        visible = without_padding(q, k, {part: arguments[part] for part in arguments.keys() & set(VISIBLE)})
        scaling, gain, softcap = (arguments.get(name) for name in ("scaling", "gain", "softcap"))
        relative = gain
        if not isinstance(scaling, (str, Scaling)):  # a float of the model's
            relative = scaling * q.shape[-1] ** 0.5 * (1.0 if gain is None else gain)
        each(Layer(names[id(module)], q, k, scaling, gain, relative, visible, context, softcap, kind))

    with observed(model, hand_on):
        names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
        with _evaluating(model), torch.no_grad():
            _run(model, _inputs(tokens, is_ours))
    if not found:
        raise ValueError("model: expected one that computes attention from these inputs, got none")


@contextmanager
def _observed_transformers(model: Any, hand_on: Callable[..., None]) -> Iterator[None]:
    try:
        from ..huggingface import patch, patched
        from ..huggingface.architecture import attention_modules
        from ..huggingface.kinds import is_global, is_rotary
        from ..huggingface.scalings import modes_in_model
    except ImportError as error:
        raise ImportError(f"advise needs transformers for a model: {install('hf')}") from error
    with ExitStack() as contexts:
        handle = patched(model) if isinstance(model, nn.Module) else None
        if handle is None:
            handle = contexts.enter_context(patch(model, "sqrt_dim"))
        found = {id(one.module): one for one in attention_modules(model)}

        def observe(module: nn.Module, q: Tensor, k: Tensor, arguments: dict[str, Any], aux: Any) -> None:
            one, children = found[id(module)], module.named_children()
            qk_norm = any(name in _KEY_NORMS and not isinstance(child, nn.Identity) for name, child in children)
            kind = Kind(is_rotary(one), is_global(one) is False, qk_norm, bool(modes_in_model(one.config)))
            hand_on(module, q, k, arguments, kind)

        contexts.enter_context(handle.watch(observe))
        yield


@contextmanager
def _observed_ours(model: nn.Module, hand_on: Callable[..., None]) -> Iterator[None]:
    """A layer without rotary positions has none where others have: else the tokens may bring theirs along."""
    layers = [one for one in model.modules() if isinstance(one, ScaledAttention)]
    some_rotary = any(one.rotary is not None for one in layers)

    def observe(layer: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = {**dict(zip(("x", "context"), args, strict=False)), **keywords}
        for name in ("cu_seqlens", "cache"):
            if given.get(name) is not None:
                raise NotImplementedError(f"tokens: expected sequences in rows of their own, got {name}")
        q, k, _ = layer.operands(given["x"], given.get("context"))
        plain = type(layer).positioned is ScaledAttention.positioned
        rotary = True if layer.rotary is not None else False if some_rotary and plain else None
        own = {name: getattr(layer, name) for name in ("causal", "window", "scaling", "softcap")}
        hand_on(layer, q, k, own | given, Kind(rotary, qk_norm=not isinstance(layer.k_norm, nn.Identity)))

    with ExitStack() as contexts:
        for layer in layers:
            contexts.callback(layer.register_forward_pre_hook(observe, with_kwargs=True).remove)
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _inputs(tokens: Any, is_ours: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if is_ours and not isinstance(tokens, Mapping):
        return (tokens,), {}
    inputs = dict(tokens) if isinstance(tokens, Mapping) else {"input_ids": tokens}
    ids = inputs.get("input_ids")
    if "input_ids" in inputs and (not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in INTEGERS):
        raise TypeError(f"tokens: expected token ids, int [B, S], or inputs by name, got {_described(ids)}")
    return (), inputs


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
