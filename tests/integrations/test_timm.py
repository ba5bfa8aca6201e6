"""timm's attention with a scaling, inside timm's models."""

import copy

import pytest
import torch

timm = pytest.importorskip("timm", reason="pip install 'tritonattn[integrations]'")

from timm.layers.attention import Attention

from tests.support.layers import with_gradients
from tests.support.refusals import refuses
from tritonattn.integrations import timm as ours

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def model(**arguments):
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", **SMALL, **arguments).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "qkv" in name:  # logits of a size that makes the softmax matter
                parameter.mul_(8)
    return made.eval()


def images():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_sqrt_dim_is_timms_model():
    theirs, made = model(), model(attn_layer=ours.attention_layer())
    made.load_state_dict(theirs.state_dict(), strict=True)
    assert [type(m).__name__ for m in made.modules() if isinstance(m, Attention)] == ["ScaledAttention"] * 2
    torch.testing.assert_close(*(with_gradients(x, images()) for x in (made, theirs)), rtol=1e-8, atol=1e-9)


def test_layers_and_a_replacement_agree():
    plain, made = model(), model(attn_layer=ours.attention_layer("log_key_count:4"))
    for layer in plain.modules():
        if isinstance(layer, Attention):
            layer.fused_attn = False
    with ours.replace_attention(plain, "log_key_count:4") as replaced:
        assert len(replaced.names) == 2
        torch.testing.assert_close(plain(images()), made(images()))
    assert (plain(images()) - made(images())).abs().max() > 1e-4


STAGES = {"img_size": 32, "embed_dim": 12, "depths": (2,), "num_heads": (3,), "window_size": 4, "num_classes": 5}
BIASED = {
    "vit_relpos_base_patch16_224": {"rel_pos_type": "bias", "init_values": None, **SMALL},
    "beit_base_patch16_224": {"init_values": None, **SMALL},
    "swin_tiny_patch4_window7_224": STAGES,
}


@pytest.mark.parametrize(("name", "sizes"), BIASED.items(), ids=BIASED)
def test_a_model_with_a_bias_of_pairs_keeps_it(name, sizes):
    """Tables of relative positions, and the masks of shifted windows."""
    torch.manual_seed(0)
    made = timm.create_model(name, **sizes).double().eval()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "bias_table" in key:
                parameter.normal_()
            elif parameter.dim() == 2:  # of a size that makes the softmax matter
                parameter.normal_(0, 0.3)
    before, plain = set(made.state_dict()), copy.deepcopy(made)
    wanted, gradients = with_gradients(made, images())
    with ours.replace_attention(made) as replaced:
        assert len(replaced.names) == 2
        torch.testing.assert_close(with_gradients(made, images()), (wanted, gradients))
    with ours.replace_attention(made, "ssmax"):
        assert set(made.state_dict()) - before == {
            f"{layer}.logit_scaling.{parameter}" for layer in replaced.names for parameter in ("s", "b")
        }
        copied = copy.deepcopy(made)
        with torch.no_grad():
            for key, parameter in copied.named_parameters():
                if "logit_scaling" in key:
                    parameter.mul_(3)
        torch.testing.assert_close(made(images()), wanted)
        assert (copied(images()) - wanted).abs().max() > 1e-6
    assert set(made.state_dict()) == before
    assert torch.equal(made(images()), plain(images()))


def test_refusals():
    layer, x = ours.attention_layer()(16, 4), torch.randn(2, 6, 16)
    with pytest.raises(ValueError, match="attn_mask: expected None with is_causal=True"):
        layer(x, attn_mask=torch.ones(6, 6).bool(), is_causal=True)
    refuses("ValueError: scaling: expected one of", ours.attention_layer, "squirt_dim")
    refuses("ValueError: model: expected one with attention layers of timm", ours.replace_attention, torch.nn.ReLU())
