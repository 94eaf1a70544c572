"""Measuring a machine and a model into a profile of step times."""
