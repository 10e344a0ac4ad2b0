"""Files of rows: delimiters, encodings and broken JSON, each named with its line."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from burnish.data import load_rows
from burnish.errors import DataError

ROWS = [{"prompt": "a, b", "completion": "c; d"}, {"prompt": 'say "x"\nand | y', "completion": "1\t2"}]


def delimited(delimiter: str, end: str = "\n") -> str:
    """The rows with every cell quoted and the header plain."""
    quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row.values()] for row in ROWS]
    return end.join(delimiter.join(cells) for cells in [list(ROWS[0]), *quoted]) + end


def read(file: Path, content: str | bytes) -> list[dict[str, object]]:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_rows({"path": str(file)}, "data.train")


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize(
    ("delimiter", "name"), [(",", "commas"), (";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")]
)
def test_the_delimiter_is_the_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, delimiter: str, name: str
) -> None:
    file = tmp_path / f"rows.{suffix}"
    assert read(file, delimited(delimiter)) == ROWS
    said = capsys.readouterr().err
    usual = {"csv": ",", "tsv": "\t"}[suffix]
    assert said == (
        "" if delimiter == usual else f"[burnish] {file}: cells are read as separated by {name}, as in its header\n"
    )
    marked = b"\xef\xbb\xbf" + delimited(delimiter, end="\r\n").encode()
    assert [list(row) for row in read(file, marked)] == [["prompt", "completion"]] * 2, "byte order mark and CRLF"


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("text\na;b|c\n", [{"text": "a;b|c"}]),
        ("text\nx\n", [{"text": "x"}]),
        ('"a;b",c\n1;2,3\n', [{"a;b": "1;2", "c": "3"}]),
        ("a;b,c\n1,2\n3;4,5\n", [{"a;b": "1", "c": "2"}, {"a;b": "3;4", "c": "5"}]),
        ("a;b,c;d\n1,5;2;3\n4;5;6\n", [{"a": "1,5", "b,c": "2", "d": "3"}, {"a": "4", "b,c": "5", "d": "6"}]),
        ("a;b\n1,5;2\n", [{"a": "1,5", "b": "2"}]),
        ("a;b\n" + "1;2\n" * 300 + '"x\ny";3\n', [*[{"a": "1", "b": "2"}] * 300, {"a": "x\ny", "b": "3"}]),
        ('a;b\n"' + "x\n" * 300 + '";3\n', [{"a": "x\n" * 300, "b": "3"}]),
    ],
)
def test_one_reading_of_the_header_and_the_first_rows(tmp_path: Path, content: str, rows: list[dict[str, str]]) -> None:
    assert read(tmp_path / "rows.csv", content) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a;b,c\n", "header and first rows can be read as separated by commas or by semicolons: put quotes around"),
        ("a;b,c\n1;2,3\n4;5,6\n", "can be read as separated by commas or by semicolons"),
        ("a;b,c\n1\n", "can be read as separated by commas or by semicolons"),
        (
            "a;b\n1;2\n\n1;2;3\n",
            r"rows\.csv:4: row 3 has more or fewer cells than the header, read as separated by sem",
        ),
        ("a|b\n1\n", r"rows\.csv:2: row 2 has more or fewer cells than the header, read as separated by vertical bars"),
        ('a;b\n1;2\n"3;4\n5;6\n', r"rows\.csv:3 is not CSV: unexpected end of data"),
        ("a;a\n1;2\n", "has the column 'a' twice"),
    ],
)
def test_no_row_is_read_in_two_ways(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "rows.csv", content)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl"])
def test_files_of_lines_are_read_once(tmp_path: Path, name: str) -> None:
    """What comes through a pipe is gone after it was read; the head of the file is looked at before the rest."""
    line = '{"a": "1", "b": "2"}\n' if name == "rows.jsonl" else "1;2\n"
    content = ("" if name == "rows.jsonl" else "a;b\n") + line * 50_000
    os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=lambda: (tmp_path / name).write_text(content))
    writer.start()
    rows = load_rows({"path": str(tmp_path / name)})
    writer.join()
    assert rows == [{"a": "1", "b": "2"}] * 50_000


@pytest.mark.parametrize(
    ("name", "line"), [("rows.csv", "a,b\n"), ("rows.jsonl", '{"a": 1}\n'), ("rows.json", '[{"a":\n\n1}]\n')]
)
def test_the_line_that_is_not_utf_8(tmp_path: Path, name: str, line: str) -> None:
    """Also beyond what is read at once."""
    many = line.encode() * 40_000
    number, place = many.count(b"\n") + 1, len(many) + 1
    with pytest.raises(DataError, match=rf"{name}:{number} is not UTF-8 \(invalid .* at byte {place}\): save it as"):
        read(tmp_path / name, many + "xé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"is not UTF-8 but UTF-16: save it as UTF-8"):
        read(tmp_path / name, line.encode("utf-16"))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"a": 1, "a": 2}', " has the key 'a' twice: rename or remove one"),
        ('{"a": {"b": 1, "b": 2}}', " has the key 'b' twice: rename or remove one"),
        (f'{{"a": {"9" * 5000}}}', " holds a number with too many digits: write it as a string"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", " is JSON nested too deeply: flatten it, or drop the row"),
        ('{"a": 1', " is not JSON: "),
    ],
)
def test_broken_json_is_said_once(tmp_path: Path, name: str, value: str, message: str) -> None:
    file = tmp_path / name
    with pytest.raises(DataError) as caught:
        read(file, f"[{value}]" if name == "rows.json" else f'{{"a": 1}}\n{value}\n')
    where = str(file) if name == "rows.json" else f"{file}:2"
    assert str(caught.value).startswith(where + message)
