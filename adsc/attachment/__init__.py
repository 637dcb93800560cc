"""Attaching a plan: hooks, adapters and checkpoints that carry it, calls under another plan."""
