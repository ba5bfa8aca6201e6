"""`replace_sdpa` past a model's call: other methods, branches that no run reached, a second replacement, its repr."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tests.support.refusals import refuses
from tests.support.watch import Watch
from tritonattn.integrations.sdpa import replace_sdpa, scaled_sdpa

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def heads_of(x):
    q = 3 * x.unflatten(-1, (4, -1)).transpose(1, 2)
    v = x.unflatten(-1, (4, -1)).transpose(1, 2)
    return scaled_dot_product_attention(q, q, v, is_causal=True).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def attend(self, x):
        return heads_of(x)

    def forward(self, x):
        return self.attend(x)


class Model(nn.Module):
    """Attends by layers, by a method of one, in a method of its own, and in a branch."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.branch = Attention(), Attention(), Attention()
        self.weight = nn.Linear(16, 16)

    def forward(self, x, branch=False):
        return self.branch(x) if branch else self.second.attend(self.first(x))

    def encode(self, x):
        return self.first(x) + self.second.attend(x)

    def score(self, x):
        return heads_of(x) - x

    def generate(self, x):
        return self.score(self.encode(x))


METHODS = {
    "call": lambda model: model(X),
    "encode": lambda model: model.encode(X),
    "score": lambda model: model.score(X),
    "generate": lambda model: model.generate(X),
    "branch": lambda model: model(X, branch=True),
}


@pytest.mark.parametrize("example", [X, None], ids=["example", "first call"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_branch_has_the_scaling(name, example):
    """Those that the example does not reach, too; before the model's first call as after it."""
    model, run = Model(), METHODS[name]
    before = run(model)
    with scaled_sdpa("log_key_count:2"):
        expected = run(model)
    assert not torch.allclose(expected, before, atol=1e-3)
    state = [dict(vars(module)) for module in model.modules()]
    with replace_sdpa(model, "log_key_count:2", example=example) as replaced:
        torch.testing.assert_close(run(model), expected)
        torch.testing.assert_close(run(copy.deepcopy(model)), expected)
        model(X)
        torch.testing.assert_close(run(model), expected)
        assert set(replaced.names) == {"", "first", "second", "branch"}
    assert [dict(vars(module)) for module in model.modules()] == state
    assert torch.equal(run(model), before)


def test_layers_that_are_not_asked_for_stay_in_methods():
    model = Model()
    with replace_sdpa(model, "log_key_count:2", layers=["first", "branch"], example=X) as replaced:
        assert set(replaced.names) == {"first", "branch"}
        first = model.first.forward
        torch.testing.assert_close(model.score(X), Model().score(X))
        torch.testing.assert_close(model.second.attend(X), heads_of(X))
        assert not torch.allclose(first(X), heads_of(X), atol=1e-3)


class Outer(nn.Module):
    """Attends in its own code around layers, one of which a branch alone reaches."""

    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, x, branch=False):
        return self.inner(x) if branch else heads_of(x)


def test_a_branch_that_is_not_asked_for_stays_inside_one_that_is():
    model = Outer()
    with replace_sdpa(model, "log_key_count:2", layers=[""], example=X):
        assert not torch.allclose(model(X), heads_of(X), atol=1e-3)
        torch.testing.assert_close(model(X, branch=True), heads_of(X))


def test_a_learned_scaling_names_what_the_example_does_not_reach_and_refuses_it():
    model, message = Model(), "example: expected one that reaches every call .* got none for the model, branch, whose"
    with pytest.warns(UserWarning, match=message):
        replaced = replace_sdpa(model, "ssmax", example=X)
    assert replaced.names == ["first", "second"]
    assert [row.split()[0] for row in replaced.report().splitlines()[2:]] == ["first", "second", "Model", "branch"]
    assert replaced.report().count("left alone: not reached by the example") == 2
    torch.testing.assert_close(model.encode(X), Model().encode(X))
    for name, where in (("score", "the model"), ("branch", "branch")):
        refuses(f"NotImplementedError: {where}: expected an example that reaches this call", METHODS[name], model)
    replaced.undo()
    replaced = replace_sdpa(model, "ssmax", example=lambda model: [run(model) for run in METHODS.values()])
    assert set(replaced.names) == {"", "first", "second", "branch"}
    for run in METHODS.values():
        expected = run(Model())
        torch.testing.assert_close(run(model), expected)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.5 * ("logit_scaling" in name))
        assert not torch.allclose(run(model), expected, atol=1e-3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(0.5 * ("logit_scaling" in name))


def test_a_second_replacement_says_already_and_how_to_undo():
    model = Model()
    error = "ValueError: model: expected ~ got Model, in which ~ replaced already: undo() the first replacement"
    with replace_sdpa(model, "dim", example=X):
        refuses(error, replace_sdpa, model, "dim", None, X)
        replace_sdpa(model, "dim")
        refuses(error, model, X)
    with replace_sdpa(model, "dim"):
        refuses("ValueError: model: ~ replaced already: undo() the first", replace_sdpa, model, "dim")
    layers = nn.Sequential(nn.TransformerEncoderLayer(16, 4, dropout=0.0, batch_first=True))
    with replace_sdpa(layers, example=X):
        refuses("ValueError: ~ in which 0.self_attn are replaced already", replace_sdpa, layers, "dim", None, X)


def test_the_repr_says_model_layers_scaling_and_whether_it_is_installed():
    model = Model()
    replaced = replace_sdpa(model, "log_key_count:2", layers="first")
    start = "ReplacedSDPA(Model, layers: "
    assert repr(replaced) == f"{start}none yet, scaling: log_key_count:2, awaits the first call)"
    model(X)
    assert repr(replaced) == f"{start}first, scaling: log_key_count:2, installed)"
    replaced.undo()
    assert repr(replaced) == f"{start}first, scaling: log_key_count:2, undone)"


class Noisy(Attention):
    """Draws random numbers in eval mode, too."""

    def forward(self, x):
        return heads_of(x + torch.randn_like(x))


def test_the_example_takes_no_random_numbers_from_a_seed_set_before():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    replace_sdpa(Noisy(), "dim", example=X)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("example", [X, None], ids=["example", "first call"])
def test_layers_run_on_the_backend_that_was_asked_for(example):
    """PyTorch's fused kernel serves "auto" on a CPU, and never the reference."""
    model = Outer().eval()
    for backend in ("auto", "reference"):
        with replace_sdpa(model, "dim", example=example, backend=backend), torch.no_grad():
            model(X)
            with Watch() as watch:
                model(X)
        fused = [name for name in watch.calls if "scaled_dot_product" in name]
        assert bool(fused) == (backend == "auto"), (backend, fused)


def test_a_first_call_that_fails_leaves_the_model_as_it_was():
    """With torch's layers, which are exchanged before the call."""
    layer = nn.TransformerEncoderLayer(16, 4, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, Attention()).eval()
    before, classes = model(X), [type(module) for module in model.modules()]
    replace_sdpa(model, "dim", layers=["0", "nothing"])
    refuses("ValueError: layers: expected names or patterns of 0.self_attn, 1", model, X)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(X), before)
