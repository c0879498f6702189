cimport cython
from broker.engine.inflight cimport Inflight
from broker.engine.message cimport Message


@cython.freelist(1024)
@cython.final
cdef class Pending:
    cdef public Message message
    cdef public Spool spool
    cdef public long long seq
    cdef public int qos
    cdef public bint retain
    cdef public object idents
    cdef public unsigned int group
    cdef public list more
    cdef public int left
    cdef public object hold
    cdef public Spool publisher
    cdef public int publisher_ident
    cdef public bint retained
    cdef public Message replaces
    cdef public list moved
    cdef public bint urgent
    cdef public int state
    cdef public unsigned long long position

    cpdef add(self, Spool spool, long long seq, int qos, bint retain, object idents, unsigned int group)
    @cython.locals(i=Py_ssize_t, entry=tuple)
    cpdef drop(self, Spool spool, long long seq)
    cpdef list takers(self)


@cython.final
cdef class Spool:
    cdef public object session
    cdef public object journal
    cdef public unsigned int number
    cdef public long long next_seq
    cdef public long long sent
    cdef public long long floor
    cdef public long long again_below
    cdef public long long held_below
    cdef public object backlog
    cdef public object tail
    cdef public list loading
    cdef public dict holds
    cdef public list done
    cdef public set gone
    cdef public set marks
    cdef public dict marking
    cdef public bint dirty
    cdef public bint paused
    cdef public unsigned int segment
    cdef public bint over
    cdef object __weakref__

    cpdef finish(self, long long seq, Pending pending, Inflight inflight)
    cpdef note(self, long long seq)
    @cython.locals(floor=longlong, sent=longlong)
    cpdef advance(self, Inflight inflight)
    cpdef passed(self, long long seq, Inflight inflight)
    cpdef completed(self, long long seq, Inflight inflight)
    cpdef settle(self)
    cpdef bint refill(self) except -1
