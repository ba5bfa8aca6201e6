"""`advise`: which scaling to try first, on which layers, and why."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from ..calls.attention import batch_visibility
from ..calls.checks import check_count, operands
from ..core.hints import shortened
from ..core.records import for_json
from ..scaling import Scaling
from ..scaling.names import ModeName
from .fading import half_at
from .layers import VISIBLE, Layer, read_layers, without_padding
from .rules import POSITIONS_FIRST, RULES, Reading, Rule

_COLUMNS = """\
one-hot, uniform: shares of rows
half at n: where attention fades, the number of keys at which the sharpest head's largest key has half of the mass"""

_REPOSITORY = "https://github.com/tritonattn/tritonattn"


@dataclass(frozen=True)
class Finding:
    """The diagnosis of one layer, and the advice for it.

    rule     the first rule that applied
    advice   the mode to try, or another remedy
    mode     the mode to try; None to keep the present one
    after    the layer's reading with that mode on the same q and k; None without a mode

    >>> import torch
    >>> from tritonattn.analysis import advise
    >>> q, k = torch.randn(2, 1, 4, 64, 32)
    >>> finding = advise(q, 40 * k).findings[0]
    >>> finding.rule.name, finding.mode
    ('peaked', 'key_norm_mean')
    """

    reading: Reading
    rule: Rule
    advice: str
    mode: str | None = None
    after: Reading | None = None

    @property
    def layer(self) -> str:
        return self.reading.layer

    @property
    def remedy(self) -> tuple[str, str | None, str]:
        """The rule, the mode to try and the present one: layers that agree in these have one advice."""
        return self.rule.name, self.mode, self.reading.mode


@dataclass(frozen=True)
class Advice:
    """The scaling to try first, with reasons.

    mode       a name for `scaling=`, with its parameter in brackets; the present mode if it is to be kept
    text       the advice as a sentence, before it that of `positions`
    layers     the layers that `mode` is for
    positions  layers over all keys with rotary positions, which fail first beyond the trained length
    unseen     causal layers over all keys whose positions are not known
    why, watch, turn_back, evidence   of the rule behind most findings that are not harmless
    findings   one for each layer

    >>> import torch
    >>> from tritonattn.analysis import advise
    >>> advice = advise(*torch.randn(2, 1, 4, 64, 32))
    >>> advice.mode, advice.keeps, advice.text
    ('sqrt_dim', True, 'keep sqrt_dim')
    """

    mode: str
    text: str
    layers: tuple[str, ...]
    why: str
    watch: str
    turn_back: str
    evidence: tuple[str, ...]
    findings: tuple[Finding, ...]
    positions: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def keeps(self) -> bool:
        """True where no layer is to take another scaling; longer inputs may fail yet, by `positions` or `unseen`."""
        return all(finding.mode is None for finding in self.findings)

    def table(self) -> str:
        """A line for each layer: its figures, its rule, and its figures with the mode to try.

        "half at n" is the number of keys at which the sharpest head gives its largest key 1/2, see `analysis.fading`,
        and what bounds the logits; "window" or "positions" where more keys than in training never come, or where
        rotary positions fail before.
        """
        figures = ("one-hot", "uniform", "entropy/ln n", "max logit", "Jacobian", "gradient", "half at n")
        headers = ("layer", *figures, "rule", "try")
        rows = [(one.layer, *_figures(one), _rules(one), _tried(one.mode, one.after)) for one in self.findings]
        return tabulate(rows, headers, "simple", disable_numparse=True)

    def report(self) -> str:
        """The table and the reasons as text."""
        parts = [("Try first", self.text), ("Why", self.why), ("Watch", self.watch), ("Turn back if", self.turn_back)]
        lines = [textwrap.fill(f"{name}: {text}", 100, subsequent_indent="  ") for name, text in parts if text != "-"]
        evidence = [textwrap.fill(text, 100, initial_indent="  - ", subsequent_indent="    ") for text in self.evidence]
        return "\n".join([self.table(), _COLUMNS, "", *lines, f"It rests on (files of {_REPOSITORY}):", *evidence])

    def as_dict(self) -> dict[str, Any]:
        """A dict for JSON, in which numbers that are not finite are None."""
        findings = [
            {
                "rule": one.rule.name,
                "condition": one.rule.condition,
                "advice": one.advice,
                "mode": one.mode,
                "reading": dataclasses.asdict(one.reading),
                "after": None if one.after is None else dataclasses.asdict(one.after),
            }
            for one in self.findings
        ]
        return for_json({**vars(self), "keeps": self.keeps, "findings": findings})


