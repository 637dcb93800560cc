"""Commands that take a checkpoint."""
