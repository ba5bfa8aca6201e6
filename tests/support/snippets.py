"""The Python in a document, and running it."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def snippets(document: str, language: str = "python") -> list[str]:
    """The code blocks of a document of the repository."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(document: str, position: int) -> dict[str, Any]:
    """Execute a Python block as a program; return its names."""
    code = compile(snippets(document)[position], f"{document} snippet {position}", "exec")
    names = {"__name__": "__main__"}
    exec(code, names)
    return names
