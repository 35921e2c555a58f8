"""All windows that are sampled from one policy version, as one batch.

The cost of a decoding step hardly depends on the number of sequences (benchmarks/decode.py), so all windows
whose contents are known are sampled together. sampler.py loads the weights and writes the windows,
part_log.py writes what has finished before.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
from vpmoe.rollout.part_files import RolloutKey
from vpmoe.rollout.policy_version import PolicyVersion
from vpmoe.rollout.window_files import Rollout
from vpmoe.rollout.windows import PromptPlan, WindowPlan, WindowSchedule, completion_limit
from vpmoe.sampler.part_log import PartLog
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


class PlannedRollout(NamedTuple):
    """A rollout of a version, before it is sampled."""

    key: RolloutKey
    prompt: PromptPlan
    request: SamplingRequest


@dataclass(frozen=True)
class SampledVersion:
    """The sampled windows of a version."""

    windows: Sequence[tuple[WindowPlan, Sequence[Rollout]]]
    adopted: Counter[int]
    """By window, the number of rollouts that earlier attempts had sampled."""
    seconds: float
    """Time to build and sample all of them."""
    speed: float
    """Sampled tokens per second, without those of earlier attempts."""


def sample_version(
    source: PromptSource,
    version: PolicyVersion,
    adjustments: Sequence[Adjustment],
    engines: SamplingEngines,
    parts: PartLog,
    check_stop: CheckStop,
    recorded: Callable[[], bool],
    report: Callable[[int, int], None],
) -> SampledVersion | None:
    """Sample all windows of the version that the engines hold. `adjustments`: all so far. `recorded`: called
    at the end, waits until the bucket has the version; None is returned if it says that the bucket never
    will. `report`: called after each part with the numbers of finished and of all rollouts.

    Windows that are in the bucket already, or come after the stage's end, are sampled too. On the CPU the
    bits depend on what is computed together, so the batch must depend on the version alone and not on how far
    an earlier attempt came. Engines that share a queue sample only what is in no part, and write parts.
    """
    started = time.monotonic()
    windows = [
        source.windows.window(number, version.tokens, adjustments)
        for number in source.windows.curriculum.windows_of(version.version)
    ]
    planned = [
        PlannedRollout(RolloutKey(window.number, prompt.place, rollout), prompt, request)
        for window in windows
        for prompt, rollout, request in source.requests(window)
    ]
    adopted: Counter[int] = Counter()
    adopted_tokens = 0
    if engines.depth is None:
        completions = engines.sample([one.request for one in planned], check_stop)
        rollouts = [make_rollout(*one) for one in zip(planned, completions, strict=True)]
        seconds = time.monotonic() - started
        if not recorded():
            return None
    else:
        parts.adopt_all({one.key: one.request for one in planned})
        adopted.update(key.window for key in parts.rollouts)
        adopted_tokens = sum(len(one.logp_C) for one in parts.rollouts.values())
        sample_missing(planned, engines, parts, check_stop, report)
        seconds = time.monotonic() - started
        if not recorded():
            return None
        parts.write()
        rollouts = [parts.rollouts[one.key] for one in planned]
    of_window: dict[int, list[Rollout]] = {window.number: [] for window in windows}
    for one, rollout in zip(planned, rollouts, strict=True):
        of_window[one.key.window].append(rollout)
    tokens = sum(len(one.logp_C) for one in rollouts) - adopted_tokens
    return SampledVersion(
        [(window, of_window[window.number]) for window in windows], adopted, seconds, tokens / seconds
    )


def sample_missing(
    planned: Sequence[PlannedRollout],
    engines: SamplingEngines,
    parts: PartLog,
    check_stop: CheckStop,
    report: Callable[[int, int], None],
) -> None:
    """Sample the rollouts that are in no part. What had finished before an error is written."""

    def wait() -> None:
        check_stop()
        if parts.write_if_due():
            report(len(parts.rollouts), len(planned))

    missing = [one for one in planned if one.key not in parts.rollouts]
    try:
        for index, completion in engines.sample_queue([one.request for one in missing], wait):
            parts.add(missing[index].key, make_rollout(missing[index], completion))
    except BaseException:
        parts.write_if_recorded()
        raise


def make_rollout(planned: PlannedRollout, completion: Completion) -> Rollout:
    """A completion as it is stored: with its prompt, the span of each token, and its Harmony validity."""
    ids_C = completion.ids_C
    return Rollout(
        planned.prompt.place,
        planned.key.rollout,
        planned.prompt.document,
        planned.prompt.effort,
        prompts.completion_validity(ids_C),
        np.concatenate([planned.request.ids_P, ids_C]),
        prompts.completion_spans(ids_C),
        completion.logp_C,
    )
