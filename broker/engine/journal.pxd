cimport cython
from broker.engine.intake cimport Intake
from broker.engine.message cimport Message
from broker.engine.receiver cimport Hold
from broker.engine.spool cimport Pending, Spool


cdef class Journal(Intake):
    cdef public object scratch
    cdef public long long lost
    cdef public int loads
    cdef public object compaction
    cdef public object pace
    cdef public dict origins
    cdef public dict _origin_bytes
    cdef public long long _number
    cdef public bint _resting

    @cython.locals(pending=Pending, size=Py_ssize_t, entries=int, spool=Spool, floor=longlong)
    cpdef _commit(self)
    @cython.locals(message=Message)
    cpdef bytes _encode(self, Pending pending)
    @cython.locals(pending=Pending, spool=Spool, publisher=Spool, hold=Hold, alive=int)
    cpdef written(self, object number, list places)
