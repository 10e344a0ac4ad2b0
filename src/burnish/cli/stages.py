"""Training, evaluation and sampling from the tables of a checked run file, for all commands."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers
from tqdm.auto import tqdm
from transformers import modeling_gguf_pytorch_utils

import burnish
from burnish.cli.dry_run import dry_run
from burnish.config import known_fields
from burnish.config.sections import EvaluationSection, PairsSection
from burnish.config.stages import STAGES
from burnish.data import encode_rows, errors_of, prompt_group, sft_groups
from burnish.environments.episodes import EpisodeEngine
from burnish.errors import ConfigError
from burnish.evaluation.evaluate import Evaluation, evaluate, mean_nll
from burnish.evaluation.pairs import PairRanking, best_row, preference_rows, rank_pairs, sample_rows
from burnish.model.fingerprint import weights_fingerprint
from burnish.model.loading import adopt_chat_template, load_model, load_processing_class
from burnish.model.precision import fast_bf16
from burnish.model.reward_model import RewardModel
from burnish.model.scoring import prepare_for_scoring
from burnish.rewards import Rubric
from burnish.rollout import SamplingParams, eos_token_ids, make_engine
from burnish.runs.files import write_json_lines
from burnish.runs.lock import locked
from burnish.stages.agents import Agents
from burnish.training.callbacks import EngineProgress
from burnish.training.checkpoint import start

__all__ = ["evaluate_model", "make_pairs", "rank_with", "train"]

logger = logging.getLogger(__name__)

# transformers' bars for single files would hide the progress of the run; that of GGUF files has no switch.
transformers.logging.disable_progress_bar()
cast(Any, modeling_gguf_pytorch_utils).tqdm = partial(tqdm, disable=True)

Rows = Sequence[dict[str, Any]]


def train(
    kind: str,
    model: str,
    rows: Rows,
    training: dict[str, Any],
    *,
    rubric: Rubric | None = None,
    environment: Any = None,
    eval_rows: Rows | None = None,
    model_init: dict[str, Any] | None = None,
    peft: dict[str, Any] | None = None,
    only_look: bool = False,
) -> Any:
    """Train one stage and save the model.

    Args:
        kind: stage name.
        model: initial model.
        rows: training rows.
        training: keyword arguments of the stage's config.
        rubric: reward of an online stage.
        environment: `environment_factory` of an online stage; None for single turns.
        eval_rows: held-out rows.
        model_init: arguments of from_pretrained.
        peft: fields of a LoraConfig.
        only_look: print a dry run instead, without loading weights (`--dry-run`).

    Returns:
        The trainer; None for a dry run.
    """
    stage = STAGES[kind]
    config_class, trainer_class = (getattr(burnish, f"{stage.name}{ending}") for ending in ("Config", "Trainer"))
    config = config_class(**{"model_init_kwargs": model_init or None, **training})
    if only_look:
        shown: dict[str, Any] = {"rubric": rubric, "environment": environment} if stage.online else {}
        dry_run(kind, config, model, rows, eval_rows=eval_rows, **shown)
        return None
    # Fail before weights are loaded; the trainer checks again afterwards.
    start(config, config.resume_from_checkpoint, model=model, check_only=True)
    rewards: dict[str, Any] = {"reward_funcs": rubric} if stage.online else {}
    if stage.online and environment is not None:
        rewards["environment_factory"] = environment
    # The lock covers loading and saving; other ranks end with the first one.
    with locked(config.output_dir) if config.process_index == 0 else nullcontext():
        trainer = trainer_class(
            model=model, args=config, train_dataset=list(rows), eval_dataset=eval_rows, peft_config=_lora(peft),
            **rewards,
        )  # fmt: skip
        with trainer.status.recording():  # a run is finished once its model is saved
            trainer.train()
            trainer.save_model()
        return trainer


def _lora(fields: dict[str, Any] | None) -> Any:
    if fields is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(**fields)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"[peft]: peft refuses it ({' '.join(str(error).split())}).") from error


def evaluate_model(
    model: str, rows: Rows, rubric: Rubric, section: EvaluationSection, *, name: str, seed: int = 0, **shared: Any
) -> Evaluation:
    """Evaluate pass@k of a saved model on rows, and `nll` if they have completions.

    `shared` is `model_init`, and for episodes `environment` and the fields of the trainer that limit them, `episodes`.
    """
    loaded, tokenizer, sampling = _sampling(model, rows, rubric, section, "data.eval", **shared)
    total = len(sampling["groups"]) * section.num_samples
    options: dict[str, Any] = {"ks": section.ks, "seed": seed, "solved": section.solved, "name": name}
    if isinstance(sampling["engine"], EpisodeEngine):
        result = evaluate(**options, **sampling)
    else:
        with EngineProgress(sampling["engine"], f"evaluate {name}", total) as shown:
            options["engine"] = shown
            result = evaluate(**sampling | options)
    if any("completion" not in row for row in rows):
        return result
    prepare_for_scoring(loaded)
    shown_groups = encode_rows(sft_groups, rows, tokenizer)
    nll = {group.index: value for group, value in zip(shown_groups, mean_nll(loaded, shown_groups), strict=True)}
    return result.with_criterion("nll", [nll.get(index) for index in range(len(rows))])


def make_pairs(
    model: str, rows: Rows, rubric: Rubric, section: PairsSection, *, model_init: dict[str, Any] | None = None
) -> dict[str, int]:
    """Write samples, preference pairs and best-of-n rows to the section's folder; returns row counts by file."""
    folder, seed = Path(section.output_dir), section.seed
    with locked(section.output_dir):
        loaded, _, sampling = _sampling(model, rows, rubric, section, "data.train", model_init=model_init)
        identity = weights_fingerprint(loaded)
        records = sample_rows(file=folder / "samples.jsonl", model=identity, seed=seed, **sampling)
        limits: dict[str, Any] = {"pairs_per_prompt": section.pairs_per_prompt, "min_margin": section.min_margin}
        pairs = [row for record in records for row in preference_rows(record, seed=seed, **limits)]
        best = [best_row(record, min_reward=section.min_reward, seed=seed) for record in records]
        made = {"pairs.jsonl": pairs, "best.jsonl": [row for row in best if row is not None]}
        for name, found in made.items():
            write_json_lines(folder / name, found)
    return {str(folder / name): len(found) for name, found in made.items()}


