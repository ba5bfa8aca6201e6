"""The parts of the documents that code writes: `python -m docs.generated` lists stale ones, `--write` renews them.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; in Python and JavaScript, in such comments.
"""

from __future__ import annotations

import argparse
import functools
import graphlib
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tritonattn import SCALINGS, Scaling, nn
from tritonattn.scaling.names import is_required

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf/results"
PART = re.compile(r"((?:<!--|//|#) generated: (\w+)(?: -->)?\n).*?([ \t]*(?:<!--|//|#) end\b)", re.DOTALL)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def floors() -> str:
    """Folders of the package by floor, and which they import, without those that another of these imports anyway."""
    from tests.test_layers import DOORS, FILES, FLOORS, imported_modules, module_of

    below: dict[str, set[str]] = {folder: set() for folders in FLOORS for folder in folders}
    for file in (file for file in FILES if module_of(file) not in DOORS):
        folder = module_of(file)[0]
        below[folder] |= {other for other, *_ in imported_modules(file)} - {folder}
    reached: dict[str, set[str]] = {}
    for folder in graphlib.TopologicalSorter(below).static_order():
        reached[folder] = below[folder].union(*(reached[other] for other in below[folder]))
    lines = []
    for number, folders in reversed([*enumerate(FLOORS, 1)]):
        for position, folder in enumerate(sorted(folders)):
            over = below[folder]
            nearest = sorted(one for one in over if not any(one in reached[other] for other in over))
            floor = f"{number:2}" if position == 0 else "  "
            lines.append(f"{floor}  {folder:13}{'-> ' + ', '.join(nearest) if nearest else ''}".rstrip())
    return "```text\n" + "\n".join(lines) + "\n```\n"


@functools.cache
def interpreted() -> dict:
    """The tables of `docs.probes`, which runs kernels in Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "docs.probes"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def support() -> str:
    """Try what each backend runs, and return the table."""
    return table(["", "`triton`", "`flash`", "`sdpa`", "`reference`"], interpreted()["support"])


def memory() -> str:
    """Bytes that a call keeps for its backward, counted as by `python -m perf memory`."""
    return interpreted()["memory"] + "\n"


COST_MODES = ("sqrt_dim", "key_count", "key_norm_sum")
# Tokens, dtype, passes; [1, 8, tokens, 64], causal.
COST_CASES = (
    (512, "fp32", "forward"),
    (512, "fp32", "forward+backward"),
    (4096, "fp32", "forward"),
    (4096, "fp32", "forward+backward"),
    (4096, "bf16", "forward"),
    (4096, "bf16", "forward+backward"),
)


def costs() -> str:
    """Time over that of PyTorch's attention on a CPU, from perf/results/cpu.jsonl; compile times from codegen.json."""
    records = [json.loads(line) for line in (RESULTS / "cpu.jsonl").read_text(encoding="utf-8").splitlines()]

    def one(mode: str, **axes) -> dict:
        (record,) = (
            record
            for record in records
            if record["contestant"] == f"tritonattn {mode}" and axes.items() <= record["axes"].items()
        )
        return record

    rows = [
        [
            f"{length:,} tokens, {dtype}, {passes.replace('+', ' and ')}",
            *(
                f"{one(mode, length=length, dtype=dtype, passes=passes, head_dim=64, causal=True)['ratio']:.2f}x"
                for mode in COST_MODES
            ),
        ]
        for length, dtype, passes in COST_CASES
    ]
    tiny = [[one(mode, length=16, passes=passes) for mode in COST_MODES] for passes in ("forward", "forward+backward")]
    for name, found in zip(("forward", "forward and backward"), tiny, strict=True):
        more = (f"+{1000 * (1 - 1 / record['ratio']) * record['median_ms']:.0f} us" for record in found)
        rows.append([f"16 tokens, 1 head, fp32, {name}", *more])
    compiled = json.loads((RESULTS / "codegen.json").read_text(encoding="utf-8"))
    seconds = [case["compile_seconds"] for case in compiled]
    compilation = f"{statistics.median(seconds):.1f} s per kernel, at most {max(seconds):.1f} s"
    first = "first call on a GPU: to compile 1 kernel, and 3 in the backward"
    rows.append([first, compilation, "likewise", "likewise, 1 or 2 kernels more"])
    run = one("sqrt_dim", length=512, dtype="fp32", passes="forward", head_dim=64, causal=True)["environment"]
    source = (
        f"\nMeasured: {run['device']}, {run['threads']} threads, torch {run['torch']}, commit {run['commit']}, "
        f"`{run['command']}`. Compile times: triton "
        f"{compiled[0]['triton']}, commit {compiled[0]['commit']}, `python -m perf codegen`.\n"
    )
    return table(["time over PyTorch's attention", *(f"`{mode}`" for mode in COST_MODES)], rows) + source


