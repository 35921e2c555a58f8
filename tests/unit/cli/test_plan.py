"""`vpmoe plan`: what it prints and refuses, what it needs, and that the guide shows what it prints."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import valid_specs
from tests.fakes.teacher_configs import GPT_OSS_20B
from vpmoe.api.text import write_yaml
from vpmoe.cli import plan as command
from vpmoe.cli.main import main
from vpmoe.plan.teacher import KNOWN
from vpmoe.plan.throughput import CARDS

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "docs" / "guides" / "size-a-run.md"
FULL = "manifests/examples/full.yaml"


def write(folder: Path, **changes: Any) -> str:
    path = folder / "run.yaml"
    path.write_text(write_yaml(valid_specs.manifest(changes)))
    return str(path)


def test_the_guide_shows_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (shown,) = re.findall(r"```console\n\$ vpmoe plan (.*?)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert main(["plan", *shlex.split(shown[0])]) == 0
    assert capsys.readouterr().out == shown[1]
    assert FULL in shown[0]
    (hours,) = re.findall(r"^full: (\S+) hours", shown[1])
    assert f": {hours} hours by the plan, which" in (ROOT / "README.md").read_text()


def test_as_json_it_has_numbers_and_null_for_what_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", write(tmp_path), "--output", "json", "--dataset-tokens", "2B"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == "minimal" and found["card"] == "h100-80" and found["gpus"] == 8
    preprocess, first, evaluate = found["steps"]
    assert preprocess["tokens"] == 2 * 10**9 and evaluate["step"] == "first-evaluate"
    assert preprocess["hours"] == pytest.approx(found["preprocessCpuHours"] / 8), "eight workers of one core"
    # 86,800 tokens/s were measured with microbatches of 32,768 positions and no layer recomputed. Here a rank
    # has 17 sequences a step in nine microbatches of at most 16,384, with 2 of 80 layers recomputed.
    longer = (1 + 2 / 3 / 80 + 9 * 4096 / (17 * 8192)) / (1 + 4096 / 32_768)
    assert first["gpus"] == {"train": 7} and first["tokensPerSecond"] == pytest.approx(7 * 86_800 / longer)
    assert any(source.startswith("first: trains 76,706 tokens/s a GPU") for source in found["sources"])
    assert found["bucket"]["dataset"] == 10**10 and found["bucket"]["exported model"] == 12_059_789_854
    assert found["memory"][0]["fits"] is True and found["memory"][0]["items"]["weights"] == 12_059_789_854
    assert found["checkpoints"][0]["size"] == 72_358_739_124
    assert found["problems"] == [] and found["teacher"] is None, "no stage uses it"


def test_speeds_and_lengths_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, **{"spec.stages": [valid_specs.ONPOLICY]})
    options = (
        "--preprocess-tokens-per-second 1e6 --train-tokens-per-second 1e4 --sample-tokens-per-second 5000 "
        "--score-tokens-per-second 9e9 --dataset-tokens 36B"
    )
    lengths = "--prompt 100 --completion low=300,medium=700,high=1500"
    assert main(["plan", file, *options.split(), *lengths.split()]) == 0
    out = capsys.readouterr().out
    assert ", after 1.2 hours of preprocessing (10.0 CPU hours); teacher" in out
    assert "preprocess: 1,000,000 tokens/s a CPU core, given" in out
    assert "train: 10,000 tokens/s a GPU, given" in out and "sample: 5,000 tokens/s a GPU, given" in out
    assert (
        "onpolicy: prompts of 100 tokens, completions of low 300, medium 700, high 1,500 on average, one in "
        "100 as long as it may be, assumed" in out
    )


@pytest.mark.parametrize(
    "arguments, memory",
    [
        pytest.param([], 80 * 10**9, id="runtime.gpuMemory"),
        pytest.param(["--gpu", "h200-141"], CARDS["h200-141"].memory, id="--gpu comes first"),
    ],
)
def test_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], memory: int
) -> None:
    file = write(tmp_path, **{"spec.runtime.gpuMemory": "80G"})
    assert main(["plan", file, "--output", "json", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["cardMemory"] == memory


def test_a_run_that_cannot_fit_is_refused_with_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, **{"spec.student.gpus": 1, "spec.stages": [valid_specs.FORCED]})
    assert main(["plan", file, "--gpu", "h100-80"]) == 65
    out, err = capsys.readouterr()
    assert "79.0, needs 115" in out, "the table shows what does not fit"
    (trainer,) = err.splitlines()
    assert trainer.startswith(f"{file}: spec.student: the trainer of forced needs 115 GiB on each")


def test_a_run_that_the_api_server_rejects_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, **{"spec.runtime.gpuMemory": "80Gi", "spec.student.gpus": 1})
    assert main(["plan", file]) == 65
    assert "spec.runtime.gpuMemory: stage first: training vpmoe-6b on 1 GPUs takes at least 114 GiB of" in (
        capsys.readouterr().err
    )


def test_the_teacher_s_size_is_of_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(GPT_OSS_20B))
    file = write(tmp_path, **{"spec.stages": [valid_specs.RESCORED], "spec.teacher.model": "s3://a/own"})
    assert main(["plan", file, "--output", "json", "--teacher-config", str(config)]) == 0
    found = json.loads(capsys.readouterr().out)
    (teacher,) = (role for role in found["memory"] if role["role"] == "teacher")
    assert found["teacher"] == "own" and teacher["items"]["weights"] == KNOWN["gpt-oss-20b"].stored
    assert found["hours"] is None, "its speed was not measured"


@pytest.mark.parametrize("content", ["[]", "{", '{"hidden_size": 1}'])
def test_a_malformed_config_is_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(content)
    file = write(tmp_path, **{"spec.stages": [valid_specs.RESCORED]})
    assert main(["plan", file, "--teacher-config", str(tmp_path / "config.json")]) == 65
    assert f"{tmp_path}/config.json" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "none.yaml")]) == 65
    assert "none.yaml" in capsys.readouterr().err


def test_a_prompt_without_room_for_an_answer_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only if a stage samples: others have no prompts, and sequences may be shorter than the default."""
    sampling = write(tmp_path, **{"spec.stages": [valid_specs.ONPOLICY], "spec.training.sequenceLength": 128})
    assert main(["plan", sampling]) == 65
    assert "--prompt 128 leaves no room" in capsys.readouterr().err
    assert main(["plan", write(tmp_path, **{"spec.training.sequenceLength": 128})]) == 0
    assert "(h100-80), without preprocessing\n" in capsys.readouterr().out, "no teacher in the head line"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu", "a100"],
        ["--completion", "loud=3"],
        ["--dataset-tokens", "many"],
        ["--train-tokens-per-second", "0"],
        ["--sample-tokens-per-second", "1e-300"],
        ["--teacher", "gpt-oss-20b", "--teacher-config", "x"],
    ],
)
def test_a_wrong_command_line_ends_with_64(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", FULL, *arguments])
    assert ended.value.code == 64


def test_the_choices_of_the_command_are_those_of_the_plan() -> None:
    """They are written twice, so that `vpmoe --help` imports no plan."""
    assert set(command.CARDS) == set(CARDS)


def test_it_needs_pydantic_and_yaml_only() -> None:
    code = (
        "import sys; from vpmoe.cli.main import main; code = main(['plan', sys.argv[1]]); "
        "heavy = {'torch', 'numpy', 'boto3', 'botocore', 'pyarrow', 'vpmoe.storage'} & set(sys.modules); "
        "sys.exit(f'imports {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, FULL], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
