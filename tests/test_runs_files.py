"""Files of a run: whole or not at all, lines end at line feeds only, and errors name the file."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from burnish.errors import BurnishError, FileError
from burnish.runs.files import (
    append_json_lines,
    filter_json_lines,
    read_json,
    read_json_lines,
    replacing,
    write_json,
    writing,
)

ODD_TEXTS = ["\u2028", "\u0085", "\x0b\x0c\x1c", " \t ", "\ud800", "\r\n", "\0", '"\\']


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_survives_a_line(tmp_path, text):
    file = tmp_path / "a" / "lines.jsonl"
    append_json_lines(file, [{"text": text}, {"text": "next"}])
    assert [record["text"] for record in read_json_lines(file)] == [text, "next"]
    filter_json_lines(file, lambda record: record["text"] == text)
    assert [record["text"] for record in read_json_lines(file)] == [text]


def test_values_unknown_to_json_become_text(tmp_path):
    file = tmp_path / "value.json"
    write_json(file, {"when": datetime.date(2020, 1, 2), "pairs": {(1, 2): 3}})
    assert read_json(file) == {"when": "2020-01-02", "pairs": {"(1, 2)": 3}}


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "te')
    append_json_lines(file, [{"step": 3}])
    assert [record["step"] for record in read_json_lines(file)] == [1, 3]


def test_lines_that_are_no_records_are_skipped(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"a": 1}\n\n[1]\n\xff\xfe\n3\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    assert list(read_json_lines(file)) == [{"a": 1}, {"a": 2}]


def test_a_draft_that_fails_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "value.json"
    write_json(file, [1])
    with pytest.raises(ZeroDivisionError), replacing(file) as stream:
        stream.write(f"half {1 / 0}")
    assert read_json(file) == [1]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("write", [lambda f: write_json(f, 1), lambda f: append_json_lines(f, [{}])])
def test_a_file_where_a_folder_should_be_is_a_clear_error(tmp_path, write):
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileError, match=r"taken.*cannot be written") as caught:
        write(tmp_path / "taken" / "file")
    assert isinstance(caught.value, BurnishError)
    assert isinstance(caught.value, OSError)


def test_a_full_disk_is_a_clear_error(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(FileError, match="No space left"), writing(tmp_path / "file"):
        Path("/dev/full").write_text("x")


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\ud800"])
def test_what_is_not_json_is_named(tmp_path, content):
    file = tmp_path / "value.json"
    file.write_text(content, errors="surrogatepass")
    with pytest.raises(FileError, match="not a JSON file"):
        read_json(file)


def test_a_missing_file_is_the_default(tmp_path):
    assert read_json(tmp_path / "none", 5) == 5
    assert list(read_json_lines(tmp_path / "none")) == []


def test_lines_are_plain_json(tmp_path):
    file = tmp_path / "lines.jsonl"
    append_json_lines(file, [{"a": "é"}])
    assert file.read_text(encoding="utf-8") == '{"a": "é"}\n'
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": "é"}
