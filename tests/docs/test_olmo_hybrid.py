"""docs/examples/olmo_hybrid.py: the patched hybrid is the plain one's full pass, in training and at every step."""

import copy
import inspect
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from tritonattn.huggingface import patch, patched

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FILE = Path(__file__).resolve().parents[2] / "docs/examples/olmo_hybrid.py"
NAMES = {"layers.*.self_attn.ssmax_scale": "s"}
PROMPT, LENGTH = 30, 48


@pytest.fixture
def hybrid(monkeypatch):
    spec = spec_from_file_location("olmo_hybrid", FILE)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "olmo_hybrid", module)
    spec.loader.exec_module(module)
    return module


def built(hybrid, implementation="sdpa"):
    torch.manual_seed(0)
    model = hybrid.small_hybrid().eval()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("ssmax_scale"):
                x.copy_(torch.rand(4) + 0.5)
            elif "norm" in name:
                x.add_(0.3 * torch.randn_like(x))
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_step_is_the_full_pass_and_the_model_s_own_code_is_not(hybrid, implementation, tmp_path):
    classes = (part for part in vars(hybrid).values() if inspect.isclass(part) and part.__module__ == "olmo_hybrid")
    assert not any("tritonattn" in inspect.getsource(part) for part in classes)
    model = built(hybrid, implementation)
    tokens = hybrid.texts(2, LENGTH, torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model(tokens).logits[:, PROMPT - 1 :]
        control = hybrid.stepwise(
            model, tokens, PROMPT
        )  # n is the length of each call: ln 1 = 0 for ln 31 = 3.43 to ln 48 = 3.87
    assert hybrid.error(control[:, 0], whole[:, 0]) < hybrid.BOUND
    assert min(hybrid.error(control[:, i], whole[:, i]) for i in range(1, LENGTH - PROMPT + 1)) > 0.05
    names = model.state_dict().keys()
    patch(model, scaling="ssmax", layers="global", parameters=NAMES)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == names
    for ours in (model, loaded):
        found = hybrid.stepwise(ours, tokens, PROMPT)
        assert max(hybrid.error(found[:, i], whole[:, i]) for i in range(LENGTH - PROMPT + 1)) < hybrid.BOUND
    new = loaded.generate(tokens[:, :PROMPT], max_new_tokens=9, do_sample=False)
    patched(model).undo()
    for i in range(PROMPT, PROMPT + 9):
        assert torch.equal(model(new[:, :i]).logits[:, -1].argmax(-1), new[:, i])


def test_training_is_that_of_the_plain_model(hybrid):
    plain = built(hybrid).train()
    ours = copy.deepcopy(plain)
    with patch(ours, scaling="ssmax", layers="global", parameters=NAMES):
        losses = hybrid.train(ours, 4)
    wanted = hybrid.train(plain, 4)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    moved = [(a - b).abs().max() for a, b in zip(ours.parameters(), plain.parameters(), strict=True)]
    assert max(moved) < 1e-3
    assert losses[-1] < losses[0]
