"""`check_scaling`: right scalings pass, and each kind of mistake is named with its mask."""

import pytest
import torch

from tritonattn import SCALINGS, Scales, Scaling, check_scaling, nn

MASKS = {"full", "causal", "causal, last rows", "window", "padding", "padding on the left", "dense", "packed"}
MASKS |= {"ranges, rows without keys"}


@pytest.mark.parametrize("mode", SCALINGS)
def test_every_mode_passes(mode):
    found = check_scaling(mode)
    assert set(found) == MASKS
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize(
    "scaling",
    [nn.SSMax(6, bias=True), nn.PowerLaw(3, "key_norm_sum"), nn.PerHead("key_norm_rms", heads=2), nn.Cosine(4)],
)
def test_learned_scalings_pass_with_their_own_number_of_heads(scaling):
    assert max(check_scaling(scaling).values()) < 1e-5


class Counts(Scaling):
    """1 / n, right."""

    name = "counts"

    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, query=1 / visibility.counts().clamp(min=1))

    def multiplier(self, q, k, visible):
        return 1 / visible.sum(-1, keepdim=True).clamp(min=1)


class WrongCount(Counts):
    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, query=1 / (visibility.counts() + 1))


class IgnoresTheMask(Counts):
    def scales(self, q, k, visibility, statistics):
        return Scales(1 / k.shape[2])


class IgnoresPackedSequences(Counts):
    def scales(self, q, k, visibility, statistics):
        if visibility.sequences is None:
            return super().scales(q, k, visibility, statistics)
        return Scales(1.0, query=1 / torch.arange(1, q.shape[2] + 1).double()[None, None])


class BothIgnorePadding(Counts):
    def scales(self, q, k, visibility, statistics):
        return Scales(1 / k.shape[2])

    def multiplier(self, q, k, visible):
        return 1 / k.shape[2]


class BothLeakTheFuture(Counts):
    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, query=k.norm(dim=-1).amax(-1, keepdim=True))

    def multiplier(self, q, k, visible):
        return k.norm(dim=-1).amax(-1)[..., None, None]


class Lengths(Counts):
    """1 / sum ||k||, without a gradient."""

    reads_keys = False

    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, query=1 / statistics.length_sum.detach().clamp(min=1e-6))

    def multiplier(self, q, k, visible):
        return 1 / torch.where(visible, k.norm(dim=-1)[:, :, None], 0).sum(-1, keepdim=True).clamp(min=1e-6)


class ReadsKeysAfterAll(Counts):
    reads_keys = False

    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, key=k.norm(dim=-1))

    def multiplier(self, q, k, visible):
        return k.norm(dim=-1)[:, :, None]


class HalfAGradient(torch.nn.Module, Counts):
    def __init__(self):
        super().__init__()
        self.power = torch.nn.Parameter(torch.ones(4, 1))

    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, query=self.power * self.power.detach() / visibility.counts().clamp(min=1))

    def multiplier(self, q, k, visible):
        return self.power.square()[..., None] / visible.sum(-1, keepdim=True).clamp(min=1)


class Infinite(Counts):
    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, query=1 / torch.zeros(q.shape[:3]))

    def multiplier(self, q, k, visible):
        return 1 / torch.zeros(())


class TooLargeForOneHead(Counts):
    def scales(self, q, k, visibility, statistics):
        heads = torch.tensor([1.0, 1.0, 1.001, 1.0])[:, None]
        return Scales(1.0, query=heads / visibility.counts().clamp(min=1))


@pytest.mark.parametrize(
    ("scaling", "mask", "about"),
    [
        (WrongCount, "full", r"scales\(\) differs from multiplier\(\) .*: expected 0.0833333, got 0.0769231 at"),
        (IgnoresTheMask, "causal", r"scales\(\) differs from multiplier\(\) .*, got 0.0833333 at"),
        (IgnoresPackedSequences, "packed", r"scales\(\) differs from multiplier\(\)"),
        (BothIgnorePadding, "padding", "factors .* change with the number of keys that padding hides: expected 0.2"),
        (BothLeakTheFuture, "causal", r"factors .* change with key \d+ in rows that do not see it"),
        (Lengths, "full", r"the gradient of scales\(\) towards k differs from that of multiplier\(\)"),
        (ReadsKeysAfterAll, "full", r"scales\(\) looks at k, which reads_keys = False rules out: .* got nan"),
        (Infinite, "full", ".*expected a finite number, got inf at"),
        (HalfAGradient, "full", r"the gradient of scales\(\) towards power differs .* difference, 0\.5"),
        (TooLargeForOneHead, "full", r"scales\(\) differs from multiplier\(\) .* at \[0, 2, .* difference, 0\.001$"),
    ],
)
def test_a_mistake_is_named_with_its_mask(scaling, mask, about):
    with pytest.raises(ValueError, match=f"^scaling: under the mask '{mask}', {about}"):
        check_scaling(scaling())


def test_what_is_no_scaling_is_refused():
    with pytest.raises(TypeError, match=r"got the class Counts; write Counts\(\)"):
        check_scaling(Counts)
    with pytest.raises(TypeError, match=r"scaling: expected a name or a Scaling, got float 0\.5"):
        check_scaling(0.5)
    with pytest.raises(ValueError, match="did you mean 'key_count'"):
        check_scaling("key_coumt")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_compared_where_none_are_recorded(mode):
    scaling = HalfAGradient()
    with mode(), pytest.raises(ValueError, match="towards power differs"):
        check_scaling(scaling)


@pytest.mark.parametrize(
    ("sizes", "error", "about"),
    [
        ({"heads": 0}, ValueError, "heads: expected at least 1, got 0"),
        ({"heads": 2.0}, TypeError, r"heads: expected an int, got float 2\.0"),
        ({"kv_heads": 0}, ValueError, "kv_heads: expected at least 1, got 0"),
        ({"heads": 3, "kv_heads": 2}, ValueError, "kv_heads: expected a number that divides heads = 3, got 2"),
        ({"head_dim": 0}, ValueError, "head_dim: expected at least 1, got 0"),
    ],
)
def test_sizes_of_no_call_are_refused(sizes, error, about):
    with pytest.raises(error, match=f"^{about}"):
        check_scaling(Counts(), **sizes)


def test_sizes_are_as_asked_and_the_generator_stays():
    seen = set()

    class Watched(Counts):
        def scales(self, q, k, visibility, statistics):
            seen.add((q.shape[1], k.shape[1], q.shape[3]))
            return super().scales(q, k, visibility, statistics)

    before = torch.get_rng_state()
    check_scaling(Watched(), heads=6, kv_heads=3, head_dim=5)
    assert seen == {(6, 3, 5)}
    assert torch.equal(torch.get_rng_state(), before)
