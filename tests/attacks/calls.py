"""Pickles that would run code. Each payload creates the marker file, or would reach what can."""

from __future__ import annotations

from collections.abc import Iterator

from . import ops
from .case import MARK, Case, file

TOUCH = ops.text(f"touch {MARK}")
OPEN = ops.text(f"open({MARK!r}, 'w')")
SYSTEM = ops.named("os", "system")
RUN = "would run code"


def _reduce() -> dict[str, tuple[bytes, str]]:
    """Calls by GLOBAL and REDUCE, and the name that the refusal must give."""
    code = ops.text(f"import os; os.system('touch {MARK}')")
    return {
        "os.system": (ops.call("os", "system", TOUCH), "os.system"),
        "posix.system": (ops.call("posix", "system", TOUCH), "posix.system"),
        "os.popen": (ops.call("os", "popen", TOUCH), "os.popen"),
        "eval": (ops.call("builtins", "eval", OPEN), "builtins.eval"),
        "exec": (ops.call("builtins", "exec", OPEN), "builtins.exec"),
        "compile": (ops.call("builtins", "compile", OPEN, ops.text("x"), ops.text("exec")), "builtins.compile"),
        "open": (ops.call("builtins", "open", ops.text(MARK), ops.text("w")), "builtins.open"),
        "python 2 eval": (ops.call("__builtin__", "eval", OPEN), "builtins.eval"),
        "python 2 commands": (ops.call("commands", "getoutput", TOUCH), "subprocess.getoutput"),
        "import": (ops.call("builtins", "__import__", ops.text("os")), "builtins.__import__"),
        "importlib": (ops.call("importlib", "import_module", ops.text("os")), "importlib.import_module"),
        "subprocess": (ops.call("subprocess", "Popen", b"](" + ops.text("touch") + ops.text(MARK) + b"e"), "Popen"),
        "subprocess.run": (ops.call("subprocess", "run", TOUCH), "subprocess.run"),
        "runpy": (ops.call("runpy", "run_path", ops.text("evil.py")), "runpy.run_path"),
        "runpy code": (ops.call("runpy", "_run_code", code, b"}"), "runpy._run_code"),
        "pty": (ops.call("pty", "spawn", ops.text("sh")), "pty.spawn"),
        "webbrowser": (ops.call("webbrowser", "open", ops.text("file:///")), "webbrowser.open"),
        "webbrowser class": (ops.call("webbrowser", "GenericBrowser", TOUCH), "webbrowser.GenericBrowser"),
        "ctypes": (ops.call("ctypes", "CDLL", ops.text("libc.so.6")), "ctypes.CDLL"),
        "timeit": (ops.call("timeit", "timeit", OPEN), "timeit.timeit"),
        "cProfile": (ops.call("cProfile", "run", OPEN), "cProfile.run"),
        "code": (ops.call("code", "InteractiveInterpreter"), "code.InteractiveInterpreter"),
        "bdb": (ops.call("bdb", "Bdb"), "bdb.Bdb"),
        "pickle.loads": (ops.call("pickle", "loads", ops.text("x")), "pickle.loads"),
        "_pickle.loads": (ops.call("_pickle", "loads", ops.text("x")), "_pickle.loads"),
        "marshal": (ops.call("marshal", "loads", ops.text("x")), "marshal.loads"),
        "function": (ops.call("types", "FunctionType", b"N", b"}"), "types.FunctionType"),
        "torch.load": (ops.call("torch", "load", ops.text("evil.pt")), "torch.load"),
        "torch.serialization.load": (ops.call("torch.serialization", "load", ops.text("x")), "serialization.load"),
        "torch.jit": (ops.call("torch.jit", "load", ops.text("evil.pt")), "torch.jit.load"),
        "torch.hub": (ops.call("torch.hub", "load", ops.text("evil")), "torch.hub.load"),
        "torch extension": (ops.call("torch.utils.cpp_extension", "load_inline", TOUCH), "load_inline"),
        "numpy.load": (ops.call("numpy", "load", ops.text("x.npy"), b"N", b"\x88"), "numpy.load"),
        "numpy testing": (ops.call("numpy.testing._private.utils", "runstring", OPEN, b"}"), "runstring"),
        "joblib": (ops.call("joblib", "load", ops.text("x")), "joblib.load"),
        "attrgetter": (ops.call("operator", "attrgetter", ops.text("system")), "operator.attrgetter"),
        "methodcaller": (ops.call("operator", "methodcaller", ops.text("system"), TOUCH), "operator.methodcaller"),
        "partial called": (ops.call("functools", "partial", SYSTEM, TOUCH) + b")R", "functools.partial"),
        "reduce": (ops.call("functools", "reduce", SYSTEM, b"]"), "functools.reduce"),
        "map": (ops.call("builtins", "map", SYSTEM, b"]"), "builtins.map"),
        "getattr of a module": (ops.call("builtins", "getattr", ops.named("os", "path"), ops.text("Sys")), "getattr"),
        "getattr chain": (
            ops.call("builtins", "getattr", ops.call("builtins", "getattr", ops.named("a", "B"), ops.text("__class__")),
                     ops.text("__base__")),
            "builtins.getattr",
        ),
        "getattr of our table": (
            ops.call("builtins", "getattr", ops.named("collections", "OrderedDict"), ops.text("_function")), "getattr",
        ),
        "setattr": (ops.call("builtins", "setattr", ops.named("a", "B"), ops.text("may_call"), b"\x88"), "setattr"),
        "copyreg extension": (ops.call("copyreg", "add_extension", ops.text("os"), ops.text("system")), "extension"),
        "copyreg.__reduce_ex__": (ops.call("copyreg", "__reduce_ex__", ops.named("a", "B"), ops.number(2)), "copyreg"),
        "copyreg._reconstructor": (ops.call("copyreg", "_reconstructor", SYSTEM, b"N", b"N"), "os.system"),
        "copyreg.__newobj__": (ops.call("copyreg", "__newobj__", SYSTEM, TOUCH), "copyreg.__newobj__"),
        "codec": (ops.call("_codecs", "encode", ops.text("x"), ops.text("idna")), "_codecs.encode"),
        "codecs.lookup": (ops.call("_codecs", "lookup", ops.text(MARK)), "_codecs.lookup"),
        "codecs.open": (ops.call("codecs", "open", ops.text(MARK), ops.text("w")), "codecs.open"),
        "codec by bytes": (ops.call("builtins", "bytes", ops.text("x"), ops.text("rot13")), "_codecs.encode"),
        "unknown function": (ops.call("megatron.utils", "setup", TOUCH), "megatron.utils.setup"),
        "dotted name": (ops.call("os", "path.os.system", TOUCH), "os.path.os.system"),
        "pathlib method": (ops.call("pathlib", "Path.touch", ops.text(MARK)), "pathlib.Path.touch"),
        "reduce_ex object": (ops.call("builtins", "type", ops.text("X"), b")", b"}"), "builtins.type"),
        "linecache": (ops.call("linecache", "getlines", ops.text("/etc/passwd")), "linecache.getlines"),
        "socket": (ops.call("socket", "create_connection", b")"), "socket.create_connection"),
        "logging": (ops.call("logging", "FileHandler", ops.text(MARK)), "logging.FileHandler"),
        "tempfile": (ops.call("tempfile", "NamedTemporaryFile"), "tempfile.NamedTemporaryFile"),
    }  # fmt: skip


