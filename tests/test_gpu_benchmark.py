"""The GPU entry point on a CPU, with tiny models: the code that runs, not the numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_plan  # noqa: E402
import gpu_side  # noqa: E402
import gpu_stages  # noqa: E402
from gpu_model import completion_ids, prompt_rows, random_model, word_tokenizer  # noqa: E402

MEMORY = ("max_allocated_bytes", "max_reserved_bytes", "used_bytes")


def run(folder: Path, *stages: str) -> dict[str, Any]:
    """The stages that `gpu.py` left in its JSON."""
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny", "--out", folder / "out"]
    command += ["--work", folder / "work", "--stages", *stages]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out" / "gpu.json").read_text())["stages"]


def check_rates(found: Mapping[str, Any]) -> None:
    assert found["seconds"] > 0
    assert found["tokens_per_second"] > 0
    assert 0 < found["mfu"] <= found["hfu"]
    assert [found[name] for name in MEMORY] == [None] * 3


def test_capped_stage(tmp_path: Path) -> None:
    """A QLoRA step of the real trainer, and the tests of a GPU skipped where there is none."""
    pytest.importorskip("bitsandbytes")
    stages = run(tmp_path, "tests", "memory-2k")
    assert stages["tests"]["found"] == {"skipped": "no CUDA device"}
    assert stages["memory-2k"]["status"] == "done", stages
    found = stages["memory-2k"]["found"]
    check_rates(found)
    assert found["settings"]["quantized"]
    assert found["cap_bytes"] == 6.6e9
    assert found["start"]["dtypes"] == ["bfloat16", "uint8"]
    assert [step["completion_tokens"] for step in found["short_steps"]] == [8 * 8]
    assert [step["completion_tokens"] for step in found["steps"]] == [8 * 48] * 3
    assert set(found["planned"]["phases"]) == {"loading", "rollout", "update"}


@pytest.mark.slow
def test_all_stages(tmp_path: Path) -> None:
    """Every stage of a CPU, with TRL's sides where TRL is installed."""
    stages = run(tmp_path, "environment", "memory-20k", "largest", "speed", "rollouts", "memory-2k-native")
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(stages, "done"), stages
    found = {name: stage["found"] for name, stage in stages.items()}
    check_rates(found["memory-20k"])
    check_rates(found["largest"]["burnish"])
    check_rates(found["memory-2k-native"])
    check_rates(found["speed"]["sides"]["burnish"])
    assert found["rollouts"]["Qwen3-0.6B"]["native"] > 0
    assert found["rollouts"]["Llama-3.1-8B"]["generate"] > 0
    for side in ("trl-bf16", "trl-autocast"):
        made = found["speed"]["sides"][side]
        if "failed" in made:
            assert not (ROOT / ".venv-trl").exists()
            assert "TRL is not installed" in made["failed"]
        else:
            check_rates(made)
            assert found["speed"]["same_rows"]


def test_a_stage_that_is_stopped_says_so(tmp_path: Path) -> None:
    setup = {"device": "cpu", "tiny": True, "seconds": 0.2, "path": str(ROOT / "src"), "trl_python": None}
    found = gpu.run_stage("environment", setup | {"work": str(tmp_path)}, tmp_path / "log")
    assert found["status"] == "out of time"
    assert found["seconds"] < 20


def test_a_stage_that_fails_says_why(tmp_path: Path) -> None:
    setup = {"device": "cpu", "tiny": True, "seconds": 60, "path": str(ROOT / "src"), "trl_python": None}
    found = gpu.run_stage("no such stage", setup | {"work": str(tmp_path)}, tmp_path / "log")
    assert found["status"] == "failed"
    assert "no such stage" in found["error"]
    assert "found" not in found


@pytest.mark.parametrize("holds", [True, False])
def test_the_cap_is_tried(monkeypatch: pytest.MonkeyPatch, holds: bool) -> None:
    asked: list[Any] = []

    def allocate(size: int, **options: Any) -> None:
        asked.append(size)
        if holds:
            raise torch.cuda.OutOfMemoryError

    total = SimpleNamespace(total_memory=100 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "empty", allocate)
    device = gpu_side.Device("cuda", 25 * 2**30)
    assert device.cap_enforced is holds
    assert asked == [0.25, 25 * 2**30 + 2**28]


