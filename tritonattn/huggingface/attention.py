"""transformers' attention interface on top of `tritonattn.attention`."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..calls.attention import attention
from ..calls.results import AttentionAux
from ..calls.varlen import attention_varlen
from ..core.autograd import values_are_read
from ..core.invariance import refuse_over_ranks
from ..core.private_names import attribute
from ..core.torch_distributed import context_parallel
from ..scaling import Scaling, SqrtDim
from ..scaling.base import reads_distances, relative_gain
from .architecture import query_heads
from .masks import is_packed, key_range_mask, packed_arguments, visible_arguments
from .settings import Settings, layer_scaling

NAME = "tritonattn"
_ULYSSES = "deepspeed.runtime.sequence_parallel.ulysses_sp"

# Keyword arguments that change the result and are not supported.
_REFUSED = {
    "relative_position_bias": "a bias under this name",
    "indices": "sparse key indices",
    "block_indices": "sparse block indices",
    "head_mask": "a mask of whole heads",
    "block_table": "a paged cache",
    "cache": "a paged cache that the attention function has to read (transformers before 5.24)",
}

_COSTLY = (
    "output_attentions=True: no kernel of tritonattn forms attention weights, so the eager reference does, in O(Q K)"
    " memory a layer"
)
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function for AttentionInterface.

        logit = model_scaling * sqrt(D) * (gain * the mode's factor) * (q . k) + position_bias

    with the scaling and gain of `Settings.of(module)`. model_scaling is the model's `scaling`, by default
    1 / sqrt(D). So "sqrt_dim" gives the model as it was, and factors beyond 1 / sqrt(D), or in q, are kept. A scaling
    that normalises q (cosine) replaces the model's.

    Args:
        module: The attention module that calls.
        query: [B, Hq, Q, D].
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, Dv].
        attention_mask: As `key_range_mask` makes it; int32, bool or floating [B, 1, Q, K or 2], or None.
        scaling: model_scaling in the formula.
        dropout: Chance in [0, 1) to drop a probability.
        kwargs: Further arguments of transformers, such as softcap, s_aux, sinks, sliding_window and position_bias.

    Under torch's context_parallel query, key and value are this rank's part of a sequence: a full causal layer attends
    to all of it, and another one raises. A layer also raises where DeepSpeed's Ulysses has cut sequences for another
    implementation than this one.

    Returns:
        [B, Q, Hq, Dv], and with output_attentions the weights [B, Hq, Q, K], from the reference and with a warning.

    Raises:
        NotImplementedError: An argument that changes the result and is not supported (sparse indices, a paged cache).
    """
    _refuse_ulysses_of_others(module)
    observer, parallel = getattr(layer_scaling(module), "observer", None), context_parallel()
    with_weights = _wants_weights(module, kwargs)
    if is_packed(attention_mask, kwargs) and observer is None and not with_weights:
        if kwargs.get("position_bias") is not None:
            _refuse("position_bias", "a bias of pairs of packed requests", module)
        options = _options(module, query, scaling, dropout, **kwargs)
        if kwargs.get("sinks") is not None:
            options["sinks"] = options["sinks"][0]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # packed requests: no mask of T_q x T_k
        return attention_varlen(q, k, v, **packed_arguments(kwargs), **options)[None], None
    arguments = call_arguments(module, query, key, attention_mask, scaling, dropout, **kwargs)
    weights = _attention_weights(module, query, key, arguments) if with_weights else None
    options = arguments if observer is None else {**arguments, "return_aux": True}
    if parallel is None:
        result = attention(query, key, value, **options)
    else:
        from .context_parallel import over_ranks

        refuse_over_ranks(arguments["batch_invariant"])
        result = over_ranks(module, query, key, value, options, kwargs, parallel)
    if observer is None:
        out = cast(Tensor, result)
    else:
        out, aux = cast(tuple[Tensor, AttentionAux], result)
        observer(module, query, key, arguments, aux)
    return out.transpose(1, 2).contiguous(), weights


