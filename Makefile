# Every target sets up the environment it needs (scripts/setup.sh); a second call installs nothing.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-browser test-vllm test-sglang test-clients lint format types contracts wheel check bench bench-math bench-clients \
        bench-offline bench-engine docs setup clean distclean

DEMO_ARGS ?=
PYTEST_ARGS ?=
# Two workers of one thread each: the tests' tensors are tiny, and more threads only wait for one another.
WORKERS ?= 2

DEV := bin="$$(scripts/setup.sh dev)" &&
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

demo: ## distil a tiny teacher over HTTP and show what it did (DEMO_ARGS="--objective gjs --seed 1")
	@bin="$$(scripts/setup.sh train,serve,report)" && "$$bin/topkd" demo $(DEMO_ARGS)

test: ## the fast tests (PYTEST_ARGS="tests/topk -k gjs" narrows them)
	@$(DEV) $(ONE_THREAD) "$$bin/python" -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# The servers of test-vllm start for minutes on one core, so it runs beside the others; it prints when they are done.
test-slow: ## the slow tests, test-browser and test-vllm
	@$(DEV) log=$$(mktemp) && trap 'rm -f "$$log"' EXIT && { \
	$(MAKE) --no-print-directory test-vllm >"$$log" 2>&1 & vllm=$$!; failed=0; \
	$(ONE_THREAD) "$$bin/python" -m pytest -q -m "slow and not vllm and not sglang and not browser and not clients" -n $(WORKERS) --dist loadfile --durations 25 $(PYTEST_ARGS) || failed=1; \
	$(MAKE) --no-print-directory test-browser || failed=1; \
	wait $$vllm || failed=1; cat "$$log"; exit $$failed; }

# A run of its own: the driver's event loop stays in its process, and asyncio tests there would meet it.
test-browser: ## the report's page in a real Chromium
	@$(DEV) bash scripts/setup_browser.sh && $(ONE_THREAD) "$$bin/python" -m pytest -q -m browser $(PYTEST_ARGS)

test-vllm: ## what needs a real vLLM on CPU and llama.cpp, installed into .venv-vllm and .venv-llama
	@$(DEV) PYTHON="$$bin/python" bash scripts/setup_vllm.sh && PYTHON="$$bin/python" bash scripts/setup_llama.sh && \
	$(ONE_THREAD) "$$bin/python" -m pytest -q -m vllm -p no:xdist --durations 15 $(PYTEST_ARGS)

# Outside `make check`: 1.7 GB, and minutes of start-up. Its recorded replies run in `make test`.
test-sglang: ## what needs a real SGLang on CPU, installed into .venv-sglang (1.7 GB)
	@$(DEV) PYTHON="$$bin/python" bash scripts/setup_sglang.sh && \
	$(ONE_THREAD) "$$bin/python" -m pytest -q -m sglang -p no:xdist --durations 15 $(PYTEST_ARGS)

# Outside `make check`: they bring torch and some 200 packages of their own.
test-clients: ## openai, litellm, lm-eval, inspect-ai and TRL against topkd serve, installed into .venv-clients
	@$(DEV) PYTHON="$$bin/python" bash scripts/setup_clients.sh && \
	$(ONE_THREAD) "$$bin/python" -m pytest -q -m clients -p no:xdist --durations 15 $(PYTEST_ARGS)

lint: ## ruff, and the documents' code blocks counted
	@$(DEV) "$$bin/ruff" check . && "$$bin/ruff" format --check . && "$$bin/python" -m tests.docs.blocks

format: ## let ruff format and fix
	@$(DEV) "$$bin/ruff" format . && "$$bin/ruff" check --fix .

types: ## mypy, strict, over the package and tests/typing
	@$(DEV) "$$bin/mypy"

contracts: ## which room may import which
	@$(DEV) "$$bin/lint-imports"

wheel: ## build the wheel and test it in a clean environment away from the source
	@$(DEV) scripts/check_wheel.sh "$$bin/python"

check: ## everything CI runs, with the minutes of each part
	@scripts/check.sh lint types contracts test wheel test-slow

bench: bench-math bench-clients bench-offline bench-engine ## all figures; results land in benchmarks/results/

bench-math: ## F1 and F6: two-list divergences, fused loss (also against liger-kernel, put into .venv-liger)
bench-clients: ## F2 to F4: decoding and end-to-end scoring, against openai-python and TRL in .venv-bench
bench-offline: ## F7: the score cache against datasets and Parquet
bench-engine: ## F5 and F8: overlap, estimators; how fast a report opens
bench-math: SCRIPTS = $(wildcard benchmarks/bench_pairs.py benchmarks/bench_fused.py)
bench-clients: SCRIPTS = $(wildcard benchmarks/bench_decode.py benchmarks/bench_scoring.py benchmarks/bench_serve.py)
bench-offline: SCRIPTS = $(wildcard benchmarks/bench_store.py)
bench-engine: SCRIPTS = $(wildcard benchmarks/bench_overlap.py benchmarks/bench_estimators.py benchmarks/bench_report.py)
bench-clients: BEFORE = PYTHON="$$bin/python" bash scripts/setup_bench.sh &&
bench-math: BEFORE = "$$bin/python" -m pip install -qq --no-deps --upgrade --target .venv-liger liger-kernel==0.8.5 &&
bench-math bench-clients bench-offline bench-engine:
	@$(DEV) $(BEFORE) for script in $(SCRIPTS); do echo "== $$script"; "$$bin/python" "$$script" || exit 1; done

docs: ## the documentation site, into build/site; a warning is an error
	@$(DEV) NO_MKDOCS_2_WARNING=1 "$$bin/python" -m mkdocs build --quiet && echo "build/site/index.html"

setup: ## the development environment, and nothing else
	@$(DEV) echo "$$bin"

clean: ## what builds and tests leave behind
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache demo-out
	find topkd tests benchmarks examples docs scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also the environments that make made
	rm -rf .venv .venv-vllm .venv-vllm-0.31 .venv-vllm-0.33 .venv-sglang .venv-llama .venv-bench .venv-clients .venv-liger
