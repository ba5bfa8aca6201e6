"""The recipes of docs/derivatives.md: gradients of every parameter, by tiles and by eager attention, in float64."""

import pytest
import torch
from torch import Tensor

from tests.support.snippets import run
from tritonattn.nn import ScaledAttention, SSMax

PAGE = "docs/derivatives.md"
MEAN_FLOW, PENALTY = range(2)
SCALINGS = {"cosine": lambda: "cosine", "ssmax": lambda: SSMax(2, base=64)}

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")


def through_tangent(model, data, noise, r, t):
    """As terminal velocity matching, a loss whose gradient goes through the tangent too."""
    z, velocity = torch.lerp(data, noise, t[:, None, None]), noise - data
    mean, tangent, *_ = torch.func.jvp(model, (z, r, t), (velocity, torch.zeros_like(r), torch.ones_like(t)))
    return (mean + (t - r)[:, None, None] * tangent - velocity).square().mean()


def gradients_of_flow(loss: str, scaling: str, length: int, backend: str, width: int = 16) -> dict[str, Tensor]:
    """Gradients of a loss of the page's model under a random mask, by parameter."""
    torch.manual_seed(0)
    recipe = run(PAGE, MEAN_FLOW)
    mask = torch.rand(1, 1, length, length) > 0.5
    model = recipe["Flow"](width, 2, SCALINGS[scaling](), mask=mask, backend=backend).double()
    data, noise = torch.randn(2, 1, length, width, dtype=torch.float64)
    r, t = torch.tensor([[0.2], [0.7]], dtype=torch.float64)
    losses = {"mean flow": recipe["mean_flow_loss"], "through the tangent": through_tangent}
    losses[loss](model, data, noise, r, t).backward()
    return {name: x.grad for name, x in model.named_parameters()}


def assert_as_eager(loss: str, scaling: str, length: int) -> None:
    ours, eager = (gradients_of_flow(loss, scaling, length, backend) for backend in ("sdpa", "reference"))
    assert any(name.startswith("scaling") for name in ours) == (scaling == "ssmax")
    torch.testing.assert_close(ours, eager, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("loss", ["mean flow", "through the tangent"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_few_step_models(loss, scaling):
    assert_as_eager(loss, scaling, 37)


def test_the_detached_tangent_is_another_gradient():
    detached, whole = (gradients_of_flow(loss, "cosine", 21, "sdpa") for loss in ("mean flow", "through the tangent"))
    assert not torch.allclose(detached["qkv.weight"], whole["qkv.weight"], rtol=1e-3)


def test_gradient_penalty():
    penalty, found = run(PAGE, PENALTY)["gradient_penalty"], []
    for backend in ("sdpa", "reference"):
        torch.manual_seed(0)
        layer = ScaledAttention(16, 2, scaling="ssmax:8", causal=True, backend=backend).double()
        real, fake = torch.randn(2, 3, 20, 16, dtype=torch.float64)
        penalty(lambda x, layer=layer: layer(x).square().mean((1, 2)), real, fake).backward()
        found.append({name: x.grad for name, x in layer.named_parameters() if x.grad is not None})
    assert {name for name, x in found[0].items() if x.count_nonzero()} >= {"scaling.s"}
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)
