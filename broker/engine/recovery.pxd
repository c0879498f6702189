cimport cython
from broker.engine.records cimport number_at


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
    cdef public dict owed

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
    @cython.locals(at=Py_ssize_t, end=Py_ssize_t, size=Py_ssize_t, kind=int)
    cpdef read(self, object segment, object offset, bytes body)
    @cython.locals(
        data="const unsigned char *", at=Py_ssize_t, end=Py_ssize_t, start=Py_ssize_t, after=Py_ssize_t, size=Py_ssize_t,
        length=Py_ssize_t, count=int, bits=int, flags=int, number="unsigned int", publisher="unsigned int",
        seq="long long", clock_ms="unsigned long long", both="unsigned long long", found=Found,
    )
    cpdef _put(self, object position, bytes payload)


@cython.locals(at=Py_ssize_t, size=longlong, count=longlong, segment="unsigned long long", here="unsigned long long", both="unsigned long long")
cpdef long long _weigh(object alive, dict live, long long now)
