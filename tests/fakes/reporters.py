"""Progress uploaders for tests that look at what a trainer reports, without a store to upload it to."""

from collections.abc import Callable
from typing import Any

from vpmoe.trainer.context import StageContext
from vpmoe.trainer.reporting.uploader import ProgressUploader


class NullReporter(ProgressUploader):
    """A report that writes nothing: what it says is test_training_report's business."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    def update(self, **changes: Any) -> None:
        self.said |= changes

    def flush_metrics(self) -> None:
        pass


class RecordingReporter(NullReporter):
    """A report that keeps the lines, and may do something after each step."""

    def __init__(self, after: Callable[[int], None] = lambda step: None) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        self._after = after

    def log(self, *lines: dict[str, Any]) -> None:
        self.lines += lines
        self._after(lines[-1]["step"])

    def check(self) -> None:
        pass

    def finish(self, **changes: Any) -> None:
        self.update(**changes)


def stop_after(step: int, task: Callable[[], StageContext]) -> Callable[[int], None]:
    return lambda done: task().stopping.set() if done == step else None
