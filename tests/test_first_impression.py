"""Real commands in processes of their own: every line that they print is burnish's."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Generator
from pathlib import Path

import pytest

from burnish.cli.output import set_up_output
from test_pipeline import PREFERENCES, written

ROOT = Path(__file__).parent.parent

ADAPTERS = """
model = "{model}"
data = {{ train = {{ path = "{rows}" }} }}

[training]
output_dir = "{output}"
max_steps = 2
save_steps = 1
bf16 = false
per_device_train_batch_size = 8
num_generations = 4
max_completion_length = 8
gradient_checkpointing = true
packing = true

[peft]
r = 4

[[rubric]]
kind = "numeric"
sources = ["last_number"]
"""


def burnish(*words: str, **environment: str) -> list[str]:
    """Run a command; its lines on standard output."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-m", "burnish", *words],
        capture_output=True, text=True, cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1", **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    foreign = [line for line in done.stderr.splitlines() if not line.startswith("[burnish] ")]
    assert not foreign, "\n".join(foreign)
    return done.stdout.splitlines()


def test_a_pipeline_of_every_kind_of_stage(tmp_path: Path) -> None:
    assert not burnish("pipeline", str(written(tmp_path, PREFERENCES)))


def test_adapters_checkpointing_and_a_resumed_run(tmp_path: Path) -> None:
    file, run = str(written(tmp_path, ADAPTERS)), tmp_path / "run"
    assert burnish("grpo", file) == [f"saved to {run}"]
    again = ("--training.max_steps=3", "--training.resume_from_checkpoint=true")
    assert burnish("grpo", file, *again) == [f"saved to {run}"]
    assert burnish("report", str(run)) == [str(run / "report.html")]


def test_help_says_nothing_else() -> None:
    (first, *_) = burnish("grpo", "--help")
    assert first.startswith("usage: burnish grpo")


@pytest.mark.slow
def test_the_first_example_on_freshly_installed_packages(tmp_path: Path) -> None:
    """Nothing is compiled yet, so that what the compiler says of other packages would be said now."""
    run = tmp_path / "run"
    words = ("--sft.max_steps=1", "--grpo.max_steps=1", "--data.eval.size=4", "--evaluation.num_samples=1",
             "--evaluation.ks=[1]", f"--output_dir={run}")  # fmt: skip
    assert not burnish("pipeline", "examples/chain_sum.toml", *words, PYTHONPYCACHEPREFIX=str(tmp_path / "compiled"))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.fixture
def own_process() -> Generator[None]:
    """Undo what a command sets up for its process."""
    loggers = [logging.getLogger(name) for name in ("burnish", "burnish.config", "bitsandbytes.backends.cpu.ops")]
    before = [(one.level, list(one.handlers), list(one.filters)) for one in loggers]
    with warnings.catch_warnings():
        yield
    for one, (level, handlers, filters) in zip(loggers, before, strict=True):
        one.setLevel(level)
        one.handlers[:], one.filters[:] = handlers, filters


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize("quantized", [False, True])
def test_only_known_remarks_are_silenced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quantized: bool
) -> None:
    for library in ("HF_DATASETS", "HF_HUB"):
        monkeypatch.setenv(f"{library}_DISABLE_PROGRESS_BARS", "0")
    file = tmp_path / "run.toml"
    file.write_text('[model]\nname = "x"\nquantization_config = "nf4"\n' if quantized else 'model = "x"\n')
    warnings.resetwarnings()
    set_up_output(["grpo", str(file)])
    cases = [
        (SyntaxWarning, "invalid escape sequence", "/x/site-packages/sympy/a", False),
        (SyntaxWarning, "invalid escape sequence", "/home/me/rewards", True),
        (FutureWarning, "`gradient_checkpointing` is deprecated and will be removed in v6.", "transformers.a", False),
        (FutureWarning, "`gradient_checkpointing` is deprecated and will be removed in v6.", "mine", True),
        (FutureWarning, "something else", "transformers.a", True),
        (UserWarning, "something else", "transformers.a", True),
    ]
    for category, message, module, shown in cases:
        with warnings.catch_warnings(record=True) as seen:
            warnings.warn_explicit(message, category, "file.py", 1, module=module)
        assert bool(seen) == shown, (category, message, module)
    bitsandbytes = logging.getLogger("bitsandbytes.backends.cpu.ops")
    for message, shown in (("Failed to load CPU gemm_4bit_forward: %s", quantized), ("another: %s", True)):
        record = bitsandbytes.makeRecord("", logging.WARNING, "", 1, message, ("no kernels",), None)
        assert bool(bitsandbytes.filter(record)) == shown
    logging.getLogger("burnish.training").info("a detail")
    logging.getLogger("burnish.training").warning("%d rows", 3)
    logging.getLogger("burnish.config").info("accepted")
    assert capsys.readouterr().err.splitlines() == ["[burnish] warning: 3 rows", "[burnish] accepted"]


def test_importing_changes_neither_warnings_nor_loggers() -> None:
    code = (
        "import logging, warnings; before = list(warnings.filters), dict(logging.root.manager.loggerDict); "
        "import burnish, burnish.cli.main; burnish.Rubric; "
        "assert warnings.filters == before[0]; assert not logging.getLogger('burnish').handlers; "
        "assert logging.getLogger('burnish').level == logging.NOTSET"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
