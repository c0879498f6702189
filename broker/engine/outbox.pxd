cimport cython


cdef class Flusher:
    cdef public object call_soon
    cdef public list dirty
    cdef public int reads
    cdef public bint scheduled

    @cython.locals(b=Outbox)
    cpdef void add(self, Outbox box) noexcept
    cpdef void after_read(self)
    @cython.locals(box=Outbox, dirty=list)
    cpdef void flush(self)


@cython.final
@cython.no_gc  # `close` breaks the cycle with the transport
cdef class Outbox:
    cdef public object link
    cdef public Flusher flusher
    cdef public Py_ssize_t limit
    cdef public Py_ssize_t size
    cdef public bytes first
    cdef public list more
    cdef public bint congested
    cdef public Py_ssize_t dropped

    cpdef void push(self, bytes data)
    @cython.locals(more=list)
    cpdef void push_parts(self, bytes head, bytes ident, bytes body)
    cpdef bint offer(self, bytes data)
    @cython.locals(more=list)
    cpdef void flush(self)
    cpdef void resume(self)
    cpdef void close(self)
