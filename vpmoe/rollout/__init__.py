"""The on-policy protocol: which windows a stage has, what is in them, and the files that the roles exchange.

Sampler, teacher and trainer each compute the schedule (curriculum.py, windows.py, prompts.py) as a pure
function of the run and of what is in the bucket; none is exchanged. policy_version.py, window_files.py,
back_pressure.py and evaluation_record.py describe stored objects, version_volume.py copies of them on a
volume. gate.py decides whether a stage may begin, forecast.py estimates it. No torch.
"""
