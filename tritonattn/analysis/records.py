"""Outputs of a monitored run: a file of JSON lines, TensorBoard."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..core.records import append
from .alarms import layer_value


class JsonLines:
    """A file with one JSON object a line, each appended by one write: whenever a run ends, its lines are whole."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.path = Path(file)
        if self.path.is_dir() or not self.path.absolute().parent.is_dir():
            raise ValueError(f"file: expected a file in an existing folder, got {str(file)!r}")
        append(self.path, [])  # the file exists, and can be written, before the run begins

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; numbers that are not finite become null."""
        append(self.path, [record])


class Scalars:
    """The records as TensorBoard scalars: the loss, and of every layer the largest logit and the heads' means."""

    def __init__(self, target: Any) -> None:
        """target: a folder, or a writer with add_scalar(name, value, step)."""
        self._owned = not hasattr(target, "add_scalar")
        self._writer = _writer(target) if self._owned else target

    def write(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if record["loss"] is not None:
            self._writer.add_scalar("loss", record["loss"], step)
        for layer, measures in record["layers"].items():
            for name, values in measures.items():
                value = layer_value(name, values) if isinstance(values, list) else None
                if value is not None:
                    self._writer.add_scalar(f"{layer}/{name}", value, step)

    def close(self) -> None:
        """Close a writer of our own; that of the caller is only flushed, where it can be."""
        if self._owned:
            self._writer.close()
        elif hasattr(self._writer, "flush"):
            self._writer.flush()


def _writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: it is not installed; to mend it: pip install 'tritonattn[monitor]'") from error
    return SummaryWriter(str(folder))
