"""SGLang's engine on the backend "tritonattn", against patched models of transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch

import tritonattn.huggingface
from tests.serving.cases import STEPS, Case, gains, learned, prompts

ENGINE = {
    "device": "cpu",
    "skip_tokenizer_init": True,
    "disable_cuda_graph": True,
    "dtype": "float32",
    "context_length": 256,
    "chunked_prefill_size": 64,
    "max_running_requests": 8,
    "max_total_tokens": 1536,
    "mem_fraction_static": 0.6,
    "log_level": "error",
}
COMMAND = {
    "attention_backend": "tritonattn",
    "json_model_override_args": '{"tritonattn": {"scaling": "log_key_count"}}',
}
# SGLang turns the channels of q and k in weights of this class alone, as its rotary positions need them.
LLAMA4 = {"json_model_override_args": '{"architectures": ["Llama4ForConditionalGeneration"]}'}
CASES = {
    "two ranks": Case("llama", learned, {"tp_size": 2}),  # ssmax, the model's, key_norm_mean with gains
    "windows, softcap": Case("gemma2", learned),
    "settings of the command": Case("llama", "log_key_count", COMMAND | {"enable_mixed_chunk": True}),
    "the model's temperature": Case("ministral3", gains, {"page_size": 32}),
    "chunks, and the model's temperature": Case("llama4", gains, LLAMA4),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_patched_transformers(case, tmp_path):
    patched, plain = CASES[case].save(tmp_path / "model")
    runs = [prompts(), [prompts()[i] for i in (5, 3)]]
    engine = {"model_path": str(tmp_path / "model"), **ENGINE, **CASES[case].options}
    (tmp_path / "given.json").write_text(json.dumps({"engine": engine, "runs": runs, "steps": STEPS}))
    command = [sys.executable, "-m", "tests.serving.sglang.once", tmp_path / "given.json", tmp_path / "out.json"]
    subprocess.run(command, check=True, timeout=900)
    found = json.loads((tmp_path / "out.json").read_text())
    assert max(x["cached"] for x in found[0]) >= 64  # of a prompt that begins alike
    assert min(x["cached"] for x in found[1]) >= 64
    made, tokens = [x["made"] for run in found for x in run], [x for run in runs for x in run]
    assert unlike(patched, tokens, made) == 0
    assert unlike(plain, tokens, made) > STEPS


@torch.no_grad()
def unlike(model, tokens: list[list[int]], made: list[list[int]]) -> int:
    """Generated tokens that are not the model's."""
    logits = (model(torch.tensor([x + y])).logits[0, len(x) - 1 : -1] for x, y in zip(tokens, made, strict=True))
    return sum(int((x.argmax(-1) != torch.tensor(y)).sum()) for x, y in zip(logits, made, strict=True))


REFUSED = {
    "a patched checkpoint": (lambda model: tritonattn.huggingface.patch(model, scaling="log_key_count"), {}),
    "settings of the command": ("log_key_count", COMMAND),
}
MESSAGES = ("Unknown quantization method: needs_tritonattn", "attention_backend")


@pytest.mark.parametrize(("case", "message"), zip(REFUSED, MESSAGES, strict=True))
def test_what_needs_the_plugin_is_refused_without_it(case, message, tmp_path):
    scaling, options = REFUSED[case]
    Case("llama", scaling).save(tmp_path)
    given = json.dumps({"model_path": str(tmp_path), **ENGINE, **options})
    program = f"from sglang.srt.entrypoints.engine import Engine; Engine(**__import__('json').loads({given!r}))"
    code = f"if __name__ == '__main__':\n    {program}; print('served')"
    (tmp_path / "serve.py").write_text(code)
    without = os.environ | {"SGLANG_PLUGINS": "none"}
    done = subprocess.run([sys.executable, tmp_path / "serve.py"], env=without, capture_output=True, text=True)
    assert done.returncode != 0
    assert "served" not in done.stdout
    assert message in done.stderr
