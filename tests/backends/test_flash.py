"""Backend "flash" on stand-ins for FlashAttention 2, 3 and 4: results, gradients, and what the libraries are given."""

import sys

import pytest
import torch
from torch.autograd import forward_ad

import tritonattn
from tests.kernels import harness
from tests.support import flash
from tests.support.calls import assert_gradients_of_keys_add_up, torch_kernels
from tests.support.flash import assert_close
from tests.support.packed import RAGGED, offsets
from tests.support.pairs import in_turn
from tests.support.refusals import refuses
from tritonattn.backends.flash import libraries, obstacles
from tritonattn.backends.flash.run import folded
from tritonattn.core.observation import Observer
from tritonattn.ops import statistics as by_kernels

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
TWO, THREE, FOUR = "flash-attn-2 2.8.3.post2", "flash-attn-3 0251105", "flash-attn-4 4.0.0b36"
OLD_THREE = "flash-attn-3 2.8.3.post2"
NEWEST = (TWO, THREE, FOUR)
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (5, 2)},
    "left window": {"window": (4, None)},
    "right window": {"window": (None, 3)},
    "causal window": {"causal": True, "window": (6, None)},
    "window of all": {"window": (2**40, 2**40), "causal": True},
}
NO_LIMIT = {TWO: -1, THREE: -1, FOUR: None}


@in_turn(
    scaling=[name for name, mode in tritonattn.SCALINGS.items() if not mode.about.addend],
    version=flash.VERSIONS,
    mask=MASKS,
    dtype=HALVES,
    lengths=[(24, 24), (9, 30), (1, 30), (30, 9), (24, 24)],
)
def test_every_mode(scaling, version, mask, dtype, lengths, monkeypatch):
    (module,) = flash.install(monkeypatch, version)
    tensors = harness.inputs(dtype, CPU, q_len=lengths[0], k_len=lengths[1], scales=("gain",))
    assert_close(tensors, tritonattn.attention, scaling=scaling, **MASKS[mask])
    assert len(module.calls) == 1


@in_turn(version=flash.VERSIONS, masks=[{}, {"causal": True}, {"causal": True, "window": (2, 0)}], dtype=HALVES)
@pytest.mark.parametrize("scaling", ["key_count", "key_norm_mean", "cosine"])
def test_packed_sequences(version, masks, dtype, scaling, monkeypatch):
    """Rows and keys of no sequence are NaN, and so is what a library leaves of them."""
    (module,) = flash.install(monkeypatch, version)
    tensors = harness.packed_inputs(RAGGED, dtype, CPU, scales=("gain",))
    function = tritonattn.attention_varlen
    options = {"scaling": scaling, **RAGGED.arguments(), **masks}
    assert_close(tensors, function, summands=1.0, **options)
    given = module.calls[0]
    assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (5, 6)
    assert torch.equal(given["cu_seqlens_k"], offsets(RAGGED.k_lengths))
    if version == OLD_THREE:
        refuses(
            "NotImplementedError: return_aux: ~ flash-attn-3",
            function,
            **tensors,
            **options,
            backend="flash",
            return_aux=True,
        )
        return
    found, exact = (
        function(**x, **options, backend=backend, return_aux=True)[1].lse.double()
        for x, backend in ((tensors, "flash"), (harness.as_double(tensors), "reference"))
    )
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("version", NEWEST)
def test_what_a_library_is_given(version, monkeypatch):
    """The constant, not multiplied into q, and the sides of windows as the library says none."""
    (module,) = flash.install(monkeypatch, version)
    none, q, k, v = NO_LIMIT[version], *(x.bfloat16() for x in torch.randn(3, 1, 2, 20, 16))
    for masks, causal, window in (
        ({}, False, (none, none)),
        ({"causal": True}, True, (none, none)),
        ({"window": (5, 2)}, False, (5, 2)),
        ({"window": (4, None)}, False, (4, none)),
        ({"window": (None, 3)}, False, (none, 3)),
        ({"window": (6, 0)}, True, (6, none)),
        ({"window": (19, 2**40)}, False, (19, none)),
        ({"window": (20, None)}, False, (none, none)),
    ):
        factor = torch.full((2, 20), 1.5)
        tritonattn.scaled_attention(q, k, v, factor, scale=0.3, backend="flash", **masks)
        given = module.calls[-1]
        assert (given["causal"], given["window_size"], given["softmax_scale"]) == (causal, window, 0.3), masks
        assert torch.equal(given["q"], (1.5 * q.float()).bfloat16().transpose(1, 2))
        assert given["k"].data_ptr() == k.data_ptr()