FORM_COLUMNS = {
    **{f"{length:,}": {"length": length} for length in (256, 1024, 4096)},
    "1,024, batch 4": {"length": 1024, "batch": 4},
    "1,024, `key_norm_mean`": {"length": 1024, "scaling": "key_norm_mean"},
    **{f"{length:,}, bf16": {"length": length, "dtype": "bf16"} for length in (1024, 4096)},
}
FORM_KINDS = {
    "steps over a cache": "decode",
    "`return_aux`": "return_aux",
    "dropout": "dropout",
    "windows of 49 tokens": "Swin",
    "the others": "",
}
PASSES = ("forward", "forward+backward")


def _ratios_of_forms() -> tuple[list[tuple[dict, float]], str]:
    """Axes of each case of perf/results/forms.jsonl, with ours over the peer of the least median; their source.

    A ratio is the median over rounds.
    """
    records = [json.loads(line) for line in (RESULTS / "forms.jsonl").read_text(encoding="utf-8").splitlines()]
    peers: dict[str, dict] = {}
    for record in records:
        if "ratio" in record and not record["contestant"].startswith("tritonattn"):  # none to a wrong result of ours
            best = peers.setdefault(str(record["axes"]), record)
            peers[str(record["axes"])] = min(best, record, key=lambda one: one["median_ms"])
    run = records[0]["environment"]
    commits = ", ".join(dict.fromkeys(record["environment"]["commit"] for record in records))
    source = (
        f"\nMeasured: {run['device']}, one thread ([conditions](../perf/results/cpu_notes.md#forms)), "
        f"torch {run['torch']}, commits {commits}, `python -m perf sweep --suite forms --threads 1`; -: not measured.\n"
    )
    return [(peer["axes"], 1 / peer["ratio"]) for peer in peers.values()], source


def forms() -> str:
    """Time of ours over that of the fastest peer on a CPU, by form: forward, and with backward."""
    ratios, source = _ratios_of_forms()

    def cell(form: str, **axes) -> str:
        wanted = {"form": form, "batch": 1, "dtype": "fp32", "scaling": "sqrt_dim", **axes}
        found = [ratio for its, ratio in ratios if wanted.items() <= its.items()]
        return "/".join(f"{ratio:.2f}" for ratio in found) or "-"

    names = dict.fromkeys(axes["form"] for axes, _ in ratios)
    rows = [[form, *(cell(form, **axes) for axes in FORM_COLUMNS.values())] for form in names]
    return table(["form", *FORM_COLUMNS], rows) + source


def kinds_of_forms() -> str:
    """The least and the largest time over that of the fastest peer, by kind of form and all axes."""
    ratios, _ = _ratios_of_forms()
    groups: dict[tuple, dict[tuple[str, str], list[float]]] = {}
    for axes, ratio in ratios:
        group = groups.setdefault(tuple(axes[name] for name in ("dtype", "length", "batch", "scaling")), {})
        kind = next(kind for kind, word in FORM_KINDS.items() if word in axes["form"])
        group.setdefault((kind, axes["passes"]), []).append(ratio)

    def cell(found: list[float]) -> str:
        return f"{min(found):.2f} to {max(found):.2f} ({len(found)})" if len(found) > 1 else f"{found[0]:.2f}"

    rows = []
    for (dtype, length, batch, scaling), group in sorted(groups.items(), reverse=True):
        cells = (" / ".join(cell(group[kind, one]) for one in PASSES if (kind, one) in group) for kind in FORM_KINDS)
        rows.append([f"{length:,}", str(batch), dtype, f"`{scaling}`", *(text or "-" for text in cells)])
    return table(["tokens", "batch", "dtype", "scaling", *FORM_KINDS], rows)


