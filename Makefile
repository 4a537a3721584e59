# Thin: each target is the commands README.md explains. Set-up is kept in stamp files, so a second call costs nothing.
# Another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# --no-build-isolation below: the extension is built with the setuptools and pybind11 of constraints.txt
PIP := $(PY) -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.hpp)

.PHONY: help setup test test-extras slurm-test parity bench quickstart clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make setup       .venv, torch, dependencies, csrc"
	@echo "make quickstart  corpus -> tokenizer -> pretraining on 2 CPU ranks -> curve -> Hugging Face folder -> sample"
	@echo "make test        the whole test suite"
	@echo "make test-extras tests of optional packages (NVIDIA DALI), which it installs into .venv"
	@echo "make slurm-test  jobs on a real Slurm, which it installs (Debian, as root) and starts for the tests alone"
	@echo "make parity      every layout against one rank; writes docs/parity.md"
	@echo "make bench       every benchmark"
	@echo "make clean       build outputs and the quickstart's work folder (.venv stays)"

setup: $(VENV)/.installed

# torch comes first and alone, so that nothing else chooses its build. Without an NVIDIA driver the CPU build is tried first
# (from wherever pip is told to look), then the default build, which runs on a CPU too but is much larger.
TORCH = $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("Python 3.11 or 3.12 is needed, and $(PYTHON) is %d.%d; try make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools pybind11
	@echo "installing $(TORCH)"
	@if command -v nvidia-smi >/dev/null; then $(PIP) install -q $(TORCH); \
	else $(PIP) install -q $(TORCH)+cpu 2>/dev/null || $(PIP) install -q $(TORCH); fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "installing dependencies, building csrc"
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

test: $(VENV)/.installed
	$(PY) -m pytest tests -n 2 --dist loadfile

# A second stamp, so that the suite itself stays without them.
$(VENV)/.extras: $(VENV)/.installed
	@echo "installing NVIDIA DALI"
	$(PIP) install -q -c constraints.txt nvidia-dali-cuda130
	@touch $@

test-extras: $(VENV)/.extras
	$(PY) -m pytest tests/extras

slurm-test: $(VENV)/.installed
	sh tests/slurm/install.sh
	TRIREME_SLURM=1 $(PY) -m pytest tests/slurm

parity: $(VENV)/.installed
	$(PY) tests/parity_table.py --write docs/parity.md

bench: $(VENV)/.installed
	@set -e; for entry in benchmarks/[!_]*.py; do echo "== $$entry"; $(PY) $$entry; done

include examples/quickstart/steps.mk

clean:
	rm -rf build dist *.egg-info engine/_csrc*.so examples/*/work $(VENV)/.installed $(VENV)/.extras
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
