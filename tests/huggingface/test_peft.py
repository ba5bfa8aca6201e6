"""PEFT: LoRA with a learned scaling in `modules_to_save`, trained, saved, loaded and merged."""

import pytest
import torch

peft = pytest.importorskip("peft")
import transformers

from tests.huggingface.architectures import ARCHITECTURES
from tests.support.refusals import refuses
from tritonattn.huggingface import patch, patched

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


def model(layers=None):
    """The same patched model each time, with ssmax in every layer, or in some."""
    network = ARCHITECTURES["llama"].build()
    if layers != []:
        patch(network, scaling="ssmax", layers=layers)
    return network


def lora():
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["tritonattn"])


def logits(network):
    with torch.no_grad():
        return network.eval()(TOKENS).logits


def test_the_adapters_copy_of_the_scaling_is_trained_saved_loaded_and_merged(tmp_path):
    adapted = peft.get_peft_model(model(), lora())
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        adapted.train()(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scalings = {name: p for name, p in adapted.named_parameters() if "tritonattn" in name}
    learned = {name: p for name, p in scalings.items() if "modules_to_save.default" in name}
    originals = {name: p for name, p in scalings.items() if "original_module" in name}
    assert len(learned) == len(originals) == 4  # s and b of two layers
    assert all(p.requires_grad for p in learned.values())
    assert not any(p.requires_grad for p in originals.values())
    for before, after in zip(originals.values(), learned.values(), strict=True):
        assert not torch.equal(before, after)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(model()), rtol=0, atol=0)
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(model()))

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)  # LoRA's product, rounded into W
    assert set(patched(merged).layers) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    merged.save_pretrained(tmp_path / "whole")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), logits(merged))


@pytest.mark.parametrize("wrap", ["get_peft_model", "its base", "prompt", "add_adapter"])
def test_a_model_that_peft_has_adapted_takes_no_learned_values_which_it_would_not_save(wrap, tmp_path):
    network = model([])
    if wrap == "add_adapter":  # of transformers, which calls this
        adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), network)
    else:
        prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        adapted = peft.get_peft_model(network, prompt if wrap == "prompt" else lora())
    given = network if wrap == "its base" else adapted
    for learned in ({"scaling": "ssmax"}, {"gain": torch.ones(4, 1)}):
        refuses("ValueError: model: ~ PEFT ~ patch first ~ modules_to_save=['tritonattn']", patch, given, **learned)
    assert patched(adapted) is None
    before = logits(adapted)
    with patch(given, scaling="key_count"):  # nothing to save but the adapter
        assert not torch.equal(logits(adapted), before)
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([], r"values of model\.layers\.0\.self_attn that the model lacks"),
        ([1], r"lacks values of model\.layers\.1\.self_attn, which the model has patched"),
        (None, r"lacks values of model\.layers\.1\.self_attn, which the model has patched"),
    ],
    ids=["none", "another", "one too many"],
)
def test_an_adapter_is_refused_by_a_base_with_other_scalings(layers, named, tmp_path):
    peft.get_peft_model(model([0]), lora()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"adapter: expected learned scalings .*{named}"):
        peft.PeftModel.from_pretrained(model(layers), tmp_path)
