"""`tritonattn watch`: the records of a Monitor as a page and as a picture."""

import json
import math
import re
import warnings
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import tritonattn
from tritonattn.analysis import Monitor, Thresholds
from tritonattn.cli import main as cli
from tritonattn.lab.watch.curves import MEASURES, Watched
from tritonattn.lab.watch.picture import figure_of, write_page

LAYERS = ["blocks.0.attention", "blocks.1.attention"]


def record(step: int, loss: float | None = 1.0, logit: float = 5.0, alarms=(), names=LAYERS) -> dict:
    measures = {"calls": 1, "rows": 8, "max_logit": [logit, 1.0], "relative_entropy": [0.5, None]}
    measures |= {"near_one_hot": [0.0, 0.5], "near_uniform": [0.25, 0.25], "output_variance": [2.0, 4.0]}
    measures |= {"q_gradient_norm": [0.0, 0.0], "k_gradient_norm": None}
    alarms = [{"layer": layer, "measure": m, "value": v, "limit": w, "new": new} for layer, m, v, w, new in alarms]
    return {"step": step, "loss": loss, "alarms": alarms, "layers": dict.fromkeys(names, measures)}


def written(tmp_path, *records):
    file = tmp_path / "run.jsonl"
    file.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    return file


def panels(*records, tmp_path) -> dict:
    return {panel.measure: panel for panel in Watched.read(written(tmp_path, *records)).panels}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The file and the last record of a run that raises an alarm."""
    torch.manual_seed(0)
    model = nn.Sequential(*(tritonattn.nn.ScaledAttention(16, heads=2, causal=True) for _ in range(2)))
    file = tmp_path_factory.mktemp("run") / "run.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the alarm's
        with Monitor(model, every=2, file=file, thresholds=Thresholds(0.1)) as monitor:
            for _ in range(5):
                loss = model(torch.randn(2, 8, 16)).square().mean()
                loss.backward()
                monitor.step(loss)
    return file, monitor.last


def test_curves_are_what_the_monitor_wrote(run):
    file, last = run
    watched = Watched.read(file)
    assert list(watched.lines) == ["0", "1"]
    assert [panel.measure for panel in watched.panels] == list(MEASURES)
    for panel in watched.panels:
        for name, points in panel.curves.items():
            assert [step for step, _ in points] == [0, 2, 4]
            values = last["layers"][name][panel.measure] if name else [last["loss"]]
            expected = max(values) if panel.measure == "max_logit" else sum(values) / len(values)
            assert points[-1][1] == pytest.approx(expected)
    alarm = watched.runs[0].alarms[0]
    assert (alarm.step, alarm.measure) == (0, "max_logit")
    assert "3 records of 2 layers" in watched.summary()


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    file = written(tmp_path, record(0), record(10))
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Watched.read(marked).runs[0].records == Watched.read(file).runs[0].records


def test_a_second_run_in_the_file_begins_another_curve(tmp_path):
    found = panels(record(0), record(10), record(0), record(10), tmp_path=tmp_path)
    assert [math.isnan(value) for _, value in found["loss"].curves[""]] == [False, False, True, False, False]


def test_alarms_are_marked_where_they_begin_and_their_limits_stay(tmp_path):
    first = record(10, logit=30.0, alarms=[(LAYERS[1], "max_logit", 30.0, 20.0, True)])
    later = record(20, logit=31.0, alarms=[(LAYERS[1], "max_logit", 31.0, 20.0, False)])
    panel = panels(record(0), first, later, tmp_path=tmp_path)["max_logit"]
    assert [(one.step, one.value) for one in panel.alarms] == [(10, 30.0)]
    assert panel.limits == [20.0]


def page_of(file, tmp_path) -> str:
    write_page(Watched.read(file), tmp_path / "run.html")
    return (tmp_path / "run.html").read_text(encoding="utf-8")


def elements_of(page: str) -> list[ElementTree.Element]:
    """The elements of a page, read as XML: all are closed, and names are escaped."""
    return list(ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>|(?<=<details) open", "", page)).iter())


def test_the_page_is_whole_and_fetches_nothing(run, tmp_path):
    text = page_of(run[0], tmp_path)
    elements = elements_of(text)
    tags = {one.tag.rpartition("}")[2] for one in elements}
    assert {"svg", "details", "table"} <= tags
    assert not {"script", "link", "img", "image", "iframe"} & tags
    assert not re.search(r"https?:|url\((?!#)|@import|\bsrc=|href=\"(?!#)", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    texts = {one.text for one in elements}
    assert {"loss", "layer 0", "layer 1", "entropy / ln n"} <= texts
    assert any((one or "").startswith("step 0: 0: max_logit") for one in texts)


def test_lines_have_the_values_of_the_records(tmp_path):
    records = [record(step, loss=loss) for step, loss in ((0, 1.0), (50, 3.0), (100, 2.0))]
    first, second, *_ = figure_of(Watched.read(written(tmp_path, *records))).axes
    [loss] = first.lines
    assert loss.get_xydata().tolist() == [[0, 1], [50, 3], [100, 2]]
    assert [line.get_ydata().tolist() for line in second.lines] == [[5, 5, 5]] * 2


def test_the_page_escapes_names_and_shows_a_lone_point(tmp_path):
    name = "<b>&layer"
    text = page_of(written(tmp_path, record(7, names=[name])), tmp_path)
    assert name not in text
    assert f"layer {name}" in {one.text for one in elements_of(text)}
    panels = figure_of(Watched.read(tmp_path / "run.jsonl")).axes
    assert all(line.get_marker() not in ("", "None") for panel in panels for line in panel.lines)


def test_the_command_draws_by_the_suffix_and_a_torn_line_is_named(run, tmp_path, capsys):
    file = tmp_path / "torn.jsonl"
    file.write_text(run[0].read_text() + '{"step": 6, "lo')
    assert cli.main(["watch", str(file)]) == 0
    assert cli.main(["watch", str(file), "--output", str(tmp_path / "new" / "a.png")]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("torn.jsonl: 3 records of 2 layers") == 2
    assert f"plot: {tmp_path / 'torn.html'}" in printed.out
    assert printed.err.count(f"{file}:4: expected a record of a Monitor, skipped") == 2
    assert (tmp_path / "torn.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_several_files_are_compared_a_line_a_run(tmp_path, capsys):
    """Both are called run.jsonl: their folders tell them apart."""
    files = []
    for folder, first, second in (("old", 5.0, 7.0), ("new", 9.0, 6.0)):
        measures = [record(0, logit=logit)["layers"][LAYERS[0]] for logit in (first, second)]
        measures[0] = measures[0] | {"near_one_hot": [0.1, 0.2], "relative_entropy": [None, None]}
        alarms = [{"layer": LAYERS[0], "measure": "max_logit", "value": 9.0, "limit": 8.0, "new": True}]
        one = record(0, loss=first) | {"layers": dict(zip(LAYERS, measures, strict=True))}
        (tmp_path / folder).mkdir()
        files.append(written(tmp_path / folder, one | {"alarms": alarms if folder == "new" else []}))
    watched = Watched.read(*files, files[0])
    found = {panel.measure: panel for panel in watched.panels}
    assert found["loss"].curves == {"old": [(0, 5.0)], "new": [(0, 9.0)]}
    assert found["max_logit"].curves == {"old": [(0, 7.0)], "new": [(0, 9.0)]}  # the largest of both layers
    assert found["near_one_hot"].curves["old"] == [(0, pytest.approx((0.15 + 0.25) / 2))]
    assert found["relative_entropy"].curves["old"] == [(0, 0.5)]  # of the layer that has one
    assert cli.main(["watch", *map(str, files), "--output", str(tmp_path / "both.html")]) == 0
    assert "old: 1 record of 2 layers (blocks.*.attention), steps 0 to 0, no alarms; new: " in capsys.readouterr().out
    texts = {one.text for one in elements_of((tmp_path / "both.html").read_text(encoding="utf-8"))}
    assert {"run old", "run new", "new, step 0: blocks.0.attention: max_logit 9, threshold 8"} <= texts


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b"step loss\n1 2\n", "whose first line is none"),
        (b'{"task": "recall"}\n' * 3, "lacks step, loss, alarms or layers"),
        (b'{"step": 1, "loss": 1, "alarms": [], "layers": {"a": 1}}\n', "whose first line is none"),
        (b'{"step": 1, "loss": 1, "alarms": [{}], "layers": {}}\n', "whose first line is none"),
        (b'{"step": 1, "loss": "1", "alarms": [], "layers": {}}\n', "whose first line is none: a value is no number"),
        (b'{"step": 1, "loss": 1%s, "alarms": [], "layers": {}}\n' % (b"0" * 400), "whose first line is none"),
        (b'{"step": 1%s, "loss": 1, "alarms": [], "layers": {}}\n' % (b"0" * 400), "step is no number"),
        (b'{"step": 1, "loss": null, "alarms": [], "layers": {}}\n', "a loss or a layer's measure"),
        (b"[" * 100_000, "whose first line is none"),
        (b"[1]\n", "lacks step"),
        (b"\x89PNG\xff\xfe", "it is no text"),
    ],
)
def test_another_file_is_refused_in_one_line(content, part, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["watch", str(file)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("tritonattn watch: FILE: expected ")
    assert part in said[0]
    assert not (tmp_path / "a.html").exists()
