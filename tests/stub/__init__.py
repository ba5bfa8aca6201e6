"""A stand-in for NVIDIA's driver: Triton's CudaDriver and launcher run on a machine without a GPU.

    stub = installed()                         # one a process: the devices of DEVICES
    with stub.active(90, on_launch=seen.append):
        tritonattn.attention(q, k, v, backend="triton")     # CPU tensors, which are the device's memory
    seen[0].kernel, seen[0].grid, seen[0].arguments         # what the driver was handed
    stub.messages()                            # what it refused, and why

A C library replaces libcuda.so.1 and holds every call to the rules of the driver API (libcuda.c). Each
launch's raw parameters are compared with the kernel's arguments (launched.py). Nothing runs, unless `on_launch` hands
the launch to tests/emulator, as the tests in tests/emulated do.

Not covered: torch's CUDA code, streams and asynchrony, the allocator, graphs, clusters beyond their size, AMD. One
thread may launch at a time.
"""

from .launched import Launched
from .machine import DEVICES, Stub, installed

__all__ = ["DEVICES", "Launched", "Stub", "installed"]
