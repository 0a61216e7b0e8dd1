# Two commands need nothing but Python 3.11+ and make: `make demo` and `make test`. Both make .venv once, under constraints.txt.
#   make demo [HISTORY=FILE] [MODEL=FOLDER-OR-HUB-NAME]    the main job, end to end, on the embedded default; then served over HTTP
#   make test [ARGS="-k name"]     the whole suite       make check   format, lint, types, import rules
#   make proof                     the long proofs        make bench   the benchmarks       make gpu   what needs CUDA
#   make clean                     removes what runs made

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# The first Python that runs and is new enough; constraints.txt is what 3.11 was tested with.
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13; do \
  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)
VENV ?= .venv
RUN := $(VENV)/bin/python
# A stamp holds the digest of what was installed, so that an edit of pyproject.toml or constraints.txt installs again, and nothing else does.
WANTED := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' -)
DEMO_STAMP := $(VENV)/.installed-demo-$(WANTED)
DEV_STAMP := $(VENV)/.installed-dev-$(WANTED)
BENCH_STAMP := $(VENV)/.installed-bench-$(WANTED)
# The S3 server of the tests wants another botocore than s3fs: an environment of its own.
S3_VENV ?= .venv-s3
S3_STAMP := $(S3_VENV)/.installed-$(shell cat tests/s3-server.txt 2>/dev/null | cksum | tr ' ' -)
# The vllm engine's tests want vLLM's own torch: an environment of its own, too.
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed-$(shell cat tests/vllm.txt 2>/dev/null | cksum | tr ' ' -)
# LiteLLM wants an older openai than the tests' own.
LITELLM_VENV ?= .venv-litellm
LITELLM_STAMP := $(LITELLM_VENV)/.installed-$(shell cat tests/litellm.txt 2>/dev/null | cksum | tr ' ' -)
# Tests at a time: those on Ray one after another in one process, all others in the rest; they wait more than they compute. JOBS=1: all in one.
JOBS ?= 2
# One compute thread a process unless told otherwise: tests and the demo run several workers on a small machine.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test gpu check proof bench clean

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile

demo: $(DEMO_STAMP)
	@$(RUN) -m pipelines.demo $(if $(HISTORY),--history "$(HISTORY:~%=$(HOME)%)") $(if $(MODEL),--model "$(MODEL)") $(ARGS)$(if $(HISTORY),, && $(RUN) -m serving.demo $(ARGS))

test: $(DEV_STAMP) $(S3_STAMP)
	@$(RUN) -m pytest -q --durations=15 $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadscope --no-loadscope-reorder) -m "not proof and not gpu" $(ARGS)

gpu: $(DEV_STAMP)
	@$(RUN) -m pytest -q --durations=15 -m gpu $(ARGS)

check: $(DEV_STAMP)
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy
	@$(RUN) -m pytest -q tests/test_architecture.py

proof: $(DEV_STAMP) $(S3_STAMP) $(VLLM_STAMP) $(LITELLM_STAMP)
	@$(RUN) -m pytest -q -s --durations=0 -m proof $(ARGS)

bench: $(BENCH_STAMP) $(S3_STAMP)
	@for file in benchmarks/*.py; do echo "== $$file"; $(RUN) "$$file" $(ARGS); done

clean:
	rm -rf runs adapters prepared .demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(RUN):
	@"$(or $(PYTHON),python3)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed (found: $$(python3 --version 2>&1 || true)); install it, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "this Python cannot make environments: install its venv package (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv "$(VENV)"

$(DEMO_STAMP): | $(RUN)
	@$(call install,train$(comma)serve$(comma)k8s)
	@rm -f $(VENV)/.installed-demo-*; touch $@

$(DEV_STAMP): $(DEMO_STAMP)
	@$(call install,train$(comma)serve$(comma)eval$(comma)otel$(comma)dev)
	@rm -f $(VENV)/.installed-dev-*; touch $@

$(BENCH_STAMP): $(DEV_STAMP)
	@$(call install,train$(comma)serve$(comma)eval$(comma)otel$(comma)dev$(comma)bench)
	@rm -f $(VENV)/.installed-bench-*; touch $@

$(S3_STAMP): | $(RUN)
	@echo "installing the S3 server of the tests in $(S3_VENV) (once)"
	@"$(PYTHON)" -m venv --clear "$(S3_VENV)"
	@"$(S3_VENV)/bin/python" -m pip install --disable-pip-version-check --quiet -r tests/s3-server.txt
	@touch $@

# torchvision and its like come with vLLM for other builds of torch, and then do not load.
$(VLLM_STAMP): | $(RUN)
	@echo "installing vLLM for its engine's tests in $(VLLM_VENV) (once; some minutes, 3 GB)"
	@"$(PYTHON)" -m venv --clear "$(VLLM_VENV)"
	@"$(VLLM_VENV)/bin/python" -m pip install --disable-pip-version-check --quiet -r tests/vllm.txt
	@"$(VLLM_VENV)/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(LITELLM_STAMP): | $(RUN)
	@echo "installing LiteLLM for its test in $(LITELLM_VENV) (once)"
	@"$(PYTHON)" -m venv --clear "$(LITELLM_VENV)"
	@"$(LITELLM_VENV)/bin/python" -m pip install --disable-pip-version-check --quiet -r tests/litellm.txt
	@touch $@

comma := ,
# Byte code of what is rarely imported is left to its first import: a third of all files. (torch imports sympy: not rare.)
RARELY := transformers/models/(?!auto|qwen2/|llama/)|/tests?/|/testing/
# Without a GPU, the default torch wheel for Linux brings gigabytes of CUDA: PIP_EXTRA_INDEX_URL may name PyTorch's CPU wheels instead.
define install
echo "installing ftcore[$(1)] under constraints.txt (once; about a minute, 2 GB)"; \
if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ -z "$${PIP_EXTRA_INDEX_URL:-}$${PIP_INDEX_URL:-}" ]; then \
  echo "no GPU seen: if pip downloads CUDA packages, set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels and start again (README, Install)"; fi; \
$(RUN) -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt -e '.[$(1)]'; \
echo "compiling"; $(RUN) -m compileall -q -j 0 -x '$(RARELY)' "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >/dev/null || true
endef
