# `make demo` and `make test` set themselves up: a virtual environment, the pinned torch, this package.
# Which torch build is installed (CPU or CUDA) is pip's choice; PIP_INDEX_URL or PIP_EXTRA_INDEX_URL steer it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test matrix fuzz sanitize faults leaks results bench reproduce gpu sanitize-gpu setup clean

demo: $(READY)
	$(BIN)/python examples/demo.py --output out/demo $(ARGS)

# JOBS files of tests at a time, on one thread each.
JOBS ?= 2
test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# The property tests at length, some 30,000 random cases in a quarter of an hour on one core; CASES=N
# for another number a property, SEED=N for the cases of an earlier run, whose seed it printed.
CASES ?= 1500
SEED ?=
fuzz: $(READY)
	$(BIN)/python benchmarks/fuzz.py --cases $(CASES) $(if $(SEED),--seed $(SEED)) $(ARGS)

# The C++ extension under the compilers' sanitizers: address, undefined, thread.
sanitize: $(READY)
	$(BIN)/python benchmarks/sanitize.py $(ARGS)

# The tests on other Pythons, with other torches, and without what is optional; downloads 10 GB.
matrix: $(READY)
	$(BIN)/python benchmarks/matrix.py $(ARGS)

# Kills, damaged files, full disks and failing judges: tests/test_faults.py at length, some minutes.
faults: $(READY)
	$(BIN)/python benchmarks/faults.py $(ARGS)

# Ten thousand calls of each op and thousands of steps of training: is memory flat? tests/test_leaks.py
# at length, a quarter of an hour.
leaks: $(READY)
	$(BIN)/python benchmarks/leaks.py $(ARGS)

# Every figure of README.md, measured again. Run both on an idle machine. Peers take part in the
# second, which takes hours, where they are installed: pip install '.[peers]'.
results: $(READY)
	$(BIN)/python benchmarks/run.py --suite memory
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python examples/demo.py --output out/demo
	cp out/demo/results.json benchmarks/results/demo.json
	$(BIN)/python benchmarks/readme.py

bench: $(READY)
	$(BIN)/python benchmarks/run.py --suite head loss segments accuracy
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/scaling.py

# KTO, Step-KTO and rejection sampling over ten seeds on two tasks, for docs/REPRODUCTION.md; an hour
# or two. Goes on where it was stopped, from out/reproduction.
reproduce: $(READY)
	$(BIN)/python benchmarks/reproduce.py $(ARGS)
	$(BIN)/python benchmarks/readme.py

# Tests and benchmarks that want a GPU, in under ten minutes; everything lands in STEPKTO_GPU_OUT
# (default out/gpu). ARGS='--parts tests head' chooses parts. Without a virtual environment:
# python benchmarks/gpu_visit.py
gpu: $(READY)
	$(BIN)/python benchmarks/gpu_visit.py $(ARGS)

# The memory checker of the CUDA toolkit over a few of those tests.
sanitize-gpu: $(READY)
	$(BIN)/python benchmarks/gpu_visit.py --parts sanitize $(ARGS)

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit("want Python >= 3.10, got " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[train,lora,rewards,test,triton,trl]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info out
