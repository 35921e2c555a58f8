"""The command `vpmoe`: main.py reads the command line, each other module is one subcommand."""
