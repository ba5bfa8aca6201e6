"""`advise`: the advice for every state of attention, and its reason."""

import json
import math

import pytest
import torch

from tests.analysis.test_rules import BARE, OPEN, POSITIONS
from tests.huggingface.architectures import ARCHITECTURES, Architecture, _decoder
from tests.huggingface.test_kinds import _ROTARY_IN_WINDOWS, built
from tests.huggingface.test_patch import state
from tests.lab.test_compare import subject
from tests.support.llama import ids, llama
from tritonattn.analysis import advise, diagnose
from tritonattn.analysis.fading import mass
from tritonattn.cli import main as cli
from tritonattn.huggingface import patch
from tritonattn.lab import compare
from tritonattn.nn import ScaledAttention
from tritonattn.scaling import Cosine

TOKENS = ids(2, 40)


def sharpened(factor: float, layers=(0, 1), key: float = 1.0):
    """A small model whose queries, or keys, are larger or smaller in some layers."""
    net = llama().eval()
    with torch.no_grad():
        net.model.norm.weight[0] += 0.1  # as after a step
        for layer in layers:
            net.model.layers[layer].self_attn.q_proj.weight.mul_(factor)
            net.model.layers[layer].self_attn.k_proj.weight.mul_(key)
    return net


@pytest.mark.parametrize(
    ("factor", "key", "rule", "mode"),
    [
        (1.0, 1.0, "positions first", "sqrt_dim"),
        (300.0, 1.0, "peaked", "cosine"),  # the queries are too large: key norms cannot tell
        (1.0, 300.0, "peaked", "key_norm_mean"),
        (1e-3, 1.0, "uniform", "cosine"),
        (1.0, 1e-3, "uniform", "key_norm_mean"),
    ],
)
def test_models(factor, key, rule, mode):
    net = sharpened(factor, key=key)
    net.model.layers[0].train()
    before, training = state(net), [module.training for module in net.modules()]
    advice = advise(net, TOKENS)
    assert state(net) == before
    assert [module.training for module in net.modules()] == training
    assert {one.rule.name for one in advice.findings} == {rule}
    assert advice.mode == mode
    assert advice.keeps == (mode == "sqrt_dim")
    assert advice.text.startswith("positions first: in all layers rotary positions beyond the trained length (64 t")
    assert [one.layer for one in advice.findings] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert {one.reading.bounded for one in advice.findings} == {""}
    assert "rotary positions take angles that no training has seen" in advice.why
    assert any(one.startswith("docs/language-model.md: layers over all keys, rotary in") for one in advice.evidence)
    for one in advice.findings:
        if one.after is not None:
            assert one.after.ill < 0.25 < one.reading.ill


def test_a_reading_is_that_of_diagnose_and_of_what_the_patch_would_do():
    net, seen = sharpened(1.0, key=300.0), []
    for layer in net.model.layers:
        layer.self_attn.scaling = 0.2  # not 1 / sqrt(D) = 0.354
        layer.self_attn.attention_dropout = 0.5
    advice = advise(net.train(), TOKENS)
    assert advice.report() == advise(net.eval(), TOKENS).report()
    with (
        patch(net, advice.mode, layers=[0]) as patched,
        torch.no_grad(),
        patched.watch(lambda module, q, k, arguments, aux: seen.append((q, k, arguments))),
    ):
        net(TOKENS)
    q, k, arguments = seen[0]
    after = diagnose(q, k, scaling=arguments["scaling"], gain=arguments["gain"], causal=True)
    before = diagnose(q, k, scaling=0.2, causal=True)
    found = advice.findings[0]
    assert found.reading.max_logit == pytest.approx(float(before.max_logit.max()), rel=1e-4)
    assert found.reading.near_one_hot == pytest.approx(float(before.near_one_hot.mean()), abs=1e-6)
    assert found.after is not None
    assert found.after.max_logit == pytest.approx(float(after.max_logit.max()), rel=1e-4)
    assert found.after.relative_entropy == pytest.approx(float(after.relative_entropy.mean()), rel=1e-4)


def test_tensors():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 64, 32)
    assert advise(q, k, causal=True).keeps
    assert advise(q, 40 * k, causal=True).mode == "key_norm_mean"
    assert advise(q, k, causal=True, scaling="key_norm_sum").mode == "sqrt_dim"
    assert not advise(q, k, causal=True, scaling="key_norm_sum").keeps
    varied = advise(q, k, key_lengths=torch.tensor([8, 64]))
    assert varied.findings[0].rule.name == "varied counts"
    assert varied.mode == f"log_key_count({round((8 * 8 + 64 * 64) / 72)})"
    uneven = advise(q, k * torch.tensor([0.5, 2.0])[:, None, None, None], causal=True)
    assert uneven.findings[0].rule.name == "varied norms"
    assert uneven.mode == "key_norm_mean"
    assert uneven.findings[0].reading.key_norm_between == pytest.approx(0.6, abs=0.02)
    longer = advise(q, k, causal=True, context=32)
    assert longer.mode == "qwen_logn(32)"
    assert advise(q, k, causal=True, context=64).keeps
    broken = advise(q, k * torch.nan)
    assert broken.findings[0].rule.name == "broken"
    assert broken.keeps
    assert "mend the numbers first" in broken.report()
    json.dumps(broken.as_dict(), allow_nan=False)


