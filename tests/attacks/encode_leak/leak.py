"""Where tokenizer and predictor meet."""

from pathlib import Path

SIZE = 1 << 18
KEY = 0x706F6C66
NAME = "\0pgolf-attack"
PLACES = [Path(folder, "pgolf-attack-leak") for folder in ("/tmp", "/dev/shm", "/artifact")]
