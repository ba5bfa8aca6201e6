"""The masks that models make for their layers and caches are ranges, equal to transformers' own."""

import pytest
import torch
from transformers import masking_utils

from tests.huggingface.architectures import ARCHITECTURES
from tritonattn.huggingface import attention_forward, key_range_mask, patch, register

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Spy:
    """A mask function that compares every mask with transformers' dense one, and keeps its dtype."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype | None] = []

    def __call__(self, **asked):
        mask = key_range_mask(**asked)
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        wanted = masking_utils.sdpa_mask(**{**asked, **skips})
        self.dtypes.append(None if mask is None else mask.dtype)
        if mask is None:
            mask = key_range_mask(**{**asked, **skips})
        if mask.dtype == torch.int32:
            key = torch.arange(asked["kv_length"])
            mask = (key >= mask[..., :1]) & (key < mask[..., 1:])
        assert torch.equal(mask.expand_as(wanted), wanted)
        return key_range_mask(**asked)


@pytest.fixture
def spy():
    one = Spy()
    register("tritonattn", attention_forward, one)
    yield one
    register()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
def test_masks_of_packed_documents(name, spy):
    network, ids = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()["input_ids"][:1]
    position = torch.tensor([[*range(6), *range(7)]])
    with patch(network), torch.no_grad():
        packed = network(input_ids=ids, position_ids=position, use_cache=False).logits
        assert set(spy.dtypes) == {torch.int32}
        parts = [network(input_ids=part, use_cache=False).logits for part in ids.split([6, 7], dim=1)]
    if name in ("llama", "mistral", "gemma3"):  # Llama 4's chunks and temperatures follow the place in the batch
        torch.testing.assert_close(packed, torch.cat(parts, dim=1), atol=1e-3, rtol=1e-3)
