"""Every kernel compiles with the oldest triton that pyproject.toml allows, whose language is smaller, and is right."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPILE = """
import sys, torch, triton
from tritonattn.kernels import KERNELS
from tritonattn.tuning import Problem, compile_kernel
forms = ({}, {"right": True, "query_scale": True, "key_scale": True, "query_scale_grad": True},
         {"key_ranges": True, "softcap": True, "sinks": True, "dropout": True, "aux": True})
for kernel in KERNELS:
    for form in forms:
        for target in ("sm_80", "sm_90"):
            compile_kernel(kernel, Problem(64, 64, torch.float16, **form), target=target)
print(triton.__version__)
"""


def test_no_loop_writes_to_its_own_variable():
    """Compilers up to triton 3.4 then read the loop's counter wherever the variable was written."""
    for path in (ROOT / "tritonattn" / "kernels").glob("*.py"):
        for loop in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(loop, ast.For):
                names = [node for statement in loop.body for node in ast.walk(statement) if isinstance(node, ast.Name)]
                written = {node.id for node in names if isinstance(node.ctx, ast.Store)}
                assert ast.unparse(loop.target) not in written, f"{path.name}:{loop.lineno}"


def test_the_oldest_triton_compiles_every_kernel(tmp_path):
    oldest = re.search(r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "packages")]
    subprocess.run([*install, f"triton=={oldest}.*"], check=True)
    paths = os.pathsep.join([str(tmp_path / "packages"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(oldest)
    emulated = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/emulated", "tests/stub_tests"]
    done = subprocess.run(emulated, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
