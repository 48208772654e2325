"""Draft training: generate text with the target, train a draft on it, evaluate the draft on held-out text."""
