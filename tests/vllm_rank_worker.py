"""Trains by GRPO with vLLM in each process, under whatever launcher started it: run by test_vllm_colocated.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from test_vllm_config import logged, trainer
from vllm_sources import fresh

folder, per_device, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
made = trainer(
    folder,
    None,
    fresh(seed=11),
    vllm_mode="colocate",
    vllm_tensor_parallel_size=size,
    per_device_train_batch_size=per_device,
    max_steps=2,
    log_completions=True,
)
made.train()
if made.args.process_index == 0:
    (folder / "differences.json").write_text(json.dumps(logged(made, "sampling/probe/difference")))
made.stage.sampler.engine.close()