@in_turn(scale=[0.3, 0.0, -0.7], version=NEWEST, dtype=HALVES)
def test_scales_of_both_sides(scale, version, dtype, monkeypatch):
    flash.install(monkeypatch, version)
    tensors = harness.inputs(dtype, CPU, scales=("query_scale", "key_scale"))
    assert_close(tensors, tritonattn.scaled_attention, summands=1.0, scale=scale, causal=True)


@in_turn(
    dims=[(5, 9), (40, 40), (192, 128), (200, 16), (129, 129), (256, 256), (192, 128), (64, 136)],
    version=[FOUR, TWO, FOUR, FOUR, THREE, TWO, THREE, FOUR],
)
def test_head_dims(dims, version, monkeypatch):
    flash.install(monkeypatch, version)
    tensors = harness.inputs(torch.bfloat16, CPU, q_len=8, k_len=9, head_dim=dims[0], value_dim=dims[1])
    assert_close(tensors, tritonattn.attention, causal=True)


def test_operands_of_any_strides(monkeypatch):
    """The stand-ins refuse rows that do not begin at 16 bytes; libraries load from there without a check."""
    flash.install(monkeypatch, TWO)
    whole = torch.randn(3, 1, 2, 9, 40).bfloat16()
    for views in (whole[..., 1:17], whole[..., ::2], whole[..., :20].mT, whole.transpose(2, 3)[..., :9]):
        q, k, v = views.unbind()
        found, wanted = (tritonattn.attention(q, k, v, backend=one).float() for one in ("flash", "reference"))
        torch.testing.assert_close(found, wanted, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("version", NEWEST)
def test_softcap(version, monkeypatch):
    flash.install(monkeypatch, version)
    tensors = harness.inputs(torch.bfloat16, CPU, scales=("gain",))
    assert_close(tensors, tritonattn.attention, scaling="log_key_count", softcap=1.5, causal=True)


def test_sinks(monkeypatch):
    flash.install(monkeypatch, FOUR)
    tensors = harness.inputs(torch.bfloat16, CPU, scales=("sinks", "gain"))
    assert_close(tensors, tritonattn.attention, scaling="log_key_count", causal=True)
    of_rows = tensors | {"sinks": torch.zeros(2, 21)}
    refuses(
        "NotImplementedError: sinks of rows: ~ 'flash' ~ 'triton'", tritonattn.attention, **of_rows, backend="flash"
    )
    flash.install(monkeypatch, THREE, TWO)
    refuses(
        "NotImplementedError: sinks: ~ by flash-attn-3 ~ 'triton'", tritonattn.attention, **tensors, backend="flash"
    )


def test_lse_and_its_gradient(monkeypatch):
    """Only FlashAttention 4 has one; of the others it is refused, where the libraries would drop it."""
    tensors = harness.inputs(torch.bfloat16, CPU, q_len=20, k_len=12, scales=("gain",))

    def loss(backend, tensors):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        options = {"scaling": "log_key_count", "causal": True, "backend": backend}
        out, aux = tritonattn.attention(**leaves, **options, return_aux=True)
        seen = aux.lse.isfinite()
        total = out.double().sum() + (aux.lse[seen].double() ** 2).sum()
        return aux.lse.detach().double(), *torch.autograd.grad(total, list(leaves.values()))

    exact = loss("reference", harness.as_double(tensors))
    flash.install(monkeypatch, FOUR)
    for found, wanted in zip(loss("flash", tensors), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=0.02 * wanted[wanted.isfinite()].abs().max(), rtol=0.02)
    for version in (TWO, THREE):
        flash.install(monkeypatch, version)
        refuses("NotImplementedError: return_aux: flash-attn- ~ no gradient of lse", loss, "flash", tensors)


def test_aux_is_lse_alone(monkeypatch):
    flash.install(monkeypatch, FOUR)
    q, k, v = (x.bfloat16() for x in torch.randn(3, 1, 2, 9, 16))
    _, aux = tritonattn.attention(q, k, v, backend="flash", return_aux=True)
    assert isinstance(aux, tritonattn.AttentionAux)
    assert aux[1:] == (None, None)
    for name in ("max_logit", "entropy"):
        refuses(f"NotImplementedError: {name}: backend 'flash' gives lse alone", getattr, aux, name)


@pytest.mark.parametrize("version", NEWEST)
def test_gradients_of_keys_are_added_before_they_are_rounded(version, monkeypatch):
    """Through logits and through norms, by kernels of statistics too, whose gradient comes in another tensor."""
    flash.install(monkeypatch, version)
    with pytest.raises(AssertionError):  # the library's gradient of keys, in fp16, is infinite
        assert_gradients_of_keys_add_up("flash")
    tensors = harness.inputs(torch.bfloat16, CPU, scales=("gain",))
    used = []
    monkeypatch.setattr(by_kernels, "kernels", lambda: used.append(version) or torch_kernels())
    monkeypatch.setattr("tritonattn.calls.dispatch.kernels_take", lambda x: True)
    for scaling in ("key_norm_mean", "cosine"):
        assert_close(tensors, tritonattn.attention, scaling=scaling, causal=True)
    assert used


def test_gradients_of_a_fold():
    """A 16-bit gradient goes through fp32 products and sums, rounded once to what takes them."""
    x, d = torch.randn(2, 1, 2, 5, 16).bfloat16()
    scale, seen = torch.randn(1, 2, 5, requires_grad=True), torch.tensor([True, True, False, True, True])
    products = torch.where(seen[:, None], d, 0).float() * x.float()
    d_x = torch.where(seen[:, None], d, 0).float() * scale.detach()[..., None]
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        y = folded(leaf, scale, seen.expand(1, 1, 5), torch.bfloat16)
        assert torch.equal(y, torch.where(seen[:, None], x.float() * scale[..., None], 0).bfloat16())
        found = torch.autograd.grad(y, (leaf, scale), d)
        assert torch.equal(found[0], d_x.to(dtype))
        assert torch.equal(found[1], products.sum(-1))


REFUSED = {
    "key_lengths": {"key_lengths": torch.tensor([3, 4])},
    "key_ranges": {"key_ranges": torch.zeros(2, 21, 2, dtype=torch.int32)},
    "mask": {"mask": torch.ones(21, 35, dtype=torch.bool)},
    "key_bias": {"key_bias": torch.zeros(1, 2, 35)},
    "bias": {"bias": torch.zeros(21, 35)},
    "relative_bias": {"relative_bias": torch.zeros(1, 2, 1, 41)},
    "dropout_p": {"dropout_p": 0.1},
    "batch_invariant": {"batch_invariant": True},
    "return_aux with sinks": {"return_aux": True, "sinks": torch.zeros(2)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_library_has(name, monkeypatch):
    (module,) = flash.install(monkeypatch, FOUR)
    tensors = harness.inputs(torch.bfloat16, CPU)
    error = (
        f"NotImplementedError: {name}: backend 'flash' does not support it; backend 'auto' does, by 'triton' or 'sdpa'"
    )
    refuses(error, tritonattn.attention, **tensors, **REFUSED[name], backend="flash")
    assert not module.calls


def test_other_refusals(monkeypatch):
    flash.install(monkeypatch, FOUR)
    attention, decode = tritonattn.attention, tritonattn.attention_decode
    wide, narrow = torch.randn(3, 1, 2, 5, 264).bfloat16(), torch.randn(3, 1, 2, 5, 16)
    refuses("NotImplementedError: head_dim 264, above 256: ~ 'triton'", attention, *wide, backend="flash")
    refuses("NotImplementedError: q of dtype torch.float32: ~ 'triton'", attention, *narrow, backend="flash")
    q, k, v = narrow.bfloat16()

    class Biased(tritonattn.Scaling):
        def scales(self, q, k, visibility, statistics):
            return tritonattn.Scales(1.0, key_bias=torch.zeros(2, 5))

    refuses(
        "NotImplementedError: key_bias: ~ 'triton'",
        attention,
        q,
        k,
        v,
        scaling=Biased(),
        backend="flash",
    )
    options = {"key_lengths": torch.tensor([5]), "backend": "flash"}
    refuses("NotImplementedError: attention_decode: ~ 'triton'", decode, q[:, :, :1], k, v, **options)

    def loss(q):
        return attention(q, k, v, backend="flash").sum()

    refuses("NotImplementedError: torch.func: ~ 'triton'", torch.func.grad(loss), q)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of torch's derivatives
@pytest.mark.parametrize("scaling", ["sqrt_dim", "key_norm_mean", "cosine"])
def test_derivatives_beyond_the_first_are_refused(scaling, monkeypatch):
    flash.install(monkeypatch, FOUR)
    leaves = [x.requires_grad_() for x in torch.randn(3, 1, 2, 20, 8).bfloat16().unbind()]
    out = tritonattn.attention(*leaves, scaling=scaling, causal=True, backend="flash")
    for gradient in torch.autograd.grad(out.square().sum(), leaves, create_graph=True):
        for leaf in leaves:
            error = "NotImplementedError: ~ 'flash' has no gradients of gradients; backends 'triton', 'sdpa'"
            refuses(error, torch.autograd.grad, gradient.square().sum(), leaf, retain_graph=True)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), x.detach()) for x in leaves]
        error = "NotImplementedError: a tangent of forward mode: ~ 'triton' or 'sdpa'"
        refuses(error, tritonattn.attention, *duals, backend="flash")
        tritonattn.attention(*duals)  # "auto" passes it over


