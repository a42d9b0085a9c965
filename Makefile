PYTHON ?= python3

BIN := .venv/bin
STAMP := .venv/installed
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What runs with other releases of torch: the newest by default, and all tests of the engine.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints-newest.txt)
TORCH_ENV = .venv-torch-$(TORCH)
# A limit on torch in pip's own configuration gives way to PIP_CONSTRAINT, but not to an argument.
TORCH_PIP = PIP_CONSTRAINT=$(@D)/constraints.txt $(@D)/bin/python -m pip install --quiet --disable-pip-version-check
TESTS ?= $(addprefix tests/,distributed engine inner layers nn planning properties solvers testing verify zoo)

.PHONY: help env demo bench docs test test-torch mutation lint format wheel-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

env: $(STAMP) ## create .venv and install the checkout in it, editable

# torch goes first and alone, so that the pinned build is there before a package asks for a range.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) torch
	$(BIN)/python $(PIP_INSTALL) --editable '.[train,text,examples,dev]'
	@touch $@

demo: env ## memory and accuracy of the strategies, on real characters (4 minutes)
	$(BIN)/imaml compare --out runs/demo

bench: env ## time and memory of a meta-gradient beside other libraries (most of an hour, on an idle machine)
	$(BIN)/python -m benchmarks.compare

docs: .venv-docs/installed ## build the site into build/site, strictly: no link of it leads nowhere
	.venv-docs/bin/python docs/site/build.py

.venv-docs/installed: requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-docs.txt
	@touch $@

test: env ## run the tests, on two cores
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-torch: $(TORCH_ENV)/installed ## run the engine's tests with another torch: TORCH=2.9.1 (7 GB)
	$(TORCH_ENV)/bin/python -m pytest --numprocesses 2 --dist worksteal $(TESTS)

.venv-torch-%/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	sed 's/^torch==.*/torch==$*/' constraints.txt > $(@D)/constraints.txt
	$(TORCH_PIP) torch && $(TORCH_PIP) --editable '.[scipy,testing]' pytest-xdist \
	|| { echo "torch $* cannot be installed: see what pip says above, and choose a release by TORCH=..." >&2; exit 1; }
	@touch $@

# mutmut wants both packages side by side. MUTANTS='*_cg.*' runs a part: patterns of mutants' names.
mutation: env ## break the numerical core on purpose and count what the tests notice (hours)
	$(BIN)/python $(PIP_INSTALL) --editable '.[mutation]'
	rm -rf build/mutation
	mkdir -p build/mutation
	cp -r imaml solvers/imaml_solvers tests benchmarks/mutation/conftest.py benchmarks/mutation/pyproject.toml \
	build/mutation
	cd build/mutation && OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=mutation \
	../../$(BIN)/mutmut run $(foreach m,$(MUTANTS),'$(m)')
	$(BIN)/python benchmarks/mutation/summary.py build/mutation

lint: env ## check style, docstrings and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: env ## apply the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Only the core dependencies, and a working folder with a module `solvers` that must never be imported.
wheel-check: env ## build the wheel and import it in a clean environment
	rm -rf build/wheel-check
	$(BIN)/python -m build --outdir build/wheel-check . >/dev/null
	$(PYTHON) -m venv build/wheel-check/venv
	build/wheel-check/venv/bin/python $(PIP_INSTALL) torch
	build/wheel-check/venv/bin/python $(PIP_INSTALL) build/wheel-check/*.whl
	mkdir build/wheel-check/elsewhere
	echo 'raise ImportError("the user'\''s own solvers.py was imported")' > build/wheel-check/elsewhere/solvers.py
	cd build/wheel-check/elsewhere && ../venv/bin/python -c 'import imaml, imaml_solvers; print(imaml.__file__)'
	rm -rf build/wheel-check/venv

clean: ## remove the environment, caches and products
	rm -rf .venv .venv-docs .venv-torch-* build dist runs .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find imaml solvers tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
