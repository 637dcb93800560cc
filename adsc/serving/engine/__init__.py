"""All that imports vLLM, a file for each of its interfaces; `registration` hands them to it."""
