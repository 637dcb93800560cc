"""Checkpoints at an address of their own: manifest, upload, verification, pull."""
