"""benchmarks.pipeline: what it refuses."""

import pytest

from benchmarks import pipeline


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param(
            ["--spread", "0"], "argument --spread: '0' is no number from 1e-12 to 1e+15", id="spread"
        ),
        pytest.param(
            ["--runaway", "1"], "argument --runaway: '1' is no number from 0 to below 1", id="share"
        ),
        pytest.param(
            ["--copy", "nan"], "argument --copy: 'nan' is no number from 1e-12 to 1e+15", id="seconds"
        ),
        pytest.param(["--gigabytes-per-second", "0"], "'0' is no number from 1e-12 to 1e+15", id="bucket"),
        pytest.param(["--prompts", "0"], "argument --prompts: must be at least 1", id="prompts"),
        pytest.param(["--prompt", "8192"], "leaves no room for an answer", id="prompt"),
        pytest.param(["--weights", "bucket", "--volume", "5"], "needs --weights volume", id="volume"),
        pytest.param(["--run", "manifests/examples/forced.yaml"], "has 0 OnPolicy stages", id="run"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        pipeline.main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
