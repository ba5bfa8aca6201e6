"""Attention on a CPU for every mask and option, tile by tile in plain torch: memory O(S D), backward included.

A tile is some query rows against some keys, for a few heads. Tiles without a visible pair are skipped; tiles in which
every pair is visible are not masked. Operands are widened to fp32 (fp64 stays) a tile at a time and nothing
is rounded in between, P included: the result of a 16-bit call is rounded once.

With x = scale * (q . k) * query_scale * key_scale + biases and z = x, or softcap * tanh(x / softcap):

    s       = exp(z - lse)
    share_i = exp(lse_i) / (exp(lse_i) + exp(sinks_i))      1 without sinks
    keep_ij = kept_ij / (1 - p)                             1 without dropout
    out_i   = share_i sum_j keep_ij s_ij v_j
    delta_i = out_i . d_out_i
    dz_ij   = s_ij (share_i keep_ij (d_out_i . v_j) - share_i delta_i + d_lse_i)
    dx_ij   = dz_ij (1 - (z_ij / softcap)^2)                dz_ij without softcap
    d_sinks_i = -(1 - share_i) delta_i
    d_bias_ij = dx_ij                                   dz_ij where biases are added after the softcap

The gradient of a scale is that of the scaled operand before it meets the scale, times the operand: nothing is
divided by a scale.
"""

from .backward_pass import backward
from .forward_pass import forward

__all__ = ["backward", "forward"]
