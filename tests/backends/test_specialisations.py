"""Calls that differ in one property that selects code have different specialisations: none meets code of another.

A specialisation keeps code for calls that share it. No kernel runs, and no GPU is needed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tritonattn.backends import triton as attention
from tritonattn.backends.triton import launch
from tritonattn.backends.triton.device import Specialisation, binder
from tritonattn.core.call import AttentionCall, RowGradients
from tritonattn.core.dropout import Dropout
from tritonattn.core.sequences import Sequences
from tritonattn.core.terms import Needs, Terms
from tritonattn.core.visibility import Visibility
from tritonattn.tuning import Target

pytestmark = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")

BACKEND = triton.compiler.make_backend(GPUTarget("cuda", 80, 32))
SIZE = 64  # rows, keys and head dim
ALL = Needs(*[True] * len(Needs._fields))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def apart(x: Tensor, by: int = 1) -> Tensor:
    """x with rows that stand `by` elements apart: 1 is not aligned, 8 is, but to fewer bytes."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + by)[..., : x.shape[-1]]


QKV = dict(zip("qkv", (normal(2, 2, SIZE, SIZE) for _ in range(3)), strict=True))
VECTOR, BIAS = torch.ones(2, 2, SIZE), torch.ones(2, 2, 1, SIZE)
LENGTHS, RANGES = torch.ones(2, dtype=torch.int32), torch.tensor([0, SIZE]).expand(2, SIZE, 2)
TABLE = torch.arange(2, dtype=torch.int32)[:, None]  # of pages as large as a sequence: their shape is that of keys
SEQUENCES = Sequences(*(torch.tensor([0, 100, 200], dtype=torch.int32),) * 2, 100, 100)
PAIRS, TABLE_OF_DISTANCES = torch.ones(1, 1, 1, SIZE), torch.ones(1, 2, 1, 8)
TERMS = {"query_scale": VECTOR, "key_scale": VECTOR, "key_bias": BIAS, "softcap": 1.5, "sinks": VECTOR}
TERMS |= {"bias": PAIRS, "relative_bias": TABLE_OF_DISTANCES, "relative_scale": TABLE_OF_DISTANCES}
BEFORE = {"key_bias": BIAS, "softcap": 1.5}  # of a bias that is added behind a softcap


def called(**given: Any) -> AttentionCall:
    """A call on QKV; given: more, or others, by the name of a tensor, a term or a mask."""
    tensors = {name: given.pop(name, x) for name, x in QKV.items()}
    logits = Terms(0.3, **{name: given.pop(name) for name in Terms._fields if name in given})
    rest = {name: given.pop(name) for name in ("dropout", "block_table", "is_part") if name in given}
    visible = Visibility.of(tensors["q"], tensors["k"], **given)
    return AttentionCall(**tensors, visibility=visible, terms=logits, **rest)


NO_ROWS = RowGradients()


def far(rows: int) -> dict[str, Any]:
    """A call of so many rows and keys, without memory, whose bias has one entry a key."""
    tensors = {name: torch.empty(1, 1, rows, 16, dtype=torch.bfloat16, device="meta") for name in ("q", "k", "v")}
    return tensors | {"bias": torch.empty(1, 1, 1, rows, device="meta")}


def packed(longest: int) -> dict[str, Any]:
    ends = torch.tensor([0, SIZE], dtype=torch.int32)
    return {name: x[:1] for name, x in QKV.items()} | {"sequences": Sequences(ends, ends, longest, longest)}


def forward(aux: bool = False, **given: Any) -> None:
    attention.forward(called(**given), aux)


def backward(
    d_out: Tensor = QKV["q"],
    d_rows: RowGradients = NO_ROWS,
    rounding: Tensor | None = None,
    needs: Needs = ALL,
    **given: Any,
) -> None:
    call = called(**given)
    present = (x is not None for x in call.tensors())
    needs = Needs(*(need and there for need, there in zip(needs, present, strict=True)))
    attention.backward(call, QKV["q"], VECTOR, d_out, d_rows, needs, rounding)


def decode(aux: bool = False, **given: Any) -> None:
    tensors = {"q": normal(2, 2, 2, SIZE), "k": QKV["k"], "v": QKV["v"]}
    tensors |= {name: given.pop(name) for name in "qkv" if name in given}
    logits = Terms(0.3, **{name: given.pop(name) for name in Terms._fields if name in given})
    rows, table, capacity = tensors["q"].shape[2], given.pop("block_table", None), given.pop("capacity", SIZE)
    options = {"at_lengths": True, **given}
    visible = Visibility(2, 2, 2, rows, capacity, torch.device("cpu"), **options)
    attention.decode(AttentionCall(**tensors, visibility=visible, terms=logits, block_table=table), aux)


def far_backward(rows: int) -> None:
    call = called(**far(rows))
    lse = torch.empty(1, 1, rows, device="meta")
    attention.backward(call, call.q, lse, call.q, RowGradients(), Needs(q=True, bias=True))


def append(heads: int) -> None:
    """Keys of so many heads, which are the stride of a page's entries."""
    dtypes = (torch.float32, torch.float64, torch.float64, torch.float32)
    buffers = tuple(torch.zeros(2, SIZE, heads, dtype=dtype) for dtype in dtypes)
    attention.append_to_pages(normal(4, heads, SIZE), LENGTHS.new_tensor([0, 3, 4]), LENGTHS, TABLE, buffers)


