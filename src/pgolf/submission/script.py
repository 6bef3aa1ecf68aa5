"""A script of the Parameter Golf contest, read without running it.

It trains, saves, loads what it saved and evaluates, all in its main. What scores it needs is a slice of that: the
statements that make the model and load the weights into it.
"""

import ast
import base64
import builtins
import bz2
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pgolf.errors import Refused

SOURCE_BYTES = 4_000_000
_MEMORY_BYTES = 256 * 1024 * 1024
_EVALUATES = re.compile(r"eval|valid|score", re.IGNORECASE)
_MUTATES = {"to", "bfloat16", "float", "half", "double", "eval", "requires_grad_", "append", "extend", "update", "pop"}
_GIVEN = {"device"}
"""Names that predict.py defines."""


@dataclass(frozen=True)
class Script:
    """A script. Its code may be compressed in it."""

    name: str
    source: str
    """The readable code."""
    tree: ast.Module


@dataclass(frozen=True)
class Loader:
    """How a script makes its model."""

    source: str
    """Statements to run in the script's module, where `device` is defined."""
    model: str
    """The variable that holds the model then."""
    lines: tuple[int, ...]
    """Lines of the script that they are from."""
    skipped: tuple[str, ...]
    """Statements that change the model in loops, which are left out: what training switches on."""


def parse(name: str, data: bytes) -> Script:
    """Read a script. Raises Refused when it is no Python, or compressed in a way that is not known."""
    try:
        source = data.decode("utf-8")
        tree = ast.parse(source)
        if packed := _packed(tree):
            source = packed.decode("utf-8")
            tree = ast.parse(source)
    except UnicodeDecodeError:
        raise Refused(f"{name}: is not UTF-8 text") from None
    except SyntaxError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise Refused(f"{name}: is not Python {version} ({error.msg}, line {error.lineno})") from None
    except (ValueError, RecursionError, MemoryError):
        raise Refused(f"{name}: is not Python that can be read") from None
    script = Script(name, source, tree)
    if not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree)):
        if any(isinstance(node, ast.Call) and _called(node) == "exec" for node in ast.walk(tree)):
            raise Refused(f"{name}: runs code from elsewhere; import the file that holds the model's classes")
        raise Refused(f"{name}: defines no model: it has no class")
    return script


def _packed(tree: ast.Module) -> bytes | None:
    """The source in `exec(lzma.decompress(base64.b85decode("...")))` and the like, which is decoded, not run."""
    modules = {"lzma": lzma, "zlib": zlib, "bz2": bz2, "base64": base64}
    named = {
        alias.asname or alias.name: modules[alias.name]
        for node in tree.body
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name in modules
    }
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _called(node.value) == "exec":
            argument = node.value.args[0] if node.value.args else None
            if isinstance(argument, ast.Call) and _called(argument) == "compile" and argument.args:
                argument = argument.args[0]
            if isinstance(argument, ast.Call) and _called(argument) == "decode" and not argument.args:
                assert isinstance(argument.func, ast.Attribute)
                argument = argument.func.value  # bytes.decode()
            found = _value(argument, named)
            return found.encode() if isinstance(found, str) else found
    return None


def _value(node: ast.AST | None, modules: Mapping[str, Any]) -> Any:
    """A literal, a constant of `modules`, or what their decoders make of one; None for anything else."""
    match node:
        case ast.Constant(value):
            return value
        case ast.List(elts):
            return [_value(each, modules) for each in elts]
        case ast.Dict(keys, values):
            return {_value(k, modules): _value(v, modules) for k, v in zip(keys, values, strict=True)}
        case ast.Attribute(ast.Name(module), name) if module in modules and re.match("F(ORMAT|ILTER)_", name):
            return getattr(modules[module], name, None)
        case ast.Call(ast.Attribute(ast.Name(module), name), [inner], keywords) if module in modules:
            data = _value(inner, modules)
            options = {word.arg: _value(word.value, modules) for word in keywords if word.arg}
            try:
                return _decode(modules[module], name, data, options)
            except (ValueError, TypeError, OverflowError, EOFError, MemoryError, lzma.LZMAError, zlib.error, OSError):
                return None
    return None


