"""vLLM's attention backend TRITONATTN, on `attention_decode` and `attention_varlen`."""

# pyright: reportMissingImports=false
from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from ...calls.decode import attention_decode
from ...calls.page_checks import SMALLEST_PAGE
from ...calls.paged_statistics import PagedKeyStatistics
from ...calls.varlen import attention_varlen
from . import NAME
from .settings import call_arguments, layer_settings, reads_lengths, saved_settings, with_learned


class TritonattnBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[TritonattnImpl]:
        return TritonattnImpl

    @staticmethod
    def get_builder_cls() -> type[TritonattnMetadataBuilder]:
        return TritonattnMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(SMALLEST_PAGE)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


@dataclass
class TritonattnMetadata:
    """The rows of one step: first `decodes` sequences of one new token each, then the others, the chunks.

    lengths        int32 [sequences], the sequences' keys, new ones included
    block_table    int32 [sequences, pages]
    tokens         new tokens of all sequences
    new_ends       int32 [sequences + 1], 0 and where the new tokens of each sequence end
    row_ends       int32 [chunks + 1], likewise, counted from the first chunk's; None without chunks, as key_ends
    key_ends       int32 [chunks + 1], 0 and the running sums of the chunks' keys, old ones included
    longest_rows, longest_keys   bounds on one sequence's
    passes         times that new keys are entered in the record of key lengths
    """

    decodes: int
    tokens: int
    lengths: Tensor
    block_table: Tensor
    new_ends: Tensor
    row_ends: Tensor | None
    key_ends: Tensor | None
    longest_rows: int
    longest_keys: int
    passes: int


