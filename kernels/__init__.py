"""Pure torch kernels."""
