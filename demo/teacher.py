"""The demonstration's teacher: a tiny GPT-OSS, trained once on the sample's training documents and cached.

    python -m demo.teacher        # trains it if it is not in the cache, and prints its folder

It reads what the student reads, rendered by the project's preprocessing, and never the held-out documents. A
softmax over all 201,088 ids would be nearly all of the work. So it is trained over the few thousand ids that
occur and a few groups of ids that do not. The ids of a group share one row of the embedding and of the head;
a group of n ids has n times the weight of one id, so this equals the whole softmax. At the end each id gets
its row, and the checkpoint is an ordinary GPT-OSS.

A share of the target goes to all ids, weighted by how common they are (the tokenizer's merges are ordered by
frequency), and some inputs are replaced by ids that do not occur. So the teacher also has a useful opinion of
tokens that it has never read: those of held-out documents, and those that a student samples at first.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from demo import sample
from demo.tiny_gpt_oss import TINY
from devcluster import binaries
from vpmoe.api import DistillRun, load_run
from vpmoe.data.dataset import WRITER, dataset_settings
from vpmoe.data.preprocess import census, encode, sampling
from vpmoe.data.system_message import EffortSubstitution
from vpmoe.data.vocabulary import CALL, END_OF_DOCUMENT, RETURN, VOCABULARY_SIZE

MANIFEST = Path(__file__).parents[1] / "manifests/examples/demo.yaml"
SHARDS = 2
"""Parquet files of the demonstration's input."""

STEPS = 160
DOCUMENTS = 8
"""Documents a step."""
LEARNING_RATE = 3e-3
WARMUP = 20
"""Steps over which the learning rate rises; then it falls to a twentieth as half a cosine."""
WEIGHT_DECAY = 0.1
SMOOTHING = 0.2
"""Share of the target that goes to all ids, by PRIOR."""
PRIOR = 1000
"""The assumed frequency of id n is proportional to 1 / (n + PRIOR)."""
REPLACED = 0.2
"""Share of a completion's inputs that are replaced; half as many of a prompt's."""
GROUPS = 8
"""Groups of ids that do not occur, from common to rare."""
EFFORTS = ("low", "medium", "high")
"""Reasoning efforts of the system message. Each step draws one for each document."""


@dataclass(frozen=True)
class TeacherDocument:
    """A training document of T tokens, without its end-of-document token."""

    ids_T: NDArray[np.int64]
    learned_T: NDArray[np.bool_]
    """Whether the token is learned: those of reasoning and final answer."""


def make_teacher() -> Path:
    """Return the folder of the trained teacher, a Hugging Face model directory. Train it if it is not cached.

    The folder's name is a hash of everything that decides its content. The folder appears by rename, and a
    second process waits for the one that trains.
    """
    run = load_run(MANIFEST)
    cache = binaries.cache().parent / "demo"
    folder = cache / f"teacher-{content_key(run)}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "teacher.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for leftover in cache.glob("teacher-*.making"):  # of a process that was killed
                shutil.rmtree(leftover)
            making = folder.with_suffix(".making")
            train(training_documents(run), making)
            making.rename(folder)
    return folder


