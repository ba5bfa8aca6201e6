"""The playground's numbers are tritonattn's, in Node.js and on the page in a browser."""

from __future__ import annotations

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


def by_node(expression: str):
    if shutil.which("node") is None:
        pytest.skip("needs Node.js")
    code = f"const page = require({json.dumps(str(SCRIPT))}); console.log(JSON.stringify({expression}))"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected(mode: str, q: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
    unit = torch.eye(k.shape[2], dtype=torch.float64)[None, None]
    p, aux = tritonattn.attention(q, k, unit, scaling=mode, backend="reference", return_aux=True)
    found = diagnose(q, k, scaling=mode)
    return {
        "p": p.flatten(),
        "maxLogit": aux.max_logit.squeeze(),
        "relativeEntropy": found.relative_entropy.squeeze(),
        "gradient": found.gradient_norm.squeeze(),
    }


def drawn(case, result: str = "0") -> tuple[torch.Tensor, torch.Tensor, dict]:
    """q [1, 1, 1, D] and k [1, 1, n, D] as the page draws them, and what an expression makes of them."""
    sizes = json.dumps(dict(zip(("n", "D", "spread", "seed"), case, strict=True)))
    found = by_node(f"(({{ q, k }}) => ({{ q, k, result: {result} }}))(page.operands({sizes}))")
    q, k = (torch.tensor(found[name], dtype=torch.float64) for name in "qk")
    return q[None, None, None], k[None, None], found["result"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_are_those_of_tritonattn(case):
    q, k, rows = drawn(case, "page.row(q, k)")
    assert list(rows) == list(tritonattn.SCALINGS)
    for mode, row in rows.items():
        for name, value in expected(mode, q, k).items():
            torch.testing.assert_close(torch.tensor(row[name], dtype=torch.float64), value, rtol=1e-5, atol=1e-9)
