"""Bytes of an update at the moments at which it may take most, by formulas.

L layers, H hidden, Q query features, K key features, M width of the MLP, V vocabulary, T tokens of a part, N scored
tokens. docs/planning.md has the formulas as a table, with what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from burnish.planner.logit_tiles import tile_bytes, tile_columns, tile_rows
from burnish.planner.memory import (
    Bytes,
    Method,
    Part,
    adapted_experts,
    checkpoint_bytes,
    dequantised_bytes,
    is_tiled,
    layer_bytes,
    mlp_width,
    saved_bytes,
)
from burnish.planner.shapes import ModelShape

__all__ = ["Update"]

MASTER_BLOCK = 2**24
"""Weights whose gradients are one block, which is widened to fp32 at once (`burnish.model.masters`)."""


@dataclass(frozen=True)
class Update:
    """The last backward pass of an optimizer step, with the gradients of those before.

    Components: gradients, activations (what the forward pass keeps), layer (working set of one layer), head (a tile,
    scored rows and their gradient), head gradient (of the embedding or head, until it is accumulated), experts (copies
    with their adapters added), dequantised (one layer of 4-bit weights) and kept prompt (what its forward pass
    keeps, and its keys and values with their gradients).

    Attributes:
        shape: dimensions of the model.
        method: how it trains.
        part: the largest part.
        num_parts: forward and backward passes of an optimizer step on a rank; from the second on, gradients accumulate
            in fp32.
        on_cpu: whether the device is the CPU, which has smaller tiles.
        with_head: whether the loss reads log-probabilities; false for reward models and critics.
        averages: whether several ranks average the gradients, which masters do in fp32.
    """

    shape: ModelShape
    method: Method
    part: Part
    num_parts: int
    on_cpu: bool
    with_head: bool = True
    averages: bool = False

    def moments(self) -> dict[str, Bytes]:
        """Return moments -> components -> bytes."""
        found = self._moments()
        if kept := self.part.kept:
            prompt = replace(self, part=Part(kept, 0, 0), with_head=False)
            numbers = 2 * self.shape.keys * self.shape.layers * kept
            # Without checkpoints, the layers keep them anyway.
            values = self.method.item * numbers * self.method.checkpoints
            for moment in found.values():
                moment["kept prompt"] = prompt.pending + values + 4 * numbers
                # Its graph has copies of its own, but for the last layer, whose MLP no key or value needs.
                layers = max(self.shape.mixture_layers, 1)
                moment["experts"] = moment.get("experts", 0) + prompt.copies // layers * (layers - 1)
            for name, moment in prompt._moments().items():
                found[f"prompt's {name}"] = moment | {"kept prompt": values + self.method.item * numbers}
        return found

    def _moments(self) -> dict[str, Bytes]:
        found = {"layer": self.last_layer(), "first layer": self.first_layer(), "embedding": self.embedding()}
        method = self.method
        if method.checkpoints and method.bf16 and self.shape.gated:
            found["norm"] = self.norm()
        if self.averages and method.bf16:
            found["average"] = self.average()
        if self.with_head:
            found |= {"head": self.head(), "head's backward": self.head_backward()}
        return found

    def head(self) -> Bytes:
        """The head's forward pass: activations, a tile with a buffer for the entropy, rows and six statistics.

        A frozen head's computes the rows' gradient, and adds it up in fp32.
        """
        shape, scored, item = self.shape, self.part.scored, self.method.item
        pulls = not self.method.repeats_head
        scratches = 1 + int(pulls and shape.softcap)
        tile = tile_bytes(shape, scored, on_cpu=self.on_cpu, item=item, scratches=scratches)
        rows = scored * ((1 + pulls) * item * shape.hidden + 24)
        block = tile_rows(scored, on_cpu=self.on_cpu, item=item, scratches=scratches)
        return {**self._after_forward(), "head": tile + rows + pulls * block * (4 + item) * shape.hidden}

    def head_backward(self) -> Bytes:
        """The head's backward pass: the gradient of the rows adds up in fp32, and goes on in the compute dtype.

        Beside that of the whole table stands its slice of a tile, which over several tiles of rows adds up in fp32.
        """
        shape, scored, item = self.shape, self.part.scored, self.method.item
        if not self.method.repeats_head:
            return {**self._after_forward(), "head": scored * (2 * item * shape.hidden + 24)}
        scratches = int(shape.softcap)
        tile = tile_bytes(shape, scored, on_cpu=self.on_cpu, item=item, scratches=scratches)
        rows = scored * ((2 * item + 4) * shape.hidden + 24)
        adds = tile_rows(scored, on_cpu=self.on_cpu, item=item, scratches=scratches) < scored
        columns = tile_columns(shape, scored, on_cpu=self.on_cpu, item=item, scratches=scratches)
        part = (item + adds * (4 + item * self.method.bf16)) * columns * shape.hidden if self.table else 0
        return {**self._after_forward(), "head": tile + rows + part, "head gradient": self.table}

    def last_layer(self) -> Bytes:
        """The backward pass of the layer that comes first in it, where all activations are still there."""
        trained = self.method.trained(self.shape)
        # The second pass widens the gradients of the first, block by block.
        widened = 4 * min(trained, MASTER_BLOCK) if self.num_parts == 2 and self.method.bf16 else 0
        found = self._after_forward() | self._layer()
        found["gradients"] += widened
        found["activations"] -= self.passed
        found["experts"] += self.copies
        return found

    def norm(self) -> Bytes:
        """The backward pass of a recomputed layer's second RMS norm, in bf16: T (28 H + 4 H + 4 Q + 4 K).

        Norms compute in fp32, in seven tensors, one of them the first norm's input; those of queries and keys keep
        theirs, T (4 Q + 4 K).
        """
        shape, item = self.shape, self.method.item
        numbers = 2 * shape.hidden + 2 * shape.queries + 2 * shape.keys
        wide = 28 * shape.hidden + 4 * (shape.queries + shape.keys) * shape.qk_norm
        return {
            "gradients": self.earlier,
            "activations": self.kept,
            "layer": (wide + item * numbers) * self.part.tokens + self.joined,
            "head gradient": self.waiting,
        }

    def first_layer(self) -> Bytes:
        """The backward pass of the layer that comes last in it, where all gradients but the embedding's are there."""
        item, table = self.method.item, self.table
        # The embedding's is not there yet, or not widened.
        missing = {1: table, 2: (self.wide - item) * table // item}.get(self.num_parts, 0)
        found = self._layer() | {
            "gradients": self.wide * self.method.trained(self.shape) - missing,
            "activations": self.kept // self.shape.layers,
        }
        found["experts"] += self.copies // max(self.shape.mixture_layers, 1)
        return found

    def embedding(self) -> Bytes:
        """The embedding's backward pass; the second widens the first's gradient of the whole table beside its own."""
        return {
            "gradients": self.wide * self.method.trained(self.shape),
            "activations": 2 * self.method.item * self.shape.hidden * self.part.tokens,
            "head gradient": self.table + (self.table if self.num_parts > 1 else 0),
        }

    def average(self) -> Bytes:
        """The average over ranks, which widens one block of gradients after another."""
        trained = self.method.trained(self.shape)
        table = 0 if self.method.adapters is not None else self.shape.vocabulary * self.shape.hidden
        block = max(table, min(trained, MASTER_BLOCK))
        return {"gradients": max(4 * trained, self.method.item * trained + 4 * block)}

    @property
    def wide(self) -> int:
        """Bytes of a number of the whole gradient."""
        return 4 if self.num_parts > 1 or not self.method.bf16 else self.method.item

    @property
    def earlier(self) -> int:
        """Bytes of the gradients of earlier passes."""
        trained = self.method.trained(self.shape)
        return {1: 0, 2: self.method.item * trained}.get(self.num_parts, 4 * trained)

    @property
    def kept(self) -> int:
        """Bytes on the device that the forward pass keeps."""
        shape, method, tokens = self.shape, self.method, self.part.tokens
        if not method.checkpoints:
            return shape.layers * saved_bytes(shape, method) * tokens
        kept = checkpoint_bytes(shape, method, tokens)
        # Of offloaded inputs two are on the device: one in use, one on its way.
        return min(kept, 2 * method.item * shape.hidden * tokens) if method.activation_offloading else kept

    @property
    def pending(self) -> int:
        """Bytes that a prompt's own graph keeps on the device: of its last layer only what keys and values need."""
        shape, method = self.shape, self.method
        if method.checkpoints:
            return 0 if method.activation_offloading else self.kept
        needed = method.item * (shape.hidden + (2 + shape.qk_norm) * shape.keys)
        return self.kept - (saved_bytes(shape, method) - needed) * self.part.tokens

    @property
    def passed(self) -> int:
        """Bytes of the inputs of norms behind the last MLP: the final one, and with four a layer, its last."""
        if self.method.checkpoints:
            return 0
        return (1 + (self.shape.norms > 2)) * self.method.item * self.shape.hidden * self.part.tokens

    @property
    def table(self) -> int:
        """Bytes of the gradient of an embedding or head that trains."""
        return self.method.item * self.shape.vocabulary * self.shape.hidden if self.method.adapters is None else 0

    @property
    def waiting(self) -> int:
        """Bytes of the gradient of a tied head, which waits for the embedding's."""
        return self.table if self.with_head and self.shape.tied else 0

    @property
    def copies(self) -> int:
        """Bytes of the experts' copies of all layers, each of which keeps its own without checkpointing."""
        if self.method.checkpoints:
            return 0
        return sum(adapted_experts(self.shape, self.method)) * self.shape.mixture_layers

    @property
    def joined(self) -> int:
        """Bytes of the kept keys and values before those of a recomputed layer's own."""
        return 2 * self.method.item * self.shape.keys * self.part.kept * self.method.checkpoints

    def _after_forward(self) -> Bytes:
        final = 2 * self.method.item * self.shape.hidden * self.part.tokens
        return {"gradients": self.earlier, "activations": self.kept + final, "experts": self.copies}

    def _layer(self) -> Bytes:
        """Components of a layer's backward pass."""
        shape, method, tokens = self.shape, self.method, self.part.tokens
        if method.checkpoints:
            layer = layer_bytes(shape, method)
        elif is_tiled(shape, method):
            # All that a part of the MLP saves when it runs again, two gradients in it, and those of all parts' inputs.
            layer = method.item * (6 * mlp_width(shape) // method.mlp_tiles + 4 * shape.hidden)
        else:
            layer = method.item * (4 * mlp_width(shape) + 2 * shape.hidden)
        adapted = adapted_experts(shape, method)
        # Each expert weight has a gradient in turn; the second's copy is gone by the first's. A layer that is
        # recomputed makes its copies again.
        least, most = min(adapted, default=0), max(adapted, default=0)
        working = max(least, most - least) + (sum(adapted) if method.checkpoints else 0)
        # While a weight of the MLP is unpacked, one of its gradients is not there yet.
        spare = method.item * mlp_width(shape) * tokens // method.mlp_tiles
        return {
            "layer": layer * tokens + self.joined,
            "head gradient": self.waiting,
            "experts": working,
            "dequantised": dequantised_bytes(shape, method, spare),
        }
