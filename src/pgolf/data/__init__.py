"""Data: token shards, dataset folders, and the two ways to make one (build, demo)."""
