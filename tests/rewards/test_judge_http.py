"""The HTTP judge against a real server on loopback."""

import contextlib
import dataclasses
import json
import math
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from test_judge import mesh

from jaxnr.config import JudgeConfig
from jaxnr.errors import InputError
from jaxnr.rewards import judge_http
from jaxnr.rewards.criteria import Criterion, text_rubric
from jaxnr.rewards.judge import WRITTEN_TOKENS, open_judge
from jaxnr.rewards.judge_http import HttpJudge, p_yes, text_of
from jaxnr.rewards.written_rubric import WritingJudge

LISTS = [("storm florida", "rowing cup"), ("electric car",)]
CRITERIA = [tuple(Criterion(question, 1.0) for question in ("storms?", "rowing?", "cars?"))] * 2
SECRET = "token-that-nobody-may-see"


def completion(text: str, **logprobs: float) -> bytes:
    """A chat completion; ``logprobs`` are the log-probabilities of the likeliest first tokens."""
    choice: dict = {"message": {"role": "assistant", "content": text}}
    if logprobs:
        top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]}
    return json.dumps({"choices": [choice]}).encode()


class Server:
    """Answers by ``respond(message, n) -> (status, headers, body)``, n the how many-th request of that message."""

    def __init__(self, respond):
        self.requests, self.headers, self.in_flight, self.most_in_flight = [], [], 0, 0
        self.part, self.pause = 2**30, 0.0  # bytes written at once, and seconds after each part
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                message = body["messages"][0]["content"]
                with lock:
                    server.requests.append(body)
                    server.headers.append((self.path, dict(self.headers)))
                    n = sum(request["messages"][0]["content"] == message for request in server.requests)
                    server.in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server.in_flight)
                status, headers, content = respond(message, n)
                with lock:
                    server.in_flight -= 1
                with contextlib.suppress(OSError):  # a client that has given up
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    for start in range(0, len(content), server.part):
                        self.wfile.write(content[start : start + server.part])
                        time.sleep(server.pause)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(judge_http, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge_at(url: str, cache=None, token: str = "", **settings) -> HttpJudge:
    config = {"concurrency": 4, "timeout": 5.0, "retries": 2, "max_failed_share": 1.0} | settings
    return HttpJudge(JudgeConfig(kind="http", model="some", url=url, **config), token=token, cache=cache)


def always(body: bytes, status: int = 200, **headers):
    return lambda message, n: (status, headers, body)


def test_each_question_is_asked_once_with_its_list_and_answers_come_back_in_place():
    def respond(message, n):
        subject = message.rpartition("Question: ")[2].partition("?")[0].rstrip("s")
        yes = f"- {subject}" in message or f" {subject}" in message.partition("Question")[0]
        return 200, {}, completion("Yes." if yes else "no")

    with Server(respond) as server:
        judge = judge_at(server.url, token=SECRET)
        yes_NC = judge([*LISTS, LISTS[0]], [*CRITERIA, CRITERIA[0][:2]])
    np.testing.assert_array_equal(yes_NC, [[1, 1, 0], [0, 0, 1], [1, 1, np.nan]])
    assert len(server.requests) == 6  # the third list repeats the first
    assert (judge.asked, judge.failed) == (6, 0)
    for path, headers in server.headers:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == f"Bearer {SECRET}"
    message = server.requests[0]["messages"][0]["content"]
    assert "- storm florida\n- rowing cup\n" in message or "- electric car\n" in message
    assert server.requests[0]["model"] == "some"


def test_probability_comes_from_the_first_tokens_where_the_server_gives_them():
    body = completion("No", Yes=math.log(0.3), no=math.log(0.5), NO=math.log(0.1), **{" yes": math.log(0.05)})
    with Server(always(body)) as server:
        yes_NC = judge_at(server.url)(LISTS, CRITERIA)
    np.testing.assert_allclose(yes_NC, 0.35 / 0.95, rtol=1e-6)
    assert server.requests[0]["logprobs"] is True


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (completion("**Yes**, it does"), 1.0),
        (completion("<think>no, or yes?</think>\n\nno"), 0.0),
        (completion("Yes", maybe=-0.1), 1.0),  # no answer among the likeliest tokens: by the text
        (completion("Nothing"), None),
        (completion("maybe yes"), None),
        (completion("Yes", yes=float("nan")), None),
        (b"<html>", None),
        (b"{}", None),
        (b'{"choices": []}', None),
        (b'{"choices": [{"message": {"content": null}}]}', None),
        (b'{"choices": [{"logprobs": {"content": [{"top_logprobs": [7]}]}}]}', None),
        (b"[" * 100_000, None),
        (b"\xff\xfe", None),
    ],
)
def test_an_answer_is_yes_no_or_none_whatever_the_response(content, expected):
    assert p_yes(content) == expected


