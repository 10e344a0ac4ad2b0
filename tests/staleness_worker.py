"""A run two rollouts ahead in a process of its own, to be killed: `staleness_worker.py FOLDER URL`."""

from __future__ import annotations

import sys
from pathlib import Path

from test_vllm_config import trainer

if __name__ == "__main__":
    folder, url = Path(sys.argv[1]), sys.argv[2]
    made = trainer(
        folder, url, max_staleness=2, max_steps=8, shuffle_dataset=False, log_completions=True, save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    made.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
