"""The package as a kernel of the HuggingFace hub: sources for kernel-builder, and built variants ready to load."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from pathlib import Path

from ..core.errors import CommandError
from ..tuning.cache_dir import shipped_tables

NAME = "tritonattn"
BACKENDS = ("cpu", "cuda", "rocm")
_PACKAGE = Path(__file__).resolve().parent.parent

# Files that need more than torch and triton, and those of commands.
_LEFT_OUT = ("analysis", "cli", "huggingface", "integrations", "lab", "autotune", "__main__.py")
_LEFT_OUT += ("core/progress.py", "core/provenance.py")

# transformers' attention interface: imported when transformers calls it, without what registers and patches.
_INTERFACE = ("architecture", "attention", "context_parallel", "first_use", "masks", "scalings", "settings")
_ENTRY = """

supports_flash_attn = True  # by this name and the next transformers takes a kernel for an attention implementation


def flash_attn_forward(module, query, key, value, attention_mask, **arguments):
    \"\"\"The attention of a model of transformers, with the scaling of its config.tritonattn.\"\"\"
    from .huggingface.attention import attention_forward

    return attention_forward(module, query, key, value, attention_mask, **arguments)
"""

_BUILD = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "MIT"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = ["py", "json", "md"]
"""

_FLAKE = """\
{
  description = "tritonattn: attention whose logit scaling is a parameter";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

_CARD = """\
---
library_name: kernels
license: mit
---

# tritonattn

Attention whose logit scaling is a parameter: exact, differentiable; Triton kernels on NVIDIA and AMD GPUs, PyTorch's
attention on CPUs.

```python
from kernels import get_kernel

tritonattn = get_kernel("{repo_id}", version={version}, trust_remote_code=["{repo_id}"])
out = tritonattn.attention(q, k, v, scaling="key_norm_mean", causal=True)
```

Its functions are those of the Python package tritonattn, without its patches of models. It needs torch and triton.

As the attention of a model of transformers:

```python
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("model")
config.tritonattn = {{"scaling": "log_key_count:8192"}}  # for all layers; without it the model's own
kernel = {{"attn_implementation": "{implementation}", "allow_all_kernels": True}}
model = AutoModelForCausalLM.from_pretrained("model", config=config, **kernel)
```
"""


def write(folder: Path, repo_id: str, version: int = 1) -> list[str]:
    """Write a kernel repository into a new or empty folder.

        build.toml, flake.nix, CARD.md     for `kernel-builder build` and the hub
        torch-ext/tritonattn/              the sources: relative imports, torch and triton only
        build/torch-cpu/, -cuda/, -rocm/   the same with metadata.json: what `kernels.get_local_kernel(folder)` loads

    transformers loads it by `attn_implementation="OWNER/NAME"`, from the hub's branch v1, and as "OWNER/NAME@v2" from
    version 2 on; LOCAL_KERNELS=OWNER/NAME=FOLDER in the environment takes the folder instead.

    The operators of every copy have another namespace, so that a kernel loads with an installed tritonattn, and
    several versions of it in one process. A call that fails or is interrupted leaves nothing behind.

    Args:
        folder: A new or empty folder.
        repo_id: OWNER/NAME on the hub.
        version: The kernel's version on the hub, counted up at a change that breaks callers.

    Returns:
        The names of the built variants.

    Raises:
        CommandError: A folder that holds something, an invalid repo_id or version.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise CommandError(f"--repo-id: expected OWNER/NAME, got {repo_id!r}")
    if version < 1:
        raise CommandError(f"--version: expected at least 1, got {version}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"folder: expected a new or empty folder, got {str(folder)!r}")
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    with tempfile.TemporaryDirectory(dir=existing) as made:
        variants = _fill(Path(made), repo_id, version)
        folder.mkdir(parents=True, exist_ok=True)
        for path in Path(made).iterdir():
            path.rename(folder / path.name)
    return variants


def _fill(folder: Path, repo_id: str, version: int) -> list[str]:
    files = _sources()
    names = ", ".join(f'"{backend}"' for backend in BACKENDS)
    _write(folder / "build.toml", _BUILD.format(name=NAME, version=version, backends=names, repo_id=repo_id))
    _write(folder / "flake.nix", _FLAKE)
    implementation = repo_id if version == 1 else f"{repo_id}@v{version}"
    _write(folder / "CARD.md", _CARD.format(repo_id=repo_id, version=version, implementation=implementation))
    _copy(files, folder / "torch-ext" / NAME)
    hashes = {name: hashlib.sha256(text.encode()).digest() for name, text in sorted(files.items())}
    build = hashlib.sha256(b"".join(hashes.values())).hexdigest()[:8]
    variants = [f"torch-{backend}" for backend in BACKENDS]
    for backend, variant in zip(BACKENDS, variants, strict=True):
        built = folder / "build" / variant
        metadata = {
            "name": NAME,
            "id": f"_{NAME}_{backend}_{build}",
            "version": version,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {
                "algorithm": "sha256",
                "files": {name: base64.b64encode(one).decode() for name, one in hashes.items()},
            },
        }
        _copy(files, built)
        _write(built / "metadata.json", json.dumps(metadata, indent=2) + "\n")
    return variants


def _sources() -> dict[str, str]:
    """The kernel's files by their paths in the package."""
    files = {}
    for path in sorted(_PACKAGE.rglob("*.py")):
        inside = path.relative_to(_PACKAGE)
        if not any(inside.is_relative_to(one) for one in _LEFT_OUT):
            files[inside.as_posix()] = path.read_text(encoding="utf-8")
    files["__init__.py"] += _ENTRY
    files["huggingface/__init__.py"] = '"""transformers\' attention interface."""\n'
    for name in _INTERFACE:
        files[f"huggingface/{name}.py"] = (_PACKAGE / f"huggingface/{name}.py").read_text(encoding="utf-8")
    for path in sorted(shipped_tables().iterdir()):
        if path.suffix in (".json", ".md"):
            files[f"autotune_cache/{path.name}"] = path.read_text(encoding="utf-8")
    return files


def _copy(files: dict[str, str], folder: Path) -> None:
    for name, text in files.items():
        _write(folder / name, text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())  # the bytes of the digest, on Windows too