def test_no_more_requests_are_under_way_than_allowed():
    def respond(message, n):
        time.sleep(0.02)
        return 200, {}, completion("yes")

    criteria = [tuple(Criterion(f"{number}?", 1.0) for number in range(30))]
    with Server(respond) as server:
        yes_NC = judge_at(server.url, concurrency=3)([("storm",)], criteria)
    assert yes_NC.tolist() == [[1.0] * 30]
    assert len(server.requests) == 30
    assert server.most_in_flight == 3


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_passing_failure_is_tried_again(status):
    def respond(message, n):
        return (200, {}, completion("yes")) if n == 3 else (status, {}, b"busy")

    with Server(respond) as server:
        judge = judge_at(server.url, retries=2)
        assert np.all(judge(LISTS, CRITERIA) == 1)
    assert len(server.requests) == 18
    assert judge.failed == 0


def test_retry_after_is_honoured_up_to_the_longest_delay(monkeypatch):
    def respond(message, n):
        return (200, {}, completion("yes")) if n == 2 else (429, {"Retry-After": "0.3"}, b"")

    with Server(respond) as server:
        started = time.monotonic()
        judge_at(server.url)(LISTS, [CRITERIA[0], ()])
        assert time.monotonic() - started >= 0.3
        monkeypatch.setattr(judge_http, "LONGEST_DELAY", 0.01)
        server.requests.clear()
        started = time.monotonic()
        judge_at(server.url)(LISTS, [CRITERIA[0], ()])
        assert time.monotonic() - started < 0.3
    assert judge_http._retry_after("Fri, 31 Dec 9999 23:59:59 GMT") > 1e9
    assert [judge_http._retry_after(value) for value in ("soon", "", None, "-3", "nan")] == [None] * 5


