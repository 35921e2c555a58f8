"""The log of a version's parts, without engines: how often the bucket is asked, and foreign parts."""

from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest

from tests.fakes.part_rollouts import HEADER, random_rollouts
from tests.fakes.students import new_seed
from vpmoe.api import DistillRun
from vpmoe.failure import Permanent
from vpmoe.inference.engine_pool import SamplingRequest
from vpmoe.rollout.part_files import RolloutKey, list_parts, part_bytes
from vpmoe.rollout.window_files import Rollout
from vpmoe.sampler import part_log
from vpmoe.sampler.part_log import PartLog
from vpmoe.storage import Bucket, paths


@pytest.fixture
def run(run_spec: dict[str, object]) -> DistillRun:
    return DistillRun.parse(run_spec)


@pytest.fixture
def rollouts() -> dict[RolloutKey, Rollout]:
    return random_rollouts(np.random.default_rng(new_seed()))


def requests(rollouts: dict[RolloutKey, Rollout]) -> dict[RolloutKey, SamplingRequest]:
    return {
        key: SamplingRequest(one.ids_T[: one.prompt_length], 0, len(one.logp_C))
        for key, one in rollouts.items()
    }


def add_all(log: PartLog, rollouts: Iterable[tuple[RolloutKey, Rollout]]) -> None:
    for key, one in rollouts:
        log.add(key, one)


def test_the_bucket_is_asked_once_a_second_whether_it_has_the_version(
    bucket: Bucket, run: DistillRun, rollouts: dict[RolloutKey, Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not after every decoding step, while the version is on a volume only."""
    now, asked = 0.0, []

    def recorded() -> bool:
        asked.append(now)
        return now >= 23

    monkeypatch.setattr(part_log, "time", SimpleNamespace(monotonic=lambda: now))
    log = PartLog(bucket, run, HEADER, {}, recorded)
    log.adopt_all(requests(rollouts))
    first, *others = rollouts.items()
    add_all(log, [first])
    for step in range(1, 301):
        now = step / 10
        assert log.write_if_due() == (now == 23)
    assert asked == [0, 20, 21, 22, 23]
    add_all(log, others)
    now = 43
    assert log.write_if_due() and log.rollouts.keys() == rollouts.keys()
    assert list_parts(bucket, run, HEADER.stage, HEADER.version) == [0, 1]


def test_a_part_of_something_else_is_named_as_often_as_it_is_met(
    bucket: Bucket, run: DistillRun, rollouts: dict[RolloutKey, Rollout]
) -> None:
    """The sampler writes what is left once more when it fails. Nothing of the part is adopted."""
    wanted = requests(rollouts)
    last = [*rollouts][-1]
    wanted[last] = wanted[last]._replace(ids_P=wanted[last].ids_P[:0])
    log = PartLog(bucket, run, HEADER, {}, lambda: True)
    log.adopt_all(wanted)
    bucket.create(
        paths.part(run, HEADER.stage, HEADER.version, 0),
        part_bytes(HEADER.model_copy(update={"part": 0}), rollouts),
        {},
    )
    add_all(log, [*rollouts.items()][:2])
    for _ in range(2):
        with pytest.raises(Permanent, match=f"of window {last.window} has another prompt"):
            log.write()
        assert log.rollouts == {}
