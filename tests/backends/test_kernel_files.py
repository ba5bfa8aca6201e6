"""A kernel reads from top to bottom: few functions behind it, few parameters, products in its body."""

import ast
import functools
from pathlib import Path

import pytest

import tritonattn
from tritonattn.backends.triton import KERNELS

FOLDER = Path(tritonattn.__file__).parent / "backends" / "triton"
# Matrix products in the body of a kernel, whose loop is written once for blocks with a mask and without.
PRODUCTS = {
    ("forward", "attention_forward"): 2,
    ("grad_query", "attention_grad_query"): 3,
    ("grad_key_value", "attention_grad_key_value"): 4,
    ("decode", "attention_decode"): 2,
    ("tangent", "attention_tangent"): 7,  # 5 of a launch's tangents, or 5 of its row terms
    ("grad_query_second", "attention_grad_query_second"): 8,
    ("grad_key_value_second", "attention_grad_key_value_second"): 10,
}
SHARED = ("block", "pairs", "softmax")
MOST_PARAMETERS = 32  # at run time
Function = tuple[str, str]


@functools.cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((FOLDER / f"{file}.py").read_text(encoding="utf-8"))


@functools.cache
def known_to(file: str) -> dict[str, Function]:
    """Device functions by the names that they have in a file, those that it imports included."""
    found = {}
    for node in tree_of(file).body:
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(x) for x in node.decorator_list):
            found[node.name] = (file, node.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and (FOLDER / f"{node.module}.py").exists():
            of_file = known_to(node.module)
            found |= {name.name: of_file[name.name] for name in node.names if name.name in of_file}
    return found


def body_of(function: Function) -> ast.FunctionDef:
    file, name = function
    return next(node for node in tree_of(file).body if isinstance(node, ast.FunctionDef) and node.name == name)


def behind(function: Function) -> set[Function]:
    """The device functions that a kernel reaches, itself included."""
    reached, found = set(), [function]
    while found:
        one = found.pop()
        if one not in reached:
            reached.add(one)
            names = {node.id for node in ast.walk(body_of(one)) if isinstance(node, ast.Name)}
            found += [other for name, other in known_to(one[0]).items() if name in names]
    return reached


@pytest.mark.parametrize("kernel", PRODUCTS, ids=lambda kernel: kernel[1])
def test_a_kernel_has_at_most_24_functions_in_its_file_and_those_that_kernels_share(kernel):
    functions = behind(kernel)
    assert len(functions) <= 24, sorted(functions)
    assert {file for file, _ in functions} <= {kernel[0], *SHARED}


@pytest.mark.parametrize("kernel", PRODUCTS, ids=lambda kernel: kernel[1])
def test_products_stand_in_the_kernel(kernel):
    of_function = {one: ast.unparse(body_of(one)).count("tl.dot(") for one in behind(kernel)}
    assert {one: count for one, count in of_function.items() if count} == {kernel: PRODUCTS[kernel]}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_has_at_most_32_parameters_at_run_time(name):
    parameters = [one.name for one in KERNELS[name].params if not one.is_constexpr]
    assert len(parameters) <= MOST_PARAMETERS, parameters


def test_a_kernel_has_the_name_of_its_entry():
    for name, kernel in KERNELS.items():
        assert kernel.__name__ in (f"attention_{name}", f"{name}_kernel", name)


def test_kernels_take_at_most_8_records():
    found = [node.name for node in tree_of("records").body if isinstance(node, ast.ClassDef)]
    assert len(found) <= 8, found
