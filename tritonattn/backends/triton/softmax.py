"""Device functions of the softmax: its step, its sums, softcap, and what rounding takes from its results.

Logits are in base 2 inside a kernel: exp(x) = exp2(x * log2(e)). Every multiply-add is an explicit fma, so that results
do not depend on Triton's fp-fusion default.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .block import vector_from

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# fp32's smallest normal number. It stands for a factor of 0 where a hidden logit is -inf, since -inf * 0 is NaN.
TINY = tl.constexpr(2.0**-126)


@triton.jit
def partial_sums(x, COLUMNS: tl.constexpr):
    """Sums of x [M, N] as [M, COLUMNS], column c from every n = c modulo COLUMNS.

    mma.sync and wgmma leave two neighbours of every 8 columns in one lane: with 8 no lane needs another's sum. One
    column costs 5 % of the forward's loop and 7 % of grad_query's (sm_80; static, triton 3.9).
    """
    return tl.sum(x.reshape(x.shape[0], x.shape[1] // COLUMNS, COLUMNS), 1)


@triton.jit
def soft_cap(x, softcap):
    """softcap * tanh(x / softcap) for x in base 2 and softcap in natural units, which broadcasts to x.

    tanh is exact to 2 ulp: below 0.6 an odd polynomial (tanh(x) / x by least squares on Chebyshev nodes), else by exp.
    """
    limit = softcap * LOG2_E
    x = x * (1.0 / limit)
    square = x * x
    series = tl.fma(square, -0.005883233156055212, 0.020785147324204445)
    series = tl.fma(series, square, -0.05378039926290512)
    series = tl.fma(series, square, 0.13331879675388336)
    series = tl.fma(series, square, -0.33333295583724976)
    small = tl.fma(x * square, series, x)
    magnitude = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0.0, -magnitude, magnitude)) * limit


@triton.jit
def soft_cap_slope(capped, softcap):
    """The derivative of `soft_cap` from its result."""
    ratio = capped * (1.0 / (softcap * LOG2_E))
    return tl.fma(-ratio, ratio, tl.full(capped.shape, 1.0, tl.float32))


@triton.jit
def softcap_of_rows(softcap, factor, scale):
    """softcap * query_scale of rows whose factor is scale * query_scale in base 2, of either sign: `soft_cap` is even.

    Where it would be 0, as are the logits, the softcap.
    """
    caps = factor * tl.where(scale == 0.0, 0.0, softcap / (scale * LOG2_E))
    return tl.where(caps == 0.0, softcap, caps)


@triton.jit
def exponents(s, factor, biases, of_row, softcap, terms, AXIS: tl.constexpr):
    """(exponent, capped) of pairs in base 2: a logit with of_row added, and its part that passes the softcap.

    factor and biases, or None, broadcast to s; of_row is a vector of rows, which lacks the axis AXIS of s.
    """
    capped = s
    if terms.query_scale_after_softcap is not None:
        softcap = tl.expand_dims(softcap, AXIS)
    if softcap is None:
        if biases is None:
            exponent = tl.fma(s, factor, tl.expand_dims(of_row, AXIS))
        else:
            exponent = tl.fma(s, factor, biases) + tl.expand_dims(of_row, AXIS)
    elif terms.bias_after_softcap is not None:
        capped = soft_cap(s * factor, softcap)
        exponent = capped + biases + tl.expand_dims(of_row, AXIS)
    else:
        x = s * factor if biases is None else tl.fma(s, factor, biases)
        capped = soft_cap(x, softcap)
        exponent = capped + tl.expand_dims(of_row, AXIS)
        if biases is not None:
            exponent = tl.where(biases == float("-inf"), float("-inf"), exponent)
    return exponent, capped


@triton.jit
def gradients_of(ds, capped, softcap, terms, AXIS: tl.constexpr):
    """The gradients of a logit's product and of its biases, from that of the logit: see `exponents`."""
    d_biases = ds
    if terms.query_scale_after_softcap is not None:
        softcap = tl.expand_dims(softcap, AXIS)
    if softcap is not None:
        ds *= soft_cap_slope(capped, softcap)
        if terms.bias_after_softcap is None:
            d_biases = ds
    return ds, d_biases


