"""Keyword arguments: those of other libraries, whose error names ours, and our own in every overload."""

import inspect
import re
import warnings
from functools import partial

import pytest
import torch
from typing_extensions import get_type_hints

import tritonattn
from tritonattn.backends import BACKENDS
from tritonattn.calls import dispatch, options
from tritonattn.calls.public import _HINTS
from tritonattn.core.hints import warn_once
from tritonattn.distributed import context_parallel, context_parallel_attention, context_parallel_decode, decode

FUNCTIONS = (
    tritonattn.attention,
    tritonattn.scaled_attention,
    tritonattn.attention_varlen,
    tritonattn.attention_decode,
)
LAYER = tritonattn.nn.ScaledAttention
FUNCTIONS += (LAYER.__init__, LAYER.forward, context_parallel_attention, context_parallel_decode)
Q = torch.ones(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("function", "keywords", "message"),
    [
        ("attention", {"is_causal": True}, "attention: expected causal= (bottom-right, where PyTorch's is top-left)"),
        ("attention", {"scale": 0.1}, "attention: expected scaling= (a float is the factor itself), got scale="),
        ("attention", {"attn_mask": Q}, "attention: expected mask= (bool, True is visible"),
        ("attention", {"attn_bias": Q}, "attention: expected bias= (a number a pair"),
        ("attention", {"alibi_slopes": Q}, "attention: expected key_bias= (tritonattn.nn.ALiBi(heads)(Sk)"),
        ("attention", {"score_mod": Q}, "attention: expected scaling= (a Scaling, or factors; what it adds: key_bias="),
        ("attention", {"relative_scale": Q}, "attention: expected scaling= (a Scaling with Scales(relative=); `sca"),
        ("attention_varlen", {"bias": Q}, "attention_varlen: expected relative_bias= (a number a distance; key_bias="),
        (
            partial(context_parallel_attention, Q, Q, Q, mesh=0),
            {"bias": Q},
            "context_parallel_attention: expected key_b",
        ),
        ("attention", {"dropout_p": 0.0, "enable_gqa": True}, "attention: expected no enable_gqa=: k may have fewer"),
        ("attention", {"window_size": (3, 0)}, "attention: expected window= (a pair: left, right), got window_size="),
        ("scaled_attention", {"softmax_scale": 0.1}, "scaled_attention: expected scale= (a float), got softmax_scale="),
        ("attention_decode", {"cache_seqlens": Q}, "attention_decode: expected key_lengths="),
        ("attention_decode", {"is_causal": True}, "attention_decode: expected no is_causal=: a row attends to the k"),
        ("attention_decode", {"attn_mask": Q}, "attention_decode: expected key_lengths= ([B]: the number of keys"),
        (
            "attention_decode",
            {},
            "attention_decode: expected key_lengths= ([B]: keys of each sequence in the cache, the",
        ),
        ("attention_varlen", {"attn_mask": Q}, "attention_varlen: expected cu_seqlens_k= (rows see the keys of their"),
        (
            "attention_varlen",
            {"mask": Q},
            "attention_varlen: expected cu_seqlens_k= (rows see the keys of their sequence",
        ),
        (
            "attention_varlen",
            {"sm_scale": 0.1},
            "attention_varlen: expected scaling= (a float is the factor itself), got",
        ),
        ("attention", {"sm_scale": 0.1}, "attention: expected scaling= (a float is the factor itself), got sm_scale="),
        ("attention", {"need_weights": True}, "attention: expected return_aux= (lse, largest logit and entropy; the"),
        (
            "attention",
            {"scaling": "log_key_count", "base": 64},
            'attention: expected scaling=tritonattn.SCALINGS["log_key_count"](base=64) or "log_key_count:64", got',
        ),
        (
            "attention",
            {"scaling": "log_power", "power": 2},
            'attention: expected scaling=tritonattn.SCALINGS["log_power"](power=2), got power=',
        ),
        ("attention", {"base": 64}, 'attention: expected scaling= (a mode with its base, such as "log_key_count:64")'),
        (partial(LAYER, 8, 2), {"scaling": "ssmax", "base": 64}, 'ScaledAttention: expected scaling="ssmax:64", got'),
        ("attention", {"casual": True}, "attention: expected causal=, got casual="),
        (partial(LAYER, 8), {"head": 2}, "ScaledAttention: expected heads=, got head="),
        ("attention", {"of_none": 1}, "attention() got an unexpected keyword argument 'of_none'"),
        ("attention", {"scaling": [1]}, "scaling: expected a name, a Scaling, a float or a tensor, got list"),
        (partial(LAYER, 8), {"num_heads": 2}, "ScaledAttention: expected heads= (query heads), got num_heads="),
        (partial(LAYER(8, 2), Q), {"attn_mask": Q}, "ScaledAttention.forward: expected mask="),
        (
            partial(LAYER(8, 2), Q),
            {"causal": True},
            "ScaledAttention.forward: expected causal= in the constructor, got causal= in a call",
        ),
        (
            partial(LAYER(8, 2), Q),
            {"is_causal": True},
            "ScaledAttention.forward: expected causal= (bottom-right, where PyTorch's is top-left) in the constructor",
        ),
        (partial(LAYER(8, 2), Q), {"softmax_scale": 1.0}, "ScaledAttention.forward: expected scaling= (a float"),
        (partial(LAYER(8, 2), Q), {"cu_seqlens_q": Q}, "ScaledAttention.forward: expected cu_seqlens="),
        ("attention", {"key_padding_mask": Q}, "attention: expected key_lengths= ([B]: the number of keys of each seq"),
        ("attention", {"mode": "dim"}, "attention: expected scaling= (a name in SCALINGS, a Scaling or a float), got"),
    ],
)
def test_a_word_of_another_library_is_answered_with_ours(function, keywords, message):
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        (function if callable(function) else partial(getattr(tritonattn, function), Q, Q, Q))(**keywords)


