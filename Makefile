# `make demo` and `make test` set themselves up: a virtual environment, the pinned torch, this package.
# Which torch build is installed (CPU or CUDA) is pip's choice; PIP_INDEX_URL or PIP_EXTRA_INDEX_URL steer it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test results setup clean

demo: $(READY)
	$(BIN)/python examples/demo.py --output out/demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

# Every figure of README.md, measured again. Run it on an idle machine.
results: $(READY)
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python examples/demo.py --output out/demo
	cp out/demo/results.json benchmarks/results/demo.json
	$(BIN)/python benchmarks/readme.py

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("want Python >= 3.10, got " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[train,test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info out
