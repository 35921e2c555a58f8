"""`vpmoe count`: the numbers of the locked student, and what a part costs."""

import json

import pytest

from vpmoe.cli.main import main
from vpmoe.model.shapes import PARTS


def count(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, int]:
    assert main(["count", "--shape", "vpmoe-6b", "--output", "json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["parts"].values()) == found["total"]
    return {name: number for name, number in found.items() if isinstance(number, int)} | found["parts"]


def test_vpmoe_6b_has_the_parameters_of_the_locked_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    found = count(capsys)
    assert found["total"] == 6_029_894_927
    assert round(found["active"] / 1e6, 1) == 788.2
    assert round(found["active without embeddings and output"] / 1e6, 1) == 376.4


def test_the_table_has_a_line_per_part_and_the_three_sums(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "--shape", "vpmoe-6b"]) == 0
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["total"] == "6,029,894,927" and lines["softmax offsets"] == "640"
    assert [*lines][-3:] == ["total", "active", "active without embeddings and output"]


@pytest.mark.parametrize(
    "part, change",
    [
        pytest.param("softmax_offset", -640, id="a number per head and layer"),
        pytest.param("value_residual", -79, id="a number per layer after the first"),
        pytest.param("learned_frequencies", -64, id="one set"),
        pytest.param("alibi", 0, id="fixed slopes"),
        pytest.param("local_window", 0, id="no parameter"),
        pytest.param("tensor_product_ranks", 60 * 1024 * (1536 - 1064), id="local layers"),
    ],
)
def test_a_part_left_out_changes_the_total_by_its_own_parameters(
    capsys: pytest.CaptureFixture[str], part: str, change: int
) -> None:
    assert count(capsys, "--without", part)["total"] == 6_029_894_927 + change


def test_an_unknown_shape_or_part_is_rejected_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "--shape", "vpmoe-7b"]) == 65
    assert "--shape: vpmoe-7b is not a student. Use vpmoe-6b or tiny." in capsys.readouterr().err
    assert main(["count", "--shape", "tiny", "--without", "rope"]) == 65
    assert f"--without: rope is not a part. Use one of {', '.join(PARTS)}." in capsys.readouterr().err
