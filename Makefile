# make demo, make test, make lint, make docs: each does all its own set-up, from a fresh clone, in .venv.
# make records-check: which published figures are of other sources than the present.
# make test-oldest: as make test, with the oldest versions that pyproject.toml allows, in .venv-oldest.
#   PYTHON=python3.12   the Python (>= 3.10) that the environment is made with; remove it to change that
#   TORCH_INDEX=URL     one more package index, for another build of torch, e.g. https://download.pytorch.org/whl/cpu
#   VENV=0              use PYTHON's environment as it is: nothing is installed
PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= 1

ifeq ($(VENV),0)
run := $(PYTHON)
run_oldest := $(PYTHON)
installed =
installed_oldest =
else
run := .venv/bin/python
run_oldest := .venv-oldest/bin/python
installed = .venv/$(1).installed
installed_oldest = .venv-oldest/installed
endif

# Two processes of one thread each. Tests marked gpu have the GPU to themselves: pytest -m gpu.
cpu_tests := -m pytest -n 2 --dist worksteal -m "not gpu" --durations 10
pip_install = -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable

.PHONY: demo test test-oldest lint docs records-check
.NOTPARALLEL:

demo: $(call installed,demo)
	$(run) -m benchmarks.demo

test: $(call installed,test)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(run) $(cpu_tests)

test-oldest: $(installed_oldest)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(run_oldest) $(cpu_tests)

records-check: $(call installed,test)
	$(run) -m benchmarks report --check

lint: $(call installed,lint)
	$(run) -m ruff check .
	$(run) -m ruff format --check .
	$(run) -m mypy
	$(run) -m tests.documented_code

docs: $(call installed,docs)
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs build --strict --quiet

.venv/created .venv-oldest/created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(f"Python >= 3.10 is needed and {sys.executable} is {sys.version.split()[0]}: name another with make PYTHON=...")'
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	touch $@

.venv/%.installed: pyproject.toml constraints.txt .venv/created
	.venv/bin/python $(pip_install) ".[$*]" --constraint constraints.txt
	touch $@

.venv-oldest/installed: pyproject.toml tests/oldest.py .venv-oldest/created
	.venv-oldest/bin/python $(pip_install) . --no-deps
	.venv-oldest/bin/python tests/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python $(pip_install) ".[test]" --constraint .venv-oldest/constraints.txt
	touch $@
