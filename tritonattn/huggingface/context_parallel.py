"""A patched layer under torch's context_parallel: full causal attention to the whole sequence, or an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.torch_distributed import TorchContext
from ..distributed import context_parallel_attention
from ..distributed.layout import Split


def over_ranks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: dict[str, Any],
    keywords: dict[str, Any],
    context: TorchContext,
) -> Any:
    """Attention of this rank's rows [B, H, S / P, D] to the whole sequence, from arguments made of its part alone.

    Masks of a part say nothing of the whole, so they must be those of one causal sequence: position_ids say whether it
    is one. Raises NotImplementedError or ValueError for anything else.
    """
    name = type(module).__name__
    if arguments["dropout_p"] > 0:
        raise NotImplementedError(f"dropout: expected 0 under context_parallel, got {arguments['dropout_p']} in {name}")
    if arguments.get("bias") is not None:
        raise NotImplementedError(
            f"position_bias: expected none under context_parallel, whose ranks know its entries for their tokens alone,"
            f" got one in {name}; leave the layer to attn_implementation='eager'"
        )
    split = Split.of(context.mesh, context.layout)
    if not _is_causal(module, query, key, arguments, keywords, split):
        raise NotImplementedError(
            f"attention_mask: expected full causal attention without padding and cache under context_parallel, got"
            f" another mask in {name}; leave the layer to attn_implementation='sdpa'"
        )
    positions, expected = keywords.get("position_ids"), split.positions(query.shape[2], query.device)
    if not isinstance(positions, Tensor):
        raise NotImplementedError(f"position_ids: expected to reach {name} under context_parallel, got none")
    if positions.shape[-1] != query.shape[2] or not bool((positions == expected).all()):
        raise ValueError(
            f"position_ids: expected the positions in the sequence of this rank's tokens, {int(expected[0])} and so on,"
            " got others: give the model position_ids of the whole sequence, one document long, and put them among the"
            " buffers of context_parallel"
        )
    rest = ("scaling", "gain", "softcap", "sinks", "backend", "return_aux")
    given = {name: arguments[name] for name in rest if name in arguments}
    return context_parallel_attention(query, key, value, mesh=context.mesh, layout=context.layout, causal=True, **given)


def _is_causal(
    module: Any, query: Tensor, key: Tensor, arguments: dict[str, Any], keywords: dict[str, Any], split: Split
) -> bool:
    rows = query.shape[2]
    window = keywords.get("sliding_window")
    types, index = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    is_other = types is not None and isinstance(index, int) and types[index] != "full_attention"
    if is_other or key.shape[2] != rows or (window is not None and window < rows * split.size):
        return False
    if arguments.get("mask") is not None:
        return False
    ranges = arguments.get("key_ranges")
    if ranges is None:
        return bool(arguments.get("causal"))
    # The step of positions between two chunks looks like another document.
    row = torch.arange(rows, device=query.device)
    first = row // (rows // split.chunks_per_rank) * (rows // split.chunks_per_rank)
    lo, hi = ranges.unbind(-1)
    return bool((((lo == 0) | (lo == first)) & (hi == row + 1)).all())
