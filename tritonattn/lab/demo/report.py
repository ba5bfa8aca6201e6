"""The demo's figures as a table, sentences and files."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate

from .measurement import Measurement

AGREEMENT = 1e-4
_HEADERS = (
    "mode",
    "loss/\ntoken",
    "perplexity",
    "entropy\n/ ln n",
    "largest\nlogit",
    "loss\nmoved",
    "logit\nmoved",
)


@dataclass(frozen=True)
class Report:
    """measurements: the first is sqrt_dim's, from which the others are told to have moved."""

    model: str
    tokens: int
    eager_loss: float
    measurements: tuple[Measurement, ...]

    @property
    def difference(self) -> float:
        """Loss with sqrt_dim less the loss with the model's own eager attention."""
        return self.measurements[0].loss - self.eager_loss

    @property
    def agrees(self) -> bool:
        """False where sqrt_dim, which is every model's own scaling, gives another loss."""
        return abs(self.difference) <= AGREEMENT

    def table(self, columns: int | None = None) -> str:
        """One row a mode; one block a mode where a row does not fit into the terminal."""
        rows = [self._row(measurement) for measurement in self.measurements]
        table = tabulate(
            rows, headers=_HEADERS, tablefmt="simple", disable_numparse=True, stralign="right", colalign=("left",)
        )
        columns = columns or shutil.get_terminal_size().columns
        if max(map(len, table.splitlines())) <= columns:
            return table
        names = [header.replace("/\n", "/").replace("\n", " ") for header in _HEADERS]
        blocks = [tabulate(zip(names, row, strict=True), tablefmt="plain", disable_numparse=True) for row in rows]
        return "\n\n".join(blocks)

    def layers(self) -> str:
        """A table a mode with one row a layer: its entropy, that of its heads, and its logits."""
        tables = []
        for one in self.measurements:
            headers = (one.mode, "entropy\n/ ln n", "of heads", "mean row's\nlargest logit", "largest\nlogit")
            rows = [
                (
                    layer.name,
                    f"{layer.entropy:.3f}",
                    f"{layer.lowest_entropy:.2f} to {layer.highest_entropy:.2f}",
                    _short(layer.row_logit),
                    _short(layer.largest_logit),
                )
                for layer in one.layers
            ]
            tables.append(
                tabulate(
                    rows,
                    headers=headers,
                    tablefmt="simple",
                    disable_numparse=True,
                    stralign="right",
                    colalign=("left",),
                )
            )
        return "\n\n".join(tables)

    def check(self) -> str:
        return (
            f"\nThe model's own eager attention has loss {self.eager_loss:.6f}; sqrt_dim differs from it by "
            f"{self.difference:+.1e} (wanted: at most {AGREEMENT:g}){'.' if self.agrees else ', which is WRONG.'}"
        )

    def advice(self) -> str:
        """How to read the table, and which mode moved the loss least."""
        text = (
            "How to read it: entropy / ln n is 1 for uniform attention and 0 for a single key; the "
            "weights were trained with their own scaling, so a mode that keeps its logits keeps its loss, "
            "while one whose factor shrinks with the number of keys (key_count, key_norm_sum) "
            "averages the context away unless the model is trained with it or it is given a gain."
        )
        others, base = self.measurements[1:], self.measurements[0].loss
        if others:
            near = min(others, key=lambda other: _distance(other.loss, base))
            text += f" Here {near.mode} moved the loss least, by {near.loss - base:+.4f}."
        return text

    def write_json(self, file: Path) -> None:
        """Every figure; a figure that is not finite becomes null."""
        file.write_text(json.dumps(self._record(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def draw(self, file: Path) -> None:
        from .plot import draw

        draw(self.model, self.measurements, file)

    def _row(self, measurement: Measurement) -> tuple[str, ...]:
        base = self.measurements[0]
        return (
            measurement.mode,
            f"{measurement.loss:.4f}",
            _short(_perplexity(measurement.loss)),
            f"{measurement.entropy:.3f}",
            _short(measurement.largest_logit),
            "-" if measurement is base else f"{measurement.loss - base.loss:+.4f}",
            "-" if measurement is base else _short(measurement.largest_logit - base.largest_logit, "+"),
        )

    def _record(self) -> dict[str, Any]:
        base = self.measurements[0]
        return {
            "model": self.model,
            "tokens": self.tokens,
            "eager_loss": _finite(self.eager_loss),
            "sqrt_dim_minus_eager_loss": _finite(self.difference),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "modes": [
                {
                    "mode": one.mode,
                    "loss": _finite(one.loss),
                    "perplexity": _finite(_perplexity(one.loss)),
                    "entropy_over_ln_n": _finite(one.entropy),
                    "largest_logit": _finite(one.largest_logit),
                    "loss_moved": _finite(one.loss - base.loss),
                    "largest_logit_moved": _finite(one.largest_logit - base.largest_logit),
                    "seconds": round(one.seconds, 2),
                    "layers": [
                        {
                            "name": layer.name,
                            "entropy_over_ln_n": _finite(layer.entropy),
                            "lowest_entropy_of_a_head": _finite(layer.lowest_entropy),
                            "highest_entropy_of_a_head": _finite(layer.highest_entropy),
                            "largest_logit": _finite(layer.largest_logit),
                            "mean_largest_logit_of_a_row": _finite(layer.row_logit),
                        }
                        for layer in one.layers
                    ],
                }
                for one in self.measurements
            ],
        }


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _distance(loss: float, base: float) -> float:
    return math.inf if math.isnan(loss) else abs(loss - base)


def _short(value: float, sign: str = "") -> str:
    """Two decimals, or four digits and an exponent for what would be wide."""
    return f"{value:{sign}.2f}" if abs(value) < 1e5 else f"{value:{sign}.3e}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
