"""Problems that select a kernel's code, tile configs, and the one statement of which configs are legal."""

from __future__ import annotations

import functools
import re
from dataclasses import asdict, dataclass, field, make_dataclass
from typing import Any, NamedTuple

import torch

from ..core.terms import ADDENDS, TERMS
from .architectures import ARCHITECTURES, Architecture, unknown

# Kernels with an MMA loop, of calls with their gradients and of derivatives beyond these, and the memory-bound ones,
# whose tiles only bound the rows that a program holds.
FIRST_KERNELS = ("forward", "grad_key_value", "grad_query", "decode")
SECOND_KERNELS = ("tangent", "grad_query_second", "grad_key_value_second")
TILED_KERNELS = FIRST_KERNELS + SECOND_KERNELS
_DESCRIBED = FIRST_KERNELS[:3]  # those that can load by the tensor memory accelerator
STREAMING_KERNELS = (
    "row_terms",
    "key_statistics",
    "prefix_sums",
    "key_statistics_grad",
    "append_keys",
    "append_to_pages",
    "row_bounds",
    "keys_seen",
    "argmax_of_ranges",
    "combine_splits",
    "sum_of_splits",
)

# Row terms of a backward are padded to a multiple of this, so that every block of rows up to it divides them.
ROW_TERMS_ALIGNMENT = 128
# Rows, and keys, of a short call at most: configs are chosen for short calls and for long ones.
SHORT = 1024
# Blocks of keys in a split of decode: shorter ones would move more of their results than of the cache.
SHORTEST_SPLIT = 4

WIDEST = 512  # head dim that kernels take
WIDEST_KEYS = 1024  # of decode, and of passes over keys alone: latent attention has 576
TENSOR_MEMORY_COLUMNS = 512  # of 128 rows and 4 bytes, a program


class Target(NamedTuple):
    """A GPU architecture: ("cuda", "90") or ("hip", "gfx942"); where there is a device, its name and its processors."""

    backend: str
    arch: str
    card: str = ""
    processors: int = 0

    @classmethod
    def parse(cls, name: str) -> Target:
        """Parse "sm_90" or "gfx942"."""
        if found := re.fullmatch(r"sm_([7-9][0-9]|1[0-9]{2})|(gfx[0-9a-z-]{3,20})", name):  # LLVM aborts on older ones
            return cls("cuda", found[1]) if found[1] else cls("hip", name)
        raise ValueError(f"target: expected sm_<number from 70> or gfx<name>, got {name!r}")

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """The target of a device; CPU tensors (interpreter, emulator) take sm_80's configs."""
        if device.type != "cuda":
            return cls("cuda", "80")
        return _target_of(torch.cuda.current_device() if device.index is None else device.index)

    @property
    def name(self) -> str:
        """ "sm_90", "gfx942"."""
        return f"sm_{self.arch}" if self.backend == "cuda" else self.arch

    @property
    def is_too_old(self) -> bool:
        """True where Triton makes no code for its tensor cores, as for NVIDIA's before sm_80."""
        return self.backend == "cuda" and int(self.arch) < 80

    @property
    def has_eight_bit(self) -> bool:
        """True where Triton has the type of e4m3's numbers, as for NVIDIA's from sm_89 on; AMD's may emulate it."""
        return self.backend != "cuda" or int(self.arch) >= 89

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES.get(self.arch) or unknown(self.backend, self.arch)


@functools.cache
def _target_of(index: int) -> Target:
    card, properties = torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index)
    processors = properties.multi_processor_count
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Target("hip", arch, card or arch, processors)  # ROCm has no name where its list of them is missing
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", f"{major}{minor}", card, processors)


_FLAGS = [(term.name, bool, field(default=False)) for term in TERMS if term.flag]


