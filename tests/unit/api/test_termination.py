"""The termination record: what jobs write, what the operator reads, and that Kubernetes keeps all of it."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe.api.progress import PROGRESS_BYTES, Progress
from vpmoe.api.termination import EXIT_CODES, MESSAGE_BYTES, RECORD_BYTES, TerminationRecord

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ADDRESS = "s3://bucket/" + "p" * 500 + "/manifest.json"
WHOLE = {
    "step": "vanilla",
    "attempt": 3,
    "state": "Running",
    "message": "Training, step 7 of 9",
    "updated": NOW,
    "tokens": {"done": 700, "total": 900},
    "tokensPerSecond": 12.5,
    "loss": 2.5,
    "heldOut": {"before": {"reasoning": 9.0, "final": 8.0}},
    "dataset": {"id": "d" * 64, "manifest": ADDRESS, "sha256": "e" * 64},
    "checkpoint": {"iteration": 6, "tokens": 600, "manifest": ADDRESS, "sha256": "c" * 64},
    "conditions": [
        {"type": "RouterCollapse", "status": "True", "reason": "DeadExpert", "message": "x" * 200}
    ],
}

any_text = st.text() | st.text(alphabet=st.sampled_from('aé中😀"\\\n\x00\x85\u2028\ud800'), max_size=6000)
counts = st.integers(0, 2**53)
amounts = st.builds(dict, done=counts, total=counts)
addresses = st.text(max_size=2048)
progresses = st.fixed_dictionaries(
    {
        "step": st.text(max_size=25),
        "attempt": st.integers(1, 10**6),
        "state": st.sampled_from(["Running", "Succeeded"]),
        "updated": st.just(NOW),
    },
    optional={
        "message": st.text(max_size=6000),
        "tokens": amounts,
        "parts": amounts,
        "tokensPerSecond": st.floats(allow_nan=False, allow_infinity=False),
        "dataset": st.fixed_dictionaries(
            {"id": st.text(max_size=64), "manifest": addresses, "sha256": st.text(max_size=64)}
        ),
        "checkpoint": st.fixed_dictionaries(
            {"iteration": counts, "tokens": counts, "manifest": addresses, "sha256": st.text(max_size=64)}
        ),
    },
)


@given(
    kind=st.sampled_from(["Succeeded", *EXIT_CODES]),
    message=any_text,
    rank=st.none() | st.integers(0, 10**6),
    commit=st.sampled_from([None, "", "ab" * 20, "cd" * 32]),
    progress=st.none() | progresses,
)
def test_a_record_of_any_content_is_one_line_that_kubernetes_keeps_and_the_operator_reads(
    kind: str, message: str, rank: int | None, commit: str | None, progress: dict[str, Any] | None
) -> None:
    record = TerminationRecord.model_validate(
        {
            "class": kind,
            "rank": rank,
            "exit": EXIT_CODES.get(kind, 0),
            "commit": commit,
            "message": message,
            "progress": progress,
        }
    )
    line = record.to_json_line()
    assert len(line) <= RECORD_BYTES and b"\n" not in line
    found = TerminationRecord.parse(line.decode())
    assert found is not None
    assert (found.kind, found.rank, found.exit, found.commit) == (kind, rank, record.exit, commit)
    whole = message.encode(errors="replace").decode()
    assert found.message == whole or (
        whole.startswith(found.message.removesuffix("…"))
        and len(json.dumps(found.message, ensure_ascii=False).encode()) >= MESSAGE_BYTES
    )
    if progress is not None and found.progress is not None:
        assert record.progress is not None
        kept = ("step", "attempt", "state", "tokens", "parts")
        assert [getattr(found.progress, name) for name in kept] == [
            getattr(record.progress, name) for name in kept
        ]


def test_a_record_that_is_cut_off_has_its_whole_commit_or_none() -> None:
    commit = "ab" * 20
    record = TerminationRecord.model_validate(
        {"class": "Internal", "exit": 70, "commit": commit, "message": "cut"}
    )
    line = record.to_json_line().decode()
    whole = line.index(f'{commit}"') + len(commit) + 1
    for size in range(len(line)):
        found = TerminationRecord.parse(line[:size])
        assert found is None or found.commit == (commit if size >= whole else None)


def test_a_record_of_usual_size_has_everything_but_the_conditions() -> None:
    record = TerminationRecord.model_validate(
        {"class": "Terminated", "exit": 143, "message": "saved", "progress": WHOLE}
    )
    found = TerminationRecord.parse(record.to_json_line().decode())
    assert found is not None and found.progress is not None
    assert found.progress == Progress.model_validate({**WHOLE, "conditions": []})


def test_a_long_message_shortens_the_progress_and_then_itself() -> None:
    record = TerminationRecord.model_validate(
        {
            "class": "Permanent",
            "exit": 65,
            "message": "x" * 9000,
            "progress": {**WHOLE, "message": "y" * 9000},
        }
    )
    line = record.to_json_line()
    found = TerminationRecord.parse(line.decode())
    assert found is not None and found.progress is not None and RECORD_BYTES - 3 <= len(line) <= RECORD_BYTES
    assert found.progress.message == "" and found.progress.checkpoint == record.progress.checkpoint
    assert len(found.message) >= MESSAGE_BYTES and found.message.endswith("…")


@pytest.mark.parametrize(
    "text, expected",
    [
        pytest.param(
            '{"class": "Permanent", "rank": 3, "exit": 65, "message": "no"}',
            TerminationRecord(kind="Permanent", rank=3, exit=65, message="no"),
            id="of the version before",
        ),
        pytest.param(
            'a log line\n{"class": "Permanent", "message": "no"}\n',
            TerminationRecord(kind="Permanent", message="no"),
            id="at the end of a log",
        ),
        pytest.param(
            '{"class": "Succeeded", "exit": 0, "message": "", "later": {"version": 2}}',
            TerminationRecord(kind="Succeeded", exit=0),
            id="of a newer version",
        ),
        pytest.param(
            '{"class": "Internal", "exit": 70, "message": "x", "progress": {"attempt": "none"}}',
            TerminationRecord(kind="Internal", exit=70, message="x"),
            id="with a progress that cannot be read",
        ),
        pytest.param(
            '{"class": "Retriable", "rank": null, "exit": 75, "message": "the store is aw',
            TerminationRecord(kind="Retriable", exit=75),
            id="cut off",
        ),
        pytest.param("", None, id="empty"),
        pytest.param("\n \n", None, id="blank"),
        pytest.param("Traceback (most recent call last):", None, id="a log line"),
        pytest.param("17", None, id="a number"),
        pytest.param("{}", None, id="an empty object"),
        pytest.param('["class"', None, id="half a list"),
        pytest.param('{"class": "Exploded", "exit": 1, "message": ""}', None, id="an unknown class"),
    ],
)
def test_what_is_read_of_a_termination_message(text: str, expected: TerminationRecord | None) -> None:
    assert TerminationRecord.parse(text) == expected


@pytest.mark.parametrize("size", range(200, RECORD_BYTES, 100))
def test_a_record_that_kubernetes_has_cut_off_is_read_as_far_as_it_goes(size: int) -> None:
    """In a pod of many containers each gets less than 4,096 bytes."""
    record = TerminationRecord.model_validate(
        {"class": "Permanent", "rank": 3, "exit": 65, "message": "no such bucket", "progress": WHOLE}
    )
    found = TerminationRecord.parse(record.to_json_line()[:size].decode())
    assert found is not None and (found.kind, found.exit, found.message) == (
        "Permanent",
        65,
        "no such bucket",
    )
    if found.progress is not None:
        assert (found.progress.step, found.progress.attempt) == ("vanilla", 3)


@given(message=st.text(max_size=20000), conditions=st.integers(0, 400))
def test_a_served_progress_has_at_most_64_kib(message: str, conditions: int) -> None:
    progress = Progress.model_validate(
        {**WHOLE, "message": message, "conditions": WHOLE["conditions"] * conditions}
    )
    text = progress.to_json()
    assert len(text) <= PROGRESS_BYTES
    found = Progress.model_validate_json(text)
    assert (found.step, found.tokens, found.checkpoint) == (
        progress.step,
        progress.tokens,
        progress.checkpoint,
    )
    assert message.startswith(found.message)
