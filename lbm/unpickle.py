"""Pickles of unknown origin: numpy arrays and plain types are read, every other class is refused by name.

The TAP-Vid sets are pickles, and the tracks of the Kubric layout lie in one (an object array in a .npy file).
"""

import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np

from common import io as files


class _Kind:
    """Stands for numpy.dtype in a pickle: numpy trusts the flags in a dtype's state, and forged ones make it follow raw bytes."""

    def __init__(self, code: str, *_):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufcSUO":
            raise ValueError(f"refused, arrays of type {code} are not read")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    def __setstate__(self, state):
        super().__setstate__((*state[:2], state[2].dtype, *state[3:]))


def _frombuffer(data, kind, size, order):
    """np.frombuffer, unlike np.ndarray, makes no object pointers of bytes. A copy, as an array could be freed under its view."""
    return np.frombuffer(bytes(data), kind.dtype).reshape(size, order=order)


_PLAIN = (dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, bool, complex)
_KNOWN = {f"builtins.{kind.__name__}": kind for kind in _PLAIN}
_KNOWN |= {"numpy.ndarray": None, "numpy.dtype": _Kind, "collections.OrderedDict": OrderedDict}  # None: only named, never called
_KNOWN["_codecs.encode"] = lambda text, _: text.encode("latin1")  # bytes, in old protocols
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _KNOWN[f"{_core}.multiarray._reconstruct"] = lambda *_: _Array(0)
    _KNOWN[f"{_core}.multiarray.scalar"] = lambda kind, data: np.frombuffer(data, kind.dtype)[0]
    _KNOWN[f"{_core}.numeric._frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    """Knows numpy arrays and plain types; every other name is refused, and none is imported."""

    def find_class(self, module, name):
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full not in _KNOWN:
            raise ValueError(f"refused, it wants to load {module}.{name}: only numpy arrays and plain types are read")
        return _KNOWN[full]


def load_pickle(path, file=None):
    """Read a pickle (from an open `file`, if given) of numpy arrays and plain types.

    Any other class is a ValueError that names it, and nothing is executed.
    """
    try:
        return _Unpickler(file or io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # damaged pickles raise anything
        raise ValueError(f"{path}: not a readable pickle: {error}") from None


def load_npy(path):
    """Read a .npy file; arrays of objects go through `load_pickle`, and a single stored object (a dict) is returned bare."""
    array = files.load_npy(path, load_pickle)
    return array.item() if isinstance(array, np.ndarray) and array.dtype.hasobject and array.shape == () else array
