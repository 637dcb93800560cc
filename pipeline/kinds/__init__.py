"""What each stage of a compression is: its config and its identity, a file a kind.

What the stages do stands in pipeline/stages, in files of the same names. Whoever makes, lists or
compares stages imports these files alone: no torch, no Ray, no numpy.
"""