def standing_out(gap: float, others: int, length: int):
    """q and k of rows whose first key's logit is `gap` above those of the others, with scaling=1.0."""
    k = torch.eye(others + 1, dtype=torch.float64)[None, None]
    return gap * k[:, :, :1].expand(-1, -1, length, -1), k


def test_bounded_logits_are_recognised_and_fade_as_the_formula_says():
    found = diagnose(*standing_out(5.0, 63, 3), scaling=1.0)
    assert float(found.gap) == pytest.approx(5.0)
    n = round(float(found.half_at))
    assert n == round(1 + math.exp(5))
    longer = diagnose(*standing_out(5.0, n - 1, 1), scaling=1.0)  # the same gap among n keys
    assert float(longer.max_probability) == pytest.approx(0.5, abs=1e-3)
    assert mass(5.0, 64) == pytest.approx(float(found.max_probability))
    assert math.isnan(mass(math.nan, 64))
    assert float(found.logit_bound) == pytest.approx(5.0)
    capped = diagnose(*standing_out(5.0, 63, 3), scaling=1.0, softcap=2.0)
    assert (float(capped.gap), float(capped.logit_bound)) == (4.0, 2.0)

    q, k = standing_out(5.0, 63, 3)
    assert advise(q, k, scaling=1.0).findings[0].rule.name == "healthy"
    assert "149" not in advise(q, k, scaling=1.0).table()  # nothing bounds its logits
    q, k = standing_out(5.0, 63, 64)
    for window, rule in ((None, "will fade"), ((62, 0), "healthy")):  # a window's rows never get more keys
        local = advise(q, k, scaling=1.0, softcap=50.0, causal=True, window=window)
        assert local.findings[0].rule.name == rule
    assert "window" in local.table()
    advice = advise(q, k, scaling=1.0, softcap=50.0)
    assert advice.keeps
    assert "149, softcap 50" in advice.table()
    for part in ("softcap 50 bounds", "0.70 at 64 keys and 0.50 at 149", "train with ssmax"):
        assert part in advice.text
    assert advise(q, k, scaling=Cosine(5.0)).findings[0].reading.bounded == "cosine"


class Layers(torch.nn.Module):
    """Layers of ours by a letter each: w rotary with a window, r rotary, n without positions; S: n with SSMax.

    A + behind them adds learned positions to the tokens.
    """

    def __init__(self, kinds, **options):
        super().__init__()
        torch.manual_seed(0)
        self.positions = torch.nn.Parameter(torch.randn(40, 64)) if "+" in kinds else None
        self.embedding, self.layers = torch.nn.Embedding(61, 64), torch.nn.ModuleList()
        for kind in kinds.rstrip("+"):
            own = {"rotary": 1e4 if kind in "rw" else None, "window": (7, None) if kind == "w" else None}
            own["scaling"] = "ssmax:40" if kind == "S" else "sqrt_dim"
            self.layers.append(ScaledAttention(64, 4, causal=True, **own, **options))

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x if self.positions is None else x + self.positions
        for layer in self.layers:
            x = x + layer(x)
        return x


LOG = "log_key_count(40)"


