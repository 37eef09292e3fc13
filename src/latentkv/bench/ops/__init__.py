"""Single ops beside their ceilings."""
