"""The kernels of inference on a GPU without one: in Triton's interpreter."""

import os
import subprocess
import sys


def test_kernels_equal_float64_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.fakes.inference_cases"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
