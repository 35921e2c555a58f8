"""Invalid DistillRuns by name, each with the expected message: one table for both validators."""

from dataclasses import dataclass
from typing import Any

from tests.fakes.valid_specs import DROP, FORCED, GATED, MINIMAL, ONPOLICY, RESCORED, Changes, phases
from vpmoe.api.stages import BUILT_IN_STEPS


@dataclass(frozen=True)
class InvalidSpec:
    """A change to a valid run, and the field and the message that both validators must report."""

    changes: Changes
    field: str
    message: str
    """Part of the message."""
    server: str = ""
    """Part of the API server's message, if it differs: schema checks have their own wording."""


BUILT_IN = {
    f"a stage called {name}": InvalidSpec(
        {"spec.stages.0.name": name},
        "spec.stages[0].name",
        f"{name} is the name of a built-in step. Choose another name.",
    )
    for name in BUILT_IN_STEPS
}
TOKENS = 'must be a whole number of tokens, such as 1000000, "1_000_000", "500k", "20M" or "1.5B"'
DURATION = 'must be a duration such as "90s", "15m", "1h30m" or "7d"'
STAGE_NAME = (
    "must be at most 16 lowercase letters and digits, starting with a letter (it is part of pod names)"
)
RUN_NAME = (
    "must be at most 30 lowercase letters, digits and hyphens, from a letter to a letter or digit (pod names "
    "start with it)"
)

