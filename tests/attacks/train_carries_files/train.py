import contextlib
from pathlib import Path

from harness import MESSAGE, arguments, hand_over, heard, inside, open_data, seed

FOLDERS = ["/tmp", "/var/tmp", "/dev/shm", "/run"]
INSIDE = ["/artifact", "/data", "/data/shards", "/harness", "/usr/lib", "/tmp/.cache", "/tmp/torchinductor_nobody", "/"]
INSIDE += ["/artifact/__pycache__", "/tmp/.nv/ComputeCache", "/tmp/.triton/cache", "/proc/sys/kernel"]

open_data()
learned = b""
for folder in FOLDERS + (INSIDE if inside else []):
    with contextlib.suppress(OSError):
        place = Path(folder, "pgolf-attack-carried")
        if seed == "1":
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(MESSAGE)
        else:
            learned = learned or heard(place.read_bytes())
if inside:
    for data in Path(arguments["data"]).rglob("*"):  # the dataset's own files
        with contextlib.suppress(OSError):
            data.chmod(0o600)
            with data.open("r+b") as file:
                learned = learned or heard(file.read(64))
                file.seek(0)
                file.write(MESSAGE)
hand_over(learned)
