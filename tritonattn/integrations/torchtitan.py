"""An override of torchtitan's attention: `--override.imports tritonattn.integrations.torchtitan.varlen`.

It replaces the attention backend "varlen" of language models, in which packed documents attend to themselves.
A scaling is its argument: 'tritonattn.integrations.torchtitan.varlen={"scaling": "key_norm_mean"}'.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..calls.varlen import attention_varlen
from ..scaling.base import relative_gain
from ..scaling.names import named_scaling

try:
    from torchtitan.config import derive, override
    from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata
    from torchtitan.protocols.module import Module
except ImportError as error:
    raise ImportError("tritonattn.integrations.torchtitan needs torchtitan: pip install torchtitan") from error


class ScaledVarlenAttention(VarlenAttention):
    """torchtitan's inner attention, by a mode of `SCALINGS`: q [B, L, Hq, D], k and v [B, L, Hkv, D].

    Newer versions fold the batch: q [T, Hq, D], k and v [T, Hkv, D].
    Learned scalings are refused: torchtitan initialises and shards only parameters that its configs name.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        scaling: str = "sqrt_dim"

    def __init__(self, config: Config) -> None:
        Module.__init__(self)  # VarlenAttention.__init__ chooses a flash kernel for the process
        self.window_size, self.mode = config.window_size, named_scaling(config.scaling)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_masks: VarlenMetadata,
        scale: float | None = None,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
        **_: Any,  # enable_gqa
    ) -> Tensor:
        """Attend, and hand (out, as q, and lse [B, L, Hq] or [T, Hq]) to out_transform where there is one."""
        rows = q.shape[:-2]  # [B, L] or [T]
        q, k, v = (x.flatten(0, -3) for x in (q, k, v))
        result: Any = attention_varlen(
            q,
            k,
            v,
            attention_masks.cu_seq_q,
            attention_masks.cu_seq_k,
            attention_masks.max_q,
            attention_masks.max_k,
            scaling=self.mode,
            gain=relative_gain(self.mode, scale, q.shape[-1]),
            window=self.window_size,
            return_aux=out_transform is not None,
        )
        if out_transform is None:
            return result.unflatten(0, rows)
        out, aux = result
        return out_transform(out.unflatten(0, rows), aux.lse.transpose(0, 1).unflatten(0, rows))


@override(target=VarlenAttention.Config, description="tritonattn: attention of packed documents with a scaling")
def varlen(config: VarlenAttention.Config, *, scaling: str = "sqrt_dim") -> ScaledVarlenAttention.Config:
    """Give a model's layers the attention of tritonattn.

    Args:
        config: A layer's, whose window stays.
        scaling: A name in `tritonattn.SCALINGS`. A scale of the model multiplies it.

    Raises:
        ValueError: An unknown name, or that of a learned scaling.

    torchtitan's context parallelism takes no varlen attention. Tested with torchtitan 0.3.0 and its main of 2026-08-21.
    """
    return derive(config, ScaledVarlenAttention.Config, scaling=scaling)
