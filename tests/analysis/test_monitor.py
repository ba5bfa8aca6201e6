"""`Monitor`: its numbers, the calls that count, also in threads, and its errors."""

import contextlib
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tritonattn
from tests.analysis.models import DIM, Net, dense
from tests.calls.test_biases import Recent
from tests.support.llama import HEADS, KV_HEADS, ids, llama
from tests.support.refusals import refuses
from tritonattn.analysis import Monitor, Thresholds
from tritonattn.core import observation
from tritonattn.huggingface import patch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*use_reentrant.*:UserWarning")
QUIET = Thresholds(None, None, None)
MEASURES = ("max_logit", "relative_entropy", "near_one_hot", "near_uniform")
MEASURES += ("q_gradient_norm", "k_gradient_norm", "output_variance")


def record_of(net, *losses, **options):
    """The record of a step with these losses, functions of the model."""
    net.zero_grad()
    with Monitor(net, every=1, thresholds=QUIET, **options) as monitor:
        for loss in losses:
            loss(net).backward()
        return monitor.step()


def close(got, wanted, rtol=1e-4, atol=1e-6):
    for name in MEASURES:
        pair = (torch.tensor(one[name]).double() for one in (got, wanted))
        torch.testing.assert_close(*pair, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, DIM**-0.5),
        ({"causal": True}, DIM**-0.5),
        ({"causal": True, "backend": "reference"}, DIM**-0.5),
        ({"softcap": 2.0}, DIM**-0.5),
        ({"scaling": "none"}, 1.0),
    ],
    ids=["plain", "causal", "reference", "softcap", "none"],
)
def test_numbers_against_a_dense_computation(options, factor):
    """Logits have the mode's factor, and probabilities the softcap too."""
    net, x, weight = Net(**options), torch.randn(3, 9, 32), torch.randn(3, 9, 32)
    lengths = torch.tensor([9, 5, 1])
    real = torch.arange(9) < lengths[:, None]
    visible = real[:, None, None].expand(3, 1, 9, 9)
    visible = visible.tril() if "causal" in options else visible
    weight = weight * real[..., None]
    got = record_of(net, lambda net: (net(x, key_lengths=lengths) * weight).sum())["layers"]["attention"]
    wanted = dense(net, x, factor, visible, real, weight.double(), options.get("softcap"))
    close(got, {name: value.tolist() for name, value in wanted.items()})
    assert (got["rows"], got["calls"]) == (HEADS * 15, 1)
    assert got["max_logit"] == sorted(got["max_logit"])  # the sharpness of Net's heads rises
    if "softcap" in options:
        assert got["max_logit"][-1] > 10


ONE = torch.Generator().manual_seed(1)
PAIRS = 9 * torch.randn(2, HEADS, 9, 9, generator=ONE)
HIDDEN = PAIRS[0, :, 0].masked_fill(torch.arange(9) > 2, -torch.inf)
DISTANCES = 9 * torch.randn(1, HEADS, 1, 12, generator=ONE)
SLOPES = tritonattn.nn.ALiBi(HEADS).slopes[:, None, None] * torch.arange(-8.0, 1)
DISTANCE = torch.arange(9)[:, None] - torch.arange(9)
BIASES = {
    "key_bias": ({"key_bias": PAIRS[:, :, 0]}, PAIRS[:, :, :1]),
    "hidden keys": ({"key_bias": HIDDEN}, HIDDEN[None, :, None]),
    "slopes": ({"key_bias": SLOPES[:, 0]}, SLOPES),
    "bias": ({"bias": PAIRS}, PAIRS),
    "relative_bias": ({"relative_bias": DISTANCES, "relative_right": 2}, DISTANCES[0, :, 0, (DISTANCE + 2).clamp(0)]),
    "of the scaling": ({"scaling": Recent()}, None),
}


class Bare(nn.Module):
    def forward(self, *operands, **options):
        return tritonattn.attention(*operands, causal=True, **options)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"softcap": 2.0, "bias_after_softcap": True}], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("biases", BIASES)
