"""Device code only: what one program computes. Grids, strides, allocation and configs are the backend's."""

from .forward import attention_forward
from .grad_key_value import attention_grad_key_value
from .grad_query import attention_grad_query, attention_row_terms
from .key_statistics import key_lengths, key_prefix_sums, key_statistics_grad

KERNELS = {
    "forward": attention_forward,
    "row_terms": attention_row_terms,
    "grad_query": attention_grad_query,
    "grad_key_value": attention_grad_key_value,
    "key_statistics": key_lengths,
    "key_prefix_sums": key_prefix_sums,
    "key_statistics_grad": key_statistics_grad,
}
