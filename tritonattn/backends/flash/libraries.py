"""FlashAttention 4, 3 and 2 and cuDNN: which are installed, and how each is called."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...core.call import AttentionCall
from ...core.private_names import DisableTorchFunction
from ...core.visibility import Visibility

WIDEST = 256
KEYWORDS_OF_LSE = ("return_lse", "return_attn_probs")
HOW_TO_INSTALL = (
    "pip install 'flash-attn-4>=4.0.0b34' (Hopper, Blackwell); pip install 'flash-attn>=2.6' --no-build-isolation"
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

    def widths(self, dims: tuple[int, int], card: int, is_grouped: bool) -> tuple[int, int]:
        """The head dims, of q and k and of v, to which zeros are added."""
        takes_unequal = self.packed is not None and self.name != "flash-attn-2"
        if dims == (192, 128) and takes_unequal and not (self.name == "flash-attn-4" and card == 9 and is_grouped):
            return dims
        width = -(-max(dims) // 8) * 8
        if self.name == "flash-attn-4" and card in (10, 11) and width > 128:
            width = WIDEST
        return width, width

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, scale: float, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """out and lse, None unless asked for, of operands as this library takes them."""
        visible, options = call.visibility, self._options(call, scale, sinks)
        sequences = visible.sequences
        if sequences is None:
            found = self.dense(q, k, v, **options)
        else:
            assert self.packed is not None
            starts = {"cu_seqlens_q": sequences.q_starts, "cu_seqlens_k": sequences.k_starts}
            # For at most one row per sequence FlashAttention 2 takes exactly one, where key heads are shared.
            longest = {"max_seqlen_q": max(sequences.longest_q, 2), "max_seqlen_k": sequences.longest_k}
            found = self.packed(q, k, v, **starts, **longest, **options)
        out, lse, *_ = found if isinstance(found, tuple) else (found, None)
        return out, lse if call.aux else None

    def _options(self, call: AttentionCall, scale: float, sinks: Tensor | None) -> dict[str, Any]:
        left, right = limits(call.visibility)
        options: dict[str, Any] = {"softmax_scale": scale, "causal": right == 0}
        if left is not None or right not in (None, 0):
            sides = (left, None if right == 0 else right)  # causal says the right one
            options["window_size"] = tuple(self.no_limit if side is None else side for side in sides)
        if call.terms.softcap is not None:
            options["softcap"] = call.terms.softcap
        if sinks is not None:
            options["learnable_sink"] = sinks
        if torch.are_deterministic_algorithms_enabled() and "deterministic" in self.keywords:
            options["deterministic"] = True
        if call.aux:
            options[next(name for name in KEYWORDS_OF_LSE if name in self.keywords)] = True
        return options


def lengths(visible: Visibility) -> tuple[int, int]:
    """Queries and keys, at most, of a sequence."""
    sequences = visible.sequences
    return (visible.q_len, visible.k_len) if sequences is None else (sequences.longest_q, sequences.longest_k)


def limits(visible: Visibility) -> tuple[int | None, int | None]:
    """The sides of a window that hide a key, as far as lengths show it; a right one of 0 is causal."""
    q_len, k_len = lengths(visible)
    left = None if visible.left is None or visible.left >= k_len else visible.left
    return left, None if visible.right is None or visible.right >= max(q_len, 1) else visible.right


def _cudnn(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool) -> Tensor:
    """cuDNN's attention through PyTorch, q [B, S, H, D]; causal is top-left."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), DisableTorchFunction():
        out = scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal, enable_gqa=is_grouped)
    return out.transpose(1, 2)


CUDNN = Library("cudnn", (8, 9, 10, 11, 12), None, _cudnn)
# FlashAttention 4 before 4.0.0b34 has a forward for head dim 256 without windows, softcap and sinks, in this module.
OF_OLD_FOUR = "flash_attn.cute.sm100_hd256_2cta_fmha_forward"
# The newest first: name, module, cards, no_limit, and what tells those of today from drafts and old ones: a keyword
# that these lack, and a module that today's have no more.
FLASH = (
    ("flash-attn-4", "flash_attn.cute", (9, 10, 11, 12), None, "gather_bwd_recompute_p", OF_OLD_FOUR),
    ("flash-attn-3", "flash_attn_interface", (9,), -1, "softcap", ""),
    ("flash-attn-2", "flash_attn", (0, 8, 9, 10, 11, 12), -1, "softcap", ""),
)


@functools.cache
def libraries(card: int) -> tuple[Library, ...]:
    """The libraries that run on a card, by the first number of its compute capability; 0 is AMD's."""
    found = [one for one in _looked_for(card) if isinstance(one, Library)]
    if card in CUDNN.cards and torch.backends.cudnn.is_available():
        found.append(CUDNN)
    return tuple(found)


def why_none(card: int) -> str:
    """Say why no library of FLASH runs on a card."""
    reasons = [one for one in _looked_for(card) if one and isinstance(one, str)]
    return "; ".join(reasons) or "which is not installed for this GPU"


def _looked_for(card: int) -> list[Library | str]:
    return [_imported(*one) for one in FLASH if card in one[2]]


def _imported(
    name: str, module: str, cards: tuple[int, ...], no_limit: int | None, keyword: str, former: str
) -> Library | str:
    """The library, or why it cannot be used: "" where it is not installed."""
    try:
        functions = import_module(module)
        found = Library(name, cards, no_limit, functions.flash_attn_func, functions.flash_attn_varlen_func)
    except (ImportError, AttributeError, OSError) as error:  # OSError: built for another torch
        is_absent = isinstance(error, AttributeError) or getattr(error, "name", None) in (module, module.split(".")[0])
        return "" if is_absent else f"{name} cannot be imported ({type(error).__name__}: {error})"
    return f"{name} is too old" if keyword not in found.keywords or former in sys.modules else found


def card_of(device: torch.device) -> int:
    """The first number of a GPU's compute capability; 0 of AMD's. Raises ValueError for another device."""
    if device.type != "cuda":
        raise ValueError(f"backend: expected tensors on a CUDA or HIP device for 'flash', got {device}")
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]
