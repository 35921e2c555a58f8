"""Copies the metrics of a run from the bucket into a tracker: TensorBoard, Weights & Biases or MLflow.

rows.py turns lines of metrics into named values, reader.py reads what is new in the bucket, sync.py joins the
two with a tracker; each tracker is a module of its own. A step of the run is a run in the tracker. No job
imports any of this, and no image has a tracker.
"""
