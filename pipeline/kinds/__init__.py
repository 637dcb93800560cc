"""The kinds of stages of a compression: config and identity, one file per kind.

The bodies are in pipeline/stages, in files of the same names. To build, list or compare stages,
only these files are imported: no torch, no Ray, no numpy.
"""
