"""Backend "flash" where libraries and cards differ: each call is right, or refused by name."""

import pytest
import torch

import tritonattn
from tests.backends.test_flash import CPU, FOUR, NEWEST, THREE, TWO
from tests.kernels import harness
from tests.support import flash
from tests.support.flash import assert_close
from tests.support.packed import Packed
from tests.support.pairs import in_turn
from tests.support.refusals import refuses
from tritonattn.backends.flash import libraries, obstacles, run
from tritonattn.core.call import Request
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility

LACKING = [(3, None), (None, 9), (3, 9), (3, 40), (None, 28)]
WINDOWS = [*LACKING, (None, 2), (0, 0), (40, 3), (40, 40), (3, 8)]
HIDDEN = {"window": {"window": (2, 0)}, "causal": {"causal": True}, "both": {"causal": True, "window": (1, None)}}


@pytest.mark.parametrize("window", WINDOWS)
@in_turn(version=[TWO, THREE, FOUR, TWO, TWO], lengths=[(30, 9), (30, 9), (30, 9), (9, 30), (10, 9)])
def test_windows_of_any_lengths(version, window, lengths, monkeypatch):
    """FlashAttention 2 takes a side for another one where there are more queries than keys."""
    flash.install(monkeypatch, version)
    tensors = harness.inputs(torch.bfloat16, CPU, q_len=lengths[0], k_len=lengths[1])
    options = {"scaling": "key_norm_mean", "window": window}
    if version == TWO and lengths == (30, 9) and window in LACKING:
        error = "NotImplementedError: window of up to 30 queries and 9 keys: ~ by flash-attn-2 ~ 'triton'"
        refuses(error, tritonattn.attention, **tensors, **options, backend="flash")
    else:
        assert_close(tensors, tritonattn.attention, **options)


def test_a_window_that_the_second_lacks(monkeypatch):
    tensors = harness.inputs(torch.bfloat16, CPU, q_len=30, k_len=9)
    options = {"window": (3, None), "backend": "flash"}
    flash.install(monkeypatch, TWO)
    packed = Packed((30, 2), (9, 20))  # a side of the longest sequence, as the library has it
    packed_tensors = harness.packed_inputs(packed, torch.bfloat16, CPU)
    error = "NotImplementedError: window of up to 30 queries and 20 keys: ~ by flash-attn-2 ~ 'triton'"
    refuses(error, tritonattn.attention_varlen, **packed_tensors, **packed.arguments(), **options)
    two, three = flash.install(monkeypatch, TWO, THREE, card=9)
    tritonattn.attention(**tensors, **options)
    assert (len(two.calls), len(three.calls)) == (0, 1)


@in_turn(version=NEWEST, group=[2, 1, 2], causal=[False, True])
def test_packed_single_rows(version, group, causal, monkeypatch):
    """With sequences of none, and rows of none behind: as many rows as sequences."""
    flash.install(monkeypatch, version)
    packed = Packed((1, 0, 1, 0), (3, 2, 0, 0), q_tail=2, k_tail=1)
    tensors = harness.packed_inputs(packed, torch.bfloat16, CPU, group=group)
    assert_close(tensors, tritonattn.attention_varlen, summands=1.0, **packed.arguments(), causal=causal)


@pytest.mark.parametrize("version", NEWEST)
def test_packed_rows_of_no_sequence(version, monkeypatch):
    """Libraries refuse a batch of none; all rows attend to nothing."""
    (module,) = flash.install(monkeypatch, version)
    packed = Packed((), (), q_tail=5, k_tail=3)
    tensors = harness.packed_inputs(packed, torch.bfloat16, CPU)
    assert_close(tensors, tritonattn.attention_varlen, **packed.arguments(), causal=True)
    assert module.calls == []


