"""Bytes of weights, gradients, optimizer states, activations, head and key-value cache, by formulas.

L layers, H hidden, Q query features, K key features, M width of the MLP, V vocabulary, T tokens of a part, N scored
tokens, r rank of adapters. What the trainers allocate is described in docs/planning.md, with what was measured.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from burnish.errors import ConfigError
from burnish.planner.logit_tiles import tile_bytes
from burnish.planner.shapes import Linear, ModelShape

__all__ = [
    "COPIED_PROMPT_TOKENS",
    "KEPT_PROMPT_TOKENS",
    "MOST_ROWS",
    "PREFILL_TOKENS",
    "Adapters",
    "Bytes",
    "Method",
    "Part",
    "adapted_experts",
    "cache_bytes",
    "cache_tokens",
    "checkpoint_bytes",
    "dequantised_bytes",
    "forward_bytes",
    "is_tiled",
    "keeps_prompt",
    "layer_bytes",
    "mlp_width",
    "offloaded_bytes",
    "pinned_bytes",
    "round_up",
    "saved_bytes",
    "split_rows",
    "weight_bytes",
]

Bytes = dict[str, int]
"""Component -> bytes."""

PREFILL_TOKENS = 4096
"""Most prompt tokens of one prefill forward of the native engine, unless one prompt is longer."""
KEPT_PROMPT_TOKENS = 64
"""Least tokens of prompts that are not computed again, for which a group's prompt gets a pass of its own."""
MOST_ROWS = 64
"""Most completions that the native engine decodes together."""
COPIED_PROMPT_TOKENS = 128
"""Longest prompt that the native engine copies into the cache of each completion."""
_CACHE_STEP = 16
"""Tokens to whose multiples the native engine rounds cache lengths."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """LoRA adapters, as in peft.

    Attributes:
        rank: r.
        targets: names of modules, one regular expression, "all-linear", or None for peft's choice.
        parameters: names of fused expert weights that get adapters.
        whole: modules trained in full, such as embed_tokens.
        ranks: regular expression of modules -> rank.
        layers: number of layers that get adapters; None for all.
    """

    rank: int = 8
    targets: tuple[str, ...] | str | None = None
    parameters: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    layers: int | None = None

    @property
    def trains_embedding(self) -> bool:
        """Whether the input embedding is trained in full."""
        return any(name.rpartition(".")[2] in ("embed_tokens", "wte") for name in self.whole)

    def matched(self, shape: ModelShape) -> list[tuple[Linear, int]]:
        """Return the linear layers that get adapters, each with its rank."""
        tensors = [(one, self._rank_of(one.path)) for one in shape.expert_tensors if one.path.endswith(self.parameters)]
        if shape.mixture_layers and self.targets == "all-linear":
            # peft adapts fused experts per expert, two fused projections with twice the rank, and the router.
            router = Linear("mlp.gate", shape.hidden, shape.experts, shape.mixture_layers)
            ranks = (2 * self.rank, self.rank, self.rank)
            tensors = list(zip((*shape.expert_tensors, router), ranks, strict=True))
        return [*((one, self._rank_of(one.path)) for one in shape.linears if self._takes(one)), *tensors]

    def _takes(self, linear: Linear) -> bool:
        targets = self.targets
        if targets == "all-linear":
            return True
        if isinstance(targets, str):
            names = (f"model.layers.0.{linear.path}", f"transformer.h.0.{linear.path}")
            return any(re.fullmatch(targets, name) for name in names)
        if targets is None:
            targets = ("q_proj", "v_proj", "qkv_proj", "c_attn")
        return any(linear.path == name or linear.path.endswith(f".{name}") for name in targets)

    def _rank_of(self, path: str) -> int:
        for pattern, rank in self.ranks:
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                return rank
        return self.rank

    def num_parameters(self, shape: ModelShape) -> int:
        """Number of trained parameters: r (n + m) for an n by m layer, and those trained in full."""
        added = sum(rank * (one.inputs + one.outputs) * one.number * one.experts for one, rank in self.matched(shape))
        added = added if self.layers is None else added * self.layers // shape.layers
        whole = sum(name.rpartition(".")[2] in ("embed_tokens", "wte", "lm_head") for name in self.whole)
        return added + whole * shape.vocabulary * shape.hidden

    def saved_ranks(self, shape: ModelShape) -> int:
        """Sum of the ranks in a layer: the outputs of A, which the backward pass needs."""
        return sum(rank * one.number for one, rank in self.matched(shape) if one.experts == 1) // shape.layers


@cache
def _adapter_sizes(adapters: Adapters, shape: ModelShape) -> tuple[int, int]:
    return adapters.num_parameters(shape), adapters.saved_ranks(shape)


@dataclass(frozen=True, slots=True)
class Method:
    """How weights are held and trained.

    Attributes:
        bf16: compute in bf16 with fp32 masters; else in fp32.
        adapters: None trains all weights.
        bits: bits of a linear weight of the decoder if it is quantised, such as 4.127; None for the compute dtype.
        optimizer_bytes: bytes of the optimizer's state per trained weight.
        paged_optimizer: whether that state is in the host's memory.
        gradient_checkpointing: keep the inputs of layers only, and recompute a layer in its backward pass.
        activation_offloading: keep those inputs in the host's memory.
        mlp_tiles: parts of its tokens that an MLP computes one after another.
        embedding_offloading: keep the input embedding in the host's memory.
        int8_cache: whether the native engine's keys and values are in 8 bits.
        entropy_bonus: whether the loss has a gradient by the entropy.
    """

    bf16: bool = True
    adapters: Adapters | None = None
    bits: float | None = None
    optimizer_bytes: float = 8.0
    paged_optimizer: bool = False
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    mlp_tiles: int = 1
    embedding_offloading: bool = False
    int8_cache: bool = False
    entropy_bonus: bool = False

    @property
    def repeats_head(self) -> bool:
        """Whether the head's tiles are computed again for its backward pass: not where it is frozen."""
        return self.adapters is None or "lm_head" in self.adapters.whole or self.entropy_bonus

    @property
    def item(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.bf16 else 4

    @property
    def checkpoints(self) -> bool:
        """Whether only the inputs of layers are kept, on the device or off it."""
        return self.gradient_checkpointing or self.activation_offloading

    def trained(self, shape: ModelShape) -> int:
        """Number of trained parameters."""
        return shape.num_parameters if self.adapters is None else _adapter_sizes(self.adapters, shape)[0]

    def ranks(self, shape: ModelShape) -> int:
        """Sum of the ranks of the adapters in a layer."""
        return 0 if self.adapters is None else _adapter_sizes(self.adapters, shape)[1]


class Part(NamedTuple):
    """What one forward and backward pass holds: each prompt once, and its completions.

    Attributes:
        tokens: packed tokens, T.
        scored: tokens in the loss, N.
        pairs: query-key pairs of its attention.
        kept: prompt tokens whose keys and values an earlier pass has computed, P.
    """

    tokens: int
    scored: int
    pairs: int
    kept: int = 0

    @property
    def held(self) -> int:
        """Tokens whose activations are there at once, T + P."""
        return self.tokens + self.kept

    @classmethod
    def of(cls, prompt: int, completion: int, completions: int, groups: int = 1) -> Part:
        """Build the part of equal groups.

        Args:
            prompt: tokens of a prompt.
            completion: tokens of a completion.
            completions: completions of a group.
            groups: number of groups.
        """
        pairs = prompt * prompt // 2 + completions * completion * (prompt + completion // 2)
        return cls(groups * (prompt + completions * completion), groups * completions * completion, groups * pairs)


def keeps_prompt(prompt: int, pieces: int) -> bool:
    """Return whether the prompt of a group that is cut is computed once, in a pass of its own, and not in each piece.

    Args:
        prompt: tokens of the prompt.
        pieces: pieces of the group.
    """
    return (pieces - 1) * (prompt - 1) >= KEPT_PROMPT_TOKENS


def split_rows(
    prompt: int,
    completion: int,
    completions: int,
    group: int,
    budget: int,
    *,
    whole: bool = False,
    keep_prompts: bool = False,
) -> list[Part]:
    """Split a micro-batch of equal completions into parts, as `burnish.model.packing.split_by_tokens` does.

    Args:
        prompt: tokens of a prompt.
        completion: tokens of a completion.
        completions: completions of the micro-batch.
        group: completions of a prompt.
        budget: most tokens of a part (`token_budget`).
        whole: keep the completions of a prompt together.
        keep_prompts: compute the prompt of a group that is cut in a pass of its own, which is a part too.
    """

    def cut(size: int) -> list[int]:
        if whole or size < 2 or prompt + size * completion <= budget:
            return [size]
        return [*cut((size + 1) // 2), *cut(size // 2)]

    sizes = [group] * (completions // group) + [completions % group] * (completions % group > 0)
    alone: list[Part] = []
    pieces: list[Part] = []
    for size in sizes:
        found = [Part.of(prompt, completion, one) for one in cut(size)]
        if keep_prompts and keeps_prompt(prompt, len(found)):
            kept, pairs = prompt - 1, (prompt - 1) ** 2 // 2
            alone.append(Part(kept, 0, pairs))
            alone += [Part(one.tokens - kept, one.scored, one.pairs - pairs, kept) for one in found]
        else:
            pieces += found
    return alone + (_balanced(sorted(pieces, reverse=True), budget) if pieces else [])


def _balanced(pieces: list[Part], budget: int) -> list[Part]:
    if len(pieces) > 1 and pieces[-2].tokens + pieces[-1].tokens > budget:
        return pieces  # what the loop would find, more slowly
    count = max(1, -(-sum(piece.tokens for piece in pieces) // budget))
    while count < len(pieces):
        heap = [(0, number) for number in range(count)]
        lists: list[list[Part]] = [[] for _ in range(count)]
        for piece in pieces:
            load, number = heapq.heappop(heap)
            lists[number].append(piece)
            heapq.heappush(heap, (load + piece.tokens, number))
        if all(sum(piece.tokens for piece in one) <= budget or len(one) == 1 for one in lists):
            return [Part(*map(sum, zip(*one, strict=True))) for one in lists]
        count += 1
    return pieces


def weight_bytes(shape: ModelShape, method: Method) -> Bytes:
    """Count the weights that stay for the whole run: base, adapters, lower halves of masters, optimizer states."""
    linear = shape.linear_weights
    rest = shape.num_parameters - linear
    bits = 8 * method.item if method.bits is None else method.bits
    trained = method.trained(shape)
    found = {"weights": method.item * rest + round(linear * bits / 8)}
    if method.adapters is not None:
        found["adapters"] = method.item * trained
    if method.bf16:
        found["masters"] = 2 * trained
    found["optimizer"] = round(method.optimizer_bytes * trained)
    return found


def saved_bytes(shape: ModelShape, method: Method) -> int:
    """Bytes per token that a layer keeps for its backward pass without checkpointing.

    Norms and gated MLPs are recomputed (`burnish.model.recomputation`): 8 H + 4 K + 4 M + 2 times the ranks, for Q = H.
    A tiled MLP keeps nothing but its input, which its norm recomputes, and runs again part by part: without the 4 M.
    """
    queries, keys, hidden = shape.queries, shape.keys, shape.hidden
    # Inputs of the norms; queries, keys and values; the attention's output and its log normaliser.
    numbers = shape.norms * hidden + 2 * queries + 2 * keys + shape.qk_norm * (queries + keys) + method.ranks(shape)
    kept = 0 if is_tiled(shape, method) else _mlp_numbers(shape, method, recomputes=True)
    return method.item * (numbers + kept) + 4 * shape.heads


def is_tiled(shape: ModelShape, method: Method) -> bool:
    """Return whether MLPs run over parts of their tokens; only dense gated ones can."""
    return method.mlp_tiles > 1 and shape.gated and not shape.fused and not shape.experts


def layer_bytes(shape: ModelShape, method: Method) -> int:
    """Bytes per token of a layer that is recomputed under checkpointing, at the largest moment of its backward pass.

    All that it saves, 20 H + 4 K + 8 M (16 H with adapters) for Q = H, and two gradients in its MLP, 4 M.
    """
    trains_all = method.adapters is None
    numbers = (8 if trains_all else 6) * shape.hidden + 2 * shape.queries + 2 * shape.keys + method.ranks(shape)
    numbers += (shape.norms - 2) * 3 * shape.hidden + shape.qk_norm * 3 * (shape.queries + shape.keys)
    # Once the product's gradient has become those of gate and up, the product itself is gone.
    mlp = _mlp_numbers(shape, method, recomputes=False) + 2 * mlp_width(shape)
    if method.mlp_tiles > 1:
        # A part's, and the outputs of all, once in parts and once together.
        mlp = mlp // method.mlp_tiles + 2 * shape.hidden
    return method.item * (numbers + mlp)


def mlp_width(shape: ModelShape) -> int:
    """Features of the MLP that a token passes in the widest layer."""
    routed = shape.experts_per_token * shape.expert_width + shape.shared_width if shape.experts else 0
    return max(routed, shape.width if shape.dense_layers or not shape.experts else 0)


def adapted_experts(shape: ModelShape, method: Method) -> tuple[int, ...]:
    """Bytes of a layer's fused expert weights that have adapters: peft adds these to a copy at every forward."""
    if method.adapters is None or not shape.mixture_layers:
        return ()
    matched = method.adapters.matched(shape)
    return tuple(method.item * one.inputs * one.outputs * one.experts for one, _ in matched if one.experts > 1)


def _mlp_numbers(shape: ModelShape, method: Method, *, recomputes: bool) -> int:
    """Numbers per token that an MLP saves, of the mean layer."""
    # gate and up; with them the activation and the product, which the fused form of phi3 and experts keep.
    dense = shape.width * ((2 if recomputes and not shape.fused else 4) if shape.gated else 5)
    if not shape.mixture_layers:
        return dense
    # What enters a frozen expert weight is not kept; what leaves it is, for the gradient of its router's weight.
    trains = bool(adapted_experts(shape, method)) or method.adapters is None
    routed = shape.experts_per_token * ((1 + trains) * shape.hidden + (3 + trains) * shape.expert_width)
    routed += shape.shared_width * (2 if recomputes else 4)
    return (routed * shape.mixture_layers + dense * shape.dense_layers) // shape.layers


def checkpoint_bytes(shape: ModelShape, method: Method, tokens: int) -> int:
    """Bytes of the inputs of all layers: L H numbers per token."""
    return method.item * shape.layers * shape.hidden * tokens


def offloaded_bytes(shape: ModelShape, method: Method, tokens: int, *, on_cpu: bool) -> int:
    """Bytes that offloaded checkpoints take in the host's memory.

    The inputs of all layers and of the last norm, that in fp32 too, and its output before the weight.
    """
    numbers = shape.hidden * tokens
    sizes = [method.item * numbers] * (shape.layers + 2) + [4 * numbers] * method.bf16
    return sum(size if on_cpu else pinned_bytes(size) for size in sizes)


def pinned_bytes(size: int) -> int:
    """Bytes that torch takes for a tensor in pinned memory: it rounds up to a power of two."""
    return 1 << max(size - 1, 0).bit_length() if size else 0


def forward_bytes(shape: ModelShape, method: Method, part: Part, *, on_cpu: bool, with_head: bool = True) -> Bytes:
    """Count a forward pass without gradients at its largest moment: in a layer, or with a tile of the head.

    Behind a kept prompt, the prompt's own pass counts too; its keys and values stay until the last piece is done.
    """
    numbers, item = part.tokens * method.item, method.item
    moments = _layer_moments(shape, method, part)
    if with_head:
        head = tile_bytes(shape, part.scored, on_cpu=on_cpu, item=item) + part.scored * (item * shape.hidden + 16)
        moments.append({"activations": 2 * numbers * shape.hidden, "head": head})
    if part.kept:
        moments += _layer_moments(shape, method, Part(part.kept, 0, 0))
        moments = [found | {"kept prompt": 2 * item * shape.keys * shape.layers * part.kept} for found in moments]
    return max(moments, key=lambda found: sum(found.values()))


def _layer_moments(shape: ModelShape, method: Method, part: Part) -> list[Bytes]:
    numbers = part.tokens * method.item
    moments: list[Bytes] = [
        {"activations": numbers * (4 * shape.hidden + beside), "dequantised": unpacked, "experts": experts}
        for beside, unpacked, experts in _forward_moments(shape, method)
    ]
    if part.kept:
        # Queries, output, keys and values, and the latter two once more behind those of the prompt.
        own = numbers * (3 * shape.hidden + 2 * shape.queries + 2 * shape.keys)
        moments.append({"activations": own + 2 * method.item * shape.keys * part.held})
    return moments


def _forward_moments(shape: ModelShape, method: Method) -> list[tuple[int, int, int]]:
    """List numbers per token beside 4 H (embedding, input, residual, norm), an unpacked weight, and experts' copies."""
    hidden, tiles = shape.hidden, method.mlp_tiles
    finished = hidden * (tiles - 1) // tiles  # outputs of the tiles before
    gate = shape.width if shape.dense_layers or not shape.experts else 0
    # Activation and product, and with adapters theirs, once the weight that was unpacked for the base is gone.
    dense = gate * ((4 if shape.fused else 3) + (2 if shape.fused else 1) * _adapts_mlp(shape, method))
    # A token's experts: its copies, gate, up, activation and product; or outputs, weighted and put in order.
    routed = shape.experts_per_token * max(4 * hidden, hidden + 4 * shape.expert_width)
    largest = dequantised_bytes(shape, method)
    # The output projection beside queries, keys and values, and norms, which compute in fp32.
    attention = 2 * shape.queries + 2 * shape.keys + 2 * hidden * (method.adapters is not None)
    return [
        (finished + dense // tiles, 0, 0),
        (finished + 2 * gate // tiles, largest, 0),
        (routed if shape.mixture_layers else 0, 0, sum(adapted_experts(shape, method))),
        (max(attention, (3 if method.bf16 else 1) * hidden), 0, 0),
    ]


def _adapts_mlp(shape: ModelShape, method: Method) -> bool:
    if method.adapters is None or shape.mixture_layers:
        return False
    return any(one.outputs in (shape.width, 2 * shape.width) for one, _ in method.adapters.matched(shape))


def dequantised_bytes(shape: ModelShape, method: Method, spare: int = 0) -> int:
    """Bytes of the largest linear layer as the matrix product gets it, beyond `spare` bytes that are free meanwhile."""
    if method.bits is None:
        return 0
    largest = max((one.inputs * one.outputs for one in shape.linears), default=0)
    return max(method.item * largest - spare, 0)


def cache_tokens(prompt: int, completion: int, group: int, completions: int, *, bound: int | None = None) -> int:
    """Tokens that the native engine's cache has room for at its fullest.

    Args:
        prompt: tokens of a prompt.
        completion: most tokens of a completion.
        group: completions of a prompt.
        completions: completions of a rollout on a rank; at most 64 run at a time.
        bound: most tokens (`rollout_cache_gib`), under which fewer run; None for no bound.
    """
    rows = min(completions, MOST_ROWS)
    prompts = -(-rows // group)
    copied = prompt if bound is None and prompt <= COPIED_PROMPT_TOKENS else 0
    found = rows * round_up(completion + copied) + prompts * round_up(prompt)
    return found if bound is None else min(found, bound)


def bounded_tokens(gib: float, per_token: int, *, prompt: int, completion: int) -> int:
    """Return how many tokens a cache of so many GiB holds.

    Args:
        gib: `rollout_cache_gib`.
        per_token: bytes of a token's keys and values.
        prompt: tokens of the longest prompt.
        completion: most tokens of a completion.

    Raises:
        ConfigError: a single completion does not fit.
    """
    tokens, least = int(gib * 2**30) // per_token, round_up(prompt) + round_up(completion)
    if tokens < least:
        raise ConfigError(
            f"rollout_cache_gib = {gib}: one completion of max_completion_length = {completion} after a prompt of "
            # A little more than it takes, so that the number as it is written is enough.
            f"{prompt} tokens takes {1.001 * least * per_token / 2**30:.4g} GiB; raise it to that at least."
        )
    return tokens


def round_up(tokens: int) -> int:
    """Round a length of the cache up to the next multiple that the native engine reserves."""
    return -(-tokens // _CACHE_STEP) * _CACHE_STEP


def cache_bytes(shape: ModelShape, method: Method) -> int:
    """Bytes of the keys and values of a token: 2 K L numbers; in 8 bits with a scale of 2 bytes per head."""
    size = shape.keys + 2 * shape.kv_heads if method.int8_cache else method.item * shape.keys
    return 2 * size * shape.layers
