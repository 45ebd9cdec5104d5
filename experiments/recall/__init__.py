"""Recall against the size of the state: the parts of the program `recall_sweep`."""
