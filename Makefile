# make demo | test | test-slow | test-lowest | lint | docs | test-gpu | clean. The first call makes .venv with the pinned packages of constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# A second environment, with the lowest versions that pyproject.toml allows.
LOWEST := .venv-lowest
EXTRAS := train,export,tensorrt-rtx,streams,dev,docs
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# Two workers by default: give WORKERS=8 on a larger machine.
WORKERS ?= 2

.PHONY: demo test test-slow test-lowest lint docs fuzz test-gpu clean
.DEFAULT_GOAL := help
.PHONY: help

help:
	@echo "make demo        the whole pipeline on generated images: export, engine, video, validation, report (in demo/)"
	@echo "make test        lint, types and tests"
	@echo "make test-slow   the tests that take minutes: a whole engine of lite0 on host memory"
	@echo "make test-lowest the tests with the lowest versions that pyproject.toml allows, in an environment of their own"
	@echo "make lint        lint, spelling, types and the direction of imports only"
	@echo "make docs        the documentation as a site (in site/)"
	@echo "make fuzz        ten minutes of damaged and odd files of each kind; findings in .fuzz/findings"
	@echo "make test-gpu    the tests that need an NVIDIA GPU"
	@echo "make clean       remove .venv, .venv-lowest, demo/, site/ and caches"

# $(call set_up,ENVIRONMENT,CONSTRAINTS,PYTHONS) makes a virtual environment by the first of PYTHONS that works and installs the project into it.
# A candidate is run, not only looked for: a version manager's shim may exist and fail.
define set_up
	@set -eu; \
	python=; \
	for candidate in $${PYTHON:-} $(3) python3; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then \
	        python=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "No Python 3.10, 3.11, 3.12 or 3.13 with the venv module was found:" \
	         "install one (on Debian and Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3 ..." >&2; \
	    exit 1; \
	fi; \
	echo "Setting up $(1) with $$($$python --version): some minutes and a few GB, once." >&2; \
	rm -f $(1)/.installed; \
	"$$python" -m venv --clear $(1); \
	$(1)/bin/python $(PIP_INSTALL) --constraint $(2) --editable '.[$(EXTRAS)]' || { $(INSTALL_FAILED); }
endef
INSTALL_FAILED := echo "The packages could not be installed: the lines above say which; check the network and the free disk space, \
then run make again." >&2; exit 1

$(READY): pyproject.toml constraints.txt
	$(call set_up,$(VENV),constraints.txt,python3.12 python3.13 python3.11 python3.10)
	@{ $(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --no-deps --target $(VENV)/stubs tensorrt-stubs && \
	$(BIN)/python scripts/tensorrt_stubs.py $(VENV)/stubs; } || { $(INSTALL_FAILED); }
	@touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(call set_up,$(LOWEST),constraints-lowest.txt,python3.10 python3.11 python3.12 python3.13)
	@touch $@

demo: $(READY)
	@$(BIN)/dynamask demo --output demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/mkdocs build --strict

test: lint
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --durations 15

test-slow: $(READY)
	$(BIN)/pytest --numprocesses $(WORKERS) --durations 15 -m minutes

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/pytest --numprocesses $(WORKERS) --dist loadfile --durations 15

fuzz: $(READY)
	$(BIN)/python -m tests.fuzzing

test-gpu: $(READY)
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("PyTorch finds no NVIDIA GPU here: dynamask doctor says why.")'
	TRITON_INTERPRET=0 $(BIN)/pytest --durations 15 -m gpu

clean:
	rm -rf $(VENV) $(LOWEST) demo site build dist *.egg-info .import_linter_cache .fuzz .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
