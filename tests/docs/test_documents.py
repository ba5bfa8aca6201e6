"""The code of docs/ runs as it stands, its commands are commands, and what it points to exists."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.support.snippets import ROOT, run, snippets
from tritonattn.cli import main as cli

DOCUMENTS = ("docs/rollout.md", "docs/workshop.md")
BLOCKS = [(document, position) for document in DOCUMENTS for position in range(len(snippets(document)))]


@pytest.mark.parametrize(("document", "position"), BLOCKS, ids=lambda value: str(value))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_snippets_run(document, position, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(document, position)


def test_no_snippet_is_overlooked():
    assert len(snippets("docs/workshop.md")) == 8
    assert len(snippets("docs/rollout.md")) == 5
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        fences = re.findall(r"^```(\w*)$", text, re.MULTILINE)
        assert set(fences) <= {"python", "sh", "text", ""}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_parse(document):
    for block in snippets(document, "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "tritonattn":
                cli._parser().parse_args(words[1:])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for file in re.findall(r"`((?:docs|perf|tests)/[\w./-]+\.(?:md|py|json))`", text):
        assert (ROOT / file).is_file(), file
