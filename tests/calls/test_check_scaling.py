"""`check_scaling`: right scalings pass, and each mistake is named with its mask."""

import pytest
import torch

from tests.support.learned import small
from tests.support.pairs import pairwise
from tests.support.refusals import refuses
from tritonattn import SCALINGS, Scales, Scaling, check_scaling

MASKS = {"full", "causal", "causal, last rows", "window", "padding", "padding on the left", "dense", "packed"}
MASKS |= {"ranges, rows without keys"}


@pairwise(mode=SCALINGS, kv_heads=[1, 2, 4])
def test_every_mode_passes(mode, kv_heads):
    found = check_scaling(small(mode), heads=4, kv_heads=kv_heads)
    assert set(found) == MASKS
    assert max(found.values()) < 1e-12


class Counts(Scaling):
    """1 / n, right."""

    name = "counts"

    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, query=1 / visibility.counts().clamp(min=1))

    def multiplier(self, q, k, visible):
        return 1 / visible.sum(-1, keepdim=True).clamp(min=1)


class Made(Counts):
    """Made of functions of (k, visibility, statistics) and of (k, visible): query scale, key scale, multiplier."""

    def __init__(self, query=None, key=None, multiplier=None, reads_keys=True) -> None:
        self.query, self.key, self.reads_keys = query, key, reads_keys
        if multiplier is not None:
            self.multiplier = lambda q, k, visible: multiplier(k, visible)

    def scales(self, q, k, visibility, statistics):
        made = (make and make(k, visibility, statistics) for make in (self.query, self.key))
        return Scales(1.0, *made)


class HalfAGradient(torch.nn.Module, Counts):
    def __init__(self):
        super().__init__()
        self.power = torch.nn.Parameter(torch.ones(4, 1))

    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, query=self.power * self.power.detach() / visibility.counts().clamp(min=1))

    def multiplier(self, q, k, visible):
        return self.power.square()[..., None] / visible.sum(-1, keepdim=True).clamp(min=1)


def one_of_keys(k, *_) -> torch.Tensor:
    return torch.full((k.shape[0], 1, 1), 1 / k.shape[2])


def counted(visibility) -> torch.Tensor:
    return 1 / visibility.counts().clamp(min=1)


def without_sequences(k, visibility, _) -> torch.Tensor:
    rows = torch.arange(1, visibility.q_len + 1).double()[None, None]
    return counted(visibility) if visibility.sequences is None else 1 / rows


def summed(k, visible) -> torch.Tensor:
    return 1 / torch.where(visible, k.norm(dim=-1)[:, :, None], 0).sum(-1, keepdim=True).clamp(min=1e-6)


WRONG_COUNT = Made(lambda k, visibility, _: 1 / (visibility.counts() + 1))
BOTH_LEAK = Made(
    lambda k, *_: k.norm(dim=-1).amax(-1, True), None, lambda k, _: k.norm(dim=-1).amax(-1)[..., None, None]
)
NO_GRADIENT = Made(lambda *x: 1 / x[2].norm_sum.detach().clamp(min=1e-6), None, summed, reads_keys=False)
READS_KEYS = Made(None, lambda k, *_: k.norm(dim=-1), lambda k, _: k.norm(dim=-1)[:, :, None], reads_keys=False)
INFINITE = Made(
    lambda k, visibility, _: 1 / torch.zeros(visibility.counts().shape), None, lambda *_: 1 / torch.zeros(())
)
ONE_HEAD = Made(lambda k, visibility, _: torch.tensor([1.0, 1.0, 1.001, 1.0])[:, None] * counted(visibility))


@pytest.mark.parametrize(
    ("scaling", "mask", "about"),
    [
        (WRONG_COUNT, "full", r"scales\(\) differs from multiplier\(\) .*: expected 0.0833333, got 0.0769231 at"),
        (Made(one_of_keys), "causal", r"scales\(\) differs from multiplier\(\) .*, got 0.0833333 at"),
        (Made(without_sequences), "packed", r"scales\(\) differs from multiplier\(\)"),
        (
            Made(one_of_keys, None, lambda k, _: 1 / k.shape[2]),
            "padding",
            "factors .* change with the number of keys that padding hides: expected 0.2",
        ),
        (BOTH_LEAK, "causal", r"factors .* change with key \d+ in rows that do not attend to it"),
        (NO_GRADIENT, "full", r"the gradient of scales\(\) towards k differs from that of multiplier\(\)"),
        (READS_KEYS, "full", r"scales\(\) looks at k, which reads_keys = False rules out: .* got nan"),
        (INFINITE, "full", ".*expected a finite number, got inf at"),
        (HalfAGradient(), "full", r"the gradient of scales\(\) towards power differs .* difference, 0\.5"),
        (ONE_HEAD, "full", r"scales\(\) differs from multiplier\(\) .* at \[0, 2, .* difference, 0\.001$"),
    ],
)
def test_a_mistake_is_named_with_its_mask(scaling, mask, about):
    with pytest.raises(ValueError, match=f"^scaling: under the mask '{mask}', {about}"):
        check_scaling(scaling)


def test_what_is_no_scaling_is_refused():
    refuses("TypeError: ~ got the class Counts; write Counts()", check_scaling, Counts)
    refuses("TypeError: scaling: expected a name or a Scaling, got float 0.5", check_scaling, 0.5)
    refuses("ValueError: ~ did you mean 'key_count'", check_scaling, "key_coumt")


def test_sizes_are_as_asked_and_the_generator_stays():
    sizes = set()

    class Watched(Counts):
        def scales(self, q, k, visibility, statistics):
            sizes.add((q.shape[1], k.shape[1], q.shape[3]))
            return super().scales(q, k, visibility, statistics)

    before = torch.get_rng_state()
    check_scaling(Watched(), heads=6, kv_heads=3, head_dim=5)
    assert sizes == {(6, 3, 5)}
    assert torch.equal(torch.get_rng_state(), before)
