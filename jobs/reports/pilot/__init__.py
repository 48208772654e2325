"""What a pilot predicts of its job: tokens, time and energy, each with an interval."""
