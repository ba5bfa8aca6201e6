"""SGLang's attention backend "tritonattn": a patched model keeps its scaling where it is served.

An installed tritonattn is all: SGLang calls `register` in each of its processes. A checkpoint that was saved with a
patch then runs on this backend. So does another model with --attention-backend tritonattn and
--json-model-override-args '{"tritonattn": {...}}', whose entries are those of config.tritonattn. Every other model is
served as if tritonattn was not installed.

plugin     called by SGLang: the backend's registration and choice, room for records of key norms
settings   where SGLang has the settings, a patch's weights, and what is refused of a server's settings
backend    SGLang's interface: metadata of a step, tables of pages; the calls of tritonattn are in `serving`
"""

NAME = "tritonattn"
OWNER = f"attention_backend {NAME}"
