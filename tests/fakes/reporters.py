"""Progress uploaders without a store, for tests of a trainer's reports."""

from collections.abc import Callable
from typing import Any

from vpmoe.trainer.context import StageContext
from vpmoe.trainer.reporting.lines import TrainerLine
from vpmoe.trainer.reporting.uploader import ProgressUploader


class NullReporter(ProgressUploader):
    """Uploads nothing. Tests of the real uploader are in tests/unit/trainer/test_reporting.py."""

    def __init__(self) -> None:
        self.progress: dict[str, Any] = {}
        """The latest value of each field."""

    def update(self, **changes: Any) -> None:
        self.progress |= changes

    def flush_metrics(self) -> None:
        pass


class RecordingReporter(NullReporter):
    """Records the metrics lines as they would be uploaded, and calls `after` with each step."""

    def __init__(self, after: Callable[[int], None] = lambda step: None) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        self._after = after

    def log(self, *lines: TrainerLine) -> None:
        self.lines += [line.dump() for line in lines]
        self._after(lines[-1].step)

    def check(self) -> None:
        pass

    def finish(self, **changes: Any) -> None:
        self.update(**changes)


def stop_after(step: int, context: Callable[[], StageContext]) -> Callable[[int], None]:
    """For RecordingReporter: sets `stopping` of the context after a step."""
    return lambda done: context().stopping.set() if done == step else None
