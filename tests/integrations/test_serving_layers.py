"""Layers of one step of a server, over pages as vLLM and SGLang have them, against attention over contiguous copies.

Neither server is needed: tests/serving runs their engines.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.served import step_of
from tritonattn import PagedKeyStatistics, attention_varlen
from tritonattn.core.eight_bit import EIGHT_BIT, times
from tritonattn.huggingface.settings import Settings
from tritonattn.integrations.serving.layers import ServedLayer, Step
from tritonattn.integrations.serving.settings import LayerFactor
from tritonattn.integrations.vllm.pages import cell_bytes, key_statistics, keys_and_values, quantised

HEADS, KV_HEADS, DIM = 4, 2, 16
PAGE, PAGES, SEQUENCES = 16, 5, 3  # keys of a page, pages of a sequence
PADDING, TOLERANCE = 2, 1e-5
WILD = torch.tensor([-1, 1 << 30], dtype=torch.int32)
SINKS = torch.tensor([[-1.0, 0.5, 1.0, 2.5], [2.0, 1.5, -0.5, 0.0]])
OF_HEADS = torch.tensor([[[0.02, 0.05]], [[0.03, 0.01]]])


@dataclass(frozen=True)
class Config:
    """A layer of a model: the scaling of its patch, and what the server gives to it."""

    scaling: str = "log_key_count:20"
    gain: float | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    descales: tuple[Any, Any] = (None, None)


EVERYTHING: dict[str, Any] = {"window": (17, 0), "softcap": 1.5, "sinks": SINKS[1]}
LAYERS = {
    "sinks": Config(sinks=SINKS[0]),
    "no sinks": Config(),
    "other sinks": Config(sinks=SINKS[1]),
    "softcap": Config(softcap=2.0),
    "smaller softcap": Config(softcap=0.5),
    "gain": Config(gain=1.5),
    "window": Config(window=(11, 0)),
    "wider window": Config(window=(23, 0)),
    "everything": Config(**EVERYTHING, gain=0.5),
    "norms": Config("key_norm_mean"),
    "norms in a window": Config("key_norm_max", **EVERYTHING),
}
EIGHT_BITS = {
    "8 bits": Config(descales=(0.02, 0.03)),
    "other 8 bits": Config(descales=(0.05, 0.01)),
    "8 bits under a softcap": Config(softcap=2.0, descales=(0.05, 0.02)),
    "8 bits of heads": Config(descales=(OF_HEADS[0], OF_HEADS[1])),
    "8 bits of heads with everything": Config(**EVERYTHING, descales=(OF_HEADS[1], OF_HEADS[0])),
    "norms of 8 bits": Config("key_norm_mean", descales=(OF_HEADS[0], 0.03)),
}
# Sequences, their new tokens, and how many of them are decodes. vLLM puts these before the chunks; of SGLang a step is
# either decodes or chunks, some of one token.
STEPS = {
    "vllm": [((0, 1, 2), (33, 20, 5), 0), ((0, 2, 1), (1, 1, 18), 2), ((0, 1, 2), (1, 1, 1), 3), ((2, 0), (1, 30), 1)],
    "sglang": [((0, 1, 2), (33, 20, 5), 0), ((1, 0), (1, 18), 0), ((2, 0, 1), (1, 1, 1), 3)],
}


class Pages:
    """NaN in memory as a server has it: vLLM's blocks of cells, or SGLang's pools of keys and of values.

    Page 0 is none of a sequence's. The record of key norms lies behind vLLM's cells.
    """

    def __init__(self, server: str, eight_bit: bool) -> None:
        pages, dtype = 1 + SEQUENCES * PAGES, EIGHT_BIT if eight_bit else torch.float32
        if server == "sglang":
            pools = (torch.full((pages * PAGE, KV_HEADS, DIM), torch.nan) for _ in "kv")
            self.keys, self.values = (pool.unflatten(0, (-1, PAGE)) for pool in pools)
            self.record = PagedKeyStatistics(pages, PAGE, KV_HEADS)
            return
        size = cell_bytes(2 * DIM, dtype.itemsize)
        cells = torch.full((pages, KV_HEADS, PAGE, size), 0x7F, dtype=torch.uint8)  # NaN in e4m3
        cache = cells if eight_bit else cells.view(torch.float32).fill_(torch.nan)
        self.keys, self.values = (x.view(dtype) for x in keys_and_values(cache, DIM))
        self.record = key_statistics(cache, DIM)

    def write(self, new: tuple[Tensor, Tensor], slots: Tensor) -> None:
        for held, x in zip((self.keys, self.values), new, strict=True):
            if x.dtype == EIGHT_BIT:
                held, x = held.view(torch.uint8), x.view(torch.uint8)
            held[slots // PAGE, slots % PAGE] = x


class Layer:
    """A served layer, its pages, and the tokens that its sequences will have: q, k, v [SEQUENCES, 80, H, DIM]."""

    def __init__(self, config: Config, server: str) -> None:
        self.config, self.heads = config, (HEADS, KV_HEADS)
        settings = Settings.from_config({"scaling": config.scaling, "gain": config.gain})
        factor = LayerFactor.of(settings, DIM**-0.5, self.heads, DIM)
        options = {"backend": "auto", "batch_invariant": None, "owner": server}
        self.served = ServedLayer(factor, config.window, config.softcap, config.sinks, **options)
        self.pages = Pages(server, config.descales[0] is not None)
        self.q, self.k, self.v = (torch.randn(SEQUENCES, PAGE * PAGES, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.stored = self.k, self.v
        if config.descales[0] is not None:
            self.stored = tuple(quantised(x, d) for x, d in zip(self.stored, config.descales, strict=True))

    def attend(self, step: Step, tokens: list[tuple[int, slice]]) -> Tensor:
        """Write the tokens of a step and attend: what the server does. Rows of padding stay as they are."""
        q, k, v = (torch.cat([x[n, new] for n, new in tokens]) for x in (self.q, *self.stored))
        self.pages.write((k, v), step.slots)
        record, descales = None, self.config.descales
        if self.served.factor.reads_norms:
            record, keys = self.pages.record, k if descales[0] is None else times(k.float(), descales[0])
            record.enter(keys, step.new_ends, step.lengths, step.block_table, step.passes)
        q = F.pad(q, (0, 0, 0, 0, 0, PADDING), value=torch.nan)
        output = torch.full_like(q, 7.0)
        self.served.attend(q, (self.pages.keys, self.pages.values), step, record, output, descales)
        assert (output[step.tokens :] == 7.0).all()
        return output[: step.tokens]

    def expected(self, tokens: list[tuple[int, slice]]) -> Tensor:
        """The same rows in float64, over the keys and values that the pages hold, dequantised."""
        k, v = (
            times(x.double(), 1.0 if d is None else d) for x, d in zip(self.stored, self.config.descales, strict=True)
        )
        q = torch.cat([self.q[n, new] for n, new in tokens]).double()
        k, v = (torch.cat([x[n, : new.stop] for n, new in tokens]) for x in (k, v))
        rows, keys = [new.stop - new.start for _, new in tokens], [new.stop for _, new in tokens]
        ends = [torch.tensor([0, *accumulate(counts)], dtype=torch.int32) for counts in (rows, keys)]
        sinks = None if self.config.sinks is None else self.config.sinks.double()
        options = {name: getattr(self.config, name) for name in ("scaling", "gain", "window", "softcap")}
        options |= {"sinks": sinks, "causal": True, "backend": "reference"}
        return attention_varlen(q, k, v, ends[0], ends[1], max(rows), max(keys), **options)


@pytest.mark.parametrize("server", STEPS)
@torch.no_grad()
def test_layers_of_a_step_are_attention_over_contiguous_copies(server):
    torch.manual_seed(0)
    configs = LAYERS if server == "sglang" else LAYERS | EIGHT_BITS
    layers = {name: Layer(config, server) for name, config in configs.items()}
    numbers = 1 + torch.randperm(SEQUENCES * PAGES).int().view(SEQUENCES, PAGES)
    held, wrong = [0] * SEQUENCES, {}
    for at, (sequences, new, decodes) in enumerate(STEPS[server]):
        tokens = [(n, slice(held[n], held[n] + count)) for n, count in zip(sequences, new, strict=True)]
        keys = [span.stop for _, span in tokens]
        is_held = torch.arange(PAGES) * PAGE < torch.tensor(keys)[:, None]
        table = torch.where(is_held, numbers[list(sequences)], WILD[torch.arange(PAGES) % 2])
        step = step_of(list(new), keys, decodes, table, PAGE)
        for name, layer in layers.items():
            error = (layer.attend(step, tokens).double() - layer.expected(tokens)).abs().max().item()
            if not error < TOLERANCE:
                wrong[name, at] = error
        for n, span in tokens:
            held[n] = span.stop
    assert not wrong
