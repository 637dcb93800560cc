"""What is run: workflows by name, and the command line."""
