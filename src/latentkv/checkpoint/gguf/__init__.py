"""What a GGUF file's metadata and tensor names mean, in the words of published checkpoints."""
