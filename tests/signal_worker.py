"""Trains a tiny model whose reward tells when a step runs: started and signalled by test_processes.py."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import tiny
from burnish import BurnishError, GRPOConfig, GRPOTrainer
from burnish.errors import Interrupted
from test_trainers import PROMPTS, digits, settings


def main(folder: Path, seconds: float, words: list[str]) -> int:
    """One run; its exit status."""
    if "ignore" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    calls = 0

    def slow(completions: list[str], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        (folder / f"call-{calls}-{args.process_index}").touch()
        time.sleep(seconds)
        return digits(completions)

    shared: dict[str, Any] = {"max_steps": 3, "num_generations": 4, "per_device_train_batch_size": 4}
    shared |= {"max_completion_length": 8, "logprob_check_bound": 1.0, "log_completions": True}
    # No use_cpu: ranks without accelerators must find each other by themselves.
    base = {name: value for name, value in settings(folder).items() if name != "use_cpu"}
    args = GRPOConfig(**base | shared)
    trainer = GRPOTrainer(tiny.model(), slow, args, PROMPTS, processing_class=tiny.tokenizer())
    try:
        trainer.train(resume_from_checkpoint=True if "resume" in words else None)
    except Interrupted as error:
        print(f"{error} world {args.world_size}", flush=True)
        return error.exit_status
    except BurnishError as error:
        print(error, flush=True)
        return 2
    print(f"finished step {trainer.state.global_step} of world {args.world_size}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
