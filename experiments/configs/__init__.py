"""Experiment records: each file's docstring has the paper, the command and what to expect."""
