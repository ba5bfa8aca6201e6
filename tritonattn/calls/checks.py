"""Check the arguments of a call, here and nowhere else, and make of them what they stand for.

Shapes, dtypes and devices always; values of CPU tensors too, except while compiling or under a transform.
Values of device tensors are never read: there backends clamp them. Every error names the argument, the
expectation and the value: TypeError for types and dtypes, ValueError for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core.autograd import autocast_is_on
from ..core.call import Request
from ..core.eight_bit import EIGHT_BIT
from ..core.hints import nearest, type_of
from ..core.invariance import switch
from ..core.row_terms import is_counted_from_rows, sinks_beside
from ..core.terms import DEFAULTS, OF_SCALING, TABLES, TERMS, Term, Terms
from ..core.torch_distributed import unshard
from ..core.visibility import Visibility
from ..scaling import Given, Scaling
from ..scaling.names import named_scaling, refuse_scaling
from .layouts import BATCHED, CACHE, SMALLEST_PAGE, Layout, names_of

Backend = Literal["auto", "triton", "flash", "sdpa", "reference"]
BACKENDS = get_args(Backend)

_LARGEST = torch.finfo(torch.float32).max * math.log(2)  # numbers act in float32, times log2(e)
_SMALLEST = torch.finfo(torch.float32).tiny
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_WORDS = {
    FLOATS: "float16, bfloat16, float32 or float64",
    INTEGERS: "an integer dtype",
    (torch.int32,): "dtype torch.int32",
}


_HINT_OF_EIGHT_BIT = (
    f"; {EIGHT_BIT} is for the cache of attention_decode, and of attention_varlen with a block_table, without gradients"
)


def operands(q: Tensor, k: Tensor, v: Tensor, layout: Layout = BATCHED) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, in the dtype of torch.autocast where it is on.

    Raises TypeError or ValueError unless they belong to one call, each in its layout.
    """
    if isinstance(q, Tensor) and autocast_is_on(q):
        q, k, v = _in_autocast(q, k, v)
    names, given = layout.names, (q, k, v)
    for name, x, axes, count in zip(names, given, layout.axes, layout.counts, strict=True):
        # Not always by `check_tensor`: tiny calls spend a third of their checks in its frames.
        if not (isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested and x.dim() == count):
            check_tensor(name, x, axes)
            raise ValueError(f"{name}: expected {count} axes {axes}, got {x.dim()} in {shape_of(x)}")
    if q.dtype not in FLOATS:
        raise TypeError(f"q: expected {_WORDS[FLOATS]}, got {q.dtype}")
    if not q.dtype == k.dtype == v.dtype and not (layout.cached and k.dtype == v.dtype == EIGHT_BIT):
        of_cache = f", or {EIGHT_BIT} of k and v" if layout.cached else ""
        hint = "" if layout.cached or k.dtype.itemsize > 1 else _HINT_OF_EIGHT_BIT
        got = f"{q.dtype}, {k.dtype}, {v.dtype}{hint}"
        raise TypeError(f"{', '.join(names)}: expected one dtype{of_cache}, got {got}")
    if not q.device == k.device == v.device:
        raise ValueError(f"{', '.join(names)}: expected one device, got {q.device}, {k.device}, {v.device}")
    shapes = q.shape, k.shape, v.shape
    for tensor, axis, other, other_axis in layout.shared:
        if shapes[tensor][axis] != shapes[other][other_axis]:
            axes, letter = layout.axes[tensor], names_of(layout.axes[tensor])[axis]
            wanted = f"{axes} with {names[other]}'s {letter} = {shapes[other][other_axis]}"
            raise ValueError(f"{names[tensor]}: expected {wanted}, got {shape_of(given[tensor])}")
    q_heads, kv_heads = q.shape[1], k.shape[layout.heads]
    fits = kv_heads > 0 and q_heads % kv_heads == 0 and (q_heads > 0 or layout.names != CACHE.names)
    if q_heads != kv_heads and not fits:
        hint = layout.hint_of_order(q, k)
        raise ValueError(f"{names[1]}: expected a number of heads that divides q's {q_heads}, got {kv_heads}{hint}")
    if layout.heads == 2 and k.shape[1] < SMALLEST_PAGE:
        hint = layout.hint_of_order(q, k)
        raise ValueError(f"{names[1]}: expected pages of at least {SMALLEST_PAGE} keys, got {k.shape[1]}{hint}")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        got = f"{q.shape[-1]} in q and {v.shape[-1]} in {names[2]}"
        raise ValueError(f"q, {names[2]}: expected head_dim of at least 1, got {got}")
    return q, k, v


