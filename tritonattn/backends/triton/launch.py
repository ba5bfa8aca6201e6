"""Plans and launches of kernels, and the executors that run or record them. Plain tensors; no policy."""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from ...core.terms import DEFAULTS, TERMS, Terms
from ...tuning import lookup
from ...tuning.config import (
    Problem,
    Target,
    TileConfig,
    key_sum_columns,
    legal_reasons,
    padded_dim,
    sum_columns,
)
from ...tuning.defaults import default_config
from ...tuning.order import LONGEST_AXIS
from .device import MOST_PROGRAMS, Grid, KernelArguments, NotCompiledError, Specialisation, grids_of, launch_on
from .interpreter import run_interpreted, tensors_of
from .records import Arguments

KERNELS: dict[str, Any] = {}  # by name: each file enters its kernels


class Variant(NamedTuple):
    """A kernel that stands in for another where a config asks for it: `TileConfig.kernel`.

    described   its descriptor of a tensor: from the tensor, its shape, its strides and the shape of a block
    rows        of the blocks of q, where its tiles have several
    """

    kernel: Any
    described: Callable[[Tensor, list[int], list[int], list[int]], Any]
    rows: int


# By name and `TileConfig.kernel`: functions that import a variant, which other versions of Triton may not have.
VARIANTS: dict[tuple[str, str], Callable[[], Variant]] = {}
ConfigFor = Callable[[str, Problem, Target], TileConfig]


def run_on_device(kernel: Any, grid: Grid, arguments: Mapping[str, Any], config: TileConfig) -> None:
    """Compile where needed and launch, on the device of the tensors."""
    device = device_of(arguments.values())
    compiled = launch_on(device, kernel, grid, arguments, config)
    if compiled is not None and compiled.n_spills:
        _hold_to_gate(kernel, arguments.specialisation.problem, device, config, compiled.n_spills)  # pyright: ignore[reportAttributeAccessIssue]


def _hold_to_gate(kernel: Any, problem: Problem, device: torch.device, config: TileConfig, spills: int) -> None:
    """Take another config from the next call on, where this one comes from another Triton and its code spills."""
    names = KERNELS | {name: kernel for name, language in VARIANTS if language == config.kernel}
    name = next((name for name, function in names.items() if function is kernel), "")
    if lookup.refuse_spills(name, problem, Target.of(device), config, spills):
        forget_plans()


def device_of(values: Iterable[Any]) -> torch.device:
    """The device of a kernel's arguments; tests on a stub of NVIDIA's driver put another function here."""
    return next(tensors_of(values)).device


config_for: ConfigFor = lookup.config_for

# Every kernel call passes `run`; a test may put another executor of the same signature here.
interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"
run: Callable[[Any, Grid, Mapping[str, Any], TileConfig], None] = run_interpreted if interpreting else run_on_device


def runs_on(device: torch.device) -> bool:
    """True where kernels can be run on tensors of this device: a GPU, or any where another executor stands in."""
    return device.type == "cuda" or run is not run_on_device


@dataclass(frozen=True, eq=False)
class Plan:
    """A kernel with its config and constexprs for one problem and target, and the names of its arguments.

    in_order      picks the arguments that a launch brings
    descriptors   names of those that the launch has to make
    absent        None for each descriptor, the first arguments, of a config without
    constants     the last arguments, by `Specialisation.wide`
    variant       the one that the kernel is of, or None
    """

    kernel: Callable
    config: TileConfig
    problem: Problem
    target: Target
    names: tuple[str, ...]
    in_order: Callable[[Arguments], tuple[Any, ...]]
    descriptors: tuple[str, ...]
    absent: tuple[None, ...]
    constants: tuple[tuple[Any, ...], ...]
    variant: Variant | None

    @classmethod
    def of(cls, kernel: str, config: TileConfig, problem: Problem, target: Target) -> Plan:
        variant = None if config.kernel == "triton" else VARIANTS[kernel, config.kernel]()
        function = KERNELS[kernel] if variant is None else variant.kernel
        names, constexprs = tuple(function.arg_names), constexpr_values(problem, config, target)
        described = tuple(name for name in names if name.endswith("_descriptor"))
        absent, described = ((), described) if config.descriptors else ((None,) * len(described), ())
        of_wide = (constexprs | {"WIDE": wide} for wide in (False, True))
        constants = [tuple(values[name] for name in names if name in values) for values in of_wide]
        in_order = operator.itemgetter(*(name for name in names[len(absent) :] if name not in constexprs))
        return cls(function, config, problem, target, names, in_order, described, absent, tuple(constants), variant)

    def launch(self, grid: Grid, available: Arguments, specialisation: Specialisation | None = None) -> None:
        """Run with the kernel's arguments out of those available, in its order.

        grid             programs along each axis; past LONGEST_AXIS or MOST_PROGRAMS in several launches
        specialisation   of the call, where kept
        """
        execute = recorder.run if (recorder := _recorder.get()) else run
        constants = self.constants[specialisation is not None and specialisation.wide]
        x, y, z = grid
        is_one = 0 < y <= LONGEST_AXIS and 0 < z <= LONGEST_AXIS and x * y * z <= MOST_PROGRAMS
        for part, first_y, first_z in ((grid, 0, 0),) if is_one else grids_of(x, y, z):
            brought = self.in_order({**available, "first_y": first_y, "first_z": first_z})
            arguments = KernelArguments(self.names, self.absent + brought + constants, specialisation)
            execute(self.kernel, part, arguments, self.config)


