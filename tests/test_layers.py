"""Imports inside the package point down only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tritonattn

PACKAGE = Path(tritonattn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. A module may import from strictly lower layers, and a folder's modules from one another.
ORDER = (
    {"autograd", "command", "provenance", "texts"},
    {"observation"},
    {"ranges", "sequences", "dropout"},
    {"visibility"},
    {"call", "first_rows", "statistics"},
    {"scaling", "decode_call"},
    {"reference", "sdpa", "blockwise", "kernels"},
    {"tuning"},
    {"launch"},
    {"triton_backend"},
    {"ops", "validation"},
    {"factor", "backends"},
    {"cache_statistics"},
    {"dispatch", "decode_validation", "varlen_validation"},
    {"api", "decoding", "varlen"},
    {"nn", "warmup"},
    {"huggingface"},
    {"analysis", "demo", "integrations", "training", "tune"},
    {"advising", "simulation"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
LAYERS = {module: layer for layer, modules in enumerate(ORDER) for module in modules}

OPTIONAL = {"transformers", "accelerate", "gguf", "matplotlib", "tabulate", "tqdm", "numpy",
            "diffusers", "kernels", "timm", "x_transformers", "sklearn", "scipy"}  # fmt: skip
OPTIONAL_IN = {
    "advising": {"transformers"},
    "huggingface": {"transformers"},
    "analysis": {"tabulate", "transformers"},
    "demo": {"transformers", "matplotlib", "tabulate", "tqdm"},
    "integrations": {"diffusers", "timm", "x_transformers"},
    "simulation": {"matplotlib", "tabulate", "tqdm"},
    "training": {"matplotlib", "scipy", "sklearn", "tabulate", "tqdm"},
    "tune": {"tabulate", "tqdm"},
}
TRITON_IN = {"kernels", "tuning", "launch", "triton_backend", "tune"}


def unit(path: Path) -> str:
    """The top-level module or folder of the package that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(relative level, module) of every import; `from . import a` gives the module a."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield 0, name.name
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                for name in node.names:
                    yield node.level, name.name
            else:
                yield node.level, node.module


def imported_units(path: Path) -> Iterator[str]:
    depth = len(path.relative_to(PACKAGE).parts)
    for level, module in imports(path):
        if level == depth:
            first = module.split(".")[0]
            known = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
            yield first if known else "__init__"
        elif level == 0 and module.split(".")[0] == "tritonattn":
            pytest.fail(f"{path}: wanted a relative import, got {module}")


def test_every_module_has_a_layer():
    assert {unit(path) for path in FILES} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = unit(path)
    for other in imported_units(path):
        assert LAYERS[other] < LAYERS[own], (
            f"{own} (layer {LAYERS[own]}) imports {other} (layer {LAYERS[other]})"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_its_users_import_an_optional_package(path):
    own = unit(path)
    outside = {module.split(".")[0] for level, module in imports(path) if level == 0}
    assert outside & OPTIONAL <= OPTIONAL_IN.get(own, set())
    if own not in TRITON_IN:
        assert "triton" not in outside


def test_kernels_know_neither_torch_nor_policy():
    for path in (PACKAGE / "kernels").glob("*.py"):
        assert {module.split(".")[0] for level, module in imports(path) if level == 0} <= {
            "triton",
            "__future__",
        }, path
