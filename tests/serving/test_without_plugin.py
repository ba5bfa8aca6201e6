"""vLLM without the plugin does not serve a checkpoint that was saved with a patch."""

import os
import subprocess
import sys

import tritonattn.huggingface

from .cases import Case


def test_a_patched_checkpoint_is_refused(tmp_path):
    _, _, arguments = Case("llama", lambda model: tritonattn.huggingface.patch(model, scaling="log_key_count")).make(
        tmp_path
    )
    program = f"import sys, vllm; vllm.LLM(**{arguments!r}); print('served', 'tritonattn' in sys.modules)"
    without = {**os.environ, "VLLM_PLUGINS": "plain_ops"}
    done = subprocess.run([sys.executable, "-c", program], env=without, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "served" not in done.stdout
    assert "no module or parameter named 'needs_tritonattn'" in done.stderr
