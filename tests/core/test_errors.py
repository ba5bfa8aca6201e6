"""Errors share one vocabulary: expected this, got that."""

import ast
import re
from pathlib import Path

import tritonattn

PACKAGE = Path(tritonattn.__file__).parent
OTHER_WORDS = re.compile(r"\b(want(s|ed)?|must be|should be|found (none|neither)|invalid|illegal|received)\b")


def messages(tree: ast.AST) -> list[str]:
    """The words of every error that a file raises or wraps, without what is filled in."""
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    texts = [[x.value for x in ast.walk(error) if isinstance(x, ast.Constant)] for error in raised]
    return ["".join(x for x in words if isinstance(x, str)) for words in texts]


def test_errors_say_expected_and_got():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += [(path.name, text) for text in messages(ast.parse(path.read_text(encoding="utf-8")))]
    assert [(name, text) for name, text in found if OTHER_WORDS.search(text)] == []
    assert sum("expected" in text for _, text in found) > 200
