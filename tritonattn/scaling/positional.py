"""The position-dependent temperatures of released models, as presets.

The models count by the position of the query; here n, the number of keys visible to the row, stands for
position + 1. Under full causal attention (padding and packing included) that is the model's value. Where
a window or a chunk hides older keys, n stops growing at its width and so does the factor, whereas the models
go on with the position.

Each model multiplies q by a factor and divides by sqrt(D); both are in the factor here, which acts in fp32
and is never rounded to the dtype of q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.hints import hinted
from ..core.invariance import power
from ..core.statistics import Statistics, reciprocal
from ..core.visibility import Visibility
from .base import Scales, dense_norms, mode
from .counts import OfCount


@mode(
    "qwen_logn",
    "max(1, ln(n)/ln(L))/sqrt(D)",
    source="Qwen's code",
    advice="L = training length",
    example={"train_length": 3},
)
@hinted
@dataclass(frozen=True)
class QwenLogn(OfCount):
    """factor = max(1, ln(n) / ln(train_length)) / sqrt(D).

    train_length   `seq_length` of the model's configuration: 8192 for Qwen-7B, 2048 for Qwen-14B

    Source: `logn_tensor` in QWenAttention, https://huggingface.co/Qwen/Qwen-7B/blob/main/modeling_qwen.py:
    entry i - 1 is log_base(i) for i > seq_length, else 1, and the query at position p takes entry p. The
    model applies it in inference only.
    Raises ValueError unless train_length is finite and above 1.
    """

    train_length: float = 8192

    trained_length = "train_length"

    def _of_count(self, n: Tensor) -> Tensor:
        return n.clamp(min=self.train_length).log() / math.log(self.train_length)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        n = visible.sum(-1, keepdim=True).double()
        logarithm = n.log2() / math.log2(self.train_length)
        return torch.where(n > self.train_length, logarithm, 1) / math.sqrt(k.shape[-1])


@mode(
    "grok2",
    "max(1, ln(n-1)/ln(L))/sqrt(D)",
    source="SGLang's code of Grok 2",
    example={"train_length": 3},
    config={"train_length": "attn_temperature_len"},
)
@hinted
@dataclass(frozen=True)
class Grok2(QwenLogn):
    """factor = max(1, ln(n - 1) / ln(train_length)) / sqrt(D).

    Like `QwenLogn` but for the offset: it counts from the position, n - 1.

    train_length    `attn_temperature_len` of the model's configuration, 1024
    after_softcap   False: a softcap c of `attention` acts after the factor, as with every mode. True: before it, as the
                    model caps its logits at 30: logit = max(1, ...) * c tanh(q . k / sqrt(D) / c)

    Source: SGLang 0.5.23, srt/layers/attention/triton_ops/decode_attention.py, xai_temperature_len: log2(position) /
    log2(length) where the position exceeds the length, else 1.
    Raises ValueError unless train_length is finite and above 1.
    """

    train_length: float = 1024
    after_softcap: bool = field(default=False, kw_only=True)

    def _of_count(self, n: Tensor) -> Tensor:
        return super()._of_count(n - 1)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        position = visible.sum(-1, keepdim=True).double() - 1
        is_beyond = position > self.train_length
        excess = torch.where(is_beyond, position, self.train_length).log2() / math.log2(self.train_length)
        return excess / math.sqrt(k.shape[-1])


@mode(
    "llama4",
    "(1 + 0.1 ln(floor(n/8192) + 1))/sqrt(D)",
    source="Llama 4's code",
    example={"scale": 0.5, "floor_scale": 2},
    config={"scale": "attn_scale", "floor_scale": "floor_scale"},
    models=("llama4_text",),
)
@hinted
@dataclass(frozen=True)
class Llama4(OfCount):
    """factor = (1 + scale * ln(1 + floor(n / floor_scale))) / sqrt(D).

    scale, floor_scale   `attn_scale` and `floor_scale` of the model's configuration

    Source: Llama4TextAttention.forward in transformers/models/llama4/modeling_llama4.py (transformers 5.24):
    log1p(floor((position + 1) / floor_scale)) * attn_scale + 1, in layers without rotary embedding only.
    There the position counts padding too; here padding is not counted.
    Raises ValueError unless both are finite and above 0.
    """

    scale: float = 0.1
    floor_scale: float = 8192

    def _of_count(self, n: Tensor) -> Tensor:
        return 1 + self.scale * (1 + (n / self.floor_scale).floor()).log()

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        position = visible.sum(-1, keepdim=True).double() - 1
        temperature = torch.log1p(torch.floor((position + 1.0) / self.floor_scale)) * self.scale + 1.0
        return temperature / math.sqrt(k.shape[-1])


@mode(
    "ministral3",
    "(1 + 0.1 ln(1 + floor((n-1)/16384)))/sqrt(D)",
    source="Ministral 3's code",
    example={"beta": 0.5, "original_length": 2},
    config={
        "beta": "rope_parameters.llama_4_scaling_beta",
        "original_length": "rope_parameters.original_max_position_embeddings",
    },
    models=("ministral3", "mistral4"),
)
@hinted
@dataclass(frozen=True)
class Ministral3(OfCount):
    """factor = (1 + beta * ln(1 + floor((n - 1) / original_length))) / sqrt(D).

    Like `Llama4` but for the offset: it counts from the position, not from the position + 1.

    beta, original_length   `llama_4_scaling_beta` and `original_max_position_embeddings` of the model's
                            rope_parameters

    Source: get_llama_4_attn_scale in transformers/models/ministral3/modeling_ministral3.py (transformers
    5.24): 1 + beta * log(1 + floor(position_ids / original_max_position_embeddings)).
    Raises ValueError unless both are finite and above 0.
    """

    beta: float = 0.1
    original_length: float = 16384

    def _of_count(self, n: Tensor) -> Tensor:
        return 1 + self.beta * (1 + ((n - 1).clamp(min=0) / self.original_length).floor()).log()

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        position = visible.sum(-1, keepdim=True).double() - 1
        steps = torch.floor(torch.where(position < 0, 0, position) / self.original_length)
        return (1 + self.beta * torch.log1p(steps)) / math.sqrt(k.shape[-1])


@mode(
    "inkling",
    "(1 + 0.1 ln(max(n/128000, 1)))/sqrt(D)",
    source="Inkling's code",
    example={"alpha": 0.5, "n_floor": 2},
    config={"alpha": "log_scaling_alpha", "n_floor": "log_scaling_n_floor"},
    models=("inkling_text", "inkling2_text", "inkling2_loop_text"),
)
@hinted
@dataclass(frozen=True)
class Inkling(OfCount):
    """factor = (1 + alpha * ln(max(n / n_floor, 1))) / sqrt(D).

    The model normalises q and k and divides by D, not by sqrt(D): give gain=D**-0.5 for its logits.

    alpha, n_floor   `log_scaling_alpha` and `log_scaling_n_floor` of the model's configuration

    Source: InklingAttention.forward in transformers/models/inkling/modeling_inkling.py (transformers 5.24):
    1 + alpha * log(max((position + 1) / n_floor, 1)), in layers without a window only. The model multiplies its
    bias of relative positions by it, too. There the position counts padding; here padding is not counted.
    Raises ValueError unless both are finite and above 0.
    """

    alpha: float = 0.1
    n_floor: float = 128000

    def _of_count(self, n: Tensor) -> Tensor:
        return 1 + self.alpha * (n / self.n_floor).clamp(min=1).log()

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        n = visible.sum(-1, keepdim=True).double()
        excess = torch.where(n > self.n_floor, n, self.n_floor).log2() - math.log2(self.n_floor)
        return (1 + self.alpha * math.log(2) * excess) / math.sqrt(k.shape[-1])


@mode(
    "inkling2",
    "min(1, T/‖q‖) min(1, T/‖k‖) (1 + 0.1 ln(max(n/128000, 1)))/sqrt(D)",
    {"T": "sqrt(512)"},
    source="Inkling 2's code",
    advice="bounds logits and leaves short q and k alone",
    example={"alpha": 0.5, "n_floor": 2, "threshold": 2.0},
    config={**Inkling.about.config, "threshold": "qk_l2_clip_threshold"},
    models=("inkling2_text", "inkling2_loop_text"),
)
@hinted
@dataclass(frozen=True)
class Inkling2(Inkling):
    """factor = min(1, threshold / ||q||) * min(1, threshold / ||k||) * (the factor of `Inkling`).

    Vectors longer than the threshold are cut to it, so that no logit exceeds threshold^2 times the factor of
    `Inkling`; shorter ones stay.

    threshold        `qk_l2_clip_threshold` of the model's configuration, sqrt(512)
    alpha, n_floor   as in `Inkling`. n stays below n_floor in layers with a window, which have the clip alone, as in
                     the model.

    Source: Inkling2L2Clip and Inkling2LogScale in transformers/models/inkling2/modeling_inkling2.py (transformers
    5.24). The model adds 1e-6 to the norms, and multiplies q by a learned vector [Hq, D] before the clip.
    Raises ValueError unless all are finite and above 0.
    """

    threshold: float = 512**0.5

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        rows = super().scales(q, k, visibility, statistics)
        query, key = (
            self.threshold / x.clamp(min=self.threshold) for x in (statistics.query_norms(q), statistics.norms)
        )
        return Scales(rows.constant, query=query if rows.query is None else rows.query * query, key=key, is_finite=True)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        def clip(norms: Tensor) -> Tensor:
            return torch.where(norms > self.threshold, self.threshold * reciprocal(norms), 1)

        clip_of_q = clip(dense_norms(q, visible.any(-1)))[..., None]  # [B, Hq, Sq, 1]
        clip_of_k = clip(dense_norms(k, visible.any(-2)))[..., None, :]  # [B, Hq, 1, Sk]
        return super().multiplier(q, k, visible) * clip_of_q * clip_of_k


@mode(
    "beam",
    "(1 + n/2048)^0.1/sqrt(D)",
    source="Beam's code",
    example={"power": 0.5, "length": 2},
    models=("beam",),
)
@hinted
@dataclass(frozen=True)
class Beam(OfCount):
    """factor = (1 + n / length)^power / sqrt(D).

    power, length   constants of the model's code

    Source: compute_attention_scaling in transformers/models/beam/modeling_beam.py (transformers 5.24):
    (1 + (position + 1) / 2048)^0.1, in layers without rotary embedding only.
    Raises ValueError unless both are finite and above 0.
    """

    power: float = 0.1
    length: float = 2048

    def _of_count(self, n: Tensor) -> Tensor:
        return power(1 + n / self.length, self.power)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        position = visible.sum(-1, keepdim=True).double() - 1
        return torch.exp(self.power * torch.log1p((position + 1) / self.length)) / math.sqrt(k.shape[-1])
