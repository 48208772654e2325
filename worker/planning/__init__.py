"""Planning: what fits on a node's GPUs and how fast it should be, from the models' configurations alone."""
