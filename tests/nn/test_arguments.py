"""Arguments that the modules refuse: every error names the argument, the expected and the given value."""

import pytest
import torch

from tests.support.refusals import refuses
from tritonattn import SCALINGS, nn

from .test_attention import WIDTH, layer, tokens

OFFSETS = torch.tensor([0, 7], dtype=torch.int32)
K, V = torch.randn(2, 2, 3, 6), torch.randn(2, 2, 3, 4)


def made(**arguments):
    return nn.ScaledAttention(WIDTH, **{"heads": 4} | arguments)


@torch.no_grad()
def called(**arguments):
    return layer(causal=True, context_width=16)(**{"x": tokens()} | arguments)


def gate(*arguments):
    return nn.ForgetGate(WIDTH, 4, dtype=torch.float64)(*arguments)


def advanced(steps):
    return nn.Scheduled("dim", "none", 9).advance(steps)


def cache(**changed):
    return nn.KeyValueCache(**{"batch": 2, "kv_heads": 2, "capacity": 8, "head_dim": 6} | changed)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: made(heads=5), ValueError, "head_dim: expected an int where heads = 5 do not divide .*, got None"),
        (lambda: made(kv_heads=3), ValueError, "kv_heads: expected a divisor of heads = 4, got 3"),
        (lambda: made(scaling="ssmaxx"), ValueError, "scaling: expected one of"),
        (lambda: made(scaling=nn.SSMax), TypeError, r"expected an instance .* SSMax; write SSMax\(heads=\.\.\.\)"),
        (lambda: made(heads="a"), TypeError, "^heads: expected an int, got str 'a'"),
        (lambda: made(causal=1), TypeError, "causal: expected a bool, got int 1"),
        (lambda: made(window=3), TypeError, r"window: expected \(left, right\), got 3"),
        (lambda: made(dropout_p=1.5), ValueError, r"dropout_p: expected a number in \[0, 1\), got 1.5"),
        (lambda: made(backend="tritn"), ValueError, "backend: expected one of auto, .*, got 'tritn'"),
        (lambda: made(sinks=torch.zeros(4)), TypeError, "sinks: expected a bool, got a torch.float32 tensor"),
        (lambda: made(dtype=torch.int32), TypeError, "dtype: expected float16, .*, got torch.int32"),
        (lambda: made(rotary=0), ValueError, "rotary: expected .*, got 0"),
        (lambda: made(rotary=1), ValueError, "rotary: expected a finite number above 1, got 1"),
        (lambda: made(scaling=None), TypeError, "scaling: expected a name, a Scaling or a float, got NoneType"),
        (lambda: layer()(tokens().half()), TypeError, "x: expected the layer's torch.float64, got torch.float16; cast"),
        (lambda: called(context=tokens(width=16).half()), TypeError, "context: expected the layer's .*64, got .*16; c"),
        (lambda: made(gate="headwse"), ValueError, "gate: expected 'elementwise', .* got 'headwse' .did you mean"),
        (lambda: made(gate=True), TypeError, "gate: expected 'elementwise', 'headwise' or None, got bool"),
        (lambda: made(rotary=1e4, head_dim=5), ValueError, "head_dim: expected an even number with rotary, got 5"),
        (lambda: made(rotary=1e4)(tokens(), tokens()), ValueError, "context: expected None with rotary, got a tensor"),
        (lambda: called(x=tokens()[0]), ValueError, r"x: expected \[B, Sq, width = 24\], got \[7, 24\]"),
        (lambda: called(x=tokens().int()), TypeError, "x: expected a floating dtype, got torch.int32"),
        (lambda: called(context=tokens()), ValueError, r"context: .*context_width = 16\], got \[2, 7, 24\]"),
        (lambda: called(), ValueError, r"context: expected \[B, Sk, context_width = 16\], got None"),
        (lambda: called(cu_seqlens=OFFSETS, max_seqlen=7), ValueError, r"x: .* \[T, width = 24\], got \[2, 7, 24\]"),
        (lambda: called(x=tokens()[0], cu_seqlens=OFFSETS), TypeError, "max_seqlen: expected an int, got NoneType"),
        (lambda: called(cache=[tokens()]), TypeError, "cache: expected a KeyValueCache, got list"),
        (lambda: called(cache=[tokens()], max_seqlen=7), ValueError, "max_seqlen: .* None with cache, got int 7"),
        (lambda: cache(head_dim="a"), TypeError, "head_dim: expected an int, got str 'a'"),
        (lambda: cache(value_dim=-1), ValueError, "value_dim: expected at least 1, got -1"),
        (lambda: cache(dtype=torch.int32), TypeError, "dtype: expected float16, .*, got torch.int32"),
        (lambda: advanced("x"), TypeError, "steps: expected an int, got str 'x'"),
        (lambda: advanced(-1), ValueError, "steps: expected at least 0, got -1"),
        (lambda: nn.ForgetGate(8, 4, bias="no"), TypeError, "bias: expected a bool, got str 'no'"),
        (lambda: gate([1.0]), TypeError, r"x: expected a tensor \[..., S, width\], got list"),
        (lambda: gate(tokens(width=8)), ValueError, r"x: expected \[..., S, width = 24\], got \[2, 7, 8\]"),
        (lambda: gate(tokens(), torch.ones(2, 4, 1)), ValueError, r"before: .*, heads\] = \[2, 4\], got \[2, 4, 1\]"),
        (lambda: nn.SSMax(4, bias="no"), TypeError, "bias: expected a bool, got str 'no'"),
        (lambda: nn.SSMax(4, base=64, mode="sqrt_dim"), ValueError, "base: expected none with mode='sqrt_dim'.*got 64"),
        (lambda: nn.SSMax(4)(K), TypeError, r"SSMax: expected to be an argument, .*scaling=\.\.\.\), got a call of it"),
        (lambda: nn.Scheduled("dim", "none", 9)(K), TypeError, "Scheduled: expected to be an argument, .*, got a call"),
        (lambda: nn.LearnedLogPower(4, 0.7, mode="sqrt_dim"), ValueError, "power: expected none with mode=.*, got 0.7"),
        (lambda: nn.PerHead(0.3, heads=4), TypeError, "scaling: expected a name or a Scaling, got float 0.3"),
        (lambda: nn.PowerLaw(4, "key_norm_rms"), ValueError, "mode: expected one of sqrt_dim, dim, none, .*, got"),
        (lambda: nn.Scheduled("sqrt_dim", "dim", 0), ValueError, "steps: expected at least 1, got 0"),
        (lambda: nn.Scheduled("sqrt_dim", "dimm", 9), ValueError, "scaling: expected one of .*did you mean 'dim'"),
        (lambda: nn.Scheduled(SCALINGS["dim"], "dim", 10), TypeError, r"write Dim\(\)"),
        (lambda: nn.Scheduled("dim", "none", 10, blend="cubic"), ValueError, "blend: expected one of .*'cubic'"),
        (lambda: next(nn.scaling_parameters([])), TypeError, r"module: expected an nn\.Module, got list"),
    ],
)
def test_refused_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_arguments_that_exclude_one_another():
    made, x = layer(causal=True), tokens()
    cache, lengths = made.cache(2, 8), torch.tensor([3, 7])
    with torch.no_grad():
        for name, value in {"context": x, "key_lengths": lengths, "mask": torch.ones(7, 7).bool()}.items():
            refuses(
                f"ValueError: {name}: expected None with cache, got a tensor", made, x, cache=cache, **{name: value}
            )
        refuses("ValueError: cache: expected a causal layer", layer(), x, cache=cache)
    refuses("ValueError: counts: expected None with no cache", made, x, counts=lengths)
    refuses("ValueError: max_seqlen: expected None with no cu_seqlens, got int 7", made, x, max_seqlen=7)
    packed = {"cu_seqlens": OFFSETS, "max_seqlen": 7}
    refuses("ValueError: key_lengths: expected None with cu_seqlens", made, x[0], **packed, key_lengths=lengths)
    refuses("NotImplementedError: cache: no gradient goes through it", made, x, cache=cache)
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("new", "error", "message"),
    [
        ((K, V.int()), TypeError, "v_new: expected float16, bfloat16, float32 or float64, got torch.int32"),
        ((K[..., :5], V), ValueError, r"k_new: expected shape \[B, Hkv, n, D\] = \[2, 2, n, 6\], got \[2, 2, 3, 5\]"),
        ((K, V[0]), ValueError, r"v_new: expected shape \[B, Hkv, n, Dv\] = \[2, 2, n, 4\], got \[2, 3, 4\]"),
        ((K, V[:, :, :2]), ValueError, "v_new: expected k_new's n = 3, got 2"),
        ((K, V.to("meta")), ValueError, "v_new: expected this KeyValueCache's device cpu, got meta"),
    ],
)
def test_refused_keys_and_values_leave_the_cache_as_it_was(new, error, message):
    one = cache(value_dim=4)
    with pytest.raises(error, match=message):
        one.append(*new)
    assert one.lengths.tolist() == [0, 0]
    assert not one.k.any()


