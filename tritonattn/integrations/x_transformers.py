"""Replacement of the `Attend` modules of x-transformers by ones with a scaling."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..calls.checks import Backend
from ..core.errors import install
from .arguments import LayerScaling, attend, scaling_for
from .replacement import Replacement

try:
    from x_transformers.attend import Attend, Intermediates
except ImportError as error:
    raise ImportError(
        f"tritonattn.integrations.x_transformers needs x-transformers: {install('integrations')}"
    ) from error

# Options of Attend that change logits or probabilities and are no scaling; None and False turn them off.
_REFUSED = (
    "pre_softmax_talking_heads",
    "post_softmax_talking_heads",
    "pre_scale_post_talking_heads",
    "inverted_attention",
    "cog_signed",
    "l2_distance",
    "add_zero_kv",
    "selective",
    "cope",
    "flash_pack_seq",
)
_REFUSED_IN_CALLS = {
    "prev_attn": "logits of the layer before (residual_attn)",
    "attn_delta": "a change of the probabilities",
    "flash_pack_seq_kwargs": "packed sequences",
}


class ScaledAttend(nn.Module):
    """An `Attend` whose logits are scaled by a mode.

    It keeps causality, masks, biases of pairs (alibi, relative positions), grouped heads, softclamp, learned sinks and
    dropout. Attend's scale, qk_norm's included, stays a factor with the mode. Its Intermediates are empty, as with
    Attend(flash=True): logits are never formed.

    Args:
        attend: The module whose options hold.
        heads: Hq.
        scaling, backend: As in `replace_sdpa`.

    Raises:
        NotImplementedError: An option of attend that is not supported, by its name.
    """

    def __init__(
        self, attend: Attend, heads: int, scaling: LayerScaling = "sqrt_dim", backend: Backend = "auto"
    ) -> None:
        super().__init__()
        _refuse(attend)
        self.scaling = scaling_for(scaling, heads)
        self.backend: Backend = backend
        self.scale, self.causal, self.dropout = attend.scale, attend.causal, attend.dropout
        self.softcap = attend.logit_softclamp_value if attend.softclamp_logits else None
        self.head_attn_sink: Tensor | None
        self.register_parameter("head_attn_sink", attend.head_attn_sink)
        self.train(attend.training)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        row_mask: Tensor | None = None,
        causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, Intermediates]:
        """Attend as Attend.forward does; row_mask matters only to inverted attention."""
        for name, meaning in _REFUSED_IN_CALLS.items():
            if others.get(name) is not None:
                raise NotImplementedError(f"{name}: {meaning} is not supported by tritonattn")
        if 1 < k.shape[1] < q.shape[1]:  # query head h reads key head h % Hkv, where tritonattn has h // group
            k, v = (x.repeat(1, q.shape[1] // k.shape[1], 1, 1) for x in (k, v))
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None]
        bias = others.get("attn_bias")
        if bias is not None and bias.dim() == 3:
            bias = bias[None]  # of heads
        terms = {"bias": bias, "softcap": self.softcap, "sinks": self.head_attn_sink}
        options = {"causal": self.causal if causal is None else causal, **terms}
        call = self.scaling, self.backend, q, k, v, mask, self.dropout if self.training else 0.0
        return attend(*call, scale=self.scale, enable_gqa=True, options=options), Intermediates()


def replace_attend(model: nn.Module, scaling: LayerScaling = "sqrt_dim", backend: Backend = "auto") -> Replacement:
    """Give every attention layer inside a model of x-transformers a scaling, as in `replace_sdpa`.

    Raises:
        ValueError: A model without such a layer, or an invalid scaling.
        NotImplementedError: A layer with another option, by its name: talking heads, sparse or sigmoid attention,
            residual attention, ...; then nothing is changed.

    >>> import torch
    >>> from x_transformers import Decoder, TransformerWrapper
    >>> from tritonattn.integrations.x_transformers import replace_attend
    >>> model = TransformerWrapper(num_tokens=9, max_seq_len=16, attn_layers=Decoder(dim=32, depth=2, heads=4))
    >>> with replace_attend(model, "key_norm_mean") as replaced:
    ...     print(len(replaced.names), model(torch.randint(0, 9, (2, 10))).shape)
    2 torch.Size([2, 10, 9])
    """
    changes = []
    for name, module in model.named_modules():
        for flag in ("residual_attn", "cross_residual_attn"):
            if getattr(module, flag, False) is True:
                raise NotImplementedError(f"{flag}: logits of the layer before are not supported by tritonattn")
        attend = getattr(module, "attend", None)
        if isinstance(attend, Attend):
            device = next(module.parameters()).device
            scaled = ScaledAttend(attend, cast(int, module.heads), scaling, backend).to(device)
            changes.append((f"{name}.attend".removeprefix("."), module, "attend", scaled))
    return Replacement(model, "one with an Attend of x-transformers", changes)


def _refuse(attend: Attend) -> None:
    for name in _REFUSED:
        if getattr(attend, name, None) not in (None, False):
            raise NotImplementedError(f"{name}: not supported by tritonattn")
    function = attend.attn_fn
    while isinstance(function, partial):
        function = function.func
    if function is not torch.nn.functional.softmax:
        name = getattr(function, "__name__", type(function).__name__)
        raise NotImplementedError(f"attn_fn: expected softmax, got {name}, which tritonattn does not support")
