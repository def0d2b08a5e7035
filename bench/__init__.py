"""The command line: workloads, runs, records and reports.

Thin over `autotune` (what measuring means) and `vqkernels` (what is measured).
"""
