"""Durable stages on Ray: data, training, search, evaluation, stores, tracking."""
