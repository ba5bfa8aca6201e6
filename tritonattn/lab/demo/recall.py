"""Training of a small model with three scalings, and its recall among more keys than it was trained on."""

from __future__ import annotations

import torch

from ...core.progress import Progress
from ...core.tables import table
from ..training.records import planned
from ..training.tasks import LENGTHS, TASKS
from ..training.trainer import train

MODES = ("sqrt_dim", "log_key_count", "ssmax")
_BASE, *_GROWING = MODES
_HEAD = (
    "A model that is trained with a scaling: one layer of attention learns to find the value of a key among 16 to 64,\n"
    "and is then asked among up to 4,096. Share of values recalled, by number of keys ({seconds:.0f} s of training, "
    "one seed):"
)
_NEXT = "Next, for a model and a text of yours:  tritonattn advise --model MODEL --text FILE"


def report(device: torch.device) -> str:
    """Train the models on `device`, and return the table, the conclusion and the next command."""
    task, recalled, seconds = TASKS["recall"], {}, 0.0
    with Progress(total=len(MODES) * task.recipe.steps, unit="step", leave=False) as progress:
        for one in planned("recall", MODES, 1, [task.recipe], device, quick=False):
            progress.set_description(f"training with {one.mode}")
            run = train(one, device, progress.update, observations=1)
            recalled[run.mode] = [run.metrics.get(f"accuracy_{n}", float("nan")) for n in LENGTHS]
            seconds += run.seconds
    rows = [[mode, *(f"{share:.1%}" for share in shares)] for mode, shares in recalled.items()]
    shares = table(rows, ["mode", *(f"{n:,} keys" for n in LENGTHS)], "simple")
    text = (_HEAD.format(seconds=seconds), shares, conclusion({mode: row[-1] for mode, row in recalled.items()}), _NEXT)
    return "\n\n".join(text)


def conclusion(recalled: dict[str, float]) -> str:
    """Say which scaling to train with, from the shares recalled among the most keys."""
    best = max(_GROWING, key=lambda mode: recalled[mode])
    shares = f"{best} recalled {recalled[best]:.0%} at 64 times the trained length, {_BASE} {recalled[_BASE]:.0%}"
    lesson = f"train with {' or '.join(_GROWING)} if inputs will grow longer ({shares})"
    if not recalled[best] > recalled[_BASE]:
        lesson = f"this seed shows no gain from {' or '.join(_GROWING)} ({shares})"
    return f"Conclusion: keep {_BASE} in a model that is trained already; {lesson}. Five seeds: docs/training.md."
