# The ways to build and check k42. `make` alone says what there is.
#
# Everything is kept inside the checkout and made on first use: an environment folder for each interpreter, and
# build/. PYTHON=/path/to/python chooses another interpreter, which gets an environment of its own, such as
# .venv-3.13t; both can stand side by side.

ifeq ($(origin PYTHON),undefined)
PYTHON := python3
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys, sysconfig; \
	print("%d.%d" % sys.version_info[:2] + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""))')
endif

BIN := $(VENV)/bin
# Folders are among the sources so that a file that comes or goes is seen too.
NATIVE := $(shell find native -type d -o -name '*.cpp' -o -name '*.hpp')
FORMATTED := $(shell find native tests/core -name '*.cpp' -o -name '*.hpp')
SANITIZERS := thread address

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
MAKEFLAGS += --no-print-directory

.DELETE_ON_ERROR:
.PHONY: help build test demo docs lint types core format clean $(SANITIZERS:%=core-%)

help: ## this list
	@echo 'usage: make TARGET [PYTHON=/path/to/python]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 \t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

build: $(VENV)/.built ## the environment folder with k42 in it, editable, and what its tests need

test: $(VENV)/.built ## build, then run the tests; what is skipped is listed with its reason
	$(BIN)/python -m pytest

demo: $(VENV)/.built ## grep and memclone on Linux and on k42: one table, and a plot in out/demo.png
	$(BIN)/k42 demo

lint: $(VENV)/.lint ## ruff (rules and format) and clang-format, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

types: $(VENV)/.lint $(VENV)/.built ## mypy, strict; and what pyright sees in references
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs $(VENV)/.built ## the reference pages, from the docstrings, in out/docs
	$(BIN)/pdoc --docformat google --output-directory out/docs k42 k42.objects.processors k42.structures k42.vm k42.testing k42.experiments k42.sim k42.sim.models

core: $(SANITIZERS:%=core-%) ## the stress programs of tests/core under ThreadSanitizer and AddressSanitizer

$(SANITIZERS:%=core-%): core-%:
	cmake -S . -B build/core-$* -DCMAKE_BUILD_TYPE=RelWithDebInfo -DK42_CORE_TESTS=ON -DK42_SANITIZER=$*
	cmake --build build/core-$*
	ctest --test-dir build/core-$* --output-on-failure --no-tests=error --timeout 300

format: $(VENV)/.lint ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(FORMATTED)

clean: ## remove all that was made: environments, builds, caches, output
	rm -rf build dist out .venv .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A list of requirements in pyproject.toml, one a line.
requirements = $(BIN)/python -c 'import tomllib; \
	pyproject = tomllib.load(open("pyproject.toml", "rb")); print(*pyproject$(1), sep="\n")'

# A link to an interpreter that has gone counts as absent, so the folder is then made anew.
$(BIN)/python:
	$(PYTHON) -m venv --clear $(VENV)

# Without build isolation an incremental build takes seconds: the build tool stays, and so does CMake's cache.
# What k42 needs comes as wheels only: pip then takes the newest releases that have one for this interpreter.
$(VENV)/.built: pyproject.toml CMakeLists.txt $(NATIVE) $(BIN)/python
	$(call requirements,["build-system"]["requires"]) > $@.txt
	$(BIN)/pip install --quiet -r $@.txt
	$(BIN)/pip install --quiet --no-build-isolation --only-binary :all: -e '.[test]'
	@touch $@

# The tools of the checks need no built k42.
$(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: pyproject.toml $(BIN)/python
	$(call requirements,["project"]["optional-dependencies"]["$*"]) > $@.txt
	$(BIN)/pip install --quiet -r $@.txt
	@touch $@
