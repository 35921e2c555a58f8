"""Reads the progress of running steps from their pods, in background tasks: no reconcile ever waits for a
pod.

A pod is a tenant's: its answer may be late, endless, or no progress at all. So of each connection a bounded
number of bytes is read in a bounded time, and pods that do not answer wait for each other only. There are no
redirects, proxies, cookies and compression. What is wrong with a pod's answer is in the ProgressReading of
its step.
"""

import asyncio
import io
import logging
import random
import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException, HTTPResponse
from typing import cast

from pydantic import ValidationError

from distill_operator.metrics import PROGRESS_FAILURES
from distill_operator.pod_records import (
    AttemptId,
    PodAddress,
    ProgressReading,
    advance,
    progress_problem,
)
from distill_operator.pod_template import POD_PORT
from distill_operator.watch import Key
from vpmoe.api.progress import PROGRESS_BYTES, Progress

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 2.0
"""For one request, from the connection to the last byte."""
ANSWER_BYTES = PROGRESS_BYTES + 8192
"""Bytes of an answer that are read, headers included."""
ENDING_SECONDS = 1.0
"""Interval at which a step is read whose pods are terminating: they may be gone soon."""
STARTING_SECONDS = 120.0
"""A pod whose container runs may take so long until its process serves."""
TOLERATED_FAILURES = 2
"""Failures in a row that are not reported yet: a pod may be busy."""
PAUSE_LIMIT_SECONDS = 60.0
"""Longest pause after failures. It doubles with each."""
REQUEST = "GET /progress HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
REMEDY = "Open this port of the run's pods to the operator."
REQUESTS = 128
"""Requests in flight to pods that answered last time; as many to all others."""
REQUESTS_OF_STEP = 4
"""Requests in flight to the pods of one step."""
ASKED_PODS = 16
"""Pods of a step that are read at a time. Each knows the progress of the whole step."""


class Unreadable(Exception):
    """A pod's progress cannot be read. `reason` is that of a ProgressReading."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class _Followed:
    """A step whose pods are read."""

    attempt: AttemptId
    child: str
    """Uid of the attempt's child."""
    pods: Sequence[PodAddress] = ()
    ending: bool = False
    reading: ProgressReading = field(default_factory=ProgressReading)
    answering: frozenset[PodAddress] = frozenset()
    """The pods that answered last time."""
    answered: bool = False
    """Whether any of its pods has ever answered."""
    commits: dict[PodAddress, str] = field(default_factory=dict)
    """The commit that each pod served first: one pod runs one image."""
    failures: int = 0
    """Rounds in a row in which some pod did not answer."""
    silence: int = 0
    """Rounds in a row in which none answered."""
    wants_pods: bool = True
    since: float = field(default_factory=time.monotonic)
    """Monotonic time at which its pods ran first."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set if other pods are to be read, or at another pace."""
    task: asyncio.Task[None] | None = None


