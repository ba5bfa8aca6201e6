"""Cases of dense attention: ours and peers, each with a scaling, forward, backward or both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._functorch import config as compiled_autograd

import tritonattn
from tests.support.bound import BAND, PYTORCH_GRADIENT_BAND

from .check import Question, Sample, checker
from .contest import Contest, Entrant, Results
from .peers import PEERS, Attend, Problem
from .work import Shape, bytes_moved, flops

OURS = "tritonattn"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_COPIES = 3  # of the inputs; rounds take them in turn
_LOGITS_OF_TWO_SAMPLES = 2**26  # in a head: 8,192 queries and keys


@dataclass(frozen=True)
class Case:
    """A case of dense attention; `who` are (contestant, scaling), the baseline first.

    backend   of ours
    calls     calls that are timed together
    """

    suite: str
    shape: Shape
    dtype: str
    passes: str
    who: tuple[tuple[str, str], ...]
    device: torch.device
    backend: str
    calls: int = 1

    def contest(self) -> Contest:
        shape = self.shape
        axes = {
            "length": shape.k_len,
            "head_dim": shape.head_dim,
            "dtype": self.dtype,
            "causal": shape.causal,
            "passes": self.passes,
            "batch": shape.batch,
            "heads": shape.heads,
            "backend": self.backend,
        }
        if len({scaling for _, scaling in self.who}) == 1:
            axes["scaling"] = self.who[0][1]
        return Contest(
            self.suite,
            axes,
            self.enter,
            entrant_name(*self.who[0]),
            self.device,
            flops(shape, self.passes),
            bytes_moved(shape, self.passes, DTYPES[self.dtype]),
            self.calls,
        )

    def enter(self) -> list[Entrant]:
        inputs = Inputs(self)
        samples = inputs.samples()
        return [self._entrant(name, scaling, inputs, samples) for name, scaling in self.who]

    def _entrant(self, name: str, scaling: str, inputs: Inputs, samples: list[Sample]) -> Entrant:
        problem = Problem(self.shape, DTYPES[self.dtype], self.device, self.passes != "forward", scaling)
        if name == OURS:
            build, rounding = self._ours, our_rounding(self.backend, self.dtype)
        else:
            build, rounding = PEERS[name].build, PEERS[name].rounding
        return Entrant(
            entrant_name(name, scaling),
            scaling,
            lambda: inputs.running(build(problem), self.passes),
            checker(samples, scaling, rounding, PYTORCH_GRADIENT_BAND if self.backend == "sdpa" else BAND),
            ours=name == OURS,
        )

    def _ours(self, problem: Problem) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tritonattn.attention(
                q, k, v, scaling=problem.scaling, causal=problem.shape.causal, backend=self.backend
            )

        return attend


def our_rounding(backend: str, dtype: str) -> str:
    """Name the rounding of check.ROUNDINGS that ours has: on a CPU scales are folded into 16-bit operands."""
    return "operands" if backend == "sdpa" and dtype != "fp32" else "P"


def entrant_name(name: str, scaling: str) -> str:
    """Name a contestant with its scaling."""
    return f"{name} {scaling}"


def head(position: int) -> Callable[[Tensor], Tensor]:
    """Make a function that takes [B, H, ...] to one head [1, 1, ...]: at 0 the first of all, at -1 the last."""
    return lambda x: x[position][position][None, None]


class Inputs:
    """Several copies of q, k, v and the gradient of out, standard normal, from seeds."""

    def __init__(self, case: Case) -> None:
        shape, self.backward = case.shape, case.passes != "forward"
        sizes = {"q": (shape.heads, shape.q_len), "k": (shape.kv_heads, shape.k_len)}
        sizes |= {"v": sizes["k"], "d_out": sizes["q"]}
        self.copies = []
        for seed in range(_COPIES):
            random = torch.Generator(case.device).manual_seed(seed)
            tensors = {
                name: torch.randn(
                    shape.batch, *size, shape.head_dim, generator=random, device=case.device, dtype=torch.float32
                ).to(DTYPES[case.dtype])
                for name, size in sizes.items()
                if name != "d_out" or self.backward
            }
            self.copies.append(tensors)
        self.causal = shape.causal

    def samples(self) -> list[Sample]:
        """List the checked heads: the first of the first sequence and, where it is quick, the last of the last."""
        first = self.copies[0]
        batch, heads, q_len = first["q"].shape[:3]
        two = batch * heads > 1 and q_len * first["k"].shape[2] <= _LOGITS_OF_TWO_SAMPLES
        return [self._sample(head(position)) for position in ((0, -1) if two else (0,))]

    def _sample(self, part: Callable[[Tensor], Tensor]) -> Sample:
        q, k, v = (part(self.copies[0][name]) for name in "qkv")
        return Sample(Question(q, k, v, part(self.copies[0]["d_out"]) if self.backward else None, self.causal), part)

    def running(self, attend: Attend, passes: str) -> Callable[[int], Results]:
        """Return a function that calls `attend` on the copies in turn; for "backward" the forwards run now."""
        leaves = [[copy[name].detach().requires_grad_(self.backward) for name in "qkv"] for copy in self.copies]
        if passes == "forward":
            return lambda number: {"out": attend(*leaves[number % _COPIES])}

        def gradients(out: Tensor, copy: int, keep: bool) -> Results:
            return with_gradients(out, leaves[copy], self.copies[copy]["d_out"], keep)

        if passes == "forward+backward":
            return lambda number: gradients(attend(*leaves[number % _COPIES]), number % _COPIES, False)
        with _graphs_are_kept():
            outs = [attend(*copy) for copy in leaves]
        return lambda number: gradients(outs[number % _COPIES], number % _COPIES, True)


def with_gradients(out: Tensor, leaves: list[Tensor], d_out: Tensor, keep: bool = False) -> Results:
    """Return out and the gradients of q, k and v by name; `keep` keeps the graph for another backward."""
    found = torch.autograd.grad(out, leaves, d_out, retain_graph=keep)
    return {"out": out} | {f"gradient of {name}": x for name, x in zip("qkv", found, strict=True)}


def _graphs_are_kept() -> AbstractContextManager:
    """Keep compiled code from reusing the memory that it saved for a backward, which runs many times here."""
    return compiled_autograd.patch(donated_buffer=False)