@pytest.mark.parametrize("fits", [True, False])
def test_memory_beside_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    """A run that does not fit under its cap is measured without one, so that it says how much was missing."""
    caps: list[float | None] = []
    reserved = 5_000_000_000 if fits else 9_000_000_000

    def measure(setup: Any, name: str, made: dict[str, Any], *rest: Any) -> dict[str, Any]:
        caps.append(made.get("cap_bytes"))
        if not fits and caps[-1] is not None:
            raise RuntimeError("out of memory")
        used = {"used_bytes": reserved + 500_000_000, "reserved_bytes": reserved}
        return {"steps": [used], "max_reserved_bytes": reserved, "used_bytes": used["used_bytes"]}

    monkeypatch.setattr(gpu_stages, "measure", measure)
    setup = gpu_stages.Setup("cuda", True, 60, str(tmp_path), str(ROOT / "src"), None)
    gpu_stages.memory(setup, "Llama-3.1-8B", "2k")
    found = json.loads((tmp_path / "stage.json").read_text())
    assert found["within_limit"] is fits
    assert found["within_limit_as_used"] is fits
    assert found["context_bytes"] == 500_000_000
    assert caps == ([6.6e9] if fits else [6.6e9, None])
    assert ("capped" in found) is not fits


def settings(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"side": "burnish", "lora": False, "quantized": False, "prompt": 16, "completion": 48}
    found |= {"config": gpu_plan.shape_of("Qwen3-0.6B", tiny=True), "num_generations": 8}
    return found | {"training": {"per_device_train_batch_size": 8}, **changes}


def test_flops() -> None:
    """Checkpointing is executed and not needed; TRL computes a prompt once per completion."""
    plain, checkpointed = (
        gpu_plan.flops(
            gpu_plan.request_of(settings(training={"gradient_checkpointing": on, "token_budget": 2048}), "cpu"),
            by_sequence=False,
        )
        for on in (False, True)
    )
    assert plain[0] == plain[1] == checkpointed[0] < checkpointed[1]
    training = {"completions": 8, "micro_batch": 1, "gradient_checkpointing": False}
    trl = gpu_plan.flops(gpu_plan.request_of(settings(side="trl", training=training), "cpu"), by_sequence=True)
    assert trl[0] == plain[0] < trl[1]
    # 6 a weight and token, 4 times 2 V H a scored token, 12 Q L a query-key pair.
    weights, scored, pairs = 2 * (3 * 128 * 256 + 2 * 128 * 128 + 2 * 128 * 64), 8 * 48, 128 + 8 * 48 * (16 + 24)
    assert plain[0] == 6 * weights * (16 + 384) + 4 * 2 * 512 * 128 * scored + 12 * 128 * 2 * pairs


@pytest.mark.parametrize("model", ["Llama-3.1-8B", "Qwen3-0.6B"])
def test_random_model(model: str) -> None:
    """Weights are spread as a fresh model's, tied where the real ones are; rotary frequencies have values."""
    config = gpu_plan.shape_of(model, tiny=True)
    made = random_model(config, quantized=False, device="cpu", dtype=torch.float32)
    tensors = [*made.parameters(), *made.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == config["tie_word_embeddings"]
    assert abs(float(made.lm_head.weight.detach().std()) - 0.02) < 0.002  # 65,536 draws
    assert float(made.model.rotary_emb.inv_freq[0]) == 1.0
    with torch.no_grad():
        assert made(torch.arange(8)[None]).logits.isfinite().all()


def test_quantized_model() -> None:
    """Linear layers but the head in NF4 with double quantisation, marked as transformers marks them."""
    pytest.importorskip("bitsandbytes")
    made = random_model(gpu_plan.shape_of("Llama-3.1-8B", tiny=True), quantized=True, device="cpu")
    assert made.is_loaded_in_4bit
    assert made.hf_quantizer.is_trainable
    for linear in (made.model.layers[1].mlp.down_proj, made.model.layers[0].self_attn.k_proj):
        assert linear.weight.quant_state.nested
        assert linear.weight.quant_state.quant_type == "nf4"
        assert linear.quant_state is linear.weight.quant_state
        assert linear.weight.numel() == linear.in_features * linear.out_features // 2
    assert made.lm_head.weight.dtype == torch.bfloat16


def test_rows_have_exact_lengths() -> None:
    tokenizer = word_tokenizer(512)
    for row in prompt_rows(512, 16)[:3]:
        assert len(tokenizer(row["prompt"])["input_ids"]) == 16
    first, again, other = (completion_ids(512, 48, call=call, count=2) for call in (0, 0, 1))
    assert first == again != other
    assert {len(ids) for ids in first} == {48}
    assert min(map(min, first)) > 1  # neither the end of a sequence nor the unknown word
