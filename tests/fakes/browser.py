"""A headless Chromium with one page, driven through its DevTools protocol over a pipe.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devcluster import needs

PROGRAMS = ("chromium", "google-chrome")
WIDE, PHONE = 1280, 390
"""Widths of a desktop's and of a phone's page, in CSS pixels."""


def program() -> str:
    """The browser's program. Installs Debian's package if there is none and this is root.

    Raises ClusterError, which names the package, if it cannot.
    """
    if not any(map(shutil.which, PROGRAMS)):
        needs.packages({"chromium": "chromium"})
    return next(found for found in map(shutil.which, PROGRAMS) if found)


class Browser:
    """One page of a browser."""

    def __init__(self, commands: int, answers: int) -> None:
        """Given the file descriptors of the pipe."""
        self._commands, self._answers = os.fdopen(commands, "wb", 0), os.fdopen(answers, "rb")
        self._number, self._rest, self._session = 0, b"", ""
        self._events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, file: Path, *, width: int, dark: bool) -> None:
        """Open a file at a width, in the light or dark style, and wait until it is loaded."""
        self._events.clear()
        self.set_dark(dark)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width <= PHONE}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url=file.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()
        self._wait_for_frames()

    def set_dark(self, dark: bool) -> None:
        """Have the system prefer the dark style, or the light one."""
        media = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[media])
        self._wait_for_frames()

    def _wait_for_frames(self) -> None:
        """Two frames later, everything that an event started is drawn."""
        frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
        self.evaluate(frame)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, or what its promise becomes."""
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def console(self) -> list[str]:
        """What the page has written to the console, and its uncaught errors."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """The addresses that the page has asked for."""
        sent = [event for event in self._events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, file: Path) -> Path:
        """Write a PNG of the whole page."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))
        return file

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._answers.read1(1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        if "method" in found:
            self._events.append(found)
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A running browser, whose profile is in `folder`."""
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    # The protocol's descriptors are 3 and 4 in the browser, whatever they are here.
    script = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    options += [f"--user-data-dir={folder}", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        ["bash", "-c", script, "browser", program(), *options],
        pass_fds=(read_commands, write_answers),
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Browser(commands, answers)
    finally:
        process.kill()
        process.wait()
