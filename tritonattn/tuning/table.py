"""Tables of tuned configs: what a file says, how it is checked, read and written. Data; nothing in it is executed."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..core import records
from .config import (
    FIRST_KERNELS,
    OPTIONAL_FIELDS,
    OPTIONS,
    SECOND_KERNELS,
    TILED_KERNELS,
    WIDEST,
    WIDEST_KEYS,
    WRITTEN_IN,
    Problem,
    Target,
    TileConfig,
    holds_more,
)
from .fingerprint import gluon_fingerprint, kernels_fingerprint

Content = TypeVar("Content")

SCHEMA_VERSION = 1
HEAD_DIMS = (40, 64, 72, 80, 88, 96, 128, 192, 256)
# Head dims that a model ranks. Other common ones, no multiples of 16 (Stable Diffusion's 40, SigLIP's and DiT's
# 72, ViT-g's 88) have the code of the width they pad to but for a mask's bound, so only a card may tell them apart.
RANKED_HEAD_DIMS = tuple(dim for dim in HEAD_DIMS if dim % 16 == 0)
# Passes with derivatives beyond the first have one of each padded width.
_PADDED_HEAD_DIMS = (64, 128, 256)
# Scales of a call by kernel; "gradient" is the query scale's gradient, which grad_query sums. Beside 5 to 10 products a
# query scale hardly counts.
_SCALES = ("none", "query", "query+key")
SCALES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FIRST_KERNELS, _SCALES),
    "grad_query": ("none", "query", "query+gradient", "query+key+gradient"),
    **dict.fromkeys(SECOND_KERNELS, _SCALES[1:]),
}
LENGTHS = ("short", "long")
SOURCES = ("static", "measured")
_LARGEST_FILE = 2**22
_LONGEST_MESSAGE = 300
# The fields of a config that are not int.
_TYPES = {"descriptors": bool, "warp_specialize": bool, "kernel": str}
# Upper limits of a config's numbers (the lower is 1, of OPTIONS 0), so that no later arithmetic meets a hostile one.
_MOST = {
    "block_m": 1024,
    "block_n": 1024,
    "num_warps": 32,
    "num_stages": 16,
    "l2_percent": 10_000,
    "split_blocks": 1024,
    "waves_per_eu": 8,
}


class TableError(ValueError):
    """A table that cannot be used; the message names the file and says why."""


class Key(NamedTuple):
    """The 16-bit calls that an entry serves: max(D, Dv) is at most head_dim, and pads to the same tile.

    A head_dim that is not a multiple of 16 serves max(D, Dv) = head_dim alone.
    """

    kernel: str
    head_dim: int
    scales: str
    lengths: str

    def __str__(self) -> str:
        return "/".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Key:
        """The key that prints as this; raises ValueError."""
        kernel, head_dim, scales, lengths = text.split("/")
        if kernel not in SCALES or scales not in SCALES[kernel] or lengths not in LENGTHS:
            raise ValueError(text)
        if head_dim not in map(str, _dims_of(kernel)):
            raise ValueError(text)
        return cls(kernel, int(head_dim), scales, lengths)

    @property
    def problem(self) -> Problem:
        """The call of this key that is gated and timed: causal; of training, or a decode of grouped heads."""
        dim, right = self.head_dim, self.kernel != "decode"
        return Problem(
            dim,
            dim,
            torch.bfloat16,
            right=right,
            short=self.lengths == "short",
            query_scale="query" in self.scales,
            key_scale="key" in self.scales,
            query_scale_grad="gradient" in self.scales,
            grouped=self.kernel == "decode",
            rounding=self.kernel in ("forward", *SECOND_KERNELS),
        )


def keys(kernels: tuple[str, ...] = TILED_KERNELS, head_dims: tuple[int, ...] = HEAD_DIMS) -> Iterator[Key]:
    """The keys of a table."""
    for kernel in kernels:
        for head_dim in (dim for dim in _dims_of(kernel) if dim in head_dims):
            yield from (Key(kernel, head_dim, scales, lengths) for scales in SCALES[kernel] for lengths in LENGTHS)


def _dims_of(kernel: str) -> tuple[int, ...]:
    """The head dims that keys of a kernel have."""
    return _PADDED_HEAD_DIMS if kernel in SECOND_KERNELS else HEAD_DIMS


class Exact(NamedTuple):
    """The calls of one `Problem`, as a search finds them for a program's calls; of 16 bits, not `invariant`."""

    kernel: str
    problem: Problem

    def __str__(self) -> str:
        """Kernel, dims and dtype, then the fields that differ from a bare call's."""
        problem, named = self.problem, []
        for field in fields(Problem):
            value = getattr(problem, field.name)
            if field.default is not MISSING and value != field.default:
                named.append(field.name if value is True else f"{field.name}={value}")
        dtype = str(problem.dtype).removeprefix("torch.")
        return f"{self.kernel}/{problem.head_dim}/{problem.value_dim}/{dtype}/{'+'.join(named) or 'plain'}"

    @classmethod
    def parse(cls, text: Any) -> Exact:
        """The one that prints as this; raises ValueError."""
        try:
            kernel, head_dim, value_dim, dtype, named = text.split("/")
            given: dict[str, Any] = {} if named == "plain" else dict(map(_option, named.split("+")))
            problem = Problem(int(head_dim), int(value_dim), _DTYPES[dtype], **given)
            found = cls(kernel, problem)
            dims = (problem.head_dim, problem.value_dim, problem.packed_rows)
            is_sound = kernel in TILED_KERNELS and is_searched(problem) and str(found) == text
            if is_sound and all(1 <= x <= most for x, most in zip(dims, _MOST_DIMS, strict=True)):
                return found
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        raise ValueError(f"expected kernel/head_dim/value_dim/dtype/options, got {shown(text)}")


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_MOST_DIMS = (WIDEST_KEYS, WIDEST, 2**16)  # head and value dims, packed rows


