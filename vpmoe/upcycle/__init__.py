"""Start a student from a dense model ("heavy upcycling"): plan.py decides, build.py makes the weights."""
