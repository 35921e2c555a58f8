"""Part files: round trip of rollouts and of scores, rejected files."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.fakes.part_rollouts import HEADER, random_rollouts
from tests.fakes.students import new_seed
from vpmoe.failure import Permanent
from vpmoe.rollout.part_files import (
    Part,
    PartScoresHeader,
    RolloutKey,
    part_bytes,
    part_scores_bytes,
    read_part,
    read_part_scores,
)
from vpmoe.storage import Bucket


def scores_bytes(
    of: Part, logp: dict[RolloutKey, NDArray[np.float32]], sha256: str = "", teacher: str = "t"
) -> bytes:
    header = PartScoresHeader(
        run=HEADER.run,
        stage=HEADER.stage,
        version=2,
        part=3,
        worker=0,
        rollouts=sha256 or of.sha256,
        teacher=teacher,
    )
    return part_scores_bytes(header, logp)


def test_parts_and_their_scores_are_read_as_they_were_written(bucket: Bucket) -> None:
    random = np.random.default_rng(new_seed())
    written = random_rollouts(random)
    bucket.create("part", part_bytes(HEADER, written), {})
    part = read_part(bucket, "part", HEADER.dump())
    assert part.header == HEADER and part.rollouts.keys() == written.keys()
    for key, one in written.items():
        for name in ("ids_T", "span_C", "logp_C"):
            found = getattr(part.rollouts[key], name)
            assert np.array_equal(getattr(one, name), found) and getattr(one, name).dtype == found.dtype
    some = list(written)[1:3]
    logp = {key: -random.exponential(3, size=len(written[key].logp_C)).astype(np.float32) for key in some}
    logp[some[0]][0] = -np.inf
    scores = read_part_scores(scores_bytes(part, logp), "here", part, "t")
    assert list(scores) == some and scores[some[0]][0] == -100
    assert np.array_equal(scores[some[1]], logp[some[1]])
    assert read_part_scores(scores_bytes(part, {}), "here", part, "t") == {}, "no rollout is this worker's"


def test_an_invalid_part_is_rejected(bucket: Bucket) -> None:
    written = random_rollouts(np.random.default_rng(new_seed()))
    data = part_bytes(HEADER, written)
    (key, one), *_ = written.items()
    for number, (content, message) in enumerate(
        (
            (data[: len(data) // 2], "it is not a part file .*delete it"),
            (part_bytes(HEADER, {key: one, RolloutKey(key.window, 7, 7): one}), "it has a rollout twice"),
            (part_bytes(HEADER.model_copy(update={"part": 4}), written), "part is 4 there and 3 here"),
        )
    ):
        bucket.create(f"part-{number}", content, {})
        with pytest.raises(Permanent, match=rf"part-{number}: {message}"):
            read_part(bucket, f"part-{number}", HEADER.dump())


def test_scores_of_another_part_or_teacher_are_rejected() -> None:
    written = random_rollouts(np.random.default_rng(new_seed()))
    part = Part(HEADER, written, "s" * 64)
    logp = {key: one.logp_C for key, one in written.items()}
    short = {key: one[1:] for key, one in logp.items()}
    for data, message in (
        (scores_bytes(part, logp, "o" * 64), "it has the scores of other rollouts"),
        (scores_bytes(part, logp, teacher="u"), "it has the scores of another teacher"),
        (scores_bytes(part, short), "one score for each sampled token"),
        (scores_bytes(part, {RolloutKey(9, 9, 9): next(iter(logp.values()))}), "one score for each"),
        (scores_bytes(part, logp)[:100], "it is not a file of a part's scores"),
    ):
        with pytest.raises(Permanent, match=message):
            read_part_scores(data, "here", part, "t")
