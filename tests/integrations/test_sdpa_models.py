"""`replace_sdpa` on models of other libraries: a learned scaling starts where they were, a fixed one is a context's."""

import pytest
import torch

from tests.support.llama import ids, llama
from tests.support.refusals import refuses
from tritonattn.integrations.sdpa import replace_sdpa, scaled_sdpa

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
STAGES = {"img_size": 32, "embed_dim": 12, "depths": (2,), "num_heads": (3,), "window_size": 4, "num_classes": 5}


def of_timm(name, sizes):
    library = pytest.importorskip("timm", reason="pip install 'tritonattn[integrations]'")
    return library.create_model(name, **sizes), {"x": IMAGES}


def of_diffusers(name, options, inputs):
    library = pytest.importorskip("diffusers", reason="pip install 'tritonattn[integrations]'")
    return getattr(library, name)(**options), inputs


def of_transformers(name, options, inputs):
    library = pytest.importorskip("transformers", reason="pip install 'tritonattn[hf]'")
    config = getattr(library, f"{name}Config")(**options, attn_implementation="sdpa")
    return getattr(library, f"{name}Model")(config), inputs


UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2}
WAV2VEC2 = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
# A model, its inputs, and how many layers of how many heads are found.
MODELS = {
    "timm's ViT": (lambda: of_timm("vit_tiny_patch16_224", SIZES), 2, 3),
    "timm's BEiT": (lambda: of_timm("beit_base_patch16_224", {**SIZES, "init_values": None}), 2, 3),
    "timm's Swin": (lambda: of_timm("swin_tiny_patch4_window7_224", STAGES), 2, 3),
    "a UNet of diffusers": (
        lambda: of_diffusers(
            "UNet2DConditionModel",
            UNET,
            {"sample": LATENTS, "timestep": torch.tensor(3), "encoder_hidden_states": LATENTS.view(2, 16, 16)},
        ),
        8,
        4,
    ),
    "a DiT of diffusers": (
        lambda: of_diffusers(
            "DiTTransformer2DModel",
            {**DIT, "sample_size": 8, "patch_size": 2, "norm_num_groups": 4},
            {"hidden_states": LATENTS, "timestep": torch.tensor([3, 4]), "class_labels": torch.tensor([1, 2])},
        ),
        2,
        2,
    ),
    "Wav2Vec2 of transformers": (
        lambda: of_transformers("Wav2Vec2", WAV2VEC2, {"input_values": IMAGES[:, 0].flatten(1)[:, :400]}),
        2,
        4,
    ),
}


def result(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_a_library(name):
    made, count, heads = MODELS[name]
    torch.manual_seed(0)
    model, inputs = made()
    model = model.eval().double()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # of a size that makes the softmax matter
                parameter.normal_(0, 0.3)
        if "Swin" in name:
            own = "ValueError: ~ got SwinTransformer, in which a softmax is formed by layers.0.blocks.0.attn.softmax"
            refuses(own, replace_sdpa, model, "ssmax", None, inputs)
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = True
        before, keys = result(model, inputs), set(model.state_dict())
        with replace_sdpa(model, "ssmax", example=inputs) as replaced:
            torch.testing.assert_close(result(model, inputs), before)
            added = set(model.state_dict()) - keys
            assert len(replaced.names) == count
            assert added == {f"{layer}.logit_scaling.{x}" for layer in replaced.names for x in ("s", "b")}
            assert {tuple(model.get_parameter(one).shape) for one in added} == {(heads,)}
        assert set(model.state_dict()) == keys
        assert torch.equal(result(model, inputs), before)
        with scaled_sdpa("log_key_count:4"):
            expected = result(model, inputs)
        assert (expected - before).abs().max() > 1e-5 * before.abs().max()
        with replace_sdpa(model, "log_key_count:4"):
            torch.testing.assert_close((result(model, inputs), result(model, inputs)), (expected, expected))


def test_a_model_of_transformers_generates_as_patched():
    """With padding on the left, and a cache: n counts the keys of a row in both."""
    huggingface = pytest.importorskip("tritonattn.huggingface", reason="pip install 'tritonattn[hf]'")
    model, tokens = llama("sdpa").eval().double(), ids(length=6)
    given = {"attention_mask": (torch.arange(6) >= torch.tensor([[2], [0]])).long(), "max_new_tokens": 8}
    asked = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    plain = model.generate(tokens, **given, **asked).logits
    with huggingface.patch(model, "log_key_count:3"):
        expected = model.generate(tokens, **given, **asked).logits
    with replace_sdpa(model, "log_key_count:3", example=tokens):
        found = model.generate(tokens, **given, **asked).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[-1], plain[-1], atol=1e-3)
