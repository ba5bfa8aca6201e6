"""The decode kernels of sm_80 and sm_90: splits, pages, windows, packed groups, every dtype, head dim and form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.support.caches import check_newest, sequences
from tests.support.pairs import in_turn
from tritonattn import attention_decode
from tritonattn.tuning import TileConfig

from .cases import CPU, described
from .executor import GPU, padded

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
SMALL = TileConfig(16, 16, 1, 3)  # a split has 64 keys
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"aux": False},
    "aux": {},
    "every form": {"softcap": 2.0, "sinks": True, "key_bias": True},
}


@dataclass(frozen=True)
class Case:
    """One call for the newest `count` tokens of caches of `written` keys; tiles None: the default config.

    heads: of queries and keys; page: None for a contiguous cache.
    """

    dtype: torch.dtype
    dims: tuple[int, int]
    tiles: TileConfig | None = None
    written: tuple[int, int] = (60, 150)
    capacity: int = 171
    count: int = 1
    page: int | None = None
    heads: tuple[int, int] = (2, 1)
    window: tuple[int, int] | None = None
    scaling: str = "sqrt_dim"
    form: str = "plain"
    eight_bit: str = ""

    def __str__(self) -> str:
        return described(self)

    def check(self) -> None:
        """Hold the newest rows to the bound of the same rows of one full pass."""
        options = FORMS[self.form] | {"scaling": self.scaling, "window": self.window, "lay": padded}
        if options.pop("sinks", False):
            options["sinks"] = torch.linspace(-1, 2, 2 * self.heads[0] * max(self.written)).view(2, self.heads[0], -1)
        if options.pop("key_bias", False):
            options["bias_heads"] = self.heads[0]
        sizes = {"heads": self.heads, "dims": self.dims, "count": self.count, "page": self.page}
        sizes["eight_bit"] = self.eight_bit
        check_newest(self.dtype, CPU, self.written, max(self.written), self.capacity, **sizes, **options)


FAST = (
    Case(BFLOAT, (16, 16), SMALL, form="aux"),
    Case(HALF, (40, 24), SMALL, (17, 160), count=3, page=23, scaling="cosine", form="aux"),
    Case(BFLOAT, (16, 32), SMALL, (5, 150), count=5, heads=(8, 2), window=(70, 0), form="every form"),
    Case(SINGLE, (16, 16), SMALL, page=16, scaling="key_norm_max", window=(30, 0)),
    Case(HALF, (16, 16), SMALL, (5, 150), page=23, scaling="key_norm_mean", eight_bit="head"),
)

# Every head dim on every GPU in the default config, with dtypes, pages, windows and forms in turn.
SM_80, SM_90 = GPU(80), GPU(90)
EVERYTHING = [
    (SM_80, Case(HALF, (64, 64), None, (130, 256), 300, 16, 16, (1, 1), (90, 0), "key_norm_mean")),
    (SM_80, Case(BFLOAT, (128, 128), None, (17, 290), 300, 2, 16, (1, 1), (400, 0), "key_norm_max", "aux")),
    (SM_80, Case(SINGLE, (192, 128), None, (130, 256), 300, 2, None, (8, 2), (90, 0), "cosine", "aux")),
    (SM_80, Case(HALF, (256, 256), None, (17, 290), 300, 1, None, (8, 2), None, "key_norm_mean", "aux")),
    (SM_80, Case(BFLOAT, (72, 136), None, (130, 256), 300, 2, 23, (8, 2), (400, 0), "cosine")),
    (SM_80, Case(BFLOAT, (576, 512), None, (30, 70), 80, 1, None, (4, 1))),
    (SM_90, Case(BFLOAT, (64, 64), None, (17, 290), 300, 16, 23, (1, 1), None, "key_norm_mean", "aux")),
    (SM_90, Case(SINGLE, (128, 128), None, (17, 290), 300, 16, None, (8, 2), (400, 0), "key_norm_mean", "every form")),
    (SM_90, Case(HALF, (192, 128), None, (17, 290), 300, 2, None, (8, 2), (90, 0), "key_norm_mean", "aux")),
    (SM_90, Case(BFLOAT, (256, 256), None, (17, 290), 300, 1, None, (1, 1), None, "key_norm_max")),
    (SM_90, Case(SINGLE, (72, 136), None, (130, 256), 300, 2, 23, (8, 2), None, "key_norm_max", "every form")),
]


@in_turn(case=FAST, capability=[80, 90])
def test_decode(case, capability, emulate):
    executor = emulate(GPU(capability), case.tiles)
    case.check()
    assert ("combine_splits" in executor.launched) == (case.window != (30, 0))


@pytest.mark.slow
@in_turn(dtype=[BFLOAT, HALF], capability=[80, 90])
def test_every_number_of_8_bits(dtype, capability, emulate):
    """The output of a row that attends to one key is its value: NaN for two of them."""
    emulate(GPU(capability), SMALL)
    q, byte = torch.zeros(1, 1, 1, 16, dtype=dtype), torch.arange(256, dtype=torch.int32).to(torch.uint8)
    k, v = (x.view(1, 1, 1, -1).view(torch.float8_e4m3fn) for x in (byte[:16], byte))
    found = attention_decode(q, k, v, key_lengths=torch.tensor([1]), backend="triton")
    torch.testing.assert_close(found, v.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert found.isnan().sum() == 2


@in_turn(name=["q", "k"], length=[60, 150])
def test_nan_of_a_visible_pair_is_in_its_row(name, length, emulate):
    """One split, or several of which one or all are NaN; the other sequence is as before."""
    executor = emulate(GPU(80), SMALL)
    operands = dict(zip("qkv", sequences(BFLOAT, heads=(2, 1), length=length, dims=(16, 16)), strict=True))
    operands["q"] = operands["q"][:, :, -1:].clone()
    operands[name][0, :, 0] = torch.nan
    q, k, v = (padded(x) for x in operands.values())
    lengths = torch.tensor([length, length])
    out, aux = attention_decode(q, k, v, key_lengths=lengths, return_aux=True, backend="triton")
    assert ("combine_splits" in executor.launched) == (length == 150)
    for result in (out, *aux):
        assert result[0].isnan().all()
        assert result[1].isfinite().all()


@pytest.mark.slow
@in_turn(page=[None, 16], capability=[80, 90])
def test_biases_by_distance(page, capability, emulate):
    """Behind a softcap, read as bf16, with rows and splits whose distances pass the extent."""
    emulate(GPU(capability), SMALL)
    q, k, v = sequences(BFLOAT, heads=(4, 2), length=160, dims=(16, 16))
    lengths, q = torch.tensor([150, 60]), q[:, :, -3:].contiguous()
    table = torch.randn(1, 4, 3, 40, generator=torch.Generator().manual_seed(0)).to(BFLOAT)
    options = {"relative_bias": padded(table, (0, 3)), "relative_right": 2, "softcap": 2.0, "bias_after_softcap": True}
    options |= {"key_lengths": lengths, "return_aux": True}
    expected = attention_decode(q, k, v, backend="reference", **options)
    if page:
        k, v = (x.transpose(1, 2).unflatten(1, (-1, page)).flatten(0, 1).contiguous() for x in (k, v))
        options["block_table"] = torch.arange(20, dtype=torch.int32).view(2, 10)
    out, aux = attention_decode(padded(q), padded(k), padded(v), backend="triton", **options)
    for ours, exact in zip((out, *aux), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, exact, atol=2e-2, rtol=2e-2)
