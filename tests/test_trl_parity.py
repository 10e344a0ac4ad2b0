"""Our losses equal TRL's on one batch, one micro-batch, one rank, fp32. Slow: TRL runs in its own environment."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from burnish.model.classifier import to_reward_model
from test_preference_trainer import LABELLED, PAIRS, losses_of
from test_trainers import settings

ROOT = Path(__file__).parent.parent
TRL = ROOT / ".venv-trl" / "bin" / "python"

# TRL finds assistant turns by these marks alone.
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHATS = [
    [
        {"role": "user", "content": f"{i}+{i}?"},
        {"role": "assistant", "content": str(2 * i)},
        {"role": "user", "content": "sure?" + "?" * (i % 3)},
        {"role": "assistant", "content": "yes" * (1 + i % 2)},
    ]
    for i in range(12)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": PAIRS,
    "labelled": LABELLED,
    # Of one length, so that policy and reference put pairs in different orders: what losses that sort pairs look at.
    "even": [
        {"prompt": f"{i}=", "chosen": f"{(37 * i) % 90 + 10}", "rejected": f"{(53 * i) % 90 + 10}x"} for i in range(12)
    ],
    # Not one token is shared, so there is no prompt.
    "promptless": [{"chosen": f"{row['chosen']}+1", "rejected": row["rejected"]} for row in PAIRS],
    "margins": [{**row, "margin": 0.25 * (i % 4)} for i, row in enumerate(PAIRS)],
    "texts": [{"text": row["prompt"] + row["chosen"]} for row in PAIRS],
    "completions": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS],
    "chats": [{"messages": chat} for chat in CHATS],
    "chat_completions": [{"prompt": chat[:3], "completion": chat[3:]} for chat in CHATS],
}


@dataclass(frozen=True)
class Case:
    """Which trainers, on which rows, with which fields of TRL's config and of ours (the same if None)."""

    trainer: str
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] | None = None
    rows: str = "pairs"

    @property
    def own_config(self) -> dict[str, Any]:
        return self.theirs if self.ours is None else self.ours


