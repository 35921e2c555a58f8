"""What is measured of a step and of an evaluation, as lines of JSON and as Prometheus gauges. docs/training.md lists every field.

Making them is all that is done here; report.py brings them to the bucket.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from vpmoe.api.progress import SpanLoss
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.clock import now
from vpmoe.model.router import ExpertLoad
from vpmoe.rollout.prompts import VALID

LOADS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0)
"""Bounds of the load histogram, in mean loads: experts at most a quarter of the mean, …, above 16 times the mean."""


def router(load: ExpertLoad) -> dict[str, Any]:
    """How the step's tokens spread over the experts."""
    tokens_LE = load.tokens.numpy()
    relative = tokens_LE / np.maximum(tokens_LE.mean(axis=1, keepdims=True), 1e-9)
    counts = np.bincount(np.searchsorted(LOADS, relative.flatten()), minlength=len(LOADS) + 1)
    return {
        "maxOverMean": dict(zip(load.layers, np.round(load.max_over_mean.numpy(), 3).tolist(), strict=True)),
        "dead": {layer: dead for layer, dead in zip(load.layers, load.dead.tolist(), strict=True) if dead},
        "auxLoss": float(load.aux.mean()),
        "histogram": {"bounds": LOADS, "experts": counts.tolist()},
    }


def line(event: str, position: TrainState, attempt: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics: what happened, where the stage stood after it, and what was measured."""
    return {
        "event": event,
        "time": now().isoformat(timespec="milliseconds"),
        "attempt": attempt,
        "step": position.steps,
        "iteration": position.iteration,
        "tokens": position.tokens,
        "epoch": position.epoch,
        **facts,
    }


class Prometheus:
    """The latest numbers as gauges, served at /metrics."""

    def __init__(self, labels: Mapping[str, str], port: int) -> None:
        registry = CollectorRegistry()
        self._labels = labels
        names = [*labels]

        def gauge(name: str, words: str, more: Sequence[str] = ()) -> Gauge:
            return Gauge(f"vpmoe_train_{name}", words, [*names, *more], registry=registry)

        self._of_step = {
            "step": gauge("step", "Optimizer steps of the stage"),
            "tokens": gauge("tokens", "Tokens of the stage, padding excluded"),
            "epoch": gauge("epoch", "Pass over the data"),
            "loss": gauge("loss", "Loss of the latest step"),
            "gradientNorm": gauge("gradient_norm", "Norm of the latest gradient before clipping"),
            "learningRate": gauge("learning_rate", "Learning rate of the latest step"),
            "tokensPerSecond": gauge("tokens_per_second", "Tokens a second over the last steps"),
        }
        self._span = gauge("span_loss", "Loss of the latest step by span, nats a token", ["span"])
        self._held_out = gauge("held_out_loss", "Held-out loss by span, nats a token", ["span"])
        self._of_span = {
            ("teacherLogp",): gauge(
                "teacher_logp",
                "Teacher's mean log-probability in the latest scored step by span, nats",
                ["span"],
            ),
            ("weight", "mean"): gauge(
                "weight_mean", "Mean confidence weight in the latest scored step by span", ["span"]
            ),
            ("weight", "saturationLow"): gauge(
                "weight_saturation_low_ratio", "Share of weights at confidence.min by span", ["span"]
            ),
            ("weight", "saturationHigh"): gauge(
                "weight_saturation_high_ratio", "Share of weights at confidence.max by span", ["span"]
            ),
            ("kl",): gauge(
                "teacher_kl",
                "KL(teacher‖student) at the stage's temperature in the latest step by span, nats",
                ["span"],
            ),
            ("reverseKl",): gauge(
                "reverse_kl",
                "KL(student‖teacher) over the latest window's sampled tokens by span, nats a token",
                ["span"],
            ),
            ("samplerKl",): gauge(
                "sampler_kl",
                "KL(sampler‖trainer) over the latest window's sampled tokens by span, nats a token",
                ["span"],
            ),
            ("cosine",): gauge(
                "teacher_cosine",
                "Cosine of student's and teacher's hidden states in the latest step by span",
                ["span"],
            ),
        }
        self._of_window = {
            "window": gauge("window", "Latest window that was trained"),
            "staleness": gauge(
                "window_staleness", "Windows trained since the version that the latest one was sampled from"
            ),
            "waitRollouts": gauge(
                "wait_rollouts_seconds", "Seconds for which the latest window's rollouts were waited for"
            ),
            "waitScores": gauge(
                "wait_scores_seconds", "Seconds for which the latest window's scores were waited for"
            ),
        }
        self._buffer = gauge(
            "buffer_windows", "Windows that were ready ahead of the trainer, sampled and scored", ["kind"]
        )
        self._valid = gauge(
            "valid_ratio",
            "Share of the latest window's rollouts that are valid Harmony by effort",
            ["effort"],
        )
        self._max_over_mean = gauge(
            "router_max_over_mean", "Busiest expert's load over the mean, the worst layer's"
        )
        self._dead = gauge("router_dead_experts", "Experts without a token in the latest step, all layers")
        self._aux = gauge("router_aux_loss", "Balance loss of the router, 1 when balanced")
        self._utilisation = gauge("gpu_utilisation_ratio", "Mean utilisation of the ranks' GPUs")
        self._headroom = gauge("gpu_memory_headroom_bytes", "Least free memory of the ranks' GPUs")
        start_http_server(port, registry=registry)

    def show(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take the numbers of all lines. What is null has no value there either."""
        for line in lines:
            self._show(line)

    def _show(self, line: Mapping[str, Any]) -> None:
        spans, values = (
            (self._held_out, line.get("heldOut"))
            if line["event"] == "evaluation"
            else (self._span, line.get("lossBySpan"))
        )
        for span, value in (values or {}).items():
            if value is not None:
                spans.labels(**self._labels, span=span).set(value)
        if line["event"] != "step":
            return
        for path, by_span in self._of_span.items():
            measured: Any = line
            for name in path:
                measured = measured.get(name, {})
            for span, value in measured.items():
                if value is not None:
                    by_span.labels(**self._labels, span=span).set(value)
        if "window" in line:
            for kind, count in line["buffer"].items():
                self._buffer.labels(**self._labels, kind=kind).set(count)
            for effort, shares in line["validity"].items():
                self._valid.labels(**self._labels, effort=effort).set(shares.get(VALID, 0))
        found = {
            **{gauge: line[name] for name, gauge in self._of_window.items() if name in line},
            **{gauge: line[name] for name, gauge in self._of_step.items()},
            self._max_over_mean: max(line["router"]["maxOverMean"].values()),
            self._dead: sum(line["router"]["dead"].values()),
            self._aux: line["router"]["auxLoss"],
            self._utilisation: line["gpu"]["utilisation"],
            self._headroom: line["gpu"]["memoryHeadroom"],
        }
        for gauge, value in found.items():
            if value is not None:
                gauge.labels(**self._labels).set(value)


def weighted(loss: SpanLoss, weights: Mapping[str, float]) -> float:
    """w_r·CE_r + w_f·CE_f; a span that no held-out document has counts nothing."""
    return weights["reasoning"] * (loss.reasoning or 0.0) + weights["final"] * (loss.final or 0.0)
