"""Records of cached keys: a decode step measures new keys only, and no record outlives its proof."""

from __future__ import annotations

import copy
import gc
import inspect
import random
import weakref

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils

from tests.huggingface.architectures import ARCHITECTURES
from tests.huggingface.checks import static_cache
from tritonattn.core import statistics
from tritonattn.huggingface import patch
from tritonattn.huggingface.recording import RECORDING, RecordingDynamicLayer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
LLAMA = ARCHITECTURES["llama"]
TAKES_CONFIG = "config" in inspect.signature(DynamicCache.__init__).parameters
DYNAMIC_WINDOWS = getattr(cache_utils, "DynamicSlidingWindowLayer", None)
STATIC_WINDOWS = getattr(cache_utils, "StaticSlidingWindowLayer", None)
# Names of models, the kinds of their caches, and a layer of them.
CACHES = {
    "dynamic": ("llama", DynamicCache, cache_utils.DynamicLayer),
    "static": ("llama", static_cache, cache_utils.StaticLayer),
    "dynamic window": ("mistral", DynamicCache, DYNAMIC_WINDOWS),
    "static window": ("mistral", static_cache, STATIC_WINDOWS),
    "dynamic chunks": ("llama4", DynamicCache, DYNAMIC_WINDOWS),
    "static window beside full": ("gemma3", static_cache, STATIC_WINDOWS),
}
RECORDED = {name: one for name, one in CACHES.items() if one[2] in RECORDING}


def cache_of(kind: str, network, length: int = 20, batch: int = 2):
    make = CACHES[kind][1]
    if make is static_cache:
        return static_cache(network, length, batch)
    return DynamicCache(config=network.config) if TAKES_CONFIG else DynamicCache()


def network_of(kind: str):
    return ARCHITECTURES[CACHES[kind][0]].build()


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


class Lengths:
    """How many keys have been measured, counted where the lengths of keys are computed."""

    def __init__(self, monkeypatch) -> None:
        self.keys = 0
        original = statistics._lengths_on_cpu

        def counting(k):
            self.keys += k.shape[-2]
            return original(k)

        monkeypatch.setattr(statistics, "_lengths_on_cpu", counting)

    def take(self) -> int:
        keys, self.keys = self.keys, 0
        return keys


def held_from_the_start(cache) -> bool:
    """Whether the layers had been there before their first keys, so that these were made by layers that record."""
    return all(not layer.keys.is_inference() for layer in cache.layers)


@pytest.mark.parametrize(
    ("mode", "context"),
    [("key_norm_sum", torch.no_grad), ("key_norm_max", torch.no_grad), ("key_norm_sum", torch.inference_mode)],
)
@pytest.mark.parametrize("cache", RECORDED)
def test_a_step_measures_new_keys_only(mode, cache, context, monkeypatch):
    """Before a window is full, when it becomes so, and after."""
    network, ids = network_of(cache), LLAMA.inputs()["input_ids"]
    layers = len(network.model.layers)
    for first in (3, 8):
        with patch(network, scaling=mode), context():
            held = cache_of(cache, network)
            lengths = Lengths(monkeypatch)
            network(input_ids=ids[:, :first], past_key_values=held)
            assert lengths.take() == first * layers
            if context is torch.inference_mode and not held_from_the_start(held):
                network(input_ids=ids[:, :1], past_key_values=held)  # measures what a plain layer has made
                lengths.take()
            for new in (1, 1, 2, 1, 3):
                network(input_ids=ids[:, :new], past_key_values=held)
                assert lengths.take() == new * layers
        assert any(isinstance(layer, RECORDING[CACHES[cache][2]]) for layer in held.layers)


