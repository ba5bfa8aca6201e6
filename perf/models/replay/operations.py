"""The instructions of a loop as the replay takes them: the unit that each takes, and what it starts or waits for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..static.control_flow import Instruction
from ..static.machine_code import instruction_class, shared_bytes, tensor_work
from .control import Control
from .parameters import Parameters

# Units of a scheduler. A queued unit holds one instruction that waits for its turn, the others none.
PIPES = ("fp32", "integer", "uniform", "mma")
QUEUES = ("exp", "memory")

# By name: unit, turn and latency as fields of Parameters.
_TIMINGS = {
    "MUFU": ("exp", "exp", "exp_latency"),
    "SHFL": ("memory", "shuffle", "shuffle_latency"),
    "LDSM": ("memory", "load_matrix", "shared_latency"),
    "STSM": ("memory", "store_matrix", "shared_latency"),
    "LDS": ("memory", "shared", "shared_latency"),
    "STS": ("memory", "shared", "shared_latency"),
    "LDG": ("memory", "shared", "global_latency"),
    "LDL": ("memory", "shared", "local_latency"),
    "STG": ("memory", "shared", "store_latency"),
    "STL": ("memory", "shared", "store_latency"),
    "LDGSTS": ("memory", "asynchronous", "store_latency"),
    **dict.fromkeys(("LDC", "ULDC", "LDCU", "S2R", "S2UR", "R2UR"), ("uniform", "uniform", "constant_latency")),
    **dict.fromkeys(("VOTE", "VOTEU", "ELECT"), ("uniform", "uniform", "constant_latency")),
}
_CLASS_TIMINGS = {
    "fp32": ("fp32", "fp32", ""),
    "multiply": ("fp32", "multiply", ""),
    **dict.fromkeys(("integer", "compare", "convert"), ("integer", "integer", "")),
    "uniform": ("uniform", "uniform", "uniform_latency"),
}
_WITH_OPERANDS = ("fp32", "multiply", "integer", "compare", "convert", "exp", "shuffle", "shared")
_REGISTER = re.compile(r"(?<!U)\bR(\d+)")
# Clocks until a request of the TMA has read its descriptor, and an arrival its operands.
_DESCRIPTOR, _ARRIVAL = 40, 29


class Operation(NamedTuple):
    """An instruction of the loop.

    unit       of PIPES or QUEUES, "wgmma", or "" for none; taken for `turn` clocks
    latency    clocks until the result is there; 0: the stall count covers it
    operands   registers read from the file
    act        "product": a wgmma; "product wait": until at most `amount` groups of them run
               "copy": cp.async of `amount` bytes by four warps; "commit": closes their group; "copy wait": as product's
               "request": to the TMA; "poll": until a request is there
               "barrier": of the program; "turn", "pass": of warpgroups that take turns. Else "".
    amount     as said; of a product 1 where it ends a group
    in_registers   the first operand of a product lies in registers
    """

    name: str
    control: Control
    unit: str = ""
    turn: float = 0.0
    latency: float = 0.0
    operands: int = 0
    act: str = ""
    amount: int = 0
    in_registers: bool = False


def operations(
    body: Sequence[tuple[Instruction, Control]], labels: dict[str, int], parameters: Parameters
) -> list[Operation]:
    """Translate the straight path through a loop's body, without the retries of waits.

    labels: the index in the body of the instruction behind each label.
    """
    takes_turns = any(instruction.opcode.startswith("BAR.ARV") for instruction, _ in body)
    found: list[Operation] = []
    kept: set[str] = set()
    index = 0
    while index < len(body):
        instruction, control = body[index]
        operands, kept = _operands(instruction, kept)
        found.append(_operation(instruction, control, operands, takes_turns, parameters))
        index += 1
        if found[-1].act == "poll" and index < len(body) and (target := _skips(body[index][0], labels)) > index:
            found.append(Operation("BRA", body[index][1]))
            index = target
    return found


def of_consumer(path: list[Operation], takes_turns: bool, parameters: Parameters) -> list[Operation]:
    """Change the path of a warpgroup that consumes what others load, whose barriers no other has.

    Where consumers take turns, the last wait for an mbarrier before the first product is that for a turn, and the first
    arrival behind the last product passes it on.
    """
    release = math.ceil(parameters.barrier)
    path = [
        one._replace(act="", control=one.control._replace(stall=max(release, one.control.stall)))
        if one.act == "barrier"
        else one
        for one in path
    ]
    if takes_turns:
        products = [position for position, one in enumerate(path) if one.act == "product"]
        turn = max(position for position, one in enumerate(path) if one.act == "poll" and position < products[0])
        is_arrival = [one.name == "SYNCS" and one.act == "" for one in path]
        path[turn] = path[turn]._replace(act="turn")
        behind = is_arrival.index(True, products[-1])
        path[behind] = path[behind]._replace(act="pass")
    return path


def _skips(instruction: Instruction, labels: dict[str, int]) -> int:
    """Return where a branch goes that leaves the retries of a wait out, else -1."""
    if instruction.name != "BRA" or not instruction.predicate.startswith("@P"):
        return -1
    return next((labels[name] for name in labels if f"({name})" in instruction.operands), -1)


def _operands(instruction: Instruction, kept: set[str]) -> tuple[int, set[str]]:
    """Count registers that an instruction reads, without those that the last one kept; return those that it keeps."""
    count, keeps = 0, set()
    for operand in re.split(r",\s*", instruction.operands)[1:]:
        if (found := _REGISTER.search(operand)) and "UR" not in operand:
            count += 0 if found[1] in kept else 2 if ".64" in operand else 1
            if ".reuse" in operand:
                keeps.add(found[1])
    return count, keeps


def _operation(
    instruction: Instruction, control: Control, operands: int, takes_turns: bool, parameters: Parameters
) -> Operation:
    of_opcode = instruction_class(instruction)
    if instruction.name in ("HMMA", "HGMMA"):
        return _product(instruction, control, parameters)
    act, amount, latency = _act(instruction, takes_turns, parameters)
    of_class = _CLASS_TIMINGS.get(of_opcode) if not instruction.name.startswith("U") else _CLASS_TIMINGS["uniform"]
    timing = _TIMINGS.get(instruction.name) or of_class
    if act in ("request", "poll") or timing is None or of_opcode == "control":
        return Operation(instruction.name, control, latency=latency, act=act, amount=amount)
    unit, turn, latency_name = timing
    return Operation(
        instruction.name,
        control,
        unit,
        getattr(parameters, turn),
        getattr(parameters, latency_name) if latency_name else 0.0,
        operands if of_opcode in _WITH_OPERANDS else 0,
        act,
        amount,
    )


def _product(instruction: Instruction, control: Control, parameters: Parameters) -> Operation:
    work, operand_bytes, warps = tensor_work([instruction], 0, 4)
    if warps == 1:
        return Operation(instruction.name, control, "mma", 4 * work / parameters.rates.tensor)
    clocks = max(work / parameters.rates.tensor, operand_bytes / 128)
    is_last = "gsb0" in instruction.operands
    in_registers = instruction.operands.count("gdesc[") == 1
    return Operation(
        instruction.name, control, "wgmma", clocks, act="product", amount=int(is_last), in_registers=in_registers
    )


def _act(instruction: Instruction, takes_turns: bool, parameters: Parameters) -> tuple[str, int, float]:
    """Return the act, its amount and its latency."""
    name, opcode, operands = instruction.name, instruction.opcode, instruction.operands
    if opcode.startswith("WARPGROUP.DEPBAR"):
        return "product wait", int(operands.rpartition("0x")[2], 16), 0.0
    if name == "DEPBAR" and operands.startswith("SB0"):
        return "copy wait", int(operands.rpartition("0x")[2], 16), 0.0
    if name == "LDGSTS":
        return "copy", 4 * shared_bytes(instruction), 0.0
    if name == "LDGDEPBAR":
        return "commit", 0, 0.0
    if name == "UTMALDG":
        return "request", 0, _DESCRIPTOR
    if name == "SYNCS":
        return ("poll", 0, parameters.poll) if "PHASECHK" in opcode else ("", 0, _ARRIVAL)
    if name == "BAR":
        act = "pass" if "ARV" in opcode else "turn" if takes_turns else "barrier"
        return act, 0, 0.0
    return "", 0, 0.0
