"""Make a student's weights from a dense model, as plan.py says.

Tensor by tensor: `Upcycling.tensor` reads the source tensors of one and returns it, so a writer holds one of
the student's at a time. The largest is the embeddings: of `vpmoe-6b` 0.8 GB, beside those of the source in
fp32. The same source, shape, seed and donor give the same bits on a CPU.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vpmoe.checkpoint.safetensors_header import (
    INDEX,
    SINGLE,
    InvalidCheckpoint,
    StoredTensor,
    read_folder,
    read_header,
    read_json_object,
)
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.model.initial import generator_for, initial_std, initial_vector, log_frequencies
from vpmoe.model.shapes import Shape
from vpmoe.upcycle.plan import TensorOrigin, UpcyclePlan, plan
from vpmoe.upcycle.source import COPY_AGAIN, EMBEDDING
from vpmoe.upcycle.source_tokenizer import FILE as TOKENIZER
from vpmoe.upcycle.source_tokenizer import load_source_tokenizer
from vpmoe.upcycle.vocabulary import VocabularyMap, map_vocabulary

CONFIG = "config.json"
DTYPES = ("BF16", "F16", "F32")
"""safetensors' names of the types that are read."""

NOISE = 0.02
"""Standard deviation of what is added to copies of units in experts, relative to the copied matrix' own:
several experts are copies of the same units, and must differ to become different."""

ROUTER_SPREAD = 0.1
"""Standard deviation of the router's logits at the start: scores are 0.5 ± 0.025, so that the selection
biases, which move by 0.001 a step, even out the experts' load within a few dozen steps."""


