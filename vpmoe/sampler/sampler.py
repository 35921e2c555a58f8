"""The sampler of an OnPolicy stage: samples the stage's windows, one policy version after the other.

It has no state: it continues with the first window that has no rollouts, and within it with the rollouts that
are in no part, whichever attempt sampled those before. The first writer of a window wins. A version may be on
a volume before it is in the bucket, which is the record: it is sampled from at once, and what was sampled is
written when the bucket has it. windows.py (vpmoe.rollout) says what a window contains, version_batch.py
samples it.
"""

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vpmoe.api import DistillRun, pod_metrics
from vpmoe.api.base import Record
from vpmoe.api.metrics import MetricsLine, Sample
from vpmoe.api.stages import OnPolicy
from vpmoe.data.dataset import dataset_facts, load_training_dataset
from vpmoe.data.reader import BlockCache
from vpmoe.failure import Permanent
from vpmoe.inference.verify import LoadStats, SamplingEngines, Source, load_version
from vpmoe.process.board import ProgressBoard
from vpmoe.process.gpu import GpuUse, ReadGpus, not_read
from vpmoe.process.step_worker import StepWorker, step_succeeded
from vpmoe.provenance import Provenance
from vpmoe.rollout import back_pressure, policy_version
from vpmoe.rollout.back_pressure import Adjustment
from vpmoe.rollout.curriculum import EFFORTS, Curriculum
from vpmoe.rollout.gate import require_validity
from vpmoe.rollout.part_files import PartHeader
from vpmoe.rollout.policy_version import PolicyVersion
from vpmoe.rollout.version_volume import VersionVolume
from vpmoe.rollout.window_files import Rollout, RolloutHeader, read_rollouts, rollouts_bytes
from vpmoe.sampler.part_log import PartLog
from vpmoe.sampler.version_batch import PromptSource, SampledVersion, sample_version
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Manifest

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between two checks for a version."""
VOLUME_SECONDS = 0.1
"""Seconds between two checks whether it is on the volume."""
REPORT_SECONDS = 30.0
"""Seconds between reports while waiting for a version."""
NAME = re.compile(r"window-(\d{6})\.rollouts\.arrow")


class VersionLoad(Record):
    """How the version of a batch was loaded."""

    seconds: float
    """From the start of the download, or of reading the volume, until the version was verified."""
    probe: float
    """Largest difference from the trainer's log-probabilities of the probe, in nats."""
    source: Source
    """Where its files were read."""


class FoundVersion(NamedTuple):
    """A version that is published, or is on the volume before it is."""

    published: Manifest
    facts: PolicyVersion
    volume: VersionVolume | None
    """The volume that it was found on; None: the bucket."""


class Lengths(Record):
    """Lengths of completions, in tokens."""

    mean: float
    max: int


class VersionWaits(NamedTuple):
    """Seconds that the sampler waited for a version."""

    weights: float
    """Until it could be loaded."""
    upload: float
    """With the sampled windows, until the bucket had it."""


class WindowLine(MetricsLine):
    """The sampler's line of metrics for a window."""

    event: str = "window"
    window: int
    version: int
    together: int
    """Windows sampled in the same batch."""
    seconds: float
    """Time to sample the batch."""
    wait_weights: float
    """Seconds that the sampler waited for the version; 0 except for the first window of a batch."""
    wait_upload: float
    """Seconds that the sampled windows waited until the bucket had the version; 0 except for the first window
    of a batch."""
    tokens: int
    """Tokens of the window: prompts and completions."""
    tokens_per_second: float
    """Sampled tokens per second, over the batch, without those of earlier attempts."""
    rollouts: int
    adopted: int
    """Rollouts that earlier attempts had sampled, from part files."""
    load: VersionLoad | None
    """None except for the first window of a batch."""
    effort: dict[str, int]
    """Number of rollouts by effort."""
    validity: dict[str, dict[str, int]]
    """Number of rollouts by effort and validity."""
    lengths: dict[str, Lengths]
    """By effort."""
    gpu: GpuUse | None
    """While the batch was sampled; None except for the first window of a batch."""

    def samples(self) -> Iterable[Sample]:
        yield Sample(pod_metrics.SAMPLER_WINDOW, self.window)
        yield Sample(pod_metrics.SAMPLER_VERSION, self.version)
        for effort, counts in self.validity.items():
            for validity, count in counts.items():
                labels = {"effort": effort, "validity": validity}
                yield Sample(pod_metrics.SAMPLER_ROLLOUTS, count, labels)
        if self.load is not None:  # the first window of a batch
            yield Sample(pod_metrics.TOKENS, self.tokens_per_second * self.seconds)
            yield Sample(pod_metrics.SAMPLER_BATCH_SECONDS, self.seconds)
            yield Sample(pod_metrics.SAMPLER_LOAD_SECONDS, self.load.seconds)
            yield Sample(pod_metrics.SAMPLER_PROBE, self.load.probe)
        if self.gpu is not None:
            yield from self.gpu.samples()


