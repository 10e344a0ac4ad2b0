"""Checks of a server when it is connected: its model, its tokenizer, and how it reports log-probabilities."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from burnish.data.tokens import plain_ids
from burnish.errors import ConfigError
from burnish.rollout.vllm.client import ServerClient, ServerRefused
from burnish.rollout.vllm.wire import LogprobsMode, parse_prompt_logprobs, probe_request

__all__ = ["Served", "check_tokenizer", "read_logprobs_mode", "read_served"]

_CHUNK = 4096
"""Tokens of one request that decodes them."""

_ROUNDED_NATS = 0.25
"""Largest difference between decoding a token and scoring it in a prompt, in 16 bits."""

_INFO_SECONDS = 120.0

_TEXT = "Répondez: 12 * 7 = 84,\n\tif x<=y: return '…'  # ok; 日本語, naïve café — 1e-6"


@dataclass(frozen=True, slots=True)
class Served:
    """A server's model.

    Attributes:
        name: its name in requests.
        root: folder or name that it was loaded from.
        max_model_len: most tokens of a prompt with its completion, or None.
        backend: back end of its weight transfer, or None.
        workers: processes that hold a part of the weights, or a copy.
    """

    name: str
    root: str
    max_model_len: int | None
    backend: str | None = None
    workers: int = 1


async def read_served(client: ServerClient) -> Served:
    """Return the base model that a server serves; adapters have a parent.

    Raises:
        ConfigError: it serves none.
    """
    listed = (await client.get("/v1/models")).get("data", [])
    for card in listed:
        if not card.get("parent"):
            longest = card.get("max_model_len")
            backend, workers = await _weight_transfer(client)
            root = str(card.get("root") or card["id"])
            return Served(str(card["id"]), root, longest and int(longest), backend, workers)
    raise ConfigError(f"{client.url} serves no model: start one with `burnish serve MODEL`.")


async def _weight_transfer(client: ServerClient) -> tuple[str | None, int]:
    """Return the back end of a server's weight transfer, and the number of its workers."""
    try:
        # It lists the packages of its environment, once.
        answer = await client.get("/server_info?config_format=json", deadline=_INFO_SECONDS)
    except ServerRefused:  # a server without the routes of a sync, which will fail there
        return None, 1
    config = answer.get("vllm_config") or {}
    transfer, parallel = config.get("weight_transfer_config") or {}, config.get("parallel_config") or {}
    copies = int(parallel.get("data_parallel_size") or 1)
    return transfer.get("backend"), copies * int(parallel.get("world_size") or 1)


async def check_tokenizer(client: ServerClient, served: Served, tokenizer: Any) -> None:
    """Check that a server has the trainer's tokenizer: a hash of the decoded vocabulary, and encoded texts.

    Raises:
        ConfigError: with the first difference.
    """
    size = len(tokenizer)
    ours, theirs = hashlib.sha256(), hashlib.sha256()
    for chunk in _chunks(sorted(int(i) for i in cast("dict[str, Any]", tokenizer.get_vocab()).values())):
        try:
            answer = await client.post("/detokenize", {"model": served.name, "tokens": chunk})
        except ServerRefused as error:
            raise _other_tokenizer(client, f"it cannot decode tokens {chunk[0]} to {chunk[-1]} ({error})") from error
        decoded, local = str(answer.get("prompt")), str(tokenizer.decode(chunk, skip_special_tokens=False))
        ours.update(local.encode("utf-8", "surrogatepass"))
        theirs.update(decoded.encode("utf-8", "surrogatepass"))
        if ours.digest() != theirs.digest():
            first = next((i for i, (a, b) in enumerate(zip(local, decoded, strict=False)) if a != b), len(local))
            shown = f"{local[first : first + 20]!r}, there {decoded[first : first + 20]!r}"
            raise _other_tokenizer(client, f"of {size} tokens, those from {chunk[0]} decode to {shown}")
    special = " ".join(map(str, cast("Sequence[Any]", tokenizer.all_special_tokens)))
    for text in (_TEXT, special):
        asked = {"model": served.name, "prompt": text, "add_special_tokens": False}
        found, wanted = (await client.post("/tokenize", asked)).get("tokens"), plain_ids(tokenizer, text)
        if found != wanted:
            raise _other_tokenizer(client, f"{text!r:.60} encodes to {wanted!r:.100} here and {found!r:.100} there")


def _chunks(ids: Sequence[int]) -> Iterator[list[int]]:
    for first in range(0, len(ids), _CHUNK):
        yield list(ids[first : first + _CHUNK])


def _other_tokenizer(client: ServerClient, difference: str) -> ConfigError:
    return ConfigError(
        f"{client.url} has another tokenizer than the trainer: {difference}. Start it with the trained model, "
        "`burnish serve MODEL`."
    )


async def read_logprobs_mode(client: ServerClient, served: Served, prompt: Sequence[int]) -> LogprobsMode:
    """Find out which log-probabilities a server returns.

    Those of the distribution sampled from are -log m where top_k = 1 keeps m equal logits. m is mostly 1; logits of 16
    bits tie now and then. Those of the model are what it says of the same tokens in a prompt.

    Raises:
        ConfigError: they are neither.
    """
    body = {"model": served.name, "prompt": list(prompt), "max_tokens": 4, "temperature": 1.0, "top_k": 1}
    body |= {"logprobs": 0, "ignore_eos": True, "seed": 1, "return_token_ids": True, "add_special_tokens": False}
    answer = await client.post("/v1/completions", body, deadline=120.0)
    choice = answer["choices"][0]
    values = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    allowed = [-math.log(ties) for ties in range(1, 9)]
    if all(min(abs(value - a) for a in allowed) < 1e-3 for value in values):
        return "processed"
    tokens = [*prompt, *choice["token_ids"]]
    scored = await client.post("/v1/completions", probe_request(tokens, model=served.name), deadline=120.0)
    known = parse_prompt_logprobs(scored, tokens)[-len(values) :]
    if all(abs(value - k) < _ROUNDED_NATS for value, k in zip(values, known, strict=True)):
        return "raw"
    raise ConfigError(
        f"{client.url} reports log-probabilities that are neither those before temperature and truncation nor those "
        f"after ({values}): start it with --logprobs-mode processed_logprobs, as `burnish serve` does."
    )
