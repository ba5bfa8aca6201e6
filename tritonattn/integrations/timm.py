"""timm's models with a scaling: through `create_model(..., attn_layer=)`, or in the layers of one that is made."""

from __future__ import annotations

from torch import Tensor, nn

from ..calls.checks import Backend
from ..core.errors import install
from .arguments import LayerScaling, scaling_for
from .replacement import Change, Replacement
from .sdpa import ScaledSDPA, sdpa_changes

try:
    from timm.layers.attention import Attention
except ImportError as error:
    raise ImportError(f"tritonattn.integrations.timm needs timm: {install('integrations')}") from error


def attention_layer(scaling: LayerScaling = "sqrt_dim", backend: Backend = "auto") -> type[Attention]:
    """A subclass of timm.layers.Attention with a scaling, as in `replace_sdpa`: its arguments, state_dict and results.

    Pretrained weights load as into timm's layer. Models that do not take `attn_layer` say so themselves, by a
    TypeError: `replace_attention` reaches their layers.

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
            self.fused_attn = True  # pyright: ignore[reportGeneralTypeIssues]
            self.scaling = scaling_for(scaling, self.num_heads, self.qkv.weight.device)

        def forward(self, *arguments, **keywords) -> Tensor:
            with ScaledSDPA(self.scaling, backend):
                return super().forward(*arguments, **keywords)

    return ScaledAttention


def replace_attention(model: nn.Module, scaling: LayerScaling = "sqrt_dim", backend: Backend = "auto") -> Replacement:
    """`replace_sdpa` for a model of timm (BEiT, Swin, MaxViT, EVA, ...) without an example: it turns on `fused_attn`.

    Biases of pairs (relative positions, the masks of shifted windows) are added to the scaled logits, with gradient.

    Raises:
        ValueError: A model without such a layer, or an invalid scaling.

    >>> import timm, torch
    >>> from tritonattn.integrations.timm import replace_attention
    >>> model = timm.create_model("test_vit_relpos", img_size=32, num_classes=3)
    >>> with replace_attention(model, "log_key_count:196") as replaced:
    ...     print(len(replaced.names), model(torch.randn(2, 3, 32, 32)).shape)
    9 torch.Size([2, 3])
    """
    changes: list[Change] = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            scaled = scaling_for(scaling, getattr(module, "num_heads", 1), next(module.parameters()).device)
            changes += [*sdpa_changes(name, module, scaled, backend), (name, module, "fused_attn", True)]
    return Replacement(model, "one with attention layers of timm", changes)
