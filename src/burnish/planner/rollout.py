"""Bytes that a rollout of the native engine takes beside its cache, at the moments at which it may take most."""

from __future__ import annotations

from dataclasses import dataclass, replace

from burnish.planner.memory import (
    COPIED_PROMPT_TOKENS,
    MOST_ROWS,
    PREFILL_TOKENS,
    Bytes,
    Method,
    Part,
    forward_bytes,
    round_up,
)
from burnish.planner.run import Run
from burnish.planner.shapes import ModelShape

__all__ = ["Wave"]

_DRAWN_ROWS = 16
"""Rows whose tokens are drawn together, from fp32 logits (`burnish.rollout.sampling`)."""


@dataclass(frozen=True, slots=True)
class Wave:
    """Completions that the native engine samples together, at their greatest length.

    Attributes:
        prompt: tokens of a prompt.
        completion: tokens of a completion.
        group: completions of a prompt.
        rows: completions.
        bound: most tokens of the cache; None for no bound.
        in_8_bits: whether keys and values are.
    """

    prompt: int
    completion: int
    group: int
    rows: int
    bound: int | None = None
    in_8_bits: bool = False

    @classmethod
    def of(cls, prompt: int, completion: int, group: int, completions: int, bound: int | None = None) -> Wave:
        """Fill a wave from the completions of a rollout as the engine does: prompts come in while one more row fits."""
        rows = min(completions, MOST_ROWS)
        if bound is not None:

            def room(prompts: int) -> int:
                return (bound - prompts * round_up(prompt)) // round_up(completion)

            prompts = -(-rows // group)
            prompts = next((n for n in range(1, prompts) if room(n + 1) <= n * group), prompts)
            rows = max(min(rows, prompts * group, room(prompts)), 1)
        return cls(prompt, completion, group, rows, bound)

    @classmethod
    def planned(cls, run: Run) -> Wave:
        """Return the first wave of a run's rollouts."""
        completions = run.completions * run.rollout_batches
        wave = cls.of(run.prompt_tokens, run.completion_tokens, run.group, completions, run.cache_bound)
        return replace(wave, in_8_bits=run.method.int8_cache)

    @property
    def prompts(self) -> int:
        """Prompts in the cache."""
        return -(-self.rows // self.group)

    @property
    def copied(self) -> int:
        """Prompt tokens in the cache of each row; 0 where the rows of a prompt share its own."""
        return self.prompt if self.bound is None and self.prompt <= COPIED_PROMPT_TOKENS else 0

    def bytes(self, shape: ModelShape, method: Method, *, on_cpu: bool) -> Bytes:
        """Return the largest moment of a prefill, a decode forward, the attention in both, and sampling."""
        prefill = Part(self.prompt * min(self.prompts, max(PREFILL_TOKENS // self.prompt, 1)), 0, 0)
        step = Part(self.rows, 0, 0)
        moments: list[Bytes] = [
            *(forward_bytes(shape, method, part, on_cpu=on_cpu, with_head=False) for part in (prefill, step)),
            {"attention": self._attention(shape, method, on_cpu=on_cpu)},
            {"logits": self._logits(shape, method)},
        ]
        if shape.softcap:
            # Scores of a prompt with itself, in fp32 before and after their softmax, and rounded.
            moments.append({"attention": (8 + method.item) * shape.heads * self.prompt**2})
        return max(moments, key=lambda found: sum(found.values()))

    def _attention(self, shape: ModelShape, method: Method, *, on_cpu: bool) -> int:
        """A layer's attention: a mask, and off the CPU copies of its keys or values, and scores in fp32 and once more.

        The rows' own tokens and their prompts take turns; a prompt's keys are copied once for its rows.
        """
        item, own, prompt = method.item, round_up(self.completion + self.copied), round_up(self.prompt)
        mask = 4 * self.rows * own
        if on_cpu and not shape.softcap:
            return mask
        scores = (4 + item) * shape.heads
        of_own = self.rows * own * (item * shape.keys + scores)
        of_prompts = 0 if self.copied else prompt * (self.prompts * item * shape.keys + self.rows * scores)
        return max(of_own, of_prompts) + mask

    def _logits(self, shape: ModelShape, method: Method) -> int:
        """Logits of all rows and of the prompts that they continue, and two fp32 copies of those drawn together."""
        drawn = 8 * min(self.rows, _DRAWN_ROWS)
        return shape.vocabulary * (method.item * (self.rows + self.prompts) + drawn)
