"""Modules that stand in for FlashAttention 2, 3 and 4 on a CPU: the real signatures, eager attention inside.

They keep to what is read in the libraries' code: what these check, what each card lacks, what they leave unwritten, and
where they differ from their documents without an error.

`flash_signatures.json` holds the signatures of the real functions, by package and version. To record another one:

    python -m tests.support.flash NAME VERSION flash_attn_interface.py
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.kernels import harness
from tests.support.bound import allowed_error
from tritonattn.backends.flash import libraries, run

RECORDED = Path(__file__).with_name("flash_signatures.json")
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")
_STARTS = ("cu_seqlens_q", "cu_seqlens_k")
FIRST_FOUR = "4.0.0b34"  # of those without the module OF_OLD_FOUR
MODULES = {name: module for name, module, *_ in libraries.FLASH}
# The versions whose keywords differ, and a card that runs each, by the first number of its compute capability.
VERSIONS = {
    "flash-attn-2 2.8.3.post2": 8,
    "flash-attn-3 2.8.3.post2": 9,
    "flash-attn-3 0251105": 9,
    "flash-attn-4 4.0.0b36": 10,
}


def signatures_of(source: str) -> dict[str, str]:
    """The parameters of FUNCTIONS in a file's text, without annotations."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            for parameter in node.args.args:
                parameter.annotation = None
            found[node.name] = ast.unparse(node.args)
    return found


def recorded(version: str, function: str) -> str:
    return json.loads(RECORDED.read_text(encoding="utf-8"))[version][function]


def signature(parameters: str) -> inspect.Signature:
    (node,) = ast.parse(f"def function({parameters}): ...").body
    assert isinstance(node, ast.FunctionDef)
    names, defaults = [one.arg for one in node.args.args], [ast.literal_eval(one) for one in node.args.defaults]
    defaults = [inspect.Parameter.empty] * (len(names) - len(defaults)) + defaults
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    pairs = zip(names, defaults, strict=True)
    return inspect.Signature([inspect.Parameter(name, either, default=default) for name, default in pairs])


