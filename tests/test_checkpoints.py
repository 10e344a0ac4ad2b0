"""A checkpoint is of one run, whole, and found: what may be resumed, with which changes, and what is refused."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import tiny
from burnish import ConfigError, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from burnish.cli import stages
from burnish.config import STAGES, known_fields
from burnish.config.stages import resume_class
from burnish.runs import checkpoints
from burnish.runs.checkpoints import COMPLETE, DRAFTS, find_checkpoint, problem_of
from burnish.training.rollout_state import RolloutState
from burnish.types import Completion, Group, StopReason
from test_ppo import ppo
from test_preference_trainer import dpo, kto, losses_of
from test_trainers import PROMPTS, TEXTS, assert_same, digits, grpo, settings, sft, weights

SAVED: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    sft(folder, **SAVED).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


# Which run a checkpoint belongs to


def test_a_new_run_does_not_mix_with_the_checkpoints_of_another(run: Path) -> None:
    before = names(run)
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint = true, .* another output_dir, .*overwrite_output"):
        sft(run, **SAVED, learning_rate=1e-3).train()
    assert names(run) == before
    (run / "notes.txt").write_text("mine")
    (run / "checkpoint-old").mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    other = sft(run, **{**SAVED, "max_steps": 1}, learning_rate=1e-3, overwrite_output_dir=True)
    other.train()
    assert names(run) == ["checkpoint-1", "checkpoint-old"], "only what a run wrote is deleted"
    assert (run / "notes.txt").read_text() == "mine"
    assert "{}" not in (run / "metrics.jsonl").read_text().splitlines(), "its records are the new run's alone"


def test_the_model_of_the_run_that_is_overwritten_goes_too(run: Path) -> None:
    """A whole model beside adapters of an earlier run would be read as that run's."""
    adapted = with_lora(run, max_steps=1, overwrite_output_dir=True)
    adapted.train()
    adapted.save_model()
    assert (run / "adapter_config.json").is_file()
    (run / "README.md").write_text("the user's own words")
    again = sft(run, max_steps=1, overwrite_output_dir=True)
    again.train()
    assert not {"adapter_config.json", "adapter_model.safetensors"} & {path.name for path in run.iterdir()}
    assert (run / "README.md").read_text() == "the user's own words"


@pytest.mark.parametrize("place", ["", "checkpoint-2"])
def test_the_model_to_start_from_is_not_overwritten(run: Path, place: str) -> None:
    trainer = sft(run.parent / "base", max_steps=1)
    trainer.save_model(str(run / place))
    with pytest.raises(ConfigError, match="holds the model to start from"):
        sft(run, str(run / place), max_steps=1, overwrite_output_dir=True).train()
    training = settings(run, overwrite_output_dir=True)
    with pytest.raises(ConfigError, match="holds the model to start from"):
        stages.train("sft", str(run / place), TEXTS, training)
    assert (run / place / "model.safetensors").is_file()


def test_nothing_that_burnish_did_not_write_is_deleted(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-5"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="was not written by burnish"):
        sft(tmp_path, overwrite_output_dir=True).train()
    assert (foreign / "model.safetensors").read_bytes() == b"mine"


ROWS = [{"prompt": f"{i}-{i}=", "completion": "0"} for i in range(24)]

OTHER_ANSWERS = [{**row, "completion": row["completion"].translate(str.maketrans("01234", "56789"))} for row in TEXTS]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **changes})


def other_data(folder: Path, rows: Any = ROWS) -> Any:
    args = SFTConfig(**settings(folder, per_device_train_batch_size=8, **SAVED))
    return SFTTrainer(tiny.model(), args, train_dataset=rows, processing_class=tiny.tokenizer())


