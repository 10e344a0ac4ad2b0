"""Held-out sets: by name, steering a run in every stage; metrics are known before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback

import burnish
import tiny
from burnish import ConfigError, DataError
from burnish.training.evaluation_sets import TIMINGS
from test_preference_trainer import LABELLED, PAIRS
from test_trainers import PROMPTS, TEXTS, digits, settings

ROWS: dict[str, Any] = {"SFT": TEXTS, "Reward": PAIRS, "DPO": PAIRS, "KTO": LABELLED}
OFFLINE = tuple(ROWS)
ONLINE = ("GRPO", "RLOO", "PPO", "OnlineDPO")


def made(stage: str, folder: Path, *, evaluated: Any = None, callbacks: Any = None, **changes: Any) -> Any:
    """A trainer of a stage with held-out rows."""
    rows = ROWS.get(stage, PROMPTS)
    online: dict[str, Any] = {"max_completion_length": 6} if stage in ONLINE else {}
    if stage in ("GRPO", "RLOO"):
        online["num_generations"] = 4
    args = getattr(burnish, f"{stage}Config")(
        **settings(folder, **{"per_device_train_batch_size": 8, **online, **changes})
    )
    rewards = {"reward_funcs": digits} if stage in ONLINE else {}
    return getattr(burnish, f"{stage}Trainer")(
        model=tiny.model(), args=args, train_dataset=rows, eval_dataset=rows[:4] if evaluated is None else evaluated,
        processing_class=tiny.tokenizer(), callbacks=callbacks, **rewards,
    )  # fmt: skip


@pytest.mark.parametrize("stage", [*OFFLINE, *ONLINE])
def test_sets_by_name_have_metrics_by_name(stage: str, tmp_path: Path) -> None:
    rows = ROWS.get(stage, PROMPTS)
    trainer = made(
        stage, tmp_path, evaluated={"first": rows[:4], "rest": rows[4:8]}, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    logged = {name for log in trainer.state.log_history for name in log}
    assert {"eval_first_loss", "eval_rest_loss"} <= logged
    assert "eval_loss" not in logged
    one = made(stage, tmp_path / "one", evaluated=rows[4:8]).evaluate()["eval_loss"]
    both = made(stage, tmp_path / "both", evaluated={"first": rows[:4], "rest": rows[4:8]}).evaluate()
    assert both["eval_rest_loss"] == pytest.approx(one, abs=1e-6)
    assert trainer.evaluate({"other": rows[8:12]}).keys() >= {
        f"eval_other_{name}" for name in trainer.stage.evaluation_names(trainer.stage.encode(rows[8:12], "other"))
    }
    assert trainer.evaluate("rest").keys() >= {"eval_loss"}
    with pytest.raises(DataError, match="not an evaluation set of this trainer, which has 'first', 'rest'"):
        trainer.evaluate("zzz")


def test_a_reference_is_asked_once_for_each_set(tmp_path: Path) -> None:
    trainer = made("DPO", tmp_path, evaluated={"a": PAIRS[:3], "b": PAIRS[3:6]})
    asked: list[int] = []
    whole = trainer.stage.scores.of_reference
    trainer.stage.scores.of_reference = lambda groups: asked.append(len(groups)) or whole(groups)
    for _ in range(2):
        trainer.evaluate()
    assert asked == [3, 3]


@pytest.mark.parametrize("stage", ["SFT", "KTO", "GRPO", "PPO"])
def test_a_run_keeps_its_best_model_and_stops_early(stage: str, tmp_path: Path) -> None:
    steered: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True, "max_steps": 3, "learning_rate": 1e-3,
    }  # fmt: skip
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)
    trainer = made(stage, tmp_path, callbacks=[stopping], **steered)
    trainer.train()
    assert trainer.state.best_metric is not None
    assert trainer.state.global_step == 2  # no loss is better than the first by a billion


@pytest.mark.parametrize("stage", ["SFT", "GRPO"])
def test_a_plateau_lowers_the_learning_rate(stage: str, tmp_path: Path) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 1e9}}
    trainer = made(stage, tmp_path, eval_strategy="steps", eval_steps=1, max_steps=4, **plateau)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] < 1e-2


@pytest.mark.parametrize("stage", [*OFFLINE, *ONLINE])
def test_a_metric_that_no_evaluation_yields_is_known_before_the_first_step(stage: str, tmp_path: Path) -> None:
    best: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True,
    }  # fmt: skip
    trainer = made(stage, tmp_path, metric_for_best_model="accuracy_of_moon", **best)
    with pytest.raises(ConfigError, match=r"^metric_for_best_model = 'accuracy_of_moon': .* use one of eval_loss"):
        trainer.train()
    assert trainer.state.global_step == 0
    by_set = made(stage, tmp_path, evaluated={"a": ROWS.get(stage, PROMPTS)[:4]}, **best)
    with pytest.raises(ConfigError, match=r"^metric_for_best_model = 'loss': .* use one of eval_a_loss"):
        by_set.train()


STEPWISE = [{"prompt": f"{i}?", "completions": ["a", f"b{i}"], "labels": [True, i % 2 == 0]} for i in range(16)]
ODD_SETS: dict[str, Any] = {
    "KTO, all good": [row for row in LABELLED if row["label"]][:4],
    "KTO, all bad": [row for row in LABELLED if not row["label"]][:4],
    "KTO, one row": LABELLED[:1],
    "Reward, steps": STEPWISE[:4],
    "DPO, one pair": PAIRS[:1],
    "SFT, one row": TEXTS[:1],
    "GRPO, one prompt": PROMPTS[:1],
}
STEERED: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "load_best_model_at_end": True, "max_steps": 1,
}  # fmt: skip


@pytest.mark.parametrize("case", [*OFFLINE, *ONLINE, *ODD_SETS])
def test_exactly_the_metrics_of_an_evaluation_are_known_before_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = case.partition(",")[0]
    if case == "Reward, steps":
        monkeypatch.setitem(ROWS, "Reward", STEPWISE)
    rows = ODD_SETS.get(case)
    sets = None if rows is None else {"odd": rows, "whole": ROWS.get(stage, PROMPTS)[:4]}
    trainer = made(stage, tmp_path, evaluated=sets, metric_for_best_model="nope", **STEERED)
    with pytest.raises(ConfigError) as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    said = str(caught.value).partition("use one of ")[2].rstrip(".").split(", ")
    found = {name for name in trainer.evaluate() if not name.endswith(("epoch", *TIMINGS))}
    assert set(said) == found
    if rows is not None:  # and what is offered works
        made(stage, tmp_path / "run", evaluated=sets, metric_for_best_model=max(found), **STEERED).train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"callbacks": [EarlyStoppingCallback()]}, r"^EarlyStoppingCallback with metric_for_best_model = None: name"),
        ({"save_strategy": "best"}, r"^save_strategy = 'best' with metric_for_best_model = None: name the metric"),
        (
            {"callbacks": [EarlyStoppingCallback()], "metric_for_best_model": "loss", "eval_strategy": "no"},
            r"^EarlyStoppingCallback with eval_strategy = 'no': there is no metric to track; set eval_strategy",
        ),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "no"},
            r"^save_strategy = 'best' with eval_strategy = 'no'",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "odd"},
            "^metric_for_best_model = 'odd'",
        ),
        ({"callbacks": [EarlyStoppingCallback()], "metric_for_best_model": "x"}, "^metric_for_best_model = 'x'"),
    ],
)
@pytest.mark.parametrize("stage", ["SFT", "GRPO"])
def test_what_follows_a_metric_needs_one(stage: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    def run() -> None:
        made(stage, tmp_path, **{"eval_strategy": "steps", "eval_steps": 1, **changes}).train()

    with pytest.raises(ConfigError, match=words):
        run()


@pytest.mark.parametrize("follower", ["best", "stopping", "plateau"])
@pytest.mark.parametrize("stage", ["DPO", "GRPO"])
def test_a_metric_of_the_users_that_does_not_come_is_named(stage: str, follower: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "best": dict(STEERED),
        "stopping": {"callbacks": [EarlyStoppingCallback()], "eval_strategy": "steps", "eval_steps": 1},
        "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
    }[follower]
    changes["max_steps"] = 1
    trainer = made(stage, tmp_path, metric_for_best_model="mine", **changes)
    trainer.stage.compute_metrics = lambda _: {"other": 1.0}
    with pytest.raises(ConfigError, match=r"^metric_for_best_model = 'mine': .*eval_other"):
        trainer.train()
    assert trainer.evaluate()["eval_other"] == 1.0, "after the run that failed nothing is followed any more"
    good = made(stage, tmp_path / "good", metric_for_best_model="mine", **changes)
    good.stage.compute_metrics = lambda _: {"mine": 1.0}
    good.train()


def test_a_run_may_follow_what_a_reward_logs(tmp_path: Path) -> None:
    def reward(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        log_metric("mine", float(len(completions)))
        return digits(completions)

    trainer = made("GRPO", tmp_path, metric_for_best_model="mine", greater_is_better=True, **STEERED)
    trainer.stage.rubric = burnish.Rubric.from_functions(reward)
    trainer.train()
    assert trainer.state.best_metric == 16.0


@pytest.mark.parametrize("changes", [
    {}, {"beta": 0.1}, {"entropy_coef": 0.1, "top_entropy_quantile": 0.5}, {"num_generations_eval": 1},
    {"algorithm": "reinforce_pp", "kl_target": 1.0}, {"algorithm": "maxrl"}, {"sampling_correction": "token_truncate"},
])  # fmt: skip
def test_a_loss_of_held_out_samples_moves_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    """Neither the weights nor the state of training: with and without evaluations a run is the same to the bit."""
    runs = []
    for name in ("plain", "evaluated"):
        steered = {"eval_strategy": "steps", "eval_steps": 1} if name == "evaluated" else {}
        trainer = made("GRPO", tmp_path / name, **changes, **steered)
        trainer.train()
        runs.append((trainer, [log for log in trainer.state.log_history if "loss" in log]))
    (plain, logs), (evaluated, others) = runs
    timed = tuple(name for log in (*logs, *others) for name in log if name.startswith("seconds/"))
    assert [{k: v for k, v in log.items() if k not in timed} for log in logs] == [
        {k: v for k, v in log.items() if k not in timed} for log in others
    ]
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), evaluated.model.parameters(), strict=True))
    losses = [log["eval_loss"] for log in evaluated.state.log_history if "eval_loss" in log]
    assert len(losses) == 3
    assert all(loss == loss for loss in losses)


def test_the_loss_of_held_out_samples_is_that_of_a_step(tmp_path: Path) -> None:
    """On the prompts of a step, with its seed, the evaluation's loss is the step's own."""
    trainer = made(
        "GRPO", tmp_path, evaluated=PROMPTS[:2], beta=0.1, learning_rate=0.0, max_steps=1, shuffle_dataset=False,
        seed=7,
    )  # fmt: skip
    ref = {name: p + 0.05 for name, p in trainer.stage.reference.model.named_parameters()}
    trainer.stage.reference.model.load_state_dict(ref, strict=False)
    trainer.stage.reference = type(trainer.stage.reference)(trainer.stage.reference.model, is_initial_policy=False)
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.args.seed = 8  # an evaluation draws with the next seed
    trainer.train()
    assert abs(evaluated) > 1e-3
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [evaluated] == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("stage", ["SFT", "GRPO"])
def test_predictions_are_refused(stage: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluate\\(rows, metric_key_prefix='test'\\)"):
        made(stage, tmp_path).predict(ROWS.get(stage, PROMPTS)[:2])


@pytest.mark.parametrize("stage", ["DPO", "KTO"])
def test_references_are_computed_first_more_than_once(stage: str, tmp_path: Path) -> None:
    """By a second train(), another trainer in the same folder, and after an evaluation that came before."""
    trainer = made(stage, tmp_path, precompute_ref_log_probs=True, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.train()
    trainer.evaluate()
    again = made(stage, tmp_path, precompute_ref_log_probs=True)
    again.evaluate()
    again.train()


@pytest.mark.parametrize("stage", ONLINE)
def test_rewards_see_the_state_of_the_trainer(stage: str, tmp_path: Path) -> None:
    seen: list[int] = []

    def reward(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        seen.append(trainer_state.global_step)
        return digits(completions)

    trainer = made(stage, tmp_path, **({"num_iterations": 1} if stage == "PPO" else {}))
    trainer.stage.rubric = burnish.Rubric.from_functions(reward)
    trainer.train()
    assert sorted(set(seen)) == [0, 1, 2]
    trainer.evaluate()
    assert seen[-1] == 3
