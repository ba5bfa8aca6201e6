"""Checks of a patched model, as functions."""

from typing import Any

import torch
import transformers
from torch import Tensor

import tritonattn.huggingface
from tests.huggingface.architectures import PADDINGS, Architecture

PAD = 3


def gradients(network: Any, architecture: Architecture, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter's gradient of a random projection of the outputs."""
    network.zero_grad()
    out = architecture.outputs(network, inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).mean().backward()
    return {name: x.grad.clone() for name, x in network.named_parameters() if x.grad is not None}


def equals_eager(architecture: Architecture, padding: str) -> None:
    """Outputs and gradients of the model patched with sqrt_dim are those of its own eager attention."""
    network, inputs = architecture.build(), architecture.inputs(padding)
    with torch.no_grad():
        wanted = architecture.outputs(network, inputs)
    expected = gradients(network, architecture, inputs)
    with tritonattn.huggingface.patch(network, scaling="sqrt_dim"):
        with torch.no_grad():
            got = architecture.outputs(network, inputs)
        found = gradients(network, architecture, inputs)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert found.keys() == expected.keys()
    largest = max(x.norm() for x in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-6 * largest, (name, float(error), float(gradient.norm()))


def padding_changes_nothing(architecture: Architecture, scaling: str) -> None:
    """Padded rows of a batch give their results alone, in a prefill and in the steps after it."""
    network, inputs = architecture.build(), architecture.inputs("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert PADDINGS["left"][0][:PAD] == [0] * PAD
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with tritonattn.huggingface.patch(network, scaling=scaling), torch.no_grad():
        alone = network(input_ids=ids[:1, PAD:]).logits
        together = network(input_ids=ids, attention_mask=mask, position_ids=position).logits[:1, PAD:]
        steps = stepwise(network, ids, mask, position)[:1, PAD:]
    for got in (together, steps):
        assert (got - alone).abs().max() <= 1e-4 * alone.abs().max(), scaling


def stepwise(network: Any, ids: Tensor, mask: Tensor, position: Tensor, first: int = 6, cache: Any = None) -> Tensor:
    """Logits [B, S, V] of a prefill of `first` tokens and of single steps after it."""
    out = network(
        input_ids=ids[:, :first],
        attention_mask=mask[:, :first],
        position_ids=position[:, :first],
        use_cache=True,
        past_key_values=cache,
    )
    logits, cache = [out.logits], out.past_key_values
    for step in range(first, ids.shape[1]):
        here = slice(step, step + 1)
        out = network(
            input_ids=ids[:, here],
            attention_mask=mask[:, : step + 1],
            position_ids=position[:, here],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def static_cache(network: Any, length: int, batch: int = 2) -> Any:
    more = {"max_batch_size": batch} if transformers.__version__.startswith("4.") else {}
    return transformers.StaticCache(config=network.config, max_cache_len=length, **more)
