"""The device of a process: GPU or CPU. The environment selects it, not the hardware that is available."""

import os

import torch

from vpmoe.failure import Permanent


def choose(megatron: bool = True) -> torch.device:
    """cuda:LOCAL_RANK, or the CPU if CUDA_VISIBLE_DEVICES is set and empty.

    On the CPU megatron-core is patched (cpu.py) unless `megatron` is False. Raises Permanent if the GPU does
    not exist: falling back to the CPU would silently make a run a thousand times slower.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        if megatron:
            from vpmoe.model import cpu  # imports megatron-core, which takes seconds

            cpu.install()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise Permanent(
            f"process {local_rank} of this pod finds {torch.cuda.device_count()} CUDA devices. Give the pod "
            "one GPU per process (spec.student.gpus, gpusPerPod), install the driver, or set "
            "CUDA_VISIBLE_DEVICES to the empty string (in a pod: runtime.env) to compute on the CPU."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
