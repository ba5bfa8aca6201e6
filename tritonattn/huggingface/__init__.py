"""tritonattn in transformers: `register()`, then `model.set_attn_implementation("tritonattn")`."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("tritonattn.huggingface needs transformers: pip install 'tritonattn[hf]'") from error

from .attention import NAME, attention_forward, call_arguments, register, unregister
from .masks import key_range_mask
from .settings import Settings

__all__ = [
    "NAME",
    "Settings",
    "attention_forward",
    "call_arguments",
    "key_range_mask",
    "register",
    "unregister",
]
