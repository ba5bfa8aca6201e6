"""Every refusal names the argument, what was expected and what came, and nothing is computed before it."""

import inspect
import warnings

import pytest
import torch
from torch import ones

import tritonattn
from tests.support.packed import offsets
from tests.support.refusals import refuses
from tritonattn import KeyStatistics, PagedKeyStatistics, ops
from tritonattn.backends import BACKENDS, reference
from tritonattn.scaling import KeyNormSum

B, HQ, HKV, SQ, SK, D = 2, 4, 2, 3, 5, 8
INT = torch.int32
CU = offsets((3, 2))
META = torch.device("meta")
nan, inf = float("nan"), float("inf")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # that these are a prototype
    NESTED = torch.nested.nested_tensor([ones(2), ones(3)])

DENSE = {"q": ones(B, HQ, SQ, D), "k": ones(B, HKV, SK, D), "v": ones(B, HKV, SK, D)}
PACKED = {"q": ones(5, HQ, D), "k": ones(5, HKV, D), "v": ones(5, HKV, D)}
PACKED |= {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 3, "max_seqlen_k": 3}
CACHE = {"q": ones(B, HQ, SQ, D), "k_cache": ones(B, HKV, 24, D), "v_cache": ones(B, HKV, 24, 6)}
CACHE |= {"key_lengths": torch.tensor([9, 20])}
TABLE = torch.tensor([[0, 1], [2, 3]], dtype=INT)
PAGES = CACHE | {"k_cache": ones(7, 16, HKV, D), "v_cache": ones(7, 16, HKV, 6), "block_table": TABLE}
PACKED_PAGES = {"q": ones(3, HQ, D).double(), "k": ones(8, 16, HKV, D).double(), "v": ones(8, 16, HKV, 6).double()}
PACKED_PAGES |= {"cu_seqlens_q": offsets((2, 1)), "cu_seqlens_k": offsets((20, 3)), "max_seqlen_q": 2}
PACKED_PAGES |= {"max_seqlen_k": 20, "block_table": TABLE}
CALLS = {
    "attention": DENSE,
    "scaled_attention": DENSE,
    "attention_varlen": PACKED,
    "attention_decode": CACHE,
    "attention_varlen over pages": PACKED_PAGES,
    "attention_decode over pages": PAGES,
}

# Arguments changed, and the error: its type and what it says, in parts.
Case = tuple[dict, str]


def of_kv(k: torch.Tensor, v: torch.Tensor | None = None, suffix: str = "", **more) -> dict:
    return {"k" + suffix: k, "v" + suffix: k if v is None else v, **more}


def factors(name: str) -> list[Case]:
    return [
        ({name: ones(HQ)}, f"ValueError: {name}: ~ [H, 1] ~ [1, S] ~ 1-D [4]"),
        ({name: ones(B, 3, 7)}, f"ValueError: {name}: ~ [2, 3, 7]"),
        ({name: ones(1, 1, 1, 1)}, f"ValueError: {name}: ~ [1, 1, 1, 1]"),
        ({name: ones(HQ, 1).int()}, f"TypeError: {name}: ~ float32 ~ torch.int32"),
        ({name: ones(HQ, 1).to_sparse()}, f"TypeError: {name}: ~ dense ~ sparse"),
        ({name: ones(1, 1, device=META)}, f"ValueError: {name}: ~ cpu ~ meta"),
    ]


