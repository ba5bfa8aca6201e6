"""One sequence on several processes, or on one: torchrun --nproc-per-node=2 docs/examples/context_parallel.py

Each rank holds a part of the tokens. Results, gradients and the key statistics of "key_norm_mean" are those of one
process.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import tritonattn
from tritonattn.distributed import context_parallel_attention, shard, unshard

if "RANK" in os.environ:
    dist.init_process_group("gloo")
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))

torch.manual_seed(0)  # the same whole sequence on every rank
whole = [torch.randn(1, heads, 512, 64) for heads in (8, 2, 2)]
parts = [shard(x, mesh=mesh, layout="zigzag").requires_grad_() for x in whole]
options = {"scaling": "key_norm_mean", "causal": True}
out = context_parallel_attention(*parts, mesh=mesh, layout="zigzag", **options)
out.square().sum().backward()

one = [x.clone().requires_grad_() for x in whole]
wanted = tritonattn.attention(*one, **options)
wanted.square().sum().backward()
pairs = [(out, wanted), *((part.grad, x.grad) for part, x in zip(parts, one, strict=True))]
error = max((unshard(a.detach(), mesh=mesh, layout="zigzag") - b).abs().max().item() for a, b in pairs)
if dist.get_rank() == 0:
    print(f"{dist.get_world_size()} ranks of {parts[0].shape[2]} tokens: largest difference to one process {error:.1e}")
assert error < 1e-4
dist.destroy_process_group()
