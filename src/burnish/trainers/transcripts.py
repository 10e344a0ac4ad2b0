"""Every sampled completion with its reward breakdown, as JSON lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from burnish.data.tokens import decode_text
from burnish.runs.records import StepRecords
from burnish.trainers.prompts import Share
from burnish.types import Completion

__all__ = ["TranscriptLog"]

Record = dict[str, Any]


class TranscriptLog:
    """Writes one record per completion: prompt, text, reward, criteria, advantage.

    Args:
        args: `log_completions` says whether and where.
        is_main: whether this rank writes; the others hand their completions to it.
        gathered: the same list of all ranks.
    """

    def __init__(self, args: Any, *, is_main: bool, gathered: Callable[[Sequence[Record]], list[Record]]) -> None:
        self.enabled = bool(args.log_completions)
        folder = Path(args.output_dir if args.log_completions in (True, False) else args.log_completions)
        # Runs that share a folder must not cut each other's records back.
        run = os.path.relpath(args.output_dir, folder)
        labels = {"stage": args.kind, **({} if run == "." else {"run": run})}
        self.records = StepRecords(folder / "transcripts.jsonl" if self.enabled and is_main else None, **labels)
        self._gathered = gathered

    def write(self, shares: Sequence[Share], *, step: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Append the completions of one rollout, those of all ranks; every rank calls this.

        Raises:
            FileError: they cannot be written.
        """
        if not self.enabled:
            return
        own = [
            {"place": share.place, "step": step, "prompt_index": share.group.index, "sample": share.first + number,
             "prompt": prompt, **_record(completion)}
            for share in shares
            for prompt in [decode_text(tokenizer, share.group.prompt_ids)]
            for number, completion in enumerate(share.group.completions)
        ]  # fmt: skip
        everyone = sorted(self._gathered(own), key=lambda record: (record["place"], record["sample"]))
        for record in everyone:
            del record["place"]
        self.records.append(everyone)


def _record(completion: Completion) -> Record:
    score = completion.score
    return {
        "completion": completion.text,
        "stop_reason": completion.stop_reason,
        "num_tokens": len(completion.token_ids),
        "reward": None if score is None else score.total,
        "criteria": {} if score is None else score.criteria,
        "errors": {} if score is None else score.errors,
        "advantage": completion.advantage,
    }
