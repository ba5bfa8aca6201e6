"""Key ranges equal transformers' dense masks, of all functions and of models."""

import inspect

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask, sliding_window_overlay

from tests.huggingface.architectures import ARCHITECTURES
from tritonattn.huggingface import attention_forward, first_use, key_range_mask, patch, register

BATCH = 3
PADDINGS = {"none": None, "all visible": (0, 0), "left": (3, 0), "right": (0, 4), "both": (2, 3)}
POSITIONAL = "cache_position" in inspect.signature(sdpa_mask).parameters  # transformers before 5.1
CHUNKS_FOLLOW_PADDING = "left_padding" in inspect.signature(masking_utils.chunked_overlay).parameters


@pytest.fixture(autouse=True)
def _a_model_was_built(monkeypatch):
    """Before the first one all masks are explicit."""
    monkeypatch.setattr(first_use, "_waiting", [])


def documents(length: int) -> torch.Tensor:
    starts = torch.tensor([[4, 5, 9 + b] for b in range(BATCH)])
    return (torch.arange(length) >= starts[..., None]).sum(1, dtype=torch.int32)


def mask_functions(length: int, square: bool) -> dict:
    starts = {"left_padding": torch.tensor([0, 2, 3])} if CHUNKS_FOLLOW_PADDING else {}
    window, chunk = sliding_window_overlay(4), masking_utils.chunked_overlay(5, **starts)
    functions = {
        "causal": causal_mask_function,
        "window": and_masks(window, causal_mask_function),
        "nested": and_masks(and_masks(window, causal_mask_function), chunk),
        "chunk": and_masks(chunk, causal_mask_function),
    }
    if square:
        packed = masking_utils.packed_sequence_mask_function(documents(length))
        functions["packed"] = and_masks(causal_mask_function, packed)
        functions["packed window"] = and_masks(functions["window"], packed)
        functions["window alone"] = window
    if hasattr(masking_utils, "bidirectional_mask_function"):
        functions["bidirectional"] = masking_utils.bidirectional_mask_function
    if hasattr(masking_utils, "sliding_window_bidirectional_mask_function"):
        functions["bidirectional window"] = masking_utils.sliding_window_bidirectional_mask_function(3)
    if square and hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        ids = documents(length)
        restart = torch.arange(length) - torch.searchsorted(ids, ids)
        for name in ("causal", "window", "chunk"):
            remapped = masking_utils.remap_positions_for_packed_sequence(functions[name], restart)
            functions[f"remapped {name}"] = and_masks(remapped, packed)
            functions[f"remapped {name} alone"] = remapped
            functions[f"remapped {name} and a window alone"] = and_masks(remapped, window)
    return functions


def arguments(q_length: int, kv_length: int, q_offset=0, kv_offset: int = 0, padding=None, **rest) -> dict:
    if padding is not None:
        left, right = padding
        visible = torch.ones(BATCH, kv_offset + kv_length, dtype=torch.bool)
        visible[1:, kv_offset : kv_offset + left] = False
        visible[2:, visible.shape[1] - right :] = False
        padding = visible
    where = {"q_length": q_length, "q_offset": q_offset, "device": torch.device("cpu")}
    if POSITIONAL:
        where = {"cache_position": torch.arange(q_length) + q_offset}
    return {
        "batch_size": BATCH,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "attention_mask": padding,
        "allow_is_causal_skip": False,
        **where,
        **rest,
    }


