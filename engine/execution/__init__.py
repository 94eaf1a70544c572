"""From scheduled batches to tokens: memory, weights, compiled kernels, and the runner that calls them."""