# Every function that has the argument refuses these.
SHARED: list[Case] = [
    ({"causal": 1}, "TypeError: causal: ~ bool ~ int 1"),
    ({"return_aux": "yes"}, "TypeError: return_aux: ~ bool ~ 'yes'"),
    ({"backend": "cuda"}, "ValueError: backend: ~ auto, triton, flash, sdpa, reference ~ 'cuda'"),
    ({"window": 3}, "TypeError: window: ~ (left, right) ~ 3"),
    ({"window": (1.0, 2)}, "TypeError: window: ~ int or None ~ 1.0"),
    ({"window": (-2, 0)}, "ValueError: window: ~ sides of at least 0 ~ -1 or None ~ (-2, 0)"),
    ({"softcap": 1e-40}, "ValueError: softcap: ~ above 0 ~ 1e-40"),
    ({"softcap": 0.0}, "ValueError: softcap: ~ above 0 ~ 0.0"),
    ({"softcap": nan}, "ValueError: softcap: ~ finite ~ nan"),
    ({"dropout_p": 1.0}, "ValueError: dropout_p: ~ [0, 1) ~ 1.0"),
    ({"dropout_p": -0.1}, "ValueError: dropout_p: ~ [0, 1) ~ -0.1"),
    ({"sinks": torch.zeros(HKV)}, "ValueError: sinks: ~ [Hq] = [4] ~ [2]"),
    ({"sinks": torch.zeros(())}, "ValueError: sinks: ~ [Hq] = [4] ~ []"),
    ({"sinks": torch.zeros(1)}, "ValueError: sinks: ~ [Hq] = [4] ~ [1]"),
    ({"sinks": torch.zeros(B, HQ)}, "ValueError: sinks: ~ [Hq] = [4] or one broadcastable to ~ got [2, 4]"),
    ({"sinks": torch.zeros(HQ).int()}, "TypeError: sinks: ~ float32 ~ int32"),
    ({"sinks": torch.zeros(HQ, device=META)}, "ValueError: sinks: ~ cpu ~ meta"),
    ({"key_bias": ones(7)}, "ValueError: key_bias: ~ 1-D [7]"),
    ({"key_bias": ones(B, HQ, SQ, SK)}, "ValueError: key_bias: ~ [2, 4, 3, 5]"),
    ({"key_bias": ones(1, SK).int()}, "TypeError: key_bias: ~ float32 ~ int32"),
    ({"key_bias": ones(1, SK, device=META)}, "ValueError: key_bias: ~ q's device cpu ~ meta"),
    *factors("scaling"),
    ({"scaling": "vaswani"}, "ValueError: scaling: ~ sqrt_dim, dim, none ~ 'vaswani'"),
    ({"scaling": "key_norm_meen"}, "ValueError: did you mean 'key_norm_mean'"),
    ({"scaling": KeyNormSum}, "TypeError: scaling: ~ instance ~ write KeyNormSum()"),
    ({"scaling": inf}, "ValueError: scaling: ~ finite ~ inf"),
    ({"backend": "tritton"}, "ValueError: backend: ~ got 'tritton' (did you mean 'triton'?)"),
    ({"softcap": 0}, "ValueError: softcap: expected a number above 0, got 0 ~ None is no softcap"),
    ({"scaling": "ssmax"}, "ValueError: 'ssmax' ~ module ~ tritonattn.nn.SSMax(heads=Hq, base=LENGTH)"),
    ({"scaling": "per_head"}, "ValueError: 'per_head' ~ nn.PerHead(heads=Hq)"),
    *factors("gain"),
    ({"gain": "2"}, "TypeError: gain: ~ number ~ '2'"),
    *(({"gain": x}, f"ValueError: gain: expected a finite number, got {x!r}") for x in (10**400, 3e38, inf, nan)),
    ({"scaling": 1e30, "gain": 1e30}, "ValueError: constant * gain: expected a finite number, got 1.0 ~ e+60"),
    *factors("query_scale"),
    ({"key_scale": ones(B, HQ, SK)}, "ValueError: key_scale: ~ [2, 2, 5] ~ [2, 4, 5]"),
    ({"scale": ones(())}, "TypeError: scale: ~ number ~ tensor"),
    ({"scale": -inf}, "ValueError: scale: ~ finite ~ -inf"),
]

