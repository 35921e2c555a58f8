"""`python -m vpmoe.rollout plan`: sums, assumptions and rejected arguments of the forecast."""

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
from vpmoe.rollout.forecast import Assumptions, Forecast, forecast_phases

ASSUMPTIONS = Assumptions(prompt=100, completion={"low": 300, "medium": 700, "high": 9999})


SMALL = {"tokens": "300M", "rollout": {"promptsPerWindow": 512}}


def run(**changes: Any) -> DistillRun:
    return DistillRun.parse(
        valid_specs.manifest({"spec.stages": [{**valid_specs.ONPOLICY, **SMALL, **changes}]})
    )


def forecast(run: DistillRun) -> tuple[OnPolicy, list[Forecast], Forecast]:
    stage = run.stage("onpolicy")
    assert isinstance(stage, OnPolicy)
    phases = forecast_phases(run.spec, stage, ASSUMPTIONS)
    return stage, phases, sum(phases, Forecast())


@pytest.mark.parametrize(
    "changes", [{}, {"anchor": 0}, {"anchor": 0.7, "staleness": 9}, {"publishEvery": 5}], ids=str
)
def test_the_phases_add_up_to_the_stage(changes: dict[str, Any]) -> None:
    it = run(**changes)
    stage, phases, total = forecast(it)
    step = layout(it.spec.student, it.spec.training, stage).tokens_per_step
    anchors = total.anchor // step
    largest = -(-phases[-1].on_policy // phases[-1].windows)
    assert stage.tokens <= total.on_policy + total.anchor < stage.tokens + max(step, largest)
    assert anchors == interleave(total.windows + anchors, stage.anchor).sum()
    assert total.prompts == total.windows * 512 and sum(total.effort.values()) == pytest.approx(total.prompts)
    assert total.versions == {Curriculum(stage).version_of(window) for window in range(total.windows)}
    assert sum(len(phase.versions) for phase in phases) == len(total.versions), (
        "each version belongs to one phase"
    )


def test_each_phase_follows_the_curriculum() -> None:
    stage, phases, total = forecast(run())
    for phase, planned in zip(phases, stage.curriculum, strict=True):
        share = (phase.on_policy + phase.anchor) / (total.on_policy + total.anchor)
        assert share == pytest.approx(planned.share, abs=0.02), "up to the windows that were in progress"
        assert [phase.effort[name] / phase.prompts for name in EFFORTS] == pytest.approx(
            [getattr(planned.effort, name) for name in EFFORTS]
        )
    assert [phase.rollouts / phase.prompts for phase in phases] == pytest.approx([1, 1.1, 2], abs=0.05)
    assert [phase.longest for phase in phases] == [2048, 4096, 4096]
    assert phases[0].on_policy / phases[0].rollouts == pytest.approx(100 + 0.7 * 300 + 0.3 * 700, rel=1e-3)
    assert phases[2].on_policy / phases[2].rollouts == pytest.approx(
        100 + 0.1 * 300 + 0.3 * 700 + 0.6 * 4096, rel=1e-3
    ), "truncated at maxTokens"


def test_completions_are_truncated_at_the_sequences_end() -> None:
    it = run(rollout={"maxTokens": {"low": 9000, "medium": 9000, "high": 9000}})
    assert [phase.longest for phase in forecast(it)[1]] == [8092] * 3


def test_the_table_states_its_assumptions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        write_yaml(
            valid_specs.manifest(
                {"spec.stages": [valid_specs.ONPOLICY, {**valid_specs.ONPOLICY, "name": "again"}]}
            )
        )
    )
    assert main(["plan", "--run", str(path), "--completion", "low=300,high=1500"]) == 0
    output = capsys.readouterr().out
    assert "onpolicy: 8B tokens in " in output and "again: 8B tokens in " in output
    assert (
        "prompts of 128 tokens; completions of low 300, medium 1,024 (half of maxTokens), high 1,500;"
        in output
    )
    lines = [line.split() for line in output.split("\n\n")[1].splitlines()]
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
            id="only-anchor-steps",
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
def test_a_run_without_a_forecast_is_rejected_with_the_reason(
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
def test_invalid_lengths_are_rejected(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--run", "run.yaml", "--completion", text])
    assert (
        "is not an effort and a number of tokens, such as low=300,medium=700,high=2000"
        in capsys.readouterr().err
    )
