"""vpMoE: the library that the pods (`jobs`) and the operator (`operator`) use."""