def biases() -> str:
    """Static counts of the kernels with each bias, from perf/results/biases.json."""
    records = json.loads((RESULTS / "biases.json").read_text(encoding="utf-8"))
    cells: dict[tuple[str, int, str], list[str]] = {}
    for record in records:
        count = record["non_mma_per_logit"]
        figures = (f"{count:.1f}" if count else "-", str(record["registers"]), str(record["spill_bytes"]))
        cells.setdefault((record["kernel"], record["head_dim"], record["target"]), []).append(", ".join(figures))
    forms = [record["form"].removeprefix("query_scale + ") for record in records]
    header = ["kernel", "D", "target", *(f"`{form}`" for form in dict.fromkeys(forms))]
    source = f"triton {records[0]['triton']}, commit {records[0]['commit']}, `python -m perf codegen --biases`"
    rows = ([kernel, str(dim), target, *row] for (kernel, dim, target), row in cells.items())
    return table(header, rows) + f"\nStatic: {source}, bf16, causal, default configs.\n"


def _ledger() -> list[list[str]]:
    """Rows of the ledger by `python -m perf language-model`, of the models that learned it with five seeds."""
    from perf.studies.language_model.records import read
    from perf.studies.language_model.report import ledger_rows

    return [row for row in ledger_rows(run for run in read() if run.found.solved_at is not None) if row[2] == "5"]


def language_model() -> str:
    """The ledger, every row."""
    from perf.studies.language_model.records import read
    from perf.studies.language_model.report import LEDGER_HEADER, sources

    return table(LEDGER_HEADER, _ledger()) + f"\n{sources(read())}\n"


RECALL_COLUMNS = (
    "**`sqrt_dim`**",
    "**`log_key_count`**",
    "**`SSMax`**",
    *(f"{x} at test" for x in ("log n", "twice", "four times")),
)


def recall() -> str:
    """The ledger's means over seeds at 32 times the trained length, a row for each kind of model."""
    found: dict[str, dict[str, str]] = {}
    model = ""
    for row in _ledger():
        model = row[0] or model
        found.setdefault(model, {}).setdefault(row[1], row[6].partition(" ")[0])
    header = ["layers, QK-norm", *(column.strip("*") for column in RECALL_COLUMNS)]
    return table(header, ([model, *(cells.get(x, "-") for x in RECALL_COLUMNS)] for model, cells in found.items()))


def language_model_text() -> str:
    """Loss on text by `python -m perf language-model`, every row."""
    return table(*_text())


def _text() -> tuple[list[str], list[list[str]]]:
    from perf.studies.language_model.records import read
    from perf.studies.language_model.report import text_rows

    return text_rows(read())


TEXT_COLUMNS = ("layers, QK-norm", "factor", "0-64", "64-128", "256-512", "2048-4096")


def nats() -> str:
    """Loss on text, some positions."""
    header, rows = _text()
    kept = [header.index(column) for column in TEXT_COLUMNS]
    return table(TEXT_COLUMNS, ([row[i].partition(" (")[0] for i in kept] for row in rows))


def formula(mode: type[Scaling]) -> str:
    """A mode's factor with the values of its letters, and what it adds."""
    found = ", ".join([mode.about.factor, *(f"{letter} = {value}" for letter, value in mode.about.letters.items())])
    return f"{found}, and adds {mode.about.addend}" if mode.about.addend else found


def modes() -> str:
    """The table of modes on README, with the names that take a trained length."""
    rows = []
    for name, mode in SCALINGS.items():
        length = re.search(r"ln\((base|L)\)", mode.about.factor)
        more = f'; {length[1]}: `"{name}:2048"`' if length else ""
        rows.append([f"`{name}`" + " (default)" * (name == "sqrt_dim"), formula(mode) + more, mode.about.source])
    return table(["name", "factor", "source"], rows)


def advice() -> str:
    """The table of modes in docs/scalings.md."""
    rows = ([f"`{name}`", formula(mode), mode.about.advice] for name, mode in SCALINGS.items())
    return table(["name", "factor", "advice"], rows)


