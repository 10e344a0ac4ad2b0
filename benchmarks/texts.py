"""What both sides of the SFT and DPO benchmarks share: rows of random words, and what a step was made of."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from common import Recorder

__all__ = ["BLOCK_TOKENS", "TEXTS", "Text", "TextRecorder", "blocks_per_step", "num_blocks", "text_rows"]

BLOCK_TOKENS = 1024
"""Length of the blocks that TRL packs rows into: its default `max_length`."""

ROWS_PER_BLOCK = 8
"""Rows that one block holds in the mean."""

Lengths = tuple[int, ...]
"""Tokens of a row's columns, the end-of-sequence token of each completion included."""

Text = tuple[list[int], list[list[int]]]
"""A row as it was trained on: tokens of the prompt, tokens of each completion."""


@dataclass(frozen=True, slots=True)
class TextWorkload:
    """One kind of row.

    Args:
        columns: prompt, then completions.
        step: (random numbers, rows of a step) -> lengths of each row's columns.
    """

    columns: tuple[str, ...]
    step: Callable[[random.Random, int], list[Lengths]]


def num_blocks(lengths: Sequence[int], block: int = BLOCK_TOKENS) -> int:
    """Blocks that best-fit decreasing packs these rows into."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in room if space >= length]
        if fitting:
            room.remove(min(fitting))
            room.append(min(fitting) - length)
        else:
            room.append(block - length)
    return len(room)


def blocks_per_step(num_rows: int) -> int:
    """Blocks that every step of uneven rows fills."""
    return max(num_rows // ROWS_PER_BLOCK, 1)


def _uneven(rng: random.Random, num_rows: int) -> list[Lengths]:
    """Rows of 20 to 400 tokens, log-uniform, the prompt a fifth to three fifths of each.

    Drawn until the step's rows fill the same number of TRL's blocks as every other step: a micro-batch of TRL's counts
    blocks, and both sides must see the same rows in the same step.
    """
    while True:
        totals = [round(math.exp(rng.uniform(math.log(20), math.log(400)))) for _ in range(num_rows)]
        if num_blocks(totals) == blocks_per_step(num_rows):
            break
    prompts = [round(total * rng.uniform(0.2, 0.6)) for total in totals]
    return [(prompt, total - prompt) for prompt, total in zip(prompts, totals, strict=True)]


def _pairs(prompt: int, completion: int) -> Callable[[random.Random, int], list[Lengths]]:
    """Pairs around these lengths, each column a fifth longer or shorter at most."""

    def step(rng: random.Random, num_rows: int) -> list[Lengths]:
        means = (prompt, completion, completion)
        return [tuple(round(mean * rng.uniform(0.8, 1.2)) for mean in means) for _ in range(num_rows)]

    return step


_PAIR = ("prompt", "chosen", "rejected")

TEXTS = {
    "sft_uneven": TextWorkload(("prompt", "completion"), _uneven),
    "dpo_half": TextWorkload(_PAIR, _pairs(100, 100)),
    "dpo_three_quarters": TextWorkload(_PAIR, _pairs(300, 100)),
}


def _words(tokenizer: Any) -> list[str]:
    """Words that are one token each wherever they stand: a space and letters, in the order of their ids."""
    words = [
        (index, " " + token[1:])
        for token, index in tokenizer.get_vocab().items()
        if re.fullmatch("\u0120[a-z]{2,}", token)
    ]
    return [word for index, word in sorted(words) if tokenizer.encode(word, add_special_tokens=False) == [index]]


def text_rows(settings: Mapping[str, Any], tokenizer: Any, *, seed: int = 0) -> list[dict[str, str]]:
    """The data set: as many rows as the run's steps take, the same on every machine."""
    workload, rng, words = TEXTS[settings["workload"]], random.Random(seed), _words(tokenizer)
    made: list[dict[str, str]] = []
    for _ in range(settings["max_steps"]):
        for prompt, *completions in workload.step(rng, settings["rows"]):
            # The last token of a completion is the end-of-sequence token, which both sides append.
            lengths = [prompt, *(length - 1 for length in completions)]
            texts = ["".join(rng.choices(words, k=length)) for length in lengths]
            made.append(dict(zip(workload.columns, texts, strict=True)))
    return made


class TextRecorder(Recorder):
    """Measures SFT and DPO steps: keeps the batches that enter `training_step`, reads them after the clock stopped.

    Args:
        trainer: the trainer to watch.
        read: one of its batches -> its rows.
    """

    def __init__(self, trainer: Any, read: Callable[[Any], list[Text]]) -> None:
        super().__init__()
        self._read, self._batches = read, []
        inner = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._batches.append(inputs)
            return inner(model, inputs, *args, **kwargs)

        trainer.training_step = training_step

    def start(self) -> None:
        """Begin a step: forget the last one."""
        self._batches.clear()
        super().start()

    def details(self, now: float) -> dict[str, Any]:
        """The step's rows, read from the tensors that were trained on."""
        texts = [text for batch in self._batches for text in self._read(batch)]
        sequences = [len(prompt) + len(completion) for prompt, completions in texts for completion in completions]
        scored = sum(len(completion) for _, completions in texts for completion in completions)
        digests = sorted(sha256(json.dumps(text).encode()).hexdigest() for text in texts)
        return {
            "rows": len(texts),
            "unique_tokens": scored + sum(len(prompt) for prompt, _ in texts),
            "scored_tokens": scored,
            "longest_sequence": max(sequences),
            "padded_tokens": len(sequences) * max(sequences),
            "computed_tokens": sum(batch["input_ids"].numel() for batch in self._batches),
            "micro_batches": len(self._batches),
            "texts": sha256("".join(digests).encode()).hexdigest()[:16],
        }
