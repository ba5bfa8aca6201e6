"""A server's layer: rows that it attended with and the reference's, and what it must not read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritonattn import attention

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
VIEWS = {"transpose", "slice", "select", "view", "alias", "detach"}


class Attended(NamedTuple):
    """Rows of a sequence: out and q [rows, Hq, D], all its keys and values [keys, Hkv, D]."""

    out: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def of(cls, steps: list[tuple[Any, ...]], run: Callable[..., dict[str, torch.Tensor]]) -> list["Attended"]:
        """Every sequence of every step (rows, keys, ...); `run` returns q, k, v of its new tokens, and out.

        A sequence goes on with the keys that its number had in the step before.
        """
        held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        found = []
        for step in steps:
            rows, keys = step[:2]
            ran = run(*step)
            out, q, k, v = (ran[name].split(rows) for name in ("out", "q", "k", "v"))
            for n, (new, end) in enumerate(zip(rows, keys, strict=True)):
                before = held.get(n, (k[n][:0], v[n][:0]))
                held[n] = tuple(torch.cat([x[: end - new], y[n]]) for x, y in zip(before, (k, v), strict=True))
                found.append(cls(out[n], q[n], *held[n]))
        return found

    def error(self, **arguments: Any) -> float:
        """The largest difference from `exact`."""
        return float((self.out.double() - exact(*self[1:], **arguments)).abs().max())


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None = None,
    chunk: int | None = None,
    **arguments: Any,
):
    """The reference's last rows of a sequence: q [rows, Hq, D], k and v [S, Hkv, D], window keys at most.

    chunk   each row attends within its chunk of so many keys
    """
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    if chunk is not None:
        row = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
        arguments["key_ranges"] = torch.stack([row - row % chunk, row + 1], dim=-1)[None]
    arguments |= {"causal": True, "window": None if window is None else (window - 1, None), "backend": "reference"}
    return attention(q, k, v, **arguments)[0].transpose(0, 1)


class NoHostRead(TorchDispatchMode):
    """Raise where the host would wait for values of a device, or torch reads keys or values of a cache.

    A layer's records next to them have another dtype.
    """

    def __init__(self, cache):
        super().__init__()
        self.cache, self.dtype = cache.untyped_storage().data_ptr(), cache.dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in (*VIEWS, "index_put_", "_index_put_impl_"):
            read = [x for x in args if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == self.cache]
            assert all(x.dtype != self.dtype for x in read), name
        masks = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        assert name not in READS, name
        assert not masks, name
        return func(*args, **(kwargs or {}))
