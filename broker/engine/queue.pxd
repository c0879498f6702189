cimport cython
from broker.engine.core cimport Core
from broker.engine.inflight cimport Inflight
from broker.engine.message cimport Message
from broker.engine.outbox cimport Flag
from broker.engine.receiver cimport Hold, Receiver
from broker.engine.spool cimport Spool


cdef class Queue(Receiver):
    cdef public Core core
    cdef public list subscriptions
    cdef public Inflight inflight
    cdef public object queue
    cdef public Py_ssize_t queue_bytes
    cdef public object spec
    cdef public Spool spool
    cdef public list blocked
    cdef public object retained
    cdef public dict dropped
    cdef public Flag persistent
    cdef public Flag left_share

    cpdef int refuses(self, Py_ssize_t size) except -1
    cpdef int _admit(self, int qos, Py_ssize_t size) except -1
    cpdef int _enqueue(self, Message message, int qos, bint retain, object idents, Hold hold, object group) except -1
    @cython.locals(spool=Spool)
    cpdef object _seq_of(self, int ident)