def advise(
    model: nn.Module | Tensor,
    tokens: Tensor | Mapping[str, Tensor],
    *,
    context: int | None = None,
    scaling: ModeName | str | Scaling | float = "sqrt_dim",
    gain: float | Tensor | None = None,
    softcap: float | None = None,
    **visible: Any,
) -> Advice:
    """Diagnose every attention layer, and say which scaling to try first.

    Args:
        model: A module that computes its attention by `tritonattn.attention`, `tritonattn.nn.ScaledAttention` or, if by
            none of these, F.scaled_dot_product_attention, or a transformers model that `tritonattn.huggingface.patch`
            can patch, patched or not; it does not change. Or q [B, Hq, Sq, D] of one layer.
        tokens: Token ids [B, S], or what the module takes first, or inputs by name, the tokens first, with
            attention_mask if there is padding, whose rows do not count. Or k [B, Hkv, Sk, D].
        context: The length of the model's training; None is its config's max_position_embeddings, or without a config
            the largest number of keys that a row attends to.
        scaling, gain, softcap, causal, window, key_lengths, key_ranges, mask: With q and k: as in `diagnose`.

    The first of `tritonattn.analysis.rules.RULES` that applies to a layer gives its advice. Modes are tried on the
    layer's q and k before they are advised. Heads are averaged. A softcap bounds the gaps of `analysis.fading` alone,
    and sinks and biases are ignored. The cost is a forward pass, or two, and for each layer and mode a `diagnose`,
    about 25 forward passes of its attention.

    Kinds of layers: in transformers windows and rotary positions are read as `huggingface.patch(layers=...)` reads
    them. In other models windows are those of the calls, and a run on the first token, repeated, shows positions: q . k
    depends on the distance of a pair where they are rotary, and on nothing where there are none. Where neither is so,
    as with positions added to the tokens, `unseen` and the text name the layer. QK-norm is a module k_norm (or as
    transformers' models name it), or q and k that are an RMS norm's times weights.

    Returns:
        `Advice`; print(advice.report()).

    Raises:
        TypeError, ValueError: An argument, inputs that the model does not take, or a model without such attention.
        NotImplementedError: A transformers model whose attention cannot be patched, naming why; packed sequences.

    >>> import torch
    >>> from tritonattn.analysis import advise
    >>> q, k = torch.randn(2, 1, 4, 128, 64)
    >>> advise(q, k, causal=True).mode
    'sqrt_dim'
    >>> advise(8 * q, 8 * k, causal=True).mode
    'cosine'
    """
    if context is not None:
        check_count("context", context, 2)
    if isinstance(model, Tensor):
        if not isinstance(tokens, Tensor):
            raise TypeError(f"k: expected a tensor with q, got {type(tokens).__name__}")
        if unknown := set(visible) - set(VISIBLE):
            raise TypeError(f"{', '.join(sorted(unknown))}: expected arguments out of {', '.join(VISIBLE)}")
        q, k, _ = operands(model, tokens, tokens)
        batch_visibility(q, k, **visible)
        visible = without_padding(q, k, visible)
        return _joined([_finding(Layer("q, k", q, k, scaling, gain, None, visible, context, softcap))])
    others = {"scaling": None if scaling == "sqrt_dim" else scaling, "gain": gain, "softcap": softcap}
    names = [*visible, *(name for name, value in others.items() if value is not None)]
    if names:
        raise TypeError(f"{', '.join(names)}: expected only with q and k, got a {type(model).__name__}")
    findings: list[Finding] = []
    read_layers(model, tokens, context, lambda layer: findings.append(_finding(layer)))
    return _with_positions(_joined(findings), findings)


def _with_positions(advice: Advice, findings: list[Finding]) -> Advice:
    """The advice for a model with what is not seen of its positions, or that it has none."""
    text, unseen = advice.text, [one for one in findings if one.reading.rotary is None and one.reading.is_global]
    if unseen:
        text += (
            f". Positions are not seen in {_where(unseen, findings)}: where they are rotary or learned, they fail first"
            " beyond the trained length"
        )
    if all(one.reading.rotary is False and one.reading.is_global for one in findings):
        text += ". No layer has positions, so that the order of tokens is hardly known: add rotary layers with a window"
    return dataclasses.replace(advice, text=text, unseen=_names(unseen))


