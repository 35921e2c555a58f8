"""The operator: turns DistillRuns into Jobs and PyTorchJobs, and writes their status.

Jobs never use the Kubernetes API.
"""
