"""The cases: every kernel for every target, and the other choices in pairs; some are quick."""

from typing import NamedTuple

import torch

from tests.support.pairs import all_pairs, thinned
from tests.support.versions import OLDER_TRITON
from tritonattn.tuning import Problem, Target
from tritonattn.tuning.config import STREAMING_KERNELS, TILED_KERNELS, shared_limit

from .facts import facts

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950")
TARGETS = (*NVIDIA, *AMD)
ALIKE = ("sm_86", "gfx90a")  # take the tiles of sm_89 and of gfx942
BFLOAT, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
ATTENTION = TILED_KERNELS[:3]

SCALES = {
    "none": {},
    "q": {"query_scale": True},
    "qk": {"query_scale": True, "key_scale": True},
    "qb": {"query_scale": True, "key_bias": True},
}
WITH_GRADIENT = SCALES["qk"] | {"query_scale_grad": True}
FORMS_OF_FLOAT32 = {
    "q": {"right": True, **SCALES["q"]},
    "qk": {"right": True, **SCALES["qk"]},
    "qb": {"right": True, **SCALES["qb"]},
    "gradient": {"right": True, **WITH_GRADIENT},
    "mask": {"mask": True, **WITH_GRADIENT},
    "dropout": {"dropout": True, "right": True, **WITH_GRADIENT},
}
FORMS_OF_DECODE = {
    "plain": {},
    "q": SCALES["q"],
    "pages": {**SCALES["qb"], "block_table": True},
    "everything": {
        **SCALES["qk"],
        **dict.fromkeys(("left", "block_table", "softcap", "sinks", "aux", "grouped"), True),
    },
}
MASKS = ("", "right", "left right", "key_lengths", "key_ranges", "mask")


class Case(NamedTuple):
    """A kernel to be compiled in its default config.

    spills   bytes a thread that its loops may spill; None where they are not looked at
    """

    kernel: str
    problem: Problem
    target: str
    spills: int | None = 0

    def __str__(self) -> str:
        problem = self.problem
        sizes = f"{problem.head_dim}+{problem.value_dim}-{str(problem.dtype).removeprefix('torch.')}"
        return "-".join([self.kernel, self.target, sizes, str(problem.packed_rows), *self.options])

    @property
    def options(self) -> list[str]:
        return [name for name, value in vars(self.problem).items() if value is True and name != "aligned"]

    def check(self) -> None:
        """Compile it; no loop may spill, its shared memory must fit, and 16 bits go through tensor instructions."""
        code = facts(self.kernel, self.problem, self.target)
        assert self.spills is None or code.spill_bytes <= self.spills, code
        assert code.shared_bytes <= shared_limit(Target.parse(self.target)), code
        if self.kernel in TILED_KERNELS and self.target in NVIDIA and self.problem.dtype != SINGLE:
            assert code.mma_loops, f"expected a loop with tensor instructions, got {code}"


def of_16_bits() -> list[Case]:
    """Head dims above 128 only on cards with enough shared memory, and of 512 a few."""
    dims = (64, 72, 80, 96, 128, 192, 256)
    rows = all_pairs({"kernel": TILED_KERNELS, "target": TARGETS, "dim": dims, "scales": tuple(SCALES)})
    widest = [("forward", "sm_80", "none"), ("grad_query", "sm_90", "q"), ("grad_key_value", "gfx942", "qk")]
    rows += [{"kernel": kernel, "target": target, "dim": 512, "scales": scales} for kernel, target, scales in widest]
    return [
        Case(row["kernel"], Problem(dim, dim, BFLOAT, right=True, **SCALES[row["scales"]]), row["target"])
        for row in rows
        if row["target"] not in ALIKE and ((dim := row["dim"]) <= 128 or row["target"] not in ("sm_89", "sm_120"))
    ]


def of_float32() -> list[Case]:
    """On sm_120 ptxas keeps to 80 registers, one too few; decoding with a bias of keys spills five."""
    choices = {"kernel": TILED_KERNELS, "target": TARGETS, "dim": (64, 128, 256), "form": tuple(FORMS_OF_FLOAT32)}
    return [
        Case(
            row["kernel"],
            Problem(row["dim"], row["dim"], SINGLE, **FORMS_OF_FLOAT32[row["form"]]),
            row["target"],
            0 if row["target"] != "sm_120" else 20 if row["form"] == "qb" else 4,
        )
        for row in thinned(all_pairs(choices), [("target", "form")])
    ]


