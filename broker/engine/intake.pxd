cimport cython
from broker.engine.core cimport Core
from broker.engine.message cimport Message
from broker.engine.receiver cimport Hold
from broker.engine.spool cimport Pending, Spool


cdef class Intake:
    cdef public Core core
    cdef public object store
    cdef public object call_later
    cdef public dict spools
    cdef public dict values
    cdef public dict live
    cdef public unsigned int next_number
    cdef public object retained
    cdef public object heirs
    cdef public object owed
    cdef public dict ending
    cdef public dict _value_segments
    cdef public long long _origin_clock
    cdef public double _origin_now
    cdef public list _hot
    cdef public list _young
    cdef public list _old
    cdef public list _dirty
    cdef public list _notes
    cdef public list _ends
    cdef public list _copies
    cdef public dict _freed
    cdef public object _next
    cdef public dict _outstanding
    cdef public bint _scheduled
    cdef public bint _ticking

    cpdef long long clock_ms(self)
    cpdef Pending take(self, Message message, Spool spool, long long seq, int qos, bint retain, object idents, unsigned int group, Hold hold, bint urgent)
    cpdef _enter(self, Pending pending, bint urgent)
    cpdef _hurry(self, Pending pending)
    @cython.locals(hold=Hold)
    cpdef settled(self, Pending pending)
    cpdef touch(self, Spool spool)
    cpdef free(self, unsigned long long position)
    cpdef _less(self, unsigned int segment)
    cpdef wake(self)
    @cython.locals(pending=Pending)
    cpdef _tick(self)
    cpdef _commit(self)
