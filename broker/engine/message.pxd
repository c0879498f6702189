cimport cython


cdef class Origin:
    cdef public str client_id
    cdef public object username
    cdef public object peerhost
    cdef public object instance
    cdef public object principal
    cdef public object node
    cdef public object _prefix

    cpdef str prefix(self)


@cython.freelist(256)
@cython.final
cdef class Message:
    cdef public bytes topic
    cdef public bytes payload
    cdef public int qos
    cdef public bint retain
    cdef public bytes properties
    cdef public double expires
    cdef public Origin origin
    cdef public str ident
    cdef public long long time_ms
    cdef public long long clock_ms
    cdef public bytes packet4
    cdef public bytes packet5
    cdef public bytes head4
    cdef public bytes head5
    cdef public bytes body5
    cdef public object pending
    cdef public object kept

    cpdef bytes publish0(self, bint v5)
    cpdef bytes head(self, bint v5, int qos)
    cpdef bytes body(self, bint v5)
    cpdef bytes body_with(self, bytes extra)
    cpdef bytes metadata(self)


@cython.locals(n=Py_ssize_t)
cpdef bytes encode_head(bytes topic, int first, Py_ssize_t rest)
