"""Several processes, signals and two runs in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish import ConfigError, SFTConfig
from burnish.cli.main import main
from burnish.errors import FileError, Interrupted
from burnish.runs.files import read_json_lines
from burnish.runs.lock import LOCK, locked
from test_trainers import digits, grpo, settings, sft

WORKER = Path(__file__).parent / "signal_worker.py"


def start(folder: Path, *words: Any, ranks: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(WORKER), str(folder), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def transcripts(folder: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(folder / "transcripts.jsonl"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_at_the_step_boundary_and_the_resumed_run_is_whole(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    changes: dict[str, Any] = {"log_completions": True, "logprob_check_bound": 1.0}
    whole = grpo(tmp_path / "whole", **changes)
    whole.train()

    def signalled(completions: list[str], **columns: Any) -> list[float]:
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), number)
        return digits(completions, **columns)

    signalled.__name__ = "digits"
    before = signal.getsignal(number)
    trainer = grpo(tmp_path / "run", rewards=signalled, **changes)
    with pytest.raises(Interrupted, match=rf"{name}: stopped after step 2, saved .*checkpoint-2") as caught:
        trainer.train()
    assert caught.value.exit_status == 128 + number
    assert signal.getsignal(number) == before
    resumed = grpo(tmp_path / "run", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert transcripts(tmp_path / "run") == transcripts(tmp_path / "whole")


def test_a_signal_in_the_last_save_does_not_save_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = sft(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    saves: list[int] = []
    original = trainer._save_checkpoint

    def signalled(*args: Any) -> None:
        saves.append(trainer.state.global_step)
        os.kill(os.getpid(), signal.SIGTERM)
        original(*args)

    monkeypatch.setattr(trainer, "_save_checkpoint", signalled)
    with pytest.raises(Interrupted, match=r"after step 2, saved .*checkpoint-2"):
        trainer.train()
    assert saves == [2]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_signals_that_are_ignored_or_handled_stay_so(tmp_path: Path, handler: Any) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        seen: list[Any] = []
        trainer = grpo(tmp_path, rewards=lambda completions, **_: seen.append(signal.getsignal(signal.SIGHUP)) or
                       [float(len(c)) for c in completions], max_steps=1)  # fmt: skip
        trainer.train()
        assert seen == [handler]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_outside_the_main_thread_takes_no_signal(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def run() -> None:
        try:
            sft(tmp_path, max_steps=1).train()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    run = start(tmp_path, 600)
    wait_for(lambda: (tmp_path / "call-1-0").exists())
    run.terminate()
    time.sleep(0.5)
    assert run.poll() is None
    run.terminate()
    assert run.wait(timeout=20) == -signal.SIGTERM
    assert "SIGTERM: stopping after this step" in (run.communicate()[1])


def test_the_command_exits_with_the_signal_and_prints_the_line_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{tmp_path}/model"\n[data]\ntrain = {{ path = "{tmp_path}/rows.jsonl" }}\n'
        f'[training]\noutput_dir = "{tmp_path}/out"\nmax_steps = 3\nuse_cpu = true\nreport_to = "none"\n'
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 8)
    from burnish.training.callbacks import MetricsCallback

    def signalled(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsCallback, "on_step_begin", signalled)
    assert main(["sft", str(file)]) == 128 + signal.SIGTERM
    message = capsys.readouterr().err.splitlines()[-1]
    line = f"burnish sft {file} --training.resume_from_checkpoint=true"
    assert message == f"burnish sft: SIGTERM after step 1. To continue from the last checkpoint: {line}"
    monkeypatch.undo()
    assert main(line.split()[1:]) == 0
    assert [record["step"] for record in read_json_lines(tmp_path / "out" / "metrics.jsonl")] == [1, 3]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_ranks_without_accelerators_train_together_and_stop_together(tmp_path: Path) -> None:
    run = start(tmp_path, 2, ranks=2)
    # One rank is signalled, both stop; which step depends on when the ranks compare.
    wait_for(lambda: (tmp_path / "call-2-1").exists())
    child = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(child[-1]), signal.SIGTERM)
    out, err = run.communicate(timeout=200)
    assert "SIGTERM: stopped after step 2, saved" in out, err[-2000:]
    assert "world 2" in out
    assert (tmp_path / "checkpoint-2" / "complete").is_file()
    resumed = start(tmp_path, 0, "resume", ranks=2)
    out, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err[-2000:]
    assert out.count("finished step 3 of world 2") == 2
    assert [(r["step"], r["sample"]) for r in transcripts(tmp_path)] == [
        (s, i) for s in (1, 2, 3) for _ in range(2) for i in range(4)
    ]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_ranks_that_would_train_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr("burnish.trainers.configs.needs_cpu", lambda: False)
    changes = {k: v for k, v in settings(tmp_path).items() if k != "use_cpu"}
    with pytest.raises(ConfigError, match=r"the launcher started 2 processes, and each would train alone \(RANK"):
        SFTConfig(**changes)


@pytest.mark.parametrize("command", ["eval", "pairs", "pipeline"])
def test_commands_of_one_process_refuse_a_launcher(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, "run.toml"]) == 2
    assert f"the launcher started 2 processes, and `burnish {command}` runs as one" in capsys.readouterr().err


HOLDER = """
import sys, time
from burnish.runs.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    trainer = sft(tmp_path, max_steps=1)
    with pytest.raises(FileError, match=rf"output_dir = '{tmp_path}': process {holder.pid} on .* writes there"):
        trainer.train()
    holder.kill()
    holder.communicate()
    assert (tmp_path / LOCK).is_file()  # stale: the file of a killed process holds nobody up
    (tmp_path / "metrics.jsonl.1.draft").write_text("cut")
    trainer.train()
    assert not (tmp_path / LOCK).exists()
    assert not (tmp_path / "metrics.jsonl.1.draft").exists()


def test_a_lock_is_entered_again_by_its_process_only(tmp_path: Path) -> None:
    with locked(tmp_path):
        with locked(tmp_path / "." / ""):
            assert (tmp_path / LOCK).is_file()
        assert (tmp_path / LOCK).is_file()
        child = os.fork()
        if child == 0:
            try:
                with locked(tmp_path):
                    os._exit(1)
            except FileError as error:
                os._exit(0 if f"process {os.getppid()} " in str(error) else 2)
        assert os.waitpid(child, 0)[1] == 0
    assert not (tmp_path / LOCK).exists()