def _replaced_by_ulysses() -> list[str]:
    """The implementations for which UlyssesSPAttentionHF stands in."""
    if sys.modules.get(_ULYSSES) is None:
        return []
    return [name for name, one in ALL_ATTENTION_FUNCTIONS.items() if getattr(one, "__module__", "") == _ULYSSES]


# The mark of torch.compiler.assume_constant_result: else a graph holds for one number of imported modules.
_replaced_by_ulysses._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _refuse_ulysses_of_others(module: nn.Module) -> None:
    """Raise where Ulysses stands in for another implementation: this layer would get this rank's part."""
    others = _replaced_by_ulysses()
    if others and NAME not in others:
        raise NotImplementedError(
            f"attention: DeepSpeed's Ulysses shares sequences over ranks in layers of {', '.join(others)}, got a"
            f" {type(module).__name__} of {NAME}: patch all layers, and register_with_transformers(model,"
            f" core_attn_implementation={NAME!r}, ...)"
        )


def call_arguments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float | Tensor | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Translate a call of transformers, as `attention_forward` gets it, into arguments of `tritonattn.attention`.

    Returns:
        Keyword arguments, without query, key and value.

    Raises:
        TypeError, ValueError: A mask, or settings in the config.
        NotImplementedError: An argument that changes the result and is not supported.
    """
    options = _options(module, query, scaling, dropout, **kwargs)
    if kwargs.get("read_index") is not None and attention_mask is None:
        raise NotImplementedError(
            "read_index: continuous batching without masks is not supported by tritonattn in layers that are watched or"
            f" return attention weights, got such a {type(module).__name__}: call"
            " model.set_attn_implementation('sdpa') after patching"
        )
    arguments = {**options, **visible_arguments(module, query, key, attention_mask, kwargs)}
    if query.shape[2] != key.shape[2]:
        _refuse_distances(module, query, key, arguments)
    if position_bias is not None:
        bias = position_bias[..., : key.shape[2]]
        arguments["bias"] = bias if arguments.get("bias") is None else arguments["bias"] + bias
    return arguments


def _options(
    module: nn.Module,
    query: Tensor,
    scaling: float | Tensor | None,
    dropout: float,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The arguments of `tritonattn.attention` but those of visibility and bias."""
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            _refuse(name, meaning, module)
    settings = Settings.of(module)
    gain = settings.gain
    if isinstance(gain, Tensor) and gain.numel() == 1 and gain.requires_grad and query.shape[1] < query_heads(module):
        raise ValueError(  # its gradient would be that of this rank's heads, and be reduced by nobody
            f"gain: expected one value per head, [Hq, 1], under tensor parallelism, which shards it as q, got"
            f" {list(gain.shape)} in {type(module).__name__}"
        )
    return {
        **scaling_arguments(settings, scaling, query.shape[-1]),
        "softcap": softcap,
        "sinks": s_aux if sinks is None else _sinks_of_tokens(module, query, s_aux, sinks),
        "dropout_p": dropout,
        "backend": settings.backend,
        "batch_invariant": settings.batch_invariant,
    }


def _refuse_distances(module: nn.Module, query: Tensor, key: Tensor, arguments: dict[str, Any]) -> None:
    """Raise where a scaling of distances would count them from other keys than the rows': those of a static cache."""
    shown = arguments.get("key_ranges", arguments.get("mask"))
    scaling = arguments["scaling"]
    if shown is None or not isinstance(scaling, Scaling) or not reads_distances(scaling, query):
        return
    at_the_end = shown[..., -1, 1] == key.shape[2] if "key_ranges" in arguments else shown[..., -1, -1]
    if not values_are_read(shown, waits=True) or not bool(at_the_end.any()):
        _refuse("scaling", f"one of distances, as {type(scaling).__name__}, over a static or compiled cache,", module)


