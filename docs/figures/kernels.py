"""The picture of performance.md: `python -m docs.figures.kernels` draws it from codegen.json and replay.md.

Both lie in perf/results, written by `python -m perf codegen` and `python -m perf replay`. Nothing in it was timed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tritonattn.lab.figures import COLOURS, dodge, foot

from .themes import save_themes

RESULTS = Path(__file__).resolve().parents[2] / "perf/results"
TARGET, HEAD_DIM = "sm_90", 128
KERNELS = {
    "forward": "forward",
    "grad_query": "gradient\nof q",
    "grad_key_value": "gradients\nof k and v",
}
FORMS = {
    "none": "one factor for all rows (sqrt_dim)",
    "query_scale": "a factor a row (modes that count keys or measure norms)",
    "query_scale + key_scale": "and a factor a key (cosine, inkling2)",
    "query_scale + key_bias": "and a bias a key (ALiBi, forget gates)",
}
OFF = 0.15  # by how much modelled shares of sm_90 may be off


def shares() -> dict[int, dict[str, float]]:
    """The modelled share of the tensor rate by head dim and kernel: of the shipped config, the first row of each."""
    text = (RESULTS / "replay.md").read_text(encoding="utf-8")
    part = re.split(r"^## ", text.split(f"\n## {TARGET}\n")[1], flags=re.MULTILINE)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")]
    found: dict[int, dict[str, float]] = {}
    for row in (dict(zip(rows[0], cells, strict=True)) for cells in rows[1:]):
        found.setdefault(int(row["D"]), {}).setdefault(row["kernel"], float(row["tensor rate"]))
    return found


def instructions() -> dict[str, dict[str, float]]:
    """Static instructions per logit besides the products, by form and kernel: causal, bf16."""
    cases = json.loads((RESULTS / "codegen.json").read_text(encoding="utf-8"))
    wanted = {"target": TARGET, "head_dim": HEAD_DIM, "dtype": "bf16", "causal": True}
    cases = [case for case in cases if wanted.items() <= case.items()]
    return {
        form: {case["kernel"]: case["non_mma_per_logit"] for case in cases if case["form"] == form} for form in FORMS
    }


def source() -> str:
    replayed = re.search(r"triton (\S+) at commit (\w+)", (RESULTS / "replay.md").read_text(encoding="utf-8"))
    case = json.loads((RESULTS / "codegen.json").read_text(encoding="utf-8"))[0]
    assert replayed
    return (
        f"{TARGET}, bf16. Modelled: `python -m perf replay`, triton {replayed[1]}, commit {replayed[2]}. "
        f"Static: causal, `python -m perf codegen`, triton {case['triton']}, commit {case['commit']}"
    )


def draw() -> Figure:
    counts = instructions()
    more = max(counts["query_scale"][kernel] - counts["none"][kernel] for kernel in KERNELS)
    figure = Figure(figsize=(10.5, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, {f"head dim {dim}": values for dim, values in shares().items()}, COLOURS[2:], off=OFF)
    left.set_title(f"Modelled: share of an H100's tensor rate; lines: may be off by {OFF:.0%}", fontsize=10)
    left.set_ylim(0, 1.08)
    _bars(right, {FORMS[form]: values for form, values in counts.items()}, (COLOURS[7], *COLOURS[4:]))
    right.set_title(f"Static: instructions a logit besides the products, head dim {HEAD_DIM}", fontsize=10)
    title = f"Nothing here was timed on a GPU. A factor a row adds at most {more:.2f} instructions a logit to a loop"
    figure.suptitle(title, fontsize=12)
    foot(figure, source())
    return figure


def _bars(axes: Axes, groups: dict[str, dict[str, float]], colours: tuple[str, ...], off: float = 0) -> None:
    """Draw a bar a group for each kernel, with its value; `off` is the share by which values may be off."""
    for index, ((label, values), colour) in enumerate(zip(groups.items(), colours, strict=False)):
        xs = [x + dodge(index, len(groups), 0.8) for x in range(len(KERNELS))]
        heights = [values[kernel] for kernel in KERNELS]
        axes.bar(xs, heights, 0.72 / len(groups), color=colour, label=label)
        if off:
            axes.errorbar(xs, heights, [off * height for height in heights], linestyle="none", color="grey")
        for x, height in zip(xs, heights, strict=True):
            axes.text(x, height * (1 + off), f"{height:.2f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(KERNELS)), list(KERNELS.values()))
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1 + (len(groups) % 2) * 2)


if __name__ == "__main__":
    print(*save_themes(draw(), Path(__file__).with_suffix(".png")), sep="\n")