def with_lora(folder: Path, **changes: Any) -> Any:
    args = SFTConfig(**settings(folder, per_device_train_batch_size=8, **{**SAVED, **changes}))
    return SFTTrainer(tiny.model(), args, train_dataset=TEXTS, processing_class=tiny.tokenizer(), peft_config=lora())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda folder: sft(folder, **SAVED, seed=8), r"seed = 8, it was 7"),
        (lambda folder: sft(folder, **SAVED, optim="sgd"), r"optim = 'sgd', it was 'adamw_torch"),
        (lambda folder: sft(folder, **SAVED, bf16=True), r"bf16 = True, it was False"),
        (lambda folder: sft(folder, tiny.model(seed=1), **SAVED), r"model is not the one that the run began with"),
        (lambda folder: sft(folder, tiny.model("qwen3"), **SAVED), r"model is not the one that the run began with"),
        (lambda folder: sft(folder, **SAVED, per_device_train_batch_size=4), r"4 completions or rows .* it was 8"),
        (other_data, r"train_dataset differs"),
        (lambda folder: other_data(folder, OTHER_ANSWERS), r"train_dataset differs"),
        (with_lora, r"adapters \['default'\], it was none \(peft_config\)"),
        (lambda folder: grpo(folder, **SAVED), r"stage grpo, it was sft"),
    ],
)
def test_another_run_is_refused_with_what_differs(run: Path, made: Callable[[Path], Any], message: str) -> None:
    for resume in (True, str(run / "checkpoint-2")):
        with pytest.raises(ConfigError, match=f"is of another run: .*{message}"):
            made(run).train(resume_from_checkpoint=resume)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8}, r"peft_config.r = 8, it was 4"),
        ({"target_modules": ["v_proj"]}, r"\['v_proj'\], it was \['q_proj'\]"),
    ],
)
def test_adapters_of_another_shape_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    changes = {**SAVED, "max_steps": 1}
    grpo(tmp_path, **changes, peft_config=lora()).train()
    with pytest.raises(ConfigError, match=message):
        grpo(tmp_path, **changes, peft_config=lora(**config)).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match=r"num_generations = 2, it was 4"):
        grpo(tmp_path, **changes, peft_config=lora(), num_generations=2).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match=r"adapters none, it was \['default'\]"):
        grpo(tmp_path, **changes).train(resume_from_checkpoint=True)


def test_the_same_run_is_known_again_whatever_was_trained_in_memory(run: Path) -> None:
    trainer = sft(run, **SAVED)
    run_id = json.loads((run / "checkpoint-3" / "run.json").read_text())["run"]
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    again = {path.name: json.loads((path / "run.json").read_text())["run"] for path in run.glob("checkpoint-*")}
    assert again == dict.fromkeys(("checkpoint-1", "checkpoint-2", "checkpoint-3"), run_id)
    trainer.train(resume_from_checkpoint=True)  # its weights are the trained ones by now


def test_a_checkpoint_without_a_record_resumes_with_one_warning(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    older(run / "checkpoint-3")
    sft(run, **{**SAVED, "max_steps": 4}).train(resume_from_checkpoint=True)
    told = [record for record in caplog.records if "earlier version of burnish" in record.message]
    assert len(told) == 1


def older(checkpoint: Path) -> None:
    """As versions without records wrote it."""
    (checkpoint / "run.json").unlink(missing_ok=True)
    (checkpoint / COMPLETE).write_text("")


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("before", "now"), [DTYPES, DTYPES[::-1]])
def test_another_dtype_is_refused_with_and_without_a_record(
    tmp_path: Path, before: torch.dtype, now: torch.dtype
) -> None:
    """Where no record tells, the files do: no KeyError, and no weights that are half of what was saved."""
    sft(tmp_path, tiny.model(dtype=before), **{**SAVED, "max_steps": 1}).train()
    for message in ("is of another run: ", "it holds .* masters, and this run trains .* masters"):
        with pytest.raises(ConfigError, match=message):
            sft(tmp_path, tiny.model(dtype=now), **SAVED).train(resume_from_checkpoint=True)
        older(tmp_path / "checkpoint-1")


def test_a_checkpoint_without_a_record_of_adapters_is_refused_for_the_whole_model(run: Path) -> None:
    older(run / "checkpoint-3")
    with pytest.raises(ConfigError, match=r"lacks .* and \d+ other weights"):
        with_lora(run).train(resume_from_checkpoint=True)


# What may change


