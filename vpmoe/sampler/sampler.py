"""The sampler of an OnPolicy stage: version after version, all windows that have to be sampled from it.

It has no state: it goes on at the first window without rollouts, whoever sampled those before, and whoever writes a window's rollouts
first is right. What a window asks for is windows.py's business, how they are sampled batch.py's; what becomes of them the teacher's and the
trainer's.
"""

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe.api import DistillRun
from vpmoe.api.stages import OnPolicy
from vpmoe.clock import now
from vpmoe.data.dataset import dataset_facts, load_training_dataset
from vpmoe.data.reader import BlockCache
from vpmoe.failure import Permanent
from vpmoe.inference.verify import InferenceEngines, LoadStats, load_version
from vpmoe.process.step_worker import StepWorker
from vpmoe.provenance import Provenance
from vpmoe.rollout import back_pressure, policy_version
from vpmoe.rollout.curriculum import EFFORTS, Curriculum
from vpmoe.rollout.gate import require_validity
from vpmoe.rollout.policy_version import PolicyVersion
from vpmoe.rollout.window_files import Rollout, RolloutHeader, read_rollouts, rollouts_bytes
from vpmoe.sampler.version_batch import PromptSource, SampledVersion, sample_version
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Manifest

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between looks for a version."""
REPORT_SECONDS = 30.0
"""Seconds between reports while one is waited for."""
NAME = re.compile(r"window-(\d{6})\.rollouts\.arrow")


@dataclass(frozen=True)
class SamplerWorker(StepWorker):
    """One attempt at sampling a stage. Its parts are the windows."""

    stage: OnPolicy
    engines: InferenceEngines
    scratch: Path

    def url(self, number: int) -> str:
        return self.bucket.url(paths.window(self.run, self.stage.name, number, "rollouts"))

    def over(self) -> bool:
        """Whether the trainer has finished the stage, and will ask for nothing more."""
        key = paths.progress(self.run, self.stage.name)
        return self.bucket.exists(key) and self.bucket.get_json(key)["state"] == "Succeeded"

    def read(self, number: int) -> RolloutHeader:
        """What a window in the bucket says of itself. Raises Permanent where it is not what its name says, or of another configuration."""
        key, where = paths.window(self.run, self.stage.name, number, "rollouts"), self.url(number)
        about = read_rollouts(self.bucket.get(key), where).header
        ours = (self.provenance.run, self.run.config_hash, self.stage.name, number)
        if (about.run, about.config, about.stage, about.window) != ours:
            raise Permanent(
                f"{where}: it is window {about.window} of stage {about.stage} of {about.run}, configuration {about.config}. The object was "
                "put there by somebody else; delete it, and it is made again."
            )
        return about

    def newest(self) -> RolloutHeader | None:
        """The window before the first that has no rollouts; None where that is the first of all."""
        prefix = paths.window(self.run, self.stage.name, 0, "rollouts").removesuffix(
            "window-000000.rollouts.arrow"
        )
        there = {int(found[1]) for each in self.bucket.list(prefix) if (found := NAME.search(each.key))}
        first = next(number for number in range(len(there) + 1) if number not in there)
        return self.read(first - 1) if first else None

    def say(self, message: str, before: RolloutHeader | None, speed: float | None = None) -> None:
        """Report the windows up to `before` as done; as many are expected as the stage's tokens with them let expect."""
        done, seen = (before.window + 1, before.seen + before.tokens) if before else (0, 0)
        expected = -(-done * self.stage.tokens // seen) if seen else 0
        self.report(message, done, max(done, expected), speed)


def sample_stage(
    run: DistillRun,
    stage: OnPolicy,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    engines: InferenceEngines,
    scratch: Path,
) -> None:
    """Sample every window of the stage that has no rollouts yet, as its version is published; ends with the last, or when training has.

    Files are kept below `scratch`. Raises Permanent where the data set, a version or a window is at fault, Retriable where engines took
    other weights wrongly, StorageError, Terminated where it was asked to stop. A window is in the bucket whole or not at all.
    """
    require_validity(run, stage, bucket)
    job = SamplerWorker(run, bucket, provenance, stopping, None, stage, engines, scratch)
    made = load_training_dataset(run, bucket)
    curriculum = Curriculum(stage)
    before, source = job.newest(), None
    while before is None or not before.last:
        waiting = time.monotonic()
        found = wait_for_version(job, curriculum.version_of(before.window + 1 if before else 0), before)
        if found is None:
            break
        (published, facts), waited = found, time.monotonic() - waiting
        source = source or PromptSource(run, stage, made, facts, BlockCache(bucket, scratch / "blocks"))
        job.say(f"Loading version {facts.version}", before)
        loading = load_version(bucket, published, facts, engines, scratch, job.check_stop)
        first, *others = curriculum.windows_of(facts.version)
        asked = f"windows {first} to {others[-1]}" if others else f"window {first}"
        job.say(f"Sampling {asked} from version {facts.version}", before)
        batch = sample_version(
            source, facts, back_pressure.read_adjustments(bucket, run, stage.name), engines, job.check_stop
        )
        before = write_windows(job, source, published, facts, batch, before, waited, loading)
    done = before.window + 1 if before else 0
    job.report_success(
        "Complete" if before and before.last else "The stage has ended", done, dataset_facts(bucket, made)
    )


def wait_for_version(
    job: SamplerWorker, number: int, before: RolloutHeader | None
) -> tuple[Manifest, PolicyVersion] | None:
    """A version, as soon as it is published; None where the stage is over before it is."""
    reported = -REPORT_SECONDS
    while not job.over():
        if found := policy_version.find_version(job.bucket, job.run, job.stage.name, number):
            return found
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            job.say(f"Waiting for version {number}", before)
        job.stopping.wait(POLL_SECONDS)
        job.check_stop()
    return None


def write_windows(
    job: SamplerWorker,
    source: PromptSource,
    published: Manifest,
    facts: PolicyVersion,
    batch: SampledVersion,
    before: RolloutHeader | None,
    waited: float,
    loading: LoadStats,
) -> RolloutHeader:
    """Write the windows of a batch that come after `before`, up to the stage's last; returns what the last of them in the bucket says.

    Not even a request to stop comes between them: to write all takes seconds, and to sample them again minutes.
    """
    after, load_line = (
        source.windows.curriculum.tokens_before_next,
        {"seconds": loading.seconds, "probe": loading.probe},
    )
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
            version=facts.version,
            weights=policy_version.weights_digest(published),
            phase=window.phase,
            seen=seen,
            tokens=tokens,
            last=after(window.number, seen, tokens, source.anchors) >= job.stage.tokens,
            turns=window.adjustments,
        )
        line = {
            "window": window.number,
            "version": facts.version,
            "together": len(batch.windows),
            "seconds": batch.seconds,
            "waitWeights": 0.0 if place else waited,
            "tokens": tokens,
            "tokensPerSecond": batch.speed,
            "rollouts": len(rollouts),
            "load": None if place else load_line,
            **effort_metrics(rollouts),
        }
        write_metrics(job, line)
        key = paths.window(job.run, job.stage.name, window.number, "rollouts")
        if job.bucket.create(key, rollouts_bytes(before, rollouts), job.provenance.metadata()):
            log.info(
                f"Window {window.number} from version {facts.version}: {len(rollouts):,} rollouts, {tokens:,} tokens"
            )
        else:
            log.warning("%s was written by another sampler: going on from that", job.url(window.number))
            before = job.read(window.number)
        job.say(f"Window {window.number} sampled", before, batch.speed)
        if before.last:
            break
    assert before, "a version has a window, and it was asked for because one is missing"
    return before


def effort_metrics(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """By the effort that was asked for: how many rollouts, how many of each validity, and how long completions are in tokens."""
    of = {name: found for name in EFFORTS if (found := [one for one in rollouts if one.effort == name])}
    lengths = {name: [len(one.logp_C) for one in found] for name, found in of.items()}
    return {
        "effort": {name: len(found) for name, found in of.items()},
        "validity": {
            name: dict(sorted(Counter(one.validity for one in found).items())) for name, found in of.items()
        },
        "lengths": {
            name: {"mean": sum(found) / len(found), "max": max(found)} for name, found in lengths.items()
        },
    }


def write_metrics(job: SamplerWorker, line: dict[str, Any]) -> None:
    """Write a window's line, before the window itself: so each has exactly one, whoever was killed when."""
    said = {
        "event": "window",
        "time": now().isoformat(timespec="milliseconds"),
        "attempt": job.provenance.attempt,
        **line,
    }
    key = paths.metrics(job.run, job.provenance.step, f"{line['window']:06d}")
    job.bucket.put_bytes(key, (json.dumps(said, allow_nan=False) + "\n").encode(), job.provenance.metadata())
