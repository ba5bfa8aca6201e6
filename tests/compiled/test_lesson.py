"""The kernels of docs/examples/kernel.py compile for GPUs: all products on tensor cores, no spills."""

import importlib

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perf.static.machine_code import read_machine_code
from tritonattn.backends.triton import launch

pytestmark = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")


@pytest.mark.parametrize(("arch", "product"), [(80, "tt.dot "), (90, "warp_group_dot ")])
@pytest.mark.parametrize(("name", "products"), [("forward", 2), ("grad_query", 3), ("grad_key_value", 4)])
def test_kernels_compile(name, products, arch, product, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the file asks for the interpreter where there is no GPU
    lesson = importlib.import_module("docs.examples.kernel")
    kernel, sizes = getattr(lesson, f"{name}_kernel"), {"D": 128, **lesson.TILES}
    tensors = (f"{tensor}_ptr" for tensor in ("q", "k", "v", "out", "do", "dq", "dk", "dv"))
    types = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(sizes, "constexpr") | {"S": "i32"}
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if "*" in kind}
    source = ASTSource(kernel, signature, sizes, aligned)
    options = {"num_warps": lesson.LAUNCH["num_warps"], "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.asm["ttgir"].count(product) == products
    assert read_machine_code(compiled).spill_bytes == 0
