"""The ways to run kernels: on a GPU, in Triton's interpreter, or emulated behind a stub of NVIDIA's driver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tritonattn.autotune.timing import card_state
from tritonattn.backends.triton import launch
from tritonattn.core.provenance import commit


def obstacle(name: str) -> str | None:
    """Say why no kernel runs on this device here, or return None."""
    if name == "cuda":
        return None if torch.cuda.is_available() else "device cuda: torch finds no GPU"
    if name == "interpret":
        wanted = "kernels run on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 in the environment"
        return None if launch.interpreting else wanted
    if launch.interpreting:
        return "device emulate: TRITON_INTERPRET=1 leaves nothing to compile"
    return "device emulate: NVIDIA's driver itself is loaded" if torch.cuda.is_available() else None


def origin(device: torch.device) -> str:
    """Say where times of `kernels_on`'s device come from: the card and its state, and versions."""
    found = "emulated: times mean nothing"
    if device.type == "cuda":
        state = ", ".join(f"{name} {value}" for name, value in card_state(device).items())
        found = f"measured on {torch.cuda.get_device_name()}, {state}"
    return f"{found}; torch {torch.__version__}, commit {commit()}"


@contextmanager
def kernels_on(name: str, capability: int = 80) -> Iterator[torch.device]:
    """Run the kernels of backend "triton" on a device inside; yield the device of the tensors.

    capability   of the GPU that the stub shows for "emulate"
    """
    if name != "emulate":
        yield torch.device("cuda" if name == "cuda" else "cpu")
        return
    from tests.emulated.executor import Executor
    from tests.stub import installed

    with installed().active(capability, Executor()):
        yield torch.device("cpu")