# Parts of a factor in JavaScript, as they are replaced in turn. A blank is a product behind a number, a bracket or a
# norm, whose last letter is m.
JAVASCRIPT = {
    r"sum ‖k‖²": "squares",
    r"mean ‖k‖²": "(squares / n)",
    r"sum ‖k‖": "sum",
    r"mean ‖k‖": "(sum / n)",
    r"max ‖k‖": "largest",
    r"‖q‖": "queryNorm",
    r"‖k‖": "norm",
    r"\bbase\b": "L",
    r"\^": " ** ",
    r" ?/ ?": " / ",
    r"(?<=[\dm)]) (?=[a-z(])": " * ",
    r"\b(?=(sqrt|floor|min|max)\()": "Math.",
    r"\bln\(": "Math.log(",
}


def playground() -> str:
    """The factors of docs/playground.js, whose keys stand at no distance."""
    lines = []
    for name, mode in ((name, mode) for name, mode in SCALINGS.items() if not mode.about.addend):
        letters = {rf"\b{letter}\b": f"({value})" for letter, value in mode.about.letters.items()}
        code = mode.about.factor
        for part, its in (letters | JAVASCRIPT).items():
            code = re.sub(part, its, code)
        lines.append(f"  {name}: (norm) => {code},\n")
    return "".join(lines)


def names() -> str:
    """The names of modes for type checkers."""
    return "".join(f'    "{name}",\n' for name in SCALINGS)


def types() -> str:
    """The classes of modes for type checkers."""
    paths = ((name, mode.__module__.rpartition(".")[2], mode.__name__) for name, mode in SCALINGS.items())
    return "".join(f"        {name}: type[{file}.{cls}]\n" for name, file, cls in paths)


def learned_names() -> str:
    """The names of learned modes for type checkers."""
    return "".join(f'    "{name}",\n' for name in nn.LEARNED)


def learned() -> str:
    """The expression that makes each module, for the error of a call that is given its name."""
    lines = []
    for cls in (getattr(nn, one) for one in nn.__all__):
        if isinstance(cls, type) and issubclass(cls, Scaling) and hasattr(cls, "name"):
            parameters = inspect.signature(cls).parameters.items()
            given = [one for one, x in parameters if is_required(x) or one == cls.trained_length]
            lines.append(f'    "{cls.name}": "{cls.__name__}({", ".join(f"{one}={_GIVEN[one]}" for one in given)})",\n')
    return "".join(lines)


_GIVEN = {"heads": "Hq", "head_dim": "D", "base": "LENGTH"}
_GIVEN |= {"mode_a": "'sqrt_dim'", "mode_b": "'key_norm_mean'", "steps": "1000"}

PARTS: dict[str, Callable[[], str]] = {
    **{"modes": modes, "advice": advice, "playground": playground, "names": names, "types": types},
    **{"learned_names": learned_names, "learned": learned},
    **{"floors": floors, "support": support, "costs": costs, "forms": forms, "memory": memory},
    **{"kinds_of_forms": kinds_of_forms},
    **{"biases": biases, "recall": recall, "nats": nats},
    **{"language_model": language_model, "language_model_text": language_model_text},
}


def renewed(text: str, known: dict[str, str]) -> str:
    """A document's text with its parts written again; `known` keeps what was computed."""

    def part(found: re.Match) -> str:
        name = found[2]
        if name not in known:
            known[name] = PARTS[name]()
        return f"{found[1]}{known[name]}{found[3]}"

    return PART.sub(part, text)


def documents() -> list[Path]:
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*.md"))]
    files += [ROOT / "docs/playground.js", ROOT / "tritonattn/scaling/names.py"]
    return [file for file in files if PART.search(file.read_text(encoding="utf-8"))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.generated", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the documents")
    write, known, stale = parser.parse_args().write, {}, []
    for file in documents():
        text = file.read_text(encoding="utf-8")
        new = renewed(text, known)
        if new != text:
            stale.append(file.relative_to(ROOT).as_posix())
            if write:
                file.write_text(new, encoding="utf-8")
    print("\n".join(f"{'renewed' if write else 'stale'}: {name}" for name in stale) or "nothing is stale")
    return 1 if stale and not write else 0


if __name__ == "__main__":
    sys.exit(main())
