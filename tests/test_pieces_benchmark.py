"""The benchmark of the memory stack's pieces: it measures every piece that the planner can choose, and it runs."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import burnish.planner.proposals
import tiny
from burnish.planner.models import FoundModel, find_shape

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import memory_pieces as pieces  # noqa: E402

SIZES = pieces.Sizes(40, 12, 4, 70, 2, 6, 4)


def test_every_piece_that_the_planner_chooses_from_is_measured() -> None:
    """All fields that a proposal can set, as the source of the proposals names them, under whatever condition."""
    source = Path(burnish.planner.proposals.__file__).read_text(encoding="utf-8")
    (options,) = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "_options"
    )
    offered = {
        key.value
        for node in ast.walk(options)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    assert "gradient_checkpointing" in offered, "the options have moved: say where they are now"
    measured = {
        name
        for piece in pieces.pieces(pieces.Setting(find_shape(pieces.MODEL), pieces.Sizes()))
        for name in piece.fields
    }
    assert offered - measured == pieces.NOT_MEASURED.keys(), "add a piece to benchmarks/memory_pieces.py"
    assert measured <= offered


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("bitsandbytes")
    model = tiny.model("llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    found = FoundModel.of(model.config.to_dict(), "tiny", "tiny")
    folder = str(tmp_path_factory.mktemp("pieces"))
    shop = pieces.Workshop(model, tiny.tokenizer(), pieces.Setting(found, SIZES), folder)
    return [pieces.measure(shop, piece, 1) for piece in pieces.pieces(shop.setting)]


def test_all_pieces_are_measured(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["ratio"]["min"] > 0
        assert row["planned_ratio"] > 0
        assert min(row["bytes"].values()) > 0
        assert row["planned_bytes"].keys() == row["bytes"].keys()
    assert json.loads(json.dumps(rows)) == rows
    assert pieces.table(rows).count("\n") == len(rows) + 1
    assert len(pieces.draw(rows).axes) == 2


def test_pieces_are_on_and_off(rows: list[dict[str, Any]]) -> None:
    by_name = {row["piece"]: row for row in rows}
    for name in (
        "gradient_checkpointing", "mlp_tiles = 8, no checkpoints", "embedding_offloading", "rollout_cache_dtype = int8",
        "rollout_cache_gib",
    ):  # fmt: skip
        assert pieces.saved(by_name[name]) > 0, name
    moved = by_name["embedding_offloading"]["host_bytes"]
    rows_read = SIZES.prompt + SIZES.group * SIZES.completion
    assert moved["on"] - moved["off"] == 2 * tiny.SIZES["hidden_size"] * (tiny.SIZES["vocab_size"] + rows_read)


def test_disagreements_are_those_that_all_pairs_show() -> None:
    def row(name: str, least: float, most: float, planned: float) -> dict[str, Any]:
        return {"piece": name, "phase": "update", "ratio": {"min": least, "max": most}, "planned_ratio": planned}

    rows = [row("a", 1.2, 1.3, 1.0), row("b", 1.0, 1.1, 1.5), row("c", 1.1, 1.6, 1.1), row("d", 1.4, 1.5, 2.0)]
    assert pieces.disagreements(rows) == [("a", "b")]
