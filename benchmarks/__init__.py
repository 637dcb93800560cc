"""Ratios measured within one run; docs/performance.md explains how to read them."""
