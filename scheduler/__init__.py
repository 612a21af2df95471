"""The optional scheduler; placement for preheat and persistent cache tasks."""