def test_the_newest_that_can(monkeypatch):
    """On Hopper 4 before 3 before 2; 3 is made for Hopper alone, and 4 not for Ampere."""
    tensors = harness.inputs(torch.bfloat16, CPU)
    for card, wanted in ((9, 2), (10, 2), (8, 0)):
        modules = flash.install(monkeypatch, *NEWEST, card=card)
        tritonattn.attention(**tensors, backend="flash")
        assert [len(module.calls) for module in modules] == [int(at == wanted) for at in range(3)]
    two, three = flash.install(monkeypatch, TWO, OLD_THREE, card=9)
    tritonattn.attention(**tensors, backend="flash")
    tritonattn.attention(**tensors, backend="flash", return_aux=True)  # that 3 hands no lse out
    assert (len(two.calls), len(three.calls)) == (1, 1)


def test_nothing_installed(monkeypatch):
    tensors = harness.inputs(torch.bfloat16, CPU)
    refuses(
        "ValueError: backend: expected tensors on a CUDA or HIP device for 'flash', got cpu",
        tritonattn.attention,
        **tensors,
        backend="flash",
    )
    commands = ("'flash-attn-4>=4.0.0b34'", "'flash-attn>=2.6'", "./hopper")
    how = " ~ ".join(f"pip install {one}" for one in commands)
    for versions, why in (
        ((), "which is not installed for this GPU"),
        (("flash-attn-2 2.5.8",), "flash-attn-2 is too old"),
        (("flash-attn-4 4.0.0b24",), "flash-attn-4 is too old"),  # drops the gradient of sinks
        (("flash-attn-4 4.0.0b33",), "flash-attn-4 is too old"),  # asserts at head dim 256 on sm_100
    ):
        flash.install(monkeypatch, *versions, card=9)
        error = f"ImportError: backend: 'flash' needs FlashAttention, {why}: {how}"
        refuses(error, tritonattn.attention, **tensors, backend="flash")
    flash.install(monkeypatch, card=7)
    error = "NotImplementedError: compute capability 7.x: backend 'flash' does not support it"
    refuses(error, tritonattn.attention, **tensors, backend="flash")