TABLE_OF_3 = {"relative_bias": ones(1, 1, 1, 3)}
OF_DENSE: list[Case] = [
    ({"v": ones(1, B, HKV, SK, D)}, "ValueError: v: ~ 4 axes ~ 5"),
    ({"k": ones(B, HKV, SK, D).int()}, "TypeError: q, k, v: ~ one dtype ~ torch.int32"),
    (
        {"q": ones(B, SQ, HQ, D), "k": ones(B, SK, HKV, D), "v": ones(B, SK, HKV, D)},
        "ValueError: k: ~ divides q's 3, got 5: they look like [B, S, H, D]; pass q, k and v each as x.transpose(1, 2)",
    ),
    ({"v": ones(B, HKV, SK, D).half()}, "TypeError: q, k, v: ~ one dtype ~ torch.float16"),
    ({"v": NESTED}, "TypeError: v: ~ dense tensor [B, Hkv, Sk, Dv] ~ nested tensor"),
    ({"q": ones(B, HQ, SQ, D).to_sparse()}, "TypeError: q: ~ dense ~ sparse"),
    ({"k": ones(B, HKV, SK, D, device=META)}, "ValueError: one device ~ cpu, meta, cpu"),
    ({"k": ones(3, HKV, SK, D)}, "ValueError: k: expected [B, Hkv, Sk, D] with q's B = 2, got [3, 2, 5, 8]"),
    ({"v": ones(B, 1, SK, D)}, "ValueError: v: ~ with k's Hkv = 2, got [2, 1, 5, 8]"),
    *((of_kv(ones(B, count, SK, D)), f"ValueError: k: ~ divides q's 4 ~ {count}") for count in (0, 3, 8)),
    ({"v": ones(B, HKV, 6, D)}, "ValueError: v: ~ with k's Sk = 5, got [2, 2, 6, 8]"),
    ({"k": ones(B, HKV, SK, 7)}, "ValueError: k: ~ with q's D = 8, got [2, 2, 5, 7]"),
    ({"q": ones(B, HQ, SQ, 0), "k": ones(B, HKV, SK, 0)}, "ValueError: at least 1 ~ 0 in q"),
    ({"key_lengths": ones(B)}, "TypeError: key_lengths: ~ integer ~ float32"),
    ({"key_lengths": ones(3).int()}, "ValueError: key_lengths: ~ [B] = [2] ~ [3]"),
    ({"key_lengths": ones(B, device=META).int()}, "ValueError: key_lengths: ~ cpu ~ meta"),
    ({"key_lengths": torch.tensor([-1, 2])}, "ValueError: key_lengths: ~ [0, Sk = 5] ~ -1"),
    ({"key_lengths": torch.tensor([6, 2])}, "ValueError: key_lengths: ~ [0, Sk = 5] ~ 6"),
    (
        {"key_ranges": torch.zeros(B, SQ).int()},
        "ValueError: key_ranges: expected shape [B, Sq, 2] = [2, 3, 2] or [B, 1, Sq, 2] = [2, 1, 3, 2], got [2, 3]",
    ),
    ({"key_ranges": torch.zeros(B, SQ, 2)}, "TypeError: key_ranges: ~ integer ~ float32"),
    (
        {"key_ranges": torch.tensor([[[0, 1]] * SQ, [[2, 2], [5, 3], [4, 0]]])},
        "ValueError: key_ranges: expected lo <= hi, got (5, 3) in row 1 of batch entry 1; a row without keys is",
    ),
    (
        {"key_ranges": torch.tensor([[[0, 1]] * SQ, [[2, 2], [4, 0], [5, 3]]])[:, None]},
        "ValueError: key_ranges: expected lo <= hi, got (4, 0) in row 1 of batch entry 1",
    ),
    (
        {"key_ranges": torch.tensor([1, 0], dtype=torch.uint8).expand(B, SQ, 2)},
        "ValueError: key_ranges: expected lo <= hi, got (1, 0) in row 0 of batch entry 0",
    ),
    ({"key_ranges": torch.full((B, SQ, 2), 9)}, "ValueError: key_ranges: ~ [0, Sk = 5] ~ 9"),
    (
        {"mask": torch.zeros(SQ, SK)},
        "TypeError: mask: ~ torch.bool ~ got torch.float32; of 0 and -inf give mask == 0, other",
    ),
    ({"mask": torch.zeros(SQ, SK).int()}, "TypeError: mask: ~ torch.bool, True for visible, got torch.int32"),
    ({"mask": ones(B, SK).bool()}, "ValueError: mask: ~ [2, 4, 3, 5] ~ [B, 1, 1, Sk]"),
    ({"mask": ones(B, HKV, SQ, SK).bool()}, "ValueError: mask: ~ [2, 2, 3, 5]"),
    *(
        (
            {"mask": ones(n, SQ, SK).bool()},
            f"ValueError: mask: ~ got [{n}, 3, 5]; write mask[:, None] for [B, 1, Sq, Sk], mask[None] ~ [1, H",
        )
        for n in (B, HQ)
    ),
    ({"mask": ones(SQ, SK, device=META).bool()}, "ValueError: mask: ~ cpu ~ meta"),
    ({"key_bias": ones(B, 3, SK)}, "ValueError: key_bias: ~ [B, Hq or Hkv, Sk] = [2, 4, 5], got [2, 3, 5]"),
    ({"bias": ones(4, SK)}, "ValueError: bias: ~ broadcastable to [B, Hq, Sq, Sk] = [2, 4, 3, 5], got [4, 5]"),
    *(
        (
            {"bias": ones(n, SQ, SK)},
            f"ValueError: bias: ~ got [{n}, 3, 5]; write bias[:, None] for [B, 1, Sq, Sk], bias[None] ~ [1, H",
        )
        for n in (B, HQ)
    ),
    (
        {"key_bias": ones(B, SK)},
        "ValueError: key_bias: ~ got [2, 5]; write key_bias[:, None] for [B, 1, Sk], key_bias[None]",
    ),
    ({"bias": ones(SQ, SK).int()}, "TypeError: bias: ~ float32 ~ torch.int32"),
    ({"relative_bias": ones(HQ, 3)}, "ValueError: relative_bias: expected [B, Hq, Sq, extent] ~ got [4, 3]"),
    ({"relative_bias": ones(1, 3, 1, 3)}, "ValueError: relative_bias: expected a shape broadcastable"),
    ({"relative_bias": ones(1, 1, 1, 0)}, "ValueError: relative_bias: expected an extent of at least 1"),
    ({"relative_bias": [1.0]}, "TypeError: relative_bias: expected a tensor [B, Hq, Sq, extent], got list"),
    ({"relative_right": 1}, "ValueError: relative_right: expected 0 without relative_bias, got 1"),
    (TABLE_OF_3 | {"relative_right": 3}, "ValueError: relative_right: expected less than the extent, 3, got 3"),
    (TABLE_OF_3 | {"relative_right": 1.0}, "TypeError: relative_right: expected an int"),
    ({"bias_after_softcap": 1}, "TypeError: bias_after_softcap: expected a bool"),
    (
        TABLE_OF_3 | {"key_ranges": torch.zeros(B, SQ, 2).int(), "batch_invariant": True},
        "NotImplementedError: relative_bias: not supported with key_ranges under batch_invariant",
    ),
]

