"""The ops as Triton kernels: on a GPU, and on a CPU through Triton's interpreter for tests. Imports triton lazily."""
