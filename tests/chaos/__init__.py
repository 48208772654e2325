"""Fault injection: run the whole service as real processes and break each of them."""