OF_ONE: dict[str, list[Case]] = {
    "attention": [
        ({"scaling": ones(B, 3, 7)}, "ValueError: scaling: ~ [B, Hq, Sq] = [2, 4, 3]"),
        ({"gain": ones(B, 3, 7)}, "ValueError: gain: ~ [B, Hq, Sq] = [2, 4, 3]"),
        ({"is_causal": True}, "TypeError: is_causal"),
        *OF_DENSE,
    ],
    "scaled_attention": [
        ({"query_scale": ones(B, 3, 7)}, "ValueError: query_scale: ~ [B, Hq, Sq] = [2, 4, 3]"),
        *OF_DENSE,
    ],
    "attention_varlen": [
        ({"cu_seqlens_q": CU.long()}, "TypeError: cu_seqlens_q: ~ got torch.int64; cu_seqlens_q.int() is"),
        ({"cu_seqlens_k": CU.to(META)}, "ValueError: cu_seqlens_k: expected q's device cpu, got meta"),
        ({"cu_seqlens_q": CU[None]}, "ValueError: cu_seqlens_q: expected shape [N + 1] ~ got [1, 3]"),
        ({"cu_seqlens_k": offsets((5,))}, "ValueError: cu_seqlens_k: expected shape [N + 1] = [3], got [2]"),
        ({"cu_seqlens_q": CU + 1}, "ValueError: cu_seqlens_q: expected a first offset of 0, got 1"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 3]).int()}, "ValueError: cu_seqlens_k: expected offsets that do"),
        ({"cu_seqlens_k": offsets((3, 3))}, "ValueError: cu_seqlens_k: ~ at most T_k = 5, got 6"),
        ({"max_seqlen_q": 2}, "ValueError: max_seqlen_q: expected at least ~ 3, got 2"),
        ({"max_seqlen_k": 2}, "ValueError: max_seqlen_k: expected at least ~ 3, got 2"),
        ({"max_seqlen_q": -1}, "ValueError: max_seqlen_q: expected at least 0, got -1"),
        ({"max_seqlen_k": 3.0}, "TypeError: max_seqlen_k: expected an int, got float 3.0"),
        ({"q": torch.zeros(1, 5, 4, 8)}, "ValueError: q: expected 3 axes [T_q, Hq, D], got 4"),
        ({"v": torch.zeros(6, 2, 8)}, "ValueError: v: expected [T_k, Hkv, Dv] with k's T_k = 5, got [6, 2, 8]"),
        ({"gain": ones(4, 6)}, "ValueError: gain: ~ [Hq, T_q] = [4, 5], got [4, 6]"),
        ({"statistics": PagedKeyStatistics(8, 16, 2)}, "ValueError: expected a block_table with"),
    ],
    "attention_decode": [
        ({"q": None}, "TypeError: q: expected a tensor [B, Hq, Sq, D], got NoneType"),
        ({"q": ones(2, 4, 17, 8)}, "ValueError: q: expected Sq of 1 to 16, got 17; for more rows: attention"),
        ({"q": ones(2, 4, 0, 8)}, "ValueError: q: expected Sq of 1 to 16, got 0"),
        ({"q": ones(2, 4, 1, 7)}, "ValueError: k_cache: ~ with q's D = 7, got [2, 2, 24, 8]"),
        ({"q": ones(3, 4, 1, 8)}, "ValueError: k_cache: expected [B, Hkv, capacity, D] with q's B = 3, got [2, "),
        ({"q": ones(2, 4, 1, 8).half()}, "TypeError: q, k_cache, v_cache: expected one dtype, ~ got torch.float16"),
        ({"k_cache": ones(2, 2, 24, 8, device=META)}, "ValueError: q, k_cache, v_cache: ~ one device ~ cpu, meta, cpu"),
        ({"v_cache": ones(2, 2, 23, 6)}, "ValueError: v_cache: ~ with k_cache's capacity = 24, got [2, 2, 23, 6]"),
        ({"v_cache": ones(2, 2, 24, 0)}, "ValueError: expected head_dim of at least 1, got 8 in q and 0 in v_cache"),
        ({"key_lengths": torch.tensor([9])}, "ValueError: key_lengths: expected shape [B] = [2], got [1]"),
        ({"key_lengths": torch.tensor([9, 25])}, "ValueError: expected values in [0, capacity = 24], got 25"),
        ({"statistics": KeyStatistics(2, 2, 24)}, "ValueError: (append first), got 0 of 9 in sequence 0"),
        (
            of_kv(ones(2, 24, 2, 8), suffix="_cache"),
            "ValueError: divides q's 4, got 24: [2, 24, 2, 8] looks like [B, capacity, Hkv, D], not [B, Hkv, capa",
        ),
        (of_kv(ones(2, 3, 24, 8), suffix="_cache"), "ValueError: divides q's 4, got 3"),
        ({"q": ones(2, 0, 1, 8)}, "ValueError: k_cache: expected a number of heads that divides q's 0, got 2"),
        ({"block_table": True}, "TypeError: block_table: expected a tensor [B, max_pages], got bool True"),
        (  # pages without their block_table
            of_kv(ones(7, 16, 2, 8), suffix="_cache"),
            "ValueError: k_cache: expected [B, Hkv, capacity, D] with q's B = 2, got [7, 16, 2, 8]",
        ),
        ({"statistics": KeyStatistics(2, 2, 25)}, "ValueError: [B, Hkv, capacity] = [2, 2, 24], got [2, 2, 25]"),
        ({"statistics": KeyStatistics(2, 2, 24, device=META)}, "ValueError: statistics: expected q's device cpu"),
        ({"statistics": KeyStatistics(2, 2, 24, dtype=torch.float64)}, "TypeError: statistics: expected dtype"),
        *(
            ({name: x.clone().requires_grad_()}, f"NotImplementedError: {name}: attention_decode has no gradient")
            for name, x in {**CACHE, **dict.fromkeys(("gain", "scaling"), ones(4, 1)), "sinks": ones(4)}.items()
            if x.is_floating_point()
        ),
    ],
    "attention_varlen over pages": [
        ({"k": ones(23, 2, 8)}, "ValueError: k: expected 4 axes [N, page, Hkv, D], got 3 in [23, 2, 8]"),
        ({"v": ones(7, 16, 2, 6).double()}, "ValueError: v: ~ with k's N = 8, got [7, 16, 2, 6]"),
        (of_kv(ones(8, 4, 2, 8).double()), "ValueError: k: expected pages of at least 16 keys, got 4"),
        (
            of_kv(ones(8, 2, 16, 8), q=ones(3, 16, 8)),
            "ValueError: pages of at least 16 keys, got 2: [8, 2, 16, 8] looks like [N, Hkv, page, D], not [N, pa",
        ),
        ({"block_table": TABLE.double()}, "TypeError: block_table: expected dtype torch.int32, got torch.float64"),
        ({"block_table": ones(3, 3, dtype=INT)}, "ValueError: block_table: expected shape [B, max_pages] = [2, max_pa"),
        ({"block_table": TABLE.to(META)}, "ValueError: block_table: expected q's device cpu"),
        ({"block_table": TABLE + 7}, "ValueError: block_table: expected pages in [0, N = 8) up to cu_seqlens_k, got 8"),
        ({"block_table": TABLE[:, :1]}, "ValueError: cu_seqlens_k: expected at most block_table's max_pages * page"),
        ({"max_seqlen_k": 19}, "ValueError: max_seqlen_k: expected at least the longest sequence, 20, got 19"),
        ({"dropout_p": 0.1}, "NotImplementedError: dropout_p: expected 0 with a block_table, got 0.1"),
        *(
            ({name: x}, f"NotImplementedError: {name}: attention_varlen with a block_table has")
            for name, x in {
                "q": PACKED_PAGES["q"].clone().requires_grad_(),
                "gain": ones(4, 1, requires_grad=True),
                "scaling": tritonattn.nn.SSMax(heads=4),
            }.items()
        ),
        (
            {"statistics": PagedKeyStatistics(8, 17, 2)},
            "ValueError: statistics: expected shape [N, page, Hkv] = [8, 16, 2], got [8, 17, 2]",
        ),
        ({"statistics": PagedKeyStatistics(8, 16, 2)}, "TypeError: statistics: expected dtype torch.float64 for q of"),
        ({"key_bias": ones(4, 22)}, "ValueError: cu_seqlens_k: expected offsets of at most T_k = 22, got 23"),
    ],
    "attention_decode over pages": [
        ({"block_table": TABLE.float()}, "TypeError: block_table: expected dtype torch.int32, got torch.float32"),
        ({"block_table": ones(3, 2, dtype=INT)}, "ValueError: block_table: expected shape [B, max_pages] = [2"),
        ({"block_table": TABLE[:, :1]}, "ValueError: key_lengths: ~ block_table's max_pages * page = 16], got 20"),
        ({"block_table": TABLE + 4}, "ValueError: block_table: expected pages in [0, N = 7) up to key_lengths, got 7"),
        ({"block_table": TABLE[:, :0]}, "ValueError: k_cache: expected a capacity of at least 1 key"),
        (of_kv(ones(7, 9, 2, 8), suffix="_cache"), "ValueError: pages of at least 16 keys, got 9"),
        (
            of_kv(ones(7, 2, 16, 8), suffix="_cache"),
            "ValueError: divides q's 4, got 16: [7, 2, 16, 8] looks like [N, Hkv, page, D] ~ k_cache.transpose(1, 2)",
        ),
        (
            of_kv(ones(7, 2, 16, 8), suffix="_cache", q=ones(2, 32, 1, 8)),
            "ValueError: pages of at least 16 keys, got 2: [7, 2, 16, 8] looks like [N, Hkv, page, D]",
        ),
    ],
}


