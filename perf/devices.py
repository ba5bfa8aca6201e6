"""Where kernels run: on a GPU, in Triton's interpreter, or emulated behind a stub of NVIDIA's driver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tritonattn.backends.triton import launch

KINDS = ("cuda", "emulate", "interpret")


def obstacle(kind: str) -> str | None:
    """Say why no kernel runs on a device of this kind here, or return None."""
    if kind == "cuda":
        return None if torch.cuda.is_available() else "device cuda: torch sees no GPU"
    if kind == "interpret":
        wanted = "kernels run on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 in the environment"
        return None if launch.interpreting else wanted
    if launch.interpreting:
        return "device emulate: TRITON_INTERPRET=1 leaves nothing to compile"
    return "device emulate: NVIDIA's own driver is loaded" if torch.cuda.is_available() else None


@contextmanager
def kernels_on(kind: str, capability: int = 80) -> Iterator[torch.device]:
    """Run the kernels of backend "triton" on a device of this kind inside; the device of the tensors.

    capability   of the GPU that the stub shows for "emulate"
    """
    if kind != "emulate":
        yield torch.device("cuda" if kind == "cuda" else "cpu")
        return
    from tests.emulated.executor import Executor
    from tests.stub import installed

    with installed().active(capability, Executor()):
        yield torch.device("cpu")
