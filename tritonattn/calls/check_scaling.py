"""`check_scaling`: hold the two formulas of a scaling, and their gradients, against each other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core.call import Request
from ..core.hints import type_of
from ..core.pair_biases import relative_pairs
from ..core.sequences import Sequences
from ..core.statistics import Statistics
from ..core.terms import Terms
from ..core.visibility import Visibility
from ..scaling import Scaling
from ..scaling.names import ModeName, named_scaling, refuse_scaling
from .checks import check_count, check_number
from .dispatch import logits
from .formulas import dense

_BATCH, _ROWS, _KEYS = 2, 10, 12
_LEAST = -1e300  # stands for a bias of -inf
_TOLERANCE = 1e-4  # of the larger one: parameters may be fp32


def check_scaling(
    scaling: ModeName | str | Scaling, *, heads: int | None = None, kv_heads: int | None = None, head_dim: int = 8
) -> dict[str, float]:
    """Check a user's scaling: `scales` against `multiplier`, `addend`, `relative_addend`, under every mask.

    On random q and k in float64, without a mask and under causal, window, padding, range, packed and dense masks:

    - The factor of every visible pair, and its bias, are the same by both formulas.
    - So are its gradients towards q, k and the scaling's parameters.
    - The factors and gradients of a row ignore keys that the row does not attend to: their values and their number.
    - With `reads_keys = False`, `scales` does not look at k.

    Args:
        scaling: A `Scaling`, or a name in `SCALINGS`.
        heads: Query heads. None takes the scaling's `heads`, else the first axis of its parameters of two axes or more,
            else 4.
        kv_heads: Key heads, which divide the query heads. None is half of them if that is whole, else all.
        head_dim: D.

    Returns:
        The largest relative difference of factors, biases and gradients, by mask.

    Raises:
        ValueError: The two formulas differ, or one depends on a key that it must not; names the mask, and the largest
            difference. Or an invalid number of heads or head dim.
        TypeError: A value that is not a scaling.

    >>> import tritonattn
    >>> max(tritonattn.check_scaling("key_norm_mean").values()) < 1e-9
    True
    """
    mode = named_scaling(scaling) if isinstance(scaling, str) else scaling
    if not isinstance(mode, Scaling):
        if not isinstance(mode, type):
            raise TypeError(f"scaling: expected a name or a Scaling, got {type_of(mode)}")
        refuse_scaling(mode)
    parameters: dict[str, Tensor] = dict(mode.named_parameters()) if isinstance(mode, nn.Module) else {}
    heads = _heads(mode, parameters) if heads is None else heads
    check_count("heads", heads, 1)
    kv_heads = (heads // 2 if heads % 2 == 0 else heads) if kv_heads is None else kv_heads
    check_count("kv_heads", kv_heads, 1)
    check_count("head_dim", head_dim, 1)
    if heads % kv_heads:
        raise ValueError(f"kv_heads: expected a number that divides heads = {heads}, got {kv_heads}")
    device = next((x.device for x in parameters.values()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def random(count: int, length: int) -> Tensor:
        shape = (_BATCH, count, length, head_dim)
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(device).requires_grad_()

    found = {}
    with torch.inference_mode(False):  # records gradients, under no_grad too
        for name, (q_len, masks) in _masks(device).items():
            case = _Case(name, mode, random(heads, q_len), random(kv_heads, _KEYS), masks)
            found[name] = case.formulas({x: p for x, p in parameters.items() if p.requires_grad})
            case.hidden_keys()
            if not mode.reads_keys:
                case.unread_keys()
    return found


def _heads(scaling: Scaling, parameters: dict[str, Tensor]) -> int:
    heads = getattr(scaling, "heads", None)
    return heads if isinstance(heads, int) else max((x.shape[0] for x in parameters.values() if x.dim() > 1), default=4)


def _masks(device: torch.device) -> dict[str, tuple[int, dict[str, Any]]]:
    """The number of rows, and arguments of Visibility.of, by name."""
    positions, keys = torch.arange(_ROWS, device=device), torch.arange(_KEYS, device=device)
    lengths = torch.tensor([_KEYS, 5], device=device)
    ranges = torch.stack([positions // 2, (3 * positions) % (_KEYS + 1)], -1).expand(_BATCH, -1, -1).int()
    left = torch.tensor([[2, _KEYS], [7, _KEYS]], device=device)[:, None].expand(-1, _ROWS, -1).int()
    starts = torch.tensor([0, 5, _KEYS], dtype=torch.int32, device=device)
    holes = (positions[:, None] + 2 * keys) % 5 > 1
    return {
        "full": (_ROWS, {}),
        "causal": (_KEYS, {"causal": True}),
        "causal, last rows": (3, {"causal": True}),
        "window": (_KEYS, {"window": (3, 1)}),
        "padding": (_ROWS, {"key_lengths": lengths}),
        "padding on the left": (_ROWS, {"key_ranges": left}),
        "ranges, rows without keys": (_ROWS, {"key_ranges": ranges}),
        "dense": (_ROWS, {"mask": holes}),
        "packed": (_KEYS, {"causal": True, "sequences": Sequences(starts, starts, 7, 7)}),
    }


class _Case:
    """A scaling on q [B, Hq, Sq, D] and k [B, Hkv, Sk, D] under one mask."""

    def __init__(self, name: str, scaling: Scaling, q: Tensor, k: Tensor, masks: dict[str, Any]) -> None:
        if "sequences" in masks:  # packed batches have no batch axis
            q, k = (x[:1].detach().requires_grad_() for x in (q, k))
        self.name, self.scaling, self.q, self.k = name, scaling, q, k
        self.visibility = Visibility.of(q, k, **masks)
        self.visible = self.visibility.dense().expand(*q.shape[:3], k.shape[2])

    def formulas(self, parameters: dict[str, Tensor]) -> float:
        """Compare factors, biases and gradients; return the largest relative difference."""
        largest, leaves = 0.0, {"q": self.q, "k": self.k, **parameters}
        formulas = dense(self._request())
        for method, fast, given in zip(("multiplier", "addend"), self._scales(self.k), formulas, strict=True):
            slow = torch.as_tensor(0.0 if given is None else given, dtype=torch.float64)
            slow = torch.where(self.visible, slow.to(fast.device), 0)
            if method == "addend":
                slow = slow.clamp(min=_LEAST)
            largest = max(largest, self._compare(f"scales() differs from {method}() [b, h, i, j]", fast, slow))
            weights = torch.linspace(-1, 2, fast.numel(), dtype=torch.float64, device=fast.device).reshape(fast.shape)
            for name, leaf in leaves.items():
                ours, theirs = (_gradient((x * weights).sum(), leaf) for x in (fast, slow))
                about = f"the gradient of scales() towards {name} differs from that of {method}()"
                size = torch.maximum(ours.abs().amax(), theirs.abs().amax())
                largest = max(largest, self._compare(about, ours, theirs, size))
        return largest

    def hidden_keys(self) -> None:
        """Change each key in turn: rows that do not attend to it must keep their factors. Hidden keys may be NaN."""
        with torch.no_grad():
            before = self._scales(self.k)
            for key in range(self.k.shape[2]):
                attends = self.visible[..., key]  # [B, Hq, Sq]
                changed = self.k.clone()
                changed[:, :, key] = 3 * changed[:, :, key] + 1 if attends.any() else math.nan
                about = f"factors [b, h, i, j] change with key {key} in rows that do not attend to it"
                for one, other in zip(before, self._scales(changed), strict=True):
                    self._compare(about, torch.where(attends[..., None], one, other), one)
            lengths = self.visibility.key_lengths
            if lengths is not None:
                entry, shortest = int(lengths.argmin()), int(lengths.min())
                cut = _Case(self.name, self.scaling, self.q[entry, None], self.k[entry, None, :, :shortest], {})
                about = "factors [b, h, i, j] change with the number of keys that padding hides"
                padded_keys = self._scales(self.k, distances=False)  # distances count from the last key, hidden or not
                for one, alone in zip(padded_keys, cut._scales(cut.k, distances=False), strict=True):
                    self._compare(about, one[entry, None, :, :, :shortest], alone)

    def unread_keys(self) -> None:
        """Let `scales` have NaN for k, as a paged cache does for a scaling that does not read it."""
        with torch.no_grad():
            about = "scales() looks at k, which reads_keys = False rules out"
            both = self._scales(self.k), self._scales(self.k, torch.full_like(self.k, math.nan))
            for with_keys, without in zip(*both, strict=True):
                self._compare(about, without, with_keys)

    def _request(self) -> Request:
        terms = Terms(sinks=self.q.new_zeros(self.visibility.rows))  # take what a bias counts from
        return Request(self.q, self.k, self.k, self.visibility, terms, scaling=self.scaling)

    def _scales(self, k: Tensor, given: Tensor | None = None, distances: bool = True) -> tuple[Tensor, Tensor]:
        """The factor and the bias of every visible pair from `scales`, [B, Hq, Sq, Sk]; 0 elsewhere.

        distances   take the relative scale and bias, too, and count biases of keys from the rows where they do
        """
        statistics = Statistics(k, self.visibility)
        terms = logits(self._request(), statistics, k if given is None else given)
        check_number("constant", terms.scale)
        factor = torch.full(self.visible.shape, terms.scale, dtype=torch.float64, device=k.device)
        if terms.query_scale is not None:
            factor = factor * terms.query_scale[..., None]
        if terms.key_scale is not None:
            factor = factor * terms.key_scale.repeat_interleave(self.q.shape[1] // k.shape[1], 1)[:, :, None]
        if terms.relative_scale is not None and distances:
            factor = factor * relative_pairs(terms.relative_scale, terms.relative_right, self.visibility, fill=1.0)
        bias = torch.zeros_like(factor)
        if terms.key_bias is not None:
            bias = bias + terms.key_bias.flatten(1, 2)[:, :, None]
        if terms.relative_bias is not None and distances:
            bias = bias + relative_pairs(terms.relative_bias, terms.relative_right, self.visibility)
        if terms.sinks is not None and distances:
            bias = bias - terms.sinks[..., None]
        return torch.where(self.visible, factor, 0), torch.where(self.visible, bias, 0).clamp(min=_LEAST)

    def _compare(self, about: str, got: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
        """Return the largest difference, relative to the values or to `size`. Raises ValueError if it is too large."""
        size = torch.maximum(got.abs(), expected.abs()) if size is None else size
        relative = ((got - expected).abs() / size.clamp(min=1e-30)).detach().nan_to_num(math.inf)
        largest = float(relative.max())
        if largest > _TOLERANCE:
            at = int(relative.argmax())
            right, ours = (float(x.detach().flatten()[at]) for x in (expected, got))
            values = f"{f'{right:.6g}' if math.isfinite(right) else 'a finite number'}, got {ours:.6g}"
            indices = [int(x) for x in torch.unravel_index(torch.tensor(at), got.shape)]
            raise ValueError(
                f"scaling: under the mask {self.name!r}, {about}: expected {values} at {indices}, the largest relative"
                f" difference, {largest:.2g}"
            )
        return largest


def _gradient(x: Tensor, leaf: Tensor) -> Tensor:
    if not x.requires_grad:
        return torch.zeros_like(leaf, dtype=torch.float64)
    (found,) = torch.autograd.grad(x, leaf, retain_graph=True, allow_unused=True, materialize_grads=True)
    return found.double()
