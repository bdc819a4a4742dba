# make quickstart prunes and distils a small language model and writes a report. make test runs the tests. Both make .venv first.
# PYTHON is 3.11 if it runs here, else a newer one: all tests run on 3.11, and only those of test-megatron on newer Pythons. An
# existing .venv keeps its Python until make clean.
PYTHON ?= $(shell for v in 3.11 3.12 3.13; do python$$v -c 'import ensurepip' 2>/dev/null && echo python$$v && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
# WORKERS=3 runs test files in three processes: shorter, since many tests wait for other processes, but tried less often.
WORKERS ?= 0
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
# Tests of starts, losses, stages, kills and of lm-eval's answers. The other tests of test-megatron use all that these use of
# megatron-core.
ANY_MEGATRON := $(addprefix tests/distributed/,test_kill.py test_loss.py test_meeting.py test_stages.py test_start.py) \
	$(addprefix tests/parity/,test_eval_oracle.py test_modelopt_kl.py test_smollm2.py)

.PHONY: quickstart test test-megatron lint clean

quickstart: $(VENV)/ready
	$(BIN)/python -m minitron_train run +recipe=smollm2

test: $(VENV)/ready
	$(PYTEST) $(PYTEST_ARGS)

# the tests that depend on megatron-core's release
test-megatron: $(VENV)/ready
	$(PYTEST) tests/unit/test_shims.py tests/unit/test_cpu.py tests/unit/test_safe_load.py tests/parity \
		tests/distributed tests/e2e/test_tiny.py $(addprefix --ignore=,$(ANY_MEGATRON)) $(PYTEST_ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/ready: pyproject.toml $(wildcard constraints/*.txt)
	$(if $(PYTHON),,$(error no Python 3.11, 3.12 or 3.13 on the PATH; install one, or set PYTHON))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	version=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints/$$version.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