def _decode(module: Any, name: str, data: Any, options: dict[str, Any]) -> bytes | None:
    if module is base64 and name in ("b64decode", "b85decode", "a85decode"):
        return bytes(getattr(base64, name)(data))
    if name != "decompress" or not isinstance(data, bytes):
        return None
    if module is lzma:
        limit: dict[str, Any] = {} if options.get("format") == lzma.FORMAT_RAW else {"memlimit": _MEMORY_BYTES}
        return lzma.LZMADecompressor(**options, **limit).decompress(data, SOURCE_BYTES)
    if module is bz2:
        return bz2.BZ2Decompressor().decompress(data, SOURCE_BYTES)
    return zlib.decompressobj(int(options.get("wbits", zlib.MAX_WBITS))).decompress(data, SOURCE_BYTES)


def _called(call: ast.Call) -> str:
    """Name of the function or method that a call calls."""
    return (
        call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "") or type(call.func).__name__
    )


def names(script: Script, name: str) -> bool:
    """Whether the script names the environment variable `name`."""
    texts = (node.value for node in ast.walk(script.tree) if isinstance(node, ast.Constant))
    return name in {text for text in texts if isinstance(text, str)}


def setting(script: Script, name: str, env: Mapping[str, str]) -> int | None:
    """A whole number that the script reads from the environment: of `env`, or its default; None if there is none."""
    if name in env:
        return int(env[name]) if re.fullmatch(r"\d{1,9}", env[name]) else None
    for node in ast.walk(script.tree):
        if isinstance(node, ast.Call) and len(node.args) >= 2:
            key, default = node.args[0], node.args[1]
            if isinstance(key, ast.Constant) and key.value == name and isinstance(default, ast.Constant):
                text = str(default.value).replace("_", "")
                return int(text) if re.fullmatch(r"\d{1,9}", text) else None
    return None


