"""Tiny students in which every part affects the output, and their publication as policy versions."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vpmoe.api import DistillRun
from vpmoe.data import vocabulary_file
from vpmoe.data.dataset import dataset_input, load_dataset
from vpmoe.data.vocabulary import CALL, CHANNEL, END, MESSAGE, RETURN
from vpmoe.model import hf_export, state
from vpmoe.model.batch import Batch
from vpmoe.model.head import target_logp
from vpmoe.model.learner import Learner
from vpmoe.model.router import Router
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.model.student import Student
from vpmoe.provenance import Provenance
from vpmoe.rollout import policy_version
from vpmoe.rollout.policy_version import PolicyVersion
from vpmoe.rollout.version_volume import VersionVolume
from vpmoe.storage import Bucket, Subject, manifest, paths
from vpmoe.storage.blocks import hash_files
from vpmoe.storage.manifest import Manifest
from vpmoe.trainer.onpolicy.publisher import compute_probe

TINY = SHAPES["tiny"]
COMPLETE_TINY = replace(TINY, name="complete-tiny", router_bias=True)
"""`tiny` with the part that it lacks too, the router's bias."""
COMPLETE_WIDE = replace(SHAPES["vpmoe-6b"], name="complete-wide", layers=8)
"""The first 8 layers of vpmoe-6b, of which two are global."""
ANALYSIS, FINAL = (vocabulary_file.encoding().encode_ordinary(name)[0] for name in ("analysis", "final"))
Ids = NDArray[np.int32]


def learner(device: torch.device, seed: int, shape: Shape = TINY) -> Learner:
    """A tiny student in which every part affects the output: no norm is 1, biases are not 0 and change the
    routing, and frequencies have moved."""
    torch.manual_seed(seed)
    built = Learner.build(shape, device, sequence_length=4096, seed=1234, weight_decay=0.1, gradient_clip=1.0)
    with torch.no_grad():
        for name, parameter in built.student.named_parameters():
            if name == "log_frequency":
                parameter.add_(torch.randn_like(parameter))
                continue
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
                continue
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(
                std=0.3 if name == "embedding.weight" else 0.15
            )
        for name, buffer in built.student.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(std=0.2)
    return built


def export(folder: Path, learner: Learner) -> Path:
    """Export the student's checkpoint in float32."""
    hf_export.export_student(
        folder, learner.student.shape, 4096, state.sizes(learner), state.copy_weights(learner), torch.float32
    )
    return folder


def trainer_logp(learner: Learner, sequences: Sequence[Ids]) -> list[NDArray[np.float32]]:
    """As student_logp, of the student that the learner trains."""
    return student_logp(learner.student, sequences)


@torch.no_grad()
def student_logp(student: Student, sequences: Sequence[Ids]) -> list[NDArray[np.float32]]:
    """The trainer's log-probabilities of each sequence's ids given those before, [T − 1] each. All sequences
    are packed into one row."""
    ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64))[None]
    lengths = [len(ids_T) for ids_T in sequences]
    number = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(lengths))[None]
    batch = Batch.from_rows(ids, torch.ones_like(ids, dtype=torch.uint8), number.int())
    batch = batch.to(student.output.device)
    logp = target_logp(student(batch), student.output, batch.target)
    return [part[:-1].cpu().numpy() for part in logp.split(lengths)]


def is_a_tie(learner: Learner, ids_T: Ids, tolerance: float) -> bool:
    """Whether two experts are as good as equal at a position, so that another order of sums may choose the
    other: changes of 10⁻⁵ in the routers' logits move a log-probability by more than `tolerance` nats."""
    expected = trainer_logp(learner, [ids_T])[0]
    gating = Router.gating
    generator = torch.Generator().manual_seed(0)  # on the CPU, as the students of tests without a GPU

    def shaken(router: Router, input: torch.Tensor) -> torch.Tensor:
        logits = gating(router, input)
        return logits + 1e-5 * torch.randn(logits.shape, generator=generator)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(Router, "gating", shaken)
        return any(np.abs(trainer_logp(learner, [ids_T])[0] - expected).max() > tolerance for _ in range(12))