@in_turn(version=NEWEST, masks=HIDDEN.values(), scaling=["sqrt_dim", "key_norm_mean", "cosine"])
@pytest.mark.parametrize("lengths", [(3, 30), (30, 9)])
def test_nan_in_hidden_keys_and_rows(version, masks, scaling, lengths, monkeypatch):
    """A library multiplies hidden values by 0; here they are zeros."""
    flash.install(monkeypatch, version)
    q_len, k_len = lengths
    tensors = harness.inputs(torch.bfloat16, CPU, q_len=q_len, k_len=k_len, scales=("gain",))
    visible = Visibility.of(tensors["q"], tensors["k"], causal=masks.get("causal", False), window=masks.get("window"))
    rows, keys = visible.attending_rows()[0, 0], visible.seen_keys()[0, 0]

    def results(tensors):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = tritonattn.attention(**leaves, **masks, scaling=scaling, backend="flash")
        return out, *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))

    poisoned = {name: x.clone() for name, x in tensors.items()}
    for name, seen in (("q", rows), ("k", keys), ("v", keys)):
        poisoned[name][:, :, ~seen] = torch.nan
    for found, wanted in zip(results(poisoned), results(tensors), strict=True):
        assert torch.equal(found, wanted)
    with torch.no_grad():
        assert tritonattn.attention(**poisoned, **masks, scaling=scaling, backend="flash").isfinite().all()


@pytest.mark.parametrize("version", NEWEST)
def test_gradients_of_odd_strides(version, monkeypatch):
    """Gradients of out are handed on in aligned rows, and operands of axes of one entry lose their odd strides."""
    flash.install(monkeypatch, version)
    q, k, v = (torch.randn(9, 2, 16, 1).bfloat16().permute(3, 1, 0, 2).requires_grad_() for _ in range(3))
    d_out = torch.randn(1, 2, 9, 23).bfloat16()
    assert q.stride(0) == 1

    def gradients(backend):
        out = tritonattn.attention(q, k, v, causal=True, backend=backend)
        wider = torch.cat([out, q.detach()[..., :7]], -1)  # its gradient has rows of 23
        return torch.autograd.grad(wider, (q, k, v), d_out)

    for found, wanted in zip(gradients("flash"), gradients("reference"), strict=True):
        torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)


# Card, head dims, options, the name of what FlashAttention 4 lacks there, and True where it has it without gradients.
FOUR_LACKS = [
    (12, (64, 64), {"softcap": 2.0}, "softcap with gradients", True),
    (12, (64, 64), {"sinks": True}, "sinks", False),
    (12, (64, 136), {}, "head_dim 136, above 128", False),
    (12, (192, 128), {}, "head_dim 192, above 128", False),
    (10, (256, 256), {"softcap": 2.0}, "softcap with gradients at head_dim 256", True),
    (10, (200, 64), {"window": (3, 2)}, "window with gradients at head_dim 200", True),
    (11, (136, 136), {"sinks": True}, "sinks with gradients at head_dim 136", True),
]


@pytest.mark.parametrize(("card", "dims", "options", "name", "runs_forward"), FOUR_LACKS)
def test_what_the_fourth_lacks_on_a_card(card, dims, options, name, runs_forward, monkeypatch):
    flash.install(monkeypatch, FOUR, card=card)
    options = options | ({"sinks": torch.zeros(2)} if "sinks" in options else {}) | {"backend": "flash"}
    sizes = {"q_len": 8, "k_len": 9, "head_dim": dims[0], "value_dim": dims[1]}
    tensors = harness.inputs(torch.bfloat16, CPU, **sizes, scales=("gain",))
    for leaf in ("q", "gain"):  # the second is seen in the scaling's factor alone
        leaves = {key: x.clone().requires_grad_(key == leaf) for key, x in tensors.items()}
        error = f"NotImplementedError: {name}: backend 'flash' does not support it by flash-attn-4 ~ 'triton'"
        refuses(error, tritonattn.attention, **leaves, **options)
    with torch.no_grad():
        if runs_forward:
            tritonattn.attention(**tensors, **options)
        two, _ = flash.install(monkeypatch, TWO, FOUR, card=card)
        if "sinks" not in options and not runs_forward:
            tritonattn.attention(**tensors, **options)
            assert len(two.calls) == 1


