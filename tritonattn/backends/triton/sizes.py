"""The sizes of an AttentionCall: of its sequences, and as `record` keeps them."""

from __future__ import annotations

from ...core.call import AttentionCall
from ...tuning.calls import Size


def lengths_of(call: AttentionCall) -> tuple[int, int]:
    """Rows and keys of the longest sequence."""
    visible, sequences = call.visibility, call.visibility.sequences
    return (visible.q_len, visible.k_len) if sequences is None else (sequences.longest_q, sequences.longest_k)


def sequences_of(call: AttentionCall) -> int:
    """Batch entries, or sequences of a packed batch."""
    sequences = call.visibility.sequences
    return call.visibility.batch if sequences is None else len(sequences.q_starts) - 1


def size_of(call: AttentionCall) -> Size:
    visible, (rows, keys) = call.visibility, lengths_of(call)
    return Size(
        batch=sequences_of(call),
        heads=visible.q_heads,
        q_len=rows,
        k_len=keys,
        group=visible.q_heads // visible.kv_heads,
        q_total=0 if visible.sequences is None else visible.q_len,
        k_total=0 if visible.sequences is None else visible.k_len,
        page=0 if call.block_table is None else call.k.shape[2],
        left=min(visible.left or 0, rows + keys),
        right=min(visible.right or 0, rows + keys),
    )
