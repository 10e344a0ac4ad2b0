"""Nonsense in: each case ends in an error that names field or row, value and fix, or in a skip that is counted.

Where nothing but data, arguments or a configuration is wrong, the model's name leads nowhere: had a weight been asked
for, the error would be another one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

import burnish
import tiny
from burnish.cli.main import main
from burnish.errors import BurnishError, ConfigError, DataError, ModelError
from burnish.model.classifier import to_reward_model
from test_trainers import settings

NAN, INF = float("nan"), float("inf")
EVERY = "sft dpo kto reward online_dpo grpo"
PAIRED = "sft dpo kto reward"
NAMES = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "online_dpo": "OnlineDPO", "grpo": "GRPO"}
HALF = "1+\ud83d"
"""The first half of an emoji."""


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def plain(stage: str, i: int = 0) -> dict[str, Any]:
    """A good row."""
    answer, question = str(i + 1), {"prompt": f"{i}+1="}
    match stage:
        case "sft":
            return {**question, "completion": answer}
        case "kto":
            return {**question, "completion": answer, "label": i % 2 == 0}
        case "dpo" | "reward":
            return {**question, "chosen": answer, "rejected": "no"}
        case _:
            return question


def chat(stage: str, i: int = 0) -> dict[str, Any]:
    """The same as messages."""
    row = plain(stage, i)
    talk = {name: [said(row[name])] for name in ("completion", "chosen", "rejected") if name in row}
    return {**row, **talk, "prompt": [user(row["prompt"])]}


def good(stage: str, make: Callable[[str, int], dict[str, Any]] = plain) -> list[dict[str, Any]]:
    return [make(stage, i) for i in range(6)]


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def build(stage: str, folder: Path, rows: Any, model: Any = "./nowhere", **given: Any) -> Any:
    """A trainer; `config` are fields of its configuration, the rest arguments of its constructor."""
    online = stage in ("online_dpo", "grpo")
    fields = {"per_device_train_batch_size": 4, "max_steps": 1, **({"num_generations": 2} if online else {})}
    fields |= {"max_completion_length": 4} if online else {}
    args = getattr(burnish, f"{NAMES[stage]}Config")(**settings(folder, **{**fields, **given.pop("config", {})}))
    if online:
        given.setdefault("reward_funcs", length)
    given.setdefault("processing_class", tiny.tokenizer())
    return getattr(burnish, f"{NAMES[stage]}Trainer")(model, args=args, train_dataset=rows, **given)


def each(*cases: tuple[Any, ...]) -> list[Any]:
    """One parameter set a stage."""
    return [
        pytest.param(stage, *rest, id=f"{stage}-{number}-{rest[-1][:40]}")
        for number, (stages, *rest) in enumerate(cases)
        for stage in stages.split()
    ]


NO_TEXT = "use a string, or a non-empty list of messages"
NO_MESSAGE = "which is not a message: each needs a role and a content"


@pytest.mark.parametrize(
    ("stage", "change", "fragment"),
    each(
        (EVERY, {"prompt": ""}, "row 2: prompt is empty: drop the row"),
        *((EVERY, {"prompt": value}, NO_TEXT) for value in (5, 1.5, True, NAN, b"abc", [], {})),
        *((EVERY, {"prompt": value}, NO_MESSAGE) for value in (["a"], [{}], [[user("x")]], [{"content": "x"}])),
        (EVERY, {"prompt": [{"role": 5, "content": "x"}]}, NO_MESSAGE),
        (EVERY, {"prompt": HALF}, "row 2: the text holds half a character"),
        ("sft kto reward online_dpo grpo", {"images": ["x"]}, "row 2 has images: burnish trains on text"),
        ("sft dpo kto reward", {"prompt": [user("x")]}, "row 2 mixes plain and conversational columns"),
        ("sft dpo kto grpo", {"tools": [{"name": "f"}]}, "row 2 has tools, but its prompt is a string"),
        ("sft kto", {"prompt": None}, "row 2 has the columns"),
        ("online_dpo grpo", {"prompt": None}, "needs prompt: rename columns"),
        ("sft kto", {"completion": None}, "needs prompt + completion"),
        ("dpo reward", {"chosen": None}, "needs chosen + rejected"),
        ("dpo reward", {"rejected": None}, "needs chosen + rejected"),
        *(("sft kto", {"completion": value}, NO_TEXT) for value in (5, NAN, {}, [])),
        *(("dpo reward", {"rejected": value}, NO_TEXT) for value in (5, NAN, {}, [])),
        ("sft kto", {"completion": HALF}, "row 2: the text holds half a character"),
        ("dpo reward", {"chosen": HALF}, "row 2: the text holds half a character"),
        ("dpo reward", {"chosen": "no"}, "row 2: chosen equals rejected, so the pair has no learning signal"),
        ("dpo reward", {"chosen": "é", "rejected": "ü"}, "are the same tokens, so the pair has no learning signal"),
        ("reward", {"chosen": ""}, "row 2: completion 0 is empty"),
        ("reward", {"rejected": "   "}, "row 2: completion 1 is empty"),
        *(("reward", {"margin": value}, "use a finite number") for value in (NAN, INF, "0.5", True, [])),
        ("reward", {"margin": 1.0}, "row 0 has no margin and others do"),
        *(("kto", {"label": value}, "use true (good) or false (bad)") for value in (NAN, "true", 2, -1, 0.5, "", [])),
        ("kto", {"label": None}, "needs prompt + completion + label"),
        ("kto", {"chosen": "a", "rejected": "b"}, "row 2 has chosen, rejected and completion"),
        ("sft", {"messages": [user("x")]}, "row 2 fits more than one format"),
        ("dpo kto reward", {"prompt": None, "completion": None, "chosen": None, "input_ids": [1]}, "are rows of SFT"),
    ),
)  # fmt: skip
def test_a_bad_row(tmp_path: Path, stage: str, change: dict[str, Any], fragment: str) -> None:
    rows = good(stage)
    if "margin" in change and fragment.startswith("use"):
        rows = [{**row, "margin": 0.5} for row in rows]
    rows[2] = {**rows[2], **change}
    with pytest.raises(DataError) as caught:
        build(stage, tmp_path, rows)
    assert str(caught.value).startswith("train_dataset: row ")
    assert fragment in str(caught.value)
    with pytest.raises(DataError, match=r"^eval_dataset: row "):
        build(stage, tmp_path, good(stage), eval_dataset=rows)


ANSWERS = {"sft": "completion", "kto": "completion", "dpo": "chosen", "reward": "rejected"}


@pytest.mark.parametrize(
    ("stage", "column", "value", "fragment"),
    each(
        (EVERY, "prompt", [], NO_TEXT),
        (EVERY, "prompt", [{"role": "user"}], "a message without content"),
        (EVERY, "prompt", [user(None)], "a message without content"),
        (EVERY, "prompt", [user(5)], "whose content is not text"),
        (EVERY, "prompt", [user(["a"])], "whose content is not text"),
        (EVERY, "prompt", [user([{"type": "image"}])], "whose content is not text"),
        (EVERY, "prompt", [{"from": "human"}], "a message without content"),
        (EVERY, "prompt", [{"from": ["human"], "value": "x"}], NO_MESSAGE),
        (EVERY, "prompt", [{"from": "martian", "value": "x"}], "role = 'martian': neither one of assistant"),
        (EVERY, "prompt", [{"role": "martian", "content": "x"}], "role = 'martian': neither one of assistant"),
        (EVERY, "prompt", [user("\ud800")], "half a character"),
        (PAIRED, "prompt", [user("x"), said("y")], "the prompt ends with an assistant message"),
        (PAIRED, "answer", [user("x")], "a completion must begin with an assistant message"),
        (PAIRED, "answer", [said("x"), user("y")], "a completion must end with an assistant message"),
        (PAIRED, "answer", [{"role": "assistant"}], "a message without content"),
        (PAIRED, "answer", [said(5)], "whose content is not text"),
        (PAIRED, "answer", [said("2", tool_calls="x")], "tool_calls = 'x': use a list of calls"),
        (PAIRED, "answer", [said("2", tool_calls=[{"x": 1}])], "use a list of calls"),
        (PAIRED, "answer", [said("\ud800")], "half a character"),
        ("sft dpo grpo", "tools", "nope", "tools = 'nope' is not JSON"),
        ("sft dpo grpo", "tools", 5, "tools = 5: use a list of JSON schemas"),
        ("sft dpo grpo", "tools", ["x"], "is not JSON"),
        ("sft dpo grpo", "tools", [5], "each tool must be a JSON schema"),
        ("sft dpo grpo", "chat_template_kwargs", 5, "use a mapping of template variables"),
        ("sft dpo grpo", "chat_template_kwargs", "nope", "is not JSON"),
    ),
)
def test_a_bad_conversation(tmp_path: Path, stage: str, column: str, value: Any, fragment: str) -> None:
    rows = good(stage, chat)
    rows[2] = {**rows[2], (ANSWERS[stage] if column == "answer" else column): value}
    with pytest.raises(DataError) as caught:
        build(stage, tmp_path, rows)
    assert str(caught.value).startswith("train_dataset: row 2")
    assert fragment in str(caught.value)


def ranked(*completions: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": "a", "completions": list(completions), **more}] * 4


@pytest.mark.parametrize(
    ("stage", "rows", "fragment"),
    each(
        (EVERY, "abc", "train_dataset.path = 'abc': no such file; check it"),
        (EVERY, 3, "train_dataset = 3: use a list of rows, a data set, or a path"),
        (EVERY, [], "train_dataset: there are no rows"),
        (EVERY, Dataset.from_list([]), "train_dataset: there are no rows"),
        (EVERY, ["abc"], "row 0 is 'abc': each row must be columns by name"),
        (EVERY, [None], "row 0 is None"),
        (EVERY, [{"x": 1}], "row 0 has the columns ['x']"),
        ("sft", [{"conversations": []}], "row 0: conversations = []"),
        ("sft", [{"conversations": "hi"}], "row 0: conversations = 'hi', a string: use a list of messages"),
        ("sft", [{"messages": "hi"}], "row 0: messages = 'hi', a string: use a list of messages"),
        ("sft", [{"text": [user("x")]}], "a list: use a string, or name the column messages"),
        ("dpo kto reward online_dpo grpo", [{"conversations": []}], "name conversations after what this stage needs"),
        (EVERY, {"prompt": ["a"], "completion": ["b"]}, "train_dataset holds columns ['completion', 'prompt']"),
        (
            EVERY,
            DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])}),
            "is a dict of splits ['train']: pass one",
        ),
        (EVERY, None, "train_dataset = None: pass rows"),
        ("sft", [{"text": ""}], "row 0: text is empty"),
        ("sft", [{"text": 3}], "row 0: text = 3"),
        ("sft", [plain("sft"), plain("dpo")], "row 1 has the columns ['chosen', 'prompt', 'rejected']"),
        ("dpo", [plain("dpo"), plain("kto")], "row 1 has the columns ['completion', 'label', 'prompt']"),
        ("kto", [plain("kto")], "one row has no other completion to estimate the KL with"),
        ("kto", [plain("dpo"), {**plain("dpo"), "prompt": ""}], "row 1: prompt is empty"),
        ("kto", [{"chosen": "a", "rejected": "b"}], "needs prompt + completion + label"),
        ("reward", [plain("reward"), *ranked("a", "b")], "row 0 is preference, row 1 is ranked"),
        ("reward", ranked("a"), "use a list of at least two, the best first"),
        ("reward", ranked("a", "a"), "two completions are the same tokens"),
        ("reward", ranked("a", None), "each must be a string, or a list of messages"),
        ("reward", ranked("a", 5), "each must be a string, or a list of messages"),
        ("reward", ranked("a", "b", labels=[True]), "1 labels for 2 steps"),
        ("reward", ranked("a", "b", labels=[True, NAN]), "use a list of true and false, one a step"),
        ("reward", ranked("a", "", labels=[True, True]), "use a non-empty list of steps"),
        ("online_dpo grpo", [{"prompt": "a"}], "1 prompts are fewer than the 2 of one rollout"),
    ),
)
def test_a_bad_data_set(tmp_path: Path, stage: str, rows: Any, fragment: str) -> None:
    with pytest.raises(BurnishError) as caught:
        build(stage, tmp_path, rows)
    assert fragment in str(caught.value)


CHATS = [{"messages": [user(f"{i}+1="), said(str(i + 1))]} for i in range(4)]


UNMARKED = "{% for m in messages %}{% generation %}{% endgeneration %}{{ m['content'] }}{% endfor %}"


def tokenizer(**changes: Any) -> Any:
    made = tiny.tokenizer()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("stage", "rows", "given", "fragment"),
    each(
        (PAIRED, None, {"config": {"max_length": 2}}, "max_length"),
        ("online_dpo grpo", None, {"config": {"max_prompt_length": 1}}, "under {'max_prompt_length': 1}: raise"),
        ("sft", [{"text": "abcd"}], {"config": {"max_length": 2, "truncation_mode": "drop"}}, "none of 1 rows"),
        ("dpo", [{"prompt": "1", "chosen": "aaab", "rejected": "aaac"}], {"config": {"max_length": 4}}, "none of 1"),
        ("sft", [{"text": "a"}], {"config": {"dataset_text_field": "body"}}, "dataset_text_field = 'body': row 0 has"),
        ("sft", None, {"config": {"assistant_only_loss": True}}, "assistant_only_loss = True, but row 0 is plain"),
        ("sft", CHATS, {"config": {"completion_only_loss": True}}, "row 0 has no completion column"),
        ("sft", [{"messages": [user("x")]}], {"config": {"assistant_only_loss": True}}, "none of 1 rows has a token"),
        ("sft", CHATS, {"processing_class": tokenizer(chat_template=None)}, "the tokenizer has no chat template"),
        ("sft", CHATS, {"processing_class": tokenizer(chat_template="{% for %}")}, "the chat template rejects"),
        ("sft", CHATS, {"processing_class": tokenizer(chat_template="{{ raise_exception('no') }}")}, "rejects"),
        ("sft", CHATS, {"config": {"chat_template": "x.jinja"}}, "the path of an existing .jinja file"),
        (
            "sft",
            CHATS,
            {
                "processing_class": tokenizer(chat_template=UNMARKED),
                "config": {"assistant_only_loss": True},
            },
            "generation blocks mark nothing",
        ),
        (
            "sft",
            CHATS,
            {"processing_class": tokenizer(chat_template="hello"), "config": {"assistant_only_loss": True}},
            "row 0: the chat template leaves out the key 'content' of message 0 (user)",
        ),
        (PAIRED, None, {"processing_class": tokenizer(eos_token=None, pad_token=None)}, "tokenizer has no eos_token"),
        (EVERY, None, {"processing_class": "abc"}, "processing_class = str: pass a tokenizer of transformers"),
        ("sft reward", None, {"config": {"eos_token": "<|nope|>"}}, "eos_token = '<|nope|>': not in the vocabulary"),
        ("reward", None, {"config": {"pad_token": "<|nope|>"}}, "pad_token = '<|nope|>': not in the vocabulary"),
        (EVERY, None, {"eval_dataset": []}, "eval_dataset: there are no rows"),
        (EVERY, None, {"config": {"eval_strategy": "steps", "eval_steps": 1}}, "without eval_dataset: pass held-out"),
        (PAIRED, None, {"config": {"dataloader_drop_last": True, "per_device_train_batch_size": 8}}, "not a full"),
        (EVERY, None, {"peft_config": "lora"}, "peft_config = 'lora': pass a peft config"),
        (EVERY, None, {"peft_config": {"r": 4}}, "pass a peft config"),
        (EVERY, None, {"callbacks": ["x"]}, "callbacks: 'x' is not a transformers.TrainerCallback"),
        (EVERY, None, {"optimizers": "adam"}, "optimizers = 'adam': pass (optimizer, scheduler)"),
        ("dpo kto", None, {"ref_model": "./nowhere"}, "ref_model = './nowhere': pass a model of transformers"),
        ("dpo kto", None, {"ref_model": 5}, "ref_model = 5"),
        ("grpo", None, {"ref_model": 5, "config": {"beta": 0.1}}, "ref_model = 5"),
        ("grpo", None, {"ref_model": tiny.model(), "config": {"beta": 0.0}}, "beta = 0.0 does not use a reference"),
        ("dpo", None, {"ref_model": tiny.model(), "config": {"loss_type": "simpo"}}, "a reference: remove ref_model"),
        *(
            ("online_dpo grpo", [{"prompt": "1", name: "x"}] * 4, {}, f"train_dataset: row 0 has a column {name!r}")
            for name in ("prompts", "completions", "completion_ids", "trainer_state")
        ),
        ("online_dpo grpo", None, {"reward_funcs": []}, "a rubric needs at least one criterion"),
        ("online_dpo grpo", None, {"reward_funcs": 5}, "function = 5 of criterion 'int': pass a callable"),
        ("online_dpo grpo", None, {"reward_funcs": None}, "pass a callable"),
        ("sft dpo grpo", None, {"config": {"model_init_kwargs": {"dtype": "float33"}}}, "./nowhere"),
    ),
)  # fmt: skip
def test_bad_arguments(tmp_path: Path, stage: str, rows: Any, given: dict[str, Any], fragment: str) -> None:
    with pytest.raises(BurnishError) as caught:
        build(stage, tmp_path, good(stage) if rows is None else rows, **given)
    assert fragment in str(caught.value)


def broken() -> Any:
    made = tiny.model()
    made.model.layers[0].mlp.up_proj.weight.data[0, 0] = NAN
    return made


def frozen() -> Any:
    return tiny.model().requires_grad_(False)


def lora(**fields: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, **fields)


@pytest.mark.parametrize(
    ("stage", "model", "given", "fragment"),
    each(
        (EVERY, lambda: "./nowhere", {}, "model = './nowhere': no such folder"),
        (EVERY, lambda: "", {}, "model = '': name a folder"),
        (EVERY, lambda: torch.nn.Linear(2, 2), {}, "model = Linear: use a transformers or peft model"),
        (EVERY, lambda: tiny.model(vocab_size=8), {}, "8 embeddings: processing_class belongs to another model"),
        ("sft dpo kto grpo", broken, {}, "its log-probabilities of a short row are not finite"),
        ("sft dpo kto grpo", frozen, {}, "all of its parameters are frozen"),
        ("sft dpo kto grpo", lambda: to_reward_model(tiny.model(), seed=0), {}, "pass a causal language model"),
        (EVERY, tiny.model, {"peft_config": lora(target_modules=["nope"])}, "peft_config does not fit Llama"),
        ("reward", tiny.model, {"peft_config": lora(task_type="CAUSAL_LM")}, "use 'SEQ_CLS', or leave it out"),
        (
            "dpo kto",
            tiny.model,
            {"ref_model": tiny.model(vocab_size=8)},
            "ref_model on train_dataset: row 0 has the token",
        ),
        (
            "grpo",
            tiny.model,
            {"ref_model": tiny.model(vocab_size=8), "config": {"beta": 0.1}},
            "ref_model on train_dataset: row 0 has the token",
        ),
        ("dpo", tiny.model, {"ref_model": to_reward_model(tiny.model(), seed=0)}, "pass a causal language model"),
        (
            "dpo",
            tiny.model,
            {"config": {"sync_ref_model": True}, "peft_config": lora(target_modules=["q_proj"])},
            "adapters that are switched off cannot be synced",
        ),
        (EVERY, tiny.model, {"config": {"model_init_kwargs": {"dtype": "bfloat16"}}}, "with a model in memory"),
    ),
)
def test_a_bad_model(
    tmp_path: Path, stage: str, model: Callable[[], Any], given: dict[str, Any], fragment: str
) -> None:
    with pytest.raises((ConfigError, ModelError)) as caught:
        build(stage, tmp_path, good(stage), model(), **given)
    assert fragment in str(caught.value)


def test_the_model_as_its_own_reference_is_refused(tmp_path: Path) -> None:
    model = tiny.model()
    with pytest.raises(ModelError, match="ref_model is the model itself"):
        build("dpo", tmp_path, good("dpo"), model, ref_model=model)


def test_a_reference_of_another_size_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build("dpo", tmp_path, good("dpo"), tiny.model(), ref_model=tiny.model(vocab_size=128))
    assert "ref_model has 128 embeddings and the model 96" in caplog.text


def test_nothing_ends_a_completion(tmp_path: Path) -> None:
    model = tiny.model()
    model.generation_config.eos_token_id = None
    endless = tokenizer(eos_token=None, pad_token="<unk>")
    with pytest.raises(ConfigError, match=r"so every completion would run to max_completion_length: set tokenizer"):
        build("grpo", tmp_path, good("grpo"), model, processing_class=endless)


@pytest.mark.parametrize(
    ("written", "fragment"),
    [
        ("weights", "no model could be read from it"),
        ("config", "no model could be read from it"),
        ("head", "lack 1 weights of LlamaForCausalLM (lm_head.weight), which would start random"),
        ("tokenizer", "no tokenizer could be read from it. Save it beside the model, or pass processing_class"),
        ("nothing", "no config.json and no .gguf file"),
    ],
)
def test_a_folder_that_holds_no_whole_model(tmp_path: Path, written: str, fragment: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if written != "nothing":
        (to_reward_model(tiny.model(), seed=0) if written == "head" else tiny.model()).save_pretrained(folder)
        if written != "tokenizer":
            tiny.tokenizer().save_pretrained(folder)
    if written == "weights":
        (folder / "model.safetensors").write_bytes(b"xx")
    if written == "config":
        file = folder / "config.json"
        file.write_text(file.read_text().replace('"llama"', '"no such architecture"'))
    with pytest.raises(ModelError) as caught:
        build("sft", tmp_path, good("sft"), str(folder), processing_class=None)
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "rows", "config", "message", "kept"),
    [
        ("sft", [{"prompt": "1" * 30, "completion": "a"}], {"max_length": 20}, "1 of 7 rows are skipped", 6),
        ("kto", [{"prompt": "1" * 30, "completion": "a", "label": True}], {"max_length": 20}, "1 of 7 rows are sk", 6),
        ("dpo", [{"prompt": "1" * 30, "chosen": "a", "rejected": "b"}], {"max_length": 20}, "1 of 7 rows are skipp", 6),
        ("reward", [{"prompt": "1" * 30, "chosen": "a", "rejected": "b"}], {"max_length": 20}, "1 of 7 rows are lo", 6),
        ("grpo", [{"prompt": "1" * 30}], {"max_prompt_length": 20}, "1 of 7 rows are skipped", 6),
        (
            "dpo",
            [{"prompt": "1+1=", "chosen": "aaaab", "rejected": "aaaac"}],
            {"max_length": 8},
            "1 pairs are dropped",
            6,
        ),
        ("sft", [{"prompt": "1+1=", "completion": ""}], {}, "1 completions are empty", 7),
        ("dpo", [{"prompt": "1+1=", "chosen": "2", "rejected": " "}], {}, "1 completions are empty", 7),
        ("kto", [{"prompt": "1+1=", "completion": "", "label": False}], {}, "1 completions are empty", 7),
        ("sft", [chat("sft")], {}, "rows of several formats, each encoded as its own: 1 conversational", 7),
        ("dpo", [chat("dpo")], {}, "rows of several formats, each encoded as its own: 1 conversational", 7),
        ("grpo", [chat("grpo")], {}, "rows of several formats, each encoded as its own: 1 conversational", 7),
        ("kto", [plain("dpo")], {}, "", 8),
    ],
)
def test_what_is_counted_and_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    stage: str,
    rows: list[dict[str, Any]],
    config: dict[str, Any],
    message: str,
    kept: int,
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = build(stage, tmp_path, good(stage) + rows, tiny.model(), config=config)
    assert len(trainer.train_dataset) == kept
    assert f"train_dataset: {message}" in caplog.text or not message
    trainer.train()


def test_one_label_alone_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build("kto", tmp_path, [{**row, "label": True} for row in good("kto")], tiny.model())
    assert "train_dataset: every label is True" in caplog.text


def test_a_run_that_diverges_stops_with_a_reason(tmp_path: Path) -> None:
    for stage in ("sft", "dpo", "grpo"):
        trainer = build(stage, tmp_path, good(stage), tiny.model(), config={"learning_rate": 1e30, "max_steps": 3})
        # Online, the engine sees it first: the next round of samples has no probabilities.
        with pytest.raises(BurnishError, match=r"^step 1: .*the step is not taken|the model's logits overflowed"):
            trainer.train()


def test_checkpoints_and_evaluations_of_nothing(tmp_path: Path) -> None:
    for stage in EVERY.split():
        trainer = build(stage, tmp_path, good(stage), tiny.model())
        with pytest.raises(ConfigError, match=r"resume_from_checkpoint = 'nowhere': no such folder"):
            trainer.train(resume_from_checkpoint="nowhere")
        with pytest.raises(ConfigError, match=r"resume_from_checkpoint = True: output_dir = .* has no checkpoint"):
            trainer.train(resume_from_checkpoint=True)
        with pytest.raises(DataError, match="eval_dataset = None: pass held-out rows"):
            trainer.evaluate()
        with pytest.raises(DataError, match=r"eval_dataset: row 0 has the columns \['x'\]"):
            trainer.evaluate([{"x": 1}])
        metrics = trainer.evaluate(good(stage))
        assert all(np.isfinite(value) for value in metrics.values())


def test_references_are_of_the_data_set_that_is_evaluated(tmp_path: Path) -> None:
    """Rows are known by their place, and another data set has other rows there."""
    trainer = build("dpo", tmp_path, good("dpo"), tiny.model(), ref_model=tiny.model(seed=5), eval_dataset=good("dpo"))
    other = [{"prompt": "9*9=", "chosen": "81", "rejected": "99"}]
    alone = build("dpo", tmp_path, good("dpo"), tiny.model(), ref_model=tiny.model(seed=5), eval_dataset=other)
    expected = alone.evaluate()["eval_loss"]
    first = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(other)["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first, abs=1e-6)


ANY = ("SFT", "Reward", "DPO", "KTO", "OnlineDPO", "GRPO")


@pytest.mark.parametrize(
    ("field", "value", "fragment"),
    [
        ("learning_rate", "fast", "learning_rate = 'fast': expected float, got str"),
        ("learning_rate", NAN, "learning_rate = nan: use a finite number"),
        ("learning_rate", -1, "learning_rate = -1"),
        ("num_train_epochs", "abc", "expected float, got str"),
        ("num_train_epochs", 0, "use a number above 0"),
        ("max_steps", 0, "max_steps = 0: use at least 1, or -1 to count by epochs"),
        ("max_steps", 1.5, "expected int, got float"),
        ("per_device_train_batch_size", -1, "use at least 1"),
        ("per_device_train_batch_size", True, "expected int, got bool"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps = 0: use at least 1"),
        ("weight_decay", NAN, "weight_decay = nan"),
        ("weight_decay", -0.1, "use a number of at least 0"),
        ("adam_beta1", 1.0, "use a number in [0, 1)"),
        ("max_grad_norm", NAN, "max_grad_norm = nan"),
        ("max_grad_norm", -1.0, "0 disables clipping"),
        ("warmup_steps", NAN, "warmup_steps = nan"),
        ("logging_steps", 0, "use a number of steps above 0"),
        ("seed", "x", "seed = 'x': expected int, got str"),
        ("seed", -1, "use an integer of at least 0"),
        ("bf16", "yes", "bf16 = 'yes': expected bool | None, got str"),
        ("report_to", ["nope"], "nope is not supported"),
        ("lr_scheduler_type", "cosin", "lr_scheduler_type = 'cosin': use one of linear, cosine"),
        ("optim", "adam", "optim = 'adam': use one of adamw_torch"),
        ("eval_strategy", "sometimes", "eval_strategy = 'sometimes': use one of no, steps, epoch"),
        ("token_budget", 0, "token_budget = 0: use a number of tokens"),
        ("output_dir", __file__, "it is a file; name a folder"),
        ("nonsense", 1, "nonsense = 1: unknown field"),
        ("fp16", True, "fp16 loss scaling is not supported; set bf16"),
    ],
)
@pytest.mark.parametrize("config", ANY)
def test_a_bad_value_in_python(tmp_path: Path, config: str, field: str, value: Any, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(burnish, f"{config}Config")(**{"output_dir": str(tmp_path), "use_cpu": True, field: value})
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("config", "fields", "fragment"),
    [
        ("DPO", {"loss_type": "dpo"}, "loss_type = 'dpo': use one of sigmoid, sigmoid_norm"),
        ("DPO", {"loss_type": []}, "loss_type = []"),
        ("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for 2 losses"),
        (
            "DPO",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, NAN]},
            "use a list of numbers, one per loss_type",
        ),
        ("DPO", {"beta": 0.0}, "beta = 0.0: use a number above 0"),
        ("DPO", {"beta": "strong"}, "expected float, got str"),
        ("DPO", {"label_smoothing": 0.5}, "use a number in [0, 0.5)"),
        ("KTO", {"loss_type": "sigmoid"}, "use kto or apo_zero_unpaired"),
        ("KTO", {"desirable_weight": NAN}, "desirable_weight = nan"),
        ("Reward", {"center_rewards_coefficient": -1.0}, "center_rewards_coefficient = -1.0"),
        ("SFT", {"max_length": 1}, "max_length = 1: use at least 2 tokens"),
        ("SFT", {"assistant_only_loss": "yes"}, "expected bool, got str"),
        ("SFT", {"chat_template": 5}, "expected str | None, got int"),
        ("SFT", {"model_init_kwargs": ["x"]}, "expected dict[str, Any] | None, got list"),
        ("GRPO", {"num_generations": 3, "per_device_train_batch_size": 4}, "is not a whole number of groups"),
        ("GRPO", {"num_generations": 1}, "a group is compared with itself: use at least 2"),
        ("OnlineDPO", {"num_generations": 3, "per_device_train_batch_size": 4}, "use a multiple of 3"),
    ],
)
def test_a_bad_value_of_a_stage(tmp_path: Path, config: str, fields: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(burnish, f"{config}Config")(**{"output_dir": str(tmp_path), "use_cpu": True, **fields})
    assert fragment in str(caught.value)


def test_numbers_of_numpy_paths_and_text_are_taken_as_what_they_say(tmp_path: Path) -> None:
    args: Any = burnish.DPOConfig(
        output_dir=tmp_path, use_cpu=True, learning_rate="1e-5", beta=np.float64(0.2), max_steps=np.int64(3),
        loss_type=("sigmoid", "sft"), warmup_steps=1,
    )  # fmt: skip
    assert (args.learning_rate, args.beta, args.max_steps) == (1e-5, 0.2, 3)
    assert args.loss_type == ["sigmoid", "sft"]
    assert args.output_dir == str(tmp_path)


ROW = {"prompt": "a", "completion": "b"}
LINE = json.dumps(ROW) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("rows.jsonl", b"", "has no rows"),
        ("rows.jsonl", LINE.encode() + b'{"prompt": "a"\n', "rows.jsonl:2 is not JSON"),
        ("rows.jsonl", b"[1, 2]\n", "rows.jsonl:1 is a list: each row must be an object"),
        ("rows.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "rows.jsonl:1 has the key 'prompt' twice"),
        ("rows.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), "is not UTF-8 (invalid continuation byte at byte 12)"),
        ("rows.jsonl", b'{"prompt": NaN, "completion": "b"}\n', "row 0: prompt = nan"),
        ("rows.jsonl", b'{"prompt": "a\\ud83d", "completion": "b"}\n', "row 0: the text holds half a character"),
        ("rows.json", LINE.encode(), "the file holds a dict: use a list of objects"),
        ("rows.csv", b"prompt,prompt,completion\na,b,c\n", "has the column 'prompt' twice"),
        ("rows.csv", b"prompt,completion\na\n", "row 2 has more or fewer cells than the header"),
        ("rows.csv", b'prompt,completion\n"a,b\n', "is not CSV"),
        ("rows.parquet", b"a", "is not Parquet"),
        ("rows.txt", b"a", "use one of .csv, .json, .jsonl, .parquet"),
        ("other.jsonl", LINE.encode(), "no such file; check it, or give a glob that matches"),
    ],
)
def test_a_bad_file_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, content: bytes,
    fragment: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    tiny.tokenizer().save_pretrained("model")
    tiny.model().config.save_pretrained("model")
    Path(name).write_bytes(content)
    read = "rows.jsonl" if name == "other.jsonl" else name
    Path("run.toml").write_text(f'model = "model"\n[data]\ntrain = {{ path = "{read}" }}\n[training]\nuse_cpu = true\n')
    assert main(["sft", "run.toml"]) == 2
    assert fragment in capsys.readouterr().err


RUN = 'model = "model"\n[data]\n{which} = {{ path = "rows.jsonl" }}\n'
RUBRIC = '[[rubric]]\nkind = "exact"\n'


@pytest.mark.parametrize(
    ("kind", "text", "fragment"),
    [
        *((kind, '[training]\nlearning_rate = "fast"\n', "[training] learning_rate = 'fast': expected float, got str")
          for kind in EVERY.split()),
        *((kind, "[training]\nlearning_rate = nan\n", "use a finite number") for kind in EVERY.split()),
        *((kind, "[training]\nmax_steps = 0\n", "or -1 to count by epochs") for kind in EVERY.split()),
        *((kind, "[training]\nlearning_rat = 1.0\n", "did you mean learning_rate") for kind in EVERY.split()),
        *((kind, "[training]\nmax_seq_length = 5\n", "its name is max_length") for kind in EVERY.split()),
        *((kind, '[training]\nresume_from_checkpoint = "nowhere"\n', "no such folder") for kind in EVERY.split()),
        *((kind, "[peft]\nrank = 8\n", "[peft] rank = 8: unknown field") for kind in EVERY.split()),
        *((kind, "[model_init]\nnope = 1\n", "[model_init] nope = 1: unknown field") for kind in EVERY.split()),
        ("dpo", "[training]\nloss_type = [\"sigmoid\", \"sft\"]\nloss_weights = [1.0, nan]\n", "one per loss_type"),
        ("grpo", "[training]\nper_device_train_batch_size = 4\nnum_generations = 3\n", "whole number of groups"),
        ("pairs", "[pairs]\nnum_samples = 0\n", "[pairs] num_samples = 0: a pair needs at least 2"),
        ("pairs", "[pairs]\ntemperature = nan\n", "[pairs] temperature = nan"),
        ("pairs", '[pairs]\nmax_completion_length = "x"\n', "expected int, got str"),
        ("pairs", "[pairs]\nnope = 1\n", "[pairs] nope = 1: unknown field"),
        ("pairs", "[training]\nseed = 1\n", "`burnish pairs` does not use [training]; remove it"),
        ("eval", "[evaluation]\nnum_samples = 0\n", "[evaluation] num_samples = 0: use at least 1"),
        ("eval", "[evaluation]\ntemperature = nan\n", "[evaluation] temperature = nan"),
    ],
)  # fmt: skip
def test_a_bad_run_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, text: str,
    fragment: str,
) -> None:  # fmt: skip
    """There is neither a model nor a file of rows: the file alone is read."""
    monkeypatch.chdir(tmp_path)
    rubric = RUBRIC if kind in ("online_dpo", "grpo", "pairs", "eval") else ""
    Path("run.toml").write_text(RUN.format(which="eval" if kind == "eval" else "train") + rubric + text)
    assert main([kind, "run.toml"]) == 2
    assert fragment in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pairs", "eval"])
@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"x": 1}, "row 0 has the columns ['x']"),
        ({"prompt": 5, "answer": "a"}, "row 0: prompt = 5"),
        ({"prompt": HALF, "answer": "a"}, "row 0: the text holds half a character"),
    ],
)
def test_bad_prompts_of_pairs_and_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str,
    row: dict[str, Any], fragment: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    tiny.tokenizer().save_pretrained("model")
    tiny.model().config.save_pretrained("model")
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    which = "eval" if kind == "eval" else "train"
    Path("run.toml").write_text(RUN.format(which=which) + RUBRIC)
    assert main([kind, "run.toml"]) == 2
    assert f"data.{which}: {fragment}" in capsys.readouterr().err


def test_adapters_of_a_reward_model_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their task is that of a classifier, whatever the file leaves out."""
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good("reward")))
    Path("run.toml").write_text(
        RUN.format(which="train")
        + '[peft]\nr = 2\ntarget_modules = ["q_proj"]\n[training]\noutput_dir = "out"\nmax_steps = 1\nuse_cpu = true\n'
        "bf16 = false\nprogress = false\n"
    )
    assert main(["reward", "run.toml"]) == 0
