"""Fingerprints of the kernels' code, by which a table knows the kernels that it was made for."""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "backends" / "triton"
GLUON_FILES = ("hopper_forward.py",)


@functools.cache
def kernels_fingerprint() -> str:
    """16 hex digits of the kernels' code without comments, docstrings and layout: a table belongs to one such code.

    GLUON_FILES are left out: a change there makes no other entry stale. They have `gluon_fingerprint`.
    """
    return _fingerprint([path for path in _FOLDER.glob("*.py") if path.name not in GLUON_FILES], "triton.jit")


@functools.cache
def gluon_fingerprint() -> str:
    """16 hex digits of the code in GLUON_FILES: an entry whose config names such a kernel belongs to one."""
    return _fingerprint([_FOLDER / name for name in GLUON_FILES], "gluon.")


def _fingerprint(paths: list[Path], mark: str) -> str:
    sources = [path.read_text(encoding="utf-8") for path in sorted(paths)]
    return hashlib.sha256(device_code(sources, mark).encode()).hexdigest()[:16]


def device_code(sources: list[str], mark: str = "triton.jit") -> str:
    """All that Triton compiles: functions under the mark, and the constants and records that they name."""
    nodes = [(node, source) for source in sources for node in ast.parse(source).body]
    kernels = [one for one in nodes if any(mark in ast.unparse(x) for x in getattr(one[0], "decorator_list", ()))]
    named = {name.id for node, _ in kernels for name in ast.walk(node) if isinstance(name, ast.Name)}
    named_nodes = [one for one in nodes if _names_bound(one[0]) & named]
    return "\0".join(sorted(_code(_text(*one)) for one in kernels + named_nodes))


def _names_bound(node: ast.stmt) -> set[str]:
    """Names that a class or an assignment at a file's top binds."""
    targets = node.targets if isinstance(node, ast.Assign) else [node] if isinstance(node, ast.ClassDef) else []
    return {getattr(target, "id", getattr(target, "name", "")) for target in targets}


def _text(node: ast.stmt, source: str) -> str:
    """A statement's lines, its decorators included."""
    first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno]) + "\n"


def _code(source: str) -> str:
    """Tokens, one a line; a string that is a whole statement is a docstring."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    kept, starts_statement = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = starts_statement and token.type == tokenize.STRING
        if token.type not in layout and not is_docstring:
            kept.append(token.string)
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            starts_statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return "\n".join(kept)
