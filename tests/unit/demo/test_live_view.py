"""The demonstration's live view of a run's status, with and without a terminal."""

import io
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from demo.live_view import LiveView, step_lines

NOW = datetime(2026, 1, 1, 12, 1, tzinfo=UTC)
STATUS: dict[str, Any] = {
    "step": "vanilla",
    "tokensPerSecond": 4321.0,
    "loss": 9.1234,
    "steps": [
        {
            "name": "preprocess",
            "state": "Succeeded",
            "partsDone": 2,
            "partsTotal": 2,
            "started": "2026-01-01T12:00:00Z",
            "finished": "2026-01-01T12:00:07Z",
            "message": "Finished",
        },
        {
            "name": "vanilla",
            "state": "Running",
            "tokensDone": 30_000,
            "tokensTotal": 60_000,
            "started": "2026-01-01T12:00:10Z",
            "message": "Training, step 7 of 15",
        },
        {"name": "onpolicy", "state": "Pending", "message": "Waits for vanilla"},
    ],
}


def test_a_training_step_shows_speed_and_loss() -> None:
    preprocess, vanilla, onpolicy = step_lines(STATUS, NOW)
    assert (preprocess.done, preprocess.seconds, preprocess.figures) == (1.0, 7.0, "")
    assert (vanilla.done, vanilla.seconds, vanilla.figures) == (0.5, 50.0, "4,321 tokens/s  loss 9.123")
    assert (onpolicy.done, onpolicy.seconds) == (0.0, None)


def test_without_a_terminal_a_row_is_printed_once_for_each_change() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=100)) as view:
        for done in (30_000, 31_000, 45_000, 46_000):
            STATUS["steps"][1]["tokensDone"] = done
            view.show(step_lines(STATUS, NOW))
    rows = out.getvalue().splitlines()
    assert [row.split()[:3] for row in rows] == [
        ["preprocess", "Succeeded", "100%"],
        ["vanilla", "Running", "50%"],
        ["vanilla", "Running", "75%"],
    ]


def test_on_a_terminal_every_step_has_one_line_that_is_updated_in_place() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=100, force_terminal=True, color_system=None)) as view:
        for _ in range(3):
            view.show(step_lines(STATUS, NOW))
    last = out.getvalue().rpartition("\x1b[2K")[2]
    assert "✓ preprocess" in out.getvalue() and "onpolicy" in last
