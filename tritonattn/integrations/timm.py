"""timm's vision transformers with a scaling, through `create_model(..., attn_layer=)`."""

from __future__ import annotations

from torch import Tensor

from ..calls.attention import attention
from ..scaling import Scaling
from .arguments import keys_and_masks, scaling_for

try:
    from timm.layers.attention import Attention
except ImportError as error:
    raise ImportError("tritonattn.integrations.timm needs timm: pip install 'tritonattn[integrations]'") from error


def attention_layer(scaling: str | Scaling = "sqrt_dim", backend: str = "auto") -> type[Attention]:
    """A subclass of timm.layers.Attention whose logits are scaled by a mode: its arguments, state_dict and results.

    Args:
        scaling: A name in `tritonattn.SCALINGS`; one in `tritonattn.nn.LEARNED`, of which every layer makes its own
            module that starts at sqrt_dim, as pretrained weights want; or a `Scaling`, which all layers share.
        backend: As in `tritonattn.attention`.

    Pretrained weights load as into timm's own layer. attn_mask is bool, True for visible, or additive with 0 and -inf;
    a bias raises NotImplementedError. Models that do not take `attn_layer` say so themselves, by a TypeError.

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