def test_a_library_that_cannot_be_imported(monkeypatch, tmp_path):
    """Built for another torch, as a rule: the error is told, unless another library runs the call."""
    flash.install(monkeypatch, card=8)
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    tensors = harness.inputs(torch.bfloat16, CPU)
    error = "ImportError: ~ flash-attn-2 cannot be imported (ImportError: undefined symbol: _ZN3c10): pip install"
    refuses(error, tritonattn.attention, **tensors, backend="flash")
    (module,) = flash.install(monkeypatch, THREE)
    tritonattn.attention(**tensors, backend="flash")
    assert len(module.calls) == 1


def test_cudnn(monkeypatch):
    """cuDNN, where nothing else is installed: squares and whole rows of a batch, with scales and their gradients."""
    flash.install(monkeypatch, card=9)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(obstacles, "can_use_cudnn_attention", lambda params: False)
    tensors = harness.inputs(torch.bfloat16, CPU, q_len=20, k_len=20, scales=("gain",))
    refuses("NotImplementedError: q [ ~ by cudnn; pip ~ 'triton'", tritonattn.attention, **tensors, backend="flash")
    monkeypatch.setattr(obstacles, "can_use_cudnn_attention", lambda params: True)
    monkeypatch.setattr(
        libraries, "sdpa_kernel", lambda backend: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    )
    for masks in ({}, {"causal": True}):
        assert_close(tensors, tritonattn.attention, scaling="key_norm_mean", **masks)
    tensors = harness.inputs(torch.bfloat16, CPU)
    for name, options in (
        ("causal of 21 queries and 35 keys", {"causal": True}),
        ("window", {"window": (2, 2)}),
        ("softcap", {"softcap": 2.0}),
        ("sinks", {"sinks": torch.zeros(2)}),
        ("return_aux", {"return_aux": True}),
    ):
        error = f"NotImplementedError: {name}: ~ by cudnn; pip install 'flash-attn-4 ~ 'triton'"
        refuses(error, tritonattn.attention, **tensors, **options, backend="flash")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of Dynamo, at a break
def test_a_compiler_leaves_it_out(monkeypatch):
    (module,) = flash.install(monkeypatch, FOUR)
    q, k, v = (x.bfloat16().requires_grad_() for x in torch.randn(3, 1, 2, 12, 16))

    def call(q, k, v):
        return tritonattn.attention(q * 2, k, v, scaling="key_norm_mean", causal=True, backend="flash") + 1

    found, wanted = torch.compile(call, backend="aot_eager")(q, k, v), call(q, k, v)
    assert torch.equal(found, wanted)
    assert len(module.calls) == 2
    for one, other in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_monitor_gets_its_statistics_from_another_backend(monkeypatch):
    (module,) = flash.install(monkeypatch, FOUR)
    q, k, v = (x.bfloat16() for x in torch.randn(3, 1, 2, 12, 16))
    found = []
    observer = Observer(lambda call: found.append(call.rows()))
    observer.begin()
    try:
        tritonattn.attention(q, k, v, causal=True, backend="flash")
    finally:
        observer.close()
    wanted = tritonattn.attention(q, k, v, causal=True, backend="sdpa", return_aux=True)[1]
    torch.testing.assert_close(found[0].entropy, wanted.entropy)
    assert len(module.calls) == 1
