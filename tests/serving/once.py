"""Generate from the prompts of a file with an engine in this process: python -m tests.serving.once ARGUMENTS OUT."""

import json
import sys
from pathlib import Path

from .plain_ops import register

if __name__ == "__main__":
    register()
    from vllm import LLM, SamplingParams

    import tritonattn.huggingface  # noqa: F401, which applies settings to models of transformers

    given = json.loads(Path(sys.argv[1]).read_text())
    sampling = SamplingParams(temperature=0, max_tokens=given["steps"], ignore_eos=True, detokenize=False)
    tokens = [{"prompt_token_ids": x} for x in given["prompts"]]
    outputs = LLM(**given["engine"]).generate(tokens, sampling, use_tqdm=False)
    Path(sys.argv[2]).write_text(json.dumps([list(x.outputs[0].token_ids) for x in outputs]))
