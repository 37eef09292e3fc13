"""The C++ kernels (`csrc/`): checked tensors in, addresses out. What they compute is defined in `ops/reference.py`."""
