"""Adapters of PEFT that hold learned scalings: refused by a model that has no place for them.

PEFT itself drops weights of modules that the model lacks, and the model computes with its own scaling.
"""

from __future__ import annotations

from typing import Any

from ..core.extension import extend
from .settings import ATTRIBUTE


def follow_adapters() -> None:
    """Let PEFT refuse adapters whose scalings are not those of the model's layers. Repeating it is harmless."""
    try:
        from peft import PeftModel
    except Exception:  # none, or one that is broken in any way: it loads no adapters either
        return
    extend(PeftModel, "load_adapter", _refusing)


def _refusing(original: Any) -> Any:
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = original(self, *args, **kwargs)
        except KeyError as error:
            if layers := _layers(map(str, error.args)):
                raise _refusal(f"it lacks values of {layers}, which the model has patched") from error
            raise
        if layers := _layers(result.unexpected_keys):
            raise _refusal(f"it has values of {layers} that the model has no place for")
        return result

    return load_adapter


def _layers(keys: Any) -> str:
    """The layers of the base model whose scalings have these keys of a state_dict."""
    names = [key.partition(f".{ATTRIBUTE}.")[0] for key in keys if f".{ATTRIBUTE}." in key]
    return ", ".join(dict.fromkeys(name.removeprefix("base_model.model.") for name in names))


def _refusal(got: str) -> ValueError:
    return ValueError(
        f"adapter: expected learned scalings of the layers that the model has patched, but {got}: load the base model"
        " again, and patch it with the scaling and layers of the adapter's training before PEFT wraps it"
    )
