"""One attention, three ways: kernels, PyTorch on a CPU, and the eager reference."""
