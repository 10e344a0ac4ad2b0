"""`burnish serve MODEL`: start a vLLM server that a run can sample from, and watch it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from pathlib import Path
from types import FrameType

from burnish import vllm_plugin
from burnish.errors import ConfigError, EngineError
from burnish.model.adapter_files import saved_adapters
from burnish.model.sources import find_model
from burnish.progress import format_seconds, say
from burnish.rollout.vllm.delivery import FAILED
from burnish.rollout.vllm.registry import forget, register
from burnish.rollout.vllm.weights import MAX_RANK, lora_slot

__all__ = ["find_vllm", "plugin_path", "run", "servable", "server_command", "server_environment", "untied"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_INDEX = "model.safetensors.index.json"
_HEALTHY_SECONDS = 600.0
"""A server that ran this long starts with all its restarts again."""


def run(args: argparse.Namespace) -> None:
    """Start the server, and again when it dies, until a signal ends it."""
    if args.host not in _LOOPBACK and not args.expose:
        raise ConfigError(
            f"--host {args.host}: whoever reaches the server can load weights and run methods on it, without the "
            "token. Use 127.0.0.1 and an SSH tunnel, or add --expose in a network that you trust."
        )
    if args.expose and args.weight_transfer == "ipc":
        raise ConfigError(
            "--weight-transfer ipc with --expose: vLLM would run what others send it, since handles of GPU memory are "
            "pickled. The trainer is on the same machine: use 127.0.0.1."
        )
    executable = find_vllm(args.vllm)
    token = os.environ.get("VLLM_API_KEY") or secrets.token_urlsafe(24)
    with servable(args.model, bf16=args.dtype != "float32") as folder, plugin_path() as plugins, _ended_by_signals():
        command = server_command(executable, folder, args)
        register(
            args.port,
            {
                "url": f"http://{args.host}:{args.port}",
                "token": token,
                "model": args.model,
                "pid": os.getpid(),
                "gpus": _gpus(),
            },
        )
        say(f"starting {shlex.join(command)}")
        try:
            _watch(command, {**os.environ, **server_environment(token, args.weight_transfer, plugins)}, args)
        finally:
            forget(args.port)


def find_vllm(given: str | None) -> str:
    """Find vLLM's program: as given, in BURNISH_VLLM, in .venv-vllm here, or on the PATH.

    Raises:
        ConfigError: there is none.
    """
    own = Path(".venv-vllm", "bin", "vllm")
    for name in (given, os.environ.get("BURNISH_VLLM"), str(own.resolve()) if own.is_file() else None, "vllm"):
        if name and (found := shutil.which(name)):
            return found
        if name and name != "vllm":
            raise ConfigError(f"--vllm {name}: no such program.")
    raise ConfigError(
        "vLLM is not installed here: `make vllm` builds .venv-vllm with its CPU build; for a GPU, `pip install vllm` "
        "into an environment of its own, and name its program by --vllm or BURNISH_VLLM."
    )


def server_command(executable: str, folder: str, args: argparse.Namespace) -> list[str]:
    """Build the command line: log-probabilities of what was sampled, no defaults of the model, adapters if wanted."""
    command = [executable, "serve", folder, "--host", args.host, "--port", str(args.port)]
    mode = "raw_logprobs" if args.raw_logprobs else "processed_logprobs"
    command += ["--served-model-name", args.model, "--logprobs-mode", mode]
    command += ["--generation-config", "vllm", "--dtype", args.dtype]
    backend = vllm_plugin.BACKEND if args.weight_transfer == "folder" else args.weight_transfer
    command += ["--weight-transfer-config", json.dumps({"backend": backend})]
    if not _has_gpu():
        # A seeded prompt that is prefilled in parts ends the engine of the CPU build (vLLM 0.32), whose generators have
        # no offset to set back.
        command += ["--no-enable-chunked-prefill"]
    if args.max_model_len is not None:
        command += ["--max-model-len", str(args.max_model_len)]
    if args.lora_rank is not None:
        if not 1 <= args.lora_rank <= MAX_RANK:
            raise ConfigError(f"--lora-rank {args.lora_rank}: use 1 to {MAX_RANK}.")
        # The adapter in use, and the next one while it is proven.
        command += ["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2"]
        command += ["--max-lora-rank", str(lora_slot(args.lora_rank))]
    return [*command, *args.overrides]


def server_environment(token: str, weight_transfer: str, plugins: str) -> dict[str, str]:
    """Return the variables that open the routes of a sync, with the token and the folder of the plug-in."""
    path = os.pathsep.join(filter(None, (plugins, os.environ.get("PYTHONPATH"))))
    # vLLM reads handles of GPU memory from HTTP in pickled form only.
    pickled = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if weight_transfer == "ipc" else {}
    return {
        **pickled,
        "PYTHONPATH": path,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_API_KEY": token,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
    }


def _has_gpu() -> bool:
    """Return whether vLLM would run on a GPU here."""
    import torch

    return torch.cuda.is_available()


def _gpus() -> list[str]:
    """Return the identities of the visible GPUs, asked in another process so that this one holds no memory of them."""
    if not _has_gpu():
        return []
    each = "str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())"
    line = f"import json, torch; print(json.dumps([{each}]))"
    return json.loads(subprocess.run([sys.executable, "-c", line], stdout=subprocess.PIPE, check=True).stdout)


@contextlib.contextmanager
def plugin_path() -> Generator[str]:
    """Yield a folder from which Python loads the plug-in of vLLM as if it were installed; burnish need not be."""
    with tempfile.TemporaryDirectory(prefix="burnish-plugin-") as made:
        shutil.copy(vllm_plugin.__file__, Path(made, "burnish_vllm_plugin.py"))
        about = Path(made, "burnish_vllm_plugin-1.dist-info")
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: burnish-vllm-plugin\nVersion: 1\n", "utf-8")
        entry = "[vllm.general_plugins]\nburnish = burnish_vllm_plugin:register\n"
        (about / "entry_points.txt").write_text(entry, "utf-8")
        yield made


@contextlib.contextmanager
def servable(model: str, *, bf16: bool) -> Generator[str]:
    """Yield a folder or name that vLLM loads, and reloads whole.

    A GGUF file is exported first, and adapters stand for their base. A tied head gets a weight of its own on a CPU.
    """
    name, source = model, find_model(model)
    if (adapters := saved_adapters(source.name)) is not None:
        name, source = adapters.base, find_model(adapters.base)

    with tempfile.TemporaryDirectory(prefix="burnish-serve-") as made:
        folder = Path(source.name)
        if source.gguf_file is not None:
            from burnish.model.loading import load_model, load_processing_class

            folder = Path(made, "exported")
            loaded, _ = load_model(name, bf16=bf16)
            loaded.save_pretrained(folder)
            load_processing_class(name).save_pretrained(folder)
            del loaded
        if folder.is_dir() and not _has_gpu():
            folder = untied(folder, Path(made, "untied"))
        yield str(folder) if folder.is_dir() else source.name


def untied(folder: Path, view: Path) -> Path:
    """Make a view of a model with tied embeddings in which the head has a weight of its own.

    On a CPU vLLM packs the head once and never again where it is tied to the embeddings: a reload would leave the old
    one (seen with 0.32). A head of its own is reloaded like every layer.

    Args:
        folder: saved model.
        view: folder to make, of links to the files of the first one.

    Returns:
        The view; the folder itself where the head is not tied.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    # transformers ties by default, and leaves the default out of the file.
    if not config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)):
        return folder
    from safetensors import safe_open
    from safetensors.torch import save_file

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            if "lm_head.weight" in names:
                return folder
            name = next((n for n in names if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
            head = None if name is None else weights.get_tensor(name)
        if head is not None:
            break
    else:
        say(f"{folder}: no embeddings were found to untie; the first sync will tell if the head follows")
        return folder
    view.mkdir()
    for file in folder.iterdir():
        if file.name not in ("config.json", _INDEX):
            (view / file.name).symlink_to(file.resolve())
    save_file({"lm_head.weight": head}, view / "head.safetensors", metadata={"format": "pt"})
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        index["weight_map"]["lm_head.weight"] = "head.safetensors"
        (view / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    (view / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return view


@contextlib.contextmanager
def _ended_by_signals() -> Generator[None]:
    """Turn the signals that end a process into KeyboardInterrupt, so that the server is ended too."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        say("server ended")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(command: Sequence[str], environment: dict[str, str], args: argparse.Namespace) -> None:
    left = args.restarts
    while True:
        started = time.monotonic()
        # A session of its own: a signal to the terminal reaches it through us, after which its workers are ended too.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            reason = _until_it_fails(process, args)
        finally:
            _end(process)
        if time.monotonic() - started > _HEALTHY_SECONDS:
            left = args.restarts
        if left == 0:
            raise EngineError(f"the server {reason}, after {args.restarts} restarts; its own messages are above.")
        left -= 1
        say(f"the server {reason}: starting it again ({left} restarts left)")
        time.sleep(min(2.0, args.interval))


def _until_it_fails(process: subprocess.Popen[bytes], args: argparse.Namespace) -> str:
    """Wait until a server ends or hangs; return what happened."""
    url, started = f"http://{args.host}:{args.port}", time.monotonic()
    is_up, answered = False, time.monotonic()
    while process.poll() is None:
        time.sleep(args.interval)
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10 * args.interval):
                answered = time.monotonic()
        except (urllib.error.URLError, OSError):
            if is_up and time.monotonic() - answered > args.hung:
                return f"did not answer for {args.hung:.0f} s"
            continue
        if _has_failed(url, 10 * args.interval):
            return "could not load the whole of a version"
        if not is_up:
            is_up = True
            say(
                f"server ready after {format_seconds(time.monotonic() - started)}: set use_vllm = true, vllm_mode = "
                f'"server" and vllm_server_base_url = "http://{args.host}:{args.port}" in [training]'
            )
    return f"ended with status {process.returncode}"


def _has_failed(url: str, timeout: float) -> bool:
    """Return whether a trainer has noted that the server holds a part of a version."""
    try:
        with urllib.request.urlopen(f"{url}/weight_info", timeout=timeout) as answer:
            return str(json.load(answer).get("weight_version")).endswith(FAILED)
    except (OSError, ValueError):  # busy, or without the route
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server with its workers, which share its session."""
    for number, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 15.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # workers of a server that was killed itself
    sys.stderr.flush()
