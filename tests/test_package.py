from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import burnish
from burnish.config.stages import TRAINER_NAMES


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)))"


@pytest.mark.parametrize(
    "statement",
    [
        "import burnish; dir(burnish)",
        "import burnish; burnish.ConfigError, burnish.Rubric, burnish.Group, burnish.write_report",
        "import burnish.config as s; s.known_fields('grpo'), s.lora_fields(), s.check_fields('sft', {'seed': 1})",
        "import burnish.cli.config",
        "from burnish.cli.main import build_parser; build_parser().format_help()",
        "import burnish.data, burnish.rewards, burnish.report",
    ],
)
def test_no_torch(statement: str):
    assert python(f"import sys; {statement}; {HEAVY}") == "[]"


@pytest.mark.parametrize("command", ["", "sft", "grpo", "eval", "pipeline", "report"])
def test_help_loads_no_torch(command: str):
    words = [*command.split(), "--help"]
    code = f"import sys, contextlib, io\nfrom burnish.cli.main import main\nwith contextlib.suppress(SystemExit), \
contextlib.redirect_stdout(io.StringIO()):\n    main({words!r})\n{HEAVY}"
    assert python(code) == "[]"


def test_public_names_are_sorted_and_load():
    assert burnish.__all__ == sorted(burnish.__all__)
    for name in burnish.__all__:
        assert getattr(burnish, name) is not None
    assert set(burnish.__all__) <= set(dir(burnish))


def test_public_names_are_the_ones_of_their_modules():
    for module, names in burnish._HOMES.items():
        for name in names:
            assert name in import_module(module).__all__
            assert getattr(burnish, name) is getattr(import_module(module), name)
    for name, module in TRAINER_NAMES.items():
        assert name in import_module(f"burnish.trainers.{module}").__all__
        assert getattr(burnish, name) is getattr(import_module(f"burnish.trainers.{module}"), name)
    assert {*burnish._HOME_OF, *TRAINER_NAMES, "__version__"} == set(burnish.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'DPOTrainr'"):
        burnish.DPOTrainr  # noqa: B018


def test_submodule_is_not_shadowed():
    assert import_module("burnish.evaluation.evaluate").__name__ == "burnish.evaluation.evaluate"


def test_package_is_typed():
    assert Path(burnish.__file__).with_name("py.typed").is_file()


def test_every_module_declares_its_names():
    root = Path(burnish.__file__).parent
    modules = [path for path in root.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    assert modules
    for path in modules:
        module = import_module(".".join(("burnish", *path.relative_to(root).with_suffix("").parts)))
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__), module.__name__


def test_the_docs_list_every_algorithm() -> None:
    from burnish.config import ALGORITHMS

    text = (Path(__file__).parent.parent / "docs" / "algorithms.md").read_text()
    for name, row in ALGORITHMS.items():
        line = next((line for line in text.splitlines() if line.startswith(f"| `{name}` |")), "")
        assert line.endswith(f"| {row.paper} |"), name


def test_compiled_kernels_are_bounded_and_what_is_set_outside_stays(monkeypatch: pytest.MonkeyPatch):
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    code = f"import os, burnish.trainers.sft; print(*(os.environ[name] for name in {names}))"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert python(code) == "1 128"
    monkeypatch.setenv(names[1], "7")
    assert python(code) == "1 7"
