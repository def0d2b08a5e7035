"""The regression gate: is a candidate slower than its baseline, on this machine, now."""
