"""Where a process computes: the one decision between GPU and CPU, made by the environment and never by what
happens to be there."""

import os

import torch

from vpmoe.failure import Permanent


def choose(megatron: bool = True) -> torch.device:
    """cuda:LOCAL_RANK; or the CPU, only where CUDA_VISIBLE_DEVICES is set and empty (then megatron-core is
    prepared for it, where asked).

    Raises Permanent where there is no such GPU: a run must not end up a thousand times slower than asked
    without a word.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        if megatron:
            from vpmoe.model import cpu  # loads megatron-core, which those who do without need not wait for

            cpu.install()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise Permanent(
            f"process {local_rank} of this pod finds {torch.cuda.device_count()} CUDA devices. Give the pod "
            "one GPU a process "
            "(spec.student.gpus, gpusPerPod), install the driver, or set CUDA_VISIBLE_DEVICES to the empty "
            "string to compute on the CPU."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
