"""Trained reward models as reward functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from burnish.data import answer_group, read_last
from burnish.errors import ModelError, RewardError
from burnish.model.adapter_files import saved_adapters
from burnish.model.classifier import load_reward_model, pack_reads, prepare_for_rewards, reward_scores
from burnish.model.loading import load_processing_class
from burnish.model.packing import split_by_tokens
from burnish.model.precision import fast_bf16
from burnish.model.scoring import causal_lm, continuing, eval_mode, keeps_prompts
from burnish.types import Completion, Group

__all__ = ["RewardModel"]

_ROW_COLUMNS = ("chat_template_kwargs", "tools")
"""Columns that change how a conversation is rendered."""


class RewardModel:
    """Reward function of a trained reward model, for `reward_funcs` or a `Criterion`.

    Completions of one prompt share its computation, also in several forwards. Texts are tokenized as in training: EOS
    ends plain completions, the chat template ends conversational ones.

    Args:
        model: a model saved by `RewardTrainer` (folder of a model or of adapters, hub name), or a sequence classifier
            with one label in memory.
        tokenizer: the reward model's tokenizer, which may differ from the policy's; None loads the saved one.
        token_budget: most tokens of one forward; a longer completion runs alone. None: all at once.
        chat_template: a template's file or name; None for the tokenizer's own.
        device: device of a model given by name; None for the GPU if there is one.
        bf16: run a model given by name in bf16; None where the device has fast bf16.

    Raises:
        ModelError: the model is not a reward model, or is in memory and given without a tokenizer or with a device or
            dtype.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        token_budget: int | None = 4096,
        chat_template: str | None = None,
        device: str | torch.device | None = None,
        bf16: bool | None = None,
    ) -> None:
        if not isinstance(model, str | Path):
            if tokenizer is None:
                raise ModelError("tokenizer = None with a reward model in memory: pass its tokenizer.")
            if device is not None or bf16 is not None:
                raise ModelError(f"device = {device}, bf16 = {bf16}: a model in memory keeps its own; omit both.")
        self.tokenizer = tokenizer if tokenizer is not None else load_processing_class(str(model))
        self.token_budget = token_budget
        self.chat_template = chat_template
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, _ = load_reward_model(model, bf16=fast_bf16(target) if bf16 is None else bf16, seed=None)
        if isinstance(model, str | Path):
            self.model.to(target)
        if isinstance(model, str | Path) and saved_adapters(model) is not None:
            # Adapters are saved without the model's configuration, and their base's lacks the padding token.
            causal_lm(self.model).config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        prepare_for_rewards(self.model)
        config = causal_lm(self.model).config.get_text_config()
        self._pad_token_id: int | None = config.pad_token_id

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Score completions.

        Args:
            prompts: strings, or lists of messages.
            completions: strings, or lists of messages; one per prompt.
            columns: columns of the data set; `tools` and `chat_template_kwargs` reach the chat template.

        Returns:
            Scores in the order of the completions; higher is better, and 0 has no special meaning.

        Raises:
            RewardError: the numbers of prompts and completions differ.
            DataError: a prompt or completion that cannot be tokenized.
        """
        if len(prompts) != len(completions):
            raise RewardError(
                f"{len(prompts)} prompts for {len(completions)} completions: give one prompt per completion."
            )
        rows = [
            {"prompt": prompt, "completion": completion}
            | {name: columns[name][i] for name in _ROW_COLUMNS if columns.get(name) is not None}
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        groups, scored = self._groups(rows)
        device = self.model.device
        with torch.no_grad(), eval_mode(self.model):
            for part in split_by_tokens(groups, self.token_budget, keep_prompts=keeps_prompts(self.model)):
                batch = pack_reads(part).to(device)
                with continuing(self.model, batch, reward_scores):
                    values = reward_scores(self.model, batch).tolist()
                done = [completion for group in part for completion in group.completions]
                for completion, value in zip(done, values, strict=True):
                    completion.sequence["score"] = value
        return [completion.sequence["score"] for completion in scored]

    def _groups(self, rows: list[dict[str, Any]]) -> tuple[list[Group], list[Completion]]:
        """Group rows by prompt; also return the completions in row order."""
        by_prompt: dict[tuple[int, ...], Group] = {}
        completions: list[Completion] = []
        for index, row in enumerate(rows):
            single = answer_group(row, self.tokenizer, index=index, chat_template=self.chat_template)
            read_last(single, self._pad_token_id)
            group = by_prompt.setdefault(tuple(single.prompt_ids), Group(single.prompt_ids, []))
            group.completions += single.completions
            completions += single.completions
        return list(by_prompt.values()), completions
