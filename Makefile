# make bench | test | test-integrations | test-sanitize | lint | docs | wheel | step : each makes the environment that it needs.
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
OLD_TORCH ?= torch==2.13.0
VENV ?= .venv
ABI_VENV ?= .venv-abi
BIN := $(VENV)/bin
CSRC := $(shell find csrc -type f)
# A process for each core.
PARALLEL := -n auto --dist worksteal

.PHONY: bench test test-integrations test-abi test-sanitize lint format docs wheel step clean

# A few minutes; without the options it is every method on every embedded task, which takes hours.
bench: $(VENV)/ready
	$(BIN)/python -m bench run --tasks digits-mlp,digits-cnn,mnist1d,fm14 --ruleset lr-only --trials 5 --tune-seeds 1 \
	  --methods sgd,adam,adam-half,adamw,diffgrad,adabelief --out runs
	$(BIN)/python -m bench report runs --html runs/report.html

test: $(VENV)/ready
	$(BIN)/pytest -q $(PARALLEL)

test-integrations: $(VENV)/integrations
	$(BIN)/pytest -q tests/integrations

step: $(VENV)/peers
	$(BIN)/python -m bench.step --md

# The wheel that was built against one torch, in an environment with another; away from the sources, so that it is the
# wheel that is tested.
test-abi: wheel $(ABI_VENV)/ready
	$(ABI_VENV)/bin/pip install -q --no-deps --force-reinstall dist/optimzoo-*.whl
	rm -rf build/abi && mkdir -p build/abi && cp -r tests setup.cfg build/abi
	cd build/abi && ../../$(ABI_VENV)/bin/python -P -c "import optimzoo; print(optimzoo.__file__)" | grep site-packages
	cd build/abi && ../../$(ABI_VENV)/bin/pytest -q tests/test_native.py tests/test_reference.py

# The tests of the native steps against a library that watches every access of memory and what the language leaves
# undefined. The sanitizers' libraries have to be there before Python is; Python's own allocations count as leaks.
SANITIZERS := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer
test-sanitize: $(VENV)/ready
	rm -rf build/sanitize && mkdir -p build/sanitize/optimzoo
	cp -r tests csrc setup.cfg build/sanitize && cp optimzoo/*.py build/sanitize/optimzoo
	cd build/sanitize && CXXFLAGS='-O1 -g $(SANITIZERS)' ../../$(BIN)/python -c "import subprocess; \
	  from optimzoo import _build; subprocess.run(_build._commands(_build.Path('optimzoo'))[0], check=True)"
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ../../$(BIN)/python -m pytest -q $(PARALLEL) --hypothesis-profile quick tests/test_native.py tests/test_schemas.py \
	  tests/test_random.py tests/test_reference.py tests/test_laws.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

docs: $(VENV)/ready
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	$(BIN)/sphinx-build -W -q -b doctest docs docs/_build/doctest
	$(BIN)/pytest -q tests/site

wheel: $(VENV)/ready
	rm -rf build dist
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

$(VENV)/ready: setup.cfg pyproject.toml optimzoo/_build.py $(CSRC)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH) 'setuptools>=77'
	$(BIN)/pip install -q --no-build-isolation -e '.[bench,test,lint,docs]'
	touch $@

$(VENV)/peers: $(VENV)/ready
	$(BIN)/pip install -q -e '.[peers]' --no-build-isolation
	touch $@

$(VENV)/integrations: $(VENV)/ready
	$(BIN)/pip install -q -e '.[integrations]' --no-build-isolation
	touch $@

$(ABI_VENV)/ready: setup.cfg
	test -x $(ABI_VENV)/bin/python || $(PYTHON) -m venv $(ABI_VENV)
	$(ABI_VENV)/bin/pip install -q $(OLD_TORCH) numpy pytest hypothesis
	touch $@

clean:
	rm -rf build dist runs docs/_build optimzoo/*.so
