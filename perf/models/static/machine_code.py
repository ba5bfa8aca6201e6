"""Static facts of a kernel's machine code: registers, memory, spills, and the work of its MMA loops."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass

from triton.compiler import CompiledKernel

from tritonattn.autotune.gate import number_behind, read_binary, read_code
from tritonattn.tuning.config import Problem, padded_dim

from .control_flow import Instruction, Listing, Span, innermost, is_ptx_mma, loops, parse, ptx_loops
from .lanes import Lanes

# Classes of opcodes (up to their first dot); MUFU is the exp unit, U* the uniform datapath; others are integer.
_OPCODES = {
    "tensor": "HMMA HGMMA QGMMA IMMA IGMMA QMMA OMMA DMMA UTCHMMA UTCQMMA UTCOMMA UTCIMMA",
    "exp": "MUFU",
    "fp32": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FFMA32I FADD32I HFMA2 HMUL2 HADD2 UFFMA UFMUL UFADD",
    "multiply": "IMAD UIMAD IMAD32I IDP",
    "compare": "FMNMX FMNMX3 FSEL FSETP FSET FCHK HMNMX2 UFMNMX UFSETP",
    "convert": "F2FP F2F I2F F2I I2FP F2IP I2I FRND",
    "shared": "LDS LDSM STS STSM ATOMS",
    "tensor_memory": "LDTM STTM LDT STT UTCCP UTCATOMSWS UTCSHIFT",
    "global": "LDG STG LDGSTS LD ST RED REDG ATOM ATOMG LDC LDCU ULDC UTMALDG UTMASTG UTMAPF UTMAREDG UBLKCP UBLKRED",
    "shuffle": "SHFL REDUX CREDUX VOTE MATCH",
    "barrier": "BAR SYNCS WARPSYNC DEPBAR LDGDEPBAR WARPGROUP FENCE MEMBAR UTCBAR ARRIVES BSYNC BSSY CCTL ERRBAR ELECT "
    "NANOSLEEP USETMAXREG UTMACMDFLUSH UTMACCTL ACQBULK CGAERRBAR",
    "local": "LDL STL",
    "control": "BRA EXIT NOP BRX CALL RET JMP BREAK PLOP3 UPLOP3 P2R R2P UP2UR BMOV KILL WARPEXIT YIELD",
}
CLASSES = (*_OPCODES, "integer", "uniform")
_CLASS_OF = {opcode: name for name, opcodes in _OPCODES.items() for opcode in opcodes.split()}
_COMMIT = "wgmma.commit_group"
_PACKED = ("FFMA2", "FMUL2", "FADD2")


@dataclass(frozen=True)
class MmaLoop:
    """One iteration of a loop with tensor instructions and no such loop inside.

    instructions   by class, of one warp; `tensor` are the MMAs themselves
    packed         fp32 instructions that do two operations a lane
    tiles          iterations of the source's loop in one of these: more than 1 where ptxas unrolled it
    flops          of the tensor instructions, of the whole program (thread block); more than the tiles need where warps
                   that find too few rows repeat each other's work
    shared_bytes   moved to and from shared memory by the whole program: loads, stores, asynchronous copies, and
                   operands of wgmma and tcgen05. Writes of the TMA are left out: no instruction holds their size
    operand_bytes  of them, operands of wgmma and tcgen05; 0: no products that run while warps go on
    products       groups of wgmma that the source commits, and product_waits, waits for them; 0 without wgmma
    """

    instructions: dict[str, int]
    packed: int
    tiles: int
    flops: int
    shared_bytes: int
    operand_bytes: int = 0
    products: int = 0
    product_waits: int = 0

    @property
    def total(self) -> int:
        return sum(self.instructions.values())

    @property
    def other(self) -> int:
        """Instructions of one warp that are not MMAs."""
        return self.total - self.instructions["tensor"]


@dataclass(frozen=True)
class MachineCode:
    """Resources: registers, stack_bytes, spill_bytes of a thread; shared_bytes of a program; columns of tensor_memory.

    spill_bytes    loaded from and stored to local memory by the instructions inside loops, each counted once.
                   AMD: of the whole kernel, as its compiler reports them
    mma_loops      None for AMD, whose loops are not read
    instructions   of the whole kernel; 0 for AMD
    direct_loads   AMD: instructions that copy from memory to LDS, through no register
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    spill_bytes: int
    tensor_memory: int = 0
    mma_loops: tuple[MmaLoop, ...] | None = None
    instructions: int = 0
    direct_loads: int = 0

    @property
    def unmasked_loop(self) -> MmaLoop | None:
        """The loop over blocks without a mask: the one with the fewest other instructions for its MMAs' work."""
        return min(self.mma_loops or (), key=lambda loop: loop.other / loop.flops, default=None)


