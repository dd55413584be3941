"""The two sides of an effect, and the set of data that each is about, in the order of all tensors and tables."""

SIDES = ("unlearn", "retain")
SETS = ("forget", "retain")
