"""vLLM's attention backend TRITONATTN, on the calls behind `attention_decode` and `attention_varlen`."""

# pyright: reportMissingImports=false
from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import vllm.envs as envs
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

from ... import ops
from ...backends import BACKENDS, choose
from ...calls.dispatch import resolve, with_terms
from ...calls.formulas import by_formulas
from ...calls.layouts import SMALLEST_PAGE
from ...calls.paged_statistics import PagedKeyStatistics
from ...calls.varlen import Packing
from ...core.call import Request
from ...core.invariance import is_invariant
from ...core.terms import Terms
from ...core.visibility import Visibility, window_sides
from ...tuning.config import WIDEST
from . import NAME
from .pages import RECORD, key_statistics, keys_and_values
from .settings import (
    LayerFactor,
    Settings,
    asked_settings,
    check_all_taken,
    layer_settings,
    saved_settings,
    with_learned,
)


class TritonattnBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

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
        return head_size <= WIDEST

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


class RecordingBackend(TritonattnBackend):
    """The backend of layers that read key norms: their cells of the cache hold these too."""

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        size = (spec.head_size + spec.head_size_v + RECORD) * spec.dtype.itemsize
        return replace(spec, state_content_bytes=size)


@dataclass(eq=False)
class TritonattnMetadata:
    """The rows of one step: first sequences of one new token each, then the others.

    tokens        new tokens of all sequences
    slots         int64 [tokens], where their keys go in the cache; -1 of padding
    new_ends      int32 [sequences + 1], 0 and where the new tokens of each sequence end
    lengths       int32 [sequences], the sequences' keys, new ones included
    block_table   int32 [sequences, pages]
    passes        times that new keys are entered in the record of key norms
    decodes       sequences of one new token
    chunks        where the rows of the others end, counted from the first of them, and the running sums of their keys,
                  old ones included; bounds on one sequence's; None where there are none

    Layers compute together what depends on the step alone: the first that needs it does, so that a CUDA graph captures
    that too.
    """

    tokens: int
    slots: Tensor
    new_ends: Tensor
    lengths: Tensor
    block_table: Tensor
    passes: int
    decodes: int
    chunks: Packing | None
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """compute(), which depends on the step and the key alone. Memory of a captured graph is the graph's."""
        key = (key, self.slots.is_cuda and torch.cuda.is_current_stream_capturing())
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def positions(self, page: int) -> tuple[Tensor, Tensor]:
        """Page of each new key, and its position there; padding is sent to vLLM's unused page 0."""
        slots = self.slots.clamp(min=0)
        return slots // page, slots % page


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
        count, others, rows, _ = split_decodes_and_prefills(m, decode_threshold=1)
        lengths, table, chunks = m.seq_lens, m.block_table_tensor, None
        if others:
            key_ends = torch.nn.functional.pad(lengths[count:].cumsum(0, dtype=torch.int32), (1, 0))
            ends = (m.query_start_loc[count:] - rows, key_ends)
            chunks = Packing(*ends, m.max_query_len, m.max_seq_len, table[count:])
        return TritonattnMetadata(
            tokens=m.num_actual_tokens,
            slots=m.slot_mapping[: m.num_actual_tokens],
            new_ends=m.query_start_loc,
            lengths=lengths,
            block_table=table,
            passes=self._passes(m, others) if self._shares_pages else 1,
            decodes=count,
            chunks=chunks,
        )

    def _passes(self, m: Any, chunks: int) -> int:
        """A bound, from copies on the host, on how many sequences go on from one another's new keys.

        vLLM lets a sequence begin behind pages that another one fills in the same step. The record's entries of its
        keys go on from that one's last, which a pass before has to enter. The lengths on the host are exact for
        sequences that begin, and for those whose pages they may share.
        """
        if not chunks:
            return 2  # launches depend on shapes alone
        new = itertools.pairwise(m.query_start_loc_cpu.tolist())
        spans = [(end - (b - a), end) for end, (a, b) in zip(m.seq_lens_cpu_upper_bound.tolist(), new, strict=True)]
        begins = {start for start, _ in spans if start > 0 and start % SMALLEST_PAGE == 0}
        return 1 + sum(any(start < begin <= end for start, end in spans) for begin in begins)


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
        self.saved = saved_settings(config)
        self._overrides = asked_settings(config) is not None
        self._is_random = config.load_config.load_format == "dummy"
        self._layers = config.compilation_config.static_forward_context
        self._device = config.device_config.device
        self._window = None if sliding_window is None else (sliding_window - 1, 0)
        self._softcap = float(logits_soft_cap) if logits_soft_cap else None
        self._sinks = sinks
        self._moves_pages = config.kv_transfer_config is not None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find this layer's scaling, now that all layers exist and what they have learned is loaded."""
        layers = {name: x for name, x in self._layers.items() if isinstance(getattr(x, "impl", None), TritonattnImpl)}
        name, layer = next((name, x) for name, x in layers.items() if x.impl is self)
        if type(layer) is not Attention or layer.head_size_v != self.head_size:
            raise NotImplementedError(
                f"attention_backend {NAME}: expected an Attention with values of {self.head_size}, got a"
                f" {type(layer).__name__} with values of {layer.head_size_v} at {name}"
            )
        ranks = get_tensor_model_parallel_world_size()
        if not self._overrides:
            check_all_taken(self.saved, self.learned)
        saved, settings = layer_settings(self.saved, name, tuple(layers), self.num_heads * ranks)
        if saved is not None:
            learned = None if self._is_random else self.learned.get(saved, {})
            settings = with_learned(settings, saved, learned, get_tensor_model_parallel_rank(), ranks)
        heads = (self.num_heads, self.num_kv_heads)
        found = LayerFactor.of(settings, self.scale, heads, self.head_size)
        if found.reads_norms:
            if self._moves_pages:
                raise NotImplementedError(
                    f"kv_transfer_config: expected None for a scaling by key norms at {name}: its cells hold more"
                    " than keys and values, which no connector was tried with"
                )
            layer.attn_backend = RecordingBackend
        self._factor = found.to(self._device)
        self._sinks = None if self._sinks is None else self._sinks.detach().float()
        self._backend, self._invariant = settings.backend, _invariant(settings, name)

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
        """Write the new keys and values, and attend with query [tokens, Hq, D] into output [tokens, Hq, D]."""
        if attn_metadata is None:  # vLLM measures its memory
            return output.fill_(0)
        m, pages = attn_metadata, keys_and_values(kv_cache, self.head_size)
        self._write(key, value, pages, m)
        statistics = None
        if self._factor.reads_norms:
            statistics = key_statistics(kv_cache, self.head_size)
            statistics.enter(key[: m.tokens], m.new_ends, m.lengths, m.block_table, m.passes)
        k, v = (x.transpose(1, 2) for x in pages)
        if first := m.decodes:
            q, table = query[:first, :, None], m.block_table[:first]
            call = self._call(q, k, v, self._decode_visibility(q, k, m), table, statistics)
            output[:first] = self._attend(call)[:, :, 0]
        if m.chunks is not None:
            rows = query[first : m.tokens]
            visible, q = self._chunk_visibility(rows, pages[0], m, m.chunks), rows.transpose(0, 1)[None]
            call = self._call(q, k, v, visible, m.chunks.block_table, statistics)
            output[first : m.tokens] = self._attend(call)[0].transpose(0, 1)
        return output

    def _write(self, key: Tensor, value: Tensor, pages: tuple[Tensor, Tensor], m: TritonattnMetadata) -> None:
        page, position = m.once(("positions", size := pages[0].shape[1]), lambda: m.positions(size))
        for held, new in zip(pages, (key, value), strict=True):
            held[page, position] = new[: m.tokens]

    def _decode_visibility(self, q: Tensor, k: Tensor, m: TritonattnMetadata) -> Visibility:
        lengths, left, invariant = m.lengths[: m.decodes], window_sides(self._window)[0], is_invariant(self._invariant)
        sizes = (q.shape[0], q.shape[1], k.shape[1], 1, k.shape[2] * m.block_table.shape[1])

        def visible() -> Visibility:
            return Visibility.of_padded(sizes, q.device, lengths, left=left, invariant=invariant)

        return m.once(("decodes", sizes, left, invariant), visible)

    def _chunk_visibility(self, rows: Tensor, pages: Tensor, m: TritonattnMetadata, packing: Packing) -> Visibility:
        window, invariant = self._window, is_invariant(self._invariant)

        def visible() -> Visibility:
            keys = packing.keys(pages)
            return packing.visibility(rows, pages, keys, causal=True, window=window, invariant=invariant)

        return m.once(("chunks", rows.shape[1], pages.shape[2], window, invariant), visible)

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Visibility,
        block_table: Tensor | None,
        record: PagedKeyStatistics | None,
    ) -> Request:
        request = Request(
            q,
            k,
            v,
            visible,
            Terms(softcap=self._softcap, sinks=self._sinks_of(visible)),
            block_table=block_table,
            scaling=self._factor.scaling,
            gain=self._factor.gain,
            backend=self._backend,
            statistics=record,
            cached=f"attention_backend {NAME}",
        )
        return request.changed(backend=choose(request).name)

    def _sinks_of(self, visible: Visibility) -> Tensor | None:
        return None if self._sinks is None else self._sinks[:, None].expand(visible.rows)

    def _attend(self, request: Request) -> Tensor:
        """out of a request, with the terms of its logits from another layer of the step that has the same."""
        backend = BACKENDS[request.backend]
        if backend.by_formulas:
            return by_formulas(request).out
        if self._factor.shared is None:
            return ops.attention(resolve(request, backend)).out
        key = self._factor.shared, self._softcap
        terms = request.visibility.once(key, lambda: resolve(request, backend).terms)
        return ops.attention(with_terms(request, backend, terms._replace(sinks=request.terms.sinks))).out


def _invariant(settings: Settings, name: str) -> bool | None:
    """The switch of a layer, which the switch of vLLM turns on."""
    if not envs.VLLM_BATCH_INVARIANT:
        return settings.batch_invariant
    if settings.batch_invariant is False:
        raise ValueError(f"batch_invariant: expected True or None under VLLM_BATCH_INVARIANT=1, got False at {name}")
    return True
