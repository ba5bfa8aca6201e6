"""torchtitan's debug Llama by our override: documents alone by torch's attention, and FSDP2 of four processes."""

import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

with warnings.catch_warnings():  # torch's, at the import of what torchtitan compiles
    warnings.simplefilter("ignore")
    pytest.importorskip("torchtitan.models.common.attention", reason="pip install torchtitan")
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.models.common.attention import ScaledDotProductAttention, VarlenAttention
from torchtitan.models.llama3 import llama3_configs

from tests.distributed.pool import on_every_rank
from tests.support.refusals import refuses
from tritonattn.core.torch_distributed import whole

OVERRIDE = "tritonattn.integrations.torchtitan.varlen"
LENGTHS = (20, 1, 11)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
FOLDED = "q_TNH" in inspect.signature(VarlenAttention.forward).parameters  # since 0.3.0: [T, ...] for [B, L, ...]


class Stock(ScaledDotProductAttention):
    """torchtitan's attention by torch, which takes [B, L, H, D] only, of one sequence [T, H, D] too."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(ScaledDotProductAttention.Config):
        pass

    def forward(self, q, k, v, **options):
        return super().forward(*(x.view(-1, *x.shape[-3:]) for x in (q, k, v)), **options).view_as(q)


def llama(scaling: str | None, window: tuple[int, int] = (-1, 0)) -> Any:
    """Two layers in fp32, the same on every rank; torch's attention where scaling is None."""
    config = llama3_configs["debugmodel"](attn_backend="varlen")
    config.layers = config.layers[:2]
    inner = Stock.Config() if scaling is None else VarlenAttention.Config(window_size=window)
    for layer in config.layers:
        layer.attention = dataclasses.replace(layer.attention, inner_attention=inner)
    if scaling is not None:
        assert len(apply_overrides(OverrideConfig(imports=[(OVERRIDE, {"scaling": scaling})]), config)) == 2
    model = config.build()
    torch.manual_seed(0)
    model.init_states(buffer_device=torch.device("cpu"))
    return model


def tokens(batch: int = 4) -> torch.Tensor:
    return torch.randint(2048, (batch, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits, [B, L, vocabulary]."""
    positions = POSITIONS.expand_as(ids)
    given, positions = (ids.flatten(), positions.flatten()) if FOLDED else (ids, positions)
    return model(given, positions=positions, attention_masks=model.get_attention_masks(positions)).view(*ids.shape, -1)


def logits_alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[L, vocabulary] of one document [L]."""
    lead = (ids.shape[0],) if FOLDED else (1, ids.shape[0])
    return model(ids.view(lead), positions=torch.arange(ids.shape[0]).view(lead)).flatten(0, -2)


def test_documents_attend_as_they_do_alone():
    stock, ids = llama(None), tokens()
    alone = torch.stack([torch.cat([logits_alone(stock, part) for part in row.split(LENGTHS)]) for row in ids])
    torch.testing.assert_close(logits(llama("sqrt_dim"), ids), alone, rtol=1e-4, atol=1e-4)
    for other in (llama("key_norm_sum"), llama("sqrt_dim", window=(3, 0))):
        assert not torch.allclose(logits(other, ids), alone, atol=1e-2)
    refuses("ValueError: ~ SSMax", llama, "ssmax")


@on_every_rank
def test_fsdp_has_the_gradients_of_one_process(rank: int) -> None:
    """Largest relative error of FSDP2's gradients."""
    one, model = llama("key_norm_mean"), llama("key_norm_mean")
    for part in (*model.layers.values(), model):
        fully_shard(part, mesh=init_device_mesh("cpu", (4,)))
    for net, ids in ((one, tokens()), (model, tokens()[rank : rank + 1])):
        logits(net, ids).square().mean().backward()
    pairs = zip(model.parameters(), one.parameters(), strict=True)
    assert max(((whole(p.grad) - q.grad).abs().max() / q.grad.abs().max()).item() for p, q in pairs) < 1e-5