@pytest.mark.parametrize("scaling", ["ssmax:64", "log_key_count:64", "qwen_logn:64", "ssmax"])
def test_rotary_positions_over_all_keys_with_a_factor_that_grows_warn(scaling):
    with pytest.warns(UserWarning, match="rotary: expected a window, or no positions"):
        made(scaling=scaling, rotary=1e4, causal=True)
    made(scaling=scaling, causal=True)
    made(rotary=1e4, causal=True)
    made(scaling="ssmax:8", rotary=1e4, causal=True, window=(7, 0))


def test_a_scaling_is_assigned_as_it_is_given_to_the_constructor():
    """Also over a learned one, where torch takes nothing but a module."""
    for first in ("ssmax:64", "sqrt_dim"):
        one = made(scaling=first, causal=True, dtype=torch.float64)
        for given in ("log_key_count:64", SCALINGS["qwen_logn"](64), 0.5, "learned_cosine", nn.SSMax(4, 64), "dim"):
            one.scaling = given
            fresh = made(scaling=given, causal=True, dtype=torch.float64)
            assert set(one.state_dict()) == set(fresh.state_dict())
            fresh.load_state_dict(one.state_dict())
            assert torch.equal(one(tokens()), fresh(tokens()))
    for wrong in (None, True, torch.ones(4)):
        refuses("TypeError: scaling: expected a name, a Scaling or a float, got", setattr, one, "scaling", wrong)
    refuses("ValueError: scaling: expected one of", setattr, one, "scaling", "ssmaxx")
    assert one.scaling.name == "dim"
    near, far = made(causal=True, window=(7, 0)), made(causal=True, rotary=1e4)
    with pytest.warns(UserWarning, match="scaling: expected a base of at most 8, the keys in window"):
        near.scaling = "ssmax:64"
    with pytest.warns(UserWarning, match="rotary: expected a window, or no positions"):
        far.scaling = "ssmax:64"
