"""vLLM without the plugin refuses what needs it: a patched checkpoint, and the documented command for another."""

import os
import subprocess
import sys

import pytest

import tritonattn.huggingface

from .cases import Case

CASES = {
    "patched checkpoint": (
        Case("llama", lambda model: tritonattn.huggingface.patch(model, scaling="log_key_count")),
        "no module or parameter named 'needs_tritonattn'",
    ),
    "settings of the command": (
        Case("llama", "log_key_count", {"attention_backend": "TRITONATTN"}),
        "Unknown attention backend: 'TRITONATTN'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_needs_the_plugin_is_refused(case, tmp_path):
    model, message = CASES[case]
    _, _, arguments = model.make(tmp_path)
    program = f"import sys, vllm; vllm.LLM(**{arguments!r}); print('served', 'tritonattn' in sys.modules)"
    without = {**os.environ, "VLLM_PLUGINS": "plain_ops"}
    done = subprocess.run([sys.executable, "-c", program], env=without, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "served" not in done.stdout
    assert message in done.stderr