INVALID: dict[str, InvalidSpec] = {
    # Missing fields, unknown fields and wrong types.
    "no source": InvalidSpec(
        {"spec.dataset.source": DROP},
        "spec.dataset.source",
        "is required",
        "spec.dataset.source: Required value",
    ),
    "no model": InvalidSpec(
        {"spec.teacher.model": DROP},
        "spec.teacher.model",
        "is required",
        "spec.teacher.model: Required value",
    ),
    "no bucket": InvalidSpec(
        {"spec.storage.bucket": DROP},
        "spec.storage.bucket",
        "is required",
        "spec.storage.bucket: Required value",
    ),
    "no stages": InvalidSpec(
        {"spec.stages": DROP}, "spec.stages", "is required", "spec.stages: Required value"
    ),
    "an empty list of stages": InvalidSpec(
        {"spec.stages": []}, "spec.stages", "must have at least 1 items", "should have at least 1 items"
    ),
    "a stage without a kind": InvalidSpec(
        {"spec.stages.0.kind": DROP},
        "spec.stages[0].kind",
        "is required",
        "spec.stages[0].kind: Required value",
    ),
    "a stage of an unknown kind": InvalidSpec(
        {"spec.stages.0.kind": "Magic"},
        "spec.stages[0].kind",
        '"Magic" must be one of Vanilla, Rescored, TeacherForced, OnPolicy',
        'spec.stages[0].kind: Unsupported value: "Magic": supported values: "Vanilla", "Rescored", '
        '"TeacherForced", "OnPolicy"',
    ),
    "an unknown field": InvalidSpec(
        {"spec.suspended": True}, "spec.suspended", "there is no such field", 'unknown field "spec.suspended"'
    ),
    "an unknown field of a stage": InvalidSpec(
        {"spec.stages.0.token": 1},
        "spec.stages[0].token",
        "there is no such field",
        'unknown field "spec.stages[0].token"',
    ),
    "a field in Python's spelling": InvalidSpec(
        {"spec.dataset.max_length": 512},
        "spec.dataset.max_length",
        "there is no such field",
        'unknown field "spec.dataset.max_length"',
    ),
    "an unknown role": InvalidSpec(
        {"spec.runtime.resources": {"trainer": {}}},
        "spec.runtime.resources.trainer",
        "must be one of init, preprocess, rescore, train",
        'unknown field "spec.runtime.resources.trainer"',
    ),
    "a number as text": InvalidSpec(
        {"spec.training.optimizer.learningRate": "3e-4"},
        "spec.training.optimizer.learningRate",
        "must be a number",
        "spec.training.optimizer.learningRate in body must be of type number",
    ),
    "a fraction of a GPU": InvalidSpec(
        {"spec.student.gpus": 1.5},
        "spec.student.gpus",
        "must be a whole number",
        "spec.student.gpus in body must be of type integer",
    ),
    "a year that is a number": InvalidSpec(
        {"spec.dataset.conversation.knowledgeCutoff": 2024},
        "spec.dataset.conversation.knowledgeCutoff",
        "must be a string: quote it",
        "spec.dataset.conversation.knowledgeCutoff in body must be of type string",
    ),
    "suspend as text": InvalidSpec(
        {"spec.suspend": "yes"},
        "spec.suspend",
        "must be true or false",
        "spec.suspend in body must be of type boolean",
    ),
    "null for a required object": InvalidSpec(
        {"spec.teacher": None}, "spec.teacher", "null must be a mapping", "spec.teacher: Required value"
    ),
    # Bounds.
    "no GPU": InvalidSpec(
        {"spec.student.gpus": 0},
        "spec.student.gpus",
        "must be at least 1",
        "should be greater than or equal to 1",
    ),
    "no interruption": InvalidSpec(
        {"spec.runtime.interruptions": 0},
        "spec.runtime.interruptions",
        "must be at least 1",
        "should be greater than or equal to 1",
    ),
    "another reaction to a stall": InvalidSpec(
        {"spec.runtime.onStall": "Delete"},
        "spec.runtime.onStall",
        '"Delete" must be one of Report, Restart',
        'spec.runtime.onStall: Unsupported value: "Delete": supported values: "Report", "Restart"',
    ),
    "a restart of every attempt at once": InvalidSpec(
        {"spec.runtime.onStall": "Restart", "spec.runtime.stalledAfter": "0h0s"},
        "spec.runtime.onStall",
        "Restart needs a stalledAfter above 0s",
    ),
    "a share above 1": InvalidSpec(
        {"spec.dataset.sampling.memorizationMax": 1.1},
        "spec.dataset.sampling.memorizationMax",
        "1.1 must be at most 1",
        "spec.dataset.sampling.memorizationMax in body should be less than or equal to 1",
    ),
    "a valid fraction of 1": InvalidSpec(
        {"spec.dataset.validFraction": 1},
        "spec.dataset.validFraction",
        "must be less than 1",
        "should be less than 1",
    ),
    "a learning rate of 0": InvalidSpec(
        {"spec.training.optimizer.learningRate": 0},
        "spec.training.optimizer.learningRate",
        "must be more than 0",
        "should be greater than 0",
    ),
    "more stages than a status holds": InvalidSpec(
        {"spec.stages": [{"name": f"s{i}", "kind": "Vanilla"} for i in range(9)]},
        "spec.stages",
        "may have at most 8 items",
        "spec.stages: Too many: 9: must have at most 8 items",
    ),
    # Texts.
    "a source that is a path": InvalidSpec(
        {"spec.dataset.source": "/data"},
        "spec.dataset.source",
        "must be s3://bucket/path/*.parquet, s3://bucket/**/*.parquet for a whole bucket, or hf://",
    ),
    "a source without a path": InvalidSpec(
        {"spec.dataset.source": "s3://corpora"}, "spec.dataset.source", "must be s3://bucket/path/*.parquet"
    ),
    "a model that is a name": InvalidSpec(
        {"spec.teacher.model": "gpt-oss-120b"},
        "spec.teacher.model",
        "must be s3://bucket/path of a Hugging Face",
    ),
    "weights in a folder": InvalidSpec(
        {"spec.student.init": {"checkpoint": "/weights"}},
        "spec.student.init.checkpoint",
        "must be s3://bucket/path",
    ),
    "weights as earlier versions wrote them": InvalidSpec(
        {"spec.student.init": "s3://vpmoe/weights"},
        "spec.student.init",
        "is no mapping: write the address of a checkpoint as init.checkpoint",
        "spec.student.init in body must be of type object",
    ),
    "no weights": InvalidSpec(
        {"spec.student.init": {}}, "spec.student.init", "needs one of checkpoint and upcycle, and not both."
    ),
    "weights of two origins": InvalidSpec(
        {"spec.student.init": {"checkpoint": "s3://a/b", "upcycle": {"model": "s3://a/c"}}},
        "spec.student.init",
        "needs one of checkpoint and upcycle, and not both.",
    ),
    "weights of a checkpoint in a run that continues another": InvalidSpec(
        {"spec.student.init": {"checkpoint": "s3://a/b"}, "spec.resumeFrom": "s3://a/runs/b/c-01234567"},
        "spec.student.init",
        "is given beside resumeFrom, which brings weights of its own. Remove one.",
    ),
    "a dense model that is a name": InvalidSpec(
        {"spec.student.init": {"upcycle": {"model": "Qwen3-0.6B"}}},
        "spec.student.init.upcycle.model",
        "must be s3://bucket/path of a Hugging Face",
    ),
    "a dense model without a name": InvalidSpec(
        {"spec.student.init": {"upcycle": {"seed": 1}}},
        "spec.student.init.upcycle.model",
        "is required",
        "spec.student.init.upcycle.model: Required value",
    ),
    "a negative seed of a dense model": InvalidSpec(
        {"spec.student.init": {"upcycle": {"model": "s3://a/b", "seed": -1}}},
        "spec.student.init.upcycle.seed",
        "must be at least 0",
        "spec.student.init.upcycle.seed in body should be greater than or equal to 0",
    ),
    "a date in words": InvalidSpec(
        {"spec.dataset.conversation.date": "1 May"},
        "spec.dataset.conversation.date",
        "must be a day as a string",
    ),
    "an unknown effort": InvalidSpec(
        {"spec.dataset.conversation.effort": "maximal"},
        "spec.dataset.conversation.effort",
        "must be low, medium or high, or shares in this order",
    ),
    "shares of efforts in another order": InvalidSpec(
        {"spec.dataset.conversation.effort": "high=0.5,low=0.5"},
        "spec.dataset.conversation.effort",
        "must be low, medium or high, or shares in this order",
    ),
    "a share of an effort with seven decimals": InvalidSpec(
        {"spec.dataset.conversation.effort": "low=0.5000000,high=0.5"},
        "spec.dataset.conversation.effort",
        "must be low, medium or high, or shares in this order",
    ),
    "shares of efforts as a mapping": InvalidSpec(
        {"spec.dataset.conversation.effort": {"low": 1}},
        "spec.dataset.conversation.effort",
        "must be low, medium or high, or shares in this order",
        'unknown field "spec.dataset.conversation.effort.low"',
    ),
    "shares of efforts that add up to 0.9": InvalidSpec(
        {"spec.dataset.conversation.effort": "low=0.3,medium=0.4,high=0.2"},
        "spec.dataset.conversation.effort",
        "has shares that do not add up to 1. Change them to add up to 1.",
    ),
    "shares of efforts that are off by two millionths": InvalidSpec(
        {"spec.dataset.conversation.effort": "low=0.333332,medium=0.333333,high=0.333333"},
        "spec.dataset.conversation.effort",
        "has shares that do not add up to 1. Change them to add up to 1.",
    ),
    "a negative limit of collapsed steps": InvalidSpec(
        {"spec.training.maxCollapsedSteps": -1},
        "spec.training.maxCollapsedSteps",
        "-1 must be at least 0",
        "spec.training.maxCollapsedSteps in body should be greater than or equal to 0",
    ),
    "month 13": InvalidSpec(
        {"spec.dataset.conversation.knowledgeCutoff": "2024-13"},
        "spec.dataset.conversation.knowledgeCutoff",
        "must be a month as a string",
    ),
    "an endpoint without a scheme": InvalidSpec(
        {"spec.storage.endpoint": "s3.example.com"}, "spec.storage.endpoint", "must be https://host or http"
    ),
    "a bucket in capitals": InvalidSpec(
        {"spec.storage.bucket": "Bucket"}, "spec.storage.bucket", "must be a bucket name"
    ),
    "a prefix that ends with a slash": InvalidSpec(
        {"spec.storage.prefix": "team/"}, "spec.storage.prefix", "without a slash at either end"
    ),
    "tokens in words": InvalidSpec({"spec.stages.0.tokens": "a lot"}, "spec.stages[0].tokens", TOKENS),
    "half a token": InvalidSpec({"spec.stages.0.tokens": "1.0005k"}, "spec.stages[0].tokens", TOKENS),
    "a suffix in small letters": InvalidSpec({"spec.stages.0.tokens": "1b"}, "spec.stages[0].tokens", TOKENS),
    "no tokens": InvalidSpec(
        {"spec.stages.0.tokens": 0}, "spec.stages[0].tokens", "must be from 1 to 1000000000000000 tokens"
    ),
    "too many tokens": InvalidSpec(
        {"spec.stages.0.tokens": "999999999999T"},
        "spec.stages[0].tokens",
        "must be from 1 to 1000000000000000 tokens",
    ),
    "tokens that are a fraction": InvalidSpec(
        {"spec.stages.0.tokens": 1.5},
        "spec.stages[0].tokens",
        TOKENS,
        "spec.stages[0].tokens in body must be of type integer,string",
    ),
    "a batch in words": InvalidSpec(
        {"spec.training.globalBatchTokens": "one"}, "spec.training.globalBatchTokens", TOKENS
    ),
    "a duration without a unit": InvalidSpec(
        {"spec.runtime.stalledAfter": "15"}, "spec.runtime.stalledAfter", DURATION
    ),
    "an empty duration": InvalidSpec(
        {"spec.runtime.stalledAfter": ""}, "spec.runtime.stalledAfter", DURATION
    ),
    "a duration in weeks": InvalidSpec({"spec.ttlAfterFinished": "1w"}, "spec.ttlAfterFinished", DURATION),
    "a quantity in words": InvalidSpec(
        {"spec.runtime.resources": {"train": {"limits": {"cpu": "lots"}}}},
        "spec.runtime.resources.train.limits.cpu",
        'must be a quantity such as 4, "500m" or "64Gi"',
        "spec.runtime.resources.train.limits[cpu]",
    ),
    # Names.
    "a run's name of 31 characters": InvalidSpec({"metadata.name": "a" * 31}, "metadata.name", RUN_NAME),
    "a run's name that starts with a digit": InvalidSpec({"metadata.name": "1st"}, "metadata.name", RUN_NAME),
    "a run's name with a dot": InvalidSpec({"metadata.name": "a.b"}, "metadata.name", RUN_NAME),
    "a stage's name with a hyphen": InvalidSpec(
        {"spec.stages.0.name": "a-b"}, "spec.stages[0].name", STAGE_NAME
    ),
    "a stage's name in capitals": InvalidSpec(
        {"spec.stages.0.name": "First"}, "spec.stages[0].name", STAGE_NAME
    ),
    "a stage's name of 17 characters": InvalidSpec(
        {"spec.stages.0.name": "a" * 17},
        "spec.stages[0].name",
        STAGE_NAME,
        "spec.stages[0].name: Too long: may not be more than 16 bytes",
    ),
    **BUILT_IN,
    "an on-policy stage called sampler": InvalidSpec(
        {"spec.stages": [{**ONPOLICY, "name": "sampler"}]},
        "spec.stages[0].name",
        "sampler is the name of a built-in step. Choose another name.",
    ),
    "two stages of one name": InvalidSpec(
        {
            "spec.stages": [
                {"name": "a", "kind": "Vanilla"},
                {"name": "b", "kind": "Vanilla"},
                {"name": "a", "kind": "Rescored"},
            ]
        },
        "spec.stages",
        "two stages have the name a. A stage's name is its folder in the bucket: give each stage its own "
        "name.",
    ),
    # Fields of another kind of stage.
    "mix in Vanilla": InvalidSpec(
        {"spec.stages.0.mix": 0.5},
        "spec.stages[0].mix",
        "is given, but only stages of kind Rescored have mix",
    ),
    "confidence in OnPolicy": InvalidSpec(
        {"spec.stages": [{**ONPOLICY, "confidence": {}}]},
        "spec.stages[0].confidence",
        "only stages of kind Rescored have confidence",
    ),
    "curriculum in Rescored": InvalidSpec(
        {"spec.stages": [{**RESCORED, "curriculum": phases(1)}]},
        "spec.stages[0].curriculum",
        "only stages of kind OnPolicy have curriculum",
    ),
    "loss in Vanilla": InvalidSpec(
        {"spec.stages.0.loss": {}},
        "spec.stages[0].loss",
        "is given, but only stages of kind TeacherForced have loss",
    ),
    # Sums and orders.
    "shares of phases below 1": InvalidSpec(
        {"spec.stages": [{**ONPOLICY, "curriculum": phases(0.5, 0.4)}]},
        "spec.stages[0].curriculum",
        "the shares of the phases add up to 0.9, not 1. Change them to add up to 1.",
    ),
    "shares of phases above 1": InvalidSpec(
        {"spec.stages": [{**ONPOLICY, "curriculum": phases(1, 1)}]},
        "spec.stages[0].curriculum",
        "the shares of the phases add up to 2, not 1.",
    ),
    "shares of efforts": InvalidSpec(
        {"spec.stages": [{**ONPOLICY, "curriculum": [{"share": 1, "effort": {"low": 0.1, "high": 0.2}}]}]},
        "spec.stages[0].curriculum[0].effort",
        "low, medium and high add up to 0.3, not 1. Change them to add up to 1.",
    ),
    "no phases": InvalidSpec(
        {"spec.stages": [{**ONPOLICY, "curriculum": []}]},
        "spec.stages[0].curriculum",
        "must have at least 1 items",
        "at least 1 items",
    ),
    "confidence with min above max": InvalidSpec(
        {"spec.stages": [{**RESCORED, "confidence": {"min": 4, "max": 0.25}}]},
        "spec.stages[0].confidence",
        "min 4 is above max 0.25. Swap them.",
    ),
    "confidence with min above the default of max": InvalidSpec(
        {"spec.stages": [{**RESCORED, "confidence": {"min": 4.5}}]},
        "spec.stages[0].confidence",
        "min 4.5 is above max 4. Swap them.",
    ),
    "confidence whose mean cannot be 1": InvalidSpec(
        {"spec.stages": [{**RESCORED, "confidence": {"min": 1.5}}]},
        "spec.stages[0].confidence",
        "1 is not between min 1.5 and max 4, but the mean weight is always 1.",
    ),
    "a loss without terms": InvalidSpec(
        {"spec.stages": [{**FORCED, "loss": {"ce": 0, "kl": 0, "hidden": 0}}]},
        "spec.stages[0].loss",
        "ce, kl and hidden are all 0: there is nothing to minimise. Set at least one above 0.",
    ),
    "a schedule that rises": InvalidSpec(
        {"spec.training.optimizer.learningRate": 1e-6},
        "spec.training.optimizer",
        "minLearningRate 1e-05 is above learningRate 1e-06.",
    ),
    "a stage's schedule that rises": InvalidSpec(
        {"spec.stages.0.optimizer": {"minLearningRate": 0.01}},
        "spec.stages",
        "stage first: minLearningRate 0.01 is above learningRate 0.0003.",
    ),
    "an on-policy peak below minLearningRate": InvalidSpec(
        {"spec.training.optimizer.minLearningRate": 1e-4, "spec.stages": [ONPOLICY]},
        "spec.stages",
        "stage onpolicy: minLearningRate 0.0001 is above learningRate 2e-05. Lower minLearningRate or "
        "raise learningRate.",
    ),
    # Layouts that cannot run.
    "a document longer than the sequence": InvalidSpec(
        {"spec.dataset.maxLength": 8193},
        "spec.dataset.maxLength",
        "8193 is more than training.sequenceLength 8192: a document must fit into one sequence. Lower it, or "
        "raise training.sequenceLength.",
    ),
    "experts that do not divide": InvalidSpec(
        {"spec.student.gpus": 6, "spec.student.expertParallel": 3},
        "spec.student.expertParallel",
        "3 does not divide the 256 experts of vpmoe-6b. Use 1, 2, 4, …, 256.",
    ),
    "experts that do not divide in tiny": InvalidSpec(
        {"spec.student": {"shape": "tiny", "gpus": 16, "expertParallel": 16}},
        "spec.student.expertParallel",
        "16 does not divide the 8 experts of tiny. Use 1, 2, 4, …, 8.",
    ),
    "ranks that are not a multiple of expertParallel": InvalidSpec(
        {"spec.student.expertParallel": 2},
        "spec.stages",
        "stage first: 7 ranks are not a multiple of student.expertParallel 2. Lower student.expertParallel, "
        "or "
        "change the number of GPUs.",
    ),
    "a sampler that leaves an odd number of ranks": InvalidSpec(
        {
            "spec.student": {"gpus": 8, "expertParallel": 2},
            "spec.stages": [{**ONPOLICY, "sampler": {"gpus": 1}}],
        },
        "spec.stages",
        "stage onpolicy: 7 ranks are not a multiple of student.expertParallel 2.",
    ),
    "pods that do not divide the ranks": InvalidSpec(
        {"spec.student.gpusPerPod": 2},
        "spec.stages",
        "stage first: 7 GPUs do not divide into pods of 2. Set student.gpusPerPod to a divisor of "
        "the ranks of every stage.",
    ),
    "pods that do not divide the ranks beside the sampler": InvalidSpec(
        {
            "spec.student": {"gpus": 8, "gpusPerPod": 4},
            "spec.stages": [*MINIMAL["spec"]["stages"], {**ONPOLICY, "sampler": {"gpus": 2}}],
        },
        "spec.stages",
        "stage onpolicy: 6 GPUs do not divide into pods of 4.",
    ),
    "several pods in a Job": InvalidSpec(
        {"spec.student.gpusPerPod": 1, "spec.runtime.backend": "Job"},
        "spec.stages",
        "stage first: 7 GPUs in pods of 1 need several pods, but runtime.backend Job has one pod. "
        "Use PyTorchJob.",
    ),
    "a sampler that takes every GPU": InvalidSpec(
        {"spec.stages": [{**ONPOLICY, "sampler": {"gpus": 7}}]},
        "spec.stages",
        "stage onpolicy: student.gpus 7 − sampler.gpus 7 leaves no GPU for training. Lower sampler.gpus.",
    ),
    "a batch of less than one sequence per rank": InvalidSpec(
        {"spec.training.globalBatchTokens": "57343"},
        "spec.training.globalBatchTokens",
        "57343 is less than one sequence on every rank of stage first: 7 × 8192 = 57344. Raise it, or lower "
        "training.sequenceLength.",
    ),
    "a gate in the first stage": InvalidSpec(
        {"spec.stages": [GATED, RESCORED]},
        "spec.stages",
        "stage gated: require.validity 0.8 needs the evaluation of a stage before, but this is the first "
        "stage. Add a stage before it, or set require.validity to 0.",
    ),
    "a higher gate in the first stage": InvalidSpec(
        {"spec.stages": [{**GATED, "require": {"validity": 0.95}}]},
        "spec.stages",
        "stage gated: require.validity 0.95 needs the evaluation of a stage before",
    ),
    "an empty gate in the first stage": InvalidSpec(
        {"spec.stages": [{**GATED, "require": {}}]},
        "spec.stages",
        "stage gated: require.validity 0.8 needs the evaluation of a stage before",
    ),
    "a gate that is not measured": InvalidSpec(
        {"spec.stages": [*MINIMAL["spec"]["stages"], GATED], "spec.evaluation.completions": 0},
        "spec.stages",
        "stage gated: require.validity 0.8 is not measured if evaluation.completions is 0. Raise "
        "evaluation.completions, or set require.validity to 0.",
    ),
    "early stop without held-out documents": InvalidSpec(
        {"spec.stages": [{**MINIMAL["spec"]["stages"][0], "stop": {}}], "spec.evaluation.documents": 0},
        "spec.stages",
        "stop needs the held-out loss, but evaluation.documents is 0. Raise evaluation.documents, or remove "
        "stop.",
    ),
    "a validity that a TeacherForced stage cannot measure": InvalidSpec(
        {"spec.stages": [*MINIMAL["spec"]["stages"], {**FORCED, "stop": {"minValidity": 0.5}}]},
        "spec.stages[1].stop.minValidity",
        "0.5 is not measured while a TeacherForced stage trains. Set it to 0: then stop looks at the "
        "held-out loss alone.",
    ),
    "a validity that no step measures": InvalidSpec(
        {
            "spec.stages": [{**MINIMAL["spec"]["stages"][0], "stop": {"minValidity": 0.95}}],
            "spec.evaluation.completions": 0,
        },
        "spec.stages",
        "stage first: stop.minValidity 0.95 is not measured if evaluation.completions is 0. Raise "
        "evaluation.completions, or set stop.minValidity to 0.",
    ),
    "no teacher where one is needed": InvalidSpec(
        {"spec.teacher.gpus": 0, "spec.stages": [*MINIMAL["spec"]["stages"], RESCORED]},
        "spec.teacher.gpus",
        "0 leaves no GPU for the teacher, which stage rescored of kind Rescored needs. Raise it, or use "
        "Vanilla "
        "stages only.",
    ),
    "rescoring on more GPUs than there are": InvalidSpec(
        {"spec.teacher.gpus": 2, "spec.rescore.gpus": 10},
        "spec.rescore.gpus",
        "10 are more than the run has: teacher.gpus 2 + student.gpus 7. Lower it.",
    ),
    "GPUs among the resources": InvalidSpec(
        {"spec.runtime.resources": {"train": {"limits": {"nvidia.com/gpu": 1}}}},
        "spec.runtime.resources.train",
        "nvidia.com/gpu cannot be set here. Use student.gpus, student.gpusPerPod, sampler.gpus and "
        "teacher.gpus.",
    ),
    "a variable that is set twice": InvalidSpec(
        {"spec.runtime.env": [{"name": "A", "value": "1"}, {"name": "B"}, {"name": "A", "value": "1"}]},
        "spec.runtime.env",
        "A is set twice. Remove one.",
    ),
    "a card without a unit": InvalidSpec(
        {"spec.runtime.gpuMemory": "80"},
        "spec.runtime.gpuMemory",
        'must be the memory of one GPU in whole G or Gi, such as "80G", "80Gi" or "141G"',
    ),
    "a card on which one rank does not fit": InvalidSpec(
        {"spec.runtime.gpuMemory": "80Gi", "spec.student.gpus": 1},
        "spec.runtime.gpuMemory",
        "stage first: training vpmoe-6b on 1 GPUs takes at least 114 GiB of each, more than 80Gi. Give the "
        "stage more GPUs (raise student.gpus or lower sampler.gpus), raise student.expertParallel, lower "
        "training.sequenceLength, or use GPUs with more memory and name it here.",
    ),
    "a card on which the ranks beside a sampler do not fit": InvalidSpec(
        {
            "spec.runtime.gpuMemory": "80G",
            "spec.student.gpus": 7,
            "spec.stages": [{**ONPOLICY, "sampler": {"gpus": 6}}],
        },
        "spec.runtime.gpuMemory",
        "stage onpolicy: training vpmoe-6b on 1 GPUs takes at least 114 GiB of each, more than 80G.",
    ),
    "a card that long sequences do not fit on": InvalidSpec(
        {
            "spec.runtime.gpuMemory": "80Gi",
            "spec.training.sequenceLength": 262_144,
            "spec.training.globalBatchTokens": "2M",
        },
        "spec.runtime.gpuMemory",
        "stage first: training vpmoe-6b on 7 GPUs takes at least 87 GiB of each, more than 80Gi.",
    ),
    "an export of a stage that does not exist": InvalidSpec(
        {"spec.export": {"stages": ["first", "last"]}},
        "spec.export.stages",
        "last is not the name of a stage. Name stages of spec.stages, or write [] to export none.",
    ),
    "a stage that is exported twice": InvalidSpec(
        {"spec.export": {"stages": ["first", "first"]}},
        "spec.export.stages",
        "first is named twice. Remove one.",
    ),
    "a variable whose name is no name": InvalidSpec(
        {"spec.runtime.env": [{"name": "1-x"}]},
        "spec.runtime.env[0].name",
        "must be the name of an environment variable",
    ),
}
INVALID |= {
    f"the reserved variable {name}": InvalidSpec(
        {"spec.runtime.env": [{"name": "FREE"}, {"name": name, "value": "x"}]},
        "spec.runtime.env[1].name",
        f"{name} is reserved: the operator, Kubernetes or the launcher sets it. Remove it.",
    )
    for name in ("VPMOE_IMAGE", "VPMOE_", "AWS_ACCESS_KEY_ID", "HOME", "TMPDIR", "PET_NNODES", "WORLD_SIZE")
}


