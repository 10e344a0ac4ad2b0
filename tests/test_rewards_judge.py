"""Rewards by a language model: scores, comparisons in both orders, retries, limits; with a real HTTP server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from burnish.errors import ConfigError, RewardError
from burnish.rewards import Criterion, Rubric, rubric_from_config
from burnish.rewards import judge as judge_module
from burnish.rewards.judge import llm_judge
from http_server import JsonHandler, ThreadServer
from test_rewards_rubric import group

pytest.importorskip("httpx2")


class Judge:
    """A model that answers by a function of the text of the request; statuses other than 200 are given first."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.statuses: list[int] = []
        self.seconds = 0.0
        self.most_at_once = self._now = 0
        lock = threading.Lock()
        judge = self

        class Handler(JsonHandler):
            def handle_json(self, body: Any) -> None:
                with lock:
                    judge.asked.append(body)
                    judge.keys.append(self.headers.get("Authorization"))
                    status = judge.statuses.pop(0) if judge.statuses else 200
                    judge._now += 1
                    judge.most_at_once = max(judge.most_at_once, judge._now)
                time.sleep(judge.seconds)
                with lock:
                    judge._now -= 1
                text = answer(body["messages"][0]["content"])
                payload = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        self.server = ThreadServer(Handler)

    @property
    def url(self) -> str:
        return f"{self.server.url}/v1"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], str]], Judge]]:
    monkeypatch.setattr(judge_module, "_FIRST_PAUSE_SECONDS", 0.01)
    judges: list[Judge] = []

    def start(answer: Callable[[str], str]) -> Judge:
        judges.append(Judge(answer))
        return judges[-1]

    yield start
    for judge in judges:
        judge.server.stop()


