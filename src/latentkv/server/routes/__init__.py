"""One file a group of paths."""
