"""Record every sampled completion with its rewards and advantage, as JSON lines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from burnish.data.tokens import decode_text
from burnish.progress import say
from burnish.rollout.prompts import Shard
from burnish.runs.records import StepRecords
from burnish.types import Completion, Group

__all__ = ["TranscriptLog"]

_SHOWN_SECONDS = 30.0
_PROMPT_LENGTH, _COMPLETION_LENGTH = 80, 200

Entry = tuple[tuple[int, int], bool, dict[str, Any]]
"""The completion's (position, sample), whether another rank sampled it, and its record."""


class TranscriptLog:
    """Write one record per completion: prompt, text, reward, criteria, logged columns, advantage.

    Args:
        args: the trainer's config; `log_completions` sets whether and where to write.
        is_main: whether this rank writes the completions of all ranks.
        gathered: concatenates the lists of all ranks.
        name: name of the file.
    """

    def __init__(
        self,
        args: Any,
        *,
        is_main: bool,
        gathered: Callable[[Sequence[Entry]], list[Entry]],
        name: str = "transcripts.jsonl",
    ) -> None:
        self.enabled = bool(args.log_completions)
        self.records = StepRecords.of_run(args, args.log_completions, name, writes=is_main)
        self._gathered = gathered
        self._shows = is_main and args.progress and not args.disable_tqdm
        self._shown = -math.inf

    def write(
        self,
        sampled: Sequence[Shard],
        *,
        trained: Sequence[Shard] = (),
        step: int,
        tokenizer: PreTrainedTokenizerBase,
        **fields: Any,
    ) -> None:
        """Append the completions of all ranks, once each and in a fixed order; called on every rank.

        Args:
            sampled: all sampled completions, whether they are trained on or not.
            trained: completions of the batch, with their advantages; refills may move them from another rank.
            step: first optimizer step on them.
            tokenizer: decodes prompts.
            fields: further fields of every record.

        Raises:
            FileError: they cannot be written.
        """
        if self._shows and sampled and sampled[0].group.completions:
            self._show(sampled[0].group, tokenizer)
        if not self.enabled:
            return
        here = {id(completion) for shard in sampled for completion in shard.group.completions}
        own = [*_entries(sampled, tokenizer), *_entries(trained, tokenizer, but=here)]
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for key, is_copy, record in sorted(self._gathered(own), key=lambda entry: entry[:2]):
            # Replayed completions were written when they were sampled.
            if not is_copy or key in found:
                found[key] = record
        self.records.append([{"step": step, **fields, **record} for record in found.values()])

    def _show(self, group: Group, tokenizer: PreTrainedTokenizerBase) -> None:
        """Print one completion, at most every half minute."""
        if time.monotonic() - self._shown < _SHOWN_SECONDS:
            return
        self._shown = time.monotonic()
        completion = group.completions[0]
        prompt = _printable(decode_text(tokenizer, group.prompt_ids))
        reward = "failed" if completion.reward is None else f"{completion.reward:.3g}"
        prompt = prompt if len(prompt) <= _PROMPT_LENGTH else f"...{prompt[-_PROMPT_LENGTH:]}"
        text = _printable(completion.text)
        text = text if len(text) <= _COMPLETION_LENGTH else f"{text[:_COMPLETION_LENGTH]}..."
        say(f"sample: {prompt!r} -> {text!r}  reward {reward}")


def _printable(text: str) -> str:
    """Return text on one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _entries(
    shards: Sequence[Shard], tokenizer: PreTrainedTokenizerBase, but: Collection[int] | None = None
) -> list[Entry]:
    """Return entries of completions; with `but`, only of those that other ranks sampled."""
    return [
        (
            (shard.position, shard.first + number),
            but is not None,
            {
                "prompt_index": shard.group.index,
                "sample": shard.first + number,
                "prompt": prompt,
                **_record(completion),
            },
        )
        for shard in shards
        for prompt in [decode_text(tokenizer, shard.group.prompt_ids)]
        for number, completion in enumerate(shard.group.completions)
        if but is None or id(completion) not in but
    ]


def _record(completion: Completion) -> dict[str, Any]:
    score, advantage = completion.score, completion.sequence.get("advantages")
    if (of_tokens := completion.token.get("advantages")) is not None:
        advantage = fmean(completion.scored(of_tokens) or [0.0])
    return {
        "completion": completion.text,
        "stop_reason": completion.stop_reason,
        "num_tokens": completion.num_scored_tokens,
        **({} if completion.episode is None else {"messages": completion.episode.messages}),
        "reward": None if score is None else score.total,
        "criteria": {} if score is None else score.criteria,
        "errors": {} if score is None else score.errors,
        "answers": {} if score is None else score.answers,
        "extra": {} if score is None else score.extra,
        "advantage": advantage,
    }
