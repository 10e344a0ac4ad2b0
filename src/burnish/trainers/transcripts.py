"""Every sampled completion with its reward breakdown, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from burnish.types import Completion, Group

__all__ = ["JsonLines", "TranscriptLog"]


class JsonLines:
    """An append-only file of JSON objects with a `step`, which a resumed run cuts back to its checkpoint."""

    def __init__(self, file: Path | None, stage: str) -> None:
        self.file = file
        self.stage = stage

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Write records, each a line, with this stage's name."""
        if self.file is None or not records:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"stage": self.stage, **record}, ensure_ascii=False) + "\n" for record in records]
        with self.file.open("a", encoding="utf-8") as stream:
            stream.writelines(lines)

    def truncate_after(self, step: int) -> None:
        """Drop this stage's records of later steps, and a last line that was cut off."""
        if self.file is None or not self.file.is_file():
            return
        kept: list[str] = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record.get("stage") != self.stage or record.get("step", 0) <= step:
                kept.append(line + "\n")
        self.file.write_text("".join(kept), encoding="utf-8")


class TranscriptLog(JsonLines):
    """Writes groups as one record per completion: prompt, text, reward, criteria, advantage."""

    @classmethod
    def of(cls, args: Any, is_main: bool, stage: str) -> TranscriptLog:
        """The log that `log_completions` asks for; it writes nothing on other ranks or where it is off."""
        if not args.log_completions or not is_main:
            return cls(None, stage)
        folder = args.output_dir if args.log_completions is True else args.log_completions
        return cls(Path(folder) / "transcripts.jsonl", stage)

    def write(self, groups: Sequence[Group], *, step: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Append the completions of one rollout."""
        if self.file is None:
            return
        self.append(
            [
                {"step": step, "prompt_index": group.index, "sample": number, "prompt": prompt, **_record(completion)}
                for group in groups
                for prompt in [tokenizer.decode(group.prompt_ids)]
                for number, completion in enumerate(group.completions)
            ]
        )


def _record(completion: Completion) -> dict[str, Any]:
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
