"""Kernels of the hub's repository, without the installed package."""

import importlib.util
import sys

import torch

import tritonattn
from tritonattn.integrations import hub_kernel


def test_a_repository_runs_without_the_package(tmp_path, monkeypatch, device):
    hub_kernel.write(tmp_path / "hub", "someone/attention")
    for name in [name for name in sys.modules if name.split(".")[0] == "tritonattn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tritonattn", None)
    path = tmp_path / "hub" / "build" / "torch-cpu" / "__init__.py"
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("of_hub", path))
    monkeypatch.setitem(sys.modules, "of_hub", module)
    spec.loader.exec_module(module)
    q = torch.randn(1, 2, 5, 4, device=device)
    out = module.attention(q, q, q, causal=True, backend="triton")
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert sorted(module.__all__) == sorted(tritonattn.__all__)
