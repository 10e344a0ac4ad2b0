"""Supervised fine-tuning: metrics, losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from burnish import ConfigError, DataError, SFTConfig, SFTTrainer
from burnish.training.stream import GroupStream
from test_trainers import SPLITS, TEXTS, settings, sft, weights


def tokens_of(row: dict[str, str]) -> tuple[list[int], list[int]]:
    tokenizer = tiny.tokenizer()
    return tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["completion"])["input_ids"], 0]


def by_hand(rows: list[dict[str, str]], model: Any) -> dict[str, torch.Tensor]:
    """Log-probability, entropy and accuracy of every completion token, one plain forward per row."""
    found: dict[str, list[torch.Tensor]] = {"logprobs": [], "entropy": [], "correct": []}
    for row in rows:
        prompt, completion = tokens_of(row)
        logprobs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        target = torch.tensor(completion)
        found["logprobs"].append(logprobs.gather(1, target[:, None])[:, 0])
        found["entropy"].append(-(logprobs.exp() * logprobs).sum(1))
        found["correct"].append((logprobs.argmax(1) == target).float())
    return {name: torch.cat(values) for name, values in found.items()}


@pytest.fixture(scope="module")
def skilled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that is right now and then: an untrained one never is, and an accuracy of 0 shows no mistake."""
    trainer = sft(tmp_path_factory.mktemp("skilled"), max_steps=20)
    trainer.train()
    model = tiny.model()
    model.load_state_dict(trainer.model.state_dict())
    return model


@pytest.mark.parametrize("split", [{}, *SPLITS])
def test_metrics_are_means_over_all_tokens_since_the_last_log(
    tmp_path: Path, skilled: Any, split: dict[str, int]
) -> None:
    # learning_rate 0: three steps of 8 rows see all 24 rows under one model.
    changes = {
        "learning_rate": 0.0,
        "logging_steps": 3,
        "logging_first_step": False,
        "train_sampling_strategy": "sequential",
        **split,
    }
    trainer = sft(tmp_path, copy.deepcopy(skilled), **changes)
    trainer.train()
    log = trainer.state.log_history[0]
    with torch.no_grad():
        expected = by_hand(TEXTS, skilled)
    assert 0.2 < float(expected["correct"].mean()) < 0.95
    assert log["entropy"] == pytest.approx(float(expected["entropy"].mean()), abs=1e-5)
    assert log["mean_token_accuracy"] == pytest.approx(float(expected["correct"].mean()), abs=1e-7)
    assert log["num_tokens"] == sum(len(ids) for row in TEXTS for ids in tokens_of(row))


def test_evaluation_in_between_leaves_the_training_metrics_alone(tmp_path: Path) -> None:
    logs = []
    for evaluate in (False, True):
        args = SFTConfig(
            **settings(
                tmp_path,
                logging_steps=3,
                logging_first_step=False,
                eval_strategy="steps" if evaluate else "no",
                eval_steps=1,
            )
        )
        trainer = SFTTrainer(
            tiny.model(), args, train_dataset=TEXTS, eval_dataset=TEXTS[:5], processing_class=tiny.tokenizer()
        )
        trainer.train()
        history = trainer.state.log_history
        log = next(log for log in history if "loss" in log)
        logs.append({name: value for name, value in log.items() if not name.startswith("seconds/")})
        assert all(("entropy" in log) == ("loss" in log) for log in history)
        assert not evaluate or history[0]["eval_num_tokens"] < logs[-1]["num_tokens"]
    assert logs[0] == logs[1]


