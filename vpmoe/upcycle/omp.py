"""Orthogonal matching pursuit: vectors as sparse combinations of others.

Step by step, each vector takes the anchor whose direction has the largest product with what is left of it,
and all its coefficients are solved again by least squares (Pati, Rezaiifar & Krishnaprasad 1993; for
vocabularies arXiv 2506.06607).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ATOMS = 16
"""Anchors of a combination."""
BATCH = 512
"""Vectors that are combined at the same time; their products with all anchors are held."""
ENOUGH = 1e-3
"""A vector is done when what is left of it is shorter than this part of it."""


def combine(
    anchors: Tensor, table: Tensor, rows: Sequence[int], atoms: int
) -> tuple[list[list[int]], list[list[float]]]:
    """For each of the `rows` of `table` [V, D] at most `atoms` of the anchors [A, D], and their coefficients.

    A row of zeros has none. Computes on a GPU if there is one: atoms · rows · A · D multiplications, and the
    anchors and their squares of BATCH · atoms are in its memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    anchors = anchors.to(device, torch.float32)
    directions = torch.nn.functional.normalize(anchors, dim=1)
    chosen: list[list[int]] = []
    coefficients: list[list[float]] = []
    for start in range(0, len(rows), BATCH):
        index = torch.tensor(rows[start : start + BATCH])
        target = table[index].to(device, torch.float32)
        picks, weights, used = _pursue(anchors, directions, target, min(atoms, len(anchors)))
        for row, values, number in zip(picks.tolist(), weights.tolist(), used.tolist(), strict=True):
            chosen.append(row[:number])
            coefficients.append(values[:number])
    return chosen, coefficients


def _pursue(
    anchors: Tensor, directions: Tensor, target_bD: Tensor, atoms: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(anchors [b, K], coefficients [b, K], how many are used [b]) of a batch of vectors."""
    left_bD = target_bD
    size_b = target_bD.norm(dim=1)
    picks_bK = torch.empty((len(target_bD), 0), dtype=torch.int64, device=target_bD.device)
    weights_bK = torch.zeros((len(target_bD), atoms), device=target_bD.device)
    used_b = torch.zeros(len(target_bD), dtype=torch.int64, device=target_bD.device)
    for step in range(atoms):
        going_b = left_bD.norm(dim=1) > ENOUGH * size_b
        if not going_b.any():
            break
        product_bA = (left_bD @ directions.T).abs()
        product_bA.scatter_(1, picks_bK, -1.0)
        picks_bK = torch.cat([picks_bK, product_bA.argmax(1, keepdim=True)], 1)
        atoms_bKD = anchors[picks_bK]
        # The normal equations: what is left is orthogonal to the anchors taken, so the next is no sum of
        # them.
        exact_bKD = atoms_bKD.double()
        right_bK = torch.einsum("bkd,bd->bk", exact_bKD, target_bD.double())
        solved_bK = torch.linalg.solve(exact_bKD @ exact_bKD.mT, right_bK)
        weights_bK[going_b] = 0
        weights_bK[going_b, : step + 1] = solved_bK[going_b].float()
        used_b[going_b] = step + 1
        rest_bD = target_bD - torch.einsum("bk,bkd->bd", weights_bK[:, : step + 1], atoms_bKD)
        left_bD = torch.where(going_b.unsqueeze(1), rest_bD, left_bD)
    return picks_bK, weights_bK, used_b
