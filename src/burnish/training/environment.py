"""Versions and hardware of a run."""

from __future__ import annotations

import functools
import logging
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from burnish.model.precision import fast_bf16

__all__ = ["TESTED", "environment", "warn_of_untested"]

logger = logging.getLogger(__name__)

TESTED = {"torch": "2.13.0", "transformers": "5.23.0"}
"""Newest versions that burnish is tested with."""


def environment() -> dict[str, Any]:
    """Return versions and hardware, to record beside measurements."""
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


@functools.cache
def warn_of_untested() -> None:
    """Warn once per process of libraries newer than the versions that burnish is tested with."""
    found = {name: metadata.version(name) for name in TESTED}
    # The release alone: torch 2.13.0+cpu is 2.13.0.
    newer = [name for name in TESTED if Version(found[name]).release > Version(TESTED[name]).release]
    if newer:
        named = ", ".join(f"{name} {found[name]} (tested up to {TESTED[name]})" for name in newer)
        pins = " ".join(f"{name}=={TESTED[name]}" for name in newer)
        logger.warning("%s: newer than burnish was tested with; if something fails, pip install %s.", named, pins)
