# make demo: from nothing to a report.  make test: from nothing to a green test run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SLURM := slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core

.PHONY: demo test lint bench faults browser slurm clean
.DEFAULT_GOAL := demo

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m pipeline -m experiment=demo batch=constant_16,constant_64,stages,norm_test seed=0,1
	$(BIN)/python -m analysis demo --baseline batch=constant_16

test: $(VENV)/.dev browser slurm
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

browser:     # for the tests that open the report
	@command -v chromium >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	  || echo "No Chromium: the tests that open the report are skipped. Remedy: apt install chromium"

slurm:       # for the tests that submit; they start the daemons themselves, so policy-rc.d forbids it to apt
	@PATH="$$PATH:/usr/sbin"; policy=/usr/sbin/policy-rc.d; \
	type slurmctld slurmd sbatch munged slurmdbd mariadbd >/dev/null 2>&1 \
	  || { [ "$$(id -u)" = 0 ] \
	       && { [ -e $$policy ] || { trap "rm -f $$policy" EXIT INT TERM; \
	            printf '#!/bin/sh\nexit 101\n' >$$policy && chmod +x $$policy; }; } \
	       && apt-get update -qq \
	       && apt-get install -y -qq --no-install-recommends $(SLURM) >/dev/null; } \
	  || echo "No SLURM: the tests that submit to it are skipped. Remedy: apt install $(SLURM)"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev   # half an hour on two cores, which nothing else should use
	$(BIN)/python -m benchmarks.guard

faults: $(VENV)/.dev      # kills, full disks, damaged files and the like; forty minutes on two cores
	$(BIN)/python -m tests.faults

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
