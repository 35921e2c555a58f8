"""The student: its shapes, its modules on megatron-core, its training state. What the trainer uses of it, in
the order of a process:

    device = device.choose()                                    the GPU of this process, or the CPU where that
    was asked for distributed.start(device, expert_parallel)                  process groups; then rank(),
    ranks(), total(tensor), stop() learner = Learner.build(SHAPES["tiny"], device, …)          learner.py:
    student + DDP + distributed optimizer batch = Batch.from_rows(tokens, spans, documents)
    batch.py: a microbatch of packed rows counts = distributed.sum_over_ranks(sum of batch.counts)
    denominators of the GLOBAL batch, before any forward outcome = learner.forward_backward(batches,
    vanilla(counts, weights), int(counts[0])) norm = learner.step(learning_rate)
    nothing is permanent before it outcome = learner.evaluate(batches) state.slices(learner),
    state.sizes(learner), state.restore(learner, read, steps)      what a checkpoint holds

shapes.py imports no torch. Nothing here knows of Kubernetes, buckets, schedules or data sets.
"""

import logging
import warnings

# megatron-core warns of every optional package that is not there, several times a process, and torch of names
# that megatron uses: pages of them before the first line that says something about the run.
logging.getLogger("megatron").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", module=r"torch\.distributed\.c10d_logger", category=FutureWarning)
