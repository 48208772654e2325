"""Training of drafts: the target writes texts, a draft learns to foresee them, held-out texts tell how well it does."""
