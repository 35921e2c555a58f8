"""What a pod serves: its progress and its metrics, whatever its work and the bucket do."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import pytest

from jobs import pod_server
from jobs.entrypoint import serves_progress
from tests.fakes.recorded import small_run
from vpmoe.api import DistillRun, pod_metrics
from vpmoe.api.metrics import Sample
from vpmoe.api.progress import PROGRESS_BYTES, Progress
from vpmoe.failure import Permanent
from vpmoe.process.board import ProgressBoard
from vpmoe.process.launcher import free_port
from vpmoe.process.step_worker import StepWorker
from vpmoe.provenance import Provenance, git_sha
from vpmoe.storage import Bucket, Patience, StorageError

PROGRESS = Progress(
    step="vanilla", attempt=2, state="Running", message="é", updated=datetime(2026, 1, 1, tzinfo=UTC)
)


@contextmanager
def served(board: ProgressBoard) -> Iterator[int]:
    """The port at which the board is served."""
    port = free_port()
    server = pod_server.serve(board, str(port))
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str | None, bytes]:
    """Status, content type and body."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type"), answer.read()
    finally:
        connection.close()


def test_the_latest_progress_is_served_as_json() -> None:
    board = ProgressBoard()
    with served(board) as port:
        assert get(port, "/progress") == (204, None, b""), "before the first"
        for done in range(3):
            board.progress = PROGRESS.model_copy(update={"attempt": done + 1})
            status, content_type, body = get(port, "/progress")
            assert (status, content_type) == (200, "application/json")
            expected = board.progress.model_copy(update={"commit": git_sha() or ""})
            assert Progress.model_validate_json(body) == expected
        assert get(port, "/")[0] == get(port, "/progress/x")[0] == 404


def test_a_progress_of_any_size_is_served_in_64_kib() -> None:
    with served(ProgressBoard(PROGRESS.model_copy(update={"message": "x" * 10**6}))) as port:
        body = get(port, "/progress")[2]
    assert len(body) <= PROGRESS_BYTES and json.loads(body)["step"] == "vanilla"


def test_metrics_are_rendered_when_they_are_asked_for() -> None:
    board = ProgressBoard()
    with served(board) as port:
        assert get(port, "/metrics") == (200, pod_server.METRICS_TYPE, b""), "before the first number"
        board.metrics.record([Sample(pod_metrics.STEP, 7)])
        assert b'vpmoe_train_step{role="",run="",stage=""} 7.0\n' in get(port, "/metrics")[2]
        board.progress = PROGRESS
        assert b"vpmoe_step_progress_timestamp_seconds{" in get(port, "/metrics")[2]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_it_is_served_on_both_address_families() -> None:
    with served(ProgressBoard(PROGRESS)) as port:
        assert get(port, "/progress", "::1") == get(port, "/progress", "127.0.0.1")


def test_a_client_that_sends_nothing_does_not_stop_an_answer_to_another() -> None:
    with served(ProgressBoard(PROGRESS)) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        assert get(port, "/progress")[0] == 200
        for connection in silent:
            connection.close()


def test_a_bucket_that_does_not_answer_does_not_stop_the_served_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    run, board = DistillRun.parse(small_run()), ProgressBoard()
    provenance = Provenance(None, None, "c" * 64, "default", "tiny-run", run.uid8, "preprocess", 1, "")
    with socket.create_server(("127.0.0.1", 0)) as silent, served(board) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        bucket = Bucket.open(run.spec.storage, patience=Patience(attempts=1, connect=5, read=30))
        worker = StepWorker(run, bucket, provenance, threading.Event(), board, None)

        def report() -> None:
            with suppress(StorageError):
                worker.report("Part 1 done", 1, 4)

        writing = threading.Thread(target=report)
        writing.start()
        connection, _ = silent.accept()
        assert connection.recv(3) == b"PUT", "the report is being written"
        found = Progress.model_validate_json(get(port, "/progress")[2])
        assert writing.is_alive(), "the store has not answered"
        connection.close()
        writing.join()
    assert found.parts is not None and (found.parts.done, found.message) == (1, "Part 1 done")


@pytest.mark.parametrize("port", ["tcp://10.0.0.1:80", "-1", "99999"])
def test_a_port_that_is_none_is_rejected(port: str) -> None:
    with pytest.raises(Permanent, match=f"VPMOE_SERVE_PORT={port}"):
        pod_server.serve(ProgressBoard(), port)


def test_a_port_that_is_taken_is_rejected() -> None:
    with served(ProgressBoard()) as port, pytest.raises(Permanent, match="Set it to a free port"):
        pod_server.serve(ProgressBoard(), str(port))


@pytest.mark.parametrize(
    "role, environment, serves",
    [
        pytest.param("preprocess", {}, True, id="a worker"),
        pytest.param("sampler", {"RANK": "1"}, True, id="a role without ranks"),
        pytest.param("train", {"RANK": "0"}, False, id="the launcher in a PyTorchJob's Master"),
        pytest.param("train", {}, False, id="the launcher in a Job"),
        pytest.param("train", {"LOCAL_RANK": "0", "RANK": "0"}, True, id="rank 0"),
        pytest.param("train", {"LOCAL_RANK": "0", "RANK": "4"}, False, id="a rank of a Worker"),
        pytest.param("train", {"LOCAL_RANK": "4", "RANK": ""}, False, id="the teacher beside the ranks"),
    ],
)
def test_one_process_of_a_pod_serves(role: str, environment: dict[str, str], serves: bool) -> None:
    assert serves_progress(role, environment) is serves