class PodProgress:
    """The progress of all running steps.

    `changed` is called with a run's key when there is something new for its next reconcile: another reading,
    or a failure after which the addresses of its pods should be read again. `interval` is in seconds. All
    methods belong to one event loop.
    """

    def __init__(self, changed: Callable[[Key], object], interval: float, port: int = POD_PORT) -> None:
        self._changed, self._interval, self._port = changed, interval, port
        self._steps: dict[tuple[Key, str], _Followed] = {}
        self._answering = asyncio.Semaphore(REQUESTS)
        self._others = asyncio.Semaphore(REQUESTS)

    def wants_pods(self, run: Key, step: str, child: str) -> bool:
        """Whether `follow` should be given the pods of this child: they are not known, or do not answer."""
        followed = self._steps.get((run, step))
        return followed is None or followed.child != child or followed.wants_pods

    def follow(
        self,
        run: Key,
        attempt: AttemptId,
        child: str,
        pods: Sequence[PodAddress] | None,
        ending: bool = False,
        always_list: bool = False,
    ) -> ProgressReading:
        """Read the progress of this attempt from now on. Returns the newest reading; does not wait.

        `pods`: those that run now, None if they were not listed. `ending`: they are being terminated.
        `always_list`: each reconcile should list them.
        """
        followed = self._steps.get((run, attempt.step))
        if followed is None or (followed.attempt, followed.child) != (attempt, child):
            self._drop(run, attempt.step)
            followed = self._steps[run, attempt.step] = _Followed(attempt, child)
        if pods is not None:
            followed.wants_pods = not pods or always_list
            if set(pods) != set(followed.pods) or ending != followed.ending:
                followed.pods, followed.ending = pods, ending
                followed.changed.set()
        if followed.pods and (followed.task is None or followed.task.done()):
            followed.since = time.monotonic()
            followed.task = asyncio.create_task(self._keep_reading(run, followed), name=str(attempt))
            followed.task.add_done_callback(lambda task: self._note_end(run, task))
        return followed.reading

    def latest(self, run: Key, attempt: AttemptId) -> ProgressReading:
        """The last reading of an attempt whose child has ended or is gone. Its pods are not read any more."""
        followed = self._steps.get((run, attempt.step))
        if followed is None or followed.attempt != attempt:
            return ProgressReading()
        followed.pods = ()
        return ProgressReading(followed.reading.progress, images=followed.reading.images)

    def keep(self, run: Key, steps: Collection[str]) -> None:
        """Follow no other steps of this run than these."""
        for of_run, step in list(self._steps):
            if of_run == run and step not in steps:
                self._drop(run, step)

    def _drop(self, run: Key, step: str) -> None:
        followed = self._steps.pop((run, step), None)
        if followed is not None and followed.task is not None:
            followed.task.cancel()

    def _note_end(self, run: Key, task: asyncio.Task[None]) -> None:
        """Log a task that ended by an error of ours. The next reconcile of the run reads on."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("reading progress of %s ended", task.get_name(), exc_info=error)
            asyncio.get_running_loop().call_later(self._interval, self._changed, run)

    async def _keep_reading(self, run: Key, followed: _Followed) -> None:
        while True:
            followed.changed.clear()
            pods = followed.pods
            if pods:
                before, asked_for_pods = followed.reading, followed.wants_pods
                self._note(followed, await self._read_pods(followed, pods))
                if not _same(before, followed.reading) or (followed.wants_pods and not asked_for_pods):
                    self._changed(run)
            try:
                async with asyncio.timeout(self._pause(followed) if pods else None):
                    await followed.changed.wait()
            except TimeoutError:
                continue

    def _pause(self, followed: _Followed) -> float:
        """Seconds until the next reading, with jitter: a restart of the operator starts them all at once."""
        pause = ENDING_SECONDS if followed.ending else self._interval
        if followed.silence and not _starting(followed):
            pause = max(pause, min(pause * 2.0 ** min(followed.silence, 16), PAUSE_LIMIT_SECONDS))
        return pause * random.uniform(0.75, 1.0)

    async def _read_pods(
        self, followed: _Followed, pods: Sequence[PodAddress]
    ) -> dict[PodAddress, Progress | Unreadable | None]:
        """What each of the pods answers, or of a random choice of many."""
        slots = asyncio.Semaphore(REQUESTS_OF_STEP)

        async def read(pod: PodAddress) -> Progress | Unreadable | None:
            async with slots, self._answering if pod in followed.answering else self._others:
                try:
                    return await self._read_pod(pod, followed.attempt)
                except Unreadable as error:
                    PROGRESS_FAILURES.labels(error.reason).inc()
                    return error

        asked = pods if len(pods) <= ASKED_PODS else random.sample(pods, ASKED_PODS)
        return dict(zip(asked, await asyncio.gather(*(read(pod) for pod in asked)), strict=True))

    def _note(self, followed: _Followed, answers: dict[PodAddress, Progress | Unreadable | None]) -> None:
        """Turn the answers of a round into the step's reading."""
        problems = [answer for answer in answers.values() if isinstance(answer, Unreadable)]
        reports = [answer for answer in answers.values() if isinstance(answer, Progress)]
        for pod, answer in answers.items():
            if isinstance(answer, Progress) and answer.commit is not None:
                followed.commits.setdefault(pod, answer.commit)
        current = set(followed.pods)
        followed.commits = {pod: commit for pod, commit in followed.commits.items() if pod in current}
        images = frozenset((pod.image, commit) for pod, commit in followed.commits.items() if pod.image)
        answered = {pod for pod, answer in answers.items() if not isinstance(answer, Unreadable)}
        followed.answering = (followed.answering - answers.keys()) | answered
        followed.answered |= bool(answered)
        followed.failures = followed.failures + 1 if problems else 0
        followed.silence = 0 if answered else followed.silence + 1
        if problems and not _starting(followed) and followed.failures & (followed.failures - 1) == 0:
            followed.wants_pods = True  # after the 1st, 2nd, 4th, 8th, …
        if answered:
            progress = max(reports, key=advance, default=None)
            followed.reading = ProgressReading(progress, attempted=True, images=images)
        elif followed.silence > TOLERATED_FAILURES and not _starting(followed):
            problem = f"{followed.attempt.step}: {problems[0]}"
            followed.reading = ProgressReading(
                attempted=True, problem=problem, reason=problems[0].reason, images=images
            )

    async def _read_pod(self, pod: PodAddress, attempt: AttemptId) -> Progress | None:
        """The progress that a pod serves; None if it has none yet. Raises Unreadable."""
        where = f"pod {pod.name} at {pod.ip}:{self._port}"
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                answer = await self._get(pod)
        except TimeoutError:
            raise Unreadable(
                "Unreachable",
                f"{where} did not answer within {TIMEOUT_SECONDS:g} s. {REMEDY}",
            ) from None
        except OSError as error:
            message = f"{where} did not answer ({error.strerror or type(error).__name__}). {REMEDY}"
            raise Unreadable("Unreachable", message) from None
        if len(answer) > ANSWER_BYTES:
            raise Unreadable("TooLarge", f"{where} answers with more than {ANSWER_BYTES} bytes.")
        try:
            status, body = parse_answer(answer)
        except (
            HTTPException,
            ValueError,
            OverflowError,
        ) as error:  # no content is quoted: it may be another service's
            message = f"{where} gives no whole HTTP answer ({type(error).__name__})."
            raise Unreadable("NotProgress", message) from None
        if status == 204:
            return None
        if status != 200:
            raise Unreadable("NotProgress", f"{where} answers with HTTP status {status}.")
        try:
            progress = Progress.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            what = ": ".join([*[".".join(map(str, first["loc"]))] * bool(first["loc"]), first["msg"]])
            raise Unreadable("NotProgress", f"{where} serves no progress report: {what}.") from None
        if problem := progress_problem(progress, attempt):
            raise Unreadable("NotProgress", f"{where} serves a progress report, but {problem}.")
        return progress

    async def _get(self, pod: PodAddress) -> bytes:
        """The answer as it was received: at most one byte more than ANSWER_BYTES. Raises OSError."""
        reader, writer = await asyncio.open_connection(pod.ip, self._port, limit=16 * 1024)
        try:
            host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
            writer.write(REQUEST.format(host=host, port=self._port).encode())
            answer = bytearray()
            while len(answer) <= ANSWER_BYTES and (
                received := await reader.read(ANSWER_BYTES + 1 - len(answer))
            ):
                answer += received
            return bytes(answer)
        finally:
            writer.transport.abort()  # does not wait for the pod


class _Received:
    """What was received, in the place of the socket that http.client reads from."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def makefile(self, mode: str) -> io.BytesIO:
        del mode
        return io.BytesIO(self._answer)


def parse_answer(answer: bytes) -> tuple[int, bytes]:
    """Status and body of a whole HTTP answer. For anything else raises HTTPException, ValueError, or
    OverflowError for a length that is no size of memory.
    """
    response = HTTPResponse(cast(socket.socket, _Received(answer)))
    response.begin()
    return response.status, response.read()


def _starting(followed: _Followed) -> bool:
    """Whether the pods' processes may not serve yet."""
    return not followed.answered and time.monotonic() - followed.since < STARTING_SECONDS


def _same(one: ProgressReading, other: ProgressReading) -> bool:
    """Whether two readings mean the same to a reconcile: the time of an update alone does not count."""
    first, second = (
        reading.progress and reading.progress.model_dump(exclude={"updated"}) for reading in (one, other)
    )
    return first == second and replace(one, progress=None) == replace(other, progress=None)
