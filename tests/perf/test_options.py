"""Options that the commands of perf refuse before they work."""

import re
from pathlib import Path

import pytest

from perf.__main__ import main

RECORDS = Path(__file__).parents[2] / "perf" / "results" / "cpu_short.jsonl"
WHOLE = "expected a whole number from 1 up, got '0'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("correctness --processes 0", WHOLE),
        ("monitor --device nowhere", "--device: cannot use 'nowhere'"),
        ("monitor --scaling nope", "--scaling: .* got 'nope'"),
        ("codegen --head-dims 64,600", "expected a whole number from 1 to 512, got '600'"),
        ("codegen --targets h100", "expected sm_<number from 70> or gfx<name>, got 'h100'"),
        ("sweep --suite forwards", "--suite: expected some of forward, .*got 'forwards'"),
        ("sweep --scalings dims", "--scalings: expected some of sqrt_dim, .*got 'dims'"),
        (
            "gpu --minutes 1 --device emulate --out {folder} --phases soaking",
            "--phases: .*environment, .*got 'soaking'",
        ),
        ("gpu --minutes 1 --out {folder}", "gpu: device cuda: torch finds no GPU; --device emulate rehearses"),
        ("compile", "torch finds no GPU; --target compiles for a card that is not here"),
        ("sweep --device interpret", "sweep: kernels run .*: set TRITON_INTERPRET=1"),
        ("soak --device cpu", "soak: .*TRITON_INTERPRET=1"),
        ("report {folder}", "report: no records in"),
        ("plot {records} --out {file}", "--out: expected a folder, got"),
        ("train-compare --tasks digits,chess", "train-compare: --tasks: .*recall.* got 'chess'"),
        ("train-compare --modes sqrt_dim,no_such_mode", "--modes: .*key_norm_mean.*'no_such_mode'"),
        ("train-compare --modes ssmax+gain", "--modes: .*'ssmax.gain'"),
        ("train-compare --head-dim 3 --tasks text", "--head-dim: .*divisor of the width 64 of text, got 3"),
        ("train-compare --seeds 1", "--seeds: .*from 2 up, got '1'"),
        ("train-compare --grid --modes sqrt_dim", "--grid: expected two --modes, got 1"),
        ("length-study --modes sqrt_dim,no_such", "length-study: --modes: .*llama4.*'no_such'"),
        ("length-study --modes sqrt_dim:7", "--modes: expected a base after .*'sqrt_dim:7'"),
        ("length-study --modes sqrt_dim*1.2.3", "--modes: .*'sqrt_dim.1.2.3'"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys, monkeypatch):
    """Refusals where torch finds no GPU and Triton does not interpret."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("tritonattn.backends.triton.launch.interpreting", False)
    monkeypatch.setattr("tritonattn.backends.triton.launch.runs_on", lambda device: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # which a sweep in the interpreter changes
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as ended:
        main([word.format(folder=tmp_path, file=file, records=RECORDS) for word in arguments.split()])
    assert ended.value.code != 0
    said = f"{ended.value.code} {capsys.readouterr().err}"
    assert re.search(message, said), said
