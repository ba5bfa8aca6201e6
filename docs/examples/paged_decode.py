"""Decode with a paged KV cache: two sequences of different lengths, pages handed out as they grow."""

import torch

import tritonattn

torch.manual_seed(0)
BATCH, HEADS, KEY_HEADS, DIM, PAGE, MAX_PAGES = 2, 8, 2, 32, 16, 4
SCALING = "key_norm_mean"
prompts = torch.tensor([19, 40])  # tokens of each prompt
steps = 6

free = list(range(BATCH * MAX_PAGES))[::-1]
table = torch.zeros(BATCH, MAX_PAGES, dtype=torch.int32)  # key j of sequence b: page table[b, j // PAGE], at j % PAGE
owned = [0] * BATCH
k_pages, v_pages = torch.zeros(2, BATCH * MAX_PAGES, PAGE, KEY_HEADS, DIM)
statistics = tritonattn.KeyStatistics(batch=BATCH, kv_heads=KEY_HEADS, capacity=MAX_PAGES * PAGE)


def write(sequence, position, key, value):
    """Keep one token's key and value [Hkv, D]."""
    if position // PAGE == owned[sequence]:
        table[sequence, owned[sequence]] = free.pop()
        owned[sequence] += 1
    page = int(table[sequence, position // PAGE])
    k_pages[page, position % PAGE], v_pages[page, position % PAGE] = key, value


# As a model would compute them: q [B, Hq, S, D], k and v [B, Hkv, S, D] of all tokens.
longest = int(prompts.max()) + steps
q = torch.randn(BATCH, HEADS, longest, DIM)
k, v = torch.randn(2, BATCH, KEY_HEADS, longest, DIM)

for b in range(BATCH):
    for j in range(int(prompts[b])):
        write(b, j, k[b, :, j], v[b, :, j])
statistics.append(k[:, :, : int(prompts.max())], counts=prompts)

lengths = prompts.clone()
for _ in range(steps):
    new = torch.arange(BATCH), slice(None), lengths  # the next token of each sequence
    for b in range(BATCH):
        write(b, int(lengths[b]), k[new][b], v[new][b])
    statistics.append(k[new][:, :, None])
    lengths = lengths + 1
    out = tritonattn.attention_decode(
        q[new][:, :, None],
        k_pages,
        v_pages,
        key_lengths=lengths,
        block_table=table,
        scaling=SCALING,
        statistics=statistics,
    )

whole = tritonattn.attention(q, k, v, scaling=SCALING, causal=True)
torch.testing.assert_close(out[:, :, 0], whole[torch.arange(BATCH), :, lengths - 1])
print(f"pages {table.tolist()}, lengths {lengths.tolist()}: the last step is that of one full pass")
