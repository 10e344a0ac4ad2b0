"""GRPO with vLLM on one or more ranks, each a process that runs this file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from burnish.runs.files import read_json_lines
from test_vllm_config import logged, trainer
from vllm_sources import fresh


def run_ranks(ranks: int, folder: Path, **fields: Any) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Train two groups a step; return the transcripts, and logged metrics by name."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    fields = {"per_device_train_batch_size": 8 // ranks, **fields}
    command = [sys.executable, *launcher, __file__, str(folder), json.dumps(fields)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(read_json_lines(folder / "transcripts.jsonl")), json.loads((folder / "logged.json").read_text())


def in_order(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return step, prompt, sample and text of transcripts, whichever rank wrote them."""
    return sorted((row["step"], row["prompt_index"], row["sample"], row["completion"]) for row in rows)


def main() -> None:
    folder, fields = Path(sys.argv[1]), json.loads(sys.argv[2])
    made = trainer(folder, fields.pop("vllm_server_base_url", None), fresh(seed=11), log_completions=True, **fields)
    made.train()
    if made.args.process_index == 0:
        names = ("sampling/probe/difference", "sampling/staleness/max", "sampling/logprob_difference/max")
        (folder / "logged.json").write_text(json.dumps({name: logged(made, name) for name in names}))
    made.stage.sampler.engine.close()


if __name__ == "__main__":
    main()
