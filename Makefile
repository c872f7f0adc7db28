# make quickstart   install into .venv (or the active virtual environment) and run the small example
# make test         lint, format check and the test suite
# make soak         every fault (docs/faults.md), 50 kills and 100,000 hostile inputs (make test has 2 and 1,600); an hour or so
# make docs         the documentation as a site, build/site/index.html
# make audit        known vulnerabilities of the pinned dependencies (needs the network)
# make bench        every benchmark that this machine can run (BENCH_ARGS=--quick: the headlines)
# make clean        remove .venv, what was built, and caches
# make clean-runs   remove runs/, with its models and judgement stores, after asking

VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.trace_jax-installed$(subst /,-,$(CURDIR))
BENCH_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# An interpreter has to run, not only to be on the PATH. constraints.txt was resolved on 3.11, so 3.11 comes first.
FIND_PYTHON = for candidate in python3.11 python3.12 python3.13 python3; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo $$candidate; exit 0; fi; done; \
	echo "trace_jax needs Python 3.11 or newer: install it, or activate a virtual environment that has it" >&2; \
	exit 1

.PHONY: install quickstart test soak docs audit bench clean clean-runs

install: $(INSTALLED)

quickstart: $(INSTALLED)
	$(PYTHON) -m trace_jax.launch --config=configs/quickstart.py --workdir=runs/quickstart

test: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest $(PYTEST_ARGS)

soak: $(INSTALLED)
	TRACE_SOAK_KILLS=50 TRACE_SOAK_INPUTS=100000 TRACE_SOAK=1 JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n 2 -m 'fault or soak'

docs: $(INSTALLED)
	$(PYTHON) -m pip install -qq -c constraints.txt -e '.[docs]'
	$(PYTHON) -m mkdocs build --strict --quiet
	@echo build/site/index.html

audit: $(INSTALLED)
	$(PYTHON) -m pip install -qq pip-audit
	.ci/audit $(PYTHON)

bench: $(INSTALLED)
	$(PYTHON) -m pip install -qq trl accelerate torch==2.13.0 libtpu
	for script in impact trl packing head sampling judge startup scaling growth; do \
		echo "bench.$$script"; $(PYTHON) -m bench.$$script $(BENCH_ARGS) || exit 1; done
	$(PYTHON) -m bench.trl --shape 16m $(BENCH_ARGS)
	$(PYTHON) -m bench.trl --data pku $(BENCH_ARGS)
	$(PYTHON) -m bench.profile $(BENCH_ARGS)
	$(PYTHON) -m bench.pages

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find trace_jax tests configs bench -name __pycache__ -type d -prune -exec rm -rf {} +

clean-runs:
	@if [ ! -d runs ]; then echo 'there is no runs/'; exit 0; fi; \
	du -sh runs/* 2>/dev/null; \
	printf 'delete all of runs/, with its models and paid judgements? [y/N] '; \
	read answer; if [ "$$answer" = y ]; then rm -rf runs; else echo 'nothing was deleted'; fi

$(INSTALLED): setup.py constraints.txt | $(PYTHON)
	@echo 'installing trace_jax into $(VENV) (about 1.3 GB the first time)'
	$(PYTHON) -m pip install -qq -c constraints.txt -e '.[test]'
	touch $@

$(PYTHON):
	@python=$$($(FIND_PYTHON)) && echo "making $(VENV) with $$python" && $$python -m venv $(VENV)
