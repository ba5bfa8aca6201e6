"""vLLM's attention backend TRITONATTN, on the calls behind `attention_decode` and `attention_varlen`."""

# pyright: reportMissingImports=false
from __future__ import annotations

import itertools
from dataclasses import replace
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

from ...calls.layouts import SMALLEST_PAGE
from ...calls.varlen import Packing
from ...core.eight_bit import EIGHT_BIT, times
from ...core.private_names import attribute
from ...tuning.config import WIDEST
from ..serving.layers import ServedLayer, Step, key_ends
from ..serving.settings import LayerFactor, Loaded, check_all_taken, invariant
from . import NAME
from .pages import cell_bytes, descale_of, key_statistics, keys_and_values, quantised
from .settings import asked_settings, saved_settings

_LAYER = "vllm.model_executor.layers.attention.Attention"
_BUILDER = "vllm.v1.attention.backend.AttentionMetadataBuilder"
_OWNER = f"attention_backend {NAME}"
_EIGHT_BIT = ("fp8", "fp8_e4m3")  # vLLM's words for its cache of e4m3


class TritonattnBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *_EIGHT_BIT]

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
        return replace(spec, state_content_bytes=cell_bytes(spec.head_size + spec.head_size_v, spec.dtype.itemsize))


class TritonattnMetadata(Step):
    """A step, with the cells of its new keys."""

    def positions(self, page: int) -> tuple[Tensor, Tensor]:
        """Page of each new key, and its position there; padding is sent to vLLM's unused page 0."""
        slots = self.slots.clamp(min=0)
        return slots // page, slots % page


class TritonattnMetadataBuilder(AttentionMetadataBuilder[TritonattnMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        attribute(self, f"{_BUILDER}._init_reorder_batch_threshold")(1)  # sequences of one new token come first
        self._shares_pages = vllm_config.cache_config.enable_prefix_caching

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> TritonattnMetadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError(f"{_OWNER}: expected causal attention, got causal={m.causal}")
        count, others, rows, _ = split_decodes_and_prefills(m, decode_threshold=1)
        lengths, table, chunks = m.seq_lens, m.block_table_tensor, None
        if others:
            ends = (m.query_start_loc[count:] - rows, key_ends(lengths[count:]))
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
            ("kv_cache_dtype", kv_cache_dtype, ("auto", dtype, *_EIGHT_BIT)),
            ("kv_sharing_target_layer_name", kv_sharing_target_layer_name, (None,)),
            ("decode_context_parallel_size", self.dcp_world_size, (1,)),
            ("prefill_context_parallel_size", self.pcp_world_size, (1,)),
            ("pipeline_parallel_size", config.parallel_config.pipeline_parallel_size, (1,)),
        ):
            if value not in wanted:
                expected = " or ".join(map(str, wanted))
                raise NotImplementedError(f"{_OWNER}: expected {name} {expected}, got {value}")
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
                f"{_OWNER}: expected an Attention with values of {self.head_size}, got a"
                f" {type(layer).__name__} with values of {layer.head_size_v} at {name}"
            )
        if not self._overrides:
            check_all_taken(self.saved, self.learned)
        learned = None if self._is_random else self.learned
        loaded = Loaded(self.saved, learned, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        settings = loaded.of(name, tuple(layers), self.num_heads)
        heads = (self.num_heads, self.num_kv_heads)
        found = LayerFactor.of(settings, self.scale, heads, self.head_size)
        if found.reads_norms:
            if self._moves_pages:
                raise NotImplementedError(
                    f"kv_transfer_config: expected None for a scaling by key norms at {name}: its cells hold more"
                    " than keys and values, which no connector was tried with"
                )
            layer.attn_backend = RecordingBackend
        self._served = ServedLayer(
            found.to(self._device),
            window=self._window,
            softcap=self._softcap,
            sinks=None if self._sinks is None else self._sinks.detach().float(),
            backend=settings.backend,
            batch_invariant=invariant(settings, "VLLM_BATCH_INVARIANT=1" if envs.VLLM_BATCH_INVARIANT else None, name),
            owner=_OWNER,
        )

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
        m, pages, descales = attn_metadata, keys_and_values(kv_cache, self.head_size), (None, None)
        new = key[: m.tokens], value[: m.tokens]
        if self.kv_cache_dtype in _EIGHT_BIT:
            descales = (
                descale_of(*(attribute(layer, f"{_LAYER}._{name}") for name in ("k_scale", "k_scale_float"))),
                descale_of(*(attribute(layer, f"{_LAYER}._{name}") for name in ("v_scale", "v_scale_float"))),
            )
            new = quantised(new[0], descales[0]), quantised(new[1], descales[1])
            pages = pages[0].view(EIGHT_BIT), pages[1].view(EIGHT_BIT)
        self._write(new, pages, m)
        statistics = None
        if self._served.factor.reads_norms:
            statistics = key_statistics(kv_cache, self.head_size)
            keys = new[0] if descales[0] is None else times(new[0].float(), descales[0])
            statistics.enter(keys, m.new_ends, m.lengths, m.block_table, m.passes)
        self._served.attend(query, pages, m, statistics, output, descales)
        return output

    def _write(self, new: tuple[Tensor, Tensor], pages: tuple[Tensor, Tensor], m: TritonattnMetadata) -> None:
        """Write new keys and values [tokens, Hkv, D] to their cells."""
        page, position = m.once(("positions", size := pages[0].shape[1]), lambda: m.positions(size))
        for held, x in zip(pages, new, strict=True):
            if x.dtype == EIGHT_BIT:  # torch writes bytes everywhere
                held, x = held.view(torch.uint8), x.view(torch.uint8)
            held[page, position] = x
