"""All windows that are sampled from one policy version, sampled as one batch.

A forward that draws a token of each sequence costs nearly the same however many sequences there are (benchmarks/decode.py), so what can be
known at the same time is sampled together. Where weights come from and where windows go to is sampler.py's business.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vpmoe.api import DistillRun
from vpmoe.api.layout import layout
from vpmoe.api.stages import OnPolicy
from vpmoe.data.packing import BatchPlan, documents, firsts
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.inference.engine_pool import CheckStop, Completion, SamplingRequest
from vpmoe.inference.verify import InferenceEngines
from vpmoe.rollout import prompts
from vpmoe.rollout.back_pressure import Adjustment
from vpmoe.rollout.policy_version import PolicyVersion
from vpmoe.rollout.window_files import Rollout
from vpmoe.rollout.windows import PromptPlan, WindowPlan, WindowSchedule, completion_limit
from vpmoe.storage.manifest import Manifest


class PromptSource:
    """What the windows of a stage are made of: the data set's documents, and where the stage began in their order."""

    def __init__(
        self, run: DistillRun, stage: OnPolicy, made: Manifest, began: PolicyVersion, cache: BlockCache
    ) -> None:
        """`made` is the data set's manifest, `began` any version of the stage."""
        training = run.spec.training
        self.parts = DatasetReader(made, "train", cache)
        self._first_document = firsts([len(lengths) for lengths in self.parts.lengths])
        self._prompts = prompts.PromptBuilder(made.facts["settings"]["conversation"])
        self._bound = training.sequence_length
        self.windows = WindowSchedule(
            stage, training.seed, [len(lengths) for lengths in self.parts.lengths], began.first_prompt
        )
        plan = BatchPlan(self.parts.lengths, training.seed, training.sequence_length)
        self.anchors = plan.steps(
            began.first_sequence,
            layout(run.spec.student, run.spec.training, stage).sequences_per_step,
            stage.tokens,
        )
        """[steps] tokens of the stage's anchor steps up to each: Curriculum.after."""

    def requests(self, window: WindowPlan) -> Iterator[tuple[PromptPlan, int, SamplingRequest]]:
        """All that is asked in a window: of which prompt, which of its rollouts, and how."""
        numbers = np.array([asked.document for asked in window.prompts], np.int32)
        found = documents(numbers, self._first_document, self.parts.lengths)
        self.parts.prefetch(found)
        for asked, document in zip(window.prompts, found, strict=True):
            ids_P = self._prompts.build(*self.parts.read(document), asked.effort)
            bound = completion_limit(len(ids_P), asked.effort, window.max_tokens, self._bound)
            for rollout, seed in enumerate(asked.seeds):
                yield asked, rollout, SamplingRequest(ids_P, seed, bound)


@dataclass(frozen=True)
class SampledVersion:
    """The windows of a version, sampled."""

    windows: Sequence[tuple[WindowPlan, Sequence[Rollout]]]
    seconds: float
    """Of putting and sampling all of them."""
    speed: float
    """Sampled tokens a second."""


def sample_version(
    source: PromptSource,
    facts: PolicyVersion,
    turned: Sequence[Adjustment],
    engines: InferenceEngines,
    check_stop: CheckStop,
) -> SampledVersion:
    """Sample all windows of the version that the engines hold; `turned` are the turns so far.

    Always all: also those that are in the bucket already, and those that the stage will end before. Bits depend on what is computed
    together, so that must depend on the version alone, however far an attempt before came.
    """
    started = time.monotonic()
    windows = [
        source.windows.window(number, facts.tokens, turned)
        for number in source.windows.curriculum.windows_of(facts.version)
    ]
    asked = [list(source.requests(window)) for window in windows]
    completions = iter(
        engines.sample([request for of_window in asked for _, _, request in of_window], check_stop)
    )
    sampled = [[make_rollout(*one, next(completions)) for one in of_window] for of_window in asked]
    seconds = time.monotonic() - started
    tokens = sum(len(one.logp_C) for rollouts in sampled for one in rollouts)
    return SampledVersion(list(zip(windows, sampled, strict=True)), seconds, tokens / seconds)


def make_rollout(asked: PromptPlan, number: int, request: SamplingRequest, completion: Completion) -> Rollout:
    """A completion as it is stored: with its prompt, the span of each token, and what it is as a Harmony answer."""
    ids_C = completion.ids_C
    return Rollout(
        asked.place,
        number,
        asked.document,
        asked.effort,
        prompts.completion_validity(ids_C),
        np.concatenate([request.ids_P, ids_C]),
        prompts.completion_spans(ids_C),
        completion.logp_C,
    )