@triton.jit
def lost_in_rounding(exact, rounded):
    """exact - rounded in 256ths of the last place of `rounded`, bf16 or fp16, as int8: `core.rounding`.

    fp32, which stands for bf16 in Triton's interpreter, loses nothing.
    """
    SHIFT: tl.constexpr = 15 - rounded.dtype.fp_mantissa_width if rounded.dtype != tl.float32 else 0
    HALF: tl.constexpr = (1 << SHIFT) >> 1
    lost = exact.to(tl.int32, bitcast=True) - rounded.to(tl.float32).to(tl.int32, bitcast=True)
    lost = tl.minimum(lost, (128 << SHIFT) - HALF - 1)
    if SHIFT < 8:  # bf16 has fp32's exponents, so that only NaN loses more
        lost = tl.maximum(lost, -(128 << SHIFT))
    return ((lost + HALF) >> SHIFT).to(tl.int8)


@triton.jit
def before_rounding(rounded, lost):
    """The fp32 that `rounded` was, from what it lost: `core.rounding`."""
    SHIFT: tl.constexpr = 15 - rounded.dtype.fp_mantissa_width if rounded.dtype != tl.float32 else 0
    bits = rounded.to(tl.float32).to(tl.int32, bitcast=True) + (lost.to(tl.int32) << SHIFT)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def gradients_of_tangent(p, dp, t_dp, t_x, t_biases, capped, mean, delta, eta, softcap):
    """(t_z, d_z, d_t_z, d_x, d_t_x): the gradients of a tangent towards logits and their tangents t_, capped and not.

        d_t_z = p * (dp - delta)                                t_z = t_x * dz/dx + t_biases
        d_z   = p * ((t_z - mean) * (dp - delta) + t_dp - eta)
        d_t_x = d_t_z * dz/dx
        d_x   = (d_z - 2 * tanh(x / softcap) / softcap * t_x * d_t_z) * dz/dx

    dp, t_dp   products of d_out with v and with its tangent, or None; t_biases: not those in t_x, or None
    mean, delta, eta   of `SecondTerms`; all in natural units but capped, and broadcast to p
    """
    t_z = t_x
    if softcap is not None:
        ratio = capped * (1.0 / (softcap * LOG2_E))
        slope = soft_cap_slope(capped, softcap)
        t_z = t_x * slope
    if t_biases is not None:
        t_z += t_biases
    excess = dp - delta
    d_z, d_t_z = p * tl.fma(t_z - mean, excess, -eta), p * excess
    if t_dp is not None:
        d_z = tl.fma(p, t_dp, d_z)  # a sum of t_dp alone would join the product's
    d_x, d_t_x = d_z, d_t_z
    if softcap is not None:
        d_t_x = d_t_z * slope
        d_x = tl.fma(ratio * (-2.0 / softcap) * t_x, d_t_z, d_z) * slope
    return t_z, d_z, d_t_z, d_x, d_t_x


@triton.jit
def probabilities(s, bias, keep, factor, softcap, terms, m_i, MASKED: tl.constexpr, ENTROPY: tl.constexpr):
    """One step of the online softmax, relative to the new maximum m_i [BLOCK_M]: (p, weighted, alpha, moved, m_i).

    s [BLOCK_M, BLOCK_N] lacks the factor >= 0, or is capped where biases come behind the softcap; bias, in base 2,
    broadcasts to it or is None; keep has the visible pairs where MASKED. m_i is the maximum of the logits before the
    softcap over bias and product; the capped one, the shift, is subtracted. It has `moved` by so much, which shrinks
    earlier sums by alpha = exp(moved). weighted is p (z_j - shift) where ENTROPY.
    """
    cap = None if terms.bias_after_softcap is not None else softcap
    if bias is not None:
        s = tl.fma(s, factor[:, None], bias)
    if MASKED:
        s = tl.where(keep, s, float("-inf"))
    m_new = tl.max(s, 1)
    if bias is None:
        m_new *= factor
    m_new = tl.maximum(m_i, m_new)
    if cap is None:
        previous, shift = m_i, m_new
        if MASKED or bias is not None:
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        if bias is None:
            exponent = tl.fma(s, factor[:, None], (-shift)[:, None])
        else:
            exponent = s - shift[:, None]
    else:
        previous, shift = soft_cap(m_i, cap), soft_cap(m_new, cap)
        if terms.query_scale_after_softcap is not None:
            cap = cap[:, None]
        if bias is None:
            s *= factor[:, None]
        exponent = soft_cap(s, cap) - shift[:, None]
        if MASKED:
            exponent = tl.where(keep, exponent, float("-inf"))
        if bias is not None:
            exponent = tl.where(bias == float("-inf"), float("-inf"), exponent)
    p = tl.exp2(exponent)  # [BLOCK_M, BLOCK_N]
    moved = previous - shift
    alpha = tl.exp2(moved)
    weighted = p
    if ENTROPY:
        if bias is not None:
            exponent = tl.where(exponent == float("-inf"), 0.0, exponent)
        elif MASKED:
            exponent = tl.where(keep, exponent, 0.0)
        weighted = p * exponent
    return p, weighted, alpha, moved, m_new


