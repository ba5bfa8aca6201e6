"""The gradients of a call's tensors: memory for them, the records that kernels take, and the sums behind launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.call import AttentionCall
from ...core.terms import AXES, PAIRS, Gradients, Needs
from .attention import Prepared, new_results
from .combine import add_splits, new_parts
from .device import Grid
from .launch import Plan
from .ranges import rows_of_key_blocks
from .records import Arguments, Strided, TensorGradients, View


def new_gradients(ready: Prepared, needs: Needs) -> Gradients:
    """Memory for the gradients that are asked for, but those of sinks; of biases of pairs zeros, fp32 of full size."""
    call, terms, problem = ready.call, ready.call.terms, ready.specialisation.problem
    q, k, k_len, fp32 = call.q, call.k, call.visibility.k_len, torch.float32
    pairs = {}
    for name in PAIRS:
        x = getattr(terms, name)
        if x is not None and getattr(needs, name):
            pairs[name] = _of_pairs(call, k_len if AXES[name][-1] == "Sk" else x.shape[3])
    return Gradients(
        q=new_results(call, q, fp32 if problem.fp32_grad_q else q.dtype) if needs.q else None,
        k=new_results(call, k, fp32 if problem.fp32_grad_k else k.dtype) if needs.k else None,
        v=new_results(call, call.v, call.v.dtype) if needs.v else None,
        query_scale=new_results(call, q.select(3, 0)) if needs.query_scale else None,
        key_scale=new_results(call, k.select(3, 0)) if needs.key_scale else None,
        key_bias=new_results(call, terms.key_bias) if needs.key_bias and terms.key_bias is not None else None,
        **pairs,
    )


def _of_pairs(call: AttentionCall, width: int) -> Tensor:
    """Zeros [B, Hq, Sq, width] for the gradient of a bias of pairs: the kernel writes the visible ones."""
    padded = -(-width // 16) * 16  # rows begin where wide stores can
    return call.q.new_zeros((*call.q.shape[:3], padded), dtype=torch.float32)[..., :width]


def of_rows(found: Gradients) -> TensorGradients:
    """The record of a pass over rows."""
    return TensorGradients(q=found.q, query_scale=found.query_scale)


def of_keys(found: Gradients) -> TensorGradients:
    """The record of a pass over keys."""
    pairs = {}
    for name in PAIRS:
        x = getattr(found, name)
        if x is not None:
            pairs[name] = Strided(x, *x.stride())
    return TensorGradients(*found)._replace(q=None, query_scale=None, **pairs)


def summed(found: Gradients, call: AttentionCall) -> Gradients:
    """The gradients with those of pairs summed, in fp32 and one order, over the axes that a bias has once."""
    for name in PAIRS:
        x = getattr(found, name)
        if x is not None:
            bias = getattr(call.terms, name)
            found = found._replace(**{name: x.sum_to_size(bias.shape).to(bias.dtype)})
    return found


def row_bounds(chosen: Plan, arguments: Arguments, call: AttentionCall) -> Arguments:
    """The masks of a pass over keys with the rows of each block of keys, where key_ranges narrow them."""
    masks = arguments["masks"]
    view = View(*(arguments[name] for name in ("q_len", "k_len", "left", "right")), *masks[:2])
    bounds = rows_of_key_blocks(call.visibility, view, chosen.config.block_n)
    return {"masks": masks._replace(row_bounds=bounds)}


def launch_in_row_splits(chosen: Plan, grid: Grid, arguments: Arguments, ready: Prepared) -> None:
    """Launch a pass over keys whose rows are shared out among splits, and add their parts up."""
    call, specialisation = ready.call, ready.specialisation
    results, splits = arguments["gradients"], arguments["splits"]
    shared = {name: getattr(results, name) for name in ("k", "v", "key_scale", "key_bias")}
    parts = {name: new_parts(call, x, splits) for name, x in shared.items() if x is not None}
    if "key_bias" in parts:
        parts["key_bias"].zero_()  # a split writes the heads that it has rows of
    chosen.launch(grid, arguments | {"gradients": results._replace(**parts)}, specialisation.in_splits)
    for name, part in parts.items():
        add_splits(specialisation, part, shared[name])
