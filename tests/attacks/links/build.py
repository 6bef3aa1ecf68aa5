import tarfile

import zstandard


def variants(tar: bytes, member):
    """Name -> (artifact, what the refusal says)."""
    words = "only regular files and folders may be in an artifact"
    kinds = {"symbolic": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}
    return {
        f"{kind} link to {target}": (
            zstandard.compress(member(name="text.txt", type=code, linkname=target) + tar),
            words,
        )
        for kind, code in kinds.items()
        for target in ("/etc/passwd", "../../data/val_documents.jsonl", "predict.py")
    }
