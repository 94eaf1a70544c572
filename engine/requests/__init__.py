"""What a caller hands over, what comes back, and how a request wants to be sampled and ended."""