@contextmanager
def configured(kernel: str, config: TileConfig) -> Iterator[None]:
    """Run a kernel with this config inside, in every call that it is legal for."""
    global config_for
    before, config_for = config_for, overriding(kernel, config, config_for)
    try:
        yield
    finally:
        config_for = before


@functools.lru_cache(maxsize=64)
def overriding(kernel: str, config: TileConfig, otherwise: ConfigFor) -> ConfigFor:
    """The same function for the same arguments, so that plans made by it are found again."""

    def chosen(name: str, problem: Problem, target: Target) -> TileConfig:
        is_meant = name == kernel and not legal_reasons(name, config, problem, target)
        return config if is_meant else otherwise(name, problem, target)

    return chosen


class Launch(NamedTuple):
    """The arguments of an executor."""

    kernel: Any
    grid: Grid
    arguments: Mapping[str, Any]
    config: TileConfig


class _Recorder(NamedTuple):
    """An executor that keeps the launches of one context, with the target and the configs that they go by."""

    target: Target
    config_for: ConfigFor
    launches: list[Launch]

    def run(self, kernel: Any, grid: Grid, arguments: Mapping[str, Any], config: TileConfig) -> None:
        self.launches.append(Launch(kernel, grid, arguments, config))


_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(target: Target, configs: ConfigFor = default_config) -> Iterator[list[Launch]]:
    """Collect the launches of calls inside, as on a card of the target, and run none; tensors may be meta tensors."""
    recorder = _Recorder(target, configs, [])
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def has_eight_bit(device: torch.device) -> bool:
    """True where kernels load numbers of 8 bits as such, and not their bytes."""
    recorder = _recorder.get()
    target = recorder.target if recorder else _target(Target.of, device)
    return interpreting or target.has_eight_bit


def plan(kernel: str, specialisation: Specialisation, device: torch.device) -> Plan:
    if recorder := _recorder.get():
        return _plan_of(kernel, specialisation, recorder.target, recorder.config_for)
    return _plan_of(kernel, specialisation, _target(Target.of, device), config_for)


@functools.lru_cache(maxsize=4096)
def _plan_of(kernel: str, specialisation: Specialisation, target: Target, config_of: ConfigFor) -> Plan:
    """The plan of a specialisation's problem, without the hash of 30 fields at each launch."""
    return _plan(kernel, specialisation.problem, target, config_of)


def forget_plans() -> None:
    """Ask for each config again."""
    _plan.cache_clear()
    _plan_of.cache_clear()


@functools.lru_cache(maxsize=64)
def _target(of: Callable[[torch.device], Target], device: torch.device) -> Target:
    """of(device), which every launch asks."""
    return of(device)


def drop_config(kernel: str, problem: Problem, device: torch.device, chosen: Plan, error: Exception) -> None:
    """Drop a tuned config that fails here, with a warning, so that the next plan has another; raise other errors.

    A variant is dropped for any error but that of a graph's capture, which would have to compile it.
    """
    is_refusal = isinstance(error, TritonError) or "PassManager" in str(error)
    is_refusal |= chosen.variant is not None and not isinstance(error, NotCompiledError)
    if not is_refusal or not lookup.reject_config(kernel, problem, Target.of(device), chosen.config, error):
        raise error
    forget_plans()


@functools.lru_cache(maxsize=4096)
def _plan(kernel: str, problem: Problem, target: Target, config_of: ConfigFor) -> Plan:
    config = config_of(kernel, problem, target)
    try:
        return Plan.of(kernel, config, problem, target)
    except (ImportError, AttributeError) as error:  # a Triton that has renamed what a variant takes
        if config.kernel == "triton" or not lookup.reject_config(kernel, problem, target, config, error):
            raise
    return _plan(kernel, problem, target, config_of)


