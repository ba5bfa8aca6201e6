"""The figures of `tritonattn compare` as tables, sentences and files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tabulate import tabulate

from ...core.records import FIGURES, write_json
from .measurement import Measurement

AGREEMENT = 1e-4

_HEADERS = ("mode", "loss/\ntoken", "perplexity", "entropy\n/ ln n", "largest\nlogit", "loss\nmoved", "logit\nmoved")


@dataclass(frozen=True)
class Report:
    """The measurements of a model; the first is sqrt_dim's, with which the others are compared."""

    model: str
    tokens: int
    eager_loss: float
    measurements: tuple[Measurement, ...]

    @property
    def difference(self) -> float:
        """Loss with sqrt_dim less the loss with the model's eager attention."""
        return self.measurements[0].loss - self.eager_loss

    @property
    def agrees(self) -> bool:
        """True where sqrt_dim, which is every model's scaling, gives the model's loss."""
        return abs(self.difference) <= AGREEMENT

    def table(self) -> str:
        """Tabulate the measures, a row per mode."""
        return tabulate([self._row(one) for one in self.measurements], _HEADERS, "simple", **FIGURES)

    def layers(self) -> str:
        """Tabulate the entropy of each layer and of its heads, and logits: a table per mode, a row per layer."""
        tables = []
        for one in self.measurements:
            headers = (one.mode, "entropy\n/ ln n", "of heads", "mean row's\nlargest logit", "largest\nlogit")
            rows = [
                (
                    layer.name,
                    f"{layer.entropy_over_ln_n:.3f}",
                    f"{layer.lowest_entropy_of_a_head:.2f} to {layer.highest_entropy_of_a_head:.2f}",
                    _short(layer.mean_largest_logit_of_a_row),
                    _short(layer.largest_logit),
                )
                for layer in one.layers
            ]
            tables.append(tabulate(rows, headers, "simple", **FIGURES))
        return "\n\n".join(tables)

    def check(self) -> str:
        return (
            f"\nThe model's eager attention has loss {self.eager_loss:.6f}; sqrt_dim differs from it by "
            f"{self.difference:+.1e} (expected: at most {AGREEMENT:g}){'.' if self.agrees else ', which is WRONG.'}"
        )

    def advice(self) -> str:
        """Say how to read the table, and which mode moved the loss least."""
        text = (
            "How to read it: entropy / ln n is 1 for uniform attention and 0 for a single key; the "
            "weights were trained with the model's scaling, so a mode that keeps its logits keeps its loss, "
            "while one whose factor shrinks with the number of keys (key_count, key_norm_sum) "
            "averages the context away unless the model is trained with it or it is given a gain."
        )
        others, base = self.measurements[1:], self.measurements[0].loss
        if others:
            near = min(others, key=lambda other: (math.isnan(other.loss), abs(other.loss - base)))
            text += f" Here {near.mode} moved the loss least, by {near.loss - base:+.4f}."
        return f"{text}\nNext, for a model and a text of yours:  tritonattn advise --model MODEL --text FILE"

    def _row(self, one: Measurement) -> tuple[str, ...]:
        x = self._figures(one)
        return (
            one.mode,
            f"{x['loss']:.4f}",
            _short(x["perplexity"]),
            f"{x['entropy_over_ln_n']:.3f}",
            _short(x["largest_logit"]),
            "-" if one is self.measurements[0] else f"{x['loss_moved']:+.4f}",
            "-" if one is self.measurements[0] else _short(x["largest_logit_moved"], "+"),
        )

    def _figures(self, one: Measurement) -> dict[str, float]:
        base = self.measurements[0]
        return {
            "loss": one.loss,
            "perplexity": math.exp(one.loss) if one.loss < 700 else math.inf,
            "entropy_over_ln_n": one.entropy,
            "largest_logit": one.largest_logit,
            "loss_moved": one.loss - base.loss,
            "largest_logit_moved": one.largest_logit - base.largest_logit,
        }

    def write_json(self, file: Path) -> None:
        """Write every figure; one that is not finite becomes null."""
        modes = [
            {"mode": one.mode, **self._figures(one), "seconds": round(one.seconds, 2)}
            | {"layers": [asdict(layer) for layer in one.layers]}
            for one in self.measurements
        ]
        record = {
            "model": self.model,
            "tokens": self.tokens,
            "eager_loss": self.eager_loss,
            "sqrt_dim_minus_eager_loss": self.difference,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "modes": modes,
        }
        write_json(file, record)


def _short(value: float, sign: str = "") -> str:
    """Format with two decimals, a wide number with four digits and an exponent."""
    return f"{value:{sign}.2f}" if abs(value) < 1e5 else f"{value:{sign}.3e}"
