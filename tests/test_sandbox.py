"""Programs of a hostile model, contained: nothing outside changes, and the next honest run works."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import ConfigError, RewardError
from burnish.rewards import Limits, Sandbox, SandboxError, WorkerPool, code_answer, gym_answer, math_answer
from burnish.rewards.sandbox import memory
from burnish.rewards.sandbox import trial as trials
from burnish.rewards.sandbox.levels import LEVELS
from sandbox_attacks import ATTACKS, CHEATS, HONEST, PRELUDE, SLOW, TREES, WITHOUT_NAMESPACES

SHORT = Limits(wall_seconds=0.5, cpu_seconds=1, memory_bytes=256 << 20, processes=8, file_bytes=4 << 20)


def works(level: str) -> str | None:
    """Reason to skip a level; only that the machine does not have it, never that an attack succeeds."""
    if sys.platform != "linux":
        return "isolation needs Linux"
    if level == "bubblewrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    reason = trials._trial_of_process(level)
    return reason if reason is not None and "the sandbox failed" in reason else None


@pytest.fixture(scope="module", params=LEVELS)
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    if (reason := works(request.param)) is not None:
        pytest.skip(reason)
    box = Sandbox(num_workers=1, isolation=request.param)
    yield box
    box.close()


@pytest.fixture(scope="module")
def best() -> Iterator[Sandbox]:
    if all(works(level) is not None for level in LEVELS):
        pytest.skip("this machine has no isolation")
    box = Sandbox(num_workers=1)
    yield box
    box.close()


@dataclass
class Host:
    """What an attack is after, and how to see that it got none of it."""

    folder: Path
    server: socket.socket
    victim: subprocess.Popen[bytes]

    def facts(self) -> dict[str, Any]:
        return {
            "secret": str(self.folder / "secret"),
            "folder": str(self.folder),
            "port": self.server.getsockname()[1],
            "pid": os.getpid(),
            "victim": self.victim.pid,
        }

    def state(self) -> tuple[Any, ...]:
        files = sorted((str(p), p.stat().st_mode, p.stat().st_nlink, p.read_text()) for p in self.folder.iterdir())
        library = sorted(os.listdir(Path(os.__file__).parent))
        return files, library, self.victim.poll(), os.nice(0), socket.gethostname(), os.getcwd()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text("HOST-SECRET")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        os.environ["BURNISH_TEST_TOKEN"] = "HOST-SECRET"
        yield Host(folder, server, victim)
        del os.environ["BURNISH_TEST_TOKEN"]
    victim.kill()
    victim.wait()


def descendants() -> set[int]:
    """Processes below this one, zombies aside."""
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(file.parent.name)] = int(fields[1])
    found, size = {os.getpid()}, 0
    while len(found) != size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


def program(host: Host, attack: str) -> str:
    return f"HOST = {host.facts()!r}\n{PRELUDE}\n{attack}"


def assert_contained(box: Sandbox, host: Host, before: tuple[Any, ...], processes: set[int]) -> None:
    assert host.state() == before
    with pytest.raises(BlockingIOError):
        host.server.accept()
    assert descendants() <= processes
    honest = box.run("import os, sys\nprint(sum(map(int, sys.stdin.read().split())), os.listdir('.'))", "1 2 3")
    assert (honest.end, honest.stdout) == ("ok", "6 []\n")


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(box: Sandbox, host: Host, name: str) -> None:
    if name in SLOW and box.level != "namespaces" and SLOW.index(name) > 2:
        pytest.skip("ends in a time-out as the first three do")
    if box.level == "landlock" and name in WITHOUT_NAMESPACES:
        pytest.skip(WITHOUT_NAMESPACES[name])
    assert box.run("print(1)").stdout == "1\n"
    before, processes = host.state(), descendants()
    run = box.run(program(host, ATTACKS[name]), limits=SHORT)
    assert "ESCAPED" not in run.stdout, run.stdout
    assert "HOST-SECRET" not in run.stdout + run.stderr
    if name in SLOW:
        assert run.end == "timeout"
    assert_contained(box, host, before, processes)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_through_the_verifier(best: Sandbox, host: Host, name: str) -> None:
    if name in SLOW and SLOW.index(name) > 1:
        pytest.skip("ends in a time-out as the first two do")
    verify = code_answer(sandbox=best, timeout_seconds=1, memory_mib=256)
    assert best.run("print(1)").stdout == "1\n"
    text = f"```python\n{program(host, ATTACKS[name])}\n```"
    before, processes = host.state(), descendants()
    [value] = verify(["p"], [text], tests=[["assert answer(20) == 41", "assert answer(1) == 3"]])
    assert value == 0.0
    assert_contained(best, host, before, processes)


TREE = Limits(wall_seconds=20.0, memory_bytes=256 << 20)


@pytest.mark.parametrize("name", TREES)
def test_a_tree_of_processes_has_the_memory_of_one(box: Sandbox, host: Host, name: str) -> None:
    if box.level == "landlock":
        pytest.skip("no process can be started")
    assert box.run("print(1)").stdout == "1\n"
    before, processes, start = host.state(), descendants(), time.monotonic()
    run = box.run(program(host, f"{TREES[name]}\nprint('ESCAPED')"), limits=TREE)
    assert run.end == "memory"
    assert time.monotonic() - start < 5
    assert "ESCAPED" not in run.stdout
    assert_contained(box, host, before, processes)


def test_what_processes_share_counts_once(box: Sandbox) -> None:
    if box.level == "landlock":
        pytest.skip("no process can be started")
    run = box.run(PRELUDE + HONEST, limits=TREE)
    assert (run.end, run.stdout) == ("ok", "[True, True, True, True, True]\n")


@pytest.mark.parametrize("inside", [False, True])
def test_an_answer_of_too_many_processes_scores_zero(best: Sandbox, inside: bool) -> None:
    if best.level == "landlock":
        pytest.skip("no process can be started")
    # Only the second test makes it grow; what it passed before does not count.
    answer = f"{PRELUDE}\ndef f(n):\n    if n == 0: return 1\n" + "\n".join(
        f"    {line}" for line in TREES["children"].splitlines()
    )
    options = {"sandbox": best, "memory_mib": 256, "same_process": inside, "partial_credit": True}
    column = {"tests": [["assert f(0) == 1", "f(1)"]]}
    assert code_answer(**options)(["p"], [f"```python\n{answer}\n```"], **column) == [0.0]
    [value] = code_answer(**options, failures="exclude")(["p"], [f"```python\n{answer}\n```"], **column)
    assert isinstance(value, RewardError)
    assert "too much memory" in str(value)


def test_memory_by_what_the_kernel_lets_be_read(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where shares are closed to the reader, each process counts with all that it sees: more, never less."""
    if sys.platform != "linux":
        pytest.skip("/proc needs Linux")
    code = "import os, time\nx = bytearray(64 << 20)\nif pid := os.fork(): print(pid, flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [parent.pid, int(parent.stdout.readline())]
        assert memory.descendants(parent.pid) == pids[1:]
        assert memory.innermost(parent.pid) == pids[1]
        assert memory.memory_exceeds(pids, 60 << 20)
        assert not memory.memory_exceeds(pids, 110 << 20)
        read = Path.read_text

        def closed(path: Path, *arguments: Any, **options: Any) -> str:
            if path.name in ("smaps_rollup", "children"):
                raise PermissionError(str(path))
            return read(path, *arguments, **options)

        monkeypatch.setattr(Path, "read_text", closed)
        monkeypatch.setattr(memory, "_lists_children", lambda: False)
        assert memory.memory_exceeds(pids, 110 << 20)
        assert not memory.memory_exceeds(pids, 200 << 20)
        assert memory.descendants(parent.pid) == pids[1:]
        memory.kill_all([host.victim.pid], parent.pid)  # not below it
        memory.kill_all(pids[1:], parent.pid)
        parent.kill()
        monkeypatch.undo()
        deadline = time.monotonic() + 5
        while memory._address_space(pids[1]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert memory._address_space(pids[1]) == 0
    assert host.victim.poll() is None


@pytest.mark.parametrize("name", CHEATS)
def test_cheat(best: Sandbox, name: str) -> None:
    tests = [
        "assert answer(20) == 41",
        "assert abs(answer(3) - 7) < 1e-9",
        "assert answer(5) in (11,)",
        "assert isinstance(answer(6), int) and answer(6) > 12 and not answer(6) > 13",
    ]
    verify = code_answer(sandbox=best, timeout_seconds=1, partial_credit=True)
    [value] = verify(["p"], [f"```python\n{CHEATS[name]}\n```"], tests=[tests])
    assert value == 0.0
    assert verify(["p"], ["```\ndef answer(n): return 2 * n + 1\n```"], tests=[tests]) == [1.0]


def test_modules_of_the_answer_are_not_those_of_the_tests(best: Sandbox) -> None:
    answer = "class math:\n    isclose = staticmethod(lambda *_: True)\ndef double(n): return n"
    tests = ["assert math.isclose(double(2), 4)", "assert double(math.floor(3)) == 3"]
    assert best.judge(answer, tests).results == [0, 1]


STACK = """
from collections import Counter
class Stack:
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
        return self
    def pop(self):
        if not self.items:
            raise Empty("nothing left")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __add__(self, other): return Stack(self.items + other.items)
    def __enter__(self): return self
    def __exit__(self, *_): self.items.clear()
class Empty(LookupError): pass
def apply(function, values): return [function(v) for v in values]
def fill(values): values.extend([1, 2]); values.sort()
def count(text): return Counter(text)
def numbers():
    yield 1
    yield 2
def rotate(rows): rows[:] = [list(row) for row in zip(*rows[::-1])]
import math
big, point = 10 ** 400, (1, 2.5, None, {"a": {1, 2}, (1, 2): b"x"})
"""


@pytest.mark.parametrize(
    "test",
    [
        "s = Stack([1]).push(2)\nassert len(s) == 2 and s.pop() == 2 and list(s) == [1] and 1 in s and s.items == [1]",
        "assert Stack([1]) == Stack([1]) and Stack([1]) != Stack([2]) and isinstance(Stack(), Stack)",
        "assert (Stack([1]) + Stack([2])).items == [1, 2]",
        "try:\n    Stack().pop()\nexcept Empty as error:\n    assert 'nothing' in str(error)\nelse:\n    assert False",
        "try:\n    Stack().pop()\nexcept LookupError:\n    pass\nelse:\n    assert False",
        "assert apply(lambda v: v * 2, [1, 2]) == [2, 4] and apply(abs, [-1]) == [1] and apply(str, [1]) == ['1']",
        "x = [3]\nfill(x)\nassert x == [1, 2, 3]",
        "assert count('aab') == {'a': 2, 'b': 1} and list(numbers()) == [1, 2] and next(numbers()) == 1",
        "m = [[1, 2], [3, 4]]\nrotate(m)\nassert m == [[3, 1], [4, 2]]",
        "assert big == 10 ** 400 and point == (1, 2.5, None, {'a': {1, 2}, (1, 2): b'x'})",
        "s = Stack([1])\nwith s as t:\n    assert len(t) == 1\nassert not len(s)",
        "assert apply(values=[1], function=float) == [1.0] and math.isclose(point[1], 2.5)",
    ],
)  # fmt: skip
def test_honest_tests_pass_and_fail_apart(best: Sandbox, test: str) -> None:
    run = best.judge(STACK, [test])
    assert run.results == [1], run.note
    assert best.judge(STACK.replace("1, 2", "2, 1").replace("items", "things"), ["assert big == 1"]).results == [0]


def test_tests_inside_the_answer_and_objects_of_the_tests(best: Sandbox) -> None:
    test = "class Node:\n    value = 3\nassert read(Node()) == 3"
    code = "def read(node): return node.value"
    assert best.judge(code, [test]).results == [0]  # an object of the tests cannot be copied
    assert best.judge(code, [test, "assert read(1)"], inside=True).results == [1, 0]


def test_partial_credit_setup_and_broken_tests(best: Sandbox) -> None:
    code = "```python\ndef half(x): return x / 2\n```"
    tests = ["assert half(4) == 2", "assert half(5) == 2", "assert math.isclose(half(1), 0.5)"]
    for setup, expected in (("import math", 2 / 3), ("", 1 / 3)):
        verify = code_answer(sandbox=best, partial_credit=True, setup_column="setup")
        assert verify(["p"], [code], tests=[tests], setup=[setup]) == [expected]
    [value] = code_answer(sandbox=best, setup_column="setup")(["p"], [code], tests=[tests], setup=["import no_such"])
    assert isinstance(value, RewardError)
    assert "no_such" in str(value)
    for bad in (5, [], {"inputs": ["1"]}, [{"input": 1}]):
        [value] = code_answer(sandbox=best)(["p"], [code], tests=[bad])
        assert isinstance(value, RewardError)
        assert "holds no tests" in str(value)


def test_whole_programs_by_input_and_output(best: Sandbox) -> None:
    double = "```python\nprint(int(input()) * 2, end='  \\n\\n')\n```"
    for tests in ({"inputs": ["2", "3"], "outputs": ["4", "6\n"]}, json.dumps([{"input": "2", "output": "4"}])):
        assert code_answer(sandbox=best)(["p"], [double], tests=[tests]) == [1.0]
    tests = [{"input": "2", "output": "4"}, {"input": "0", "output": "1"}]
    assert code_answer(sandbox=best)(["p"], [double], tests=[tests]) == [0.0]
    assert code_answer(sandbox=best, partial_credit=True)(["p"], [double], tests=[tests]) == [0.5]
    failing = "```python\nprint(4)\nraise SystemExit(1)\n```"
    assert code_answer(sandbox=best)(["p"], [failing], tests=[tests[:1]]) == [0.0]


def test_failures_of_the_answer_score_zero_and_those_of_the_machine_exclude(
    best: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = "```python\nwhile True: pass\n```"
    tests = [[{"input": "", "output": ""}]]
    assert code_answer(sandbox=best, timeout_seconds=0.5)(["p"], [loop], tests=tests) == [0.0]
    [value] = code_answer(sandbox=best, timeout_seconds=0.5, failures="exclude")(["p"], [loop], tests=tests)
    assert isinstance(value, RewardError)
    assert "took too long" in str(value)
    broken = Sandbox(num_workers=1, isolation=best.level)
    monkeypatch.setattr("burnish.rewards.sandbox.zygotes.jailed_command", lambda *_, **__: ["/bin/false"])
    [value] = code_answer(sandbox=broken)(["p"], [loop], tests=tests)
    assert isinstance(value, SandboxError)


def test_a_killed_zygote_is_replaced(best: Sandbox) -> None:
    best.run("pass")
    zygote = best._slots.get()
    assert zygote is not None
    best._slots.put(zygote)
    os.kill(zygote._process.pid, 9)
    time.sleep(0.05)
    with pytest.raises(SandboxError):
        best.run("pass")
    assert best.run("print(1)").stdout == "1\n"


def test_nothing_runs_without_isolation_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_trial_of_process", lambda level: "reads a file outside")
    with pytest.raises(ConfigError, match=r'isolation = .auto.: .*reads a file outside.*set isolation = "none"'):
        Sandbox().run("print(1)")
    with pytest.raises(ConfigError, match="cannot be isolated"):
        code_answer(sandbox=Sandbox())(["p"], ["```\n1\n```"], tests=["assert True"])
    with pytest.raises(ConfigError, match="isolation = 'jail'"):
        Sandbox(isolation="jail")
    box = Sandbox(num_workers=1, isolation="none")
    assert (box.isolation, box.run("print(1)").stdout) == ("none", "1\n")
    assert box.run("import time; time.sleep(60)", limits=SHORT).end == "timeout"
    box.close()


def test_the_trial_sees_a_level_that_does_not_hold(monkeypatch: pytest.MonkeyPatch, best: Sandbox) -> None:
    monkeypatch.setattr("burnish.rewards.sandbox.levels._filter", lambda has_namespaces: "06000000" + "0000ff7f")
    assert "namespace" in str(trials.trial(best.level)) or "starts processes" in str(trials.trial(best.level))


def test_each_layer_stands_without_the_others(box: Sandbox) -> None:
    if box.level == "landlock":
        pytest.skip("it has no namespaces")
    before = descendants()
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(box.run, "import time; time.sleep(1)")
        time.sleep(0.5)
        [innermost] = [pid for pid in descendants() if not children(pid) and pid not in before]
        names = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
        ours, theirs = ({name: os.readlink(f"/proc/{pid}/ns/{name}") for name in names} for pid in ("self", innermost))
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{innermost}/status").read_text().splitlines())
        assert run.result().end == "ok"
    assert [name for name in names if ours[name] == theirs[name]] == []
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {0}
    assert "0" not in status["Uid"].split()  # RLIMIT_NPROC does not count the superuser's


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_isolation_is_named_and_programs_do_not_meet(best: Sandbox) -> None:
    assert best.isolation.split(" + ")[-1] == "seccomp"
    assert best.isolation.startswith((best.level, "landlock"))
    leave = "import builtins, sys, json\nbuiltins.left = sys.left = json.left = 1\nopen('left', 'w')\nprint(id(sys))"
    assert best.run(leave).end == "ok"
    look = "import builtins, sys, json, os\nprint([hasattr(m, 'left') for m in (builtins, sys, json)], os.listdir('.'))"
    assert best.run(look).stdout == "[False, False, False] []\n"


def test_streams_and_status_are_those_of_a_program(best: Sandbox) -> None:
    run = best.run("import sys\nprint(input())\nprint('e', file=sys.stderr)\nsys.exit(3)", "näh\n")
    assert (run.end, run.code, run.stdout, run.stderr) == ("error", 3, "näh\n", "e\n")
    run = best.run("import atexit\natexit.register(print, 'bye')\nif __name__ == '__main__': raise ValueError('no')")
    assert (run.end, run.code, run.stdout) == ("error", 1, "bye\n")
    assert run.stderr.endswith("ValueError: no\n")
    run = best.run("import os\nos.kill(os.getpid(), 11)")
    assert run.end in ("crash", "error")  # signals are refused without namespaces


WORKER = """
import os, socket, sys
class Dataset:
    def __init__(self, task):
        self.task = task
    def score_answer(self, answer, entry):
        exec_ = {"read": lambda: open(answer).read(), "list": lambda: os.listdir(os.path.dirname(answer)),
                 "write": lambda: os.open(answer, os.O_WRONLY), "signal": lambda: os.getpgid(int(answer)),
                 "network": lambda: socket.socket(), "processes": lambda: os.listdir("/proc"),
                 "crash": lambda: os.abort(), "memory": lambda: bytearray(64 << 30)}
        try:
            exec_[self.task]()
        except OSError:
            return 0.0
        return 1.0
def create_dataset(task, **config):
    return Dataset(task, **config)
"""


def test_graders_run_in_the_same_isolation(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "reasoning_gym"
    for name in ("", "algorithmic", "arithmetic", "games"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    for name in ("binary_matrix", "number_sorting", "spiral_matrix", "string_insertion"):
        (package / "algorithmic" / f"{name}.py").touch()
    (package / "arithmetic" / "bitwise_arithmetic.py").touch()
    (package / "games" / "n_queens.py").touch()
    (package / "factory.py").write_text(WORKER)
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    sys.modules.pop("reasoning_gym", None)
    pool = WorkerPool(num_workers=1)
    if pool.level == "none":
        pytest.skip("this machine has no isolation")
    verify = gym_answer(pool=pool, timeout_seconds=5)
    before = host.state()
    names = ("read", "list", "write", "network", "processes", "crash", "memory")
    answers = dict.fromkeys(names, host.facts()["secret"])
    if pool.level != "landlock":
        answers["signal"] = str(host.victim.pid)
    tasks = list(answers)
    texts = [f"<answer>{answer}</answer>" for answer in answers.values()]
    values = verify(["p"] * len(tasks), texts, gym_task=tasks, gym_entry=['{"answer": ""}'] * len(tasks))
    assert dict(zip(tasks, values, strict=True)) == dict.fromkeys(tasks, 0.0)
    excluding = gym_answer(pool=pool, timeout_seconds=5, failures="exclude")
    [value] = excluding(["p"], ["<answer>x</answer>"], gym_task=["crash"], gym_entry=['{"answer": ""}'])
    assert isinstance(value, RewardError)
    assert host.state() == before
    pool.close()


@pytest.mark.parametrize(
    "answer",
    ["__import__('os').system('touch mark')", "9^{9^{9^9}}", r"\frac" * 2000, "(" * 20_000],
    ids=["code", "tower", "fractions", "brackets"],
)
def test_attacks_through_mathematics(pool: WorkerPool, host: Host, answer: str) -> None:
    pytest.importorskip("math_verify")
    before = host.state()
    verify = math_answer(pool=pool, sources=["text"], timeout_seconds=1)
    assert verify(["p"], [answer], answer=["2y"]) == [0.0]
    assert verify(["p"], ["y+y"], answer=["2y"]) == [1.0]
    assert host.state() == before


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(num_workers=1)
    yield pool
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tree_that_cannot_be_seen_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory._warn_unseen.cache_clear()
    memory.warn_if_unseen(os.getpid())
    assert not caplog.records
    monkeypatch.setattr(memory, "_address_space", lambda pid: 0)
    for _ in range(2):
        memory.warn_if_unseen(os.getpid())
    (record,) = caplog.records
    assert "memory_mib bounds each process" in record.getMessage()
    memory._warn_unseen.cache_clear()
