"""Tokens a second of a TeacherForced stage's teacher: hidden states by its engine, beside prefill alone.

    python -m benchmarks.teacher_forced [--shape gpt-oss-20b|gpt-oss-120b] [--card GIB] [--profile]

A teacher of the shape, in MXFP4 with vLLM's dummy weights, answers --students questions of --positions
positions at a time: packed documents of 200 to 2,200 random ids, as the
trainer asks them. Rows, each the median of --repeats:
  prefill    vLLM's forward of the same documents, of which nothing is kept
  hidden     the same, and the hidden states where the engine returns them
  answers    the same, and placed at each question's positions, in the type that they travel in
"busy" is the share of students' time in which one such teacher keeps --ranks students of --train tokens/s
each busy: what `vpmoe plan --hidden-tokens-per-second` computes with. Memory is what the process has
allocated, vLLM's cache included; with --card, vLLM gets the share of a card of that size, which shows whether
the teacher fits on it. Needs a GPU, and vLLM for CUDA; with CUDA_VISIBLE_DEVICES empty and --layers, a tiny
teacher that is not quantised runs on the CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vpmoe.api.card import GIB
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.inference.vllm_options import prepare_environment

SHORTEST, LONGEST = 200, 2200
"""Lengths of documents."""
LAYERS = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}
"""Layers, and experts of each."""


def config_of(shape: str, layers: int | None) -> dict[str, Any]:
    """The config.json of a release, or of a small model of `layers` layers that is not quantised."""
    depth, experts = LAYERS[shape]
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": depth,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131_072,
        "sliding_window": 128,
        "rope_theta": 150_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "swiglu_limit": 7.0,
        "pad_token_id": 199_999,
        "eos_token_id": 200_002,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }
    if layers is not None:
        del config["quantization_config"]
        config |= {"num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 64}
        config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
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

    from vpmoe.inference.teacher_hidden import GPU_MEMORY, HiddenStateEngine

    class Dummy(HiddenStateEngine):
        """Without the checks of a checkpoint, of which dummy weights have none."""

        def __init__(self, directory: Path, **options: Any) -> None:
            self._load(directory, LONGEST, "bfloat16", load_format="dummy", **options)

    options = {}
    if card is not None:
        memory = torch.cuda.get_device_properties(0).total_memory
        options = {"gpu_memory_utilization": GPU_MEMORY * card * GIB / memory}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(shape, layers)))
        return Dummy(Path(folder), **options)


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
    parser.add_argument("--shape", choices=LAYERS, default="gpt-oss-20b")
    parser.add_argument("--students", type=int, default=7, help="questions that are answered together")
    parser.add_argument("--positions", type=int, default=8192, help="positions of a question")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--card", type=float, metavar="GIB", help="memory of the card, if not this one's")
    parser.add_argument("--ranks", type=int, default=7, help="students of this teacher")
    parser.add_argument(
        "--train", type=float, default=5950, help="tokens a second of a student that never waits"
    )
    parser.add_argument("--layers", type=int, help="a tiny teacher with this many layers, for a trial")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one row `hidden`")
    given = parser.parse_args()
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
    demand = given.ranks * given.train
    print(
        f"one teacher keeps {given.ranks} students of {given.train:,.0f} tokens/s busy for "
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
