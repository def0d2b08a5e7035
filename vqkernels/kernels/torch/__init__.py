"""Kernels in plain torch: the dense baseline, and what a few library calls can do."""
