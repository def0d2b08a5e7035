"""Measuring kernels and searching their spaces.

Sits between the kernels (which know nothing of it) and the command line: evaluating one config
honestly is this package's whole subject.
"""
