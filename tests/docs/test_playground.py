"""The playground's numbers are tritonattn's, in Node.js."""

import json
import shutil
import subprocess

import pytest
import torch

import tritonattn
from tests.support.snippets import ROOT
from tritonattn.analysis import diagnose

SCRIPT = ROOT / "docs/playground.js"
CASES = [(2, 16, 0.0, 0), (32, 64, 1.0, 1), (512, 32, 2.0, 2)]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_are_those_of_tritonattn(case):
    sizes = json.dumps(dict(zip(("n", "D", "spread", "seed"), case, strict=True)))
    drawn = f"(({{ q, k }}) => ({{ q, k, rows: page.row(q, k) }}))(page.operands({sizes}))"
    code = f"const page = require({json.dumps(str(SCRIPT))}); console.log(JSON.stringify({drawn}))"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    q, k = (torch.tensor(found[name], dtype=torch.float64).view(1, 1, -1, case[1]) for name in "qk")
    unit = torch.eye(case[0], dtype=torch.float64)[None, None]
    assert list(found["rows"]) == list(tritonattn.SCALINGS)
    for mode, row in found["rows"].items():
        p, aux = tritonattn.attention(q, k, unit, scaling=mode, backend="reference", return_aux=True)
        of_rows = diagnose(q, k, scaling=mode)
        wanted = {"p": p, "maxLogit": aux.max_logit}
        wanted |= {"relativeEntropy": of_rows.relative_entropy, "gradient": of_rows.gradient_norm}
        for name, value in wanted.items():
            ours = torch.tensor(row[name], dtype=torch.float64).view_as(value)
            torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-9)
