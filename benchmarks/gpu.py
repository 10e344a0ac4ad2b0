"""Everything that a GPU has to say, in one command of at most ten minutes, without a network: see README.md.

Usage: make wheels, then on the GPU's machine: python benchmarks/gpu.py [--stages NAME ...] [--seconds 560]
       without a GPU: python benchmarks/gpu.py --device cpu --tiny --out FOLDER

Assumed there: Python 3.12, torch with CUDA and triton, a C compiler for triton, transformers, accelerate, pandas and
pyarrow. What `requirements-gpu.txt` lists is installed from `benchmarks/wheels` where it is missing, in a folder of its
own. Models have real shapes and random weights, so no file of weights is read.

Each stage is a process with a time limit; the most important come first. The results are `gpu.json` in the folder that
$OUT names, or --out, written after each stage and before it: one that fails or is stopped leaves what it had found, and
why, and the next one runs. `gpu.log` has what all of them printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WHEELS = HERE / "wheels"
LEAST_SECONDS = 20
"""A stage that has less time is not begun."""
ERROR_CHARACTERS = 3000


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and short rows, to test the code")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="run these only, in this order")
    parser.add_argument("--seconds", type=float, default=560, help="time for everything, the installation included")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or HERE / "results"))
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "gpu", help="packages, logs, partial results")
    parser.add_argument("--trl-python", type=Path, help="interpreter that has TRL, if it is not this one")
    return parser.parse_args()


def missing() -> list[str]:
    """Name the requirements that no installed package meets."""
    from packaging.requirements import Requirement

    found: list[str] = []
    for line in (HERE / "requirements-gpu.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        try:
            is_met = requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            is_met = False
        if not is_met:
            found.append(line)
    return found


def install(site: Path) -> dict[str, Any]:
    """Install missing packages beside the interpreter's own, one by one, so that one bad wheel costs only itself."""
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    found: dict[str, Any] = {"installed": [], "failed": {}}
    for requirement in missing() if WHEELS.is_dir() else ():
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile"]
        command += ["--no-index", "--no-deps", "--find-links", WHEELS, "--target", site, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            found["failed"][requirement] = (done.stdout + done.stderr)[-ERROR_CHARACTERS:]
        else:
            found["installed"].append(requirement)
    if (site / "datasets").is_dir() and (reason := import_error("datasets", str(site))):
        # transformers imports it wherever it is found, so one that does not fit its pyarrow would break every stage.
        found["failed"]["datasets"] = reason
        for folder in site.glob("datasets*"):
            shutil.rmtree(folder)
    try:
        metadata.version("burnish")
    except metadata.PackageNotFoundError:
        # A run records burnish's version, and the sources alone have no metadata.
        version = re.findall(r'__version__ = "(.+)"', (ROOT / "src" / "burnish" / "__init__.py").read_text())[0]
        folder = site / f"burnish-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: burnish\nVersion: {version}\n")
    return found


def import_error(name: str, path: str) -> str:
    """Return what importing a package prints where it fails; empty where it does not."""
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", f"import {name}"], env=environment, capture_output=True, check=False)
    return done.stderr.decode(errors="replace")[-ERROR_CHARACTERS:] if done.returncode else ""


def has_trl(python: Path, path: str) -> bool:
    """Tell whether an interpreter finds TRL."""
    command = [python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('trl') is None)"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=False)
    return done.returncode == 0


def run_stage(name: str, setup: Mapping[str, Any], log: Path) -> dict[str, Any]:
    """Run a stage in a session of its own, and end all that it started when its time is over."""
    partial, logs = Path(setup["work"]) / "stage.json", Path(setup["work"]) / "logs"
    partial.unlink(missing_ok=True)
    shutil.rmtree(logs, ignore_errors=True)
    began, start = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, HERE / "gpu_stages.py", name, json.dumps(setup)],
            stdout=stream, stderr=stream, start_new_session=True,
            env=os.environ | {"PYTHONPATH": setup["path"], "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            status = "done" if process.wait(setup["seconds"]) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            # Workers outlive a stage that fails: the group is the stage's own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, Any] = {"status": status, "seconds": time.monotonic() - began}
    if partial.exists():
        found["found"] = json.loads(partial.read_text())
    if status != "done":
        with log.open("rb") as stream:
            stream.seek(start)
            found["error"] = stream.read().decode(errors="replace")[-ERROR_CHARACTERS:]
        found["workers"] = {path.stem: path.read_text(errors="replace")[-ERROR_CHARACTERS:] for path in logs.glob("*")}
    return found


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Replace the results, which are whole at any time."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(path)


def source() -> str | None:
    """Return the commit, where the sources are a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> None:
    """Install what is missing, then run the stages."""
    options, began = parse(), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    out, log = options.out / "gpu.json", options.out / "gpu.log"
    log.unlink(missing_ok=True)
    site = options.work.resolve() / "site"
    installation = install(site)
    path = f"{ROOT / 'src'}{os.pathsep}{site}"
    sys.path[:0] = [str(ROOT / "src"), str(site)]
    from gpu_stages import STAGES

    if unknown := sorted(set(options.stages or ()) - set(STAGES)):
        raise SystemExit(f"--stages {' '.join(unknown)}: use some of {', '.join(STAGES)}")
    candidates = [options.trl_python, Path(sys.executable), ROOT / ".venv-trl" / "bin" / "python"]
    trl = next((str(python) for python in candidates if python and python.exists() and has_trl(python, path)), None)
    results: dict[str, Any] = {
        "commit": source(), "device": options.device, "tiny": options.tiny, "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "installation": installation, "trl_python": trl is not None, "stages": {},
    }  # fmt: skip
    for name in options.stages or STAGES:
        left = options.seconds - (time.monotonic() - began)
        if left < LEAST_SECONDS:
            results["stages"][name] = {"status": "not begun", "seconds_left": left}
            continue
        results["stages"][name] = {"status": "running"}
        write(out, results)
        print(f"{name}: begun, {left:.0f} s left", flush=True)
        setup = {
            "device": options.device, "tiny": options.tiny, "seconds": min(STAGES[name][0], left),
            "work": str(site.parent), "path": path, "trl_python": trl,
        }  # fmt: skip
        results["stages"][name] = made = run_stage(name, setup, log)
        write(out, results)
        print(f"{name}: {made['status']} after {made['seconds']:.0f} s", flush=True)
    write(out, results)


if __name__ == "__main__":
    main()
