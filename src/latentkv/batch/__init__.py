"""Many requests of a file, in the form of OpenAI's batches, answered into another."""
