"""The host's work on the draft trees of a step: compiled, and the same in NumPy for machines without a C compiler."""
