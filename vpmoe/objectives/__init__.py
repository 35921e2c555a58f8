"""What training minimises: objectives, and the head that turns token coefficients into a loss and gradients.

An objective (objective.py) is asked for the loss of each microbatch. All but TeacherForced's are a function `Batch -> Coefficient`; a
Coefficient is a function `(logp_t, rows_t) -> c_t` that the head calls once a chunk: `logp_t` [t] are the chunk's log p(target), detached,
and `rows_t` [t] int64 say which of the batch's T positions they belong to. The loss is Σ c·(−log p). Coefficients known beforehand ignore
`logp_t`; those of on-policy training are made from it.
"""