def rank_with(model: str, rows: Rows) -> PairRanking:
    """Rank preference rows with a saved reward model."""
    return rank_pairs(RewardModel(model), rows)


def _sampling(
    model: str,
    rows: Rows,
    rubric: Rubric,
    section: EvaluationSection | PairsSection,
    name: str,
    model_init: dict[str, Any] | None = None,
    environment: Any = None,
    episodes: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Load a model and its tokenizer; also return the arguments that `evaluate` and `sample_rows` share."""
    tokenizer = load_processing_class(model)
    adopt_chat_template(tokenizer, section.chat_template)
    agents = Agents(model, environment_factory=environment)
    fields = {name: info.default for name, info in known_fields("grpo").items()} | dict(episodes or {})
    environments = agents.environments(SimpleNamespace(**fields | {"stop_settled": False}), tokenizer)
    if environments is not None:
        with errors_of(name):
            rows = [environments.prepared(row) for row in rows]
    groups = encode_rows(prompt_group, rows, tokenizer, name=name)
    with errors_of(name):
        rubric.check_columns(groups)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, _ = load_model(model, bf16=fast_bf16(device), init_kwargs=model_init)
    params = SamplingParams(
        max_new_tokens=section.max_completion_length,
        temperature=section.temperature,
        eos_token_ids=eos_token_ids(loaded, tokenizer),
    )
    engine: Any = make_engine(loaded.to(device), tokenizer)
    engine = agents.playing(engine, environments, loaded, tokenizer, params)
    shared = {"engine": engine, "groups": groups, "rubric": rubric, "params": params}
    return loaded, tokenizer, {**shared, "num_samples": section.num_samples}
