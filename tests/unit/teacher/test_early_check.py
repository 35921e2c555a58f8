"""A teacher that a run cannot use is refused by its config.json, before a GPU is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import fake_hub
from tests.fakes.teacher_configs import GPT_OSS_120B
from vpmoe.api import DistillRun
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, paths
from vpmoe.teacher.early_check import check_teacher

ROOT = Path(__file__).parents[3]
VANILLA = {"name": "vanilla", "kind": "Vanilla", "tokens": 1000}
FORCED = {"name": "forced", "kind": "TeacherForced", "tokens": 1000}
RESCORED = {"name": "rescored", "kind": "Rescored", "tokens": 1000}


def put(bucket: Bucket, **changes: Any) -> None:
    """Write a model directory whose weights are no weights: they must not be read."""
    bucket.put_bytes("models/teacher/config.json", json.dumps({**GPT_OSS_120B, **changes}).encode(), {})
    bucket.put_bytes("models/teacher/model.safetensors", b"not read", {})


def run_with(run_spec: dict[str, Any], *stages: dict[str, Any]) -> DistillRun:
    run_spec["spec"]["stages"] = [VANILLA, *stages]
    run_spec["spec"]["teacher"]["gpus"] = 1
    return DistillRun.parse(run_spec)


def test_the_large_release_is_a_teacherforced_teacher_on_a_card_that_holds_it(
    run_spec: dict[str, Any], bucket: Bucket
) -> None:
    put(bucket)
    run = run_with(run_spec, FORCED)
    with pytest.raises(Permanent) as raised:
        check_teacher(run, bucket, "64Gi")
    assert str(raised.value) == (
        f"spec.teacher.model: {run.spec.teacher.model} needs GPUs of 72 GiB, and a GPU has 64Gi "
        "(spec.runtime.gpuMemory): step forced holds the whole teacher in vLLM beside its students on each "
        "of its GPUs (59.7 GiB of weights, 1.2 GiB of output matrix and answers). Either use a smaller "
        "teacher, or its release in MXFP4, or raise spec.teacher.gpus, so that each has fewer students, or "
        "use GPUs with more memory."
    )
    check_teacher(run, bucket, "80Gi")
    check_teacher(run, bucket, None)


def test_it_fits_as_a_teacher_that_scores(run_spec: dict[str, Any], bucket: Bucket) -> None:
    put(bucket)
    run = run_with(run_spec, RESCORED)
    check_teacher(run, bucket, "80G")
    with pytest.raises(Permanent, match=r"step rescore holds the whole teacher in vLLM on each of its GPUs"):
        check_teacher(run, bucket, "48Gi")
    assert bucket.exists(paths.teacher(run)), "the teacher of the run is decided now"


@pytest.mark.parametrize(
    "change, stage, message",
    [
        pytest.param(
            {"model_type": "llama"}, FORCED, "model_type is 'llama', expected gpt_oss", id="another"
        ),
        pytest.param({"hidden_size": None}, FORCED, "hidden_size is None", id="no size"),
        pytest.param({"vocab_size": 200_000}, FORCED, "vocab_size 200000", id="another vocabulary"),
        pytest.param(
            {"max_position_embeddings": 16},
            RESCORED,
            r"max_position_embeddings is 16, and dataset\.maxLength is \d+: .* Lower dataset\.maxLength",
            id="a short context",
        ),
        pytest.param(
            {"max_position_embeddings": 16},
            FORCED,
            r"max_position_embeddings is 16, and dataset\.maxLength is \d+: .* Lower dataset\.maxLength",
            id="a short context beside the students",
        ),
    ],
)
def test_what_the_config_alone_decides_needs_no_card(
    run_spec: dict[str, Any],
    bucket: Bucket,
    change: dict[str, Any],
    stage: dict[str, Any],
    message: str,
) -> None:
    put(bucket, **change)
    with pytest.raises(Permanent, match=message):
        check_teacher(run_with(run_spec, stage), bucket, None)


def test_a_run_without_a_teacher_looks_for_none(run_spec: dict[str, Any], bucket: Bucket) -> None:
    check_teacher(run_with(run_spec), bucket, "80Gi")
    assert not bucket.exists(paths.teacher(run_with(run_spec)))


def test_a_malformed_variable_is_named(run_spec: dict[str, Any], bucket: Bucket) -> None:
    with pytest.raises(Permanent, match="VPMOE_GPU_MEMORY='80' does not match"):
        check_teacher(run_with(run_spec, FORCED), bucket, "80")


def test_of_a_model_on_the_hub_only_the_config_is_downloaded(
    run_spec: dict[str, Any], tmp_path: Path
) -> None:
    """In a process of its own: the hub's client reads its address when it is imported."""
    files = {"config.json": json.dumps(GPT_OSS_120B).encode(), "model.safetensors": b"not read"}
    run_spec["spec"]["teacher"]["model"] = "hf://openai/gpt-oss-120b"
    run_with(run_spec, FORCED)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_spec))
    code = """
import sys
from vpmoe.api import load_run
from vpmoe.storage import Bucket
from vpmoe.teacher.early_check import check_teacher
run = load_run(sys.argv[1])
check_teacher(run, Bucket.open(run.spec.storage), "64Gi")
"""
    with fake_hub.serve("openai/gpt-oss-120b", files, kind="models") as (endpoint, requests):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run.yaml")],
            env={
                **os.environ,
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(tmp_path / "hub"),
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert "hf://openai/gpt-oss-120b needs GPUs of 72 GiB" in done.stderr, done.stderr
    assert not [path for path in requests if "model.safetensors" in path]


def test_preprocess_ends_with_65_before_it_reads_the_dataset(
    run_spec: dict[str, Any], bucket: Bucket, tmp_path: Path
) -> None:
    """As a pod, which has runtime.gpuMemory in a variable; there is no input either."""
    put(bucket)
    run = run_with(run_spec, FORCED)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.document()))
    done = subprocess.run(
        [sys.executable, "-m", "jobs.preprocess", "--run", str(tmp_path / "run.yaml")],
        env={**os.environ, "VPMOE_GPU_MEMORY": "64Gi"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 65, done.stderr
    assert "needs GPUs of 72 GiB, and a GPU has 64Gi (spec.runtime.gpuMemory)" in done.stderr
