"""Give the attention layers of PyPI's torchtune a scaling by `replace_sdpa`: `python -m tests.peers.torchtune_blocks`.

Its wheel is downloaded with pip into a temporary folder; nothing of it is kept. Only its layers are imported: its
packages import torchao and datasets.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from tritonattn.integrations.sdpa import replace_sdpa, scaled_sdpa

VERSION = "0.6.1"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = f"-m pip install --quiet --no-deps --no-compile --target {folder} torchtune=={VERSION}"
        subprocess.run([sys.executable, *command.split()], check=True)
        for name in ("torchtune", "torchtune.modules", "torchtune.utils"):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(Path(folder, *name.split(".")))]
        from torchtune.modules.attention import MultiHeadAttention  # pyright: ignore[reportMissingImports]

        check(MultiHeadAttention)


class Decoder(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        q_and_out, k_and_v = ([nn.Linear(32, width), nn.Linear(32, width)] for width in (32, 16))
        sizes = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
        projections = dict(zip(("q_proj", "output_proj", "k_proj", "v_proj"), q_and_out + k_and_v, strict=True))
        self.attn = attention(**sizes, **projections)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x + self.attn(x, x, mask=mask)


def check(attention: type[nn.Module]) -> None:
    """A learned scaling starts where the layers were, and leaves no trace; a fixed one is that of the context."""
    torch.manual_seed(0)
    model, x = Decoder(attention).double(), 3 * torch.randn(2, 9, 32, dtype=torch.float64)
    documents = torch.arange(9).ge(4)
    for mask in (None, (documents[:, None] == documents).tril().expand(2, -1, -1)):  # causal, and packed documents
        before = model(x, mask)
        with replace_sdpa(model, "ssmax", example=(x, mask)) as replaced:
            assert replaced.names == ["attn"]
            torch.testing.assert_close(model(x, mask), before)
            model(x, mask).sum().backward()
            assert model.get_parameter("attn.logit_scaling.s").grad.abs().min() > 0
        assert torch.equal(model(x, mask), before)
        with scaled_sdpa("log_key_count:4"):
            expected = model(x, mask)
        with replace_sdpa(model, "log_key_count:4"):
            torch.testing.assert_close(model(x, mask), expected)
        assert (expected - before).abs().max() > 1e-2


if __name__ == "__main__":
    main()
