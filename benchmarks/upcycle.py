"""Loss of a student that starts from a dense model beside one that starts from random weights, at equal
tokens.

    VPMOE_TEST_PARQUET=rows.parquet python -m benchmarks.upcycle [--seeds 3] [--steps 60] [--source-steps 150]
    …

The data are rows of SYNTH (of the files in VPMOE_TEST_PARQUET, colon-separated; else the repository's
sample), split by document: half for the source, the rest for the student, of which a tenth is held out. The
source is a Qwen3 of transformers with twice the student's heads and a tokenizer of its own, trained here
until it is at least one nat below its start. The student is `tiny`'s architecture with every part, and
without any, on the first ids of o200k: they are a byte-pair encoding by themselves, so that two cores need
not compute 201,088 logits a token.

Prints the held-out loss in nats a token, mean ± standard deviation over the seeds, of which each has a source
of its own: scratch   random weights, as the trainer draws them
pieces    upcycled; tokens that the source has not are made of their pieces
donor     upcycled; they are combinations found in the embeddings of a model with the student's vocabulary,
          which is trained on the source's rows too (with every part only)
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiktoken
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from vpmoe.data import vocabulary_file
from vpmoe.model import device as devices
from vpmoe.model import distributed, state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import PARTS, SHAPES, Shape
from vpmoe.objectives.vanilla import vanilla
from vpmoe.upcycle.build import Upcycling, prepare
from vpmoe.upcycle.source_tokenizer import load_source_tokenizer
from vpmoe.upcycle.vocabulary import map_vocabulary

ROW = 256
ROWS = 8
"""Rows of a step, for all models."""
WEIGHTS = {"reasoning": 1.0, "final": 1.0}


def texts() -> list[str]:
    """Reasoning and answer of each row."""
    files = [Path(name) for name in os.environ.get("VPMOE_TEST_PARQUET", "").split(":") if name]
    names = ["synthetic_reasoning", "synthetic_answer"]
    if files:
        import pyarrow.parquet as pq

        found = [row for file in files for row in pq.read_table(file, columns=names).to_pylist()]
    else:
        from demo import sample

        found = sample.rows()
    return ["\n".join(row[name] or "" for name in names) for row in found]


def pieces_of(documents: Sequence[str], encode: Callable[[str], list[int]]) -> Tensor:
    """Pieces of ROW tokens, [n, ROW]; what is left of a document is left out."""
    encoded = [torch.tensor(encode(text), dtype=torch.int64) for text in documents]
    return torch.cat([ids[: len(ids) // ROW * ROW].view(-1, ROW) for ids in encoded])


def stream(rows: Tensor, seed: int) -> Iterator[Tensor]:
    """[ROWS, ROW] for ever: every piece once in a random order, then in another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - ROWS + 1, ROWS):
            yield rows[order[start : start + ROWS]]


def short_o200k(size: int) -> tiktoken.Encoding:
    """The byte-pair encoding of o200k's first `size` ids."""
    whole = vocabulary_file.encoding()
    ranks = {token: rank for token, rank in whole._mergeable_ranks.items() if rank < size}
    return tiktoken.Encoding("short", pat_str=whole._pat_str, mergeable_ranks=ranks, special_tokens={})