@pytest.mark.parametrize(
    ("function", "more", "message"),
    [
        ("attention", [True], "attention: expected at most 3 positional arguments (q, k, v), got 4; name the rest, such"
         " as causal=True"),
        ("attention", [Q > 0, 0.0], "(q, k, v), got 5; name the rest, such as mask=..."),
        ("attention", ["dim"], "such as scaling='dim'"),
        ("attention", [None], "(q, k, v), got 4; name the rest"),
        (partial(LAYER(4, 2), Q[0]), [Q[0], Q[0]], "(x, context), got 3; name the rest; context is keys and values,"),
        (partial(LAYER, 8, 2), [1], "ScaledAttention: expected at most 2 positional arguments (width, heads), got 3"),
    ],
)  # fmt: skip
def test_an_argument_without_its_name_is_given_one(function, more, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        (function if callable(function) else partial(getattr(tritonattn, function), Q, Q, Q))(*more)


def test_every_mode_with_arguments_has_hints():
    modes = [*tritonattn.SCALINGS.values(), *tritonattn.nn.LEARNED.values(), tritonattn.nn.QueryAdaptiveSSMax]
    for mode in modes:
        if inspect.signature(mode).parameters:
            with pytest.raises(TypeError, match=f"^{mode.__name__}: expected .*, got of_none="):
                mode(of_none=1)


def test_every_hint_names_an_argument():
    known = {name for function in FUNCTIONS for name in inspect.signature(function).parameters}
    assert {ours for ours, _ in _HINTS.values()} <= known | {""}


def test_a_warning_names_the_line_that_calls(monkeypatch):
    warn_once.cache_clear()
    monkeypatch.setattr(dispatch, "choose", lambda *_: warn_once("another backend") or BACKENDS["sdpa"])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        tritonattn.attention(Q, Q, Q)
    assert [one.filename for one in found] == [__file__]


OPTIONS_OF = {
    tritonattn.attention: options.Options,
    tritonattn.scaled_attention: options.ScaledOptions,
    tritonattn.attention_varlen: options.VarlenOptions,
    tritonattn.attention_decode: options.DecodeOptions,
    context_parallel_attention: context_parallel.ParallelOptions,
    context_parallel_decode: decode.ParallelDecodeOptions,
}


@pytest.mark.parametrize("function", OPTIONS_OF, ids=lambda function: function.__name__)
def test_options_are_the_arguments_by_name(function):
    """So that every overload has all of them, of the same type, whatever return_aux is."""
    hints, options = get_type_hints(function), get_type_hints(OPTIONS_OF[function])
    named = {name: one for name, one in inspect.signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert options == {name: hints[name] for name in named if name in options}
    assert {name for name, one in named.items() if one.default is not one.empty} <= {*options, "return_aux"}