def test_rows_are_one_hot_by_their_biases_too(biases, backend, options):
    """Also the one key of the first row, and where a softcap bounds the logits but not the biases.

    The largest logit is without a bias, which of a forget gate grows with the position: QK-clip would shrink weights
    that are not too large.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    given, added = BIASES[biases]
    keys = k.repeat_interleave(HEADS // KV_HEADS, 1)
    added = Recent().addend(q, keys, None) if added is None else added
    logits = q @ keys.mT * DIM**-0.5
    visible = torch.ones(9, 9, dtype=torch.bool).tril() & ~added.isneginf()
    added = added.clamp(min=-1e9)
    is_after = "bias_after_softcap" in options
    z = logits if is_after else logits + added
    z = 2 * torch.tanh(z / 2) if "softcap" in options else z
    p = torch.softmax((z + added if is_after else z).masked_fill(~visible, -torch.inf), -1)
    wanted = (p.amax(-1) > 0.95).double().mean((0, 2))
    got = record_of(Bare(), lambda net: net(q, k.requires_grad_(), v, backend=backend, **given, **options).sum())
    layer = got["layers"]["Bare"]
    assert layer["near_one_hot"] == pytest.approx(wanted.tolist(), abs=1e-6)
    entropy = torch.special.entr(p).sum(-1)[..., 1:] / torch.arange(2, 10).log()
    assert layer["relative_entropy"] == pytest.approx(entropy.mean((0, 2)).tolist(), abs=1e-5)
    largest = logits.masked_fill(~visible, -torch.inf).amax((0, 2, 3))
    assert layer["max_logit"] == pytest.approx(largest.tolist(), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["eager", "sdpa", "patched", "in part"])
def test_padding_and_accumulation_say_what_the_sequences_say_alone(how, side):
    net = llama("eager" if how == "eager" else "sdpa")
    tokens, lengths = ids(2, 12), (12, 7)
    mask = torch.ones(2, 12, dtype=torch.int64)
    here = slice(12 - lengths[1], None) if side == "left" else slice(0, lengths[1])
    mask[1] = 0
    mask[1, here] = 1
    labels = torch.where(mask == 1, tokens, -100)
    total = 11 + 6  # predicted tokens
    layers = None if how == "patched" else [0]

    def together(net):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = net(tokens, attention_mask=mask, position_ids=positions).logits[:, :-1]
        seen = (mask[:, 1:] == 1) & (mask[:, :-1] == 1)
        return nn.functional.cross_entropy(logits[seen], labels[:, 1:][seen], reduction="sum") / total

    def alone(row, part):
        def loss(net):
            out = net(tokens[row : row + 1, part]).logits[0, :-1]
            return nn.functional.cross_entropy(out, tokens[row, part][1:], reduction="sum") / total

        return loss

    patched = how in ("patched", "in part")
    with patch(net, "key_norm_mean", layers=layers) if patched else contextlib.nullcontext():
        got = record_of(net, together)
        wanted = record_of(net, alone(0, slice(0, 12)), alone(1, here))
    assert list(got["layers"]) == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    for name, layer in got["layers"].items():
        close(layer, wanted["layers"][name], rtol=1e-3, atol=1e-5)
        assert layer["rows"] == wanted["layers"][name]["rows"] == HEADS * 19
        assert (layer["calls"], wanted["layers"][name]["calls"]) == (1, 2)


def test_numbers_of_64_bits_are_not_rounded_to_32():
    """Squares of 1e25 are beyond fp32."""
    operands = [x.requires_grad_() for x in torch.randn(3, 2, HEADS, 9, DIM, dtype=torch.float64)]
    small, large = (
        record_of(Bare(), lambda net, s=size: (s * net(*operands[:2], s * operands[2])).sum())["layers"]["Bare"]
        for size in (1.0, 1e25)
    )
    for name, power in (("q_gradient_norm", 2), ("k_gradient_norm", 2), ("output_variance", 2), ("max_logit", 0)):
        assert large[name] == pytest.approx([x * 1e25**power for x in small[name]], rel=1e-12)


def test_an_evaluation_between_does_not_count_nor_does_decoding():
    """attention_decode has no gradient."""
    net, x = llama(), ids()
    wanted = record_of(net, lambda net: net(x, labels=x).loss)
    net.zero_grad()
    with Monitor(net, every=1, thresholds=QUIET) as monitor:
        net.eval()
        with torch.no_grad():
            net(ids(4, seed=5), labels=ids(4, seed=5))
            net.generate(x[:1, :4], max_new_tokens=2, do_sample=False, pad_token_id=0)
        net.train()
        net(x, labels=x).loss.backward()
        got = monitor.step()
    assert got["layers"] == wanted["layers"]
    assert got["loss"] == wanted["loss"]
    net = Net(causal=True)
    with Monitor(net, every=1, thresholds=QUIET) as monitor, torch.no_grad():
        net(torch.randn(1, 1, 32), cache=net.attention.cache(1, 8))
        with pytest.warns(RuntimeWarning, match="saw no attention"):
            assert monitor.step()["layers"] == {}


def test_a_module_that_caught_an_error_of_its_part_counts_as_itself():
    class Outer(Net):
        def forward(self, x):
            with contextlib.suppress(ValueError):
                self.attention(x[0])
            return tritonattn.attention(*x.unflatten(-1, (HEADS, DIM)).transpose(1, 2).expand(3, -1, -1, -1, -1))

    x = torch.randn(2, 5, 32, requires_grad=True)
    assert list(record_of(Outer(), lambda net: net(x).sum())["layers"]) == ["Outer"]


def test_frozen_layers():
    net, x = nn.Sequential(Net(), Net()), torch.randn(2, 5, 32)
    wanted = record_of(net, lambda net: net(x).square().sum())["layers"]
    net[0].requires_grad_(False)
    net[1].attention.q_proj.requires_grad_(False)
    got = record_of(net, lambda net: net(x).square().sum())["layers"]
    assert got["0.attention"]["q_gradient_norm"] is None
    assert got["0.attention"]["max_logit"] == wanted["0.attention"]["max_logit"]
    assert got["1.attention"]["q_gradient_norm"] is None  # nothing before it learns
    # Only up to rounding: without gradients the first layer's output is computed by another kernel.
    net[0].attention.o_proj.requires_grad_(True)
    through = record_of(net, lambda net: net(x).square().sum())["layers"]
    for record, name in ((got, "k_gradient_norm"), (through, "q_gradient_norm")):
        torch.testing.assert_close(*(torch.tensor(one["1.attention"][name]) for one in (record, wanted)))


def test_arguments():
    net = Net()
    for options, error in (
        ({"every": 0}, ValueError),
        ({"every": 1.5}, ValueError),
        ({"on_alarm": "stop"}, ValueError),
        ({"on_alarm": "undo"}, ValueError),
        ({"thresholds": {"loss": 1}}, TypeError),
        ({"log": "wandb"}, TypeError),
        ({"file": "/nowhere/at/all.jsonl"}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            Monitor(net, **options)
    refuses("TypeError: model: expected an nn.Module", Monitor, "model")
    refuses("ValueError: ~ thresholds.max_logit", Thresholds, max_logit=float("nan"))
    refuses("TypeError: Monitor: ~ got threshold= (did you mean thresholds=?)", Monitor, net, threshold=50)
    for share in (90, -1):
        refuses(f"ValueError: ~ expected a share of rows, from 0 to 1, got {share}", Thresholds, near_one_hot=share)
    for limit in (-5, 0.0):
        message = f"thresholds.max_logit: expected a number above 0, or None, got {limit}"
        refuses(f"ValueError: {message}", Thresholds, max_logit=limit)
    for warmup in (-1, 1.5, True, None):
        refuses("ValueError: thresholds.warmup: expected a number of steps, at least 0, got", Thresholds, warmup=warmup)
    with Monitor(net) as monitor, pytest.raises(RuntimeError, match="not in use"):
        monitor.__enter__()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it compiles
def test_compiled_layers_are_all_seen_and_compiled_once():
    net, x = llama("sdpa"), ids()
    patch(net, "key_norm_mean", layers=[1])

    def loss(run):
        return run(x).logits.square().mean()

    wanted = record_of(net, loss)["layers"]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled, records = torch.compile(net, backend=counter), []
    with Monitor(net, every=2, thresholds=QUIET) as monitor:
        for _ in range(4):
            net.zero_grad()
            loss(compiled).backward()
            records.append(monitor.step())
    assert [record is None for record in records] == [False, True, False, True]
    assert records[0]["layers"] == records[2]["layers"] == wanted
    assert counter.frame_count == 1


def test_the_compiler_is_left_as_it_was():
    """Also by Monitors that overlap, and by one that an exception ends."""

    def compiles() -> bool:
        return bool(torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")(torch.zeros(1)))

    with Monitor(Net(), every=2, thresholds=QUIET) as one, Monitor(Net(), every=2, thresholds=QUIET) as other:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they see no attention
            one.step()
            assert not compiles()
            other.step()
        assert compiles()
        one.step()
    with contextlib.suppress(KeyboardInterrupt), Monitor(Net(), thresholds=QUIET):
        assert not compiles()
        raise KeyboardInterrupt
    assert compiles()
    with torch.compiler.set_stance("force_eager"):
        with Monitor(Net(), thresholds=QUIET):
            pass
        assert not compiles()


def test_rows_of_packed_sequences_are_no_padding_where_keys_are():
    """Queries and keys are packed apart here, so the position of a row does not tell whether it is padding."""

    class Packed(nn.Module):
        def forward(self, x):
            q, k = torch.tensor([[0, 5, 9], [0, 4, 8]], dtype=torch.int32)
            return tritonattn.attention_varlen(x, x, x, q, k, 5, 4)

    x = torch.randn(9, HEADS, DIM, requires_grad=True)
    assert record_of(Packed(), lambda net: net(x).sum())["layers"]["Packed"]["rows"] == HEADS * 9


def run_together(*functions):
    """Results of functions that run in threads at the same time."""
    barrier = threading.Barrier(len(functions))

    def started(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(started, function) for function in functions]]


def test_monitors_in_threads_record_their_models():
    nets = [Net(scaling=scaling) for scaling in ("sqrt_dim", "key_count", "none")]
    x = torch.randn(2, 5, 32)

    def loss(net):
        return net(x).square().sum()

    wanted = [record_of(net, loss)["layers"] for net in nets]

    def run(net):
        return lambda: [record_of(net, loss, loss) for _ in range(8)]

    for layers, records in zip(wanted, run_together(*map(run, nets)), strict=True):
        for record in records:
            assert record["layers"].keys() == {"attention"}
            assert record["layers"]["attention"]["calls"] == 2
            assert record["layers"]["attention"]["max_logit"] == layers["attention"]["max_logit"]


def test_a_thread_that_was_in_the_model_at_the_end_of_a_step_is_not_observed_later():
    net, x = Net(), torch.randn(2, 5, 32)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(10)

    def run():
        net(x)
        return observation.is_observed()

    hook = net.attention.o_proj.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        with Monitor(net, every=2, thresholds=QUIET) as monitor:
            observed = pool.submit(run)
            assert inside.wait(10)
            monitor.step()
        go_on.set()
        assert observed.result() is False
    hook.remove()
