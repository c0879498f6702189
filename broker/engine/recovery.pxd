cimport cython
from broker.engine.records cimport Taker


@cython.final
cdef class Found:
    cdef public dict fields
    cdef public dict subscriptions
    cdef public object entries
    cdef public long long floor
    cdef public set done
    cdef public set released
    cdef public set marks
    cdef public long long next_seq
    cdef public unsigned int segment
    cdef public bint over
    cdef public bint left_share

    @cython.locals(floor="long long", seq="long long", last="long long", at=Py_ssize_t, ascending=bint, done=set, released=set)
    cpdef object alive(self)


cdef class Recovery:
    cdef public dict sessions
    cdef public set ended
    cdef public dict retained
    cdef public dict values
    cdef public unsigned int highest
    cdef public int bad
    cdef public long long queued

    cpdef Found _session(self, unsigned int number)
    cpdef _one(self, object position, int kind, bytes payload)
    @cython.locals(taker=Taker, found=Found, flags=int)
    cpdef _put(self, object position, bytes payload)
