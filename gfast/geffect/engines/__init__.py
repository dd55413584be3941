"""The engines: ways to the same numbers, each without what it need not hold."""
