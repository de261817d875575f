# Bootstraps an environment and starts what lives elsewhere.

PRESET ?= demo
DATA ?=
JOBS ?=
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)

# Remade when the lock or the project changes. The stamp is written last, so that an install
# that was cut off starts afresh. --python: an active conda environment is left alone.
INSTALLED := .venv/.installed
UV_INSTALL = .venv/bin/uv pip install --python .venv/bin/python --no-deps

.PHONY: help reproduce smoke plan lab explorer site pretrained test test-fast bench lock

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s  %s\n", $$1, $$2}' Makefile
	@echo 'Variables of reproduce, smoke, plan, site and pretrained, as in "make reproduce PRESET=cifar10-small DATA=folder":'
	@echo '  PRESET  a file of presets/: smoke, demo (default), cifar10-small, paper, or a path'
	@echo '  DATA    folder of CIFAR or of your own images; smoke and demo need none'
	@echo '  JOBS    notebooks beside each other (default: all cores)'
	@echo 'PYTHON names the Python 3.11 that the environment .venv is made from.'

reproduce:  ## make every table and figure of PRESET (the first run installs .venv)
smoke:  ## the same graph at its smallest, to see that everything runs
smoke: override PRESET = smoke
reproduce smoke: $(INSTALLED)
	.venv/bin/python -m immunity_lib.reproduce --preset $(PRESET) \
		$(if $(DATA),--data "$(DATA)") $(if $(JOBS),--jobs $(JOBS))

plan: $(INSTALLED)  ## print what PRESET would cost, before anything runs
	.venv/bin/python -m immunity_lib.plan --preset $(PRESET) $(if $(DATA),--data "$(DATA)")

lab: $(INSTALLED)  ## open the notebooks in JupyterLab, the explorer's first
	.venv/bin/jupyter lab notebooks/05_heatmaps.ipynb

# Each reader has a kernel of his own, with one thread: several of them share the cores
explorer: $(INSTALLED)  ## serve the explorer of notebook 05 as a page
	OMP_NUM_THREADS=1 .venv/bin/voila notebooks/05_heatmaps.ipynb --progressive_rendering=True

site: reproduce  ## make what is missing of PRESET, and all of it as plain HTML
	.venv/bin/python -m immunity_lib.site --preset $(PRESET)

pretrained: $(INSTALLED)  ## write the weights that come with the project from those in runs/
	.venv/bin/python -m immunity_lib.pretrained --preset $(PRESET) $(if $(DATA),--data "$(DATA)")

test: $(INSTALLED)  ## check the style and run all tests
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pytest

test-fast: $(INSTALLED)  ## run the tests that take seconds
	.venv/bin/python -m pytest -m "not slow"

bench: $(INSTALLED)  ## time the library beside its peers
	.venv/bin/python -m benchmarks

lock: $(INSTALLED)  ## write requirements.lock from pyproject.toml (pins that still fit stay)
	.venv/bin/uv pip compile pyproject.toml --quiet --extra test --generate-hashes \
		--no-emit-index-url --no-header --python-version 3.11 -o requirements.lock

NEEDS_PYTHON = import sys; found = sys.version.split()[0]; found.startswith("3.11.") or sys.exit( \
	"Python 3.11 is needed, but $(PYTHON) is Python " + found + \
	". Name the right one with: make PYTHON=/path/to/python3.11")

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c '$(NEEDS_PYTHON)'
	test -f $@ || $(PYTHON) -m venv --clear .venv
	rm -f $@
	.venv/bin/python -m pip install --quiet uv
	$(UV_INSTALL) --require-hashes -r requirements.lock
	$(UV_INSTALL) --no-build-isolation -e .
	touch $@