class StandIn(ModuleType):
    """A version's module; `calls` are the arguments of the calls so far, defaults included."""

    def __init__(self, version: str, card: int) -> None:
        (self.package, self.version), self.card = version.split(), card
        super().__init__(MODULES[self.package])
        self.calls: list[dict[str, Any]] = []
        for name in FUNCTIONS:
            setattr(self, name, self._function(signature(recorded(version, name))))

    def _function(self, declared: inspect.Signature) -> Any:
        def function(*positional: Any, **keywords: Any) -> Any:
            given = declared.bind(*positional, **keywords)
            given.apply_defaults()
            self.calls.append(dict(given.arguments))
            return self._attend(given.arguments)

        function.__signature__ = declared  # type: ignore[attr-defined]
        return function

    def _attend(self, given: dict[str, Any]) -> Any:
        q, k, v = (given[name] for name in "qkv")
        self._check(q, k, v, given)
        q_starts, k_starts = ([] if given.get(name) is None else given[name].tolist() for name in _STARTS)
        if self.package == "flash-attn-2":
            given = self._as_two_reads(given, q, k, q_starts)
        if not q_starts:
            out, lse = zip(*(self._one(*x, given) for x in zip(q, k, v, strict=True)), strict=True)
            out, lse = torch.stack(out), torch.stack(lse)
        else:
            out, lse = self._packed(q, k, v, q_starts, k_starts, given)
        out = _with_hook(out, _assert_aligned).view_as(out)  # behind the hook of whoever gets it
        if self.package == "flash-attn-4":
            wanted = given["return_lse"] or any(x.requires_grad for x in (q, k, v))
            return out, (lse if given["return_lse"] else lse.detach()) if wanted else None
        _with_hook(lse, torch.zeros_like)  # FlashAttention 2 and 3 drop its gradient without a word
        if not given.get("return_attn_probs"):
            return out
        return (out, lse, None) if self.package == "flash-attn-2" else (out, lse)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> None:
        """Check as the libraries do, and the alignment of vector loads, which they trust in."""
        for x in (q, k, v):
            assert x.dtype in (torch.float16, torch.bfloat16)
            assert x.dtype == q.dtype
            _assert_aligned(x)
        dims = q.shape[-1], v.shape[-1]
        assert all(dim % 8 == 0 and 8 <= dim <= 256 for dim in dims)
        unequal = (192, 128) if self.package != "flash-attn-2" else None
        assert dims[0] == dims[1] or dims == unequal, dims
        if self.package == "flash-attn-4":
            self._check_four(q, k, v, given)
        if given["deterministic"] and any(x.requires_grad for x in (q, k, v)):
            assert (self.package, self.card) != ("flash-attn-4", 12)
            assert self.package != "flash-attn-3" or max(dims) <= 192
        assert q.shape[-2] % k.shape[-2] == 0
        assert isinstance(given["softmax_scale"], float)
        assert given["softmax_scale"] > 0
        assert given["causal"] in (True, False)
        assert isinstance(given["window_size"], tuple)
        for side in given["window_size"]:
            assert side is None if self.package == "flash-attn-4" and side is None else -1 <= side < 2**31
        assert self.package != "flash-attn-4" or -1 not in given["window_size"]
        assert "cu_seqlens_q" not in given or given["cu_seqlens_q"].numel() > 1, "batch size must be positive"
        for side in "qk" if "cu_seqlens_q" in given else "":
            starts, longest = given[f"cu_seqlens_{side}"], given[f"max_seqlen_{side}"]
            assert starts.dtype == torch.int32
            assert starts.is_contiguous()
            assert isinstance(longest, int)
            assert longest >= starts.diff().max()

    def _check_four(self, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> None:
        """Check as 4.0.0b36 asserts by card, and at 12 that tiles fit in its shared memory."""
        dims, (left, right) = (q.shape[-1], v.shape[-1]), given["window_size"]
        softcap, sink = given["softcap"], given["learnable_sink"]
        has_graph = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sink))
        if self.card == 9:
            assert not has_graph or dims[0] == dims[1] or q.shape[-2] == k.shape[-2]
        elif self.card == 12:
            assert max(dims) <= 128
            assert sink is None
            assert not (has_graph and softcap)
        else:
            assert max(dims) <= 128 or dims in ((192, 128), (256, 256)), dims
            if has_graph and dims == (256, 256):
                assert left is None
                assert right is None or given["causal"]
                assert not softcap
                assert sink is None

    def _as_two_reads(self, given: dict[str, Any], q: Tensor, k: Tensor, q_starts: list) -> dict[str, Any]:
        """The arguments as csrc/flash_attn/flash_api.cpp changes them."""
        k_len = given.get("max_seqlen_k", k.shape[1])
        left, right = (-1 if side >= k_len else side for side in given["window_size"])
        if given["causal"]:
            right = 0
        if left < 0 <= right:
            left = k_len
        if right < 0 <= left:
            right = k_len
        if given.get("max_seqlen_q") == 1 and q.shape[-2] > k.shape[-2] and left < 0 and right <= 0:
            assert q_starts == list(range(q.shape[0] + 1))  # rows are taken for sequences
        softcap = 0.0 if self.card == 0 else given["softcap"]  # csrc/flash_attn_ck does not read it
        return given | {"window_size": (left, right), "softcap": softcap, "causal": False}

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, q_starts: list, k_starts: list, given: Any) -> Any:
        """As the libraries, with NaN for what they leave unwritten: results and gradients of no sequence."""
        q, k, v = (_unwritten(x, starts[-1]) for x, starts in ((q, q_starts), (k, k_starts), (v, k_starts)))
        outs, lses = [], []
        for rows, end, keys, k_end in zip(q_starts, q_starts[1:], k_starts, k_starts[1:], strict=False):
            loaded = slice(keys, k_end if self.package == "flash-attn-2" else k_end + 8)  # 3 and 4 load whole tiles
            out, lse = self._one(q[rows:end], k[loaded], v[loaded], given, k_end - keys)
            outs.append(out)
            lses.append(lse)
        tail = q.shape[0] - q_starts[-1]
        outs.append(v.new_full((tail, q.shape[1], v.shape[2]), torch.nan))
        lses.append(torch.full((q.shape[1], tail), torch.nan))
        return torch.cat(outs), torch.cat(lses, -1)

    def _one(
        self, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any], k_len: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """out [S, H, Dv] and lse [H, S] of a sequence of k_len keys; logits in fp32, P rounded, as in the kernels.

        Other keys are loaded and masked: NaN there passes on.
        """
        q_len, group = q.shape[0], q.shape[1] // k.shape[1]
        k_len = k.shape[0] if k_len is None else k_len
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        logits = given["softmax_scale"] * torch.einsum("ihd,jhd->hij", q.float(), k.float())
        if given.get("softcap"):
            logits = given["softcap"] * (logits / given["softcap"]).tanh()
        left, right = (None if side in (None, -1) else side for side in given["window_size"])
        key = torch.arange(k.shape[0])
        distance = key - (torch.arange(q_len)[:, None] + k_len - q_len)
        right = 0 if given["causal"] else right
        visible = (key < k_len).expand(q_len, -1).clone()
        visible &= True if right is None else distance <= right
        visible &= True if left is None else distance >= -left
        sink, empty = given.get("learnable_sink"), ~visible.any(-1)
        logits = torch.where(visible, logits, -torch.inf)
        columns = logits if sink is None else torch.cat([logits, sink[:, None, None].expand(-1, q_len, 1)], -1)
        columns = (
            torch.where(empty[:, None], 0, columns) if columns.shape[-1] else columns.new_zeros(*columns.shape[:2], 1)
        )
        lse = columns.logsumexp(-1)
        p = torch.where(visible, (logits - lse[..., None]).exp(), 0).to(v.dtype)
        out = torch.einsum("hij,jhd->ihd", p.float(), v.float()).to(q.dtype)
        nothing = torch.inf if self.package == "flash-attn-2" else -torch.inf
        return out, torch.where(empty, nothing, lse)


