"""Findings and counts of a run."""

from __future__ import annotations

import collections

import numpy as np

from .errors import PTXError
from .flow import Flow
from .instruction import Instruction


class Report:
    """Findings of a run.

    races, uninitialised, faults   problems by position; each has line, text, loc, message, count
    benign                         races whose writers write equal values, as Triton's redundant threads do
    notes                          remarks, such as divergent barriers
    counts                         executed warp instructions by class, of PTX and not of machine code
    global_memory                  by class: requests, 32-byte sectors, bytes, sectors_per_request, sector_use
    shared_memory                  by class: wavefronts, ideal (without bank conflicts), conflict_degree
    seconds, ctas                  of the run
    strict                         whether a race or an uninitialised read raises PTXError
    """

    def __init__(self, name: str, flow: Flow) -> None:
        self.name, self.flow = name, flow
        self.races, self.benign, self.uninitialised, self.faults, self.notes = ({} for _ in range(5))
        self.counts, self.global_memory, self.shared_memory = {}, {}, {}
        self.seconds, self.ctas, self.strict = 0.0, 0, False
        self.executions = np.zeros(len(flow.blocks), np.int64)  # warps by block
        self.requests = collections.defaultdict(lambda: [0, 0, 0])  # instruction -> requests, sectors, bytes
        self.wavefronts = collections.defaultdict(lambda: [0, 0])  # instruction -> wavefronts, ideal

    @property
    def ok(self) -> bool:
        return not (self.races or self.uninitialised or self.faults)

    def problems(self) -> list[dict]:
        return [found for findings in (self.faults, self.races, self.uninitialised) for found in findings.values()]

    def note(self, findings: dict, key: tuple, instruction: Instruction, message: str, count: int = 1) -> None:
        """File a finding; more of the same position are counted."""
        if self.strict and any(findings is problems for problems in (self.races, self.uninitialised)):
            raise PTXError(message)
        known = findings.get(key)
        if known is None:
            findings[key] = {
                "line": instruction.line,
                "text": instruction.text,
                "loc": instruction.loc,
                "message": message,
                "count": count,
            }
        else:
            known["count"] += count

    def close(self) -> None:
        """Sum up the counters."""
        counts = collections.Counter()
        instructions = self.flow.instructions
        for block, executions in zip(self.flow.blocks, self.executions.tolist(), strict=True):
            if executions:
                for instruction in instructions[block.start : block.end]:
                    counts[instruction.counted_as] += executions
        self.counts = dict(counts.most_common())
        requests, wavefronts = self._by_class(self.requests, 3), self._by_class(self.wavefronts, 2)
        self.global_memory = {
            name: {
                "requests": count,
                "sectors": sectors,
                "bytes": size,
                "sectors_per_request": round(sectors / max(count, 1), 2),
                "sector_use": round(size / max(32 * sectors, 1), 3),
            }
            for name, (count, sectors, size) in requests.items()
        }
        self.shared_memory = {
            name: {"wavefronts": count, "ideal": ideal, "conflict_degree": round(count / max(ideal, 1), 3)}
            for name, (count, ideal) in wavefronts.items()
        }

    def _by_class(self, counters: dict, width: int) -> dict[str, list[int]]:
        total = collections.defaultdict(lambda: [0] * width)
        for index, values in counters.items():
            row = total[self.flow.instructions[index].counted_as]
            for i, value in enumerate(values):
                row[i] += value
        return total

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.ctas} CTAs, {self.seconds:.3f} s, {sum(self.counts.values())} warp instructions"]
        lines.append("  counts " + ", ".join(f"{name} {count}" for name, count in self.counts.items()))
        for name, row in self.global_memory.items():
            lines.append(
                f"  {name:12} {row['requests']} requests, {row['sectors']} sectors ({row['sectors_per_request']:.2f} "
                f"per request), {row['bytes']} bytes, sector use {100 * row['sector_use']:.0f}%"
            )
        for name, row in self.shared_memory.items():
            lines.append(
                f"  {name:12} bank conflict degree {row['conflict_degree']:.3f} ({row['wavefronts']} wavefronts, "
                f"{row['ideal']} without conflicts)"
            )
        for findings in ("faults", "races", "uninitialised", "benign", "notes"):
            for found in getattr(self, findings).values():
                lines.append(f"  {findings.upper()} (x{found['count']}): {found['message']}")
        if self.ok:
            lines.append("  no access out of bounds, no race, no uninitialised read")
        return "\n".join(lines)
