"""The device of a process. The environment decides between GPU and CPU, never what happens to be
available."""

import os

import torch

from vpmoe.failure import Permanent


def choose(megatron: bool = True) -> torch.device:
    """cuda:LOCAL_RANK, or the CPU if CUDA_VISIBLE_DEVICES is set and empty.

    On the CPU megatron-core is patched unless `megatron` is False. Raises Permanent if the GPU does not
    exist: a run must not silently become a thousand times slower.
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
            "one GPU a process (spec.student.gpus, gpusPerPod), install the driver, or set "
            "CUDA_VISIBLE_DEVICES to the empty string to compute on the CPU."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
