"""The on-policy data plane: what the student is asked, how its answers are read, which make up a window; and the student that answers.

What must be the same for sampler, teacher and trainer is a pure function of the run and of what the bucket holds already: curriculum.py,
windows.py, prompt.py. Nobody sends a schedule to anybody. weights.py writes the student as a Hugging Face checkpoint, in the trainer, and
proves one before it is loaded; transformers_model.py and vllm_model.py compute it, with the parts of layers.py. Whoever loads one calls
`register()` of the module that it needs first: nothing of this repository has to be installed, and nothing is run that a checkpoint brings
along. sampler.py is the sampler's work, engines.py and engine.py its vLLM, proof.py what comes between a version and them.
"""
