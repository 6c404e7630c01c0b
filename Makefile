# make help

# What pip installs as PyTorch, options included. On a GPU machine whose driver needs another
# build: make train TORCH='torch==2.13.0 --index-url URL'
TORCH ?= torch==2.13.0
# The interpreter; default: the first of python3, python3.13 ... python3.10 that fits.
PYTHON ?=
# Ranks: one per GPU where there are some, else two.
NPROC ?= $(shell .venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')
# More overrides for make train, such as ARGS='train.steps=50 run.name=short'
ARGS ?=

SETUP = @TORCH='$(TORCH)' PYTHON='$(PYTHON)' tools/setup_env.sh

.PHONY: help train test lint audit format docs env env-test clean

help:
	@echo 'make train   set up .venv and train the quickstart (NPROC, ARGS, TORCH, PYTHON)'
	@echo 'make test    set up .venv and run the test suite'
	@echo 'make lint    ruff, formatting, types'
	@echo 'make audit   installed packages: pins, known vulnerabilities (docs/safety.md)'
	@echo 'make format  let ruff format and fix'
	@echo 'make docs    write docs/configuration.md'
	@echo 'make env     only set up .venv for training; env-test: for tests too'
	@echo 'make clean   remove caches; runs/ and .venv stay'

env:
	$(SETUP) run

env-test:
	$(SETUP) test

train: env
	OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node $(NPROC) -m trainer.train experiment=quickstart $(ARGS)

test: env-test
	@tools/test.sh

lint: env-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

audit: env-test
	.venv/bin/python tools/audit.py

format: env-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: env-test
	.venv/bin/python -m configs.reference

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find configs launch parallel placement trainer tests -name __pycache__ -type d -prune -exec rm -rf {} +
