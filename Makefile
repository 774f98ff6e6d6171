# Every target is a command or two that you could type yourself. Set-up happens on its own where a target needs it.

# The Python that the environment is made from, 3.11 or later; where the environment lies.
PYTHON ?= python3
VENV ?= .venv
# What JAX computes on: cpu, tpu, cuda12 or cuda13; `make setup ACCEL=cuda13` installs what it needs for that.
ACCEL ?= cpu
ifeq ($(filter cpu tpu cuda12 cuda13,$(ACCEL)),)
$(error ACCEL=$(ACCEL) is none of cpu, tpu, cuda12, cuda13)
endif
# Test processes (0: in this one), and more arguments for pytest: make test ARGS="tests/losses -x".
WORKERS ?= 2
ARGS ?=
# 1: test-slow installs torch, peft and bitsandbytes first, so that tests marked `oracle` run.
ORACLE ?= 0
# 1: test-slow installs compilers for chips that are not there first, so that tests of 8B models on them run.
AHEAD ?= 0

# Huge pages for large arrays: a third off a CPU step. glibc reads this before Python starts.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

version := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
lock := requirements/python$(if $(filter 3.11,$(version)),3.11,3.12).txt
ready := $(VENV)/.ready-$(version)
accelerator := $(if $(filter-out cpu,$(ACCEL)),$(VENV)/.$(ACCEL)-$(version))
oracle := $(VENV)/.oracle-$(version)
ahead := $(VENV)/.ahead-$(version)
trl := .venv-trl/.ready-$(version)
python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check
pytest := JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 $(python) -m pytest -n $(WORKERS) --dist loadfile --durations=10 --durations-min=10

.DEFAULT_GOAL := help
.PHONY: help setup demo setup-oracle setup-ahead setup-trl test test-slow check bench memory lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

# For each way in which PYTHON may not do: one line that mends it, before anything is written.
goal := $(or $(firstword $(MAKECMDGOALS)),setup)
define require-python
@die() { echo "$$1" >&2; exit 1; }; \
case "$(version)" in \
	"") die "PYTHON=$(PYTHON) does not run; on Debian: apt-get install python3 python3-venv; or name another: make $(goal) PYTHON=python3.11";; \
	2.*|3.[0-9]|3.10) die "PYTHON=$(PYTHON) is Python $(version), daajax needs 3.11 or later; name one: make $(goal) PYTHON=python3.11";; \
esac; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	die "PYTHON=$(PYTHON) has no venv or ensurepip to make an environment with; on Debian: apt-get install python$(version)-venv"
endef

setup: $(ready) $(accelerator) ## an environment in .venv with the pinned versions, and daajax in it; ACCEL=tpu, cuda12 or cuda13
	@echo "$(VENV) is ready: Python $(version), $(lock)"

$(ready): $(lock) pyproject.toml
	$(require-python)
	@echo "Setting up $(VENV) for Python $(version) from $(lock): a few minutes"
	@if test -f $(VENV)/pyvenv.cfg && ! test -e $(VENV)/bin/python$(version); then rm -rf $(VENV); fi
	@$(PYTHON) -m venv $(VENV)
	@$(pip) install --quiet --no-deps --use-pep517 -r $(lock)
	@$(pip) install --quiet --no-deps --no-build-isolation --editable .
	@$(pip) check
	@touch $@

# The plugins of the locked jax; what they need besides (cuDNN, NCCL, …) is as new as they allow.
ifneq ($(accelerator),)
$(accelerator): $(lock) $(ready)
	@echo "Installing what JAX needs for $(ACCEL): gigabytes for GPUs"
	@$(pip) install --quiet "jax[$(ACCEL)]" -c $(lock)
	@touch $@
endif

demo: $(ready) ## align a small model and see what came of it: three minutes on two CPU cores, no network
	@$(python) -m demo

setup-oracle: $(oracle) ## torch, peft and bitsandbytes into it, which tests marked `oracle` compare with (Python 3.11)
	@echo "$(VENV) has the oracle"

