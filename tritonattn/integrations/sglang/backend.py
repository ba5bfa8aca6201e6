"""SGLang's attention backend "tritonattn", on the calls behind `attention_decode` and `attention_varlen`."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from ...calls.paged_statistics import PagedKeyStatistics
from ...calls.varlen import Packing
from ...huggingface.settings import Settings
from ...scaling import Grok2
from ...tuning.config import WIDEST
from ..serving.layers import ServedLayer, Step, key_ends
from ..serving.settings import LayerFactor, Loaded, check_all_taken, invariant, saved_settings
from . import OWNER
from .settings import are_asked_for, learned_values, refuse

_MODES = (ForwardMode.DECODE, ForwardMode.EXTEND, ForwardMode.MIXED)


class TritonattnAttnBackend(AttentionBackend):
    needs_cpu_seq_lens = False  # but for extended sequences, whose lengths SGLang has on the host

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self._pool, self._page = runner.token_to_kv_pool, runner.page_size
        self._first_cells = runner.req_to_token_pool.req_to_token[:, :: self._page]  # of the pages of every request
        modules = {name: x for name, x in runner.model.named_modules() if isinstance(x, RadixAttention)}
        for name, module in modules.items():
            _check_layer(module, name)
        self._check_pools(runner)
        config, arguments = runner.model_config, runner.server_args
        self._chunk = config.attention_chunk_size  # keys of layers with use_irope
        if self._chunk is not None and self._chunk % self._page:
            refuse("attention_chunk_size", f"a multiple of page_size {self._page}", self._chunk)
        parallel, saved, learned = get_parallel(), saved_settings(config), learned_values(config)
        if not are_asked_for(arguments):
            check_all_taken(saved, learned)
        values = None if arguments.load_format == "dummy" else learned
        loaded = Loaded(saved, values, parallel.attn_tp_rank, parallel.attn_tp_size)
        switch = "--enable-deterministic-inference" if arguments.enable_deterministic_inference else None
        self._layers: dict[int, ServedLayer] = {}
        self._records: dict[int, PagedKeyStatistics] = {}
        for name, module in modules.items():
            settings = loaded.of(name, tuple(modules), module.tp_q_head_num)
            served = _served(module, settings, name, switch, runner.device)
            self._layers[module.layer_id] = served
            if served.factor.reads_norms:
                pages = self._pages(module.layer_id)[0].shape[0]
                record = PagedKeyStatistics(pages, self._page, module.tp_k_head_num, device=runner.device)
                self._records[module.layer_id] = record

    def _check_pools(self, runner: Any) -> None:
        pool = self._pool
        pools = (pool.full_kv_pool, pool.swa_kv_pool) if type(pool) is SWAKVPool else (pool,)
        for one in pools:
            if type(one) is not MHATokenToKVPool or one.kv_cache_layout != "nhd":
                layout = getattr(one, "kv_cache_layout", None)
                refuse("a MHATokenToKVPool of layout", "nhd", f"a {type(one).__name__} of {layout}")
            if one.dtype != runner.dtype or one.store_dtype != one.dtype:
                refuse("keys and values of the model's", runner.dtype, one.dtype)

    # Metadata of a step. Replayed CUDA graphs hold what `_in_graph` computes for steps of one token a sequence.

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        batch, mode = forward_batch, forward_batch.forward_mode
        if mode.is_idle() or mode.is_decode():
            return
        if mode not in _MODES:
            refuse("a forward mode", " or ".join(x.name for x in _MODES), mode.name)
        new, old = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
        longest = max(a + b for a, b in zip(new, old, strict=True))
        lengths = (batch.extend_prefix_lens + batch.extend_seq_lens).int()
        table = self._table(batch, -(-longest // self._page))
        ends = key_ends(batch.extend_seq_lens), key_ends(lengths)
        self.forward_metadata = Step(
            tokens=sum(new),
            slots=batch.out_cache_loc,
            new_ends=ends[0],
            lengths=lengths,
            block_table=table,
            passes=1,  # SGLang shares pages that a step before has filled
            decodes=0,
            chunks=Packing(*ends, max(new), longest, table),
        )

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        batch = forward_batch
        if not batch.forward_mode.is_decode():
            return
        count = batch.seq_lens.shape[0]
        self.forward_metadata = Step(
            tokens=count,
            slots=batch.out_cache_loc,
            new_ends=torch.arange(count + 1, dtype=torch.int32, device=batch.seq_lens.device),
            lengths=batch.seq_lens.int(),
            block_table=self._table(batch, self._first_cells.shape[1]),
            passes=1,
            decodes=count,
            chunks=None,
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: graphs hold the tensors of a step."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def _table(self, batch: Any, pages: int) -> Tensor:
        """int32 [sequences, pages], the pages of a step's sequences; wild behind their keys."""
        return self._first_cells[:, :pages][batch.req_pool_indices] // self._page

    def _of_window(self, step: Step) -> Step:
        """A step in the pool of layers with windows, which has other numbers of the cells, and no page of old keys."""

        def translated() -> Step:
            cells = self._pool.translate_loc_from_full_to_swa(step.block_table.long() * self._page)
            table = cells.clamp(min=0).int() // self._page
            chunks = None if step.chunks is None else replace(step.chunks, block_table=table)
            slots = self._pool.translate_loc_from_full_to_swa(step.slots)
            return replace(step, slots=slots, block_table=table, chunks=chunks)

        return step.once("window", translated)

    # Layers

    def forward_extend(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(*args, **kwargs)

    def forward_decode(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(*args, **kwargs)

    def _forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Write the new keys and values, and attend with q [tokens, Hq * D]: [tokens, Hq * Dv]."""
        if wanted := sorted(name for name, x in kwargs.items() if x is not None):
            refuse("a layer without", ", ".join(wanted), "them")
        if k is None or v is None:
            raise NotImplementedError(f"{OWNER}: expected layers with keys of their own, got none at {layer.layer_id}")
        served, step = self._layers[layer.layer_id], self.forward_metadata
        assert isinstance(step, Step)
        in_window = type(self._pool) is SWAKVPool and self._pool.layers_mapping[layer.layer_id][1]
        if in_window:
            step = self._of_window(step)
        if save_kv_cache:
            where = KVWriteLoc(forward_batch.out_cache_loc, step.slots if in_window else None)
            self._pool.set_kv_buffer(layer, where, k, v)
        if layer.use_irope and self._chunk is not None:
            step = step.in_chunks(self._chunk, self._page)
        if (record := self._records.get(layer.layer_id)) is not None:
            record.enter(k[: step.tokens], step.new_ends, step.lengths, step.block_table, step.passes)
        if served.sinks is None and sinks is not None:
            served.sinks = sinks.detach().float()
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_zeros if q.shape[0] > step.tokens else q.new_empty  # rows of padding behind
        output = out(*q.shape[:2], layer.v_head_dim)
        served.attend(q, self._pages(layer.layer_id), step, record, output)
        return output.flatten(1)

    def _pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [N, page, Hkv, D] of a layer."""
        k, v = self._pool.get_kv_buffer(layer)
        return k.unflatten(0, (-1, self._page)), v.unflatten(0, (-1, self._page))


def _check_layer(layer: Any, name: str) -> None:
    """Raise NotImplementedError for a layer that the backend does not serve."""
    for attribute, expected in (
        ("attn_type", AttentionType.DECODER),
        ("is_cross_attention", False),
        ("logit_capping_method", "tanh"),
        ("pos_encoding_mode", "NONE"),
    ):
        if (found := getattr(layer, attribute)) != expected:
            refuse(attribute, expected, f"{found} at {name}")
    if layer.qk_head_dim > WIDEST:
        refuse("head dims", f"at most {WIDEST}", f"{layer.qk_head_dim} at {name}")


def _served(layer: Any, settings: Settings, name: str, switch: str | None, device: Any) -> ServedLayer:
    heads, scale = (layer.tp_q_head_num, layer.tp_k_head_num), float(layer.scaling)
    found = LayerFactor.of(_with_temperature(layer, settings, name), scale, heads, layer.qk_head_dim)
    return ServedLayer(
        found.to(torch.device(device)),
        window=(layer.sliding_window_size, 0) if layer.sliding_window_size > -1 else None,
        softcap=float(layer.logit_cap) or None,
        sinks=None,
        backend=settings.backend,
        batch_invariant=invariant(settings, switch, name),
        owner=OWNER,
    )


def _with_temperature(layer: Any, settings: Settings, name: str) -> Settings:
    """Settings with Grok 2's temperature, which SGLang leaves to its attention backends."""
    if layer.xai_temperature_len <= 0:
        return settings
    if settings.scaling is not None:
        raise ValueError(f"scaling: expected None at {name}, which has Grok 2's temperature, got {settings.scaling}")
    return replace(settings, scaling=Grok2(layer.xai_temperature_len, after_softcap=True))