KEYS, LENGTHS = ones(3, HKV, 4), torch.tensor([2, 1])
APPENDED = {"k_new": KEYS, "cu_seqlens": offsets((2, 1)), "key_lengths": LENGTHS}
APPENDED["block_table"] = torch.tensor([[3, 0], [1, 9]], dtype=INT)  # of which no key reaches page 9
RECORDS = [
    (lambda: KeyStatistics(0.5, 1, 1), "TypeError: batch: expected an int, got float 0.5"),
    (lambda: KeyStatistics(1, True, 1), "TypeError: kv_heads: expected an int, got bool"),
    (lambda: KeyStatistics(1, 1, -1), "ValueError: capacity: expected at least 0, got -1"),
    (lambda: KeyStatistics(1, 1, 1, dtype=torch.bfloat16), "TypeError: dtype: expected torch.float32 or"),
    (lambda: PagedKeyStatistics(0.5, 16, 1), "TypeError: pages: expected an int, got float 0.5"),
    (lambda: PagedKeyStatistics(4, 8, 1), "ValueError: page: expected at least 16, got 8"),
    (lambda: PagedKeyStatistics(4, 16, -1), "ValueError: kv_heads: expected at least 0, got -1"),
    (lambda: PagedKeyStatistics(4, 16, 1, dtype=torch.bfloat16), "TypeError: dtype: expected torch.float32 or"),
]
OF_RECORD = [
    (lambda one: one.last(3, 2), "ValueError: keys: expected a value in [0, 2], got 3"),
    (lambda one: one.last(-1, 2), "ValueError: keys"),
    (lambda one: one.last(1.5, 2), "TypeError: keys: expected an int, got float 1.5"),
    (lambda one: one.last(1, "2"), "TypeError: capacity: expected an int, got str '2'"),
    (lambda one: one.select(torch.tensor([3])), "ValueError: index"),
    (lambda one: one.select(torch.tensor([[0]])), "ValueError: index: expected shape [n]"),
    (lambda one: one.select(torch.tensor([0.5])), "TypeError: index"),
    (lambda one: one.with_capacity("x"), "TypeError: capacity: expected an int, got str 'x'"),
    (lambda one: one.with_capacity(5), "ValueError: capacity: expected at least 20, got 5"),
    (lambda one: one.append(None), "TypeError: k_new: expected a tensor [B, Hkv, n, D], got NoneType"),
    (lambda one: one.append(ones(3, 2, 1, 5).int()), "TypeError: k_new: ~ float16, bfloat16, float32 or float64"),
    (lambda one: one.append(ones(3, 5)), "ValueError: k_new: expected shape [B, Hkv, n, D] = [3, 2, n, D], got [3, 5]"),
    (lambda one: one.append(ones(3, 3, 1, 5)), "ValueError: k_new: expected ~ got [3, 3, 1, 5]"),
    (lambda one: one.append(ones(3, 2, 1, 0)), "ValueError: k_new: expected D of at least 1, got [3, 2, 1, 0]"),
    (lambda one: one.append(ones(3, 2, 1, 5).to(META)), "ValueError: k_new: ~ KeyStatistics's device cpu, got meta"),
    (lambda one: one.append(ones(3, 2, 2, 5), ones(3)), "TypeError: counts: expected an integer dtype, got torch.fl"),
    (lambda one: one.append(ones(3, 2, 2, 5), ones(2).int()), "ValueError: counts: expected shape [B] = [3], got [2]"),
    (lambda one: one.append(ones(3, 2, 2, 5), CU), "ValueError: counts: expected values in [0, 2], got 5"),
    (lambda one: one.reorder([0, 1, 2]), "TypeError: index: expected a tensor [B], got list"),
    (lambda one: one.reorder(torch.tensor([0, 1, 3])), "ValueError: index: expected values in [0, 2], got 3"),
    (lambda one: one.truncate(torch.tensor([0, -1, 3])), "ValueError: lengths: expected values in [0, 20], got -1"),
    (lambda one: one.truncate(21), "ValueError: lengths: expected a value in [0, 20], got 21"),
    (lambda one: one.truncate(1.0), "TypeError: lengths: expected an integer tensor [B] or an int, got float 1.0"),
]
OF_PAGED_RECORD: list[Case] = [
    ({"k_new": KEYS[None]}, "ValueError: k_new: expected shape [T, Hkv, D] = [T, 2, D], got [1, 3, 2, 4]"),
    ({"k_new": KEYS.int()}, "TypeError: k_new: expected float16, bfloat16, float32 or float64, got torch.int32"),
    ({"k_new": KEYS.to(META)}, "ValueError: k_new: expected this PagedKeyStatistics's device"),
    ({"k_new": KEYS[:2]}, "ValueError: cu_seqlens: expected offsets of at most T = 2, got 3"),
    ({"key_lengths": LENGTHS[:1]}, "ValueError: key_lengths: expected shape [B] = [2], got [1]"),
    ({"key_lengths": LENGTHS.clamp(max=1)}, "ValueError: 2 new keys of sequence 0 to block_table's max_pages"),
    ({"key_lengths": LENGTHS + torch.tensor([0, 32])}, "ValueError: expected values from the 1 new keys of"),
    ({"key_lengths": LENGTHS + torch.tensor([0, 30])}, "ValueError: pages in [0, N = 4) up to key_lengths, got 9"),
    ({"block_table": TABLE[:1]}, "ValueError: block_table: expected shape [B, max_pages] = [2, max"),
]


