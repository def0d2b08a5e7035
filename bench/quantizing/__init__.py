"""A model's linear layers quantised, one at a time: which, how, and what is left to do."""
