"""One run: from a frozen config to a finished run directory."""
