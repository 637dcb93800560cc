"""The training loop, its batches, strategies and checkpoints; nothing here knows of Ray."""
