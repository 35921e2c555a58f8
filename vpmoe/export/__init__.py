"""Export of the student as a model folder: what transformers and vLLM open without this package. No
megatron-core, no transformers, no vLLM."""
