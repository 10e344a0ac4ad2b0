"""A rubric's identity: the same in every process, another for everything that decides a reward."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.rewards import Criterion, Rubric
from burnish.rewards.identity import rubric_identity
from burnish.rewards.registry import rubric_from_config

CONFIGS: list[list[dict[str, Any]]] = [
    [{"kind": "exact"}],
    [{"kind": "exact", "weight": 2}],
    [{"kind": "exact", "name": "other"}],
    [{"kind": "exact", "timeout_seconds": 1}],
    [{"kind": "exact", "isolate": False}],
    [{"kind": "numeric"}],
    [{"kind": "numeric", "sources": ["last_number"]}],
    [{"kind": "numeric", "sources": ["last_number", "tag"]}],
    [{"kind": "soft_overlong", "max_completion_length": 8, "cache": 2}],
    [{"kind": "soft_overlong", "max_completion_length": 8, "cache": 3}],
    [{"kind": "python", "function": "math:sqrt"}],
    [{"kind": "python", "function": "math:exp"}],
    [{"kind": "python", "function": "functools:reduce", "options": {"initial": 1}}],
    [{"kind": "python", "function": "functools:reduce", "options": {"initial": 2}}],
    [{"kind": "exact"}, {"kind": "format"}],
]


def test_every_option_makes_another_rubric_and_no_process_does() -> None:
    found = [rubric_identity(rubric_from_config(config)) for config in CONFIGS]
    assert len(set(found)) == len(CONFIGS)
    code = (
        "import json, sys; from burnish.rewards.identity import rubric_identity as i; "
        "from burnish.rewards.registry import rubric_from_config as r; "
        "print(json.dumps([i(r(c)) for c in json.loads(sys.argv[1])])); assert 'torch' not in sys.modules"
    )
    words = [sys.executable, "-c", code, json.dumps(CONFIGS)]
    other = subprocess.run(words, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"} | _path())
    assert json.loads(other.stdout) == found


def _path() -> dict[str, str]:
    import burnish

    return {"PYTHONPATH": str(Path(burnish.__file__).parents[1])}


class Judge:
    def __init__(self, model: str, calls: Any = None, **own: Any) -> None:
        self.model = model
        self._met = calls if calls is not None else object()
        self.__dict__.update(own)

    def __call__(self, **_: Any) -> list[float]:
        return []

    def method(self, **_: Any) -> list[float]:
        return []


def counted(bonus: float) -> Any:
    return lambda **_: [bonus]


def defaults(bonus: float) -> Any:
    def reward(*, bonus: float = bonus, **_: Any) -> list[float]:
        return [bonus]

    return reward


def filled(value: float) -> torch.nn.Module:
    net = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(net.weight, value)
    torch.nn.init.constant_(net.bias, 0.0)
    return net


@pytest.mark.parametrize(
    "make",
    [
        counted,
        defaults,
        lambda value: functools.partial(counted, value),
        lambda value: Judge(f"model-{value}"),
        lambda value: Judge("model", options={"temperature": value}),
        lambda value: Judge(f"model-{value}").method,
        lambda value: Judge("model", net=filled(value)),
    ],
)
def test_what_a_function_holds_is_part_of_it(make: Any) -> None:
    one, same, other = (rubric_identity(Rubric([Criterion("c", make(value))])) for value in (1.0, 1.0, 2.0))
    assert one == same
    assert one != other


def test_the_source_of_a_users_module_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found: list[str] = []
    for helper in ("len(text)", "-len(text)", "len(text)"):
        (tmp_path / "own_rewards.py").write_text(
            f"def helper(text):\n    return {helper}\n\n\n"
            "def reward(completions, **_):\n    return list(map(helper, completions))\n"
        )
        sys.modules.pop("own_rewards", None)
        importlib.invalidate_caches()
        found.append(rubric_identity(rubric_from_config([{"kind": "python", "function": "own_rewards:reward"}])))
    assert found[0] == found[2] != found[1]
