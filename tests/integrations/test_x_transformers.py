"""x-transformers' attention with a scaling, inside its models."""

import copy
from functools import partial

import pytest
import torch

pytest.importorskip("x_transformers", reason="pip install 'tritonattn[integrations]'")

from x_transformers import CrossAttender, Decoder, Encoder, TransformerWrapper, XTransformer
from x_transformers.attend import Attend

from tests.support.layers import with_gradients
from tests.support.pairs import in_turn
from tritonattn import attention
from tritonattn.integrations import x_transformers as ours

TOKENS = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(9) < torch.tensor([9, 5])[:, None]
LAYERS = {"Decoder": Decoder, "Encoder": Encoder}
OPTIONS = {
    "plain": {},
    "flash": {"attn_flash": True},
    "rotary": {"rotary_pos_emb": True},
    "grouped": {"attn_kv_heads": 2, "rotary_pos_emb": True},
    "one key head": {"attn_one_kv_head": True},
    "qk_norm": {"attn_qk_norm": True, "attn_qk_norm_scale": 7},
    "qk_norm a dimension": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "softclamp": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0},
    "sinks": {"attn_head_learned_sink": True},
    "memory": {"attn_num_mem_kv": 3},
    "relative positions": {"rel_pos_bias": True},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "alibi and softclamp": {"alibi_pos_bias": True, "attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0},
}


def model(layers=Decoder, **options):
    torch.manual_seed(0)
    made = TransformerWrapper(
        num_tokens=11, max_seq_len=16, attn_layers=layers(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    ).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "to_q" in name or "to_k" in name or "sink" in name:  # a size that makes the softmax matter
                parameter.mul_(3).add_(0.3 * torch.randn_like(parameter))
    return in_float64(made.eval())


def in_float64(made):
    """Their softmax is float32 even in a float64 model."""
    for module in made.modules():
        if isinstance(module, Attend) and "dtype" in getattr(module.attn_fn, "keywords", {}):
            module.attn_fn = partial(torch.nn.functional.softmax, dim=-1)
    return made


@in_turn(options=[*OPTIONS, "memory"], layers=["Decoder", "Encoder"])
def test_sqrt_dim_is_their_model(options, layers):
    theirs = model(LAYERS[layers], **OPTIONS[options])
    made = copy.deepcopy(theirs)
    replaced = ours.replace_attend(made)
    assert len(replaced.names) == 2
    assert not any(isinstance(x, Attend) for x in made.modules())
    assert set(made.state_dict()) == set(theirs.state_dict())
    torch.testing.assert_close(made(TOKENS), theirs(TOKENS), rtol=1e-9, atol=1e-9)
    masks = {} if options == "memory" and layers == "Decoder" else {"mask": PADDING}
    torch.testing.assert_close(*(with_gradients(x, TOKENS, **masks) for x in (made, theirs)), rtol=1e-7, atol=1e-8)
    replaced.undo()
    assert torch.equal(made(TOKENS), theirs(TOKENS))


@in_turn(options=["grouped", "qk_norm", "softclamp", "sinks", "relative positions", "alibi"])
def test_gradients_of_gradients_are_those_of_their_model(options):
    """As models that learn at test time need them: the loss after a step of gradient descent, by all parameters."""

    def meta_gradients(made):
        parameters = {name: x for name, x in made.named_parameters() if x.requires_grad}
        steps = torch.autograd.grad(made(TOKENS).square().mean(), tuple(parameters.values()), create_graph=True)
        learned = {name: x - 0.1 * step for (name, x), step in zip(parameters.items(), steps, strict=True)}
        after = torch.func.functional_call(made, learned, (TOKENS.flip(1),)).square().mean()
        return torch.autograd.grad(after, tuple(parameters.values()))

    theirs = model(**OPTIONS[options])
    made = copy.deepcopy(theirs)
    ours.replace_attend(made)
    torch.testing.assert_close(meta_gradients(made), meta_gradients(theirs), rtol=1e-7, atol=1e-9)


def test_cross_attention_and_generation():
    torch.manual_seed(0)
    sizes = {"num_tokens": 11, "depth": 1, "heads": 4, "max_seq_len": 16}
    both = {f"{side}_{name}": size for side in ("enc", "dec") for name, size in sizes.items()}
    theirs = in_float64(XTransformer(dim=32, **both).double().eval())
    made = copy.deepcopy(theirs)
    assert len(ours.replace_attend(made).names) == 3
    torch.testing.assert_close(made(TOKENS, TOKENS, mask=PADDING), theirs(TOKENS, TOKENS, mask=PADDING))
    found, expected = (x.generate(TOKENS, TOKENS[:, :1], 8, mask=PADDING, temperature=0.0) for x in (made, theirs))
    assert torch.equal(found, expected)
    torch.manual_seed(0)
    cross = in_float64(CrossAttender(dim=32, depth=1, heads=4).double().eval())
    x, context = torch.randn(2, 2, 9, 32, dtype=torch.float64)
    expected = cross(x, context=context, context_mask=PADDING)
    for scaling in ("sqrt_dim", "ssmax"):  # which starts where the model was
        with ours.replace_attend(cross, scaling):
            torch.testing.assert_close(cross(x, context=context, context_mask=PADDING), expected)


@pytest.mark.parametrize(("kv_heads", "scale", "causal"), [(4, None, True), (2, 0.7, False), (1, None, True)])
def test_other_modes_by_hand(kv_heads, scale, causal):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, kv_heads, 9, 8, dtype=torch.float64, generator=generator)
    wide = [x.repeat(1, 4 // kv_heads, 1, 1) for x in (k, v)]  # their heads are shared in turn
    given = {"causal": causal, "mask": PADDING[:, None, None], "backend": "reference"}
    attend = Attend(causal=causal, heads=4, scale=scale)
    for mode in ("key_norm_mean", "key_norm_max", "log_key_count", "cosine"):
        gain = None if scale is None or mode == "cosine" else scale * 8**0.5
        out, _ = ours.ScaledAttend(attend, 4, mode)(q, k, v, mask=PADDING)
        torch.testing.assert_close(out, attention(q, *wide, scaling=mode, gain=gain, **given))


REFUSED = {
    **{name: {f"attn_{name}": True} for name in ("l2_distance", "add_zero_kv", "selective", "cog_signed")},
    "pre_softmax_talking_heads": {"attn_pre_talking_heads": True},
    "post_softmax_talking_heads": {"attn_post_talking_heads": True},
    "attn_fn: expected softmax, got sparse_topk_attn": {"attn_sparse_topk": 3},
    "attn_fn: expected softmax, got sigmoid": {"attn_sigmoid": True},
    "attn_fn: expected softmax, got one_hot_straight_through": {"attn_hard": True},
    "residual_attn": {"residual_attn": True},
}


SET = ("pre_scale_post_talking_heads", "inverted_attention", "cope", "flash_pack_seq")


@pytest.mark.parametrize("message", [*REFUSED, *SET])
def test_options_that_change_probabilities_are_refused_by_name(message):
    made = model(**REFUSED.get(message, {}))
    if message in SET:
        setattr(next(x for x in made.modules() if isinstance(x, Attend)), message, True)
    with pytest.raises(NotImplementedError, match=message):
        ours.replace_attend(made)
    assert sum(isinstance(x, Attend) for x in made.modules()) == 2