def test_delays_double(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    with Server(always(b"", 500)) as server:
        monkeypatch.setattr(judge_http.asyncio, "sleep", sleep)
        judge_at(server.url, retries=5, concurrency=1)(LISTS[:1], [CRITERIA[0][:1]])
    assert len(slept) == 5
    assert all(0.5 <= seconds / (0.01 * 2**attempt) <= 1.5 for attempt, seconds in enumerate(slept))


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refusal_is_not_tried_again(status):
    with Server(always(b"no such model", status, Location="/elsewhere")) as server:
        judge = judge_at(server.url)
        assert np.all(np.isnan(judge(LISTS, CRITERIA)))
    assert len(server.requests) == 6
    assert judge.failed == 6


def test_a_response_that_is_late_drips_or_is_too_long_is_a_failure(monkeypatch):
    release = threading.Event()

    def late(message, n):
        release.wait(2)
        return 200, {}, completion("yes")

    with Server(late) as server:
        judge = judge_at(server.url, timeout=0.1, retries=1)
        started = time.monotonic()
        assert np.isnan(judge(LISTS[:1], [CRITERIA[0][:1]])).all()
        assert time.monotonic() - started < 1
        assert len(server.requests) == 2
        release.set()
    with Server(always(completion("yes"))) as server:
        server.part, server.pause = 1, 0.04
        judge = judge_at(server.url, timeout=0.2, retries=0)
        started = time.monotonic()
        assert np.isnan(judge(LISTS[:1], [CRITERIA[0][:1]])).all()
        assert time.monotonic() - started < 1
    monkeypatch.setattr(judge_http, "LARGEST_RESPONSE", 1000)
    with Server(always(completion("yes" + " " * 1000))) as server:
        judge = judge_at(server.url)
        assert np.isnan(judge(LISTS[:1], [CRITERIA[0][:1]])).all()
        assert len(server.requests) == 1


def written(message: str, n: int = 1):
    """A question to a message that asks for one; to others yes."""
    signal = re.search(r'^- "(.*)"$', message, re.MULTILINE)
    return 200, {}, completion(f"Does the list have a query on {signal[1]}?" if signal else "yes")


def test_questions_are_written_by_the_endpoint_once_and_then_asked(tmp_path):
    rubric = text_rubric(("storm", "rowing", "car"), (4.0, 2.0, 1.0), (["a storm"], ["a regatta"], ["an electric car"]))

    def respond(message, n):
        if '- "an electric car"' in message:
            return 200, {}, completion('{"question": "cars?"}')
        if '- "a regatta"' in message and n == 1:
            return 503, {}, b"busy"
        status, headers, body = written(message)
        return status, headers, body.replace(b"Does", b"<think>so?</think>\\n\\nDoes")

    with Server(respond) as server:
        config = JudgeConfig(kind="http", model="some", url=server.url, rubric="language_model", max_failed_share=1.0)
        judge = open_judge(config, tmp_path, mesh())
        assert isinstance(judge, WritingJudge)
        np.testing.assert_array_equal(judge(LISTS, [rubric.coverage] * 2), np.ones((2, 4)))
        writing = [body for body in server.requests if "logprobs" not in body]
        asked = [body["messages"][0]["content"] for body in server.requests if "logprobs" in body]
        assert len(writing) == 4  # one of them again, after the 503
        assert writing[0]["temperature"] == 0
        assert writing[0]["max_tokens"] == WRITTEN_TOKENS
        assert judge.refused == 1
        for question in ("Does the list have a query on a storm?", "Does the list contain a query about: car?"):
            assert sum(f"Question: {question}\n" in message for message in asked) == 2
        server.requests.clear()
        open_judge(config, tmp_path, mesh())(LISTS, [rubric.coverage] * 2)
        assert server.requests == []
        open_judge(dataclasses.replace(config, cache=""), tmp_path, mesh())(LISTS, [rubric.coverage] * 2)
        assert len(server.requests) == 8
        assert all("logprobs" in body for body in server.requests)


def test_few_messages_without_a_reply_leave_theirs_empty_and_more_stop_the_run():
    def respond(message, n):
        return (400, {}, b"no") if "odd" in message else (200, {}, completion(f"reply to {message}"))

    messages = [f"{number} {'odd' if number % 2 else 'even'}" for number in range(24)]
    with Server(respond) as server:
        judge = judge_at(server.url, max_failed_share=0.5)
        assert judge.write(messages[:18]) == [f"reply to {m}" if "even" in m else "" for m in messages[:18]]
        assert (judge.asked, judge.failed) == (18, 9)
        with pytest.raises(InputError, match="failed on 10 of 24 questions"):
            judge_at(server.url, max_failed_share=0.4).write(messages)
        assert judge_at(server.url).write([]) == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (completion("<think>hm</think> yes?"), " yes?"),
        (b'{"choices": [{"message": {"content": null}}]}', None),
        (b'{"choices": {}}', None),
        (b"[1]", None),
        (b"\xff", None),
    ],
)
def test_a_reply_is_the_text_of_a_completion(content, text):
    assert text_of(content) == text


def test_malformed_answers_are_nan_and_counted_and_leave_the_others():
    def respond(message, n):
        return 200, {}, b'{"choices": [' if "rowing?" in message else completion("yes")

    with Server(respond) as server:
        judge = judge_at(server.url)
        np.testing.assert_array_equal(judge(LISTS, CRITERIA), [[1, np.nan, 1]] * 2)
    assert (judge.asked, judge.failed) == (6, 2)


