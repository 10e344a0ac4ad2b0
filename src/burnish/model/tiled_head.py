"""Tiled language-model head: log-probability and entropy of scored tokens without [N, V] logits.

The forward pass saves two values per token (log Z and, on request, the entropy); the backward pass recomputes each tile
of logits and turns it into its gradient in place. The vocabulary is its outer loop, so the gradient of a weight slice
is complete after one iteration and no fp32 copy of the whole [V, H] gradient is needed.

Where the head is frozen, as beside adapters, the forward pass computes the gradient of each log-probability by its
hidden state instead, in the manner of flash attention: whatever the loss, the backward pass multiplies it by one number
per token, and no tile is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.errors import ConfigError
from burnish.model.huge_pages import on_huge_pages
from burnish.model.traced import device_type, has_values

__all__ = ["HeadOutput", "HeadSpec", "tiled_logprobs"]

_TILE_BYTES = {"cpu": 16 * 2**20}  # a tile that stays in the last-level cache makes the elementwise passes nearly free
_TILE_BYTES_ACCELERATOR, _MIN_COLUMNS = 256 * 2**20, 256
_SCALED_ROWS = 1024


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Logit scaling of a model: logits = softcap tanh(scale x / softcap), or scale x without a softcap.

    Args:
        scale: factor on the head's output.
        softcap: bound on the logits; None for none.
    """

    scale: float = 1.0
    softcap: float | None = None


class HeadOutput(NamedTuple):
    """Outputs of the head for N tokens.

    Attributes:
        logprobs: [N] log-probability of the target in nats, fp32 or float64; differentiable.
        entropy: [N] entropy of the distribution in nats, or None where not requested; differentiable.
        correct: [N] mask, True where no token is likelier than the target.
        log_collision: [N] log-probability that two draws agree, or None where not requested; no gradient.
    """

    logprobs: Tensor
    entropy: Tensor | None
    correct: Tensor
    log_collision: Tensor | None


class _Operands(NamedTuple):
    """[N, V] logits = hidden weight^T + bias + u b^T, with hidden [N, H], weight [V, H], u [N, R], b [V, R]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    u: Tensor | None
    b: Tensor | None

    def take_rows(self, index: Tensor) -> _Operands:
        """Select tokens."""
        return self._replace(hidden=self.hidden[index], u=None if self.u is None else self.u[index])


@dataclass(frozen=True, slots=True)
class _Options:
    """Hyperparameters of one call."""

    spec: HeadSpec
    temperature: float
    with_entropy: bool
    entropy_gradient: bool
    with_collision: bool
    tile_bytes: int

    @property
    def slope(self) -> float:
        """Derivative of a scaled logit by the head's output, without the tanh."""
        return self.spec.scale / self.temperature


