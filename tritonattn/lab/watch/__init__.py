"""Draw the records of a Monitor by matplotlib, as a page or a picture: the `tritonattn watch` command."""

from __future__ import annotations

from argparse import Namespace

from .curves import Watched

SUFFIXES = (".html", ".png")


def run(options: Namespace) -> int:
    """Read options.files, draw them into options.output by its suffix, and say what was drawn. Returns 0."""
    watched = Watched.read(*options.files)
    from ..figures import save
    from .picture import figure_of, write_page  # need matplotlib

    if options.output.suffix == ".png":
        save(figure_of(watched), options.output)
    else:
        write_page(watched, options.output)
    print(f"{watched.summary()}\nplot: {options.output}")
    return 0
