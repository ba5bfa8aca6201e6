"""Every learned scaling: values, gradients of its parameters, every way to call it."""

import pytest
import torch

from tests.support.calls import operands
from tests.support.learned import LEARNED, learned
from tests.support.masks import MASKS
from tests.support.pairs import pairwise
from tests.support.refusals import refuses
from tritonattn import SCALINGS, Scaling, attention, nn
from tritonattn.core.torch_distributed import twin
from tritonattn.nn.tied import tie_parameters
from tritonattn.scaling.base import relative_gain

every_case = pytest.mark.parametrize("case", LEARNED)


def outcome(scaling, leaves, call=attention, **arguments):
    """out and the gradients of q, k, v and of the scaling's parameters, under a fixed objective."""
    out = call(*leaves.values(), scaling=scaling, **arguments)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    tensors = {**leaves, **dict(scaling.named_parameters())}
    gradients = torch.autograd.grad((out.double() * direction).sum(), list(tensors.values()), materialize_grads=True)
    return {"out": out, **dict(zip(tensors, gradients, strict=True))}


def assert_same(ours, exact, rtol=1e-9, atol=1e-10):
    for name, expected in exact.items():
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pairwise(case=LEARNED, mask=MASKS, kv_heads=[1, 2, 4], free=[("case", "mask")])
def test_every_mask_against_the_reference(case, mask, kv_heads):
    leaves, scaling = operands(heads=(4, kv_heads)), learned(case)
    masks = MASKS[mask](2, 4, 5, 7)
    exact = outcome(scaling, leaves, backend="reference", **masks)
    assert_same(outcome(scaling, leaves, backend="sdpa", **masks), exact)


class Objective(torch.nn.Module):
    def __init__(self, scaling) -> None:
        super().__init__()
        self.scaling = scaling

    def forward(self, q, k, v):
        return attention(q, k, v, scaling=self.scaling, causal=True).square().sum()


@every_case
def test_gradients_of_parameters_by_finite_differences_alone_and_mapped(case):
    layer, (q, k, v) = Objective(learned(case)), operands().values()
    parameters = {name: x.detach().clone().requires_grad_() for name, x in layer.named_parameters()}

    def function(q, k, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (q, k, v.detach()))

    assert torch.autograd.gradcheck(function, (q, k, *parameters.values()), fast_mode=True)
    if not parameters:
        return
    inputs = [x.detach() for x in (q, k, v)]
    gradient = torch.func.grad(lambda values, *x: torch.func.functional_call(layer, values, x))
    expected = list(torch.autograd.grad(layer(*inputs), list(layer.parameters()), materialize_grads=True))
    parameters = {name: x.detach() for name, x in parameters.items()}
    torch.testing.assert_close(list(gradient(parameters, *inputs).values()), expected)
    of_samples = torch.func.vmap(gradient, in_dims=(None, 0, 0, 0))(parameters, *(x[:, None] for x in inputs))
    torch.testing.assert_close([x.sum(0) for x in of_samples.values()], expected)


def test_a_class_that_does_not_say_so_reads_keys():
    class Custom(Scaling):
        name = "custom"

    of_key_count, of_ssmax = type("Of", (SCALINGS["key_count"],), {}), type("Of", (nn.SSMax,), {})
    for one in (Custom(), of_key_count(), of_ssmax(4), nn.PerHead(Custom(), heads=4), nn.Scheduled("dim", Custom(), 5)):
        assert one.reads_keys
    assert not nn.PerHead("key_norm_max", heads=4).reads_keys


@every_case
def test_rows_without_keys_may_hold_nan_and_zeros_give_none(case):
    leaves, scaling = operands(), learned(case)
    masks = {"key_lengths": torch.tensor([0, 6])}
    clean = {backend: outcome(scaling, leaves, backend=backend, **masks) for backend in ("sdpa", "reference")}
    with torch.no_grad():
        leaves["q"][0] = torch.nan
        leaves["k"][0] = torch.nan
        leaves["k"][1, :, 6:] = torch.inf
    for backend, expected in clean.items():
        for name, x in outcome(scaling, leaves, backend=backend, **masks).items():
            assert torch.equal(x, expected[name]), name
    leaves = operands()
    with torch.no_grad():
        leaves["q"][:, :, 1] = 0
        leaves["k"][0] = 0
    results = [outcome(scaling, leaves, causal=True, backend=backend) for backend in ("sdpa", "reference")]
    assert all(x.isfinite().all() for x in results[0].values())
    assert_same(*results)


