"""libcuda.c as a loaded library."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import triton
from triton import knobs

SOURCE = Path(__file__).with_name("libcuda.c")
MOST_DEVICES = 8


class State(ctypes.Structure):
    """`Stub` of libcuda.c."""

    _fields_ = (
        ("devices", ctypes.c_int),
        ("driver_version", ctypes.c_int),
        ("capability", ctypes.c_int * MOST_DEVICES),
        ("launches", ctypes.c_long),
        ("maps", ctypes.c_long),
        ("loads", ctypes.c_long),
        ("unloads", ctypes.c_long),
        ("attributes", ctypes.c_long),
        ("pointer_queries", ctypes.c_long),
        ("context_switches", ctypes.c_long),
        ("refusals", ctypes.c_long),
        ("messages", ctypes.c_char * (1 << 16)),
        ("used", ctypes.c_size_t),
    )


# int(function, grid, threads, shared bytes, parameters, their bytes)
LaunchCallback = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_ubyte),
    ctypes.c_uint,
)


def built() -> Path:
    """The folder of libcuda.so.1, compiled once for this source, in Triton's cache."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    digest = hashlib.sha256(SOURCE.read_bytes() + (include / "cuda.h").read_bytes()).hexdigest()[:16]
    folder = Path(knobs.cache.dir) / f"stub_libcuda_{digest}"
    if not (folder / "libcuda.so").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        library = made / "libcuda.so.1"
        options = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
        subprocess.run([os.environ.get("CC", "gcc"), *options, "-o", str(library), str(SOURCE)], check=True)
        (made / "libcuda.so").symlink_to(library.name)  # the name by which triton 3.4 links
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            assert (folder / "libcuda.so").exists()
    return folder


def loaded(folder: Path) -> ctypes.CDLL:
    """The library, under the name by which Triton's modules are linked."""
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    library.stub_state.restype = ctypes.POINTER(State)
    library.stub_on_launch.argtypes = [LaunchCallback]
    library.stub_stream.restype = ctypes.c_void_p
    library.stub_parameters.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.cuCtxSetCurrent.argtypes = [ctypes.c_void_p]
    return library
