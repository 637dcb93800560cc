"""What makes a stage durable: identity, lease, attempt, record; the graph that Ray runs."""
