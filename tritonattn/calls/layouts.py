"""The axes of q, k and v in batched, packed and cached calls."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SMALLEST_PAGE = 16


def names_of(axes: str) -> list[str]:
    """The names of axes such as "[B, S]"."""
    return axes.strip("[]").split(", ")


class Layout(NamedTuple):
    """The axes of q, k and v in a call; axes of one name have one size.

    names    of q, k and v, in errors
    axes     of each, and their numbers
    heads    the axis of k and v that is heads
    cached   k and v are a KV cache, which may be of 8 bits
    shared   (tensor, axis, other tensor, other axis) of each two axes of one name, as positions
    """

    names: tuple[str, ...]
    axes: tuple[str, ...]
    counts: tuple[int, ...]
    heads: int
    shared: tuple[tuple[int, int, int, int], ...]
    cached: bool = False

    @classmethod
    def of(cls, cached: bool = False, **axes: str) -> Layout:
        """The layout of tensors by name, such as q="[B, Hq, Sq, D]"."""
        first: dict[str, tuple[int, int]] = {}
        shared = []
        for tensor, one in enumerate(axes.values()):
            for axis, name in enumerate(names_of(one)):
                if name in first:
                    shared.append((tensor, axis, *first[name]))
                else:
                    first[name] = tensor, axis
        counts = tuple(len(names_of(one)) for one in axes.values())
        return cls(tuple(axes), tuple(axes.values()), counts, first["Hkv"][1], tuple(shared), cached)

    def hint_of_order(self, q: Tensor, k: Tensor) -> str:
        """A hint for heads and keys that would fit if they were exchanged; "" otherwise."""
        if self is PACKED:
            return ""
        keys, heads = k.shape[self.heads], k.shape[3 - self.heads]  # if they are
        if self is BATCHED:
            fits = heads > 0 and q.shape[2] % heads == 0
            return ": they look like [B, S, H, D]; pass q, k and v each as x.transpose(1, 2)" if fits else ""
        if heads == 0 or q.shape[1] % heads != 0 or ("page" in self.axes[1] and keys < SMALLEST_PAGE):
            return ""
        (_, k_name, v_name), (first, one, two, last) = self.names, names_of(self.axes[1])
        looks = f"[{first}, {two}, {one}, {last}], not {self.axes[1]}"
        return f": {list(k.shape)} looks like {looks}; pass {k_name}.transpose(1, 2), and {v_name} likewise"


BATCHED = Layout.of(q="[B, Hq, Sq, D]", k="[B, Hkv, Sk, D]", v="[B, Hkv, Sk, Dv]")
PACKED = Layout.of(q="[T_q, Hq, D]", k="[T_k, Hkv, D]", v="[T_k, Hkv, Dv]")
PAGED = Layout.of(True, q="[T_q, Hq, D]", k="[N, page, Hkv, D]", v="[N, page, Hkv, Dv]")
CACHE = Layout.of(True, q="[B, Hq, Sq, D]", k_cache="[B, Hkv, capacity, D]", v_cache="[B, Hkv, capacity, Dv]")
CACHE_OF_RANKS = CACHE._replace(cached=False)
CACHE_PAGES = Layout.of(True, q="[B, Hq, Sq, D]", k_cache="[N, page, Hkv, D]", v_cache="[N, page, Hkv, Dv]")
