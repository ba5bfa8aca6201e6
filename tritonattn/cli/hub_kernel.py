"""`tritonattn hub-kernel`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.errors import CommandError

HELP = "write the package as a kernel repository of the HuggingFace hub"
DESCRIPTION = (
    "Write build.toml, the sources for kernel-builder, and built variants that the library `kernels` loads with "
    "get_local_kernel(FOLDER), into a new or empty folder. Nothing is uploaded."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to write into, new or empty")
    parser.add_argument(
        "--repo-id", default="tritonattn/tritonattn", metavar="OWNER/NAME", help="the repository (default: %(default)s)"
    )
    parser.add_argument(
        "--version", type=int, default=1, metavar="N", help="its version on the hub (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    from ..integrations.hub_kernel import write

    try:
        variants = write(options.folder, options.repo_id, options.version)
    except OSError as error:
        raise CommandError(f"folder: expected a folder, got {str(options.folder)!r}: {error.strerror}") from error
    print(f"{options.folder}: built variants {', '.join(variants)}")
    return 0
