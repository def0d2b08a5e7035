"""Tables over results of any runs: what may be compared, matched, with intervals."""