def _opcodes() -> dict[str, tuple[bytes, str]]:
    """The other instructions that make objects or alter them."""
    stack_global = ops.text("os") + ops.text("system") + b"\x93"
    setstate = ops.named("collections", "OrderedDict") + b"N}" + ops.text("qualname") + ops.text("x") + b"s\x86b"
    return {
        "INST": (b"(" + TOUCH + b"ios\nsystem\n", "os.system"),
        "OBJ": (b"(" + SYSTEM + TOUCH + b"o", "os.system"),
        "NEWOBJ": (SYSTEM + b"(" + TOUCH + b"t\x81", "os.system"),
        "NEWOBJ_EX": (SYSTEM + b"(" + TOUCH + b"t}\x92", "os.system"),
        "STACK_GLOBAL": (stack_global + b"(" + TOUCH + b"tR", "os.system"),
        "short STACK_GLOBAL": (b"\x8c\x02os\x8c\x06system\x93" + b"(" + TOUCH + b"tR", "os.system"),
        "EXT1": (b"\x82\x01" + b"(" + TOUCH + b"tR", "extension code 1"),
        "EXT2": (b"\x83\x01\x01" + b"(" + TOUCH + b"tR", "extension code 257"),
        "EXT4": (b"\x84\x01\x00\x00\x01" + b"(" + TOUCH + b"tR", "extension code 16777217"),
        "BUILD on our table": (setstate, "__setstate__ of collections.OrderedDict"),
        "BUILD on a class": (ops.named("a", "B") + b"}" + ops.text("may_call") + b"\x88sb", "damaged"),
        "BUILD on a tensor": (ops.tensor() + b"}" + ops.text("file") + ops.text("/etc/x") + b"sb", "state of its own"),
        "BUILD on a storage": (
            ops.storage("0", 2) + b"}" + ops.text("start") + ops.number(9) + b"sb", "state of its own"
        ),
        "calling an object": (ops.named("a", "B") + b")R(" + TOUCH + b"tR", "a.B"),
        "calling a text": (ops.text("x") + b")R", "damaged"),
        "buffers from outside": (b"\x97\x98", "buffers from outside"),
    }  # fmt: skip