def test_every_field_has_one_class() -> None:
    classes: dict[str, set[str]] = {}
    for kind in STAGES:
        for name, info in known_fields(kind).items():
            classes.setdefault(name, set()).add(info.resume)
    assert {name: found for name, found in classes.items() if len(found) > 1} == {}
    assert set(map(resume_class, classes)) == {"free", "applied", "refused"}
    assert [resume_class(name) for name in ("logging_steps", "learning_rate", "seed")] == ["free", "applied", "refused"]
    assert resume_class("a_field_of_tomorrow") == "refused"


def rates(trainer: Any) -> list[float]:
    return [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]


@pytest.fixture(scope="module", params=DTYPES)
def halfway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.dtype]:
    """A run of four steps that stands at the second."""
    folder = tmp_path_factory.mktemp("halfway")
    sft(folder, tiny.model(dtype=request.param), **HALFWAY).train()
    shutil.rmtree(folder / "checkpoint-4")
    return folder, request.param


HALFWAY: dict[str, Any] = {**SAVED, "max_steps": 4, "save_steps": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-3, "weight_decay": 0.5, "adam_beta1": 0.5},
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
        {"max_steps": 6},
    ],
)
def test_learning_rate_and_schedule_take_effect(
    halfway: tuple[Path, torch.dtype], tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The steps after the resume have the rates that a run with the new settings has there."""
    shutil.copytree(halfway[0], tmp_path / "a")
    settings = {**HALFWAY, **changes, "save_strategy": "no"}
    resumed = sft(tmp_path / "a", tiny.model(dtype=halfway[1]), **settings)
    resumed.train(resume_from_checkpoint=True)
    new = sft(tmp_path / "b", **settings)
    new.train()
    assert rates(resumed)[2:] == rates(new)[2:]
    for group, expected in zip(resumed.optimizer.param_groups, new.optimizer.param_groups, strict=True):
        assert (group["weight_decay"], group["betas"]) == (expected["weight_decay"], expected["betas"])
    told = "\n".join(record.message for record in caplog.records if "resuming" in record.message)
    assert all(name in told for name in changes)


def test_another_split_of_the_same_batch_is_applied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = {**SAVED, "max_steps": 4, "save_steps": 2}
    whole = sft(tmp_path, **base)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    split = sft(tmp_path, **base, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    split.train(resume_from_checkpoint=True)
    assert_same(weights(whole), weights(split), 2e-6)
    assert any("per_device_train_batch_size = 4 (was 8)" in record.message for record in caplog.records)


def test_free_settings_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = {**SAVED, "max_steps": 4, "save_steps": 2}
    whole = sft(tmp_path / "a", **base)
    whole.train()
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = sft(tmp_path / "b", **{**base, "save_steps": 1, "save_total_limit": 1, "logging_steps": 2, "run_name": "x"})
    moved.train(resume_from_checkpoint=True)
    assert_same(weights(whole), weights(moved), 0.0)
    assert not [record for record in caplog.records if "resuming" in record.message]


# Where a run stands


@pytest.mark.parametrize("max_steps", [3, 2])
@pytest.mark.parametrize("asked", [True, False])
def test_a_run_at_its_last_step_takes_no_other(tmp_path: Path, max_steps: int, asked: bool) -> None:
    """Asked by `train` or by the configuration, as commands and pipelines do; in the middle of an epoch."""
    half = {**SAVED, "per_device_train_batch_size": 4}
    saved = sft(tmp_path, **half)
    saved.train()
    resumed = sft(tmp_path, **{**half, "max_steps": max_steps}, resume_from_checkpoint=None if asked else True)
    resumed.train(resume_from_checkpoint=True) if asked else resumed.train()
    assert resumed.state.global_step == 3
    assert_same(weights(saved), weights(resumed), 0.0)


def test_online_runs_at_their_last_step_sample_nothing(tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        return digits(completions)

    grpo(tmp_path, rewards=counted, **SAVED).train()
    before = len(calls)
    resumed = grpo(tmp_path, rewards=counted, **SAVED)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.state.global_step, len(calls)) == (3, before)


def test_going_back_sets_the_later_checkpoints_aside(run: Path) -> None:
    """They are of a course that this run leaves; the latest name must not bring it back."""
    sft(run, **{**SAVED, "max_steps": 2}, learning_rate=1e-3).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert names(run) == ["checkpoint-1", "checkpoint-2", "superseded-checkpoint-2", "superseded-checkpoint-3"]
    assert find_checkpoint(run) == run / "checkpoint-2"


# Whole checkpoints, found


BREAKS: dict[str, Callable[[Path], object]] = {
    "no complete": lambda c: (c / COMPLETE).unlink(),
    "complete is not JSON": lambda c: (c / COMPLETE).write_text("yes"),
    "complete is another JSON": lambda c: (c / COMPLETE).write_text("[1]"),
    "complete is a folder": lambda c: ((c / COMPLETE).unlink(), (c / COMPLETE).mkdir()),
    **{
        f"{name} {how}": (lambda c, name=name, act=act: act(c / name))
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth",
                     "run.json", "trainer.json", "config.json")
        for how, act in {
            "missing": lambda p: p.unlink(),
            "empty": lambda p: p.write_bytes(b""),
            "truncated": lambda p: p.write_bytes(p.read_bytes()[:-7]),
            "foreign": lambda p: p.write_bytes(b"x" * p.stat().st_size),
        }.items()
    },
    "save_only_model": lambda c: (
        (c / "optimizer.pt").unlink(), (c / "scheduler.pt").unlink(), (c / COMPLETE).write_text("")
    ),
    "complete empty": lambda c: (c / COMPLETE).write_text(""),
    "emptied": lambda c: (shutil.rmtree(c), c.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint_is_not_resumed_and_the_one_before_is(
    run: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    BREAKS[name](run / "checkpoint-3")
    (run / "checkpoint-old").mkdir()
    (run / "checkpoint-9").write_text("a file")
    assert find_checkpoint(run) == run / "checkpoint-2"
    assert any("checkpoint-3 cannot be resumed: " in record.message for record in caplog.records)
    for number in (1, 2):
        BREAKS[name](run / f"checkpoint-{number}")
    with pytest.raises(ConfigError, match=r"has no usable checkpoint \(.*checkpoint-3 cannot be resumed: "):
        find_checkpoint(run)


@pytest.mark.parametrize("name", ["no complete", "optimizer.pt truncated"])
def test_python_and_commands_find_the_same(run: Path, name: str) -> None:
    whole = sft(run.parent / "whole", **SAVED)
    whole.train()
    BREAKS[name](run / "checkpoint-3")
    with pytest.raises(ConfigError, match=r"checkpoint-3': .* latest usable checkpoint"):
        sft(run, **SAVED).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    shutil.copytree(run, run.parent / "twin")
    found = [sft(run, **SAVED), sft(run.parent / "twin", **SAVED, resume_from_checkpoint="true")]
    found[0].train(resume_from_checkpoint=True)
    found[1].train()
    for trainer in found:
        assert_same(weights(whole), weights(trainer), 0.0)
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint) if checkpoint.name != "checkpoint-1" else BREAKS[name](checkpoint)
    with pytest.raises(ConfigError, match="no usable checkpoint"):
        sft(run, **SAVED).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="no usable checkpoint"):
        sft(run, **SAVED, resume_from_checkpoint=True).train()


def test_commands_refuse_before_weights_are_loaded(run: Path) -> None:
    training = settings(run, **SAVED)
    with pytest.raises(ConfigError, match="has checkpoints of an earlier run"):
        stages.train("sft", "no-such-model", TEXTS, training)
    (run / "checkpoint-3" / COMPLETE).unlink()
    for number in (1, 2):
        shutil.rmtree(run / f"checkpoint-{number}")
    with pytest.raises(ConfigError, match="no usable checkpoint"):
        stages.train("sft", "no-such-model", TEXTS, {**training, "resume_from_checkpoint": True})


def test_files_of_earlier_versions_are_checked_by_their_ends(run: Path) -> None:
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        target = run.parent / name
        shutil.copytree(run / "checkpoint-3", target)
        older(target)
        assert problem_of(target) is None
        data = (target / name).read_bytes()
        (target / name).write_bytes(data[: len(data) // 2])
        assert problem_of(target) == f"{name} is truncated"


def operations(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> int:
    """Save a checkpoint, killed before operation `limit`; returns how many there are."""
    done = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done > limit:
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "mkdir", "unlink"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        draft = folder / DRAFTS / "checkpoint-3"
        try:
            checkpoints.discard_draft(folder)
            draft.mkdir(parents=True)
            write_checkpoint(draft, "new")
            checkpoints.publish(draft, folder)
            checkpoints.rotate(folder, 1)
        except Killed:
            pass
    return done


def write_checkpoint(folder: Path, content: str) -> None:
    state = json.dumps({"global_step": 3, "content": content})
    for name in ("model.safetensors.index.json", "trainer_state.json"):
        (folder / name).write_text(state)
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save(content, folder / name)


@pytest.mark.parametrize("before", ["checkpoint-2", "checkpoint-3"])
def test_a_kill_between_any_two_operations_leaves_one_whole_checkpoint(
    tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With save_total_limit = 1, where an older checkpoint goes and where the same one is written again."""

    def started(name: str) -> Path:
        folder = tmp_path / name
        draft = folder / DRAFTS / before
        draft.mkdir(parents=True)
        write_checkpoint(draft, "old")
        checkpoints.publish(draft, folder)
        return folder

    total = operations(started("all"), monkeypatch, 10**6)
    assert total > 5
    for limit in range(total):
        folder = started(str(limit))
        operations(folder, monkeypatch, limit)
        for _ in range(2):
            found = find_checkpoint(folder)
            assert found is not None
            assert problem_of(found) is None
            contents = {
                json.loads((found / name).read_text())["content"]
                for name in ("model.safetensors.index.json", "trainer_state.json")
            } | {torch.load(found / name) for name in ("optimizer.pt", "scheduler.pt")}
            assert len(contents) == 1, "old files beside new ones"
            checkpoints.settle(folder)
        assert not (folder / DRAFTS).exists()


def test_old_checkpoints_go_after_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers deletes first; a kill there left nothing to resume."""
    seen: list[list[str]] = []
    real = checkpoints.rotate

    def rotate(folder: Path, *args: Any, **kwargs: Any) -> None:
        seen.append(names(folder))
        assert all(problem_of(folder / name) is None for name in seen[-1])
        real(folder, *args, **kwargs)

    monkeypatch.setattr("burnish.training.checkpoint.rotate", rotate)
    sft(tmp_path, **SAVED, save_total_limit=1).train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert names(tmp_path) == ["checkpoint-3"]


def test_the_best_checkpoint_is_kept_and_named(tmp_path: Path) -> None:
    args = SFTConfig(
        **settings(tmp_path, **SAVED, per_device_train_batch_size=8, save_total_limit=1, eval_strategy="steps",
                   eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    )  # fmt: skip
    trainer = SFTTrainer(
        tiny.model(), args, train_dataset=TEXTS, eval_dataset=TEXTS[:8], processing_class=tiny.tokenizer()
    )
    trainer.train()  # the loss falls, so the highest is the first
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1"]


# State that transformers does not know


@pytest.mark.parametrize("make", [dpo, kto])
def test_a_moved_reference_is_restored_to_the_bit(tmp_path: Path, make: Callable[..., Any]) -> None:
    """Losses, too: they are what a moved reference changes first. Two epochs, so that known sums are asked again."""
    changes = {**SAVED, "max_steps": 6, "sync_ref_model": True, "ref_model_sync_steps": 2, "learning_rate": 0.05}
    whole = make(tmp_path, per_device_train_batch_size=4, **changes)
    whole.train()
    for at in (5, 3, 2):
        resumed = make(tmp_path, per_device_train_batch_size=4, **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert losses_of(resumed) == losses_of(whole)
        assert_same(weights(whole), weights(resumed), 0.0)
        own = [dict(trainer.stage.reference.model.named_parameters()) for trainer in (whole, resumed)]
        assert_same(*own, 0.0)
    older(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "reference.pt").unlink()
    with pytest.raises(ConfigError, match=r"reference\.pt is missing"):
        make(tmp_path, per_device_train_batch_size=4, **changes).train(str(tmp_path / "checkpoint-5"))


def test_another_reference_model_is_another_run(tmp_path: Path) -> None:
    dpo(tmp_path, **SAVED, ref_model=tiny.model(seed=5)).train()
    for changes in ({"ref_model": tiny.model(seed=6)}, {}):
        with pytest.raises(ConfigError, match="ref_model is not the one that the run began with"):
            dpo(tmp_path, **SAVED, **changes).train(resume_from_checkpoint=True)


def test_a_fixed_kl_coefficient_is_the_configuration_s(tmp_path: Path) -> None:
    changes = {**SAVED, "max_steps": 1}
    grpo(tmp_path, **changes, beta=0.1).train()
    resumed = grpo(tmp_path, **{**changes, "max_steps": 2}, beta=0.3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.stage.algorithm.kl.coefficient == 0.3


def test_the_critic_s_optimizer_takes_changed_settings(tmp_path: Path) -> None:
    changes = {**SAVED, "max_steps": 1}
    ppo(tmp_path, **changes).train()
    resumed = ppo(tmp_path, **{**changes, "max_steps": 2}, weight_decay=0.5, adam_beta1=0.5, value_learning_rate=0.02)
    resumed.train(resume_from_checkpoint=True)
    groups = resumed.stage.algorithm.critic.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert {group["betas"][0] for group in groups} == {0.5}


# Samples in flight


def test_rows_of_any_kind_stay_in_the_data_set(tmp_path: Path) -> None:
    row = {"prompt": "1", "when": datetime.datetime(2024, 1, 1), "by": {(1, 2): b"x"}, "object": object()}
    prompts = [Group([1], [], {"prompt": "0"}, 4), Group([2], [], row, 7)]
    sampled = dataclasses.replace(prompts[1], completions=[Completion([3], text="a", policy_logprobs=[-0.1])])
    sampled.completions[0].stop_reason = StopReason.SETTLED
    state = RolloutState(1, 2, 3, 0.5, [[sampled]], {9: sampled}, {"beta": 0.1}, {7: 1})
    state.save(tmp_path, 0)
    back = RolloutState.load(tmp_path, rank=0, world=1, prompts=prompts)
    assert back == state
    assert back.buffer[0][0].row is row
    with pytest.raises(ConfigError, match="row 7 of train_dataset"):
        RolloutState.load(tmp_path, rank=0, world=1, prompts=prompts[:1])


@pytest.mark.parametrize(("wrote", "world"), [(2, 1), (1, 2), (3, 2)])
def test_samples_in_flight_stay_with_their_processes(tmp_path: Path, wrote: int, world: int) -> None:
    group = Group([2], [Completion([3])], {}, 0)
    empty = RolloutState(1, 2, 3, 0.5, [], {9: group}, {})
    for rank in range(wrote):
        empty.save(tmp_path, rank)
    for rank in range(world):
        assert RolloutState.load(tmp_path, rank=rank, world=world, prompts=[group]) == empty
    dataclasses.replace(empty, buffer=[[group]]).save(tmp_path, wrote - 1)
    with pytest.raises(ConfigError, match=f"{wrote} processes have samples in flight and {world} would continue"):
        RolloutState.load(tmp_path, rank=0, world=world, prompts=[group])


def test_a_resumed_run_with_such_rows_is_the_uninterrupted_one(tmp_path: Path) -> None:
    rows = [{**row, "when": datetime.date(2024, 1, 1 + i), "by": {(i, i): i}} for i, row in enumerate(PROMPTS)]
    seen: list[Any] = []

    def dated(completions: list[str], when: list[Any], by: list[Any], **columns: Any) -> list[float]:
        seen.extend(zip(when, by, strict=True))
        return digits(completions)

    def made() -> GRPOTrainer:
        args = GRPOConfig(**settings(tmp_path, **SAVED, steps_per_generation=2, per_device_train_batch_size=12,
                                     num_generations=4, max_completion_length=8))  # fmt: skip
        return GRPOTrainer(tiny.model(), dated, args, rows, processing_class=tiny.tokenizer())

    whole = made()
    whole.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(weights(whole), weights(resumed), 0.0)
    assert all(isinstance(when, datetime.date) and isinstance(by, dict) for when, by in seen)
