"""Settings of every test."""

from __future__ import annotations

import signal

import hypothesis
import torch

# One thread: small products do not wait for each other, and results do not vary.
torch.set_num_threads(1)

# The same examples every time: a run that fails can be run again.
hypothesis.settings.register_profile("latentkv", derandomize=True)
hypothesis.settings.load_profile("latentkv")

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would the programs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
