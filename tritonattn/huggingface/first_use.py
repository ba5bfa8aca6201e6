"""Extensions of methods of transformers and PEFT, made at the first use in a process, not at an import.

The first use is the first model of transformers that is built or wrapped, or the first layer that gets a scaling. A
model that lives at the import is one too: only extended methods refuse "tritonattn" for a model that cannot use it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

_waiting: list[Callable[[], None]] = []
_lock = threading.Lock()


def at_first_use(*calls: Callable[[], None]) -> None:
    """Call these at the first use, in this order."""
    if not _waiting:
        register_module_module_registration_hook(_note_model)
    _waiting.extend(calls)
    if any(True for _ in living_models()):
        note_use()


def living_models() -> Iterator[PreTrainedModel]:
    """The models of transformers in this process that have a config."""
    return (one for one in gc.get_objects() if issubclass(type(one), PreTrainedModel) and "config" in vars(one))


def is_waiting() -> bool:
    """True where there was no use since the import: an unpickled model takes tritonattn's masks unchecked."""
    return bool(_waiting)


def note_use() -> None:
    """Make the calls that wait; they are made once."""
    if _waiting:
        with _lock, torch.device("cpu"):  # PEFT's import makes tensors, and loaded models begin on meta
            for call in _waiting:
                call()
            _waiting.clear()


def _note_model(parent: nn.Module, name: str, child: Any) -> None:
    """A hook of torch, called with each module that gets a child: a model does so before its `post_init`."""
    if _waiting and (isinstance(parent, PreTrainedModel) or isinstance(child, PreTrainedModel)):
        note_use()
