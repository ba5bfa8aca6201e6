"""timm's models with a scaling: through `create_model(..., attn_layer=)`, or in the layers of one that is made."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..calls.attention import attention
from ..calls.checks import Backend
from ..core.errors import install
from ..scaling import Scaling
from ..scaling.base import relative_gain
from ..scaling.names import LayerMode
from .arguments import keys_and_masks, scaling_for
from .replacement import Replacement

try:
    from timm.layers.attention import Attention
except ImportError as error:
    raise ImportError(f"tritonattn.integrations.timm needs timm: {install('integrations')}") from error


def attention_layer(scaling: LayerMode | Scaling = "sqrt_dim", backend: Backend = "auto") -> type[Attention]:
    """A subclass of timm.layers.Attention whose logits are scaled by a mode: its arguments, state_dict and results.

    Args:
        scaling: A name in `tritonattn.SCALINGS`; one in `tritonattn.nn.LEARNED`, of which every layer makes a module
            that starts at sqrt_dim, as pretrained weights want; or a `Scaling`, which all layers share.
        backend: As in `tritonattn.attention`.

    Pretrained weights load as into timm's layer. attn_mask is bool, True for visible, or additive. Models that do
    not take `attn_layer` say so themselves, by a TypeError: `replace_attention` reaches their layers.

    Raises:
        TypeError, ValueError: An invalid scaling.

    >>> import timm, torch
    >>> from tritonattn.integrations.timm import attention_layer
    >>> layer = attention_layer("key_norm_mean")
    >>> model = timm.create_model("vit_tiny_patch16_224", attn_layer=layer, depth=1, img_size=32, num_classes=3)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 3])
    """
    scaling_for(scaling, 1)  # refuse a bad one before a model is half made

    class ScaledAttention(Attention):
        def __init__(self, *arguments, **keywords) -> None:
            super().__init__(*arguments, **keywords)
            self.scaling = scaling_for(scaling, self.num_heads, self.qkv.weight.device)

        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            gate = self.gate(x).sigmoid() if self.gate is not None else None
            qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # [B, N, 3, H, D]
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            q, k = self.q_norm(q), self.k_norm(k)
            k, v, masks = keys_and_masks(q, k, v, attn_mask, is_causal)
            dropout_p = self.attn_drop.p if self.training else 0.0
            out = attention(q, k, v, scaling=self.scaling, dropout_p=dropout_p, backend=backend, **masks)
            out = self.norm(out.transpose(1, 2).flatten(2))
            if gate is not None:
                out = out * gate
            return self.proj_drop(self.proj(out))

    return ScaledAttention


def replace_attention(
    model: nn.Module, scaling: LayerMode | Scaling = "sqrt_dim", backend: Backend = "auto"
) -> Replacement:
    """Give every attention layer of a timm model a scaling: BEiT, Swin, MaxViT, relative positions, EVA, ...

    Args:
        model: One whose layers call `F.scaled_dot_product_attention`; other calls of theirs stay. Biases of pairs
            (relative positions, the masks of shifted windows) are added to the scaled logits, with gradient.
        scaling: As in `attention_layer`; a learned name makes each layer a module `logit_scaling`: give its parameters
            to the optimiser.
        backend: As in `tritonattn.attention`.

    Raises:
        ValueError: A model without such a layer, or an invalid scaling.

    >>> import timm, torch
    >>> from tritonattn.integrations.timm import replace_attention
    >>> model = timm.create_model("test_vit_relpos", img_size=32, num_classes=3)
    >>> with replace_attention(model, "log_key_count:196") as replaced:
    ...     print(len(replaced.names), model(torch.randn(2, 3, 32, 32)).shape)
    9 torch.Size([2, 3])
    """
    changes: list[tuple[str, Any, str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            scaled = scaling_for(scaling, getattr(module, "num_heads", 1), next(module.parameters()).device)
            changes.append((name, module, "forward", partial(_scaled_forward, module, backend)))
            changes += [(name, module, "logit_scaling", scaled), (name, module, "fused_attn", True)]
    return Replacement(model, "one with attention layers of timm", changes)


def _scaled_forward(layer: Any, backend: Backend, *arguments: Any, **keywords: Any) -> Any:
    """A layer's forward, whose calls of scaled_dot_product_attention are `attention` with its scaling."""
    with _Scaled(layer.logit_scaling, backend):
        return type(layer).forward(layer, *arguments, **keywords)


class _Scaled(TorchFunctionMode):
    def __init__(self, scaling: Scaling, backend: Backend) -> None:
        super().__init__()
        self.scaling, self.backend = scaling, backend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **keywords)
        return self._attention(*args, **keywords)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend: [..., H, S, D] each, whose leading axes are one batch."""
        batch = q.shape[:-3]
        if attn_mask is not None and attn_mask.dim() > 4:
            attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        k, v, masks = keys_and_masks(q, k, v, attn_mask, is_causal)
        gain = relative_gain(self.scaling, scale, q.shape[-1])
        options = {"scaling": self.scaling, "gain": gain, "dropout_p": dropout_p, "backend": self.backend}
        return cast(Tensor, attention(q, k, v, **options, **masks)).unflatten(0, batch)
