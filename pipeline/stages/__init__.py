"""Bodies of the stages, imported when a stage runs."""
