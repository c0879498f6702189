cimport cython
from broker.engine.message cimport Message, Origin


@cython.final
@cython.freelist(64)
cdef class Taker:
    cdef public unsigned int session
    cdef public long long seq
    cdef public int qos
    cdef public bint retain
    cdef public object idents
    cdef public unsigned int group
    cdef public bint moved


cpdef bytes encode_put(Message message, bint retained, object expires_ms, unsigned int publisher, int publisher_ident, int count, bytes takers, bytes origin)
@cython.locals(bits=int, fixed=bytes)
cpdef bytes encode_taker(unsigned int session, object seq, int qos, bint retain, object idents, unsigned int group=*)
cpdef bytes encode_moved(unsigned int session, object seq)
cpdef list decode_takers(bytes payload)
@cython.locals(p="const unsigned char*", at=Py_ssize_t, count=int, bits=int, n=int, group="unsigned int")
cpdef list decode_all_takers(bytes payload)
@cython.locals(at=Py_ssize_t, count=int, bits=int)
cpdef Message decode_message(bytes payload, double now, long long clock_ms, dict origins)
cpdef tuple put_fields(bytes payload)
@cython.locals(at=Py_ssize_t, n=Py_ssize_t, size=Py_ssize_t, bits=int)
cpdef tuple put_topic(bytes payload)
@cython.locals(value="unsigned long long")
cpdef unsigned long long number_at(const unsigned char *data, Py_ssize_t at, Py_ssize_t size)
