"""How far the student outside of the trainer computes from the trainer, in the trainer's own type: what the
bounds of a rollout rest on.

    python benchmarks/agreement.py [--shape tiny] [--sequences 8] [--length 512] [--spread 3.0]

Builds the trainer's student with random weights, exports it as a policy version is exported, loads that with
transformers, and asks both for the log-probability of the same random ids. Prints mean, 99th percentile and
largest |Δ|, and the KL that `samplerKl` would show (k3) on ids that the exported one drew itself; beside them
the floor: what the trainer's student differs from itself when the same sequences are packed in another order.
Then the seconds of the copy, for which training waits, of the export, beside writing the same bytes to the
same disk, and of loading it. On a GPU in bf16 unless CUDA_VISIBLE_DEVICES is set and empty, then in fp32.
`--spread` is the standard deviation of the logits: trained models are sharper than random ones, and a sharper
one differs more.
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


def packed(ids_NT: Tensor, order: Tensor) -> Batch:
    """One row of all sequences, in this order."""
    ids = ids_NT[order].reshape(1, -1).cpu()
    number = torch.repeat_interleave(torch.arange(len(ids_NT)), ids_NT.shape[1])[None]
    return Batch.from_rows(ids, torch.ones_like(ids, dtype=torch.uint8), number.int())


@torch.no_grad()
def trainers(student: Any, ids_NT: Tensor, order: Tensor, device: torch.device) -> Tensor:
    """[N, T − 1] of each id but the first, as the trainer finds it."""
    batch = packed(ids_NT, order).to(device)
    logp_T = target_logp(student(batch), student.output, batch.target)
    found = torch.empty(ids_NT.shape[0], ids_NT.shape[1] - 1, device=device)
    found[order.to(device)] = logp_T.view(ids_NT.shape)[:, :-1].float()
    return found


@torch.no_grad()
def others(model: Any, ids_NT: Tensor) -> Tensor:
    """[N, T − 1] the same, one sequence at a time."""
    return torch.stack(
        [
            model(ids_T[None]).logits[0, :-1].float().log_softmax(1).gather(1, ids_T[1:, None])[:, 0]
            for ids_T in ids_NT.unbind()
        ]
    )


@torch.no_grad()
def drawn(model: Any, ids_NT: Tensor) -> Tensor:
    """[N, T − 1] at each position an id that the exported student draws there: what a sampler would have
    sampled after that much."""
    rows = [
        torch.multinomial(model(ids_T[None]).logits[0, :-1].float().softmax(1), 1)[:, 0]
        for ids_T in ids_NT.unbind()
    ]
    return torch.stack(rows)


@torch.no_grad()
def of_drawn(logits_TV: Tensor, drawn_T: Tensor) -> Tensor:
    return logits_TV.float().log_softmax(1).gather(1, drawn_T[:, None])[:, 0]


def say(name: str, one: Tensor, other: Tensor) -> None:
    off = (one - other).abs().flatten().double()
    print(
        f"{name}: |Δ| mean {off.mean():.2e}, 99th percentile {off.quantile(0.99):.2e}, largest "
        f"{off.max():.2e} nats"
    )


def written_again(folder: Path) -> float:
    """Seconds that it takes to write the same files from memory to the same disk."""
    seconds = 0.0
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        started = time.monotonic()
        (folder / "again").write_bytes(content)
        seconds += time.monotonic() - started
    (folder / "again").unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="ids of each")
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
    as_it_is, reversed_order = torch.arange(given.sequences), torch.arange(given.sequences).flip(0)
    wanted = trainers(student, ids_NT, as_it_is, device)
    held: Any = SimpleNamespace(student=student, device=device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory: dict[str, Tensor] = {}
        state.copy_weights(held, memory)  # the first time its memory is made
        started = time.monotonic()
        read = state.copy_weights(held, memory)
        copied = time.monotonic() - started
        hf_export.export_student(folder, shape, ids_NT.numel(), state.sizes(held), read, dtype)
        exported = time.monotonic() - started - copied
        size = sum(file.stat().st_size for file in folder.iterdir())
        written = written_again(folder)
        started = time.monotonic()
        model = hf_model.load_student(folder, shape).to(device)
        loaded = time.monotonic() - started
    got = others(model, ids_NT)
    say("exported and loaded, against the trainer", got, wanted)
    say(
        "the trainer in another order, against itself",
        trainers(student, ids_NT, reversed_order, device),
        wanted,
    )
    drawn_NT = drawn(model, ids_NT)
    ratios = []
    for ids_T, drawn_T in zip(ids_NT.unbind(), drawn_NT.unbind(), strict=True):
        with torch.no_grad():
            sampler_T = of_drawn(model(ids_T[None]).logits[0, :-1], drawn_T)
            batch = packed(ids_T[None], torch.zeros(1, dtype=torch.long)).to(device)
            hidden_TH = student(batch).flatten(0, -2)[:-1]
            trainer_T = of_drawn(hidden_TH @ student.output.T, drawn_T)
        ratios.append((trainer_T - sampler_T).double())
    ratio = torch.cat(ratios)
    print(
        f"KL(exported‖trainer) of ids that the exported one draws, k3: {(ratio.expm1() - ratio).mean():.2e} "
        "nats a token"
    )
    print(
        f"{size / 2**30:.2f} GiB: copied in {copied:.1f} s, exported in {exported:.1f} s "
        f"({exported / written:.2f}× the writing of these "
        f"bytes), loaded in {loaded:.1f} s"
    )
    distributed.stop()


if __name__ == "__main__":
    main()