def test_evaluation_is_the_mean_over_the_rows(tmp_path: Path, skilled: Any) -> None:
    args = SFTConfig(**settings(tmp_path, per_device_eval_batch_size=5, token_budget=40))
    trainer = SFTTrainer(
        copy.deepcopy(skilled), args, train_dataset=TEXTS, eval_dataset=TEXTS, processing_class=tiny.tokenizer()
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = by_hand(TEXTS, skilled)
    assert metrics["eval_loss"] == pytest.approx(-float(expected["logprobs"].mean()), abs=1e-5)
    assert metrics["eval_entropy"] == pytest.approx(float(expected["entropy"].mean()), abs=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(float(expected["correct"].mean()), abs=1e-7)


def test_num_tokens_goes_on_after_a_resume(tmp_path: Path) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = sft(tmp_path, **changes)
    whole.train()
    resumed = sft(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [log.get("num_tokens") for log in resumed.state.log_history] == [
        log.get("num_tokens") for log in whole.state.log_history
    ]


def test_the_entropy_costs_no_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.model import tiled_head

    seen: list[bool] = []
    original = tiled_head._gradients  # pyright: ignore[reportPrivateUsage]

    def recorded(operands: Any, target: Any, row: Any, *rest: Any) -> Any:
        seen.append(row.entropy_grad is None)
        return original(operands, target, row, *rest)

    monkeypatch.setattr(tiled_head, "_gradients", recorded)
    sft(tmp_path).train()
    assert seen == [True] * 3


@pytest.mark.parametrize("split", [{}, *SPLITS])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_loss_and_gradient_by_hand(tmp_path: Path, loss_type: str, split: dict[str, int]) -> None:
    changes = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 0.5, "loss_type": loss_type}
    trainer = sft(tmp_path, lr_scheduler_type="constant", train_sampling_strategy="sequential", **changes, **split)
    start = weights(trainer)
    trainer.train()
    model = tiny.model()
    logprobs = by_hand(TEXTS[:8], model)["logprobs"]
    factors = logprobs.detach().exp() if loss_type == "dft" else torch.ones_like(logprobs)
    loss = -(factors * logprobs).mean()
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    for name, parameter in model.named_parameters():
        step = (start[name] - weights(trainer)[name]) / 0.5
        torch.testing.assert_close(step, parameter.grad, rtol=0, atol=1e-5, msg=name)  # fp32 differences of weights


def test_evaluation_reports_the_loss_that_trains(tmp_path: Path) -> None:
    args = SFTConfig(**settings(tmp_path, loss_type="dft"))
    metrics = SFTTrainer(
        tiny.model(), args, train_dataset=TEXTS, eval_dataset=TEXTS, processing_class=tiny.tokenizer()
    ).evaluate()
    with torch.no_grad():
        logprobs = by_hand(TEXTS, tiny.model())["logprobs"]
    assert metrics["eval_loss"] == pytest.approx(-float((logprobs.exp() * logprobs).mean()), abs=1e-5)


def test_noise_changes_training_by_the_seed_and_never_evaluation(tmp_path: Path) -> None:
    runs = {}
    for name, changes in {
        "none": {},
        "noise": {"neftune_noise_alpha": 5.0},
        "again": {"neftune_noise_alpha": 5.0},
    }.items():
        args = SFTConfig(**settings(tmp_path / name, **changes))
        trainer = SFTTrainer(
            tiny.model(), args, train_dataset=TEXTS, eval_dataset=TEXTS, processing_class=tiny.tokenizer()
        )
        before = trainer.evaluate()
        trainer.train()
        runs[name] = (before["eval_loss"], weights(trainer))
        assert not trainer.model.get_input_embeddings()._forward_hooks
    assert runs["none"][0] == runs["noise"][0]
    assert all(torch.equal(a, runs["again"][1][n]) for n, a in runs["noise"][1].items())
    assert any((a - runs["none"][1][n]).abs().max() > 1e-3 for n, a in runs["noise"][1].items())


def test_the_row_length_scales_no_noise(tmp_path: Path) -> None:
    """Ours is there while a part is scored; the hook of transformers would be there all the time."""
    trainer = sft(tmp_path, neftune_noise_alpha=5.0)
    hooks: list[int] = []
    stage: Any = trainer.stage
    original = stage.loss

    def counted(*args: Any) -> Any:
        hooks.append(len(trainer.model.get_input_embeddings()._forward_hooks))
        return original(*args)

    stage.loss = counted
    trainer.train()
    assert hooks == [0] * 3


def test_a_resumed_run_draws_the_noise_of_the_uninterrupted_one(tmp_path: Path) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "neftune_noise_alpha": 5.0}
    whole = sft(tmp_path, **changes)
    whole.train()
    resumed = sft(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_truncation_mode_reaches_the_rows(tmp_path: Path) -> None:
    rows = [{"text": "0123456789" * 3}, {"text": "012"}]
    sizes = {}
    for mode in ("keep_start", "keep_end", "drop", "split"):
        args = SFTConfig(**settings(tmp_path, truncation_mode=mode, max_length=8))
        trainer = SFTTrainer(tiny.model(), args, train_dataset=rows, processing_class=tiny.tokenizer())
        sizes[mode] = [group.num_tokens for group in trainer.train_dataset]
    assert sizes == {"keep_start": [8, 4], "keep_end": [8, 4], "drop": [4], "split": [8, 8, 8, 7, 4]}


class Endless:
    """Rows again and again, without a length; remembers how many were read."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows, self.read = rows, 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        for row in self.rows:
            self.read += 1
            yield row


def streamed(folder: Path, rows: Any, **changes: Any) -> SFTTrainer:
    args = SFTConfig(**settings(folder, **{"per_device_train_batch_size": 4, "max_steps": 4, **changes}))
    return SFTTrainer(tiny.model(), args, train_dataset=rows, processing_class=tiny.tokenizer())


UNUSABLE = [{"prompt": "0" * 30, "completion": "1"}]
"""The prompt alone fills max_length."""


def sources() -> dict[str, Any]:
    import datasets

    return {
        "iterable": Endless(TEXTS),
        "generator": (row for row in TEXTS * 2),
        "datasets": datasets.Dataset.from_list(TEXTS).to_iterable_dataset(),
    }


@pytest.mark.parametrize("source", ["iterable", "generator", "datasets"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_trains_as_the_list_does(tmp_path: Path, source: str, accumulation: int) -> None:
    """4 steps of 8 rows are a pass over 24 rows and a third of the next."""
    changes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    changes["train_sampling_strategy"] = "sequential"
    whole = streamed(tmp_path / "a", TEXTS, **changes)
    whole.train()
    stream = streamed(tmp_path / "b", sources()[source], **changes)
    stream.train()
    assert stream.state.global_step == 4
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(stream)[name]), name


def test_a_stream_is_read_only_as_far_as_training_goes(tmp_path: Path) -> None:
    rows = Endless(TEXTS)
    trainer = streamed(tmp_path, rows, max_steps=2)
    assert rows.read == 0
    trainer.train()
    assert rows.read == 2 * 4


def test_unusable_rows_of_a_stream_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row for text in TEXTS for row in (*UNUSABLE, text)]
    trainer = streamed(tmp_path / "a", Endless(rows), max_length=12)
    trainer.train()
    clean = streamed(tmp_path / "b", Endless(TEXTS), max_length=12)
    clean.train()
    assert all(torch.equal(value, weights(clean)[name]) for name, value in weights(trainer).items())
    assert "16 of 32 rows are skipped" in caplog.text
    with pytest.raises(DataError, match=r"a whole pass gave process 0 of 1 no row .*\(1 rows read\)"):
        streamed(tmp_path / "c", Endless(UNUSABLE), max_length=12).train()


@pytest.mark.parametrize("source", ["iterable", "generator", "datasets"])
def test_a_resumed_stream_skips_what_was_consumed(tmp_path: Path, source: str) -> None:
    changes = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 9, "max_steps": 5}
    whole = streamed(tmp_path, sources()[source], **changes)
    whole.train()
    resumed = streamed(tmp_path, sources()[source], **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 5
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_an_iterator_that_ends_early_ends_training(tmp_path: Path) -> None:
    trainer = streamed(tmp_path, (row for row in TEXTS[:10]))
    trainer.train()
    assert trainer.state.global_step == 3, "4 + 4 + 2 rows"


def test_a_stream_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_steps = -1: train_dataset has no length"):
        streamed(tmp_path, iter(TEXTS), max_steps=-1)
    with pytest.raises(ConfigError, match=r"dataloader_num_workers = 2"):
        streamed(tmp_path, iter(TEXTS), dataloader_num_workers=2)
    with pytest.raises(DataError, match=r"dataset_text_field = 'story': row 0 has the columns \['body'\]"):
        streamed(tmp_path, [{"body": "0"}], dataset_text_field="story")


def test_ranks_share_the_rows_of_a_stream(tmp_path: Path) -> None:
    trainer = streamed(tmp_path, Endless(TEXTS))
    stream = trainer.train_dataset
    assert isinstance(stream, GroupStream)
    stream.world = 3
    seen = []
    for stream.rank in range(3):
        groups = iter(stream)
        seen += [next(groups).index for _ in range(8)]
    assert sorted(seen) == list(range(24))
    assert seen[:3] == [0, 3, 6]


def nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def quantised(folder: Path, where: str, model: Any = None, peft_config: Any = None, **changes: Any) -> SFTTrainer:
    """Quantised through the trainer's argument, through model_init_kwargs, or both."""
    init = {"model_init_kwargs": {"quantization_config": nf4()}} if where != "argument" else {}
    args = SFTConfig(**settings(folder / "run", **{**init, **changes}))
    given = {"quantization_config": nf4()} if where != "init" else {}
    path = str(folder / "model") if model is None else model
    return SFTTrainer(
        path, args, train_dataset=TEXTS, processing_class=tiny.tokenizer(), peft_config=peft_config, **given
    )


def test_quantisation_that_cannot_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    tiny.model().config.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="in model_init_kwargs: remove it from one"):
        quantised(tmp_path, "both", peft_config=lora())
    with pytest.raises(ConfigError, match="beside a model in memory"):
        quantised(tmp_path, "argument", tiny.model(), lora())
    for where in ("argument", "init"):
        with pytest.raises(ConfigError, match="quantised weights cannot be trained"):
            quantised(tmp_path, where)
    monkeypatch.setattr("burnish.model.quantization.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes: pip install 'burnish\[quant\]'"):
        quantised(tmp_path, "argument", peft_config=lora())
    init = {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}
    with pytest.raises(ConfigError, match="needs the package bitsandbytes"):
        SFTTrainer(
            "x",
            SFTConfig(**settings(tmp_path, **init)),
            train_dataset=TEXTS,
            processing_class=tiny.tokenizer(),
            peft_config=lora(),
        )


@pytest.mark.parametrize("where", ["argument", "init"])
def test_quantisation_reaches_from_pretrained(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to the loader, without the package that quantises."""
    seen: list[dict[str, Any]] = []

    def load(name: str, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return tiny.model(), {"missing_keys": set()}

    tiny.model().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("burnish.model.quantization.find_spec", lambda name: object())
    monkeypatch.setattr("burnish.model.loading.AutoModelForCausalLM.from_pretrained", load)
    trainer = quantised(tmp_path, where, peft_config=lora())
    assert [kwargs["quantization_config"].bnb_4bit_quant_type for kwargs in seen] == ["nf4"]
    assert seen[0]["dtype"] == torch.float32
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("where", ["argument", "init"])
def test_adapters_train_on_quantised_weights(tmp_path: Path, where: str) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.model(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path / "model")
    trainer = quantised(tmp_path, where, peft_config=lora(), max_steps=20, learning_rate=1e-2)
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert "Linear4bit" in kinds
    before = weights(trainer)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
