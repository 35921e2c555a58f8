"""vpMoE: the library behind the distillation jobs and the operator. Entry points of pods are in `jobs`, the operator in `operator`."""
