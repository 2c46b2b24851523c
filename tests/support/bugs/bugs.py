"""Usage: python3 bugs.py BUG MIB: touch so many MiB of memory, then fail in one of several ways."""

import ctypes
import json
import os
import signal
import sys

bug, mib = map(int, sys.argv[1:])
memory = bytearray(b"\7") * ((mib << 20) + 1)
if bug == 0:
    ctypes.string_at(8)
elif bug == 1:
    ctypes.memset(8, 0, 4096)
elif bug == 2:
    os.abort()
elif bug == 3:
    os.kill(os.getpid(), signal.SIGSEGV)
elif bug == 4:
    ctypes.pythonapi.Py_DecRef(ctypes.c_void_p(8))
elif bug == 5:
    ctypes.CFUNCTYPE(None)(0)()
elif bug == 6:
    json.loads("[]", object_hook=ctypes.pythonapi.Py_FatalError(b"fatal"))
