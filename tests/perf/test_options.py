"""What the commands of perf refuse, before they work."""

from __future__ import annotations

import re

import pytest

from perf.__main__ import main

WHOLE = "expected a whole number from 1 up, got '0'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("correctness --processes 0", WHOLE),
        ("soak --trials 0", WHOLE),
        ("sanitize --trials 0", WHOLE),
        ("cpu --repeats 0", WHOLE),
        ("monitor --length 0", WHOLE),
        ("monitor --device nowhere", "--device: cannot use 'nowhere'"),
        ("monitor --scaling nope", "--scaling: .* got 'nope'"),
        ("codegen --workers 0", WHOLE),
        ("codegen --head-dims 64,300", "expected numbers from 1 to 256, got '64,300'"),
        ("codegen --targets h100", "expected sm_<number> or gfx<name>, got 'h100'"),
        ("report {folder}", "report: no records in"),
        ("plot x.jsonl --out {file}", "--out: wanted a folder, got"),
        ("gpu --minutes 1 --device cpu --out {file}", "--out: wanted a folder, got"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as ended:
        main(arguments.format(folder=tmp_path, file=file).split())
    assert ended.value.code != 0
    said = f"{ended.value.code} {capsys.readouterr().err}"
    assert re.search(message, said), said
