# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment in .venv first.
VENV ?= .venv
PYTHON ?= python3
PYTEST ?=
WORKERS ?= 2
SCORECARD ?=
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-oldest test-newest scorecard check lint format docs notebook clean

demo: $(VENV)/.installed  ## train the model that comes with the project, and see what it learned
	@$(RUN) -m sftx.demo

test: $(VENV)/.installed-dev  ## everything that must pass before a change goes in; PYTEST="-m slow" adds arguments
	@$(MAKE) --no-print-directory lint; lint=$$?; OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) $(PYTEST); tests=$$?; exit $$((lint || tests))

test-oldest:  ## the tests with the oldest torch and transformers that are supported, in .venv-oldest; PYTEST as above
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet torch==2.11.0
	.venv-oldest/bin/python -m pip install --quiet transformers==5.17.0 --editable ".[dev]"
	.venv-oldest/bin/python -m pytest $(PYTEST)

test-newest:  ## the tests with the newest torch and transformers that install, in .venv-newest; PYTEST as above
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade torch
	.venv-newest/bin/python -m pip install --quiet --upgrade transformers peft --editable ".[dev]"
	.venv-newest/bin/python -m pytest $(PYTEST)

scorecard: $(VENV)/.installed-dev  ## checks of what a run must survive; SCORECARD="only=7,11 json=FILE" adds arguments
	@PYTHONPATH=$(CURDIR)/tests:$$PYTHONPATH $(RUN) -m scorecard $(SCORECARD)

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(VENV)/.installed-docs  ## pages made from the code, then the site, in build/site
	$(RUN) -m sftx schema format=markdown > docs/settings.md
	$(RUN) -m sftx schema format=python > keywords.tmp && mv keywords.tmp src/sftx/settings/keywords.py
	$(RUN) scripts/reference.py
	$(RUN) -m zensical build --clean --strict

notebook: $(VENV)/.installed-docs $(VENV)/.installed-dev  ## the tutorial as a notebook, run anew: some minutes, and a model of 93 MB
	$(RUN) scripts/notebook.py

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .pytest_cache .ruff_cache .hypothesis build

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; name one: make demo PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that nothing after it can choose another build of it.
$(VENV)/.installed: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV): a few minutes the first time, nothing the next."
	$(INSTALL) torch==2.13.0 --constraint requirements.txt
	$(INSTALL) --requirement requirements.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-docs: requirements-docs.txt $(VENV)/.installed
	$(INSTALL) --requirement requirements-docs.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(INSTALL) --requirement requirements-dev.txt
	@touch $@
