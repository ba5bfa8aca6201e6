"""A mini-model whose training shows whether a backend's gradients are those of the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonattn.nn import LEARNED, ScaledAttention
from tritonattn.scaling import SCALINGS

MODES = (*SCALINGS, *LEARNED)
WIDTH, CLASSES = 16, 8
# Nats. Losses of two backends that compute the same gradients differ by some 1e-7 after 100 steps in fp32; those of a
# backward pass that is off by a tenth by 1e-4 after 4 steps, by 4e-3 and more after 100.
BAND = 1e-5


class MiniModel(nn.Module):
    """Classes of every position by causal attention, with one key head: the only way from another position.

    fault   factor on the gradients of q and k, as of a backward pass whose scale is wrong
    """

    def __init__(self, mode: str, backend: str, heads: int = 2, fault: float = 1.0) -> None:
        super().__init__()

        class Attention(ScaledAttention):
            def positioned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
                for x in (q, k):
                    x.register_hook(lambda gradient: gradient * fault)
                return q, k

        self.attention = Attention(WIDTH, heads, kv_heads=1, head_dim=8, scaling=mode, causal=True, backend=backend)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x))


def losses(
    mode: str,
    backend: str,
    steps: int,
    *,
    batch: int = 4,
    length: int = 12,
    heads: int = 2,
    rate: float = 0.1,
    fault: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[steps] of training on one batch of random features [batch, length, WIDTH] and classes: SGD with momentum."""
    torch.manual_seed(0)
    model = MiniModel(mode, backend, heads, fault)
    x, target = 2 * torch.randn(batch, length, WIDTH), torch.randint(CLASSES, (batch * length,))
    model, x, target = model.to(device), x.to(device), target.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    curve = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x).flatten(0, 1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve).cpu()