$(oracle): requirements/oracle.txt $(ready)
	@test $(version) = 3.11 || { echo "the oracle is pinned for Python 3.11, this is $(version): make $(goal) PYTHON=python3.11" >&2; exit 1; }
	@$(pip) install --quiet -r requirements/oracle.txt -c $(lock)
	@touch $@

setup-ahead: $(ahead) ## compilers for TPUs and GPUs that are not there into a folder of it (Python 3.11; 3 GB)
	@echo "$(VENV)/ahead has the compilers"

# In a folder of their own: beside jax, they would look for the chips at every start.
$(ahead): requirements/ahead.txt $(ready)
	@test $(version) = 3.11 || { echo "the compilers are pinned for Python 3.11, this is $(version): make $(goal) PYTHON=python3.11" >&2; exit 1; }
	@rm -rf $(VENV)/ahead
	@$(pip) install --quiet --no-deps --target $(VENV)/ahead -r requirements/ahead.txt
	@touch $@

setup-trl: $(trl) ## TRL and torch into an environment of their own, .venv-trl, to measure beside (Python 3.11; 1.5 GB)
	@echo ".venv-trl has TRL"

$(trl): requirements/trl.txt
	$(require-python)
	@test $(version) = 3.11 || { echo "TRL is pinned for Python 3.11, this is $(version): make $(goal) PYTHON=python3.11" >&2; exit 1; }
	@rm -rf .venv-trl
	@$(PYTHON) -m venv .venv-trl
	@.venv-trl/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/trl.txt
	@touch $@

# Small programs, compiled and run a few times: without optimizations a quarter less CPU time, with the older emitters of
# jaxlib 0.10 a quarter less again, and the same numbers hold; later ones lack these, and end at a flag they do not know.
# Tests marked `optimized` switch the optimizations on, and start processes without either: tests/conftest.py.
emitters := $(if $(shell grep -s '^jaxlib==0[.]10[.]' $(lock)),--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1)
test test-slow: export JAX_DISABLE_MOST_OPTIMIZATIONS = 1
test test-slow: export XLA_FLAGS := $(strip $(XLA_FLAGS) $(emitters))
test: $(ready) ## the quick tests, on 8 CPU devices
	$(pytest) -m "not slow and not oracle" $(ARGS)

test-slow: $(ready) $(if $(filter 1,$(ORACLE)),$(oracle)) $(if $(filter 1,$(AHEAD)),$(ahead)) ## the others; ORACLE=1 and AHEAD=1 install what some of them need
	$(pytest) -m "slow or oracle" $(ARGS)

check: $(ready) ## format, lint, types, shell scripts
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(python)
	$(VENV)/bin/shellcheck .ci/run launch/*.sh launch/slurm.sbatch

bench: $(ready) $(trl) ## the scripts of benchmarks/ that measure this machine; the last one beside TRL (Python 3.11)
	$(python) -m benchmarks.packing
	$(python) -m benchmarks.attention
	$(python) -m benchmarks.head
	$(python) -m benchmarks.ceiling
	$(python) -m benchmarks.scaling
	$(python) -m benchmarks.against_trl

memory: $(ahead) ## what an update of an 8B model needs on chips that are not there (Python 3.11)
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 PYTHONPATH=$(VENV)/ahead \
		$(python) -m benchmarks.memory $(ARGS)

lock: ## resolve the dependencies afresh and write the lock of this Python's version
	$(require-python)
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --upgrade pip setuptools
	.venv-lock/bin/pip install --quiet '.[test,check]'
	{ echo "# Python $(subst 3.12,3.12 and later,$(version)): core, test and check of pyproject.toml, written by \`make lock\`."; \
	  .venv-lock/bin/pip freeze --all --exclude pip --exclude daajax; } > $(lock)
	rm -rf .venv-lock build

clean: ## remove environments, caches and build leftovers; runs/ stays
	rm -rf .venv* .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
