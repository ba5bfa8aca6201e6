"""The first causal rows apart from the others: a part of each operand, and a part of the output's gradient."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import Function

from ...core.autograd import apply, first_order, runs_eagerly


def split(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """x [B, H, S, ...] as it is, and its first rows; the gradients of both come back as one."""
    return apply(_Split, x, rows) if x.requires_grad else (x, _first(x, rows))


def join(out: Tensor, first: Tensor) -> Tensor:
    """out [B, H, S, D]; the gradient of its first rows goes to `first`, the same values computed otherwise."""
    return apply(_Join, out, first)


def _first(x: Tensor, rows: int) -> Tensor:
    # Not x[:, :, :rows]: a batch of torch.autograd.grad has no rule for the axes that it takes whole.
    return x.narrow(2, 0, rows)


class _Split(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _first(x, rows)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.rows = inputs

    @staticmethod
    @first_order
    def backward(ctx, saved, whole: Tensor, first: Tensor):
        is_own = runs_eagerly(whole) and not whole.requires_grad  # of attention alone: see sdpa._Fold
        total = whole if is_own else whole.clone()
        _first(total, ctx.rows).add_(first)
        return total, None


class _Join(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, first: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.rows = inputs[1].shape[2]

    @staticmethod
    @first_order
    def backward(ctx, saved, g: Tensor):
        rest = g.clone()
        _first(rest, ctx.rows).zero_()
        return rest, _first(g, ctx.rows)
