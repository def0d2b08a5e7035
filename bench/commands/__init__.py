"""One file a command; each ends in a click command named `command`."""
