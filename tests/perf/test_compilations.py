"""Distinct kernels of ordinary work: a bound for each list, so that none is compiled twice for what does not matter.

And the other way round: calls of one specialisation, whose code is kept, are calls of one code.
"""

import random
from collections import defaultdict

import pytest
import torch
import triton
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget

from perf.cpu.compilations import LISTS, kernels_of
from perf.soak.draw import Limits, draw
from tritonattn.backends.triton import device, launch
from tritonattn.tuning import Target, default_config

MOST = {"training": 65, "decoding": 17, "packing": 13, "appending keys": 4}

OPTIONAL = set("window key_lengths key_ranges mask dropout_p softcap sinks query_scale key_scale gain".split())

pytestmark = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")


@pytest.mark.parametrize("name", LISTS)
def test_few_kernels_are_compiled(name):
    before, found = launch.run, kernels_of(name, Target("cuda", "90"))
    assert launch.run is before
    assert sum(found.values()) <= MOST[name], found


def test_calls_of_one_specialisation_are_calls_of_one_code(monkeypatch):
    """Random calls of few sizes, some leaves with gradients, by Triton's binding. Nothing runs."""
    bound, backend = defaultdict(list), triton.compiler.make_backend(GPUTarget("cuda", 80, 32))
    binders, chosen = {}, random.Random(0)

    def run(kernel, grid, arguments, config) -> None:
        values = tuple(arguments.values())
        if arguments.specialisation is not None and device.kept_code(None, values, kernel).takes(values):
            bind = binders.setdefault(kernel, device.binder(kernel, backend))
            bound[arguments.specialisation, kernel, config].append((*bind(*values)[1],))
        if "argmax_ptr" in arguments:
            arguments["argmax_ptr"].zero_()  # positions of keys, which torch reads

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "config_for", default_config)
    launch._specialisations.clear()
    for seed in range(128, 208):
        trial = draw(seed, torch.device("cpu"), Limits(3, (8, 16), 1))
        given = {**trial.leaves, **trial.options}
        left_out_in_turn = sorted(OPTIONAL & given.keys()) if trial.gradients else ["softcap", "sinks"]
        for left_out in ("nothing", "nothing", *left_out_in_turn):
            arguments = {name: x for name, x in given.items() if name != left_out}
            for name in trial.leaves.keys() & arguments.keys():
                arguments[name] = given[name].detach().requires_grad_(trial.gradients and chosen.random() < 0.8)
            results = [x for x in tree_leaves(trial.attend(**arguments, backend="triton")) if x.requires_grad]
            if results:
                torch.autograd.backward(results, [torch.ones_like(x) for x in results])
    assert [key for key, codes in bound.items() if len(set(codes)) > 1] == []
    assert sum(len(codes) > 1 for codes in bound.values()) > 100
