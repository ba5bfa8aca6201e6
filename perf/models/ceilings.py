"""Limits of the generated code, static counts in bf16: ceilings of the default configs' unmasked loops, and floors."""

from __future__ import annotations

# Non-MMA instructions per logit with query_scale: kernel, target, head_dim.
NON_MMA_PER_LOGIT = {
    ("forward", "sm_80", 64): 8.4,
    ("forward", "sm_80", 128): 11.8,
    ("forward", "sm_90", 64): 6.9,
    ("forward", "sm_90", 128): 7.6,
    ("forward", "sm_100", 64): 6.4,
    ("forward", "sm_100", 128): 7.0,
    ("grad_key_value", "sm_80", 64): 9.4,
    ("grad_key_value", "sm_80", 128): 14.0,
    ("grad_key_value", "sm_90", 64): 9.7,
    ("grad_key_value", "sm_90", 128): 10.8,
    ("grad_key_value", "sm_100", 64): 10.4,
    ("grad_key_value", "sm_100", 128): 11.4,
    ("grad_query", "sm_80", 64): 7.4,
    ("grad_query", "sm_80", 128): 10.5,
    ("grad_query", "sm_90", 64): 8.2,
    ("grad_query", "sm_90", 128): 8.9,
    ("grad_query", "sm_100", 64): 8.2,
    ("grad_query", "sm_100", 128): 9.0,
    # Of all tangents, and towards all tensors and tangents: 5, 8 and 10 products. sm_89's code is sm_86's.
    ("tangent", "sm_80", 128): 16.0,
    ("tangent", "sm_86", 128): 34.0,
    ("tangent", "sm_90", 128): 20.4,
    ("tangent", "sm_100", 128): 20.2,
    ("tangent", "sm_120", 128): 33.7,
    ("grad_query_second", "sm_80", 128): 53.5,
    ("grad_query_second", "sm_86", 128): 53.5,
    ("grad_query_second", "sm_90", 128): 53.5,
    ("grad_query_second", "sm_100", 128): 46.7,
    ("grad_query_second", "sm_120", 128): 54.5,
    ("grad_key_value_second", "sm_80", 128): 76.0,
    ("grad_key_value_second", "sm_86", 128): 76.0,
    ("grad_key_value_second", "sm_90", 128): 78.0,
    ("grad_key_value_second", "sm_100", 128): 74.0,
    ("grad_key_value_second", "sm_120", 128): 67.0,
    # Tiles are small so that the fp32 sums fit registers. Where a product of the tile has fewer columns than its warps
    # could take, 8 each on sm_80 and in sm_90's mma.sync, or a program's two warpgroups share 64 rows, warps repeat
    # exponentials.
    ("forward", "sm_80", 512): 68.0,
    ("forward", "sm_90", 512): 90.0,
    ("forward", "sm_100", 512): 52.0,
    ("grad_key_value", "sm_80", 512): 130.0,
    ("grad_key_value", "sm_90", 512): 102.0,
    ("grad_query", "sm_80", 512): 78.0,
    ("grad_query", "sm_90", 512): 51.0,
}

# The same with a bias of pairs, causal, and bytes per thread that loops may spill: kernel, target, head_dim, bias.
# Tiles without spills have more instructions per logit, 8 % to a third.
PAIR_BIASES = {
    ("forward", "sm_80", 64, "bias"): (12.9, 0),
    ("forward", "sm_90", 128, "relative_bias"): (24.6, 0),
    ("forward", "sm_100", 64, "bias"): (13.0, 0),
    ("grad_key_value", "sm_80", 64, "relative_bias"): (29.8, 0),
    ("grad_key_value", "sm_90", 128, "bias"): (26.0, 52),
    ("grad_key_value", "sm_90", 128, "relative_bias"): (36.8, 172),
    ("grad_key_value", "sm_100", 64, "relative_bias"): (39.8, 0),
    ("grad_query", "sm_80", 128, "bias"): (16.4, 0),
    ("grad_query", "sm_90", 64, "relative_bias"): (20.3, 0),
    ("grad_query", "sm_90", 128, "relative_bias"): (24.1, 28),
    ("grad_query", "sm_100", 128, "bias"): (20.5, 0),
}

# The same over pages of 16 bits, and of 8, at head dim 128: decoding, and packed causal rows.
EIGHT_BIT_PAGES = {
    ("decode", "sm_80"): (64.8, 106.0),
    ("decode", "sm_90"): (65.7, 119.8),
    ("decode", "sm_100"): (61.7, 95.3),
    ("forward", "sm_80"): (15.6, 20.5),
}

# The same of the forward in Gluon, sm_90, by head_dim; and the least share of the tensor rate that its replay may have.
GLUON_NON_MMA_PER_LOGIT = {64: 6.4, 128: 7.1}
GLUON_SHARE = {64: 0.66, 128: 0.88}

# Instructions per logit that query_scale may add to a kernel without scales, in one config.
QUERY_SCALE = {"forward": 0.05, "grad_query": 0.05, "grad_key_value": 0.3}
# sm_100 loads terms of rows one by one, so that packed arithmetic finds them: the factor is one load more.
QUERY_SCALE_OF_TARGET = {("grad_key_value", "sm_100"): 0.65}

# Instructions per logit that key_scale may add to a kernel with query_scale. One multiplication is inherent, and in
# grad_query a second one (the gradient of a logit times the scale, which rounding K would save); the rest loads scales.
KEY_SCALE = {"forward": 1.6, "grad_query": 2.6, "grad_key_value": 1.6}

# The same of key_bias. One addition is inherent; both backward passes add up gradients of logits too, and the pass over
# keys multiplies them by the row's factor only then.
KEY_BIAS = {"forward": 2.1, "grad_query": 3.3, "grad_key_value": 3.7}
KEY_BIAS_OF_TARGET = {("grad_key_value", "sm_100"): 3.8}

# Floor of the instructions that copy from memory to LDS on gfx950, in the shipped configs: kernel, head_dim. Tiles that
# two products read in two layouts, K of grad_query and both of grad_key_value, go through registers.
DIRECT_LOADS = {
    ("forward", 64): 8,
    ("forward", 128): 8,
    ("grad_query", 64): 4,
    ("grad_query", 128): 4,
}
