"""`diagnose` against dense means over the rows and keys that count."""

from dataclasses import fields

import pytest
import torch

from tests.support.masks import MASKS, visible_pairs
from tests.support.rows import HQ, B, dense, tensors
from tritonattn.analysis import Diagnosis, diagnose

BY_GAPS = ("count_power", "count_power_error")  # tests/analysis/test_gaps.py


def expected(q, k, scaling="sqrt_dim", gain=None, **masks):
    rows = dense(q, k, scaling, gain, **masks)
    visible = visible_pairs((*q.shape[:3], k.shape[2]), **masks)
    group = q.shape[1] // k.shape[1]
    seen = visible.unflatten(1, (k.shape[1], group)).any(2).any(2)  # [B, Hkv, Sk]
    lengths = k.double().norm(dim=-1)
    found: dict[str, list] = {field.name: [] for field in fields(Diagnosis) if field.name not in BY_GAPS}
    for head in range(q.shape[1]):
        row = {name: value[:, head] for name, value in rows.items()}
        sees, several = row["key_count"] > 0, row["key_count"] > 1
        relative = row["entropy"][several] / row["key_count"][several].log()
        counts, norms = row["key_count"][sees], lengths[:, head // group][seen[:, head // group]]
        for name in ("logit_std", "max_probability", "jacobian_norm", "gradient_norm"):
            found[name].append(row[name][sees].mean())
        found["max_logit"].append(row["max_logit"][sees].max() if sees.any() else torch.tensor(-torch.inf).double())
        found["relative_entropy"].append(relative.mean())
        found["near_one_hot"].append((row["max_probability"][sees] > 0.95).double().mean())
        found["near_uniform"].append((relative > 0.98).double().mean())
        for name, x in (("key_count", counts), ("key_norm", norms)):
            found[f"{name}_mean"].append(x.mean())
            found[f"{name}_variation"].append(x.std(correction=0) / x.mean())
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("scaling", "gain"), [("sqrt_dim", 3.0), ("key_norm_sum", None)])
def test_every_mask(mask, scaling, gain):
    q, k = tensors()
    masks = MASKS[mask](B, HQ, 6, 9)
    ours, exact = diagnose(q, k, scaling=scaling, gain=gain, **masks), expected(q, k, scaling, gain, **masks)
    for name, value in exact.items():
        assert getattr(ours, name).shape == (HQ,)
        torch.testing.assert_close(getattr(ours, name), value, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_padding_counts_nowhere():
    """Padded keys are far longer than the rest, and would change every figure."""
    q, k = tensors()
    lengths = torch.tensor([0, 5])
    k[0], k[1, :, 5:] = 1e3, torch.nan
    ours, alone = diagnose(q, k, key_lengths=lengths), diagnose(q[1:], k[1:, :, :5])
    for field in fields(Diagnosis):
        values = getattr(ours, field.name), getattr(alone, field.name)
        torch.testing.assert_close(*values, rtol=1e-12, atol=0, equal_nan=field.name in BY_GAPS)
    assert (ours.key_count_mean == 5).all()
    assert (ours.key_count_variation == 0).all()
