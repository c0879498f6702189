cimport cython


@cython.final
cdef class Inflight:
    cdef public int count
    cdef public int mask
    cdef public int next_id
    cdef public bytearray states
    cdef public bytearray high
    cdef public bytearray low
    cdef public list heads
    cdef public list bodies
    cdef public list refs
    cdef public list stored

    @cython.locals(ident=int, slot=int)
    cpdef int add(self, bytes head, bytes body, int qos) except -1
    @cython.locals(slot=int)
    cpdef put(self, int ident, int state, bytes head, bytes body, object ref=*)
    cpdef keep(self, int ident, object pending)
    cpdef object stored_of(self, int ident)
    @cython.locals(slot=int)
    cpdef int state(self, int ident) except -1
    @cython.locals(slot=int)
    cpdef release(self, int ident)
    @cython.locals(slot=int)
    cpdef remove(self, int ident)
    cpdef attach(self, int ident, object ref)
    cpdef list entries(self)
    @cython.locals(found=int, least=int, slot=int, age=int)
    cpdef bytes first_body(self)
    cpdef _grow(self)
