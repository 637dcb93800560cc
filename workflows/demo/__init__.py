"""The demo: its pictures, its questions, its small model."""
