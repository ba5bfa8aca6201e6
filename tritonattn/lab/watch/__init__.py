"""Draw the records of a Monitor by matplotlib, as a page or a picture: the `tritonattn watch` command."""

from __future__ import annotations

from argparse import Namespace

from .curves import Watched

SUFFIXES = (".html", ".png")


def run(options: Namespace) -> int:
    """Read options.files, draw them into options.output by its suffix, and say what was drawn. Returns 0."""
    watched = Watched.read(*options.files)
    from .picture import draw, write_page  # needs matplotlib

    make = draw if options.output.suffix == ".png" else write_page
    make(watched, options.output)
    print(f"{watched.summary()}\nplot: {options.output}")
    return 0