def end_early(learner: Learner) -> Learner:
    """The same student, changed so that most completions end after about ten tokens: one component of the
    hidden state is always large, no layer writes to it, and it favours the tokens that end messages."""
    writing = [f"{part}.{kind}" for part in ("linear_proj", "linear_fc2") for kind in ("weight", "bias")]
    with torch.no_grad():
        for name, parameter in learner.student.named_parameters():
            if name.endswith(tuple(writing)):
                parameter[0] = 0.0
            elif name.endswith(("experts.down", "experts.down_bias")):
                parameter.view(TINY.experts, TINY.hidden, -1)[:, 0] = 0.0
            elif name == "decoder.final_layernorm.weight":
                parameter[0] = 1.0
        learner.student.embedding.weight[:, 0] = 100.0
        learner.student.output[:, 0] = 0.0
        for token, logit in (
            (RETURN, 1.3),
            (CALL, 1.25),
            (END, 1.3),
            (CHANNEL, 1.3),
            (MESSAGE, 1.3),
            (ANALYSIS, 1.3),
            (FINAL, 1.3),
        ):
            learner.student.output[token] = 0.0
            learner.student.output[token, 0] = logit
    return learner


def publish(
    bucket: Bucket,
    run: DistillRun,
    folder: Path,
    learner: Learner,
    number: int,
    tokens: int,
    *,
    first_prompt: int = 0,
    other_facts: PolicyVersion | None = None,
) -> Manifest:
    """Publish the student in `folder` as a version, as the trainer does.

    `other_facts` are published instead of the student's facts.
    """
    facts = other_facts or version_facts(learner, number, tokens, first_prompt)
    key = paths.weights(run, "onpolicy", number)
    subjects = [
        bucket.put_file(f"{key}/{file.name}", file, {}).subject(key) for file in sorted(folder.iterdir())
    ]
    made = version_statement(bucket, run, facts, subjects)
    return manifest.write(bucket, paths.manifest(key), made)


def write_to_volume(
    volume: VersionVolume, bucket: Bucket, run: DistillRun, folder: Path, facts: PolicyVersion
) -> Path:
    """Write the student in `folder` to a volume, as the trainer does before it publishes it. Returns its
    folder there."""
    key = paths.weights(run, "onpolicy", facts.version)
    with volume.new_version() as new:
        for file in folder.iterdir():
            shutil.copy(file, new)
        files = {f"{key}/{file.name}": file for file in sorted(new.iterdir())}
        subjects = [stored.subject(key) for stored in hash_files(files, 2)]
        return volume.add(new, facts.version, version_statement(bucket, run, facts, subjects))


def version_facts(learner: Learner, number: int, tokens: int, first_prompt: int = 0) -> PolicyVersion:
    """The facts of a version that is this student."""
    ids = [
        tuple(np.random.default_rng(length).integers(0, TINY.vocabulary, length).tolist())
        for length in (5, 40, 64)
    ]
    return PolicyVersion(
        version=number,
        steps=number,
        tokens=tokens,
        iteration=number,
        first_sequence=0,
        first_prompt=first_prompt,
        probe=compute_probe(learner, [np.array(ids_T, np.int32) for ids_T in ids]),
    )


def version_statement(
    bucket: Bucket, run: DistillRun, facts: PolicyVersion, subjects: Sequence[Subject]
) -> dict[str, Any]:
    """The manifest of a version of the run."""
    dataset = load_dataset(run, bucket)
    provenance = Provenance(
        None,
        None,
        run.config_hash,
        "default",
        run.metadata.name,
        run.uid8,
        "onpolicy",
        1,
        "2026-01-01T00:00:00Z",
    )
    inputs = [dataset.inputs["tokenizer"], dataset_input(bucket, dataset)]
    return manifest.statement(policy_version.KIND, subjects, facts.dump(), provenance, inputs)
