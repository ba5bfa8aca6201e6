"""The cases: every kernel for every target, each kernel with each of its other choices; some are quick."""

from dataclasses import asdict
from itertools import combinations, product
from typing import NamedTuple

import torch

from perf.models.ceilings import EIGHT_BIT_PAGES, NON_MMA_PER_LOGIT, PAIR_BIASES
from tests.support.pairs import all_pairs, thinned
from tests.support.versions import OLDER_TRITON
from tritonattn.tuning import Problem, Target
from tritonattn.tuning.config import FIRST_KERNELS, SECOND_KERNELS, STREAMING_KERNELS, TILED_KERNELS

from .facts import facts

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950")
TARGETS = (*NVIDIA, *AMD)
KINDS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
OTHERS = [target for target in TARGETS if target not in KINDS]  # they differ from one of KINDS in memory alone
BFLOAT, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32

SCALES = {
    "none": {},
    "q": {"query_scale": True},
    "qk": {"query_scale": True, "key_scale": True},
    "qb": {"query_scale": True, "key_bias": True},
}
SCALES_OF_ATTENTION = SCALES | {"gradient": SCALES["qk"] | {"query_scale_grad": True}}
EVERYTHING = "left softcap sinks aux grouped"
FORMS = ("", "right", "left right", "key_lengths", "key_ranges", "mask", "dropout right", "dropout mask")
FORMS_OF_DECODE = (
    *("", "left", "grouped", "key_ranges sequences"),
    *("block_table", "sequences", EVERYTHING, f"{EVERYTHING} block_table"),
)
PACKED_ROWS = (16, 32, 64, 256)
# Bytes a thread of `of_biases_of_pairs` without a ceiling.
SPILLS_OF_PAIRS = {("grad_query", "sm_120"): 72, ("grad_key_value", "sm_120"): 12}


class Case(NamedTuple):
    """A kernel to be compiled in its default config.

    spills   bytes per thread that its loops may spill
    """

    kernel: str
    problem: Problem
    target: str
    spills: int = 0

    def __str__(self) -> str:
        problem = self.problem
        sizes = f"{problem.head_dim}+{problem.value_dim}-{str(problem.dtype).removeprefix('torch.')}"
        options = [name for name, value in asdict(problem).items() if value is True and name != "aligned"]
        return "-".join([self.kernel, self.target, sizes, str(problem.packed_rows), *options])

    def check(self) -> None:
        """Compile it; no loop may spill, its shared memory must fit, and 16 bits go through tensor instructions."""
        code = facts(self.kernel, self.problem, self.target)
        assert code.spill_bytes <= self.spills, code
        assert code.shared_bytes <= Target.parse(self.target).architecture.shared_bytes, code
        if self.kernel in TILED_KERNELS and self.target in NVIDIA and self.problem.dtype != SINGLE:
            assert code.mma_loops, f"expected a loop with tensor instructions, got {code}"


def problem_of(head_dim: int, scales: str = "q", causal: bool = True) -> Problem:
    return Problem(head_dim, head_dim, BFLOAT, right=causal, **SCALES[scales])


def of_ceilings() -> list[Case]:
    """Full attention at head dim 128, causal at others."""
    problems = {dim: problem_of(dim, causal=dim != 128) for _, _, dim in NON_MMA_PER_LOGIT}
    spills = {("grad_query", "sm_90", 512): 8}
    return [Case(one[0], problems[one[2]], one[1], spills.get(one, 0)) for one in NON_MMA_PER_LOGIT]


def of_every_choice() -> list[Case]:
    """Each kernel with each choice, each dtype with each, each target of another kind with each size.

    Triton 3.8 spills with dropout.
    """
    choices = {
        "kernel": FIRST_KERNELS,
        "target": KINDS,
        "size": ((64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)),
        "dtype": (BFLOAT, HALF, SINGLE),
        "form": range(len(FORMS) - 2 * OLDER_TRITON),
        "scales": tuple(SCALES_OF_ATTENTION),
    }
    cases = []
    free = list(combinations(("target", "size", "form", "scales"), 2))[1:]
    for row in thinned(all_pairs(choices), free):
        forms = FORMS_OF_DECODE if row["kernel"] == "decode" else FORMS
        options = dict.fromkeys(forms[row["form"]].split(), True) | SCALES_OF_ATTENTION[row["scales"]]
        rows = PACKED_ROWS[row["form"] % 4] if row["kernel"] == "decode" else 16
        problem = Problem(*row["size"], row["dtype"], packed_rows=rows, **options)
        cases.append(Case(row["kernel"], problem, row["target"]))
    return cases


def of_wide_heads() -> list[Case]:
    """The widest, and those of latent attention."""
    everything = dict.fromkeys(f"{EVERYTHING} block_table".split(), True)
    return [
        *(Case(kernel, problem_of(512, "qk"), "gfx942") for kernel in FIRST_KERNELS[:3]),
        Case("decode", Problem(512, 512, BFLOAT, **SCALES["qk"], **everything), "sm_80"),
        Case("decode", Problem(576, 512, BFLOAT, **SCALES["q"]), "sm_90"),
        Case("decode", Problem(576, 512, BFLOAT, **SCALES["qb"], block_table=True), "sm_100"),
    ]


