"""The `pgolf` command: a file for each group of commands."""
