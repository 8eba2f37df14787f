# Everything runs in a .venv of its own. An importable torch >= 2.11 is reused, else $(TORCH) is installed first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= out/demo
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*/*)
WORLD := packages/mirage-world

.PHONY: demo test test-fast test-slow bench lint docs nightly asan cuda tiny tiny-memories evaluate clean

demo: $(READY)
	$(BIN)/python -m mirage demo --out $(OUT)

# Two processes, whose threads do not spin while they wait for each other.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal
test: $(READY)
	$(PYTEST)

# What takes seconds or less, and what `make test` has besides.
test-fast: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

# Half an hour on two CPU cores, growth and the full-width VAE encoder most of it; `pytest benchmarks` takes minutes.
bench: $(READY)
	$(BIN)/python -m pytest benchmarks --full --save $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.plots $(dir $(wildcard benchmarks/results/*/results.json))
	$(BIN)/python -m benchmarks.tables --write

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The documentation, into site/; a warning is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What takes too long for every change: the sanitizers, the deliberate faults, and all tests with the samples that they
# take of long lists, of kills and of fuzzed inputs, at full length.
nightly: $(READY) cuda asan mutation
	MIRAGE_NIGHTLY=1 $(PYTEST)

ASAN_TESTS := $(foreach name,back_project splat splat_aligned cache_write bounded_write block_bounds float8 view_overlap,\
	ops/test_$(name).py) cache/test_cache.py

# The CPU operators under address and undefined-behaviour sanitizers, from a build of their own, which pytest must find
# before the checkout's. CI takes the fast tests of the compiled backend alone.
ASAN_ARGS ?=
asan: $(READY)
	MIRAGE_SANITIZE=1 MIRAGE_BUILD_CUDA=0 $(BIN)/python setup.py -q build --build-lib build/asan
	cd build/asan && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. MIRAGE_REQUIRE_CPU=1 OMP_NUM_THREADS=2 \
	$(CURDIR)/$(BIN)/python -m pytest -q -p no:cacheprovider -o "pythonpath=build/asan ." \
	$(ASAN_ARGS) $(addprefix ../../tests/kernels/,$(ASAN_TESTS))

# Plants deliberate faults in a copy of the tree, one at a time: the tests must catch each. A few of them for CI:
# `make mutation MUTATION_ARGS="--sample 6"`, always the same; `--seed N` takes others.
MUTATION_ARGS ?= --jobs 2
mutation: $(READY)
	$(BIN)/python -m tests.mutation.run $(MUTATION_ARGS)

# Compiles every CUDA source for every architecture of the list (or of TORCH_CUDA_ARCH_LIST), warnings as errors; needs
# nvcc, no GPU.
cuda: $(READY)
	MIRAGE_BUILD_CUDA=1 $(BIN)/python setup.py -q build_ext --build-lib build/cuda --build-temp build/cuda-temp

# mirage-tiny from nothing, by its seeds, on two CPU cores. A run that was stopped is resumed.
tiny: $(READY)
	$(BIN)/python -m mirage train configs/tiny/vae.yaml
	$(BIN)/python -m mirage train configs/tiny/vae-video.yaml
	$(BIN)/python -m mirage train configs/tiny/vae-shifted.yaml
	$(BIN)/python -m mirage train configs/tiny/vae-steady.yaml
	$(BIN)/python -m mirage prepare configs/tiny/clips.yaml --out runs/tiny/clips
	$(BIN)/python -m mirage prepare configs/tiny/clips-more.yaml --out runs/tiny/clips-more
	$(BIN)/python -m mirage train configs/tiny/backbone.yaml
	$(BIN)/python -m mirage train configs/tiny/adapter.yaml
	$(BIN)/python -m mirage train configs/tiny/lora.yaml
	$(BIN)/python -m mirage.training.release --runs runs/tiny

# The memories to compare with, on mirage-tiny's backbone, after `make tiny`, whose files they start from: none with an adapter
# and LoRA of its own, of the same steps, on the cameras' rays; nearest and pixel with 1,000 steps more on their own readouts.
# Two at a time take less: `OMP_NUM_THREADS=1 make -j2 tiny-memories`.
MEMORIES := none nearest pixel
tiny-memories: $(addprefix tiny-memory-,$(MEMORIES))

tiny-memory-none: $(READY)
	$(BIN)/python -m mirage train configs/tiny/adapter-none.yaml
	$(BIN)/python -m mirage train configs/tiny/lora-none.yaml

tiny-memory-%: $(READY)
	$(BIN)/python -m mirage train configs/tiny/lora-$*.yaml

# The four memories side by side. The seeds must be of rooms that were never trained on: configs/tiny uses those below 1800.
SEEDS ?= 10000:10032
FRAMES ?= 97
evaluate: $(READY)
	$(BIN)/python -m mirage evaluate --model mirage-tiny --seeds $(SEEDS) --frames $(FRAMES) --out out/evaluate-$(FRAMES) \
	$(foreach memory,$(MEMORIES),--weights $(memory)=runs/tiny/lora-$(memory))

$(READY): pyproject.toml setup.py $(WORLD)/pyproject.toml $(WORLD)/setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# A torch that $(PYTHON) can import is seen from the .venv through a path file, and never replaced.
	@$(BIN)/python -c "import torch" 2>/dev/null || $(PYTHON) -c "import os, re, torch; \
	assert tuple(map(int, re.findall(r'\d+', torch.__version__)[:2])) >= (2, 11); \
	print(os.path.dirname(os.path.dirname(torch.__file__)))" 2>/dev/null \
	> $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/reused_torch.pth || true
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "setuptools>=77" ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e . -e "./$(WORLD)[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info out runs site mirage_kernels/*.so mirage_kernels/_build_info.py
	rm -rf $(WORLD)/build $(WORLD)/dist $(WORLD)/*.egg-info
