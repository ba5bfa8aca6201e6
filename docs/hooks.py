"""Hooks of the site: its version and repository from the package's metadata, the dark look of pictures, links."""

from __future__ import annotations

import re
from importlib.metadata import metadata

from mkdocs.config.defaults import MkDocsConfig

_PICTURE = re.compile(r"!\[([^\]]*)\]\((figures/[\w/-]+)\.png\)")


def on_config(config: MkDocsConfig) -> None:
    """Put the version next to the name; the link is `Repository` of [project.urls], where there is one."""
    about = metadata("tritonattn")
    config.site_name = f"{config.site_name} {about['Version']}"
    urls = dict(line.split(", ", 1) for line in about.get_all("Project-URL") or ())
    if repository := urls.get("Repository"):
        config.repo_url, config.repo_name = repository, "/".join(repository.rstrip("/").split("/")[-2:])


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: object) -> str:
    """Let a picture be followed by its dark look, NAME-dark.png; the site shows one of the two.

    A link to a file outside of docs/ leads to the repository.
    """
    markdown = markdown.replace("](../", f"]({config.repo_url}/blob/main/")
    return _PICTURE.sub(r"![\1](\2.png#only-light)\n![\1](\2-dark.png#only-dark)", markdown)
