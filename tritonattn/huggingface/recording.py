"""Cache layers of transformers that keep `KeyStatistics` of their keys, so that a decode step looks at new keys only.

A layer becomes one of these when a patched module with a scaling of its own first meets it, and from then on its record
follows what is done to it: update, reorder_cache, crop, batch_repeat_interleave, batch_select_indices, reset. A layer
that forgets keys (a sliding window) has a record that runs on, of which the last places are those of its keys. The
record counts only while it provably describes the keys: they are the tensor that the layer left behind, not written to
since, as its version counter says. In any other case the statistics are computed from the keys themselves:

    keys put into the cache or edited there        another tensor, or another version
    a compiled step                                a graph reads no versions, and may run after an edit
    keys made in torch.inference_mode              they count no versions, so that an edit leaves no trace
    recorded gradients                             a record has none
    static layers of older versions (5.0 is one)   they write to places that they are told, so that nothing says which
                                                   keys they hold

In inference mode a layer therefore makes its keys outside of it, where all tensors count versions, also those of edits
in inference mode; keys that it had before, or that a static layer was given room for before, it cannot help.

Edits through `.data` or numpy, which count no versions anywhere, are not seen: reset such a cache.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from ..calls.key_statistics import KeyStatistics

_ROOM = 64  # keys, the least by which a record grows

# Tensors and how often each had been written to, and ints.
Marks = tuple[tuple[Any, int], ...]


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _marks(watched: tuple[Any, ...]) -> Marks:
    """Empty where nothing can be proven: without keys, or with tensors that count no versions."""
    known = all(isinstance(x, int) or (isinstance(x, Tensor) and not x.is_inference()) for x in watched)
    return tuple((x, 0 if isinstance(x, int) else x._version) for x in watched) if known else ()


def _same(now: Marks, before: Marks) -> bool:
    return (
        bool(now)
        and len(now) == len(before)
        and all(
            (x == left if isinstance(x, int) else x is left) and version == old
            for (x, version), (left, old) in zip(now, before, strict=True)
        )
    )


def _outside_inference_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """What the method makes counts versions, if the layer allows it."""

    @functools.wraps(method)
    def outside(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or not self._leaves_inference_mode():
            return method(self, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return outside


def _recording(base: Any) -> Any:
    """A subclass of a cache layer's class, of the same layout, so that the class of a living layer can be changed."""

    class Recording(base):
        _statistics: KeyStatistics | None = None
        _left: Marks = ()  # what the record describes
        _handed: tuple[weakref.ref, int] | None = None  # what the last update returned beside the layer's own keys

        def gave(self, key: Tensor) -> bool:
            """Whether the last update returned key."""
            return key is (self._last_keys() if self._handed else self.keys)

        @_outside_inference_mode
        def key_statistics(self) -> tuple[KeyStatistics, int]:
            """Those of the keys that the last update returned, made where not kept; and the first one's place there."""
            record, handed = self._valid(), self._last_keys()
            edited = self._handed is not None and handed is not None and _version(handed) != self._handed[1]
            if record is None or edited:
                record = self._measured()
                self._keep(None if edited else record, handed)
            return record, self._first()

        @_outside_inference_mode
        def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            record = self._valid()
            result = super().update(key_states, *args, **kwargs)
            if record is not None:
                record = self._with_room(record, key_states.shape[2], result[0])
                record.append(key_states)
                self._grow(key_states.shape[2])
            self._keep(record, result[0])
            return result

        @_outside_inference_mode
        def reorder_cache(self, beam_idx: Tensor) -> Any:
            record = self._valid()
            result = super().reorder_cache(beam_idx)
            self._keep(None if record is None else record.select(beam_idx.to(record.counts.device)))
            return result

        @_outside_inference_mode
        def batch_repeat_interleave(self, repeats: int) -> Any:
            record = self._valid()
            result = super().batch_repeat_interleave(repeats)
            self._keep(_selected(record, lambda entries: entries.repeat_interleave(repeats)))
            return result

        @_outside_inference_mode
        def batch_select_indices(self, indices: Tensor) -> Any:
            record = self._valid()
            result = super().batch_select_indices(indices)
            self._keep(_selected(record, lambda entries: entries[indices]))
            return result

        @_outside_inference_mode
        def crop(self, *args: Any, **kwargs: Any) -> Any:
            record, before = self._valid(), self.get_seq_length()
            result = super().crop(*args, **kwargs)
            if record is not None:
                self._truncate(record, before)
            self._keep(record)
            return result

        def reset(self) -> Any:
            self._keep(None)
            return super().reset()

        def __getstate__(self) -> dict[str, Any]:
            """A copy starts without a record: versions of tensors are not copied."""
            return {name: x for name, x in vars(self).items() if name not in ("_statistics", "_left", "_handed")}

        def _watched(self) -> tuple[Any, ...]:
            """Tensors and ints whose change would make the record wrong."""
            return (self.keys,)

        def _last_keys(self) -> Tensor | None:
            """What the last update returned beside the layer's own keys, while it lives."""
            return None if self._handed is None else self._handed[0]()

        def _leaves_inference_mode(self) -> bool:
            """Whether its methods work outside of inference mode, since they write to no tensors made in it."""
            return True

        def _measured(self) -> KeyStatistics:
            return _statistics_of(self.keys)

        def _first(self) -> int:
            return 0

        def _grow(self, new: int) -> None:
            """Note that the record has grown."""

        def _with_room(self, record: KeyStatistics, new: int, returned: Tensor) -> KeyStatistics:
            """The record, or one with room for the new keys among those that an update returned."""
            needed = self.keys.shape[2]
            return record if needed <= record.capacity else record.with_capacity(max(needed + _ROOM, needed * 5 // 4))

        def _truncate(self, record: KeyStatistics, before: Any) -> None:
            record.truncate(self.keys.shape[2])

        def _valid(self) -> KeyStatistics | None:
            """The record, where it provably describes what the layer holds."""
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or self._statistics is None:
                return None
            return self._statistics if _same(_marks(self._watched()), self._left) else None

        def _keep(self, record: KeyStatistics | None, handed: Tensor | None = None) -> None:
            self._statistics, self._left = None, ()
            if torch.compiler.is_compiling():
                return
            self._handed = None
            if handed is not None and handed is not self.keys:
                self._handed = weakref.ref(handed), _version(handed)
            if record is not None and (marks := _marks(self._watched())):
                self._statistics, self._left = record, marks

    return Recording


def _writes_to_normal_tensors(layer: Any) -> bool:
    """For a static layer. What it has before it is given room, its length, is exchanged for a normal tensor."""
    if not layer.is_initialized and layer.cumulative_length.is_inference():
        with torch.inference_mode(False), torch.no_grad():
            layer.cumulative_length = layer.cumulative_length.clone()
    return not any(isinstance(x, Tensor) and x.is_inference() for x in vars(layer).values())


def _forgetting(base: Any) -> Any:
    """Of a layer whose update may return more keys than it goes on to hold, the last ones of those."""

    class Forgetting(_recording(base)):
        _count = 0  # keys in the record

        def _measured(self) -> KeyStatistics:
            handed = self._last_keys()
            keys = self.keys if handed is None or self.keys.shape[2] > handed.shape[2] else handed
            self._count = self._filled(keys)
            return _statistics_of(keys, self._count)

        def _filled(self, keys: Tensor) -> int:
            """How many of the places of keys hold keys, the first ones."""
            return keys.shape[2]

        def _first(self) -> int:
            handed = self._last_keys()
            return self._count - self._filled(self.keys if handed is None else handed)

        def _grow(self, new: int) -> None:
            self._count += new

        def _with_room(self, record: KeyStatistics, new: int, returned: Tensor) -> KeyStatistics:
            if self._count + new <= record.capacity:
                return record
            self._count = max(map(self._filled, (returned, self.keys))) - new
            return record.last(self._count, 2 * (self._count + new) + _ROOM)

        def _truncate(self, record: KeyStatistics, before: int) -> None:
            self._count -= before - self.get_seq_length()
            record.truncate(self._count)

    return Forgetting


class RecordingDynamicLayer(_recording(cache_utils.DynamicLayer)):
    """A layer whose keys are new tensors at every step."""


class RecordingStaticLayer(_recording(cache_utils.StaticLayer)):
    """New keys go to the places from cumulative_length on; the places behind it hold no keys."""

    def _leaves_inference_mode(self) -> bool:
        return _writes_to_normal_tensors(self)

    def _watched(self) -> tuple[Any, ...]:
        return (self.keys, self.cumulative_length)

    def _measured(self) -> KeyStatistics:
        return _statistics_of(self.keys, int(self.cumulative_length))

    def _with_room(self, record: KeyStatistics, new: int, returned: Tensor) -> KeyStatistics:
        return record  # it has a place for every key that the cache has one for

    def _truncate(self, record: KeyStatistics, before: Any) -> None:
        record.truncate(self.cumulative_length.expand(len(record.counts)))


RECORDING: dict[type, type] = {cache_utils.DynamicLayer: RecordingDynamicLayer}
# Other static layers write keys to whatever places they are told, so that nothing says which keys they hold.
if "cumulative_length" in getattr(cache_utils.StaticLayer, "__annotations__", {}):
    RECORDING[cache_utils.StaticLayer] = RecordingStaticLayer

if hasattr(cache_utils, "DynamicSlidingWindowLayer"):

    class RecordingDynamicSlidingWindowLayer(_forgetting(cache_utils.DynamicSlidingWindowLayer)):
        """An update returns what it held and the new keys; it goes on to hold the last window - 1 of them."""

        def _watched(self) -> tuple[Any, ...]:
            return (self.keys, self.cumulative_length)

    RECORDING[cache_utils.DynamicSlidingWindowLayer] = RecordingDynamicSlidingWindowLayer

if RecordingStaticLayer in RECORDING.values():

    class RecordingStaticSlidingWindowLayer(_forgetting(cache_utils.StaticSlidingWindowLayer)):
        """New keys go behind those held, until there is no place; from then on its keys move up."""

        def _leaves_inference_mode(self) -> bool:
            return _writes_to_normal_tensors(self)

        def _watched(self) -> tuple[Any, ...]:
            return (self.keys, self.cumulative_length, self.cumulative_length_int)

        def _filled(self, keys: Tensor) -> int:
            return min(self.cumulative_length_int, self.max_cache_len) if keys is self.keys else keys.shape[2]

    RECORDING[cache_utils.StaticSlidingWindowLayer] = RecordingStaticSlidingWindowLayer


def _selected(record: KeyStatistics | None, pick: Callable[[Tensor], Tensor]) -> KeyStatistics | None:
    """The record with the batch entries that pick takes out of all their numbers."""
    if record is None:
        return None
    return record.select(pick(torch.arange(len(record.counts), device=record.counts.device)))


def _statistics_of(keys: Tensor, held: int | None = None) -> KeyStatistics:
    """Of the first `held` keys, with room for some more than there are places."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    batch, heads, length = keys.shape[:3]
    record = KeyStatistics(batch, heads, length + _ROOM, device=keys.device, dtype=dtype)
    record.append(keys[:, :, :held])
    return record
