"""The operator: from DistillRuns to Jobs, PyTorchJobs and a status. It never touches tensors; jobs never touch the Kubernetes API."""
