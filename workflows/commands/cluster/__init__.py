"""Commands that talk to a Ray cluster."""
