"""The names and values of rows, from lines as jobs write them."""

import math

import pytest

from tests.fakes import recorded_run
from vpmoe.trackers.rows import row

TIME = {"time": "2026-11-28T01:12:36.964+00:00", "attempt": 1}


def test_a_trainers_line_has_grouped_names() -> None:
    line = next(one for one in recorded_run.lines("onpolicy", "step") if one["kind"] == "OnPolicy")
    found = row(line, 7, "train")
    assert found is not None and found.x == 7 and found.time.isoformat("T", "milliseconds") == line["time"]
    router = line["router"]
    expected = {
        "loss/total": line["loss"],
        "loss/reasoning": line["lossBySpan"]["reasoning"],
        "loss/final": line["lossBySpan"]["final"],
        "train/learning_rate": line["learningRate"],
        "train/gradient_norm": line["gradientNorm"],
        "train/tokens_per_second": line["tokensPerSecond"],
        "router/max_over_mean": max(router["maxOverMean"].values()),
        "router/dead": sum(router["dead"].values()),
        "router/aux_loss": router["auxLoss"],
        "reverse_kl/final": line["reverseKl"]["final"],
        "bounded/advantage/final": line["bounded"]["advantage"]["final"],
        "validity/medium": line["validity"]["medium"].get("valid", 0.0),
        "lengths/medium/mean": line["lengths"]["medium"]["mean"],
        "rollouts/medium": line["rollouts"]["medium"],
        "train/wait_rollouts": line["waitRollouts"],
        "buffer/scored": line["buffer"]["scored"],
    }
    assert expected.items() <= found.values.items()
    # No text, no histogram, nothing that was not measured, and not what is an axis.
    assert not [name for name in found.values if name.startswith("gpu/") or "histogram" in name]
    assert not {"train/kind", "train/attempt", "train/step", "train/window"} & found.values.keys()


def test_sampler_trainer_and_evaluation_have_the_same_names_for_the_same_thing() -> None:
    sampler = row(recorded_run.lines("onpolicy-sampler")[0], 0, "sampler")
    evaluate = row(recorded_run.lines("vanilla-evaluate")[0], 0, "evaluation")
    assert sampler is not None and evaluate is not None
    assert sampler.values["validity/medium"] == 0.25 and sampler.values["rollouts/medium"] == 4
    assert evaluate.values["validity/all"] == pytest.approx(2 / 6, rel=1e-12)
    assert evaluate.values["validity/low"] == 0.0 and evaluate.values["lengths/high/max"] == 24
    held_out = recorded_run.lines("vanilla-evaluate")[0]["heldOut"]
    assert evaluate.values["held_out/final"] == held_out["final"]


def test_a_start_has_no_row_and_what_is_not_finite_no_value() -> None:
    assert row(recorded_run.lines("vanilla", "start")[0], 0, "train") is None
    assert row({"event": "step", **TIME, "loss": math.nan, "lossBySpan": {"final": None}}, 0, "train") is None
    skipped = {"event": "skipped", **TIME, "number": 2, "loss": "nan", "gradientNorm": "inf"}
    skipped |= {"seconds": 1.0, "batchTokens": 9, "batch": {"firstSequence": 4}}
    bad = row(skipped, 7, "train")
    assert bad is not None and bad.x == 7 and bad.values == {"train/skipped": 2.0}
    odd = row({"event": "step", **TIME, "exercises": {"Q&A (short)": 1.0}}, 0, "train")
    assert odd is not None and odd.values == {"exercises/q_a _short_": 1.0}
