cimport cython

ctypedef const unsigned char* View


cdef int _LARGEST

cpdef bytes encode_length(Py_ssize_t n)


cdef class FrameReader:
    cdef public Py_ssize_t max_size
    cdef bytes _tail
    cdef int _first
    cdef Py_ssize_t _missing
    cdef list _pieces
    cdef bint _broken

    @cython.locals(packets=list, position=Py_ssize_t)
    cpdef list feed(self, bytes data)
    @cython.locals(
        size=Py_ssize_t, view=View, start=Py_ssize_t, length=Py_ssize_t, shift=int, byte=int, first=int
    )
    cdef _split(self, bytes data, Py_ssize_t position, list packets)
