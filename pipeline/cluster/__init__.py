"""Ray clusters: jobs, checks before a run, checks of an installation."""
