"""The sampler of an OnPolicy stage: window after window, sampled from exactly the version that it has to be sampled from.

It has no state: it goes on at the first window without rollouts, whoever sampled those before, and whoever writes a window's rollouts
first is right. What a window asks for is windows.py's business, how completions come about engine.py's; what becomes of them the teacher's
and the trainer's.
"""

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vpmoe.api import DistillRun
from vpmoe.api.layout import layout
from vpmoe.api.stages import OnPolicy
from vpmoe.data.worker import Worker
from vpmoe.failure import Permanent
from vpmoe.provenance import Provenance
from vpmoe.rollout import prompt, turns, version
from vpmoe.rollout.curriculum import EFFORTS, Curriculum
from vpmoe.rollout.engines import Completion, Request
from vpmoe.rollout.proof import Load, Loadable, load
from vpmoe.rollout.record import AboutRollouts, Rollout, read_rollouts, rollouts_bytes
from vpmoe.rollout.version import Version
from vpmoe.rollout.windows import Prompt, Window, Windows, longest
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.training.parts import Cache, Parts
from vpmoe.training.plan import BatchPlan, documents, firsts
from vpmoe.training.stage import dataset, dataset_facts

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between looks for a version."""
REPORT_SECONDS = 30.0
"""Seconds between reports while one is waited for."""
NAME = re.compile(r"window-(\d{6})\.rollouts\.arrow")


@dataclass(frozen=True)
class Job(Worker):
    """One attempt at sampling a stage. Its parts are the windows."""

    stage: OnPolicy
    engines: Loadable
    scratch: Path

    def url(self, number: int) -> str:
        return self.bucket.url(paths.window(self.run, self.stage.name, number, "rollouts"))

    def over(self) -> bool:
        """Whether the trainer has finished the stage, and will ask for nothing more."""
        key = paths.progress(self.run, self.stage.name)
        return self.bucket.exists(key) and self.bucket.get_json(key)["state"] == "Succeeded"

    def read(self, number: int) -> AboutRollouts:
        """What a window in the bucket says of itself. Raises Permanent where it is not what its name says, or of another configuration."""
        key, where = paths.window(self.run, self.stage.name, number, "rollouts"), self.url(number)
        about = read_rollouts(self.bucket.get(key), where).about
        ours = (self.provenance.run, self.run.config_hash, self.stage.name, number)
        if (about.run, about.config, about.stage, about.window) != ours:
            raise Permanent(
                f"{where}: it is window {about.window} of stage {about.stage} of {about.run}, configuration {about.config}. The object was "
                "put there by somebody else; delete it, and it is made again."
            )
        return about

    def newest(self) -> AboutRollouts | None:
        """The window before the first that has no rollouts; None where that is the first of all."""
        prefix = paths.window(self.run, self.stage.name, 0, "rollouts").removesuffix("window-000000.rollouts.arrow")
        there = {int(found[1]) for each in self.bucket.list(prefix) if (found := NAME.search(each.key))}
        first = next(number for number in range(len(there) + 1) if number not in there)
        return self.read(first - 1) if first else None

    def say(self, message: str, done: int, seen: int, speed: float | None = None) -> None:
        """Report how many windows are done, `seen` tokens of the stage with them; as many are expected as these let expect."""
        expected = -(-done * self.stage.tokens // seen) if seen else 0
        self.report(message, done, max(done, expected), speed)


class Source:
    """What the windows of a stage are made of: the data set's documents, and where the stage began in their order."""

    def __init__(self, job: Job, made: Manifest, began: Version) -> None:
        run, stage = job.run, job.stage
        training = run.spec.training
        self.parts = Parts(made, "train", Cache(job.bucket, job.scratch / "blocks"))
        self._first_document = firsts([len(lengths) for lengths in self.parts.lengths])
        self._prompts = prompt.Prompts(made.facts["settings"]["conversation"])
        self._bound = training.sequence_length
        self.windows = Windows(stage, training.seed, [len(lengths) for lengths in self.parts.lengths], began.first_prompt)
        plan = BatchPlan(self.parts.lengths, training.seed, training.sequence_length)
        self.anchors = plan.steps(began.first_sequence, layout(run.spec, stage).sequences_per_step, stage.tokens)
        """[steps] tokens of the stage's anchor steps up to each: Curriculum.after."""

    def requests(self, window: Window) -> Iterator[tuple[Prompt, int, Request]]:
        """All that is asked in a window: of which prompt, which of its rollouts, and how."""
        numbers = np.array([asked.document for asked in window.prompts], np.int32)
        found = documents(numbers, self._first_document, self.parts.lengths)
        self.parts.prefetch(found)
        for asked, document in zip(window.prompts, found, strict=True):
            ids_P = self._prompts.ids(*self.parts.read(document), asked.effort)
            bound = longest(len(ids_P), asked.effort, window.max_tokens, self._bound)
            for rollout, seed in enumerate(asked.seeds):
                yield asked, rollout, Request(ids_P, seed, bound)