@pytest.fixture(autouse=True)
def _nothing_is_computed(monkeypatch):
    def computed(*args, **kwargs):
        pytest.fail("a refused call was computed")

    for module in (ops, BACKENDS["sdpa"], reference):
        monkeypatch.setattr(module, "attention", computed)


def cases() -> list[tuple[str, dict, str]]:
    found = []
    for call in CALLS:
        known = inspect.signature(getattr(tritonattn, call.split()[0])).parameters
        shared = [] if "over" in call else [case for case in SHARED if not case[0].keys() - known]
        found += [(call, *case) for case in (*shared, *OF_ONE[call])]
    return found


@pytest.mark.parametrize(("call", "changes", "error"), cases(), ids=lambda x: x if isinstance(x, str) else "")
def test_refusals(call, changes, error):
    refuses(error, getattr(tritonattn, call.split()[0]), **(CALLS[call] | changes))


def test_refusals_of_records():
    for make, error in RECORDS:
        refuses(error, make)
    for call, error in OF_RECORD:
        refuses(error, call, KeyStatistics(3, 2, 20))
    for changes, error in OF_PAGED_RECORD:
        refuses(error, PagedKeyStatistics(4, 16, HKV).append, **(APPENDED | changes))


def test_everything_but_the_operands_is_keyword_only():
    with pytest.raises(TypeError):
        tritonattn.attention(*DENSE.values(), "sqrt_dim")
