"""The parts of a version's rollouts: written while the version is sampled, and adopted by a restarted
sampler, which then samples only the rest.

part_files.py (vpmoe.rollout) describes the files.
"""

import logging
import time
from collections.abc import Callable, Mapping
from itertools import count

import numpy as np

from vpmoe.api import DistillRun
from vpmoe.inference.engine_pool import SamplingRequest
from vpmoe.plan.sampling import PART_SECONDS
from vpmoe.rollout.part_files import (
    PartHeader,
    RolloutKey,
    list_parts,
    part_bytes,
    read_part,
)
from vpmoe.rollout.window_files import Rollout, foreign_rollouts
from vpmoe.storage import Bucket, paths

log = logging.getLogger(__name__)

RECORD_SECONDS = 1.0
"""Seconds between two checks whether the bucket has the version, once a part is due."""


class PartLog:
    """The rollouts of one version that are in parts, of all samplers, and those that are not written yet."""

    def __init__(
        self,
        bucket: Bucket,
        run: DistillRun,
        header: PartHeader,
        metadata: Mapping[str, str],
        recorded: Callable[[], bool],
    ) -> None:
        """`header`: of the version's parts; its `part` is not used. `metadata`: of the objects. `recorded`:
        whether the bucket has the version; before it does, the version has no parts."""
        self.rollouts: dict[RolloutKey, Rollout] = {}
        """Those that are in the bucket."""
        self._bucket, self._run, self._header, self._metadata = bucket, run, header, metadata
        self._recorded = recorded
        self._requests: Mapping[RolloutKey, SamplingRequest] = {}
        self._parts: set[int] = set()
        self._pending: dict[RolloutKey, Rollout] = {}
        self._due = time.monotonic() + PART_SECONDS
        """When the next part is written, or the bucket is asked again."""

    def adopt_all(self, requests: Mapping[RolloutKey, SamplingRequest]) -> None:
        """Read all parts of the version. `requests`: those of all of its rollouts.

        Raises StorageError if a part was altered, Permanent if it is of another run, configuration or
        version, or holds something that was not requested.
        """
        self._requests = requests
        header = self._header
        if not self._recorded():
            return
        for number in list_parts(self._bucket, self._run, header.stage, header.version):
            self._adopt(number)
        if self.rollouts:
            log.info(
                f"Adopted {len(self.rollouts):,} of {len(requests):,} rollouts of version {header.version} "
                f"from {len(self._parts)} parts"
            )

    def add(self, key: RolloutKey, rollout: Rollout) -> None:
        """A rollout that has finished. It is written with the next part, unless another sampler's is in the
        bucket."""
        if key not in self.rollouts:
            self._pending[key] = rollout

    def write_if_due(self) -> bool:
        """Write a part if the last one is PART_SECONDS old and the bucket has the version; returns whether it
        did."""
        if not self._pending or time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + RECORD_SECONDS  # it is called after every decoding step
        return self.write_if_recorded()

    def write_if_recorded(self) -> bool:
        """Write all rollouts that are in no part yet, if the bucket has the version; returns whether it
        has."""
        recorded = self._recorded()
        if recorded:
            self.write()
        return recorded

    def write(self) -> None:
        """Write all rollouts that are in no part yet. The bucket must have the version.

        If another sampler has written a part of the same number, its rollouts replace ours.
        """
        while self._pending:
            number = next(number for number in count() if number not in self._parts)
            data = part_bytes(self._header.model_copy(update={"part": number}), self._pending)
            if self._bucket.create(self._key(number), data, self._metadata):
                self._parts.add(number)
                self.rollouts |= self._pending
                self._pending = {}
            else:
                log.warning(
                    "%s was written by another sampler; adopting its rollouts",
                    self._bucket.url(self._key(number)),
                )
                self._adopt(number)
        self._due = time.monotonic() + PART_SECONDS

    def _adopt(self, number: int) -> None:
        expected = self._header.model_copy(update={"part": number}).dump()
        part = read_part(self._bucket, self._key(number), expected)
        where = self._bucket.url(self._key(number))
        for key, rollout in part.rollouts.items():
            which = f"rollout {key.rollout} of prompt {key.prompt} of window {key.window}"
            request = self._requests.get(key)
            if request is None:
                raise foreign_rollouts(where, f"version {self._header.version} has no {which}")
            if not np.array_equal(rollout.ids_T[: rollout.prompt_length], request.ids_P):
                raise foreign_rollouts(where, f"{which} has another prompt")
            if key in self.rollouts:
                raise foreign_rollouts(where, f"{which} is in another part too")
        self.rollouts |= part.rollouts
        for key in part.rollouts:
            self._pending.pop(key, None)
        self._parts.add(number)

    def _key(self, number: int) -> str:
        return paths.part(self._run, self._header.stage, self._header.version, number)
