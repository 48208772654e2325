"""Faults on purpose: the whole service as real processes, and what may happen to each of them."""
