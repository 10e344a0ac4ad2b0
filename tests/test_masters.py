"""Master weights: bf16 parameters, fp32 truth."""

from __future__ import annotations

import pytest
import torch

from burnish.errors import CheckFailed
from burnish.model.masters import MasterWeights, _Gradients, _Master
from live_bytes import LiveBytes


def optimizer(parameters: list[torch.nn.Parameter], lr: float = 1e-3, **kwargs: object) -> MasterWeights:
    groups = [{"params": parameters, "weight_decay": 0.1}]
    return MasterWeights(groups, lambda own: torch.optim.AdamW(own, lr=lr), **kwargs)  # type: ignore[arg-type]


def test_steps_smaller_than_a_bf16_gap_are_kept() -> None:
    low = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    own = MasterWeights([{"params": [low]}], lambda p: torch.optim.SGD(p, lr=1e-3))
    start = own.masters[0].detach().clone()
    for _ in range(8):
        low.sum().backward()
        own.step()
    torch.testing.assert_close(own.masters[0].detach(), start - 8e-3, rtol=0, atol=1e-6)
    assert torch.equal(low.detach(), own.masters[0].detach().bfloat16())


def test_weights_saved_in_bf16_move_from_the_first_step() -> None:
    """Masters in the middle of their rounding cells would leave every weight where it is."""
    start = (0.02 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-7, -(2.0**-126), 3e38], dtype=torch.bfloat16)
    low = torch.nn.Parameter(torch.cat([start, special]))
    own = MasterWeights([{"params": [low]}], lambda p: torch.optim.SGD(p, lr=1e-6))
    masters = own.masters[0].detach()
    assert torch.equal(masters.bfloat16(), low.detach()), "the model starts as it was saved"
    assert torch.equal(masters[-7:-5], torch.zeros(2))
    assert (masters[:-7] != low.detach()[:-7].float()).float().mean() > 0.99
    # The same from a bf16 file that was read in fp32.
    other = torch.nn.Parameter(low.detach().clone())
    read = MasterWeights([{"params": [other]}], lambda p: torch.optim.SGD(p), {other: other.detach().float()})
    assert torch.equal(read.masters[0], masters)

    low.sum().backward()
    own.step()
    change = (low.detach()[:-7] - start).double()
    assert (change != 0).float().mean() < 0.1
    assert change.mean().item() == pytest.approx(-1e-6, rel=0.1)


def test_masters_known_exactly_are_kept() -> None:
    exact = torch.linspace(-1, 1, 7)
    low = torch.nn.Parameter(exact.bfloat16())
    assert torch.equal(optimizer([low], masters={low: exact.clone()}).masters[0].detach(), exact)


def test_equals_a_plain_fp32_optimizer_on_the_same_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator)
    low = torch.nn.Parameter(start.bfloat16())
    reference = torch.nn.Parameter(start.clone())
    own = optimizer([low], masters={low: start.clone()})
    plain = torch.optim.AdamW([{"params": [reference], "weight_decay": 0.1}], lr=1e-3)
    for _ in range(5):
        parts = [torch.randn(5, 3, generator=generator).bfloat16() for _ in range(3)]
        for part in parts:
            (low * part).sum().backward()
        assert low.grad is None, "gradients leave the parameter for the fp32 accumulator"
        reference.grad = sum((part.float() for part in parts), torch.zeros(5, 3))
        norm = own.clip_gradients(0.5)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_([reference], 0.5))
        own.step()
        plain.step()
        plain.zero_grad()
    assert torch.equal(own.masters[0].detach(), reference.detach())


def test_resume_continues_from_the_masters() -> None:
    def run(parameter: torch.nn.Parameter, own: MasterWeights, steps: int) -> None:
        for _ in range(steps):
            (parameter * parameter).sum().backward()
            own.step()

    start = torch.linspace(-1, 1, 7)
    whole = torch.nn.Parameter(start.bfloat16())
    uninterrupted = optimizer([whole], masters={whole: start.clone()})
    run(whole, uninterrupted, 6)

    first = torch.nn.Parameter(start.bfloat16())
    before = optimizer([first], masters={first: start.clone()})
    run(first, before, 3)
    second = torch.nn.Parameter(first.detach().clone())
    after = optimizer([second])
    after.load_state_dict(before.state_dict())
    run(second, after, 3)
    assert torch.equal(after.masters[0], uninterrupted.masters[0])
    assert torch.equal(second, whole)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    own = optimizer([parameter])
    state = own.state_dict()
    state["masters"] = []
    with pytest.raises(CheckFailed, match="0 master weights and the model trains 1"):
        own.load_state_dict(state)


