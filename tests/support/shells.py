"""Kernels compiled without their bodies, where only their launches count."""

import ast
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from tritonattn.backends.triton import KERNELS, device, launch


def leave_bodies_out(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Compile kernels that take their arguments and do nothing, into caches of this test alone: `folder` on disk."""
    make_ir, parse = ASTSource.make_ir, JITFunction.parse

    def empty(kernel: Any) -> ast.Module:
        tree: Any = parse(kernel)
        tree.body[0].body = [ast.Return()]
        return ast.fix_missing_locations(tree)

    def made(source: Any, *arguments: Any, **named: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:  # here alone: hashes are of the whole code
            patch.setattr(JITFunction, "parse", empty)
            return make_ir(source, *arguments, **named)

    monkeypatch.setattr(ASTSource, "make_ir", made)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(launch, "_specialisations", {})
    monkeypatch.setattr(device, "_codes", {})
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
