"""train-compare: runs of the same weights and data in every mode, its files and tables, and docs/training.md."""

import pytest
import torch

pytest.importorskip("sklearn", reason="pip install 'tritonattn[lab]'")

from scipy import stats

from perf.__main__ import main
from perf.studies.train_compare import trainer
from perf.studies.train_compare.modes import MODES, build
from perf.studies.train_compare.records import Recipe, Run, read
from perf.studies.train_compare.report import Interval
from perf.studies.train_compare.tasks import TASKS
from perf.studies.train_compare.trainer import as_tested, fresh_model, train
from tritonattn.core.provenance import Environment

CPU = torch.device("cpu")


def planned_run(task: str = "digits", mode: str = "sqrt_dim", seed: int = 0, steps=3, batch=4, **choices) -> Run:
    recipe = Recipe("adamw", 1e-2, 0.01, steps, batch)
    return Run(task, mode, seed, recipe, Environment.of(CPU), "command", "date", quick=True, **choices)


@pytest.mark.parametrize("task", TASKS)
def test_every_mode_starts_from_the_same_weights_and_gets_the_same_batches(task, monkeypatch):
    def weights(mode: str, seed: int = 0) -> dict[str, torch.Tensor]:
        model = fresh_model(planned_run(task, mode, seed))
        return {name: p for name, p in model.named_parameters() if ".scaling." not in name}

    def batches(mode: str) -> tuple[list, str]:
        found, draw = [], type(TASKS[task]).batch
        monkeypatch.setattr(TASKS[task], "batch", lambda *rest: found.append(draw(TASKS[task], *rest)) or found[-1])
        return found, train(planned_run(task, mode, steps=2), CPU).data

    first = weights("sqrt_dim")
    for mode in ("key_count+gain", "power_law", "sqrt_dim:log_key_count"):
        other = weights(mode)
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)
    (drawn, data), (others, other_data) = batches("sqrt_dim"), batches("power_law")
    assert data == other_data
    for a, b in zip(drawn, others, strict=True):
        assert torch.equal(a.target, b.target)
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
    assert not torch.equal(next(iter(weights("sqrt_dim", 1).values())), next(iter(first.values())))
    other_seed = TASKS[task].batch(4, torch.Generator().manual_seed(1))
    assert not torch.equal(other_seed.target, drawn[0].target)


@pytest.mark.parametrize("mode", MODES)
def test_every_default_mode_trains(mode):
    run = train(planned_run(mode=mode, steps=6, batch=32), CPU, observations=2)
    assert run.status == "trained"
    assert run.train_loss[-1] < run.train_loss[0]
    assert run.steps == [3, 6]


@pytest.mark.parametrize(("name", "gain"), [("key_norm_sum+gain", 9), ("cosine+gain", 1), ("dim*4", 4)])
def test_a_gain_is_learned_from_its_start_or_constant(name, gain):
    scaling = build(name, 4, 8, keys=9)
    torch.testing.assert_close(scaling.theta.exp(), torch.full((4,), float(gain)))
    assert scaling.theta.requires_grad == ("+" in name)


def test_parameters_of_scalings_are_not_decayed():
    model = fresh_model(planned_run(mode="ssmax"))
    decayed, kept = trainer._optimizer(model, Recipe("adamw", 1.0, 0.5, 1, 1)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    assert not [names[id(p)] for p in decayed["params"] if ".scaling." in names[id(p)]]
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_no_held_out_number_is_trained_on_and_lengths_vary():
    task, random = TASKS["spell"], torch.Generator().manual_seed(0)

    def numbers(batch) -> list[int]:
        rows = zip(batch.inputs["source"].tolist(), batch.inputs["lengths"].tolist(), strict=True)
        return [int("".join(map(str, digits[:length]))) for digits, length in rows]

    trained, held_out = numbers(task.batch(2000, random)), numbers(task.held_out())
    assert {n % 11 for n in held_out} == {3}
    assert 3 not in {n % 11 for n in trained}
    assert {len(str(n)) for n in trained} == {len(str(n)) for n in held_out} == set(range(1, 7))


def test_a_table_has_each_key_once_and_is_asked_for_keys_inside_its_length():
    task = TASKS["recall"]
    batch = task.batch(20, torch.Generator().manual_seed(0))
    keys, values, lengths, asked = (batch.inputs[name] for name in ("keys", "values", "lengths", "asked"))
    assert keys.min() >= 0
    assert keys.max() == 15
    assert len(set(lengths.tolist())) > 5
    for row in range(20):
        table = [tuple(key) for key in keys[row].tolist()]
        assert len(set(table)) == len(table) == 64
        found = [table.index(tuple(key)) for key in asked[row].tolist()]
        assert max(found) < lengths[row]
        assert [values[row, i].item() for i in found] == batch.target[row].tolist()


def test_a_swap_tests_the_same_weights_with_another_scaling():
    run = planned_run("recall", "sqrt_dim*4:sqrt_dim*2", qk_norm=True, head_dim=32)
    model = fresh_model(run)
    tested = as_tested(run, model)
    weights = dict(model.named_parameters())
    for name, p in tested.named_parameters():
        if name == "attention.scaling.theta":
            assert p.exp().tolist() == pytest.approx([2.0, 2.0])
            assert weights[name].exp().tolist() == pytest.approx([4.0, 4.0])
            assert not p.requires_grad
        else:
            assert torch.equal(p, weights[name])
    assert as_tested(planned_run("recall"), model) is model
    batch = TASKS["recall"].batch(2, torch.Generator().manual_seed(0))
    assert not torch.equal(model(**batch.inputs), tested(**batch.inputs))


def test_the_command_writes_everything(tmp_path, capsys):
    arguments = ["train-compare", "--tasks", "digits", "--modes", "sqrt_dim,power_law", "--seeds", "2", "--steps", "2"]
    arguments += ["--out", str(tmp_path)]
    main(arguments)
    out = capsys.readouterr().out
    assert all(part in out for part in ("accuracy", "±", "exponent of n", "2 seeds"))
    assert (tmp_path / "runs.md").read_text() == out
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    runs = read(tmp_path / "runs-digits.jsonl")
    assert [(run.seed, run.mode) for run in runs] == [(s, m) for s in (0, 1) for m in ("sqrt_dim", "power_law")]
    assert runs[0].environment.torch == torch.__version__
    assert runs[0].command


def test_the_interval_is_students():
    values = [0.91, 0.93, 0.88, 0.97, 0.90]
    one = Interval.of(values)
    low, high = stats.t.interval(0.95, 4, loc=one.mean, scale=stats.sem(values))
    assert (one.mean - one.half, one.mean + one.half) == pytest.approx((low, high), rel=1e-12)
    assert Interval.of([1.0, 3.0]).half == pytest.approx(12.706, abs=1e-3)  # t's quantile 0.975, 1 degree of freedom
    assert Interval.of([2.0]).text() == "2.000 ± ?"
    assert not Interval.of([-1.0, 3.0]).excludes_zero
    assert Interval.of([2.9, 3.0]).excludes_zero
    assert Interval.of([float("nan"), 3.0]).text() == "nan ± nan"
    assert Interval.of([float("inf"), 3.0]).text() == "inf ± nan"
