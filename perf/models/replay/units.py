"""Units of a scheduler: from which clock each takes another instruction, and when what it took is done."""

from __future__ import annotations

from .parameters import Parameters


class Pipe:
    """Takes an instruction when the last one's turn is over."""

    def __init__(self) -> None:
        self.accepts = 0.0

    def take(self, now: float, turn: float) -> float:
        """Return the clock at which the instruction starts."""
        self.accepts = now + turn
        return now


class Queue:
    """Holds one instruction that waits: takes another when that one has started."""

    def __init__(self) -> None:
        self.accepts = self._free = 0.0

    def take(self, now: float, turn: float) -> float:
        start = max(now, self._free)
        self.accepts, self._free = start, start + turn
        return start


class Gate:
    """The clock from which a full queue takes another product."""

    accepts = 0.0


class TensorUnit:
    """Asynchronous products of all warpgroups, one after the other in the order of their issue."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._starts: list[float] = []
        self._begun = self._free = 0.0
        self.of_shared, self.of_registers = Gate(), Gate()

    def take(self, now: float, clocks: float) -> float:
        """Return the clock at which the product's result may be read."""
        parameters = self._parameters
        start = max(now + parameters.wgmma_start, self._free)
        if start > self._free:
            self._begun = start
        self._free = start + clocks
        self._starts = [*self._starts[-max(parameters.queue_of_shared, parameters.queue_of_registers) :], start]
        self.of_shared.accepts = self._start_of_last(parameters.queue_of_shared)
        self.of_registers.accepts = self._start_of_last(parameters.queue_of_registers)
        return self._free + parameters.wgmma_tail

    def _start_of_last(self, count: int) -> float:
        return self._starts[-count] if len(self._starts) >= count else 0.0

    def has_work(self, now: float) -> bool:
        return self._free > now

    def is_running(self, now: float) -> bool:
        return self._begun <= now < self._free


class RegisterFile:
    """Ports that all instructions read operands through; results of wgmma take half of them while it runs."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._free = 0.0

    @property
    def accepts(self) -> float:
        return self._free - self._parameters.operand_slack

    def read(self, now: float, operands: int, during_products: bool) -> None:
        parameters = self._parameters
        each = parameters.operand_during_products if during_products else parameters.operand
        self._free = max(self._free, now) + operands * each


class Channel:
    """From L2 to a processor's shared memory: one copy after the other."""

    def __init__(self, bytes_a_clock: float) -> None:
        self._rate = bytes_a_clock
        self._free = 0.0

    def carry(self, start: float, count: float) -> float:
        """Return the clock at which the last of `count` bytes leaves."""
        self._free = max(start, self._free) + count / self._rate
        return self._free


class Requests:
    """Loads that a program asks of the TMA ahead of their use.

    each     requests that one poll waits for
    ahead    polls between a request and the one that waits for it; what the loop did not ask for itself is there
    """

    def __init__(self, each: int, ahead: int) -> None:
        self._each, self._ahead = each, ahead
        self._arrivals: list[float] = []

    def add(self, arrival: float) -> None:
        self._arrivals.append(arrival)

    def arrival(self, poll: int) -> float:
        """Return the clock at which the data of poll 0, 1, ... is there, infinity if nobody asked for it so far."""
        if not self._each:
            return 0.0
        last = (poll + 1 - self._ahead) * self._each - 1
        if last < 0:
            return 0.0
        return self._arrivals[last] if last < len(self._arrivals) else float("inf")
