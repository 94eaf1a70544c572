"""Fleets: several kinds of replicas, what becomes of them, and what they take."""
