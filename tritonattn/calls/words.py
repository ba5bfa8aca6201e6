"""Hints for keyword arguments that belong to the attention functions of other libraries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Words of F.scaled_dot_product_attention, flash-attn, xformers and FlexAttention: the argument that stands for each (""
# if none is needed), and what it takes. A function without that argument has the hint of the argument's own name.
_HINTS = {
    "is_causal": ("causal", "bottom-right, where PyTorch's is top-left"),
    "causal": ("", "a row sees the keys up to its own"),
    "attn_mask": ("mask", "bool, True is visible; key_lengths and key_ranges cost less; of floats, bias="),
    "mask": ("key_lengths", "[B]: the number of keys of each sequence"),
    "attn_bias": ("bias", "a number a pair, broadcastable to [B, Hq, Sq, Sk]; key_bias= and relative_bias= cost less"),
    "position_bias": ("relative_bias", "a number a distance, [B, Hq, Sq, extent]; or bias=, a number a pair"),
    "rel_pos": ("relative_bias", "a number a distance, [B, Hq, Sq, extent]"),
    "bias": ("relative_bias", "a number a distance; key_bias= takes a number a key"),
    "relative_bias": ("key_bias", "a number a key, [B, H, Sk], added to logits"),
    "alibi_slopes": ("key_bias", "tritonattn.nn.ALiBi(heads)(Sk), in causal attention; in others relative_bias="),
    "scale": ("scaling", "a float is the factor itself"),
    "softmax_scale": ("scaling", "a float is the factor itself"),
    "scaling": ("scale", "a float"),
    "enable_gqa": ("", "k may have fewer heads than q, whose number they divide"),
    "window_size": ("window", "(left, right)"),
    "logits_soft_cap": ("softcap", "a number above 0"),
    "embed_dim": ("width", "features of x"),
    "num_heads": ("heads", "query heads"),
    "num_kv_heads": ("kv_heads", "a divisor of heads"),
    "key_padding_mask": ("key_lengths", "[B]: the number of keys of each sequence"),
    "dropout": ("dropout_p", "a number in [0, 1)"),
    "p": ("dropout_p", "a number in [0, 1)"),
    "deterministic": ("", "every call is"),
    "cache_seqlens": ("key_lengths", "the new keys included"),
    "return_attn_probs": ("return_aux", "lse, largest logit and entropy"),
    "return_lse": ("return_aux", "lse, largest logit and entropy"),
    "block_mask": ("key_ranges", "[lo, hi) of every row; or mask"),
    "score_mod": ("scaling", "a Scaling, or factors; what it adds: key_bias=, relative_bias= or bias="),
}


def hint_for(keywords: Iterable[str], known: Any) -> str | None:
    """The hint for the first keyword that another library has and `known` has not, or None."""
    return next(filter(None, (_hint(word, known) for word in keywords)), None)


def _hint(word: str, known: Any) -> str | None:
    if word in known or word not in _HINTS:
        return None
    ours, note = _HINTS[word]
    while ours and ours not in known:
        if ours not in _HINTS:
            return None
        ours, note = _HINTS[ours]
    return f"expected {ours}= ({note}), got {word}=" if ours else f"expected no {word}=: {note}"
