"""Texts in the public domain that come with the package; ORIGIN.md names their sources."""

from __future__ import annotations

from pathlib import Path

WONDERLAND = Path(__file__).parent / "wonderland.txt"
