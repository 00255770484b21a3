# userscale: `make quickstart` and `make test` need a shell, make and some Python 3; the rest is installed into .venv here.
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
PYTHON := .venv/bin/python
ARGS ?=
# Python's compiled files are kept, whatever the environment says: without them each process takes 5 s more to import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-next lint types wheel lock clean

quickstart: .venv/ok
	$(PYTHON) -m experiments quickstart $(ARGS)

test: .venv/ok
	$(PYTHON) -m pytest $(ARGS)

test-next: .venv-next/ok  ## the marked part of the suite on the newest jax that pyproject.toml allows
	.venv-next/bin/python -m pytest -m portable $(ARGS)

lint: .venv/ok
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: .venv/ok
	$(PYTHON) -m mypy

wheel: .venv/ok  ## built, installed into an empty environment, imported
	bash .ci/wheel $(UV)

lock: .uv-found  ## resolves both locks anew; no address is written
	mkdir -p build && sed '/^managed/d' pyproject.toml > build/pyproject.toml && echo 'jax==0.11.2' > build/pin.txt
	cd build && $(abspath_uv) pip compile -q --universal --python-version 3.12 --no-header --no-annotate --no-emit-index-url \
	  -c pin.txt --group dev pyproject.toml -o ../requirements.lock
	cd build && $(abspath_uv) pip compile -q --universal --python-version 3.12 --no-header --no-annotate --no-emit-index-url \
	  -c pin.txt -c ../requirements.lock --extra cuda --extra tpu --extra redis --extra llm --extra tensorboard pyproject.toml -o ../requirements-accelerators.lock

abspath_uv = $(if $(findstring /,$(UV)),$(abspath $(UV)),$(UV))

.uv-found:
	@$(UV) --version >/dev/null 2>&1 || { python3 -m venv .uv && .uv/bin/python -m pip install -q uv; } \
	  || { rm -rf .uv && python3 -m pip install -q --target .uv uv; }

.venv/ok: requirements.lock pyproject.toml .python-version | .uv-found
	$(UV) venv -q --allow-existing .venv
	$(UV) pip sync -q -p $(PYTHON) requirements.lock
	$(UV) pip install -q -p $(PYTHON) --no-deps -e . && touch $@

.venv-next/ok: requirements.lock pyproject.toml .python-version | .uv-found
	$(UV) venv -q --allow-existing .venv-next
	grep -vE '^(jax|jaxlib)==' requirements.lock > .venv-next/requirements.txt
	$(UV) pip install -q -p .venv-next/bin/python -r .venv-next/requirements.txt 'jax>=0.12,<0.13'
	$(UV) pip install -q -p .venv-next/bin/python --no-deps -e . && touch $@

clean:
	rm -rf .venv .venv-next .uv build runs
