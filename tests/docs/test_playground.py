"""The playground's numbers are tritonattn's, in Node.js and on the page in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

import tritonattn
from tests.support.snippets import ROOT
from tritonattn.analysis import diagnose

SCRIPT = ROOT / "docs/playground.js"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
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


def test_operands_are_as_described():
    q, k, _ = drawn((4096, 64, 0.5, 3))
    lengths = k.norm(dim=-1).flatten()
    assert abs(q.std() - 1) < 0.3
    assert abs(lengths.log().std() - 0.5) < 0.05
    assert abs(lengths.log().mean() - 0.5 * torch.tensor(64.0).log()) < 0.05


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: chromium")
def test_the_page_shows_them(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f'<div id="playground-row"></div><script src="{SCRIPT.as_uri()}"></script>', encoding="utf-8")
    n, dim, spread, seed = case = CASES[1]
    profile, address = tmp_path / "profile", f"{page.as_uri()}#n={n}&D={dim}&spread={spread:g}&seed={seed}"
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [CHROMIUM, *options.split(), f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, address], capture_output=True, text=True, check=False, timeout=120)
    cards = re.findall(r"<code>(\w+)</code>.*?<dl>(.*?)</dl>", done.stdout, re.DOTALL)
    assert [name for name, _ in cards] == list(tritonattn.SCALINGS), done.stderr
    q, k, _ = drawn(case)
    for mode, text in cards:
        shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html.unescape(text)))
        exact = expected(mode, q, k)
        assert float(shown["entropy / ln n"]) == pytest.approx(float(exact["relativeEntropy"]), abs=6e-4)
        assert float(shown["largest p"]) == pytest.approx(float(exact["p"].max()), rel=6e-3)
        assert float(shown["largest logit"]) == pytest.approx(float(exact["maxLogit"]), rel=6e-3)
        assert float(shown["gradient"]) == pytest.approx(float(exact["gradient"]), rel=6e-2)
