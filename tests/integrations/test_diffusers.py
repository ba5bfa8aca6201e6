"""diffusers' attention backends, one a scaling, inside its models."""

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'tritonattn[integrations]'")

from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from tests.support.pairs import in_turn
from tritonattn import attention
from tritonattn.integrations import diffusers as ours

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def registered():
    """`register`, undone after the test: the table of backends is global."""
    names = []

    def register(name=ours.NAME, *arguments, **keywords):
        ours.register(name, *arguments, **keywords)
        names.append(name)
        return name

    yield register
    for name in set(names):
        ours.unregister(name)


def flux(seed=0):
    torch.manual_seed(seed)
    made = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm_q" in name or "norm_k" in name:  # logits of a size that makes the softmax matter
                parameter.mul_(2)
    return made.eval()


def inputs():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": normal(2, 9, 4),
        "encoder_hidden_states": normal(2, 5, 8),
        "pooled_projections": normal(2, 8),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": normal(9, 3),
        "txt_ids": normal(5, 3),
    }


def operands(q_len=6, k_len=6, heads=(4, 4)):
    generator = torch.Generator().manual_seed(1)
    sizes = ((q_len, heads[0]), (k_len, heads[1]), (k_len, heads[1]))
    return [torch.randn(2, n, h, 8, generator=generator, dtype=torch.float64) for n, h in sizes]


def sample(model, **attention_arguments):
    return model(**inputs(), joint_attention_kwargs=attention_arguments).sample


@pytest.mark.parametrize("biased", [False, True])
def test_sqrt_dim_is_their_model_and_its_gradients(registered, biased):
    """With a bias of all pairs of text and image tokens, too, and the bias's gradient."""
    model, name = flux(), registered()
    given = {"attention_mask": torch.randn(2, 2, 14, 14).mul(2).requires_grad_()} if biased else {}
    leaves = [*model.parameters(), *given.values()]
    expected = sample(model, **given)
    assert biased == (not torch.allclose(expected, sample(model)))
    gradients = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
    with ours.use(model, name) as replaced:
        assert replaced.names == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
        found = sample(model, **given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(found.square().sum(), leaves, allow_unused=True)
        torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-4)
    assert torch.equal(sample(model, **given), expected)


UPPER = torch.ones(6, 6).bool().triu(1)
MASKS = {
    "full": {},
    "keys": {"attn_mask": torch.arange(6) < torch.tensor([4, 6])[:, None]},
    "bool": {
        "attn_mask": torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < torch.tensor([1] + [0.6] * 5)
    },
    "floats": {"attn_mask": torch.zeros(1, 1, 6, 6).double().masked_fill(UPPER, -torch.inf)},
    "ten thousand": {"attn_mask": torch.zeros(1, 1, 6, 6).double().masked_fill(UPPER, -1e4)},
    "bias": {"attn_mask": torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)).double()},
    "causal": {"is_causal": True},
}


def assert_as_native(name, operands, **arguments):
    backends = (AttentionBackendName(backend) for backend in (name, "native"))
    torch.testing.assert_close(*(dispatch_attention_fn(*operands, backend=one, **arguments) for one in backends))


@in_turn(mask=MASKS, scale=[None, 0.9], heads=[(4, 4), (4, 2), (4, 2)])
def test_every_argument_is_as_natives(registered, mask, scale, heads):
    is_grouped = heads[0] != heads[1]
    assert_as_native(registered(), operands(heads=heads), scale=scale, enable_gqa=is_grouped, **MASKS[mask])


@pytest.mark.parametrize(("q_len", "k_len"), [(4, 7), (7, 4)])
def test_causal_is_top_left_where_lengths_differ(registered, q_len, k_len):
    assert_as_native(registered(), operands(q_len, k_len), is_causal=True)


def test_other_modes_by_hand(registered):
    given = {"causal": True, "return_aux": True, "backend": "reference"}
    for mode in ("key_norm_mean", "log_key_count"):
        options = {"is_causal": True, "backend": AttentionBackendName(registered("tritonattn_mode", mode))}
        for scale, gain in ((None, None), (0.5, 0.5 * 8**0.5)):
            wanted, aux = attention(*(x.transpose(1, 2) for x in operands()), scaling=mode, gain=gain, **given)
            out = dispatch_attention_fn(*operands(), scale=scale, **options)
            torch.testing.assert_close(out, wanted.transpose(1, 2))
            found = dispatch_attention_fn(*operands(), scale=scale, attention_kwargs={"return_lse": True}, **options)
            torch.testing.assert_close(found, (out, aux.lse.transpose(1, 2)))


def test_refusals(registered):
    q, k, v = operands()
    entry = AttentionBackendName(registered())

    def dispatch(key=k, **options):
        return dispatch_attention_fn(q, key, v, backend=entry, **options)

    mask = torch.ones(6, 6).bool()
    not_made = "name: expected one that `register` made, got 'native'"
    linear = "model: expected attention processors that take a backend, got Linear"
    for error, message, call in (
        (ValueError, "attn_mask: expected None with is_causal", lambda: dispatch(attn_mask=mask, is_causal=True)),
        (NotImplementedError, "_parallel_config: context parallelism", lambda: dispatch(parallel_config=object())),
        (ValueError, "key: expected query's 4 heads without enable_gqa, got 2", lambda: dispatch(key=k[:, :, :2])),
        (ValueError, "name: expected one that diffusers does not have, got 'native'", lambda: ours.register("native")),
        (ValueError, "name: expected lower case", lambda: ours.register("TritonAttn")),
        (ValueError, "which is a module", lambda: ours.register("tritonattn_learned", "ssmax")),
        (ValueError, not_made, lambda: ours.unregister("native")),
        (ValueError, not_made, lambda: ours.use(flux(), "native")),
        (ValueError, linear, lambda: ours.use(torch.nn.Linear(2, 2), registered())),
    ):
        with pytest.raises(error, match=message):
            call()
