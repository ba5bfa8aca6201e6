"""`advise`: which scaling to try first, on which layers, and why."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.attention import batch_visibility
from ..calls.checks import INTEGERS, check_count, operands
from ..core.errors import install
from ..core.norms import key_norms_of
from ..core.records import for_json
from ..core.tables import table
from ..core.visibility import Visibility
from ..scaling import Scaling
from ..scaling.names import ModeName, named_scaling
from .diagnosis import Diagnosis, diagnose
from .fading import half_at
from .gaps import layer_power, power_of
from .rules import RULES, Reading, Rule
from .tally import counted_rows

# The norm of the keys in transformers' models: Qwen 3, Gemma 3, OLMo 2; Phi; HunYuan; Idefics 2; Llama 4.
_KEY_NORMS = {"k_norm", "k_layernorm", "key_layernorm", "k_layer_norm", "qk_norm"}
_VISIBLE = ("causal", "window", "key_lengths", "key_ranges", "mask")
_COLUMNS = """\
one-hot, uniform: shares of rows
half at n: the number of keys at which the sharpest head's largest key has half of the mass"""


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
    text       the advice as a sentence
    layers     the layers that it is for
    why, watch, turn_back, evidence   of the rule behind most findings that are not healthy
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

    @property
    def keeps(self) -> bool:
        """True where the advice is to change nothing."""
        return all(finding.mode is None for finding in self.findings)

    def table(self) -> str:
        """A line for each layer: its figures, its rule, and its figures with the mode to try.

        "half at n" is the number of keys at which the sharpest head gives its largest key 1/2, see `analysis.fading`,
        and what bounds the logits.
        """
        figures = ("one-hot", "uniform", "entropy/ln n", "max logit", "Jacobian", "gradient", "half at n")
        headers = ("layer", *figures, "rule", "try")
        rows = [
            (one.layer, *_figures(one.reading), one.rule.name, _tried(one.mode, one.after)) for one in self.findings
        ]
        return table(rows, headers, "simple", left=None)

    def report(self) -> str:
        """The table and the reasons as text."""
        parts = [("Try first", self.text), ("Why", self.why), ("Watch", self.watch), ("Turn back if", self.turn_back)]
        lines = [textwrap.fill(f"{name}: {text}", 100, subsequent_indent="  ") for name, text in parts if text != "-"]
        evidence = [textwrap.fill(text, 100, initial_indent="  - ", subsequent_indent="    ") for text in self.evidence]
        return "\n".join([self.table(), _COLUMNS, "", *lines, "It rests on:", *evidence])

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


