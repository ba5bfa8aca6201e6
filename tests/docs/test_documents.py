"""The code of the documents runs, their commands parse, links lead somewhere, generated parts are current."""

import argparse
import doctest
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import tritonattn
from docs import generated
from perf.__main__ import module_of
from tests.support.snippets import ROOT, run, snippets
from tritonattn.analysis import diagnose
from tritonattn.cli import main as cli

DOCUMENTS = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").glob("*.md"))
RECORDS = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "perf/results").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "perf/README.md", "autotune_cache/README.md"]
PAGES += ["RELEASING.md", "SECURITY.md", "tests/emulator/README.md", *DOCUMENTS, *RECORDS]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [(document, position) for document in DOCUMENTS for position in range(len(snippets(document)))]
OPTIONAL = {"transformers": r"transformers|tritonattn\.huggingface", "peft": "peft"}


@pytest.mark.parametrize(("document", "position"), BLOCKS, ids=lambda value: str(value))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_snippets_run(document, position, tmp_path, monkeypatch):
    for package, imported in OPTIONAL.items():
        if re.search(rf"^(import|from) ({imported})\b", snippets(document)[position], re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run(document, position)


def commands(document: str) -> list[list[str]]:
    """The words of every command of ours, in blocks and in sentences."""
    lines = [line for block in snippets(document, "sh") for line in block.splitlines()]
    lines += re.findall(r"`((?:tritonattn|python -m perf) [^`\n]+)`", TEXTS[document])
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("document", PAGES)
def test_commands_parse(document):
    for words in commands(document):
        if words[0] == "tritonattn":
            cli._parser().parse_args(words[1:])
        elif words[:3] == ["python", "-m", "perf"] and words[3] != "COMMAND":
            parser = argparse.ArgumentParser()
            module_of(words[3]).add_arguments(parser)
            parser.parse_args(words[4:])


def anchors(document: str) -> set[str]:
    """The names of its headings in links, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", TEXTS[document], re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_somewhere(document):
    folder = (ROOT / document).parent
    text = re.sub(r"```.*?```|`[^`\n]*`", "", TEXTS[document], flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        assert "#only-" not in target, "docs/hooks.py adds the dark look to the site; GitHub would show both"
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (folder / file).resolve() if file else ROOT / document
        assert path.is_file(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.relative_to(ROOT).as_posix()), target


def test_every_page_is_in_the_site():
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(file.removeprefix("docs/") for file in DOCUMENTS)


def test_a_person_can_finish_the_pages():
    """Details of a measurement go into a record of perf/results."""
    words = {page: len(TEXTS[page].split()) for page in DOCUMENTS}
    assert max(words.values()) <= 3_000, max(words, key=words.__getitem__)
    assert sum(words.values()) <= 43_200


SCALINGS_PAGE = "docs/scalings.md"


def test_the_code_of_the_readme_runs():
    assert all(run("README.md", 0)[name].grad is not None for name in "qkv")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_mode_as_documented_keeps_padding_out(backend):
    """As the page writes a mode, keys that no row attends to may hold NaN: its author is not asked to think of it."""
    (position,) = (i for i, code in enumerate(snippets(SCALINGS_PAGE)) if "class LogKeyNorm(Scaling)" in code)
    scaling = run(SCALINGS_PAGE, position)["LogKeyNorm"]()
    q, k, v = torch.randn(3, 1, 4, 9, 8, dtype=torch.float64).unbind(0)
    lengths = torch.tensor([6])
    hidden = torch.arange(9)[:, None] >= 6
    results = []
    for fill in (0.0, torch.nan):
        leaves = [q.clone().requires_grad_(), *(torch.where(hidden, fill, x).requires_grad_() for x in (k, v))]
        out = tritonattn.attention(*leaves, scaling=scaling, causal=True, key_lengths=lengths, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(map(torch.equal, *results))


STORED = {
    found[2]: (file, found[0])
    for file in generated.documents()
    for found in generated.PART.finditer(file.read_text(encoding="utf-8"))
}
INTERPRETED = ("support", "memory")  # the slow tier's


@pytest.mark.parametrize("name", [name for name in generated.PARTS if name not in INTERPRETED])
def test_part_is_not_stale(name):
    check_part(name)


def check_part(name: str) -> None:
    file, stored = STORED[name]
    assert generated.renewed(stored, {}) == stored, f"{file}: run python -m docs.generated --write"


def test_a_stale_part_is_found():
    stale = "<!-- generated: floors -->\nold\n<!-- end -->"
    assert generated.renewed(stale, {"floors": "new\n"}) == stale.replace("old", "new")


PROGRAMS = sorted((ROOT / "docs/examples").glob("*.py"))
KERNELS = ROOT / "docs/examples/kernel.py"  # a separate process: it asks for Triton's interpreter
SLOW = ROOT / "docs/examples/train_gpt.py"  # the slow tier's: it trains
MODULES = [file for file in sorted((ROOT / "tritonattn").rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("program", sorted({*PROGRAMS} - {KERNELS, SLOW}), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_program_runs(program, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(program)])
    if "transformers" in (text := program.read_text(encoding="utf-8")):
        oldest = re.search(r"transformers (\d+\.\d+) or newer", text)
        pytest.importorskip("transformers", minversion=oldest and oldest[1])
    runpy.run_path(str(program), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_kernels_run_without_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, KERNELS], env=environment, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 7
    assert all(float(error) <= 1e-5 * float(size) for error, size in re.findall(r"(\S+) of (\S+)$", done.stdout, re.M))


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings(file):
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(pytest.importorskip(name, exc_type=ImportError))
    assert result.attempted == file.read_text(encoding="utf-8").count(">>> ")
    assert result.failed == 0


SCRIPT = ROOT / "docs/playground.js"
CASES = [(2, 16, 0.0, 0, 64), (32, 64, 1.0, 1, 2.5), (512, 32, 2.0, 2, 1024)]
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")


def in_node(expression):
    code = f"const page = require({json.dumps(str(SCRIPT))}); console.log(JSON.stringify({expression}))"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def operands(drawn, head_dim):
    """q [1, 1, 1, D] and k [1, 1, n, D] with the products and norms that were drawn, in the plane of two axes."""
    dots, norms = (torch.tensor([*drawn[name].values()], dtype=torch.float64) for name in ("dots", "norms"))
    q = torch.zeros(1, head_dim, dtype=torch.float64)
    k = torch.zeros(len(dots), head_dim, dtype=torch.float64)
    q[0, 0] = drawn["queryNorm"]
    k[:, 0] = dots / q[0, 0]
    k[:, 1] = (norms.square() - k[:, 0].square()).sqrt()
    return q[None, None], k[None, None]


@needs_node
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_are_those_of_tritonattn(case):
    n, head_dim, _, _, trained = case
    chosen = dict(zip(("n", "D", "spread", "seed", "L"), case, strict=True), s=0.3)
    found = in_node(f"((k, all) => ({{ ...k, rows: page.row(k, all) }}))(page.keys({chosen}), {chosen})")
    q, k = operands(found, head_dim)
    ssmax = tritonattn.nn.SSMax(1, dtype=torch.float64)
    torch.nn.init.constant_(ssmax.s, 0.3)
    settings = {"log_key_count": "base", "log_power": "base", "qwen_logn": "train_length", "grok2": "train_length"}
    scalings = {mode: mode for mode, one in tritonattn.SCALINGS.items() if not one.about.addend} | {"ssmax": ssmax}
    scalings |= {mode: tritonattn.SCALINGS[mode](**{name: trained}) for mode, name in settings.items()}
    unit = torch.eye(n, dtype=torch.float64)[None, None]
    assert [*found["rows"]] == [*scalings]
    for mode, row in found["rows"].items():
        p, aux = tritonattn.attention(q, k, unit, scaling=scalings[mode], backend="reference", return_aux=True)
        of_rows = diagnose(q, k, scaling=scalings[mode])
        wanted = {"p": p, "maxLogit": aux.max_logit}
        wanted |= {"relativeEntropy": of_rows.relative_entropy, "gradient": of_rows.gradient_norm}
        for name, value in wanted.items():
            ours = row[name].values() if name == "p" else [row[name]]
            ours = torch.tensor([*ours], dtype=torch.float64).view_as(value)
            torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-9)
