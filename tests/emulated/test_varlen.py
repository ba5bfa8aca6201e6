"""attention_varlen by the kernels of sm_80 and sm_90: packed sequences, some empty, and keys in pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from tests.kernels import harness
from tests.support.packed import Packed
from tests.support.pages import check_appends, paged_call
from tests.support.slow import slow_but
from tritonattn import attention_varlen
from tritonattn.backends import triton as triton_backend
from tritonattn.tuning import TileConfig

from .cases import CPU, described, with_padded_gradient
from .executor import GPU, padded_operands

HALF, BFLOAT = torch.float16, torch.bfloat16

# Sequences without rows, without keys, with more rows than keys; rows and keys of no sequence behind the last one.
PACKED = {
    "short": Packed((19, 0, 35, 1), (19, 4, 0, 33), q_tail=5, k_tail=17),
    "long": Packed((150, 0, 40), (270, 3, 20), q_tail=5, k_tail=17),
    "many": Packed((30, 1, 0, 129, 16), (64, 0, 7, 130, 5)),
}
MASKS: dict[str, dict] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (130, 20)},
    "causal window": {"causal": True, "window": (70, None)},
}


@dataclass(frozen=True)
class Case:
    """One call; heads: kv heads, and query heads of each; tiles None: the default config."""

    dtype: torch.dtype
    dims: tuple[int, int]
    tiles: TileConfig | None = None
    packed: str = "short"
    mask: str = "full"
    form: str = "plain"
    scaling: str = "sqrt_dim"
    gain: bool = True
    heads: tuple[int, int] = (1, 2)

    def __str__(self) -> str:
        return described(self)

    def check(self, gradients: bool = True) -> None:
        """Hold the results and every gradient to the bound."""
        packed, arguments = PACKED[self.packed], harness.FORMS[self.form] | MASKS[self.mask]
        scales = ("gain",) if self.gain else ()
        if "sinks" in arguments:
            scales = (*scales, arguments.pop("sinks"))
        tensors = harness.packed_inputs(
            packed,
            self.dtype,
            CPU,
            kv_heads=self.heads[0],
            group=self.heads[1],
            head_dim=self.dims[0],
            value_dim=self.dims[1],
            scales=scales,
        )
        # fp32's band is below what rows of one key leave, and a chain of 256 products: logits of 10 are 40 eps off.
        cancelling = (12.0 if self.dims[0] == 256 else 1.0) if self.dtype == torch.float32 else 0.0
        attend = with_padded_gradient(partial(attention_varlen, **packed.arguments()))
        arguments |= {"summands": cancelling, "scaling": self.scaling, "gradients": gradients}
        harness.check(padded_operands(tensors), attend, **arguments)


FAST = ((GPU(90), Case(BFLOAT, (16, 32), TileConfig(64, 16, 4, 2), mask="causal", form="aux")),)
# Loops of the default configs with masks, forms and scalings in turn, of which tests/kernels has all pairs.
EVERYTHING = [
    (GPU(80), Case(HALF, (64, 64), None, "long", "causal window", "everything")),
    (GPU(80), Case(BFLOAT, (192, 128), None, "many", "causal", "everything", "cosine", False, (2, 1))),
    (GPU(90), Case(BFLOAT, (64, 64), None, "long", "causal", "dropout", "key_norm_sum", True, (2, 1))),
    (GPU(90), Case(torch.float32, (64, 64), None, "many", "causal window", "dropout", "cosine", False, (2, 1))),
    (GPU(90, True), Case(HALF, (64, 64), None, "long", "window", "everything", "cosine", False, (2, 1))),
    (GPU(90, True), Case(BFLOAT, (192, 128), None, "many", "full", "plain", "cosine", True, (2, 1))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "case"), FAST, ids=str)
def test_varlen(gpu, case, emulate):
    executor = emulate(gpu, case.tiles)
    case.check()
    assert (executor.executed("tma") > 0) == gpu.descriptors


# From one new token to a whole prompt.
ROWS = Packed((1, 18, 0, 5), (40, 18, 3, 33), q_tail=2, k_tail=3)
TILES = {80: TileConfig(16, 16, 1, 3), 90: TileConfig(64, 16, 4, 2)}
TERMS = ("key_scale", "key_bias", "sinks")
CASES = {
    "key heads shared, terms": (80, BFLOAT, 21, {"dims": (40, 24), "heads": (4, 2), "terms": TERMS}),
    "a window, a lost page": (90, HALF, 64, {"dims": (32, 32), "lost": (3, 0), "window": (17, None)}),
}


@pytest.mark.parametrize("name", slow_but(["a window, a lost page"], CASES))
def test_pages(name, emulate):
    """The contiguous keys are loaded by descriptors on sm_90."""
    capability, dtype, page, form = CASES[name]
    executor = emulate(GPU(capability, descriptors=capability == 90), TILES[capability])
    calls = paged_call(ROWS, dtype, page, causal=True, invariant=True, **form)
    found, expected = (triton_backend.forward(call, aux=True) for call in calls)
    assert executor.launched == ["attention_forward"] * 2
    assert (executor.executed("tma") > 0) == (capability == 90)
    assert all(map(torch.equal, found, expected))


def test_appended_norms(emulate):
    executor = emulate(GPU(90))
    check_appends(BFLOAT, 24)
    assert executor.launched == ["key_statistics_kernel", "append_to_pages_kernel"] * 5
