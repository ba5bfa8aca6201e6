"""The overloads of the public functions have every argument, of the same type, whatever return_aux is."""

import inspect

import pytest
from typing_extensions import get_type_hints

import tritonattn
from tritonattn.calls import options
from tritonattn.distributed import context_parallel, context_parallel_attention, context_parallel_decode, decode

FUNCTIONS = {
    tritonattn.attention: options.Options,
    tritonattn.scaled_attention: options.ScaledOptions,
    tritonattn.attention_varlen: options.VarlenOptions,
    tritonattn.attention_decode: options.DecodeOptions,
    context_parallel_attention: context_parallel.ParallelOptions,
    context_parallel_decode: decode.ParallelDecodeOptions,
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_options_are_the_arguments_by_name(function):
    hints, options = get_type_hints(function), get_type_hints(FUNCTIONS[function])
    named = {name: one for name, one in inspect.signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert options == {name: hints[name] for name in named if name in options}
    assert {name for name, one in named.items() if one.default is not one.empty} <= {*options, "return_aux"}
