"""A new scaling, learned, and its check: against its dense formula, under every form of mask."""

import torch
from torch import nn

import tritonattn
from tritonattn import Scales, Scaling


class RmsPower(nn.Module, Scaling):
    """(mean ||k||^2)^(-a_h / 2) over the visible keys: a = 1 is key_norm_rms, a = 0 leaves key norms alone."""

    name = "rms_power"
    reads_keys = False  # `scales` takes all it needs from `statistics`: decoding then gathers no pages for it

    def __init__(self, heads):
        super().__init__()
        self.power = nn.Parameter(torch.ones(heads, 1))

    def scales(self, q, k, visibility, statistics):  # vectors: [B, Hq, Sq]
        n = visibility.counts().clamp(min=1)
        mean = (statistics.norm_square_sum / n).clamp(min=1e-12)  # [B, Hkv, Sq]
        mean = mean.repeat_interleave(q.shape[1] // mean.shape[1], 1)
        return Scales(1.0, query=mean ** (-self.power / 2))

    def multiplier(self, q, k, visible):  # the formula, dense: k is repeated to the query heads
        squares = torch.where(visible, k.square().sum(-1)[:, :, None], 0).sum(-1, keepdim=True)
        mean = (squares / visible.sum(-1, keepdim=True).clamp(min=1)).clamp(min=1e-12)
        return mean ** (-self.power[..., None] / 2)


torch.manual_seed(0)
scaling = RmsPower(heads=4)
for mask, difference in tritonattn.check_scaling(scaling).items():
    print(f"{mask}: both formulas and their gradients agree to {difference:.0e}")


class Hasty(RmsPower):
    """The same with the mean over all keys, which leaks the future."""

    def scales(self, q, k, visibility, statistics):
        mean = k.square().sum(-1).mean(-1, keepdim=True).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return Scales(1.0, query=mean ** (-self.power / 2))


try:
    tritonattn.check_scaling(Hasty(heads=4))
except ValueError as error:
    print(error)

q, k, v = torch.randn(2, 4, 24, 16), *torch.randn(2, 2, 2, 24, 16)
tritonattn.attention(q, k, v, scaling=scaling, causal=True).square().sum().backward()
print("gradient of the power:", scaling.power.grad.flatten().tolist())
