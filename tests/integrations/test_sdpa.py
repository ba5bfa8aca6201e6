"""Any code that calls F.scaled_dot_product_attention, with a scaling: torch's results with sqrt_dim, layers found."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.support.layers import with_gradients
from tests.support.refusals import refuses
from tritonattn import attention
from tritonattn.analysis import Monitor, advise
from tritonattn.integrations.sdpa import replace_sdpa, scaled_sdpa

B, T, E, H = 2, 6, 16, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


UPPER = torch.ones(5, 7).bool().triu(2)
CALLS = {
    "one head": ((5, 8), (7, 8), {}),
    "three axes": ((3, 5, 8), (3, 7, 8), {"attn_mask": normal(3, 5, 7)}),
    "three axes, a mask of pairs": ((3, 5, 8), (3, 7, 8), {"attn_mask": ~UPPER}),
    "grouped, three axes": ((4, 5, 8), (2, 7, 8), {"enable_gqa": True}),
    "five axes": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), {"attn_mask": normal(3, 1, 5, 7)}),
    "five axes, a mask of five": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), {"attn_mask": normal(2, 1, 1, 5, 7) > -1}),
    "a broadcast batch": ((1, 4, 5, 8), (2, 4, 7, 8), {}),
    "a broadcast key head": ((2, 4, 5, 8), (2, 1, 7, 8), {"scale": 0.7}),
    "a broadcast query head": ((2, 1, 5, 8), (2, 4, 7, 8), {}),
    "keys without a batch": ((2, 4, 5, 8), (4, 7, 8), {}),
    "grouped": ((2, 4, 5, 8), (2, 2, 7, 8), {"enable_gqa": True, "attn_mask": ~UPPER}),
    "hidden by floats": (
        (2, 4, 5, 8),
        (2, 4, 7, 8),
        {"attn_mask": torch.zeros(5, 7).double().masked_fill(UPPER, -1e4)},
    ),
    "a bias of heads": ((2, 4, 5, 8), (2, 4, 7, 8), {"attn_mask": normal(4, 5, 7), "scale": 0.2}),
    "causal, more keys": ((2, 4, 5, 8), (2, 4, 7, 8), {"is_causal": True}),
    "causal, more rows": ((2, 4, 7, 8), (2, 4, 5, 8), {"is_causal": True, "scale": 0.5}),
}


@pytest.mark.parametrize("call", CALLS)
def test_sqrt_dim_is_torchs_call(call):
    q_shape, k_shape, options = CALLS[call]
    leaves = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate((q_shape, k_shape, k_shape))]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point() and mask.min() > -1e4:
        leaves.append(mask.clone().requires_grad_())
        options = {**options, "attn_mask": leaves[-1]}
    expected = scaled_dot_product_attention(*leaves[:3], **options)
    with scaled_sdpa("sqrt_dim"):
        found = scaled_dot_product_attention(*leaves[:3], **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected)))


def test_modes_scales_and_dropout_are_those_of_attention():
    q, k = normal(2, 4, 6, 8), normal(2, 2, 6, 8, seed=1)
    for mode in ("log_key_count:4", "key_norm_mean", "cosine"):
        gain = None if mode == "cosine" else 0.5 * math.sqrt(8)
        torch.manual_seed(0)
        expected = attention(q, k, k, scaling=mode, gain=gain, causal=True, dropout_p=0.3)
        torch.manual_seed(0)
        with scaled_sdpa("dim"), scaled_sdpa(mode):  # the inner one holds
            found = scaled_dot_product_attention(q, k, k, None, 0.3, True, scale=0.5, enable_gqa=True)
        torch.testing.assert_close(found, expected)


def test_calls_of_the_package_stay_as_they_are():
    q = normal(1, 2, 20, 8)
    expected = attention(q, q, q, scaling="key_norm_mean", causal=True)
    with scaled_sdpa("none"):
        assert torch.equal(attention(q, q, q, scaling="key_norm_mean", causal=True), expected)
    model = nn.ModuleList([nn.TransformerEncoderLayer(E, H, batch_first=True, dropout=0.0), GPT()]).double()
    with replace_sdpa(model, example=lambda model: model[1](model[0](normal(B, T, E)))) as replaced:
        assert replaced.names == ["0.self_attn", "1.blocks.0.attn", "1.blocks.1.attn"]


class Attention(nn.Module):
    """nanoGPT's."""

    def __init__(self, heads=H):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x):
        q, k, v = (y.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for y in self.c_attn(x).split(E, dim=2))
        y = scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        y = y.flatten(2).unflatten(-1, (-1, E // self.heads))  # which torch.compile traces in a way of its own
        return self.c_proj(y.transpose(1, 2).contiguous().view(*x.shape[:2], E))


class Block(nn.Module):
    def __init__(self, recomputes):
        super().__init__()
        self.attn, self.norm, self.recomputes = Attention(), nn.BatchNorm1d(T), recomputes

    def forward(self, x):
        return x + self.norm(checkpoint(self.attn, x, use_reentrant=False) if self.recomputes else self.attn(x))


class GPT(nn.Module):
    def __init__(self, recomputes=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(recomputes), Block(recomputes))
        self.drop = nn.Dropout(0.5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0, 0.5)

    def forward(self, x):
        return self.drop(self.blocks(x))


X = normal(B, T, E)
LEARNED = [f"blocks.{i}.attn.logit_scaling.{name}" for i in (0, 1) for name in ("s", "b")]


def test_learned_scalings_start_where_the_model_was_and_leave_no_trace():
    model = GPT().double()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.blocks[1].eval()
    before = model.blocks(X)
    model.load_state_dict(state)
    replaced = replace_sdpa(model, "ssmax", example=X)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert not model.blocks[1].attn.training
    assert replaced.names == ["blocks.0.attn", "blocks.1.attn"]
    assert sorted(set(model.state_dict()) - set(state)) == sorted(LEARNED)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in state.items())
    assert model.get_parameter(LEARNED[0]).shape == (H,)
    torch.testing.assert_close(model.blocks(X), before)
    replaced.undo()
    model.load_state_dict(state)
    assert torch.equal(model.blocks(X), before)
    assert set(model.state_dict()) == set(state)
    assert "forward" not in vars(model.blocks[0].attn)


def stirred(model):
    with torch.no_grad():
        for name in LEARNED:
            model.get_parameter(name).add_(0.3)
    return model.eval()


def test_copies_pickles_checkpoints_compiled_models_and_ddp_agree():
    model, recomputing = GPT().double(), GPT(recomputes=True).double()
    for one in (model, recomputing):
        replace_sdpa(one, "ssmax", example=X)
        stirred(one)
    expected, plain = with_gradients(model, X), GPT().double().eval()(X)
    assert (expected[0] - plain).abs().max() > 1e-3
    assert all(x is not None and x.abs().max() > 0 for x in expected[1][-4:])
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), recomputing
    for other in (*others, torch.compile(model, fullgraph=True, backend="eager")):
        torch.testing.assert_close(with_gradients(other, X), expected)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(model)(X).square().sum().backward()
    finally:
        destroy_process_group()
    torch.testing.assert_close(tuple(x.grad for x in model.parameters()), expected[1])
    with torch.no_grad():
        model.get_parameter(LEARNED[0]).add_(1)
    torch.testing.assert_close(others[0](X), expected[0])