def of_dropout() -> list[Case]:
    """On sm_120 three registers too few for a dense mask besides, at head dim 64; triton 3.8 spills."""
    masks = () if OLDER_TRITON else ("right", "mask", "right left key_lengths")
    cases = []
    for row in all_pairs({"kernel": ATTENTION, "target": NVIDIA, "dim": (64, 128), "masks": masks}) if masks else ():
        form = dict.fromkeys(row["masks"].split(), True)
        problem = Problem(row["dim"], row["dim"], BFLOAT, dropout=True, query_scale=True, **form)
        cases.append(Case(row["kernel"], problem, row["target"], 12 if row["target"] == "sm_120" else 0))
    return cases


def of_decoding() -> list[Case]:
    choices = {
        "target": TARGETS,
        "dim": (64, 80, 96, 128, 192, 256),
        "rows": (16, 32, 64, 256),
        "form": tuple(FORMS_OF_DECODE),
    }
    rows = thinned(all_pairs(choices), [("target", "dim")])
    rows += [{"target": "sm_80", "dim": 512, "rows": 32, "form": form} for form in ("pages", "everything")]
    return [
        Case(
            "decode",
            Problem(row["dim"], row["dim"], BFLOAT, packed_rows=row["rows"], **FORMS_OF_DECODE[row["form"]]),
            row["target"],
        )
        for row in rows
    ] + [
        Case("decode", Problem(576, 512, BFLOAT, **form), target)  # latent attention
        for form, target in zip(FORMS_OF_DECODE.values(), ("sm_80", "sm_90", "sm_100", "gfx950"), strict=True)
    ]


def of_pages() -> list[Case]:
    everything = dict.fromkeys(("left", "softcap", "sinks", "aux", "grouped"), True)
    forms = (SCALES["q"], SCALES["qk"] | everything)
    rows = all_pairs({"target": ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"), "dim": (64, 80, 128), "form": forms})
    return [
        Case(
            "forward",
            Problem(row["dim"], row["dim"], BFLOAT, right=True, sequences=True, block_table=True, **row["form"]),
            row["target"],
        )
        for row in rows
    ]


def of_streaming_kernels() -> list[Case]:
    """Each on three targets in turn."""
    masks = dict.fromkeys(("right", "left", "key_lengths", "key_ranges"), True)
    problem = Problem(64, 64, BFLOAT, **masks, **SCALES["qk"])
    return [
        Case(kernel, problem, TARGETS[(number + step) % 9])
        for number, kernel in enumerate(STREAMING_KERNELS)
        for step in (0, 3, 6)
    ]


def of_every_form() -> list[Case]:
    """A spread of masks, scales and sizes; they compile, and their shared memory fits."""
    sizes = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
    choices = {
        "kernel": TILED_KERNELS,
        "target": TARGETS,
        "size": sizes,
        "dtype": (HALF, BFLOAT),
        "mask": MASKS,
        "scales": ({}, SCALES["q"], WITH_GRADIENT),
    }
    return [
        Case(
            row["kernel"],
            Problem(*row["size"], row["dtype"], **dict.fromkeys(row["mask"].split(), True), **row["scales"]),
            row["target"],
            None,
        )
        for row in thinned(all_pairs(choices), [("target", "size"), ("target", "mask")])
    ]


CASES = [
    *of_16_bits(),
    *of_float32(),
    *of_dropout(),
    *of_decoding(),
    *of_pages(),
    *of_streaming_kernels(),
    *of_every_form(),
]


def soonest(kernel: str, target: str) -> Case:
    """The case that compiles soonest: of 16 bits, of the fewest options, of the fewest columns."""
    cases = [case for case in CASES if (case.kernel, case.target) == (kernel, target)]
    return min(cases, key=lambda case: (case.problem.dtype == SINGLE, len(case.options), case.problem.head_dim))


QUICK = [soonest(TILED_KERNELS[number % 4], target) for number, target in enumerate(TARGETS)]
