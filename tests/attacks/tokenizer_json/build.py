"""The library reads them inside the sandboxes that encode and decode; what counts is that the text comes back."""

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LOSSY = "the tokenizer is lossy"
FIRST = "This text is the first document of the attack suite."


def sound() -> dict[str, Any]:
    """Bytes, as the library writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate([*alphabet, "<bos>"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return json.loads(tokenizer.to_str())


def variants() -> dict[str, tuple[bytes, str]]:
    """Name -> (tokenizer.json, what the refusal says; nothing if it is accepted)."""

    def changed(**fields: Any) -> bytes:
        return json.dumps(sound() | fields).encode()

    def split(pattern: str) -> dict[str, Any]:
        first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [first, sound()["pre_tokenizer"]]}

    def replace(pattern: str, content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": {"String": pattern}, "content": content}

    def added(content: str) -> list[dict[str, Any]]:
        flags = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": True}
        return [{"id": 257, "content": content, **flags}]

    huge = sound()["model"]
    huge["vocab"] |= {f"never{number}": 257 + number for number in range(100_000)}
    lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    grows = {"type": "Sequence", "decoders": [sound()["decoder"], replace("e", "e" * 10_000)]}

    def pads(strategy: Any) -> dict[str, Any]:
        kind = {"direction": "Right", "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "<pad>"}
        return {"padding": {"strategy": strategy, "pad_id": 257, **kind}, "added_tokens": added("<pad>")}

    merged = {"dropout": 0.5, "merges": [["t", "h"]], "vocab": sound()["model"]["vocab"] | {"th": 257}}
    unpad = {"type": "Sequence", "decoders": [replace("<pad>", ""), sound()["decoder"]]}
    return {
        "sound": (changed(), ""),
        "huge table": (changed(model=huge), ""),
        "catastrophic pattern": (changed(pre_tokenizer=split("(([a-z ])+.)+[A-Z]([a-z ])+$")), "MAY TAKE FOREVER"),
        "pattern that does not close": (changed(pre_tokenizer=split("(")), "encode: "),
        "nested": (b'{"added_tokens": ' + b"[" * 100_000, "encode: "),
        "nested decoder": (b'{"decoder": ' + b'{"type": "Sequence", "decoders": [' * 50_000, "encode: "),
        "cut off": (changed()[:-100], "encode: "),
        "not JSON": (b"\xff\xfe\0", "encode: "),
        "truncates": (
            changed(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
            LOSSY,
        ),
        "swallows spaces": (changed(added_tokens=added("is")), LOSSY),
        "folds case": (changed(normalizer=lower), LOSSY),
        "decoder grows": (changed(decoder=grows), "bytes of TEXTS where at most"),
        "decoder invents": (changed(decoder={"type": "Sequence", "decoders": [replace("T", FIRST)]}), LOSSY),
        "pads to the longest text of a group": (changed(**pads("BatchLongest"), decoder=unpad), ""),
        "pads to a length": (changed(**pads({"Fixed": 20_000}), decoder=unpad), "bytes of TOKENS where at most"),
        "pads are text": (changed(**pads("BatchLongest")), LOSSY),
        "segments at random": (changed(model=sound()["model"] | merged), ""),
        "drops unknown bytes": (
            changed(model=sound()["model"] | {"vocab": {"e": 0, "<bos>": 256}, "unk_token": None}),
            LOSSY,
        ),
        "no decoder": (changed(decoder=None), LOSSY),
    }