def cases() -> Iterator[Case]:
    """Every payload in a zip; some in every protocol, in legacy files and in unusual places."""
    for name, (body, phrase) in {**_reduce(), **_opcodes()}.items():
        told = (phrase,) if name in _opcodes() else (phrase, RUN, "torch.save(")
        pickle = ops.pickled(ops.table({"model": ops.table({"w": ops.tensor()}), "x": body}), 4)
        yield Case(f"call {name}", file(ops.zipped(pickle)), told)
    attack = ops.call("os", "system", TOUCH)
    for protocol in range(6):
        yield Case(
            f"protocol {protocol}",
            file(ops.zipped(ops.pickled(ops.table({"x": attack}), protocol))),
            ("os.system", "under the key x"),
        )
        data = ops.legacy(ops.pickled(ops.table({"x": attack}), protocol), {})
        yield Case(f"legacy protocol {protocol}", file(data), ("os.system", "under the key x"))
    yield from _places(attack)


def _places(attack: bytes) -> Iterator[Case]:
    good = ops.table({"w": ops.tensor()})
    trees = {
        "optimizer": (ops.table({"model": good, "optimizer": ops.table({"state": attack})}), "optimizer/state"),
        "a list": (ops.table({"model": good, "x": ops.table({"y": b"](" + attack + b"e"})}), "x/y"),
        "model_args": (ops.table({"model": good, "model_args": ops.table({"a": b"N", "b": attack})}), "model_args/b"),
        "a weight": (ops.table({"model": ops.table({"h.0.w": attack})}), "model/h.0.w"),
        "arguments": (ops.table({"z": ops.named("a", "B") + b"(" + attack + b"tR"}), "under the key z"),
    }
    for name, (tree, key) in trees.items():
        yield Case(f"in {name}", file(ops.zipped(ops.pickled(tree))), ("os.system", key))
    yield Case("in a key", file(ops.zipped(ops.pickled(ops.table([(attack, b"N")])))), ("os.system",))
    yield Case("in a persistent id", file(ops.zipped(ops.pickled(attack + b"Q"))), ("os.system",))
    pid = b"(" + ops.text("storage") + attack + ops.text("0") + ops.text("cpu") + ops.number(2) + b"tQ"
    yield Case("in a storage", file(ops.zipped(ops.pickled(pid))), ("os.system",))
    yield Case(
        "storage of another class", file(ops.zipped(ops.pickled(pid.replace(attack, SYSTEM)))), ("unknown class",)
    )
    yield Case("persistent id of a text", file(ops.zipped(ops.pickled(ops.text("x") + b"Q"))), ("persistent id",))
    yield Case("persistent id in text", file(ops.zipped(ops.pickled(b"Pevil\n"))), ("persistent id",))
    keys = ops.legacy(ops.pickled(ops.table({"w": ops.tensor()})))
    evil = keys.replace(ops.pickled(b"](" + ops.text("0") + b"e"), ops.pickled(b"](" + attack + b"e"))
    yield Case("in the list of storages", file(evil), ("os.system",))
    head = ops.MAGIC + ops.VERSION + ops.pickled(attack) + ops.pickled(b"}") + ops.pickled(b"]")
    yield Case("in the head", file(head), ("os.system",))
    nested = ops.call("torch._utils", "_rebuild_parameter", attack, b"\x88", b"}")
    yield Case("in a parameter", file(ops.zipped(ops.pickled(ops.table({"w": nested})))), ("os.system", "key w"))
    made = ops.call(
        "torch._tensor", "_rebuild_from_type_v2", SYSTEM, ops.named("torch", "Tensor"), b"(" + TOUCH + b"t", b"}"
    )
    yield Case(
        "as a tensor's function",
        file(ops.zipped(ops.pickled(ops.table({"w": made})))),
        ("a tensor of class torch.Tensor",),
    )
