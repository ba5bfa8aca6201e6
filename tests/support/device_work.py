"""Work that a call hands to a device, counted on CPU tensors that stand for a device's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch.profiler import ProfilerActivity, profile

# Operators without work for a device: of shapes and strides, or of numbers that the host holds.
HOST = set(
    """
    alias as_strided broadcast_tensors contiguous detach detach_ empty empty_like empty_strided expand flatten
    lift_fresh narrow new_empty promote_types reshape resize_ resolve_conj resolve_neg result_type
    scalar_tensor select slice squeeze to transpose unflatten unsqueeze view view_as _local_scalar_dense item
    """.split()
)


@contextmanager
def values_unread() -> Iterator[None]:
    """Calls read no values of CPU tensors, as of a device's."""
    with pytest.MonkeyPatch.context() as patch:
        of_calls = ("decode", "key_statistics", "paged_statistics", "sequence_checks", "varlen")
        for module in (*(f"calls.{name}" for name in of_calls), "core.statistics", "core.visibility"):
            patch.setattr(f"tritonattn.{module}.values_are_read", lambda *x: False)
        yield


def work_of_torch(call: Callable[[], object]) -> list[str]:
    """The operators of torch that compute something, innermost ones."""
    call()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        call()
    found = []
    for event in record.events():
        name = event.name.removeprefix("aten::")
        inner = {child.name.removeprefix("aten::") for child in event.cpu_children}
        if event.name.startswith("aten::") and name not in HOST and inner <= HOST:
            found.append(name)
    return found
