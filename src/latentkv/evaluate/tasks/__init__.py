"""What is asked: each task makes its questions from text or numbers, the same ones for the same seed."""
