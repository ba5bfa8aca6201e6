"""An attention layer around any scaling."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calls.attention import attention
from ..calls.checks import (
    Backend,
    check_bool,
    check_count,
    check_dtype,
    check_masks,
    check_number,
    check_settings,
    check_softcap,
    table_of,
)
from ..calls.decode import attention_decode
from ..calls.public import public
from ..calls.sequence_checks import check_offsets
from ..calls.varlen import attention_varlen
from ..core.autograd import needs_graph
from ..core.call import LONGEST_QUERY
from ..core.hints import type_of
from ..core.pair_biases import reflected
from ..core.ranges import window_sides
from ..core.torch_distributed import SharesSequence
from ..scaling import Scaling
from ..scaling.base import check_positive, reads_distances
from ..scaling.names import LayerMode, refuse_scaling
from .cache import KeyValueCache
from .layer_checks import check_features, check_gate, check_projected, checked_head_dim
from .learned import describe
from .registry import scaling_of_layer, warn_of_layer
from .rotary import rotated


class ScaledAttention(SharesSequence, nn.Module):
    """Multi-head attention with its projections.

        out = o_proj(sigmoid(g_proj(x)) * attention(q_norm(q_proj(x)), k_norm(k_proj(y)), v_proj(y)))

    with y = context, or x without one, and the factor sigmoid(g_proj(x)) where the layer has a gate.

    Args:
        width: Features of x and of the result.
        heads: Hq.
        kv_heads: Hkv, a divisor of heads; None is heads.
        head_dim: D; None is width // heads.
        context_width: Features of context, for cross attention; None is width.
        scaling: A name in `tritonattn.SCALINGS` or in `tritonattn.nn.LEARNED`, a `Scaling`, or a float. A learned name
            makes a module, which starts at sqrt_dim, but for "learned_cosine"; "ssmax:64" starts at that base. Modules
            are registered and learned with the layer. `layer.scaling` may be assigned to; make the optimizer after it.
        causal, window, softcap: As in `tritonattn.attention`.
        sinks: Learn a sink [heads], a logit in the softmax's denominator only, from 0.
        qk_norm: RMS-normalise q and k over D, each with a weight [D], as Qwen 3 and Gemma 3 do.
        rotary: Base of rotary positions, 10000.0 in Llama 2, for self attention; None: no positions. A subclass that
            overrides `positioned` gives others.
        gate: Multiply the heads' outputs, before o_proj, by a sigmoid of g_proj(x), in fp32: "elementwise" has a gate
            for every channel, g_proj being [heads * head_dim, width], "headwise" one for every head, [heads, width].
            None has none. Qiu et al. 2025, arXiv:2505.06708; the names are those of OLMo 3.5 and Step-3.5. Qwen3-Next
            has the elementwise gate's rows within q_proj, behind those of q in every head.
        dropout_p: Chance to drop a probability, in training.
        bias: Give the projections a bias.
        backend, batch_invariant: As in `tritonattn.attention`; the projections are torch's and take no part in it.
        device, dtype: The parameters' device and dtype.

    Raises:
        TypeError, ValueError: Arguments that do not describe a layer.

    >>> import torch, tritonattn
    >>> layer = tritonattn.nn.ScaledAttention(64, heads=4, kv_heads=2, scaling="ssmax", causal=True)
    >>> layer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    >>> with torch.no_grad():
    ...     cache = layer.cache(batch=2, capacity=32)
    ...     prompt = layer(torch.randn(2, 10, 64), cache=cache)
    ...     step = layer(torch.randn(2, 1, 64), cache=cache)
    >>> cache.lengths
    tensor([11, 11])
    """

    rotary: float | None = None  # of a pickle that has none
    gate: str | None = None

    @public()
    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_width: int | None = None,
        scaling: LayerMode | Scaling | float = "sqrt_dim",
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        qk_norm: bool = False,
        rotary: float | None = None,
        gate: Literal["elementwise", "headwise"] | None = None,
        dropout_p: float = 0.0,
        bias: bool = False,
        backend: Backend = "auto",
        batch_invariant: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_masks(causal, window, batch_invariant)
        check_settings(backend, dropout_p)
        if softcap is not None:
            check_softcap("softcap", softcap)
        for name, flag in {"sinks": sinks, "qk_norm": qk_norm, "bias": bias}.items():
            check_bool(name, flag)
        check_gate(gate)
        check_dtype(dtype)
        kv_heads = heads if kv_heads is None else kv_heads
        context_width = width if context_width is None else context_width
        self.head_dim = checked_head_dim(width, heads, kv_heads, head_dim, context_width)
        if rotary is not None:
            check_positive("rotary", rotary, above=1.0)
            if self.head_dim % 2:
                raise ValueError(f"head_dim: expected an even number with rotary, got {self.head_dim}")
        self.rotary, self.gate = rotary, gate
        self.width, self.context_width = width, context_width
        self.heads, self.kv_heads = heads, kv_heads
        self.causal, self.window, self.softcap = causal, window, softcap
        self.scaling: Scaling | float
        self.scaling = _scaling_of(scaling, heads, device=device, dtype=dtype)
        self.dropout_p, self.backend, self.batch_invariant = dropout_p, backend, batch_invariant
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(width, heads * self.head_dim, **options)
        self.k_proj = nn.Linear(context_width, kv_heads * self.head_dim, **options)
        self.v_proj = nn.Linear(context_width, kv_heads * self.head_dim, **options)
        self.o_proj = nn.Linear(heads * self.head_dim, width, **options)
        if gate is not None:
            self.g_proj = nn.Linear(width, heads * (self.head_dim if gate == "elementwise" else 1), **options)
        norm = {"eps": 1e-6, "device": device, "dtype": dtype}
        self.q_norm = nn.RMSNorm(self.head_dim, **norm) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, **norm) if qk_norm else nn.Identity()
        self.sinks: Tensor | None
        learned = nn.Parameter(torch.empty(heads, device=device, dtype=dtype)) if sinks else None
        self.register_parameter("sinks", learned)
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; as `scaling`, whatever the constructor takes, also in place of a learned one."""
        if name == "scaling" and (isinstance(value, Scaling) or not isinstance(value, nn.Module)):
            value = self._checked_scaling(value)
            if not isinstance(value, nn.Module):  # torch puts none in a module's place
                self._modules.pop(name, None)
        super().__setattr__(name, value)

    def _checked_scaling(self, scaling: Any) -> Any:
        """The scaling of a value assigned: of the constructor's, which has been checked, itself."""
        if "k_proj" in self._modules:
            like = self.k_proj.weight
            scaling = _scaling_of(scaling, self.heads, device=like.device, dtype=like.dtype)
        warn_of_layer(scaling, self.causal, self.window, self.rotary)
        return scaling

    def reset_parameters(self) -> None:
        """Start the sinks again from 0; projections, norms and the scaling are modules that reset themselves."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def extra_repr(self) -> str:
        sizes = f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, causal={self.causal}"
        if isinstance(self.scaling, nn.Module):
            return sizes
        return f"{sizes}, scaling={describe(self.scaling) if isinstance(self.scaling, Scaling) else self.scaling}"

    def cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for this layer, on its device and in its dtype."""
        like = self.k_proj.weight
        return KeyValueCache(batch, self.kv_heads, capacity, self.head_dim, device=like.device, dtype=like.dtype)

    def positioned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Give q [B, Hq, Sq, D] and k [B, Hkv, Sk, D] of self attention their positions: rotary ones, or a subclass's.

        positions   int64 [B or 1, Sq]: of the tokens in their sequences, those before them in a cache or on other
                    ranks counted
        """
        if self.rotary is None:
            return q, k
        return rotated(q, positions, self.rotary), rotated(k, positions, self.rotary)

    @public()
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        key_ranges: Tensor | None = None,
        mask: Tensor | None = None,
        key_bias: Tensor | None = None,
        bias: Tensor | None = None,
        relative_bias: Tensor | None = None,
        relative_right: int = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KeyValueCache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Attention of x over context, or over itself and the tokens in a cache.

        Args:
            x: [B, Sq, width]; with cu_seqlens [T, width].
            context: [B, Sk, context_width]: cross attention.
            key_lengths, key_ranges, mask: As in `tritonattn.attention`.
            key_bias: As in `tritonattn.attention`, `attention_varlen` or `attention_decode`: with a cache of all its
                capacity.
            bias, relative_bias, relative_right: Likewise; with cu_seqlens or a cache no bias. A prompt of more than 16
                tokens in a cache makes a bias of pairs of the relative one.
            cu_seqlens, max_seqlen: Self attention of packed sequences: int32 [N + 1], sequence s is the rows
                cu_seqlens[s] to cu_seqlens[s + 1]; and the longest one's length.
            cache: A causal layer's: the new keys are appended to it, and x attends to them and those before. For
                inference: neither gradients nor dropout.
            counts: With a cache, integers [B]: how many of the Sq tokens are those of sequence b, the first ones. The
                others reach nothing, and their rows are o_proj of zeros.

        Under `tritonattn.distributed.ContextParallel` x and key_bias are those of this rank's tokens, cu_seqlens and
        max_seqlen those of the whole sequence, and the other arguments are refused.

        Returns:
            As x, with `width` features.

        Raises:
            TypeError, ValueError: As in `tritonattn.attention`; arguments that exclude one another.
            NotImplementedError: A gradient through a cache; dropout over ranks; a scaling with a relative bias and a
                prompt of more than 16 tokens in a cache.
        """
        masks = {"key_lengths": key_lengths, "key_ranges": key_ranges, "mask": mask}
        if self.rotary is not None:
            _refuse_with("rotary", {"context": context})
        others = {"context": context, **masks, "bias": bias}
        biases: dict[str, Any] = {"key_bias": key_bias}
        if not (relative_bias is None and type(relative_right) is int and relative_right == 0):
            biases |= {"relative_bias": relative_bias, "relative_right": relative_right}
        if self.sequence_part is not None:
            _refuse_with(
                "ContextParallel", {**others, "relative_bias": relative_bias, "cache": cache, "counts": counts}
            )
        if cache is not None:
            _refuse_with("cache", {**others, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen})
            out = self._cached(x, cache, counts, biases)
            if self.gate is not None and counts is not None:  # the tokens past counts may be NaN
                past = torch.arange(x.shape[1], device=x.device) >= counts[:, None]
                x = x.masked_fill(past[..., None], 0)
            return self._joined(out.transpose(1, 2), x)
        _refuse_with("no cache", {"counts": counts})
        if cu_seqlens is not None:
            _refuse_with("cu_seqlens", others)
            return self._packed(x, cu_seqlens, max_seqlen, biases)
        _refuse_with("no cu_seqlens", {"max_seqlen": max_seqlen})
        operands = self.operands(x, context)
        if self.sequence_part is not None:
            out = self.sequence_part.attention(*operands, **self._masked(biases))
        else:
            out = attention(*operands, **masks, bias=bias, **self._masked(biases))
        return self._joined(out.transpose(1, 2), x)

    def operands(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Project and normalise the operands of a call without a cache: q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D]."""
        q, k, v = self._projected(x, context)
        if context is None:
            q, k = self.positioned(q, k, self._positions(x.shape[1], x.device)[None])
        return q, k, v

    def _settings(self, biases: dict[str, Any]) -> dict[str, Any]:
        """The arguments of every form of attention."""
        return {
            **biases,
            "scaling": self.scaling,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "backend": self.backend,
            "batch_invariant": self.batch_invariant,
        }

    def _masked(self, biases: dict[str, Any]) -> dict[str, Any]:
        """The arguments of attention without a cache."""
        dropout_p = self.dropout_p if self.training else 0.0
        return {"causal": self.causal, "window": self.window, "dropout_p": dropout_p, **self._settings(biases)}

    def _projected(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D]."""
        check_features("x", x, f"[B, Sq, width = {self.width}]", self.width)
        axes = f"[B, Sk, context_width = {self.context_width}]"
        if context is not None:
            check_features("context", context, axes, self.context_width)
        elif self.context_width != self.width:
            raise ValueError(f"context: expected {axes}, got None")
        y = x if context is None else context
        check_projected("x", x, self.q_proj)
        check_projected("context", y, self.k_proj)
        q, k, v = (
            project(z).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project, z in ((self.q_proj, x), (self.k_proj, y), (self.v_proj, y))
        )
        return self.q_norm(q), self.k_norm(k), v

    def _joined(self, out: Tensor, x: Tensor) -> Tensor:
        """Join the heads of [B, Sq, Hq, D], or [T, Hq, D], times their gates of x, by the last projection."""
        if self.gate is not None:
            gate = self.g_proj(x)  # of this rank's heads
            gate = gate.to(torch.promote_types(gate.dtype, torch.float32)).sigmoid().to(out.dtype)
            out = out * gate.unflatten(-1, (out.shape[-2], -1))
        return self.o_proj(out.flatten(-2))

    def _packed(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: Any, biases: dict[str, Any]) -> Tensor:
        check_features("x", x, f"[T, width = {self.width}]", self.width)
        check_offsets("cu_seqlens", cu_seqlens, x)
        check_count("max_seqlen", max_seqlen)
        q, k, v = self._projected(x[None])
        row = self._positions(x.shape[0], x.device).to(cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens, row, right=True).clamp(max=cu_seqlens.shape[0] - 1) - 1
        q, k = self.positioned(q, k, (row - cu_seqlens[sequence])[None])
        options = self._masked(biases)
        if self.sequence_part is not None:
            out = self.sequence_part.attention(q, k, v, cu_seqlens=cu_seqlens, **options)
            return self._joined(out[0].transpose(0, 1), x)
        q, k, v = (z[0].transpose(0, 1) for z in (q, k, v))  # [T, H, D]
        out = attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
        return self._joined(out, x)

    def _cached(self, x: Tensor, cache: KeyValueCache, counts: Tensor | None, biases: dict[str, Any]) -> Tensor:
        """The result before the last projection: [B, Hq, Sq, D]."""
        if not self.causal:
            raise ValueError("cache: expected a causal layer, got causal=False")
        if not isinstance(cache, KeyValueCache):
            raise TypeError(f"cache: expected a KeyValueCache, got {type_of(cache)}")
        if x.shape[0] != len(cache.lengths):
            raise ValueError(f"x: expected the cache's {len(cache.lengths)} sequences, got shape {list(x.shape)}")
        q, k, v = self._projected(x)
        if needs_graph(q, k, v):
            raise NotImplementedError("cache: no gradient goes through it; call under torch.no_grad()")
        positions = cache.lengths[:, None] + torch.arange(x.shape[1], device=x.device)  # [B, Sq]
        q, k = self.positioned(q, k, positions)
        cache.claim(self)
        try:
            cache.append(k, v, counts)
        except ValueError as error:  # of the room that is left: x has what the cache calls k_new
            raise ValueError(str(error).replace("k_new: ", "x: ", 1)) from error
        settings = self._settings(biases)
        if counts is None and x.shape[1] <= LONGEST_QUERY:
            return attention_decode(
                q,
                cache.k,
                cache.v,
                key_lengths=cache.lengths,
                statistics=cache.statistics,
                window=self.window,
                **settings,
            )
        if isinstance(self.scaling, Scaling) and reads_distances(self.scaling, q):
            raise NotImplementedError(
                f"scaling: expected one without a factor or bias of distances for a prompt of more than {LONGEST_QUERY}"
                f" tokens, or with counts, in a cache, got {type(self.scaling).__name__}"
            )
        if settings.get("relative_bias") is not None:
            table, right = settings.pop("relative_bias"), settings.pop("relative_right")
            table = table_of("relative_bias", table, "relative_right", right, q, q.shape[:3], "[B, Hq, Sq]")
            settings["bias"] = reflected(table, positions + right, slice(0, cache.k.shape[2]))
        left, _ = window_sides(self.window)
        first = torch.zeros_like(positions) if left is None else (positions - left).clamp(min=0)
        end = torch.where(positions < cache.lengths[:, None], positions + 1, 0)  # rows past counts attend to nothing
        key_ranges = torch.stack([torch.minimum(first, end), end], dim=-1)
        return attention(q, cache.k, cache.v, key_ranges=key_ranges, **settings)


def _scaling_of(scaling: Any, heads: int, **options: Any) -> Scaling | float:
    """The scaling of a layer, of a number that number."""
    if isinstance(scaling, (str, Scaling, type)):
        return scaling_of_layer(scaling, heads, **options)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        refuse_scaling(scaling, "a name, a Scaling or a float")
    check_number("scaling", scaling)
    return scaling


def _refuse_with(what: str, others: dict[str, Any]) -> None:
    for name, x in others.items():
        if x is not None:
            got = "a tensor" if isinstance(x, Tensor) else type_of(x)
            raise ValueError(f"{name}: expected None with {what}, got {got}")