# Options that a call has or not, alone or with another: by these it differs from the same call without.
MASKS = {
    "window": (4, None),
    "causal": True,
    "key_lengths": LENGTHS,
    "key_ranges": RANGES,
    "mask": torch.ones(SIZE, SIZE, dtype=torch.bool),
    "invariant": True,
}
OPERANDS = {name: apart(x) for name, x in QKV.items()}
ATTENTION = TERMS | MASKS | OPERANDS | {"dropout": Dropout(0.5, torch.zeros(2, dtype=torch.int64))}
PROPERTIES = [
    *((forward, {}, {name: x}) for name, x in ATTENTION.items()),
    (forward, {}, {"aux": True}),
    (forward, {}, {"block_table": TABLE}),
    (forward, packed(SIZE), packed(4096)),
    (forward, {name: x[:1] for name, x in QKV.items()}, packed(SIZE)),
    *((run, BEFORE, BEFORE | {"bias_after_softcap": True}) for run in (forward, decode)),
    *((backward, {}, {name: TERMS[name]}) for name in ("bias", "relative_bias", "relative_scale")),
    (backward, {"bias": PAIRS}, {"bias": PAIRS, "needs": Needs(q=True, k=True, v=True)}),
    (backward, {}, {"d_out": apart(QKV["q"], 8)}),
    (backward, {}, {"d_rows": RowGradients(VECTOR)}),
    (backward, {}, {"d_rows": RowGradients(entropy=VECTOR, entropies=VECTOR)}),
    (backward, {}, {"rounding": torch.zeros(2, 2, SIZE, SIZE, dtype=torch.int8)}),
    (backward, {"key_scale": VECTOR}, {"key_scale": VECTOR, "needs": Needs(q=True, k=True, v=True)}),
    (backward, {}, {"q": QKV["q"].float()}),
    (backward, {}, {"k": QKV["k"].float()}),
    (backward, {}, {"is_part": True}),
    *((decode, {}, {name: x}) for name, x in (TERMS | OPERANDS).items() if name != "q"),
    (decode, {}, {"q": apart(normal(2, 2, 2, SIZE))}),
    (decode, {}, {"q": normal(2, 2, 9, SIZE)}),
    (decode, {}, {"left": 4}),
    (decode, {}, {"aux": True}),
    (decode, {}, {"key_lengths": LENGTHS}),
    (decode, {}, {"key_ranges": RANGES[:, :1]}),
    (decode, {"key_lengths": LENGTHS}, {"key_lengths": LENGTHS, "block_table": TABLE}),
    (decode, {"key_lengths": LENGTHS}, {"key_lengths": LENGTHS, "row_counts": LENGTHS}),
    (append, {"heads": 1}, {"heads": 2}),
    (far_backward, {"rows": 2**14}, {"rows": 2**16}),
]
# Lengths that select no code: of a packed batch, of rows and keys, and of a cache that has grown by one.
LENGTHS_OF = [
    (
        forward,
        *({"q": normal(2, 2, n, SIZE), "k": normal(2, 2, n, SIZE), "v": normal(2, 2, n, SIZE)} for n in (60, 61)),
    ),
    (forward, *({name: normal(1, 2, n, SIZE) for name in "qkv"} | {"sequences": SEQUENCES} for n in (200, 201))),
    (decode, *({name: normal(2, 2, n, SIZE) for name in "kv"} | {"capacity": n} for n in (100, 101))),
]


Codes = list[tuple[Specialisation, tuple]]


def codes(run: Callable[..., None], given: dict[str, Any]) -> Codes:
    """Specialisation and selected code of each launch that has one, with Triton's binding."""
    with launch.recording(Target("cuda", "80")) as launches:
        run(**given)
    found = []
    for kernel, _, arguments, config in launches:
        if arguments.specialisation is not None:
            bound = binder(kernel, BACKEND)(*arguments.values())[1]
            found.append((arguments.specialisation, (kernel.__name__, config, str(bound))))
    return found


@pytest.mark.parametrize(
    ("run", "plain", "other"), PROPERTIES, ids=[f"{f.__name__}-{'-'.join(other)}" for f, _, other in PROPERTIES]
)
def test_a_call_behind_another_has_the_code_that_it_has_alone(run, plain, other):
    launch._specialisations.clear()
    alone = codes(run, other)
    launch._specialisations.clear()
    before, behind = codes(run, plain), codes(run, other)
    kept = {}
    for specialisation, code in (*before, *behind):
        assert kept.setdefault((specialisation, *code[:2]), code) == code
    found, expected = (
        [(specialisation.problem, specialisation.wide, code) for specialisation, code in one] for one in (behind, alone)
    )
    assert found == expected


@pytest.mark.parametrize(("run", "one", "other"), LENGTHS_OF, ids=["rows and keys", "packed total", "cache"])
def test_other_lengths_find_the_specialisation(run, one, other):
    """Its plan and code too: nothing is computed again but the grid."""
    found = [specialisation for given in (one, other) for specialisation, _ in codes(run, given)]
    assert len(set(found)) == 1
