"""Cases of packed sequences of different lengths, against the same ones padded to the longest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tritonattn

from .attention import DTYPES, OURS, entrant_name, our_rounding, with_gradients
from .check import Question, Sample, checker
from .contest import Contest, Entrant, Results, Unavailable
from .peers import package, require_16_bits, require_gpu
from .recipes import CONSTANTS, prescaled
from .work import Shape, bytes_moved, flops

PADDED = f"{OURS} padded"
_COPIES = 2


@dataclass(frozen=True)
class Ragged:
    """Sequences in a row, x [T, H, D], with their offsets [N + 1] and their padded form."""

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @property
    def slots(self) -> Tensor:
        """Index of every token in a flattened [N, longest]."""
        parts = [torch.arange(length) + n * self.longest for n, length in enumerate(self.lengths)]
        return torch.cat(parts).to(self.device)

    def padded(self, x: Tensor) -> Tensor:
        """Pad x [T, H, D] with zeros to [N, H, longest, D]."""
        flat = x.new_zeros(len(self.lengths) * self.longest, *x.shape[1:])
        flat[self.slots] = x
        return flat.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2).contiguous()


def spread(longest: int, count: int) -> tuple[int, ...]:
    """Spread the lengths of `count` sequences evenly up to the longest: half of a padded batch is padding."""
    return tuple(max(1, longest * (n + 1) // count) for n in range(count))


@dataclass(frozen=True)
class VarlenCase:
    """Causal attention over sequences; forward, or forward and backward."""

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: str
    passes: str
    scaling: str
    peers: tuple[str, ...]
    device: torch.device
    backend: str

    @property
    def ragged(self) -> Ragged:
        return Ragged(self.lengths, self.device)

    def contest(self) -> Contest:
        shapes = [Shape(1, self.heads, self.heads, n, n, self.head_dim, causal=True) for n in self.lengths]
        axes = {
            "length": max(self.lengths),
            "sequences": len(self.lengths),
            "tokens": sum(self.lengths),
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "passes": self.passes,
            "scaling": self.scaling,
            "heads": self.heads,
            "backend": self.backend,
        }
        work = sum(flops(shape, self.passes) for shape in shapes)
        size = sum(bytes_moved(shape, self.passes, DTYPES[self.dtype]) for shape in shapes)
        return Contest("varlen", axes, self.enter, entrant_name(PADDED, self.scaling), self.device, work, size)

    def enter(self) -> list[Entrant]:
        copies = [self._inputs(seed) for seed in range(_COPIES)]
        parts = [self.packed_head(position) for position in self.positions]
        heads = [[part(x) for x in copies[0]] for part in parts]
        questions = [Question(*x[:3], x[3] if self.passes != "forward" else None, causal=True) for x in heads]
        names = (PADDED, OURS, *self.peers)
        return [self._entrant(name, copies, questions) for name in names]

    @property
    def positions(self) -> tuple[int, ...]:
        """The checked sequences: the last, and the first unless it is one token, whose gradients are 0."""
        return (0, -1) if self.lengths[0] > 1 else (-1,)

    def packed_head(self, position: int) -> Callable[[Tensor], Tensor]:
        """Make a function that takes [T, H, D] to one head [1, 1, S, D]: the first of all at 0, the last at -1."""
        rows = slice(self.lengths[0]) if position == 0 else slice(-self.lengths[-1], None)
        return lambda x: x[rows, position][None, None]

    def padded_head(self, position: int) -> Callable[[Tensor], Tensor]:
        """Make a function that takes [N, H, longest, D] to the same head."""
        return lambda x: x[position, position, : self.lengths[position]][None, None]

    def _inputs(self, seed: int) -> list[Tensor]:
        """Draw q, k, v and the gradient of out: [T, H, D]."""
        random = torch.Generator(self.device).manual_seed(seed)
        size = (4, sum(self.lengths), self.heads, self.head_dim)
        return list(torch.randn(size, generator=random, device=self.device, dtype=torch.float32).to(DTYPES[self.dtype]))

    def _entrant(self, name: str, copies: list[list[Tensor]], questions: list[Question]) -> Entrant:
        """Make an entrant; padded ones get padded inputs, since padding is not timed."""
        padded = name in (PADDED, "sdpa")
        ours = name in (OURS, PADDED)
        rounding = our_rounding(self.backend, self.dtype) if ours else "operands"
        part = self.padded_head if padded else self.packed_head
        samples = [
            Sample(question, part(position)) for question, position in zip(questions, self.positions, strict=True)
        ]

        def prepare() -> Callable[[int], Results]:
            attend = self._call(name)
            tensors = [[self.ragged.padded(x) for x in copy] if padded else copy for copy in copies]
            return self._running(attend, tensors)

        check = checker(samples, self.scaling, rounding)
        return Entrant(entrant_name(name, self.scaling), self.scaling, prepare, check, ours)

    def _running(self, attend: Callable[..., Tensor], tensors: list[list[Tensor]]) -> Callable[[int], Results]:
        backward = self.passes != "forward"
        leaves = [[x.detach().requires_grad_(backward) for x in copy[:3]] for copy in tensors]

        def call(number: int) -> Results:
            copy = number % _COPIES
            out = attend(*leaves[copy])
            return with_gradients(out, leaves[copy], tensors[copy][3]) if backward else {"out": out}

        return call

    def _call(self, name: str) -> Callable[..., Tensor]:
        calls = {OURS: self._ours, PADDED: self._ours_padded, "sdpa": self._sdpa_padded}
        calls |= {"flash-attn-2": lambda: self._flash_attn("flash_attn")}
        calls |= {"flash-attn-3": lambda: self._flash_attn("flash_attn_interface")}
        if name not in calls:
            raise Unavailable("is not asked for packed sequences: it has no such call, or none that is public")
        return calls[name]()

    def _ours(self) -> Callable[..., Tensor]:
        ends, longest = self.ragged.offsets, self.ragged.longest

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tritonattn.attention_varlen(
                q, k, v, ends, ends, longest, longest, scaling=self.scaling, causal=True, backend=self.backend
            )

        return attend

    def _ours_padded(self) -> Callable[..., Tensor]:
        lengths = torch.tensor(self.lengths, device=self.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tritonattn.attention(
                q, k, v, scaling=self.scaling, causal=True, key_lengths=lengths, backend=self.backend
            )

        return attend

    def _sdpa_padded(self) -> Callable[..., Tensor]:
        """Make PyTorch's call on padded inputs; causal alone hides right padding from all real rows."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, scale = prescaled(self.scaling, q, k, causal=True)
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

        return attend

    def _flash_attn(self, name: str) -> Callable[..., Tensor]:
        """Make a call of flash_attn_varlen_func."""
        function = package(name).flash_attn_varlen_func
        require_gpu(self.device)
        require_16_bits(DTYPES[self.dtype])
        if self.scaling not in CONSTANTS:
            raise Unavailable(f"no recipe for {self.scaling} of packed sequences")
        scale = CONSTANTS[self.scaling](self.head_dim)
        ends, longest = self.ragged.offsets, self.ragged.longest

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = function(q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True)
            return out[0] if isinstance(out, tuple) else out

        return attend