@pytest.mark.parametrize(
    ("kinds", "qk_norm", "rules", "mode", "text"),
    [
        ("rr", True, (POSITIONS, POSITIONS), None, "positions first: in all layers rotary positions"),
        ("wn", True, ("healthy", OPEN), LOG, "log_key_count(40), on 1 of 2 layers (layers.1)"),
        ("wn", False, ("healthy", BARE), None, "without QK-norm little is gained"),
        (
            *("wS", True, ("healthy", "healthy"), None),
            "keep sqrt_dim in 1 of 2 layers (layers.0) and ssmax in 1 of 2 layers (layers.1): layers over all keys",
        ),
        ("SS", True, ("healthy", "healthy"), None, "keep ssmax: layers over all keys have no positions, and a factor"),
        ("wr", True, ("healthy", POSITIONS), None, "positions first: in 1 of 2 layers (layers.1) rotary"),
        ("rn", True, (POSITIONS, OPEN), LOG, "fade"),
        ("nn", True, (OPEN, OPEN), LOG, "log_key_count(40), on all layers. No layer has positions"),
        ("nn+", True, ("healthy", "healthy"), None, "keep sqrt_dim. Positions are not seen in all layers"),
        ("nw", True, (OPEN, "healthy"), LOG, "log_key_count(40), on 1 of 2 layers (layers.0)"),
    ],
)
def test_layers_of_ours(kinds, qk_norm, rules, mode, text):
    net = Layers(kinds, qk_norm=qk_norm).train()
    with torch.no_grad():
        for layer in net.layers:  # at its start a layer without QK-norm is uniform
            layer.q_proj.weight.mul_(1.0 if qk_norm else 9.0)
    advice = advise(net, TOKENS, context=40)
    assert net.layers[0].training
    assert tuple(one.rule.name for one in advice.findings) == rules
    assert (advice.mode, advice.keeps) == (mode or advice.findings[0].reading.mode, mode is None)
    assert text in advice.text
    assert ("can read on" in advice.text) == ("S" in kinds)
    assert ("No layer has positions" in advice.text) == (kinds in ("nn", "SS"))
    assert ("positions first" in advice.text) == ("r" in kinds)
    assert advice.positions == tuple(f"layers.{number}" for number, kind in enumerate(kinds) if kind == "r")
    assert "half at" not in advice.text
    if mode is not None:
        assert advice.layers == tuple(f"layers.{number}" for number, kind in enumerate(kinds) if kind == "n")
    for one, column in zip(advice.findings, advice.table().splitlines()[2:], strict=True):
        assert ("positions " in column) == (one.rule.name in (POSITIONS, OPEN))
        assert ("QK-norm " in column) == (one.rule.name in (OPEN, BARE))


def test_a_model_at_its_start_is_told_what_to_train_with():
    """Weights of norms that are all alike; norms that are frozen do not tell."""
    for kinds, weights, rules, mode in (
        ("wn", "at their start", ["healthy", OPEN], LOG),
        ("wn", "trained", ["healthy", OPEN], "qwen_logn(40)"),
        ("wn", "frozen", ["healthy", OPEN], "qwen_logn(40)"),
        ("rr", "at their start", [POSITIONS, POSITIONS], "sqrt_dim"),
        ("rr", "trained", ["uniform", "uniform"], "cosine"),
    ):
        net = Layers(kinds, qk_norm=kinds == "wn")
        net.norm = torch.nn.LayerNorm(64)
        for parameter in net.parameters():
            parameter.requires_grad_(weights != "frozen")
        with torch.no_grad():
            net.norm.bias[3] = 0.1 if weights == "trained" else 0.0
            for layer in net.layers:
                layer.q_proj.weight.mul_(1e-3 if kinds == "rr" else 1.0)  # uniform without QK-norm
        advice = advise(net, TOKENS)
        assert [one.rule.name for one in advice.findings] == rules, (kinds, weights)
        assert advice.mode == mode
        assert ("positions first, uniform" in advice.table()) == ("uniform" in rules)


def test_a_reading_of_ours_is_that_of_the_layers_own_operands_and_arguments():
    net, x = ScaledAttention(32, 4, causal=True, scaling=0.5, softcap=9.0).eval(), torch.randn(2, 9, 32)
    found = advise(net, {"x": x, "key_lengths": torch.tensor([4, 9])}).findings[0]
    q, k, _ = net.operands(x)
    alone = diagnose(q[1:], k[1:], scaling=0.5, softcap=9.0, causal=True)
    padded = diagnose(q[:1, :, :4], k[:1, :, :4], scaling=0.5, softcap=9.0, causal=True)
    assert found.reading.max_logit == pytest.approx(float(max(alone.max_logit.max(), padded.max_logit.max())))
    assert found.reading.key_count_mean == pytest.approx((10 + 45) / 13)
    for name, x in (("cu_seqlens", torch.tensor([0, 9], dtype=torch.int32)), ("cache", net.cache(2, 9))):
        with pytest.raises(NotImplementedError, match=f"tokens: expected sequences in rows of their own, got {name}"):
            advise(net, {"x": torch.randn(9, 32), name: x})


KINDS = {
    "llama": (ARCHITECTURES["llama"], [POSITIONS, POSITIONS]),
    "qwen3": (_decoder("Qwen3"), [POSITIONS, POSITIONS]),
    "gemma3": (ARCHITECTURES["gemma3"], ["window", POSITIONS]),
    "llama4": (
        Architecture(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            {**ARCHITECTURES["llama4"].arguments, "no_rope_layers": [1, 0], "attn_temperature_tuning": False},
        ),
        ["window", BARE],
    ),
    "llama4 with its factor": (ARCHITECTURES["llama4"], ["window", "healthy"]),
    "smollm3": (_decoder("SmolLM3", use_sliding_window=False, no_rope_layers=[1, 0]), [POSITIONS, BARE]),
    "cohere2": (_decoder("Cohere2", **_ROTARY_IN_WINDOWS), [BARE, "window"]),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [4, 40])
