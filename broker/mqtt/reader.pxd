cimport cython

ctypedef const unsigned char* View


@cython.freelist(8)
@cython.final
cdef class Reader:
    cdef bytes _data
    cdef View _view
    cdef public Py_ssize_t position
    cdef public Py_ssize_t end

    @cython.locals(start=Py_ssize_t)
    cdef Py_ssize_t _take(self, Py_ssize_t size) except -1
    @cython.locals(start=Py_ssize_t)
    cpdef int byte(self) except -1
    @cython.locals(start=Py_ssize_t)
    cpdef int uint16(self) except -1
    @cython.locals(high=cython.longlong)
    cpdef object uint32(self)
    @cython.locals(value=int, shift=int, byte=int)
    cpdef int varint(self) except -1
    @cython.locals(size=Py_ssize_t, start=Py_ssize_t)
    cpdef bytes binary(self)
    cpdef str text(self, bint strict)
    cpdef bytes slice(self, Py_ssize_t start, Py_ssize_t end)
    @cython.locals(start=Py_ssize_t)
    cpdef bytes rest(self)
    cpdef finish(self)