@dataclass(frozen=True)
class SamplerWorker(StepWorker):
    """One attempt at sampling a stage. Its parts are windows."""

    stage: OnPolicy
    engines: SamplingEngines
    scratch: Path

    def url(self, number: int) -> str:
        return self.bucket.url(paths.window(self.run, self.stage.name, number, "rollouts"))

    def stage_finished(self) -> bool:
        """Whether the trainer has finished the stage, so that it needs no more windows."""
        return step_succeeded(self.run, self.bucket, self.stage.name)

    def read_header(self, number: int) -> RolloutHeader:
        """The header of a window in the bucket.

        Raises Permanent if it is not of this window, stage and configuration.
        """
        key, where = paths.window(self.run, self.stage.name, number, "rollouts"), self.url(number)
        header = read_rollouts(self.bucket.get(key), where).header
        ours = (self.provenance.run, self.run.config_hash, self.stage.name, number)
        if (header.run, header.config, header.stage, header.window) != ours:
            raise Permanent(
                f"{where}: it is window {header.window} of stage {header.stage} of {header.run}, "
                f"configuration {header.config}. This run did not write it; delete it to have "
                "the window sampled again."
            )
        return header

    def newest_window(self) -> RolloutHeader | None:
        """The header of the last window before the first gap; None if the first window has no rollouts."""
        prefix = paths.window(self.run, self.stage.name, 0, "rollouts").removesuffix("000000.rollouts.arrow")
        there = {int(found[1]) for each in self.bucket.list(prefix) if (found := NAME.search(each.key))}
        first = next(number for number in range(len(there) + 1) if number not in there)
        return self.read_header(first - 1) if first else None

    def part_log(self, version: int, weights: str, recorded: Callable[[], bool]) -> PartLog:
        """The parts of a version. `weights`: policy_version.weights_digest."""
        header = PartHeader(
            run=self.provenance.run,
            config=self.run.config_hash,
            stage=self.stage.name,
            version=version,
            weights=weights,
            part=0,
        )
        return PartLog(self.bucket, self.run, header, self.provenance.metadata(), recorded)

    def report_windows(self, message: str, before: RolloutHeader | None, speed: float | None = None) -> None:
        """Report the windows up to `before` as done.

        The total is extrapolated from the tokens that they have.
        """
        done, seen = (before.window + 1, before.seen + before.tokens) if before else (0, 0)
        expected = -(-done * self.stage.tokens // seen) if seen else 0
        self.report(message, done, max(done, expected), speed)


def sample_stage(
    run: DistillRun,
    stage: OnPolicy,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    board: ProgressBoard,
    engines: SamplingEngines,
    scratch: Path,
    read_gpus: ReadGpus = not_read,
    volume: VersionVolume | None = None,
) -> None:
    """Sample every window of the stage that has no rollouts yet, as soon as its version is published, or is
    on `volume`.

    Returns after the last window, or when training has ended. Keeps files below `scratch`. A window is
    written whole or not at all.

    Raises Permanent if the stage may not begin, or if the dataset, a version or a window is invalid,
    Retriable if engines computed incorrectly after they replaced their weights, StorageError, Terminated if
    it was asked to stop.
    """
    require_validity(run, stage, bucket)
    job = SamplerWorker(run, bucket, provenance, stopping, board, None, stage, engines, scratch)
    made = load_training_dataset(run, bucket)
    curriculum = Curriculum(stage)
    before, source = job.newest_window(), None
    while before is None or not before.last:
        waiting = time.monotonic()
        number = curriculum.version_of(before.window + 1 if before else 0)
        found = wait_for_version(job, number, before, volume)
        if found is None:
            break
        (published, version, found_on), waited = found, time.monotonic() - waiting
        source = source or PromptSource(run, stage, made, version, BlockCache(bucket, scratch / "blocks"))
        job.report_windows(f"Loading version {version.version}", before)
        loading = load_version(bucket, published, version, engines, scratch, job.check_stop, found_on)
        if loading is None:
            continue
        first, *others = curriculum.windows_of(version.version)
        windows = f"windows {first} to {others[-1]}" if others else f"window {first}"
        job.report_windows(f"Sampling {windows} from version {version.version}", before)
        read_gpus()  # what they did before is not the batch's
        adjustments = back_pressure.read_adjustments(bucket, run, stage.name)
        record = VersionRecord(job, found, adjustments)
        batch = sample_version(
            source,
            version,
            adjustments,
            engines,
            job.part_log(version.version, policy_version.weights_digest(published), record.is_there),
            job.check_stop,
            partial(record.wait, before),
            partial(report_part, job, windows, before),
        )
        if batch is None:
            if found_on:
                found_on.reject(published)
            continue
        waits, used = VersionWaits(waited, record.waited), read_gpus()
        before = write_windows(job, source, published, version, batch, before, waits, loading, used)
    done = before.window + 1 if before else 0
    job.report_success(
        "Complete" if before and before.last else "The stage has ended", done, dataset_facts(bucket, made)
    )


def report_part(
    job: SamplerWorker, windows: str, before: RolloutHeader | None, finished: int, planned: int
) -> None:
    """Report how many rollouts of the batch are in the bucket. `windows`: those of the batch, in words."""
    job.report_windows(f"Sampling {windows}: {finished:,} of {planned:,} rollouts", before)


def wait_for_version(
    job: SamplerWorker,
    number: int,
    before: RolloutHeader | None,
    volume: VersionVolume | None = None,
    reason: str = "weights",
) -> FoundVersion | None:
    """Wait until a version is on the volume, if one is given, or published. `reason`: of the wait, in the
    metrics. Returns None if the stage ends first. Raises Retriable if an engine ends: the next attempt then
    loads while this version is awaited."""
    reported = -REPORT_SECONDS
    while not job.stage_finished():
        if volume and (found := volume.find(number)):
            return FoundVersion(*found, volume)
        if found := policy_version.find_version(job.bucket, job.run, job.stage.name, number):
            return FoundVersion(*found, None)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            job.report_windows(f"Waiting for version {number}", before)
        with job.board.metrics.waiting(reason):
            wait_for_poll(job, number, volume)
        job.check_stop()
        job.engines.check_engines(job.check_stop)
    return None


def wait_for_poll(job: SamplerWorker, number: int, volume: VersionVolume | None) -> None:
    """Wait for POLL_SECONDS, or until the version appears on the volume, or a request to stop."""
    until = time.monotonic() + POLL_SECONDS
    there = volume is not None and volume.has(number)
    while (left := until - time.monotonic()) > 0 and not job.stopping.is_set():
        if volume is not None and not there and volume.has(number):
            return
        job.stopping.wait(min(left, VOLUME_SECONDS) if volume else left)


class VersionRecord:
    """Whether the bucket has a version that was found on the volume and is sampled from with these
    adjustments. Nothing that was sampled is written before.

    The bucket can have another one: the trainer that wrote it to the volume was killed, and the next attempt
    has computed other weights or made another adjustment.
    """

    def __init__(self, job: SamplerWorker, found: FoundVersion, adjustments: Sequence[Adjustment]) -> None:
        self._job, self._found, self._adjustments = job, found, adjustments
        self._same: bool | None = None if found.volume else True
        """None: the bucket has no such version yet."""
        self.waited = 0.0
        """Seconds in `wait`."""

    def is_there(self) -> bool:
        """Whether the bucket has this version now."""
        job, number = self._job, self._found.facts.version
        if self._same is None and (
            recorded := policy_version.find_version(job.bucket, job.run, job.stage.name, number)
        ):
            self._same = self._equals(*recorded)
        return bool(self._same)

    def wait(self, before: RolloutHeader | None) -> bool:
        """Wait until the bucket has the version. False if it then is another one, or if the stage ends
        first."""
        if self._same is None:
            began = time.monotonic()
            recorded = wait_for_version(self._job, self._found.facts.version, before, reason="upload")
            self.waited = time.monotonic() - began
            self._same = recorded is not None and self._equals(recorded.published, recorded.facts)
        return self._same

    def _equals(self, published: Manifest, facts: PolicyVersion) -> bool:
        job, found = self._job, self._found
        contents = {policy_version.weights_digest(one) for one in (published, found.published)}
        last = Curriculum(job.stage).windows_of(facts.version)[-1]
        now = back_pressure.read_adjustments(job.bucket, job.run, job.stage.name)
        applied = [[one for one in each if one.window <= last] for each in (self._adjustments, now)]
        if len(contents) == 1 and facts == found.facts and applied[0] == applied[1]:
            return True
        log.warning("The trainer has made version %d again; its windows are sampled again", facts.version)
        return False


def write_windows(
    job: SamplerWorker,
    source: PromptSource,
    published: Manifest,
    version: PolicyVersion,
    batch: SampledVersion,
    before: RolloutHeader | None,
    waits: VersionWaits,
    loading: LoadStats,
    gpu: GpuUse,
) -> RolloutHeader:
    """Write the windows of a batch that come after `before`, up to the stage's last; returns the header of
    the last one.

    A request to stop does not interrupt it: writing all takes seconds, sampling them again takes minutes.
    """
    after = source.windows.curriculum.tokens_before_next
    missing = [
        (window, rollouts)
        for window, rollouts in batch.windows
        if before is None or window.number > before.window
    ]
    for place, (window, rollouts) in enumerate(missing):
        seen = after(before.window, before.seen, before.tokens, source.anchors) if before else 0
        tokens = sum(len(one.ids_T) for one in rollouts)
        before = RolloutHeader(
            run=job.provenance.run,
            config=job.run.config_hash,
            stage=job.stage.name,
            window=window.number,
            version=version.version,
            weights=policy_version.weights_digest(published),
            phase=window.phase,
            seen=seen,
            tokens=tokens,
            last=after(window.number, seen, tokens, source.anchors) >= job.stage.tokens,
            turns=window.adjustments,
        )
        line = WindowLine(
            attempt=job.provenance.attempt,
            window=window.number,
            version=version.version,
            together=len(batch.windows),
            seconds=batch.seconds,
            wait_weights=0.0 if place else waits.weights,
            wait_upload=0.0 if place else waits.upload,
            tokens=tokens,
            tokens_per_second=batch.speed,
            rollouts=len(rollouts),
            adopted=batch.adopted[window.number],
            load=None
            if place
            else VersionLoad(seconds=loading.seconds, probe=loading.probe, source=loading.source),
            gpu=None if place else gpu,
            **rollout_stats(rollouts),
        )
        write_metrics(job, line)
        key = paths.window(job.run, job.stage.name, window.number, "rollouts")
        if job.bucket.create(key, rollouts_bytes(before, rollouts), job.provenance.metadata()):
            log.info(
                f"Sampled window {window.number} from version {version.version}: {len(rollouts):,} rollouts, "
                f"{tokens:,} tokens"
            )
        else:
            log.warning("%s was written by another sampler; continuing from it", job.url(window.number))
            before = job.read_header(window.number)
        job.report_windows(f"Window {window.number} sampled", before, batch.speed)
        if before.last:
            break
    assert before, "each version has a window, and this one was loaded because one is missing"
    return before


def rollout_stats(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The fields `effort`, `validity` and `lengths` of a WindowLine."""
    by_effort = {
        name: found for name in EFFORTS if (found := [one for one in rollouts if one.effort == name])
    }
    lengths = {name: [len(one.logp_C) for one in found] for name, found in by_effort.items()}
    return {
        "effort": {name: len(found) for name, found in by_effort.items()},
        "validity": {
            name: dict(sorted(Counter(one.validity for one in found).items()))
            for name, found in by_effort.items()
        },
        "lengths": {
            name: Lengths(mean=sum(found) / len(found), max=max(found)) for name, found in lengths.items()
        },
    }


def write_metrics(job: SamplerWorker, line: WindowLine) -> None:
    """Write a window's line of metrics. It is written before the window, so each window has exactly one."""
    key = paths.metrics(job.run, job.provenance.step, f"{line.window:06d}")
    data = json.dumps(line.dump(), allow_nan=False) + "\n"
    job.bucket.put_bytes(key, data.encode(), job.provenance.metadata())
    job.board.metrics.record(line.samples())
