"""Tests of the vLLM plugin: `make test-vllm`. Elsewhere vLLM is not installed, and nothing here is collected."""

import importlib.util
import os
from pathlib import Path

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore = [] if HAS_VLLM else [x.name for x in Path(__file__).parent.glob("*.py")]

# Before vllm is imported, and for the processes that it starts.
os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="session", autouse=True)
def plain_ops(tmp_path_factory):
    """vLLM's operators here, and in all its processes by an entry point on PYTHONPATH."""
    if not HAS_VLLM:
        return
    from . import plain_ops

    plain_ops.register()
    installed = tmp_path_factory.mktemp("plugin") / "plain_ops-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-ops\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nplain_ops = tests.serving.plain_ops:register\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (installed.parent, Path.cwd())))