@dataclass(frozen=True, eq=False)
class _Layer:
    """The operands of one attention call, to be diagnosed with any mode."""

    name: str
    q: Tensor
    k: Tensor
    scaling: Any
    gain: Any
    relative: Any  # the model's factor with any mode, see `huggingface.patch`; None is 1
    visible: dict[str, Any]
    context: int | None
    softcap: float | None = None
    qk_norm: bool = False  # the layer normalises q and k before the call

    @cached_property
    def seen(self) -> Visibility:
        return Visibility.of(self.q, self.k, **self.visible)

    def read(self, mode: str | None) -> Reading:
        """Diagnose the layer with a mode; None is its present scaling."""
        scaling, gain = self.scaling, self.gain
        if mode is not None:
            scaling = named_scaling(mode)
            gain = None if scaling.normalises_query else self.relative
        found = diagnose(self.q, self.k, scaling=scaling, gain=gain, softcap=self.softcap, **self.visible)
        longest = int(self.seen.counts().max())
        lo, hi = self.seen.ranges()
        last = torch.arange(1, hi.shape[-1] + 1, device=hi.device) + self.seen.k_len - self.seen.q_len
        return Reading(
            layer=self.name,
            mode=_name(self.scaling) if mode is None else mode,
            **_means(found),
            key_norm_between=_between_sequences(self.k, self.seen),
            causal=bool((hi <= last)[hi > lo].all()),
            longest=longest,
            context=self.context,
            power=power_of(*layer_power(found.count_power, found.count_power_error)),
            bounded=self._bounded(scaling),
            windowed=int(self.seen.seen_keys().sum(-1).max()) > longest,
        )

    def _bounded(self, scaling: Any) -> str:
        """Name what bounds the logits."""
        mode = named_scaling(scaling) if isinstance(scaling, str) else scaling
        if getattr(mode, "normalises_query", False):
            return "cosine"
        return "QK-norm" if self.qk_norm else "" if self.softcap is None else f"softcap {self.softcap:g}"


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
        model: A transformers model that `tritonattn.huggingface.patch` can patch, patched or not; it does not change.
            Or q [B, Hq, Sq, D] of one layer.
        tokens: Token ids [B, S], or the model's inputs by name, with attention_mask if there is padding, whose rows do
            not count. Or k [B, Hkv, Sk, D].
        context: The length of the model's training; None is its config's max_position_embeddings.
        scaling, gain, softcap, causal, window, key_lengths, key_ranges, mask: With q and k: as in `diagnose`.

    The first of `tritonattn.analysis.rules.RULES` that applies to a layer gives its advice. Modes are tried on the
    layer's q and k before they are advised. Heads are averaged. A softcap bounds the gaps of `analysis.fading` alone,
    and sinks and biases are ignored. A layer that normalises keys is recognised by the name of that module (k_norm,
    ...). The cost is one forward pass, and for each layer and mode a `diagnose`, about 25 forward passes of its
    attention.

    Returns:
        `Advice`; print(advice.report()).

    Raises:
        TypeError, ValueError: An argument, inputs that the model does not take, or a model without attention that can
            be patched.
        NotImplementedError: A model whose attention cannot be patched, naming why.

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
        if unknown := set(visible) - set(_VISIBLE):
            raise TypeError(f"{', '.join(sorted(unknown))}: expected arguments out of {', '.join(_VISIBLE)}")
        q, k, _ = operands(model, tokens, tokens)
        batch_visibility(q, k, **visible)
        visible = _without_padding(q, k, visible)
        return _joined([_finding(_Layer("q, k", q, k, scaling, gain, None, visible, context, softcap))])
    others = {"scaling": None if scaling == "sqrt_dim" else scaling, "gain": gain, "softcap": softcap}
    names = [*visible, *(name for name, value in others.items() if value is not None)]
    if names:
        raise TypeError(f"{', '.join(names)}: expected only with q and k, got a {type(model).__name__}")
    return _joined(_findings_of_model(model, tokens, context))


def _findings_of_model(model: nn.Module, tokens: Any, context: int | None) -> list[Finding]:
    try:
        from ..huggingface import patch, patched
    except ImportError as error:
        raise ImportError(f"advise needs transformers for a model: {install('hf')}") from error
    if context is None:
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    findings: list[Finding] = []

    def observe(module: nn.Module, q: Tensor, k: Tensor, arguments: dict[str, Any], aux: Any) -> None:
        visible = _without_padding(q, k, {part: arguments[part] for part in arguments.keys() & set(_VISIBLE)})
        scaling, gain, softcap = (arguments[name] for name in ("scaling", "gain", "softcap"))
        relative = gain
        if not isinstance(scaling, (str, Scaling)):  # a float of the model's
            relative = scaling * q.shape[-1] ** 0.5 * (1.0 if gain is None else gain)
        children = module.named_children()
        qk_norm = any(name in _KEY_NORMS and not isinstance(child, nn.Identity) for name, child in children)
        name = names[id(module)]
        findings.append(_finding(_Layer(name, q, k, scaling, gain, relative, visible, context, softcap, qk_norm)))

    present = patched(model) if isinstance(model, nn.Module) else None
    handle = patch(model, "sqrt_dim") if present is None else present
    names = {id(module): name for name, module in model.named_modules()}
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with handle.watch(observe), torch.no_grad():
            _run(model, tokens)
    finally:
        for module, mode in training:
            module.training = mode
        if present is None:
            handle.undo()
    if not findings:
        raise ValueError("model: expected one that computes attention from these inputs, got none")
    return findings


