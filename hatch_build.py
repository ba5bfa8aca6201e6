"""Builds of the package: the README as a package index shows it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from hatchling.metadata.plugin.interface import MetadataHookInterface

_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_PICTURE = re.compile(r"<picture>.*?(<img [^>]*>).*?</picture>", re.DOTALL)
_IMAGE = re.compile(r'(!\[[^]]*\]\(|<img [^>]*src=")([^)"\s]+)')
_LINK = re.compile(r'(\]\(|<a [^>]*href=")([^)"\s]+)')


class ReadmeHook(MetadataHookInterface):
    """Fills in `project.readme`: the repository's README.md with links to the repository at the tag of this version."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = described(text, metadata["urls"]["Repository"], f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def described(text: str, repository: str, tag: str) -> str:
    """The text with absolute links and one <img> for each <picture>, which indexes do not show; code stays as it is."""

    def absolute(view: str) -> Callable[[re.Match[str]], str]:
        return lambda found: found[1] + urljoin(f"{repository}/{view}/{tag}/README.md", found[2])

    parts = _CODE.split(text)
    for at in range(0, len(parts), 2):  # between pieces of code
        prose = _PICTURE.sub(r"\1", parts[at])
        parts[at] = _LINK.sub(absolute("blob"), _IMAGE.sub(absolute("raw"), prose))
    return "".join(parts)
