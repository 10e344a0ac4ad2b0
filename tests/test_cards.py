"""Model cards: what they say, when they are written, and that a user's own README stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

import tiny
from burnish import DPOTrainer, SFTConfig, SFTTrainer
from burnish.runs.checkpoints import delete_run
from test_preference_trainer import PAIRS, dpo
from test_reward_trainer import trainer as reward
from test_trainers import TEXTS, grpo, settings


def sft(folder: Path, model: Any = None, **changes: Any) -> SFTTrainer:
    peft_config = changes.pop("peft_config", None)
    return SFTTrainer(
        tiny.model() if model is None else model,
        SFTConfig(**settings(folder, **{"max_steps": 1, **changes})),
        train_dataset=TEXTS,
        eval_dataset=TEXTS[:3],
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def test_the_card_says_how_the_model_was_trained(tmp_path: Path) -> None:
    trainer = grpo(tmp_path / "my-run", algorithm="dr_grpo", epsilon=0.3, max_steps=1, eval_dataset=[{"prompt": "1"}])
    trainer.train()
    trainer.evaluate()
    assert not (tmp_path / "my-run" / "README.md").exists()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "my-run" / "README.md")
    found = card.data.to_dict()
    assert found["tags"] == ["burnish", "grpo", "dr-grpo"]
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert found["model_name"] == "my-run"
    for text in (
        "# my-run", "group relative policy optimisation ([arXiv:2402.03300]", "`dr_grpo` ([arXiv:2503.20783]",
        "1 optimizer steps", "| `epsilon` | 0.3 |", "| `max_steps` | 1 |", "| `reward` |", "| `eval_reward` |",
        "burnish ",
    ):  # fmt: skip
        assert text in card.text, text
    assert str(tmp_path) not in card.content
    assert trainer.model.model_tags == ["burnish", "grpo", "dr-grpo"]


def test_what_is_told_once_is_in_every_later_card(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer.create_model_card(model_name="small", dataset_name="someone/rows", tags="maths")
    trainer.create_model_card(tags=["maths", "more"])
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "copy"))
    for folder in (tmp_path, tmp_path / "copy"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.to_dict()["datasets"] == ["someone/rows"]
        assert card.data.to_dict()["tags"] == ["burnish", "sft", "maths", "more"]
        assert "# small" in card.text
        assert "[someone/rows](https://huggingface.co/datasets/someone/rows)" in card.text


def test_adapters_have_burnish_s_card_and_their_base(tmp_path: Path) -> None:
    """peft writes a template of its own, with the base's folder in it, wherever it saves."""
    (tmp_path / "base").mkdir()
    tiny.model().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# base\n")
    trainer = SFTTrainer(
        str(tmp_path / "base"),
        SFTConfig(**settings(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)),
        train_dataset=TEXTS,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=3, target_modules=["q_proj"]),
    )
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.to_dict()["library_name"] == "peft"
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert "base_model" not in card.data.to_dict()
    assert "Trained from `base` with" in card.text
    assert "LORA, rank 3" in card.text
    assert str(tmp_path) not in card.content
    assert not (tmp_path / "run" / "checkpoint-1" / "README.md").exists()


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=3, target_modules=["q_proj"])])
def test_a_card_that_burnish_did_not_write_stays(tmp_path: Path, peft_config: Any) -> None:
    mine = "---\nlicense: mit\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(mine)
    trainer = sft(tmp_path, peft_config=peft_config)
    trainer.save_model()
    trainer.create_model_card(dataset_name="other")
    assert (tmp_path / "README.md").read_text() == mine
    delete_run(tmp_path)
    assert (tmp_path / "README.md").read_text() == mine
    assert not (tmp_path / "tokenizer.json").exists()


def test_an_edited_card_stays_and_an_untouched_one_is_renewed(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    trainer = sft(tmp_path)
    trainer.save_model()
    before = file.read_text()
    trainer.train()
    trainer.save_model()
    assert file.read_text() != before
    edited = file.read_text().replace("## Training", "## How it was trained")
    file.write_text(edited)
    trainer.save_model()
    assert file.read_text() == edited


def test_the_card_goes_with_its_run(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer.save_model()
    trainer.create_model_card(tags="more")
    assert (tmp_path / "README.md").is_file()
    delete_run(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_settings_of_the_machine_are_not_in_the_card(tmp_path: Path) -> None:
    template = tmp_path / "secret.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    trainer = sft(tmp_path / "run", hub_token="hf_secret", run_name="secret", chat_template=str(template))
    trainer.save_model()
    assert "secret" not in (tmp_path / "run" / "README.md").read_text()


def test_a_push_brings_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves the machine: what would be uploaded is the folder as it is then."""
    sent: list[str] = []

    def upload(api: Any, **given: Any) -> str:
        sent.append((Path(given["folder_path"]) / "README.md").read_text())
        return "sent"

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    trainer = sft(tmp_path)
    trainer.hub_model_id = trainer.args.hub_model_id = "someone/small"
    trainer.push_to_hub(dataset_name="someone/rows")
    card = ModelCard(sent[0])
    assert card.data.to_dict()["datasets"] == ["someone/rows"]
    assert card.data.to_dict()["tags"] == ["burnish", "sft"]
    assert "# small" in card.text


@pytest.mark.parametrize(("make", "tags"), [(dpo, ["burnish", "dpo"]), (reward, ["burnish", "reward"])])
def test_offline_stages_have_cards(tmp_path: Path, make: Any, tags: list[str]) -> None:
    trainer: DPOTrainer = make(tmp_path, max_steps=1)
    assert PAIRS
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict()["tags"] == tags
    assert ("arXiv:2305.18290" in card.text) == ("dpo" in tags)
