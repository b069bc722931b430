"""GPU kernels of our own, in Triton. Nothing here is imported where there is no GPU."""
