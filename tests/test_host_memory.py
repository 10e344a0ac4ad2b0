"""The host's memory in a plan: its verdict, its proposals, and what a trainer refuses and chooses for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from burnish.cli.main import main
from burnish.errors import ConfigError
from burnish.planner import devices
from burnish.planner.budget import keep_budget, refuse_too_large
from burnish.planner.devices import DEVICES, Device, find_device, host_memory
from burnish.planner.memory import Method, offloaded_bytes, pinned_bytes
from burnish.planner.models import find_shape
from burnish.planner.plan import USABLE, estimate
from burnish.planner.proposals import propose
from burnish.planner.run import Request
from burnish.trainers import sft
from burnish.training import memory_plan
from test_memory_plan import trainer

GB = 10**9
QLORA = {"peft": {"r": 16, "target_modules": "all-linear"}, "model_init": {"quantization_config": "nf4"}}
OFFLOADED = {"activation_offloading": True, "gradient_checkpointing": True, "max_completion_length": 4096,
             "token_budget": 10**6}  # fmt: skip


def request_of(host: int | None, device: Device = DEVICES["H100"], **given: Any) -> Request:
    return Request("grpo", find_shape("Llama-3.1-8B"), device.with_host(host), **{**QLORA, **given})


def values(request: Request, *, only_exact: bool = False) -> list[dict[str, Any]]:
    """The fields that each proposal sets."""
    return [
        {name: value for change in proposal.changes for name, value in change.values.items()}
        for proposal in propose(request, only_exact=only_exact)
    ]


def test_a_host_too_small_for_what_is_offloaded() -> None:
    """33,280 tokens: 272 MB a layer, which pinned memory rounds up to 537 MB, and the rest of a process."""
    request = request_of(18 * GB, training=OFFLOADED)
    plan = estimate(request)
    assert plan.peak_host_phase.name == "update"
    assert plan.host_bytes == 650_000_000 + 34 * 2**29 + 2**30
    assert (plan.fits_device, plan.fits_host, plan.fits) == (True, False, False)
    assert plan.excess_bytes == plan.host_bytes - (plan.usable_host_bytes or 0) > 0
    fastest, *others = propose(request)
    assert [change.values for change in fastest.changes] == [
        {"gradient_checkpointing": True, "activation_offloading": False}
    ]
    assert fastest.slowdown < 1
    assert fastest.plan.fits
    assert fastest.plan.fits_host
    assert others
    assert all(one.plan.fits for one in others)
    assert any("token_budget" in fields for fields in values(request, only_exact=True)), "smaller parts fit as well"


def test_a_host_that_is_large_enough_and_one_that_is_not_known() -> None:
    fits, unknown = (estimate(request_of(host, training=OFFLOADED)) for host in (32 * GB, None))
    assert (fits.fits_host, fits.fits) == (True, True)
    assert (unknown.fits_host, unknown.fits) == (None, True)
    assert unknown.as_dict()["device"]["usable_host_bytes"] is None
    assert fits.usable_host_bytes == int(USABLE * 32 * GB)


def test_weights_that_are_read_in_fp32_do_not_fit_the_host() -> None:
    request = request_of(32 * GB, model_init={})
    plan = estimate(request)
    assert plan.peak_host_phase.name == "loading"
    assert plan.host_bytes == 650_000_000 + 6 * plan.run.shape.num_parameters
    assert values(request)[0] == {"dtype": "bfloat16"}
    assert estimate(replace(request, in_memory=True)).fits, "nothing is read of a model in memory"


def test_what_would_take_a_small_host_s_memory_is_not_proposed() -> None:
    """A device that the inputs of layers do not fit, and a host that they do not fit either."""
    training: dict[str, Any] = {"gradient_checkpointing": True, "mlp_tiles": 16, "max_length": 16384}
    row = replace(request_of(None, training={**training, "per_device_train_batch_size": 1}), kind="sft", in_memory=True)
    moved = replace(row, training={**row.training, "activation_offloading": True})
    between = (estimate(row).peak_bytes + estimate(moved).peak_bytes) / 2 / USABLE
    device = replace(row.device, memory_bytes=round(between))
    large, tight = (replace(row, device=device.with_host(size * GB)) for size in (8, 4))
    assert any(fields.get("activation_offloading") for fields in values(large))
    proposals = propose(tight)
    assert proposals
    assert all(one.plan.fits for one in proposals)
    assert not any(fields.get("activation_offloading") for fields in values(tight))


def test_levels_rise_where_the_host_has_room() -> None:
    """Offloading would lower the device's peak most, and the host cannot take it: more tiles are enough."""
    row = replace(request_of(None, training={"max_length": 16384, "per_device_train_batch_size": 1}), kind="sft")
    fields: dict[str, Any] = {"gradient_checkpointing": True, "mlp_tiles": 8}
    wanted = estimate(replace(row, training={**row.training, **fields})).peak_bytes
    device = replace(row.device, memory_bytes=round((wanted + 10**6) / USABLE))
    found = values(replace(row, device=device.with_host(4 * GB), in_memory=True))
    assert any(one.keys() == fields.keys() for one in found)


