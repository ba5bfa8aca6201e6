"""`replace_sdpa(parameters=)`: a model's own tensors as parameters of its scalings."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tests.support.layers import with_gradients
from tests.support.refusals import refuses
from tritonattn.integrations.sdpa import replace_sdpa
from tritonattn.nn import SSMax

E, H, T = 16, 4, 9


class Attention(nn.Module):
    """Multiplies q by s_h ln n, where it has s."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.scale = nn.Parameter(torch.rand(H, 1))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, H, -1)).transpose(1, 3).unbind(2)
        if self.scale is not None:
            q = q * self.scale[:, None] * torch.arange(1, x.shape[1] + 1).log()[:, None]
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


def build():
    torch.manual_seed(0)
    return nn.Sequential(Attention(), nn.Tanh(), Attention()).double()


X = torch.randn(2, T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_tensor_stays_the_model_s_and_is_the_scaling_s():
    model = build()
    names, attributes = model.state_dict().keys(), [set(vars(module)) for module in (model[0], model[2])]
    expected = with_gradients(model, X)
    replaced = replace_sdpa(model, "ssmax", example=X, parameters={"*.scale": "s"})
    assert replaced.names == ["0", "2"]
    assert model.state_dict().keys() == names
    assert torch.equal(model[0].logit_scaling.s, model[0].scale[:, 0])
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (model, *others, torch.compile(model, fullgraph=True, backend="eager")):
        torch.testing.assert_close(with_gradients(one, X), expected)
    with torch.no_grad():
        model[0].scale.mul_(2)
    assert not torch.allclose(model(X), expected[0])
    torch.testing.assert_close(others[0](X), expected[0])
    torch.optim.SGD([model[0].qkv.weight]).step()
    replaced.undo()
    assert [set(vars(module)) for module in (model[0], model[2])] == attributes
    with torch.no_grad():
        model[0].scale.div_(2)
    torch.testing.assert_close(model(X), expected[0])


@pytest.mark.parametrize(
    ("scaling", "parameters", "error"),
    [
        ("ssmax", "s", "TypeError: parameters: expected a dict from names or patterns ~ got str 's'"),
        ("ssmax", {"*.scal": "s"}, "ValueError: parameters['*.scal']: ~ [4], 0.scale, 2.scale, got no match"),
        ("ssmax", {"0.scale": "s"}, "ValueError: expected a tensor for 's' in every ~ got none in 2: name the layers"),
        ("ssmax", {"*.proj.bias": "s"}, "ValueError: a tensor of shape [4], ~ got a torch.float64 ~ [16] at 0.proj.b"),
        ("dim", {"*.scale": "s"}, "ValueError: parameters['*.scale']: expected a learned scaling, 'ssmax', got 's'"),
        (SSMax(H, base=9.0), {"*.scale": "s"}, "TypeError: scaling: expected a name, such as 'ssmax', with parameters"),
    ],
)
def test_refusals_leave_the_model_as_it_was(scaling, parameters, error):
    model = build()
    before, expected = [set(vars(module)) for module in model.modules()], model(X)
    refuses(error, replace_sdpa, model, scaling, None, X, "auto", parameters)
    assert [set(vars(module)) for module in model.modules()] == before
    assert torch.equal(model(X), expected)
