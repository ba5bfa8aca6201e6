"""Derivatives of a call beyond the first, by the kernels, held to the bound by dense attention in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.bound import assert_within_bound
from tests.support.calls import changed
from tests.support.derivatives import Tensors, by_autograd, by_passes, directions, tensors_of
from tritonattn.backends.triton.operands import Operands
from tritonattn.core.call import AttentionCall
from tritonattn.core.terms import PAIRS, Gradients, Needs
from tritonattn.tuning.calls import Size
from tritonattn.tuning.config import Problem

NAMES = [name for name in Gradients._fields if name != "relative_scale"]  # which tiles in torch compute
SCALES = "right query_scale key_scale"
BIASES = "query_scale key_bias bias relative_bias softcap"
FORMS = {
    "plain": "",
    "scales": SCALES,
    "capped": f"{SCALES} left softcap sinks key_lengths grouped",
    "pairs": f"{BIASES} key_ranges dropout grouped",
    "after": f"{BIASES} bias_after_softcap mask sinks",
    "packed": "right query_scale key_bias relative_bias sequences dropout grouped",
}


@dataclass
class Case:
    """A call, tangents of all its tensors, and gradients of the tangents of out and of lse."""

    call: AttentionCall
    tangents: Gradients
    d_out: Tensor
    d_lse: Tensor | None

    def found(self, needs: Needs | None = None, needs_tangents: Needs | None = None) -> Tensors:
        return by_passes(self.call, self.tangents, self.d_out, self.d_lse, needs, needs_tangents)

    def check(self) -> Tensors:
        """Hold tangents and their gradients to the bound, those towards tangents that are None too."""
        dtype, found = self.call.q.dtype, self.found()
        whole = {name: x.contiguous() for name, x in tensors_of(self.call).items()}  # torch's jvp takes no expanded one
        call = changed(self.call, **whole)
        rest = self.tangents, self.d_out, self.d_lse
        exact, eager = by_autograd(call, *rest), by_autograd(call, *rest, dtype)
        assert set(found) == set(exact)
        for name, x in found.items():
            source = name.removeprefix("dot ")
            expected = dtype if source in ("out", "q", "k", "v", *PAIRS) else torch.float32
            assert x.dtype == expected, name
            assert_within_bound(x, exact[name], eager[name], dtype, name=name)
        return found


def case_of(
    form: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    dims: Any = (16, 16),
    lengths: Any = (19, 35),
) -> Case:
    """A case of a form: names of `Problem`'s fields."""
    problem = Problem(dims[0], dims[1], dtype, **dict.fromkeys(form.split(), True))
    packed = problem.sequences
    size = Size(
        batch=2,
        heads=2,
        group=1 + problem.grouped,
        q_len=lengths[0],
        k_len=lengths[1],
        q_total=2 * lengths[0] if packed else 0,
        k_total=2 * lengths[1] if packed else 0,
        left=9,
    )
    call = Operands(problem, size, device).attention().changed(backend="triton")
    tangents, d_out, d_lse = directions(call)
    moved = (None if x is None else x.to(device) for x in tangents)
    return Case(call, Gradients(*moved), d_out.to(device), d_lse.to(device))