def _run(model: nn.Module, tokens: Any) -> None:
    """Run a model on its inputs; an error of the model names them."""
    inputs = dict(tokens) if isinstance(tokens, Mapping) else {"input_ids": tokens}
    ids = inputs.get("input_ids")
    if "input_ids" in inputs and (not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in INTEGERS):
        raise TypeError(f"tokens: expected token ids, int [B, S], or inputs by name, got {_described(ids)}")
    try:
        model(**inputs)
    except (NotImplementedError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        got = ", ".join(f"{name} {_described(x)}" for name, x in inputs.items())
        raise ValueError(f"tokens: expected inputs that {type(model).__name__} takes, got {got}: {error}") from error


def _described(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _without_padding(q: Tensor, k: Tensor, visible: dict[str, Any]) -> dict[str, Any]:
    """Visibility arguments that hide all keys from rows of padding."""
    seen = Visibility.of(q, k, **visible)
    rows = counted_rows(seen)
    if seen.depends_on_sizes_only or rows.shape[1] > 1:
        return visible
    lo, hi = seen.ranges()
    hi = torch.where(rows[:, 0], hi, lo)
    ranges = torch.stack(torch.broadcast_tensors(lo, hi), dim=-1).expand(q.shape[0], -1, -1)
    return {name: x for name, x in visible.items() if name == "mask"} | {"key_ranges": ranges}


def _means(found: Diagnosis) -> dict[str, float]:
    names = [field.name for field in dataclasses.fields(Reading) if hasattr(found, field.name)]
    means = {name: float(getattr(found, name).mean()) for name in names}
    return {**means, "max_logit": float(found.max_logit.amax()), "gap": float(found.gap.amax())}


def _between_sequences(k: Tensor, seen: Visibility) -> float:
    """Standard deviation over mean of the sequences' mean key norms, averaged over the heads."""
    visible = seen.seen_keys().expand(seen.keys)  # [B, Hkv, Sk]
    norms = key_norms_of(k, visible).double()
    count = visible.sum(-1)
    means = torch.where(visible, norms, 0).sum(-1) / count.clamp(min=1)  # [B, Hkv]
    means = means[(count > 0).all(1)]
    if means.shape[0] < 2:
        return 0.0
    return float((means.std(0, correction=0) / means.mean(0)).nan_to_num().mean())


def _name(scaling: Any) -> str:
    if isinstance(scaling, str):
        return scaling
    return scaling.name if isinstance(scaling, Scaling) else "sqrt_dim"  # a float is the model's factor


def _finding(layer: _Layer) -> Finding:
    reading = layer.read(None)
    rule = next(rule for rule in RULES if rule.applies(reading))
    for candidate in rule.candidates:
        mode = candidate.format(context=reading.context, counted=reading.counted)
        if mode == reading.mode:
            continue
        after = layer.read(mode)
        if rule.fixes(reading, after):
            return Finding(reading, rule, mode, mode, after)
    words = {"mode": reading.mode, "trained": reading.trained, "fading": reading.fading}
    return Finding(reading, rule, rule.otherwise.format(**words))


def _joined(findings: list[Finding]) -> Advice:
    """The advice for a model: that of its most frequent finding that is not `healthy`, for the layer of least gap."""
    ill = [one for one in findings if one.rule.name != "healthy"]
    counted = Counter(one.remedy for one in ill or findings)
    remedy, _ = counted.most_common(1)[0]
    chosen = [one for one in findings if one.remedy == remedy]
    rule, first = chosen[0].rule, chosen[0].reading
    mode, text = chosen[0].mode, min(chosen, key=lambda one: one.reading.gap).advice
    layers = tuple(one.layer for one in chosen)
    if ill:
        where = f"{len(chosen)} of {len(findings)} layers: {', '.join(layers)}"
        text = f"{text}, on {'all layers' if len(chosen) == len(findings) > 1 else where}"
        if others := len(ill) - len(chosen):
            text += f" ({others} more have other findings, see the table)"
    explained = {name: getattr(rule, name) for name in ("why", "watch", "turn_back", "evidence")}
    return Advice(first.mode if mode is None else mode, text, layers, **explained, findings=tuple(findings))


def _figures(one: Reading) -> tuple[str, ...]:
    return (
        f"{one.near_one_hot:.2f}",
        f"{one.near_uniform:.2f}",
        f"{one.relative_entropy:.3f}",
        f"{one.max_logit:.4g}",
        f"{one.jacobian_norm:.2g}",
        f"{one.gradient_norm:.2g}",
        "window" if one.windowed else ", ".join(filter(None, (_count(float(half_at(one.gap))), one.bounded))),
    )


def _count(n: float) -> str:
    return f"{n:,.0f}" if n < 1e7 else f"{n:.0e}"


def _tried(mode: str | None, after: Reading | None) -> str:
    if mode is None or after is None:
        return "-"
    shares = f"one-hot {after.near_one_hot:.2f}, uniform {after.near_uniform:.2f}"
    return f"{mode}: {shares}, Jacobian {after.jacobian_norm:.2g}"
