"""One attention layer beside its peers."""