def test_softcap_on_amd(monkeypatch):
    """The second, as built for AMD, reads none."""
    flash.install(monkeypatch, TWO, card=0)
    tensors = harness.inputs(torch.bfloat16, CPU)
    assert_close(tensors, tritonattn.attention, causal=True)
    error = "NotImplementedError: softcap on AMD: ~ by flash-attn-2"
    refuses(error, tritonattn.attention, **tensors, softcap=2.0, backend="flash")


@pytest.mark.parametrize("version", NEWEST)
def test_grad_mode_and_autocast(version, monkeypatch):
    flash.install(monkeypatch, version)
    q, k, v = (x.bfloat16().float().requires_grad_() for x in torch.randn(3, 1, 2, 12, 16))

    def call(*operands):
        return tritonattn.attention(*operands, scaling="key_norm_mean", causal=True, backend="flash")

    wanted = call(*(x.bfloat16() for x in (q, k, v)))
    with torch.autocast("cpu", torch.bfloat16):
        found = call(q, k, v)
    assert torch.equal(found, wanted)
    assert [x.dtype for x in torch.autograd.grad(found.float().sum(), (q, k, v))] == [torch.float32] * 3
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = call(*(x.bfloat16() for x in (q, k, v)))
            assert not out.requires_grad
            torch.testing.assert_close(out, wanted, atol=0.02, rtol=0.02)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms(deterministic, monkeypatch):
    """The libraries add gradients of q in no fixed order, unless they are told to."""
    for version, card, dim, is_refused in (
        (TWO, 8, 200, False),
        (THREE, 9, 192, False),
        (THREE, 9, 200, True),
        (FOUR, 9, 200, False),
        (FOUR, 12, 64, True),
    ):
        (module,) = flash.install(monkeypatch, version, card=card)
        leaf = torch.randn(1, 2, 8, dim).bfloat16().requires_grad_()
        if is_refused:
            error = "NotImplementedError: gradients under torch.use_deterministic_algorithms: ~ by flash-attn-"
            refuses(error, tritonattn.attention, leaf, leaf, leaf, backend="flash")
            leaf = leaf.detach()
        tritonattn.attention(leaf, leaf, leaf, backend="flash").sum()
        assert [call["deterministic"] for call in module.calls] == [True]
    torch.use_deterministic_algorithms(False)
    tritonattn.attention(leaf, leaf, leaf, backend="flash")
    assert not module.calls[-1]["deterministic"]


def test_products_beyond_fp16(monkeypatch):
    """A factor beyond 16 bits' range is a fold's limit; a constant goes to the library as it is."""
    flash.install(monkeypatch, TWO)
    q, k, v = (x.half() for x in torch.randn(3, 1, 2, 9, 16))
    assert tritonattn.attention(60 * q, k, v, gain=2000.0, backend="flash").isfinite().all()
    folded = tritonattn.attention(60 * q.abs() + 60, k, v, gain=torch.tensor(2000.0), backend="flash")
    assert folded.isnan().all()


def test_cudnn_is_asked_before_it_is_chosen(monkeypatch):
    """Calls that it does not take are refused before they run, so that "auto" can leave it to the kernels."""
    flash.install(monkeypatch, card=9)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    asked = []

    def can_use(params):
        asked.append((tuple(params.query.shape), params.query.requires_grad, params.is_causal))
        return params.query.shape[-1] <= 128

    monkeypatch.setattr(obstacles, "can_use_cudnn_attention", can_use)

    def call(dim, q_len=9, **masks):
        q, k = (torch.randn(1, 2, length, dim).bfloat16() for length in (q_len, 9))
        return Request(q, k, k, Visibility.of(q, k, **masks), Terms())

    assert run.takes(call(64, causal=True), "cudnn")
    assert run.takes(call(60), "cudnn")
    assert not run.takes(call(136), "cudnn")
    assert not run.takes(call(64, q_len=8, causal=True), "cudnn")
    assert asked == [((1, 2, 9, 64), False, True), ((1, 2, 9, 64), True, False), ((1, 2, 9, 136), False, False)]
    assert libraries.libraries(9) == libraries.libraries(9)
