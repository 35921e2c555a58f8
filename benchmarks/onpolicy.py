"""Toy comparison of OnPolicy with Vanilla and Rescored: one student trained in each way, at equal tokens.

    python -m benchmarks.onpolicy [--seeds 3] [--warm 300] [--tokens 300k] [--plot onpolicy.svg] …

The data are rows (of the files in VPMOE_TEST_PARQUET, colon-separated; else the repository's sample) as
Harmony conversations, with reasoning and answer cut into short pieces. The teacher, a dense transformer of a
million weights, is trained on them with plain torch. The student is the repository's own (mixture of experts,
a quarter of a million weights). For each seed it trains for `--warm` Vanilla steps, and from there on
`--tokens` more positions in each of three ways, with the repository's objectives, learner, export and
schedule of anchor steps. Then it answers held-out questions.

Prints mean ± standard deviation over the seeds: the reverse KL, which is KL(student‖teacher) over the whole
vocabulary at each token that the student sampled; the share of valid Harmony; the held-out cross-entropy. The
last line has the teacher's own values, which are the floors. With 440 real rows the reverse KL is 0.57 ± 0.01
after Vanilla, 0.54 ± 0.01 after Rescored, 0.32 ± 0.01 after OnPolicy. At three times the learning rate and a
staleness of two windows OnPolicy can diverge here: its gradient has one sample per token, and a step has only
a few thousand tokens.

The vocabulary is reduced to the special tokens and the most frequent ones; the others are removed from the
texts. With 201,088 logits per token, two cores would spend almost all of the time on the logits. Ids are
translated back wherever the repository's code reads Harmony.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpmoe.api.quantities import parse_tokens
from vpmoe.api.stages import Confidence
from vpmoe.data import harmony, vocabulary, vocabulary_file
from vpmoe.data.mixture import interleave
from vpmoe.data.packing import pack_sequences
from vpmoe.data.spans import SPANS
from vpmoe.inference import hf_model
from vpmoe.model import device as devices
from vpmoe.model import distributed, hf_export, state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.objectives.confidence import centre
from vpmoe.objectives.onpolicy import on_policy
from vpmoe.objectives.rescored import rescored
from vpmoe.objectives.vanilla import vanilla
from vpmoe.rollout import prompts, validity
from vpmoe.teacher.histogram import CODES, sparse

SPECIALS = (
    vocabulary.END_OF_DOCUMENT,
    vocabulary.RETURN,
    vocabulary.CALL,
    vocabulary.CHANNEL,
    vocabulary.START,
    vocabulary.END,
    vocabulary.MESSAGE,
    harmony.ROLE_USER,
    harmony.ROLE_ASSISTANT,
    harmony.CHANNEL_ANALYSIS,
    harmony.CHANNEL_FINAL,
)
ROW = 512
WEIGHTS = {"reasoning": 1.0, "final": 1.0}
QUESTION, REASONING, ANSWER = 24, 40, 28
"""Maximum number of tokens of each piece."""
BOUND = 128
"""Maximum number of tokens of a completion."""
BRANCHES = ("Vanilla", "Rescored", "OnPolicy")


@dataclass(frozen=True)
class Document:
    """A conversation in ids of the reduced vocabulary; the first `prompt_length` ids are the prompt.

    `logp` has the teacher's log-probability of each token, `sampler_logp` the sampler's.
    """

    ids: NDArray[np.int64]
    prompt_length: int
    span: NDArray[np.uint8]
    logp: NDArray[np.float32] | None = None
    sampler_logp: NDArray[np.float32] | None = None


class Vocabulary:
    """The specials and the most frequent tokens of some texts, numbered from 0."""

    def __init__(self, texts: Sequence[Sequence[int]], size: int) -> None:
        counts = Counter(token for text in texts for token in text)
        known = [token for token, _ in counts.most_common(size) if token not in SPECIALS]
        self.ids_V = np.array([*SPECIALS, *known][:size])
        self._number = {int(token): number for number, token in enumerate(self.ids_V)}
        self.kept = sum(counts[int(token)] for token in self.ids_V) / counts.total()

    def small(self, ids: Sequence[int]) -> list[int]:
        return [self._number[token] for token in ids if token in self._number]

    def real(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        return self.ids_V[ids].astype(np.int32)


def rows() -> list[tuple[str, str, str]]:
    """(question, reasoning, answer) of each row that has all three."""
    files = [Path(name) for name in os.environ.get("VPMOE_TEST_PARQUET", "").split(":") if name]
    if files:
        import pyarrow.parquet as pq

        names = ["query", "synthetic_reasoning", "synthetic_answer"]
        found = [
            row for file in files for row in pq.read_table(file, columns=names).slice(0, 2000).to_pylist()
        ]
    else:
        from demo import sample

        found = sample.rows()
    texts = [
        tuple(row[name] or "" for name in ("query", "synthetic_reasoning", "synthetic_answer"))
        for row in found
    ]
    return [text for text in texts if all(part.strip() for part in text)]  # type: ignore[misc]


def documents(words: Vocabulary, row: tuple[list[int], ...]) -> Iterator[Document]:
    """The conversations of a row: its question with each piece of its reasoning and its answer in turn."""
    question, reasoning, answer = (words.small(text) for text in row)
    pieces = zip(range(0, len(reasoning), REASONING), range(0, len(answer), ANSWER), strict=False)
    prompt = words.small([vocabulary.START, harmony.ROLE_USER, vocabulary.MESSAGE]) + question[:QUESTION]
    prompt += words.small([vocabulary.END, vocabulary.START, harmony.ROLE_ASSISTANT])
    for at, start in pieces:
        reasoning_piece, answer_piece = reasoning[at : at + REASONING], answer[start : start + ANSWER]
        if min(len(reasoning_piece), len(answer_piece)) < 8:
            continue
        completion = words.small([vocabulary.CHANNEL, harmony.CHANNEL_ANALYSIS, vocabulary.MESSAGE])
        completion += reasoning_piece
        completion += words.small(
            [
                vocabulary.END,
                vocabulary.START,
                harmony.ROLE_ASSISTANT,
                vocabulary.CHANNEL,
                harmony.CHANNEL_FINAL,
                vocabulary.MESSAGE,
            ]
        )
        completion += answer_piece + words.small([vocabulary.RETURN])
        yield document(words, np.array(prompt), np.array(completion))


def document(
    words: Vocabulary, prompt: NDArray[np.int64], completion: NDArray[np.int64], **scores: Any
) -> Document:
    span = np.concatenate([np.zeros(len(prompt), np.uint8), prompts.completion_spans(words.real(completion))])
    return Document(np.concatenate([prompt, completion]), len(prompt), span, **scores)


def batch_of(held: Sequence[Document]) -> Batch:
    """The documents packed into rows."""
    places, starts = pack_sequences(np.array([len(one.ids) for one in held], np.int32), ROW)
    shape = (len(starts) - 1, ROW)
    tokens, span = np.zeros(shape, np.int64), np.zeros(shape, np.uint8)
    number, scores = np.full(shape, -1, np.int32), np.full((2, *shape), np.nan, np.float32)
    for row in range(len(starts) - 1):
        at = 0
        for place in places[starts[row] : starts[row + 1]]:
            one = held[place]
            to = slice(at, at := at + len(one.ids))
            tokens[row, to], span[row, to], number[row, to] = one.ids, one.span, place
            for which, logp in enumerate((one.logp, one.sampler_logp)):
                if logp is not None:
                    scores[which, row, to] = logp
    given = [
        None if getattr(held[0], name) is None else torch.from_numpy(logp)
        for name, logp in zip(("logp", "sampler_logp"), scores, strict=True)
    ]
    return Batch.from_rows(torch.from_numpy(tokens), torch.from_numpy(span), torch.from_numpy(number), *given)


def padded(sequences: Sequence[NDArray[np.int64]], left: bool = False) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [N, longest], padded on the right, or on the `left`."""
    longest = max(map(len, sequences))
    ids, mask = np.zeros((len(sequences), longest), np.int64), np.zeros((len(sequences), longest), np.int64)
    for row, sequence in enumerate(sequences):
        to = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids[row, to], mask[row, to] = sequence, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


