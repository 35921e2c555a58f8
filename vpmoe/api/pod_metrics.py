"""The metrics that a run's pods serve for Prometheus. docs/reference/metrics.md has the same list.

Names follow https://prometheus.io/docs/practices/naming/: base units, `_total` for counters. Every metric
also has the labels run, stage and role of its process. Namespace, pod and container are added by Prometheus
when it scrapes, so no metric has a label of these names. Labels have few values: none is a step, a window or
a layer.
"""

from vpmoe.api.metrics import Metric

# Every role
PROGRESS_TIME = Metric(
    "vpmoe_step_progress_timestamp_seconds",
    "gauge",
    "Time of the step's latest progress report, in seconds since the epoch.",
)
ATTEMPT = Metric("vpmoe_step_attempt", "gauge", "Number of the attempt at the step.")
DONE = Metric(
    "vpmoe_step_done",
    "gauge",
    "Tokens trained, or parts done: parts of the dataset or scores, windows, measurements, files.",
    ("unit",),
)
PLANNED = Metric("vpmoe_step_planned", "gauge", "The total of vpmoe_step_done, as far as known.", ("unit",))
CONDITION = Metric(
    "vpmoe_step_condition",
    "gauge",
    "1 for each condition that the step reports, such as RouterCollapse.",
    ("type", "reason"),
)
VALIDITY = Metric(
    "vpmoe_step_validity_ratio", "gauge", "Share of sampled completions that are valid Harmony, as reported."
)
TOKENS = Metric(
    "vpmoe_tokens", "counter", "Tokens that the process has trained, sampled or scored, without padding."
)
WAIT_SECONDS = Metric(
    "vpmoe_wait_seconds",
    "counter",
    "Seconds that the process has waited for what another role makes, or for an upload.",
    ("reason",),
)
GPU_UTILISATION = Metric(
    "vpmoe_gpu_utilisation_ratio",
    "gauge",
    "Share of the latest step, window or part in which a kernel ran, mean of the GPUs.",
)
GPU_MEMORY_FREE = Metric(
    "vpmoe_gpu_memory_free_bytes",
    "gauge",
    "Least free memory of the GPUs in the latest step, window or part.",
)

# Trainer
STEP = Metric("vpmoe_train_step", "gauge", "Optimizer steps of the stage.")
EPOCH = Metric("vpmoe_train_epoch", "gauge", "Pass over the data.")
STEP_SECONDS = Metric("vpmoe_train_step_seconds", "summary", "Time of optimizer steps.", ("kind",))
SKIPPED_STEPS = Metric(
    "vpmoe_train_skipped_steps", "counter", "Steps that were skipped: loss or gradient were not finite."
)
LOSS = Metric("vpmoe_train_loss", "gauge", "What the latest step minimised; a surrogate in OnPolicy steps.")
SPAN_LOSS = Metric(
    "vpmoe_train_span_loss_nats", "gauge", "Mean -log p of the latest step, in nats a token.", ("span",)
)
HELD_OUT_LOSS = Metric(
    "vpmoe_train_held_out_loss_nats",
    "gauge",
    "Held-out loss of the latest evaluation, nats a token.",
    ("span",),
)
GRADIENT_NORM = Metric("vpmoe_train_gradient_norm", "gauge", "Norm of the latest gradient before clipping.")
LEARNING_RATE = Metric("vpmoe_train_learning_rate", "gauge", "Learning rate of the latest step.")
ROUTER_MAX_LOAD = Metric(
    "vpmoe_train_router_max_load_ratio", "gauge", "Busiest expert's load over the mean, of the worst layer."
)
ROUTER_DEAD_EXPERTS = Metric(
    "vpmoe_train_router_dead_experts", "gauge", "Experts without a token in the latest step, all layers."
)
ROUTER_AUX_LOSS = Metric("vpmoe_train_router_aux_loss", "gauge", "Balance loss of the router, 1 if balanced.")
EVALUATION_SECONDS = Metric("vpmoe_train_evaluation_seconds", "summary", "Time of the trainer's evaluations.")
CHECKPOINT_SAVE_SECONDS = Metric(
    "vpmoe_train_checkpoint_save_seconds", "summary", "Time for which a checkpoint has stopped training."
)
CHECKPOINT_UPLOAD_SECONDS = Metric(
    "vpmoe_train_checkpoint_upload_seconds",
    "summary",
    "Time to upload a checkpoint of all ranks, beside training.",
)
CHECKPOINT_TIME = Metric(
    "vpmoe_train_checkpoint_timestamp_seconds",
    "gauge",
    "Time of the attempt's latest complete checkpoint, in seconds since the epoch.",
)

