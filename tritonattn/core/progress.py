"""Progress bars of commands."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class Progress(tqdm):
    """tqdm's bar, drawn only if stderr is a terminal."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, disable=None, **options)
