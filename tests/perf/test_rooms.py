"""perf's folders: imports between them point down, and each command's module is in its room."""

import ast
from pathlib import Path

import perf
from perf.__main__ import ROOMS

FOLDER = Path(perf.__file__).parent
# From the bottom up: each may import from those before it.
ORDER = ("models", "cases", "sweep", "soak", "cpu", "gpu", "studies")


def rooms_imported(path: Path) -> set[str]:
    """Rooms from which a file in a room imports."""
    inside, found = ("perf", *path.relative_to(FOLDER).parts), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level] if node.level else ()
            dotted = [*base, *(node.module or "").split("."), node.names[0].name]
            names = [name for name in dotted if name]
            if names[0] == "perf" and names[1] in ORDER:
                found.add(names[1])
    return found


def test_imports_point_down():
    for number, room in enumerate(ORDER):
        for path in (FOLDER / room).rglob("*.py"):
            assert rooms_imported(path) <= {*ORDER[: number + 1]}, path


def test_every_file_has_a_room_and_every_command_its_module():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"__init__", "__main__", "devices", "options"}
    for room, commands in ROOMS.items():
        for command in commands:
            stem = FOLDER / room / command.replace("-", "_")
            assert stem.with_suffix(".py").is_file() or (stem / "__init__.py").is_file(), command
