"""The host's work on the engine's thread: in a step, and when prompts arrive."""
