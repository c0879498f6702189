cimport cython
from broker.engine.inflight cimport Inflight
from broker.engine.journal cimport Journal
from broker.engine.message cimport Message, encode_head
from broker.engine.outbox cimport Flag, Outbox
from broker.engine.queue cimport Queue
from broker.engine.receiver cimport Hold, Target
from broker.engine.spool cimport Pending, Spool


cdef class Session(Queue):
    cdef public object owner
    cdef public bytearray received
    cdef public int received_count
    cdef public int window
    cdef public int rights_bytes
    cdef public unsigned short alias_maximum
    cdef public Flag encoded5
    cdef public Flag claimed
    cdef public double expiry
    cdef public double ends_at
    cdef public dict rights
    cdef public object resend
    cdef public dict aliases
    cdef public object will
    cdef public double will_delay
    cdef public dict will_terms
    cdef public dict timers
    cdef public double created
    cdef public long long acked

    @cython.locals(qos=int)
    cpdef int deliver(self, Message message, Target target, Hold hold) except -1
    @cython.locals(box=Outbox, packet=bytes)
    cpdef int offer(self, Message message, int qos, bint retain, object idents, Hold hold, object group) except -1
    @cython.locals(inflight=Inflight, head=bytes, body=bytes, ident=int, spool=Spool)
    cpdef int _send(self, Outbox box, Message message, int qos, bint retain, object idents, Hold hold, object group, long long seq, Pending pending) except -1
    @cython.locals(box=Outbox, inflight=Inflight, seq=longlong, direct=bint, journal=Journal, size=Py_ssize_t, said=int, safe=Hold, pending=Pending)
    cpdef int _keep(self, Spool spool, Message message, int qos, bint retain, object idents, Hold hold, object group) except -1
    @cython.locals(pending=Pending, inflight=Inflight)
    cpdef bint _may_go(self, tuple entry) except -1
    cpdef bint _more(self) except -1
    @cython.locals(box=Outbox, spool=Spool, message=Message, qos=int, pending=Pending, hold=Hold, seq=longlong, entry=tuple, oldest=longlong)
    cpdef drain(self)
    cpdef _send_retained(self, object box)
    @cython.locals(inflight=Inflight, ident=int)
    cpdef _send_again(self, Outbox box)
    @cython.locals(inflight=Inflight, state=int, pending=Pending)
    cpdef int on_puback(self, int ident) except -1
    @cython.locals(inflight=Inflight, state=int, pending=Pending, spool=Spool)
    cpdef int on_pubrec(self, int ident, int code) except -1
    @cython.locals(inflight=Inflight, state=int)
    cpdef int on_pubcomp(self, int ident) except -1
    @cython.locals(received=bytearray)
    cpdef bint seen(self, int ident) except -1
    cpdef remember(self, int ident)
    cpdef bint forget(self, int ident) except -1
