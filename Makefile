# What a newcomer needs. Everything runs in .venv, which is made at the first command; TORCH=... takes another torch.
TORCH  ?= torch==2.13.0
PYTHON ?= python3
BIN    := .venv/bin
# A build knows its torch: another TORCH makes the environment anew.
STAMP  := .venv/.made-with-$(subst /,_,$(subst =,-,$(TORCH)))
SOURCES := $(wildcard csrc/*.h csrc/*/*) setup.py pyproject.toml
C_FILES := csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/*.cpp tests/cuda_shim/* tests/cuda_stand_in/*.h tests/cuda_stand_in/*.cpp

.PHONY: demo troubles test bench lint format install-check matrix docs cuda-check cuda-link cuda-dry-run clean
.PHONY: gpu-test gpu-build gpu-kernels gpu-suite gpu-sanitize

demo: .venv/.built                      ## train a small CNN with torch.nn's activations and with fastact's
	$(BIN)/python examples/digits_cnn.py

troubles: .venv/.built                  ## five classic troubles of activations, measured, and what cures them
	$(BIN)/python examples/classic_troubles.py

test: .venv/.built                      ## the whole suite, a file at a time on each core
	$(BIN)/python -m pytest -n auto --dist loadfile

bench: .venv/.built                     ## measure this machine
	$(BIN)/python -m fastact.bench

lint: .venv/.linters                    ## ruff, mypy on the package, clang-format in check mode
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)

format: .venv/.linters                  ## let ruff and clang-format write what lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

install-check: .venv/.built             ## the ways to install, each in an environment of its own
	$(BIN)/python tools/install_check.py

docs: .venv-docs/.made                  ## the documentation site, into site/; no broken link
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

matrix:                                 ## every pair of Python and torch that can be had here (fetches 0.5 GB for each)
	$(PYTHON) tools/matrix.py

cuda-check: .venv-cuda/.made            ## what nvcc makes of the CUDA kernels: warnings, spills, 16-byte accesses; no GPU
	.venv-cuda/bin/python tools/cuda_check.py

cuda-link:                              ## build against a torch with CUDA, and import it (fetches 0.7 GB); no GPU
	$(PYTHON) tools/cuda_link.py

cuda-dry-run:                           ## the suite on a stand-in for a GPU, with a torch with CUDA (fetches 0.7 GB); no GPU
	$(PYTHON) tools/cuda_dry_run.py

# With PYTHON, its torch and the nvcc there as they are, and no network.
gpu-test: gpu-build gpu-kernels gpu-suite gpu-sanitize  ## everything on a GPU

gpu-build:
	$(PYTHON) -m pip install --no-build-isolation --no-deps --editable .
	$(PYTHON) -m fastact.info

gpu-kernels:
	$(PYTHON) -m pytest --device cuda -rs -m "not large" tests/test_cuda.py
	$(PYTHON) -m pytest --device cuda -rs -m large tests/test_cuda.py
	$(PYTHON) -m pytest --device cuda -rP -k every tests/test_cuda.py

gpu-suite:
	$(PYTHON) -m pytest --device cuda -rs --ignore tests/test_cuda.py

SANITIZE := compute-sanitizer --target-processes all --error-exitcode 1

gpu-sanitize:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool memcheck --leak-check no $(PYTHON) tests/cuda_sanitize.py
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool initcheck $(PYTHON) tests/cuda_sanitize.py
	$(SANITIZE) --tool racecheck --racecheck-report all $(PYTHON) tests/cuda_sanitize.py
	$(SANITIZE) --tool synccheck $(PYTHON) tests/cuda_sanitize.py

clean:
	rm -rf .venv .venv-cuda .venv-docs .venv-dry-run site build dist *.egg-info fastact/*.so fastact/_built.py

$(STAMP):
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/.built: $(STAMP) $(SOURCES)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

.venv/.linters: $(STAMP) pyproject.toml .venv/.built
	$(BIN)/pip install --quiet --editable '.[lint]'
	touch $@

.venv-docs/.made: pyproject.toml
	rm -rf .venv-docs
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --upgrade pip
	.venv-docs/bin/pip install --quiet --group docs
	touch $@

# Apart from .venv, whose torch may want other versions of CUDA's packages.
.venv-cuda/.made: pyproject.toml
	rm -rf .venv-cuda
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet --upgrade pip
	.venv-cuda/bin/pip install --quiet --group cuda-check
	.venv-cuda/bin/python tools/cuda_check.py --nvcc >/dev/null 2>&1 || .venv-cuda/bin/pip install --quiet --group cuda-compiler
	touch $@
