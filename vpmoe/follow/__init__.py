"""Follows a run in a cluster: reads its DistillRun, pods and logs as a user of kubectl, and shows them."""
