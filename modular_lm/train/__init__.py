"""Training: the loop (`trainer`), its checkpoints, its metrics, and the way in without Ray."""
