"""Updates of vLLM's weights: what the trainer has now, and the proof by the probe that vLLM samples from it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.errors import CheckFailed, ConfigError
from burnish.model.adapters import without_adapters
from burnish.rollout.engine import Request
from burnish.rollout.validation import check_requests
from burnish.rollout.vllm.probe import Agreement, Answers, compare, probe_sequences, score_probe
from burnish.rollout.vllm.weights import WeightFolders, has_adapters

__all__ = ["Proof", "Update", "Updates", "check_fits", "probe_metrics"]


@dataclass(frozen=True, slots=True)
class Update:
    """Weights to deliver, and the proof to ask for.

    Attributes:
        tag: identifies the weights; unique over runs.
        run: what the tags of this run begin with.
        version: the trainer's number of the weights.
        folder: weights or adapters on disk; empty where tensors are handed over in the process.
        is_adapter: whether adapters are delivered, on a base that vLLM has.
        sequences: tokens of the probe.
        expected: [N] the trainer's log-probabilities of the probe.
        base: [N] those without adapters; empty where there are none.
        bound: largest KL that rounding explains.
    """

    tag: str
    run: str
    version: int
    folder: str
    is_adapter: bool
    sequences: Sequence[Sequence[int]]
    expected: list[float]
    base: list[float]
    bound: float


class Updates:
    """The trainer's weights, version by version.

    Args:
        model: the model being trained, prepared for scoring.
        tokenizer: the trainer's.
        bound: largest KL of the probe that rounding explains, in nats per token.
        folders: where weights or adapters are written; None where tensors are handed over in the process.
    """

    def __init__(self, model: Any, tokenizer: Any, *, bound: float, folders: WeightFolders | None) -> None:
        self._model, self._tokenizer, self._bound, self._folders = model, tokenizer, bound, folders
        self._run, self._count, self._version = f"burnish-{secrets.token_hex(4)}", 0, -1
        self.sequences: list[list[int]] = []
        self.newest: Update | None = None

    def next(self, version: int, *, longest: int | None, agreed: Callable[[bool], bool] = bool) -> tuple[Update, bool]:
        """Return the update to the trainer's weights, and whether it differs from the one before.

        Args:
            version: the trainer's step.
            longest: most tokens of a prompt with its completion that vLLM takes, or None.
            agreed: makes the answer of all processes out of that of this one.

        Raises:
            FileError: weights cannot be written.
        """
        if not self.sequences:
            self.sequences = probe_sequences(self._tokenizer, self._model, longest=longest)
        expected, newest = score_probe(self._model, self.sequences), self.newest
        # A step may change weights of which the probe's tokens show nothing, such as rows of the embeddings.
        is_new = agreed(newest is None or version != self._version or newest.expected != expected)
        if newest is not None and not is_new:
            return newest, False
        self._count += 1
        tag = f"{self._run}-{version}-{self._count}"
        update = Update(
            tag=tag,
            run=self._run,
            version=version,
            folder="" if self._folders is None else str(self._folders.write(self._model, tag)),
            is_adapter=has_adapters(self._model),
            sequences=self.sequences,
            expected=expected,
            base=self._without_adapters(),
            bound=self._bound,
        )
        self.newest, self._version = update, version
        return update, True

    def _without_adapters(self) -> list[float]:
        """Return the probe's log-probabilities without adapters, to name an adapter that never arrived."""
        if not has_adapters(self._model):
            return []
        with without_adapters(self._model):
            return score_probe(self._model, self.sequences)


@dataclass(slots=True)
class Proof:
    """What the probe has shown of one vLLM.

    Attributes:
        last, anchor: earlier probes, see `burnish.rollout.vllm.probe.compare`.
        agreement: outcome of the last one.
    """

    last: Answers | None = None
    anchor: Answers | None = None
    agreement: Agreement | None = None

    def problem(self, update: Update, observed: list[float]) -> str:
        """Compare log-probabilities of the probe with the trainer's; return the mismatch with its likely cause.

        Args:
            update: what vLLM should sample from.
            observed: [N] vLLM's log-probabilities.

        Returns:
            A sentence after "vLLM ...", or an empty string where vLLM has the weights.
        """
        now = Answers(update.tag, update.expected, observed)
        found = compare(now, self.last, self.anchor, bound=update.bound)
        self.agreement = found
        if found.cause:
            cause = found.cause
            if update.base and _nearer(observed, update.base, update.expected):
                cause = "it answers with the base model: the adapter never arrived"
            return (
                f"does not sample from the weights of {update.tag}: its log-probabilities of {len(observed)} fixed "
                f"tokens differ from the trainer's by {found.difference:.3g} nats on average (KL {found.kl:.3g}, bound "
                f"{update.bound:g}). Likely cause: {cause}."
            )
        self.last = now
        if self.anchor is None or found.is_resolved:
            self.anchor = now
        return ""

    def check(self, update: Update, observed: list[float], *, who: str, fix: str) -> None:
        """Raise CheckFailed where log-probabilities of the probe differ from the trainer's.

        Args:
            update: what vLLM should sample from.
            observed: [N] vLLM's log-probabilities.
            who: the vLLM that answered.
            fix: what to do.
        """
        if problem := self.problem(update, observed):
            raise CheckFailed(f"{who} {problem} {fix}; the run stops before it samples from the wrong weights.")


def _nearer(observed: Sequence[float], one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether values are much nearer to one list than to the other."""
    first, second = (sum(abs(a - b) for a, b in zip(observed, to, strict=True)) for to in (one, other))
    return first < 0.5 * second


def probe_metrics(proofs: Iterable[Proof]) -> dict[str, float]:
    """Return the largest difference from the trainer, and the trainer's change, over the last probes."""
    agreements = [proof.agreement for proof in proofs if proof.agreement is not None]
    if not agreements:
        return {}
    return {
        "sampling/probe/difference": max(agreement.difference for agreement in agreements),
        "sampling/probe/moved": max(agreement.moved for agreement in agreements),
    }


def check_fits(requests: Sequence[Request], longest: int, *, limit: str, fix: str) -> None:
    """Check requests before vLLM sees them.

    Args:
        requests: prompts with their sampling parameters.
        longest: most tokens of a prompt with its completion.
        limit: whose limit it is.
        fix: how to raise it to {tokens}.

    Raises:
        EngineError: a request is unusable.
        ConfigError: a completion does not fit behind its prompt.
    """
    check_requests(requests)
    for request in requests:
        tokens = len(request.prompt_ids) + request.params.max_new_tokens
        if tokens > longest:
            raise ConfigError(
                f"max_completion_length = {request.params.max_new_tokens}: with a prompt of {len(request.prompt_ids)} "
                f"tokens it exceeds {limit} {longest}; {fix.format(tokens=tokens)}, or lower max_completion_length."
            )
