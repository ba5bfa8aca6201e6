"""The kernel repository: its layout, what it imports, and that the library `kernels` loads it."""

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

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
    assert not any(name.split("/")[0] in ("analysis", "cli", "integrations", "lab", "autotune") for name in names)
    for backend in BACKENDS:
        built = repository / "build" / f"torch-{backend}"
        found = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
        assert found == names | {"metadata.json"}
        for name in names:
            assert (built / name).read_bytes() == (source / name).read_bytes()
        metadata = json.loads((built / "metadata.json").read_text())
        hashes = {name: base64.b64encode(hashlib.sha256((built / name).read_bytes()).digest()) for name in names}
        assert metadata["digest"]["files"] == {name: one.decode() for name, one in hashes.items()}
        assert metadata["backend"] == {"type": backend}
        assert metadata["version"] == 3
    assert "someone/attention" in (repository / "CARD.md").read_text()


def test_the_metadata_is_that_of_kernels(repository):
    rust = pytest.importorskip("kernels._rust", reason="loads the kernel: pip install 'tritonattn[integrations]'")
    for built in (repository / "build").iterdir():
        digest = rust.Metadata.read_from_file(built / "metadata.json").digest
        digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, built))


def test_an_unknown_name_is_an_attribute_error(kernel):
    """transformers asks a kernel for names that it may lack."""
    assert not hasattr(kernel, "flash_attn_varlen_func")


@pytest.fixture(params=["folder", "cache of the hub"])
def implementation(request, repository, tmp_path, monkeypatch):
    """The name by which transformers loads the kernel, version 3."""
    kernels = pytest.importorskip("kernels", reason="loads the kernel: pip install 'tritonattn[integrations]'")
    hub_kernels = pytest.importorskip("transformers.integrations.hub_kernels")
    flash = pytest.importorskip("transformers.modeling_flash_attention_utils")
    if not hasattr(flash, "lazy_import_flash_attention") or not hasattr(hub_kernels, "load_and_register_attn_kernel"):
        pytest.skip("transformers loads no kernel as attention")
    # transformers 5.23 and newer ask for kernels 0.18.2, and otherwise import nothing of it.
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", kernels.get_kernel, raising=False)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    if request.param == "folder":
        monkeypatch.setenv("LOCAL_KERNELS", f"someone/attention={repository}")
    else:
        stored, commit = tmp_path / "kernels--someone--attention", 40 * "0"
        (stored / "refs").mkdir(parents=True)
        (stored / "refs/v3").write_text(commit)
        shutil.copytree(repository / "build", stored / "snapshots" / commit / "build")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
        if hasattr(sys.modules.get("kernels.resolver"), "CACHE_DIR"):  # older ones read the variable once
            monkeypatch.setattr("kernels.resolver.CACHE_DIR", str(tmp_path))
    yield "someone/attention@v3"
    tritonattn.huggingface.unregister("someone/attention@v3")


def test_a_model_of_transformers_takes_it(implementation):
    """Its windows, padding, generated tokens and gradients, with a scaling of its config, equal those of a patch."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 9, "num_key_value_heads": 1}
    config = transformers.MistralConfig(sliding_window=5, initializer_range=0.5, **sizes)
    model, tokens = transformers.MistralForCausalLM(config).double().eval(), torch.randint(8, (2, 12))
    hidden = torch.ones_like(tokens).index_fill(1, torch.arange(3), 0)

    def results():
        outs = [model(tokens).logits, model(tokens, attention_mask=hidden).logits[:, 3:]]
        weight = model.model.layers[0].self_attn.q_proj.weight
        gradients = [torch.autograd.grad(out.square().sum(), weight)[0] for out in outs]
        return [*outs, *gradients, model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=8)]

    with tritonattn.huggingface.patch(model, "log_key_count:4"):
        wanted = results()
    before = model(tokens).logits
    model.set_attn_implementation(implementation, allow_all_kernels=True)
    torch.testing.assert_close(model(tokens).logits, before)
    config.tritonattn = {"scaling": "log_key_count:4"}
    torch.testing.assert_close(results(), wanted)
    assert (wanted[0] - before).abs().max() > 0.01


def test_no_mask_means_what_it_means_to_sdpa():
    """transformers gives a kernel the masks of sdpa, which leave a prefill of an empty static cache to is_causal."""
    huggingface = pytest.importorskip("tritonattn.huggingface")
    layer: Any = torch.nn.Module()
    layer.config, layer.is_causal = SimpleNamespace(_attn_implementation="someone/attention"), True
    q, k, v = torch.randn(1, 2, 4, 8), *torch.randn(2, 1, 2, 16, 8)
    out, _ = huggingface.attention_forward(layer, q, k, v, None)
    torch.testing.assert_close(out.transpose(1, 2), F.scaled_dot_product_attention(q, k, v, is_causal=True))


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
