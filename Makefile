# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment in .venv first.
VENV ?= .venv
PYTHON ?= python3
PYTEST ?=
WORKERS ?= 2
SCORECARD ?=
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check

# Of the machine that the wheels are for; WHEELS="bitsandbytes==0.50.2" adds packages
PYTHON_VERSION ?= 3.12
PLATFORM ?= x86_64
WHEELS ?=

.PHONY: demo test test-oldest test-newest scorecard check lint format docs notebook wheelhouse clean

demo: $(VENV)/.installed  ## train the model that comes with the project, and see what it learned
	@$(RUN) -m sftx.demo

test: $(VENV)/.installed-dev  ## everything that must pass before a change goes in; PYTEST="-m slow" adds arguments
	@$(MAKE) --no-print-directory lint; lint=$$?; OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST); tests=$$?; exit $$((lint || tests))

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

wheelhouse: $(VENV)/bin/python  ## wheels for a machine without internet that has torch and transformers, in wheelhouse/
	@rm -rf wheelhouse
	@$(RUN) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir wheelhouse .
	@$(RUN) -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --dest wheelhouse \
		--implementation cp --python-version $(PYTHON_VERSION) --platform manylinux_2_28_$(PLATFORM) \
		--platform manylinux_2_17_$(PLATFORM) --platform manylinux2014_$(PLATFORM) \
		--requirement requirements-offline.txt $(WHEELS)
	@test $$(du -sm wheelhouse | cut -f1) -le 60 || { echo "wheelhouse/ is larger than 60 MiB"; exit 1; }
	@echo "$$(ls wheelhouse/*.whl | wc -l) wheels for Python $(PYTHON_VERSION), $$(du -sm wheelhouse | cut -f1) MiB. Copy wheelhouse/ there, then:"
	@cp requirements-offline.txt wheelhouse/
	@echo "  python3 -m pip install --no-index --no-deps --find-links wheelhouse sftx -r wheelhouse/requirements-offline.txt"
	@echo "  python3 -m sftx doctor"

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .pytest_cache .ruff_cache .hypothesis build wheelhouse

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
