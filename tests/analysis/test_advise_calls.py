"""`advise` on modules that call `tritonattn.attention` themselves: it reads their kinds of layers off the calls."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonattn
from tests.support.llama import ids
from tritonattn.analysis import advise
from tritonattn.nn import SSMax

TOKENS, WIDTH, HEADS, D = ids(2, 40), 64, 4, 16
POSITIONS, OPEN, BARE, TRAP = "positions first", "without positions", "without QK-norm", "base beyond the window"


def turned(x, part=1.0):
    """Rotary positions of the first channels, written as a user would."""
    channels = int(x.shape[-1] * part)
    angle = torch.arange(x.shape[-2])[:, None] * 1e4 ** (-torch.arange(0, channels, 2) / channels)
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x[..., :channels].float().unflatten(-1, (-1, 2)).contiguous())
    return torch.cat([torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype), x[..., channels:]], -1)


@dataclass(frozen=True)
class Layer:
    """rotary: the share of channels turned; norm: none, functional, or a module that no list of names has."""

    rotary: float = 0.0
    norm: str = "functional"
    arguments: tuple = ()


class Block(nn.Module):
    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.before, self.of_queries, self.of_keys = nn.RMSNorm(WIDTH), nn.RMSNorm(D), nn.RMSNorm(D)

    def forward(self, x, **more):
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4)
        if self.layer.norm == "functional":
            q, k = F.rms_norm(q, (D,)), F.rms_norm(k, (D,))
        elif self.layer.norm == "module":
            q, k = self.of_queries(q), self.of_keys(k)
        if self.layer.rotary:
            q, k = turned(q, self.layer.rotary), turned(k, self.layer.rotary)
        out = tritonattn.attention(q, k, v, **{"causal": True, **dict(self.layer.arguments), **more})
        return x + self.out(out.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    def __init__(self, *layers: Layer, learned=False):
        super().__init__()
        torch.manual_seed(0)
        self.parts = [Block(layer) for layer in layers]
        self.tokens, self.blocks = nn.Embedding(61, WIDTH), nn.Sequential(*self.parts)
        self.positions = nn.Parameter(torch.randn(40, WIDTH)) if learned else None

    def forward(self, tokens):
        x = self.tokens(tokens)
        return self.blocks(x if self.positions is None else x + self.positions[: tokens.shape[1]])


def arguments(**given):
    return tuple(given.items())


def by_mask(window):
    distance = torch.arange(40)[:, None] - torch.arange(40)
    return arguments(causal=False, mask=(distance >= 0) & (distance < window))


WINDOW = arguments(window=(7, 0))
LOCAL, ROTARY, FREE = Layer(1.0, arguments=WINDOW), Layer(1.0), Layer()
CASES = {
    "the recipe": ((LOCAL, FREE), ["healthy", OPEN]),
    "the recipe with its factor": ((LOCAL, Layer(arguments=arguments(scaling="log_key_count:40"))), ["healthy"] * 2),
    "with a tensor as factor": ((LOCAL, Layer(arguments=arguments(scaling=torch.ones(40)[None]))), ["healthy"] * 2),
    "with a constant": ((LOCAL, Layer(arguments=arguments(scaling=0.5))), ["healthy", OPEN]),
    "masks": ((Layer(1.0, arguments=by_mask(8)), Layer(arguments=by_mask(40))), ["healthy", OPEN]),
    "plain rotary": ((ROTARY, ROTARY), [POSITIONS] * 2),
    "rotary with a factor": ((Layer(1.0, arguments=arguments(scaling="log_key_count:40")),), [POSITIONS]),
    "a half of the channels turned": ((Layer(0.5), FREE), [POSITIONS, OPEN]),
    "no positions": ((FREE, FREE), [OPEN] * 2),
    "weights of a norm": ((LOCAL, Layer(norm="module")), ["healthy", OPEN]),
    "no QK-norm": ((Layer(1.0, "none", WINDOW), Layer(norm="none")), ["healthy", BARE]),
    "a factor in the window": (
        (Layer(1.0, arguments=arguments(window=(7, 0), scaling="log_key_count:40")), FREE),
        [TRAP, OPEN],
    ),
    "a base of the window": (
        (Layer(1.0, arguments=arguments(window=(7, 0), scaling=SSMax(HEADS, base=8))), FREE),
        ["healthy", OPEN],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_kinds_of_layers(case, dtype):
    layers, rules = CASES[case]
    net = GPT(*layers)
    with torch.no_grad():
        for block in net.parts:
            block.of_queries.weight.uniform_(0.5, 2.0)
            block.of_keys.weight.uniform_(0.5, 2.0)
            block.qkv.weight[: 2 * WIDTH].mul_(1.0 if block.layer.norm != "none" else 2.0)
    net = net.to(dtype).train()
    advice = advise(net, TOKENS)
    assert net.training
    assert [one.rule.name for one in advice.findings] == rules
    assert [one.layer for one in advice.findings] == [f"blocks.{number}" for number in range(len(layers))]
    assert advice.text.startswith("positions first: ") == (POSITIONS in rules)
    assert advice.unseen == ()
    assert "not seen" not in advice.text
    if TRAP in rules:
        assert advice.findings[0].mode == "sqrt_dim"


def test_positions_that_are_not_seen_are_named():
    """Learned positions come with the tokens; a bias of distances acts behind q and k."""
    slopes = -torch.arange(40.0)[None, None, None] * torch.tensor([0.5, 0.25, 0.1, 0.05])[:, None, None]
    for net in (
        GPT(FREE, FREE, learned=True),
        GPT(*(Layer(arguments=arguments(relative_bias=slopes)),) * 2),
    ):
        advice = advise(net, TOKENS)
        assert advice.unseen == ("blocks.0", "blocks.1")
        assert "Positions are not seen in all layers: where they are rotary or learned, they fail first" in advice.text
        assert all(one.reading.rotary is None for one in advice.findings)
    assert advise(GPT(LOCAL, FREE, learned=True), TOKENS).unseen == ("blocks.1",)


def test_tokens_that_are_no_ids_may_bring_positions():
    """As the layers of a model alone, which are given what its embedding and positions were."""
    x = torch.randn(2, 40, WIDTH)
    assert [one.reading.rotary for one in advise(GPT(FREE, FREE).blocks, x).findings] == [None, None]
    assert [one.reading.rotary for one in advise(GPT(ROTARY, FREE).blocks, x).findings] == [True, False]


def test_padding_takes_no_part_and_packed_sequences_are_refused():
    class Padded(GPT):
        def forward(self, tokens, key_ranges):
            x = self.tokens(tokens)
            for part in self.parts:
                x = part(x, key_ranges=key_ranges)
            return x

    class Packed(GPT):
        def forward(self, tokens):
            q, k, v = self.parts[0].qkv(self.tokens(tokens[0])).unflatten(-1, (3, HEADS, D)).unbind(1)
            cu_seqlens = torch.tensor([0, 16, 40], dtype=torch.int32)
            return tritonattn.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 24, 24, causal=True)

    ranges = torch.tensor([[23, 40], [0, 40]]).unsqueeze(1).expand(-1, 40, -1)  # on the left
    for finding in advise(Padded(ROTARY, ROTARY), {"tokens": TOKENS, "key_ranges": ranges}).findings:
        assert finding.reading.rotary is True
        assert finding.reading.key_count_mean == pytest.approx((17 * 18 + 40 * 41) / 2 / 57)
    with pytest.raises(NotImplementedError, match="tokens: expected sequences in rows of their own, got packed ones"):
        advise(Packed(FREE), TOKENS)
