"""Progress from pods: what is read, that no pod can stop the reading of others, and what is reported of one
that cannot be read."""

import asyncio
import contextlib
import gzip
import json
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any

import pytest
from distill_operator import pod_progress
from distill_operator.pod_progress import PodProgress, parse_answer
from distill_operator.pod_records import AttemptId, PodAddress, PodImage, ProgressReading
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.pod_server import PodServer
from tests.fakes.pods import Pods, answer, report
from vpmoe.api.progress import PROGRESS_BYTES, Progress
from vpmoe.process.board import ProgressBoard

RUN, OTHER = ("team", "first"), ("others", "second")
CHILD = "uid-1"
ATTEMPT = AttemptId("team/first-0a1b2c3d", "vanilla", 1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short time-outs; pods serve as soon as they run."""
    monkeypatch.setattr(pod_progress, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(pod_progress, "STARTING_SECONDS", 0.0)
    monkeypatch.setattr(pod_progress, "PAUSE_LIMIT_SECONDS", 0.02)
    monkeypatch.setattr(pod_progress, "ENDING_SECONDS", 0.01)


class Reader:
    """PodProgress, and the keys that it has queued."""

    def __init__(self, port: int, interval: float = 0.01) -> None:
        self.queued: list[tuple[str, str]] = []
        self.progress = PodProgress(self.queued.append, interval, port)
        self._fields: dict[tuple[str, str], dict[str, Any]] = {}

    def follow(self, *pods: PodAddress, run: tuple[str, str] = RUN, **changes: Any) -> ProgressReading:
        """Follow step vanilla with these pods; without any, as before."""
        before = self._fields.get(run, {"attempt": ATTEMPT, "child": CHILD})
        self._fields[run] = before | changes
        return self.progress.follow(run, **self._fields[run], pods=pods or None)

    async def until(
        self, true: Callable[[ProgressReading], bool], run: tuple[str, str] = RUN
    ) -> ProgressReading:
        """The first reading of step vanilla for which that is true."""
        async with asyncio.timeout(60):
            while not true(reading := self.follow(run=run)):
                await asyncio.sleep(0.005)
        return reading

    def close(self) -> None:
        for run in (RUN, OTHER):
            self.progress.keep(run, ())


def run_with_pods(test: Callable[[Pods, Reader], Awaitable[None]], interval: float = 0.01) -> None:
    async def main() -> None:
        async with Pods() as pods:
            reader = Reader(pods.port, interval)
            try:
                await test(pods, reader)
            finally:
                reader.close()

    asyncio.run(main())


def done(reading: ProgressReading) -> int:
    return reading.progress.parts.done if reading.progress and reading.progress.parts else 0


def as_json(**changes: Any) -> bytes:
    """The JSON of a progress with some members replaced."""
    return json.dumps(json.loads(report().to_json()) | changes).encode()


Start = Callable[[Pods], Any]
BAD_PODS: dict[str, tuple[Start, str, str]] = {
    "accepts and sends nothing": (Pods.black_hole, "Unreachable", "did not answer within"),
    "drops every packet": (Pods.unreachable, "Unreachable", "did not answer within"),
    "refuses": (Pods.refusing, "Unreachable", "Open this port"),
    "sends a byte at a time": (Pods.dripping, "Unreachable", "did not answer within"),
    "resets the connection": (Pods.resetting, "Unreachable", "did not answer"),
    "resets it amid the answer": (
        lambda pods: pods.resetting(answer(b"{", length=99)),
        "Unreachable",
        "did not answer",
    ),
    "400 MiB": (
        lambda pods: pods.endless(b"HTTP/1.0 200 OK\r\n\r\n", b" "),
        "TooLarge",
        "more than",
    ),
    "400 MiB that it announces": (
        lambda pods: pods.endless(answer(b"", length=400 * 2**20), b"x"),
        "TooLarge",
        "more than",
    ),
    "400 MiB of headers": (
        lambda pods: pods.endless(b"HTTP/1.0 200 OK\r\n", b"X-Header: 1\r\n"),
        "TooLarge",
        "more than",
    ),
    "400 MiB of one header": (
        lambda pods: pods.endless(b"HTTP/1.0 200 OK\r\nX-Header: ", b"1"),
        "TooLarge",
        "more than",
    ),
    "400 MiB of chunks of a byte": (
        lambda pods: pods.endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        "TooLarge",
        "more than",
    ),
    "400 MiB of interim answers": (
        lambda pods: pods.endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "TooLarge",
        "more than",
    ),
    "one byte too many": (
        lambda pods: pods.answering(answer(b" " * (PROGRESS_BYTES + 8192))),
        "TooLarge",
        "more than",
    ),
    "a redirect": (
        lambda pods: pods.answering(answer(b"", "302 Found", f"Location: http://127.0.1.1:{pods.port}/")),
        "NotProgress",
        "HTTP status 302",
    ),
    "an error": (
        lambda pods: pods.answering(answer(b"secret", "500 Internal Server Error")),
        "NotProgress",
        "HTTP status 500",
    ),
    "not found": (
        lambda pods: pods.answering(answer(b"", "404 Not Found")),
        "NotProgress",
        "HTTP status 404",
    ),
    "metrics, as the version before": (
        lambda pods: pods.answering(answer(b"# HELP vpmoe_train_step Optimizer steps\n")),
        "NotProgress",
        "Invalid JSON",
    ),
    "another protocol": (
        lambda pods: pods.answering(b"SSH-2.0-secret\r\n"),
        "NotProgress",
        "no whole HTTP answer",
    ),
    "nothing": (lambda pods: pods.answering(b""), "NotProgress", "no whole HTTP answer"),
    "half an answer": (
        lambda pods: pods.answering(answer(report().to_json(), length=999)),
        "NotProgress",
        "no whole HTTP answer",
    ),
    "a length that is no size of memory": (
        lambda pods: pods.answering(answer(b"{}", length=10**30)),
        "NotProgress",
        "no whole HTTP answer",
    ),
    "TLS": (
        lambda pods: pods.answering(b"\x15\x03\x01\x00\x02\x02\x46"),
        "NotProgress",
        "no whole HTTP answer",
    ),
    "compressed": (
        lambda pods: pods.answering(answer(gzip.compress(b" " * 10**6), "200 OK", "Content-Encoding: gzip")),
        "NotProgress",
        "Invalid JSON",
    ),
    "not UTF-8": (lambda pods: pods.answering(answer(b'{"step": "\xff"}')), "NotProgress", "Invalid JSON"),
    "a lone surrogate": (
        lambda pods: pods.answering(answer(b'{"step": "\\ud800"}')),
        "NotProgress",
        "Invalid JSON",
    ),
    "a list": (lambda pods: pods.answering(answer(b"[]")), "NotProgress", "should be an object"),
    "deep": (lambda pods: pods.answering(answer(b"[" * 60000)), "NotProgress", "Invalid JSON"),
    "of another attempt": (lambda pods: pods.healthy(report(attempt=2)), "NotProgress", "attempt 2, not 1"),
    "of another step": (lambda pods: pods.healthy(report("rescore")), "NotProgress", "of another step"),
    "of another run, which has the address now": (
        lambda pods: pods.healthy(report(run="team/first-ffffffff")),
        "NotProgress",
        "of another run",
    ),
    "a text for a number": (
        lambda pods: pods.answering(answer(as_json(parts={"done": "secret", "total": 4}))),
        "NotProgress",
        "parts.done: ",
    ),
    "a count below zero": (
        lambda pods: pods.answering(answer(as_json(parts={"done": -1, "total": 4}))),
        "NotProgress",
        "parts.done: ",
    ),
    "a count that no status can hold": (
        lambda pods: pods.answering(answer(as_json(tokens={"done": 10**30, "total": 4}))),
        "NotProgress",
        "count above",
    ),
    "an endless number": (
        lambda pods: pods.answering(answer(b'{"attempt": ' + b"9" * 60000 + b"}")),
        "NotProgress",
        "serves no progress",
    ),
    "not a number": (
        lambda pods: pods.answering(answer(as_json().replace(b'"Running"', b'"Running", "loss": NaN'))),
        "NotProgress",
        "loss: ",
    ),
    "a time without zone": (
        lambda pods: pods.answering(answer(as_json(updated="0001-01-01T00:00:00"))),
        "NotProgress",
        "no time zone",
    ),
    "an id that is no hash": (
        lambda pods: pods.answering(answer(as_json(dataset={"id": "a/b", "manifest": "", "sha256": ""}))),
        "NotProgress",
        "dataset.id",
    ),
}


@pytest.mark.parametrize("what", BAD_PODS)
def test_what_a_pod_does_is_reported_of_its_step_and_delays_no_other(what: str) -> None:
    start, reason, message = BAD_PODS[what]

    async def test(pods: Pods, reader: Reader) -> None:
        bad = start(pods)
        bad = bad if isinstance(bad, PodAddress) else await bad
        healthy = await pods.counting("healthy")
        reader.follow(bad)
        reader.follow(healthy, run=OTHER)
        reading = await reader.until(lambda reading: bool(reading.problem))
        assert (reading.progress, reading.attempted, reading.reason) == (None, True, reason)
        assert message in reading.problem and f"vanilla: pod {bad.name} at {bad.ip}" in reading.problem
        assert "secret" not in reading.problem, "nothing of an answer is quoted: it may be another service's"
        before = done(reader.follow(run=OTHER))
        assert before > 0
        await reader.until(lambda reading: done(reading) > before, run=OTHER)
        assert {RUN, OTHER} <= {*reader.queued}

    run_with_pods(test)


LINES = [
    *(b"HTTP/%b 200 OK\r\n" % version for version in (b"1.1", b"1.0", b"0.9", b"2", b"9.9", b"")),
    *(b"HTTP/1.1 %b x\r\n" % status for status in (b"100", b"204", b"-1", b"999999", b"", b"\xb2")),
    *(
        b"Content-Length: %b\r\n" % length
        for length in (b"5", b"-5", b"9" * 30, b"\xc2\xb2", b"1_0", b"5, 6")
    ),
    *(b"%b\r\n" % size for size in (b"5", b"-5", b"f" * 30, b"0x5", b"5;x=y", b"0\r\n")),
    *(b"Transfer-Encoding: %b\r\n" % coding for coding in (b"chunked", b"gzip, chunked", b"identity")),
    b"Content-Type: multipart/mixed; boundary=a\r\n",
    b"Content-Type: text/html; charset=\xff\r\n",
    *(
        b"--a\r\n",
        b": x\r\n",
        b" folded\r\n",
        b"From x\r\n",
        b"X: =?utf-8?b?////?=\r\n",
        b"X: " + b"y" * 70000,
    ),
    *(b"\r\n", b"\n", b"\r", b"\x00", b"\xff\xfe", b"{}", b"hello", b"\x16\x03\x01\x02"),
]


@settings(max_examples=500, derandomize=True, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(LINES), st.binary(max_size=20)), max_size=9), st.booleans())
def test_bytes_of_any_kind_are_an_answer_or_none(parts: list[bytes], starts_well: bool) -> None:
    with contextlib.suppress(HTTPException, ValueError, OverflowError):
        status, body = parse_answer(b"HTTP/1.1 200 OK\r\n" * starts_well + b"".join(parts))
        assert isinstance(status, int) and isinstance(body, bytes)


def test_an_endless_answer_takes_no_memory() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        reader.follow(*[await pods.endless(b"HTTP/1.0 200 OK\r\n\r\n", b" ") for _ in range(8)])
        tracemalloc.start()
        await reader.until(lambda reading: reading.reason == "TooLarge")
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
        tracemalloc.stop()

    run_with_pods(test)


def test_a_crowd_of_silent_pods_does_not_delay_those_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_progress, "REQUESTS", 2)

    async def test(pods: Pods, reader: Reader) -> None:
        reader.follow(await pods.counting(), run=OTHER)
        await reader.until(lambda reading: done(reading) > 0, run=OTHER)
        silent = await pods.black_hole()
        for number in range(200):
            reader.progress.follow(RUN, replace(ATTEMPT, step=f"step-{number}"), CHILD, [silent])
        seen = done(reader.follow(run=OTHER))
        await reader.until(lambda reading: done(reading) > seen + 20, run=OTHER)
        assert pods.requests.count(silent.name) < 200, "they wait for each other"

    run_with_pods(test)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_no_proxy_is_used(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        proxy = await pods.healthy(report(done=7), name="proxy")
        monkeypatch.setenv(variable, f"http://{proxy.ip}:{pods.port}")
        reader.follow(await pods.healthy(report(done=1)))
        assert done(await reader.until(lambda reading: reading.attempted)) == 1
        assert "proxy" not in pods.requests

    run_with_pods(test)


def test_no_redirect_is_followed() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        target = await pods.healthy(report(done=7), name="target")
        location = f"Location: http://{target.ip}:{pods.port}/progress"
        reader.follow(await pods.answering(answer(b"", "301 Moved Permanently", location)))
        await reader.until(lambda reading: bool(reading.problem))
        assert "target" not in pods.requests

    run_with_pods(test)


def test_the_server_of_a_pod_is_read() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        board = ProgressBoard()
        server = PodServer(board, pods.port)
        serving = asyncio.create_task(asyncio.to_thread(server.serve_forever, 0.01))
        try:
            for ip in ("127.0.0.1", "::1"):
                board.progress = None
                reader.follow(PodAddress("p", ip), child=ip)
                await reader.until(lambda reading: reading == ProgressReading(attempted=True))
                board.progress = report(done=3, message="é" * 10**5)
                assert done(await reader.until(lambda reading: reading.progress is not None)) == 3
        finally:
            server.shutdown()
            await serving
            server.server_close()

    run_with_pods(test)


def test_of_several_pods_the_one_that_got_furthest_counts() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        reader.follow(
            await pods.healthy(report(done=2)),
            await pods.healthy(report(done=5)),
            await pods.answering(answer(b"", "204 No Content")),
            await pods.healthy(report(done=4)),
            pods.refusing(),
        )
        assert done(await reader.until(lambda reading: reading.attempted)) == 5
        assert reader.follow().problem == ""
        await reader.until(lambda reading: reader.progress.wants_pods(RUN, "vanilla", CHILD))

    run_with_pods(test)


def test_the_commit_that_a_pod_served_first_counts() -> None:
    """A pod that serves another each time makes neither the operator's memory nor the status grow."""
    first, second = "1" * 40, "2" * 40
    image = PodImage("r.example.com/vpmoe/trainer:1", f"sha256:{'a' * 64}")

    async def test(pods: Pods, reader: Reader) -> None:
        changing = [report(done=number + 1, commit=f"{number:040x}") for number in range(9)]
        served = [
            ([report(commit=first)], image),
            ([report(commit=second)], image),
            ([report(commit="")], replace(image, digest="")),
            ([report()], PodImage("an older version")),
            ([report(commit=first)], None),
            (changing, PodImage("changing")),
        ]
        addresses = [replace(await pods.healthy(*progress), image=of) for progress, of in served]
        expected = {
            (image, first),
            (image, second),
            (replace(image, digest=""), ""),
            (PodImage("changing"), f"{0:040x}"),
        }
        reader.follow(*addresses)
        assert (await reader.until(lambda reading: done(reading) == 9)).images == expected
        assert reader.progress.latest(RUN, ATTEMPT).images == expected, "its pods are gone"
        assert not reader.progress.latest(RUN, replace(ATTEMPT, number=2)).images
        reader.follow(addresses[0])
        await reader.until(lambda reading: reading.images == {(image, first)})

    run_with_pods(test)


def test_of_many_pods_a_few_are_read_at_a_time() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        many = [await pods.healthy(report(done=number)) for number in range(40)]
        reader.follow(*many)
        await reader.until(lambda reading: reading.attempted)
        reader.progress.keep(RUN, ())
        assert len(pods.requests) <= 2 * pod_progress.ASKED_PODS

    run_with_pods(test, interval=60)


def test_a_run_is_queued_for_a_change_and_not_for_the_time_of_an_update() -> None:
    later = {"updated": datetime(2026, 1, 2, tzinfo=UTC)}

    async def test(pods: Pods, reader: Reader) -> None:
        reader.follow(await pods.healthy(report(done=1), report(done=1, **later), report(done=2, **later)))
        await reader.until(lambda reading: done(reading) == 2)
        assert reader.queued == [RUN, RUN]

    run_with_pods(test)


def test_a_pod_that_is_busy_once_is_no_problem_and_keeps_its_reading() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        answers = [answer(report(done=1).to_json()), b"", b"", answer(report(done=2).to_json())]
        following = iter(answers)

        async def handler(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(next(following, answers[-1]))

        pod = await pods.start(handler)
        reader.follow(pod)
        seen = set()

        def finished(reading: ProgressReading) -> bool:
            seen.add((done(reading), reading.problem))
            return done(reading) == 2

        await reader.until(finished)
        assert seen <= {(0, ""), (1, ""), (2, "")}

    run_with_pods(test)


def test_a_process_that_does_not_serve_yet_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_progress, "STARTING_SECONDS", 3600.0)

    async def test(pods: Pods, reader: Reader) -> None:
        starting = pods.refusing()
        for _ in range(50):
            assert reader.follow(starting) == ProgressReading()
            await asyncio.sleep(0.01)
        assert reader.queued == [] and not reader.progress.wants_pods(RUN, "vanilla", CHILD)

    run_with_pods(test)


def test_a_problem_ends_when_the_pod_answers() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        reader.follow(pods.refusing())
        await reader.until(lambda reading: reading.reason == "Unreachable")
        assert reader.progress.wants_pods(RUN, "vanilla", CHILD), "its address may have changed"
        reader.follow(await pods.healthy(report(done=3)))
        assert done(await reader.until(lambda reading: not reading.problem)) == 3

    run_with_pods(test)


def test_a_new_attempt_has_no_reading_of_the_one_before() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        reader.follow(await pods.healthy(report(done=8)))
        await reader.until(lambda reading: done(reading) == 8)
        assert reader.progress.wants_pods(RUN, "vanilla", "uid-2")
        assert reader.follow(child="uid-2", attempt=replace(ATTEMPT, number=2)) == ProgressReading()

    run_with_pods(test)


def test_the_last_reading_stays_after_the_pods_are_gone() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        reader.follow(await pods.healthy(report(done=8, state="Succeeded")))
        await reader.until(lambda reading: done(reading) == 8)
        for _ in range(3):
            assert done(reader.progress.latest(RUN, ATTEMPT)) == 8
            await asyncio.sleep(0.02)
        assert reader.progress.latest(RUN, replace(ATTEMPT, number=2)) == ProgressReading()
        reader.progress.keep(RUN, ["another"])
        assert reader.progress.latest(RUN, ATTEMPT) == ProgressReading()

    run_with_pods(test)


def test_a_child_whose_pods_are_not_listed_yet_wants_them() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        assert reader.progress.wants_pods(RUN, "vanilla", CHILD)
        assert reader.progress.follow(RUN, ATTEMPT, CHILD, []) == ProgressReading()
        assert reader.progress.wants_pods(RUN, "vanilla", CHILD), "none runs yet"
        reader.follow(await pods.healthy(report()))
        assert not reader.progress.wants_pods(RUN, "vanilla", CHILD)

    run_with_pods(test)


def test_pods_that_terminate_are_read_more_often() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        pod = await pods.counting()
        reader.follow(pod)
        await reader.until(lambda reading: done(reading) == 1)
        reader.follow(pod, ending=True)
        await reader.until(lambda reading: done(reading) > 5)

    run_with_pods(test, interval=3600)


def test_a_fault_of_ours_ends_one_reading_and_the_next_reconcile_reads_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        pod = await pods.healthy(report(done=3))
        with monkeypatch.context() as patch:
            patch.setattr(pod_progress, "progress_problem", lambda *arguments: 1 / 0)
            reader.follow(pod)
            async with asyncio.timeout(30):
                while "ZeroDivisionError" not in caplog.text or RUN not in reader.queued:
                    await asyncio.sleep(0.01)
        reader.follow(pod)
        await reader.until(lambda reading: done(reading) == 3)

    run_with_pods(test)


def test_a_progress_of_64_kib_is_read() -> None:
    whole = report(done=3, message="x" * (PROGRESS_BYTES - 300))
    assert PROGRESS_BYTES - 300 < len(whole.to_json()) <= PROGRESS_BYTES

    async def test(pods: Pods, reader: Reader) -> None:
        reader.follow(await pods.healthy(whole))
        assert (await reader.until(lambda reading: reading.attempted)).progress == whole

    run_with_pods(test)


def test_unknown_members_of_a_newer_version_are_ignored() -> None:
    async def test(pods: Pods, reader: Reader) -> None:
        reader.follow(await pods.answering(answer(as_json(later={"a": [1]}))))
        reading = await reader.until(lambda reading: reading.attempted)
        assert reading.progress == Progress.model_validate(report())

    run_with_pods(test)
