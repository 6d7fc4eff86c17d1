# `make train` and `make test` are all a fresh machine needs: python3 >= 3.11, a C compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RECIPE ?= recipes/digits/hsvit.toml
# Two, as many a test has several ranks of its own; a file's tests share what they set up.
PARALLEL := -n 2 --dist loadfile
export OMP_NUM_THREADS ?= 1

.PHONY: env train check test test-slow test-cluster kills gpu lint types lock clean

env: $(VENV)/.locked

# The marker is newer than the lock only after a complete install, so an interrupted one is repeated. uv makes the
# environment, as some systems ship python3 without the parts that `python3 -m venv` needs. With bytecode each rank
# starts in less than half the time; where PYTHONDONTWRITEBYTECODE is set nobody else would write it.
$(VENV)/.locked: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("python3 >= 3.11 is needed: make PYTHON=...")'
	@command -v $(UV) >/dev/null || $(PYTHON) -m pip install -q --target .uv uv
	rm -rf $(VENV)
	$(UV) venv -q --python $(PYTHON) $(VENV)
	$(UV) pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

train: env
	$(BIN)/deepspeed --num_accelerators 2 --module hsvit_ds.train $(RECIPE)

# Before each commit: a minute and a half. Its tests fill the cores, and so do those of `make test`.
check: env lint types
	$(BIN)/python -m pytest $(PARALLEL) -m "not heavy and not slow and not gpu and not cluster"

test: env lint types
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: env
	$(BIN)/python -m pytest $(PARALLEL) -m slow $(if $(SELECT),-k '$(SELECT)')

# Hosts on this machine, in namespaces: needs root, sshd, pdsh and iproute2.
test-cluster: env
	$(BIN)/python -m pytest -m cluster tests/cluster $(if $(SELECT),-k '$(SELECT)')

# Fifty runs killed at random moments, and what became of them.
kills: env
	$(BIN)/python -m tests.cluster.kills 50

# Everything that one GPU can tell; python3 with torch is enough for most of it.
# DATA: CIFAR-10, a folder of shards or an archive of one.
gpu:
	$(PYTHON) -m tools.gpu all $(if $(DATA),--data $(DATA))

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

# Versions and hashes, no URLs, for every Python and platform the project runs on.
lock: env
	$(UV) pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
		--all-extras --python-version 3.11 pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .uv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
