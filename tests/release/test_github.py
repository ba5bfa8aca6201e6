"""Workflows and issue forms name what is there."""

import re
import shlex
from importlib.util import find_spec

import pytest

from tritonattn.cli import main as cli

from .agreement import ROOT

yaml = pytest.importorskip("yaml")
WORKFLOWS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")}
FORMS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_steps_run_what_exists():
    text = "\n".join(WORKFLOWS.values())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    run = set(re.findall(r"run: make ([\w-]+)", text))
    assert run == {"lint", "test", "test-slow", "test-newest", "test-oldest", "wheel", "docs"} <= targets
    assert all(find_spec(module) for module in re.findall(r"python -m (tests[\w.]+)", text))
    assert all((ROOT / script).is_file() for script in re.findall(r"docs/examples/\w+\.py", text))


def test_the_pythons_are_those_that_the_package_claims():
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    [least] = re.findall(r'^requires-python = ">=(.+)"$', PROJECT, re.MULTILINE)
    tested = yaml.safe_load(WORKFLOWS["tests"])["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == claimed
    assert claimed[0] == least


@pytest.mark.parametrize("name", FORMS)
def test_forms_ask_for_the_environment(name):
    fields = {field["id"]: field for field in yaml.safe_load(FORMS[name])["body"] if "id" in field}
    if name != "feature":
        assert "`tritonattn env`" in fields["env"]["attributes"]["description"]
        assert fields["env"]["validations"]["required"]
    for words in re.findall(r"^ *tritonattn (.*?)(?: *#.*)?$|`tritonattn ([^`]+)`", FORMS[name], re.MULTILINE):
        cli._parser().parse_args(shlex.split("".join(words)))
