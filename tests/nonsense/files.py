"""Run files that are broken as files: syntax, encodings, sizes, YAML's traps, words of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from burnish.cli.config import load_pipeline_file, load_run_file
from nonsense.cases import Case, command

TOML = 'model = "./nowhere"\n[data]\ntrain = { path = "rows.jsonl" }\n'
YAML = "model: ./nowhere\ndata: {train: {path: rows.jsonl}}\n"

_DIGITS = "9" * 5000
_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
_MERGE_BOMB = "m0: &m0 {x: 1}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)

_TOML: dict[str, str] = {
    "a key twice": TOML + "[data]\n",
    "a table twice": TOML + "[training]\n[training]\n",
    "half a line": 'model = "x',
    "half a table": TOML + "[training",
    "no value": "model =\n",
    "an int of 5,000 digits": TOML + f"[training]\nmax_steps = {_DIGITS}\n",
    "a hexadecimal int of 5,000 digits": TOML + f"[training]\nmax_steps = 0x{'f' * 5000}\n",
    "a float of 5,000 digits": TOML + f"[training]\nlearning_rate = {_DIGITS}.0\n",
    "a float beyond the largest": TOML + "[training]\nlearning_rate = 1e400\n",
    "a date": TOML + "[training]\nmax_steps = 2024-02-03\n",
    "a date that does not exist": TOML + "[training]\nmax_steps = 2024-13-45\n",
    "a time": TOML + "[training]\nmax_steps = 12:30:00\n",
    "arrays 100 deep": TOML + f"[training]\nmax_steps = {'[' * 100}{']' * 100}\n",
    "arrays 20,000 deep": TOML + f"[training]\nmax_steps = {'[' * 20000}{']' * 20000}\n",
    "tables 100 deep": TOML + "[training" + ".a" * 100 + "]\n",
    "tables 5,000 deep": TOML + "[training" + ".a" * 5000 + "]\n",
    "inline tables 5,000 deep": TOML + f"[training]\nseed = {'{a=' * 5000}1{'}' * 5000}\n",
    "100,000 keys": TOML + "[training]\n" + "".join(f"k{i} = 1\n" for i in range(100_000)),
    "a key of 100,000 characters": TOML + f"[training]\n{'k' * 100_000} = 1\n",
    "a value of 100,000 characters": TOML + f'[training]\nmax_steps = "{"v" * 100_000}"\n',
    "a name of 100,000 characters": f'model = "{"m" * 100_000}"\n[data]\ntrain = {{ path = "rows.jsonl" }}\n',
    "NUL in a value": 'model = "a\\u0000b"\n[data]\ntrain = { path = "rows.jsonl" }\n',
    "NUL in a key": TOML + '[training]\n"a\\u0000b" = 1\n',
    "NUL in the text": TOML + "\0",
    "an empty key": TOML + '"" = 1\n',
    "nothing": "",
    "a comment": "# nothing\n",
    "YAML": YAML,
    "JSON": '{"model": "x"}',
    "mixed arrays": TOML + '[training]\nmax_steps = [1, "a", [2.0]]\n',
    "a table where a value stands": 'model = "x"\n[model.more]\n[data]\ntrain = { path = "rows.jsonl" }\n',
    "an array of tables where a table stands": TOML + "[[training]]\nmax_steps = 1\n",
    "a table where an array of tables stands": TOML + '[rubric]\nkind = "exact"\n',
    "no tables": "1\n",
}

_YAML: dict[str, str] = {
    "a key twice": YAML + "model: x\n",
    "a key twice, below": YAML + "training: {max_steps: 1, max_steps: 2}\n",
    "half a line": "model: 'x",
    "half a list": "model: [x",
    "tabs": "model: x\ntraining:\n\tmax_steps: 1\n",
    "aliases that multiply": _BOMB + YAML,
    "aliases that multiply, in a table": YAML + "training:\n" + "".join(f"  {x}\n" for x in _BOMB.splitlines()),
    "merges that multiply": _MERGE_BOMB + YAML,
    "an alias of itself": YAML + "training: &a [*a]\n",
    "an alias of itself in a table": YAML + "training: &a {max_steps: *a}\n",
    "an alias of nothing": YAML + "training: *nothing\n",
    "a merge of text": YAML + "training: {<<: x}\n",
    "a merge of itself": YAML + "training: &a {<<: *a}\n",
    "lists 100 deep": YAML + f"training: {{max_steps: {'[' * 100}{']' * 100}}}\n",
    "lists 5,000 deep": YAML + f"training: {{max_steps: {'[' * 5000}{']' * 5000}}}\n",
    "an int of 5,000 digits": YAML + f"training: {{max_steps: {_DIGITS}}}\n",
    "an octal int of 5,000 digits": YAML + f"training: {{max_steps: 0{'7' * 5000}}}\n",
    "a date that does not exist": YAML + "training: {max_steps: 2024-13-45}\n",
    "a date": YAML + "training: {max_steps: 2024-02-03}\n",
    "a key that is a number": YAML + "1: x\n",
    "a key that is a number, below": YAML + "training: {1: x}\n",
    "a key that is true": YAML + "training: {true: x}\n",
    "a key that is null": YAML + "training: {null: x}\n",
    "a key that is a date": YAML + "training: {2024-01-01: x}\n",
    "a key that is a list": YAML + "training: {[a]: x}\n",
    "a key that is a number, in data": "model: x\ndata: {train: {path: rows.jsonl, columns: {1: prompt}}}\n",
    "a key that is a number, in a rubric": YAML + "rubric: [{1: exact}]\n",
    "two documents": YAML + "---\n" + YAML,
    "a list": "- model\n",
    "text": "model\n",
    "a number": "5\n",
    "nothing": "",
    "an unknown anchor tag": YAML + "training: !nope {max_steps: 1}\n",
    "a value of null": "model: null\ndata: {train: {path: rows.jsonl}}\n",
    "binary data": YAML + "training: {max_steps: !!binary aGVsbG8=}\n",
    "a set": YAML + "training: !!set {max_steps}\n",
    "ordered pairs": YAML + "training: !!omap [max_steps: 1]\n",
    "an escape that is half a character": 'model: "\\ud800"\ndata: {train: {path: rows.jsonl}}\n',
    "NUL": 'model: "\\0"\ndata: {train: {path: rows.jsonl}}\n',
    "control characters": "model: a\x01b\n",
    "an infinite number": YAML + "training: {learning_rate: .inf}\n",
    "not a number": YAML + "training: {learning_rate: .nan}\n",
    "100,000 keys": YAML + "training:\n" + "".join(f"  k{i}: 1\n" for i in range(100_000)),
    "a value of 100,000 characters": YAML + f"training: {{max_steps: {'v' * 100_000}}}\n",
    **{
        f"!!{tag}": YAML + f"training: {{max_steps: !!{tag} {value}}}\n"
        for tag, value in (
            ("int", "abc"), ("int", "''"), ("float", "abc"), ("bool", "maybe"), ("timestamp", "abc"), ("null", "abc"),
            ("binary", "'***'"), ("set", "abc"), ("omap", "abc"), ("pairs", "abc"), ("seq", "abc"), ("map", "abc"),
            ("python/object/apply:os.system", "[ls]"), ("python/name:os.system", "''"), ("python/tuple", "[1]"),
            ("python/object/new:os.system", "[ls]"), ("python/module:os", "''"), ("value", "x"), ("merge", "x"),
        )
    },
}  # fmt: skip

_BYTES: dict[str, bytes] = {
    "latin-1": 'model = "é"\n'.encode("latin-1"),
    "UTF-16": TOML.encode("utf-16"),
    "UTF-32": TOML.encode("utf-32"),
    "random bytes": bytes(range(256)) * 4,
    "a gzip file": b"\x1f\x8b\x08\x00" + bytes(40),
    "a half character": TOML.encode() + b"# \xe2\x82",
    "NULs": bytes(1000),
}

_GOOD_TOML = TOML + "[training]\nmax_steps = 1\nbf16 = false\nuse_cpu = true\n"
_ACCEPTED: dict[str, bytes] = {
    "run.toml": _GOOD_TOML.encode(),
    "bom.toml": b"\xef\xbb\xbf" + _GOOD_TOML.encode(),
    "crlf.toml": _GOOD_TOML.replace("\n", "\r\n").encode(),
    "run.yaml": YAML.encode(),
    "bom.yaml": b"\xef\xbb\xbf" + YAML.encode(),
    "crlf.yml": YAML.replace("\n", "\r\n").encode(),
    "alias.yaml": b"shared: &s {path: rows.jsonl}\n"[:0] + b"model: x\ndata: {train: &s {path: a.jsonl}, eval: *s}\n",
    "merge.yaml": b"model: x\ndata: {train: &s {path: a.jsonl}, eval: {<<: *s, limit: 3}}\n",
}

_WORDS: dict[str, tuple[str, ...]] = {
    "no file": (),
    "two files": ("run.toml", "run.toml"),
    "an unknown flag without value": ("run.toml", "--nope"),
    "an override without a name": ("run.toml", "--=1"),
    "an override with an empty part": ("run.toml", "--training..max_steps=1"),
    "an override that ends in a dot": ("run.toml", "--training.=1"),
    "two dashes": ("run.toml", "--"),
    "a short flag": ("run.toml", "-x"),
    "an override into text": ("run.toml", "--model.a.b=1"),
    "an override into a list": ("run.toml", "--rubric.5.kind=exact"),
    "an override of null below nothing": ("run.toml", "--nope.nope=null"),
    "an override of 5,000 digits": ("run.toml", f"--training.max_steps={_DIGITS}"),
    "an override that nests 20,000 deep": ("run.toml", f"--training.max_steps={'[' * 20000}{']' * 20000}"),
    "an override that nests 200 deep": ("run.toml", f"--training.max_steps={'[' * 200}{']' * 200}"),
    "an override whose path is 5,000 deep": ("run.toml", f"--training{'.a' * 5000}=1"),
    "an override with half a character": ("run.toml", '--model="\\ud83d"'),
    "an override with bytes that are not UTF-8": ("run.toml", "--model=a\udce9"),
    "an override with NUL": ("run.toml", "--model=a\0b"),
    "an override with a line break": ("run.toml", "--training.max_steps=1\nseed = 2"),
    "an override of JSON's NaN": ("run.toml", "--training.learning_rate=NaN"),
    "an override of infinity": ("run.toml", "--training.learning_rate=inf"),
    "an override of nothing": ("run.toml", "--training.max_steps="),
    "an override of a whole table by a number": ("run.toml", "--training=5"),
    "an override of the rubric by a table": ("run.toml", '--rubric={kind="exact"}'),
    "an override of the model by a list": ("run.toml", "--model=[1]"),
    "an override of the index -1": ("run.toml", "--rubric.-1.kind=exact"),
    "an override of an index of 5,000 digits": ("run.toml", f"--rubric.{_DIGITS}.kind=exact"),
    "an override of a superscript index": ("run.toml", "--rubric.².kind=exact"),
    "a flag with a value": ("run.toml", "--debug=maybe"),
    "a path with NUL": ("run\0.toml",),
    "a path of 5,000 characters": ("r" * 5000 + ".toml",),
    "an empty path": ("",),
    "a folder": (".",),
    "a folder with the right suffix": ("folder.toml",),
    "a missing file": ("missing.toml",),
    "a file below a file": ("run.toml/run.toml",),
    "another suffix": ("run.json",),
    "no suffix": ("run",),
    "a link to itself": ("loop.toml",),
    "a device": ("/dev/null",),
}


def cases() -> Iterator[Case]:
    """Files for a stage and for a pipeline, and command lines."""
    for name, text in _TOML.items():
        yield from _file_cases("TOML", name, "run.toml", text.encode("utf-8", "surrogatepass"))
    for name, text in _YAML.items():
        yield from _file_cases("YAML", name, "run.yaml", text.encode("utf-8", "surrogatepass"))
    for name, content in _BYTES.items():
        for file in ("run.toml", "run.yaml"):
            yield from _file_cases("encoding", f"{name} in {file}", file, content)
    for file, content in _ACCEPTED.items():
        yield Case("good file", file, partial(_load, file, content, "sft"), refused=False)
    for name, words in _WORDS.items():
        for command_ in ("sft", "grpo", "pipeline", "eval"):
            yield Case("command line", f"{command_}: {name}", partial(_command, command_, words))
    for name, words in {
        "no command": (), "an unknown command": ("train",), "an empty command": ("",), "a flag": ("--nope",),
        "report of nothing": ("report",), "report of a missing folder": ("report", "missing"),
        "report of a file": ("report", "run.toml"), "report into a folder": ("report", "run", "--output", "run"),
        "report below a file": ("report", "run", "--output", "run.toml/x.html"),
        "report into nothing": ("report", "run", "--output", ""),
        "report into NUL": ("report", "run", "--output", "a\0b"),
        "report of NUL": ("report", "a\0b"),
        "report of a name too long": ("report", "r" * 5000),
        "report into a name too long": ("report", "run", "--output", "r" * 5000),
        "report of a negative number of transcripts": ("report", "run", "--max-transcripts", "-5"),
        "report of half a transcript": ("report", "run", "--max-transcripts", "0.5"),
        "report of 5,000 digits of transcripts": ("report", "run", "--max-transcripts", _DIGITS),
    }.items():  # fmt: skip
        yield Case("command line", name, partial(_command, None, words))


def _file_cases(family: str, name: str, file: str, content: bytes) -> Iterator[Case]:
    yield Case(family, f"{name} (sft)", partial(_load, file, content, "sft"))
    yield Case(family, f"{name} (pipeline)", partial(_load, file, content, "pipeline"))


def _load(file: str, content: bytes, kind: str) -> None:
    Path(file).write_bytes(content)
    if kind == "pipeline":
        load_pipeline_file(file, [])
    else:
        load_run_file(file, [], "sft")


def _command(name: str | None, words: tuple[str, ...]) -> None:
    Path("run.toml").write_text(_GOOD_TOML + '[[rubric]]\nkind = "exact"\n')
    Path("run.json").write_text("{}")
    Path("run").mkdir()
    Path("run", "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "loss": 1.0}\n')
    Path("folder.toml").mkdir()
    Path("loop.toml").symlink_to("loop.toml")
    command(*(() if name is None else (name,)), *words)
