"""TensorBoard: a folder of event files for each step, DIR/<name>-<uid8>/<step>.

What it has is read from the event files at the start. A row is one event, so it is there or it is not; an
event that was cut off at the end of a file is none. TensorBoard keeps values as float32.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from vpmoe.failure import Permanent
from vpmoe.trackers.reader import Config, TrackedStep
from vpmoe.trackers.rows import Row

CONFIG = "config"
"""Name of the text with the step's configuration."""

Key = tuple[int, float, str]
"""x, seconds since 1970, and the first name of an event."""


class TensorBoard:
    """A log directory of TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, step: TrackedStep) -> "EventFiles":
        """The step's event files. Raises Permanent if the folder cannot be made."""
        return EventFiles(self.folder / step.run_name / step.name, step.config)


class EventFiles:
    """The event files of one step."""

    def __init__(self, folder: Path, config: Config) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Permanent(f"--dir {folder}: {error.strerror}. Name a folder that can be written.") from None
        self._has = set(_keys(folder))
        self._writer = EventFileWriter(str(folder))
        if not any(name == CONFIG for _, _, name in self._has):
            self._writer.add_event(Event(step=0, wall_time=0.0, summary=_text(config)))

    def write(self, rows: Sequence[Row], ended: bool) -> int:
        """As TrackerRun.write."""
        written = 0
        for row in rows:
            time, names = row.time.timestamp(), sorted(row.values)
            if (key := (row.x, time, names[0])) in self._has:
                continue
            values = [Summary.Value(tag=name, simple_value=row.values[name]) for name in names]
            self._writer.add_event(Event(step=row.x, wall_time=time, summary=Summary(value=values)))
            self._has.add(key)
            written += 1
        self._writer.flush()
        return written

    def close(self) -> None:
        """As TrackerRun.close."""
        self._writer.close()


def _keys(folder: Path) -> Iterable[Key]:
    for path in sorted(folder.glob("*tfevents*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.summary.value:
                yield event.step, event.wall_time, event.summary.value[0].tag


def _text(config: Config) -> Summary:
    """A table in Markdown, as TensorBoard's plugin for texts reads it."""
    table = "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in config.items())
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    tensor = TensorProto(dtype=DT_STRING, string_val=[table.encode()])
    return Summary(value=[Summary.Value(tag=CONFIG, metadata=metadata, tensor=tensor)])
