"""Inference engines: the student and the teacher in vLLM and transformers. No megatron-core."""
