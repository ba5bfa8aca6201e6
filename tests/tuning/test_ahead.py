"""A kernel that was compiled ahead of time is found by a launch: both ask Triton's cache for the same key.

The JIT of Triton takes the launches of public calls, on a driver that has no card, up to where it compiles.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.driver import driver

import tritonattn
from tests.support.caches import cached_call
from tests.support.packed import Packed
from tests.support.pages import paged_call
from tritonattn.backends import triton as triton_backend
from tritonattn.backends.triton import KERNELS, device, launch, records
from tritonattn.backends.triton import compile as ahead
from tritonattn.tuning import Problem, Target, TileConfig, compile_kernel, default_config

pytestmark = pytest.mark.skipif(
    launch.interpreting or torch.cuda.is_available(), reason="the JIT is not asked, or has another driver"
)
SM_80 = GPUTarget("cuda", 80, 32)
NAMES = {function: name for name, function in KERNELS.items()}
HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32


def a_driver() -> SimpleNamespace:
    """The part of a driver, of a new device, that Triton's JIT uses before it launches."""
    device, stream = object(), 0
    return SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: stream,
        get_current_target=lambda: SM_80,
    )


def key_of(source: Any, options: dict[str, Any]) -> str:
    """The part of a cache key that depends on the launch; the rest is that of the compiler."""
    return source.hash() + make_backend(SM_80).parse_options(dict(options)).hash()


@pytest.fixture
def keys(monkeypatch) -> dict[str, set[str]]:
    """By kernel, the keys that launches ask for, and under "ahead" the last that was compiled ahead."""
    found: dict[str, set[str]] = {name: set() for name in KERNELS}
    compiler = triton.compiler.compile

    def asked(source, target, options, **_):
        found[NAMES[source.fn]].add(key_of(source, options))
        return source

    def asked_ahead(source, target, options):
        assert target == SM_80
        return key_of(source, options)

    def run(kernel, grid, arguments, config) -> None:
        options = device.compile_options(config, arguments.get("INVARIANT", False))
        kernel.run(grid=grid, warmup=True, **arguments, **options)
        if "argmax_ptr" in arguments:
            arguments["argmax_ptr"].zero_()  # torch takes it for positions of keys

    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", a_driver())
    monkeypatch.setattr(triton.compiler, "compile", asked)
    monkeypatch.setattr(ahead.triton, "compile", asked_ahead)
    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "config_for", default_config)
    yield found
    for function in KERNELS.values():  # the JIT keeps the compiler that it found
        function.compile = compiler


def tensor(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point)


def attend(dtype: torch.dtype, heads: int = 2, **options: Any) -> None:
    """A training call of 64 tokens with scales, all of whose gradients are asked for."""
    q, k, v = (tensor(2, of, 64, 64, dtype=dtype) for of in (heads, 2, 2))
    scales = tensor(2, heads, 64), tensor(2, 2, 64)
    result = tritonattn.scaled_attention(q, k, v, *scales, causal=True, backend="triton", **options)
    if options.get("return_aux"):
        result[1].lse.backward(torch.ones(2, heads, 64), retain_graph=True)
        result = result[0]
    result.backward(torch.ones_like(result))


def differentiate_tangent() -> None:
    tensors, tangents = ([tensor(2, 2, 64, 64, dtype=HALF) for _ in range(3)] for _ in range(2))
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, tensors, tangents)
        out = forward_ad.unpack_dual(tritonattn.attention(*duals, causal=True, backend="triton")).tangent
        out.backward(torch.ones_like(out))


def infer() -> None:
    q, k, v = (tensor(2, heads, 64, 64, dtype=BFLOAT).detach() for heads in (4, 2, 2))
    tritonattn.attention(q, k, v, scaling="key_norm_mean", window=(20, 0), backend="triton")


def pack() -> None:
    ends = torch.tensor([0, 20, 64], dtype=torch.int32)
    q, k, v = (tensor(64, 2, 64, dtype=HALF) for _ in range(3))
    out = tritonattn.attention_varlen(q, k, v, ends, ends, 64, 64, causal=True, backend="triton")
    out.backward(torch.ones_like(out))