# Trainer, Rescored steps
TEACHER_LOGP = Metric(
    "vpmoe_train_teacher_logp_nats", "gauge", "Teacher's mean log p in the latest scored step.", ("span",)
)
WEIGHT_MEAN = Metric(
    "vpmoe_train_weight_mean", "gauge", "Mean confidence weight of the latest scored step.", ("span",)
)
WEIGHT_SATURATION = Metric(
    "vpmoe_train_weight_saturation_ratio",
    "gauge",
    "Share of the latest scored step's weights at confidence.min or .max.",
    ("span", "bound"),
)

# Trainer, TeacherForced steps
TEACHER_KL = Metric(
    "vpmoe_train_teacher_kl_nats",
    "gauge",
    "KL(teacher‖student) of the latest step at the stage's temperature, nats a token.",
    ("span",),
)
TEACHER_COSINE = Metric(
    "vpmoe_train_teacher_cosine",
    "gauge",
    "Cosine of student's and teacher's hidden states in the latest step.",
    ("span",),
)

# Trainer, windows of OnPolicy stages
REVERSE_KL = Metric(
    "vpmoe_train_reverse_kl_nats",
    "gauge",
    "KL(student‖teacher) over the latest window's sampled tokens, nats a token.",
    ("span",),
)
SAMPLER_KL = Metric(
    "vpmoe_train_sampler_kl_nats",
    "gauge",
    "KL(sampler‖trainer) over the latest window's sampled tokens, nats a token.",
    ("span",),
)
WINDOW = Metric("vpmoe_train_window", "gauge", "Latest window that was trained.")
WINDOW_PHASE = Metric("vpmoe_train_window_phase", "gauge", "Its phase of the curriculum, from 0.")
WINDOW_STALENESS = Metric(
    "vpmoe_train_window_staleness", "gauge", "Windows trained since the version that it was sampled from."
)
WINDOW_VALID = Metric(
    "vpmoe_train_window_valid_ratio", "gauge", "Share of its rollouts that are valid Harmony.", ("effort",)
)
WINDOW_LENGTH = Metric(
    "vpmoe_train_window_completion_tokens", "gauge", "Mean length of its completions, in tokens.", ("effort",)
)
READY_WINDOWS = Metric(
    "vpmoe_train_ready_windows", "gauge", "Windows in a row that are ready ahead of the trainer.", ("state",)
)
CANARY = Metric("vpmoe_train_canary_bits_per_byte", "gauge", "Bits per byte of the canary.")

# Sampler
SAMPLER_WINDOW = Metric("vpmoe_sampler_window", "gauge", "Latest window that was sampled.")
SAMPLER_VERSION = Metric("vpmoe_sampler_version", "gauge", "Policy version that it was sampled from.")
SAMPLER_ROLLOUTS = Metric(
    "vpmoe_sampler_rollouts", "counter", "Rollouts in windows that were written.", ("effort", "validity")
)
SAMPLER_BATCH_SECONDS = Metric(
    "vpmoe_sampler_batch_seconds", "summary", "Time to sample all windows of a policy version."
)
SAMPLER_LOAD_SECONDS = Metric(
    "vpmoe_sampler_load_seconds", "summary", "Time to read, load and verify a policy version."
)
SAMPLER_PROBE = Metric(
    "vpmoe_sampler_probe_difference_nats",
    "gauge",
    "Largest difference from the trainer's log p of the latest version's probe.",
)

# Teacher and rescoring
TEACHER_WINDOW = Metric("vpmoe_teacher_window", "gauge", "Latest window that this worker has scored.")
TEACHER_WINDOW_SECONDS = Metric("vpmoe_teacher_window_seconds", "summary", "Time to score a window.")
RESCORE_PART_SECONDS = Metric("vpmoe_rescore_part_seconds", "summary", "Time to score and upload a part.")

METRICS: tuple[Metric, ...] = tuple(found for found in vars().values() if isinstance(found, Metric))
"""All of them, in the order of this file."""
