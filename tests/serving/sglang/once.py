"""Generate from runs of prompts with an engine: python -m tests.serving.sglang.once ARGUMENTS OUT.

A process of its own: an engine that fails ends the one that started it.
"""

import json
import sys
from pathlib import Path

from sglang.srt.entrypoints.engine import Engine

if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    sampling = {"temperature": 0, "max_new_tokens": given["steps"], "ignore_eos": True}
    engine = Engine(**given["engine"])
    runs = [engine.generate(input_ids=tokens, sampling_params=sampling) for tokens in given["runs"]]
    found = [[{"made": x["output_ids"], "cached": x["meta_info"]["cached_tokens"]} for x in run] for run in runs]
    Path(sys.argv[2]).write_text(json.dumps(found))
    engine.shutdown()
