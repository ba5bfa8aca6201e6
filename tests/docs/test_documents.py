"""The code of the documents runs as it stands, their commands are commands, and what they point to exists."""

import argparse
import importlib
import re
import shlex

import pytest

from tests.support.snippets import ROOT, run, snippets
from tritonattn.cli import main as cli

DOCUMENTS = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "perf/README.md", "autotune_cache/README.md", *DOCUMENTS]
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
            importlib.import_module(f"perf.{words[3]}").add_arguments(parser)
            parser.parse_args(words[4:])


@pytest.mark.parametrize("document", PAGES)
def test_paths_that_are_named_exist(document):
    for path in re.findall(r"`((?:docs|perf|tests|tritonattn|autotune_cache)/[\w./-]+)`", TEXTS[document]):
        assert (ROOT / path).exists(), path


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


def test_architecture_describes_every_folder():
    table = TEXTS["docs/architecture.md"].partition("| folder |")[2].partition("\n\n")[0]
    folders = {file.parent.name for file in (ROOT / "tritonattn").glob("*/__init__.py")}
    assert folders - set(re.findall(r"`(\w+)/`", table)) == set()
