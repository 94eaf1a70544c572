"""What computes: arrays in, arrays out, compiled by Numba. Nothing here knows of requests, text or files."""
