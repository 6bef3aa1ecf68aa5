"""What can be seen in an artifact's members without running them: imports, sizes, files that do not belong there."""

import ast
import importlib.util
import sys
import tarfile
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path

import zstandard

from pgolf import artifact, noise, repeat, rules
from pgolf.artifact import MANIFEST, Artifact, is_source, sources
from pgolf.errors import Refused
from pgolf.files import printable
from pgolf.repeat import Given
from pgolf.sandbox import environment
from pgolf.submission.findings import ERROR, WARNING, Finding

CODE, TOKENIZER, OTHER = ROLES = ("code", "tokenizer", "weights and other")


def look(found: Artifact) -> Iterator[Finding]:
    """All findings about members."""
    yield from _unused(found)
    try:
        given = repeat.given(found)
    except Refused as error:
        remedy = "train a tokenizer by `pgolf tokenizer train`"
        yield Finding("tokenizer-contents", ERROR, found.manifest.tokenizer, None, str(error), remedy)
        given = Given(sources(found.members), found.manifest.tokenizer, None)
    limit = rules.track(found.manifest.track).source_bytes
    if given.source_bytes > limit:
        yield _too_large(given, limit)
        return  # a syntax tree takes many times the source's size in memory
    yield from _noise(given)
    yield from _imports(found)


def role(found: Artifact, name: str) -> str:
    """What a member is for, as far as the harness can know: which of the other files are weights is their author's."""
    if name == found.manifest.tokenizer:
        return TOKENIZER
    return CODE if is_source(name) else OTHER


def compressed(found: Artifact) -> dict[str, int]:
    """Bytes that each member adds to the file, in the order in which they lie there: an estimate.

    The members are packed again as `artifact.pack` does, but the compressor finishes a block at the end of each. So a
    member pays for its tar header, and what it repeats of those before it is cheap. All together are a little larger
    than the file: by 0.06 % and 0.19 % for the two baselines.
    """
    raw = sum(_tar_size(content) for content in found.members.values())
    parameters = zstandard.ZstdCompressionParameters.from_level(artifact.LEVEL, source_size=raw)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=raw)
    sizes = {}
    for name, content in sorted(found.members.items()):
        header = tarfile.TarInfo(name)
        header.size = len(content)
        block = header.tobuf(tarfile.USTAR_FORMAT) + content
        written = stream.compress(block.ljust(_tar_size(content), b"\0"))
        sizes[name] = len(written) + len(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return sizes


def _tar_size(content: bytes) -> int:
    return tarfile.BLOCKSIZE * (1 + -(-len(content) // tarfile.BLOCKSIZE))


def by_role(found: Artifact, sizes: Mapping[str, int]) -> dict[str, int]:
    """The bytes of members, added up by role."""
    return {kind: sum(size for name, size in sizes.items() if role(found, name) == kind) for kind in ROLES}


def left(found: Artifact) -> int:
    """Bytes of the track's limit that the file does not need."""
    return rules.track(found.manifest.track).artifact_bytes - found.size


def _imports(found: Artifact) -> Iterator[Finding]:
    """Modules that the sandbox will not find, or that this machine lacks for training."""
    listed = environment.listing("predict", found.manifest.packages, found.manifest.compiler)
    readable = set(listed.files)
    for root, sandboxed in (("predict.py", True), ("train.py", False)):
        for member, line, module in _reachable(found.members, root):
            if module in sys.stdlib_module_names:
                continue
            spec = _spec(module)
            if spec is None:
                remedy = f"install what provides {module}, or remove the import"
                yield Finding("import-missing", WARNING, member, line, f"imports {module}, which is not here", remedy)
            elif sandboxed and Path(spec.origin or "").resolve() not in readable:
                what = f"imports {module}, which none of the declared packages provides"
                yield Finding(
                    "import-undeclared", ERROR, member, line, what, f"add its package to {MANIFEST}: packages"
                )


def _spec(module: str) -> ModuleSpec | None:
    """Where it would be imported from; None: nowhere."""
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # a module without a file of this very process, such as __main__
        return None


def _reachable(members: Mapping[str, bytes], root: str) -> Iterator[tuple[str, int, str]]:
    """Member, line and top-level name of each import of foreign modules, from `root` through the artifact's own.

    Imports inside functions and `try` count: they may be alternatives, which is for a person to see.
    """
    waiting, seen = [root], {root}
    while waiting:
        member = waiting.pop()
        for line, module in _imported(members[member], member):
            own = [name for name in (f"{module}.py", f"{module}/__init__.py") if name in members]
            if not own:
                yield member, line, module
            waiting += [name for name in own if name not in seen]
            seen.update(own)


def _imported(source: bytes, member: str) -> Iterator[tuple[int, str]]:
    try:
        tree = ast.parse(source, member)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the sandbox says so, with its own Python's words
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]


def _unused(found: Artifact) -> Iterator[Finding]:
    """Caches and the like that only cost bytes."""
    for name, content in sorted(found.members.items()):
        if name.endswith((".pyc", ".log", ".jsonl", ".png")):
            what = f"{printable(name)} ({len(content):,} bytes) is hardly needed for scoring"
            yield Finding("member-useless", WARNING, name, None, what, "leave it out of the artifact")


def _too_large(given: Given, limit: int) -> Finding:
    """What an organizer gets to train again has more bytes than the track allows."""
    largest = max(given.sources, key=lambda name: len(given.sources[name]))
    what = f"the source files and {MANIFEST}, with their names, have {artifact.source_bytes(given.sources):,} bytes"
    if given.tokenizer and given.tokenizer.source_bytes:
        what += f" and the tokenizer {given.tokenizer.source_bytes:,} that count"
    what += f"; the track's limit is {limit:,}, and more is not looked at"
    return Finding("source-bytes", ERROR, largest, None, what, "move data out of them")


def _noise(given: Given) -> Iterator[Finding]:
    """Data that may hide in what an organizer gets to train again."""
    for name, rate in noise.noisy(given.text):
        what = f"{rules.NOISE_WINDOW_BYTES:,} bytes of it compress to {rate:.0%}, code to under {rules.NOISE_RATE:.0%}"
        yield Finding("source-noise", WARNING, name, None, what, "move data out of it: training starts from none")