def test_an_embedding_and_a_paged_optimizer_come_back_from_a_small_host() -> None:
    training = {"embedding_offloading": True, "optim": "paged_adamw_8bit"}
    away = request_of(64 * GB, training=training, in_memory=True)
    plan = estimate(away)
    assert plan.held_on_host(plan.phases[-1]).keys() == {"process", "optimizer", "embedding"}
    small = request_of(round((plan.host_bytes - 10**6) / USABLE), training=training, in_memory=True)
    assert {"optim": "adamw_bnb_8bit"} in values(small)
    assert {"embedding_offloading": False} in values(small)


def test_a_host_that_nothing_fits_gets_no_proposals() -> None:
    request = request_of(8 * GB, training=OFFLOADED)
    assert not estimate(request).fits
    assert propose(request) == []


def test_on_a_cpu_the_sum_of_both_counts() -> None:
    cpu = find_device("cpu").with_host(16 * GB)
    assert (cpu.memory_bytes, cpu.host_bytes) == (16 * GB, None)
    plan = estimate(request_of(None, cpu))
    assert plan.fits_host is None
    assert plan.host_bytes == 0
    assert plan.fixed["process"] == 650_000_000
    assert not plan.fits
    assert plan.peak_phase.name == "loading"


def test_ranks_share_the_host() -> None:
    assert DEVICES["H100"].with_host(64 * GB).shared_by(4).host_bytes == 16 * GB
    assert DEVICES["H100"].shared_by(4).host_bytes is None
    assert find_device("cpu").with_host(64 * GB).shared_by(4).memory_bytes == 16 * GB


def test_pinned_memory_by_hand() -> None:
    assert [pinned_bytes(size) for size in (0, 1, 2, 3, 2**20, 2**20 + 1)] == [0, 1, 2, 4, 2**20, 2**21]
    shape = find_shape("Llama-3.1-8B").shape
    assert offloaded_bytes(shape, Method(), 1000, on_cpu=True) == (34 * 2 + 4) * 4096 * 1000
    assert offloaded_bytes(shape, Method(), 1000, on_cpu=False) == 34 * 2**23 + 2**24
    assert offloaded_bytes(shape, Method(), 0, on_cpu=False) == 0


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/user.slice/job\n", {"user.slice/job/memory.max": "max", "user.slice/memory.max": "3000"}, 3000),
        ("0::/\n", {"memory.max": "2000\n"}, 2000),
        ("4:memory:/jobs/one\n0::/\n", {"memory/jobs/one/memory.limit_in_bytes": "1000"}, 1000),
        # In a container, whose own folder is the root.
        ("4:memory:/docker/id\n", {"memory/memory.limit_in_bytes": "1500"}, 1500),
        ("1:cpu:/jobs\n", {"cpu/jobs/memory.max": "10"}, None),
        ("", {"memory.max": "max"}, None),
    ],
)
def test_limits_of_control_groups(
    groups: str, limits: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"/proc/self/cgroup": groups} | {f"/sys/fs/cgroup/{name}": text for name, text in limits.items()}
    monkeypatch.setattr(devices, "_text", lambda path: files.get(str(path), ""))
    whole = host_memory()
    assert whole is not None
    if expected is None:
        assert whole > 10**8
    else:
        assert whole == expected
        assert find_device("cpu").memory_bytes == expected


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(devices.os, "sysconf")
    assert host_memory() is None
    assert find_device("cpu").memory_bytes == 2**40


