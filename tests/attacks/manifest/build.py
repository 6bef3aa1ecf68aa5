import json


def variants(manifest: dict) -> dict[str, tuple[bytes, str]]:
    """Name -> (submission.json, what the refusal says)."""

    def changed(**fields) -> bytes:
        return json.dumps(manifest | fields).encode()

    return {
        "large": (changed(name=[[[]]] * 40_000), "the limit is 65,536"),
        "nested": (b'{"name":' + b"[" * 60_000, "is not JSON"),
        "long number": (b'{"name":' + b"1" * 60_000 + b"}", "is not JSON"),
        "endless name": (changed(name="n" * 60_000), "name is"),
        "terminal codes": (changed(author="\x1b[2J"), "author is"),
        "over the bound": (changed(lanes=4096, vocab_size=(1 << 14) + 1), "vocab_size times lanes is over 67,108,864"),
        "lanes": (changed(lanes=4097), "lanes is 4097"),
        "no lanes": (changed(lanes=0), "lanes is 0"),
        "lanes by halves": (changed(lanes=1.5), "lanes is 1.5"),
        "lanes that are true": (changed(lanes=True), "lanes is True"),
        "vocabulary": (changed(vocab_size=1 << 21), "vocab_size is 2097152"),
        "bos in the bytes": (changed(bos=65), "bos is 65"),
        "transform": (changed(transform="rot13"), "transform is 'rot13'"),
        "layout": (changed(layout="longest first"), "layout is 'longest first'"),
        "retired form": (changed(form="streaming"), "is retired"),
        "window of a step form": (changed(context=64), "context has no meaning in the step form"),
        "tokenizer elsewhere": (changed(tokenizer="../t.model"), "which is not in the artifact"),
    }
