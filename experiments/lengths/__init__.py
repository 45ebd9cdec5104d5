"""Speed and loss against the length of the sequence: the parts of the programs `length_*`."""
