"""A score is a code length: here is the code, and the decoder."""