@dataclass(frozen=True)
class Problem(make_dataclass("Flags", _FLAGS, frozen=True, kw_only=True)):
    """The parts of a call that select code: sizes of the tiles' inner axes, dtype, and which tensors are there.

    Each row of `TERMS` with a flag is a field too: the call has such a term, as `core.terms.flags` says.

    aux          max_logit and entropy are asked for; of a backward: lse has a gradient
    sequences    the batch is packed; of decode: sequences have different numbers of new tokens
    block_table  keys and values lie in pages
    eight_bit    keys and values are of 8 bits, and converted as they are loaded
    aligned      every address and stride of q, k, v and the output's gradient is a multiple of 16 bytes
    packed_rows  the power of two, at least 16, that holds the heads of a group times the new tokens of a decode call
    rounding     a forward also returns what its output lost when it was rounded to 16 bits, and a backward takes it
    fp32_grad_q  a 16-bit backward returns q's gradient in fp32, for what is added to it
    fp32_grad_k  likewise k's
    is_part      a backward of some of the visible keys of its rows
    short        few rows and keys, so that a GPU may have more processors than programs: at most SHORT
    invariant    a row's bits, and so its tiles, do not depend on the rest of the batch: `defaults.default_config`
    """

    head_dim: int
    value_dim: int
    dtype: torch.dtype
    right: bool = False
    left: bool = False
    key_lengths: bool = False
    key_ranges: bool = False
    mask: bool = False
    query_scale_grad: bool = False
    grouped: bool = False
    dropout: bool = False
    aux: bool = False
    sequences: bool = False
    block_table: bool = False
    packed_rows: int = 16
    aligned: bool = True
    rounding: bool = False
    fp32_grad_q: bool = False
    fp32_grad_k: bool = False
    is_part: bool = False
    short: bool = False
    invariant: bool = False
    eight_bit: bool = False

    @functools.cached_property
    def has_bias(self) -> bool:
        """True where something is added to logits."""
        return any(getattr(self, name) for name in ADDENDS)

    @functools.cached_property
    def corrects_delta(self) -> bool:
        """True where `grad_query` corrects delta, the largest error where nothing is rounded to 16 bits."""
        return self.dtype == torch.float32 and not self.is_part

    @property
    def width(self) -> int:
        """The wider of the padded head and value dims."""
        return max(padded_dim(self.head_dim), padded_dim(self.value_dim))


def sum_columns(problem: Problem, target: Target) -> int:
    """Columns of the sums over keys that a kernel keeps for each row: see `backends.triton.softmax.partial_sums`."""
    in_registers = target.backend == "cuda" and not target.architecture.has_tensor_memory
    return 8 if in_registers and problem.dtype.itemsize == 2 else 1


