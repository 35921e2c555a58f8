"""A real terminal without a screen: a pane of tmux, with what it shows and keys to press."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from devcluster import needs
from tests.fakes.waiting import wait_until

PROGRAM = "tmux"


def program() -> str:
    """tmux. Installs Debian's package if there is none and this is root.

    Raises ClusterError, which names the package, if it cannot.
    """
    needs.packages({PROGRAM: PROGRAM})
    return shutil.which(PROGRAM) or PROGRAM


@dataclass
class Terminal:
    """One pane, in which a shell without prompt reads commands."""

    socket: Path

    def call(self, *arguments: str) -> str:
        """Runs a command of tmux; returns its stdout."""
        command = [program(), "-S", str(self.socket), "-f", "/dev/null", *arguments]
        size = ("COLUMNS", "LINES")  # rich prefers them to the terminal's own size
        environment = {name: value for name, value in os.environ.items() if name not in size}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    def start(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Run a command in the pane. After its end the pane shows its exit code."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        self.call(
            "send-keys", "-l", f"clear; env {' '.join(variables)} {shlex.join(command)}; echo ended with $?"
        )
        self.press("Enter")

    def press(self, key: str) -> None:
        """Press a key, such as C-c."""
        self.call("send-keys", key)

    def screen(self) -> list[str]:
        """The lines that are visible, without trailing spaces."""
        return [line.rstrip() for line in self.call("capture-pane", "-p").splitlines()]

    def shows(self, text: str) -> bool:
        """Whether a visible line has the text."""
        return any(text in line for line in self.screen())

    def wait_for(self, text: str) -> list[str]:
        """The visible lines as soon as one has the text."""
        wait_until(
            lambda: self.shows(text), f"the terminal shows {text!r}: {self.screen()}", seconds=60, every=0.1
        )
        return self.screen()

    def cursor_is_visible(self) -> bool:
        """Whether the cursor is shown."""
        return self.call("display-message", "-p", "#{cursor_flag}").strip() == "1"


@contextmanager
def terminal(socket: Path, columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
    """A pane of a tmux server of its own."""
    it = Terminal(socket)
    it.call("new-session", "-d", "-x", str(columns), "-y", str(rows), "sh")
    it.call("send-keys", "-l", "PS1=")
    it.press("Enter")
    try:
        yield it
    finally:
        it.call("kill-server")
