# `make demo` and `make test` install what they need. They require Python 3.10+ and a package index.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo check test bench soak setup browser

setup: .venv/.ready

.venv/.ready: pyproject.toml scripts/set_up.py
	$(PYTHON) scripts/set_up.py
	@touch $@

browser: setup
	$(BIN)/python scripts/set_up.py chromium

# PROMPT: a prompt, instead of the example's. MODEL: a folder in ComfyUI's models/diffusers, instead of the built-in model.
demo: setup
	$(BIN)/python scripts/demo.py $(if $(PROMPT),--prompt "$(PROMPT)") $(if $(MODEL),--model "$(MODEL)")

# Format, lint and unit tests, which start no process and so can share the cores. Their tensors are too small for threads.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/unit

# The browser is downloaded while the cores check. Two files of tests run at a time, except for the tests marked `alone`.
test: setup
	$(MAKE) -j 2 check browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone" tests/ranks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/host tests/browser
	$(BIN)/python -m pytest -m alone tests/ranks

bench: setup
	$(BIN)/python -m benchmarks.decode

# The long forms of tests of which `make test` runs short ones.
soak: setup
	HV15_SOAK=1 $(BIN)/python -m pytest tests/ranks/test_soak.py tests/host/test_tiny.py -s --timeout 3600