EntryKey = Key | Exact


def _option(text: str) -> tuple[str, bool | int]:
    """Parse the name and the value of an option of `Exact`."""
    name, _, value = text.partition("=")
    return name, int(value[:9]) if name == "packed_rows" else value != "False"


def is_searched(problem: Problem) -> bool:
    """True where tables may hold entries for a problem: of 16 bits, not `invariant`."""
    return problem.dtype in _DTYPES.values() and not problem.invariant


def keys_of(kernel: str, problem: Problem, target: Target) -> tuple[Key, ...]:
    """The keys of the entries that serve a call, the padded width's last; none: tables leave it out.

    Tables leave out fp32, head dims above 256, memory-bound kernels, and calls that take more registers: a mask,
    dropout, decoding with many rows or from pages, and of derivatives beyond the first what `holds_more`. A head dim
    that is not a multiple of 16 may also take the entry of its padded width, except above 128 and, on AMD, with a key
    scale, where some of these would spill.
    """
    is_heavy = problem.mask or problem.dropout or problem.block_table or problem.packed_rows > 16
    is_heavy |= kernel in SECOND_KERNELS and holds_more(problem)
    if problem.dtype.itemsize != 2 or kernel not in TILED_KERNELS or is_heavy:
        return ()
    wider = max(problem.head_dim, problem.value_dim)
    known = _dims_of(kernel)
    dims = [dim for dim in RANKED_HEAD_DIMS if dim in known and dim >= wider][:1]
    if problem.head_dim % 16 or problem.value_dim % 16:
        fits = problem.width <= 128 and not (problem.key_scale and target.backend == "hip")
        padded = max(64, problem.width) if fits else None
        dims = [dim for dim in known if (dim % 16 and dim == wider) or dim == padded]
    return tuple(Key(kernel, dim, _scales(kernel, problem), LENGTHS[not problem.short]) for dim in dims)


def _scales(kernel: str, problem: Problem) -> str:
    """The scales of a call as keys name them; where several would do, the one with more scales and gradients."""
    if kernel == "grad_query" and (problem.query_scale_grad or problem.key_scale):
        return SCALES[kernel][2 + problem.key_scale]
    found = _SCALES[1 + problem.key_scale if problem.query_scale or problem.key_scale else 0]
    return found if found in SCALES[kernel] else SCALES[kernel][0]


@dataclass(frozen=True)
class Entry:
    """A config and where it comes from.

    source    "static": it passed the gate and came first by the model; "measured": it was timed on the card
    details   for readers: registers, bytes, versions, milliseconds, runners-up
    """

    config: TileConfig
    source: str
    details: dict[str, Any]

    @property
    def triton(self) -> str:
        """The version that compiled it."""
        return str(self.details.get("triton", "unknown"))[:40]

    @property
    def is_of_these_kernels(self) -> bool:
        """False if the config names the kernel in Gluon, which has changed; the table answers for other kernels."""
        return self.config.kernel == "triton" or self.details.get("gluon") == gluon_fingerprint()

    def as_record(self) -> dict[str, Any]:
        return {"config": self.config.as_record(), "source": self.source, **self.details}


