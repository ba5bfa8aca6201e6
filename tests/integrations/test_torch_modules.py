"""torch.nn.MultiheadAttention with a scaling: torch's results with sqrt_dim, the formula with every mode."""

import pytest
import torch
from torch import nn

from tests.support.layers import assert_same
from tests.support.pairs import in_turn
from tests.support.refusals import refuses
from tests.support.watch import Watch
from tritonattn import SCALINGS, attention
from tritonattn import nn as learned
from tritonattn.integrations.torch_modules import MultiheadAttention, replace_multihead_attention

E, H, N, L, S = 16, 4, 3, 6, 6


def tokens(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(scaling="sqrt_dim", **arguments):
    """torch's layer and ours with its parameters, large enough for a sharp softmax."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, dtype=torch.float64, **arguments)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.4)
    return theirs, MultiheadAttention.of(theirs, scaling)


def additive(hidden, value=-torch.inf):
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, value)


CAUSAL = torch.ones(L, S).bool().triu(1)
PADDING = torch.arange(S) >= torch.tensor([6, 2, 4])[:, None]
PER_HEAD = (torch.rand(N * H, L, S, generator=torch.Generator().manual_seed(1)) < 0.4).index_fill(
    2, torch.tensor([0]), False
)
BIAS = torch.randn(L, S, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
CALLS = {
    "plain": {},
    "causal": {"attn_mask": CAUSAL},
    "causal hint": {"attn_mask": CAUSAL, "is_causal": True},
    "causal floats": {"attn_mask": additive(CAUSAL)},
    "large floats": {"attn_mask": additive(CAUSAL, -1e9)},
    "a bias of pairs": {"attn_mask": additive(CAUSAL) + BIAS},
    "a bias of pairs, and padding floats": {"attn_mask": BIAS, "key_padding_mask": additive(PADDING)},
    "biases of heads and keys": {
        "attn_mask": torch.stack([BIAS * head for head in range(N * H)]),
        "key_padding_mask": additive(PADDING, -3.0),
    },
    "padding": {"key_padding_mask": PADDING},
    "padding floats": {"key_padding_mask": additive(PADDING)},
    "causal hint and padding": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDING},
    "masks of heads": {"attn_mask": PER_HEAD},
    "masks of heads and padding": {"attn_mask": PER_HEAD & ~CAUSAL, "key_padding_mask": PADDING},
}


@in_turn(call=CALLS, batch_first=[False, True, True])
def test_sqrt_dim_is_torchs_layer(call, batch_first):
    theirs, ours = pair(batch_first=batch_first)
    x, settings = tokens(*((N, L, E) if batch_first else (L, N, E))).requires_grad_(), CALLS[call]
    for options in ({"need_weights": False}, {"need_weights": True}, {"average_attn_weights": False}):
        (out, weights), (expected, theirs_of_it) = (f(x, x, x, **settings, **options) for f in (ours, theirs))
        assert_same(theirs, out, expected, x)
        assert (weights is None) == (theirs_of_it is None)
        if weights is not None:
            torch.testing.assert_close(weights, theirs_of_it)


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_of_other_widths(bias):
    theirs, ours = pair(kdim=5, vdim=7, bias=bias, batch_first=True)
    inputs = [
        tokens(N, size, width, seed=i).requires_grad_() for i, (size, width) in enumerate(((4, E), (9, 5), (9, 7)))
    ]
    mask = torch.ones(4, 9).bool().triu(2)
    assert_same(theirs, ours(*inputs, attn_mask=mask)[0], theirs(*inputs, attn_mask=mask)[0], *inputs)


def by_hand(layer, x, hidden):
    """The layer on x [N, L, E] by its projections and the reference."""
    q, k, v = (
        (x @ w.T + b).unflatten(-1, (H, -1)).transpose(1, 2)
        for w, b in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    )
    out = attention(q, k, v, scaling=layer.scaling, mask=~hidden, backend="reference")
    return layer.out_proj(out.transpose(1, 2).flatten(2))


@in_turn(call=["causal hint", "padding", "masks of heads and padding"], need_weights=[True, False])
def test_other_modes_by_hand(call, need_weights):
    settings = CALLS[call]
    hidden = torch.zeros(N, H, L, S, dtype=torch.bool)
    if "attn_mask" in settings:
        mask = settings["attn_mask"]
        hidden = hidden | (mask if mask.dim() == 2 else mask.unflatten(0, (N, H)))
    if "key_padding_mask" in settings:
        hidden = hidden | settings["key_padding_mask"][:, None, None]
    x = tokens(N, L, E).requires_grad_()
    for mode in ("key_norm_mean", "sqrt_key_count", "log_key_count"):
        _, ours = pair(mode, batch_first=True)
        assert_same(ours, ours(x, x, x, need_weights=need_weights, **settings)[0], by_hand(ours, x, hidden), x)


@pytest.mark.parametrize("mode", ["sqrt_dim", "key_norm_sum"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_keeps_its_scaling_in_inference(mode, norm_first):
    """torch's encoders bypass the attention layer's forward in inference, and its padding by nested tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    x = 3 * tokens(N, L, E)
    plain = model.eval()(x, src_key_padding_mask=PADDING)
    with replace_multihead_attention(model, mode) as replaced:
        assert replaced.names == ["layers.0.self_attn", "layers.1.self_attn"]
        model.train()
        expected = model(x, src_key_padding_mask=PADDING)
        model.eval()
        with torch.no_grad():
            found = model(x, src_key_padding_mask=PADDING)
        visible = ~PADDING
        torch.testing.assert_close(found[visible], expected[visible])
        assert torch.allclose(found[visible], plain[visible]) == (mode == "sqrt_dim")
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(model(x, src_key_padding_mask=PADDING), plain)
    assert model.use_nested_tensor == (not norm_first)


def test_replacing_shares_parameters_and_takes_functions():
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    before = {name: id(x) for name, x in model.named_parameters()}

    def choose(name, module):
        assert isinstance(module, nn.MultiheadAttention)
        return {"layers.0.self_attn": "ssmax", "layers.2.self_attn": "dim"}.get(name)

    replaced = replace_multihead_attention(model, choose)
    assert replaced.names == ["layers.0.self_attn", "layers.2.self_attn"]
    assert isinstance(model.layers[0].self_attn.scaling, learned.SSMax)
    assert type(model.layers[1].self_attn) is nn.MultiheadAttention
    assert isinstance(model.layers[2].self_attn.scaling, SCALINGS["dim"])
    after = {name: id(x) for name, x in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"layers.0.self_attn.scaling.s", "layers.0.self_attn.scaling.b"}
    replaced.undo()
    assert {name: id(x) for name, x in model.named_parameters()} == before


def test_padding_and_a_causal_hint_take_no_memory_of_pairs_and_out_proj_is_called():
    theirs, ours = pair(batch_first=True)
    x, hidden, called = tokens(N, 256, E), torch.ones(256, 256).bool().triu(1), []
    padding = torch.arange(256) >= torch.tensor([256, 2, 4])[:, None]
    ours.out_proj.register_forward_hook(lambda *_: called.append(True))  # as adapters are
    largest = []
    for layer in (ours, theirs):
        with torch.no_grad(), Watch() as watch:
            layer(x, x, x, padding, False, hidden, is_causal=True)
        largest.append(watch.largest)
    assert largest == [x.nbytes, 8 * N * H * 256**2]
    assert called == [True]


def test_refusals():
    _, ours = pair(batch_first=True)
    x = tokens(N, L, E)
    with pytest.raises(TypeError, match=r"attn_mask: expected a bool or floating mask, got torch.int64"):
        ours(x, x, x, attn_mask=CAUSAL.long())
    refuses("ValueError: is_causal: expected attn_mask with it", ours, x, x, x, is_causal=True)
    for name in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(NotImplementedError, match=name):
            MultiheadAttention(E, H, **{name: True})
        model = nn.ModuleList([nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H, **{name: True})])
        with pytest.raises(NotImplementedError, match=name):
            replace_multihead_attention(model, "dim")
        assert type(model[0]) is nn.MultiheadAttention
    with pytest.raises(ValueError, match=r"scaling: expected one of .*ssmax.*did you mean 'power_law'"):
        MultiheadAttention(E, H, scaling="power_lw")
    with pytest.raises(ValueError, match=r"model: expected one with a torch.nn.MultiheadAttention inside, got Linear"):
        replace_multihead_attention(nn.Linear(2, 2))


def test_learned_scalings_come_before_peft_which_then_saves_their_layers(tmp_path):
    peft = pytest.importorskip("peft")

    def encoder():
        torch.manual_seed(0)
        return nn.TransformerEncoder(
            nn.TransformerEncoderLayer(E, H, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
        )

    config = peft.LoraConfig(r=2, target_modules=["linear1"], modules_to_save=["self_attn"])
    message = "ValueError: model: ~ PEFT has not adapted yet ~ patch first ~ their layers in modules_to_save"
    refuses(message, replace_multihead_attention, peft.get_peft_model(encoder(), config), "ssmax")
    models = [encoder(), encoder()]
    for one in models:
        replace_multihead_attention(one, "ssmax")
    adapted, x = peft.get_peft_model(models[0], config), torch.randn(2, L, E)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "scaling" in name:
                parameter += 0.5
        wanted, before = adapted(x), models[1](x)
    assert not torch.allclose(wanted, before)
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(peft.PeftModel.from_pretrained(models[1], tmp_path)(x), wanted)