def key_sum_columns(problem: Problem, config: TileConfig, target: Target) -> int:
    """Columns of the sums over rows that grad_key_value keeps for each key, as `sum_columns`.

    Triton gives the warps of mma.sync the longer axis of a tile: with more rows than keys warps have different columns.
    With a bias, one column costs 17 % of the loop's instructions (sm_80 at D 128; static, triton 3.9).
    """
    columns = sum_columns(problem, target)
    if columns == 1 or target.architecture.has_wgmma or config.block_m <= config.block_n:
        return columns
    return min(columns * config.num_warps, config.block_m // 2)


# The fields of a config that select no code, with their defaults: how a kernel's programs share out the work.
SHARES = {"l2_percent": 100, "split_blocks": SHORTEST_SPLIT}
# The fields that select code on some architectures alone, with the defaults that are legal everywhere.
OPTIONS: dict[str, Any] = {"waves_per_eu": 0, "warp_specialize": False}
WRITTEN_IN = ("triton", "gluon")  # kernels
# The fields that a file leaves out where they are the default.
OPTIONAL_FIELDS: dict[str, Any] = {**SHARES, **OPTIONS, "kernel": WRITTEN_IN[0]}
# Registers of a thread at the start of Gluon's forward, by block_m; warpgroups then share them out. Three warpgroups
# of 64 rows have 160 each, two have 240, and the one that loads has 24.
REGISTERS = {128: 168, 192: 128}


@dataclass(frozen=True)
class TileConfig:
    """block_m query rows and block_n keys per tile, warps per program, stages of the software pipeline.

    descriptors    load the tiles that need no mask by the tensor memory accelerator (sm_90, sm_100)
    l2_percent     of the L2 cache, for the keys and values of the heads that run side by side: `tuning.order`
    split_blocks   blocks of keys of a split of decode: at least so many, where a cache is full
    waves_per_eu   waves that a SIMD of an AMD GPU shall hold, which bounds their registers; 0: the compiler's choice
    warp_specialize  divide the loop over tiles that need no mask among groups of warps (sm_100, sm_103)
    kernel         "gluon": the kernel that is written in Gluon, of num_warps for each 64 rows and as many that load
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    l2_percent: int = SHARES["l2_percent"]
    split_blocks: int = SHARES["split_blocks"]
    waves_per_eu: int = OPTIONS["waves_per_eu"]
    warp_specialize: bool = OPTIONS["warp_specialize"]
    kernel: str = WRITTEN_IN[0]

    def as_record(self) -> dict[str, Any]:
        """The fields for a file, without OPTIONAL_FIELDS that are the default."""
        return {name: value for name, value in asdict(self).items() if value != OPTIONAL_FIELDS.get(name)}


def holds_keys(kernel: str) -> bool:
    """True for passes over keys: a program holds block_n of them, and rows stream by."""
    return kernel.startswith("grad_key_value")


def streamed_width(kernel: str, problem: Problem) -> int:
    """Elements of all tiles that stream by, of one key or row: k and v, or q and d_out, and their tangents."""
    head, value = padded_dim(problem.head_dim), padded_dim(problem.value_dim)
    if kernel not in SECOND_KERNELS:
        return head + value
    return 2 * head + (1 if holds_keys(kernel) else 2) * value


def holds_more(problem: Problem) -> bool:
    """True where passes of derivatives hold a tile of a mask or bias, a slope, ranges of rows or Philox's counters."""
    of_pairs = problem.mask or problem.dropout or problem.bias or problem.relative_bias
    return of_pairs or problem.softcap or problem.key_ranges


def padded_dim(dim: int) -> int:
    """The power of two, at least 16 (the MMA's shortest axis), that holds dim."""
    return max(16, 1 << (dim - 1).bit_length())


def legal_reasons(kernel: str, config: TileConfig, problem: Problem, target: Target) -> list[str]:
    """Reasons why a config may not be compiled; empty if it may. The one statement of the constraints."""
    reasons = []
    for name in ("block_m", "block_n")[config.kernel == "gluon" :]:  # in Gluon, block_m is of whole warpgroups
        size = getattr(config, name)
        if size < 16 or size & (size - 1):
            reasons.append(f"{name} {size} is not a power of two of at least 16")
    if config.num_warps not in (1, 2, 4, 8, 16):
        reasons.append(f"num_warps {config.num_warps} is not a power of two up to 16")
    if fault := target.architecture.faulty_warps.get(config.num_warps):
        reasons.append(f"num_warps {config.num_warps} {fault}")
    if config.waves_per_eu and target.backend != "hip":
        reasons.append(f"waves_per_eu needs an AMD GPU, {target.name} is none")
    if config.warp_specialize and not (config.descriptors and may_specialise(kernel, problem, target)):
        reasons.append("warp_specialize needs descriptors, forward or gradients up to width 64, and sm_100")
    for name, least in (("num_stages", 1), ("l2_percent", 1), ("split_blocks", SHORTEST_SPLIT), ("waves_per_eu", 0)):
        if getattr(config, name) < least:
            reasons.append(f"{name} {getattr(config, name)} is below {least}")
    if config.kernel == "gluon":
        reasons += _gluon_reasons(kernel, config, problem, target)
    elif kernel in TILED_KERNELS and ROW_TERMS_ALIGNMENT % max(config.block_m, 1):
        reasons.append(f"block_m {config.block_m} does not divide the row terms' alignment {ROW_TERMS_ALIGNMENT}")
    if config.descriptors and not may_use_descriptors(kernel, problem, target):
        reasons.append(f"descriptors need {', '.join(_DESCRIBED)} on sm_90 or later, 16 bits and aligned tensors")
    shared, limit = _shared_estimate(kernel, config, problem, target), target.architecture.shared_bytes
    if shared > limit:
        reasons.append(f"tiles need at least {shared} bytes of shared memory, {target.name} has {limit}")
    columns = _tensor_memory_estimate(kernel, config, problem) if target.architecture.has_tensor_memory else 0
    if columns > TENSOR_MEMORY_COLUMNS:
        reasons.append(f"tiles need {columns} columns of tensor memory, {target.name} has {TENSOR_MEMORY_COLUMNS}")
    return reasons


_TERMS_OF_GLUON = ("query_scale", "key_scale", "key_bias", "sinks", "softcap")


def _gluon_reasons(kernel: str, config: TileConfig, problem: Problem, target: Target) -> list[str]:
    """Reasons why the kernel in Gluon may not be compiled: LLVM aborts the process for targets without wgmma."""
    reasons = []
    if kernel != "forward" or not target.architecture.has_wgmma:
        reasons.append("gluon needs forward on sm_90")
    if triton_version() < (3, 6):
        reasons.append("gluon needs triton 3.6")
    is_other = problem.mask or problem.dropout or problem.block_table or problem.invariant or problem.eight_bit
    is_other |= any(term.flag and getattr(problem, term.name) for term in TERMS if term.name not in _TERMS_OF_GLUON)
    if is_other or problem.dtype.itemsize != 2 or not problem.aligned:
        others = "no mask, biases of pairs or behind a softcap, dropout, pages or batch_invariant"
        reasons.append(f"gluon needs 16 bits and aligned tensors, {others}")
    if padded_dim(problem.head_dim) != padded_dim(problem.value_dim) or not 64 <= problem.width <= 256:
        reasons.append("gluon needs head and value dims that pad to the same of 64, 128 and 256")
    of_masks = problem.key_ranges or problem.left or (problem.right and (problem.key_scale or problem.key_bias))
    holds_more = of_masks or problem.softcap or problem.aux  # than the 160 registers of a thread of three warpgroups
    most = {64: (128 if holds_more else 192, 128), 128: (128, 64 if problem.softcap else 128)}
    most_rows, most_keys = most.get(problem.width, (128, 64))
    if config.block_m not in REGISTERS or config.block_m > most_rows or config.block_n > most_keys:
        reasons.append(f"gluon needs block_m 128 or 192, up to {most_rows}, and block_n up to {most_keys}")
    if config.num_warps != 4 or not config.descriptors:
        reasons.append("gluon needs num_warps 4 and descriptors")
    return reasons


@functools.cache
def triton_version() -> tuple[int, int]:
    """Major and minor version of the installed Triton."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def one_line(error: Exception) -> str:
    """An error's type and message on one line, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def may_use_descriptors(kernel: str, problem: Problem, target: Target) -> bool:
    """True where the tensor memory accelerator can load a kernel's tiles."""
    is_able = kernel in _DESCRIBED and target.architecture.has_descriptors
    is_able = is_able and not (problem.block_table or problem.eight_bit)
    return is_able and problem.aligned and problem.dtype.itemsize == 2


def may_specialise(kernel: str, problem: Problem, target: Target) -> bool:
    """True where Triton can divide a loop among groups of warps, one of them for the tensor memory accelerator.

    Gradients of wider heads would take more tensor memory than there is in most tiles: their code is a trap.
    """
    is_able = target.architecture.has_tensor_memory and (kernel == "forward" or problem.width <= 64)
    return is_able and may_use_descriptors(kernel, problem, target)


def _shared_estimate(kernel: str, config: TileConfig, problem: Problem, target: Target) -> int:
    """Bytes of the tiles that pass through shared memory: the held ones once, the streamed ones per stage.

    Where tensor instructions read shared memory themselves (wgmma, tcgen05), the stage in use is one more. Without a
    pipeline, AMD's held tiles of 16 bits pass one after another, all before the first streamed one, into registers.
    """
    if kernel not in TILED_KERNELS:
        return 0
    head, value = padded_dim(problem.head_dim), padded_dim(problem.value_dim)
    rows = streamed_width(kernel, problem)
    held, streamed = (config.block_m, config.block_n)
    if holds_keys(kernel):
        held, streamed = streamed, held
    held_width = head if kernel in ("forward", "decode") else head + value
    if kernel in SECOND_KERNELS:  # tangents stand beside what they are of, and without a pipeline tiles pass in turn
        held_width = 2 * (head + value) if holds_keys(kernel) else 2 * head + value
        rows = max(head, value) if config.num_stages == 1 else rows
    reads_shared = kernel != "decode" and target.architecture.family.products in ("wgmma", "tcgen05")
    in_use = reads_shared and problem.dtype.itemsize == 2
    stages = max(config.num_stages - (not in_use), 1)
    in_turn = target.backend == "hip" and kernel != "decode" and config.num_stages == 1 and problem.dtype.itemsize == 2
    in_turn |= kernel in SECOND_KERNELS and problem.dtype.itemsize == 4  # whose products are of registers
    if in_turn:
        return max(held * min(held_width, problem.width), streamed * rows) * problem.dtype.itemsize
    return (held * held_width + streamed * rows * stages) * problem.dtype.itemsize


def _tensor_memory_estimate(kernel: str, config: TileConfig, problem: Problem) -> int:
    """Columns of fp32 logits, in a backward their gradients too, of both as 16-bit operands, and of the sums.

    Gradients of a tangent have all that twice.
    """
    head, value = padded_dim(problem.head_dim), padded_dim(problem.value_dim)
    held, columns = config.block_m, 0
    if kernel in ("forward", "tangent"):  # a tangent has logits' too
        columns = config.block_n * (3 if kernel == "forward" else 6) // 2 + value
    elif kernel.startswith("grad_query"):
        columns = config.block_n * 5 // 2 + head
    elif holds_keys(kernel):
        held, columns = config.block_n, config.block_m * 3 + head + value
    columns *= 2 if kernel.endswith("_second") else 1
    return columns * held // 128 if problem.dtype.itemsize == 2 else 0
