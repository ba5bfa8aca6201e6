"""`python -m tests.release.installed WHEEL`: install a wheel into a new venv and use it from an empty folder.

The venv has the packages of this interpreter, torch among them, but neither the checkout nor an editable install.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.snippets import snippets

FOLDER = "import sys, tritonattn; assert tritonattn.__file__.startswith(sys.prefix), tritonattn.__file__"
COMMANDS = (
    ("env",),
    ("configs", "--gpu", "h100"),
    ("compare", "--max-tokens", "64", "--modes", "sqrt_dim,log_key_count:64", "--plot", "../compare.png"),
)


def main() -> int:
    [wheel] = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="tritonattn-wheel-") as name:
        python, empty = installed(Path(wheel).resolve(), Path(name, "venv")), Path(name, "empty")
        empty.mkdir()
        programs = [("its folder", [str(python), "-c", FOLDER])]
        programs += [(f"README.md, {i}", [str(python), "-c", code]) for i, code in enumerate(snippets("README.md"))]
        programs += [(" ".join(words), [str(python.with_name("tritonattn")), *words]) for words in COMMANDS]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            passed = list(pool.map(lambda program: run(program[0], program[1], empty), programs))
        left = [path.name for path in empty.iterdir()]
        print(f"files left in the folder: {left}" * bool(left), end="")
    return int(bool(left) or not all(passed))


def installed(wheel: Path, folder: Path) -> Path:
    """Make a venv that has the wheel; its python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    # No .pth file in this folder is read: an editable install would add the checkout by one.
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def run(name: str, command: list[str], folder: Path) -> bool:
    """True where a program ends well; prints its name, and the output of one that does not."""
    start = time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    verdict, seconds = "ok" if done.returncode == 0 else f"exit status {done.returncode}", time.perf_counter() - start
    print(f"{name}: {verdict}, {seconds:.1f} s", flush=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
