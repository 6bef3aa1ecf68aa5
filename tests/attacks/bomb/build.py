import zstandard


def variants(tar: bytes, member):
    """Name -> (artifact, what the refusal says)."""
    endless = zstandard.ZstdCompressor().compressobj()
    zeros = b"".join(endless.compress(bytes(1 << 24)) for _ in range(64)) + endless.flush()
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=29, enable_ldm=True)
    window = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    crowd = b"".join(member(name=f"m{number}") for number in range(1000))
    return {
        "zeros": (zeros, "unpacks to more than 268,435,456 bytes"),
        "window": (window.compress(tar) + window.flush(), "not a sound zstd frame"),
        "crowd": (zstandard.compress(crowd + tar), "more than 256 members"),
    }