def scores(judge: Judge, *texts: str, row: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    function = llm_judge(rubric="Is it short?", model="m", base_url=judge.url, **options)
    found = Rubric([Criterion("judge", function), Criterion("one", lambda prompts, **_: [0.0] * len(prompts))]).score(
        [group(*texts, **(row or {}))]
    )[0]
    return [score.criteria["judge"] if "judge" not in score.errors else score.errors["judge"] for score in found]


def response_of(text: str) -> str:
    mark = next(line for line in text.splitlines() if line.startswith("----"))
    return text.split("Response:\n" + mark + "\n")[1].split("\n" + mark)[0]


def test_scores_are_on_the_scale_and_know_prompt_and_rubric(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "secret")
    judge = started(lambda text: f'I think. {{"reason": "r", "score": {len(response_of(text))}}}')
    assert scores(judge, "a", "bbb", "", scale=(-1, 3), key_variable="KEY") == [0.5, 1.0, 0.25]
    assert set(judge.keys) == {"Bearer secret"}
    asked = judge.asked[0]["messages"][0]["content"]
    assert "Is it short?" in asked
    assert "\np\n" in asked
    assert (judge.asked[0]["model"], judge.asked[0]["temperature"]) == ("m", 0)


def test_the_marks_cannot_be_known_beforehand(started: Any) -> None:
    judge = started(lambda text: '{"score": 1}')
    scores(judge, "a", "b")
    marks = {line for body in judge.asked for line in body["messages"][0]["content"].splitlines() if "----" in line}
    assert len([mark for mark in marks if mark.startswith("----")]) == 2


def test_a_judge_with_a_favourite_position_says_nothing(started: Any) -> None:
    first = started(lambda text: '{"better": "A"}')
    assert scores(first, "x", row={"gold": "y"}, compare=True, reference_column="gold") == [0.5]
    assert len(first.asked) == 2

    def longer(text: str) -> str:
        a, b = (part.split("\n")[2] for part in text.split("\nResponse ")[1:])
        return json.dumps({"better": "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"})

    fair = started(longer)
    found = scores(fair, "xxx", "x", "yy", row={"gold": "zz"}, compare=True, reference_column="gold")
    assert found == [1.0, 0.0, 0.5]


def test_a_row_without_a_reference_does_not_apply(started: Any) -> None:
    judge = started(lambda text: '{"score": 10}')
    assert scores(judge, "x", row={"gold": None}, reference_column="gold") == [None]
    assert scores(judge, "x", row={"gold": "seven"}, reference_column="gold") == [1.0]
    assert "Reference answer:" in judge.asked[0]["messages"][0]["content"]


def test_failures_are_retried_and_then_exclude_the_completion(started: Any) -> None:
    judge = started(lambda text: '{"score": 10}')
    judge.statuses = [503, 429, 500]
    assert scores(judge, "x") == [1.0]
    assert len(judge.asked) == 4
    judge.statuses = [500] * 9
    (message,) = scores(judge, "x", num_retries=1)
    assert "status 500" in message
    assert "after 2 requests" in message
    judge.statuses = [401]
    (message,) = scores(judge, "x")
    assert "status 401" in message
    assert "after 1 requests" in message


@pytest.mark.parametrize(
    "answer", ["good", '{"score": "high"}', '{"score": 11}', '{"score": true}', "{}", '{"score": }']
)
def test_an_answer_that_cannot_be_read_is_no_zero(answer: str, started: Any) -> None:
    (message,) = scores(started(lambda text: answer), "x", num_retries=1)
    assert "cannot be read" in message


def test_slow_and_absent_judges(started: Any) -> None:
    judge = started(lambda text: '{"score": 10}')
    judge.seconds = 0.5
    (message,) = scores(judge, "x", num_retries=0, request_seconds=0.1)
    assert "no answer within 0.1 s" in message
    judge.server.stop()
    (message,) = scores(judge, "x", num_retries=0)
    assert "after 1 requests" in message


def test_requests_run_together_within_the_bound(started: Any) -> None:
    judge = started(lambda text: '{"score": 10}')
    judge.seconds = 0.1
    began = time.perf_counter()
    assert scores(judge, *"abcdefghijkl", max_concurrency=4) == [1.0] * 12
    assert judge.most_at_once == 4
    assert time.perf_counter() - began >= 0.3


def test_calls_for_several_prompts_share_the_bound(started: Any) -> None:
    judge = started(lambda text: '{"score": 10}')
    judge.seconds = 0.1
    function = llm_judge(rubric="Is it short?", model="m", base_url=judge.url, max_concurrency=4)
    rows = Rubric([Criterion("judge", function)]).score([group(*"abcd", index=i) for i in range(3)])
    assert [score.total for row in rows for score in row] == [1.0] * 12
    assert judge.most_at_once == 4


def test_a_memoized_judge_is_asked_once(started: Any) -> None:
    judge = started(lambda text: '{"score": 10}')
    entry = {"kind": "judge", "rubric": "r", "model": "m", "base_url": judge.url, "memoize": True}
    rubric = rubric_from_config([entry])
    for _ in range(3):
        assert [score.total for score in rubric.score([group("a", "a", "b")])[0]] == [1.0] * 3
    assert len(judge.asked) == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"base_url": "localhost"}, "base_url"),
        ({"scale": [1, 1]}, "scale"),
        ({"scale": [1]}, "scale"),
        ({"compare": True}, "reference_column"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"num_retries": -1}, "num_retries"),
        ({"request_seconds": 0.0}, "request_seconds"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {"rubric": "r", "model": "m", "base_url": "http://h/v1", **options}
    with pytest.raises(ConfigError, match=named):
        llm_judge(**given)
    with pytest.raises(ConfigError, match=named):
        rubric_from_config([{"kind": "judge", **given}])


def test_a_missing_column_is_named(started: Any) -> None:
    judge = started(lambda text: '{"score": 10}')
    function = llm_judge(rubric="r", model="m", base_url=judge.url, reference_column="gold")
    with pytest.raises(RewardError, match="'gold'"):
        Rubric([Criterion("judge", function)]).score([group("a", "b")])
