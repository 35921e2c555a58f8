"""Chaos for the operator: runs with scripts, a proxy with faults, a recorder, and what must always hold."""
