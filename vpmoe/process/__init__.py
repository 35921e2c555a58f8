"""Processes of a pod: the launcher of training ranks, the worker of a step in parts, memory on the CPU."""
