"""Which documents of a data set the teacher scores. Pure: the documents' labels and lengths in, the chosen ones out.

A function of the data set and of the stage's `subset` alone, so each worker works it out for itself and all agree. 80 million documents
take 2.8 GB of memory and half a minute: 20 bytes a document, and 40 for each of the largest group. Reading the labels is rescore.py's
business.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpmoe.api.stages import Subset
from vpmoe.data.dataset import UNKNOWN

Label = tuple[str, str]
"""(language, exercise); a document without one has the value "unknown" there."""


@dataclass(frozen=True)
class DocumentLabels:
    """One part's documents, D in the part's order, as far as picking looks at them."""

    labels: Sequence[Label]
    """The labels that occur in the part, each once."""
    label_D: NDArray[np.unsignedinteger]
    """Which of them each document has."""
    reasoning_D: NDArray[np.int32]
    """Reasoning tokens of each document."""
    assistant_D: NDArray[np.int32]
    """Supervised tokens of each document: reasoning and final."""


def document_labels(table: pa.Table) -> DocumentLabels:
    """What picking looks at, from the columns language, exercise, reasoning and final of a part's documents.parquet."""
    language, exercise = (
        table[name].combine_chunks().fill_null(UNKNOWN).dictionary_encode()
        for name in ("language", "exercise")
    )
    languages, exercises = language.dictionary.to_pylist(), exercise.dictionary.to_pylist()
    both_D = language.indices.to_numpy().astype(np.int64) * len(exercises) + exercise.indices.to_numpy()
    occurring, label_D = np.unique(both_D, return_inverse=True)
    labels = [
        (languages[both // len(exercises)], exercises[both % len(exercises)]) for both in occurring.tolist()
    ]
    reasoning_D, final_D = (table[name].to_numpy() for name in ("reasoning", "final"))
    return DocumentLabels(
        labels, label_D.astype(np.min_scalar_type(len(labels))), reasoning_D, reasoning_D + final_D
    )


def pick_documents(parts: Sequence[DocumentLabels], subset: Subset, seed: str) -> list[NDArray[np.bool_]]:
    """For each part, which of its documents are scored, [D] bool. `seed` is the data set's id; only prefer: none looks at it.

    Always true, and each line has a test of the same name:
      the documents picked have at most min(tokens, fraction of all) assistant tokens;
      only listed exercises and languages are picked, where there are lists;
      no group gets more than its share while another has less and wants more;
      a document is picked only if all before it in its group's order are.
    """
    everything = sum(int(part.assistant_D.sum(dtype=np.int64)) for part in parts)
    budget = min(subset.tokens, int(subset.fraction * everything))
    groups = sorted({label for part in parts for label in part.labels if is_eligible(label, subset)})
    number = {label: group for group, label in enumerate(groups)}
    nowhere = len(groups)
    kind = np.min_scalar_type(nowhere)
    groups_of = [
        np.array([number.get(label, nowhere) for label in part.labels], kind)[part.label_D] for part in parts
    ]
    supply = np.zeros(nowhere + 1)  # sums below 2^53, so exact
    for of_D, part in zip(groups_of, parts, strict=True):
        supply += np.bincount(of_D, part.assistant_D, nowhere + 1)
    group_D = np.concatenate(groups_of)
    assistant_D = np.concatenate([part.assistant_D for part in parts])
    rank_D = np.concatenate([pick_order(part, subset, seed, place) for place, part in enumerate(parts)])
    picked_D = np.zeros(len(group_D), np.bool_)
    for group, share in enumerate(share_budget([int(tokens) for tokens in supply[:nowhere]], budget)):
        members = np.flatnonzero(group_D == group)
        ordered = members[np.argsort(rank_D[members], kind="stable")]  # ties by place in the data set
        fits = np.cumsum(assistant_D[ordered], dtype=np.int64) <= share
        picked_D[ordered[fits]] = True
    return np.split(picked_D, np.cumsum([len(part.label_D) for part in parts])[:-1])


def is_eligible(label: Label, subset: Subset) -> bool:
    """Whether documents of this label may be picked."""
    language, exercise = label
    return (not subset.languages or language in subset.languages) and (
        not subset.exercises or exercise in subset.exercises
    )


def pick_order(part: DocumentLabels, subset: Subset, seed: str, place: int) -> NDArray[np.uint32]:
    """What a part's documents are ordered by, lowest first, [D]. `place` is the part's place in the data set.

    numpy promises that a bit generator's raw stream never changes, which it does not of its distributions.
    """
    if subset.prefer == "longReasoning":
        return np.iinfo(np.int32).max - part.reasoning_D.astype(np.uint32)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=16).digest())
    return (np.random.PCG64(key).random_raw(len(part.reasoning_D)) >> np.uint64(32)).astype(np.uint32)


def share_budget(supply: Sequence[int], budget: int) -> list[int]:
    """How much of the budget each group gets: the same for all, and what a small group cannot use goes to the others (water-filling)."""
    given = [0] * len(supply)
    left = budget
    smallest_first = sorted(range(len(supply)), key=lambda group: (supply[group], group))
    for done, group in enumerate(smallest_first):
        given[group] = min(supply[group], left // (len(supply) - done))
        left -= given[group]
    return given
