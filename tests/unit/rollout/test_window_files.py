"""Window files: round trip, equal bytes for equal windows, rejected files."""

import numpy as np
import pyarrow as pa
import pytest

from tests.fakes.students import new_seed
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.rollout.validity import VALIDITIES
from vpmoe.rollout.window_files import (
    Rollout,
    RolloutHeader,
    ScoresHeader,
    read_rollouts,
    read_scores,
    rollouts_bytes,
    scores_bytes,
)

HEADER = RolloutHeader(
    run="default/r-01234567",
    config="c" * 64,
    stage="onpolicy",
    window=3,
    version=2,
    weights="w" * 64,
    phase=0,
    seen=77,
    tokens=99,
    last=False,
    turns=0,
)


def rollouts(random: np.random.Generator, count: int = 5) -> list[Rollout]:
    files = []
    for number in range(count):
        asked, sampled = random.integers(1, 9), random.integers(1, 30)
        ids_T = random.integers(VOCABULARY_SIZE, size=asked + sampled, dtype=np.int32)
        span_C, logp_C = (
            random.integers(1, 3, size=sampled, dtype=np.uint8),
            -random.exponential(3, size=sampled).astype(np.float32),
        )
        document, validity = int(random.integers(1000)), VALIDITIES[number % 5]
        files.append(Rollout(number // 2, number % 2, document, "low", validity, ids_T, span_C, logp_C))
    return files


def scores_header(sha256: str) -> ScoresHeader:
    return ScoresHeader(run=HEADER.run, stage=HEADER.stage, window=3, rollouts=sha256, teacher="t" * 64)


def test_windows_are_read_as_they_were_written() -> None:
    random = np.random.default_rng(new_seed())
    written = rollouts(random)
    found = read_rollouts(rollouts_bytes(HEADER, written), "here")
    assert found.header == HEADER
    for one, other in zip(written, found.rollouts, strict=True):
        assert (one.prompt, one.rollout, one.document, one.effort, one.validity, one.prompt_length) == (
            other.prompt,
            other.rollout,
            other.document,
            other.effort,
            other.validity,
            other.prompt_length,
        )
        for name in ("ids_T", "span_C", "logp_C"):
            assert (getattr(one, name) == getattr(other, name)).all() and getattr(one, name).dtype == getattr(
                other, name
            ).dtype
    logp = [-random.exponential(3, size=len(one.logp_C)).astype(np.float32) for one in written]
    scores_read = read_scores(scores_bytes(scores_header(found.sha256), logp), "here", found)
    assert all(
        (one == other).all() and other.dtype == np.float32
        for one, other in zip(logp, scores_read, strict=True)
    )


def test_equal_windows_are_equal_bytes() -> None:
    seed = new_seed()
    files = [rollouts_bytes(HEADER, rollouts(np.random.default_rng(seed))) for _ in range(2)]
    assert files[0] == files[1]


def test_minus_infinity_is_stored_as_a_number_and_nan_is_rejected() -> None:
    (one,) = rollouts(np.random.default_rng(0), 1)
    one.logp_C[0] = -np.inf
    assert read_rollouts(rollouts_bytes(HEADER, [one]), "here").rollouts[0].logp_C[0] == -100
    one.logp_C[0] = np.nan
    with pytest.raises(ValueError, match="log-probability"):
        rollouts_bytes(HEADER, [one])


def test_an_invalid_window_is_rejected() -> None:
    random = np.random.default_rng(new_seed())
    window_bytes = rollouts_bytes(HEADER, rollouts(random))
    found = read_rollouts(window_bytes, "here")
    other = read_rollouts(rollouts_bytes(HEADER, rollouts(random)), "here")
    logp = [one.logp_C for one in found.rollouts]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("x", pa.int32())])) as writer:
        writer.write_table(pa.table({"x": pa.array([1], pa.int32())}))
    for data in (
        window_bytes[: len(window_bytes) // 2],
        b"",
        bytes(sink.getvalue()),
        scores_bytes(scores_header(found.sha256), logp),
    ):
        with pytest.raises(Permanent, match=r"s3://here.*delete it"):
            read_rollouts(data, "s3://here")
    with pytest.raises(Permanent, match="other rollouts"):
        read_scores(scores_bytes(scores_header(found.sha256), logp), "here", other)
    with pytest.raises(Permanent, match="one score for each"):
        read_scores(scores_bytes(scores_header(found.sha256), logp[1:]), "here", found)
