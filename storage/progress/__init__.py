"""The flush of a worker: what it writes in one transaction, several times a second."""