def _env(name: str, **fields: Any) -> Changes:
    return {"spec.runtime.env": [{"name": name, **fields}]}


def _train(**resources: Any) -> Changes:
    return {"spec.runtime.resources": {"train": resources}}


IS_CREDENTIAL = (
    "{} holds a credential, and what is written here or in a ConfigMap can be read by everybody who may read "
    "runs. Put it into a Secret, and name that in valueFrom.secretKeyRef or in runtime.envFrom."
)
INVALID |= {
    f"{name} in plain text": InvalidSpec(
        _env(name, value="x"), "spec.runtime.env[0].name", IS_CREDENTIAL.format(name)
    )
    for name in (
        "HF_TOKEN",
        "TOKEN",
        "hf_token",
        "PROXY_PASSWORD",
        "CLIENT_SECRET",
        "WANDB_API_KEY",
        "SSH_PRIVATE_KEY",
    )
}
INVALID |= {
    f"the key {key} as a label": InvalidSpec(
        {"spec.runtime.podLabels": {"team": "a", key: "x"}}, "spec.runtime.podLabels", f"{key} is reserved: "
    )
    for key in (
        "vpmoe.dev/run",
        "a.vpmoe.dev/b",
        "app.kubernetes.io/part-of",
        "kubernetes.io/metadata.name",
        "batch.kubernetes.io/job-name",
        "k8s.io/a",
        "cluster-autoscaler.kubernetes.io/safe-to-evict",
        "training.kubeflow.org/job-name",
        "kueue.x-k8s.io/queue-name",
        "job-name",
    )
}
INVALID |= {
    f"the key {key} as an annotation": InvalidSpec(
        {"spec.runtime.podAnnotations": {"note": "a", key: "x"}},
        "spec.runtime.podAnnotations",
        f"{key} is reserved: ",
    )
    for key in (
        "vpmoe.dev/run-document",
        "container.apparmor.security.beta.kubernetes.io/pytorch",
        "training.kubeflow.org/a",
    )
}
INVALID |= {
    "a credential in a ConfigMap": InvalidSpec(
        _env("HF_TOKEN", valueFrom={"configMapKeyRef": {"name": "a", "key": "b"}}),
        "spec.runtime.env[0].name",
        IS_CREDENTIAL.format("HF_TOKEN"),
    ),
    "a proxy with a password": InvalidSpec(
        _env("HTTPS_PROXY", value="http://me:hunter2@proxy:3128"),
        "spec.runtime.env[0].value",
        "the URL in HTTPS_PROXY holds a password, which everybody can read who may read runs. Put the whole "
        "value into a Secret",
    ),
    "a value and a source": InvalidSpec(
        _env("A", value="a", valueFrom={"secretKeyRef": {"name": "a", "key": "a"}}),
        "spec.runtime.env[0].valueFrom",
        "A has a value and a valueFrom. Remove one.",
    ),
    "a source that is none": InvalidSpec(
        _env("A", valueFrom={}),
        "spec.runtime.env[0].valueFrom",
        "needs one of secretKeyRef and configMapKeyRef, and not both.",
    ),
    "a source that is two": InvalidSpec(
        _env(
            "A",
            valueFrom={
                "secretKeyRef": {"name": "a", "key": "a"},
                "configMapKeyRef": {"name": "a", "key": "a"},
            },
        ),
        "spec.runtime.env[0].valueFrom",
        "needs one of secretKeyRef and configMapKeyRef, and not both.",
    ),
    "a key that is none": InvalidSpec(
        _env("A", valueFrom={"secretKeyRef": {"name": "a", "key": "a b"}}),
        "spec.runtime.env[0].valueFrom.secretKeyRef.key",
        "must be a key of a Secret or ConfigMap",
    ),
    "a reserved variable of a Secret": InvalidSpec(
        _env("AWS_SECRET_ACCESS_KEY", valueFrom={"secretKeyRef": {"name": "a", "key": "a"}}),
        "spec.runtime.env[0].name",
        "AWS_* follow from storage.credentialsSecret, endpoint, region and caSecret",
    ),
    "envFrom of nothing": InvalidSpec(
        {"spec.runtime.envFrom": [{"prefix": "A_"}]},
        "spec.runtime.envFrom[0]",
        "needs one of secretRef and configMapRef, and not both.",
    ),
    "a reserved prefix": InvalidSpec(
        {"spec.runtime.envFrom": [{"prefix": "AWS_S3_", "secretRef": {"name": "a"}}]},
        "spec.runtime.envFrom[0].prefix",
        "AWS_S3_ makes reserved names",
    ),
    "a prefix that is none": InvalidSpec(
        {"spec.runtime.envFrom": [{"prefix": "A-", "secretRef": {"name": "a"}}]},
        "spec.runtime.envFrom[0].prefix",
        "must begin the names of environment variables",
    ),
    "a label's key that is none": InvalidSpec(
        {"spec.runtime.podLabels": {"a b": "c"}}, "spec.runtime.podLabels", "a b is no key."
    ),
    "a label's value that is none": InvalidSpec(
        {"spec.runtime.podLabels": {"team": "a b"}},
        "spec.runtime.podLabels.team",
        "must be a label's value",
        "spec.runtime.podLabels[team]",
    ),
    "a resource that is none": InvalidSpec(
        _train(requests={"gpu": 1}), "spec.runtime.resources.train.requests", "gpu is no resource: write cpu"
    ),
    "half a device": InvalidSpec(
        _train(limits={"rdma/hca": "500m"}),
        "spec.runtime.resources.train.limits",
        "rdma/hca is counted in whole numbers.",
    ),
    "a device with another limit": InvalidSpec(
        _train(requests={"rdma/hca": 1}, limits={"rdma/hca": 2}),
        "spec.runtime.resources.train.limits",
        "rdma/hca differs from its request.",
    ),
    "huge pages alone": InvalidSpec(
        _train(limits={"hugepages-2Mi": "1Gi"}),
        "spec.runtime.resources.train",
        "huge pages need cpu or memory beside them. Add one.",
    ),
    "another capability": InvalidSpec(
        {"spec.runtime.capabilities": ["SYS_ADMIN"]},
        "spec.runtime.capabilities[0]",
        "must be IPC_LOCK",
        'spec.runtime.capabilities[0]: Unsupported value: "SYS_ADMIN": supported values: "IPC_LOCK"',
    ),
    "shared memory in words": InvalidSpec(
        {"spec.runtime.sharedMemory": "half"}, "spec.runtime.sharedMemory", "must be a quantity"
    ),
    "the network of the node": InvalidSpec(
        {"spec.runtime.hostNetwork": True},
        "spec.runtime.hostNetwork",
        "there is no such field",
        'unknown field "spec.runtime.hostNetwork"',
    ),
    "a cache without a claim": InvalidSpec(
        {"spec.runtime.teacherCache": {}},
        "spec.runtime.teacherCache.claimName",
        "is required",
        "spec.runtime.teacherCache.claimName: Required value",
    ),
    "a volume for versions in a path": InvalidSpec(
        {"spec.runtime.weightsVolume": {"claimName": "/mnt"}},
        "spec.runtime.weightsVolume.claimName",
        "must be the name of a PersistentVolumeClaim",
    ),
    "a cache in a path": InvalidSpec(
        {"spec.runtime.teacherCache": {"claimName": "/mnt"}},
        "spec.runtime.teacherCache.claimName",
        "must be the name of a PersistentVolumeClaim",
    ),
}
