"""One thin entry point per pod role. Each binds work in `vpmoe` to a process, and does no work of its own."""
