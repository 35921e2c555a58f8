"""Valid DistillRuns by name: one table for both validators. Invalid ones are in invalid_specs.py.

A case is a set of changes to MINIMAL. A change is a dotted path from the root (list items by number) and the
new value; DROP removes the field.
"""

import copy
from typing import Any

DROP = object()

MINIMAL: dict[str, Any] = {
    "apiVersion": "vpmoe.dev/v1alpha1",
    "kind": "DistillRun",
    "metadata": {"name": "minimal"},
    "spec": {
        "dataset": {"source": "s3://corpora/synth/*.parquet"},
        "teacher": {"model": "s3://models/gpt-oss-120b"},
        "storage": {"bucket": "vpmoe"},
        "stages": [{"name": "first", "kind": "Vanilla"}],
    },
}
RESCORED = {"name": "rescored", "kind": "Rescored"}
FORCED = {"name": "forced", "kind": "TeacherForced"}
ONPOLICY = {"name": "onpolicy", "kind": "OnPolicy", "require": {"validity": 0}}
"""A stage that can be the first, because it requires no evaluation."""
GATED = {"name": "gated", "kind": "OnPolicy"}
"""A stage that requires an evaluation of the stage before."""


def phases(*shares: float) -> list[dict[str, Any]]:
    """A curriculum with these shares, all at low effort."""
    return [{"share": share, "effort": {"low": 1}} for share in shares]


Changes = dict[str, Any]

VALID: dict[str, Changes] = {
    "required fields only": {},
    "stages of all kinds": {"spec.stages": [*MINIMAL["spec"]["stages"], RESCORED, FORCED, ONPOLICY]},
    "token counts as numbers": {
        "spec.training.globalBatchTokens": 1_000_000,
        "spec.stages.0.tokens": 1_000_000_000,
    },
    "token counts as text": {"spec.training.globalBatchTokens": "1_000_000", "spec.stages.0.tokens": "1.5B"},
    "token counts with every suffix": {
        "spec.training.globalBatchTokens": "100k",
        "spec.stages.0.tokens": "0.5T",
        "spec.evaluation.everyTokens": "123.456K",
        "spec.training.checkpoint.everyTokens": "0.000001M",
    },
    "no warm-up": {"spec.training.optimizer.warmupTokens": 0},
    "warm-up and checkpoints longer than the stage": {
        "spec.stages.0.tokens": "1M",
        "spec.training.optimizer.warmupTokens": "1B",
        "spec.training.checkpoint.everyTokens": "1B",
    },
    "null where null means none": {
        "spec.student.init": None,
        "spec.student.gpusPerPod": None,
        "spec.evaluation.canary": None,
        "spec.resumeFrom": None,
        "spec.storage.endpoint": None,
        "spec.storage.credentialsSecret": None,
        "spec.storage.caSecret": None,
        "spec.ttlAfterFinished": None,
        "spec.stages.0.stop": None,
    },
    "short sequences, to which the default of maxLength is lowered": {"spec.training.sequenceLength": 512},
    "a batch of exactly one sequence a rank": {"spec.training.globalBatchTokens": 7 * 8192},
    "pods that divide the ranks": {"spec.student.gpus": 8, "spec.student.gpusPerPod": 4},
    "pods no smaller than the ranks": {"spec.student.gpusPerPod": 8},
    "one GPU a pod, with a sampler": {"spec.student.gpusPerPod": 1, "spec.stages": [ONPOLICY]},
    "expert parallelism that divides experts and ranks": {
        "spec.student.gpus": 8,
        "spec.student.expertParallel": 4,
    },
    "a plain Job on one node": {"spec.runtime.backend": "Job"},
    "no teacher for Vanilla": {"spec.teacher.gpus": 0},
    "a Hugging Face dataset": {"spec.dataset.source": "hf://PleIAs/SYNTH@0123abc"},
    "a stage that changes part of the optimizer": {
        "spec.stages.0.optimizer": {"learningRate": 0.001, "warmupTokens": "1k"}
    },
    "an on-policy peak equal to minLearningRate": {
        "spec.training.optimizer": {"learningRate": 1e-3, "minLearningRate": 2e-5},
        "spec.stages": [ONPOLICY],
    },
    "early stop with its defaults": {"spec.stages.0.stop": {}},
    "a part of each object of each kind": {
        "spec.stages": [
            {**RESCORED, "subset": {"fraction": 1}, "confidence": {"max": 8}, "mix": 1},
            {**FORCED, "loss": {"ce": 0}},
            {
                **ONPOLICY,
                "rollout": {"maxTokens": {"high": 8192}},
                "sampler": {},
                "require": {},
                "staleness": 0,
            },
        ],
    },
    "no gate before on-policy training": {"spec.stages": [ONPOLICY], "spec.evaluation.completions": 0},
    "a gate after another stage": {"spec.stages": [ONPOLICY, GATED]},
    "a low gate": {
        "spec.stages": [RESCORED, {**GATED, "require": {"validity": 0.01}}],
        "spec.evaluation.completions": 1,
    },
    "shares that are not exact in binary": {
        "spec.stages": [{**ONPOLICY, "curriculum": phases(*[0.1] * 7, 0.3)}]
    },
    "confidence weights that are all 1": {"spec.stages": [{**RESCORED, "confidence": {"min": 1, "max": 1}}]},
    "resources by role": {
        "spec.runtime.resources": {
            "train": {"requests": {"cpu": 4, "memory": "64Gi"}, "limits": {"memory": "128Gi", "rdma/hca": 1}},
            "preprocess": {"requests": {"cpu": "500m", "ephemeral-storage": "1e9"}},
        },
    },
    "scheduling of pods": {
        "spec.runtime.nodeSelector": {"vpmoe.dev/pool": "h200"},
        "spec.runtime.tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "spec.runtime.imagePullSecrets": [{"name": "registry"}],
    },
    "durations": {"spec.runtime.stalledAfter": "1h30m", "spec.ttlAfterFinished": "7d"},
    "a name of thirty characters": {"metadata.name": "a" + "-" * 28 + "z"},
    "a stage's name of sixteen": {"spec.stages.0.name": "a123456789012345"},
    "labels and annotations": {"metadata.labels": {"team": "a"}, "metadata.annotations": {"note": "é"}},
    "another conversation": {
        "spec.dataset.conversation": {
            "identity": "Ты — vpMoE.",
            "knowledgeCutoff": "2025-12",
            "date": "2025-12-31",
            "effort": "low",
        },
    },
    "a conversation without a date": {"spec.dataset.conversation.date": None},
}


def manifest(changes: Changes, name: str | None = None) -> dict[str, Any]:
    """MINIMAL with these changes, named `name` unless the changes set a name."""
    made = copy.deepcopy(MINIMAL)
    made["metadata"]["name"] = name or made["metadata"]["name"]
    for path, value in changes.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        place: Any = made
        for part in parents:
            place = place[part] if isinstance(part, int) else place.setdefault(part, {})
        if value is DROP:
            del place[last]
        else:
            place[last] = copy.deepcopy(value)
    return made
