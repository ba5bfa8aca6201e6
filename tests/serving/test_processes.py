"""The plugin in processes that vLLM starts: ranks of an engine, a server, kernels; and vLLM without the plugin."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
import tokenizers
import torch
import transformers

import tritonattn.huggingface

from .cases import STEPS, VOCABULARY, Case, learned, prompts

MANY = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
INTERPRETED = {"TRITON_INTERPRET": "1"}
RUNS = {
    "ranks": (Case("llama", learned, {"tensor_parallel_size": 2}), prompts(), STEPS, MANY),
    "models of transformers": (Case("llama", learned, {"model_impl": "transformers"}), prompts(), STEPS, {}),
    "kernels": (Case("llama", learned, {}), [x[-20:] for x in prompts()[:4]], 4, INTERPRETED),
}


@torch.no_grad()
def greedy(model, prompt: list[int], steps: int) -> list[int]:
    out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=steps, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("run", RUNS)
def test_tokens_are_those_of_patched_transformers(run, tmp_path):
    case, tokens, steps, environment = RUNS[run]
    patched, plain, engine = case.make(tmp_path / "model")
    given = {"engine": engine, "prompts": tokens, "steps": steps}
    (tmp_path / "given.json").write_text(json.dumps(given))
    command = [sys.executable, "-m", "tests.serving.once", tmp_path / "given.json", tmp_path / "out.json"]
    subprocess.run(command, check=True, env=os.environ | environment, timeout=600)
    got = json.loads((tmp_path / "out.json").read_text())
    assert got == [greedy(patched, x, steps) for x in tokens]
    assert got != [greedy(plain, x, steps) for x in tokens]


def test_a_server_answers_with_the_tokens_of_patched_transformers(tmp_path):
    patched, plain, engine = Case("llama", learned).make(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_gpu_blocks_override")
    options = [word for name in limits for word in (f"--{name.replace('_', '-')}", str(engine[name]))]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tmp_path), "--port", str(port)]
    server = subprocess.Popen([*command, "--dtype", "float32", "--enforce-eager", *options])
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-")
        got = [
            client.completions.create(
                model=str(tmp_path),
                prompt=prompt,
                max_tokens=STEPS,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            for prompt in prompts()[1:4]
        ]
    finally:
        server.terminate()
        server.wait(60)
    tokens = [x.choices[0].token_ids for x in got]
    assert tokens == [greedy(patched, x, STEPS) for x in prompts()[1:4]]
    assert tokens != [greedy(plain, x, STEPS) for x in prompts()[1:4]]


def wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


REFUSED = {
    "patched checkpoint": (
        Case("llama", lambda model: tritonattn.huggingface.patch(model, scaling="log_key_count")),
        "Unknown quantization method: needs_tritonattn",
    ),
    "settings of the command": (
        Case("llama", "log_key_count", {"attention_backend": "TRITONATTN"}),
        "Unknown attention backend: 'TRITONATTN'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_the_plugin_is_refused(case, tmp_path):
    model, message = REFUSED[case]
    _, _, arguments = model.make(tmp_path)
    program = f"import sys, vllm; vllm.LLM(**{arguments!r}); print('served', 'tritonattn' in sys.modules)"
    without = {**os.environ, "VLLM_PLUGINS": "plain_ops"}
    done = subprocess.run([sys.executable, "-c", program], env=without, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "served" not in done.stdout
    assert message in done.stderr
