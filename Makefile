# `make demo` and `make test` are the two commands; both work on a fresh clone.
PYTHON ?=
VENV ?= .venv
OUT ?= demo_output
SEED ?= 0
PORT ?= 8188
PYTEST_ARGS ?=
# Two test files at a time, each process on one thread: quicker than one file on two threads.
WORKERS ?= 2

VENV_PYTHON := $(VENV)/bin/python
# No .pyc files for the 5 GB of libraries: most of them are never imported.
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check --quiet --no-compile --constraint constraints.txt
# With setuptools already there, the build of this package needs no environment of its own.
INSTALL_SELF := $(PIP_INSTALL) --no-build-isolation --editable

.PHONY: help demo comfyui workflows test browser test-full benchmark-ablation lint format teacher clean
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 28

demo: $(VENV)/.train  ## distil the embedded teacher and compare: LoRA, picture, report (OUT=DIR, SEED=N)
	$(VENV)/bin/dmd2 demo --out $(OUT) --seed $(SEED)

comfyui: $(VENV)/.test $(OUT)/dmd2_demo_4step.safetensors  ## start a ComfyUI with the nodes, the tiny model and the workflows (PORT=N)
	$(VENV_PYTHON) tests/comfy/by_hand.py --lora $(OUT)/dmd2_demo_4step.safetensors --port $(PORT)

workflows: $(VENV)/.test $(OUT)/dmd2_demo_4step.safetensors browser  ## write workflows/ and its pictures anew
	$(VENV_PYTHON) tests/comfy/make_workflows.py --lora $(OUT)/dmd2_demo_4step.safetensors

$(OUT)/dmd2_demo_4step.safetensors:
	$(MAKE) demo

test: $(VENV)/.test browser  ## the whole test suite, with a real ComfyUI (PYTEST_ARGS="-k NAME" for a part, WORKERS=N)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# The tests look at the nodes in a headless Chromium. In a container (root, Debian) it is installed;
# elsewhere the tests say what is missing.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  if command -v $$name >/dev/null; then exit 0; fi; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing chromium for the tests of the page (apt-get) ..."; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends chromium >/dev/null && exit 0; fi; \
	echo "There is no Chromium: the tests of the page will fail and say so."

test-full: $(VENV)/.test  ## slow tests of full-size SDXL (20 GB of memory, 10 GB of disk)
	$(VENV_PYTHON) -m pytest -m full $(PYTEST_ARGS)

ABLATION_OUT ?= ablation_output
benchmark-ablation: $(VENV)/.benchmark  ## the paper's ablations on the embedded teacher, into docs/ablation.md: two hours on 2 cores (ABLATION_OUT=DIR)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m benchmarks.ablation --out $(ABLATION_OUT)

lint: $(VENV)/.test  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.test  ## let ruff mend and format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# What made the embedded teacher and the classifier, from nothing but drawn scenes. On one kind of
# machine with one set of library versions the same files come out, byte for byte.
TEACHER_OUT ?= teacher_output
MAKE_ONE := OMP_NUM_THREADS=1 $(VENV_PYTHON) -m train_lora.demo
MAKE_TWO := OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc_per_node 2 -m train_lora.demo
MAKE_UNET := $(MAKE_TWO).make_unet $(TEACHER_OUT)/text.safetensors $(TEACHER_OUT)
LATENTS := $(TEACHER_OUT)/latents_0.safetensors $(TEACHER_OUT)/latents_1.safetensors
teacher: $(VENV)/.train  ## train the embedded teacher anew: about two hours on 2 cores (TEACHER_OUT=DIR)
	mkdir $(TEACHER_OUT)
	$(MAKE_ONE).make_classifier $(TEACHER_OUT)/classifier.safetensors
	$(MAKE_ONE).make_text $(TEACHER_OUT)/text.safetensors
	$(MAKE_TWO).make_vae $(TEACHER_OUT)/vae_1.safetensors
	$(MAKE_TWO).make_vae $(TEACHER_OUT)/vae.safetensors --init $(TEACHER_OUT)/vae_1.safetensors --steps 600 --seed 1
	for process in 0 1; do $(MAKE_ONE).make_latents $(TEACHER_OUT)/vae.safetensors \
	  $(TEACHER_OUT)/latents_$$process.safetensors --seed $$process & done; wait
	$(MAKE_UNET)/unet_1.safetensors $(LATENTS) --high-noise 2 --steps 6000 --until 1000
	$(MAKE_UNET)/unet.safetensors $(LATENTS) --init $(TEACHER_OUT)/unet_1.safetensors --steps 4500 --seed 1
	$(MAKE_ONE).pack_weights $(TEACHER_OUT)

clean:  ## remove the environment, caches and build leftovers (results stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an installation is repeated only when what it depends on has changed.
$(VENV)/.train: constraints.txt pyproject.toml | $(VENV)/.created
	@echo "Installing the trainer into $(VENV) (5 GB, one to four minutes) ..."
	$(PIP_INSTALL) setuptools
	$(INSTALL_SELF) '.[train]'
	@touch $@

$(VENV)/.test: constraints.txt pyproject.toml | $(VENV)/.created
	@echo "Installing the trainer, the tests' tools and ComfyUI's requirements into $(VENV) (6 GB, one to four minutes) ..."
	$(PIP_INSTALL) setuptools
	$(INSTALL_SELF) '.[train,data,test,host]'
	@touch $(VENV)/.train $@

$(VENV)/.benchmark: $(VENV)/.train
	$(INSTALL_SELF) '.[train,benchmark]'
	@touch $@

$(VENV)/.created:
	@for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=$$candidate; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "make: no Python 3.11 or newer was found; install one or name it: make PYTHON=/path/to/python3" >&2; \
	  exit 1; fi; \
	if ! "$$found" -m venv $(VENV); then \
	  rm -rf $(VENV); \
	  echo "make: $$found could not make an environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; fi
	@touch $@