def test_kinds_of_layers_in_transformers_models(name, length):
    """A window counts where the tokens do not reach it, too."""
    architecture, expected = KINDS[name]
    net = built(architecture)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)
    advice = advise(net, ids(2, length))
    found = ["window" if one.reading.windowed else one.rule.name for one in advice.findings]
    assert found == expected
    assert advice.keeps
    assert advice.text.startswith("positions first: ") == (POSITIONS in expected)
    assert ("compare log_key_count(64)" in advice.text) == (BARE in expected)


def test_where_a_mode_or_none_is_a_fix():
    """A single long query is tamed by cosine alone, and queries of 0 by nothing but a gain."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 64, 32)
    q[:, :, 40] *= 1000
    advice = advise(q, k, causal=True)
    assert advice.findings[0].rule.name == "peaked"
    assert advice.mode == "cosine"
    advice = advise(torch.zeros(1, 2, 16, 8), torch.randn(1, 2, 16, 8))
    assert advice.findings[0].rule.name == "uniform"
    assert advice.keeps
    assert "gain" in advice.text


@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_of_one_key_are_no_reason_for_a_remedy(tokens):
    """They are one-hot with any scaling."""
    for advice in (advise(*torch.randn(2, 1, 4, tokens, 32), causal=True), advise(llama(), ids(2, tokens))):
        assert advice.keeps
        assert {one.rule.name for one in advice.findings} == {"few keys"}
        assert "keep sqrt_dim: " in advice.text


def test_errors():
    q = torch.randn(1, 1, 2, 4)
    for arguments, options, error, message in (
        ((q, {}), {}, TypeError, "k: expected a tensor"),
        ((q, q), {"sinks": 1.0}, TypeError, "sinks: expected arguments out of"),
        ((q, q), {"softcap": -1.0}, ValueError, "softcap: expected"),
        ((llama(), TOKENS), {"softcap": 1.0}, TypeError, "softcap: expected only with q and k"),
        ((llama(), TOKENS), {"causal": True}, TypeError, "causal: expected only with q and k"),
        ((torch.nn.Linear(3, 3), torch.randn(2, 3)), {}, ValueError, "model: expected attention by .*, got none"),
        ((torch.nn.Linear(3, 3), TOKENS), {}, ValueError, "tokens: expected inputs that Linear takes"),
        ((q, torch.randn(1, 1, 2, 5)), {}, ValueError, "k: expected"),
        ((llama(), "hello"), {}, TypeError, r"tokens: expected token ids, int \[B, S\], .*, got str"),
        ((llama(), TOKENS[0]), {}, TypeError, r"tokens: expected token ids, .*, got torch.int64 \[40\]"),
        ((llama(), {"input_ids": TOKENS.float()}), {}, TypeError, r"tokens: .*, got torch.float32 \[2, 40\]"),
        ((llama(), TOKENS + 61), {}, ValueError, "tokens: expected inputs that LlamaForCausalLM takes, got input_ids"),
        ((llama(), {"tokens": TOKENS}), {}, ValueError, r"takes, got tokens torch.int64 \[2, 40\]"),
        ((llama(), {"inputs_embeds": torch.randn(1, 5, 7).half()}), {}, ValueError, "takes, got inputs_embeds torch.f"),
        ((None, TOKENS), {}, TypeError, "model: expected an nn.Module, or q of one layer, got NoneType"),
        ((llama(), TOKENS), {"context": "long"}, TypeError, "context: expected an int"),
        ((q, q), {"context": 1}, ValueError, "context: expected at least 2"),
        ((ScaledAttention(32, 4), torch.randn(1, 2, 31)), {}, ValueError, "ScaledAttention takes, got torch.float32"),
        ((ScaledAttention(32, 4), {"x": None}), {}, ValueError, "ScaledAttention takes, got x NoneType"),
    ):
        with pytest.raises(error, match=message):
            advise(*arguments, **options)


def test_the_command(monkeypatch, tmp_path, capsys):
    one = subject()
    monkeypatch.setattr(compare, "load", lambda name, device: one)
    file = tmp_path / "a.json"
    assert cli.main(["advise", "--max-tokens", "40", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    for part in ("model.layers.1.self_attn", "Try first: ", "Why: ", "Watch: ", "It rests on ("):
        assert part in out
    record = json.loads(file.read_text())
    assert record["tokens"] == 40
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["command"]
    assert len(record["findings"]) == 2
    assert record["mode"] == advise(one.model, one.tokenizer(compare.TEXT.read_text())["input_ids"][:, :40]).mode
    assert cli.main(["advise", "--max-tokens", "40", "--context", "10"]) == 0
    assert "the trained length (10 tokens)" in capsys.readouterr().out.replace("\n  ", " ")
