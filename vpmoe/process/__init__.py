"""Processes of a pod: the launcher of training ranks, and the worker of a step that is divided into parts."""
