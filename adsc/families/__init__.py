"""What differs between model families: one file a family; `table` holds them all.

A new family is a file here, a row of `table.FAMILIES`, and a row in the tests (docs/extending.md).
"""