class TritonattnMetadataBuilder(AttentionMetadataBuilder[TritonattnMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)  # sequences of one new token come first
        self._shares_pages = vllm_config.cache_config.enable_prefix_caching

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> TritonattnMetadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError(f"attention_backend {NAME}: expected causal attention, got causal={m.causal}")
        decodes, chunks, rows, _ = split_decodes_and_prefills(m, decode_threshold=1)
        row_ends = key_ends = None
        if chunks:
            row_ends = m.query_start_loc[decodes:] - rows
            key_ends = torch.nn.functional.pad(m.seq_lens[decodes:].cumsum(0, dtype=torch.int32), (1, 0))
        return TritonattnMetadata(
            decodes=decodes,
            tokens=m.num_actual_tokens,
            lengths=m.seq_lens,
            block_table=m.block_table_tensor,
            new_ends=m.query_start_loc,
            row_ends=row_ends,
            key_ends=key_ends,
            longest_rows=m.max_query_len,
            longest_keys=m.max_seq_len,
            passes=self._passes(m.query_start_loc_cpu, chunks) if self._shares_pages else 1,
        )

    def _passes(self, new_ends: Tensor, chunks: int) -> int:
        """From a copy on the host, a bound on how many sequences go on from one another's new keys.

        vLLM lets a sequence begin behind pages that another one fills in the same step. The record's entries of its
        keys go on from that one's last, which a pass before has to enter. All but the first and the last of such a
        chain fill a page.
        """
        ends = new_ends.tolist() if chunks else []
        return 2 + sum(end - start >= SMALLEST_PAGE for start, end in itertools.pairwise(ends))


class TritonattnImpl(AttentionImpl[TritonattnMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        config = get_current_vllm_config()
        dtype = str(torch.get_default_dtype()).removeprefix("torch.")
        for name, value, wanted in (
            ("alibi_slopes", alibi_slopes, (None,)),
            ("attn_type", attn_type, (AttentionType.DECODER,)),
            ("kv_cache_dtype", kv_cache_dtype, ("auto", dtype)),
            ("kv_sharing_target_layer_name", kv_sharing_target_layer_name, (None,)),
            ("decode_context_parallel_size", self.dcp_world_size, (1,)),
            ("prefill_context_parallel_size", self.pcp_world_size, (1,)),
            ("pipeline_parallel_size", config.parallel_config.pipeline_parallel_size, (1,)),
        ):
            if value not in wanted:
                expected = " or ".join(map(str, wanted))
                raise NotImplementedError(f"attention_backend {NAME}: expected {name} {expected}, got {value}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.learned: dict[str, dict[str, Tensor]] = {}  # by the saved module's name; the loader fills it
        self._saved = saved_settings(config)
        self._layers = config.compilation_config.static_forward_context
        self._device = config.device_config.device
        self._options: dict[str, Any] = {
            "window": None if sliding_window is None else (sliding_window - 1, 0),
            "softcap": logits_soft_cap or None,
        }
        self._sinks = sinks
        self._moves_pages = config.kv_transfer_config is not None
        self._reads_lengths = False
        self._statistics: PagedKeyStatistics | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find this layer's scaling, now that all layers exist and what they have learned is loaded."""
        own = {name: x for name, x in self._layers.items() if isinstance(getattr(x, "impl", None), TritonattnImpl)}
        name, layer = next((name, x) for name, x in own.items() if x.impl is self)
        if type(layer) is not Attention or layer.head_size_v != self.head_size:
            raise NotImplementedError(
                f"attention_backend {NAME}: expected an Attention with values of {self.head_size}, got a"
                f" {type(layer).__name__} with values of {layer.head_size_v} at {name}"
            )
        ranks = get_tensor_model_parallel_world_size()
        saved, settings = layer_settings(self._saved, name, tuple(own), self.num_heads * ranks)
        if saved is not None:
            learned = self.learned.get(saved, {})
            settings = with_learned(settings, saved, learned, get_tensor_model_parallel_rank(), ranks)
        self._options |= call_arguments(settings, self.scale, self.head_size)
        shape = self.num_heads, self.num_kv_heads, self.head_size
        self._reads_lengths = reads_lengths(self._options["scaling"], self._options["gain"], shape)
        if self._reads_lengths and self._moves_pages:
            raise NotImplementedError(
                f"kv_transfer_config: expected None for a scaling by key lengths at {name}: they stay where pages were"
                " written"
            )
        for key in ("scaling", "gain"):
            if isinstance(self._options[key], (Tensor, torch.nn.Module)):
                self._options[key] = self._options[key].to(self._device)
        if self._sinks is not None:
            self._options["sinks"] = self._sinks.detach().float()

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write key and value [tokens, Hkv, D] to their slots; -1, of padding, is sent to vLLM's unused block 0."""
        slots, page = slot_mapping.clamp(min=0), kv_cache.shape[2]
        tokens = slots.shape[0]
        for pages, new in zip(self._pages(kv_cache), (key, value), strict=True):
            pages[slots // page, slots % page] = new[:tokens]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TritonattnMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [tokens, Hq, D] over the pages, into output [tokens, Hq, D]."""
        if attn_metadata is None:  # vLLM measures its memory
            return output.fill_(0)
        m, (keys, values) = attn_metadata, self._pages(kv_cache)
        options = self._options
        if self._reads_lengths:
            options = {**options, "statistics": self._grown_statistics(key, keys, m)}
        if n := m.decodes:
            table = m.block_table[:n]
            rows = query[:n, :, None]  # [sequences, Hq, 1, D]
            out = attention_decode(rows, keys, values, key_lengths=m.lengths[:n], block_table=table, **options)
            output[:n] = cast(Tensor, out)[:, :, 0]
        if m.row_ends is not None and m.key_ends is not None:
            ends = m.row_ends, m.key_ends, m.longest_rows, m.longest_keys
            options = {**options, "block_table": m.block_table[n:], "causal": True}
            output[n : m.tokens] = cast(Tensor, attention_varlen(query[n : m.tokens], keys, values, *ends, **options))
        return output

    def _grown_statistics(self, new: Tensor, pages: Tensor, m: TritonattnMetadata) -> PagedKeyStatistics:
        """The record of key lengths beside this layer's pages, with the new keys [tokens, Hkv, D]."""
        blocks, page, kv_heads, _ = pages.shape
        if self._statistics is None or self._statistics.lengths.shape[0] != blocks:
            if pages.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"attention_backend {NAME}: expected a step before the first one that is captured")
            self._statistics = PagedKeyStatistics(blocks, page, kv_heads, device=pages.device)
        table = {"key_lengths": m.lengths, "block_table": m.block_table}
        for _ in range(m.passes):
            self._statistics.append(new[: m.tokens], m.new_ends, **table)
        return self._statistics

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """[blocks, Hkv, block, 2 D] of any strides -> keys and values [blocks, block, Hkv, D]."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values