def dense(mask: torch.Tensor, kv_length: int) -> torch.Tensor:
    key = torch.arange(kv_length)
    return (key >= mask[..., :1]) & (key < mask[..., 1:])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset"),
    [(13, 13, 0, 0), (1, 13, 12, 0), (4, 16, 9, 0), (5, 9, 12, 8), (1, 13, torch.tensor(6), 0)],
    ids=["square", "decode", "static prefill", "sliding cache", "static decode"],
)
def test_ranges_equal_the_dense_mask(q_length, kv_length, q_offset, kv_offset, padding):
    functions = mask_functions(kv_length, square=q_length == kv_length)
    for name, function in functions.items():
        asked = arguments(q_length, kv_length, q_offset, kv_offset, PADDINGS[padding], mask_function=function)
        expected = sdpa_mask(**asked)
        ranges = key_range_mask(**asked)
        if name.startswith("remapped") and name.endswith("alone"):
            assert ranges.dtype == torch.bool, name
            assert torch.equal(ranges, expected), name
            continue
        assert ranges.dtype == torch.int32, name
        assert ranges.shape == (BATCH, 1, q_length, 2), name
        assert torch.equal(dense(ranges, kv_length), expected.expand(BATCH, 1, -1, -1)), name


@pytest.mark.parametrize("case", ["holes", "or", "unknown", "vmap"])
def test_masks_that_are_no_range_become_dense(case):
    asked = arguments(9, 9, mask_function=causal_mask_function)
    if case == "holes":
        asked["attention_mask"] = torch.ones(BATCH, 9, dtype=torch.bool)
        asked["attention_mask"][1, 4] = False
    if case == "or":
        asked["mask_function"] = masking_utils.or_masks(causal_mask_function, sliding_window_overlay(2))
    if case == "unknown":
        asked["mask_function"] = lambda batch, head, query, key: (key <= query) & (key % 2 == 0)
    if case == "vmap":
        asked["use_vmap"] = True
    mask = key_range_mask(**asked)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, sdpa_mask(**asked))


def windowed(size: int) -> dict:
    function = and_masks(sliding_window_overlay(size), causal_mask_function)
    return arguments(9, 9, mask_function=function, local_size=size)


@pytest.mark.parametrize(
    ("asked", "skipped"),
    [
        (arguments(9, 9), True),
        (arguments(9, 9, padding=(0, 0)), True),
        (arguments(9, 9, padding=(2, 0)), False),
        (arguments(4, 9), False),
        (windowed(9), True),
        (windowed(8), False),
    ],
    ids=["causal", "unpadded", "padded", "top left", "wide window", "narrow window"],
)
def test_no_mask_where_the_causal_flag_says_it(asked, skipped):
    assert (key_range_mask(**{**asked, "allow_is_causal_skip": True}) is None) == skipped
    assert key_range_mask(**asked) is not None


def test_compiled_ranges_and_the_assertion_on_holes():
    @torch.compile(fullgraph=True, backend="eager")
    def ranges(padding):
        return key_range_mask(**{**arguments(9, 9), "attention_mask": padding})

    padding = torch.ones(BATCH, 9, dtype=torch.bool)
    padding[1, :3] = False
    mask = ranges(padding)
    assert mask.dtype == torch.int32
    assert torch.equal(mask, key_range_mask(**{**arguments(9, 9), "attention_mask": padding}))
    padding[1, 1] = True
    with pytest.raises(RuntimeError, match="masked keys between visible ones"):
        ranges(padding)


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
            mask = dense(mask, asked["kv_length"])
        assert torch.equal(mask.expand_as(wanted), wanted)
        return key_range_mask(**asked)


@pytest.fixture
def spy():
    one = Spy()
    register("tritonattn", attention_forward, one)
    yield one
    register()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
def test_masks_of_packed_documents(name, spy):
    network, ids = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()["input_ids"][:1]
    position = torch.tensor([[*range(6), *range(7)]])
    with patch(network), torch.no_grad():
        packed = network(input_ids=ids, position_ids=position, use_cache=False).logits
        assert set(spy.dtypes) == {torch.int32}
        parts = [network(input_ids=part, use_cache=False).logits for part in ids.split([6, 7], dim=1)]
    if name in ("llama", "mistral", "gemma3"):  # Llama 4's chunks and temperatures follow the position in the batch
        torch.testing.assert_close(packed, torch.cat(parts, dim=1), atol=1e-3, rtol=1e-3)
