"""The operators of vLLM's C++ library that a plain decoder needs on a CPU, in PyTorch.

So the CUDA wheel runs with VLLM_TARGET_DEVICE=cpu. `register` is an entry point for processes that vLLM starts.
"""

import torch

LIBRARY = torch.library.Library("_C", "FRAGMENT")


def define(schema: str, function) -> None:
    if not hasattr(torch.ops._C, schema.split("(")[0]):
        LIBRARY.define(schema)
        LIBRARY.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")


def slot_mapping(row_ends, positions, block_table, out, page) -> None:
    rows = torch.repeat_interleave(torch.arange(len(row_ends) - 1), row_ends.diff())
    position = positions[: len(rows)].long()
    out[: len(rows)] = block_table[rows, position // page].long() * page + position % page


def rotary(positions, query, key, head_size, table, is_neox) -> None:
    cos, sin = (x[:, None] for x in table[positions.flatten()].chunk(2, dim=-1))
    for x in (query, key):
        if x is None:
            continue
        turned = x.view(positions.numel(), -1, head_size)[..., : 2 * cos.shape[-1]]
        a, b = turned.chunk(2, -1) if is_neox else (turned[..., ::2], turned[..., 1::2])
        new = a * cos - b * sin, b * cos + a * sin
        for old, value in zip((a, b), new, strict=True):
            old.copy_(value)


def accepted(out, draft_ends, drafts, best, after, is_greedy, longest) -> None:
    """Guessed tokens up to the first that is not the model's, which replaces it, or that after the last."""
    begin = 0
    for i, end in enumerate(draft_ends.tolist()):
        equal = int((drafts[begin:end] == best[begin:end]).cumprod(0).sum())
        taken = torch.cat([best[begin:end], after[i]])[: equal + 1]
        out[i, : len(taken)] = taken
        begin = end


def register() -> None:
    define("init_cpu_memory_env(int[] nodes) -> ()", lambda nodes: None)
    define("compute_slot_mapping_kernel_impl(Tensor a, Tensor b, Tensor c, Tensor(d!) d, int e) -> ()", slot_mapping)
    define("rotary_embedding(Tensor a, Tensor(b!) b, Tensor(c!)? c, int d, Tensor e, bool f) -> ()", rotary)
    define("greedy_argmax(Tensor a) -> Tensor", lambda a: a.argmax(-1).view(-1))
    define(
        "rejection_greedy_sample_kernel_impl"
        "(Tensor(a!) a, Tensor b, Tensor c, Tensor d, Tensor e, Tensor? f, int g) -> ()",
        accepted,
    )
