"""The language model under comparison: a Llama decoder and its initial weights."""