def test_cached_answers_are_not_asked_again_by_another_instance(tmp_path):
    def respond(message, n):
        return (400, {}, b"") if "cars?" in message else (200, {}, completion("no", yes=-1.5, no=-0.25))

    cache = tmp_path / "folder" / "judge.sqlite"
    with Server(respond) as server:
        first = judge_at(server.url, cache, SECRET)(LISTS, CRITERIA)
        assert len(server.requests) == 6
        again = judge_at(server.url, cache)(LISTS, CRITERIA)
        assert len(server.requests) == 8  # the two that had failed
        np.testing.assert_array_equal(again, first)
        assert np.isnan(first[:, 2]).all()
        other = HttpJudge(JudgeConfig(kind="http", model="another", url=server.url), token="", cache=cache)
        other(LISTS[:1], [CRITERIA[0][:2]])
        assert len(server.requests) == 10
    written = b"".join(path.read_bytes() for path in cache.parent.iterdir())
    assert written
    assert SECRET.encode() not in written


def test_answers_before_a_stop_are_kept(tmp_path):
    def respond(message, n):
        return (200, {}, completion("yes")) if "storms?" in message else (400, {}, b"")

    cache = tmp_path / "judge.sqlite"
    criteria = [(CRITERIA[0][0], *(Criterion(f"{number}?", 1.0) for number in range(30)))]
    with Server(respond) as server:
        with pytest.raises(InputError):
            judge_at(server.url, cache, max_failed_share=0.2, concurrency=1)(LISTS[:1], criteria)
        assert len(server.requests) == 11  # no more are sent once the run stops
        server.requests.clear()
        assert judge_at(server.url, cache)(LISTS[:1], [CRITERIA[0][:1]]).tolist() == [[1.0]]
        assert server.requests == []


ASK = """
import sys
from pathlib import Path
from jaxnr.config import JudgeConfig
from jaxnr.rewards.criteria import Criterion
from jaxnr.rewards.judge_http import HttpJudge
config = JudgeConfig(kind="http", model="some", url=sys.argv[1], concurrency=1)
HttpJudge(config, token="", cache=Path(sys.argv[2]))([("storm",)], [[Criterion(f"{n}?", 1.0) for n in range(3)]])
"""


def test_a_killed_process_leaves_the_answers_that_it_had(tmp_path):
    third = threading.Event()

    def respond(message, n):
        if "2?" in message and not third.is_set():
            third.set()
            time.sleep(60)
        return 200, {}, completion("yes")

    cache = tmp_path / "judge.sqlite"
    with Server(respond) as server:
        process = subprocess.Popen([sys.executable, "-c", ASK, server.url, str(cache)])
        assert third.wait(60)
        process.kill()
        process.wait()
        assert len(server.requests) == 3
        criteria = [tuple(Criterion(f"{number}?", 1.0) for number in range(3))]
        assert judge_at(server.url, cache)([("storm",)], criteria).tolist() == [[1.0, 1.0, 1.0]]
        assert len(server.requests) == 4


def test_past_the_share_of_failures_a_run_stops_and_says_why_without_the_token():
    def respond(message, n):
        number = int(message.rpartition("Question: ")[2].partition("?")[0])
        return (401, {}, f"bad key {SECRET}".encode()) if number % 3 == 0 else (200, {}, completion("yes"))

    criteria = [tuple(Criterion(f"{number}?", 1.0) for number in range(60))]
    with Server(respond) as server:
        assert np.isnan(judge_at(server.url, max_failed_share=0.34)([("storm",)], criteria)).sum() == 20
        # Nine failures of 27 are as large a share, and too few to stop for.
        assert np.isnan(judge_at(server.url, max_failed_share=0.1)([("storm",)], [criteria[0][:27]])).sum() == 9
        with pytest.raises(InputError) as caught:
            judge_at(server.url, max_failed_share=0.2, token=SECRET)([("storm",)], criteria)
    assert "failed on 13 of 60 questions" in str(caught.value)
    assert "HTTP status 401: bad key ***" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_server_that_is_not_there_stops_the_run_at_once():
    with Server(always(b"")) as server:
        url = server.url
    with pytest.raises(InputError, match="ConnectError"):
        judge_at(url, max_failed_share=0.05)(LISTS, CRITERIA)


def test_a_file_that_is_no_cache_is_named(tmp_path):
    path = tmp_path / "judge.sqlite"
    path.write_text("something else entirely, and long enough to be read as a header of a database" * 20)
    with pytest.raises(InputError, match=str(path)):
        judge_at("http://127.0.0.1:9/v1", path)(LISTS, CRITERIA)
