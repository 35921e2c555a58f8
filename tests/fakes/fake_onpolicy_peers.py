"""A sampler and a teacher of an OnPolicy stage in the test's process, for tests of its trainer.

The sampler loads versions from the bucket with transformers, verifies each with its probe, and samples from
it. The teacher's scores are a function of the ids. The peers imitate nothing else.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tests.fakes.datasets import Documents
from tests.fakes.students import SMALL
from vpmoe.api.layout import layout
from vpmoe.api.stages import OnPolicy
from vpmoe.data.packing import SequenceStream
from vpmoe.inference import hf_model
from vpmoe.rollout import back_pressure, policy_version
from vpmoe.rollout.policy_version import PolicyVersion
from vpmoe.rollout.window_files import (
    Rollout,
    RolloutHeader,
    ScoresHeader,
    read_rollouts,
    rollouts_bytes,
    scores_bytes,
)
from vpmoe.rollout.windows import PromptPlan, WindowPlan, WindowSchedule, completion_limit
from vpmoe.storage import paths
from vpmoe.storage.manifest import Manifest
from vpmoe.trainer.context import StageContext

PROBE = 1e-4
"""Allowed difference of trainer and transformers, in nats: both compute in float32 but sum in different
orders."""


class FakePeers:
    """A sampler and a teacher. Their only state is the bucket, so new peers continue where others stopped."""

    def __init__(self, context: StageContext, train: list[Documents], scratch: Path) -> None:
        assert isinstance(context.stage, OnPolicy)
        self.context, self.stage = context, context.stage
        self.documents = [document for part in train for document in part]
        self.parts = [len(part) for part in train]
        spec = context.run.spec.training
        self.length, self.seed = spec.sequence_length, spec.seed
        lengths = [np.asarray([len(ids) for ids, _ in part], np.int32) for part in train]
        self.plan = SequenceStream(lengths, self.seed, self.length)
        self.sequences_per_step = layout(
            context.run.spec.student, context.run.spec.training, context.stage
        ).sequences_per_step
        self.scratch = scratch
        self.loaded: tuple[int, PreTrainedModel] | None = None
        self.sampler_logp: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda logp_C: logp_C
        self.change_header: Callable[[RolloutHeader], RolloutHeader] = lambda header: header

    def key(self, window: int, kind: str) -> str:
        return paths.window(self.context.run, self.stage.name, window, kind)  # type: ignore[arg-type]

    def advance(self) -> bool:
        """Sample and score the next window. Returns whether there was one."""
        bucket = self.context.bucket
        window = next(number for number in range(10**6) if not bucket.exists(self.key(number, "scores")))
        if not bucket.exists(self.key(window, "rollouts")) and not self.sample(window):
            return False
        data = bucket.get(self.key(window, "rollouts"))
        found = read_rollouts(data, "fake peers")
        header = ScoresHeader(
            run=found.header.run,
            stage=self.stage.name,
            window=window,
            rollouts=found.sha256,
            teacher="t" * 64,
        )
        bucket.create(
            self.key(window, "scores"),
            scores_bytes(header, [teacher_logp(one.ids_T)[one.prompt_length :] for one in found.rollouts]),
            {},
        )
        return True

    def sample(self, number: int) -> bool:
        """Sample a window. Returns False if its version is not published or the stage has no such window."""
        bucket, run, stage = self.context.bucket, self.context.run, self.stage
        windows = WindowSchedule(stage, self.seed, self.parts)
        found = policy_version.find_version(bucket, run, stage.name, windows.curriculum.version_of(number))
        if found is None:
            return False
        published, facts = found
        anchors = self.plan.tokens_after_steps(facts.first_sequence, self.sequences_per_step, stage.tokens)
        seen = 0
        if number:
            previous = read_rollouts(bucket.get(self.key(number - 1, "rollouts")), "fake peers").header
            seen = windows.curriculum.tokens_before_next(number - 1, previous.seen, previous.tokens, anchors)
        if seen >= stage.tokens:
            return False
        model = self.load(published, facts)
        windows = WindowSchedule(stage, self.seed, self.parts, facts.first_prompt)
        window_plan = windows.window(
            number, facts.tokens, back_pressure.read_adjustments(bucket, run, stage.name)
        )
        rollouts = self.rollouts(model, window_plan)
        tokens = sum(len(one.ids_T) for one in rollouts)
        header = RolloutHeader(
            run=self.context.provenance.run,
            config=self.context.provenance.config,
            stage=stage.name,
            window=number,
            version=facts.version,
            weights=policy_version.weights_digest(published),
            phase=window_plan.phase,
            seen=seen,
            tokens=tokens,
            last=windows.curriculum.tokens_before_next(number, seen, tokens, anchors) >= stage.tokens,
            turns=window_plan.adjustments,
        )
        return bucket.create(
            self.key(number, "rollouts"), rollouts_bytes(self.change_header(header), rollouts), {}
        )

    def prompt_length(self, prompt: PromptPlan) -> int:
        return int((self.documents[prompt.document][1] == 0).sum())

    def rollouts(self, model: PreTrainedModel, plan: WindowPlan) -> list[Rollout]:
        """The completions of a window, drawn together at temperature 1, each from its request's seed. An id
        that is 3 modulo 100 ends a completion."""
        requests = [(prompt, number) for prompt in plan.prompts for number in range(len(prompt.seeds))]
        generators = [torch.Generator().manual_seed(prompt.seeds[number]) for prompt, number in requests]
        lengths = [self.prompt_length(prompt) for prompt, _ in requests]
        limits = [
            length + completion_limit(length, prompt.effort, plan.max_tokens, self.length)
            for length, (prompt, _) in zip(lengths, requests, strict=True)
        ]
        ids = [
            self.documents[prompt.document][0][:length].tolist()
            for length, (prompt, _) in zip(lengths, requests, strict=True)
        ]
        logp: list[list[float]] = [[] for _ in requests]
        while unfinished := [
            n for n, one in enumerate(ids) if len(one) < limits[n] and not (logp[n] and one[-1] % 100 == 3)
        ]:
            longest = max(len(ids[n]) for n in unfinished)
            # no position reads the padding after it
            padded_BT = torch.tensor([ids[n] + [0] * (longest - len(ids[n])) for n in unfinished])
            with torch.no_grad():
                logits_BTV = model(padded_BT).logits.float()
            for n, logits_TV in zip(unfinished, logits_BTV, strict=True):
                logp_V = logits_TV[len(ids[n]) - 1].log_softmax(0)
                ids[n].append(int(torch.multinomial(logp_V.exp(), 1, generator=generators[n])))
                logp[n].append(float(logp_V[ids[n][-1]]))
        return [
            self.rollout(*request, *sampled) for request, *sampled in zip(requests, ids, logp, strict=True)
        ]

    def rollout(self, prompt: PromptPlan, number: int, ids: list[int], logp: list[float]) -> Rollout:
        """Of the ids of prompt and completion, and the log-probabilities of the completion's."""
        sampled = np.asarray(ids, np.int32)
        span = 1 + (np.arange(len(logp)) >= len(logp) // 2).astype(np.uint8)
        validity = "valid" if ids[-1] % 100 == 3 else "truncated"
        sampler_logp_C = self.sampler_logp(np.asarray(logp, np.float32))
        return Rollout(
            prompt.place, number, prompt.document, prompt.effort, validity, sampled, span, sampler_logp_C
        )

    def load(self, published: Manifest, facts: PolicyVersion) -> PreTrainedModel:
        """A version, verified with its probe."""
        if self.loaded is None or self.loaded[0] != facts.version:
            folder = self.scratch / f"sampler-{facts.version}"
            folder.mkdir(exist_ok=True)
            for name, subject in published.subjects.items():
                self.context.bucket.download(subject, folder / name)
            model = hf_model.load_student(folder, SMALL)
            for ids, expected in zip(facts.probe.ids, facts.probe.logp, strict=True):
                with torch.no_grad():
                    logp = (
                        model(torch.tensor([ids]))
                        .logits[0, :-1]
                        .log_softmax(1)
                        .gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
                    )
                assert (logp - torch.tensor(expected)).abs().max() <= PROBE
            self.loaded = facts.version, model
        return self.loaded[1]


def teacher_logp(ids_T: NDArray[np.int32]) -> NDArray[np.float32]:
    """[T] log-probabilities that depend on all ids."""
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(ids_T.tobytes()).digest()[:8]))
    return (-8 - random.exponential(5, len(ids_T))).astype(np.float32)
