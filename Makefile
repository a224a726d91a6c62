# make quickstart   install, fetch a small model and data, fine-tune it
# make test         install if needed, run the tests (ARGS="-k name" for some of them)
# make test-system  the tests that need root, the network, or more than Python (.ci/run installs it)
# make system       install what test-system needs besides
# make check        style, format and types
# make soak         kill a run at random for ten minutes, and compare (ARGS="--hosts 2": over two)
# make bench-peers  measure ours against TRL + PEFT + accelerate, in turn (ARGS="--arms ours,trl_fsdp2")
# make bench-7b     GiB and tokens/s of each setting (also bench-70b; bench-small needs no GPU)
# make lint         repair what ruff can repair
# make venv         install only
# make clean        remove the environment and the caches; models and runs stay
#
# PYTHON=python3.12       the Python that makes the environment (3.11 or newer)
# TORCH_INDEX=URL         where torch comes from, and nothing else does; empty: the default index
# JOBS=2                  how many tests run at a time; 0: one, as where there is a card
# REQUIRE_HQQ=1           fail when hqq cannot be installed

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := .ci/constraints.txt
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint $(PINS)
ARGS ?=
KERNEL_TESTS := tests/model/test_hqq.py tests/model/test_bnb_kernel.py tests/model/test_matmul.py tests/model/test_experts.py
JOBS ?= $(if $(HAS_CARD),0,2)

export PIP_ROOT_USER_ACTION := ignore

# The default index has the CUDA build of torch, several GB: without a card, find the CPU build.
HAS_CARD := $(shell command -v nvidia-smi 2>/dev/null)
ifndef CI
ifeq ($(HAS_CARD),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
endif

.PHONY: help venv test system test-system check lint quickstart bench-peers bench-7b bench-70b bench-small soak clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
		"error: $(PYTHON) is missing or older than 3.11; make PYTHON=python3.12 names another" >&2; exit 3; }
	@$(PYTHON) -m venv $(VENV) || { echo \
		"error: $(PYTHON) cannot make $(VENV); on Debian: apt-get install python3-venv" >&2; exit 3; }
	@echo "Installing torch into $(VENV) (0.2 GB without a card, about 3 GB with one) ..."
	@$(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX) $(PIP) --index-url $(TORCH_INDEX) --no-deps,$(PIP)) torch
	@echo "Installing fsdp_qlora and what it needs ..."
	@$(PIP) --editable '.[dev]' $(if $(HAS_CARD),liger-kernel)
	@$(PIP) --editable '.[hqq]' || { echo \
		"hqq could not be installed: train_type hqq_* will not work, everything else does" >&2; \
		test "$(REQUIRE_HQQ)" != 1; }
	@touch $@

test: venv
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --ignore=tests/system $(ARGS)

# Triton lies beside the environment: what else is tested must not depend on it.
system: $(VENV)/.system

$(VENV)/.system: $(VENV)/.installed
	@$(PIP) --target $(VENV)/triton --upgrade --no-deps triton
	@$(PIP) --editable '.[ray]'
	@touch $@

test-system: system
	@PYTHONPATH=$(VENV)/triton REQUIRE_TRITON=1 $(BIN)/python -m pytest -n 0 $(KERNEL_TESTS) $(ARGS)
	@$(BIN)/python -m pytest -n 0 tests/system $(ARGS)

check: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy fsdp_qlora
	@$(BIN)/mypy --strict --follow-imports silent --cache-dir .mypy_cache/api fsdp_qlora/__init__.py fsdp_qlora/api.py

lint: venv
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

quickstart: venv
	$(BIN)/python -m fsdp_qlora fetch smollm2
	$(BIN)/python -m fsdp_qlora fetch docstrings
	$(BIN)/python train.py --recipe quickstart --overwrite true

soak: venv
	$(BIN)/python -m tests.soak $(ARGS)

bench-peers: venv
	@$(PIP) --editable '.[peers]'
	$(BIN)/python recipes/peers/bench_peers.py $(ARGS)

bench-7b bench-70b bench-small: bench-%: venv
	$(BIN)/python -m fsdp_qlora bench $* $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find fsdp_qlora tests -name __pycache__ -type d -prune -exec rm -rf {} +