@triton.jit
def moved_sums(p, weighted, alpha, moved, l_i, spread, ENTROPY: tl.constexpr):
    """(l_i, spread) after a step of `probabilities`: the sums of p, and of exp(z_j - shift) (z_j - shift).

    Both are `partial_sums`, [BLOCK_M, columns].
    """
    COLUMNS: tl.constexpr = l_i.shape[1]
    alphas = tl.broadcast_to(alpha[:, None], l_i.shape)
    if ENTROPY:
        before = tl.where(l_i > 0.0, moved[:, None], 0.0)
        spread = tl.fma(tl.fma(before, l_i, spread), alphas, partial_sums(weighted, COLUMNS))
    return tl.fma(l_i, alphas, partial_sums(p, COLUMNS)), spread


@triton.jit
def joint_peak(shift, sink):
    """(peak, weight, of_sink): the larger of both, exp2(shift - peak) and exp2(sink - peak).

    +inf as a sink gives (inf, 0, 1), and NaN (shift, 1, NaN).
    """
    is_higher = sink > shift
    peak, other = tl.where(is_higher, sink, shift), tl.where(is_higher, shift, sink)
    ratio = tl.exp2(other - peak)
    return peak, tl.where(is_higher, ratio, 1.0), tl.where(is_higher, 1.0, ratio)


@triton.jit
def finish_softmax(m_i, l_i, spread, factor, softcap, terms, sinks, batch, head, rows, results, offsets, keep):
    """(l_i, weight, total) of rows [BLOCK_M], whose output is weight * acc / total; stores lse, max_logit and entropy.

    A row without keys has l_i 0, total 1, lse and max_logit -inf, entropy 0. A sink joins the total only: -inf is no
    sink, +inf gives weight 0, and NaN a total of NaN. rows are those of `sinks`, a `Scale` or None.
    """
    l_i, spread = tl.sum(l_i, 1), tl.sum(spread, 1)
    empty = l_i == 0.0
    total = tl.where(empty, 1.0, l_i)
    shift = m_i
    if softcap is not None and terms.bias_after_softcap is None:
        shift = soft_cap(m_i, softcap)
    shift = tl.where(empty, 0.0, shift)
    tl.store(results.lse + offsets, tl.where(empty, float("-inf"), (shift + tl.log2(total)) * LN_2), mask=keep)
    if results.max_logit is not None:
        max_logit = tl.where((factor == TINY) & (l_i > 0.0), 0.0, m_i * LN_2)  # TINY stands for 0
        max_logit = tl.where(l_i == l_i, max_logit, l_i)  # tl.max ignores NaN; the sum keeps it
        tl.store(results.max_logit + offsets, max_logit, mask=keep)
    if results.entropy is not None:
        entropy = tl.where(empty, 0.0, (tl.log2(total) - spread / total) * LN_2)
        tl.store(results.entropy + offsets, tl.where(entropy < 0.0, 0.0, entropy), mask=keep)
    weight = 1.0
    if sinks is not None:
        sink = tl.load(vector_from(sinks, batch, head, 0, rows), mask=keep, other=0.0)  # [BLOCK_M]
        _, weight, of_sink = joint_peak(shift, sink * LOG2_E)
        total = tl.where(empty, 1.0, tl.fma(l_i, weight, of_sink))
    return l_i, weight, total
