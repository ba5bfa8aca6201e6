"""Attention by FlashAttention 4, 3 or 2, whichever is installed, else by cuDNN through PyTorch; on a GPU.

    q'[i] = q[i] * query_scale[i],  k'[j] = k[j] * key_scale[j]      computed in fp32, rounded to 16 bits
    out   = library(q', k', v, softmax_scale=scale)

Scales, counts and statistics of keys are those of the other backends; only the products q' and k' are rounded. With the
libraries' gradients d_q' and d_k', of 16 bits,

    d_query_scale[i] = d_q'[i] . q[i],  d_q[i] = d_q'[i] * query_scale[i]      in fp32, and likewise of k

and autograd carries d_query_scale on into key norms and learned parameters.
"""

import functools

import torch

from ...core.call import Request
from ..protocol import Backend
from .run import attention, refuse_unsupported, takes


class Flash(Backend):
    """Installed libraries of attention, whose gradients are theirs."""

    name, is_traced, statistics = "flash", False, None  # torch.compile cannot trace its libraries
    attention = staticmethod(attention)

    def require(self, request: Request) -> None:
        refuse_unsupported(request)

    def passed_over(self, request: Request) -> str | None:
        """None where a table measured on this card names a library for "auto", and it takes the request."""
        if torch.compiler.is_compiling():
            return ""
        library = _faster_library(request.q.device)
        return None if library and not request.aux and takes(request, library) else ""


@functools.cache
def _faster_library(device: torch.device) -> str:
    from ...tuning.config import Target
    from ...tuning.lookup import faster_library

    return faster_library(Target.of(device)) if device.type == "cuda" else ""
