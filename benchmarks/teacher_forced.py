"""Tokens a second of a TeacherForced stage's teacher: hidden states by its engine, beside prefill alone.

    python -m benchmarks.teacher_forced [--shape gpt-oss-20b|gpt-oss-120b] [--card GIB] [--profile]
    python -m benchmarks.teacher_forced --gpus 3 --teachers 1 [--train 11300]

A teacher of the shape, in MXFP4 with vLLM's dummy weights, answers --students questions of --positions
positions at a time: packed documents of 200 to 2,200 random ids, as the trainer asks them. Rows, each the
median of --repeats:
  prefill    vLLM's forward of the same documents, of which nothing is kept
  hidden     the same, and the hidden states where the engine returns them
  answers    the same, and placed at each question's positions, in the type that they travel in
The last lines say how busy such a teacher keeps as many students of --train tokens/s each: what `vpmoe plan
--hidden-tokens-per-second` computes with. Memory is what is used of the GPU, vLLM's cache included; with
--card, vLLM gets the share of a card of that size, which shows whether the teacher fits on it.

With --gpus, processes as the launcher starts them, each on its own GPU: --gpus students that take as long
for a microbatch as --train tokens/s do, and --teachers. They talk over the stage's own channel. Each student
prints its tokens a second and the share of the time in which it did not wait, as the stage's metrics have it;
beside them stands what the plan's arithmetic says for the speed of the teacher that is measured first.

Needs a GPU, and vLLM for CUDA; with CUDA_VISIBLE_DEVICES empty and --layers, a tiny teacher that is not
quantised runs on the CPU.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.scorer import SHAPES, shape_config
from vpmoe.api.card import GIB
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.inference.vllm_options import prepare_environment
from vpmoe.process import launcher
from vpmoe.process.environment import teacher_ports

if TYPE_CHECKING:
    from vpmoe.model.batch import Batch

SHORTEST, LONGEST = 200, 2200
"""Lengths of documents."""


def config_of(shape: str, layers: int | None) -> dict[str, Any]:
    """The config.json of a release, or of a small model of `layers` layers that is not quantised."""
    config = shape_config(shape, layers) | {"dtype": "bfloat16"}
    if layers is not None:
        del config["quantization_config"]
        config |= {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4}
        config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return config


def documents_of(positions: int, random: np.random.Generator) -> list[Ids]:
    """Documents of a question, which fill its positions."""
    found: list[Ids] = []
    while positions > 0:
        length = min(positions, int(random.integers(SHORTEST, LONGEST)))
        found.append(random.integers(0, VOCABULARY_SIZE, length, np.int32))
        positions -= length
    return found


def engine_of(shape: str, layers: int | None, card: float | None) -> Any:
    """The teacher's engine with dummy weights; `card`: GiB of the card that it may think it is on."""
    prepare_environment()
    import torch

    from vpmoe.inference.teacher_hidden import HiddenStateEngine
    from vpmoe.plan.scoring import teacher_share

    class Dummy(HiddenStateEngine):
        """Without the checks of a checkpoint, of which dummy weights have none."""

        def __init__(self, directory: Path, **options: Any) -> None:
            self._load(directory, LONGEST, load_format="dummy", **options)

    options = {}
    if card is not None:
        memory = torch.cuda.get_device_properties(0).total_memory
        options = {"gpu_memory_utilization": teacher_share(int(card * GIB)) / memory}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(shape, layers)))
        return Dummy(Path(folder), **options)


def batch_of(positions: int, random: np.random.Generator) -> "Batch":
    """A microbatch of one packed row."""
    import torch

    from vpmoe.model.batch import Batch

    documents = documents_of(positions, random)
    numbers = np.repeat(np.arange(len(documents), dtype=np.int32), [len(ids) for ids in documents])
    tokens = torch.from_numpy(np.concatenate(documents)).long()[None]
    return Batch.from_rows(
        tokens, torch.ones_like(tokens, dtype=torch.uint8), torch.from_numpy(numbers)[None]
    )


def teach(given: argparse.Namespace) -> None:
    """Be a teacher of --gpus, as vpmoe/trainer/teacher_forced/server.py is."""
    prepare_environment()
    from vpmoe.inference.teacher_hidden import teacher_device
    from vpmoe.trainer.teacher_forced.channel import host
    from vpmoe.trainer.teacher_forced.protocol import ranks_of
    from vpmoe.trainer.teacher_forced.server import answer_questions

    number, ports = int(os.environ["VPMOE_TEACHER"]), teacher_ports()
    ranks = ranks_of(number, len(ports), int(os.environ["WORLD_SIZE"]))
    channel = host(os.environ["MASTER_ADDR"], ports[number], ranks, teacher_device(), lambda: None)
    engine = engine_of(given.shape, given.layers, given.card)
    random = np.random.default_rng(number)
    together = [ids for _ in ranks for ids in documents_of(given.positions, random)]
    speed = len(ranks) * given.positions / seconds_of(lambda: engine.hidden_states(together), 3)
    busy = min(1.0, speed / (len(ranks) * given.train))
    print(
        f"teacher {number} of ranks {list(ranks)}: {speed:,.0f} tokens/s alone; by the plan's arithmetic its "
        f"students are busy for {100 * busy:.0f} % of the time",
        flush=True,
    )
    channel.set_number("width", engine.width)
    answer_questions(channel, engine.hidden_states)


