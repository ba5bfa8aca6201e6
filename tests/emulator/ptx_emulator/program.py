"""Python functions made of basic blocks, on demand: one for all lanes, one under a mask."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace

from .arithmetic_code import ArithmeticCode
from .errors import PTXError
from .flow import Flow, guarded_after, guarded_by
from .instruction import Instruction
from .matrix_units import ProductGroup
from .memory_code import MemoryCode
from .parse import Kernel

_UNSUPPORTED = (KeyError, IndexError, TypeError, AttributeError, ValueError, NotImplementedError, StopIteration)


class Program(ArithmeticCode, MemoryCode):
    """The code of a kernel; symbols: variable or parameter -> address."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.flow = Flow(kernel)
        super().__init__(kernel, symbols, self.flow.doubtful)
        self.names |= {"refuse": refuse}
        self.memo: dict = {}  # bank conflicts of access patterns: the machines' of all launches
        self._functions: dict[tuple[int, bool], Callable] = {}

    def without(self, indices: frozenset[int]) -> Program:
        """The program with some instructions left out; blocks that this leaves as they are keep their functions."""
        instructions = [one.left_out() if one.index in indices else one for one in self.kernel.instructions]
        other = copy(self)
        other.kernel = replace(self.kernel, instructions=instructions)
        other.flow, other._functions = Flow(other.kernel), {}
        other.doubtful = other.flow.doubtful
        if other.doubtful != self.doubtful:
            return other
        number_of = {block[:2]: number for number, block in enumerate(self.flow.blocks)}
        for number, (start, end, *_) in enumerate(other.flow.blocks):
            same = number_of.get((start, end))
            if same is None or not indices.isdisjoint(range(start, end)):
                continue
            if other.flow.held_before(number) == self.flow.held_before(same):
                known = {masked: self._functions.get((same, masked)) for masked in (False, True)}
                other._functions |= {(number, masked): function for masked, function in known.items() if function}
        return other

    def function(self, block: int, masked: bool) -> Callable:
        """function(machine, registers, special registers) of a block for all lanes, or with a mask behind these."""
        function = self._functions.get((block, masked))
        if function is None:
            function = self._functions[block, masked] = self._compile(block, masked)
        return function

    def _compile(self, number: int, masked: bool) -> Callable:
        name = f"block_{number}{'_masked' if masked else ''}"
        lines = "\n  ".join(self._lines(number, "mask" if masked else None) or ["pass"])
        source = f"def {name}(m,R,S,mask=None):\n  {lines}\n"
        exec(compile(source, f"<{self.kernel.name} {name}>", "exec"), self.names)
        return self.names[name]

    def _lines(self, number: int, act: str | None) -> list[str]:
        block, lines, group = self.flow.blocks[number], [], None
        running, unfenced = self.flow.held_before(number)
        for one in self.flow.body(number):
            variant = _product_variant(one)
            if group is not None and (not group.takes(one, variant) if variant else group.separates(one)):
                lines += self._group_lines(group, act)
                group = None
            if variant:
                group = group or ProductGroup(one)
                group.add(one)
            else:
                lines += self._instruction_lines(one, act, running, unfenced)
            running, unfenced = guarded_after(one, running), self.flow.unfenced_after(one, unfenced)
        if group is not None:
            lines += self._group_lines(group, act)
        if block.register is not None and block.register in self.doubtful:
            branch = self.constant(self.flow.instructions[block.end - 1])
            lines.append(f"m.check_defined({branch},({block.register},),{act})")
        return lines

    def _group_lines(self, group: ProductGroup, act: str | None) -> list[str]:
        lines = [line for one in group.instructions for line in self._checks(one, act)]
        return [*lines, f"m.multiply({self.constant(group.close())},R,{act})"]

    def _instruction_lines(
        self, one: Instruction, act: str | None, running: frozenset[tuple[int, bool]], unfenced: frozenset[int]
    ) -> list[str]:
        """running, unfenced: as the flow says for wgmmas, just before this instruction."""
        lines = []
        if one.predicate is not None:
            condition = f"{'~' if one.predicate_negated else ''}R[{one.predicate}]"
            if one.predicate in self.doubtful:
                lines.append(f"m.check_defined({self.constant(one)},({one.predicate},),{act})")
            lines.append(f"mk={condition}" if act is None else f"mk=mask&{condition}")
            act = "mk"
        lines += self._checks(one, act)
        touched = frozenset(register for register, _ in running).intersection([*one.used, *one.written])
        if touched and one.base != "wgmma":
            lines.append(f"m.check_results({self.constant(one)},{self.constant(touched)},{act})")
        if unfenced and one.base == "wgmma" and one.results and unfenced & guarded_by(one):
            lines.append(f"m.report_unfenced({self.constant(one)},{min(unfenced & guarded_by(one))},{act})")
        translate = getattr(self, f"translate_{one.base}", self.translate_arithmetic)
        try:
            return lines + translate(one, act)
        except _UNSUPPORTED:
            return [*lines, f"refuse({self.constant(self.kernel)},{self.constant(one)})"]

    def _checks(self, one: Instruction, act: str | None) -> list[str]:
        """Registers that may not have been written."""
        doubtful = set(one.used) & self.doubtful - {one.predicate}
        if doubtful := tuple(sorted(doubtful - self.flow.discarded(one))) if doubtful else ():
            return [f"m.check_defined({self.constant(one)},{doubtful},{act})"]
        return []


def _product_variant(one: Instruction) -> tuple | None:
    """The properties that mma instructions share if they run together; None for an instruction that runs alone."""
    if one.base != "mma" or one.predicate is not None:
        return None
    try:
        return ProductGroup(one).variant
    except _UNSUPPORTED:
        return None


def refuse(kernel: Kernel, one: Instruction) -> None:
    """Raise what an unsupported instruction raises when it is executed."""
    what = "trap reached (a device assert?)" if one.base == "trap" else "unsupported instruction"
    raise PTXError(f"{what}\n  {kernel.where(one)}")
