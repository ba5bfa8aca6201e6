"""Wrong usage is named in one message, with the option and the value, before any work."""

from pathlib import Path

import pytest

from tritonattn.cli import main as cli
from tritonattn.cli import options
from tritonattn.lab import length, training

REFUSED = [
    ("demo --modes sqrt_dim,no_such_mode", ["--modes", "'no_such_mode'", "sqrt_dim"]),
    ("demo --device no_such_device", ["--device", "no_such_device"]),
    ("demo --text /no/such/file", ["--text", "/no/such/file"]),
    ("demo --json /dev/null/a.json", ["--json: expected a folder", "'/dev/null'"]),
    ("demo --plot a.xyz", ["--plot", "a.xyz", "png"]),
    ("demo --max-tokens 1", ["--max-tokens", "at least 2"]),
    (f"demo --model {__file__}", ["--model", ".gguf"]),
    ("simulate --modes sqrt_dim,nope", ["--modes", "'nope'", "key_norm_sum"]),
    ("simulate --parts papers", ["--parts", "'papers'", "paper, sweep, verdict"]),
    ("simulate --counts 8,99999999999", ["--counts", "'99999999999'"]),
    ("simulate --seed -1", ["--seed", "-1"]),
    ("simulate --dims 0", ["--dims", "from 1", "'0'"]),
    ("simulate --keys gauss", ["--keys", "'gauss'", "few giants"]),
    (f"simulate --plot {__file__}", ["--plot", Path(__file__).name]),
    ("train-compare --tasks digits,chess", ["--tasks", "'chess'", "recall"]),
    ("train-compare --modes sqrt_dim,no_such_mode", ["--modes", "'no_such_mode'", "key_norm_mean"]),
    ("train-compare --modes ssmax+gain", ["--modes", "'ssmax+gain'"]),
    ("train-compare --seeds 1", ["--seeds", "at least 2", "got 1"]),
    ("train-compare --grid --modes sqrt_dim", ["--grid", "two", "got 1"]),
    (f"train-compare --out {__file__}", ["--out", "folder"]),
    ("length-study --modes sqrt_dim,no_such", ["--modes", "'no_such'", "llama4"]),
    ("length-study --modes sqrt_dim:7", ["--modes", "base", "'sqrt_dim:7'"]),
    ("length-study --modes qwen_logn:0", ["--modes", "'qwen_logn:0'"]),
    ("length-study --modes sqrt_dim*1.2.3", ["--modes", "'sqrt_dim*1.2.3'"]),
    ("length-study --bin 0", ["--bin", "at least 2"]),
    (f"length-study --out {__file__}", ["--out", "folder"]),
    ("advise --context 0", ["--context: expected at least 2"]),
    ("advise --model /nowhere/model", ["--model: cannot load"]),
]


def assert_refused(capsys: pytest.CaptureFixture[str], command: str, parts: list[str]) -> None:
    """`tritonattn COMMAND` exits with 2, prints nothing, and says all parts on stderr."""
    assert cli.main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in (f"tritonattn {command.split()[0]}: ", *parts):
        assert part in captured.err


@pytest.mark.parametrize(("command", "parts"), REFUSED, ids=[command for command, _ in REFUSED])
def test_wrong_usage_is_named_before_any_work(command, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module, work in ((length, "load"), (training, "train")):
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("works"))
    assert_refused(capsys, command, parts)


def test_an_unknown_model_without_network(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_refused(capsys, "demo --model no-such-user/no-such", ["no-such-user/no-such", "HF_HUB_OFFLINE"])


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("demo", ["transformers", "pip install 'tritonattn[demo]'"]),
        ("simulate --plot x", ["simulate needs tqdm, matplotlib; to mend it: pip install 'tritonattn[lab]'"]),
        ("watch run.jsonl", ["watch needs matplotlib; to mend it: pip install 'tritonattn[monitor]'"]),
        ("train-compare", ["sklearn", "to mend it: pip install 'tritonattn[lab]'"]),
    ],
)
def test_a_missing_extra_is_named(command, parts, monkeypatch, capsys):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    assert_refused(capsys, command, parts)
