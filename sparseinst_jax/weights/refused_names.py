"""Names that no weights file needs and that are found in pickles which attack whoever loads them.

`safe_pickle` calls none of them in any case. This list only decides which files are refused as a
whole, rather than read without what they name; it cannot be complete and need not be.
"""

from __future__ import annotations

# Modules of which everything is refused.
MODULES = frozenset(
    """
    os posix nt posixpath ntpath subprocess _posixsubprocess sys shutil socket _socket ctypes
    _ctypes importlib imp _imp _frozen_importlib runpy code codeop pty commands popen2 platform
    webbrowser multiprocessing _multiprocessing threading _thread thread asyncio signal pickle
    _pickle cPickle marshal shelve dill cloudpickle joblib timeit pdb bdb profile cProfile trace
    pip ensurepip venv site setuptools distutils pkgutil zipimport zipfile tarfile pydoc doctest
    urllib urllib2 urllib3 http httplib ftplib smtplib poplib imaplib telnetlib xmlrpc requests
    tempfile operator _operator gc sqlite3 antigravity idlelib lib2to3 fileinput linecache cgi
    torch.hub torch.jit torch.package torch.ops torch.compile torch.utils.cpp_extension
    torch.utils.model_zoo torch.utils.collect_env torch._dynamo torch._inductor
    torch.distributed.rpc numpy.testing numpy.f2py numpy.distutils paddle.hub paddle.utils
    IPython logging.config
    """.split()
)
# Single functions of modules that hold harmless things too.
FUNCTIONS = frozenset(
    """
    torch.load torch.serialization.load torch.save numpy.load numpy.save numpy.fromfile
    numpy.memmap numpy.loadtxt numpy.genfromtxt paddle.load paddle.save pandas.read_pickle
    pandas.eval io.open _io.open io.open_code _io.open_code io.FileIO _io.FileIO codecs.open
    types.FunctionType types.CodeType types.LambdaType types.MethodType types.ModuleType
    copyreg.add_extension yaml.load yaml.unsafe_load yaml.full_load
    """.split()
)
# Of builtins the classes of plain data; `getattr` only for the name of a method.
BUILTINS = frozenset(
    """
    bool bytearray bytes complex dict float frozenset int list long object range set slice str
    tuple unicode xrange Ellipsis NotImplemented getattr
    """.split()
)
_OLD_MODULES = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core": "numpy._core",
}
# The two that pickle itself writes.
_NEW = frozenset({"copyreg.__newobj__", "copyreg.__newobj_ex__"})


def canonical(path: str) -> str:
    """A dotted name as newer versions of Python and NumPy call it."""
    for old, new in _OLD_MODULES.items():
        if path.startswith(f"{old}."):
            return new + path[len(old) :]
    return path


def is_refused(path: str) -> bool:
    """Whether a canonical dotted name makes its file be refused."""
    parts = path.split(".")
    if parts[0] == "builtins":
        return ".".join(parts[1:]) not in BUILTINS
    if any(part.startswith("__") for part in parts[1:]) and path not in _NEW:
        return True
    parents = {".".join(parts[: count + 1]) for count in range(len(parts))}
    return bool(parents & MODULES or parents & FUNCTIONS)
