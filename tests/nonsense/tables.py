"""The other tables of a file: sources, criteria, evaluation, pairs, adapters, model arguments, pipelines, reports."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from burnish.cli.config import load_pipeline_file, load_run_file
from burnish.config import lora_fields
from nonsense.cases import Case
from nonsense.values import BAD_PATHS, bad_values

_ROWS = {"path": "rows.jsonl"}
_GYM = {"source": "reasoning_gym", "task": "chain_sum", "size": 4}

_SECTIONS: dict[str, dict[str, str]] = {
    "evaluation": {
        "num_samples": "int", "ks": "list[int]", "temperature": "float", "max_completion_length": "int",
        "solved": "str | None",
        "output": "str | None", "compare_with": "str | None",
    },
    "pairs": {
        "output_dir": "str", "num_samples": "int", "temperature": "float", "max_completion_length": "int",
        "pairs_per_prompt": "int", "min_margin": "float", "min_reward": "float | None", "seed": "int",
    },
    "report": {"path": "str", "max_transcripts": "int"},
    "model_init": {
        "attn_implementation": "str", "cache_dir": "str", "dtype": "str", "local_files_only": "bool", "revision": "str",
        "subfolder": "str", "trust_remote_code": "bool", "use_safetensors": "bool", "variant": "str",
        "device_map": "str | dict[str, Any]", "quantization_config": "str | dict[str, Any]",
    },
}  # fmt: skip

_VALUES: dict[str, tuple[dict[str, Any], ...]] = {
    "evaluation": (
        {"num_samples": 0}, {"num_samples": -1}, {"ks": []}, {"ks": [0]}, {"ks": [-1]}, {"ks": [9]}, {"ks": [1.5]},
        {"ks": [True]}, {"ks": [10**23]}, {"temperature": -1}, {"temperature": 0}, {"max_completion_length": 0},
        {"solved": "nope"}, {"solved": ""}, {"nope": 1}, {"Ks": [1]},
        *({"output": path} for _, path in (*BAD_PATHS, ("a folder", "."), ("a device", "/dev"))[:4]),
        {"output": "."}, {"output": "file/x.json"}, {"compare_with": ""},
    ),
    "pairs": (
        {"num_samples": 1}, {"num_samples": 0}, {"temperature": 0}, {"temperature": -1}, {"max_completion_length": 0},
        {"pairs_per_prompt": 0}, {"pairs_per_prompt": 5}, {"min_margin": -1}, {"seed": -1}, {"seed": 2**32},
        {"nope": 1},
        *({"output_dir": path} for _, path in BAD_PATHS),
    ),
    "report": ({"max_transcripts": -1}, {"nope": 1}, *({"path": path} for _, path in BAD_PATHS if path != "file"),
    {"path": "."}),
    "model_init": (
        {"nope": 1}, {"token": "x"}, {"dtype": "float33"}, {"dtype": ""}, {"attn_implementation": ""},
        {"quantization_config": "int3"}, {"quantization_config": ""}, {"quantization_config": {}},
        {"quantization_config": {"nope": 1}}, {"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}},
        {"quantization_config": {"load_in_4bit": 1}},
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "x"}},
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "x"}}, {"quantization_config": "nf4"},
    ),
    "peft": (
        {"r": 0}, {"r": -1}, {"lora_dropout": 1.5}, {"lora_dropout": -0.1}, {"lora_dropout": 1.0}, {"lora_alpha": 0},
        {"lora_alpha": -1}, {"bias": "some"}, {"init_lora_weights": "nope"}, {"target_modules": []},
        {"target_modules": ""}, {"target_modules": "("}, {"target_modules": "[a-"}, {"target_modules": [""]},
        {"target_modules": [1]}, {"modules_to_save": [1]}, {"modules_to_save": [""]}, {"layers_to_transform": [-1]},
        {"layers_to_transform": -5}, {"layers_to_transform": ["x"]}, {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": "x"}}, {"rank_pattern": {"(": 4}}, {"alpha_pattern": {"q_proj": "x"}},
        {"alpha_pattern": {"q_proj": -1}}, {"trainable_token_indices": [-1]}, {"trainable_token_indices": ["x"]},
        {"trainable_token_indices": {"embed_tokens": [1.5]}}, {"layer_replication": [[0, 1, 2]]},
        {"layer_replication": [[1, 0]]}, {"layer_replication": [["a", "b"]]}, {"task_type": "NOPE"}, {"task_type": ""},
        {"exclude_modules": "("}, {"layers_pattern": "layers"}, {"use_qalora": True, "qalora_group_size": 0},
        {"peft_type": "IA3"}, {"nope": 1}, {"rank": 8}, {"alpha": 8}, {"dropout": 0.1}, {"use_dora": "yes"},
        {"r": 10**12}, {"target_parameters": [1]}, {"target_parameters": [""]},
    ),
}  # fmt: skip

_SOURCES: tuple[Any, ...] = (
    {}, {"path": ""}, {"path": "rows.txt"}, {"path": "rows"}, {"path": 5}, {"path": True}, {"path": ["rows.jsonl"]},
    {"path": {}}, {"paths": "rows.jsonl"}, {**_ROWS, "source": "reasoning_gym"}, {**_ROWS, "mix": []},
    {**_ROWS, "nope": 1}, {**_ROWS, "limit": 0}, {**_ROWS, "limit": -1}, {**_ROWS, "limit": 1.5},
    {**_ROWS, "limit": "x"},
    {**_ROWS, "limit": True}, {**_ROWS, "limit": 10**23}, {**_ROWS, "columns": "prompt"}, {**_ROWS, "columns": ["a"]},
    {**_ROWS, "columns": {"a": 1}}, {**_ROWS, "columns": {"a": ""}}, {**_ROWS, "columns": {"": "a"}},
    {**_ROWS, "columns": {"a": ["b"]}}, {**_ROWS, "columns": {"a": None}}, {**_ROWS, "columns": {"a": "c", "b": "c"}},
    {**_ROWS, "columns": 5}, {**_ROWS, "split": 5}, {**_ROWS, "split": ["train"]},
    {**_ROWS, "prompt_template": 5}, {**_ROWS, "prompt_template": "no place"}, {**_ROWS, "prompt_template": "{"},
    {**_ROWS, "prompt_template": "{prompt"}, {**_ROWS, "prompt_template": "{prompt} {other}"},
    {**_ROWS, "prompt_template": "{prompt!z}"}, {**_ROWS, "prompt_template": "{prompt:d}"},
    {**_ROWS, "prompt_template": "{prompt:>99999999999}"}, {**_ROWS, "prompt_template": "{prompt.nope}"},
    {**_ROWS, "prompt_template": "{prompt[0]}"}, {**_ROWS, "prompt_template": "{prompt:{prompt}}"},
    {**_ROWS, "prompt_template": "{prompt:{width}}"}, {**_ROWS, "prompt_template": "{}"},
    {**_ROWS, "prompt_template": "{0}"}, {**_ROWS, "prompt_template": ""}, {**_ROWS, "prompt_template": "}"},
    {**_ROWS, "completion_template": "{"}, {**_ROWS, "completion_template": "{a!z}"},
    {**_ROWS, "completion_template": 5},
    {**_ROWS, "completion_template": "{}"}, {**_ROWS, "completion_template": "{0}"},
    {**_ROWS, "completion_template": ""}, {**_ROWS, "completion_template": "{a.__class__}"},
    {**_ROWS, "completion_template": "{a:>99999999999}"}, {**_ROWS, "system_prompt": 5},
    {**_ROWS, "system_prompt": ["x"]},
    {**_ROWS, "system_prompt": ""}, {"source": "nope"}, {"source": 5}, {"source": "reasoning_gym"},
    {"source": "reasoning_gym", "task": "chain_sum"}, {"source": "reasoning_gym", "size": 4}, {**_GYM, "size": 0},
    {**_GYM, "size": -1}, {**_GYM, "size": "x"}, {**_GYM, "size": 1.5}, {**_GYM, "size": True}, {**_GYM, "seed": "x"},
    {**_GYM, "seed": -1}, {**_GYM, "seed": 10**23}, {**_GYM, "options": []}, {**_GYM, "options": "x"},
    {**_GYM, "task": ""}, {**_GYM, "task": 5}, {**_GYM, "size": 10**23}, {**_GYM, "path": "rows.jsonl"},
    {"mix": []}, {"mix": "x"}, {"mix": {}}, {"mix": [1]}, {"mix": [""]}, {"mix": [{}]}, {"mix": [[_ROWS]]},
    {"mix": [{"mix": []}]}, {"mix": [_ROWS, {"path": 5}]}, {"mix": [{**_ROWS, "nope": 1}]},
    "", 5, [], [_ROWS],
    True, {"path": "a\0b"}, {"path": "p" * 5000 + ".jsonl"}, {"path": "[.jsonl"},
)  # fmt: skip

_MISSING: tuple[tuple[Any, str], ...] = (
    ("rows.jsonl", "data.train.path = 'rows.jsonl'"), (_ROWS, "data.train.path = 'rows.jsonl'"),
    ({"mix": ["rows.jsonl"]}, "data.train.mix[0].path = 'rows.jsonl'"),
    ({"mix": [{"path": "rows/*.csv"}]}, "data.train.mix[0].path = 'rows/*.csv'"),
    ("./rows", "data.train.path = './rows'"), ("rows.txt", "data.train.path = 'rows.txt'"),
)  # fmt: skip
"""Sources whose path does not exist -> the field and value that the message names."""

_GYM_TASKS: tuple[dict[str, Any], ...] = (
    {**_GYM, "task": "no_such_task"}, {**_GYM, "options": {"nope": 1}}, {**_GYM, "options": {"min_terms": "x"}},
    {**_GYM, "options": {"min_terms": -5}}, {**_GYM, "options": {"min_terms": 9, "max_terms": 2}},
    {**_GYM, "options": {"size": 3}}, {**_GYM, "options": {"seed": 3}}, {**_GYM, "options": {"min_terms": [1]}},
    {**_GYM, "options": {"operators": ["&"]}}, {**_GYM, "options": {"operators": 5}}, {**_GYM, "options": {"self": 5}},
    {**_GYM, "options": {"min_terms": None}}, {**_GYM, "options": {"name": "x"}},
    {**_GYM, "options": {"operators": []}},
)  # fmt: skip

_CRITERIA: tuple[Any, ...] = (
    {}, {"kind": None}, {"kind": 5}, {"kind": True}, {"kind": ""}, {"kind": "nope"}, {"kind": "Exact"},
    {"kind": ["exact"]},
    {"kind": {"exact": 1}}, {"kind": [["exact"]]}, {"name": "exact"}, "exact", 5, [], ["exact"], None, True,
    *({"kind": "exact", **more} for more in (
        {"nope": 1}, {"name": 5}, {"name": ""}, {"name": ["a"]}, {"name": {}}, {"name": True}, {"weight": "x"},
        {"weight": True}, {"weight": None}, {"weight": []}, {"weight": float("nan")}, {"weight": float("inf")},
        {"weight": 10**400}, {"isolate": 1}, {"isolate": "yes"}, {"isolate": None}, {"isolate": []}, {"self": 1},
        {"completions": 1}, {"": 1}, {"sources": 5}, {"ignore_case": "yes"},
    )),
    *({"kind": "numeric", **more} for more in (
        {"sources": "tag"}, {"sources": []}, {"sources": ["nope"]}, {"sources": [5]}, {"sources": [["tag"]]},
        {"sources": None}, {"sources": {}}, {"tolerance": "x"}, {"tolerance": -1}, {"nope": 1},
        {"tolerance": float("nan")},
    )),
    *({"kind": "math", **more} for more in (
        {"timeout_seconds": 0}, {"timeout_seconds": -1}, {"timeout_seconds": "x"}, {"timeout_seconds": float("nan")},
        {"timeout_seconds": True}, {"timeout_seconds": []}, {"nope": 1},
    )),
    *({"kind": "code", **more} for more in (
        {"isolation": "jail"}, {"isolation": None}, {"failures": "one"}, {"failures": 0}, {"memory_mib": 0},
        {"memory_mib": "1G"}, {"memory_mib": 1.5}, {"timeout_seconds": float("inf")}, {"sandbox": 1}, {"column": 5},
        {"same_process": "yes"}, {"sources": ["block", "nope"]},
    )),
    *({"kind": "sql", **more} for more in ({"isolation": ""}, {"setup_column": None}, {"partial_credit": True})),
    *({"kind": "format", **more} for more in (
        {"tags": "think"}, {"tags": []}, {"tags": [5]}, {"tags": [""]}, {"tags": None}, {"nope": 1}, {"tags": [["a"]]},
    )),
    *({"kind": "soft_overlong", **more} for more in (
        {}, {"max_completion_length": 0}, {"max_completion_length": "x"}, {"max_completion_length": 10, "buffer": 20},
        {"max_completion_length": 10, "cache": -1}, {"max_completion_length": True},
    )),
    *({"kind": "gym", **more} for more in ({"nope": 1}, {"timeout_seconds": "x"}, {"timeout_seconds": -1})),
    *({"kind": "python", **more} for more in (
        {}, {"function": ""}, {"function": "x"}, {"function": ":"}, {"function": "a:"}, {"function": ":b"},
        {"function": "nope_nope:f"}, {"function": "math:nope"}, {"function": "math:pi"}, {"function": "math:sqrt.x"},
        {"function": "..x:f"}, {"function": ".x:f"}, {"function": "a b:f"}, {"function": "math:"}, {"function": 5},
        {"function": ["math:sqrt"]}, {"function": "math:sqrt", "options": 5}, {"function": "math:sqrt", "options": []},
        {"function": "broken_syntax:f"}, {"function": "broken_name:f"}, {"function": "broken_exit:f"},
        {"function": "broken_error:f"}, {"function": "broken_loop:f"}, {"function": "math\0:f"},
        {"function": "a" * 5000 + ":f"}, {"function": "math:a b"}, {"function": "broken_bytes:f"},
    )),
)  # fmt: skip

_MODULES = {
    "broken_syntax.py": b"def f(:\n", "broken_name.py": b"nope\n", "broken_exit.py": b"import sys\nsys.exit(0)\n",
    "broken_error.py": b"raise KeyError('x')\n", "broken_loop.py": b"import broken_loop\nbroken_loop.nope\n",
    "broken_bytes.py": b"\xff\xfe\x00",
}  # fmt: skip

_DOCUMENTS: tuple[tuple[str, str, dict[str, Any]], ...] = tuple(
    (kind, label, document)
    for kind in ("sft", "grpo", "eval", "pairs", "pipeline")
    for label, document in (
        ("nothing", {}), ("a model alone", {"model": "m"}), ("no model", {"data": {"train": _ROWS, "eval": _ROWS}}),
        ("an empty model", {"model": "", "data": {"train": _ROWS}}), ("a model of 5", {"model": 5}),
        ("a model of a list", {"model": ["m"]}), ("an empty model table", {"model": {}}),
        ("a model table of 5", {"model": {"path": 5}}), ("a model without path", {"model": {"gguf_file": "x"}}),
        ("an empty path", {"model": {"path": ""}, "data": {"train": _ROWS}}),
        ("an empty file", {"model": {"path": "m", "gguf_file": ""}, "data": {"train": _ROWS}}),
        ("an unknown part", {"model": {"path": "m", "file": "x"}}), ("data of 5", {"model": "m", "data": 5}),
        ("data of a list", {"model": "m", "data": [_ROWS]}), ("empty data", {"model": "m", "data": {}}),
        ("data of text", {"model": "m", "data": "rows.jsonl"}), ("another table", {"model": "m", "nope": {}}),
        ("tables of 5", {"model": "m", "data": {"train": _ROWS}, "peft": 5, "training": 5}),
        ("an empty rubric", {"model": "m", "data": {"train": _ROWS, "eval": _ROWS}, "rubric": []}),
        ("a system prompt of 5", {"model": "m", "data": {"train": _ROWS, "system_prompt": 5}}),
        ("a template of 5", {"model": "m", "data": {"train": _ROWS, "prompt_template": 5}}),
        ("two criteria of one name", {"model": "m", "data": {"train": _ROWS, "eval": _ROWS}, "sft": {},
                                      "rubric": [{"kind": "exact"}, {"kind": "exact"}]}),
        ("two criteria, none decides", {"model": "m", "data": {"train": _ROWS, "eval": _ROWS}, "evaluation": {},
                                        "rubric": [{"kind": "exact"}, {"kind": "numeric"}]}),
    )
    if not (kind == "sft" and label == "an empty rubric")
    and not (kind in ("pairs", "grpo") and label == "two criteria, none decides" and kind == "pairs")
)  # fmt: skip

_PIPELINES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no stage", {}), ("training", {"training": {}}), ("training with fields", {"training": {"max_steps": 1}}),
    ("dpo without pairs", {"dpo": {}}), ("reward without pairs", {"reward": {}}), ("kto without pairs", {"kto": {}}),
    ("a folder of a stage", {"sft": {"output_dir": "x"}}),
    ("a resume of a stage", {"sft": {"resume_from_checkpoint": True}}),
    ("a stage of 5", {"sft": 5}), ("a stage of a list", {"sft": [{}]}), ("an unknown stage", {"sftt": {}}),
    ("a field of another stage", {"sft": {"num_generations": 4}}), ("a table in a field", {"grpo": {"max_steps": {}}}),
    *((f"a folder that is {label}", {"sft": {}, "output_dir": path}) for label, path in BAD_PATHS),
    ("a folder of 5", {"sft": {}, "output_dir": 5}), ("null", {"sft": None}),
    ("an eval table of rows", {"sft": {}, "eval": {"path": "x"}}), ("a stage in upper case", {"SFT": {}}),
)  # fmt: skip


def cases() -> Iterator[Case]:
    """Each table by type and by meaning, alone in a file that is good otherwise."""
    for section, fields in _SECTIONS.items():
        for name, annotation in fields.items():
            for label, value in bad_values(annotation):
                if value is not None or section in ("evaluation", "pairs"):
                    yield _section(section, {name: value}, f"{name}: {label}", named=name)
    for name, info in lora_fields().items():
        for label, value in bad_values(info.type):
            if "Config" not in info.type:
                yield _section("peft", {name: value}, f"{name}: {label}", named=name)
    for section, tables in _VALUES.items():
        for table in tables:
            yield _section(section, table, str(table)[:80], named=str(next(iter(table))))
    for i, source in enumerate(_SOURCES):
        for where in ("train", "eval"):
            run = partial(_stage, "sft", {"data": {"train": _ROWS, where: source}})
            yield Case("[data]", f"{where} {i}: {source!r:.70}", run, refused=_refused_source(source), names=where)
        yield Case("[data]", f"mix {i}: {source!r:.70}", partial(_stage, "sft", {"data": {"train": {"mix": [source]}}}),
                   refused=_refused_source(source))  # fmt: skip
    for i, (source, named) in enumerate(_MISSING):
        for fix in ("no such file; check it", named):
            yield Case("[data]", f"missing {i}: {source!r:.90}", partial(_load_rows, source), names=fix)
    for i, source in enumerate(_GYM_TASKS):
        yield Case("[data]", f"task {i}: {source!r:.90}", partial(_load_rows, source))
    for i, criterion in enumerate(_CRITERIA):
        for kind in ("grpo", "eval"):
            yield Case("[[rubric]]", f"{kind} {i}: {criterion!r:.70}", partial(_stage, kind, {"rubric": [criterion]}))
    for kind, label, document in _DOCUMENTS:
        yield Case("file", f"{kind}: {label}", partial(_document, kind, document))
    for label, tables in _PIPELINES:
        yield Case("pipeline", label, partial(_stage, "pipeline", tables))


def _refused_source(source: Any) -> bool | None:
    """Paths are looked at when rows are read, and templates may be empty."""
    if not isinstance(source, dict) or "path" not in source:
        return True
    fine = ("limit", "split", "system_prompt", "completion_template")
    may = source in ({"path": "rows.txt"}, {"path": "rows"}, {"path": "[.jsonl"}, {**_ROWS, "system_prompt": ""},
                     {**_ROWS, "completion_template": ""}, {**_ROWS, "completion_template": "{a.__class__}"},
                     {**_ROWS, "completion_template": "{a:>99999999999}"}, {**_ROWS, "limit": 10**23})  # fmt: skip
    return None if may and fine else True


def _section(section: str, table: dict[str, Any], label: str, *, named: str) -> Case:
    kind = {"evaluation": "eval", "pairs": "pairs", "report": "pipeline"}.get(section, "sft")
    return Case(
        f"[{section}]",
        label,
        partial(_stage, kind, {section: table}),
        names="" if named == "nope" or len(table) > 1 else named,
    )


def _stage(kind: str, tables: dict[str, Any]) -> None:
    document: dict[str, Any] = {"model": "./nowhere", "data": {"train": _ROWS, "eval": _ROWS}}
    if kind != "sft":
        document["rubric"] = [{"kind": "exact"}]
    if kind == "pipeline" and "report" in tables:
        document["sft"] = {}
    _document(kind, {**document, **tables})


def _document(kind: str, document: dict[str, Any]) -> None:
    Path("file").write_text("")
    for name, content in _MODULES.items():
        Path(name).write_bytes(content)
    try:
        text = yaml.safe_dump(document, allow_unicode=True)
    except ValueError:  # an integer that Python does not print
        text = yaml.safe_dump(_hexadecimal(document)).replace("'0x", "0x").replace("0'", "0")
    Path("run.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    if kind == "pipeline":
        load_pipeline_file("run.yaml", [])
    else:
        load_run_file("run.yaml", [], kind)  # pyright: ignore[reportArgumentType]


def _hexadecimal(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _hexadecimal(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_hexadecimal(item) for item in value]
    return hex(value) if isinstance(value, int) and abs(value) > 2**64 else value


def _load_rows(source: dict[str, Any]) -> None:
    from burnish.data import load_rows

    load_rows(source, "data.train")
