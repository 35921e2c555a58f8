"""A student from a trained source learns faster than one from random weights, on the repository's sample.

benchmarks/upcycle.py measures it with more seeds, steps and rows of SYNTH.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from demo import sample
from tests.fakes.dense_models import byte_tokenizer, dense_model, save_dense_model
from tests.fakes.students import COMPLETE
from vpmoe.data import vocabulary_file
from vpmoe.model import state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.objectives.vanilla import vanilla
from vpmoe.upcycle.build import upcycle

SHAPE = replace(COMPLETE, vocabulary=1024)
LENGTH, ROWS = 64, 8
RATE = 3e-3


def pieces(texts: list[str], encode: Callable[[str], list[int]]) -> Tensor:
    """[n, LENGTH]"""
    encoded = [torch.tensor(encode(text), dtype=torch.int64) for text in texts]
    return torch.cat([ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH) for ids in encoded])


def short_o200k(size: int) -> Callable[[str], list[int]]:
    """The byte-pair encoding that o200k's first ids are by themselves."""
    whole = vocabulary_file.encoding()
    ranks = {token: rank for token, rank in whole._mergeable_ranks.items() if rank < size}
    encoding = tiktoken.Encoding("short", pat_str=whole._pat_str, mergeable_ranks=ranks, special_tokens={})
    return lambda text: encoding.encode(text, disallowed_special=())


def trained_source(folder: Path, texts: list[str], held: list[str], steps: int) -> tuple[float, float]:
    """Save a Qwen3 that was trained on the texts. Returns its held-out loss before and after."""
    tokenizer = byte_tokenizer(texts, 500)
    rows, evaluated = (pieces(part, lambda text: tokenizer.encode(text).ids) for part in (texts, held))
    model = dense_model("qwen3", vocab_size=500)
    model.apply(model._init_weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    before = float(loss(evaluated).detach())
    for step in range(steps):
        optimizer.zero_grad()
        loss(rows[torch.arange(step * ROWS, (step + 1) * ROWS) % len(rows)]).backward()
        optimizer.step()
    after = float(loss(evaluated).detach())
    save_dense_model(folder, model=model, tokenizer=tokenizer)
    return before, after


def trained_student(
    weights: dict[str, Tensor] | None, rows: Tensor, held: Tensor, steps: int, device: torch.device
) -> list[float]:
    """Held-out loss of a student before and after training; `weights`: None for random ones."""
    learner = Learner.build(
        SHAPE, device, sequence_length=LENGTH, seed=1, weight_decay=0.1, gradient_clip=1.0
    )
    if weights is not None:
        state.allocate_moments(learner)
        flat = {name: part.flatten() for name, part in weights.items()}
        state.restore(learner, lambda name, start, stop: flat[name][start:stop], 0, moments=False)
    evaluated = [batch(held)]
    losses = [learner.evaluate(evaluated).cross_entropy["reasoning"]]
    for step in range(steps):
        one = batch(rows[torch.arange(step * ROWS, (step + 1) * ROWS) % len(rows)])
        even = {"reasoning": 1.0, "final": 1.0}
        learner.forward_backward([one], vanilla(one.counts, even), int(one.counts[0]))
        learner.step(RATE)
    return [*losses, learner.evaluate(evaluated).cross_entropy["reasoning"]]


def batch(ids: Tensor) -> Batch:
    documents = torch.arange(len(ids), dtype=torch.int32).unsqueeze(1).expand_as(ids).contiguous()
    return Batch.from_rows(ids, torch.ones_like(ids, dtype=torch.uint8), documents)


def test_an_upcycled_student_is_ahead_at_equal_tokens(tmp_path: Path, device: torch.device) -> None:
    """Seeds are fixed. The source trains on other rows than the student, and both are measured on further
    ones."""
    names = ("synthetic_reasoning", "synthetic_answer")
    found = ["\n".join(row[name] or "" for name in names) for row in sample.rows()]
    held = found[3::4]
    before, after = trained_source(tmp_path, found[0::2], held, 100)
    assert after < before - 1, "the source must have learned one nat"
    rows, evaluated = (pieces(part, short_o200k(SHAPE.vocabulary)) for part in (found[1::4], held))
    torch.manual_seed(1)
    weights, _ = upcycle(tmp_path, SHAPE, 1)
    scratch = trained_student(None, rows, evaluated[:48], 30, device)
    upcycled = trained_student(weights, rows, evaluated[:48], 30, device)
    print(f"source {before:.2f} → {after:.2f}, scratch {scratch}, upcycled {upcycled}")
    assert upcycled[1] < upcycled[0] and upcycled[1] < scratch[1] - 0.1
