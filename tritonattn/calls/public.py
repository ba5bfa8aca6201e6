"""The one decorator of the public functions and layers, and its hints for words of other libraries."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.hints import hint_for_keyword
from ..core.torch_distributed import TORCHS_ATTENTION, refuse_context_parallel
from ..scaling.names import hint_for_argument
from .dtensors import Axes, call_of_parts

P = ParamSpec("P")
R = TypeVar("R")



def public(
    axes: Mapping[str, Axes] | None = None, paged: Mapping[str, Axes] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: an argument that the function does not take raises a TypeError with a hint; the signature stays.

    axes, paged   the axes of batch and heads in the arguments, and where there is a block table: DTensors then become
                  this rank's parts, and the results DTensors placed as q is; under torch's context_parallel the
                  function raises
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> R:
            try:
                if axes is not None:
                    if F.scaled_dot_product_attention is not TORCHS_ATTENTION:
                        refuse_context_parallel(function.__name__)
                    tensors: Any = sys.modules.get("torch.distributed.tensor")
                    if tensors is not None:
                        for value in (*arguments, *keywords.values()):  # no generator: every call asks
                            if type(value) is tensors.DTensor:
                                return call_of_parts(function, signature, axes, paged, arguments, keywords)
                return function(*arguments, **keywords)
            except TypeError:
                is_layer = function.__name__ == "forward"
                made = inspect.signature(type(arguments[0])).parameters if is_layer else {}
                hint = _hint_for(arguments, keywords, signature.parameters, made)
                if hint is None:
                    raise
            raise TypeError(f"{function.__qualname__.removesuffix('.__init__')}: {hint}")

        return call

    return decorate


_ADDED = "what it adds: key_bias=, relative_bias= or, in `attention`, bias="

# Words of F.scaled_dot_product_attention, flash-attn, xformers and FlexAttention: the argument that stands for each (""
# if none is needed), and what it takes. A function without that argument has the hint of that argument's name.
_HINTS = {
    "is_causal": ("causal", "bottom-right, where PyTorch's is top-left"),
    "causal": ("", "a row attends to the keys up to its position"),
    "attn_mask": (
        "mask",
        "bool, True is visible, in nn.MultiheadAttention hidden; key_lengths and key_ranges cost less; floats: bias=",
    ),
    "mask": ("key_lengths", "[B]: the number of keys of each sequence, padding after them"),
    "key_lengths": (
        "cu_seqlens_k",
        "rows see the keys of their sequence, as causal= and window= narrow them; masks with holes are for `attention`",
    ),
    "attn_bias": ("bias", "a number a pair, broadcastable to [B, Hq, Sq, Sk]; key_bias= and relative_bias= cost less"),
    "position_bias": ("relative_bias", "a number a distance, on the last axis; `attention` has bias=, a number a pair"),
    "rel_pos": ("relative_bias", "a number a distance, on the last axis"),
    "bias": ("relative_bias", "a number a distance; key_bias= takes a number a key"),
    "relative_bias": ("key_bias", "a number a key, [B, H, Sk], added to logits"),
    "alibi_slopes": ("key_bias", "tritonattn.nn.ALiBi(heads)(Sk), in causal attention; in others relative_bias="),
    "scale": ("scaling", "a float is the factor itself"),
    "sm_scale": ("scaling", "a float is the factor itself"),
    "softmax_scale": ("scaling", "a float is the factor itself"),
    "mode": ("scaling", "a name in SCALINGS, a Scaling or a float"),
    "scaling": ("scale", "a float"),
    "base": ("scaling", 'a mode with its base, such as "log_key_count:64"'),
    "enable_gqa": ("", "k may have fewer heads than q, whose number they divide"),
    "window_size": ("window", "a pair: left, right"),
    "logits_soft_cap": ("softcap", "a number above 0"),
    "embed_dim": ("width", "features of x"),
    "num_heads": ("heads", "query heads"),
    "num_kv_heads": ("kv_heads", "a divisor of heads"),
    "key_padding_mask": ("key_lengths", "[B]: the number of keys of each sequence, padding after them"),
    "dropout": ("dropout_p", "a number in [0, 1)"),
    "p": ("dropout_p", "a number in [0, 1)"),
    "deterministic": ("", "every call is; backend='flash' under torch.use_deterministic_algorithms(True)"),
    "cache_seqlens": ("key_lengths", "the new keys included"),
    "return_attn_probs": ("return_aux", "lse, largest logit and entropy"),
    "need_weights": ("return_aux", "lse, largest logit and entropy; the weights are never in memory"),
    "return_lse": ("return_aux", "lse, largest logit and entropy"),
    "k_descale": ("", "8-bit keys and values are for attention_decode, and attention_varlen with a block_table"),
    "v_descale": ("k_descale", ""),
    "block_mask": ("key_ranges", "[lo, hi) of every row; or mask"),
    "score_mod": ("query_scale", f"and key_scale=, its factors; {_ADDED}"),
    "v": ("", "q and k are enough"),
    "relative_scale": ("scaling", "a Scaling with Scales(relative=); `scaled_attention` has relative_scale="),
    "query_scale": ("scaling", f"a Scaling, or factors; {_ADDED}"),
}

# What to write for a required argument that is missing.
_REQUIRED = {
    "key_lengths": "[B]: keys of each sequence in the cache, the new ones included; of a full one torch.full((B,), Sk)"
}

# The argument that a value without a name is for, by its type; of a tensor, by whether it is a mask.
_BY_TYPE = {bool: "causal", str: "scaling", True: "mask", False: "bias"}


def _hint_for(
    arguments: Sequence[Any], keywords: Mapping[str, Any], known: Mapping[str, Parameter], made: Mapping[str, Parameter]
) -> str | None:
    """The hint for arguments that are not among the `known` ones of a function; None where all are.

    made   the arguments of the constructor, of a layer's forward
    """
    unknown = [word for word in keywords if word not in known]
    of_mode = (hint_for_argument(keywords.get("scaling"), word, keywords[word]) for word in unknown)
    if (hint := next(filter(None, of_mode), None)) is not None:
        return hint
    hints = (_hint(word, known, made) or hint_for_keyword(word, known) for word in unknown)
    if (hint := next(filter(None, hints), None)) is not None:
        return hint
    for name in _REQUIRED:
        if name in known and name not in keywords and known[name].default is Parameter.empty:
            return f"expected {name}= ({_REQUIRED[name]}), got none"
    return _hint_for_order(arguments, known)


def _hint(word: str, known: Any, made: Any = ()) -> str | None:
    ours, note, passed = word, "", set()
    while ours not in known and ours not in made:
        passed.add(ours)
        ours, note = _HINTS.get(ours, (None, ""))
        if ours is None or ours in passed:  # scale and scaling each stand for the other
            return None
        if not ours:
            return f"expected no {word}=: {note}"
    wanted = f"{ours}= ({note})" if note else f"{ours}="
    where = ("", "") if ours in known else (" in the constructor", " in a call")
    return f"expected {wanted}{where[0]}, got {word}={where[1]}"


def _hint_for_order(arguments: Sequence[Any], known: Mapping[str, Parameter]) -> str | None:
    """The hint for arguments without a name beyond those that may come so, or None."""
    ordered = [name for name, one in known.items() if one.kind is Parameter.POSITIONAL_OR_KEYWORD]
    if len(arguments) <= len(ordered):
        return None
    first = arguments[len(ordered)]
    if ordered == ["q", "k"] and isinstance(first, Tensor):
        return _hint("v", known)
    name = _BY_TYPE.get(first.dtype == torch.bool if isinstance(first, Tensor) else type(first), "")
    value = "..." if isinstance(first, Tensor) else repr(first)
    example = f", such as {name}={value}" if name in known else ""
    if "context" in ordered:
        example = "; context is keys and values, and a layer without it attends to x"
    names = [name for name in ordered if name != "self"]
    got = len(arguments) - len(ordered) + len(names)
    return f"expected at most {len(names)} positional arguments ({', '.join(names)}), got {got}; name the rest{example}"
