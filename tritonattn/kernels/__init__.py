"""Device code only: what one program computes. Grids, strides, allocation and configs are the backend's."""

from .decode import attention_decode, combine_splits
from .forward import attention_forward
from .grad_key_value import attention_grad_key_value
from .grad_query import attention_grad_query
from .key_statistics import append_keys, append_to_pages, key_norms, key_statistics_grad, prefix_sums
from .ranges import argmax_of_ranges, keys_seen, rows_of_key_block
from .row_terms import attention_row_terms

KERNELS = {
    "forward": attention_forward,
    "row_terms": attention_row_terms,
    "grad_query": attention_grad_query,
    "grad_key_value": attention_grad_key_value,
    "decode": attention_decode,
    "decode_combine": combine_splits,
    "key_statistics": key_norms,
    "prefix_sums": prefix_sums,
    "key_statistics_grad": key_statistics_grad,
    "append_keys": append_keys,
    "append_to_pages": append_to_pages,
    "row_bounds": rows_of_key_block,
    "keys_seen": keys_seen,
    "argmax_of_ranges": argmax_of_ranges,
}