@torch.no_grad()
def distributions(model: Any, sequences: Sequence[NDArray[np.int64]], device: torch.device) -> Tensor:
    """[N, longest − 1, V] log-probabilities of the token after each position."""
    ids, mask = padded(sequences)
    logits: Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1]
    return logits.float().log_softmax(2)


def logp_of(
    model: Any, sequences: Sequence[NDArray[np.int64]], device: torch.device
) -> list[NDArray[np.float32]]:
    """The log-probability of each token of each sequence; NaN for its first token."""
    found = []
    for start in range(0, len(sequences), 64):
        some = sequences[start : start + 64]
        logp_NTV = distributions(model, some, device)
        chosen = logp_NTV.gather(2, padded(some)[0][:, 1:, None].to(device)).squeeze(2).cpu().numpy()
        found += [
            np.concatenate([[np.float32(np.nan)], chosen[row, : len(one) - 1]])
            for row, one in enumerate(some)
        ]
    return found


def sample(
    words: Vocabulary, model: Any, questions: Sequence[NDArray[np.int64]], device: torch.device
) -> list[Document]:
    """Sample a completion of each prompt at temperature 1, with the log-probability of each token."""
    made = []
    stops = words.small(vocabulary.STOP_IDS)
    for start in range(0, len(questions), 64):
        some = questions[start : start + 64]
        ids, mask = padded(some, left=True)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=BOUND,
                eos_token_id=stops,
                pad_token_id=0,
            )
        for question, answer in zip(some, out[:, ids.shape[1] :].cpu().numpy(), strict=True):
            ends = np.flatnonzero(np.isin(answer, stops))
            made.append(document(words, question, answer[: ends[0] + 1] if len(ends) else answer))
    logp_of_made = logp_of(model, [one.ids for one in made], device)
    return [replace(one, sampler_logp=logp) for one, logp in zip(made, logp_of_made, strict=True)]


