"""Try what each backend does, and what it keeps: `python -m docs.probes` prints both tables as JSON.

Kernels run in Triton's interpreter, and "flash" on a stand-in for FlashAttention 4, in bf16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("TRITON_INTERPRET", "1")  # it is read when triton is imported

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from perf.cpu import memory
from tests.support import flash
from tritonattn import attention, attention_decode, attention_varlen

BACKENDS = ("triton", "flash", "sdpa", "reference")
Probe = Callable[[str], None]


def operands(heads=(2, 2), dims=(8, 8), dtype=torch.float32, length=6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, dim: int) -> Tensor:
        return torch.randn(1, count, length, dim, generator=generator).to(dtype).requires_grad_()

    return draw(heads[0], dims[0]), draw(heads[1], dims[0]), draw(heads[1], dims[1])


def dtype_for(backend: str) -> dict[str, torch.dtype]:
    """The operands' dtype where a probe does not say it."""
    return {"dtype": torch.bfloat16 if backend == "flash" else torch.float32}


def close(found, expected, dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype.itemsize > 2 else 0.05
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def run(backend: str, shapes: dict | None = None, **arguments) -> tuple[Tensor, ...]:
    """Output, or output and aux, then gradients of every operand."""
    shapes = shapes or {}
    leaves = list(operands(**shapes))
    leaves += [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    torch.manual_seed(0)
    result = attention(*leaves[:3], backend=backend, **{"scaling": "key_norm_mean", **arguments})
    out, aux = result if isinstance(result, tuple) else (result, None)
    fields = () if aux is None else (aux.lse, aux.max_logit, aux.entropy)
    return out, *fields, *torch.autograd.grad(out.square().sum(), leaves)


def agrees(shapes: dict | None = None, **arguments) -> Probe:
    """A probe: the backend's results are the reference's."""

    def probe(backend: str) -> None:
        given = dtype_for(backend) | (shapes or {})
        close(run(backend, given, **arguments), run("reference", given, **arguments), given["dtype"])

    return probe


def invariant(backend: str) -> None:
    given = dtype_for(backend)
    close(run(backend, given, batch_invariant=True), run("reference", given), given["dtype"])


def lse(backend: str) -> None:
    q, k, v = operands(**dtype_for(backend))
    found, expected = (
        attention(q, k, v, scaling="key_norm_mean", return_aux=True, backend=one)[1].lse
        for one in (backend, "reference")
    )
    close(found, expected, q.dtype)


def varlen(backend: str) -> None:
    q, k, v = (x[0].transpose(0, 1) for x in operands(**dtype_for(backend)))
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    found, expected = (
        attention_varlen(q, k, v, ends, ends, 4, 4, scaling="key_norm_mean", causal=True, backend=one)
        for one in (backend, "reference")
    )
    close(found, expected, q.dtype)


def ragged(backend: str) -> None:
    q, k, v = (x.detach()[0].transpose(0, 1) for x in operands(length=32))
    pages = [x.unflatten(0, (2, 16)).flip(0) for x in (k, v)]
    rows, keys = (torch.tensor([0, ends], dtype=torch.int32) for ends in (5, 32))
    options = {"scaling": "key_norm_mean", "causal": True}
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    found = attention_varlen(q[27:], *pages, rows, keys, 5, 32, block_table=table, backend=backend, **options)
    expected = attention_varlen(q[27:], k, v, rows, keys, 5, 32, backend="reference", **options)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def decode(paged: bool, eight_bit: bool, backend: str) -> None:
    q, k, v = (x.detach() for x in operands(length=32))
    if eight_bit:
        k, v = ((x / 0.02).to(torch.float8_e4m3fn) for x in (k, v))
    pages = {"block_table": torch.tensor([[0, 1]], dtype=torch.int32)} if paged else {}
    caches = [x[0].unflatten(1, (2, 16)).permute(1, 2, 0, 3) if paged else x for x in (k, v)]
    pages |= dict.fromkeys(("k_descale", "v_descale"), 0.02) if eight_bit else {}
    found = attention_decode(
        q[:, :, -1:], *caches, key_lengths=torch.tensor([32]), scaling="key_norm_mean", backend=backend, **pages
    )
    k, v = (x.float() * 0.02 if eight_bit else x for x in (k, v))
    expected = attention(q, k, v, scaling="key_norm_mean", causal=True, backend="reference")[:, :, -1:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def autocast(backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*operands(), backend=backend).dtype == torch.bfloat16


def compiled(backend: str) -> None:
    call = partial(attention, scaling="key_norm_mean", causal=True, backend=backend)
    found = torch.compile(call, backend="aot_eager", fullgraph=True)(*operands())
    torch.testing.assert_close(found, call(*operands()), atol=1e-4, rtol=1e-4)


def transformed(backend: str) -> None:
    q, k, v = (x.detach() for x in operands(**dtype_for(backend)))

    def loss(x: Tensor) -> Tensor:
        return attention(x, k, v, scaling="key_norm_mean", backend=backend).square().sum()

    torch.func.vmap(torch.func.grad(loss))(torch.stack([q, q]))


def second_order(backend: str) -> None:
    q, k, v = operands(**dtype_for(backend))
    out = attention(q, k, v, scaling="key_norm_mean", causal=True, backend=backend)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    torch.autograd.grad(first.sum(), q)


def forward_mode(backend: str) -> None:
    q, k, v = (x.detach() for x in operands(**dtype_for(backend)))
    with forward_ad.dual_level():
        out = attention(forward_ad.make_dual(q, q), k, v, scaling="key_norm_mean", causal=True, backend=backend)
        assert forward_ad.unpack_dual(out).tangent is not None


def pairs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def ranges() -> Tensor:
    return torch.tensor([[0, 2], [1, 3], [0, 6], [2, 2], [3, 6], [0, 1]], dtype=torch.int32)[None]


ROWS: dict[str, list[Probe]] = {
    "fp16, bf16; head dims 1 to 256, Dv different from D": [
        agrees({"dtype": torch.float16, "dims": (1, 1)}),
        agrees({"dtype": torch.bfloat16, "dims": (5, 9)}),
        agrees({"dtype": torch.float16, "dims": (256, 256)}),
    ],
    "fp32; head dims 257 to 512": [agrees({"dtype": torch.float32, "dims": (320, 320)})],
    "fp64": [agrees({"dtype": torch.float64})],
    "head dims above 512": [agrees({"dims": (520, 520)})],
    "grouped and single key heads (GQA, MQA)": [agrees({"heads": heads}) for heads in ((4, 2), (4, 1))],
    "`causal`, `window`": [agrees(causal=True), agrees(window=(2, 1)), agrees(causal=True, window=(2, None))],
    "`key_lengths`, `key_ranges`, `mask`": [
        agrees(causal=True, window=(2, 1), key_lengths=torch.tensor([4])),
        agrees(key_ranges=ranges()),
        agrees(mask=torch.tensor([1, 0, 1, 1, 0, 1]).bool().expand(1, 1, 6, 6)),
    ],
    "`softcap`": [agrees(softcap=2.0)],
    "`sinks` (`flash`: FlashAttention 4 alone)": [agrees(sinks=torch.zeros(2, requires_grad=True))],
    "`key_bias`, `dropout_p`": [
        agrees(key_bias=torch.linspace(-1, 1, 12).view(2, 6).requires_grad_(), softcap=2.0, dropout_p=0.3),
    ],
    "`bias`, `relative_bias`, `bias_after_softcap`": [
        agrees(bias=pairs(1, 2, 1, 6), causal=True),
        agrees(relative_bias=pairs(1, 2, 1, 4), relative_right=2),
        agrees(key_bias=pairs(2, 6), softcap=2.0, bias_after_softcap=True),
    ],
    "`return_aux`: lse": [lse],
    "`return_aux`: largest logit, entropy": [
        agrees(softcap=2.0, sinks=torch.zeros(2, requires_grad=True), dropout_p=0.3, return_aux=True),
    ],
    "gradients of q, k, v, `scaling`, `gain`": [
        agrees(scaling=torch.ones(2, 1, requires_grad=True), gain=torch.ones(2, 1, requires_grad=True)),
    ],
    "`attention_varlen`": [varlen],
    "`attention_decode`; pages; 8-bit caches": [ragged, *(partial(decode, paged, paged) for paged in (False, True))],
    "autocast": [autocast],
    "`torch.compile(fullgraph=True)`, `torch.func.grad`, `vmap`": [transformed, compiled],
    "`batch_invariant` (`sdpa`: on a CPU)": [invariant],
    "gradients of gradients, forward mode (jvp)": [second_order, forward_mode],
}


def outcome(probes: list[Probe], backend: str) -> str:
    """Return "yes" where all probes pass, "refused" where one is refused by name; raise any other error."""
    for probe in probes:
        try:
            probe(backend)
        except NotImplementedError:
            return "refused"
    return "yes"


if __name__ == "__main__":
    flash.install(pytest.MonkeyPatch(), "flash-attn-4 4.0.0b36")
    support = [[name, *(outcome(probes, one) for one in BACKENDS)] for name, probes in ROWS.items()]
    print(json.dumps({"support": support, "memory": memory.report(128)}))
