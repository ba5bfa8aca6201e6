"""Folders of the shipped tables and of the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_tables() -> Path:
    """The folder of tuned tables: inside the package in a wheel, next to the package in a checkout.

    Raises FileNotFoundError where an installation lacks both.
    """
    in_wheel, in_checkout = _PACKAGE / "autotune_cache", _PACKAGE.parent / "autotune_cache"
    for folder in (in_wheel, in_checkout):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"tritonattn's tuned tables: expected {in_wheel} or {in_checkout}, got neither")


def user_cache() -> Path:
    """The user's cache folder, which may not exist yet.

    $TRITONATTN_CACHE_DIR, else $XDG_CACHE_HOME/tritonattn, else ~/.cache/tritonattn. A relative
    $XDG_CACHE_HOME is ignored, as the XDG base directory specification asks. Raises RuntimeError where a user without
    a home asks for it.
    """
    if folder := os.environ.get("TRITONATTN_CACHE_DIR"):
        return Path(folder).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "tritonattn"
