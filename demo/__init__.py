"""The demonstration: one small DistillRun on the development cluster, from helm install to its results."""