@pytest.mark.parametrize("cache", RECORDED)
@pytest.mark.parametrize("mode", ["key_norm_sum", pytest.param("key_norm_max", marks=pytest.mark.slow)])
def test_a_long_text_in_pieces_is_what_it_is_without_a_cache(mode, cache):
    """So long that a record that runs on is cut several times."""
    network = network_of(cache)
    ids = torch.randint(3, 61, (2, 64), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    pieces = [7, 1, 1, 2, 1, 60, 1, 4, *[1] * 30, 30, 1, 1]
    ids = ids[:, : sum(pieces)]
    with patch(network, scaling=mode), torch.no_grad():
        wanted = network(input_ids=ids, use_cache=False).logits
        held = cache_of(cache, network, length=ids.shape[1])
        got = [network(input_ids=piece, past_key_values=held).logits for piece in ids.split(pieces, dim=1)]
    close(torch.cat(got, dim=1), wanted)
    if DYNAMIC_WINDOWS and cache == "dynamic window":
        assert held.layers[0].key_statistics()[0].capacity < 200


EDITS = {
    "written to in place": lambda layer: layer.keys.mul_(1.5),
    "replaced": lambda layer: setattr(layer, "keys", layer.keys * 1.5),
    "written to through a view": lambda layer: layer.keys[:, :, 2].zero_(),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("cache", RECORDED)
def test_an_edited_cache_is_measured_again(edit, cache, context):
    """What a record cannot prove it does not claim: the answer is that of an unknown cache class with these keys."""
    network, ids = network_of(cache), LLAMA.inputs()["input_ids"]

    def run(unknown: bool) -> torch.Tensor:
        held = cache_of(cache, network)
        network(input_ids=ids[:, :8], past_key_values=held)
        for layer in held.layers:
            EDITS[edit](layer)
            if unknown:  # a class that nobody has made a record for
                known = {recording: plain for plain, recording in RECORDING.items()}
                layer.__class__ = type("UnknownLayer", (known.get(type(layer), type(layer)),), {})
        return network(input_ids=ids[:, 8:9], past_key_values=held).logits

    for mode in ("key_norm_sum", *(["cosine"] if context is torch.no_grad else [])):
        with patch(network, scaling=mode), context():
            close(run(unknown=False), run(unknown=True))


def test_a_copied_cache_goes_on_by_itself():
    network, ids = LLAMA.build(), LLAMA.inputs()["input_ids"]
    with patch(network, scaling="key_norm_sum"), torch.no_grad():
        held = DynamicCache()
        network(input_ids=ids[:, :8], past_key_values=held)
        twin = copy.deepcopy(held)
        wanted = network(input_ids=ids[:, 8:9], past_key_values=held).logits
        assert torch.equal(network(input_ids=ids[:, 8:9], past_key_values=twin).logits, wanted)
        assert held.layers[0].keys.shape == twin.layers[0].keys.shape


@pytest.mark.parametrize("cache", RECORDED)
def test_modes_of_autograd_may_change_from_step_to_step(cache):
    """What one mode leaves behind the next one takes up, or measures anew."""
    network, ids = network_of(cache), LLAMA.inputs()["input_ids"]
    plain, inference, recorded = torch.no_grad, torch.inference_mode, torch.enable_grad
    orders = [(plain, inference) * 2, (inference, plain) * 2, (inference, inference, plain, plain)]
    if "dynamic" in cache:
        orders += [(recorded,) * 4, (plain, recorded, plain, inference)]
    with patch(network, scaling="key_norm_mean"):
        with torch.no_grad():
            wanted = network(input_ids=ids, use_cache=False).logits
        for order in orders:
            held, got = cache_of(cache, network), []
            for piece, context in zip(ids.split([4, 5, 1, 3], dim=1), order, strict=True):
                with context():
                    got.append(network(input_ids=piece, past_key_values=held).logits)
            close(torch.cat([x.detach().clone() for x in got], dim=1), wanted)
            if recorded not in order:
                assert any(layer._statistics is not None for layer in held.layers)
            if set(order) == {recorded}:
                got[-1].sum().backward()
                assert network.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["key_norm_sum", "key_norm_max"])
def test_what_is_done_to_a_cache_is_done_to_its_record(mode):
    """reorder, repeat, select, crop: afterwards the record is what the keys say, and none was measured anew."""
    network, ids = LLAMA.build(), LLAMA.inputs()["input_ids"]
    with patch(network, scaling=mode), torch.no_grad():
        held = DynamicCache()
        network(input_ids=ids[:, :8], past_key_values=held)
        layer = held.layers[1]
        assert type(layer) is RecordingDynamicLayer
        changes = [
            lambda: held.reorder_cache(torch.tensor([1, 1])),
            lambda: held.batch_repeat_interleave(3),
            lambda: held.batch_select_indices(torch.tensor([4, 0, 5])),
            lambda: held.crop(-3),
        ]
        for change in changes:
            change()
            assert layer._valid() is not None
            record, first = layer.key_statistics()
            assert first == 0
            lengths = layer.keys.norm(dim=-1)
            assert (record.counts == layer.keys.shape[2]).all()
            torch.testing.assert_close(record.lengths[..., : lengths.shape[2]], lengths)
            sums = lengths.double().cumsum(-1)
            torch.testing.assert_close(record.length_sums[..., 1 : sums.shape[2] + 1], sums)
        network(input_ids=ids[[0, 1, 0], 8:9], past_key_values=held)
        assert layer._valid() is not None


class Single:
    """One cache layer by itself, and all keys that it has been given."""

    def __init__(self, kind: type, window: int) -> None:
        arguments = {"max_cache_len": window if STATIC_WINDOWS and kind is STATIC_WINDOWS else 400}
        arguments["sliding_window"] = window
        taken = inspect.signature(kind.__init__).parameters
        self.layer = RECORDING[kind](**{name: x for name, x in arguments.items() if name in taken})
        self.keys = torch.empty(2, 2, 0, 4)

    def update(self, new: int) -> tuple[Tensor, int]:
        """What the layer returns, and the number of keys in it."""
        k = torch.randn(2, 2, new, 4)
        self.keys = torch.cat([self.keys, k], dim=2)
        given = self.layer.update(k, k)[0]
        held = self.keys.shape[2]
        return given, min(held, given.shape[2])

    def check(self, given: Tensor, held: int) -> None:
        assert self.layer.gave(given)
        record, first = self.layer.key_statistics()
        lengths = self.keys[:, :, self.keys.shape[2] - held :].norm(dim=-1)
        torch.testing.assert_close(record.lengths[..., first : first + held], lengths)
        for sums, power in ((record.length_sums, 1), (record.square_sums, 2)):
            found = sums[..., first + 1 : first + held + 1] - sums[..., first, None]
            torch.testing.assert_close(found, lengths.double().pow(power).cumsum(-1))


@pytest.mark.parametrize("window", [6, 150])
@pytest.mark.parametrize("kind", RECORDING, ids=lambda kind: kind.__name__)
def test_a_long_random_history_of_a_layer(kind, window, monkeypatch):
    """Pieces of any size, beams that change places: every key is measured once, and the record says what keys say."""
    dice, lengths = random.Random(window), Lengths(monkeypatch)
    with torch.no_grad():
        one = Single(kind, window)
        one.check(*one.update(4))
        lengths.take()
        while one.keys.shape[2] < 390:
            if dice.random() < 0.3:
                index = torch.tensor([dice.randrange(2) for _ in range(2)])
                one.layer.reorder_cache(index)
                one.keys = one.keys[index]
            new = min(dice.choice([1, 1, 1, 2, 5, 40]), 400 - one.keys.shape[2])
            given, held = one.update(new)
            assert lengths.take() == new
            one.check(given, held)
            assert lengths.take() == 0


@pytest.mark.skipif(not hasattr(DYNAMIC_WINDOWS, "activate_past_recording"), reason="this version has no such windows")
def test_rejected_guesses_leave_a_window_and_its_record(monkeypatch):
    dice, lengths = random.Random(0), Lengths(monkeypatch)
    with torch.no_grad():
        one = Single(DYNAMIC_WINDOWS, 6)
        one.layer.activate_past_recording()
        one.check(*one.update(3))
        lengths.take()
        for _ in range(60):
            new = dice.randint(1, 5)
            one.check(*one.update(new))
            rejected = dice.randint(0, new - 1)
            one.layer.crop(-rejected)
            one.keys = one.keys[:, :, : one.keys.shape[2] - rejected]
            assert lengths.take() == new


@pytest.mark.skipif(STATIC_WINDOWS not in RECORDING, reason="static windows of this version have no record")
def test_what_a_static_window_returned_is_watched_and_not_kept_alive():
    with torch.no_grad():
        one = Single(STATIC_WINDOWS, 6)
        given, held = one.update(9)
        one.check(given, held)
        given.mul_(2)  # by a model, before its attention: of this call alone
        record, first = one.layer.key_statistics()
        torch.testing.assert_close(record.lengths[..., first : first + held], given.norm(dim=-1))
        alive = weakref.ref(given)
        del given
        gc.collect()
        assert alive() is None
        one.check(*one.update(1))
