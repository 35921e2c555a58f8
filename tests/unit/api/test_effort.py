"""Efforts and their shares as text: what is read from it, its shortest form, and the default of a run."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.fakes.valid_specs import ONPOLICY, manifest
from vpmoe.api import DistillRun
from vpmoe.api.effort import EFFORTS, effort_shares, most_frequent, write_mix


def effort_of(written: dict[str, Any]) -> str:
    return DistillRun.parse(written).spec.dataset.conversation.effort


@pytest.mark.parametrize(
    "written, shortest, shares, most",
    [
        pytest.param("high", "high", {"high": "1"}, "high", id="name"),
        pytest.param(
            "low=0.3,medium=0.4,high=0.3",
            "low=0.3,medium=0.4,high=0.3",
            {"low": "3/10", "medium": "2/5", "high": "3/10"},
            "medium",
            id="three",
        ),
        pytest.param(
            "low=0.50,high=0.500000",
            "low=0.5,high=0.5",
            {"low": "1/2", "high": "1/2"},
            "high",
            id="equal-shares",
        ),
        pytest.param("low=1,medium=0.0,high=0", "low", {"low": "1"}, "low", id="one-share-of-1"),
        pytest.param(
            "low=0.333333,medium=0.333333,high=0.333333",
            "low=0.333333,medium=0.333333,high=0.333333",
            {"low": "1/3", "medium": "1/3", "high": "1/3"},
            "high",
            id="thirds",
        ),
    ],
)
def test_shares_are_exact_and_have_one_form(
    written: str, shortest: str, shares: dict[str, str], most: str
) -> None:
    found = effort_of(manifest({"spec.dataset.conversation.effort": written}))
    assert found == shortest
    assert effort_shares(found) == {effort: Fraction(share) for effort, share in shares.items()}
    assert most_frequent(found) == most


def test_any_shares_are_written_with_a_sum_of_exactly_1_and_an_error_below_a_millionth() -> None:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    for _ in range(200):
        weights = [int(weight) for weight in random.integers(0, 10 ** random.integers(1, 9), 3)]
        if not sum(weights):
            continue
        shares = {e: Fraction(weight, sum(weights)) for e, weight in zip(EFFORTS, weights, strict=True)}
        text = write_mix(shares)
        found = effort_shares(text)
        assert effort_of(manifest({"spec.dataset.conversation.effort": text})) == text
        assert sum(found.values()) == 1
        assert all(abs(found.get(effort, 0) - shares[effort]) < Fraction(1, 10**6) for effort in EFFORTS)


def curriculum(*phases: tuple[float, dict[str, float]]) -> list[dict[str, Any]]:
    return [{"share": share, "effort": effort} for share, effort in phases]


LOW, HIGH = {"low": 1.0}, {"high": 1.0}


@pytest.mark.parametrize(
    "stages, expected",
    [
        pytest.param([], "high", id="no-onpolicy-stage"),
        pytest.param([{}], "low=0.32,medium=0.42,high=0.26", id="the-default-curriculum"),
        pytest.param([{"curriculum": curriculum((1, LOW))}], "low", id="one-effort"),
        pytest.param(
            [{"curriculum": curriculum((0.2, LOW), (0.8, HIGH))}], "low=0.2,high=0.8", id="two-phases"
        ),
        pytest.param(
            [
                {"tokens": "1B", "curriculum": curriculum((1, LOW))},
                {"name": "more", "tokens": "2B", "curriculum": curriculum((1, HIGH))},
            ],
            "low=0.333333,high=0.666667",
            id="stages-by-their-tokens",
        ),
    ],
)
def test_the_default_is_the_mix_of_the_whole_curriculum(stages: list[dict[str, Any]], expected: str) -> None:
    first = manifest({})["spec"]["stages"]
    written = manifest({"spec.stages": [*first, *({**ONPOLICY, **changes} for changes in stages)]})
    assert effort_of(written) == expected
    run = DistillRun.parse(written)
    config = run.config()
    assert config["spec"]["dataset"]["conversation"]["effort"] == expected
    assert DistillRun.parse({**config, "metadata": written["metadata"]}).config_hash == run.config_hash
    written["spec"]["dataset"]["conversation"] = {"effort": "high"}
    assert effort_of(written) == "high", "what is written wins"


def test_a_malformed_curriculum_is_the_only_problem_that_is_reported() -> None:
    written = manifest(
        {"spec.stages": [*manifest({})["spec"]["stages"], {**ONPOLICY, "curriculum": "short"}]}
    )
    with pytest.raises(ValueError, match=r"^DistillRun:\n  spec\.stages\[1\]\.curriculum: .*list$"):
        DistillRun.parse(written)
