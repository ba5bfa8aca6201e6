"""`Monitor` under transformers' Trainer."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from tests.huggingface.test_patch import state as whole_state
from tests.support.llama import ids, llama
from tritonattn.analysis import Monitor, Thresholds
from tritonattn.analysis.trainer import MonitorCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
QUIET = Thresholds(None, None, None)
TOKENS = ids(16, 8)


def state(net) -> dict:
    """Everything that a Monitor could leave in a model, without the attributes and entries of a trainer."""
    return {key: value for key, value in whole_state(net).items() if key not in ("attributes", "configs")}


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return len(TOKENS)

    def __getitem__(self, i):
        return {"input_ids": TOKENS[i], "labels": TOKENS[i]}


def trainer(net, folder, monitor=None, **options):
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "data_seed": 0}
    options |= {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    arguments = transformers.TrainingArguments(str(folder), **options)
    return transformers.Trainer(
        net, arguments, train_dataset=Texts(), eval_dataset=Texts(), callbacks=[monitor.callback()] if monitor else []
    )


def test_a_record_an_optimizer_step_that_says_what_the_trainer_says(tmp_path):
    net, file = llama("sdpa"), tmp_path / "a.jsonl"
    before = state(net)
    monitor = Monitor(net, every=2, file=file, thresholds=QUIET)
    run = trainer(net, tmp_path, monitor, eval_strategy="steps", eval_steps=1)
    run.train()
    assert state(net) == before
    assert not monitor.active
    records = [json.loads(line) for line in file.read_text().splitlines()]
    logged = [one["loss"] for one in run.state.log_history if "loss" in one]
    assert [one["step"] for one in records] == [0, 2]
    for record in records:
        assert record["loss"] == pytest.approx(logged[record["step"]], abs=2e-4)  # the trainer rounds
        for layer in record["layers"].values():
            assert layer["calls"] == 2  # micro-batches; the evaluation after the step before is not among them
            assert layer["rows"] == 2 * 2 * 8 * 4
            assert len(layer["q_gradient_norm"]) == 4
    plain = llama("sdpa")
    trainer(plain, tmp_path).train()
    for one, other in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_monitor_that_is_open_stays_open(tmp_path):
    monitor = Monitor(llama(), every=1, thresholds=QUIET)
    with monitor:
        trainer(monitor.model, tmp_path, monitor).train()
        assert monitor.active
        assert monitor.last["step"] == 3


@pytest.mark.parametrize(("enabled", "scale"), [(True, 64.0), (False, 1.0)])
def test_gradients_are_divided_by_the_losss_scale(enabled, scale):
    scaler, seen = SimpleNamespace(get_scale=lambda: 64.0, is_enabled=lambda: enabled), []
    callback = MonitorCallback(SimpleNamespace(step=lambda grad_scale: seen.append(grad_scale)))
    for optimizer in (SimpleNamespace(scaler=scaler), SimpleNamespace(scaler=None), object()):
        callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        callback.on_step_end(None, None, None)
    assert seen == [scale, 1.0, 1.0]
