"""Documents of different lengths in one packed call: each counts and measures its keys only."""

import torch

import tritonattn

torch.manual_seed(0)
HEADS, KEY_HEADS, DIM = 8, 2, 32
lengths = [5, 120, 1, 37]
ends = torch.tensor([0, *lengths]).cumsum(0).int()  # cu_seqlens: 0, 5, 125, 126, 163
total, longest = int(ends[-1]), max(lengths)

q = torch.randn(total, HEADS, DIM, requires_grad=True)
k, v = (torch.randn(total, KEY_HEADS, DIM, requires_grad=True) for _ in range(2))
scaling = tritonattn.nn.SSMax(heads=HEADS, base=64)

out = tritonattn.attention_varlen(q, k, v, ends, ends, longest, longest, scaling=scaling, causal=True)
out.square().sum().backward()
packed = [q.grad.clone(), k.grad.clone(), v.grad.clone(), scaling.s.grad.clone()]
print("packed:", tuple(out.shape), "- padded it would be", (len(lengths) * longest, HEADS, DIM))

# The same, one document at a time.
for x in (q, k, v, scaling.s):
    x.grad = None
for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
    alone = tritonattn.attention(*(x[start:end].transpose(0, 1)[None] for x in (q, k, v)), scaling=scaling, causal=True)
    torch.testing.assert_close(out[start:end], alone[0].transpose(0, 1))
    alone.square().sum().backward()
for ours, expected in zip(packed, (q.grad, k.grad, v.grad, scaling.s.grad), strict=True):
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
print("outputs and gradients are those of the documents alone")
