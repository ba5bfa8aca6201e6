"""SGLang's attention layers over its pools of keys and values, without an engine."""

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel
from torch import nn

from tests.serving.attended import HEAD_DIM, HEADS, KV_HEADS, Attended
from tritonattn.integrations.sglang.backend import TritonattnAttnBackend

CELLS, CONTEXT = 4096, 512


class Layer:
    """Layer 0 of a model; `run` is what the steps of an engine ask of it.

    settings   config.tritonattn
    page       keys of a page
    swa        True: the layer's keys lie in a pool of layers with windows, which has other cells
    runner     further attributes of SGLang's runner
    given      further arguments of SGLang's RadixAttention; attributes of it, or of the model's config, where it has no
               such argument
    """

    def __init__(
        self,
        settings: dict[str, Any] | None,
        dtype: torch.dtype = torch.bfloat16,
        page: int = 16,
        swa: bool = False,
        runner: dict[str, Any] | None = None,
        **given: Any,
    ) -> None:
        attributes = {"xai_temperature_len": given.pop("xai_temperature_len", -1)}
        attributes |= {name: given.pop(name) for name in ("logit_capping_method",) if name in given}
        chunk = given.pop("attention_chunk_size", None)
        self.page, self.dtype, self.sinks = page, dtype, given.pop("sinks", None)
        self.layer = RadixAttention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, layer_id=0, **given)
        vars(self.layer).update(attributes)
        model = nn.ModuleDict({"model": nn.ModuleList([nn.ModuleDict({"attn": self.layer})])})
        self.requests = ReqToTokenPool(8, CONTEXT, "cpu", False)
        self.pool = self._pool(swa)
        config = SimpleNamespace(tritonattn=settings)
        self.runner = SimpleNamespace(
            token_to_kv_pool=self.pool,
            req_to_token_pool=self.requests,
            page_size=page,
            model=model,
            model_config=SimpleNamespace(hf_config=config, hf_text_config=config, attention_chunk_size=chunk),
            server_args=SimpleNamespace(
                json_model_override_args="{}", load_format="auto", enable_deterministic_inference=False
            ),
            device="cpu",
            dtype=dtype,
        )
        vars(self.runner).update(runner or {})
        with get_parallel().override(attn_tp_rank=0, attn_tp_size=1):
            self.backend = TritonattnAttnBackend(self.runner)

    def _pool(self, swa: bool) -> Any:
        sizes = {"page_size": self.page, "dtype": self.dtype, "head_num": KV_HEADS, "head_dim": HEAD_DIM}
        shared = {**sizes, "device": "cpu", "enable_memory_saver": False}
        if not swa:
            pool = MHATokenToKVPool(CELLS, layer_num=1, **shared)
            filled = pool.k_buffer + pool.v_buffer
        else:
            pool = SWAKVPool(CELLS, CELLS, swa_attention_layer_ids=[0], full_attention_layer_ids=[1], **shared)
            pages = torch.randperm(CELLS // self.page, generator=torch.Generator().manual_seed(3)) + 1
            cells = pages[:, None] * self.page + torch.arange(self.page)
            pool.register_mapping(torch.cat([torch.arange(self.page), cells.flatten()]))
            filled = pool.swa_kv_pool.k_buffer + pool.swa_kv_pool.v_buffer
        for buffer in filled:
            buffer[self.page :].fill_(torch.nan)  # page 0 takes keys of padding, and stays finite
        return pool

    def batch(self, rows: list[int], keys: list[int]) -> dict[str, Any]:
        """A step of requests 1, 2, ... with new tokens and keys, new ones included: what SGLang's runner hands over."""
        count, width = len(rows), CONTEXT // self.page
        pages = 1 + torch.arange(count)[:, None] + count * torch.arange(width)  # not one after another
        cells = (pages[..., None] * self.page + torch.arange(self.page)).flatten(1)
        self.requests.req_to_token[1 : count + 1] = cells
        new = [cells[n, end - a : end] for n, (a, end) in enumerate(zip(rows, keys, strict=True))]
        decodes = max(rows) == 1
        old = [end - a for a, end in zip(rows, keys, strict=True)]
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE if decodes else ForwardMode.EXTEND,
            batch_size=count,
            req_pool_indices=torch.arange(1, count + 1),
            seq_lens=torch.tensor(keys),
            out_cache_loc=torch.cat(new).long(),
            extend_seq_lens=None if decodes else torch.tensor(rows, dtype=torch.int32),
            extend_prefix_lens=None if decodes else torch.tensor(old, dtype=torch.int32),
            extend_seq_lens_cpu=None if decodes else rows,
            extend_prefix_lens_cpu=None if decodes else old,
        )
        heads = (HEADS, KV_HEADS, KV_HEADS)
        q, k, v = (torch.randn(sum(rows), n, HEAD_DIM).to(self.dtype) for n in heads)
        return {"batch": batch, "q": q, "k": k, "v": v}

    def step(self, batch: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Metadata of a step, then the layer: out [tokens, Hq, D]."""
        self.backend.init_forward_metadata(batch)
        sinks = {} if self.sinks is None else {"sinks": self.sinks}
        return self.backend.forward(q.flatten(1), k, v, self.layer, batch, **sinks).view_as(q)

    def run(self, steps: list[tuple[list[int], list[int]]], seed: int = 0) -> list[Attended]:
        """Every sequence of every step; one goes on with the keys that its number had in the step before."""
        torch.manual_seed(seed)
        return Attended.of(steps, lambda rows, keys: self._run(self.batch(rows, keys)))

    def _run(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {**{name: batch[name] for name in "qkv"}, "out": self.step(**batch)}
