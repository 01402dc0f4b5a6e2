# Afina: what a newcomer runs, and what the project's own checks run. `make` alone lists it.
#
#   PYTHON=python3.13   the Python that makes the environment (3.11 or newer)
#   VENV=.venv          where the environment lies
#   ARGS="-k recipe"    passed on to pytest by `make test`, to the measurement by `make bench`
#
# A GPU or CPU-only torch: see the head of constraints.txt.

VENV   ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
ARGS   ?=

bin    := $(VENV)/bin
ready  := $(VENV)/.afina-ready
peer   := .venv-peer

.DEFAULT_GOAL := help
.PHONY: help install demo test torture fuzz lint format bench messages clean
.DELETE_ON_ERROR:

help: ## list these
	@echo "Afina: from a file of examples to a language model that answers."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One environment serves all targets. The stamp is written only after a complete install, so an interrupted one is
# taken up again, and it makes every later call instant. The demo alone needs no
# linters, but they are a twentieth of what is installed, and one environment is one thing to explain.
$(ready): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Afina needs Python 3.11 or newer, and none was found. Install one, or name it: make PYTHON=/path/to/python3.13"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "$(PYTHON) is not a Python 3.11 or newer. Name another one: make PYTHON=/path/to/python3.13"; exit 1; }
	@$(bin)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "The environment $(VENV) could not be made. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): one to three minutes, most of it torch ..."
	@$(bin)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[eval,lm-eval,gguf-run,qlora,parquet,serve,translate,zstd,dev]" || { echo "The installation failed: pip says why above. After mending it, run make again; it goes on from here."; exit 1; }
	@touch $@

install: $(ready) ## only the environment; every other target makes it too

demo: $(ready) ## fine-tune, evaluate, export and ask the bundled model: three minutes, no GPU, no network
	@rm -rf runs/demo
	@$(bin)/afina run recipes/sentiment.yaml --out runs/demo

test: $(ready) ## every test, slow ones too, on two workers
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(bin)/python -m pytest -n 2 --dist worksteal --durations=10 $(ARGS)

fuzz: $(ready) ## two million mutated files for the GGUF reader: half a minute
	@PYTHONPATH=tests $(bin)/python -m model.fuzz_gguf 2000000 $(ARGS)

torture: $(ready) ## a thousand kills and signals on real trainings: not one bit may differ; ten minutes
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 AFINA_TORTURE=84 $(bin)/python -m pytest -n 2 --dist worksteal -s -m slow tests/train/test_kill.py $(ARGS)

lint: $(ready) ## ruff, mypy, the floors of the house
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@$(bin)/lint-imports --no-cache | tail -n 4

format: $(ready) ## let ruff put the source in order
	@$(bin)/ruff check --fix-only --quiet .
	@$(bin)/ruff format .

bench: $(ready) $(peer)/.ready ## measure speed and memory here beside TRL; decides no test
	@$(bin)/python benchmarks/train_cpu.py --peer $(peer)/bin/python $(ARGS)

bench-gpu: $(ready) ## measure on this GPU beside the peers that are installed in the environment, and the floor
	@$(bin)/python benchmarks/gpu.py $(ARGS)

# What Afina is measured against has an environment of its own, with the same torch, transformers and PEFT.
$(peer)/.ready: constraints.txt $(ready)
	@$(bin)/python -m venv $(peer)
	@$(peer)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch peft trl==1.16.0 datasets==5.2.0
	@touch $@

messages: $(ready) ## gather every message of the source into the Spanish catalogue, and compile it
	@$(bin)/python tools/messages.py

clean: ## remove the environment, the caches and runs/demo; other runs stay
	@rm -rf $(VENV) $(peer) runs/demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	@rm -rf src/*.egg-info
