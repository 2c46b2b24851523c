"""Owns the list of frames that only carry out a death: C libraries, unwinders, panics, sanitizers. Pure.

Such frames are the same for every abort() and every panic, so they neither tell crashes apart nor tell a reader where
the program failed.
"""

from __future__ import annotations

_MODULES = """
libc.so libc-2. ld-linux ld-2. ld-musl libc.musl libpthread libm.so libstdc++.so libc++.so libc++abi.so
libgcc_s libunwind libstd- libasan libubsan libtsan liblsan libmsan libhwasan libclang_rt
"""
MODULES = tuple(_MODULES.split())
"""Beginnings of the names of libraries."""
_NAMES = """
raise gsignal abort kill tgkill pthread_kill __pthread_kill_implementation __pthread_kill_internal _start
__restore_rt __assert_fail __assert_fail_base __stack_chk_fail __fortify_fail __chk_fail malloc_printerr
rust_begin_unwind Py_FatalError _Py_FatalErrorFunc _Py_FatalErrorFormat faulthandler_fatal_error V8_Fatal
JVM_handle_linux_signal JVM_abort
"""
NAMES = frozenset(_NAMES.split())
_BEGINNINGS = """
__libc_ __GI_ _Unwind_ __cxa_ __gxx_ __gnu_cxx:: __cxxabiv1:: std::terminate
__asan __sanitizer __ubsan __tsan __lsan __msan __interceptor ___interceptor
core::panicking:: core::option:: core::result:: core::slice::index:: core::str::slice_error core::cell::panic
core::intrinsics:: std::panicking:: std::process::abort std::sys:: std::sys_common:: std::rt:: std::alloc::
alloc::alloc:: alloc::raw_vec:: panic_abort:: rust_panic __rust
runtime. runtime/ syscall. internal/abi.
node::Abort node::Assert node::OnFatalError node::OOMErrorHandler node::ProcessEmit
v8::base::OS::Abort v8::internal::V8::FatalProcess v8::internal::FatalProcess v8::Utils::Report
VMError:: os::abort os::die report_vm report_fatal report_java PosixSignals:: crash_handler
"""
BEGINNINGS = tuple(_BEGINNINGS.split())
"""Beginnings of the names of functions; of C++ and Rust as `readable` writes them."""


def is_runtime(module: str, name: str) -> bool:
    """Tell whether a frame only carries out a death, by the name of its file and of its function."""
    return module.startswith(MODULES) or name in NAMES or name.startswith(BEGINNINGS)


def readable(symbol: bytes) -> str:
    """Return a symbol in plain ASCII; the nested names of C++ and Rust are written as `one::two`, without arguments."""
    text = "".join(chr(byte) if 32 < byte < 127 else "_" for byte in symbol)
    parts: list[str] = []
    if text.startswith("_Z"):
        parts = _read_itanium(text)
    elif text.startswith("_R"):
        parts = _read_rust(text)
    return "::".join(parts) or text.partition("@")[0]


def _read_itanium(text: str) -> list[str]:
    """Return the names in a symbol of C++, or of Rust until 2025: Itanium C++ ABI, "Mangling"."""
    at, parts = 2, []
    while text[at : at + 1] in tuple("NKLVrO"):
        at += 1
    if text.startswith("St", at):
        at, parts = at + 2, ["std"]
    while text[at : at + 1] in tuple("L0123456789"):
        at += text[at] == "L"
        name, at = _read_name(text, at)
        if name:
            parts.append(name)
    if len(parts) > 1 and len(parts[-1]) == 17 and parts[-1][0] == "h":  # a hash
        parts.pop()
    return parts if parts != ["std"] else []


def _read_rust(text: str) -> list[str]:
    """Return the path in a symbol of Rust: RFC 2603. Each `N` nests one name more; `s…_` tells equal names apart."""
    at, wanted = 2, 1
    parts: list[str] = []
    while at < len(text) and len(parts) < wanted:
        if text[at] == "s":
            at = (text.find("_", at) + 1) or len(text)
        elif text[at].isdigit():
            name, at = _read_name(text, at)
            parts.append(name or "closure")
        else:
            wanted += text[at] == "N"
            at += 1
    return parts


def _read_name(text: str, at: int) -> tuple[str, int]:
    """Return a name that follows its length, and where it ends."""
    end = at
    while text[end : end + 1].isdigit() and end < at + 4:
        end += 1
    size = int(text[at:end] or 0)
    end += text.startswith("_", end) and text.startswith("_R")
    return text[end : end + size], max(end + size, at + 1)
