"""An OnPolicy stage starts only if enough completions were valid; otherwise the error names the share and the
remedy."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vpmoe.api import DistillRun
from vpmoe.failure import Permanent
from vpmoe.rollout import evaluation_record, gate
from vpmoe.storage import Bucket, paths
from vpmoe.storage.bucket import json_bytes

EFFORTS = {
    "low": {"validity": {"valid": 9, "truncated": 1}, "meanTokens": 30.5, "mostTokens": 60},
    "medium": {"validity": {"valid": 8, "noFinal": 2}, "meanTokens": 40.0, "mostTokens": 90},
    "high": {"validity": {"valid": 5, "truncated": 5}, "meanTokens": 80.0, "mostTokens": 128},
}
EVALUATION = {
    "run": "default/tiny-run-01234567",
    "config": "0" * 64,
    "stage": "vanilla",
    "iteration": 12,
    "checkpoint": "1" * 64,
    "documents": 16,
    "heldOut": {"reasoning": 3.5, "final": 2.5},
    "completions": 30,
    "validity": {"valid": 22, "noFinal": 2, "truncated": 6},
    "efforts": EFFORTS,
    "canary": {"bitsPerByte": 1.75, "bytes": 1000, "sha256": "2" * 64},
}


@pytest.fixture
def spec(run_spec: dict[str, Any]) -> dict[str, Any]:
    run_spec["spec"]["student"]["gpus"] = 2
    run_spec["spec"]["evaluation"]["completions"] = 30
    run_spec["spec"]["stages"].append(
        {
            "name": "onpolicy",
            "kind": "OnPolicy",
            "tokens": 4096,
            "optimizer": {"minLearningRate": 1e-6},
            "require": {"validity": 0.8},
        }
    )
    return run_spec


def require_validity(spec: dict[str, Any], bucket: Bucket) -> None:
    run = DistillRun.parse(spec)
    gate.require_validity(run, run.spec.stages[-1], bucket)


def write_evaluation(spec: dict[str, Any], bucket: Bucket, record: Any) -> None:
    bucket.put_bytes(paths.evaluation(DistillRun.parse(spec), "vanilla"), json_bytes(record), {})


def test_too_few_valid_completions_reject_the_stage_with_the_share_and_the_remedy(
    spec: dict[str, Any], bucket: Bucket
) -> None:
    write_evaluation(spec, bucket, EVALUATION)
    with pytest.raises(Permanent) as caught:
        require_validity(spec, bucket)
    assert str(caught.value) == (
        "stage onpolicy: require.validity is 0.8, and after stage vanilla it is 0.733 (low 0.900, medium "
        "0.800, high 0.500; of 30 completions 22 valid, 6 truncated, 2 noFinal). In a new run, which may "
        "resumeFrom this one, train longer before onpolicy, or lower require.validity; 0 asks for none."
    )


def test_the_required_share_is_enough(spec: dict[str, Any], bucket: Bucket) -> None:
    spec["spec"]["stages"][-1]["require"] = {"validity": 22 / 30}
    write_evaluation(spec, bucket, EVALUATION)
    require_validity(spec, bucket)


def test_validity_0_requires_no_evaluation(spec: dict[str, Any], bucket: Bucket) -> None:
    spec["spec"]["stages"][-1]["require"] = {"validity": 0}
    require_validity(spec, bucket)


def test_stages_of_other_kinds_require_no_evaluation(spec: dict[str, Any], bucket: Bucket) -> None:
    run = DistillRun.parse(spec)
    gate.require_validity(run, run.spec.stages[0], bucket)


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param(
            None,
            r"evaluation.json has no validity after stage vanilla. Measure it "
            r"first: .* --step vanilla-evalu",
            id="missing",
        ),
        pytest.param(
            {"completions": 0, "validity": {}, "efforts": {}},
            "has no validity after stage vanilla",
            id="not-sampled",
        ),
        pytest.param(
            {"iteration": "many"},
            r"evaluation.json: iteration: .*delete it to have it measured again",
            id="altered",
        ),
        pytest.param(
            {"more": 1}, r"evaluation.json: more: .*written by another version", id="of-another-version"
        ),
    ],
)
def test_a_missing_or_invalid_evaluation_is_rejected(
    spec: dict[str, Any], bucket: Bucket, changes: dict[str, Any] | None, message: str
) -> None:
    if changes is not None:
        write_evaluation(spec, bucket, EVALUATION | changes)
    with pytest.raises(Permanent, match=message):
        require_validity(spec, bucket)


def test_an_evaluation_record_is_read_as_it_was_written() -> None:
    found = evaluation_record.EvaluationRecord.model_validate(EVALUATION)
    assert found.dump() == EVALUATION and found.valid_share == 22 / 30
    assert (
        evaluation_record.EvaluationRecord.model_validate(
            EVALUATION | {"completions": 0, "validity": {}, "efforts": {}}
        ).valid_share
        is None
    )


def test_validity_is_checked_without_torch() -> None:
    code = (
        "import sys, vpmoe.rollout.gate; print(sorted({'torch', 'vllm', 'megatron', "
        "'numpy'} & set(sys.modules)))"
    )
    assert (
        subprocess.check_output(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[3], text=True
        ).strip()
        == "[]"
    )
