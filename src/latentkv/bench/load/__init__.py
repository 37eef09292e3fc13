"""A server under load, and what serving costs."""
