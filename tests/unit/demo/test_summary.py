"""The demonstration's summary, computed from lines of metrics."""

from typing import Any

import pytest

from demo.summary import Change, held_out, on_policy, reverse_kl, summary


def evaluation(reasoning: float, final: float | None) -> dict[str, Any]:
    return {"event": "evaluation", "heldOut": {"reasoning": reasoning, "final": final}}


def window(
    number: int, reasoning: float, final: float | None, tokens: tuple[int, int] = (30, 10), valid: float = 0.5
) -> dict[str, Any]:
    return {
        "event": "step",
        "kind": "OnPolicy",
        "window": number,
        "version": number // 2,
        "rollouts": {"low": 1, "high": 3},
        "reverseKl": {"reasoning": reasoning, "final": final},
        "targets": dict(zip(("reasoning", "final"), tokens, strict=True)),
        "validity": {"low": {"truncated": 1.0}, "high": {"valid": valid, "noFinal": 1 - valid}},
    }


VANILLA = {"event": "step", "kind": "Vanilla"}
WINDOWS = [window(number, 1.0 - number / 10, 2.0 - number / 10, valid=number / 10) for number in range(8)]
STAGES = {
    "vanilla": [
        {"event": "start"},
        evaluation(12.2, 12.3),
        VANILLA,
        evaluation(9.0, 9.5),
        evaluation(8.0, 9.0),
    ],
    "onpolicy": [evaluation(8.0, 9.0), *reversed(WINDOWS), VANILLA, evaluation(7.5, 8.75)],
}


def test_the_held_out_loss_is_given_at_the_start_and_the_end_of_each_stage() -> None:
    assert held_out(STAGES) == [
        Change("vanilla", "reasoning", 12.2, 8.0),
        Change("vanilla", "final", 12.3, 9.0),
        Change("onpolicy", "reasoning", 8.0, 7.5),
        Change("onpolicy", "final", 9.0, 8.75),
    ]
    assert held_out({"vanilla": [evaluation(3.0, None)]}) == [Change("vanilla", "reasoning", 3.0, 3.0)]


def test_the_reverse_kl_weights_spans_by_their_tokens() -> None:
    assert reverse_kl(window(0, 1.0, 2.0)) == pytest.approx(1.25)
    assert reverse_kl(window(0, 1.0, None, tokens=(40, 0))) == 1.0


def test_the_reverse_kl_is_given_for_the_first_and_the_last_windows() -> None:
    (change,) = on_policy(STAGES)
    assert change.stage == "onpolicy"
    assert (change.before, change.after) == pytest.approx((1.15, 0.65))
    assert on_policy({"vanilla": STAGES["vanilla"]}) == []


def test_the_summary_shows_the_changes() -> None:
    text = "\n".join(summary(STAGES))
    assert "vanilla      reasoning" in text and "12.200    8.000  -4.200" in text
    assert "1.150    0.650  -0.500" in text
    assert "8 windows, 320 sampled tokens, 4 policy versions" in text
    assert "KL" not in "\n".join(summary({"vanilla": STAGES["vanilla"]}))