def teacher_of(words: Vocabulary, held: Sequence[Document], steps: int, device: torch.device) -> Any:
    """A dense transformer trained on the documents with plain torch."""
    from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(words.ids_V),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=ROW,
        tie_word_embeddings=False,
    )
    model: Any = Qwen3ForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    random = np.random.default_rng(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                2e-3 * min(1, (step + 1) / 40) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
            )
        some = [held[place] for place in random.choice(len(held), 32)]
        ids, mask = padded([one.ids for one in some])
        span, _ = padded([one.span.astype(np.int64) for one in some])
        labels = ids.where((mask > 0) & (span > 0), -100)
        loss = model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval().requires_grad_(False)


def shape_of(size: int) -> Shape:
    return replace(SHAPES["tiny"], name="toy", vocabulary=size)


class Toy:
    """The parts that all seeds share (vocabulary, documents, teacher), and the measurement of a student."""

    def __init__(self, given: argparse.Namespace, device: torch.device) -> None:
        self.device, self.given = device, given
        encode = vocabulary_file.encoding().encode_ordinary
        texts = [tuple(encode(part) for part in row) for row in rows()]
        self.words = Vocabulary([part for row in texts for part in row], given.vocabulary)
        order = np.random.default_rng(0).permutation(len(texts))
        held_out = max(8, len(texts) // 8)
        cut = [
            [one for place in places for one in documents(self.words, texts[place])]
            for places in (order[held_out:], order[:held_out])
        ]
        self.train, self.valid = cut
        started = time.perf_counter()
        self.teacher = teacher_of(self.words, self.train, given.teacher, device)
        logp = logp_of(self.teacher, [one.ids for one in self.train], device)
        self.train = [replace(one, logp=found) for one, found in zip(self.train, logp, strict=True)]
        self.prompts = [
            one.ids[: one.prompt_length]
            for one in self.valid[:: max(1, len(self.valid) // given.completions)]
        ][: given.completions]
        tokens = sum(len(one.ids) for one in self.train)
        print(
            f"{len(texts)} rows: {len(self.train):,} training documents of {tokens / len(self.train):.0f} "
            f"tokens, {len(self.prompts)} held-out questions; vocabulary of {len(self.words.ids_V):,} "
            f"tokens, {self.words.kept:.0%} of the text; teacher with "
            f"{sum(each.numel() for each in self.teacher.parameters()) / 1e6:.1f} M weights, trained in "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )

    def centres(self) -> dict[str, float]:
        """By span, the teacher's log p at which the confidence weight is 1.

        Computed from the histogram of the scores, as in a Rescored stage.
        """
        found = {}
        for name, span in SPANS.items():
            values = np.concatenate(
                [one.logp[one.span == span] for one in self.train if one.logp is not None]
            ).astype(np.float16)
            found[name] = centre(sparse(np.bincount(values.view(np.uint16), minlength=CODES)), Confidence())
        return found

    def students(self, learner: Learner) -> Any:
        """The learner's student as a transformers model, through the repository's export."""
        with tempfile.TemporaryDirectory() as folder:
            shape = learner.student.shape
            hf_export.export_student(
                Path(folder),
                shape,
                ROW,
                state.sizes(learner),
                state.copy_weights(learner),
                learner.student.config.params_dtype,
            )
            return hf_model.load_student(Path(folder), shape).to(self.device)

    def measure(self, learner: Learner) -> dict[str, float]:
        """The figures of COLUMNS for the learner's student; see measure_model."""
        return self.measure_model(self.students(learner))

    def measure_model(self, model: Any) -> dict[str, float]:
        """The figures of COLUMNS, from a model's answers to the held-out questions and its loss on held-out
        documents."""
        torch.manual_seed(1)
        answers = sample(self.words, model, self.prompts, self.device)
        kl = {name: [0.0, 0] for name in SPANS}
        for start in range(0, len(answers), 64):
            some = answers[start : start + 64]
            ours, theirs = (
                distributions(it, [one.ids for one in some], self.device) for it in (model, self.teacher)
            )
            kl_NT = (ours.exp() * (ours - theirs)).sum(2).cpu().numpy()
            for row, one in enumerate(some):
                for name, span in SPANS.items():
                    at = np.flatnonzero(one.span == span) - 1
                    kl[name][0] += float(kl_NT[row, at].sum())
                    kl[name][1] += len(at)
        valid = [
            prompts.completion_validity(self.words.real(one.ids[one.prompt_length :])) == validity.VALID
            for one in answers
        ]
        total, tokens = (sum(values) for values in zip(*kl.values(), strict=True))
        held = self.valid[:: max(1, len(self.valid) // 128)]
        learned = [
            logp[one.prompt_length :]
            for one, logp in zip(held, logp_of(model, [one.ids for one in held], self.device), strict=True)
        ]
        return {
            "KL": total / tokens,
            **{f"KL {name}": nats / max(1, count) for name, (nats, count) in kl.items()},
            "valid": float(np.mean(valid)),
            "CE": -float(np.concatenate(learned).mean()),
            "length": tokens / len(answers),
        }


def snapshot(learner: Learner) -> tuple[dict[str, Tensor], int]:
    """(a copy of the learner's state by name, its number of optimizer steps)."""
    return {piece.name: piece.tensor.clone() for piece in state.slices(learner)}, learner.steps


def step(learner: Learner, batch: Batch, objective: Any, rate: float) -> int:
    """Do one optimizer step. Returns its number of positions that are not padding."""
    positions = int(batch.counts[0])
    outcome = learner.forward_backward([batch], objective, positions)
    if not math.isfinite(outcome.loss):
        raise ArithmeticError(f"step {learner.steps + 1}: the loss is {outcome.loss}.")
    learner.step(rate)
    return positions


class Stream:
    """Documents in a random order that depends on the seed, epoch after epoch."""

    def __init__(self, held: Sequence[Document], seed: int) -> None:
        self._held, self._random, self._order = held, np.random.default_rng(seed), list[int]()

    def take(self, count: int) -> list[Document]:
        while len(self._order) < count:
            self._order += self._random.permutation(len(self._held)).tolist()
        taken, self._order = self._order[:count], self._order[count:]
        return [self._held[place] for place in taken]


def branch(toy: Toy, learner: Learner, kind: str, seed: int) -> list[tuple[int, dict[str, float]]]:
    """Train one way for `--tokens` positions. Returns (positions, figures of COLUMNS) at each quarter."""
    given = toy.given
    stream, centres = Stream(toy.train, seed), toy.centres()
    share = {"Vanilla": 0.0, "Rescored": given.mix, "OnPolicy": 1 - given.anchor}[kind]
    special = interleave(1_000_000, share)
    torch.manual_seed(seed)
    seen, number, measurements = 0, 0, list[tuple[int, dict[str, float]]]()
    pending: list[list[Document]] = []

    def rollouts() -> list[Document]:
        """A window of completions sampled from the current student and scored by the teacher."""
        questions = [one.ids[: one.prompt_length] for one in stream.take(given.prompts)]
        held = sample(toy.words, toy.students(learner), questions, toy.device)
        logp = logp_of(toy.teacher, [one.ids for one in held], toy.device)
        return [replace(one, logp=found) for one, found in zip(held, logp, strict=True)]

    while seen < given.tokens:
        if not special[number]:
            batch = batch_of(stream.take(given.prompts))
            objective = vanilla(batch.counts, WEIGHTS)
        elif kind == "Rescored":
            batch = batch_of(stream.take(given.prompts))
            objective = rescored(batch.counts, WEIGHTS, Confidence(), centres)
        else:
            while len(pending) <= given.staleness:  # the first windows are all from version 0
                pending.append(rollouts())
            batch = batch_of(pending.pop(0))
            objective = on_policy(batch.counts, WEIGHTS)
        seen += step(learner, batch, objective, given.branch_rate * (1 - 0.9 * seen / given.tokens))
        number += 1
        if seen >= given.tokens * (len(measurements) + 1) / 4:
            measurements.append((seen, toy.measure(learner)))
    return measurements


def experiment(toy: Toy, seed: int) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """One seed: the warm-up of a student, and its three branches.

    Returns, by branch, (positions, figures of COLUMNS); the first entry is the student after the warm-up.
    """
    given = toy.given
    learner = Learner.build(
        shape_of(len(toy.words.ids_V)),
        toy.device,
        sequence_length=ROW,
        seed=seed,
        weight_decay=0.1,
        gradient_clip=1.0,
    )
    stream = Stream(toy.train, 1000 + seed)
    for number in range(given.warm):
        batch = batch_of(stream.take(given.prompts))
        step(learner, batch, vanilla(batch.counts, WEIGHTS), given.rate * min(1, (number + 1) / 20))
    (tensors, steps), warmed = snapshot(learner), toy.measure(learner)
    found = {}
    for kind in BRANCHES:
        state.restore(learner, lambda name, start, stop: tensors[name][start:stop], steps)
        started = time.perf_counter()
        found[kind] = [(0, warmed), *branch(toy, learner, kind, seed)]
        last = found[kind][-1][1]
        kl, valid = (f"{warmed[name]:.3f} → {last[name]:.3f}" for name in ("KL", "valid"))
        print(
            f"seed {seed}, {kind:8}: reverse KL {kl} nats, valid {valid}, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
    return found


COLUMNS: dict[str, Callable[[float], str]] = {
    "KL": "{:.3f}".format,
    "KL reasoning": "{:.3f}".format,
    "KL final": "{:.3f}".format,
    "valid": "{:.1%}".format,
    "CE": "{:.3f}".format,
    "length": "{:.0f}".format,
}


def table(results: Sequence[dict[str, list[tuple[int, dict[str, float]]]]], teacher: dict[str, float]) -> str:
    """The figures over all seeds as text: a line per branch, and the teacher's."""

    def cells(measured: Sequence[dict[str, float]]) -> list[str]:
        texts = []
        for name, form in COLUMNS.items():
            values = [one[name] for one in measured]
            texts.append(
                form(statistics.mean(values))
                + (f" ± {form(statistics.stdev(values))}" if len(values) > 1 else "")
            )
        return texts

    lines = [["", *COLUMNS], ["warm-up", *cells([result["Vanilla"][0][1] for result in results])]]
    lines += [[kind, *cells([result[kind][-1][1] for result in results])] for kind in BRANCHES]
    lines += [["teacher", *cells([teacher])]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def plot(results: Sequence[dict[str, list[tuple[int, dict[str, float]]]]]) -> str:
    """Reverse KL over positions as an SVG. Each branch has a line through the means of the seeds, and a band
    from their lowest to their highest value."""
    wide, high, edge, colours = 640, 400, 56, ("#888888", "#d98200", "#1060c0")
    most = max(tokens for result in results for branch in result.values() for tokens, _ in branch)
    top = 1.05 * max(one["KL"] for result in results for branch in result.values() for _, one in branch)

    def at(tokens: float, kl: float) -> str:
        return (
            f"{edge + (wide - 2 * edge) * tokens / most:.1f},{high - edge - (high - 2 * edge) * kl / top:.1f}"
        )

    drawn = []
    for number, (kind, colour) in enumerate(zip(BRANCHES, colours, strict=True)):
        points = list(zip(*(result[kind] for result in results), strict=True))
        tokens = [statistics.mean(one[0] for one in point) for point in points]
        values = [[one[1]["KL"] for one in point] for point in points]
        band = [at(t, max(v)) for t, v in zip(tokens, values, strict=True)] + [
            at(t, min(v)) for t, v in zip(tokens, values, strict=True)
        ][::-1]
        line = [at(t, statistics.mean(v)) for t, v in zip(tokens, values, strict=True)]
        drawn.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.2"/>')
        drawn.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn.append(
            f'<text x="{edge + 16}" y="{high - edge - 52 + 18 * number}" fill="{colour}">{kind}</text>'
        )
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(share * most, 0).split(",")
        drawn.append(
            f'<text x="{x}" y="{float(y) + 18}" text-anchor="middle">{share * most / 1000:.0f}k</text>'
        )
        x, y = at(0, share * top).split(",")
        drawn.append(f'<text x="{float(x) - 6}" y="{y}" text-anchor="end">{share * top:.2f}</text>')
    axes = f'<polyline points="{at(0, top)} {at(0, 0)} {at(most, 0)}" fill="none" stroke="black"/>'
    title = "KL(student‖teacher) on held-out questions, nats per sampled token"
    middle = f'x="{wide / 2}" y="{high - 12}" text-anchor="middle"'
    words = f'<text x="{edge}" y="{edge - 20}">{title}</text>'
    words += f"<text {middle}>positions trained after the warm-up</text>"
    inner = "\n".join([axes, words, *drawn])
    root = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}"'
    return f'<svg {root} font-family="sans-serif" font-size="13">\n{inner}\n</svg>\n'


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--warm", type=int, default=300, help="Vanilla steps before the three branches")
    parser.add_argument("--tokens", type=parse_tokens, default=300_000, help="positions of each branch")
    parser.add_argument(
        "--teacher", type=int, default=220, help="optimizer steps of the teacher, 32 documents each"
    )
    parser.add_argument("--vocabulary", type=int, default=1024, help="size of the reduced vocabulary")
    parser.add_argument("--prompts", type=int, default=48, help="documents or rollouts per step")
    parser.add_argument(
        "--completions", type=int, default=192, help="held-out questions answered at each measurement"
    )
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of the warm-up")
    parser.add_argument(
        "--branch-rate",
        type=float,
        default=1e-3,
        help="initial learning rate of each branch; falls to a tenth",
    )
    parser.add_argument(
        "--mix", type=float, default=0.65, help="Rescored: share of its steps that are Rescored, not Vanilla"
    )
    parser.add_argument(
        "--anchor", type=float, default=0.15, help="OnPolicy: share of its steps that are Vanilla"
    )
    parser.add_argument(
        "--staleness",
        type=int,
        default=2,
        help="OnPolicy: number of windows by which sampling is ahead of training",
    )
    parser.add_argument("--plot", type=Path, help="file to write the plot to, as SVG")
    return parser.parse_args()


def main() -> None:
    from transformers.utils import logging

    given = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = devices.choose()
    distributed.start(device)
    toy, started = Toy(given, device), time.perf_counter()
    teacher = toy.measure_model(toy.teacher)
    results = [experiment(toy, seed) for seed in range(given.seeds)]
    print(f"\n{given.seeds} seeds, {time.perf_counter() - started:.0f} s\n{table(results, teacher)}")
    best = [min(BRANCHES, key=lambda kind: result[kind][-1][1]["KL"]) for result in results]
    print(f"\nLowest reverse KL by seed: {', '.join(best)}")
    if given.plot:
        given.plot.write_text(plot(results))
    distributed.stop()


if __name__ == "__main__":
    main()