def content_key(run: DistillRun) -> str:
    """A hash of this file, the sample, the settings and version of preprocessing, and the libraries."""
    settings = {
        "dataset": dataset_settings(run),
        "writer": WRITER,
        "shape": TINY,
        "libraries": {name: version(name) for name in ("torch", "transformers")},
    }
    parts = [
        Path(__file__).read_bytes(),
        sample.ROWS.read_bytes(),
        json.dumps(settings, sort_keys=True).encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def training_documents(run: DistillRun) -> list[list[TeacherDocument]]:
    """Each training document of the run's dataset, once for each of EFFORTS.

    Preprocessing keeps and holds out the same rows, because their ids or places in the files decide it.
    """
    spec = run.spec.dataset
    histogram, chunks = census.empty_histogram(), []
    with tempfile.TemporaryDirectory() as folder:
        for part, file in enumerate(sample.write(Path(folder), SHARDS)):
            table = pq.read_table(file, columns=list(encode.COLUMNS))
            for number, row in enumerate(table.to_pylist()):
                row_id = encode.row_identity(row["synth_id"], file.name, number)
                row_class = sampling.row_class(row["language"], row["exercise"])
                histogram[row_class, sampling.hash_bin(row_id)] += 1
            (batch,) = table.combine_chunks().to_batches()
            chunks.append(encode.make_chunk(part, file.name, 0, batch))
    bounds = spec.sampling
    thresholds = sampling.choose_thresholds(
        histogram, bounds.keep, bounds.memorization_max, bounds.non_english_max
    )
    context = encode.PreprocessContext(
        "", spec.conversation, spec.max_length, spec.valid_fraction, thresholds
    )
    conversation = dataset_settings(run)["conversation"]
    substitutions = [EffortSubstitution(conversation, effort) for effort in EFFORTS]
    return [
        [with_effort(ids_T, effort, learned) for effort in substitutions]
        for ids_T, learned in kept_documents(chunks, context)
    ]


def kept_documents(
    chunks: Sequence[encode.RowChunk], context: encode.PreprocessContext
) -> Iterator[tuple[NDArray[np.int32], int]]:
    """Each training document, and how many tokens before its end are learned."""
    for chunk in chunks:
        encoded = encode.encode_chunk(chunk, context)
        ends_D = np.cumsum(encoded.lengths_D3.sum(axis=1) + 1)
        documents = np.split(encoded.ids_T, ends_D[:-1])
        for ids_T, lengths_3, valid in zip(documents, encoded.lengths_D3, encoded.valid_D, strict=True):
            if not valid:
                yield ids_T, int(lengths_3[1:].sum())


def with_effort(ids_T: NDArray[np.int32], effort: EffortSubstitution, learned: int) -> TeacherDocument:
    """The document with the system message of another effort."""
    sent_T = effort.to_teacher(ids_T).astype(np.int64)
    return TeacherDocument(sent_T, np.arange(len(sent_T)) >= len(sent_T) - learned)


class ReducedVocabulary:
    """The W rows that training uses: the ids that occur, then GROUPS groups of the others, common to rare."""

    def __init__(self, documents: Sequence[Sequence[TeacherDocument]]) -> None:
        specials = np.array((END_OF_DOCUMENT, RETURN, CALL))
        occurring_U = np.unique(
            np.concatenate([*(one.ids_T for variants in documents for one in variants), specials])
        )
        self.known = len(occurring_U)
        self.size = self.known + GROUPS
        edges = np.geomspace(2 * PRIOR, VOCABULARY_SIZE, GROUPS)
        ids_V = np.arange(VOCABULARY_SIZE)
        self.row_V = self.known + np.searchsorted(edges[:-1], ids_V, side="right")
        self.row_V[occurring_U] = np.arange(self.known)
        self.ids_W = np.bincount(self.row_V, minlength=self.size)
        """Number of ids that each row stands for."""
        frequency_V = 1 / (ids_V + PRIOR)
        self.prior_W = np.bincount(self.row_V, frequency_V / frequency_V.sum(), self.size)


def train(documents: Sequence[Sequence[TeacherDocument]], folder: Path) -> None:
    """Train the teacher and write it to `folder`. `documents` has each document's variants, one an effort."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # its operations are small: with two threads it takes three times as long
    vocabulary, random = ReducedVocabulary(documents), np.random.default_rng(0)
    torch.manual_seed(0)
    changes = {"vocab_size": vocabulary.size, "pad_token_id": 0, "eos_token_id": None}
    model: Any = GptOssForCausalLM(GptOssConfig(**{**TINY, **changes}, dtype="float32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    log_ids_W = torch.from_numpy(np.log(vocabulary.ids_W)).float()
    prior_W = torch.from_numpy(vocabulary.prior_W).float()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        inputs, mask, targets = (torch.from_numpy(it) for it in sample_batch(documents, vocabulary, random))
        hidden = model.model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        learned_BT = targets >= 0
        logp_NW = (model.lm_head(hidden[learned_BT]) + log_ids_W).log_softmax(1)
        logp = logp_NW.gather(1, targets[learned_BT].unsqueeze(1)).mean()
        loss = -(1 - SMOOTHING) * logp - SMOOTHING * (logp_NW @ prior_W).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    whole: Any = GptOssForCausalLM(GptOssConfig(**TINY, dtype="float32"))
    state = model.state_dict()
    row_V = torch.from_numpy(vocabulary.row_V)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][row_V]
    whole.load_state_dict(state)
    whole.save_pretrained(folder)


def learning_rate(step: int) -> float:
    """The learning rate of a step, counted from 0."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
    return LEARNING_RATE * min(1, (step + 1) / WARMUP) * (0.05 + 0.95 * cosine)


def sample_batch(
    documents: Sequence[Sequence[TeacherDocument]], vocabulary: ReducedVocabulary, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Inputs, attention mask and targets (−1: none), each [DOCUMENTS, longest − 1]."""
    chosen = [
        documents[number][int(random.integers(len(EFFORTS)))]
        for number in random.choice(len(documents), DOCUMENTS, replace=False)
    ]
    shape = (len(chosen), max(len(one.ids_T) for one in chosen) - 1)
    inputs, mask, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    for row, one in enumerate(chosen):
        rows_T = vocabulary.row_V[one.ids_T]
        place = slice(0, len(rows_T) - 1)
        replaced_T = random.random(len(rows_T)) < np.where(one.learned_T, REPLACED, REPLACED / 2)
        other_T = vocabulary.known + random.integers(GROUPS, size=len(rows_T))
        inputs[row, place] = np.where(replaced_T, other_T, rows_T)[:-1]
        mask[row, place] = 1
        targets[row, place] = np.where(one.learned_T, rows_T, -1)[1:]
    return inputs, mask, targets


def main() -> None:
    argparse.ArgumentParser(prog="python -m demo.teacher", description="Train the teacher.").parse_args()
    started = time.monotonic()
    sys.stdout.write(f"{make_teacher()}\n{time.monotonic() - started:.0f} s.\n")


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    main()