def own_tokenizer(documents: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE of these documents."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def dense(rows: Tensor, held: Tensor, vocabulary: int, seed: int, given: argparse.Namespace) -> Any:
    """A Qwen3 trained on `rows`. Prints its held-out loss before and after."""
    torch.manual_seed(seed)
    shape = SHAPES["tiny"]
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=2 * shape.heads,
        num_key_value_heads=2 * shape.kv_heads,
        head_dim=shape.head_width,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate, betas=(0.9, 0.95), weight_decay=0.1)

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def held_out() -> float:
        with torch.no_grad():
            return float(torch.stack([loss(ids) for ids in held.split(ROWS)]).mean())

    before, batches = held_out(), stream(rows, seed)
    for step in range(given.source_steps):
        optimizer.param_groups[0]["lr"] = given.rate * min(1, (step + 1) / 20)
        optimizer.zero_grad()
        loss(next(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    after = held_out()
    print(f"seed {seed}: dense model of {vocabulary:,} tokens, loss {before:.2f} → {after:.2f}", flush=True)
    if after > before - 1:
        raise SystemExit("The source has not learned one nat: raise --source-steps.")
    return model


def as_batch(ids: Tensor) -> Batch:
    documents = torch.arange(len(ids), dtype=torch.int32).unsqueeze(1).expand_as(ids).contiguous()
    return Batch.from_rows(ids, torch.ones_like(ids, dtype=torch.uint8), documents)


def train(
    shape: Shape,
    weights: dict[str, Tensor] | None,
    rows: Tensor,
    held: Tensor,
    seed: int,
    given: argparse.Namespace,
    device: torch.device,
) -> list[float]:
    """Held-out losses of a student that starts with `weights` (None: random ones): at its start, after a
    quarter of the steps and after all."""
    learner = Learner.build(
        shape, device, sequence_length=ROW, seed=seed, weight_decay=0.1, gradient_clip=1.0
    )
    if weights is not None:
        state.allocate_moments(learner)
        flat = {name: part.flatten() for name, part in weights.items()}
        state.restore(learner, lambda name, start, stop: flat[name][start:stop], 0, moments=False)
    evaluated = [as_batch(ids) for ids in held.split(ROWS)]

    def held_out() -> float:
        return float(learner.evaluate(evaluated).cross_entropy["reasoning"] or math.nan)

    losses, batches = [held_out()], stream(rows, seed)
    for step in range(given.steps):
        batch = as_batch(next(batches))
        learner.forward_backward([batch], vanilla(batch.counts, WEIGHTS), int(batch.counts[0]))
        learner.step(given.rate * min(1, (step + 1) / 20))
        if step + 1 in (given.steps // 4, given.steps):
            losses.append(held_out())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help=f"steps of {ROWS * ROW} tokens of a student")
    parser.add_argument("--source-steps", type=int, default=150, help="steps of source and donor")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of all, after 20 steps")
    parser.add_argument("--layers", type=int, default=3, help="of the source")
    parser.add_argument("--student-layers", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=4096, help="ids of o200k that the student has")
    parser.add_argument("--source-vocabulary", type=int, default=3000)
    given = parser.parse_args()
    device = devices.choose()
    distributed.start(device)
    documents = texts()
    half, tenth = len(documents) // 2, len(documents) // 10
    for_source, held_texts, for_student = (
        documents[:half],
        documents[half : half + tenth],
        documents[half + tenth :],
    )
    encoding, tokenizer = short_o200k(given.vocabulary), own_tokenizer(for_source, given.source_vocabulary)
    rows, held, donors = (
        pieces_of(part, lambda text: encoding.encode(text, disallowed_special=()))
        for part in (for_student, held_texts, for_source)
    )
    source_rows, source_held = (
        pieces_of(part, lambda text: tokenizer.encode(text).ids) for part in (for_source, held_texts)
    )
    complete = replace(SHAPES["tiny"], layers=given.student_layers, vocabulary=given.vocabulary)
    shapes = {
        "every part": complete,
        "no part": replace(complete, **{part: getattr(Shape, part) for part in PARTS}),
    }
    print(
        f"tokens: source {source_rows.numel():,}, student {rows.numel():,}, held out {held.numel():,}; a "
        f"student is trained on {given.steps * ROWS * ROW:,}",
        flush=True,
    )
    found: dict[tuple[str, str], list[list[float]]] = {}
    for seed in range(1, given.seeds + 1):
        model = dense(source_rows, source_held, given.source_vocabulary, seed, given)
        donor = (
            dense(donors, held, given.vocabulary, 100 + seed, given).get_input_embeddings().weight.detach()
        )
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model.save_pretrained(folder)
            tokenizer.save(str(folder / "tokenizer.json"))
            for label, shape in shapes.items():
                made = prepare(folder, shape, seed)
                starts: dict[str, Upcycling | None] = {"scratch": None, "pieces": made}
                if shape is complete:
                    print("\n".join(made.vocabulary.table()), flush=True)
                    tokens = load_source_tokenizer(folder, given.source_vocabulary)
                    starts["donor"] = replace(
                        made, vocabulary=map_vocabulary(tokens, given.vocabulary, donor)
                    )
                for arm, start in starts.items():
                    began = time.perf_counter()
                    weights = None if start is None else dict(start.tensors())
                    losses = train(shape, weights, rows, held, seed, given, device)
                    found.setdefault((label, arm), []).append(losses)
                    said = " → ".join(f"{loss:.3f}" for loss in losses)
                    print(
                        f"seed {seed}, {label}, {arm}: {said}, {time.perf_counter() - began:.0f} s",
                        flush=True,
                    )
    print(f"\nheld-out loss, nats a token, after 0, {given.steps // 4} and {given.steps} steps")
    for (label, arm), runs in found.items():
        cells = [figure(values) for values in zip(*runs, strict=True)]
        print(f"{label:12}{arm:10}{'   '.join(cells)}")


def figure(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
