"""The drop: which tokens stay, the hooks that cut, what caches and outputs then hold."""