@dataclass(frozen=True, eq=False)
class SourceFolder:
    """A dense model in a local folder, in one or several safetensors files."""

    folder: Path
    config: dict[str, Any]
    stored: dict[str, StoredTensor]

    def read(self, name: str) -> Tensor:
        """A tensor, in fp32."""
        with safe_open(self.folder / self.stored[name].file, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.float()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, as vpmoe.upcycle.plan.plan takes them."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    def hashes(self, also: tuple[str, ...] = ()) -> dict[str, str]:
        """sha256 of each file that is read, by name."""
        names = sorted({tensor.file for tensor in self.stored.values()} | {CONFIG, *also})
        return {name: _sha256(self.folder / name) for name in names}


def open_folder(folder: Path) -> SourceFolder:
    """The model in `folder`, from its config.json and headers.

    Raises Permanent, naming the file or the tensor, if it is no whole checkpoint, or has another type than
    bfloat16, float16 and float32.
    """
    try:
        found = SourceFolder(folder, read_json_object(folder / CONFIG), read_folder(folder))
    except InvalidCheckpoint as error:
        raise Permanent(f"{folder}: {error} {COPY_AGAIN}") from error
    for name, tensor in found.stored.items():
        if tensor.dtype not in DTYPES:
            raise Permanent(
                f"{folder}: {name} is {tensor.dtype}, expected {', '.join(DTYPES)}. Use the weights that "
                "were not quantized."
            )
    return found


def plan_folder(source: SourceFolder, shape: Shape) -> UpcyclePlan:
    """The plan for a folder. Raises Permanent, with the folder's name, as `plan` does."""
    try:
        return plan(source.config, source.shapes(), shape)
    except Permanent as error:
        raise Permanent(f"{source.folder}: {error}") from error


@dataclass(frozen=True, eq=False)
class Upcycling:
    """A source, its plan and its vocabulary: everything that decides the student's weights."""

    source: SourceFolder
    plan: UpcyclePlan
    vocabulary: VocabularyMap
    seed: int
    donor: SourceFolder | None

    def table(self) -> list[str]:
        """The plan and the origin of the vocabulary's rows as lines of text."""
        return [*self.plan.table(), *self.vocabulary.table()]

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the student by its name in the trainer's checkpoint."""
        return {name: origin.size for name, origin in self.plan.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor of the student, fp32 and contiguous, of the shape that `sizes` says.

        Raises OSError if a file of the source cannot be read.
        """
        origin = self.plan.tensors[name]
        made = self._make(name.removeprefix("main/").removeprefix("buffer/"), origin)
        assert made.shape == origin.size and made.dtype == torch.float32, name
        return made.contiguous()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one after the other."""
        for name in self.plan.tensors:
            yield name, self.tensor(name)

    def facts(self) -> dict[str, Any]:
        """What a manifest says: source, files, mapping, vocabulary. JSON. Reads all of the source for its
        hashes."""
        shape = self.plan.shape
        found = {
            "source": {
                "modelType": self.plan.source.model_type,
                "files": self.source.hashes((TOKENIZER,)),
            },
            "seed": self.seed,
            "shape": shape.name,
            "parts": shape.parts,
            **self.plan.as_json(),
            "vocabulary": self.vocabulary.as_json(),
        }
        if self.donor is not None:
            found["donor"] = {"files": self.donor.hashes()}
        return found

    def _make(self, name: str, origin: TensorOrigin) -> Tensor:
        shape, read = self.plan.shape, self.source.read
        if origin.value is not None:
            return torch.full(origin.size, origin.value)
        if name == "embedding.weight":
            return self.vocabulary.embeddings(read(origin.sources[0]), self.seed)
        if name == "output":
            return self.vocabulary.outputs(read(origin.sources[0]), self.seed)
        if name == "log_frequency":
            base = self.plan.source.rope_theta if origin.method == "copied" else shape.rope_base
            return log_frequencies(shape.head_width, base).float()
        if name.endswith("router.weight"):
            return self._router(name, origin)
        if origin.method == "drawn":
            return self._normal(name, origin.size, initial_std(name, shape))
        if origin.method == "neutral":
            return torch.full(origin.size, initial_vector(name))
        if name.endswith("linear_qkv.weight"):
            query, key, value = (read(one) for one in origin.sources)
            return join_qkv(*pool_qkv(query, key, value, shape), shape)
        if name.endswith("linear_proj.weight"):
            return pool_projection(read(origin.sources[0]), shape)
        if origin.method == "chosen":
            return self._units(name, origin)
        return read(origin.sources[0])

    def _router(self, name: str, origin: TensorOrigin) -> Tensor:
        """Drawn such that logits have the deviation ROUTER_SPREAD: its input is a normalised hidden state
        times the norm's weight."""
        return self._normal(
            name, origin.size, ROUTER_SPREAD / float(self.source.read(origin.sources[0]).norm())
        )

    def _units(self, name: str, origin: TensorOrigin) -> Tensor:
        """One of the two matrices of a feed-forward layer or of the experts."""
        shape, read = self.plan.shape, self.source.read
        down = read(origin.sources[-1])
        order = by_importance(down)
        up = name.endswith((".up", "fc1.weight"))
        matrix = read(origin.sources[0]) if up else down.T  # a unit is a row
        if name.endswith((".experts.up", ".experts.down")):
            copies = matrix[expert_units(order, shape)]
            if not up:
                copies = copies * (shape.experts_per_token / shape.routed_scaling)
            noisy = copies + self._normal(name, tuple(copies.shape), NOISE * float(matrix.std()))
            return noisy if up else noisy.transpose(1, 2)
        taken = order[: origin.size[0 if up else 1]]
        if up:
            made = self._normal(name, origin.size, initial_std(name, shape))
            made[: len(taken)] = matrix[taken]
            return made
        made = torch.zeros(origin.size)
        made[:, : len(taken)] = matrix[taken].T * math.sqrt(len(order) / len(taken))
        return made

    def _normal(self, name: str, size: tuple[int, ...], std: float) -> Tensor:
        return torch.empty(size).normal_(
            0, std, generator=generator_for(name, self.seed, torch.device("cpu"))
        )


def by_importance(down: Tensor) -> Tensor:
    """The units of a feed-forward layer, those with the largest columns of the down projection [H, units]
    first."""
    return torch.argsort(torch.linalg.vector_norm(down, dim=0), descending=True, stable=True)


def expert_units(order: Tensor, shape: Shape) -> Tensor:
    """The units of each expert [E, W]: those that the shared expert has not, over and over; of a source
    without more units than the shared expert, the same ones."""
    pool = order[shape.shared_width :] if len(order) > shape.shared_width else order
    return pool[torch.arange(shape.experts * shape.expert_width) % len(pool)].view(shape.experts, -1)


def pool_qkv(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """The projections with the student's number of heads: means over consecutive heads. Each [heads · D, H].

    The queries of a pool have keys of one pool: head i of n has key-value head ⌊i · groups / n⌋ in both
    models.
    """

    def pool(matrix: Tensor, heads: int) -> Tensor:
        by_head = matrix.view(heads, -1, shape.head_width, matrix.shape[1])
        return by_head.mean(1).flatten(0, 1) if by_head.shape[1] > 1 else matrix

    return pool(query, shape.heads), pool(key, shape.kv_heads), pool(value, shape.kv_heads)


def join_qkv(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
    """The trainer's matrix: for each key-value head the rows of its queries, of its key, of its value."""
    parts = [matrix.view(shape.kv_heads, -1, matrix.shape[1]) for matrix in (query, key, value)]
    return torch.cat(parts, 1).flatten(0, 1)


def pool_projection(matrix: Tensor, shape: Shape) -> Tensor:
    """The output projection [H, heads · D] for pooled heads: the columns of a pool are summed, since the
    pool's one output takes the place of each."""
    by_head = matrix.view(len(matrix), shape.heads, -1, shape.head_width)
    return by_head.sum(2).flatten(1) if by_head.shape[2] > 1 else matrix


def prepare(source: Path, shape: Shape, seed: int, donor: Path | None = None) -> Upcycling:
    """Everything that is decided before weights are made: the plan, and how the vocabulary is mapped.

    `source` and `donor` are local folders. `donor`: a model with the student's vocabulary, of which only the
    embeddings are read (vocabulary.py); None: tokens that the source has not are made of their pieces. Raises
    Permanent, naming the folder, and the field, file or tensor, if one cannot be used.
    """
    folder = open_folder(source)
    decided = plan_folder(folder, shape)
    tokenizer = load_source_tokenizer(source, decided.source.vocabulary)
    found = None if donor is None else open_donor(donor)
    table = None if found is None else found.read(EMBEDDING)
    return Upcycling(folder, decided, map_vocabulary(tokenizer, shape.vocabulary, table), seed, found)


def open_donor(folder: Path) -> SourceFolder:
    """The embeddings of a model with the student's vocabulary; its other files need not be there.

    Raises Permanent if they are missing, of another type, or have not as many rows as the vocabulary.
    """
    try:
        config = read_json_object(folder / CONFIG)
        index = folder / INDEX
        weight_map = read_json_object(index).get("weight_map", {}) if index.is_file() else {}
        stored = read_header(folder / weight_map.get(EMBEDDING, SINGLE))
    except (InvalidCheckpoint, OSError) as error:
        raise Permanent(f"{folder}: {error} {COPY_AGAIN}") from error
    tensor = stored.get(EMBEDDING)
    if tensor is None or tensor.dtype not in DTYPES or tensor.shape[0] != VOCABULARY_SIZE:
        found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise Permanent(
            f"{folder}: {EMBEDDING} is {found}, expected {', '.join(DTYPES)} with {VOCABULARY_SIZE:,} rows. "
            "Use a donor with the student's vocabulary, such as GPT-OSS."
        )
    return SourceFolder(folder, config, {EMBEDDING: tensor})


def upcycle(
    source: Path, shape: Shape, seed: int, donor: Path | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a student made from the model in `source`, and the facts for a manifest.

    Weights are fp32, by their names in the trainer's checkpoint ("main/…", "buffer/…"); they are all in
    memory, 24 GB of `vpmoe-6b`: `prepare` and `Upcycling.tensors` give one at a time. Raises as `prepare`
    does.
    """
    made = prepare(source, shape, seed, donor)
    return dict(made.tensors()), made.facts()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
