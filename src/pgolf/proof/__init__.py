"""Compression with a submission's predictor, and proof of a score by decompression."""
