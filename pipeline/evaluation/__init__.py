"""Greedy answers, benchmarks, scores with intervals, speed; lmms-eval and vLLM."""