def _split(size: int, limit: int, multiple: int = 1) -> list[slice]:
    """Cut `size` into nearly equal slices of at most `limit` (rounded up to `multiple` where that fits)."""
    if size == 0:
        return []
    step = math.ceil(size / math.ceil(size / limit))
    step = min(math.ceil(step / multiple) * multiple, max(limit, 1))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class _Tiles:
    """Logit tiles of one call, all computed in the same buffers."""

    def __init__(self, operands: _Operands, options: _Options, num_scratch: int) -> None:
        self.operands, self.options = operands, options
        hidden_NH, weight_VH = operands.hidden, operands.weight
        self.dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        num_rows, num_columns = hidden_NH.shape[0], weight_VH.shape[0]
        needs_raw = hidden_NH.dtype != self.dtype
        element_bytes = self.dtype.itemsize * (1 + num_scratch) + hidden_NH.dtype.itemsize * needs_raw
        element_bytes += 0 if operands.u is None else operands.u.dtype.itemsize
        budget = max(1, options.tile_bytes // element_bytes)
        # A square tile reads the operands least often; a slice of the weight's gradient must fit the budget as well.
        row_limit = min(max(num_rows, 1), max(4, math.isqrt(budget)))
        column_limit = min(budget // row_limit, options.tile_bytes // (4 * hidden_NH.shape[1]))
        self.rows = _split(num_rows, row_limit)
        self.columns = _split(num_columns, max(column_limit, min(_MIN_COLUMNS, budget // row_limit), 1), 64)
        size = max((s.stop - s.start for s in self.rows), default=0) * (self.columns[0].stop - self.columns[0].start)
        self._z = hidden_NH.new_empty(size, dtype=self.dtype)
        self._raw = hidden_NH.new_empty(size) if needs_raw else None
        self._scratch = [torch.empty_like(self._z) for _ in range(num_scratch)]

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """Compute [rows, columns] scaled, capped logits over the temperature; overwritten by the next call."""
        hidden_NH, weight_VH, bias_V, u_NR, b_VR = self.operands
        hidden, weight = hidden_NH[rows], weight_VH[columns].to(hidden_NH.dtype)
        shape = (hidden.shape[0], weight.shape[0])
        z = self._z[: shape[0] * shape[1]].view(shape)
        if self._raw is None:
            torch.mm(hidden, weight.t(), out=z)
        else:
            z.copy_(torch.mm(hidden, weight.t(), out=self._raw[: z.numel()].view(shape)))
        if bias_V is not None:
            z.add_(bias_V[columns])
        if u_NR is not None and b_VR is not None:
            z.add_(torch.mm(u_NR[rows], b_VR[columns].t()))
        softcap, slope = self.options.spec.softcap, self.options.slope
        if softcap is not None:
            return z.mul_(self.options.spec.scale / softcap).tanh_().mul_(softcap / self.options.temperature)
        return z if slope == 1.0 else z.mul_(slope)

    def scratch(self, index: int, like: Tensor) -> Tensor:
        """Return a buffer shaped like the tile."""
        return self._scratch[index][: like.numel()].view(like.shape)

    def curvature(self, z: Tensor) -> Tensor | None:
        """Return dz/dx over the slope, 1 - tanh^2, of logits z; None without a softcap."""
        if (softcap := self.options.spec.softcap) is None:
            return None
        out = self.scratch(0, z) if z.dim() == 2 else None
        return torch.mul(z, self.options.temperature / softcap, out=out).square_().neg_().add_(1)

    def narrow(self, dz: Tensor) -> Tensor:
        """Cast the tile to the dtype of the matrix products, overwriting the raw logits."""
        return dz if self._raw is None else self._raw[: dz.numel()].view(dz.shape).copy_(dz)


def _locate(target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the [n, 1] column of each target, clamped into the tile, and an [n] mask of targets in it."""
    inside = (target >= columns.start) & (target < columns.stop)
    return (target - columns.start).clamp(0, columns.stop - columns.start - 1)[:, None], inside


def _statistics(
    operands: _Operands, target_N: Tensor, options: _Options, pull_NH: Tensor | None = None
) -> tuple[HeadOutput, Tensor]:
    """Compute the outputs and log Z of each row; fill `pull_NH` with the log-probability's gradient by the row."""
    curved = pull_NH is not None and options.spec.softcap is not None
    tiles = _Tiles(operands, options, num_scratch=int(options.with_entropy) + int(curved))
    blocks = [
        _score_rows(tiles, rows, target_N[rows], None if pull_NH is None else pull_NH[rows])
        for rows in tiles.rows or [slice(0, 0)]  # without a row, the outputs still have their dtypes
    ]
    joined = [None if parts[0] is None else torch.cat(parts) for parts in zip(*blocks, strict=True)]
    *output, log_z_N = cast("list[Any]", joined)
    return HeadOutput(*output), log_z_N


def _score_rows(
    tiles: _Tiles, rows: slice, target_n: Tensor, pull_nH: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """Compute the outputs and log Z of a block of rows by a streaming log-sum-exp over the vocabulary."""
    options, hidden_nH, weight_VH = tiles.options, tiles.operands.hidden[rows], tiles.operands.weight
    max_n = target_n.new_full(target_n.shape, torch.finfo(tiles.dtype).min, dtype=tiles.dtype)
    sum_n, dot_n, square_n = (torch.zeros_like(max_n) for _ in range(3))
    picked_n = torch.full_like(max_n, torch.nan)  # stays NaN for a target outside the vocabulary
    others_nH = None if pull_nH is None else torch.zeros_like(hidden_nH, dtype=tiles.dtype)
    for columns in tiles.columns:
        z = tiles.logits(rows, columns)
        column, inside = _locate(target_n, columns)
        picked_n = torch.where(inside, z.gather(1, column)[:, 0], picked_n)
        old_max, max_n = max_n, torch.maximum(max_n, z.amax(1))
        decay = torch.exp(old_max - max_n)
        curvature = None if pull_nH is None else tiles.curvature(z)
        z.sub_(max_n[:, None])
        if options.with_entropy:
            weight = torch.exp(z, out=tiles.scratch(-1, z))
            dot_n = decay * (dot_n + (old_max - max_n) * sum_n) + z.mul_(weight).sum(1)
        else:
            weight = z.exp_()
        sum_n = decay * sum_n + weight.sum(1)
        if options.with_collision:
            square_n = decay.square() * square_n + torch.linalg.vector_norm(weight, dim=1).square()
        if others_nH is not None:
            weight.scatter_(1, column, weight.gather(1, column).masked_fill(inside[:, None], 0))
            weight = tiles.narrow(weight if curvature is None else weight.mul_(curvature))
            others_nH.mul_(decay[:, None]).add_(weight @ weight_VH[columns].to(weight.dtype))
    log_sum_n = sum_n.log()
    logprob_n = picked_n - max_n - log_sum_n
    if pull_nH is not None and others_nH is not None:
        # 1 - p cancels for a likely target: its own term stays apart from the others', and is computed by expm1.
        curvature = tiles.curvature(picked_n)
        own_n = -torch.expm1(logprob_n) * (1.0 if curvature is None else curvature)
        own_nH = weight_VH[target_n.clamp(0, len(weight_VH) - 1)]  # an invalid target has a factor that is NaN
        others_nH.div_(-sum_n[:, None]).addcmul_(own_n[:, None], own_nH)
        pull_nH.copy_(others_nH.mul_(options.slope))
    entropy_n = log_sum_n - dot_n / sum_n if options.with_entropy else None
    collision_n = square_n.log() - 2 * log_sum_n if options.with_collision else None
    return logprob_n, entropy_n, picked_n == max_n, collision_n, max_n + log_sum_n


class _RowGradients(NamedTuple):
    """Row statistics of the backward pass, as [n, 1] columns; without an entropy gradient, no entropy."""

    log_z: Tensor
    logprob_grad: Tensor
    entropy: Tensor | None = None
    entropy_grad: Tensor | None = None

    def at(self, rows: slice) -> _RowGradients:
        """Select rows."""
        return _RowGradients(*(column[rows] for column in self if column is not None))


def _differentiate(tiles: _Tiles, z: Tensor, row: _RowGradients, column: Tensor, inside: Tensor) -> Tensor:
    """Turn a tile of logits into the gradient by the head's output, in place.

    dz_j = g (1[j = y] - p_j) - g_E p_j (log p_j + E), times 1 - tanh^2 under a softcap; `row` holds -g and -g_E times
    the constant slope. The target's entry uses expm1, since p - 1 cancels for a likely token.
    """
    curvature = tiles.curvature(z)
    logprob = z.sub_(row.log_z)
    target_logprob = logprob.gather(1, column)
    hit = row.logprob_grad * torch.expm1(target_logprob)
    if row.entropy is not None and row.entropy_grad is not None:
        hit += row.entropy_grad * target_logprob.exp() * (target_logprob + row.entropy)
        factor = torch.add(logprob, row.entropy, out=tiles.scratch(-1, z)).mul_(row.entropy_grad).add_(row.logprob_grad)
        dz = logprob.exp_().mul_(factor)
    else:
        dz = logprob.exp_().mul_(row.logprob_grad)
    dz.scatter_(1, column, torch.where(inside[:, None], hit, dz.gather(1, column)))
    return dz if curvature is None else dz.mul_(curvature)


class _Gradients(NamedTuple):
    """Gradients by hidden, weight, bias, u and b; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    u: Tensor | None
    b: Tensor | None


def _accumulate(total: Tensor | None, part: Tensor, wide: torch.dtype) -> Tensor:
    """Add a part, in the wide dtype from the second part on."""
    return part if total is None else total.to(wide).add_(part)


def _makers(tiles: _Tiles) -> Sequence[Callable[[Tensor], Tensor]]:
    """Return what makes each gradient: sums over the vocabulary in the statistics' dtype, the others in their own."""

    def summed(operand: Tensor) -> Tensor:
        return torch.zeros_like(operand, dtype=tiles.dtype)

    def sliced(operand: Tensor) -> Tensor:
        # Without a row, no slice is ever written.
        return on_huge_pages(torch.empty_like(operand)) if tiles.rows else torch.zeros_like(operand)

    return summed, sliced, sliced, summed, sliced


def _gradients(
    operands: _Operands, target_N: Tensor, row: _RowGradients, options: _Options, needs: Sequence[bool]
) -> _Gradients:
    """Compute the needed gradients, completing each slice of the vocabulary before the next."""
    tiles = _Tiles(operands, options, (options.spec.softcap is not None) + (row.entropy_grad is not None))
    out = _Gradients(
        *(
            None if operand is None or not need else make(operand)
            for operand, need, make in zip(operands, needs, _makers(tiles), strict=True)
        )
    )
    hidden_NH, weight_VH, _, u_NR, b_VR = operands
    for columns in tiles.columns:
        d_weight = d_bias = d_b = None
        for rows in tiles.rows:
            z = tiles.logits(rows, columns)
            dz = _differentiate(tiles, z, row.at(rows), *_locate(target_N[rows], columns))
            if out.bias is not None:
                d_bias = _accumulate(d_bias, dz.sum(0), tiles.dtype)
            if u_NR is not None and b_VR is not None:
                dz_low = dz.to(u_NR.dtype)
                if out.u is not None:
                    out.u[rows] += dz_low @ b_VR[columns]
                if out.b is not None:
                    d_b = _accumulate(d_b, dz_low.t() @ u_NR[rows], tiles.dtype)
            dz = tiles.narrow(dz)
            if out.hidden is not None:
                out.hidden[rows] += dz @ weight_VH[columns].to(dz.dtype)
            if out.weight is not None:
                d_weight = _accumulate(d_weight, dz.t() @ hidden_NH[rows], tiles.dtype)
        for total, part in ((out.weight, d_weight), (out.bias, d_bias), (out.b, d_b)):
            if total is not None and part is not None:
                total[columns] = part.to(total.dtype)
    return out


class _TiledLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: _Options, target_N: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = _Operands(*tensors)  # type: ignore[arg-type]
        with torch.autocast(operands.hidden.device.type, enabled=False):
            output, log_z_N = _statistics(operands, target_N, options)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(target_N, log_z_N, output.entropy, *operands)
        first = 2 if options.entropy_gradient else 1
        ctx.mark_non_differentiable(*(tensor for tensor in output[first:] if tensor is not None))
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        target_N, log_z_N, entropy_N, *tensors = ctx.saved_tensors
        operands, options = _Operands(*tensors), cast("_Options", ctx.options)
        logprob_grad, entropy_grad = grad_outputs[:2]
        logprob_grad = torch.zeros_like(log_z_N) if logprob_grad is None else logprob_grad
        columns = [log_z_N, logprob_grad * -options.slope]
        if entropy_grad is not None:
            columns += [entropy_N, entropy_grad * -options.slope]
        partial, keep = False, target_N
        if has_values(target_N):
            keep = torch.stack(columns[1::2]).ne(0).any(0).nonzero()[:, 0]  # skips clipped and masked tokens
            partial = keep.numel() < target_N.numel()
        if partial:
            columns, target_N = [column[keep] for column in columns], target_N[keep]
        row = _RowGradients(*(column[:, None] for column in columns))
        kept = operands.take_rows(keep) if partial else operands
        out = _gradients(kept, target_N, row, options, ctx.needs_input_grad[2:])

        def spread(grad: Tensor | None, operand: Tensor | None) -> Tensor | None:
            if grad is None or operand is None:
                return None
            grad = grad.to(operand.dtype)
            return torch.zeros_like(operand).index_copy_(0, keep, grad) if partial else grad

        return None, None, spread(out.hidden, operands.hidden), out.weight, out.bias, spread(out.u, operands.u), out.b


class _FrozenHeadLogprobs(torch.autograd.Function):
    """Log-probabilities whose only gradient is by the hidden states, and whose entropy has none."""

    @staticmethod
    def forward(ctx: Any, options: _Options, target_N: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = _Operands(*tensors)  # type: ignore[arg-type]
        pull_NH = torch.empty_like(operands.hidden)
        with torch.autocast(pull_NH.device.type, enabled=False):
            output, _ = _statistics(operands, target_N, options, pull_NH)
        ctx.save_for_backward(pull_NH)
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale each row; a block at a time, whose product is wide before it is rounded."""
        (pull_NH,), grad_N1 = ctx.saved_tensors, cast(Tensor, grad_outputs[0])[:, None]
        grad_NH = torch.empty_like(pull_NH)
        for rows in _split(len(pull_NH), _SCALED_ROWS):
            grad_NH[rows] = pull_NH[rows] * grad_N1[rows]
        return None, None, grad_NH, *[None] * (len(_Operands._fields) - 1)


def tiled_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    spec: HeadSpec = HeadSpec(),
    with_entropy: bool = False,
    entropy_gradient: bool = True,
    with_collision: bool = False,
    tile_bytes: int | None = None,
) -> HeadOutput:
    """Compute log-probability and entropy of tokens under a softmax head, without [N, V] logits.

    z = c tanh(s (h W^T + bias + u b^T) / c) / T;  log p_y = z_y - log sum_j exp z_j;  E = -sum_j p_j log p_j;
    log collision = log sum_j p_j^2 = log sum_j exp 2 z_j - 2 log sum_j exp z_j (WPO, 2406.11827).

    Matrix products run in the dtype of `hidden_NH`, softmax statistics in fp32 (float64 for float64). Gradients are
    allocated only for operands that require one; rows whose incoming gradient is exactly zero are skipped. Where
    `hidden_NH` alone requires one, the forward pass computes it, d log p_y / dh = sum_j (1[j = y] - p_j) dz_j/dh, up to
    the factor that the loss gives each row; an entropy with a gradient prevents that. Not twice differentiable.

    Args:
        hidden_NH: [N, H] input of the head.
        weight_VH: [V, H] the head's weight; a tied embedding is fine.
        target_N: [N] tokens in [0, V); on an accelerator, an invalid target gives NaN.
        bias_V: [V] added to the head's output.
        low_rank: ([N, R], [V, R]) factors u and b of an added product u b^T, of one dtype: LoRA on the head.
        temperature: T, positive.
        spec: the architecture's scale s and softcap c.
        with_entropy: also return the entropy.
        entropy_gradient: False returns an entropy without a gradient.
        with_collision: also return the log collision probability.
        tile_bytes: bound on the buffers of one tile; None for 16 MiB on CPU and 256 MiB elsewhere.

    Returns:
        `HeadOutput`; a target tied with the largest logit counts as correct.

    Raises:
        ConfigError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature!r}: log-probabilities need a positive temperature; use 1.0.")
    operands = _Operands(hidden_NH, weight_VH, bias_V, *(low_rank or (None, None)))
    _check_shapes(operands, target_N)
    if tile_bytes is None:
        tile_bytes = _TILE_BYTES.get(device_type(hidden_NH), _TILE_BYTES_ACCELERATOR)
    options = _Options(spec, temperature, with_entropy, entropy_gradient, with_collision, tile_bytes)
    trains_head = any(tensor is not None and tensor.requires_grad for tensor in operands[1:])
    needs_pull = torch.is_grad_enabled() and hidden_NH.requires_grad
    outputs: Any
    if needs_pull and not trains_head and not (with_entropy and entropy_gradient):
        outputs = _FrozenHeadLogprobs.apply(options, target_N, *operands)
    else:
        outputs = _TiledLogprobs.apply(options, target_N, *operands)
    return HeadOutput(*outputs)


def _check_shapes(operands: _Operands, target_N: Tensor) -> None:
    hidden_NH, weight_VH, bias_V, u_NR, b_VR = operands
    num_tokens, num_vocab = hidden_NH.shape[0], weight_VH.shape[0]
    assert hidden_NH.shape[1] == weight_VH.shape[1]
    assert target_N.shape == (num_tokens,)
    assert bias_V is None or bias_V.shape == (num_vocab,)
    assert u_NR is None or b_VR is None or (u_NR.shape[0], b_VR.shape[0]) == (num_tokens, num_vocab)
    if num_tokens > 0 and has_values(target_N):
        assert bool(((target_N >= 0) & (target_N < num_vocab)).all()), "target outside the vocabulary"
