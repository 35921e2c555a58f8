"""Difference in log-probability between the exported student and the trainer's, in the trainer's data type.

    python -m benchmarks.agreement [--shape tiny] [--sequences 8] [--length 512] [--spread 3.0]

The tolerances of vpmoe/inference/verify.py and the bound on samplerKl are chosen from this difference. The
benchmark builds the trainer's student with random weights, exports it as a policy version is exported, loads
the export with transformers, and computes log-probabilities of the same random ids with both. It prints mean,
99th percentile and largest |Δ|, and, on ids that the exported student sampled, the KL that `samplerKl` would
show (k3). Floor: the trainer's student against itself, with the sequences packed in another order.

It also prints the seconds to copy the weights (training waits for this), to export them (compared with
writing the same bytes to the same disk) and to load them. Runs on a GPU in bf16, or on the CPU in fp32 if
CUDA_VISIBLE_DEVICES is set and empty. `--spread` is the standard deviation of the logits. Trained models have
sharper distributions than random ones, and the difference grows with sharpness.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vpmoe.inference import hf_model
from vpmoe.model import device as devices
from vpmoe.model import distributed, hf_export
from vpmoe.model.batch import Batch
from vpmoe.model.head import target_logp
from vpmoe.model.shapes import SHAPES


def packed_batch(ids_NT: Tensor, order: Tensor) -> Batch:
    """A batch of one row that holds all sequences in the given order."""
    ids = ids_NT[order].reshape(1, -1).cpu()
    number = torch.repeat_interleave(torch.arange(len(ids_NT)), ids_NT.shape[1])[None]
    return Batch.from_rows(ids, torch.ones_like(ids, dtype=torch.uint8), number.int())


@torch.no_grad()
def trainer_logp(student: Any, ids_NT: Tensor, order: Tensor, device: torch.device) -> Tensor:
    """[N, T − 1] log-probability of each id after the first, computed by the trainer's student."""
    batch = packed_batch(ids_NT, order).to(device)
    logp_T = target_logp(student(batch), student.output, batch.target)
    found = torch.empty(ids_NT.shape[0], ids_NT.shape[1] - 1, device=device)
    found[order.to(device)] = logp_T.view(ids_NT.shape)[:, :-1].float()
    return found


@torch.no_grad()
def exported_logp(model: Any, ids_NT: Tensor) -> Tensor:
    """As trainer_logp, by the exported student, one sequence at a time."""
    return torch.stack(
        [
            model(ids_T[None]).logits[0, :-1].float().log_softmax(1).gather(1, ids_T[1:, None])[:, 0]
            for ids_T in ids_NT.unbind()
        ]
    )


@torch.no_grad()
def sampled_ids(model: Any, ids_NT: Tensor) -> Tensor:
    """[N, T − 1] ids sampled from the exported student's distribution, one for each position."""
    rows = [
        torch.multinomial(model(ids_T[None]).logits[0, :-1].float().softmax(1), 1)[:, 0]
        for ids_T in ids_NT.unbind()
    ]
    return torch.stack(rows)


@torch.no_grad()
def logp_of_sampled(logits_TV: Tensor, sampled_T: Tensor) -> Tensor:
    """[T] log-probability of each sampled id."""
    return logits_TV.float().log_softmax(1).gather(1, sampled_T[:, None])[:, 0]


def print_difference(name: str, one: Tensor, other: Tensor) -> None:
    """Print mean, 99th percentile and largest absolute difference of two tensors."""
    difference = (one - other).abs().flatten().double()
    print(
        f"{name}: |Δ| mean {difference.mean():.2e}, 99th percentile {difference.quantile(0.99):.2e}, largest "
        f"{difference.max():.2e} nats"
    )


def seconds_to_rewrite(folder: Path) -> float:
    """Seconds to write the files of the folder once more, from memory to the same disk."""
    seconds = 0.0
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        started = time.monotonic()
        (folder / "again").write_bytes(content)
        seconds += time.monotonic() - started
    (folder / "again").unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--sequences", type=int, default=8, help="number of sequences")
    parser.add_argument("--length", type=int, default=512, help="ids per sequence")
    parser.add_argument("--spread", type=float, default=3.0, help="standard deviation of the logits")
    given = parser.parse_args()
    shape, device = SHAPES[given.shape], devices.choose()
    distributed.start(device)
    from vpmoe.model import state
    from vpmoe.model.student import build

    student = build(shape, device, sequence_length=given.sequences * given.length, seed=1).eval()
    dtype = student.output.dtype
    with torch.no_grad():
        student.output.normal_(std=given.spread / math.sqrt(shape.hidden))
    ids_NT = torch.randint(
        shape.vocabulary, (given.sequences, given.length), generator=torch.Generator().manual_seed(1)
    ).to(device)
    print(f"{shape.name} on {device} in {dtype}: {given.sequences} × {given.length} ids")
    same_order, reversed_order = torch.arange(given.sequences), torch.arange(given.sequences).flip(0)
    expected = trainer_logp(student, ids_NT, same_order, device)
    held: Any = SimpleNamespace(student=student, device=device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory: dict[str, Tensor] = {}
        state.copy_weights(held, memory)  # warm-up: the first copy allocates the memory
        started = time.monotonic()
        copy = state.copy_weights(held, memory)
        copied = time.monotonic() - started
        hf_export.export_student(folder, shape, ids_NT.numel(), state.sizes(held), copy, dtype)
        exported = time.monotonic() - started - copied
        size = sum(file.stat().st_size for file in folder.iterdir())
        written = seconds_to_rewrite(folder)
        started = time.monotonic()
        model = hf_model.load_student(folder, shape).to(device)
        loaded = time.monotonic() - started
    exported_NT = exported_logp(model, ids_NT)
    print_difference("exported student against the trainer's", exported_NT, expected)
    print_difference(
        "floor, the trainer's student in another packing order",
        trainer_logp(student, ids_NT, reversed_order, device),
        expected,
    )
    sampled_NT = sampled_ids(model, ids_NT)
    ratios = []
    for ids_T, sampled_T in zip(ids_NT.unbind(), sampled_NT.unbind(), strict=True):
        with torch.no_grad():
            sampler_T = logp_of_sampled(model(ids_T[None]).logits[0, :-1], sampled_T)
            batch = packed_batch(ids_T[None], torch.zeros(1, dtype=torch.long)).to(device)
            hidden_TH = student(batch).flatten(0, -2)[:-1]
            trainer_T = logp_of_sampled(hidden_TH @ student.output.T, sampled_T)
        ratios.append((trainer_T - sampler_T).double())
    ratio = torch.cat(ratios)
    print(
        "KL(exported‖trainer) on ids that the exported student sampled, k3: "
        f"{(ratio.expm1() - ratio).mean():.2e} nats per token"
    )
    print(
        f"{size / 2**30:.2f} GiB: copied in {copied:.1f} s, exported in {exported:.1f} s "
        f"({exported / written:.2f}× writing the same bytes), loaded in {loaded:.1f} s"
    )
    distributed.stop()


if __name__ == "__main__":
    main()