def test_the_first_call_finds_the_layers_and_has_the_scaling():
    model = GPT(recomputes=True).double().eval()
    before = model(X)
    replaced = replace_sdpa(model, "log_key_count:2")
    assert replaced.names == []
    refuses("ValueError: model: expected a call of it after replace_sdpa", replace_sdpa, model, "dim", "blocks.0")
    copied = copy.deepcopy(model)
    with pytest.raises(Exception, match="example: expected one in replace_sdpa, or a call of the model, before"):
        torch.compile(model, fullgraph=True, backend="eager")(X)
    assert replaced.names == []
    with scaled_sdpa("log_key_count:2"):
        expected = copied.blocks(X)
    first = with_gradients(model, X)
    assert replaced.names == ["blocks.0.attn", "blocks.1.attn"]
    assert "forward" not in vars(model)
    torch.testing.assert_close(first, with_gradients(model, X))
    compiled = torch.compile(copied.eval(), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close((compiled(X), compiled(X)), (expected, expected))
    torch.testing.assert_close((first[0], copied(X)), (expected, expected))
    replaced.undo()
    assert torch.equal(model(X), before)


def test_advise_reads_any_model_and_a_monitor_a_replaced_one():
    model, layers = GPT().double(), ["blocks.0.attn", "blocks.1.attn"]
    state = copy.deepcopy(model.state_dict())
    advice = advise(model, X)
    assert [finding.layer for finding in advice.findings] == layers
    assert all(torch.equal(model.state_dict()[name], x) for name, x in state.items())
    replace_sdpa(model)
    assert str(advise(model, X)) == str(advice)
    with Monitor(model, every=1) as monitor:
        model(X)
        assert [*monitor.step(0.0)["layers"]] == layers


class Nested(nn.Module):
    """Calls in its own forward, around a module that calls, and one of F.multi_head_attention_forward."""

    def __init__(self):
        super().__init__()
        self.inner = Attention(2)
        self.unused = Attention()
        self.empty = nn.Sequential()
        self.weight, self.soft = nn.Parameter(normal(3 * E, E)), nn.Softmax(-1)

    def forward(self, x):
        x = self.empty(self.inner(x))
        x = self.soft(x) + scaled_dot_product_attention(x, x, x) + scaled_dot_product_attention(x, -x, x)
        x = x.transpose(0, 1)
        whole = (E, 2, self.weight, None, None, None, False, 0.0, torch.eye(E, dtype=x.dtype), None)
        return multi_head_attention_forward(x, x, x, *whole, need_weights=False)[0]


def test_the_innermost_module_and_the_layers_asked_for():
    model = nn.Sequential(Nested()).double()
    with torch.no_grad():
        before, found = model(X), {}
        for layers in (None, "0.inner", "[0]", ["*.inner", "0"]):
            with replace_sdpa(model, "none", layers, example=X) as replaced:
                found[str(layers)] = (replaced.names, model(X))
                assert "0.inner" in replaced.names or layers == "[0]"
                report = replaced.report()
        names = {key: names for key, (names, _) in found.items()}
        every = ["0.inner", "0", "0.unused"]
        assert names == {"None": every, "0.inner": ["0.inner"], "[0]": ["0"], "['*.inner', '0']": every}
        for i, one in enumerate(results := [before, *(out for _, out in found.values())]):
            assert [torch.allclose(one, other) for other in results].count(True) == 1 + (i in (1, 4))
        rows = [line.split() for line in report.splitlines()[2:]]
        assert [row[:4] for row in rows] == [
            ["0.inner", "Attention", "2", "1"],
            ["0.soft", "Softmax", "left", "alone:"],
            ["0", "Nested", "1", "3"],
            ["0.unused", "Attention", "0", "none"],
        ]
        with replace_sdpa(model, "none", "0.inner", example=X) as replaced:
            assert "left alone: not among the layers asked for" in replaced.report()
            assert not torch.allclose(model(X), before)
            with replace_sdpa(model, "none", example=X) as rest:  # the one that has no scaling yet
                assert rest.names == ["0", "0.unused"]
                torch.testing.assert_close(model(X), found["None"][1])
            torch.testing.assert_close(model(X), found["0.inner"][1])
        assert torch.equal(model(X), before)
        with scaled_sdpa("none"):
            torch.testing.assert_close(model(X), found["None"][1])


class Reading(nn.Module):
    """Calls that a scaling cannot have, by the name of one."""

    def __init__(self, call):
        super().__init__()
        self.call, self.weight = call, nn.Parameter(normal(3 * E, E))

    def forward(self, x):
        if self.call == "nested":
            q = torch.nested.nested_tensor([y.unflatten(-1, (2, -1)) for y in x], layout=torch.jagged).transpose(1, 2)
            return scaled_dot_product_attention(q, q, q)
        if self.call == "weights":
            whole = (E, 2, self.weight, None, None, None, False, 0.0, torch.eye(E, dtype=x.dtype), None)
            return multi_head_attention_forward(x, x, x, *whole)[0]
        if self.call == "heads":
            for heads in (2, 4):
                y = x.unflatten(-1, (heads, -1)).transpose(1, 2)
                x = scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2)
            return x
        if self.call == "key heads":
            return scaled_dot_product_attention(x[:, None].expand(-1, 4, -1, -1), x[:, None].expand(-1, 2, -1, -1), x)
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def test_refusals():
    x = normal(B, T, E)
    own = "ValueError: model: expected one whose modules call ~ got Sequential, in which a softmax is formed by 0"
    for call, scaling, error in (
        ("nested", "dim", "NotImplementedError: 0: query, key, value: nested tensors are not supported"),
        ("heads", "ssmax", "ValueError: 0: layers: expected calls of 2 heads for a learned scaling, got 4 heads"),
        ("key heads", "dim", "ValueError: 0: key: expected query's 4 heads without enable_gqa, got 2"),
        ("weights", "dim", own),
        ("softmax", "dim", own),
    ):
        attends = nn.TransformerEncoderLayer(E, H, batch_first=True, dtype=x.dtype)
        model = nn.Sequential(Reading(call), nn.Identity() if error is own else attends)
        children, before = list(model.named_modules()), [dict(vars(module)) for module in model.modules()]
        refuses(error, replace_sdpa, model, scaling, None, x)
        assert list(model.named_modules()) == children
        assert [dict(vars(module)) for module in model.modules()] == before
        if error is own:
            replace_sdpa(model, scaling)
            refuses(error, model, x)
            assert [dict(vars(module)) for module in model.modules()] == before
    with scaled_sdpa("dim"):
        refuses("NotImplementedError: need_weights: expected False ~ got True", Reading("weights"), x)
    model = GPT().double()
    compiled = torch.compile(model, backend="eager")
    refuses("ValueError: example: expected arguments of the model for a learned scaling", replace_sdpa, model, "ssmax")
    refuses("ValueError: layers: expected names or patterns of blocks.0.attn", replace_sdpa, model, "dim", "attn", X)
    refuses("ValueError: scaling: expected one of", replace_sdpa, model, "squirt_dim")
    model.blocks[1].attn.logit_scaling = 0.5
    refuses("ValueError: blocks.1.attn: logit_scaling: expected no attribute", replace_sdpa, model, "dim", None, X)
    refuses("ValueError: model: expected one that is not compiled yet", replace_sdpa, compiled, "dim")
    refuses("TypeError: model: expected an nn.Module, got function", replace_sdpa, normal)
    refuses("ValueError: ~ which is a module", scaled_sdpa, "ssmax")
    assert "forward" not in vars(model)
