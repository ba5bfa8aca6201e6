"""Attention by FlashAttention 4, 3 or 2, whichever is installed, else by cuDNN through PyTorch; on a GPU.

    q'[i] = q[i] * query_scale[i],  k'[j] = k[j] * key_scale[j]      computed in fp32, rounded to 16 bits
    out   = library(q', k', v, softmax_scale=scale)

Scales, counts and statistics of keys are those of the other backends; only the products q' and k' are rounded. With the
libraries' gradients d_q' and d_k', of 16 bits,

    d_query_scale[i] = d_q'[i] . q[i],  d_q[i] = d_q'[i] * query_scale[i]      in fp32, and likewise of k

and autograd carries d_query_scale on into key norms and learned parameters.
"""

from .run import attention, refuse_unsupported, takes

__all__ = ["attention", "refuse_unsupported", "takes"]