def _sinks_of_tokens(module: nn.Module, query: Tensor, s_aux: Tensor | None, sinks: Tensor) -> Tensor:
    """A sink of each query and head, of [B, Hq, Q, 1] as models have it."""
    if s_aux is not None or sinks.shape != (*query.shape[:3], 1):
        _refuse("sinks", "another sink than one for each query, [B, Hq, Q, 1],", module)
    return sinks[..., 0]


def _refuse(name: str, meaning: str, module: nn.Module) -> NoReturn:
    raise NotImplementedError(
        f"{name}: {meaning} is not supported by tritonattn in {type(module).__name__}; leave the module to"
        " attn_implementation='eager'"
    )


def register(
    name: str = NAME,
    function: AttentionFunction = attention_forward,
    mask_function: Callable[..., Tensor | None] = key_range_mask,
) -> None:
    """Register an attention function with transformers, for `model.set_attn_implementation(name)`; repeatable.

    Importing `tritonattn.huggingface` registers "tritonattn": call this only for another name or function.

    Args:
        name: The attention implementation.
        function: As `attention_forward`.
        mask_function: As `key_range_mask`. Without one transformers would pass no mask, even with padding.

    >>> from tritonattn.huggingface import attention_forward, register, unregister
    >>> def in_float32(module, query, key, value, *arguments, **options):
    ...     operands = (x.float() for x in (query, key, value))
    ...     out, weights = attention_forward(module, *operands, *arguments, **options)
    ...     return out.to(query.dtype), weights
    >>> register("tritonattn_float32", in_float32)
    >>> unregister("tritonattn_float32")
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)


def unregister(name: str = NAME) -> None:
    """Undo `register`, by name. Models that still use the name fail at their next call."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        attribute(interface, "transformers.AttentionInterface._global_mapping").pop(name, None)


def scaling_arguments(settings: Settings, model_scaling: float | Tensor | None, head_dim: int) -> dict[str, Any]:
    """Arguments scaling and gain, so that logit = model_scaling * sqrt(D) * gain * factor * (q . k)."""
    scaling, gain = settings.scaling, settings.gain
    if scaling is None or type(scaling) is SqrtDim:  # exactly the model's
        if isinstance(model_scaling, Tensor):
            return {"scaling": 1.0, "gain": model_scaling if gain is None else model_scaling * gain}
        return {"scaling": "sqrt_dim" if model_scaling is None else float(model_scaling), "gain": gain}
    return {"scaling": scaling, "gain": relative_gain(scaling, model_scaling, head_dim, gain)}


def note_wanted_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a patched module that does not pass output_attentions on: keep its value."""
    arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    layer_scaling(module).weights_wanted = bool(arguments.get("output_attentions"))


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """True where the model is asked for attention weights: by argument, by config, or by a recording hook."""
    layer = layer_scaling(module)
    configs = (getattr(module, "config", None), getattr(layer, "shared", None))
    if kwargs.get("output_attentions") or getattr(layer, "weights_wanted", False):
        return True
    if any(getattr(config, "output_attentions", False) for config in configs):
        return True
    # transformers may drop the argument and record the modules' results instead: up to 4.57 by replacing their
    # forward, later by hooks that write into a collector.
    forward = module.__dict__.get("forward")
    if getattr(getattr(forward, "__code__", None), "co_name", None) == "wrapped_forward":
        return True
    recorder = getattr(getattr(utils, "output_capturing", None), "_active_collector", None)
    if recorder is None or torch.compiler.is_compiling():
        return False
    return any("attentions" in name for name in recorder.get() or ())


def _attention_weights(module: nn.Module, query: Tensor, key: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Weights [B, Hq, Q, K] in query's dtype, before dropout: the reference's result for unit vectors as values."""
    if not torch.compiler.is_compiling():
        warnings.warn(f"{type(module).__name__}: {_COSTLY}", stacklevel=3)
    keys = key.shape[2]
    unit = torch.eye(keys, dtype=key.dtype, device=key.device).expand(*key.shape[:2], keys, keys)
    others = {"dropout_p": 0.0, "backend": "reference", "batch_invariant": False}
    return attention(query, key, unit, **{**arguments, **others})
