"""Plan placements: what fits on a node's GPUs and its predicted speed, from the models' configurations alone."""
