"""Which documents of a dataset the teacher scores. Pure: labels and lengths in, picked documents out.

The result depends on the dataset and on the stage's `subset` alone, so every worker computes the same. 80
million documents take 2.8 GB of memory and half a minute: 20 bytes per document, and 40 for each of the
largest group. rescore.py reads the labels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpmoe.api.stages import Subset
from vpmoe.data.dataset import UNKNOWN, clean_label

Label = tuple[str, str]
"""(language, exercise), each "unknown" if the document has none."""


@dataclass(frozen=True)
class DocumentLabels:
    """What picking needs to know of the D documents of a part, in the part's order."""

    labels: Sequence[Label]
    """The distinct labels of the part."""
    label_D: NDArray[np.unsignedinteger]
    """[D] index of each document's label in `labels`."""
    reasoning_D: NDArray[np.int32]
    """[D] reasoning tokens of each document."""
    assistant_D: NDArray[np.int32]
    """[D] supervised tokens of each document: reasoning and final."""


NO_DOCUMENTS = DocumentLabels([], np.empty(0, np.uint8), np.empty(0, np.int32), np.empty(0, np.int32))
"""Of a part without training documents."""


def document_labels(table: pa.Table) -> DocumentLabels:
    """From the columns language, exercise, reasoning and final of a part's documents.parquet."""
    (languages, language_D), (exercises, exercise_D) = (
        _distinct_labels(table[name].combine_chunks()) for name in ("language", "exercise")
    )
    both_D = language_D * len(exercises) + exercise_D
    occurring, label_D = np.unique(both_D, return_inverse=True)
    labels = [
        (languages[both // len(exercises)], exercises[both % len(exercises)]) for both in occurring.tolist()
    ]
    reasoning_D, final_D = (table[name].to_numpy() for name in ("reasoning", "final"))
    return DocumentLabels(
        labels, label_D.astype(np.min_scalar_type(len(labels))), reasoning_D, reasoning_D + final_D
    )


def _distinct_labels(column: pa.StringArray) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct languages or exercises of a column, and for each document the index of its own, [D]."""
    found = column.fill_null("").dictionary_encode()
    labels = [clean_label(label) or UNKNOWN for label in found.dictionary.to_pylist()]
    number = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    numbers = np.array([number[label] for label in labels], np.int64)
    return list(number), numbers[found.indices.to_numpy()]


def pick_documents(parts: Sequence[DocumentLabels], subset: Subset, seed: str) -> list[NDArray[np.bool_]]:
    """For each part, which of its documents are scored, [D] bool.

    `seed`: the dataset's id, used by prefer: none only.

    Always true, and each line has a test of the same name:
      the documents picked have at most min(tokens, fraction of all) assistant tokens;
      only listed exercises and languages are picked, if there are lists;
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
        ordered = members[np.argsort(rank_D[members], kind="stable")]  # ties by position in the dataset
        fits = np.cumsum(assistant_D[ordered], dtype=np.int64) <= share
        picked_D[ordered[fits]] = True
    return np.split(picked_D, np.cumsum([len(part.label_D) for part in parts])[:-1])


def is_eligible(label: Label, subset: Subset) -> bool:
    """Whether documents with this label may be picked."""
    language, exercise = label
    return (not subset.languages or language in subset.languages) and (
        not subset.exercises or exercise in subset.exercises
    )


def pick_order(part: DocumentLabels, subset: Subset, seed: str, place: int) -> NDArray[np.uint32]:
    """Sort keys of a part's documents, lowest first, [D]. `place`: index of the part in the dataset.

    Random keys are the generator's raw stream, which numpy guarantees not to change; its distributions may.
    """
    if subset.prefer == "longReasoning":
        return np.iinfo(np.int32).max - part.reasoning_D.astype(np.uint32)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=16).digest())
    return (np.random.PCG64(key).random_raw(len(part.reasoning_D)) >> np.uint64(32)).astype(np.uint32)


def share_budget(supply: Sequence[int], budget: int) -> list[int]:
    """The share of the budget of each group: equal shares; what a small group cannot use goes to the others
    (water-filling)."""
    given = [0] * len(supply)
    left = budget
    smallest_first = sorted(range(len(supply)), key=lambda group: (supply[group], group))
    for done, group in enumerate(smallest_first):
        given[group] = min(supply[group], left // (len(supply) - done))
        left -= given[group]
    return given
