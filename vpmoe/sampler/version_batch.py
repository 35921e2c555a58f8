"""All windows that are sampled from one policy version, as one batch.

The cost of a decoding step hardly depends on the number of sequences (benchmarks/decode.py), so all windows
whose contents are known are sampled together. sampler.py loads the weights and writes the windows.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vpmoe.api import DistillRun
from vpmoe.api.layout import layout
from vpmoe.api.stages import OnPolicy
from vpmoe.data.packing import SequenceStream, first_documents, packed_documents
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.inference.engine_pool import CheckStop, Completion, SamplingRequest
from vpmoe.inference.verify import SamplingEngines
from vpmoe.rollout import prompts
from vpmoe.rollout.back_pressure import Adjustment
from vpmoe.rollout.policy_version import PolicyVersion
from vpmoe.rollout.window_files import Rollout
from vpmoe.rollout.windows import PromptPlan, WindowPlan, WindowSchedule, completion_limit
from vpmoe.storage.manifest import Manifest


class PromptSource:
    """The prompts of a stage: the dataset's documents from the position at which the stage began."""

    def __init__(
        self, run: DistillRun, stage: OnPolicy, made: Manifest, began: PolicyVersion, cache: BlockCache
    ) -> None:
        """`made`: the dataset's manifest. `began`: any version of the stage."""
        training = run.spec.training
        self.parts = DatasetReader(made, "train", cache)
        self._first_document = first_documents([len(lengths) for lengths in self.parts.lengths])
        self._prompts = prompts.PromptBuilder(made.facts["settings"]["conversation"])
        self._max_length = training.sequence_length
        self.windows = WindowSchedule(
            stage, training.seed, [len(lengths) for lengths in self.parts.lengths], began.first_prompt
        )
        plan = SequenceStream(self.parts.lengths, training.seed, training.sequence_length)
        self.anchors = plan.tokens_after_steps(
            began.first_sequence,
            layout(run.spec.student, run.spec.training, stage).sequences_per_step,
            stage.tokens,
        )
        """[steps] cumulative tokens of the stage's anchor steps, for Curriculum.tokens_before_next."""

    def requests(self, window: WindowPlan) -> Iterator[tuple[PromptPlan, int, SamplingRequest]]:
        """The sampling requests of a window: (prompt, index among its rollouts, request)."""
        numbers = np.array([prompt.document for prompt in window.prompts], np.int32)
        found = packed_documents(numbers, self._first_document, self.parts.lengths)
        self.parts.prefetch(found)
        for prompt, document in zip(window.prompts, found, strict=True):
            ids_P = self._prompts.build(*self.parts.read_document(document), prompt.effort)
            bound = completion_limit(len(ids_P), prompt.effort, window.max_tokens, self._max_length)
            for rollout, seed in enumerate(prompt.seeds):
                yield prompt, rollout, SamplingRequest(ids_P, seed, bound)


@dataclass(frozen=True)
class SampledVersion:
    """The sampled windows of a version."""

    windows: Sequence[tuple[WindowPlan, Sequence[Rollout]]]
    seconds: float
    """Time to build and sample all of them."""
    speed: float
    """Sampled tokens per second."""


def sample_version(
    source: PromptSource,
    version: PolicyVersion,
    adjustments: Sequence[Adjustment],
    engines: SamplingEngines,
    check_stop: CheckStop,
) -> SampledVersion:
    """Sample all windows of the version that the engines hold. `adjustments`: all so far.

    Windows that are in the bucket already, or come after the stage's end, are sampled too. The bits depend on
    what is computed together, so the batch must depend on the version alone and not on how far an earlier
    attempt came.
    """
    started = time.monotonic()
    windows = [
        source.windows.window(number, version.tokens, adjustments)
        for number in source.windows.curriculum.windows_of(version.version)
    ]
    requests = [list(source.requests(window)) for window in windows]
    asked = [request for of_window in requests for _, _, request in of_window]
    if engines.depth is None:
        completions = iter(engines.sample(asked, check_stop))
    else:
        completions = iter([one for _, one in sorted(engines.sample_queue(asked, check_stop))])
    sampled = [[make_rollout(*one, next(completions)) for one in of_window] for of_window in requests]
    seconds = time.monotonic() - started
    tokens = sum(len(one.logp_C) for rollouts in sampled for one in rollouts)
    return SampledVersion(list(zip(windows, sampled, strict=True)), seconds, tokens / seconds)


def make_rollout(
    prompt: PromptPlan, number: int, request: SamplingRequest, completion: Completion
) -> Rollout:
    """A completion as it is stored: with its prompt, the span of each token, and its Harmony validity."""
    ids_C = completion.ids_C
    return Rollout(
        prompt.place,
        number,
        prompt.document,
        prompt.effort,
        prompts.completion_validity(ids_C),
        np.concatenate([request.ids_P, ids_C]),
        prompts.completion_spans(ids_C),
        completion.logp_C,
    )
