"""Processes of a pod: the launcher of training ranks and its signals, and one worker of a step made in parts."""
