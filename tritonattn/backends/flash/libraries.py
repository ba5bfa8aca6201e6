"""FlashAttention 4, 3 and 2 and cuDNN: which are installed, what each takes, and how it is called.

Versions differ in their keywords; a call is refused where a function's signature lacks the keyword that it needs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...core.call import AttentionCall

WIDEST = 256
_KEYWORDS_OF_LSE = ("return_lse", "return_attn_probs")
HOW_TO_INSTALL = (
    "pip install flash-attn-4 (Hopper, Blackwell); pip install 'flash-attn>=2.6' --no-build-isolation"
    " (FlashAttention 2, Ampere and later); FlashAttention 3 (Hopper) from its repository: pip install ./hopper"
)


@dataclass(frozen=True, eq=False)
class Library:
    """A library's functions, q [B, S, H, D], and packed [T, H, D].

    name       in errors and in tables of tuned configs
    cards      the first number of the compute capabilities that it is made for
    no_limit   stands for a side of a window without a limit
    dense      the function of a batch
    packed     that of packed sequences, or None
    """

    name: str
    cards: tuple[int, ...]
    no_limit: int | None
    dense: Callable[..., Any]
    packed: Callable[..., Any] | None = None

    @functools.cached_property
    def keywords(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.dense).parameters)

    @property
    def has_gradient_of_lse(self) -> bool:
        return "return_lse" in self.keywords

    def widths(self, head_dim: int, value_dim: int, card: int) -> tuple[int, int]:
        """The head dims, of q and k and of v, to which zeros are added."""
        if (head_dim, value_dim) == (192, 128) and self.name != "flash-attn-2" and self.packed is not None:
            return head_dim, value_dim
        width = -(-max(head_dim, value_dim) // 8) * 8
        if self.name == "flash-attn-4" and card > 9 and width > 128:
            width = max(width, WIDEST)
        return width, width

    def obstacle(self, call: AttentionCall) -> str | None:
        """Name what a call asks for and this library lacks, or None."""
        visible, terms, keywords = call.visibility, call.logits, self.keywords
        has_window = visible.left is not None or visible.right not in (None, 0)
        for name, is_asked, keyword in (
            ("window", has_window, "window_size"),
            ("softcap", terms.softcap is not None, "softcap"),
            ("sinks", terms.sinks is not None, "learnable_sink"),
        ):
            if is_asked and keyword not in keywords:
                return name
        if call.aux and not keywords.intersection(_KEYWORDS_OF_LSE):
            return "return_aux"
        if visible.sequences is not None:
            return None if self.packed is not None else "cu_seqlens_q (packed sequences)"
        if self.packed is None and visible.right == 0 and visible.q_len != visible.k_len:
            return f"causal of {visible.q_len} queries and {visible.k_len} keys"  # its mask is top-left
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, scale: float, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """out and lse, None unless asked for, of operands as this library takes them."""
        visible, options = call.visibility, self._options(call, scale, sinks)
        of_rows = visible.sequences
        if of_rows is None:
            found = self.dense(q, k, v, **options)
        else:
            assert self.packed is not None
            starts = {"cu_seqlens_q": of_rows.q_starts, "cu_seqlens_k": of_rows.k_starts}
            longest = {"max_seqlen_q": of_rows.longest_q, "max_seqlen_k": of_rows.longest_k}
            found = self.packed(q, k, v, **starts, **longest, **options)
        out, lse, *_ = found if isinstance(found, tuple) else (found, None)
        return out, lse if call.aux else None

    def _options(self, call: AttentionCall, scale: float, sinks: Tensor | None) -> dict[str, Any]:
        visible = call.visibility
        left = None if visible.left is None or visible.left >= visible.k_len else visible.left
        right = None if visible.right is None or visible.right >= visible.q_len else visible.right
        options: dict[str, Any] = {"softmax_scale": scale, "causal": right == 0}
        if left is not None or right not in (None, 0):
            sides = (left, None if right == 0 else right)  # causal says the right one
            options["window_size"] = tuple(self.no_limit if side is None else side for side in sides)
        if call.logits.softcap is not None:
            options["softcap"] = call.logits.softcap
        if sinks is not None:
            options["learnable_sink"] = sinks
        if call.aux:
            options[next(name for name in _KEYWORDS_OF_LSE if name in self.keywords)] = True
        return options


def _cudnn(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool) -> Tensor:
    """cuDNN's attention through PyTorch, q [B, S, H, D]; causal is top-left."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    if not can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, causal, is_grouped)):
        shapes = f"q {list(q.shape)} and k {list(k.shape)} of {q.dtype}"
        raise NotImplementedError(
            f"{shapes}: backend 'flash' has cuDNN alone here, which does not support them; use backend 'triton'"
        )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal, enable_gqa=is_grouped)
    return out.transpose(1, 2)


CUDNN = Library("cudnn", (8, 9, 10, 11, 12), None, _cudnn)
# The newest first: name, module, cards, no_limit, and a keyword that tells those of today from drafts and old ones.
FLASH = (
    ("flash-attn-4", "flash_attn.cute", (9, 10, 11, 12), None, "return_lse"),
    ("flash-attn-3", "flash_attn_interface", (9,), -1, "softcap"),
    ("flash-attn-2", "flash_attn", (8, 9, 10, 11, 12), -1, "softcap"),
)


@functools.cache
def libraries(card: int) -> tuple[Library, ...]:
    """The libraries that run on a card, by the first number of its compute capability; 0 is AMD's."""
    found = []
    for name, module, cards, no_limit, keyword in FLASH:
        if card not in cards and not (card == 0 and name == "flash-attn-2"):
            continue
        try:
            functions = import_module(module)
            own = Library(name, cards, no_limit, functions.flash_attn_func, functions.flash_attn_varlen_func)
        except (ImportError, AttributeError, OSError):  # absent, or built for another torch
            continue
        if keyword in own.keywords:
            found.append(own)
    if card in CUDNN.cards and torch.backends.cudnn.is_available():
        found.append(CUDNN)
    return tuple(found)


def card_of(device: torch.device) -> int:
    """The first number of a GPU's compute capability; 0 of AMD's. Raises ValueError for another device."""
    if device.type != "cuda":
        raise ValueError(f"backend: expected tensors on a CUDA or HIP device for 'flash', got {device}")
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]
