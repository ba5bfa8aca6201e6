"""The rules of `advise`: conditions on a layer's figures, modes to try, and evidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .fading import half_at, mass

FEW = 2.0  # keys per row in the mean; the softmax of one key is one-hot by itself
LARGE_LOGIT = 100.0  # QK-clip's threshold in Kimi K2
ILL = 0.5  # a layer is ill where more of its rows than this are; SmolLM2-135M's have up to 0.31 one-hot, 0.03 uniform
WELL = 0.25  # a mode fixes a layer where no more of its rows than this stay ill
COUNTS = 0.25  # variation of the rows' number of keys; 0 among sequences of one length, 0.30 for one of 8 and one of 64
FAR = 64  # times the trained length, up to which bounded logits are followed; see docs/training.md
NORMS = 0.5  # variation of the sequences' mean key norms; 0.6 where one has keys four times as long as the other


@dataclass(frozen=True)
class Reading:
    """Figures of a layer's softmax with its present scaling: means over the heads, see `Diagnosis`.

    mode       the present scaling
    max_logit  the largest of any head
    key_norm_between   standard deviation over mean of the sequences' mean key norms; 0 for one sequence
    causal     True where no row attends to keys of later positions
    longest    the largest number of visible keys of a row
    power      p of the factor (ln n)^p that the gaps of the largest logits ask for; None if they do not tell
    context    the length of the model's training in tokens; None if it is not known
    bounded    what bounds the logits: "QK-norm", "cosine", "softcap 50"; "" if nothing does
    windowed   True in a window or chunks: no row attends to all keys that the rows of its sequence do
    window     the most keys of a row in its window; None of other layers, and where that is not said
    base       the largest base of ln n in the scaling; 0 without one
    rotary     True where q and k are turned by positions, False where they have none, None where that is not known
    constant   True where no factor counts or measures keys, in the present scaling or in the model's code
    grows      True where a factor grows with the number of keys, in the present scaling or in the model's code
    untrained  True where the weights of the model's norms are all alike, as before its first step
    gap        of the sharpest head, see `analysis.fading`
    logit_bound   the largest logit that q and k of these norms can have

    >>> import torch
    >>> from tritonattn.analysis import advise
    >>> reading = advise(*torch.randn(2, 1, 4, 64, 32)).findings[0].reading
    >>> reading.mode, reading.longest
    ('sqrt_dim', 64)
    """

    layer: str
    mode: str
    logit_std: float
    max_logit: float
    relative_entropy: float
    near_one_hot: float
    near_uniform: float
    jacobian_norm: float
    gradient_norm: float
    key_count_mean: float
    key_count_variation: float
    key_norm_mean: float
    key_norm_variation: float
    key_norm_between: float
    causal: bool
    longest: int
    context: int | None = None
    power: float | None = None
    bounded: str = ""
    windowed: bool = False
    window: int | None = None
    base: float = 0.0
    rotary: bool | None = None
    constant: bool = True
    grows: bool = False
    untrained: bool = False
    gap: float = math.nan
    logit_bound: float = math.nan

    @property
    def trained(self) -> int:
        """The keys of a row at the trained length; the longest row's where that is not known."""
        return self.longest if self.context is None else self.context

    @property
    def positions_first(self) -> bool:
        """True where rotary positions meet distances beyond the trained ones as soon as inputs are longer."""
        return self.rotary is True and not self.windowed and math.isfinite(self.max_logit)

    @property
    def is_global(self) -> bool:
        """True of causal rows over all keys."""
        return self.causal and not self.windowed

    @property
    def may_take_factor(self) -> bool:
        """True where neither rotary positions nor a factor are seen."""
        return self.rotary is None and self.constant

    @property
    def is_open(self) -> bool:
        """True of causal rows over all keys without positions, whose factor does not grow: they can read on."""
        return self.rotary is False and self.is_global and self.constant

    @property
    def fading(self) -> str:
        """The mass of the sharpest head's largest key at the trained length, and the n at which it is 1/2."""
        return (
            f"{self.bounded} bounds the logits, and the sharpest head of {self.layer} gives its largest key"
            f" {mass(self.gap, self.trained):.2f} at {self.trained:,} keys and 0.50 at {half_at(self.gap):,.0f}, by"
            f" 1 / (1 + (n - 1) e^-{self.gap:.1f})"
        )

    @property
    def counted(self) -> str:
        """The mode whose factor grows with n as the gaps ask, or else as ln n, and is sqrt_dim's for the mean n."""
        count = max(2, round(self.key_count_mean))
        if self.power == 0:
            return "sqrt_dim"
        return f"log_key_count({count})" if self.power in (None, 1.0) else f"log_power({self.power:g}, {count})"

    @property
    def longer(self) -> str:
        """The mode for inputs beyond the trained length: to train with, or to put into trained weights."""
        return f"{'log_key_count' if self.untrained else 'qwen_logn'}({self.trained})"

    @property
    def ill(self) -> float:
        """Share of rows that are one-hot or uniform."""
        return self.near_one_hot + self.near_uniform


