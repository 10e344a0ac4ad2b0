"""The chat template of a run: taken from one field in every stage, and saved for the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import burnish
import tiny
from burnish.data import DEFAULT_CHAT_TEMPLATE
from burnish.errors import ConfigError, DataError
from burnish.model.loading import adopt_chat_template
from test_nonsense import NAMES, build, chat

STAGES = ("sft", "dpo", "kto", "reward", "online_dpo", "grpo")
OWN = "{% for m in messages %}[{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[{% endif %}"


def bare() -> Any:
    made = tiny.tokenizer()
    made.chat_template = None
    return made


def chats(stage: str) -> list[dict[str, Any]]:
    return [chat(stage, i) for i in range(4)]


@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_tokenizer_renders_as_in_training(tmp_path: Path, stage: str) -> None:
    trainer = build(
        stage, tmp_path, chats(stage), tiny.model(), config={"chat_template": "chatml"}, processing_class=bare()
    )
    trainer.save_model(str(tmp_path / "out"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.chat_template == DEFAULT_CHAT_TEMPLATE
    again = build(stage, tmp_path, chats(stage), tiny.model(), processing_class=saved)
    assert [[g.prompt_ids, [c.token_ids for c in g.completions]] for g in again.train_dataset] == [
        [g.prompt_ids, [c.token_ids for c in g.completions]] for g in trainer.train_dataset
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_a_tokenizer_without_a_template_is_told_a_field_that_exists(tmp_path: Path, stage: str) -> None:
    with pytest.raises(DataError, match='set chat_template = "chatml"'):
        build(stage, tmp_path, chats(stage), processing_class=bare())
    for kind in NAMES.values():
        getattr(burnish, f"{kind}Config")(output_dir=str(tmp_path), chat_template="chatml")


@pytest.mark.parametrize("field", ["chat_template", "chat_template_path"])
@pytest.mark.parametrize("form", ["source", "x.jinja", "x.j2", "folder"])
def test_templates_come_from_source_files_and_folders(tmp_path: Path, field: str, form: str) -> None:
    given = OWN
    if form == "folder":
        other = tiny.tokenizer()
        other.chat_template, other.eos_token = OWN, "!"
        other.save_pretrained(tmp_path / form)
    elif form != "source":
        (tmp_path / form).write_text(OWN)
    if form != "source":
        given = str(tmp_path / form)
    trainer = build("sft", tmp_path, chats("sft"), tiny.model(), config={field: given}, processing_class=bare())
    assert trainer.tokenizer.chat_template == OWN
    assert trainer.tokenizer.eos_token == ("!" if form == "folder" else "<eos>")


def test_an_explicit_eos_token_wins(tmp_path: Path) -> None:
    other = tiny.tokenizer()
    other.eos_token = "!"
    other.save_pretrained(tmp_path / "other")
    config = {"chat_template": str(tmp_path / "other"), "eos_token": "?"}
    assert build("sft", tmp_path, chats("sft"), tiny.model(), config=config).tokenizer.eos_token == "?"


def test_a_template_for_other_tokens_is_refused(tmp_path: Path) -> None:
    other = tiny.tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = "<|turn|>" + OWN
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"it writes '<\|turn\|>', which is not in the vocabulary"):
        build("dpo", tmp_path, chats("dpo"), config={"chat_template": str(tmp_path / "other")})
    bare().save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="the tokenizer in that folder has no chat template"):
        adopt_chat_template(tiny.tokenizer(), str(tmp_path / "bare"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no tokenizer could be read"):
        adopt_chat_template(tiny.tokenizer(), str(tmp_path / "empty"))
    (tmp_path / "bytes.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(ConfigError, match="cannot be read"):
        adopt_chat_template(tiny.tokenizer(), str(tmp_path / "bytes.jinja"))
