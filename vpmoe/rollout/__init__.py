"""The on-policy data plane: what the student is asked, how its answers are read, and which of them make up a window.

What must be the same for sampler, teacher and trainer is a pure function of the run and of what the bucket holds already: curriculum.py,
windows.py, prompt.py. Nobody sends a schedule to anybody.
"""
