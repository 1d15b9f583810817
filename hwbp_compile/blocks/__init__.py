"""Equal blocks as one kernel, forward and backward, where rows of the batch do not depend on one another.

A small block is a few microseconds of arithmetic in many times as much of calls.
"""
