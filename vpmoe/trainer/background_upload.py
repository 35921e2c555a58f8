"""Uploads that go on while training does, one at a time: of checkpoints, and of policy versions."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class BackgroundUpload:
    """A thread that runs one upload at a time."""

    def __init__(self, name: str) -> None:
        """`name` is the thread's."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._upload: Future[None] | None = None

    def start[**P](self, upload: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Begin an upload, once the one before has ended. Raises the error of the one before."""
        self.wait()
        self._upload = self._thread.submit(upload, *args, **kwargs)

    def wait(self) -> None:
        """Return once the latest upload, if any, has ended. Raises its error, once."""
        if self._upload:
            upload, self._upload = self._upload, None
            upload.result()

    def join(self, seconds: float) -> None:
        """Return once the latest upload, if any, has ended, or after `seconds`. Raises nothing of it."""
        if self._upload:
            wait([self._upload], seconds)

    def check(self) -> None:
        """Raise the error of the latest upload if it has failed; does not wait."""
        if self._upload and self._upload.done():
            self.wait()

    @property
    def running(self) -> bool:
        """Whether an upload has not ended."""
        return self._upload is not None and not self._upload.done()

    @property
    def failed(self) -> bool:
        """Whether the latest upload has failed, and its error was not raised yet."""
        return self._upload is not None and self._upload.done() and self._upload.exception() is not None

    def close(self) -> None:
        """End the thread, after the upload that may still be running."""
        self._thread.shutdown()