def _finding(layer: Layer) -> Finding:
    reading = layer.read(None)
    rule = next(rule for rule in RULES if rule.applies(reading))
    words = {name: getattr(reading, name) for name in ("mode", "context", "counted", "longer", "trained", "fading")}
    for candidate in rule.candidates:
        mode = candidate.format(**words)
        if mode == reading.mode:
            continue
        after = layer.read(mode)
        if rule.fixes(reading, after):
            return Finding(reading, rule, mode, mode, after)
    return Finding(reading, rule, rule.otherwise.format(**words))


def _joined(findings: list[Finding]) -> Advice:
    """The advice for a model: that of its most frequent finding that is not harmless, for the layer of least gap."""
    ill = [one for one in findings if not one.rule.is_harmless]
    rotary = [one for one in findings if one.reading.positions_first]
    counted = Counter(one.remedy for one in ill or rotary or findings)
    remedy, _ = counted.most_common(1)[0]
    chosen = [one for one in findings if one.remedy == remedy]
    rule, first = chosen[0].rule, chosen[0].reading
    mode, text = chosen[0].mode, _kept(findings)
    if ill:
        text = f"{min(chosen, key=lambda one: one.reading.gap).advice}, on {_where(chosen, findings)}{rule.caveat}"
        if others := len(ill) - len(chosen):
            text += f" ({others} more have other findings, see the table)"
    if rotary:
        length = "" if first.context is None else f" ({first.context:,} tokens)"
        text = (
            f"positions first: in {_where(rotary, findings)} rotary positions beyond the trained length{length} fail"
            " before attention fades: take no positions there, or a window, or stretch the rotary base."
            f" {'Then' if ill else 'Up to there'} {text}"
        )
    explained = {name: getattr(rule, name) for name in ("why", "watch", "turn_back", "evidence")}
    if rotary and ill:
        explained["why"] = f"{POSITIONS_FIRST.why}. Then: {rule.why}"
        explained["evidence"] = POSITIONS_FIRST.evidence + rule.evidence
    mode, layers, positions = mode or first.mode, _names(chosen), _names(rotary)
    return Advice(mode, text, layers, **explained, findings=tuple(findings), positions=positions)


def _kept(findings: list[Finding]) -> str:
    """Say to keep the scalings, and of a model whose layers over all keys have a factor of n that it reads on."""
    modes: dict[str, list[Finding]] = {}
    for one in findings:
        modes.setdefault(one.reading.mode, []).append(one)
    each = [mode if len(modes) == 1 else f"{mode} in {_where(some, findings)}" for mode, some in modes.items()]
    text = f"keep {' and '.join(each)}"
    everywhere = [one.reading for one in findings if one.reading.is_global]
    if everywhere and all(one.rotary is False and one.grows for one in everywhere):
        text += ": layers over all keys have no positions, and a factor that grows with n: the model can read on"
    return text


def _names(findings: list[Finding]) -> tuple[str, ...]:
    return tuple(one.layer for one in findings)


def _rules(finding: Finding) -> str:
    """The rule, behind that of positions where they fail first whatever it says."""
    both = finding.reading.positions_first and finding.rule is not POSITIONS_FIRST
    return f"{POSITIONS_FIRST.name}, {finding.rule.name}" if both else finding.rule.name


def _where(chosen: list[Finding], findings: list[Finding]) -> str:
    if len(chosen) == len(findings) > 1:
        return "all layers"
    return f"{len(chosen)} of {len(findings)} layers ({shortened([one.layer for one in chosen])})"


def _figures(finding: Finding) -> tuple[str, ...]:
    one = finding.reading
    return (
        f"{one.near_one_hot:.2f}",
        f"{one.near_uniform:.2f}",
        f"{one.relative_entropy:.3f}",
        f"{one.max_logit:.4g}",
        f"{one.jacobian_norm:.2g}",
        f"{one.gradient_norm:.2g}",
        _fades_at(finding),
    )


def _fades_at(finding: Finding) -> str:
    one = finding.reading
    if one.windowed or one.rotary:
        return "window" if one.windowed else "positions"
    return f"{_count(float(half_at(one.gap)))}, {one.bounded}" if finding.rule.fades else "-"


def _count(n: float) -> str:
    return f"{n:,.0f}" if n < 1e7 else f"{n:.0e}"


def _tried(mode: str | None, after: Reading | None) -> str:
    if mode is None or after is None:
        return "-"
    shares = f"one-hot {after.near_one_hot:.2f}, uniform {after.near_uniform:.2f}"
    return f"{mode}: {shares}, Jacobian {after.jacobian_norm:.2g}"