def imports(script: Script, everywhere: bool = False) -> set[str]:
    """Top-level names of the packages that the script imports: those without which its import fails, or all."""
    nodes = ast.walk(script.tree) if everywhere else iter(script.tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def evaluations(script: Script) -> list[str]:
    """Functions that are the script's own evaluation or training at test time, which a score does not run."""
    pattern = re.compile(r"(^|_)(evals?|ttt|slot)(_|$)", re.IGNORECASE)
    functions = (node for node in script.tree.body if isinstance(node, ast.FunctionDef))
    return [function.name for function in functions if pattern.search(function.name)]


def check_import(script: Script) -> None:
    """Raises Refused when importing the script would run it."""
    trains = {f.name for f in _functions(script.tree).values() if f.name == "main" or _trains(f)}
    for node in script.tree.body:
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _called(node.value) in trains:
            raise Refused(
                f"{script.name}: line {line} calls {_called(node.value)}, so that importing the file runs it; put the "
                'call under `if __name__ == "__main__":`'
            )
        body = not isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not _is_main_guard(node)
        if body and _trains(node):
            raise Refused(
                f"{script.name}: line {line} trains or loads when the file is imported; move it into a function main, "
                'called under `if __name__ == "__main__":`'
            )


def _trains(node: ast.AST) -> bool:
    calls = (each for each in ast.walk(node) if isinstance(each, ast.Call))
    return any(_called(call) in ("backward", "load_state_dict") for call in calls)


def _is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in _loads(node.test)


def _functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def loader(script: Script) -> Loader:
    """The statements of the script that make its model and load the weights into it, the last way if it has several.

    Raises Refused, saying why, when there is none that can be followed.
    """
    try:
        return _Slicer(script).loader()
    except RecursionError:
        raise Refused(f"{script.name}: is nested too deeply to be followed") from None


class _Slicer:
    """A backward slice of the function that loads the weights, as far as names go, without loops that train."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.functions = _functions(script.tree)
        for node in script.tree.body:
            if _is_main_guard(node):
                assert isinstance(node, ast.If)
                body = ast.FunctionDef("<main>", ast.arguments([], [], None, [], [], None, []), node.body, [])
                self.functions[body.name] = body
        self.classes = {node.name for node in script.tree.body if isinstance(node, ast.ClassDef)}
        self.imported = {
            n for node in script.tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) for n in _binds(node)
        }
        module = {name for node in script.tree.body if not _is_main_guard(node) for name in _binds(node)}
        self.known = module | set(dir(builtins)) | _GIVEN | {"__file__", "__name__"}

    def loader(self) -> Loader:
        """The loader of weights that are read from a file: the last one, of those under the fewest conditions."""
        found: Loader | None = None
        conditions = 0
        why = "nothing in it hands the result of torch.load to a model's load_state_dict"
        for function in self.functions.values():
            for path in _paths(function.body, _loads_state):
                if found and len(path.blocks) > conditions:
                    continue
                try:
                    if other := self._loader(function, path):
                        found, conditions = other, len(path.blocks)
                except Refused as error:
                    why = str(error)
        if found is None:
            raise Refused(f"{self.script.name}: how it loads its weights cannot be followed: {why}")
        return found

    def _loader(self, function: ast.FunctionDef, path: "_Path") -> Loader | None:
        target = path.statement
        assert isinstance(target, ast.Expr) and isinstance(target.value, ast.Call)
        assert isinstance(target.value.func, ast.Attribute)
        model = ast.unparse(target.value.func.value)
        parameters = [argument.arg for argument in function.args.args]
        if not parameters:
            sliced = self._slice(function, path, model)
            return self._finished(sliced, model) if _reads_file(sliced) else None
        if not _reads_file([function]):
            return None
        # A function that is handed something: it runs as it is, where another one calls it.
        for caller in self.functions.values():
            for site in _paths(caller.body, lambda node: _calls(node, function.name)):
                call = next(
                    c for c in ast.walk(site.statement) if isinstance(c, ast.Call) and _called(c) == function.name
                )
                given = _assigned(site.statement)
                if model in parameters and parameters.index(model) < len(call.args):
                    given = ast.unparse(call.args[parameters.index(model)])
                if given:
                    return self._finished(self._slice(caller, site, given), given)
        raise Refused(f"{function.name}, in line {function.lineno}, is not called in a way that gives the model a name")

    def _finished(self, statements: list[ast.stmt], model: str) -> Loader:
        lines = sorted({node.lineno for node in statements})
        module = ast.fix_missing_locations(ast.Module(statements, []))
        return Loader(ast.unparse(module) + "\n", model, tuple(lines), self._switches(model))

    def _switches(self, model: str) -> tuple[str, ...]:
        """Assignments to attributes of the model, or calls such as `model.set_depth(2)`, in loops."""
        loops = (n for f in self.functions.values() for n in ast.walk(f) if isinstance(n, (ast.While, ast.For)))
        found: dict[str, None] = {}
        for node in (node for loop in loops for node in ast.walk(loop)):
            assigns = isinstance(node, ast.Assign) and any(_owner(target) == model for target in node.targets)
            calls = isinstance(node, ast.Call) and _owner(node.func) == model
            if assigns or (isinstance(node, ast.Call) and calls and re.match("set_|enable_|activate", _called(node))):
                assert isinstance(node, (ast.stmt, ast.expr))
                found[f"line {node.lineno}: {ast.unparse(node):.80}"] = None
        return tuple(found)

    def _slice(self, function: ast.FunctionDef, path: "_Path", model: str) -> list[ast.stmt]:
        """What `path` ends in, what it needs before it, and what changes the model after it, before it is used."""
        after: list[ast.stmt] = []
        needed = {model}
        for statement in path.after():
            if _evaluates(statement):
                break
            own = {model}
            if kept := self._keep(statement, own):
                after.append(kept)
                needed |= own - _binds(kept)
        needed = needed - _binds(path.statement) | _loads(path.statement)
        before = self._before(function, path, needed)
        return [*before, path.statement, *after]

    def _before(self, function: ast.FunctionDef, path: "_Path", needed: set[str]) -> list[ast.stmt]:
        """Statements before the end of `path` that define `needed`, and arguments that callers hand over."""
        needed -= _GIVEN
        kept = self._backward(path.before(), needed)
        missing = needed - self.known
        arguments = function.args.args
        handed = [argument for argument in arguments if argument.arg in missing]
        if handed:
            kept = [*self._handed(function, [arguments.index(a) for a in handed]), *kept]
            missing -= {argument.arg for argument in handed}
        if missing:
            raise Refused(f"line {path.statement.lineno} needs {', '.join(sorted(missing))}, which it gets from a loop")
        return kept

    def _handed(self, function: ast.FunctionDef, indices: Sequence[int]) -> list[ast.stmt]:
        """Statements that give parameters of `function` the values that its first caller hands over."""
        for caller in self.functions.values():
            for site in _paths(caller.body, lambda node: _calls(node, function.name)):
                call = next(
                    c for c in ast.walk(site.statement) if isinstance(c, ast.Call) and _called(c) == function.name
                )
                if max(indices) < len(call.args):
                    pairs = [(function.args.args[index].arg, call.args[index]) for index in indices]
                    given = [ast.parse(f"{n} = {ast.unparse(v)}").body[0] for n, v in pairs if ast.unparse(v) != n]
                    for statement in given:
                        ast.increment_lineno(statement, site.statement.lineno - 1)
                    needed = {name for _, value in pairs for name in _loads(value)}
                    return [*self._before(caller, site, needed), *given]
        raise Refused(f"nothing calls {function.name}, in line {function.lineno}")

    def _backward(self, statements: Sequence[ast.stmt], needed: set[str]) -> list[ast.stmt]:
        """Those of the statements that define or change what is in `needed`, which becomes what they need."""
        kept: list[ast.stmt] = []
        for statement in reversed(statements):
            if found := self._keep(statement, needed):
                kept.append(found)
        return kept[::-1]

    def _keep(self, node: ast.stmt, needed: set[str]) -> ast.stmt | None:
        match node:
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                roots = {root for target in targets if (root := _root(target))} - self.imported
                if not (_binds(node) | roots) & needed and not roots & self.classes:
                    return None
                if not isinstance(node, ast.AugAssign):
                    needed -= _binds(node)
                needed |= _loads(node)
            case ast.Expr(ast.Call() as call):
                if not self._changes(call, needed):
                    return None
                needed |= _loads(call)
            case ast.For():
                if _trains(node) or not self._loop_changes(node, needed):
                    return None
                needed |= _loads(node) - _binds(node)
            case ast.With():
                body = self._backward(node.body, needed)
                if not body:
                    return None
                for item in node.items:
                    needed -= _stores(item.optional_vars) if item.optional_vars else set()
                    needed |= _loads(item.context_expr)
                return ast.copy_location(ast.With(node.items, body), node)
            case ast.If():
                first, second = set(needed), set(needed)
                body, orelse = self._backward(node.body, first), self._backward(node.orelse, second)
                if not body and not orelse:
                    return None
                needed.clear()
                needed |= first | second | _loads(node.test)
                return ast.copy_location(ast.If(node.test, body or [ast.Pass()], orelse), node)
            case ast.Try():
                inner = set(needed)
                body = self._backward(node.body, inner)
                if not body:
                    return None
                needed |= inner | {name for handler in node.handlers for name in _loads(handler)} - _binds(node)
                return ast.copy_location(ast.Try(body, node.handlers, [], []), node)
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef():
                if not _binds(node) & needed:
                    return None
                needed -= _binds(node)
                if isinstance(node, ast.FunctionDef):
                    own = {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
                    needed |= _loads(node) - own - {name for each in node.body for name in _binds(each)}
            case _:
                return None
        needed -= _GIVEN
        return node

    def _changes(self, call: ast.Call, needed: set[str]) -> bool:
        """Whether a call that stands alone changes something needed: `model.to(x)`, `cast(model)`."""
        if isinstance(call.func, ast.Attribute):
            into_buffer = ast.unparse(call.func) == "torch.save" and len(call.args) == 2
            if into_buffer and isinstance(call.args[1], ast.Name):
                return call.args[1].id in needed
            return _root(call.func) in needed and call.func.attr in _MUTATES
        alone = len(call.args) == 1 and not call.keywords and isinstance(call.args[0], ast.Name)
        if not alone or not isinstance(call.func, ast.Name) or call.func.id not in self.functions:
            return False
        function = self.functions[call.func.id]
        elsewhere = any(isinstance(node, ast.Global) for node in ast.walk(function))
        return ast.unparse(call.args[0]) in needed and not elsewhere and not _trains(function)

    def _loop_changes(self, loop: ast.For, needed: set[str]) -> bool:
        """Whether a loop builds something needed, or changes what it goes over, and that is needed."""
        own, items = _binds(loop), _stores(loop.target)
        touched = {root for node in ast.walk(loop) if isinstance(node, ast.stmt) for root in _touched(node)}
        if (own - items | touched) & needed:
            return True
        calls = (node.func for node in ast.walk(loop) if isinstance(node, ast.Call))
        touched |= {root for f in calls if isinstance(f, ast.Attribute) and f.attr in _MUTATES and (root := _root(f))}
        return bool(_loads(loop.iter) & needed and touched & items) and _loads(loop) <= needed | own | self.known


@dataclass(frozen=True)
class _Path:
    """Where a statement stands: blocks from the outermost one, and its index, or that of what holds it, in each."""

    blocks: tuple[Sequence[ast.stmt], ...]
    indices: tuple[int, ...]

    @property
    def statement(self) -> ast.stmt:
        return self.blocks[-1][self.indices[-1]]

    def before(self) -> list[ast.stmt]:
        """What has run before it."""
        return [s for block, index in zip(self.blocks, self.indices, strict=True) for s in block[:index]]

    def after(self) -> list[ast.stmt]:
        """What runs after it, from its own block outwards."""
        pairs = list(zip(self.blocks, self.indices, strict=True))
        return [s for block, index in reversed(pairs) for s in block[index + 1 :]]


def _paths(
    block: Sequence[ast.stmt], wanted: Callable[[ast.stmt], bool], outer: _Path | None = None
) -> Iterator[_Path]:
    """Paths to the statements that `wanted` accepts, in their order; not into functions and classes."""
    for index, node in enumerate(block):
        path = _Path((*(outer.blocks if outer else ()), block), (*(outer.indices if outer else ()), index))
        inner = [getattr(node, field, []) for field in ("body", "orelse", "finalbody")]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        if any(inner):
            for part in inner:
                yield from _paths(part, wanted, path)
        elif wanted(node):
            yield path


def _loads_state(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "load_state_dict"
        and isinstance(node.value.func.value, ast.Name)
    )


def _calls(node: ast.AST, name: str) -> bool:
    return any(isinstance(call, ast.Call) and _called(call) == name for call in ast.walk(node))


def _reads_file(nodes: Sequence[ast.AST]) -> bool:
    text = "\n".join(ast.unparse(node) for node in nodes)
    return "torch.load(" in text or "open(" in text


def _evaluates(node: ast.AST) -> bool:
    calls = (each for each in ast.walk(node) if isinstance(each, ast.Call))
    return any(_EVALUATES.search(_called(call)) and _called(call) != "eval" for call in calls)


def _assigned(node: ast.stmt) -> str | None:
    """The variable that a statement assigns to, if it is one."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _root(node: ast.AST) -> str | None:
    """`model` of `model.a[0].b`; None for a plain name."""
    if not isinstance(node, (ast.Attribute, ast.Subscript)):
        return None
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _owner(node: ast.AST) -> str | None:
    """`model` of `model.a`, and of nothing longer."""
    return node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else None


def _touched(node: ast.stmt) -> set[str]:
    """Names whose attributes or items a simple statement assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
    return {root for target in targets if (root := _root(target))}


def _stores(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}


def _binds(node: ast.AST) -> set[str]:
    """Names that a statement defines, however deep in it; not inside functions, classes and comprehensions."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)):
        return set()
    return {name for child in ast.iter_child_nodes(node) for name in _binds(child)}


def _loads(node: ast.AST) -> set[str]:
    """Names that a node reads and does not bind in comprehensions or lambdas of its own."""
    own: set[str] = set()
    for each in ast.walk(node):
        if isinstance(each, ast.comprehension):
            own |= _stores(each.target)
        elif isinstance(each, ast.Lambda):
            own |= {argument.arg for argument in each.args.args}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - own


def unused(given: Collection[str], script: Script) -> list[str]:
    """Those of the environment variables `given` that the script does not name."""
    return sorted(name for name in given if not names(script, name))
