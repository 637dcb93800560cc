"""MLflow: a journal on disk that a thread sends, models, registry, gauges."""
