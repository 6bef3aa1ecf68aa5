"""Data: token shards, dataset folders, transforms; `build` writes datasets."""