def _in_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype of torch.autocast, which is on; float64 stays, as in torch's operators."""
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.dtype in FLOATS and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return cast(q), cast(k), cast(v)


def check(request: Request, rows: str = "[B, Hq, Sq]", keys: str = "[B, Hq or Hkv, Sk]") -> Request:
    """The request, with names, and numbers of other types, replaced by the options that they stand for.

    rows, keys   the last axes of a call's rows and keys, to which a scaling or gain, and key_bias, broadcast

    Raises TypeError or ValueError unless its scaling and options belong to its operands.
    """
    q, k, v, visible, terms, scaling, gain, dropout_p, aux, backend, block_table, cached, statistics, *descales = (
        request
    )
    if aux is not False:
        check_bool("return_aux", aux)
    if not (isinstance(backend, str) and backend in BACKENDS and type(dropout_p) is float and dropout_p == 0):
        check_settings(backend, dropout_p)
    if not isinstance(dropout_p, float):
        dropout_p = as_float(dropout_p)
    if cached and dropout_p > 0:
        raise NotImplementedError(f"dropout_p: expected 0 with a block_table, got {dropout_p}")
    for number, default, _ in _GIVEN:
        if terms[number] is not default:
            terms = _checked_terms(terms, q, visible, rows, keys)
            break
    if isinstance(scaling, str):
        scaling = named_scaling(scaling)
    elif not isinstance(scaling, Scaling):
        scaling = _given(scaling, q, _last(visible.rows, rows), rows)
    elif isinstance(scaling, torch.nn.Module):
        unshard(scaling)
    if isinstance(gain, Tensor):
        check_factor("gain", gain, q, _last(visible.rows, rows), rows)
        gain = gain.to(scale_dtype(q))
    elif gain is not None:
        check_number("gain", gain)
        gain = as_float(gain)
    options = terms, scaling, gain, dropout_p, aux, backend
    return Request(q, k, v, visible, *options, block_table, cached, statistics, *descales)


