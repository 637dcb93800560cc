"""Plans within a budget: the space, trials, the study, Ray Tune."""
