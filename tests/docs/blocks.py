"""The Python blocks of the documents as files, for a type checker: `python -m tests.docs.blocks FOLDER`.

Each becomes a file, named after its document and its line, and its lines have the numbers of the document's.
"""

import re
import sys
from pathlib import Path

from tests.support.snippets import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def write(folder: Path) -> None:
    """Write all blocks into a folder, instead of those of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.py"):
        old.unlink()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            before = text.count("\n", 0, block.start(1))
            name = f"{document.stem}_{before + 1}.py".replace("-", "_")
            (folder / name).write_text("\n" * before + block[1], encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
