"""One of vLLM's attention layers with its metadata builder and cache, without an engine."""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES, WIDTH = 8, 2, 64, 16, 512, 64
NAME = "model.layers.0.self_attn.attn"


class Layer:
    """A layer of its own engine's config; `step` is what a step of the engine asks of it.

    settings   of additional_config; None serves the model as it is
    given      further arguments of vLLM's Attention
    """

    def __init__(self, settings: dict[str, Any] | None, dtype: str = "bfloat16", **given: Any) -> None:
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
            block_size=PAGE,
            additional_config=extra,
        ).create_engine_config()
        with set_current_vllm_config(self.config):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
                initialize_model_parallel(1)
            self._build(getattr(torch, dtype), given)

    def _build(self, dtype: torch.dtype, given: dict[str, Any]) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.layer = Attention(
                HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, cache_config=self.config.cache_config, prefix=NAME, **given
            )
        finally:
            torch.set_default_dtype(before)
        self.layer.process_weights_after_loading(dtype)
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=dtype)
        self.builder = self.layer.attn_backend.get_builder_cls()(spec, [NAME], self.config, torch.device("cpu"))
        self.cache = torch.zeros(PAGES, KV_HEADS, PAGE, 2 * HEAD_DIM, dtype=dtype)
        self.dtype = dtype

    def batch(self, rows: list[int], keys: list[int]) -> dict[str, Any]:
        """A step of sequences with new tokens and keys, new ones included: what vLLM's runner hands over."""
        ends = torch.tensor([0, *rows]).cumsum(0, dtype=torch.int32)
        table = torch.arange(1, 1 + len(rows) * WIDTH, dtype=torch.int32).view(len(rows), WIDTH)
        position = torch.cat([torch.arange(k - n, k) for n, k in zip(rows, keys, strict=True)])
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
        slots = table[owner, position // PAGE].long() * PAGE + position % PAGE
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
