cimport cython
from broker.engine.core cimport Core, Limits
from broker.engine.message cimport Message
from broker.engine.outbox cimport Flag, Flusher, Outbox
from broker.engine.receiver cimport Hold, Receiver, Target
from broker.engine.router cimport Entry, Route, Router
from broker.engine.session cimport Session

ctypedef const unsigned char* Bytes


@cython.final
cdef class Channel(Outbox):
    cdef public object engine
    cdef public Core core
    cdef public Router router
    cdef public object listener
    cdef public str peer
    cdef public dict identity
    cdef public Session session
    cdef public object principal
    cdef public object origin
    cdef public object connect
    cdef public unsigned char state
    cdef public unsigned char version
    cdef public Flag v5
    cdef public Flag parsing
    cdef public Flag suspended
    cdef public Flag paused
    cdef public Flag graceful
    cdef public Flag bridge
    cdef public unsigned short receive_maximum
    cdef public unsigned short alias_maximum
    cdef public int bucket
    cdef public int unanswered
    cdef public int unreleased
    cdef public int have
    cdef public int need
    cdef public int max_packet
    cdef public float keep_alive
    cdef public double last_read
    cdef public double deadline
    cdef public double held_until
    cdef public list pieces
    cdef public dict aliases
    cdef public bytearray acks
    cdef public object held
    cdef public bytes memo
    cdef public Entry memo_entry

    cpdef eof_received(self)
    cpdef connection_lost(self, object error)
    cpdef feed(self, bytes data)
    cpdef _guard(self, bytes data)
    @cython.locals(p=Bytes, n=Py_ssize_t, i=Py_ssize_t, end=Py_ssize_t, at=Py_ssize_t, size=Py_ssize_t, shift=int, byte=int, first=int, kind=int, v5=bint, session=Session, route=Route, run_route=Route, run_start=Py_ssize_t, run_end=Py_ssize_t, run_count=Py_ssize_t, largest=Py_ssize_t, topic_at=Py_ssize_t, topic_end=Py_ssize_t, length=Py_ssize_t, entry=Entry, shared=Entry, ident=int, said=int)
    cpdef _parse(self, bytes data)
    @cython.locals(session=Session, entry=Entry, rights=dict, limits=Limits, code=int, some=int)
    cpdef Entry _entry(self, bytes topic)
    @cython.locals(core=Core, session=Session, v5=bint, p=Bytes, piece=bytes, target=Target, receiver=Receiver, box=Outbox, other=list, message=Message)
    cpdef _deliver_run(self, bytes data, Py_ssize_t start, Py_ssize_t end, Py_ssize_t count, Py_ssize_t largest, Route route)
    @cython.locals(p=Bytes, i=Py_ssize_t, at=Py_ssize_t, size=Py_ssize_t, shift=int, byte=int, topic_end=Py_ssize_t, stop=Py_ssize_t, message=Message)
    cpdef list _messages(self, bytes data, Py_ssize_t start, Py_ssize_t end)
    cpdef _make_origin(self)
    cpdef int _refuse_publish(self, str reason, int qos, int ident) except -1
    cpdef push_live(self, bytes data)
    cpdef _hand_over(self, Route route, Message message)
    @cython.locals(p=Bytes, session=Session, core=Core, qos=int, off=Py_ssize_t, length=Py_ssize_t, topic_end=Py_ssize_t, body_at=Py_ssize_t, ident=int, entry=Entry, expires=double, forward=bytes, code=int, retain=bint, unkept=bint, kinds=int, message=Message, route=Route, said=int, hold=Hold, count=int, acks=bytearray, waiting=Py_ssize_t)
    cpdef int _on_publish(self, bytes data, int first, Py_ssize_t start, Py_ssize_t at, Py_ssize_t end) except -1
    cpdef _acknowledge(self, int first, int ident, int code)
    cpdef _hold(self, int first, int ident, Hold hold)
    cpdef _flush_acks(self)
    cpdef bint _forget(self, Session session, int ident) except -1
    cpdef _reply(self, int first, int ident, int code)
    @cython.locals(said=int)
    cpdef _on_pubrec(self, Session session, int ident, int code)
    cpdef _on_pubrel(self, Session session, int ident)
