"""The decode kernels of sm_80 and sm_90: splits, pages, windows, packed groups, small and default tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from tests.support.bound import assert_within_bound
from tests.support.caches import GrowingCache, sequences
from tritonattn import attention, attention_decode
from tritonattn.tuning import TileConfig

from .executor import padded

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
SMALL = TileConfig(16, 16, 1, 3)  # a split has 64 keys


@dataclass(frozen=True)
class Case:
    """One call against a cache of `written` keys; tiles None: the default config; joined: from several splits."""

    dtype: torch.dtype
    dims: tuple[int, int]
    tiles: TileConfig | None
    written: tuple[int, int]
    capacity: int
    count: int = 1
    page: int | None = None
    heads: tuple[int, int] = (2, 1)
    window: tuple[int, int] | None = None
    scaling: str = "sqrt_dim"
    softcap: float | None = None
    sinks: bool = False
    aux: bool = False
    joined: bool = True

    def __str__(self) -> str:
        sizes = f"{str(self.dtype)[6:]}-{self.dims}-{self.written}-of-{self.capacity}-new-{self.count}-{self.heads}"
        return f"{sizes}-page-{self.page}-{self.window}-{self.scaling}{'-default' if self.tiles is None else ''}"


CASES = (
    Case(BFLOAT, (16, 16), SMALL, (60, 150), 171),
    Case(HALF, (40, 24), SMALL, (17, 160), 171, count=3, page=23, scaling="cosine", aux=True),
    Case(BFLOAT, (16, 32), SMALL, (5, 150), 171, 5, heads=(8, 2), window=(70, 0), softcap=2.0, sinks=True, aux=True),
    Case(SINGLE, (16, 16), SMALL, (60, 150), 171, page=16, scaling="key_norm_max", window=(30, 0), joined=False),
    Case(BFLOAT, (128, 128), None, (130, 290), 300, 2, page=16, scaling="cosine"),
)
SLOW = (
    Case(HALF, (64, 64), None, (3, 290), 300, scaling="key_norm_mean", sinks=True),
    Case(BFLOAT, (64, 64), None, (130, 140), 150, count=4, heads=(16, 1), window=(90, 0), aux=True, joined=False),
    Case(SINGLE, (64, 32), None, (70, 140), 150, scaling="key_norm_l2"),
)


def _check(case: Case) -> None:
    q, k, v = sequences(case.dtype, heads=case.heads, length=max(case.written), dims=case.dims)
    options: dict[str, Any] = {"scaling": case.scaling, "window": case.window, "softcap": case.softcap}
    if case.sinks:
        options["sinks"] = torch.linspace(-1, 2, case.heads[0])
    exact, eager = (
        attention(*(x.to(kind) for x in (q, k, v)), causal=True, backend="reference", return_aux=True, **options)
        for kind in (torch.float64, case.dtype)
    )
    cache = GrowingCache(k, v, case.capacity, case.page, statistics=True)
    cache.write([length - case.count for length in case.written])
    cache.write(case.count)
    arguments = cache.arguments()
    arguments |= {name: padded(arguments[name]) for name in ("k_cache", "v_cache")}
    query = padded(cache.newest(q, case.count))
    found = attention_decode(query, **arguments, **options, return_aux=case.aux, backend="triton")
    out, aux = found if case.aux else (found, None)
    assert_within_bound(out, cache.newest(exact[0], case.count), cache.newest(eager[0], case.count), case.dtype)
    for name, row in {} if aux is None else aux._asdict().items():
        expected = cache.newest(getattr(exact[1], name), case.count)
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_decode(case, capability, emulate):
    executor = emulate(capability, case.tiles)
    _check(case)
    assert ("combine_splits" in [name for name, _ in executor.reports]) == case.joined