def test_learning_rate_schedulers_reach_the_inner_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    own = optimizer([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 0.5**step)
    (parameter * 1.0).sum().backward()
    own.step()
    scheduler.step()
    assert own.inner.param_groups[0]["lr"] == 0.5


def test_every_fp32_number_is_kept_in_a_bf16_weight_and_its_rest() -> None:
    """Infinities, subnormals, numbers half way between two weights: what the optimizer made comes back to the bit."""
    upper = torch.arange(-0x8000, 0x8000, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (upper[:, None] + lower).view(torch.float32)
    values = values[~values.isnan()]
    low = torch.nn.Parameter(torch.zeros_like(values, dtype=torch.bfloat16))
    master = _Master(low, None, _Gradients(low.dtype, low.device))
    master.store(values.clone())
    assert torch.equal(master.value().view(torch.int32), values.view(torch.int32))
    finite = values.abs() < 3.38e38
    gap = (low.detach().float() - values)[finite].double().abs()
    assert (gap <= (values.bfloat16().float() - values)[finite].double().abs()).all(), "a nearest weight"


def test_no_nan_turns_into_a_number() -> None:
    bits = [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x400000, -0x7FFFFF]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    low = torch.nn.Parameter(torch.zeros(len(bits), dtype=torch.bfloat16))
    master = _Master(low, None, _Gradients(low.dtype, low.device))
    master.store(values)
    assert low.isnan().all()
    assert master.value().isnan().all()


def test_exact_values_half_way_between_two_weights() -> None:
    even, odd = 1 + 2.0**-8, 1 + 3 * 2.0**-8
    exact = torch.tensor([even, odd, -even, 1.0])
    low = torch.nn.Parameter(exact.bfloat16())
    assert low.tolist() == [1.0, 1 + 2.0**-6, -1.0, 1.0]
    own = optimizer([low], masters={low: exact.clone()})
    assert low.tolist() == [1.0, 1 + 2.0**-6, -1.0, 1.0], "the model starts as it was loaded"
    torch.testing.assert_close(own.masters[0], exact, rtol=2.0**-23, atol=0)


def test_weights_that_were_set_since_are_not_set_back() -> None:
    exact = torch.linspace(-1, 1, 7)
    low = torch.nn.Parameter(exact.bfloat16())
    with torch.no_grad():
        low.add_(1.0)
    own = optimizer([low], masters={low: exact.clone()})
    assert torch.equal(own.masters[0].bfloat16(), low.detach())
    changed = low.detach().clone()
    (low * 0.0).sum().backward()
    own.inner.param_groups[0]["weight_decay"] = 0.0
    own.step()
    assert torch.equal(low.detach(), changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_beside_bf16(dtype: torch.dtype) -> None:
    """fp32 parameters (a score head) are their own masters."""
    start = torch.linspace(-1, 1, 7).to(dtype)
    low, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    own, reference = optimizer([low]), torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        for _ in range(2):
            (low * start).sum().backward()
            (plain * start.float()).sum().backward()
        own.step()
        reference.step()
        reference.zero_grad()
    assert torch.equal(own.masters[0], plain.detach())
    assert torch.equal(low.detach(), plain.detach().to(dtype))
    assert sum(rest.nbytes for rest in own.rests) == (0 if dtype == torch.float32 else 28)
    again = torch.nn.Parameter(low.detach().clone())
    after = optimizer([again])
    after.load_state_dict(own.state_dict())
    assert torch.equal(after.masters[0], own.masters[0])


def test_fourteen_bytes_a_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    lows = [torch.nn.Parameter(torch.randn(1000, 300, generator=generator).bfloat16()) for _ in range(20)]
    numbers = sum(low.numel() for low in lows)
    own = optimizer(lows)

    def backward() -> None:
        sum((low.sum() for low in lows), torch.zeros(())).backward()

    def kept() -> dict[str, float]:
        states = [t for state in own.state.values() for t in state.values()]
        named = {"rests": own.rests, "gradients": own.gradients, "moments": states}
        return {name: round(sum(t.nbytes for t in tensors) / numbers, 2) for name, tensors in named.items()}

    backward()
    assert kept() == {"rests": 2.0, "gradients": 2.0, "moments": 0.0}
    backward()
    assert kept() == {"rests": 2.0, "gradients": 4.0, "moments": 0.0}
    own.step()
    assert kept() == {"rests": 2.0, "gradients": 0.0, "moments": 8.0}
    backward()
    with LiveBytes() as live:
        own.step()
    assert live.peak < 10 * 2**22, "masters are joined a few at a time"
    assert all(handle.untyped_storage().nbytes() == 4 for group in own.param_groups for handle in group["params"])


class Foreign(torch.optim.AdamW):
    """An optimizer that may look across its parameters: it is not one of those known not to."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.seen = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        super().step()


def test_an_unknown_optimizer_sees_all_masters_at_once_and_does_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(3_000, 900, generator=generator) for _ in range(3)]
    ends: list[list[torch.Tensor]] = []
    for made in (torch.optim.AdamW, Foreign):
        lows = [torch.nn.Parameter(start.bfloat16()) for start in starts]
        exact = {low: start.clone() for low, start in zip(lows, starts, strict=True)}
        own = MasterWeights([{"params": lows[:2]}, {"params": lows[2:]}], lambda p, cls=made: cls(p, lr=1e-3), exact)
        before = own.masters
        for _ in range(2):
            (lows[0].sum() * lows[2].mean()).backward()  # the second gets no gradient
            own.clip_gradients(0.5)
            own.step()
        ends.append(own.masters)
        if isinstance(own.inner, Foreign):
            assert len(own.inner.seen) == 3
            assert torch.equal(own.inner.seen[1], before[1])
    assert all(torch.equal(left, right) for left, right in zip(*ends, strict=True))
    assert torch.equal(ends[0][1], before[1]), "without a gradient there is no step, and no weight decay"


def test_eight_bit_moments() -> None:
    """bitsandbytes' optimizer over masters: 8 bytes a weight with its bf16 gradient."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    start = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    low = torch.nn.Parameter(start.bfloat16())
    own = MasterWeights([{"params": [low]}], lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3))
    plain = torch.nn.Parameter(own.masters[0])
    reference = bitsandbytes.optim.AdamW8bit([plain], lr=1e-3)
    for _ in range(3):
        low.square().sum().backward()
        plain.grad = 2 * low.detach().float()
        own.step()
        reference.step()
    assert torch.equal(own.masters[0], plain.detach())
    moments = [
        t for state in own.state.values() for t in state.values() if torch.is_tensor(t) and t.dtype == torch.uint8
    ]
    assert sum(t.nbytes for t in moments) == 2 * low.numel()
    again = torch.nn.Parameter(low.detach().clone())
    after = MasterWeights([{"params": [again]}], lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3))
    after.load_state_dict(own.state_dict())
    assert torch.equal(after.masters[0], own.masters[0])


def test_rests_of_other_weights_are_refused() -> None:
    """A folder whose weights and optimizer are of different steps would continue from neither."""
    parameter = torch.nn.Parameter(torch.linspace(0, 1, 5).bfloat16())
    state = optimizer([parameter]).state_dict()
    with torch.no_grad():
        parameter[2] += 0.5
    with pytest.raises(CheckFailed, match="do not belong to the weights that the model holds"):
        optimizer([parameter]).load_state_dict(state)
    wide = torch.nn.Parameter(parameter.detach().float())
    with pytest.raises(CheckFailed, match="another model or dtype"):
        optimizer([wide]).load_state_dict(state)
    with pytest.raises(CheckFailed, match="another model or dtype"):
        optimizer([torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]).load_state_dict(state)
