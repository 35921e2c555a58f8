"""Three small tasks that need no download, as descriptions of lm-evaluation-harness (*.yaml) with their
questions (*.jsonl). make.py has written the questions; loader.py reads them."""
