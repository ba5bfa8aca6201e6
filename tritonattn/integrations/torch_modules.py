"""torch.nn.MultiheadAttention with a scaling, and its replacement inside models.

The layer has a forward of its own: torch's inside `ScaledSDPA` would copy q, k and v, merge padding with a causal mask
as floats [B, H, L, S], and read the weights of out_proj, which skips an adapter around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..calls.attention import attention
from ..calls.checks import Backend
from ..core.pair_biases import mask_arguments
from ..nn.learned import describe
from ..scaling import Scaling
from .arguments import LayerScaling, scaling_for
from .replacement import Change, Replacement


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention whose logit scaling is a parameter: its arguments, masks, results and state_dict.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: As in torch.
        scaling, backend: As in `replace_sdpa`.

    With "sqrt_dim" it is torch's layer, except that rows that attend to no key give o_proj of 0 instead of NaN.
    With need_weights=True, torch's default, the weights are formed, [B, H, L, S]: give need_weights=False, as
    TransformerEncoderLayer does. is_causal=True stands for the mask given with it, as torch's hint does. PyTorch's
    fused path for inference, which would leave the scaling out, is never taken.

    Raises:
        NotImplementedError: add_bias_kv, add_zero_attn, nested tensors.
        TypeError, ValueError: An invalid scaling.

    >>> import torch
    >>> from tritonattn.integrations.torch_modules import MultiheadAttention
    >>> layer = MultiheadAttention(64, 4, batch_first=True, scaling="key_norm_mean")
    >>> x = torch.randn(2, 10, 64)
    >>> out, weights = layer(x, x, x)
    >>> out.shape, weights.shape
    (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
    """

    def __init__(
        self, *arguments: Any, scaling: LayerScaling = "sqrt_dim", backend: Backend = "auto", **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self._set_scaling(scaling, backend)

    @classmethod
    def of(
        cls, layer: nn.MultiheadAttention, scaling: LayerScaling = "sqrt_dim", backend: Backend = "auto"
    ) -> MultiheadAttention:
        """The layer with a scaling: it holds the same parameters, hooks and mode; the layer itself stays as it is.

        A learned name starts at sqrt_dim, as the layer was.
        """
        made = cls.__new__(cls)
        made.__dict__.update(layer.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            made.__dict__[name] = dict(layer.__dict__[name])
        made._set_scaling(scaling, backend)
        return made

    def _set_scaling(self, scaling: LayerScaling, backend: Backend) -> None:
        for name, given in (("add_bias_kv", self.bias_k is not None), ("add_zero_attn", self.add_zero_attn)):
            if given:
                raise NotImplementedError(f"{name}: keys that the layer adds are not supported, got True")
        self.scaling = scaling_for(scaling, self.num_heads, self.out_proj.weight.device)
        self.backend: Backend = backend
        self._qkv_same_embed_dim = False  # torch's encoders check it before they bypass this layer's forward

    def extra_repr(self) -> str:
        return "" if isinstance(self.scaling, nn.Module) else f"scaling={describe(self.scaling)}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as torch.nn.MultiheadAttention.forward does."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise NotImplementedError("query, key, value: nested tensors are not supported; pad them, with a mask")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: expected attn_mask with it, of which it is a hint, got None")
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        separate = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        projections = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = map(linear, (query, key, value), projections, biases)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        options = self._masks(q, k, key_padding_mask, attn_mask, is_causal)
        options |= {"scaling": self.scaling, "dropout_p": self.dropout if self.training else 0.0}
        weights = None
        if need_weights:
            unit = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
            weights = attention(q, k, unit, backend="reference", **options)  # [B, H, L, S], after dropout
            out = weights @ v
        else:
            out = attention(q, k, v, backend=self.backend, **options)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _masks(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> dict[str, Any]:
        """torch's masks, True for hidden or added to the logits, as arguments of `attention`."""
        masks: dict[str, Any] = {}
        if is_causal and q.shape[2] == k.shape[2]:
            masks, attn_mask = {"causal": True}, None
        elif attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))  # [B, H, L, S]
        keys = None if key_padding_mask is None else key_padding_mask[..., None, None, :]
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", keys)):
            visible = ~mask if mask is not None and mask.dtype == torch.bool else mask
            for argument, x in mask_arguments(name, visible).items():
                before = masks.get(argument)
                masks[argument] = x if before is None else before & x if argument == "mask" else before + x
        return masks


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer whose attention has a scaling; scaling and backend as in `MultiheadAttention`.

    >>> import torch
    >>> from tritonattn.integrations.torch_modules import TransformerEncoderLayer
    >>> layer = TransformerEncoderLayer(64, 4, batch_first=True, scaling="log_key_count:512")
    >>> torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self, *arguments: Any, scaling: LayerScaling = "sqrt_dim", backend: Backend = "auto", **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.self_attn = MultiheadAttention.of(self.self_attn, scaling, backend)


def replace_multihead_attention(
    model: nn.Module,
    scaling: LayerScaling | Callable[[str, nn.MultiheadAttention], LayerScaling | None] = "sqrt_dim",
    backend: Backend = "auto",
) -> Replacement:
    """Give every torch.nn.MultiheadAttention inside a model a scaling; parameters stay the same objects.

    Args:
        model: TransformerEncoder, Transformer, torchvision's ViT, or anything else that holds such layers.
        scaling: As in `MultiheadAttention`, or a function of a layer's name and itself that returns one, or None to
            leave that layer alone.
        backend: As in `tritonattn.attention`.

    Raises:
        ValueError: A model without such a layer, or an invalid scaling.
        NotImplementedError: A layer with added keys (add_bias_kv, add_zero_attn); then nothing is changed.

    >>> import torch
    >>> from tritonattn.integrations.torch_modules import replace_multihead_attention
    >>> model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 4, batch_first=True), num_layers=2)
    >>> with replace_multihead_attention(model, scaling="key_norm_mean") as replaced:
    ...     print(replaced.names, model(torch.randn(2, 10, 64)).shape)
    ['layers.0.self_attn', 'layers.1.self_attn'] torch.Size([2, 10, 64])
    """

    def choose(name: str, layer: nn.MultiheadAttention) -> Any:
        return scaling(name, layer) if callable(scaling) and not isinstance(scaling, Scaling) else scaling

    changes = multihead_changes(model, choose, backend)
    return Replacement(model, "one with a torch.nn.MultiheadAttention inside", changes)


def multihead_changes(
    model: nn.Module, choose: Callable[[str, nn.MultiheadAttention], Any], backend: Backend
) -> list[Change]:
    """The changes that give a model's torch.nn.MultiheadAttention layers the chosen scalings; None leaves one alone."""
    made: dict[nn.Module, nn.Module] = {}
    changes: list[Change] = []
    for parent_name, parent in model.named_modules():
        for name, layer in parent.named_children():
            full = f"{parent_name}.{name}".removeprefix(".")
            if isinstance(layer, nn.MultiheadAttention) and (chosen := choose(full, layer)) is not None:
                made[layer] = made.get(layer) or MultiheadAttention.of(layer, chosen, backend)
                changes.append((full, parent, name, made[layer]))
        # An encoder would turn padded batches into nested tensors for the fused path, in inference only.
        if isinstance(parent, nn.TransformerEncoder) and parent.use_nested_tensor:
            changes.append((None, parent, "use_nested_tensor", False))
    return changes if made else []
