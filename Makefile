# make demo    quantize, correct and measure a real 135M model, from a fresh clone
# make test    all tests that need no GPU
# make readers exports and imports checked by the tools they are for: llama.cpp (built once, ten minutes), hqq ...
# make peers   HQQ, AutoRound, optimum-quanto and bitsandbytes beside lrec: same model, text and measures (hours)
# make fuzz    a minute of coverage-guided fuzzing of what reads manifests and caches (atheris; FUZZ_SECONDS=60)
# make lint    ruff
# make gpu     GPU tests, then speed into data/results; says so and stops where there is no NVIDIA GPU
# make clean   removes .venv and what was built (fetched data stay in data/cache)
#
# An environment that is there already: make test PYTHON=python3

PYTHON ?= .venv/bin/python
# Only the environment that this file makes can be out of date.
READY = $(if $(filter .venv/%,$(PYTHON)),.venv/installed)
CORES := $(shell getconf _NPROCESSORS_ONLN)
FUZZ_SECONDS ?= 60
NATIVE := $(wildcard lrec/kernels/native/*.cpp lrec/kernels/native/*.h)
# Left to itself, accelerate runs CPU jobs on one thread and warns about every default.
LAUNCH = $(PYTHON) -m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(CORES)

.PHONY: demo test readers peers fuzz lint gpu clean
.SILENT:

demo: $(READY)
	$(PYTHON) data/smollm2.py
	$(PYTHON) data/wikipedia.py
	$(LAUNCH) recipes/lrec_smollm2_135m.py

# A process per core, each with one thread and whole files of tests; what they share is fetched before they start.
test: $(READY)
	$(PYTHON) data/smollm2.py
	$(PYTHON) data/wikipedia.py
	$(PYTHON) data/unseen.py
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m "not gpu and not readers" -n $(CORES) --dist loadfile --no-loadscope-reorder

readers: $(READY) .readers/installed
	PYTHONPATH=$(CURDIR)/.readers $(PYTHON) -m pytest -q tests/readers tests/e2e/test_imports.py tests/e2e/test_exports.py

# What is not in the environment, in a folder of its own: nothing here is needed to use lrec.
.readers/installed:
	echo "building llama.cpp and fetching other readers into .readers (once, ten minutes)"
	CMAKE_BUILD_PARALLEL_LEVEL=$(CORES) CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1" \
		$(PYTHON) -m pip install -qq --no-deps --target .readers llama-cpp-python==0.3.36 diskcache==5.6.3 \
		hqq==0.2.8.post1 einops==0.8.2 termcolor==3.3.0
	touch $@

# Goes on where it stopped; what it makes lies in runs/peers, and its table in data/results/peers_smollm2.json.
peers: .peers/installed
	.peers/bin/python data/smollm2.py
	.peers/bin/python data/wikipedia.py
	.peers/bin/python -m peers

.peers/installed: peers/requirements.lock requirements.lock pyproject.toml setup.py $(NATIVE)
	echo "making .peers from peers/requirements.lock (once, a few minutes)"
	python3 -m venv .peers
	.peers/bin/pip install -qq -r peers/requirements.lock
	.peers/bin/pip install -qq --no-deps --no-build-isolation -e .
	touch $@

fuzz: $(READY) .fuzz/installed
	PYTHONPATH=$(CURDIR)/.fuzz:$(CURDIR) $(PYTHON) tests/fuzz_readers.py -max_total_time=$(FUZZ_SECONDS) \
		-artifact_prefix=.fuzz/ .fuzz/corpus

.fuzz/installed:
	$(PYTHON) -m pip install -qq --no-deps --target .fuzz atheris==3.0.0
	touch $@

lint: $(READY)
	$(PYTHON) -m ruff check --quiet .
	$(PYTHON) -m ruff format --check --quiet . || { $(PYTHON) -m ruff format --diff --quiet .; exit 1; }

# A machine that has the driver or the device counts as having a GPU: if torch cannot use it then, that is a failure.
gpu: $(READY)
	if ! command -v nvidia-smi > /dev/null && ! ls /dev/nvidia[0-9]* > /dev/null 2>&1; then \
		echo "skip: no NVIDIA GPU on this machine"; \
	else \
		$(PYTHON) -c "import torch; print(torch.cuda.get_device_name(), torch.ones(1).cuda().item())" && \
		$(PYTHON) -m pytest -q -m gpu tests/gpu && \
		$(PYTHON) -m lrec bench kernels --device cuda --group_size 128 --output data/results/gpu.json && \
		$(PYTHON) -m lrec bench step --device cuda --shape llama-7b --tokens 4096 --num_steps 6 \
			--output data/results/gpu.json; \
	fi

clean:
	rm -rf .venv .readers .peers .fuzz build *.egg-info lrec/kernels/native/*.so lrec/kernels/native/build.log
	find lrec peers tests data recipes -name __pycache__ -prune -exec rm -rf {} +

.venv/locked: requirements.lock
	echo "making .venv from requirements.lock (once, a few minutes)"
	python3 -m venv .venv
	.venv/bin/pip install -qq -r requirements.lock
	touch $@

.venv/installed: .venv/locked pyproject.toml setup.py $(NATIVE)
	.venv/bin/pip install -qq --no-deps --no-build-isolation -e .
	tail -n 1 lrec/kernels/native/build.log | sed 's/^/native CPU kernels: /'
	touch $@
