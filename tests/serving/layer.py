"""One of vLLM's attention layers with its metadata builder and cache, without an engine."""

import functools
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import customize_attention_spec

from .attended import HEAD_DIM, HEADS, KV_HEADS, Attended

PAGE, PAGES, WIDTH = 16, 512, 64
NAME = "model.layers.0.self_attn.attn"


class Layer:
    """A layer of an engine's config; `step` is what a step of the engine asks of it.

    settings   of additional_config; None serves the model as it is
    page       keys of a page
    engine     names of the engine's config to their values, as "parallel_config.pipeline_parallel_size"
    given      further arguments of vLLM's Attention
    """

    def __init__(
        self,
        settings: dict[str, Any] | None,
        dtype: str = "bfloat16",
        page: int = PAGE,
        engine: dict[str, Any] | None = None,
        **given: Any,
    ) -> None:
        folder = Path(mkdtemp())
        transformers.LlamaConfig(
            hidden_size=HEADS * HEAD_DIM,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(folder)
        extra = {} if settings is None else {"tritonattn": settings}
        self.config = EngineArgs(
            str(folder),
            dtype=dtype,
            skip_tokenizer_init=True,
            enforce_eager=True,
            block_size=page,
            additional_config=extra,
        ).create_engine_config()
        self.page, self.dtype = page, getattr(torch, dtype)
        for name, value in (engine or {}).items():
            *owners, last = name.split(".")
            setattr(functools.reduce(getattr, owners, self.config), last, value)
        with set_current_vllm_config(self.config):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
                initialize_model_parallel(1)
            self._build(given)

    def _build(self, given: dict[str, Any]) -> None:
        given |= {"cache_config": self.config.cache_config, "prefix": NAME}
        with set_default_torch_dtype(self.dtype):
            self.layer = Attention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, **given)
        self.layer.process_weights_after_loading(self.dtype)
        backend = self.layer.get_attn_backend()
        spec = customize_attention_spec(backend, self.layer.get_kv_cache_spec(self.config))
        self.builder = backend.get_builder_cls()(spec, [NAME], self.config, torch.device("cpu"))
        self.cache_dtype = spec.dtype
        self.renew_cache(PAGES, spec.state_content_size_bytes // spec.dtype.itemsize)

    def renew_cache(self, pages: int, width: int | None = None) -> None:
        """An empty cache, with NaN in it; width: numbers of a cell, as before where None."""
        width = self.cache.shape[-1] if width is None else width
        shape = (pages, KV_HEADS, self.page, width)
        if self.cache_dtype == torch.uint8:
            self.cache = torch.full(shape, 0x7F, dtype=torch.uint8)  # of e4m3
        else:
            self.cache = torch.full(shape, torch.nan, dtype=self.cache_dtype)

    def batch(self, rows: list[int], keys: list[int], table: torch.Tensor | None = None) -> dict[str, Any]:
        """A step of sequences with new tokens and keys, new ones included: what vLLM's runner hands over.

        table   their pages, int32 [sequences, WIDTH]; None: other pages for each
        """
        ends = torch.tensor([0, *rows]).cumsum(0, dtype=torch.int32)
        if table is None:
            table = torch.arange(1, 1 + len(rows) * WIDTH, dtype=torch.int32).view(len(rows), WIDTH)
        position = torch.cat([torch.arange(k - n, k) for n, k in zip(rows, keys, strict=True)])
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
        slots = table[owner, position // self.page].long() * self.page + position % self.page
        tokens = sum(rows)
        common = CommonAttentionMetadata(
            query_start_loc=ends,
            query_start_loc_cpu=ends.clone(),
            seq_lens=torch.tensor(keys, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(keys, dtype=torch.int32),
            num_reqs=len(rows),
            num_actual_tokens=tokens,
            max_query_len=max(rows),
            max_seq_len=max(keys),
            block_table_tensor=table,
            slot_mapping=slots,
        )
        heads = (HEADS, KV_HEADS, KV_HEADS)
        q, k, v = (torch.randn(tokens, n, HEAD_DIM, dtype=self.dtype) for n in heads)
        return {"common": common, "q": q, "k": k, "v": v, "out": torch.empty_like(q)}

    def parts(self, common: CommonAttentionMetadata, q: Any, k: Any, v: Any, out: Any) -> tuple[Any, Any]:
        """Calls for the first layer of a step, and for another: write the new keys and values, attend."""
        impl, known = self.layer.impl, self.builder.build(0, common)

        def of_layer(metadata: Any = known) -> torch.Tensor:
            if not self.layer.attn_backend.forward_includes_kv_cache_update:
                impl.do_kv_cache_update(self.layer, k, v, self.cache, common.slot_mapping)
            return impl.forward(self.layer, q, k, v, self.cache, metadata, out)

        return lambda: of_layer(self.builder.build(0, common)), of_layer

    def run(self, steps: list[tuple[Any, ...]], seed: int = 0) -> list[Attended]:
        """Every sequence of every step of `batch`; one goes on with the keys that its number had in the step before."""
        torch.manual_seed(seed)
        return Attended.of(steps, lambda *step: self._run(self.batch(*step)))

    def _run(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {**{name: batch[name] for name in "qkv"}, "out": self.parts(**batch)[1]().clone()}
