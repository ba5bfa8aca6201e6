"""vLLM's attention backend TRITONATTN: a patched model keeps its scaling where it is served.

An installed tritonattn is all: vLLM calls `register` in each of its processes. A checkpoint that was saved
with a patch then runs on this backend. So does another model with LLM(..., attention_backend="TRITONATTN",
additional_config={"tritonattn": {...}}). Its entries are those of config.tritonattn: `scaling`, `gain`, `backend` and
`batch_invariant` for all layers, or {"layers": {name: {...}}}. Every other model is served as if tritonattn was not
installed.

plugin     called by vLLM: the backend's registration and choice
settings   where vLLM has the settings, and a patch's weights
pages      the cells of vLLM's cache
backend    vLLM's interface: metadata of a step, cache writes; the calls of tritonattn are in `serving`
"""

NAME = "TRITONATTN"
