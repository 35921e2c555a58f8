"""What training minimises: one file a kind of step. The interface is vpmoe/model/objective.py.

Vanilla, Rescored and OnPolicy are functions `Batch -> Coefficient`. A Coefficient is a function `(logp_t,
rows_t) -> c_t` that the head calls once a chunk: `logp_t` [t] are the chunk's log p(target), detached, and
`rows_t` [t] int64 their places among the batch's T positions. The loss is Σ c·(−log p). Vanilla and Rescored
know their coefficients beforehand and ignore `logp_t`; OnPolicy computes them from it. TeacherForced has a
head of its own (teacher_forced_head.py).
"""
