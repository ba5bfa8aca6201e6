"""A griffe extension for the site: doctests and aligned lists of docstrings, which Markdown would reflow, as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ALIGNED = re.compile(r"\S.*\S {3,}\S")


def fenced(docstring: str) -> str:
    """The docstring with its doctests and its unindented aligned paragraphs in fences.

    >>> print(fenced("Add.\\n\\n>>> 1 + 1\\n2"))
    Add.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    paragraphs = []
    for paragraph in docstring.split("\n\n"):
        if paragraph.startswith(">>> "):
            paragraph = f"```pycon\n{paragraph}\n```"
        elif _ALIGNED.match(paragraph):
            paragraph = f"```text\n{paragraph}\n```"
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
