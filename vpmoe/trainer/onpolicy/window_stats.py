"""What the trained windows have shown: the sums between two evaluations, and whether the sampler computes
another student. Pure."""

from collections.abc import Iterable, Mapping

from vpmoe.api import pod_metrics
from vpmoe.api.metrics import BySpan, Measures, Sample
from vpmoe.api.stages import Stop
from vpmoe.checkpoint.train_state import WindowStats, WindowStream
from vpmoe.data.spans import SPANS
from vpmoe.failure import Permanent
from vpmoe.objectives.onpolicy import OnPolicyMeasures
from vpmoe.rollout.evaluation_record import CanaryResult
from vpmoe.trainer.schedule import no_longer_improves

PATIENCE = 10
"""Windows in a row above maxSamplerKl after which the stage fails."""


class WindowEvaluation(Measures):
    """What an evaluation of an OnPolicy stage adds to its line."""

    reverse_kl: float | None
    """Estimate of KL(student‖teacher) over the windows since the evaluation before, spans weighted, in
    nats. None before windows were evaluated."""
    validity: float | None
    """Share of their rollouts that are valid Harmony. None before windows were evaluated."""
    canary: CanaryResult

    def samples(self) -> Iterable[Sample]:
        yield Sample(pod_metrics.CANARY, self.canary.bits_per_byte)


def add_window(
    stats: WindowStats, rollouts: int, valid: int, tokens: Mapping[str, int], reverse_kl: BySpan
) -> WindowStats:
    """The sums with one more window: `valid` of its `rollouts` are valid, and `tokens` by span have this mean
    `reverse_kl`."""
    return WindowStats(
        rollouts=stats.rollouts + rollouts,
        valid=stats.valid + valid,
        gap={span: stats.gap.get(span, 0.0) + (reverse_kl[span] or 0.0) * tokens[span] for span in SPANS},
        tokens={span: stats.tokens.get(span, 0) + tokens[span] for span in SPANS},
    )


def close_window_stats(stream: WindowStream, weights: Mapping[str, float]) -> WindowStream:
    """The stream with its sums turned into one more measured reverse KL and validity; unchanged if no
    window was added to them."""
    stats = stream.since
    if not stats.rollouts:
        return stream
    reverse_kl = sum(weights[span] * stats.gap[span] / max(stats.tokens[span], 1) for span in SPANS)
    return stream.model_copy(
        update={
            "since": WindowStats(),
            "reverse_kl": (*stream.reverse_kl, reverse_kl),
            "validity": stats.valid / stats.rollouts,
        }
    )


def evaluation_of(stream: WindowStream | None, canary: CanaryResult) -> WindowEvaluation:
    """What the latest evaluation measured."""
    if stream is None or not stream.reverse_kl:
        return WindowEvaluation(reverse_kl=None, validity=None, canary=canary)
    return WindowEvaluation(reverse_kl=stream.reverse_kl[-1], validity=stream.validity, canary=canary)


def ends_early(stream: WindowStream | None, stop: Stop) -> bool:
    """Whether a stage with these evaluations ends before its tokens are spent: the reverse KL no longer
    falls, and at the latest evaluation at least `stop.min_validity` of the rollouts were valid."""
    return (
        stream is not None
        and stream.validity >= stop.min_validity
        and no_longer_improves(stream.reverse_kl, stop)
    )


def sampler_kl(measures: OnPolicyMeasures, tokens: Mapping[str, int]) -> float:
    """KL(sampler‖trainer) of a window, in nats a token, over both spans."""
    by_span = measures.sampler_kl
    return sum((by_span[span] or 0.0) * tokens[span] for span in SPANS) / max(sum(tokens.values()), 1)


def windows_above_bound(before: int, kl: float, bound: float, window: int) -> int:
    """Windows in a row whose KL was above `bound`, this one included. Raises Permanent if they are
    PATIENCE."""
    count = before + 1 if kl > bound else 0
    if count >= PATIENCE:
        raise Permanent(
            f"SamplerDrift: KL(sampler‖trainer) was above maxSamplerKl {bound:g} for {count} windows in a "
            f"row, {kl:.4g} nats a token in window {window}; the weights were not touched. The sampler "
            "computes another student than the trainer, or the student moves too far between versions: in a "
            "new run, which may resumeFrom this one's last checkpoint, lower publishEvery, staleness or "
            "optimizer.learningRate, or raise maxSamplerKl."
        )
    return count