def _last(shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
    """The sizes of the named axes."""
    return shape[-1 - axes.count(",") :]


def _given(scaling: Any, q: Tensor, shape: tuple[int, ...], axes: str) -> Scaling:
    """The scaling that a tensor or a number is."""
    if isinstance(scaling, Tensor):
        check_factor("scaling", scaling, q, shape, axes)
        return Given(1.0, scaling.to(scale_dtype(q)))
    if isinstance(scaling, bool) or not isinstance(scaling, Real):
        refuse_scaling(scaling)
    check_number("scaling", scaling)
    return Given(as_float(scaling))


def scale_dtype(q: Tensor) -> torch.dtype:
    """The dtype of scales, gains and sinks: float32, float64 for float64 q."""
    return torch.promote_types(q.dtype, torch.float32)


def check_factor(name: str, factor: Any, q: Tensor, shape: tuple[int, ...], axes: str) -> None:
    """Raise unless a factor of the logits is a floating tensor on q's device that broadcasts to `shape`."""
    check_tensor(name, factor, axes, FLOATS, q)
    if factor.dim() == 1 and factor.shape[0] != 1:
        raise ValueError(
            f"{name}: expected a shape that says its axis, [H, 1] for one value per head or [1, S] for one per"
            f" position, got the 1-D {shape_of(factor)}"
        )
    if not broadcasts(factor.shape, shape):
        raise ValueError(f"{name}: expected a shape broadcastable to {axes} = {list(shape)}, got {shape_of(factor)}")


def check_key_bias(name: str, bias: Any, q: Tensor, keys: tuple[int, ...], axes: str) -> None:
    """Raise unless a bias is as `check_factor` says, with a row per query head or a row per key head.

    q      the heads are its axis 1
    keys   what a factor per key broadcasts to: [..., Hkv, Sk]
    """
    check_tensor(name, bias, axes)
    *batch, kv_heads, k_len = keys
    heads = kv_heads if bias.dim() > 1 and bias.shape[-2] == kv_heads else q.shape[1]
    check_factor(name, bias, q, (*batch, heads, k_len), axes)


def _checked_terms(terms: Terms, q: Tensor, visible: Visibility, rows: str, keys: str) -> Terms:
    """The terms as of `check`, biases of pairs with four axes and sinks of all rows."""
    values: list[Any] = [*terms]
    for number, default, term in _GIVEN:
        if values[number] is not default:
            values[number] = _checked(term, values[number], q, visible, rows, keys)
    terms = Terms(*values)
    tables = [x for name in TABLES if (x := getattr(terms, name)) is not None]
    for table in tables:
        check_right("relative_right", terms.relative_right, table)
    if terms.relative_right and not tables:
        raise ValueError(f"relative_right: expected 0 without relative_bias, got {terms.relative_right}")
    if terms.key_bias is None or (terms.sinks is None and terms.softcap is None):
        return terms
    sinks = sinks_beside(terms.key_bias, terms, visible)
    return terms if sinks is terms.sinks else terms.changed(sinks=sinks)


# The terms that users give: their numbers, defaults and rows.
_GIVEN = [(i, DEFAULTS[i], term) for i, term in enumerate(TERMS) if term.name not in OF_SCALING]


def _checked(term: Term, value: Any, q: Tensor, visible: Visibility, rows: str, keys: str) -> Any:
    """The value of a row of `TERMS` as a request holds it; rows and keys as of `check`."""
    name = term.name
    if term.form == "vector":
        if term.axes[-1] != "Sk":
            return _of_rows(name, value, q, visible.rows, rows)
        sizes = _last(visible.keys, keys)
        check_key_bias(name, value, q, sizes, keys)
        if len(sizes) == 3 and value.shape[0] == visible.batch and not is_counted_from_rows(value):
            refuse_unclear(name, value, "Sk")
    elif term.form == "pairs":
        if term.axes[-1] == "Sk":
            return _pairs(name, value, q, (*visible.rows, visible.k_len))
        return _table(name, value, q, _last(visible.rows, rows), rows)
    elif term.form == "flag":
        check_bool(name, value)
    elif name == "softcap":
        check_softcap(name, value)
        return as_float(value)
    else:
        check_count(name, value)
    return value


def _of_rows(name: str, x: Any, q: Tensor, shape: tuple[int, ...], axes: str) -> Tensor:
    """A vector of rows as backends take it, [B, Hq, Sq]: [Hq], or one that broadcasts to axes, the last of `shape`."""
    check_tensor(name, x, f"[Hq] or {axes}", FLOATS, q)
    of_rows = x[:, None] if x.shape == shape[1:2] else x
    if of_rows.dim() < 2 or not broadcasts(of_rows.shape, _last(shape, axes)):
        wanted = f"[Hq] = {[shape[1]]} or one broadcastable to {axes} = {list(_last(shape, axes))}"
        raise ValueError(f"{name}: expected a shape {wanted}, got {shape_of(x)}")
    return of_rows.to(scale_dtype(q)).expand(shape)


def refuse_unclear(name: str, x: Tensor, axes: str) -> None:
    """Raise for [n, *axes] with n above 1, which may be one entry a sequence or one a head."""
    if x.dim() == axes.count(",") + 2 and x.shape[0] > 1:
        wanted = f"{name}[:, None] for [B, 1, {axes}], {name}[None] for [1, H, {axes}]"
        raise ValueError(f"{name}: expected an axis of sequences and one of heads, got {shape_of(x)}; write {wanted}")


def _pairs(name: str, x: Any, q: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Numbers of pairs as backends take them, of four axes."""
    check_tensor(name, x, "[B, Hq, Sq, Sk]")
    refuse_unclear(name, x, "Sq, Sk")
    x = x[None] if x.dim() == 1 else x
    check_factor(name, x, q, shape, "[B, Hq, Sq, Sk]")
    return _narrowed(x[(None,) * (4 - x.dim())], q)


def table_of(
    name: str, table: Any, name_of_right: str, right: Any, q: Tensor, rows: tuple[int, ...], axes: str
) -> Tensor:
    """A table by distance as backends take it, of four axes. Raises unless it is one of rows of these axes."""
    table = _table(name, table, q, rows, axes)
    check_count(name_of_right, right)
    check_right(name_of_right, right, table)
    return table


def check_right(name: str, right: int, table: Tensor) -> None:
    if not right < table.shape[-1]:
        raise ValueError(f"{name}: expected less than the extent, {table.shape[-1]}, got {right}")


def _table(name: str, table: Any, q: Tensor, rows: tuple[int, ...], axes: str) -> Tensor:
    """Numbers of distances as backends take them, of four axes, of rows of these axes: packed ones have no batch."""
    axes = axes.removesuffix("]") + ", extent]"
    check_tensor(name, table, axes)
    if table.dim() != axes.count(",") + 1:
        raise ValueError(f"{name}: expected {axes}, each axis but the last of full size or 1, got {shape_of(table)}")
    extent = table.shape[-1]
    check_factor(name, table, q, (*rows, extent), axes)
    if extent == 0:
        raise ValueError(f"{name}: expected an extent of at least 1, got 0")
    return _narrowed(table if table.dim() == 4 else table[None], q)


def _narrowed(bias: Tensor, q: Tensor) -> Tensor:
    """A bias as backends take it: in 64 bits only for such q."""
    return bias.float() if bias.dtype == torch.float64 != q.dtype else bias


def as_float(number: Any) -> Any:
    """A checked number as kernels take it: an int, or a number of numpy, is another type to them."""
    return number if isinstance(number, (float, torch.SymInt, torch.SymFloat)) else float(number)


def check_number(name: str, value: Any) -> None:
    """Raise unless value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (*_NUMBERS, Real)):
        raise TypeError(f"{name}: expected a number, got {type_of(value)}")
    value = value if isinstance(value, _NUMBERS) else float(value)
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number, got {value!r} (the largest is {_LARGEST:.4g})")


def check_softcap(name: str, softcap: Any) -> None:
    check_number(name, softcap)
    if softcap < _SMALLEST:
        least = f"(the least is {_SMALLEST:.4g}; None is no softcap)"
        raise ValueError(f"{name}: expected a number above 0, got {softcap!r} {least}")


def check_settings(backend: Any, dropout_p: Any = 0.0) -> None:
    """Raise unless these are options of a call of any operands."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}{nearest(backend, BACKENDS)}")
    if not (type(dropout_p) is float and dropout_p == 0):
        check_number("dropout_p", dropout_p)
        if not 0 <= dropout_p < 1:
            raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p!r}")


def check_masks(causal: Any, window: Any, batch_invariant: bool | None) -> bool:
    """Raise unless these are masks of a call of any operands; return whether it is invariant."""
    if causal is not True and causal is not False:
        check_bool("causal", causal)
    if window is not None:
        check_window(window)
    if batch_invariant is None:
        return switch.is_on
    check_bool("batch_invariant", batch_invariant)
    return batch_invariant


def check_window(window: Any) -> None:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected (left, right), got {window!r}")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt))):
            raise TypeError(f"window: expected (left, right) of int or None, got {window!r}")
        if side is not None and side < -1:
            raise ValueError(f"window: expected sides of at least 0, or -1 or None for unlimited, got {window!r}")


def check_tensor(
    name: str,
    x: Any,
    axes: str,
    dtypes: tuple[torch.dtype, ...] = (),
    like: Tensor | None = None,
    owner: str = "q",
    sizes: tuple[int | None, ...] | None = None,
) -> None:
    """Raise unless x is a dense tensor, of one of these dtypes, on the device of `like`, and of these sizes.

    axes    the names of its axes, in errors
    like    a tensor of `owner`
    sizes   of each axis, None where any will do
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {axes}, got {type_of(x)}")
    if x.is_nested or x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor {axes}, got {type_of(x)} and layout {x.layout}")
    if dtypes and x.dtype not in dtypes:
        hint = f"; {name}.int() is" if dtypes == (torch.int32,) and x.dtype in INTEGERS else ""
        raise TypeError(f"{name}: expected {_WORDS[dtypes]}, got {x.dtype}{hint}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected {owner}'s device {like.device}, got {x.device}")
    if sizes is None:
        return
    fits = x.dim() == len(sizes)
    for size, wanted in zip(x.shape, sizes, strict=False):
        fits = fits and (wanted is None or size == wanted)
    if not fits:
        known = [letter if size is None else str(size) for letter, size in zip(names_of(axes), sizes, strict=True)]
        equal = "" if known == names_of(axes) else f" = [{', '.join(known)}]"
        raise ValueError(f"{name}: expected shape {axes}{equal}, got {shape_of(x)}")


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    if len(shape) > len(target):
        return False
    for size, wanted in zip(shape, target[len(target) - len(shape) :], strict=True):
        if size != 1 and size != wanted:  # `in` does not see symbolic sizes
            return False
    return True


def shape_of(x: Tensor) -> list[int]:
    return list(x.shape)


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Raise unless value is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type_of(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type_of(value)}")


def check_dtype(dtype: Any) -> None:
    """Raise unless dtype is one that attention takes, or None, which stands for torch's default."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: expected {_WORDS[FLOATS]}, got {dtype!r}")