def _always(old: Reading, new: Reading) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule of `advise`.

    condition    in words; `applies` is the same in code
    candidates   modes to try on the layer's q and k, the least intrusive first: the first that fixes it is advised;
                 {context} stands for the layer's number, {counted} and {longer} for the modes of `Reading`
    fixes        True where a mode's reading is better, given the old one
    is_harmless  there is nothing to repair up to the trained length
    fades        attention fades as keys are added
    otherwise    the advice if no candidate does
    caveat       said behind the advice
    why, watch, turn_back, evidence   explanations for the reader

    >>> from tritonattn.analysis import RULES
    >>> print(*(rule.name for rule in RULES), sep=", ")
    broken, few keys, peaked, uniform, beyond the context, base beyond the window, varied norms, varied counts, \
without positions, without QK-norm, will fade, positions first, healthy
    """

    name: str
    condition: str
    applies: Callable[[Reading], bool]
    candidates: tuple[str, ...] = ()
    fixes: Callable[[Reading, Reading], bool] = _always
    otherwise: str = ""
    caveat: str = ""
    is_harmless: bool = False
    fades: bool = False
    why: str
    watch: str
    turn_back: str
    evidence: tuple[str, ...]


def _fixes(old: Reading, new: Reading) -> bool:
    return math.isfinite(new.max_logit) and new.max_logit <= LARGE_LOGIT and new.ill <= WELL


def _will_fade(one: Reading) -> bool:
    fades = bool(one.bounded) and one.may_take_factor and not one.windowed
    return fades and mass(one.gap, one.trained) > 0.5 > mass(one.gap, FAR * one.trained)


POSITIONS_FIRST = Rule(
    name="positions first",
    condition="over all keys with rotary positions",
    applies=lambda one: one.positions_first,
    otherwise="keep {mode}",
    is_harmless=True,
    why="at distances beyond the trained length L rotary positions take angles that no training has seen, also in"
    " training with a factor. Give layers over all keys no positions, and rotary ones a window; or stretch the"
    " rotary base of a trained model, and then compare qwen_logn:L. Where a part of the channels is turned, such a"
    " factor helps already",
    watch="the loss by position past the trained length: tritonattn.analysis.loss_by_position",
    turn_back="-",
    evidence=(
        "docs/language-model.md: layers over all keys, rotary in all channels or a quarter, with and without a factor",
        "perf/results/training.md, Text: past the trained length every mode loses 0.2 to 1.2 nats",
    ),
)

RULES: tuple[Rule, ...] = (
    Rule(
        name="broken",
        condition="a logit is NaN or infinite",
        applies=lambda one: not math.isfinite(one.max_logit),
        otherwise="keep the scaling; mend the numbers first: find the layer before this one that gives inf or NaN,"
        " lower the learning rate, or leave float16",
        why="no scaling mends inputs that are not finite",
        watch="loss and max_logit of a Monitor: the first record that is null names the step and the layer",
        turn_back="-",
        evidence=("docs/numerics.md, Edge cases: NaN in a key reaches the rows that attend to it",),
    ),
    Rule(
        name="few keys",
        condition=f"rows attend to fewer than {FEW:g} keys in the mean",
        applies=lambda one: one.key_count_mean < FEW,
        otherwise="keep {mode}: rows of one key do not tell; ask again with longer inputs",
        why="the softmax of one key is 1, whatever the scaling",
        watch="-",
        turn_back="-",
        evidence=("the diagnosis itself",),
    ),
    Rule(
        name="peaked",
        condition=f"more than {ILL:.0%} of the rows give one key more than 0.95, or a logit is above {LARGE_LOGIT:g}",
        applies=lambda one: one.near_one_hot > ILL or one.max_logit > LARGE_LOGIT,
        candidates=("sqrt_dim", "key_norm_mean", "cosine"),
        fixes=_fixes,
        otherwise="in training: qk_clip, or QK-norm, or a lower learning rate; without training: keep the scaling",
        why="rows are nearly one-hot: the softmax's Jacobian is nearly 0 there, and q and k learn from the few rows"
        " that are not",
        watch="near_one_hot and max_logit, which should fall, and the loss",
        turn_back="the loss of `tritonattn compare` on these layers is above sqrt_dim's: then the model has learned to"
        " be sharp, and needs no repair; or near_uniform passes 0.5 in a Monitor",
        evidence=(
            "Zhai et al. 2023, arXiv:2303.06296: entropy collapse comes with unstable training",
            "Bernhard 2023, arXiv:2311.09406: large logits give vanishing gradients, key norms take them back",
            "Henry et al. 2020, arXiv:2010.04245 (cosine); Kimi K2 2025, arXiv:2507.20534 (QK-clip)",
            "docs/simulation.md, 3: keys 1000 times larger are one-hot with sqrt_dim, and as if they were not with"
            " key_norm_mean and cosine; where norms differ inside a sequence only cosine is unaffected",
            "docs/workshop.md, exercise 1: the Jacobian of a peaked softmax",
            "the diagnosis of this layer's q and k with the mode, in the table",
        ),
    ),
    Rule(
        name="uniform",
        condition=f"entropy / ln n of more than {ILL:.0%} of the rows is above 0.98, and the model is not at its start",
        applies=lambda one: one.near_uniform > ILL and not one.untrained,
        candidates=("sqrt_dim", "key_norm_mean", "log_key_count(2.71828)", "cosine"),
        fixes=_fixes,
        otherwise="a learned gain on the scaling: patch(..., gain=torch.ones(heads, 1)), or PerHead, started above 1",
        caveat=", if its weights are trained: at its start a model without QK-norm is uniform by itself",
        why="rows average their values: q and k hardly change the output",
        watch="near_uniform and relative_entropy, which should fall, output_variance, which should rise, and the loss",
        turn_back="the model has only begun to learn, and entropy falls by itself in the first hundred steps with"
        " sqrt_dim; or near_one_hot passes 0.5 in a Monitor; or the loss of `tritonattn compare` rises",
        evidence=(
            "docs/simulation.md, 2: the gradient at q.k falls with n, under key_count and key_norm_sum by another n",
            "docs/simulation.md, 3: keys 1000 times smaller are uniform with sqrt_dim, and not with key_norm_mean and"
            " cosine",
            "Chiang & Cholak 2022, arXiv:2202.12172: ln n keeps attention sharp as n grows",
            "docs/workshop.md, exercise 2: gradients under a uniform softmax",
            "the diagnosis of this layer's q and k with the mode, in the table",
        ),
    ),
    Rule(
        name="beyond the context",
        condition="rows attend to more keys than the model was trained for, without rotary positions or a factor",
        applies=lambda one: one.may_take_factor and one.context is not None and one.longest > one.context,
        candidates=("qwen_logn({context})",),
        why="with more keys than in training a softmax spreads; ln(n) / ln(L) undoes that for n > L, and up to L the"
        " model is as it was",
        watch="the loss by position past L, with that of sqrt_dim",
        turn_back="the loss past L is not below sqrt_dim's: then positions, not the softmax, are what fails",
        evidence=(
            "Qwen's modelling code (use_logn_attn)",
            "Su, kexue.fm/archives/8823: entropy invariance",
            "against it: docs/length.md: on SmolLM2-135M, 1,024 tokens beyond, it moved the loss by +0.0002 +- 0.0011",
        ),
    ),
    Rule(
        name="base beyond the window",
        condition="the base of ln n is above the number of keys of the layer's window",
        applies=lambda one: one.window is not None and one.base > one.window,
        candidates=("sqrt_dim",),
        why="n stays below the base, so that the factor makes these logits smaller than sqrt_dim's for good. Give"
        " windowed layers no factor, as Llama 4, Inkling and Beam do, or the window's number of keys as base",
        watch="near_uniform of these layers, and the loss",
        turn_back="the model was trained with this factor, and its loss rises: its weights have made up for it",
        evidence=(
            "docs/language-model.md, Limits: a factor in windowed layers, trained with from the start",
            "the code of Llama 4, Inkling and Beam: the factor stands in layers over all keys alone",
        ),
    ),
    Rule(
        name="varied norms",
        condition=f"the sequences' mean key norms vary by more than {NORMS:.0%}",
        applies=lambda one: one.key_norm_between > NORMS,
        candidates=("key_norm_mean",),
        why="one factor is too sharp for the sequence with large keys and too flat for the one with small keys; the"
        " mean norm of its keys holds each at the same temperature",
        watch="relative_entropy, which should differ less between sequences; the loss of each",
        turn_back="the loss of either group of sequences is above sqrt_dim's: then the model uses the norms",
        evidence=(
            "docs/simulation.md, 4: norms vary between sequences: reach 0.37 with sqrt_dim, 0.56 with key_norm_mean",
            "Bernhard 2023, arXiv:2311.09406: the sum of key norms, of which this is the mean",
        ),
    ),
    Rule(
        name="varied counts",
        condition=f"not causal, and the number of keys varies by more than {COUNTS:.0%} among the rows",
        applies=lambda one: not one.causal and one.key_count_variation > COUNTS,
        candidates=("{counted}",),
        otherwise="keep {mode}: it grows with n as the gaps of the largest logits ask",
        why="the same logit gets less attention among many keys than among few; (ln(n) / ln(mean n))^p takes that back,"
        " and leaves rows of the mean number as they are. p is what the gaps of the largest logits ask for, 1 if they"
        " do not tell",
        watch="the loss of short and of long inputs, each with sqrt_dim's; max_logit of the long ones, which rises",
        turn_back="the loss of the short or of the long inputs is above sqrt_dim's",
        evidence=(
            "Chiang & Cholak 2022, arXiv:2202.12172 (p = 1); arXiv:2605.12697 (p by the gaps)",
            "against it: docs/simulation.md, 4: on random operands it passes no more gradient than sqrt_dim (0.56 to"
            " 0.55)",
            "docs/workshop.md, exercise 3: the right key's share among 8 and among 512",
        ),
    ),
    Rule(
        name="without positions",
        condition="over all keys without positions, with QK-norm or cosine, and the factor is constant",
        applies=lambda one: one.is_open and one.bounded in ("QK-norm", "cosine"),
        candidates=("{longer}",),
        fades=True,
        why="these layers can read on, and attention fades in them as keys are added: their logits are bounded. L is"
        " the trained length: train with log_key_count:L or ssmax:L; in trained weights qwen_logn:L changes nothing up"
        " to L. A learned gain of QK-norm does a part of the factor's work",
        watch="the loss by position, or recall, past the trained length, with sqrt_dim's: "
        "tritonattn.analysis.loss_by_position",
        turn_back="the loss past the trained length is not below sqrt_dim's",
        evidence=(
            "docs/language-model.md: a ledger's values recalled at 32 times the trained length, by factor",
            "the code of Llama 4, Inkling and Beam: rotary layers with windows or chunks, and a factor in the others",
        ),
    ),
    Rule(
        name="without QK-norm",
        condition="over all keys without positions, without a bound on the logits, and the factor is constant",
        applies=lambda one: one.is_open,
        otherwise="keep {mode}; without QK-norm little is gained by a factor: to read on beyond {trained:,} keys,"
        " compare {longer} with it",
        why="these layers can read on; where nothing bounds the logits, training answers more keys with larger ones",
        watch="the loss by position, or recall, past the trained length: tritonattn.analysis.loss_by_position",
        turn_back="the loss past the trained length is not below sqrt_dim's",
        evidence=(
            "docs/language-model.md: layers without QK-norm",
            "docs/training.md, Recall with QK-norm: without it at 64 times the trained keys 82% with ln n, 76% with"
            " sqrt_dim",
        ),
    ),
    Rule(
        name="will fade",
        condition="QK-norm, cosine or softcap bounds the logits, rotary positions are not seen, and the mass of the"
        f" largest key, above 1/2 at the trained length, falls below that within {FAR} times the length",
        applies=_will_fade,
        otherwise="keep {mode} up to {trained:,} keys; {fading}. If inputs will be longer and positions bear it, train"
        " with ssmax or log_key_count({trained}), or try qwen_logn({trained}), which changes nothing up to there",
        fades=True,
        why="bounded logits cannot answer more keys with a larger gap: the odds of the largest key fall like 1 / n",
        watch="the loss by position past the trained length: tritonattn.analysis.loss_by_position",
        turn_back="the largest key is a sink, such as the first token; or the loss past the trained length is not below"
        " sqrt_dim's",
        evidence=(
            "Velickovic et al. 2024, arXiv:2410.01104: bounded logits disperse as n grows",
            "docs/training.md, Recall with QK-norm: at 64 times the trained keys heads of 16 recall 24%, heads of 64"
            " 85%, and both more than 99% with ln n",
            "against it: docs/length.md: in Gemma 3 270M the gap itself grows with n",
            "the gap of this layer's q and k: tritonattn.analysis.fading",
        ),
    ),
    POSITIONS_FIRST,
    Rule(
        name="healthy",
        condition="none of these",
        applies=lambda one: True,
        otherwise="keep {mode}",
        is_harmless=True,
        why="rows are neither one-hot nor uniform, logits are moderate: there is nothing for a scaling to repair",
        watch="a Monitor at its default thresholds, if the model is trained on",
        turn_back="-",
        evidence=("the diagnosis itself", "docs/scalings.md, Modes: trained models expect sqrt_dim"),
    ),
)