DPO_LOSSES = (
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


def cases() -> dict[str, Case]:
    """Where one number of TRL's and one of ours must be the same."""
    made: dict[str, Case] = {}
    for name in DPO_LOSSES:
        smoothing = 0.1 if name in SMOOTHED else 0.0
        sorts = name.startswith("aot")
        # A large beta bends the loss, so that it matters which of the sorted values meet.
        config = {"loss_type": [name], "beta": 8.0 if sorts else 0.3, "label_smoothing": smoothing}
        made[name] = Case("dpo", config, rows="even" if sorts else "pairs")
    for kind in ("forward_kl", "js_divergence", "alpha_divergence"):
        made[kind] = Case("dpo", {"loss_type": ["sigmoid"], "f_divergence_type": kind, "beta": 0.3})
    made["mpo"] = Case("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]})
    made["ld"] = Case("dpo", {"ld_alpha": 0.4})
    made["wpo"] = Case("dpo", {"use_weighting": True})
    simpo = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}
    made["simpo"] = Case("cpo", {**simpo, "cpo_alpha": 0.0}, simpo)
    alphapo = {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.0, "simpo_gamma": 0.5}
    made["alphapo"] = Case("cpo", alphapo)
    made["cpo"] = Case("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.0}, {"loss_type": "cpo"})
    orpo = {"loss_type": ["sft", "orpo"], "loss_weights": [1.0, 0.7]}
    made["orpo without prompts"] = Case("orpo", {"beta": 0.7}, orpo, "promptless")
    made["kto"] = Case("kto", {"beta": 0.3, "undesirable_weight": 1.5}, rows="labelled")
    made["apo_zero_unpaired"] = Case("kto", {"loss_type": "apo_zero_unpaired", "beta": 0.3}, rows="labelled")
    made["reward"] = Case("reward")
    made["reward, another pad token"] = Case("reward", {"pad_token": "<unk>"})
    made["reward, margins"] = Case("reward", rows="margins")
    made["reward, centred"] = Case("reward", {"center_rewards_coefficient": 0.3}, rows="margins")
    made["sft, text"] = Case("sft", rows="texts")
    made["sft, dft"] = Case("sft", {"loss_type": "dft"}, rows="texts")
    made["sft, completions"] = Case("sft", rows="completions")
    made["sft, prompts too"] = Case("sft", {"completion_only_loss": False}, rows="completions")
    made["sft, dft of completions"] = Case("sft", {"loss_type": "dft"}, rows="completions")
    made["sft, messages"] = Case("sft", rows="chats")
    made["sft, assistant only"] = Case("sft", {"assistant_only_loss": True}, rows="chats")
    made["sft, chat completions"] = Case("sft", rows="chat_completions")
    return made


EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
ACCURACY = [name for name in cases() if name.startswith("sft,")]
"""Every mask of SFT's."""

HALVES = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}


def only_theirs() -> dict[str, Case]:
    """Numbers of TRL's that differ from ours, or from themselves in another split, for a reason shown below."""
    made = {f"orpo, beta {beta}": Case("orpo", {"beta": beta}) for beta in (0.0, 0.7)}
    for name in ("aot", "aot_unpaired", "sft", "sigmoid", "kto", "sft, completions"):
        case = cases()[name]
        made[f"{name} in halves"] = Case(case.trainer, {**case.theirs, **HALVES}, rows=case.rows)
    for name in ACCURACY:
        case = cases()[name]
        whole = {**case.theirs, **EVALUATED, "per_device_eval_batch_size": len(ROWS[case.rows])}
        made[f"{name}, evaluated"] = Case("sft", whole, rows=case.rows)
        made[f"{name}, evaluated by 5"] = Case("sft", {**whole, "per_device_eval_batch_size": 5}, rows=case.rows)
    made["orpo in halves"] = Case("orpo", {"beta": 0.7, **HALVES})
    return made


def tokenizer() -> Any:
    made = tiny.tokenizer()
    made.chat_template = MARKED
    return made


def classifier() -> Any:
    made = to_reward_model(tiny.model(), seed=3)
    # Larger than the usual start: scores must be far from 0 for a mistake to show.
    made.score.weight.data *= 20
    return made


@pytest.fixture(scope="module")
def trl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not TRL.is_file():
        pytest.skip("TRL's environment is not there: make trl")
    folder = tmp_path_factory.mktemp("trl")
    models = {"policy": tiny.model(), "reference": tiny.model(seed=5), "reward": classifier()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    given = {
        name: {"trainer": case.trainer, "config": case.theirs, "rows": case.rows}
        for name, case in (cases() | only_theirs()).items()
    }
    (folder / "cases.json").write_text(json.dumps({"cases": given, "rows": ROWS}))
    done = subprocess.run(
        [TRL, "-W", "ignore", Path(__file__).parent / "trl_worker.py", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def trl_losses(trl_folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((trl_folder / "losses.json").read_text())
    return found


@pytest.fixture(scope="module")
def trl_logs(trl_folder: Path) -> dict[str, dict[str, float]]:
    """All metrics that a case has logged."""
    found: dict[str, list[dict[str, float]]] = json.loads((trl_folder / "logs.json").read_text())
    return {name: {key: value for log in logs for key, value in log.items()} for name, logs in found.items()}


def own_loss(folder: Path, case: Case, **changes: Any) -> float:
    """The first step's loss here, at a learning rate of 0."""
    rows = ROWS[case.rows]
    config = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": len(rows), **changes}
    shared = {**settings(folder, **config), **case.own_config}
    given: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer()}
    trainer: Any
    match case.trainer:
        case "sft":
            trainer = SFTTrainer(tiny.model(), SFTConfig(**shared), **given)
        case "reward":
            trainer = RewardTrainer(classifier(), RewardConfig(**shared), **given)
        case "kto":
            args = KTOConfig(**shared, train_sampling_strategy="sequential")
            trainer = KTOTrainer(tiny.model(), tiny.model(seed=5), args, **given)
        case _:
            reads = case.trainer == "dpo" and case.own_config.get("loss_type") != ["sft"]
            trainer = DPOTrainer(tiny.model(), tiny.model(seed=5) if reads else None, DPOConfig(**shared), **given)
    trainer.train()
    # transformers rounds what it logs to 4 places here and there; compare what the trainers computed.
    return losses_of(trainer)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_the_loss_is_trl_s(
    tmp_path: Path, trl_losses: dict[str, float], name: str, record_property: Callable[[str, object], None]
) -> None:
    ours = own_loss(tmp_path, cases()[name])
    record_property("difference", abs(ours - trl_losses[name]))
    assert ours == pytest.approx(trl_losses[name], rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCURACY)
def test_token_accuracy_is_trl_s_in_one_batch_and_of_all_tokens_in_several(
    tmp_path: Path, trl_logs: dict[str, dict[str, float]], name: str
) -> None:
    """TRL's is a mean over batches of their accuracies, which several batches of unlike lengths change."""
    case, rows = cases()[name], ROWS[cases()[name].rows]
    by: list[dict[str, float]] = []
    for size in (len(rows), 5):
        config = {**EVALUATED, "max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": len(rows)}
        args = SFTConfig(**settings(tmp_path, **config, per_device_eval_batch_size=size), **case.own_config)
        trainer = SFTTrainer(tiny.model(), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer())
        trainer.train()
        by.append({key: value for log in trainer.state.log_history for key, value in log.items()})
    theirs, in_parts = trl_logs[f"{name}, evaluated"], trl_logs[f"{name}, evaluated by 5"]
    for metric in ("mean_token_accuracy", "eval_mean_token_accuracy", "entropy", "eval_entropy"):
        # Counts of tokens are equal; entropies are sums in fp32.
        assert by[0][metric] == pytest.approx(theirs[metric], abs=1e-5), metric
    assert by[1]["eval_mean_token_accuracy"] == pytest.approx(by[0]["eval_mean_token_accuracy"], abs=1e-7)
    if name == "sft, completions":  # the rows of other sets are too alike in length and score
        assert abs(in_parts["eval_entropy"] - theirs["eval_entropy"]) > 1e-5


@pytest.mark.slow
def test_orpo_s_likelihood_is_of_the_prompt_too_in_trl(tmp_path: Path, trl_losses: dict[str, float]) -> None:
    """TRL's ORPO is NLL(prompt and chosen) + beta OR; the paper's, and ours, takes the NLL of the chosen completion."""
    odds = own_loss(tmp_path / "odds", Case("orpo", ours={"loss_type": "orpo"}))
    whole = own_loss(tmp_path / "whole", cases()["sft, prompts too"])
    completion = own_loss(tmp_path / "completion", cases()["sft, completions"])
    assert trl_losses["orpo, beta 0.0"] == pytest.approx(whole, abs=1e-5)
    assert trl_losses["orpo, beta 0.7"] == pytest.approx(whole + 0.7 * odds, abs=1e-5)
    recipe = {"loss_type": ["sft", "orpo"], "loss_weights": [1.0, 0.7]}
    assert own_loss(tmp_path / "recipe", Case("orpo", ours=recipe)) == pytest.approx(completion + 0.7 * odds, abs=1e-5)
    assert abs(whole - completion) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "sft", "kto", "orpo"])
def test_a_loss_that_depends_on_the_split_in_trl_does_not_here(
    tmp_path: Path, trl_losses: dict[str, float], name: str, record_property: Callable[[str, object], None]
) -> None:
    known = {**cases(), "orpo": Case("orpo", {"beta": 0.7}, {"loss_type": ["sft", "orpo"], "loss_weights": [1.0, 0.7]})}
    theirs = [trl_losses["orpo, beta 0.7" if name == "orpo" else name], trl_losses[f"{name} in halves"]]
    record_property("whole and in halves", theirs)
    assert abs(theirs[0] - theirs[1]) > 1e-4
    ours = own_loss(tmp_path / "whole", known[name])
    assert own_loss(tmp_path / "halves", known[name], **HALVES) == pytest.approx(ours, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid", "sft, completions"])
def test_a_loss_that_is_the_same_in_halves_in_trl(trl_losses: dict[str, float], name: str) -> None:
    """So the differences above are the losses', and not the halves'."""
    assert trl_losses[f"{name} in halves"] == pytest.approx(trl_losses[name], abs=1e-5)
