"""tritonattn in transformers: `patch(model, scaling=...)`, or `model.set_attn_implementation("tritonattn")`.

Importing it registers the attention implementation "tritonattn" and changes no class of transformers or PEFT. The first
model that is built or patched extends the methods that save and load models and adapters, so that a patch comes along.
"""

from ..core.errors import install

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"tritonattn.huggingface needs transformers: {install('hf')}") from error

from .attention import NAME, attention_forward, call_arguments, register, unregister
from .continuous import follow_continuous_batching
from .first_use import at_first_use
from .loading import follow_adapters, follow_saved_settings, restore
from .masks import key_range_mask
from .observed import register_observed
from .patching import Patched, patch, patched
from .settings import Settings

register()
register_observed()
at_first_use(follow_saved_settings, follow_continuous_batching, follow_adapters)

__all__ = [
    "NAME",
    "Patched",
    "Settings",
    "attention_forward",
    "call_arguments",
    "key_range_mask",
    "patch",
    "patched",
    "register",
    "restore",
    "unregister",
]


def __dir__() -> list[str]:
    return sorted(__all__)