def read_machine_code(compiled: CompiledKernel) -> MachineCode:
    """Read a kernel that was compiled for any target."""
    read = read_code(compiled)
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        scratch = number_behind(r"\.private_segment_fixed_size:?\s+", assembly)
        direct = len(re.findall(r"^\s*(?:buffer|global)_load_.* lds\b|^\s*global_load_lds_", assembly, re.MULTILINE))
        return MachineCode(read.registers, scratch, read.shared_bytes, read.spill_bytes, direct_loads=direct)
    code = parse(disassemble(compiled.asm["cubin"]))
    spans = loops(code)
    inside = {index for span in spans for index in span.indices}
    spills = sum(_local_bytes(code.instructions[index]) for index in inside)
    hot = _mma_loops(code, spans, compiled.asm["ptx"], compiled.metadata.num_warps)
    memory = (read.spill_bytes, read.shared_bytes, spills, read.tensor_memory)
    return MachineCode(read.registers, *memory, hot, len(code.instructions))


def flops_per_logit(kernel: str, problem: Problem) -> int:
    """Count a row and key's FLOPs, head dims padded: 2 products forward, 3 for dq, 4 for dk and dv.

    A tangent has 5 and its gradients 8 and 10, where all tensors have tangents, and gradients reach these too.
    """
    query_key, value = padded_dim(problem.head_dim), padded_dim(problem.value_dim)
    products = {
        "grad_query": (2, 1),
        "grad_key_value": (2, 2),
        "tangent": (3, 2),
        "grad_query_second": (6, 2),
        "grad_key_value_second": (6, 4),
    }
    of_heads, of_values = products.get(kernel, (1, 1))
    return 2 * (of_heads * query_key + of_values * value)


@functools.lru_cache(maxsize=4)
def disassemble(cubin: bytes) -> str:
    """Return the listing of the nvdisasm in triton.

    -ndf leaves out an analysis of stacked branches, which took a quarter of the time; kernels have none. -hex prints
    each instruction's encoding behind it.
    """
    return read_binary("nvdisasm", cubin, "-c", "-ndf", "-hex")


def instruction_class(instruction: Instruction) -> str:
    name = instruction.name
    return _CLASS_OF.get(name) or ("uniform" if name.startswith("U") or name in ("R2UR", "S2UR") else "integer")


def _mma_loops(code: Listing, spans: list[Span], ptx: str, warps: int) -> tuple[MmaLoop, ...]:
    """Find the loops that hold tensor instructions and no other such loop, in order.

    ptxas turns an MMA of the PTX into one instruction, and LLVM does not unroll loops that synchronise a program, so
    the MMAs of a loop in the PTX are those of one tile.
    """
    tensor = {index for index, one in enumerate(code.instructions) if instruction_class(one) == "tensor"}
    inner, lanes = innermost(spans, tensor), Lanes(code)
    source = ptx_loops(ptx)
    of_a_tile = [(sum(map(is_ptx_mma, loop)), sum(one.opcode.startswith(_COMMIT) for one in loop)) for loop in source]
    if len(set(of_a_tile)) == 1:
        of_a_tile = of_a_tile[:1] * len(inner)
    found = zip(inner, of_a_tile, strict=True)
    return tuple(_mma_loop(code.instructions, lanes, span, *counts, warps) for span, counts in found)