def decode(page: int | None) -> None:
    """A token each of two sequences, 16 heads of which share a key head."""
    q = torch.zeros(2, 32, 1, 64, dtype=HALF)
    cache, table = torch.zeros(2, 2, 1024, 64, dtype=HALF), None
    if page is not None:
        cache = torch.zeros(2048 // page, page, 2, 64, dtype=HALF)
        table = torch.arange(2048 // page, dtype=torch.int32).view(2, -1)
    lengths = torch.tensor([1000, 3], dtype=torch.int32)
    gain = torch.ones(2, 32, 1)
    tritonattn.attention_decode(q, cache, cache, key_lengths=lengths, block_table=table, gain=gain, backend="triton")


def pages() -> None:
    """Ragged rows over pages, whose numbers are those of no other launch here."""
    packed = Packed((7, 1, 30), (60, 33, 30))
    call, _ = paged_call(packed, HALF, 48, heads=(4, 2), dims=(64, 64), terms=("key_scale",), causal=True)
    triton_backend.forward(call, aux=False)
    k, v, table = call.k.transpose(1, 2), call.v.transpose(1, 2), call.block_table
    cached = cached_call(torch.zeros(3, 32, 1, 64, dtype=HALF), k, v, table[:, 0], table.repeat(1, 8), table[:, 1])
    triton_backend.decode(cached, aux=False)


def append() -> None:
    counts, lengths = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2, 1025)
    sums = [torch.zeros(2, 2, 1026, dtype=torch.float64) for _ in range(2)]
    buffers = (counts, lengths, *sums, torch.zeros(2, 2, 1026))
    triton_backend.append_keys(torch.zeros(2, 2, 16, 64, dtype=HALF), None, buffers)


def append_in_pages() -> None:
    statistics = tritonattn.PagedKeyStatistics(9, 20, 2)
    table, ends = torch.zeros(1, 3, dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    k, lengths = torch.zeros(5, 2, 64, dtype=HALF), torch.tensor([33])
    triton_backend.append_to_pages(k, ends, lengths, table, statistics.buffers)


def largest() -> None:
    q, k, v = (tensor(2, 2, 64, 64) for _ in range(3))
    tritonattn.attention(q, k, v, scaling="key_norm_max", causal=True, backend="triton").sum().backward()


def few_key_heads() -> None:
    """Call with so many rows that they are split."""
    q, k, v = tensor(1, 8, 2048, 64, dtype=HALF), *(tensor(1, 1, 64, 64, dtype=HALF) for _ in range(2))
    tritonattn.attention(q, k, v, backend="triton").sum().backward()


def unaligned() -> None:
    """Call with rows that are copied nowhere, since batch entries share them."""
    q = torch.zeros(1, 2, 64, 66, dtype=HALF)[..., :64].expand(2, 2, 64, 64)
    tritonattn.attention(q, q, q, backend="triton")


def everything() -> None:
    mask = torch.ones(2, 4, 64, 64, dtype=torch.bool)
    attend(FULL, 4, softcap=1.0, sinks=tensor(4), dropout_p=0.5, mask=mask, return_aux=True)


def narrowed() -> None:
    ranges, lengths = torch.tensor([3, 60], dtype=torch.int32).expand(2, 64, 2), torch.tensor([50, 64])
    attend(BFLOAT, key_ranges=ranges, key_lengths=lengths)


def problem(options: str, dtype: torch.dtype = HALF) -> Problem:
    return Problem(64, 64, dtype, **dict.fromkeys(options.split(), True))


TRAINED = "right query_scale key_scale query_scale_grad"
STREAMING = Problem(1, 1, FULL, right=True)
BACKWARD = "forward row_terms grad_query grad_key_value"
# A call, and the kernels of its problems.
CALLS: dict[str, tuple[Callable[[], None], dict[Problem, str]]] = {
    "training": (lambda: attend(HALF), {problem(f"{TRAINED} rounding"): BACKWARD}),
    "everything": (everything, {problem(f"{TRAINED} grouped softcap sinks dropout mask aux", FULL): BACKWARD}),
    "narrowed": (
        narrowed,
        {
            problem(f"{TRAINED} rounding key_lengths key_ranges", BFLOAT): BACKWARD,
            replace(STREAMING, key_lengths=True, key_ranges=True): "row_bounds keys_seen",
        },
    ),
    "packed": (pack, {problem("right sequences rounding"): BACKWARD}),
    "tangents": (differentiate_tangent, {problem("right rounding"): "tangent grad_query_second grad_key_value_second"}),
    "few key heads": (few_key_heads, {problem("grouped"): "sum_of_splits"}),
    "unaligned": (unaligned, {replace(problem(""), aligned=False): "forward"}),
    "largest": (largest, {problem("", FULL): "key_statistics key_statistics_grad", STREAMING: "argmax_of_ranges"}),
    "sums": (infer, {problem("right left grouped query_scale", BFLOAT): "forward", STREAMING: "prefix_sums"}),
    "decode": (lambda: decode(None), {problem("query_scale grouped"): "decode combine_splits"}),
    "append in pages": (append_in_pages, {STREAMING: "append_to_pages"}),
    "append": (append, {problem(""): "append_keys"}),
    "pages": (lambda: decode(16), {problem("query_scale grouped block_table"): "decode"}),
    "ragged pages": (
        pages,
        {
            problem("right key_scale grouped sequences block_table"): "forward",
            problem("grouped sequences block_table"): "decode",
        },
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of torch's derivatives
@pytest.mark.parametrize("name", CALLS)
def test_a_launch_asks_for_what_was_compiled_ahead(name, keys):
    call, compiled = CALLS[name]
    call()
    for one, kernels in compiled.items():
        for kernel in kernels.split():
            assert compile_kernel(kernel, one) in keys[kernel], f"{kernel}, of {len(keys[kernel])} launched"


def test_every_kernel_is_compared():
    compared = {kernel for _, compiled in CALLS.values() for one in compiled.values() for kernel in one.split()}
    assert compared == set(KERNELS)


def test_pages_of_any_number_and_size_have_one_code():
    config, sources = TileConfig(64, 32, 4, 2), set()
    asked = ahead.launch_of("forward", problem("sequences block_table"), config, Target("cuda", "90"))
    for pages in (1, 32, 33), (16, 17, 2048), (10, 48, 1), (3, 2**17, 5), (3, 2**16, 5):
        table = torch.empty(3, pages[2], dtype=torch.int32, device="meta")
        arguments = {**asked.arguments, "pages": records.pages_of(table, *pages[:2])}
        options = device.compile_options(config)
        sources.add(ahead.specialised(asked.kernel, arguments, options, GPUTarget("cuda", 90, 32)).hash())
    assert len(sources) == 1
