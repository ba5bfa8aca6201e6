"""Errors against float64: ours, and those of q multiplied in its dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date

import torch
from torch.nn.functional import scaled_dot_product_attention

import tritonattn
from tritonattn.core.provenance import Environment
from tritonattn.lab.simulation.distributions import DISTRIBUTIONS

from .attention import DTYPES, OURS, entrant_name
from .check import Question, judge
from .contest import Effort, Results, Verdict, raising
from .recipes import scaled_by_mode
from .records import Axis, Record

SUITE = "accuracy"
RECIPE = "pre-scaled q"
_ROWS = 32  # queries; each attends to all keys


@dataclass(frozen=True)
class AccuracyCase:
    """Every scaling on one distribution of keys. Errors and bounds are of the output, over the largest exact value."""

    keys: str
    count: int
    head_dim: int
    dtype: str
    scalings: tuple[str, ...]
    device: torch.device
    backend: str
    suite: str = SUITE

    @property
    def axes(self) -> dict[str, Axis]:
        return {
            "length": self.count,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "keys": self.keys,
            "backend": self.backend,
        }

    def run(self, effort: Effort, environment: Environment) -> list[Record]:
        """Judge ours, which must keep the bound, and the recipe, which need not. Nothing is timed."""
        question = self._question()
        # The CPU path folds scales into q, which shows in fp32 too where logits reach thousands.
        rounding = "operands" if self.backend == "sdpa" else "P"
        blank = Record(SUITE, self.axes, "", "", "measured", environment, date.today().isoformat())
        records = []
        for scaling in self.scalings:
            exact, eager = question.exact(scaling), question.eager(scaling, rounding)
            theirs = judge(_prescaled(question, scaling), exact, eager, question.q.dtype)
            try:
                results = self._ours(question, scaling)
            except Exception as error:  # from a compiler or a driver
                records.append(raising(replace(blank, contestant=entrant_name(OURS, scaling), scaling=scaling), error))
            else:
                records.append(_judged(blank, OURS, scaling, judge(results, exact, eager, question.q.dtype)))
            records.append(_judged(blank, RECIPE, scaling, replace(theirs, reason="")))
        return records

    def _question(self) -> Question:
        """Draw q [1, 1, 32, D], k and v [1, 1, count, D] from a seed that depends on the count alone."""
        random = torch.Generator().manual_seed(self.count)
        q, k, v = (
            torch.randn(1, 1, rows, self.head_dim, generator=random, dtype=torch.float64)
            for rows in (_ROWS, self.count, self.count)
        )
        k = DISTRIBUTIONS[self.keys](k, random)
        return Question(*(x.to(self.device, DTYPES[self.dtype]) for x in (q, k, v)), None, causal=False)

    def _ours(self, question: Question, scaling: str) -> Results:
        out = tritonattn.attention(question.q, question.k, question.v, scaling=scaling, backend=self.backend)
        return {"out": out}


def _prescaled(question: Question, scaling: str) -> Results:
    """Multiply q by the whole factor (k by cosine's key part), and call F.scaled_dot_product_attention with scale 1."""
    q, k = scaled_by_mode(scaling, question.q, question.k, causal=False)
    return {"out": scaled_dot_product_attention(q, k, question.v, scale=1.0)}


def _judged(blank: Record, name: str, scaling: str, verdict: Verdict) -> Record:
    return replace(
        blank,
        contestant=entrant_name(name, scaling),
        scaling=scaling,
        error=verdict.error,
        bound=verdict.bound,
        status="wrong" if verdict.reason else "measured",
        reason=verdict.reason,
    )
