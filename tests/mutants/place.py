"""Find code by its function and its tokens, so that line breaks, white space, quotes and comments do not count."""

import ast
import io
import tokenize
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

_LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}


class Token(NamedTuple):
    """A token, and where it stands: (row from 1, column) of its first character and of the one after its last."""

    text: str
    start: tuple[int, int]
    end: tuple[int, int]


class Place(NamedTuple):
    """Where code stands in a file."""

    path: Path
    start: tuple[int, int]
    end: tuple[int, int]

    def replaced(self, code: str) -> str:
        """The file's text with other code there."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        (first, left), (last, right) = self.start, self.end
        changed = lines[first - 1][:left] + code + lines[last - 1][right:]
        return "".join([*lines[: first - 1], changed, *lines[last:]])


def places(path: Path, function: str, code: str) -> list[Place]:
    """Where the code stands in the functions or classes `name` or `Class.name`; in all of the file if ""."""
    if not path.is_file():
        return []
    tokens, wanted = _tokens_of(path), [token.text for token in tokens_of(code)]
    found = []
    for first, last in _functions_of(path).get(function, []):
        inside = [token for token in tokens if first <= token.start[0] <= last]
        texts = [token.text for token in inside]
        for at in range(len(texts) - len(wanted) + 1):
            if texts[at] == wanted[0] and texts[at : at + len(wanted)] == wanted:
                found.append(Place(path, inside[at].start, inside[at + len(wanted) - 1].end))
    return found


def tokens_of(code: str) -> list[Token]:
    """Tokens without layout: no trailing commas, all plain strings in the same quotes. The code may be a fragment."""
    found: list[Token] = []
    with suppress(tokenize.TokenError):  # a fragment that opens more brackets than it closes
        for kind, text, start, end, _ in tokenize.generate_tokens(io.StringIO(code.strip(" ")).readline):
            if kind in _LAYOUT:
                continue
            if text in (")", "]", "}") and found and found[-1].text == ",":
                found.pop()
            if kind == tokenize.STRING and text[0] in "\"'":
                text = repr(ast.literal_eval(text))
            found.append(Token(text, start, end))
    return found


@cache
def _tokens_of(path: Path) -> list[Token]:
    return tokens_of(path.read_text(encoding="utf-8"))


@cache
def _functions_of(path: Path) -> dict[str, list[tuple[int, int]]]:
    """The first and last line of each function and class, by its name; of the file, by ""."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[str, list[tuple[int, int]]] = {"": [(1, 1 << 30)]}
    for name, node in _named(tree, ""):
        first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
        found.setdefault(name, []).append((first, node.end_lineno or first))
    return found


def _named(tree: ast.AST, within: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield within + node.name, node
            yield from _named(node, f"{within}{node.name}.")
        else:
            yield from _named(node, within)
