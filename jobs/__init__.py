"""One thin entry point a pod role: each binds work of `vpmoe` to a process, and holds no work of its own."""
