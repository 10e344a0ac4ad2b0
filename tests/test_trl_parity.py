"""Our losses equal TRL's on one batch, one micro-batch, one rank, fp32. Slow: TRL runs in its own environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from test_preference_trainer import LABELLED, PAIRS, losses_of
from test_trainers import settings

ROOT = Path(__file__).parent.parent
TRL = ROOT / ".venv-trl" / "bin" / "python"

# name -> (TRL's trainer and config, our config)
DPO_LOSSES = (
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


def cases() -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    made: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
    for name in DPO_LOSSES:
        config = {"loss_type": [name], "beta": 0.3, "label_smoothing": 0.1 if name in SMOOTHED else 0.0}
        made[name] = ("dpo", config, config)
    for kind in ("forward_kl", "js_divergence", "alpha_divergence"):
        config = {"loss_type": ["sigmoid"], "f_divergence_type": kind, "beta": 0.3}
        made[kind] = ("dpo", config, config)
    mixed = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    made["mpo"] = ("dpo", mixed, mixed)
    made["ld"] = ("dpo", {"ld_alpha": 0.4}, {"ld_alpha": 0.4})
    made["wpo"] = ("dpo", {"use_weighting": True}, {"use_weighting": True})
    made["simpo"] = (
        "cpo",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5},
    )
    made["alphapo"] = (
        "cpo",
        {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.0, "simpo_gamma": 0.5},
        {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.0, "simpo_gamma": 0.5},
    )
    made["cpo"] = ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.0}, {"loss_type": "cpo"})
    made["kto"] = ("kto", {"beta": 0.3, "undesirable_weight": 1.5}, {"beta": 0.3, "undesirable_weight": 1.5})
    apo = {"loss_type": "apo_zero_unpaired", "beta": 0.3}
    made["apo_zero_unpaired"] = ("kto", apo, apo)
    return made


@pytest.fixture(scope="module")
def trl_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    if not TRL.is_file():
        pytest.skip("TRL's environment is not there: make trl")
    folder = tmp_path_factory.mktemp("trl")
    for name, seed in (("policy", 0), ("reference", 5)):
        tiny.model(seed=seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    given = {
        name: {"trainer": kind, "config": theirs, "rows": "kto" if kind == "kto" else "pairs"}
        for name, (kind, theirs, _) in cases().items()
    }
    (folder / "cases.json").write_text(json.dumps({"cases": given, "rows": {"pairs": PAIRS, "kto": LABELLED}}))
    done = subprocess.run(
        [TRL, "-W", "ignore", Path(__file__).parent / "trl_worker.py", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_the_loss_is_trl_s(tmp_path: Path, trl_losses: dict[str, float], name: str) -> None:
    kind, _, ours = cases()[name]
    rows = LABELLED if kind == "kto" else PAIRS
    shared = settings(tmp_path, max_steps=1, learning_rate=0.0, per_device_train_batch_size=len(rows))
    tokenizer = tiny.tokenizer()
    trainer: Any
    if kind == "kto":
        args = KTOConfig(**shared, train_sampling_strategy="sequential", **ours)
        trainer = KTOTrainer(tiny.model(), tiny.model(seed=5), args, rows, processing_class=tokenizer)
    else:
        reference = tiny.model(seed=5) if kind == "dpo" and name != "sft" else None
        trainer = DPOTrainer(tiny.model(), reference, DPOConfig(**shared, **ours), rows, processing_class=tokenizer)
    trainer.train()
    # transformers rounds what it logs to 4 places here and there; compare what the trainers computed.
    assert losses_of(trainer)[0] == pytest.approx(trl_losses[name], rel=1e-5, abs=1e-5)