def constexpr_values(problem: Problem, config: TileConfig, target: Target) -> Arguments:
    """The constexprs that kernels take from a problem, a config and a target."""
    return {
        "WIDE": False,
        "HEAD_DIM": problem.head_dim,
        "VALUE_DIM": problem.value_dim,
        "BLOCK_D": padded_dim(problem.head_dim),
        "BLOCK_DV": padded_dim(problem.value_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        "SUM_COLUMNS": sum_columns(problem, target),
        "KEY_SUM_COLUMNS": key_sum_columns(problem, config, target),
        "CORRECT_DELTA": problem.corrects_delta,
        "HAS_BIAS": problem.has_bias,
        "IS_PART": problem.is_part,
        "SPLIT_TERMS": target.architecture.has_tensor_memory,
        "ALIGNED": problem.aligned and (problem.invariant or problem.head_dim % 16 or problem.value_dim % 16) > 0,
        "INVARIANT": problem.invariant,
        "NUM_XCDS": target.architecture.dies,
        "WARP_SPECIALIZE": config.warp_specialize,
    }


_specialisations: dict[Any, Specialisation] = {}
_MOST_SPECIALISATIONS = 4096


def kept_specialisation(key: tuple[Any, ...], found: Callable[[], tuple[Problem, bool]]) -> Specialisation:
    """The one `Specialisation` of a key: forms of a call's tensors, and its options. found: problem and `wide`."""
    specialisation = _specialisations.get(key)
    if specialisation is None:
        if len(_specialisations) >= _MOST_SPECIALISATIONS:
            _specialisations.clear()
        specialisation = _specialisations[key] = Specialisation(*found())
    return specialisation


def forms_of(terms: Terms | None, *tensors: Tensor | None) -> list[Any]:
    """All of terms, and of tensors [B, H, S, D], that selects code.

    Of a tensor its `_form`, and of one that is no term True where it stands at multiples of 16 bytes; of other terms
    whether they are there.
    """
    found: list[Any] = []
    for x in tensors:  # no comprehension: each is a call before Python 3.12
        found.append(None if x is None else (_form(x.shape, x.stride(), x.dtype), x.data_ptr() % 16 == 0))
    if terms is None:
        return found
    for number, form, default in _FORMS_OF_TERMS:
        value: Any = terms[number]
        is_there = value is not default
        found.append(form(value.shape, value.stride(), value.dtype) if is_there and form is not None else is_there)
    return found


@functools.lru_cache(maxsize=4096)
def _form(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """By axis, if it has one entry and what code sees of its stride; and if a tile's offsets pass 2^31."""
    axes = tuple((size == 1, *_seen(step)) for size, step in zip(shape, strides, strict=True))
    return dtype, axes, 1024 * strides[2] + shape[3] * strides[3] >= 2**31


@functools.lru_cache(maxsize=4096)
def vector_form(_: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Likewise of `scale_of`, which stores all but the last stride times 16."""
    return dtype, _seen(strides[-1]), any(16 * step >= 2**31 for step in strides[:-1])


def _seen(step: int) -> tuple[Any, ...]:
    """Compiled code knows if a stride is 0 or 1, its divisors, which say how wide loads are, and if it has 32 bits."""
    return step == 0, step == 1, math.gcd(step, 16), step >= 2**31


_FORMS = {"vector": vector_form, "pairs": _form}  # by `Term.form`
_FORMS_OF_TERMS = [(i, _FORMS.get(one.form), DEFAULTS[i]) for i, one in enumerate(TERMS) if one.flag]


def is_wide(*tensors: Tensor | None, page: int = 0) -> bool:
    """True where offsets inside one tile, or a page, can pass 2^31: no tile has more than 1024 rows."""
    rows = max(1024, page)
    return any(x is not None and rows * x.stride(2) + x.shape[3] * x.stride(3) >= 2**31 for x in tensors)


def is_aligned(tensor: Tensor | None) -> bool:
    """True where a tensor [B, H, S, D] stands at multiples of 16 bytes, its last axis dense, as wide loads want."""
    if tensor is None:
        return True
    shape, strides, width = tensor.shape, tensor.stride(), tensor.dtype.itemsize
    if strides[3] != 1 or tensor.data_ptr() % 16:
        return False
    for axis in range(3):  # no generator: a call asks of all its tensors
        step = strides[axis] * width
        if shape[axis] > 1 and (step <= 0 or step % 16):
            return False
    return True
