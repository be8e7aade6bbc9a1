# Every target sets up what it needs; a second call sets up nothing. PYTHON=python3.12 make test picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-faults soak check bench golden clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:.*##/ -/'

.venv/ready: setup.py pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@extra=$$($(BIN)/apr doctor --extra) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,$$extra]"
	@touch $@

setup: .venv/ready  ## make .venv with apr installed in it, editable

demo: setup      ## train a small model on the standard library's source, about a minute on two cores
	@rm -rf runs/demo
	$(BIN)/apr pretrain --demo --run-dir runs/demo

test: setup      ## everything that needs no GPU
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m 'not long' tests/cpu tests/faults

test-gpu: setup  ## the tests of the GPU, on a machine that has one
	$(BIN)/python -m pytest -q tests/gpu --require-gpu --receipt docs/evidence/gpu-tests.json --falsify-receipt docs/evidence/falsify-gpu.json

test-faults: setup ## every fault of the catalogue that needs no GPU, the long ones too; the table is docs/faults.md
	$(BIN)/python tests/faults/rows.py run
	$(BIN)/python tests/faults/rows.py table

soak: setup      ## train, kill, damage, resume for SECONDS (1800) on DEVICE (cpu): the same bits as an undisturbed run
	$(BIN)/python tests/faults/soak.py --seconds $(or $(SECONDS),1800) --device $(or $(DEVICE),cpu)

check: setup     ## style and types: seconds, before every commit
	$(BIN)/ruff check . && $(BIN)/mypy

bench: setup     ## the demo model's training rate (beside PyTorch where PEER_PYTHON names an interpreter that has it)
	$(BIN)/python benchmarks/bench_train_cpu.py $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))
.PHONY: bench-gpu
bench-gpu: setup ## every kernel's time on a GPU, beside PyTorch where .venv has it; rows go to benchmarks/results
	$(BIN)/python benchmarks/bench_all.py

clean:           ## remove what the targets made, runs excepted
	rm -rf .venv build dist *.egg-info
