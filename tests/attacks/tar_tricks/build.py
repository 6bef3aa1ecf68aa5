"""What is hidden in one of these places would be free: a size counted by members does not see it."""

import struct
import tarfile

import zstandard

SECRET = b"weights " * 8


def variants(tar: bytes, member):
    """Name -> (artifact, what the refusal says); `member(**fields)` is one tar member with these header fields."""
    first = 512 + struct.unpack(">Q", int(tar[124:135], 8).to_bytes(8, "big"))[0]
    pad = -first % 512
    padded = tar[:first] + (SECRET * 8)[:pad] + tar[first + pad :]
    skippable = struct.pack("<II", 0x184D2A50, len(SECRET)) + SECRET
    return {
        "padding": (pack(padded), "bytes are hidden in the padding"),
        "after the end mark": (pack(tar + SECRET.ljust(512, b"\0")), "bytes are hidden after the tar's end mark"),
        "after the frame": (pack(tar) + SECRET, "bytes after the end of its zstd frame"),
        "skippable frame": (pack(tar) + skippable, "bytes after the end of its zstd frame"),
        "skippable frame first": (skippable + pack(tar), "bytes after the end of its zstd frame"),
        "second frame": (pack(tar) + pack(SECRET), "bytes after the end of its zstd frame"),
        "twice": (pack(member(name="predict.py") + tar), "holds this member twice"),
        "parent": (pack(member(name="../score.json") + tar), "'..' path parts are not allowed"),
        "absolute": (pack(member(name="/tmp/score.json") + tar), "absolute paths are not allowed"),
        "device": (pack(member(name="x", type=tarfile.CHRTYPE) + tar), "only regular files and folders"),
        "long name": (pack(member(name="x", type=tarfile.GNUTYPE_LONGNAME) + tar), "only regular files and folders"),
        "pax header": (pack(member(name="x", type=tarfile.XHDTYPE) + tar), "only regular files and folders"),
    }


def pack(data: bytes) -> bytes:
    return zstandard.compress(data)