@pytest.mark.parametrize("name", nn.LEARNED)
def test_made_by_name_and_heads(name):
    scaling = nn.LEARNED[name](heads=4)
    assert scaling.name == name
    assert isinstance(scaling, Scaling)
    assert {tuple(x.shape) for x in scaling.parameters()} == {(4,)}
    assert attention(*operands().values(), scaling=scaling).shape == (2, 4, 5, 6)
    elsewhere = nn.LEARNED[name](heads=4, device="meta", dtype=torch.float64)
    assert {(x.device.type, x.dtype) for x in elsewhere.parameters()} == {("meta", torch.float64)}
    refuses("ValueError: scaling: ~ on q's device cpu, got meta", attention, *operands().values(), scaling=elsewhere)
    for arguments, error, message in (
        ({"heads": 0}, ValueError, "heads: expected at least 1, got 0"),
        ({"heads": True}, TypeError, "heads: expected an int, got bool"),
        ({"heads": 4, "dtype": torch.int32}, TypeError, r"dtype: expected float16, .* or float64, got torch\.int32"),
    ):
        with pytest.raises(error, match=message):
            nn.LEARNED[name](**arguments)


RESET = {
    "per_head": lambda: nn.PerHead("key_count", heads=4),
    "cosine": lambda: nn.LearnedCosine(4),
    "ssmax": lambda: nn.SSMax(4, base=512, bias=True),
    "log_power": lambda: nn.LearnedLogPower(4, power=1.5),
    "query_adaptive_ssmax": lambda: nn.QueryAdaptiveSSMax(4, head_dim=8),
    "ssmax at sqrt_dim": lambda: nn.SSMax(4, mode="sqrt_dim"),
    "log_power at sqrt_dim": lambda: nn.LearnedLogPower(4, mode="sqrt_dim"),
    "query_adaptive_ssmax at sqrt_dim": lambda: nn.QueryAdaptiveSSMax(4, head_dim=8, mode="sqrt_dim"),
    "power_law": lambda: nn.PowerLaw(4, "key_norm_sum"),
    "scheduled": lambda: nn.Scheduled("sqrt_dim", nn.SSMax(4, base=7), steps=3),
    "layer": lambda: nn.ScaledAttention(8, 4, sinks=True, scaling="ssmax"),
}


@pytest.mark.parametrize("name", RESET)
def test_parameters_made_without_memory_are_reset_to_their_start(name):
    with torch.device("meta"):
        module = RESET[name]()
    fresh = RESET[name]()
    module.to_empty(device="cpu")
    for x in module.state_dict().values():
        x.fill_(77)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    kept = {name: x for name, x in module.state_dict().items() if "_proj" not in name}  # projections are random
    assert kept
    for name, x in kept.items():
        assert torch.equal(x, fresh.state_dict()[name]), name


@pytest.mark.parametrize("name", [name for name in RESET if name != "layer"])
def test_gradients_at_the_start_are_the_same_with_batch_invariant(name):
    """Parameters of 0 and 1 stand at kinks of functions that have none."""
    scaling, leaves, found = RESET[name]().double(), operands(), []
    for switch in (False, True):
        out = attention(*leaves.values(), scaling=scaling, causal=True, batch_invariant=switch)
        parameters = [x for x in scaling.parameters() if x.requires_grad]
        found.append(torch.autograd.grad(out.square().sum(), parameters, allow_unused=True))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_scaling_parameters_are_those_of_every_scaling_once():
    class Custom(torch.nn.Linear, Scaling):
        name = "custom"

    custom, shared = Custom(1, 1, bias=False), nn.SSMax(4, bias=True)
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), nn.PerHead(custom, heads=4), torch.nn.ModuleList([shared])])
    model.append(shared)
    found = list(nn.scaling_parameters(model))
    assert len(found) == 4
    assert set(found) == {custom.weight, model[1].theta, shared.s, shared.b}


def test_a_temperature_divides_by_the_query_where_its_mode_does():
    """A cosine then keeps a model's factor out of the gain."""
    gains = [relative_gain(nn.PerHead(mode, heads=4), 0.5, 64, gain=2.0) for mode in ("cosine", "key_count")]
    assert gains == [2.0, 8.0]


def test_a_copy_for_a_rank_has_its_part_of_a_model_s_tensor():
    model, scaling = torch.nn.Linear(1, 4), nn.SSMax(heads=4, base=9.0)
    tie_parameters(scaling, model, {"s": "bias"})
    assert scaling.s is model.bias
    assert torch.equal(twin(scaling, lambda x: x[:2]).s, model.bias[:2])
    assert scaling.s is model.bias
