"""A scaling of your own, learned, and how to test it: against its dense formula, under every kind of mask."""

import torch
from torch import nn

import tritonattn
from tritonattn import Scales, Scaling


class RmsPower(nn.Module, Scaling):
    """(mean ||k||^2)^(-a_h / 2) over the visible keys: a = 1 is key_norm_rms, a = 0 leaves key lengths alone."""

    name = "rms_power"
    reads_keys = False  # `scales` takes all it needs from `statistics`: decoding then gathers no pages for it

    def __init__(self, heads):
        super().__init__()
        self.power = nn.Parameter(torch.ones(heads, 1))

    def scales(self, q, k, visibility, statistics):  # vectors: [B, Hq, Sq]
        n = visibility.counts().clamp(min=1)
        mean = (statistics.length_square_sum / n).clamp(min=1e-12)  # [B, Hkv, Sq]
        mean = mean.repeat_interleave(q.shape[1] // mean.shape[1], 1)
        return Scales(1.0, query=mean ** (-self.power / 2))

    def multiplier(self, q, k, visible):  # the formula, dense: k is repeated to the query heads
        squares = torch.where(visible, k.square().sum(-1)[:, :, None], 0).sum(-1, keepdim=True)
        mean = (squares / visible.sum(-1, keepdim=True).clamp(min=1)).clamp(min=1e-12)
        return mean ** (-self.power[..., None] / 2)


torch.manual_seed(0)
B, HEADS, KEY_HEADS, S, DIM = 2, 4, 2, 24, 16
scaling = RmsPower(HEADS).double()
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (5, 2)},
    "padding": {"key_lengths": torch.tensor([24, 7])},
    "ranges": {"key_ranges": torch.stack([torch.arange(S) // 2, torch.arange(S) + 1], -1).expand(B, S, 2).int()},
    "holes": {"mask": torch.rand(B, 1, S, S) > 0.3},
}


def run(backend, masks):
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, heads, S, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    leaves = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    out = tritonattn.attention(*leaves, scaling=scaling, backend=backend, **masks)
    return out, *torch.autograd.grad(out.square().sum(), [*leaves, scaling.power])


for name, masks in MASKS.items():
    torch.testing.assert_close(run("sdpa", masks), run("reference", masks))
    print(f"{name}: output and gradients of q, k, v and the power agree")
