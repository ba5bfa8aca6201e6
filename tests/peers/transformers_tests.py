"""Run the model tests of transformers against tritonattn: `python -m tests.peers.transformers_tests [OPTIONS]`.

The source distribution of the installed version of transformers is downloaded with pip into a temporary folder, since
its tests are nowhere else; nothing of it is kept. Two ways, on six models:

    A  flash_attn_inference_equivalence(attn_implementation="tritonattn"): eager and ours, bf16, padding left and right
    B  "sdpa" is ours under its name: test_eager_matches_sdpa_inference, all dtypes, with and without padding

Weights are of size 0.2: at transformers' 0.02 a wrong scale passes all of these tests, and from 0.3 on rounding alone
fails some, with PyTorch's attention as with ours. Then ten of B run with logits 1.3 times too large, of a decoder and
of an encoder, and most of either's must fail: those in bfloat16, which are not among them, see no wrong scale.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SELECTED = "equals_eager_in_bfloat16 or eager_matches_sdpa_inference"
FAULTY = "eager_matches_sdpa_inference_0 and (LlamaTest or BertTest)"
# Modules that the tests import and that are not distributed.
STUBS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        tests, results = prepare(Path(folder)), Path(folder) / "results.xml"
        if status := run(tests, 1.0, rest):
            return status
        quiet = ["--tb=no", "--no-summary", f"--junitxml={results}"]
        status = run(tests, 1.3, [*rest, *quiet], FAULTY)
        return 0 if status == 1 and fault_is_seen(results) else 1


def fault_is_seen(results: Path) -> bool:
    """True where more than half of the tests of every model fail."""
    run_of, failed = Counter(), Counter()
    for case in ElementTree.parse(results).iter("testcase"):
        model = case.get("classname", "").rpartition(".")[2]
        run_of[model] += case.find("skipped") is None
        failed[model] += case.find("failure") is not None
    print("\n".join(f"{model}: {failed[model]} of {run_of[model]} see the fault" for model in run_of))
    return bool(run_of) and all(2 * failed[model] > run_of[model] for model in run_of)


def prepare(folder: Path) -> Path:
    """The tests of transformers in folder, with ours next to them; the path of ours."""
    wanted = f"transformers=={version('transformers')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    subprocess.run([*pip, "--no-build-isolation", "--dest", str(folder), wanted], check=True)
    archive = next(folder.glob("transformers-*.tar.gz"))
    with tarfile.open(archive) as tar:
        inside = [file for file in tar.getmembers() if "/tests/" in file.name]
        tar.extractall(folder, members=inside, filter="data")
    tests = folder / archive.name.removesuffix(".tar.gz") / "tests"
    for path, name in STUBS.items():
        stub = tests / path
        if not stub.exists():
            stub.parent.mkdir(exist_ok=True)
            (stub.parent / "__init__.py").touch()
            stub.write_text(f"class {name}:\n    pass\n")
    ours = tests / "tritonattn"
    ours.mkdir()
    for package in (tests, ours):
        (package / "__init__.py").touch()
    target = ours / "test_models.py"
    target.write_text((HERE / "transformers_models.py").read_text())
    return target


def run(tests: Path, fault: float, rest: list[str], selected: str = SELECTED) -> int:
    environment = {**os.environ, "TRITONATTN_PEERS_FAULT": str(fault), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    root = tests.parents[2]
    apart = ["-p", "no:cacheprovider", "-W", "ignore", "-c", os.devnull, f"--rootdir={root}"]  # from our settings
    command = [sys.executable, "-m", "pytest", "-q", *apart, "-k", selected, str(tests.relative_to(root)), *rest]
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
