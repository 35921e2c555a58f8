"""A pod rejects reserved variables that a Secret or ConfigMap of runtime.envFrom sets."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.valid_specs import manifest
from vpmoe.failure import Permanent, read_record
from vpmoe.process.environment import DECLARED, check_env_from
from vpmoe.provenance import CHECKOUT

OWN = "VPMOE_IMAGE HOME TMPDIR AWS_ACCESS_KEY_ID"


@pytest.mark.parametrize(
    "declared, variables",
    [
        pytest.param(
            OWN, {"VPMOE_IMAGE": "a", "HOME": "/tmp", "AWS_ACCESS_KEY_ID": "x"}, id="the operator's"
        ),
        pytest.param(f"{OWN} PET_* RANK", {"PET_NNODES": "2", "RANK": "0"}, id="of a PyTorchJob"),
        pytest.param(f"{OWN} JOB_COMPLETION_INDEX", {"JOB_COMPLETION_INDEX": "1"}, id="of an Indexed Job"),
        pytest.param(
            OWN,
            {"AWS_ROLE_ARN": "a", "AWS_WEB_IDENTITY_TOKEN_FILE": "b", "AWS_REGION": "c"},
            id="of a service account's identity",
        ),
        pytest.param(OWN, {"HF_TOKEN": "a", "NCCL_DEBUG": "b", "RANKS": "c"}, id="not reserved"),
    ],
)
def test_variables_that_belong_to_the_pod_are_accepted(declared: str, variables: dict[str, str]) -> None:
    environment = {DECLARED: declared, **variables}
    check_env_from(environment)
    assert environment == variables, "processes that it starts do not check again"


@pytest.mark.parametrize(
    "name",
    [
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL",
        "LOCAL_RANK",
        "RANK",
        "PET_NNODES",
        "VPMOE_PART",
        "JOB_COMPLETION_INDEX",
    ],
)
def test_a_reserved_variable_of_a_secret_is_permanent_and_its_value_is_not_shown(name: str) -> None:
    with pytest.raises(Permanent, match=f"runtime.envFrom sets {name}: reserved.*a prefix") as caught:
        check_env_from({DECLARED: OWN, "HOME": "/tmp", name: "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_outside_of_a_pod_with_env_from_nothing_is_checked() -> None:
    check_env_from({"AWS_PROFILE": "mine", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    "job, variable", [("train", "LOCAL_RANK"), ("preprocess", "AWS_PROFILE"), ("clear", "AWS_ENDPOINT_URL")]
)
def test_a_job_ends_with_the_variable_in_its_record(job: str, variable: str, tmp_path: Path) -> None:
    body: dict[str, Any] = manifest({})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(body))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "VPMOE_"))},
        "VPMOE_TERMINATION_LOG": str(tmp_path / "log"),
        DECLARED: "VPMOE_TERMINATION_LOG HOME TMPDIR",
        variable: "0",
    }
    code = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", "--run", str(tmp_path / "run.yaml")],
        cwd=CHECKOUT,
        env=environment,
        check=False,
    ).returncode
    record = read_record(tmp_path / "log")
    assert (
        code == 65 and record is not None and f"runtime.envFrom sets {variable}: reserved" in record.message
    )
