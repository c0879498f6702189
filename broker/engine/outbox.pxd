cimport cython

ctypedef unsigned char Flag  # a truth value in one byte: there is one of these objects per connection


cdef class Flusher:
    cdef public object call_soon
    cdef public list dirty
    cdef public int reads
    cdef public bint scheduled
    cdef public Py_ssize_t limit

    @cython.locals(b=Outbox)
    cpdef void add(self, Outbox box) noexcept
    cpdef void after_read(self)
    @cython.locals(box=Outbox, dirty=list)
    cpdef void flush(self)


cdef class Outbox:
    cdef public object link
    cdef public Flusher flusher
    cdef public Py_ssize_t size
    cdef public bytes first
    cdef public list more
    cdef public Flag congested

    cpdef void push(self, bytes data)
    @cython.locals(more=list)
    cpdef void push_parts(self, bytes head, bytes ident, bytes body)
    cpdef bint offer(self, bytes data)
    @cython.locals(more=list)
    cpdef void flush(self)
    cpdef void drop_unsent(self)