def of_pages() -> list[Case]:
    """Targets, head dims and forms in turn, and the one that spills where its steps are not halved."""
    common = "right sequences block_table query_scale"
    cases = [Case("forward", Problem(128, 128, BFLOAT, **dict.fromkeys(f"{common} aux".split(), True)), "sm_100")]
    for number, target in enumerate(("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")):
        options, dim = (common, f"{common} key_scale {EVERYTHING}")[number % 2], (64, 80, 128)[number % 3]
        cases.append(Case("forward", Problem(dim, dim, BFLOAT, **dict.fromkeys(options.split(), True)), target))
    return cases


def over_pages(kernel: str, target: str, eight_bit: bool = True, extras: str = "query_scale") -> Case:
    """Decoding, or packed rows, over pages."""
    options = f"block_table {extras}{' right sequences' if kernel == 'forward' else ''}"
    problem = Problem(128, 128, BFLOAT, eight_bit=eight_bit, **dict.fromkeys(options.split(), True))
    return Case(kernel, problem, target)


def of_eight_bits() -> list[Case]:
    """Cases with a ceiling, other targets, and a contiguous cache."""
    others = [over_pages("decode", "sm_120"), over_pages("forward", "gfx942", extras=f"key_scale {EVERYTHING}")]
    return [
        *(over_pages(*one) for one in EIGHT_BIT_PAGES),
        *others,
        Case("decode", Problem(128, 128, HALF, eight_bit=True), "sm_89"),
    ]


def of_pair_ceilings() -> dict[Case, float]:
    return {_of_pairs(*key, spills): ceiling for key, (ceiling, spills) in PAIR_BIASES.items()}


def of_biases_of_pairs() -> list[Case]:
    """Each kernel on each kind of target, causal, with a dense or a relative bias, of head dim 64 or 128, in turn."""
    with_ceiling, cases = {(kernel, target) for kernel, target, *_ in PAIR_BIASES}, []
    for (number, kernel), (turn, target) in product(enumerate(FIRST_KERNELS), enumerate(KINDS)):
        bias, dim = ("bias", "relative_bias")[(number + turn) % 2], (64, 128)[(number // 2 + turn // 2) % 2]
        if (kernel, target) not in with_ceiling:
            cases.append(_of_pairs(kernel, target, dim, bias, SPILLS_OF_PAIRS.get((kernel, target), 0)))
    return cases


def _of_pairs(kernel: str, target: str, dim: int, bias: str, spills: int) -> Case:
    problem = Problem(dim, dim, BFLOAT, right=kernel != "decode", query_scale=True, **{bias: True})
    return Case(kernel, problem, target, spills)


def of_second_kernels() -> list[Case]:
    """Each on each kind of target without a ceiling that takes more; registers, fp32 and other targets in turn."""
    every, turns = {"query_scale_grad": True, "right": True, **SCALES["qk"]}, list(enumerate(SECOND_KERNELS))
    forms = ("left key_ranges softcap sinks grouped", "dropout key_scale", "mask bias key_bias", "relative_bias")
    cases = [Case(SECOND_KERNELS[turn % 3], Problem(64, 64, BFLOAT, **every), one) for turn, one in enumerate(OTHERS)]
    for (number, kernel), (turn, target) in product(turns, enumerate(KINDS)):
        dim, options = (64, 128, 256)[(number + turn) % 3], dict.fromkeys(forms[(number + turn) % 4].split(), True)
        if (kernel, target, dim) not in NON_MMA_PER_LOGIT and (dim > 64 or target in AMD):
            cases.append(Case(kernel, Problem(dim, dim, BFLOAT, **every), target))
        if number == turn % 3:
            rest = {"query_scale": True, "query_scale_grad": True, **options}
            cases.append(Case(kernel, Problem(128, 128, HALF, **rest), target))
            cases.append(Case(kernel, Problem(96, 96, SINGLE, **every), target, 48))
    return cases


def of_streaming_kernels() -> list[Case]:
    """Each on a target, in turn."""
    masks = dict.fromkeys(("right", "left", "key_lengths", "key_ranges"), True)
    problem = Problem(64, 64, BFLOAT, **masks, **SCALES["qk"])
    return [Case(one, problem, TARGETS[number % len(TARGETS)]) for number, one in enumerate(STREAMING_KERNELS)]


CEILINGS, PAIR_CEILINGS = of_ceilings(), of_pair_ceilings()
CASES = [*CEILINGS, *of_every_choice(), *of_wide_heads(), *of_pages(), *of_biases_of_pairs(), *of_streaming_kernels()]
CASES += [*PAIR_CEILINGS, *of_second_kernels(), *of_eight_bits()]
CASES += [Case(FIRST_KERNELS[TARGETS.index(one) % 4], problem_of(64), one) for one in OTHERS]
CASES = list(dict.fromkeys(CASES))


def soonest(kernel: str, target: str) -> Case:
    """The case that compiles soonest: of 16 bits, of the fewest columns."""
    cases = [case for case in CASES if (case.kernel, case.target) == (kernel, target)]
    return min(cases, key=lambda case: (case.problem.dtype == SINGLE, case.problem.head_dim))


QUICK = [soonest(FIRST_KERNELS[number % 4], target) for number, target in enumerate(TARGETS)]
