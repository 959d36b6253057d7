# `make demo` and `make test` need Python >= 3.11 with pip, nothing else: they set up .venv on first use.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
MODEL ?= $(HOME)/.cache/prunenet/SmolLM2-135M-Instruct
TEXT ?= ../shared/data/wikitext2/wiki.test.raw
RESULTS ?= benchmarks/results
DATA ?= ../shared/data
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
# One process a core, which takes the tests that another has left; tiny models gain nothing from threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
TORCH = $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-slow check coverage docs readme bench chaos table wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  Variables: PYTHON ($(PYTHON)), VENV ($(VENV)), ARGS (passed on, as in: make test ARGS='-k masks');"
	@echo "  for bench and table: MODEL ($(MODEL)), TEXT, DATA, RESULTS"

setup: $(READY) ## create the environment (the others do it when needed)

# torch first and by itself: any other order lets pip replace the build that fits this machine.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "prunenet needs Python 3.11 or later, $(PYTHON) is older; try make PYTHON=python3.11"; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@echo "  $(TORCH)"
	@$(PIP_INSTALL) "$(TORCH)"
	@echo "  prunenet and what it needs"
	@$(PIP_INSTALL) -c constraints.txt -e '.[demo,dev,recover,search]'
	@touch $@

demo: $(READY) ## prune a real model by the policy that ships, train a short one, compare: results in demo/
	@$(BIN)/prunenet demo --out demo $(ARGS)

test: $(READY) ## run the tests (a few minutes)
	@$(PYTEST) $(ARGS)

test-long: $(READY) ## run the tests that take seconds each: kills, several processes, whole trainings
	@$(PYTEST) -m 'long and not slow and not gpu' $(ARGS)

test-slow: $(READY) ## run the tests that need the real model (fetch it first: make demo)
	@$(BIN)/pytest -m slow $(ARGS)

coverage: $(READY) ## run the tests, long ones too, and list the lines that none of them runs
	@$(PYTEST) -m 'not slow and not gpu' --cov=prunenet --cov-report=term-missing:skip-covered $(ARGS)

check: $(READY) ## ruff, mypy --strict, import floors
	@failed=; \
	for tool in 'ruff check .' 'ruff format --check .' 'mypy' 'lint-imports --no-logo'; do \
		echo "== $$tool"; $(BIN)/$$tool || failed="$$failed [$$tool]"; \
	done; \
	if [ -n "$$failed" ]; then echo "make check: failed:$$failed"; exit 1; fi

# mkdocs 2 will have no plugins; pyproject.toml keeps mkdocs below it, so that its theme need not warn in every build.
docs: $(READY) ## build the documentation site into site/, every warning an error
	@$(PIP_INSTALL) -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

readme: $(READY) ## write the table of model types into README.md
	PRUNENET_CACHE=$$(mktemp -d) $(BIN)/python docs/readme.py

bench: $(READY) ## run the benchmarks on MODEL, about an hour; finished parts are skipped (make demo fetches the model)
	$(BIN)/python benchmarks/training.py $(MODEL) --out $(RESULTS)/training.jsonl
	$(BIN)/python benchmarks/spectral_reward.py $(MODEL) --out $(RESULTS)/spectral_reward.jsonl

chaos: $(READY) ## kill, fill disks, mutate files, meet hostile folders; an hour or less, resumable
	TMPDIR=$(firstword $(wildcard /dev/shm) /tmp) $(BIN)/python benchmarks/chaos.py all --out $(RESULTS)/chaos.jsonl
	@$(BIN)/python benchmarks/chaos.py table --out $(RESULTS)/chaos.jsonl

# Every system of the field on equal terms: what reads weights, what writes its own text, what is given text from outside.
TABLE := random magnitude lila folding prunenet_published prunenet_published_trained prunenet-weights \
	prunenet elimination wanda_sp flap llm_pruner_element1 \
	wanda_sp@ptb flap@ptb llm_pruner_element1@ptb saap@ptb slicegpt@ptb adapruner@ptb
# What the papers claim, as relations: the sign of SAAP's stability; Wanda-sp and OWL on every kind of text.
SAAP := llm_pruner_element1@ptb saap@ptb saap_flipped@ptb saap_fusion@ptb
TEXTS := $(foreach text,@random @ptb @wiki,wanda_sp$(text) wanda_sp:owl$(text)) wanda_sp wanda_sp:owl
COMPARE := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m prunenet compare $(MODEL) --text $(TEXT) --text builtin \
	--calibration ptb=$(DATA)/ptb/ptb.valid.txt --calibration wiki=$(DATA)/wikitext2/wiki.valid.tokens --max-windows 6

table: $(READY) ## all methods x ratios 0.2, 0.3 on two texts and four tasks, then the claims; two hours or more on 2 cores, resumable
	@$(PIP_INSTALL) -c constraints.txt -e '.[eval]'
	@mkdir -p $(RESULTS)
	$(COMPARE) $(TABLE) --ratios 0.2,0.3 --calibration-tokens 32768 \
		--tasks arc_easy,piqa,winogrande,copa --task-data $(DATA)/tasks --limit 100 \
		--out $(RESULTS)/table.jsonl --markdown $(RESULTS)/table.md --figures $(RESULTS)/table
	$(COMPARE) adapruner_random@ptb --ratios 0.3 --calibration-tokens 32768 --out $(RESULTS)/claims.jsonl
	$(COMPARE) $(SAAP) --ratios 0.3 --calibration-tokens 13056 --out $(RESULTS)/claims.jsonl
	$(COMPARE) $(TEXTS) --ratios 0.3 --calibration-tokens 4096 --out $(RESULTS)/claims.jsonl

wheel: $(READY) ## build the source archive, and the wheel from it, into dist/
	@$(BIN)/python -m build --outdir dist .

clean: ## remove everything that make made
	@rm -rf $(VENV) build dist demo site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