def sample(
    run: DistillRun, stage: OnPolicy, bucket: Bucket, provenance: Provenance, stopping: threading.Event, engines: Loadable, scratch: Path
) -> None:
    """Sample every window of the stage that has no rollouts yet, as its version is published; ends with the last, or when training has.

    Files are kept below `scratch`. Raises Permanent where the data set, a version or a window is at fault, Retriable where engines took
    other weights wrongly, StorageError, Terminated where it was asked to stop. A window is in the bucket whole or not at all.
    """
    job = Job(run, bucket, provenance, stopping, None, stage, engines, scratch)
    made = dataset(run, bucket)
    curriculum = Curriculum(stage)
    before, source, loaded = job.newest(), None, None
    number = before.window + 1 if before else 0
    while before is None or not before.last:
        waiting = time.monotonic()
        found = await_version(job, curriculum.version_of(number), before)
        if found is None:
            break
        (published, facts), waited = found, time.monotonic() - waiting
        source = source or Source(job, made, facts)
        seen = curriculum.after(before.window, before.seen, before.tokens, source.anchors) if before else 0
        loading = None
        if loaded != facts.version:
            job.say(f"Loading version {facts.version}", number, seen)
            loading, loaded = load(bucket, published, facts, engines, scratch, job.check_stop), facts.version
        job.say(f"Sampling window {number} from version {facts.version}", number, seen)
        before = make(job, source, published, facts, number, seen, waited, loading)
        number += 1
    job.report_success("Complete" if before and before.last else "The stage has ended", number, dataset_facts(bucket, made))


def await_version(job: Job, number: int, before: AboutRollouts | None) -> tuple[Manifest, Version] | None:
    """A version, as soon as it is published; None where the stage is over before it is."""
    reported = -REPORT_SECONDS
    while not job.over():
        if found := version.find(job.bucket, job.run, job.stage.name, number):
            return found
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            job.say(f"Waiting for version {number}", before.window + 1 if before else 0, before.seen + before.tokens if before else 0)
        job.stopping.wait(POLL)
        job.check_stop()
    return None


def make(
    job: Job, source: Source, published: Manifest, facts: Version, number: int, seen: int, waited: float, loading: Load | None
) -> AboutRollouts:
    """Sample window `number`, before whose step the stage has `seen` tokens, and write it; returns what the window in the bucket says."""
    window = source.windows.window(number, facts.tokens, turns.read(job.bucket, job.run, job.stage.name))
    started = time.monotonic()
    asked = list(source.requests(window))
    completions = job.engines.sample([request for _, _, request in asked], job.check_stop)
    rollouts = [rollout_of(*one, completion) for one, completion in zip(asked, completions, strict=True)]
    tokens = sum(len(one.ids_T) for one in rollouts)
    about = AboutRollouts(
        run=job.provenance.run,
        config=job.run.config_hash,
        stage=job.stage.name,
        window=number,
        version=facts.version,
        weights=version.content_of(published),
        phase=window.phase,
        seen=seen,
        tokens=tokens,
        last=source.windows.curriculum.after(number, seen, tokens, source.anchors) >= job.stage.tokens,
        turns=window.turns,
    )
    seconds = time.monotonic() - started
    speed = sum(len(one.logp_C) for one in rollouts) / seconds
    line = {
        "window": number, "version": facts.version, "seconds": seconds, "waitWeights": waited, "tokens": tokens, "tokensPerSecond": speed,
        "rollouts": len(rollouts), "load": {"seconds": loading.seconds, "probe": loading.probe} if loading else None, **by_effort(rollouts),
    }  # fmt: skip
    write_metrics(job, line)
    key = paths.window(job.run, job.stage.name, number, "rollouts")
    if not job.bucket.create(key, rollouts_bytes(about, rollouts), job.provenance.metadata()):
        log.warning("%s was written by another sampler: going on from that", job.url(number))
        return job.read(number)
    log.info(f"Window {number} from version {facts.version}: {len(rollouts):,} rollouts, {tokens:,} tokens, {seconds:,.1f} s")
    job.say(f"Window {number} sampled", number + 1, seen + tokens, speed)
    return about


def rollout_of(asked: Prompt, number: int, request: Request, completion: Completion) -> Rollout:
    """A completion as it is stored: with its prompt, the span of each token, and what it is as a Harmony answer."""
    ids_C = completion.ids_C
    return Rollout(
        asked.place, number, asked.document, asked.effort, prompt.validity(ids_C), np.concatenate([request.ids_P, ids_C]),
        prompt.spans(ids_C), completion.logp_C,
    )  # fmt: skip


def by_effort(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """By the effort that was asked for: how many rollouts, how many of each validity, and how long completions are in tokens."""
    of = {name: found for name in EFFORTS if (found := [one for one in rollouts if one.effort == name])}
    lengths = {name: [len(one.logp_C) for one in found] for name, found in of.items()}
    return {
        "effort": {name: len(found) for name, found in of.items()},
        "validity": {name: dict(sorted(Counter(one.validity for one in found).items())) for name, found in of.items()},
        "lengths": {name: {"mean": sum(found) / len(found), "max": max(found)} for name, found in lengths.items()},
    }


def write_metrics(job: Job, line: dict[str, Any]) -> None:
    """Write a window's line, before the window itself: so each has exactly one, whoever was killed when."""
    said = {"event": "window", "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "attempt": job.provenance.attempt, **line}
    key = paths.metrics(job.run, job.provenance.step, f"{line['window']:06d}")
    job.bucket.put_bytes(key, (json.dumps(said, allow_nan=False) + "\n").encode(), job.provenance.metadata())
