"""Experiments: arms with controls, on one machine or on Ray, and their tables."""
