"""One call for all tensors: a loop in C over a table of pointers calls a compiled kernel.

A call from Python takes as long as a kernel needs for a thousand elements. So the kernel, which is
an ordinary C function, is called by a loop that is compiled once for this machine. Inductor builds
it, as it builds its kernels, and keeps it on disk. The loop holds no lock of Python, and may share
the tensors out to several threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from operator import is_not
from typing import Any

import torch
from torch import Tensor

_IS_THERE = partial(is_not, None)

MOST = 64
"""Arguments that a kernel may have."""

_LOOP = r"""
#include <unordered_set>
#include <utility>
#include <vector>

// Call a kernel with the words of a row. A pointer and a whole number of 64 bits are passed alike.
template <size_t... at>
static void call(void* kernel, void** row, std::index_sequence<at...>) {
    using Word = void*;
    auto function = reinterpret_cast<void (*)(decltype((void)at, Word())...)>(kernel);
    function(row[at]...);
}

// The function that calls a kernel of so many arguments.
using Call = void (*)(void*, void**);

template <size_t... n>
static Call call_of(size_t width, std::index_sequence<n...>) {
    static const Call calls[] = {
        [](void* kernel, void** row) { call(kernel, row, std::make_index_sequence<n>()); }...};
    return calls[width];
}

// What a kernel is given for x: where a tensor's memory is, or a number itself.
static void* word(PyObject* x) {
    if (x == Py_None) return nullptr;
    if (PyLong_Check(x)) return reinterpret_cast<void*>(PyLong_AsSsize_t(x));
    return _torchinductor_pyobject_tensor_data_ptr(x);
}

// Of each entry, the object and where its memory is.
static PyObject* identity(PyObject* columns) {
    std::vector<void*> words;
    for (Py_ssize_t c = 0; c < PyTuple_GET_SIZE(columns); c++) {
        PyObject* column = PyTuple_GET_ITEM(columns, c);
        if (!PyList_CheckExact(column)) throw std::runtime_error("expected a list");
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(column); i++) {
            PyObject* x = PyList_GET_ITEM(column, i);
            words.push_back(x);
            words.push_back(word(x));
        }
    }
    auto bytes = reinterpret_cast<const char*>(words.data());
    return PyBytes_FromStringAndSize(bytes, words.size() * sizeof(void*));
}

// Whether an entry of the second list lies where one of the first does.
static PyObject* overlap(PyObject* columns) {
    std::unordered_set<void*> seen;
    PyObject* column = PyTuple_GET_ITEM(columns, 0);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(column); i++)
        seen.insert(word(PyList_GET_ITEM(column, i)));
    seen.erase(nullptr);
    column = PyTuple_GET_ITEM(columns, 1);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(column); i++)
        if (seen.count(word(PyList_GET_ITEM(column, i)))) Py_RETURN_TRUE;
    Py_RETURN_FALSE;
}

// Call a kernel for every row of the columns.
static PyObject* run(PyObject* args) {
    void* kernel = PyLong_AsVoidPtr(PyTuple_GET_ITEM(args, 0));
    const Py_ssize_t rows = PyLong_AsSsize_t(PyTuple_GET_ITEM(args, 1));
    const int threads = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(args, 2)));
    PyObject* columns = PyTuple_GET_ITEM(args, 3);
    if (!kernel) return rows ? overlap(columns) : identity(columns);
    const size_t width = PyTuple_GET_SIZE(columns);
    if (width > MOST) throw std::runtime_error("too many arguments");
    std::vector<void*> table(rows * width);
    std::vector<float> narrowed(width);
    for (size_t c = 0; c < width; c++) {
        PyObject* column = PyTuple_GET_ITEM(columns, c);
        const bool each = PyList_CheckExact(column);
        if (each && PyList_GET_SIZE(column) != rows) throw std::runtime_error("wrong length");
        void* one = nullptr;
        if (PyTuple_CheckExact(column)) {
            narrowed[c] = *static_cast<double*>(word(PyTuple_GET_ITEM(column, 0)));
            one = &narrowed[c];
        } else if (!each) {
            one = word(column);
        }
        for (Py_ssize_t i = 0; i < rows; i++)
            table[i * width + c] = each ? word(PyList_GET_ITEM(column, i)) : one;
    }
    if (PyErr_Occurred()) return nullptr;
    const Call call = call_of(width, std::make_index_sequence<MOST + 1>());
    Py_BEGIN_ALLOW_THREADS
    if (threads > 1) {
        #pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (Py_ssize_t i = 0; i < rows; i++) call(kernel, &table[i * width]);
    } else {
        for (Py_ssize_t i = 0; i < rows; i++) call(kernel, &table[i * width]);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
"""


@cache
def loop() -> Callable[[int, int, int, tuple[Any, ...]], Any]:
    """The loop: ``run(kernel, rows, threads, columns)``.

    It calls the kernel at this address for every row. A column is one argument of the kernel: a
    list with an entry for each row, or what all rows have in common. An entry is a tensor, whose
    memory is given, or a whole number. A tuple of one 0-dim tensor of float64 is given in float32.

    Raises:
        Exception: of many kinds, where there is no compiler.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    class Loop(CppPythonBindingsCodeCache):
        call_entry_function = "return run(args);"
        extra_parse_arg = (
            _LOOP.replace("MOST", str(MOST)).replace("{", "{{").replace("}", "}}")
        )

    return Loop.load_pybinding(["void*"] * 4, "// a loop over a table of pointers")


ALIGNED = 64
"""Bytes to a multiple of which tensors begin."""


class Scratch:
    """What a kernel writes and reads again: tensors of these lengths and dtypes, in one piece."""

    def __init__(self, tensors: list[tuple[int, torch.dtype]]) -> None:
        self.offsets: list[int] = []
        self.length = 0
        for n, dtype in tensors:
            self.offsets.append(self.length)
            blocks = -(-n * dtype.itemsize // ALIGNED)
            self.length += blocks * ALIGNED

    def taken(self) -> tuple[Tensor, list[int]]:
        """New memory, to be kept for as long as it is used, and where in it each tensor begins."""
        memory = torch.empty(self.length, dtype=torch.uint8)
        start = memory.data_ptr()
        return memory, [start + offset for offset in self.offsets]


def address_of(kernel: Any) -> int:
    """Where the C function is that this function of Inductor's calls."""
    library = ctypes.CDLL(kernel.__self__.__file__)
    return ctypes.cast(library.kernel, ctypes.c_void_p).value or 0


def identity(columns: list[list[Any]]) -> bytes:
    """Which objects these tensors are, and where their memory is: equal if both are the same."""
    return loop()(0, 0, 1, tuple(columns))


def overlap(xs: list[Any], ys: list[Any]) -> bool:
    """Whether one of `ys` lies where one of `xs` does; entries may be None.

    Where the loop has been compiled, it looks, which is faster.

    Raises:
        RuntimeError: one has no memory that can be told, for it is sparse.
    """
    if loop.cache_info().currsize:
        return bool(loop()(0, 1, 1, (xs, ys)))
    return not addresses(xs).isdisjoint(addresses(ys))


def addresses(xs: list[Any]) -> set[int]:
    """Where the memory of these tensors is; entries may be None."""
    there = filter(_IS_THERE, xs)
    return {*map(Tensor.data_ptr, there)} - {0}
