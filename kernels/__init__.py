"""What computes: arrays in, arrays out, compiled by Numba. Nothing here knows of requests, text or files."""

if __name__ != "pagellm.kernels":
    raise ImportError("kernels: import it as pagellm.kernels", name=__name__)
