"""A tiny Llama of transformers trains and generates with the kernels behind its attention."""

import pytest
import torch

pytest.importorskip("transformers")

from tests.huggingface.architectures import ARCHITECTURES
from tests.kernels.conftest import DEVICE
from tritonattn.huggingface import patch

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings(
        "ignore::UserWarning",
        "ignore::FutureWarning",
        "ignore:overflow encountered in exp2:RuntimeWarning",  # of pairs that are masked afterwards
    ),
]


def model():
    return ARCHITECTURES["llama"].build("sdpa").to(DEVICE)


def inputs(padding: str) -> dict[str, torch.Tensor]:
    return {name: x.to(DEVICE) for name, x in ARCHITECTURES["llama"].inputs(padding).items()}


def train(network, batch: dict[str, torch.Tensor], steps: int = 2) -> tuple[list[float], torch.Tensor]:
    """Losses, and the last gradient of all parameters."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = network(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([x.grad.flatten() for x in network.parameters() if x.grad is not None])


def test_it_trains_as_with_pytorchs_attention():
    found = []
    for backend in ("triton", "sdpa"):
        network = model()
        with patch(network, scaling="key_norm_mean", backend=backend):
            found.append(train(network, inputs("left")))
    (losses, gradient), (wanted, expected) = found
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert (gradient - expected).norm() <= 1e-3 * expected.norm()
