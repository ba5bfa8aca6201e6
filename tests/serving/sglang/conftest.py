"""Tests of the SGLang plugin: `make test-sglang`. Elsewhere SGLang is not installed, and nothing here is collected."""

import importlib.util
import os
import sys
from pathlib import Path

collect_ignore_glob = [] if importlib.util.find_spec("sglang") else ["*.py"]

# Before sglang is imported, and for the processes that it starts.
STUB = str(Path(__file__).parent / "stub")
sys.path.insert(0, STUB)
os.environ |= {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",  # cores of two ranks
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join((STUB, str(Path.cwd()))),
}
