# Bootstraps an environment and starts what lives elsewhere.

PRESET ?= demo
DATA ?=
OUTPUT ?=
JOBS ?=
PROFILE ?=
TORCH ?=
# The first that runs: those of pyenv that are not chosen are there, and do not
PYTHON ?= $(shell for one in python3.12 python3.13 python3.11; do $$one -c "" 2>/dev/null && echo $$one && exit; done; \
	echo python3)

# What a shell says of Python and of installing, as modules of clusters do, is not meant for .venv; mirrors are
unexport PYTHONPATH PYTHONHOME PYTHONOPTIMIZE PYTHONWARNINGS PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT \
	UV_TORCH_BACKEND UV_TARGET UV_PREFIX UV_REQUIRE_HASHES UV_NO_BUILD UV_NO_BINARY UV_ONLY_BINARY
export PYTHONUTF8 = 1

# Remade when the lock or the project changes. The stamp is written last, so that an install
# that was cut off starts afresh. --python: an active conda environment is left alone.
INSTALLED := .venv/.installed
UV_INSTALL = .venv/bin/uv pip install --python .venv/bin/python --no-build-isolation

# By the environment: whatever quotes and spaces are in a path, the shell does not read it
export PRESET DATA OUTPUT JOBS PROFILE
WHAT = --preset "$$PRESET" $(if $(DATA),--data "$$DATA")
WHERE = $(if $(OUTPUT),--output "$$OUTPUT")

.PHONY: help reproduce smoke plan status lab explorer site pretrained test test-fast test-node bench lock

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s  %s\n", $$1, $$2}' Makefile
	@echo 'Variables, as in "make reproduce PRESET=smoke OUTPUT=folder":'
	@echo '  PRESET     $(patsubst presets/%.yaml,%,$(wildcard presets/*.yaml)), or a path (default: demo)'
	@echo '  DATA       folder of CIFAR or of your own images; smoke, demo and parts10 need none'
	@echo '  OUTPUT     where runs/ and figures/ go (default: here)'
	@echo '  JOBS       notebooks beside each other (default: all cores)'
	@echo '  PRETRAINED 1: make reproduce goes on from what comes with the project, in pretrained/'
	@echo '  CALIBRATE  1: make plan measures the speed of this machine, some ten seconds of each network'
	@echo '  PROFILE    where they run: gpu-node, slurm, or a path (default: on this machine)'
	@echo 'TORCH=cpu installs PyTorch without CUDA, 0.2 GB in place of 3; TORCH=cu126 for GPUs of 2017, as V100:'
	@echo 'both come from its own index, and are the only packages without a hash.'
	@echo 'PYTHON names the Python, 3.11 to 3.13, that the environment .venv is made from.'

reproduce:  ## make every table and figure of PRESET (the first run installs .venv)
smoke:  ## the same graph at its smallest, to see that everything runs
smoke: override PRESET = smoke
reproduce smoke: $(INSTALLED)
	.venv/bin/python -m study.graph.run $(WHAT) $(WHERE) $(if $(JOBS),--jobs "$$JOBS") \
		$(if $(PROFILE),--profile "$$PROFILE") $(if $(filter-out 0 no false,$(PRETRAINED)),--pretrained)

plan: $(INSTALLED)  ## print what PRESET would cost, before anything runs
	.venv/bin/python -m study.graph.plan $(WHAT) $(WHERE) $(if $(filter-out 0 no false,$(CALIBRATE)),--calibrate)

status: $(INSTALLED)  ## how far PRESET is, and when it will be done; from any machine
	.venv/bin/python -m study.graph.status $(WHAT) $(WHERE)

lab: $(INSTALLED)  ## open the notebooks in JupyterLab, the explorer's first
	.venv/bin/jupyter lab notebooks/05_heatmaps.ipynb

# Each reader has a kernel of his own, with one thread: several of them share the cores. It ends when
# its page has been closed, or left alone, for ten minutes. No pings: Voila reads no answer to one while
# the cells run, and where they take more than 90 seconds would never show the rest
explorer: $(INSTALLED)  ## serve the explorer of notebook 05 as a page
	OMP_NUM_THREADS=1 .venv/bin/voila notebooks/05_heatmaps.ipynb --progressive_rendering=True \
		--Voila.tornado_settings="{'ws_ping_interval':0}" \
		--MappingKernelManager.cull_idle_timeout=600 --MappingKernelManager.cull_interval=60

site: $(INSTALLED)  ## build site/, notebooks and figures as plain HTML, from what is there; PRESET first
	.venv/bin/python docs/build_site.py $(WHAT) $(WHERE)

pretrained: $(INSTALLED)  ## write the weights that come with the project from those in runs/
	.venv/bin/python pretrained/publish.py $(WHAT) $(WHERE)

test: $(INSTALLED)  ## check the style and run all tests but those of test-node
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pytest -m "not node" -n 2 --no-loadscope-reorder

test-fast: $(INSTALLED)  ## run the tests that take seconds
	.venv/bin/python -m pytest -m "not slow"

test-node: $(INSTALLED)  ## run the tests of faults, container and cluster, an hour or two
	.venv/bin/python -m pytest -m node

bench: $(INSTALLED)  ## time the library beside its peers
	.venv/bin/python -m benchmarks

lock: $(INSTALLED)  ## write requirements.lock from pyproject.toml (pins that still fit stay)
	.venv/bin/uv pip compile pyproject.toml --quiet --extra study --extra test --generate-hashes \
		--no-emit-index-url --no-header --universal --python-version 3.11 -o requirements.lock

NEEDS_PYTHON = import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	"Python 3.11, 3.12 or 3.13 is needed, but $(PYTHON) is Python " + sys.version.split()[0] + \
	". Name the right one with: make PYTHON=/path/to/python3.12")

$(INSTALLED): .venv/.packages pyproject.toml
	$(UV_INSTALL) --no-deps -e .
	touch $@

# Compiled once and not in each kernel, some six seconds where a folder is read-only or PYTHONDONTWRITEBYTECODE is set.
# setuptools first: a few packages are published as source alone, and are built with it
.venv/.packages: requirements.lock
	@$(PYTHON) -c '$(NEEDS_PYTHON)'
	test -f $@ || $(PYTHON) -m venv --clear .venv
	rm -f $@
	sed -nE '/^(uv|setuptools)==/,/[^\\]$$/p' requirements.lock > .venv/first.lock
	.venv/bin/python -m pip install --quiet --no-deps --require-hashes -r .venv/first.lock
	sed -E '/^(torch|torchvision|triton|nvidia-.*|cuda-.*)==/,/[^\\]$$/d' requirements.lock > .venv/without_torch.lock
	$(UV_INSTALL) --compile-bytecode --no-deps --require-hashes -r $(if $(TORCH),.venv/without_torch.lock,requirements.lock)
	$(if $(TORCH),$(UV_INSTALL) --compile-bytecode --torch-backend=$(TORCH) \
		$$(sed -nE 's/^(torch|torchvision)==([^ ]+).*/\1==\2/p' requirements.lock))
	touch $@
