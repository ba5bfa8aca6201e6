"""The timing protocol, also on a card that a clock stands for, and what is noted of a card with its times."""

import pytest
import torch

from tritonattn.autotune import timing

GPU = torch.device("cuda", 0)
FLUSH = 0.1  # milliseconds of the card


class Card:
    """A stream: work begins when the host has launched it and the card is done with what came before."""

    def __init__(self) -> None:
        self.host = self.done = 0.0

    def launch(self, host: float, work: float) -> None:
        self.host += host
        self.done = max(self.done, self.host) + work

    def zero_(self) -> None:
        self.launch(0.01, FLUSH)


@pytest.fixture
def card(monkeypatch):
    card = Card()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            card.launch(0.005, 0.0)
            self.time = card.done

        def query(self) -> bool:
            return self.time <= card.host

        def synchronize(self) -> None:
            card.host = max(card.host, self.time)

        def elapsed_time(self, end) -> float:
            return end.time - self.time

    monkeypatch.setattr(torch, "empty", lambda *_, **__: card)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return card


@pytest.mark.parametrize("host", [0.02, 0.5, 2.0])
def test_the_hosts_time_is_not_in_a_cards(host, card):
    """A kernel of 0.05 ms, though the host takes longer to launch it than the card to overwrite its L2 once."""
    calls: list[int] = []
    taken = timing.take_turns({"a": lambda n: (calls.append(n), card.launch(host, 0.05))}, GPU, rounds=4, warm_up=0)
    assert taken["a"] == pytest.approx([0.05] * 4)
    assert len(calls) <= 5 + 5, "the right number of flushes, at most 32, is found by doubling"
