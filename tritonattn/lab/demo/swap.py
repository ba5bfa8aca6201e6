"""A small model of Qwen 3's architecture that is trained on few keys, patched, and asked among many."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from ...core.progress import Progress
from ...core.tables import table
from ...huggingface import patch
from ...scaling import LogKeyCount, Scaling
from ..training.tasks import Batch, Recall

LENGTHS = (64, 256, 1024, 4096)  # pairs in testing
_SHORTEST, _LONGEST = 16, 64  # pairs in training
_STEPS, _ROWS, _RATE = 200, 32, 5e-3
_TESTED, _AT_A_TIME = 16, 4  # sequences
_VALUES, _SYMBOLS = 16, 16
_ASKED = _VALUES + 4 * _SYMBOLS  # the token that marks a question; values are 0 to 15, then the symbols of 4 positions

_ABOUT = """\
Patch it and it extrapolates. A small model learns to find the value of a key among {shortest} to {longest} pairs
of keys and values; then it is asked among up to {most:,}. It has Qwen 3's architecture (one layer, 4 heads of 16),
which normalises q and k. That bounds the logits: the right key cannot stand out any further, and every
key that is added takes attention from it. The patch multiplies the logits by ln(n) / ln({longest}), n being the
keys that a token attends to and {longest} the trained length. No weight changes:

    import tritonattn
    from tritonattn.huggingface import patch

    patch(model, scaling=tritonattn.SCALINGS["log_key_count"](base={longest}))

Values recalled, by number of pairs, and by the same model without QK-norm ({seconds:.0f} s of training):"""
_CONCLUSION = """\
Among {most:,} pairs it recalls {before:.0%} as it was trained, and {after:.0%} when it is patched. Without QK-norm
nothing bounds the logits, and the patch gains little or nothing: {free_before:.0%} before, {free_after:.0%} after.
Larger heads fade at greater lengths: docs/training.md."""


def report(device: torch.device, steps: int = _STEPS) -> str:
    """Train the model and the one without QK-norm on `device`; return the explanation, the table and the conclusion."""
    start = time.perf_counter()
    bounded, free = (trained(device, steps, qk_norm=qk_norm) for qk_norm in (True, False))
    seconds = time.perf_counter() - start
    found = {
        "as trained, 1/sqrt(D)": _by_length(bounded),
        f"patched, ln(n)/ln({_LONGEST})/sqrt(D)": _by_length(bounded, LogKeyCount(_LONGEST)),
        "without QK-norm, as trained": _by_length(free),
        "without QK-norm, patched": _by_length(free, LogKeyCount(_LONGEST)),
    }
    rows = [[name, *(f"{share:.1%}" for share in shares)] for name, shares in found.items()]
    before, after, free_before, free_after = (shares[-1] for shares in found.values())
    most = LENGTHS[-1]
    texts = (
        _ABOUT.format(shortest=_SHORTEST, longest=_LONGEST, most=most, seconds=seconds),
        table(rows, ["model", *(f"{n:,}" for n in LENGTHS)], "simple"),
        _CONCLUSION.format(most=most, before=before, after=after, free_before=free_before, free_after=free_after),
    )
    return "\n\n".join(texts)


def _by_length(model: Qwen3ForCausalLM, scaling: Scaling | None = None) -> list[float]:
    """Shares of right values at LENGTHS, with the scaling of the model or patched."""
    with nullcontext() if scaling is None else patch(model, scaling=scaling):
        return [recalled(model, n) for n in LENGTHS]


def trained(device: torch.device, steps: int, *, qk_norm: bool = True) -> Qwen3ForCausalLM:
    """Train the model of seed 0."""
    model: Any = untrained(qk_norm=qk_norm).to(device).train()  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01, betas=(0.9, 0.99))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    random = torch.Generator().manual_seed(0)
    for _ in Progress(range(steps), unit="step", leave=False):
        pairs = int(torch.randint(_SHORTEST, _LONGEST + 1, (), generator=random))
        batch = drawn(_ROWS, pairs, random).to(device)
        loss = F.cross_entropy(answers(model, batch).flatten(0, 1), batch.target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def untrained(*, qk_norm: bool = True) -> Qwen3ForCausalLM:
    """One layer, with W_k started as W_q: equal keys then attract each other from the start, which spares steps."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=_ASKED + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=_LONGEST,
        initializer_range=0.125,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    attention: Any = model.model.layers[0].self_attn
    attention.k_proj.load_state_dict(attention.q_proj.state_dict())
    if not qk_norm:
        attention.q_norm = attention.k_norm = torch.nn.Identity()
    return model


def drawn(size: int, pairs: int, random: torch.Generator) -> Batch:
    return Recall().tables(torch.full((size,), pairs), pairs, random)


def answers(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Logits [B, asked, values] of the asked keys: a pair is one token, a question is one after all pairs."""
    embed, first = model.model.embed_tokens, _VALUES + _SYMBOLS * torch.arange(4, device=batch.target.device)
    pairs = embed(batch.inputs["keys"] + first).sum(-2) + embed(batch.inputs["values"])
    asked = embed(batch.inputs["asked"] + first).sum(-2) + embed(torch.full_like(batch.target, _ASKED))
    tokens = torch.cat([pairs, asked], dim=1)  # [B, n + asked, hidden_size]
    no_positions = torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    logits = model(
        inputs_embeds=tokens,
        position_ids=no_positions,
        attention_mask=torch.ones_like(no_positions),  # else positions that do not rise mean packed sequences
        use_cache=False,
        logits_to_keep=asked.shape[1],
    ).logits
    return logits[..., :_VALUES]


@torch.no_grad()
def recalled(model: Qwen3ForCausalLM, pairs: int) -> float:
    """Share of right values among `pairs` pairs; the tables are the same in every call."""
    random = torch.Generator().manual_seed(1)
    batches = (drawn(_AT_A_TIME, pairs, random).to(model.device) for _ in range(_TESTED // _AT_A_TIME))
    rights = [(answers(model, batch).argmax(-1) == batch.target).double().mean() for batch in batches]
    return float(torch.stack(rights).mean())