@dataclass(frozen=True)
class Table:
    """The entries for one GPU (its table_name), made for kernels of one fingerprint.

    faster   the library of backend "flash" that a measurement on this card found faster than the kernels, or ""
    """

    gpu: str
    target: Target
    kernels: str
    entries: dict[EntryKey, Entry]
    faster: str = ""

    @property
    def is_of_these_kernels(self) -> bool:
        return self.kernels == kernels_fingerprint()

    def text(self) -> str:
        """The file's content; the same table is the same bytes, entries of single problems last."""
        record = {"schema_version": SCHEMA_VERSION, "gpu": self.gpu, "target": self.target.name}
        record |= {"kernels": self.kernels} | ({"faster": self.faster} if self.faster else {})

        def order(key: EntryKey) -> tuple:
            is_exact = isinstance(key, Exact)
            return is_exact, TILED_KERNELS.index(key.kernel), *((str(key),) if is_exact else key[1:])

        entries = {str(key): self.entries[key].as_record() for key in sorted(self.entries, key=order)}
        return json.dumps({**record, "entries": entries}, indent=1) + "\n"


def read_table(path: Path) -> Table:
    """The table in a file. Raises TableError for a file that is not a table of this schema; FileNotFoundError."""
    return parsed_file(path, _parse)


def parsed_file(path: Path, parse: Callable[[Any], Content]) -> Content:
    """Parse a file's JSON by `parse`, which may raise ValueError. Raises TableError, FileNotFoundError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait
            raise ValueError("expected a regular file, got a directory, a pipe or a device")
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"expected at most {_LARGEST_FILE} bytes, got more")
        return parse(json.loads(content.decode("utf-8"), object_pairs_hook=_object))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(f"{path}: {str(error)[:_LONGEST_MESSAGE]}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises where a name is repeated, since a reader would get only one value."""
    if pairs:
        [(name, count)] = Counter(name for name, _ in pairs).most_common(1)
        if count > 1:
            raise ValueError(f"expected each name once, got {shown(name)} {count} times")
    return dict(pairs)


def _parse(record: Any) -> Table:
    """Check and convert the content of a table's file. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    version = record.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ValueError(f"schema_version: expected {SCHEMA_VERSION}, got {shown(version)}")
    gpu, target, kernels = (_typed(name, record.get(name), str) for name in ("gpu", "target", "kernels"))
    found = _typed("entries", record.get("entries"), dict)
    entries = {_key(text): _entry(text, entry) for text, entry in found.items()}
    return Table(gpu, Target.parse(target), kernels, entries, _typed("faster", record.get("faster", ""), str))


def _typed(name: str, value: Any, wanted: type) -> Any:
    """The value, if it is of the very type: True is no int here. Raises ValueError."""
    if type(value) is not wanted:
        raise ValueError(f"{name}: expected {wanted.__name__}, got {shown(value)}")
    return value


def _key(text: str) -> EntryKey:
    for form in (Key, Exact):
        with suppress(ValueError):
            return form.parse(text)
    forms = "kernel/head_dim/scales/lengths or kernel/head_dim/value_dim/dtype/options"
    raise ValueError(f"entries: expected {forms}, got {shown(text)}")


def _entry(key: str, record: Any) -> Entry:
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{key}: expected an object with a config, got {shown(record)}")
    config, source = record["config"], record.get("source")
    if source not in SOURCES:
        raise ValueError(f"{key}: source: expected one of {', '.join(SOURCES)}, got {shown(source)}")
    names = {field.name for field in fields(TileConfig)}
    if set(config) | set(OPTIONAL_FIELDS) != names:
        raise ValueError(f"{key}: config: expected {', '.join(sorted(names))}, got {shown(sorted(config))}")
    for name, value in config.items():
        _typed(f"{key}: {name}", value, _TYPES.get(name, int))
        least = int(name not in OPTIONS)
        if name in _MOST and not least <= value <= _MOST[name]:
            raise ValueError(f"{key}: {name}: expected {least} to {_MOST[name]}, got {shown(value)}")
        if name == "kernel" and value not in WRITTEN_IN:
            raise ValueError(f"{key}: {name}: expected one of {', '.join(WRITTEN_IN)}, got {shown(value)}")
    details = {name: value for name, value in record.items() if name not in ("config", "source")}
    return Entry(TileConfig(**config), source, details)


def shown(value: Any) -> str:
    """A value of a file in a message, short and on one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_table(path: Path, table: Table | Callable[[], Table]) -> Table:
    """Replace a file, as `records.write` does, in a folder that it makes; a function may read the file and add to it.

    Returns the table.
    """
    written = []

    def text() -> str:
        written.append(table() if callable(table) else table)
        return written[0].text()

    path.parent.mkdir(parents=True, exist_ok=True)
    records.write(path, text)
    return written[0]