def learn(given: argparse.Namespace) -> None:
    """Be a student of --gpus: as long for a microbatch as --train says, and nothing else."""
    import torch

    from vpmoe.model.device import choose
    from vpmoe.trainer.teacher_forced.channel import join
    from vpmoe.trainer.teacher_forced.client import RemoteTeacher
    from vpmoe.trainer.teacher_forced.protocol import ranks_of

    device, rank, ports = choose(megatron=False), int(os.environ["RANK"]), teacher_ports()
    teacher = rank % len(ports)
    ranks = ranks_of(teacher, len(ports), int(os.environ["WORLD_SIZE"]))
    channel = join(os.environ["MASTER_ADDR"], ports[teacher], rank, ranks, device, lambda: None)
    remote, random = RemoteTeacher(channel, lambda: None), np.random.default_rng(rank)
    seconds, batches = given.positions / given.train, [batch_of(given.positions, random) for _ in range(4)]
    cycles = seconds * cycles_a_second() if device.type == "cuda" else 0
    waited = took = 0.0
    for step in range(given.repeats + 1):
        remote.meter.reset()
        began = time.monotonic()
        remote.announce(batches, batches[0] if step < given.repeats else None)
        for batch in batches:
            hidden_TG = remote.hidden_of(batch)
            assert hidden_TG.shape == (given.positions, remote.width)
            if cycles:
                torch.cuda._sleep(int(cycles))
            else:
                time.sleep(seconds)
        wait = remote.meter.seconds()
        if step:  # the first one waits for the channel's first messages, too
            waited, took = waited + wait, took + time.monotonic() - began
    remote.disconnect()
    tokens = given.repeats * len(batches) * given.positions
    print(
        f"HIDDEN rank {rank}: {tokens / took:,.0f} tokens/s of {given.train:,.0f}, busy for "
        f"{100 * (1 - waited / took):.0f} % of the time",
        flush=True,
    )


def cycles_a_second() -> float:
    """Of the clock by which torch.cuda._sleep counts."""
    import torch

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(10**8)
    began.record()
    torch.cuda._sleep(10**9)
    ended.record()
    ended.synchronize()
    return 1e12 / float(began.elapsed_time(ended))


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds of a call and of what it gives the GPU, after one that is not counted."""
    import torch

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="gpt-oss-20b")
    parser.add_argument("--students", type=int, default=7, help="questions that are answered together")
    parser.add_argument("--positions", type=int, default=8192, help="positions of a question")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--card", type=float, metavar="GIB", help="memory of the card, if not this one's")
    parser.add_argument("--gpus", type=int, help="start as many students and the teachers, each on a GPU")
    parser.add_argument("--teachers", type=int, default=1, help="with --gpus: teachers")
    parser.add_argument(
        "--train", type=float, default=5950, help="tokens a second of a student that never waits"
    )
    parser.add_argument("--layers", type=int, help="a tiny teacher with this many layers, for a trial")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one row `hidden`")
    given = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        launcher.set_parent_death_signal()
        (teach if os.environ.get("VPMOE_PART") == "teacher" else learn)(given)
        return
    if given.gpus:
        port, *ports = launcher.free_ports(1 + given.teachers)
        placement = launcher.Placement(given.gpus, 0, given.gpus, "127.0.0.1", port, tuple(ports))
        command = [sys.executable, "-m", "benchmarks.teacher_forced", *sys.argv[1:]]
        raise SystemExit(launcher.launch_workers(placement, command, command, threading.Event()))
    measure(given)


def measure(given: argparse.Namespace) -> None:
    """Print the rows of one engine."""
    began = time.perf_counter()
    engine = engine_of(given.shape, given.layers, given.card)
    import torch

    from vpmoe.trainer.teacher_forced.protocol import WIRE, DocumentRange, Question
    from vpmoe.trainer.teacher_forced.server import place

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name(0) if cuda else "cpu"
    print(f"{given.shape} on {name}, loaded in {time.perf_counter() - began:.0f} s", flush=True)
    random = np.random.default_rng(0)
    documents = [documents_of(given.positions, random) for _ in range(given.students)]
    questions = []
    for of_question in documents:
        starts = np.cumsum([0, *map(len, of_question[:-1])]).tolist()
        ranges = [DocumentRange(start, len(ids)) for start, ids in zip(starts, of_question, strict=True)]
        questions.append(Question(torch.from_numpy(np.concatenate(of_question)), ranges))
    together = [ids for of_question in documents for ids in of_question]

    def answers() -> None:
        for answer_TG in place(questions, engine.hidden_states(together)):
            answer_TG.to(WIRE[engine.device.type])

    tokens = given.students * given.positions
    rows: dict[str, Callable[[], object]] = {
        "prefill": lambda: engine._forward(together),
        "hidden": lambda: engine.hidden_states(together),
        "answers": answers,
    }
    speed = {}
    for row, call in rows.items():
        speed[row] = tokens / seconds_of(call, given.repeats)
        print(
            f"HIDDEN {row:8} {speed[row]:9,.0f} tokens/s  {speed[row] / speed['prefill']:.3f} of prefill",
            flush=True,
        )
    demand = given.students * given.train
    print(
        f"one teacher keeps {given.students} students of {given.train:,.0f} tokens/s busy for "
        f"{100 * min(1.0, speed['answers'] / demand):.0f} % of the time"
    )
    if cuda:
        free, whole = torch.cuda.mem_get_info()
        print(
            f"GPU memory: {(whole - free) / GIB:.1f} GiB in use; PyTorch's peak "
            f"{torch.cuda.max_memory_allocated() / GIB:.1f}"
        )
    if given.profile:
        with torch.profiler.profile() as profiled:
            engine.hidden_states(together)
        print(profiled.key_averages().table(sort_by="cuda_time_total", row_limit=25))


if __name__ == "__main__":
    main()
