"""DistillRuns that must be refused, each by a name, and what is said of each: one table for both validators."""

from dataclasses import dataclass

from tests.fakes.valid_specs import DROP, FORCED, GATED, MINIMAL, ONPOLICY, RESCORED, Changes, phases
from vpmoe.api.stages import BUILT_IN_STEPS


@dataclass(frozen=True)
class Bad:
    """A change, the field that both validators name, and what both say of it."""

    changes: Changes
    field: str
    words: str
    server: str = ""
    """What the API server says where its schema's own check answers, in its own words, or names the field in its own way."""


BUILT_IN = {
    f"a stage called {name}": Bad(
        {"spec.stages.0.name": name},
        "spec.stages[0].name",
        f"{name} is the name of a built-in step. Choose another.",
    )
    for name in BUILT_IN_STEPS
}
TOKENS = 'must be a whole number of tokens, such as 1000000, "1_000_000", "500k", "20M" or "1.5B"'
DURATION = 'must be a duration such as "90s", "15m", "1h30m" or "7d"'
STAGE_NAME = (
    "must be at most 16 lowercase letters and digits, starting with a letter (it is part of pod names)"
)
RUN_NAME = "must be at most 30 lowercase letters, digits and hyphens, from a letter to a letter or digit (pod names start with it)"