def _unwritten(x: Tensor, end: int) -> Tensor:
    """x, whose gradient is NaN from row `end` on."""

    def spoiled(d: Tensor) -> Tensor:
        return torch.cat([d[:end], torch.full_like(d[end:], torch.nan)])

    return _with_hook(x.view_as(x), spoiled)


def _assert_aligned(d: Tensor) -> None:
    """Rows lie in 16 aligned bytes, which the libraries trust in."""
    assert d.stride(-1) == 1
    assert not any(n % 8 for n in (d.storage_offset(), *d.stride()[:-1]))


def _with_hook(x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Tensor:
    """x, whose gradient goes through a hook where it has one."""
    if x.requires_grad:
        x.register_hook(hook)
    return x


def install(monkeypatch: pytest.MonkeyPatch, *versions: str, card: int | None = None) -> list[StandIn]:
    """Put stand-ins for all libraries, on a card for the first; CPU tensors then lie on that card."""
    card = VERSIONS[versions[0]] if card is None and versions else card
    modules = [StandIn(version, cast(int, card)) for version in versions]
    for name, module in MODULES.items():
        found = next((one for one in modules if one.package == name), None)
        monkeypatch.setitem(sys.modules, module, cast(ModuleType, found))  # None raises ImportError
    if any(one.package == "flash-attn-4" and one.version < FIRST_FOUR for one in modules):
        monkeypatch.setitem(sys.modules, libraries.OF_OLD_FOUR, ModuleType(libraries.OF_OLD_FOUR))
    cached = libraries.libraries.__wrapped__
    monkeypatch.setattr(run, "libraries", cached)
    monkeypatch.setattr(run, "card_of", lambda device: card)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    return modules


def assert_close(
    tensors: dict[str, Tensor], attend: Callable[..., Any], summands: float = 0.0, slack: float = 1.0, **arguments: Any
) -> None:
    """Results and all gradients: within twice the eager error, and four roundings of folded operands, times `slack`."""
    dtype = tensors["q"].dtype
    found, exact, eager = harness.ours_exact_eager(tensors, attend, backend="flash", **arguments)
    for name, result in found.items():
        hidden = exact[name].isneginf()
        assert torch.equal(result.isneginf(), hidden), name
        ours, wanted, narrow = (x.masked_fill(hidden, 0).double() for x in (result, exact[name], eager[name]))
        scale = max(wanted.abs().max().item(), summands)
        allowed = slack * (allowed_error(wanted, narrow, dtype) + 4 * torch.finfo(dtype).eps * scale)
        error = (ours - wanted).abs().max().item()
        assert error <= allowed, f"{name}: expected an error of at most {allowed:.3e}, got {error:.3e}"
        assert result.dtype == eager[name].dtype, name


if __name__ == "__main__":
    name, version, file = sys.argv[1:]
    known = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    known[f"{name} {version}"] = signatures_of(Path(file).read_text(encoding="utf-8"))
    RECORDED.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")
