"""Private names of other libraries: listed, there, and answered by their message when they have gone."""

import ast
import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tritonattn
from tritonattn.core import private_names
from tritonattn.core.extension import extend
from tritonattn.core.private_names import PRIVATE_NAMES, attribute, deferred, message, private

PACKAGE = Path(tritonattn.__file__).parent
# Attributes of tuples and modules whose names Python's and torch's documents give.
PUBLIC = {"_asdict", "_field_defaults", "_fields", "_replace", "_getframe", "_version", "_modules", "_C"}
# Of torch's operators, whose `_schema` its documents name; of enum, which has no other way; behind a hasattr.
PUBLIC |= {"_schema", "_is_view", "_member_map_", "_member_names_", "_value2member_map_", "_pack_args"}
ON_INSTANCES = ("Node._saved_", "Attention._", "Registry._", "._cp_options")
# Names without which a call is slower, or watches less, and has the same result.
SLOWER = (
    "torch._C._nn.scaled_dot_product_attention",
    "torch._C._current_graph_task_id",
    "torch._subclasses.FakeTensor",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "torch.ops.aten._softmax_backward_data",
)
LAUNCH = "triton.runtime.jit.create_function_from_signature"
REFUSED = [path for path, name in PRIVATE_NAMES.items() if name.without == private_names._NO_IMPORT]


def installed(path):
    return find_spec(path.partition(".")[0]) is not None


@pytest.mark.parametrize("path", [path for path in PRIVATE_NAMES if not any(x in path for x in ON_INSTANCES)])
def test_the_installed_library_has_the_name(path):
    if not installed(path):
        pytest.skip(f"{path.partition('.')[0]} is not installed: its own target tests the name")
    private(path)


def test_every_private_name_that_is_read_is_listed():
    listed = {path.rpartition(".")[2] for path in PRIVATE_NAMES} | PUBLIC
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    ours = {name for tree in trees.values() for name in bound(tree)}
    unlisted = {
        (node.attr, str(path.relative_to(PACKAGE)), node.lineno)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in listed | ours
    }
    from_modules = {
        (alias.name, str(path.relative_to(PACKAGE)), node.lineno)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
        for alias in node.names
        if any(map(is_private, (alias.name, *(node.module or "").split(".")))) and node.module != "__future__"
    }
    assert unlisted | from_modules == set()


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def bound(tree):
    """The names that a file's own classes, functions and assignments give."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@pytest.mark.parametrize("path", PRIVATE_NAMES)
def test_a_name_that_has_gone_is_answered_by_its_message(path, monkeypatch):
    def gone(path):
        raise AttributeError(path)

    monkeypatch.setattr(private_names, "_look_up", gone)
    wanted = message(path)
    assert path in wanted
    assert PRIVATE_NAMES[path].purpose in wanted
    assert PRIVATE_NAMES[path].without in wanted
    for refuse in (lambda: private(path), deferred(path), lambda: attribute(object(), path)):
        with pytest.raises(ImportError) as error:
            refuse()
        assert str(error.value) == wanted


def test_an_extension_of_a_method_that_has_gone_is_refused():
    class ModelConfig:
        __module__, __qualname__ = "sglang.srt.configs.model_config", "ModelConfig"

    with pytest.raises(ImportError, match=r"expected sglang.*ModelConfig\._parse_quant_hf_config, which loads"):
        extend(ModelConfig, "_parse_quant_hf_config", lambda original: original)
    extend(ModelConfig, "a_method_of_later_releases", lambda original: original)


@pytest.fixture(scope="module")
def without_names():
    """For each name what import and a call give without it, in one process: torch itself may need a name later."""
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", [*REFUSED, *SLOWER, LAUNCH])
def test_tritonattn_without_the_name(path, without_names):
    got = without_names[path]
    if path in SLOWER:
        assert got[0] == pytest.approx(got[1], rel=1e-5)  # numbers, of the package and of PyTorch
    else:
        assert path in got


def results_without(path):
    """The error of an import without a name, or numbers of a call and its gradients, ours and PyTorch's."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tritonattn"]:
        del sys.modules[name]
    owner_path, _, name = path.rpartition(".")
    owner, taken = private_names._look_up(owner_path), private_names._look_up(path)
    look_up = type(owner).__getattribute__
    try:
        with pytest.MonkeyPatch.context() as patch:
            if owner is torch.ops.aten:  # it makes names anew
                patch.setattr(type(owner), "__getattribute__", lambda self, asked: raising(look_up, self, asked, name))
            else:
                patch.delattr(owner, name)
            again = importlib.import_module("tritonattn")
            if path == LAUNCH:
                importlib.import_module("tritonattn.backends.triton")
    except ImportError as error:
        return str(error)
    finally:
        assert private_names._look_up(path) is taken or owner is torch.ops.aten
    q = torch.arange(96.0).sin().view(1, 2, 6, 8).requires_grad_()
    bias = torch.zeros(1, 2, 6, 6, requires_grad=True)
    visible = torch.ones(6, 6, dtype=torch.bool).triu(-2).tril(2)
    outs = again.attention(q, q, q, bias=bias, window=(2, 2)), F.scaled_dot_product_attention(q, q, q, visible)
    return [[out.sum().item(), *torch.autograd.grad(out.square().sum(), q)[0].flatten().tolist()] for out in outs]


def raising(look_up, owner, asked, name):
    if asked == name:
        raise AttributeError(asked)
    return look_up(owner, asked)


if __name__ == "__main__":
    print(json.dumps({path: results_without(path) for path in [*REFUSED, *SLOWER, LAUNCH]}))