BAD: dict[str, Bad] = {
    # What is missing, unknown or of the wrong type.
    "no source": Bad(
        {"spec.dataset.source": DROP},
        "spec.dataset.source",
        "is required",
        "spec.dataset.source: Required value",
    ),
    "no model": Bad(
        {"spec.teacher.model": DROP},
        "spec.teacher.model",
        "is required",
        "spec.teacher.model: Required value",
    ),
    "no bucket": Bad(
        {"spec.storage.bucket": DROP},
        "spec.storage.bucket",
        "is required",
        "spec.storage.bucket: Required value",
    ),
    "no stages": Bad({"spec.stages": DROP}, "spec.stages", "is required", "spec.stages: Required value"),
    "an empty list of stages": Bad(
        {"spec.stages": []}, "spec.stages", "must have at least 1 items", "should have at least 1 items"
    ),
    "a stage without a kind": Bad(
        {"spec.stages.0.kind": DROP},
        "spec.stages[0].kind",
        "is required",
        "spec.stages[0].kind: Required value",
    ),
    "a stage of an unknown kind": Bad(
        {"spec.stages.0.kind": "Magic"},
        "spec.stages[0].kind",
        '"Magic" must be one of Vanilla, Rescored, TeacherForced, OnPolicy',
        'spec.stages[0].kind: Unsupported value: "Magic": supported values: "Vanilla", "Rescored", "TeacherForced", "OnPolicy"',
    ),
    "an unknown field": Bad(
        {"spec.suspended": True}, "spec.suspended", "there is no such field", 'unknown field "spec.suspended"'
    ),
    "an unknown field of a stage": Bad(
        {"spec.stages.0.token": 1},
        "spec.stages[0].token",
        "there is no such field",
        'unknown field "spec.stages[0].token"',
    ),
    "a field in Python's spelling": Bad(
        {"spec.dataset.max_length": 512},
        "spec.dataset.max_length",
        "there is no such field",
        'unknown field "spec.dataset.max_length"',
    ),
    "a role that there is not": Bad(
        {"spec.runtime.resources": {"trainer": {}}},
        "spec.runtime.resources.trainer",
        "must be one of preprocess, rescore, train",
        'unknown field "spec.runtime.resources.trainer"',
    ),
    "a number as text": Bad(
        {"spec.training.optimizer.learningRate": "3e-4"},
        "spec.training.optimizer.learningRate",
        "must be a number",
        "spec.training.optimizer.learningRate in body must be of type number",
    ),
    "a fraction of a GPU": Bad(
        {"spec.student.gpus": 1.5},
        "spec.student.gpus",
        "must be a whole number",
        "spec.student.gpus in body must be of type integer",
    ),
    "a year that is a number": Bad(
        {"spec.dataset.conversation.knowledgeCutoff": 2024},
        "spec.dataset.conversation.knowledgeCutoff",
        "must be a string: quote it",
        "spec.dataset.conversation.knowledgeCutoff in body must be of type string",
    ),
    "suspend as text": Bad(
        {"spec.suspend": "yes"},
        "spec.suspend",
        "must be true or false",
        "spec.suspend in body must be of type boolean",
    ),
    "null for a part that is required": Bad(
        {"spec.teacher": None}, "spec.teacher", "null must be a mapping", "spec.teacher: Required value"
    ),
    # Bounds.
    "no GPU": Bad(
        {"spec.student.gpus": 0},
        "spec.student.gpus",
        "must be at least 1",
        "should be greater than or equal to 1",
    ),
    "a share above 1": Bad(
        {"spec.dataset.sampling.memorizationMax": 1.1},
        "spec.dataset.sampling.memorizationMax",
        "1.1 must be at most 1",
        "spec.dataset.sampling.memorizationMax in body should be less than or equal to 1",
    ),
    "everything held out": Bad(
        {"spec.dataset.validFraction": 1},
        "spec.dataset.validFraction",
        "must be less than 1",
        "should be less than 1",
    ),
    "a learning rate of nothing": Bad(
        {"spec.training.optimizer.learningRate": 0},
        "spec.training.optimizer.learningRate",
        "must be more than 0",
        "should be greater than 0",
    ),
    "more stages than a status holds": Bad(
        {"spec.stages": [{"name": f"s{i}", "kind": "Vanilla"} for i in range(9)]},
        "spec.stages",
        "may have at most 8 items",
        "spec.stages: Too many: 9: must have at most 8 items",
    ),
    # Texts.
    "a source that is a path": Bad(
        {"spec.dataset.source": "/data"},
        "spec.dataset.source",
        "must be s3://bucket/path/*.parquet, or hf://",
    ),
    "a source without a path": Bad(
        {"spec.dataset.source": "s3://corpora"}, "spec.dataset.source", "must be s3://bucket/path/*.parquet"
    ),
    "a model that is a name": Bad(
        {"spec.teacher.model": "gpt-oss-120b"},
        "spec.teacher.model",
        "must be s3://bucket/path of a Hugging Face",
    ),
    "weights in a folder": Bad(
        {"spec.student.init": "/weights"}, "spec.student.init", "must be s3://bucket/path"
    ),
    "a date in words": Bad(
        {"spec.dataset.conversation.date": "1 May"},
        "spec.dataset.conversation.date",
        "must be a day as a string",
    ),
    "a month of thirteen": Bad(
        {"spec.dataset.conversation.knowledgeCutoff": "2024-13"},
        "spec.dataset.conversation.knowledgeCutoff",
        "must be a month as a string",
    ),
    "an endpoint without a scheme": Bad(
        {"spec.storage.endpoint": "s3.example.com"}, "spec.storage.endpoint", "must be https://host or http"
    ),
    "a bucket in capitals": Bad(
        {"spec.storage.bucket": "Bucket"}, "spec.storage.bucket", "must be a bucket name"
    ),
    "a prefix that ends with a slash": Bad(
        {"spec.storage.prefix": "team/"}, "spec.storage.prefix", "without a slash at either end"
    ),
    "tokens in words": Bad({"spec.stages.0.tokens": "a lot"}, "spec.stages[0].tokens", TOKENS),
    "half a token": Bad({"spec.stages.0.tokens": "1.0005k"}, "spec.stages[0].tokens", TOKENS),
    "a suffix in small letters": Bad({"spec.stages.0.tokens": "1b"}, "spec.stages[0].tokens", TOKENS),
    "no tokens": Bad(
        {"spec.stages.0.tokens": 0}, "spec.stages[0].tokens", "must be from 1 to 1000000000000000 tokens"
    ),
    "tokens without end": Bad(
        {"spec.stages.0.tokens": "999999999999T"},
        "spec.stages[0].tokens",
        "must be from 1 to 1000000000000000 tokens",
    ),
    "tokens that are a fraction": Bad(
        {"spec.stages.0.tokens": 1.5},
        "spec.stages[0].tokens",
        TOKENS,
        "spec.stages[0].tokens in body must be of type integer,string",
    ),
    "a batch in words": Bad(
        {"spec.training.globalBatchTokens": "one"}, "spec.training.globalBatchTokens", TOKENS
    ),
    "a duration without a unit": Bad(
        {"spec.runtime.stalledAfter": "15"}, "spec.runtime.stalledAfter", DURATION
    ),
    "an empty duration": Bad({"spec.runtime.stalledAfter": ""}, "spec.runtime.stalledAfter", DURATION),
    "a duration in weeks": Bad({"spec.ttlAfterFinished": "1w"}, "spec.ttlAfterFinished", DURATION),
    "a quantity in words": Bad(
        {"spec.runtime.resources": {"train": {"limits": {"cpu": "lots"}}}},
        "spec.runtime.resources.train.limits.cpu",
        'must be a quantity such as 4, "500m" or "64Gi"',
        "spec.runtime.resources.train.limits[cpu]",
    ),
    # Names.
    "a run's name of 31 characters": Bad({"metadata.name": "a" * 31}, "metadata.name", RUN_NAME),
    "a run's name that starts with a digit": Bad({"metadata.name": "1st"}, "metadata.name", RUN_NAME),
    "a run's name with a dot": Bad({"metadata.name": "a.b"}, "metadata.name", RUN_NAME),
    "a stage's name with a hyphen": Bad({"spec.stages.0.name": "a-b"}, "spec.stages[0].name", STAGE_NAME),
    "a stage's name in capitals": Bad({"spec.stages.0.name": "First"}, "spec.stages[0].name", STAGE_NAME),
    "a stage's name of 17 characters": Bad(
        {"spec.stages.0.name": "a" * 17},
        "spec.stages[0].name",
        STAGE_NAME,
        "spec.stages[0].name: Too long: may not be more than 16 bytes",
    ),
    **BUILT_IN,
    "an on-policy stage called sampler": Bad(
        {"spec.stages": [{**ONPOLICY, "name": "sampler"}]},
        "spec.stages[0].name",
        "sampler is the name of a built-in step. Choose another.",
    ),
    "two stages of one name": Bad(
        {
            "spec.stages": [
                {"name": "a", "kind": "Vanilla"},
                {"name": "b", "kind": "Vanilla"},
                {"name": "a", "kind": "Rescored"},
            ]
        },
        "spec.stages",
        "two stages are called a. A stage's name is its folder in the bucket: give each its own.",
    ),
    # Fields of one kind in a stage of another.
    "mix in Vanilla": Bad(
        {"spec.stages.0.mix": 0.5},
        "spec.stages[0].mix",
        "is given, but only stages of kind Rescored have mix",
    ),
    "confidence in OnPolicy": Bad(
        {"spec.stages": [{**ONPOLICY, "confidence": {}}]},
        "spec.stages[0].confidence",
        "only stages of kind Rescored have confidence",
    ),
    "curriculum in Rescored": Bad(
        {"spec.stages": [{**RESCORED, "curriculum": phases(1)}]},
        "spec.stages[0].curriculum",
        "only stages of kind OnPolicy have curriculum",
    ),
    "loss in Vanilla": Bad(
        {"spec.stages.0.loss": {}},
        "spec.stages[0].loss",
        "is given, but only stages of kind TeacherForced have loss",
    ),
    # Sums and orders.
    "shares of phases below 1": Bad(
        {"spec.stages": [{**ONPOLICY, "curriculum": phases(0.5, 0.4)}]},
        "spec.stages[0].curriculum",
        "the shares of the phases add up to 0.9, not 1.",
    ),
    "shares of phases above 1": Bad(
        {"spec.stages": [{**ONPOLICY, "curriculum": phases(1, 1)}]},
        "spec.stages[0].curriculum",
        "the shares of the phases add up to 2, not 1.",
    ),
    "shares of efforts": Bad(
        {"spec.stages": [{**ONPOLICY, "curriculum": [{"share": 1, "effort": {"low": 0.1, "high": 0.2}}]}]},
        "spec.stages[0].curriculum[0].effort",
        "low, medium and high add up to 0.3, not 1.",
    ),
    "no phases": Bad(
        {"spec.stages": [{**ONPOLICY, "curriculum": []}]},
        "spec.stages[0].curriculum",
        "must have at least 1 items",
        "at least 1 items",
    ),
    "confidence upside down": Bad(
        {"spec.stages": [{**RESCORED, "confidence": {"min": 4, "max": 0.25}}]},
        "spec.stages[0].confidence",
        "min 4 is above max 0.25. Swap them.",
    ),
    "a least confidence above the default greatest": Bad(
        {"spec.stages": [{**RESCORED, "confidence": {"min": 4.5}}]},
        "spec.stages[0].confidence",
        "min 4.5 is above max 4. Swap them.",
    ),
    "confidence whose mean cannot be 1": Bad(
        {"spec.stages": [{**RESCORED, "confidence": {"min": 1.5}}]},
        "spec.stages[0].confidence",
        "1 does not lie between min 1.5 and max 4, and the mean weight is always 1.",
    ),
    "a loss without terms": Bad(
        {"spec.stages": [{**FORCED, "loss": {"ce": 0, "kl": 0, "hidden": 0}}]},
        "spec.stages[0].loss",
        "ce, kl and hidden are all 0",
    ),
    "a schedule that rises": Bad(
        {"spec.training.optimizer.learningRate": 1e-6},
        "spec.training.optimizer",
        "minLearningRate 1e-05 is above learningRate 1e-06.",
    ),
    "a stage's schedule that rises": Bad(
        {"spec.stages.0.optimizer": {"minLearningRate": 0.01}},
        "spec.stages",
        "stage first: minLearningRate 0.01 is above learningRate 0.0003.",
    ),
    "an on-policy peak below where the schedule ends": Bad(
        {"spec.training.optimizer.minLearningRate": 1e-4, "spec.stages": [ONPOLICY]},
        "spec.stages",
        "stage onpolicy: minLearningRate 0.0001 is above learningRate 2e-05. Lower the one or raise the other.",
    ),
    # Layouts that cannot run.
    "a document longer than the sequence": Bad(
        {"spec.dataset.maxLength": 8193},
        "spec.dataset.maxLength",
        "8193 is more than training.sequenceLength 8192",
    ),
    "experts that do not divide": Bad(
        {"spec.student.gpus": 6, "spec.student.expertParallel": 3},
        "spec.student.expertParallel",
        "3 does not divide the 256 experts of vpmoe-6b. Use 1, 2, 4, …, 256.",
    ),
    "experts that do not divide in tiny": Bad(
        {"spec.student": {"shape": "tiny", "gpus": 16, "expertParallel": 16}},
        "spec.student.expertParallel",
        "16 does not divide the 8 experts of tiny. Use 1, 2, 4, …, 8.",
    ),
    "ranks that are no multiple of the experts' parallelism": Bad(
        {"spec.student.expertParallel": 2},
        "spec.stages",
        "stage first: 7 ranks are not a multiple of student.expertParallel 2.",
    ),
    "a sampler that leaves an odd number of ranks": Bad(
        {
            "spec.student": {"gpus": 8, "expertParallel": 2},
            "spec.stages": [{**ONPOLICY, "sampler": {"gpus": 1}}],
        },
        "spec.stages",
        "stage onpolicy: 7 ranks are not a multiple of student.expertParallel 2.",
    ),
    "pods that do not divide the ranks": Bad(
        {"spec.student.gpusPerPod": 2},
        "spec.stages",
        "stage first: 7 GPUs do not divide into pods of 2. Let student.gpusPerPod divide the ranks of every stage.",
    ),
    "pods that do not divide what the sampler leaves": Bad(
        {
            "spec.student": {"gpus": 8, "gpusPerPod": 4},
            "spec.stages": [*MINIMAL["spec"]["stages"], {**ONPOLICY, "sampler": {"gpus": 2}}],
        },
        "spec.stages",
        "stage onpolicy: 6 GPUs do not divide into pods of 4.",
    ),
    "several pods in a Job": Bad(
        {"spec.student.gpusPerPod": 1, "spec.runtime.backend": "Job"},
        "spec.stages",
        "stage first: 7 GPUs in pods of 1 are several pods, and runtime.backend Job makes one. Use PyTorchJob.",
    ),
    "a sampler that takes every GPU": Bad(
        {"spec.stages": [{**ONPOLICY, "sampler": {"gpus": 7}}]},
        "spec.stages",
        "stage onpolicy: student.gpus 7 − sampler.gpus 7 leaves no GPU to train on. Lower sampler.gpus.",
    ),
    "a batch of less than a sequence a rank": Bad(
        {"spec.training.globalBatchTokens": "57343"},
        "spec.training.globalBatchTokens",
        "57343 is less than one sequence on every rank of stage first: 7 × 8192 = 57344.",
    ),
    "a gate before which nothing is trained": Bad(
        {"spec.stages": [GATED, RESCORED]},
        "spec.stages",
        "stage gated: require.validity 0.8 is about the student of the stage before, and there is none. Put one before it, or set "
        "require.validity to 0.",
    ),
    "a higher gate before which nothing is trained": Bad(
        {"spec.stages": [{**GATED, "require": {"validity": 0.95}}]},
        "spec.stages",
        "stage gated: require.validity 0.95 is about the student",
    ),
    "an empty gate before which nothing is trained": Bad(
        {"spec.stages": [{**GATED, "require": {}}]},
        "spec.stages",
        "stage gated: require.validity 0.8 is about the student",
    ),
    "a gate that nobody measures": Bad(
        {"spec.stages": [*MINIMAL["spec"]["stages"], GATED], "spec.evaluation.completions": 0},
        "spec.stages",
        "stage gated: require.validity 0.8 is not measured where evaluation.completions is 0. Raise that, or set require.validity to 0.",
    ),
    "an early end by what is not sampled": Bad(
        {"spec.stages": [{**MINIMAL["spec"]["stages"][0], "stop": {"minValidity": 0.9}}]},
        "spec.stages",
        "stop.minValidity is above 0, and a stage of kind Vanilla samples nothing to measure it. Set it to 0.",
    ),
    "an early end by what is not measured": Bad(
        {"spec.stages": [{**MINIMAL["spec"]["stages"][0], "stop": {}}], "spec.evaluation.documents": 0},
        "spec.stages",
        "stop looks at the held-out loss, and evaluation.documents is 0. Raise that, or leave stop out.",
    ),
    "no teacher where one is needed": Bad(
        {"spec.teacher.gpus": 0, "spec.stages": [*MINIMAL["spec"]["stages"], RESCORED]},
        "spec.teacher.gpus",
        "0 leaves no GPU for the teacher of stage rescored of kind Rescored. Only Vanilla stages do without.",
    ),
    "GPUs among the resources": Bad(
        {"spec.runtime.resources": {"train": {"limits": {"nvidia.com/gpu": 1}}}},
        "spec.runtime.resources.train",
        "nvidia.com/gpu is not set here: student.gpus, student.gpusPerPod, sampler.gpus and teacher.gpus say how many GPUs a pod has.",
    ),
}
