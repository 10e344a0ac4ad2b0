"""Files of rows that are broken as files, and what a run, a report or an evaluation reads back."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from burnish.data import load_rows
from nonsense.cases import Case, command

ROW: dict[str, Any] = {"prompt": "1+1=", "completion": "2"}
_LINE = json.dumps(ROW)
_DIGITS = "9" * 5000
_DEEP = "[" * 100_000 + "]" * 100_000


def _parquet(table: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()


_GOOD_PARQUET = _parquet(pyarrow.table({"prompt": ["1+1="], "completion": ["2"]}))
_GOOD_CSV = b"prompt,completion\n1+1=,2\n"

_JSON: dict[str, bytes] = {
    "nothing": b"", "a space": b" ", "line breaks": b"\n\n\n", "null": b"null\n", "a number": b"5\n", "text": b'"x"\n',
    "true": b"true\n", "half an object": b'{"prompt": "a"', "half a text": b'{"prompt": "a',
    "a comma too many": b'{"a": 1,}',
    "single quotes": b"{'prompt': 'a'}", "a comment": b"// rows\n", "a key twice": b'{"a": 1, "a": 2}',
    "a key twice, below": b'{"a": {"b": 1, "b": 2}}', "an empty list": b"[]", "a list of lists": b"[[1]]",
    "a list of numbers": b"[1]", "a list of nulls": b"[null]", "NUL": b"\0", "NULs": bytes(1000),
    "an int of 5,000 digits": f'{{"prompt": {_DIGITS}}}'.encode(), "a list in a list": b"[[{}]]",
    "100,000 deep": f'{{"prompt": {_DEEP}}}'.encode(),
    "100,000 deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "latin-1": '{"prompt": "é"}'.encode("latin-1"), "UTF-16": _LINE.encode("utf-16"), "UTF-32": _LINE.encode("utf-32"),
    "random bytes": bytes(range(256)), "gzip": gzip.compress(_LINE.encode()), "Parquet": _GOOD_PARQUET,
    "CSV": _GOOD_CSV,
    "two objects in a line": b'{"a": 1} {"a": 2}', "trailing text": b'{"a": 1} x', "a bad escape": b'{"a": "\\q"}',
    "half an escape": b'{"a": "\\ud8"}', "a line break in a text": b'{"a": "b\nc"}',
    "a tab in a text": b'{"a": "b\tc"}',
    "an unquoted key": b"{a: 1}", "a key of a number": b"{1: 2}", "undefined": b'{"a": undefined}',
    "half a character of UTF-8": b'{"a": "\xe2\x82"}', "an overlong character": b'{"a": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"a": "\xed\xa0\xbd"}', "1e400": b'{"a": 1e400', "+1": b'{"a": +1}', "01": b'{"a": 01}',
}  # fmt: skip
"""Refused as .json and as .jsonl."""

_LINES_MAY: dict[str, bytes] = {
    "a good row": _LINE.encode(), "without an end of line": _LINE.encode(), "CRLF": (_LINE + "\r\n").encode() * 2,
    "a byte order mark": b"\xef\xbb\xbf" + _LINE.encode(), "empty lines between": (_LINE + "\n\n\n").encode() * 3,
    "U+2028": json.dumps({"prompt": "a\u2028b\u0085c", "completion": "2"}, ensure_ascii=False).encode() + b"\n",
    "NaN": b'{"prompt": NaN, "completion": 1}\n', "an escaped half character": b'{"prompt": "a\\ud83d"}\n',
    "an empty object": b"{}\n", "an empty key": b'{"": 1}\n', "an escaped NUL": b'{"prompt": "a\\u0000b"}\n',
    "900 deep": b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a long line": json.dumps({"prompt": "a" * 10**6}).encode(),
}  # fmt: skip

_CSV: dict[str, bytes] = {
    "nothing": b"", "a header": b"prompt,completion\n", "a line break": b"\n", "a cell too many": b"a,b\n1,2,3\n",
    "a cell too few": b"a,b\n1\n", "half a quote": b'a,b\n"1,2\n', "a quote inside": b'a,b\n"1"x,2\n',
    "a column twice": b"a,a\n1,2\n",
    "an empty column twice": b",\n1,2\n", "latin-1": "a\né\n".encode("latin-1"),
    "UTF-16": "a,b\n1,2\n".encode("utf-16"),
    "NUL": b"a,b\n1,\0\n", "NULs": bytes(100), "gzip": gzip.compress(_GOOD_CSV), "Parquet": _GOOD_PARQUET,
    "a cell of 200,000 characters": b"a\n" + b"x" * 200_000 + b"\n", "random bytes": bytes(range(256)),
    "semicolons": b"prompt;completion\na;b\n", "tabs": b"prompt\tcompletion\na\tb\n",
    "bars": b"prompt|completion\na|b\n", "two delimiters": b"a;b,c\n1;2,3\n", "tabs and commas": b"a\tb,c\n",
    "semicolons, a cell too few": b"a;b\n1\n", "bars, half a quote": b'a|b\n"1|2\n',
    "a line of latin-1 among thousands": b"a;b\n" + b"1;2\n" * 5000 + "é;1\n".encode("latin-1"),
}  # fmt: skip

_PARQUET: dict[str, bytes] = {
    "nothing": b"", "the magic alone": b"PAR1", "the magic twice": b"PAR1PAR1", "JSON": _LINE.encode(),
    "NULs": bytes(1000),
    "no rows": _parquet(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})),
    "no columns": _parquet(pyarrow.table({})), "random bytes": bytes(range(256)) * 8,
    "a column twice": _parquet(pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["x",
    "x"])),
    **{f"cut after {part}/8": _GOOD_PARQUET[: len(_GOOD_PARQUET) * part // 8] for part in range(1, 8)},
    **{f"without its first {count} bytes": _GOOD_PARQUET[count:] for count in (1, 4, 20)},
}  # fmt: skip

_RUN_FILES = (
    "metrics.jsonl", "transcripts.jsonl", "evaluations.json", "config.json", "environment.json", "status.json",
)  # fmt: skip

_RECORDS: tuple[Any, ...] = (
    None, 5, "x", [], {}, [1], {"stage": 5}, {"step": "x"}, {"step": None, "loss": "x"}, {"stage": "sft",
    "step": 10**30},
    {"stage": ["sft"], "step": 1}, {"stage": "sft", "step": -1, "loss": [1]}, {"stage": "sft", "step": 1.5},
    {"stage": "grpo", "step": 1, "prompt": 5, "completion": None, "rewards": "x"}, {"stage": "<script>", "step": 1},
    {"evaluations": 5}, {"evaluations": [5]}, {"evaluations": [{}]}, {"evaluations": [{"name": 5, "criteria": 5}]},
    {"evaluations": [{"name": "a", "criteria": {"x": 5}}], "comparisons": 5}, {"comparisons": [{"metric": 5}]},
    {"evaluations": [{"name": "a", "pass_at_k": {"x": {}}}]}, {"evaluations": [{"name": "a", "pass_at_k": [1]}]},
    {"stage": "sft", "step": 1, "loss": True}, {"stage": "sft", "step": True}, {"": {"": {"": []}}},
    {"stage": "sft", "step": 1, "loss": "1e400"}, {"prompt": {"role": 5}}, {"prompt": [{"content": {}}]},
    {"state": 5}, {"state": ["running"]}, {"state": "running"}, {"state": "failed", "step": "x", "max_steps": []},
    {"state": "stopped", "error": 5, "reason": [], "part": 5}, {"state": "running", "part": "../..", "step": -1},
    {"state": "running", "part": "a\0b"}, {"state": "running", "part": "x" * 5000, "step": 10**30},
    {"criteria": [5], "total": "x", "step": 1}, {"criteria": {"a": {"b": 1}}, "total": [1], "step": {}},
)  # fmt: skip


_EVALUATION: dict[str, Any] = {
    "name": "a", "solved": "exact", "num_samples": 2, "seed": 0, "params": {}, "errors": [],
    "problems": [{"key": "k", "num_graded": 2, "num_solved": 1, "num_failed": 0, "num_truncated": 0, "mean_tokens": 3.0,
                  "criteria": {"exact": 0.5}}],
    "pass_at_k": {"1": {"mean": 0.5, "low": 0.0, "high": 1.0, "num": 1, "level": 0.95}},
    "criteria": {"exact": {"mean": 0.5, "low": 0.0, "high": 1.0, "num": 1, "level": 0.95}},
    "mean_completion_tokens": 3.0, "truncated_fraction": 0.0, "num_failed": 0,
}  # fmt: skip


def _changed_evaluations() -> Iterator[tuple[str, dict[str, Any]]]:
    """One entry at a time of another type, or gone."""
    for name, good in _EVALUATION.items():
        yield f"without {name}", {key: value for key, value in _EVALUATION.items() if key != name}
        for value in (None, "x", 5, [], {}, [1], {"a": 1}, [[]], [{}]):
            fits = type(value) is type(good) and value in ("x", 5, [], {})
            fits = fits or (name == "params" and isinstance(value, dict)) or (isinstance(good, float) and value == 5)
            if not fits:
                yield f"{name} = {value!r}", {**_EVALUATION, name: value}
    for table, row in (("problems", _EVALUATION["problems"][0]), ("pass_at_k", _EVALUATION["pass_at_k"]["1"])):
        for name in row:
            for value in (None, "x", [], {"a": "b"}, True):
                changed = {**row, name: value}
                if not (name == "key" and value == "x"):
                    put: Any = [changed] if table == "problems" else {"1": changed}
                    yield f"{table}.{name} = {value!r}", {**_EVALUATION, table: put}


def cases() -> Iterator[Case]:
    """Files by suffix, then what `burnish report` and `burnish eval` read back."""
    for name, content in _JSON.items():
        for suffix in (".json", ".jsonl"):
            fine = suffix == ".json" and name in ("line breaks in a list",)
            yield Case(
                "rows in JSON", f"{name} in {suffix}", partial(_rows, f"r{suffix}", content), None if fine else True
            )
            also = _LINE.encode() + b"\n" + content
            if suffix == ".jsonl" and name not in ("nothing", "a space", "line breaks"):
                yield Case("rows in JSON", f"a good row, then {name}", partial(_rows, "r.jsonl", also),
                names="r.jsonl:2"
                           if content.isascii() and b"\0" not in content else "")  # fmt: skip
    for name, content in _LINES_MAY.items():
        yield Case("rows in JSON", f"{name} in .jsonl", partial(_rows, "r.jsonl", content), None)
        listed = b"[" + content.removeprefix(b"\xef\xbb\xbf").strip().split(b"\n")[0] + b"]"
        yield Case("rows in JSON", f"{name} in .json", partial(_rows, "r.json", listed), None)
    for name, content in _CSV.items():
        may = name in ("semicolons", "tabs", "bars", "NUL", "an empty column twice", "a cell of 200,000 characters")
        for file in ("r.csv", "r.tsv"):
            yield Case(
                "rows in CSV",
                f"{name} in {file}",
                partial(_rows, file, content),
                None if may else True,
                names=file if content else "",
            )
    for delimiter in b",;\t|":
        content = _GOOD_CSV.replace(b",", bytes([delimiter]))
        for file, written in itertools.product(
            ("r.csv", "r.tsv"), (content, content.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + content)
        ):
            yield Case("rows in CSV", f"{written!r} in {file}", partial(_columns, file, written), False)
    for name, content in _PARQUET.items():
        yield Case("rows in Parquet", name, partial(_rows, "r.parquet", content))
    yield Case("rows in Parquet", "good", partial(_rows, "r.parquet", _GOOD_PARQUET), False)
    for place in ("folder.jsonl", "loop.jsonl", "missing/*.jsonl", "*.nope", "r.jsonl/x", "folder", "saved", "[",
    "**", "/dev/null",
                  "~nobody/r.jsonl", "r.JSONL", "r.jsonl ", "."):  # fmt: skip
        yield Case("rows in a place", place, partial(_place, place))
    for split in (None, "train", "nope", ""):
        yield Case("rows in a place", f"a broken saved data set, split {split}", partial(_place, "saved", split))
    for file in _RUN_FILES:
        for i, record in enumerate(_RECORDS):
            yield Case(
                "report", f"{file} {i}: {record!r:.60}", partial(_report, file, json.dumps(record).encode()), False
            )
        for name, content in _JSON.items():
            yield Case("report", f"{file}: {name}", partial(_report, file, content), False)
    yield Case("earlier evaluation", "good", partial(_compare, json.dumps(_EVALUATION).encode()), False)
    for name, changed in _changed_evaluations():
        yield Case("earlier evaluation", name, partial(_compare, json.dumps(changed).encode()))
    for name, content in _JSON.items():
        yield Case("earlier evaluation", name, partial(_compare, content))
    for i, record in enumerate(_RECORDS):
        yield Case("earlier evaluation", f"{i}: {record!r:.60}", partial(_compare, json.dumps(record).encode()))


def _rows(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    load_rows({"path": name}, "data.train")


def _columns(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    assert list(load_rows({"path": name})[0]) == ["prompt", "completion"]


def _place(path: str, split: str | None = None) -> None:
    Path("r.jsonl").write_text(_LINE + "\n")
    Path("folder.jsonl").mkdir()
    Path("folder").mkdir()
    Path("saved").mkdir()
    Path("saved", "state.json").write_text("{")
    Path("saved", "dataset_info.json").write_text("[]")
    Path("loop.jsonl").symlink_to("loop.jsonl")
    load_rows({"path": path} if split is None else {"path": path, "split": split}, "data.train")


def _report(name: str, content: bytes) -> None:
    """A page in every case: what is cut or odd becomes a note."""
    Path("run").mkdir()
    Path("run", "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "loss": 1.0}\n')
    Path("run", name).write_bytes(content)
    command("report", "run")
    assert math.isfinite(Path("run", "report.html").stat().st_size)


def _compare(content: bytes) -> None:
    from burnish.runs.files import read_json

    Path("before.json").write_bytes(content)
    from burnish.evaluation.evaluate import Evaluation, compare

    compare(Evaluation.from_dict(read_json(Path("before.json"), {})), Evaluation.from_dict(_EVALUATION))
