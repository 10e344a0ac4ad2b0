"""What a run is measured with."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from burnish.model.precision import fast_bf16

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Versions and hardware: what a figure was measured with."""
    names = ("burnish", "torch", "transformers", "accelerate", "peft")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bf16": fast_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": {name: metadata.version(name) for name in names},
        "command": " ".join(Path(word).name if word == sys.argv[0] else word for word in sys.argv),
    }