def _mma_loop(
    instructions: list[Instruction], lanes: Lanes, span: Span, mmas_of_a_tile: int, products: int, warps: int
) -> MmaLoop:
    body = [instructions[index] for index in span.body]
    flops = of_operands = shared = 0
    for index in span.body:
        instruction = instructions[index]
        if instruction_class(instruction) == "tensor":
            work, operands, sharing_warps = tensor_work(instructions, index, warps)
            flops += work * warps // sharing_warps
            of_operands += operands * warps // sharing_warps
        else:
            in_pairs = instruction.name == "LDS" and _width(instruction) > 4 and lanes.read_in_pairs(index)
            shared += shared_bytes(instruction, in_pairs) * warps
    mix = Counter(instruction_class(instruction) for instruction in body)
    packed = sum(instruction.name in _PACKED for instruction in body)
    tiles, rest = divmod(mix["tensor"], mmas_of_a_tile)
    if rest:
        raise ValueError(f"loop: expected a multiple of the PTX's {mmas_of_a_tile} MMAs, got {mix['tensor']}")
    waits = sum(one.opcode.startswith("WARPGROUP.DEPBAR") for one in body)
    return MmaLoop(dict(mix), packed, tiles, flops, shared + of_operands, of_operands, tiles * products, waits)


def tensor_work(instructions: list[Instruction], index: int, warps: int) -> tuple[int, int, int]:
    """Return (FLOPs, bytes of operands in shared memory, warps that share it) of a 16-bit tensor instruction.

    One warp issues HMMA, with operands in registers; four warps share wgmma (HGMMA), a program tcgen05 (UTCHMMA).
    """
    instruction = instructions[index]
    if instruction.name == "HMMA":
        shape = instruction.opcode.split(".")[1]  # m, n and k written together
        return {"16816": 4096, "1688": 2048, "1684": 1024}[shape], 0, 1
    in_shared = instruction.operands.count("gdesc[")
    if instruction.name == "HGMMA":
        m, n, k = map(int, instruction.opcode.split(".")[1].split("x"))
        sharing = 4
    elif instruction.name == "UTCHMMA":
        descriptor = _constant(instructions, index, _found(r"idesc\[(UR\d+)\]", instruction.operands))
        m, n = (descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3  # PTX ISA, tcgen05 instruction descriptor
        k = 8 if descriptor >> 7 & 7 == 2 else 16  # tf32, else 16 bits
        sharing = warps
    else:
        raise ValueError(f"tensor instruction: expected HMMA, HGMMA or UTCHMMA, got {instruction.opcode}")
    return 2 * m * n * k, 2 * k * (n + (m if in_shared == 2 else 0)), sharing


def _constant(instructions: list[Instruction], index: int, register: str) -> int:
    """Find the constant that the last write before an instruction put into a uniform register."""
    for instruction in reversed(instructions[:index]):
        if re.match(rf"{register}\b", instruction.operands):
            value = re.fullmatch(r"UR\d+, (0x[0-9a-f]+)", instruction.operands.strip())
            if instruction.name == "UMOV" and value:
                return int(value[1], 16)
            break
    raise ValueError(f"tcgen05 descriptor: expected a constant in {register} at {instructions[index]}")


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"operands: expected {pattern!r}, got {text!r}")
    return found[1]


def _width(instruction: Instruction) -> int:
    """Count the bytes a lane of a load or store: 4 unless the opcode says otherwise."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in instruction.opcode.split(".")[1:] if part in widths), 4)


def _local_bytes(instruction: Instruction) -> int:
    return _width(instruction) if instruction_class(instruction) == "local" else 0


def shared_bytes(instruction: Instruction, in_pairs: bool = False) -> int:
    """Count the bytes that a warp moves to or from shared memory.

    A load brings a register of a warp a clock, 128 bytes, and two registers where lanes read one address in pairs, n
    and n ^ 1 or n and n ^ 2, as where all read one: half of the bytes (NVIDIA on its forum, of compute capability 7.0
    to 7.5: forums.developer.nvidia.com/t/unexpected-shared-memory-bank-conflict/77228; taken for all).
    """
    if instruction.predicate.strip() == "@!PT":  # never runs
        return 0
    if instruction.name in ("LDSM", "STSM"):  # matrices of 8 x 8 16-bit elements
        return 128 * next((int(part) for part in instruction.opcode.split(".") if part in ("2", "4")), 1)
    if instruction.name in ("LDS", "STS", "LDGSTS"):
        registers = -(-_width(instruction) // 4)
        return 128 * -(-registers // 2) if in_pairs else 32 * _width(instruction)
    return 0
