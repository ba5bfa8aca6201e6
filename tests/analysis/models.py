"""A small attention, and a Monitor's measures of it, computed densely."""

import torch
from torch import nn

import tritonattn
from tests.support.llama import HEADS, KV_HEADS

DIM = 8


class Net(nn.Module):
    """An attention whose heads differ so much in sharpness that a swap of two shows."""

    def __init__(self, heads: int = HEADS, kv_heads: int = KV_HEADS, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = tritonattn.nn.ScaledAttention(32, heads, kv_heads=kv_heads, bias=True, **options)
        with torch.no_grad():
            rows = torch.logspace(-1, 1.5, heads).repeat_interleave(self.attention.head_dim)
            self.attention.q_proj.weight.mul_(rows[:, None])
            self.attention.q_proj.bias.mul_(rows)

    def forward(self, x, **keywords):
        return self.attention(x, **keywords)


def dense(net: Net, x, factor, visible, real, weight, softcap=None) -> dict[str, torch.Tensor]:
    """The measures of Net's attention on x [B, S, 32] for the loss (out * weight).sum(), in float64.

    factor broadcasts to [B, Hq, S, S]; visible bool likewise; real [B, S]: rows that are not padding.
    """
    layer = net.attention
    with torch.no_grad():
        q, k, v = (one.detach().double().requires_grad_() for one in layer._projected(x))
    group = layer.heads // layer.kv_heads
    logits = factor * (q @ k.repeat_interleave(group, 1).mT)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    p = torch.softmax(capped.masked_fill(~visible, -torch.inf), -1)
    out = p @ v.repeat_interleave(group, 1)
    projected = out.transpose(1, 2).flatten(2) @ layer.o_proj.weight.double().mT + layer.o_proj.bias.double()
    (projected * weight).sum().backward()
    n = visible.sum(-1).expand(q.shape[:3])
    rows = real[:, None].expand(n.shape)
    several = rows & (n > 1)
    entropy = torch.special.entr(p).sum(-1) / torch.where(several, n, 2).log()
    heads = range(layer.heads)
    return {
        "max_logit": torch.where(visible & rows[..., None], logits, -torch.inf).amax((0, 2, 3)),
        "relative_entropy": torch.stack([entropy[:, h][several[:, h]].mean() for h in heads]),
        "near_one_hot": torch.stack([(p.amax(-1) > 0.95)[:, h][rows[:, h]].double().mean() for h in heads]),
        "near_uniform": torch.stack([(entropy > 0.98)[:, h][several[:, h]].double().mean() for h in heads]),
        "q_gradient_norm": q.grad.square().sum((0, 2, 3)).sqrt(),
        "k_gradient_norm": k.grad.square().sum((0, 2, 3)).sqrt(),
        "output_variance": torch.stack([out[:, h][rows[:, h]].var(0, correction=0).mean() for h in heads]),
    }
