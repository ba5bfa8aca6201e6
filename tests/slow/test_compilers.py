"""Inductor, and the longest compilations, over the public functions and generating models."""

from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
import tritonattn
from tests.calls import test_transforms as dense
from tests.calls import test_varlen_transforms as packed
from tests.huggingface.test_generation import assert_a_compiled_static_step
from tests.huggingface.test_patch import LLAMA
from tests.ops.test_decode import _grown
from tritonattn.huggingface import patch

pytestmark = dense.pytestmark


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("scaling", ["sqrt_dim", "key_norm_max"])
@pytest.mark.parametrize("call", [dense, packed], ids=["dense", "packed"])
def test_inductor(call, scaling):
    function = partial(call.objective, scaling=scaling, **({"window": (3, 0)} if call is dense else {"causal": True}))
    call.assert_same_gradients(torch.compile(function, fullgraph=True), function, call.operands())


def test_inductor_of_a_decode_step():
    query, cache = _grown(16)
    arguments = {"scaling": "key_norm_l2", **cache.arguments()}
    found = torch.compile(lambda query: tritonattn.attention_decode(query, **arguments), fullgraph=True)(query)
    torch.testing.assert_close(found, tritonattn.attention_decode(query, **arguments))


def test_compile_dynamic_shapes_of_a_mask():
    def total(q, k, mask):
        return tritonattn.attention(q, k, k, scaling="key_norm_sum", mask=mask).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, q_len, k_len in ((1, 6, 15), (2, 7, 17)):
        q = torch.randn(batch, 2, q_len, 8, requires_grad=True)
        k = torch.randn(batch, 2, k_len, 8, requires_grad=True)
        mask = torch.rand(batch, 1, q_len, k_len) > 0.3
        dense.assert_same_gradients(partial(compiled, mask=mask), partial(total, mask=mask), (q, k))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "mode"), [("llama", "cosine"), ("gemma3", "key_norm_mean"), ("llama", "key_norm_max")]
)
def test_a_compiled_static_step(name, mode):
    assert_a_compiled_static_step(name, mode)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_trains():
    network, ids = LLAMA.build("sdpa"), LLAMA.inputs()["input_ids"]

    def gradient(run) -> torch.Tensor:
        network.zero_grad()
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([x.grad.flatten() for x in network.parameters() if x.grad is not None])

    with patch(network, scaling="ssmax", layers=[1]):
        wanted = gradient(network)
        got = gradient(torch.compile(network, fullgraph=True, backend="aot_eager"))
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()
