"""Speed-up by acceptance and batch: real costs of any configuration, with random weights and a recorded acceptance."""
