"""The suites of `python -m perf sweep`: their cases by device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

import tritonattn
from tritonattn.lab.simulation.distributions import DISTRIBUTIONS

from ..cases.accuracy import AccuracyCase
from ..cases.attention import DTYPES, OURS, Case
from ..cases.contest import Contest
from ..cases.decode import DecodeCase
from ..cases.form_cases import FormCase
from ..cases.forms import Size, forms
from ..cases.peers import PEERS
from ..cases.varlen import VarlenCase, spread
from ..cases.work import Shape

MODES = tuple(tritonattn.SCALINGS)
BACKENDS = {"cuda": "triton", "cpu": "sdpa", "interpret": "triton", "emulate": "triton"}
_TOKENS, _WIDTH = 2**14, 2048  # tokens of a training batch on a GPU; head_dim times heads of its model
_CACHED = 2**18  # tokens in all caches of a decoding batch on a GPU


@dataclass(frozen=True)
class Axes:
    """The values that a suite iterates over; batch and heads follow from them."""

    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    scalings: tuple[str, ...]
    peers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """A device, and how kernels run: on "cuda", "cpu", or on CPU tensors in Triton's "interpret"er or "emulate"d."""

    name: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.name == "cuda" else "cpu")

    @property
    def backend(self) -> str:
        return BACKENDS[self.name]

    def shape(self, length: int, head_dim: int, causal: bool) -> Shape:
        """Choose a training batch: equally many tokens for every length on a GPU, one sequence of 8 heads on a CPU."""
        if self.name == "cuda":
            batch, heads = max(1, _TOKENS // length), max(1, _WIDTH // head_dim)
        else:
            batch, heads = 1, 8 if self.name == "cpu" else 1
        return Shape(batch, heads, heads, length, length, head_dim, causal)


@dataclass(frozen=True)
class Suite:
    """Cases of a sweep: `axes` by device and `quick` ones, from which `contests` makes them."""

    about: str
    axes: dict[str, Axes]
    quick: Axes
    contests: Callable[[Axes, Machine], Iterator[Contest | AccuracyCase]]

    def chosen(self, machine: Machine, quick: bool) -> Axes:
        """Choose the axes; --quick takes one length and dtype of the suite's where kernels do not run on a device."""
        axes = self.axes[machine.name]
        if not quick:
            return axes
        if machine.name in ("cuda", "cpu"):
            return self.quick
        return replace(axes, lengths=axes.lengths[:1], dtypes=axes.dtypes[-1:])


def _against_peers(suite: str, passes: str) -> Callable[[Axes, Machine], Iterator[Contest]]:
    """Compare ours, the baseline, with every peer: one case for every scaling."""

    def contests(axes: Axes, machine: Machine) -> Iterator[Contest]:
        for scaling, dtype, length in product(axes.scalings, axes.dtypes, axes.lengths):
            for head_dim, causal in product(axes.head_dims, (False, True)):
                peers = [peer for peer in axes.peers if peer != "flex" or machine.name != "cuda" or length in _FLEX]
                who = ((OURS, scaling), *((peer, scaling) for peer in peers))
                shape = machine.shape(length, head_dim, causal)
                yield Case(suite, shape, dtype, passes, who, machine.device, machine.backend).contest()

    return contests


def _overhead(axes: Axes, machine: Machine) -> Iterator[Contest]:
    """Compare ours with every scaling, statistics of the keys included, with ours with sqrt_dim."""
    who = tuple((OURS, scaling) for scaling in ("sqrt_dim", *(s for s in axes.scalings if s != "sqrt_dim")))
    for head_dim, dtype, length in product(axes.head_dims, axes.dtypes, axes.lengths):
        for passes in ("forward", "forward+backward"):
            shape = machine.shape(length, head_dim, causal=True)
            yield Case("overhead", shape, dtype, passes, who, machine.device, machine.backend).contest()


def _against_plain(axes: Axes, machine: Machine) -> Iterator[Contest]:
    """Compare ours, and peers with the costliest scaling, with plain F.scaled_dot_product_attention."""
    plain = ("sdpa", "sqrt_dim")
    ours = tuple((OURS, scaling) for scaling in axes.scalings)
    peers = tuple((peer, axes.scalings[-1]) for peer in axes.peers if (peer, axes.scalings[-1]) != plain)
    for dtype, head_dim, length in product(axes.dtypes, axes.head_dims, axes.lengths):
        for causal, passes in product((False, True), ("forward", "forward+backward")):
            shape = machine.shape(length, head_dim, causal)
            yield Case("cpu", shape, dtype, passes, (plain, *ours, *peers), machine.device, machine.backend).contest()
    # A call so small times Python alone.
    tiny = Shape(1, 1, 1, 16, 16, 16, causal=False)
    for passes in ("forward", "forward+backward"):
        yield Case("cpu", tiny, "fp32", passes, (plain, *ours), machine.device, machine.backend, calls=100).contest()


def _forms(axes: Axes, machine: Machine) -> Iterator[Contest]:
    """List the forms of attention of a CPU; bf16 forward alone, biases of pairs in batches of 4 to 1,024 tokens."""
    if machine.name != "cpu":
        return
    for dtype, length, scaling in product(axes.dtypes, axes.lengths, axes.scalings):
        for head_dim, batch in product(axes.head_dims, (1, 4)):
            size = Size(batch, 8, length, head_dim, DTYPES[dtype], scaling)
            small = Size(1, 1, 32, head_dim, DTYPES[dtype], scaling)
            for form in forms(small):
                if form.name.startswith(_OF_PAIRS) and batch * length**2 > _MOST_PAIRS:
                    continue  # with its gradient and those of a peer's logits, 15 GB
                for passes in ("forward", "forward+backward") if form.backward and dtype == "fp32" else ("forward",):
                    yield FormCase(form.name, size, dtype, passes).contest()


def _decode(axes: Axes, machine: Machine) -> Iterator[Contest]:
    """List decoding cases with groups of 4 query heads; on a GPU equally many cached tokens for every length."""
    for head_dim, dtype, scaling in product(axes.head_dims, axes.dtypes, axes.scalings):
        for length, paged in product(axes.lengths, (False, True)):
            batch, heads = (max(1, _CACHED // length), 32) if machine.name == "cuda" else (2, 8)
            shape = Shape(batch, heads, heads // 4, 1, length, head_dim, causal=False)
            yield DecodeCase(shape, dtype, paged, scaling, axes.peers, machine.device, machine.backend).contest()


def _varlen(axes: Axes, machine: Machine) -> Iterator[Contest]:
    """List cases of packed sequences."""
    for head_dim, dtype, scaling in product(axes.head_dims, axes.dtypes, axes.scalings):
        for length, passes in product(axes.lengths, ("forward", "forward+backward")):
            lengths = spread(length, max(1, 2 * _TOKENS // length) if machine.name == "cuda" else 4)
            heads = machine.shape(length, head_dim, causal=True).heads
            yield VarlenCase(
                lengths, heads, head_dim, dtype, passes, scaling, axes.peers, machine.device, machine.backend
            ).contest()


def _accuracy(axes: Axes, machine: Machine) -> Iterator[AccuracyCase]:
    """List cases of accuracy for every distribution of keys."""
    for head_dim, dtype, keys, count in product(axes.head_dims, axes.dtypes, DISTRIBUTIONS, axes.lengths):
        yield AccuracyCase(keys, count, head_dim, dtype, axes.scalings, machine.device, machine.backend)


# Head dims of Stable Diffusion 1.5, SigLIP and DiT, Phi-2, ViT-g, Phi-3; 40 pads to 64, the others to 128.
DIMS = (40, 72, 80, 88, 96)
_FLEX = (2048, 8192)  # lengths of FlexAttention on a GPU: it is compiled for every case, for half a minute
_POWERS = tuple(2**n for n in range(10, 15))  # 1k to 16k
_ON_CPU = ("sdpa", "sdpa-math", "flex", "eager")
_COMMON = ("sqrt_dim", "key_norm_mean")


def _axes(
    lengths: dict[str, tuple[int, ...]],
    head_dims: tuple[int, ...],
    scalings: tuple[str, ...],
    peers: bool = True,
    dtypes: tuple[str, ...] | None = None,
) -> dict[str, Axes]:
    """Make axes by device, with all peers or none: bf16 on a GPU, fp32 and short sequences elsewhere by default."""
    everybody = tuple(PEERS) if peers else ()
    return {
        "cuda": Axes(lengths["cuda"], head_dims, dtypes or ("bf16",), scalings, everybody),
        "cpu": Axes(lengths["cpu"], head_dims, dtypes or ("fp32",), scalings, everybody),
        **dict.fromkeys(
            ("interpret", "emulate"),
            Axes((32, 64), (16,), dtypes or ("fp32",), scalings, ("sdpa", "eager") if peers else ()),
        ),
    }


_MOST_PAIRS = 2**24  # of a head: 4,096 tokens
_OF_PAIRS = ("bias of pairs", "relative_bias")
_KEY_COUNTS = (1, 16, 256, 4096, 65536)
_DECODING = ("sdpa", "flash-attn-2")
_TRAINING = {"cuda": _POWERS, "cpu": (512, 1024, 2048)}
_QUICK = Axes((128,), (32,), ("fp32",), _COMMON, _ON_CPU)
_CPU_AXES = Axes(
    (512, 1024, 2048, 4096, 8192),
    (64, 128),
    ("fp32", "bf16"),
    ("sqrt_dim", "key_count", "key_norm_sum"),
    ("flex", "eager"),
)

SUITES = {
    "forward": Suite(
        "the forward pass against peers",
        _axes(_TRAINING, (64, 128), _COMMON),
        replace(_QUICK, scalings=("key_norm_mean",)),  # FlexAttention is compiled for every case
        _against_peers("forward", "forward"),
    ),
    "backward": Suite(
        "the backward pass alone against peers",
        _axes(_TRAINING, (64, 128), _COMMON),
        _QUICK,
        _against_peers("backward", "backward"),
    ),
    "cpu": Suite(
        "ours over plain F.scaled_dot_product_attention, forward and forward+backward",
        dict.fromkeys(BACKENDS, _CPU_AXES),
        Axes((128,), (32,), ("fp32",), ("sqrt_dim", "key_norm_sum"), ("eager",)),
        _against_plain,
    ),
    "forms": Suite(
        "on a CPU: masks, packing, biases, statistics, dropout and decoding over the best that PyTorch does by hand",
        dict.fromkeys(
            BACKENDS, Axes((256, 1024, 4096), (64,), ("fp32", "bf16"), ("sqrt_dim", "log_key_count", "key_norm_mean"))
        ),
        Axes((64,), (32,), ("fp32",), ("sqrt_dim",)),
        _forms,
    ),
    "overhead": Suite(
        "every scaling over sqrt_dim, by length",
        _axes({"cuda": (128, 512, 2048, 4096, 8192, 32768, 65536), "cpu": (128, 512, 2048, 4096)}, (64,), MODES, False),
        Axes((64, 128), (32,), ("fp32",), MODES),
        _overhead,
    ),
    "scaling": Suite(
        "every scaling, ours and as peers do it",
        _axes({"cuda": (4096,), "cpu": (1024,)}, (64,), MODES),
        Axes((128,), (32,), ("fp32",), MODES, ("sdpa", "eager")),
        _against_peers("scaling", "forward+backward"),
    ),
    "dims": Suite(
        "other head dims of models against peers, at one length",
        _axes({"cuda": (4096,), "cpu": (1024,)}, DIMS, _COMMON[1:]),
        Axes((128,), (40,), ("fp32",), _COMMON[1:], ("sdpa", "eager")),
        _against_peers("dims", "forward+backward"),
    ),
    "decode": Suite(
        "a decoding step over a copy of as many bytes, by length of the cache",
        _axes({"cuda": (1024, 4096, 16384, 65536), "cpu": (1024, 4096)}, (128,), _COMMON),
        Axes((256,), (32,), ("fp32",), _COMMON, _DECODING),
        _decode,
    ),
    "varlen": Suite(
        "packed sequences over the same ones padded",
        _axes({"cuda": (1024, 4096), "cpu": (512,)}, (128,), _COMMON),
        Axes((64,), (32,), ("fp32",), _COMMON, _DECODING),
        _varlen,
    ),
    "accuracy": Suite(
        "errors against float64, by distribution and number of keys",
        _axes({"cuda": _KEY_COUNTS, "cpu": _KEY_COUNTS}, (64,), MODES, False, tuple(DTYPES)),
        Axes((1, 64, 1024), (32,), ("fp32", "bf16"), MODES),
        _accuracy,
    ),
    "ceilings": Suite(
        "a product of matrices and a copy, which every sweep begins with, alone",
        _axes({"cuda": (), "cpu": ()}, (), (), False, tuple(DTYPES)),
        Axes((), (), tuple(DTYPES), ()),
        lambda axes, machine: iter(()),
    ),
}
