"""Imports of the package, and between rooms of perf, point down; optional packages stay where they are wanted."""

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import perf
import tritonattn
from perf.__main__ import ROOMS

PACKAGE = Path(tritonattn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Folders from the bottom up: each may import from those on lower floors, and its files from one another.
FLOORS = (
    {"core"},
    {"scaling", "tuning"},
    {"backends"},
    {"ops"},
    {"calls"},
    {"nn", "distributed", "autotune"},
    {"huggingface"},
    {"integrations"},
    {"analysis"},
    {"lab", "__init__"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
# Public modules that only hand on names from below: they stand right below the package's __init__.
DOORS = {("tuning",)}

OPTIONAL = {"transformers", "accelerate", "gguf", "matplotlib", "tqdm", "numpy", "sklearn", "scipy"}
OPTIONAL |= {"diffusers", "kernels", "peft", "sglang", "timm", "torchtitan", "vllm", "x_transformers"}
OPTIONAL_IN = {
    "huggingface": {"transformers", "peft"},
    "core": {"tqdm"},
    "analysis": {"transformers", "matplotlib"},
    "integrations": {"diffusers", "sglang", "timm", "torchtitan", "vllm", "x_transformers"},
    "lab": {"matplotlib", "transformers"},
    "cli": {"transformers"},
}
TRITON_IN = ("tuning", "autotune", "backends/triton")

PERF = Path(perf.__file__).parent
ROOMS_FROM_BELOW = ("models", "cases", "sweep", "soak", "cpu", "gpu", "studies")


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


MODULES = {module_of(path) for path in FILES}


def floor_of(module: tuple[str, ...]) -> int:
    return FLOOR_OF["__init__"] - 1 if module in DOORS else FLOOR_OF[module[0]]


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """(relative level, dotted name) of everything that a file imports, names that a module gives included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = [node.module] if node.module else []
            found += [(node.level, ".".join([*module, name.name])) for name in node.names]
    return found


def imported_modules(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports."""
    inside = path.relative_to(PACKAGE).parts
    for level, name in imports(path):
        if level == 0:
            assert name.split(".")[0] != "tritonattn", f"{path}: expected a relative import, got {name}"
            continue
        target = (*inside[: len(inside) - level], *name.split("."))
        while target and target not in MODULES:
            target = target[:-1]
        yield target or ("__init__",)


def test_there_are_at_most_twelve_floors_and_every_folder_is_on_one():
    assert len(FLOORS) <= 12
    assert {module[0] for module in MODULES} == set(FLOOR_OF)


def test_imports_point_down():
    for path in FILES:
        folder, floor = module_of(path)[0], floor_of(module_of(path))
        for module in imported_modules(path):
            inside = module[0] == folder and module not in DOORS
            assert inside or floor_of(module) < floor, f"{path} imports {'.'.join(module)}, which is not below it"


def test_no_circle_of_files():
    arrows = {module_of(path): set(imported_modules(path)) - {module_of(path)} for path in FILES}
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError


def outside(path: Path) -> set[str]:
    """Packages besides ours that a file imports."""
    return {name.split(".")[0] for level, name in imports(path) if level == 0}


def test_only_its_users_import_an_optional_package():
    for path in FILES:
        assert outside(path) & OPTIONAL <= OPTIONAL_IN.get(module_of(path)[0], set()), path
        if not path.relative_to(PACKAGE).as_posix().startswith(TRITON_IN):
            assert "triton" not in outside(path), path


def test_nothing_needs_the_checkout():
    """A wheel has none of these folders."""
    for path in FILES:
        assert not {"docs", "perf", "tests"} & outside(path), path


def test_tables_are_laid_out_by_tabulate_alone():
    for path in (*FILES, *PERF.rglob("*.py")):
        found = re.search(r"\b[lr]just\b|" + r"\{[^{}\n]*:[^{}\n]?[<>^]\d", path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: expected tabulate, got {found[0]}"


def test_pieces_of_kernels_know_no_torch():
    assert outside(PACKAGE / "backends" / "triton" / "block.py") <= {"triton", "typing", "__future__"}


def test_imports_between_rooms_of_perf_point_down():
    for number, room in enumerate(ROOMS_FROM_BELOW):
        for path in (PERF / room).rglob("*.py"):
            inside = ("perf", *path.relative_to(PERF).parts)
            for level, name in imports(path):
                dotted = [*inside[: len(inside) - level], *name.split(".")] if level else name.split(".")
                assert dotted[0] != "perf" or dotted[1] not in ROOMS_FROM_BELOW[number + 1 :], path


def test_every_file_of_perf_has_a_room_and_every_command_its_module():
    assert {path.stem for path in PERF.glob("*.py")} == {"__init__", "__main__", "devices", "options"}
    for room, commands in ROOMS.items():
        for command in commands:
            stem = PERF / room / command.replace("-", "_")
            assert stem.with_suffix(".py").is_file() or (stem / "__init__.py").is_file(), command
