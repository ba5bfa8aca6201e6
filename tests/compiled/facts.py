"""The machine code of compiled kernels, read once: facts stay on disk for the code and the compiler they are of."""

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import triton

from perf.models.static.machine_code import MachineCode, MmaLoop, read_machine_code
from tritonattn.tuning import Problem, Target, TileConfig, compile_kernel, default_config

_ROOT = Path(__file__).resolve().parents[2]
_READ = (
    "tuning",
    "autotune",
    "backends/triton",
    "../perf/models/static",
)  # folders whose code decides a fact


def facts(kernel: str, problem: Problem, target: str, config: TileConfig | None = None) -> MachineCode:
    """Compile a kernel, in its default config unless another is given, and read its code; from disk the next time."""
    config = default_config(kernel, problem, Target.parse(target)) if config is None else config
    name = hashlib.sha256(f"{kernel} {problem} {target} {config}".encode()).hexdigest()[:24]
    path = _ROOT / ".pytest_cache" / "compiled" / f"{_fingerprint()}-{triton.__version__}" / f"{name}.json"
    if path.exists():
        return _restored(json.loads(path.read_text(encoding="utf-8")))
    code = read_machine_code(compile_kernel(kernel, problem, config, target))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(uuid4().hex)
    temporary.write_text(json.dumps(asdict(code)), encoding="utf-8")
    temporary.replace(path)  # at once, since other workers read
    return code


def _restored(record: dict) -> MachineCode:
    loops = record.pop("mma_loops")
    return MachineCode(**record, mma_loops=None if loops is None else tuple(MmaLoop(**loop) for loop in loops))


@functools.cache
def _fingerprint() -> str:
    digest = hashlib.sha256()
    for folder in _READ:
        for path in sorted((_ROOT / "tritonattn" / folder).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
