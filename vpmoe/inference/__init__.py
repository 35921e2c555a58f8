"""Inference engines: the student and the teacher in vLLM, and the student in transformers.

No megatron-core.
"""
