"""The kinds of training stage. What differs between them is in one file each; nothing else in the trainer
knows the kind.

To add a kind: a class in vpmoe/api/stages.py, an objective in vpmoe/objectives, a file here, and its case in
select.py.
"""
