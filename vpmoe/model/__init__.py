"""The student: its shapes, its modules on megatron-core, its training state. A training process:

    device = device.choose()                                       the GPU of this process, or the CPU
    distributed.start(device, expert_parallel)                     then rank(), world_size(), stop()
    learner = Learner.build(SHAPES["tiny"], device, …)             student, DDP, distributed optimizer
    batch = Batch.from_rows(tokens, spans, documents)              a microbatch of packed rows
    counts = distributed.sum_over_ranks(batch.counts)              denominators of the GLOBAL batch
    outcome = learner.forward_backward(batches, vanilla(counts, weights), int(counts[0]))
    norm = learner.step(learning_rate)                             changes the weights; the above does not
    outcome = learner.evaluate(batches)
    state.slices(learner), state.sizes(learner), state.restore(learner, read, steps)
    learner.close()                                                before distributed.stop

shapes.py imports no torch. This package contains nothing about Kubernetes, buckets, schedules or datasets.
"""

import logging
import warnings

# megatron-core warns about every missing optional package, several times per process, and torch warns about
# names that megatron uses. Together they print pages before the first useful line.
logging.getLogger("megatron").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", module=r"torch\.distributed\.c10d_logger", category=FutureWarning)