WORDS = ["plan", "Llama-3.1-8B", "--qlora", "--device", "H100"]
FIELDS = [f"--training.{name}={str(value).lower()}" for name, value in OFFLOADED.items()]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (["--host-memory", "18GB"], ["fits H100, but not the host: ", "during update, 2.88 GB more than the 17.10 GB"]),
        (["--host-memory=64GB"], ["\nfits: ", "host memory of each rank: 19.98 GB during update, 40.82 GB to spare"]),
        ([], ["\nfits: ", "19.98 GB during update; not checked: the host's memory is not known (--host-memory)"]),
    ],
)
def test_the_command_says_whether_the_host_is_enough(
    host: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *host, *FIELDS, "--json", str(tmp_path / "plan.json"), "--svg", str(tmp_path / "a.svg")]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in expected), shown
    assert "offloaded activations (host)" in shown
    plan = json.loads((tmp_path / "plan.json").read_text())["plans"][0]
    update = next(phase for phase in plan["phases"] if phase["name"] == "update")
    assert plan["host_bytes"] == update["host_total_bytes"] > update["host"]["offloaded activations"]
    assert plan["fits_host"] is (None if not host else "64" in host[0])
    assert plan["fits"] is (plan["fits_host"] is not False)
    assert bool(plan["proposals"]) is not plan["fits"]
    drawn = (tmp_path / "a.svg").read_text()
    assert "GB of host memory" in drawn
    assert ("usable, host" in drawn) is bool(host)


def test_a_bad_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--host-memory", "much"]) == 2
    assert "--host-memory = 'much': use a size such as 64GB or 60GiB" in capsys.readouterr().err


def test_a_budget_is_kept_on_the_host_too() -> None:
    request = request_of(18 * GB, training={**OFFLOADED, "memory_budget": "auto"})
    budgeted = keep_budget(request)
    assert budgeted.chosen == {"gradient_checkpointing": True, "activation_offloading": False}
    assert "the run takes 19.98 GB of the host's memory (update) as configured" in budgeted.reasons[0]
    with pytest.raises(ConfigError, match=r"takes .* of the host's memory \(loading\), which has 8.00 GB, and all"):
        keep_budget(request_of(8 * GB, training={"memory_budget": "auto"}))


def test_a_run_is_refused_beyond_the_formulas_error_only() -> None:
    need = estimate(request_of(None, training=OFFLOADED)).host_bytes
    refuse_too_large(request_of(round(need / 1.05), training=OFFLOADED))
    with pytest.raises(
        ConfigError, match=r"check_memory = True: .* of the host's memory \(update\), which has .*; set"
    ):
        refuse_too_large(request_of(round(need / 1.11), training=OFFLOADED))


def test_a_trainer_refuses_what_the_host_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "find_device", lambda _: DEVICES["H200"].with_host(20 * GB))
    monkeypatch.setattr(sft.SFTStage, "load", lambda *_: pytest.fail("weights are read"))
    model = "meta-llama/Llama-3.1-8B"
    with pytest.raises(
        ConfigError, match=r"check_memory = True: .* \(loading\), which has 20.00 GB; use a smaller model"
    ):
        trainer("SFT", tmp_path, model=model, lora=True)
    with pytest.raises(pytest.fail.Exception, match="weights are read"):
        trainer("SFT", tmp_path, model=model, lora=True, check_memory=False)


def test_a_model_in_memory_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "find_device", lambda _: DEVICES["H200"].with_host(GB))
    plan = trainer("SFT", tmp_path)._memory_plan
    assert "loading" not in [phase.name for phase in plan.phases]
    assert plan.fits_host
