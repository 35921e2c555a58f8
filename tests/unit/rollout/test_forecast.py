"""The forecast of `python -m vpmoe.rollout plan`: its sums, its assumptions, rejected arguments."""

from pathlib import Path
from typing import Any

import pytest

from tests.fakes import valid_specs
from vpmoe.api import DistillRun
from vpmoe.api.layout import layout
from vpmoe.api.stages import OnPolicy
from vpmoe.api.text import write_yaml
from vpmoe.data.mixture import interleave
from vpmoe.rollout.__main__ import main
from vpmoe.rollout.curriculum import EFFORTS, Curriculum
from vpmoe.rollout.forecast import Assumptions, Forecast, forecast_phases, format_count

ASSUMED = Assumptions(prompt=100, completion={"low": 300, "medium": 700, "high": 9999})


SMALL = {"tokens": "300M", "rollout": {"promptsPerWindow": 512}}


def run(**changes: Any) -> DistillRun:
    return DistillRun.parse(
        valid_specs.manifest({"spec.stages": [{**valid_specs.ONPOLICY, **SMALL, **changes}]})
    )


def expected(run: DistillRun) -> tuple[OnPolicy, list[Forecast], Forecast]:
    stage = run.stage("onpolicy")
    assert isinstance(stage, OnPolicy)
    phases = forecast_phases(run.spec, stage, ASSUMED)
    return stage, phases, sum(phases, Forecast())


@pytest.mark.parametrize(
    "changes", [{}, {"anchor": 0}, {"anchor": 0.7, "staleness": 9}, {"publishEvery": 5}], ids=str
)
def test_the_parts_add_up_to_the_stage(changes: dict[str, Any]) -> None:
    it = run(**changes)
    stage, phases, whole = expected(it)
    step = layout(it.spec.student, it.spec.training, stage).tokens_per_step
    anchors = whole.anchor // step
    largest = -(-phases[-1].on_policy // phases[-1].windows)
    assert stage.tokens <= whole.on_policy + whole.anchor < stage.tokens + max(step, largest)
    assert anchors == interleave(whole.windows + anchors, stage.anchor).sum()
    assert whole.prompts == whole.windows * 512 and sum(whole.effort.values()) == pytest.approx(whole.prompts)
    assert whole.versions == {Curriculum(stage).version_of(window) for window in range(whole.windows)}
    assert sum(len(phase.versions) for phase in phases) == len(whole.versions), (
        "a version belongs to one phase"
    )


def test_each_phase_is_what_the_curriculum_says() -> None:
    stage, phases, whole = expected(run())
    for phase, asked in zip(phases, stage.curriculum, strict=True):
        share = (phase.on_policy + phase.anchor) / (whole.on_policy + whole.anchor)
        assert share == pytest.approx(asked.share, abs=0.02), "but for the windows that were under way"
        assert [phase.effort[name] / phase.prompts for name in EFFORTS] == pytest.approx(
            [getattr(asked.effort, name) for name in EFFORTS]
        )
    assert [phase.rollouts / phase.prompts for phase in phases] == pytest.approx([1, 1.1, 2], abs=0.05)
    assert [phase.longest for phase in phases] == [2048, 4096, 4096]
    assert phases[0].on_policy / phases[0].rollouts == pytest.approx(100 + 0.7 * 300 + 0.3 * 700, rel=1e-3)
    assert phases[2].on_policy / phases[2].rollouts == pytest.approx(
        100 + 0.1 * 300 + 0.3 * 700 + 0.6 * 4096, rel=1e-3
    ), "cut at maxTokens"


def test_the_sequences_end_cuts_completions_too() -> None:
    it = run(rollout={"maxTokens": {"low": 9000, "medium": 9000, "high": 9000}})
    assert [phase.longest for phase in expected(it)[1]] == [8092] * 3


def test_the_table_says_what_it_assumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        write_yaml(
            valid_specs.manifest(
                {"spec.stages": [valid_specs.ONPOLICY, {**valid_specs.ONPOLICY, "name": "again"}]}
            )
        )
    )
    assert main(["plan", "--run", str(path), "--completion", "low=300,high=1500"]) == 0
    said = capsys.readouterr().out
    assert "onpolicy: 8B tokens in " in said and "again: 8B tokens in " in said
    assert (
        "prompts of 128 tokens; completions of low 300, medium 1,024 (half of maxTokens), high 1,500;" in said
    )
    lines = [line.split() for line in said.split("\n\n")[1].splitlines()]
    assert [line[0] for line in lines] == ["phase", "1", "2", "3", "all"]
    assert lines[1][-5:-1] == ["70%", "30%", "0%", "2,048"]


@pytest.mark.parametrize(
    "changes, arguments, message",
    [
        pytest.param({}, [], "spec.stages has no OnPolicy stage", id="no-such-stage"),
        pytest.param(
            {"spec.stages": [{**valid_specs.ONPOLICY, "anchor": 1}]},
            [],
            "anchor: 1 leaves no batch of rollouts",
            id="anchor-alone",
        ),
        pytest.param(
            {"spec.stages": [valid_specs.ONPOLICY]},
            ["--prompt", "8192"],
            "leaves no room for an answer",
            id="long-prompt",
        ),
        pytest.param(
            {"spec.stages": [{**valid_specs.ONPOLICY, "anchor": 2}]},
            [],
            "spec.stages[0].anchor",
            id="invalid",
        ),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(
    changes: dict[str, Any],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(write_yaml(valid_specs.manifest(changes)))
    assert main(["plan", "--run", str(path), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "low", "low=", "low=0", "loud=3", "low=3;high=4"])
def test_lengths_that_cannot_be_read_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--run", "run.yaml", "--completion", text])
    assert (
        "is not an effort and a number of tokens, such as low=300,medium=700,high=2000"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "count, text", [(0, "0"), (999, "999"), (1234, "1.23k"), (1_234_567, "1.23M"), (8_000_000_000, "8B")]
)
def test_counts_have_three_digits(count: int, text: str) -> None:
    assert format_count(count) == text
