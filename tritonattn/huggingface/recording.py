"""Cache layers of transformers that keep `KeyStatistics` of their keys, so that a decode step looks at new keys only.

A layer becomes one of these when a scaling first asks for its key lengths, and from then on its record follows what is
done to it: update, reorder_cache, crop, batch_repeat_interleave, batch_select_indices, reset. The record counts only
while it provably describes the keys: they are the tensor that the layer left behind, not written to since. In any other
case (keys put into the cache or edited there, torch.inference_mode, which does not track edits, a compiled step,
recorded gradients) the statistics are computed from the keys themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from ..cache_statistics import KeyStatistics

_ROOM = 64  # keys, the least by which a record grows


def _recording(base: Any) -> Any:
    """A subclass of a cache layer's class, of the same layout, so that the class of a living layer can be changed."""

    class Recording(base):
        _statistics: KeyStatistics | None = None
        _left: tuple[tuple[Tensor, int], ...] = ()  # what the record describes, and how often that had been written to

        def key_statistics(self) -> KeyStatistics:
            """Those of the layer's keys: the record where it describes them, or a new one."""
            record = self._valid()
            if record is None:
                held = self._held()
                record = _empty(self.keys)
                record.append(self.keys[:, :, :held])
                self._keep(record)
            return record

        def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            record = self._valid()
            result = super().update(key_states, *args, **kwargs)
            if record is not None:
                needed = self._held_after(record)
                if needed > record.capacity:
                    record = record.with_capacity(max(needed + _ROOM, needed * 5 // 4))
                record.append(key_states)
            self._keep(record)
            return result

        def reorder_cache(self, beam_idx: Tensor) -> Any:
            record = self._valid()
            result = super().reorder_cache(beam_idx)
            self._keep(None if record is None else record.select(beam_idx.to(record.counts.device)))
            return result

        def batch_repeat_interleave(self, repeats: int) -> Any:
            record = self._valid()
            result = super().batch_repeat_interleave(repeats)
            self._keep(_selected(record, lambda entries: entries.repeat_interleave(repeats)))
            return result

        def batch_select_indices(self, indices: Tensor) -> Any:
            record = self._valid()
            result = super().batch_select_indices(indices)
            self._keep(_selected(record, lambda entries: entries[indices]))
            return result

        def crop(self, *args: Any, **kwargs: Any) -> Any:
            record = self._valid()
            result = super().crop(*args, **kwargs)
            if record is not None:
                self._truncate(record)
            self._keep(record)
            return result

        def reset(self) -> Any:
            self._keep(None)
            return super().reset()

        def _watched(self) -> tuple[Tensor, ...]:
            return (self.keys,)

        def _held(self) -> int:
            return self.keys.shape[2]

        def _held_after(self, record: KeyStatistics) -> int:
            return self.keys.shape[2]

        def _truncate(self, record: KeyStatistics) -> None:
            record.truncate(self.keys.shape[2])

        def _valid(self) -> KeyStatistics | None:
            """The record, where it provably describes what the layer holds."""
            if self._statistics is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
                return None
            watched = self._watched()
            if any(not isinstance(x, Tensor) or x.is_inference() for x in watched):
                return None
            known = len(watched) == len(self._left) and all(
                x is left and x._version == version for x, (left, version) in zip(watched, self._left, strict=True)
            )
            return self._statistics if known else None

        def _keep(self, record: KeyStatistics | None) -> None:
            self._statistics, self._left = None, ()
            if record is None or torch.compiler.is_compiling():
                return
            watched = self._watched()
            if all(isinstance(x, Tensor) and not x.is_inference() for x in watched):
                self._statistics, self._left = record, tuple((x, x._version) for x in watched)

    return Recording


class RecordingDynamicLayer(_recording(cache_utils.DynamicLayer)):
    """A layer whose keys are new tensors at every step."""


class RecordingStaticLayer(_recording(cache_utils.StaticLayer)):
    """New keys go to the places from cumulative_length on; the places behind it hold no keys."""

    def _watched(self) -> tuple[Tensor, ...]:
        return (self.keys, self.cumulative_length)

    def _held(self) -> int:
        return int(self.cumulative_length)

    def _held_after(self, record: KeyStatistics) -> int:
        return record.capacity  # that of the cache, which its keys cannot pass

    def _truncate(self, record: KeyStatistics) -> None:
        record.truncate(self.cumulative_length.expand(len(record.counts)))


def _selected(record: KeyStatistics | None, pick: Callable[[Tensor], Tensor]) -> KeyStatistics | None:
    """The record with the batch entries that pick takes out of all their numbers."""
    if record is None:
        return None
    return record.select(pick(torch.arange(len(record.counts), device=record.counts.device)))


def _empty(keys: Tensor) -> KeyStatistics:
    dtype = torch.promote_types(keys.dtype, torch.float32)
    batch, heads, length = keys.shape[:3]
    return KeyStatistics(batch, heads, length + _ROOM, device=keys.device, dtype=dtype)


RECORDING: dict[type, type] = {cache_utils.DynamicLayer: RecordingDynamicLayer}
# Other static layers write keys to whatever places they are told, so that nothing says which keys they hold.
if "cumulative_length" in getattr(cache_utils.StaticLayer, "__annotations__", {}):
    RECORDING[cache_utils.StaticLayer] = RecordingStaticLayer
