"""The kernel repository: its layout, what it imports, and that the library `kernels` loads it."""

import json
from pathlib import Path

import pytest
import torch

import tritonattn
from tritonattn.cli import main as cli
from tritonattn.integrations import hub_kernel
from tritonattn.integrations.hub_kernel import BACKENDS


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tritonattn"
    assert cli.main(["hub-kernel", str(folder), "--repo-id", "someone/attention", "--version", "3"]) == 0
    return folder


@pytest.fixture(scope="module")
def kernel(repository):
    kernels = pytest.importorskip("kernels", reason="loads the kernel: pip install 'tritonattn[integrations]'")
    return kernels.get_local_kernel(repository, backend="cpu")


def test_the_layout(repository):
    assert {path.name for path in repository.iterdir()} == {"build.toml", "flake.nix", "CARD.md", "torch-ext", "build"}
    assert {path.name for path in (repository / "build").iterdir()} == {f"torch-{backend}" for backend in BACKENDS}
    source = repository / "torch-ext" / "tritonattn"
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert {"__init__.py", "backends/triton/forward.py", "nn/attention.py", "autotune_cache/README.md"} <= names
    assert not any(name.split("/")[0] in ("cli.py", "demo", "huggingface", "integrations", "tune") for name in names)
    for backend in BACKENDS:
        built = repository / "build" / f"torch-{backend}"
        found = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
        assert found == names | {"metadata.json"}
        for name in names:
            assert (built / name).read_bytes() == (source / name).read_bytes()
        metadata = json.loads((built / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert metadata["version"] == 3
    assert "someone/attention" in (repository / "CARD.md").read_text()


@pytest.mark.parametrize("scaling", ["key_norm_max", "cosine"])
def test_the_loaded_kernel_is_the_package(kernel, scaling):
    assert kernel is not tritonattn
    assert kernel.attention.__module__ != tritonattn.attention.__module__
    results = []
    for library in (kernel, tritonattn):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, heads, 9, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
        out, aux = library.attention(q, k, v, scaling=scaling, causal=True, return_aux=True)
        results.append([out, *aux, *torch.autograd.grad(out.square().sum() + aux.lse.sum(), (q, k, v))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("error", "folder"), [(KeyboardInterrupt(), "empty"), (OSError(28, "No space left on device"), "new/deep")]
)
def test_a_command_that_stops_midway_leaves_nothing(error, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    written = []

    def write(path, text):
        if len(written) == 20:
            raise error
        written.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    monkeypatch.setattr(hub_kernel, "_write", write)
    status = cli.main(["hub-kernel", str(tmp_path / folder)])
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(written) == 20
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]
