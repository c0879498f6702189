cimport cython
from broker.engine.core cimport Core, Limits
from broker.engine.message cimport Message
from broker.engine.outbox cimport Flag, Outbox
from broker.engine.receiver cimport Hold, Receiver, Target
from broker.engine.router cimport Entry, Route, Router
from broker.engine.session cimport Session

ctypedef const unsigned char* Bytes


cdef class Inbox(Outbox):
    cdef public object engine
    cdef public Core core
    cdef public Router router
    cdef public str peer
    cdef public Session session
    cdef public object principal
    cdef public object origin
    cdef public dict aliases
    cdef public bytearray acks
    cdef public object held
    cdef public bytes memo
    cdef public Entry memo_entry
    cdef public int unanswered
    cdef public int unreleased
    cdef public unsigned short receive_maximum
    cdef public unsigned short alias_maximum
    cdef public unsigned char state
    cdef public unsigned char version
    cdef public Flag v5
    cdef public Flag suspended

    cpdef make_origin(self)
    @cython.locals(session=Session, entry=Entry, rights=dict, limits=Limits, code=int, some=int)
    cpdef Entry _entry(self, bytes topic)
    @cython.locals(core=Core, session=Session, v5=bint, p=Bytes, piece=bytes, target=Target, receiver=Receiver, box=Outbox, other=list, message=Message)
    cpdef _deliver_run(self, bytes data, Py_ssize_t start, Py_ssize_t end, Py_ssize_t count, Py_ssize_t largest, Route route)
    @cython.locals(p=Bytes, i=Py_ssize_t, at=Py_ssize_t, size=Py_ssize_t, shift=int, byte=int, topic_end=Py_ssize_t, stop=Py_ssize_t, message=Message)
    cpdef list _messages(self, bytes data, Py_ssize_t start, Py_ssize_t end)
    cpdef _hand_over(self, Route route, Message message)
    @cython.locals(shared=Entry, route=Route)
    cpdef int _on_restricted(self, bytes data, Py_ssize_t start, Py_ssize_t end, Entry entry) except -1
    @cython.locals(p=Bytes, session=Session, core=Core, qos=int, off=Py_ssize_t, length=Py_ssize_t, topic_end=Py_ssize_t, body_at=Py_ssize_t, ident=int, entry=Entry, expires=double, forward=bytes, code=int, retain=bint, unkept=bint, kinds=int, message=Message, route=Route, said=int, hold=Hold, count=int, acks=bytearray)
    cpdef int _on_publish(self, bytes data, int first, Py_ssize_t start, Py_ssize_t at, Py_ssize_t end) except -1
    @cython.locals(entry=Entry)
    cpdef Entry _entry_of_alias(self, int alias, bytes topic)
    cpdef _exceed(self)
    cpdef int _reject(self, int code, int qos, int ident) except -1
    cpdef denied(self)
    cpdef int _refuse_publish(self, str reason, int qos, int ident) except -1
    cpdef _acknowledge(self, int first, int ident, int code)
    cpdef _hold(self, int first, int ident, Hold hold)
    cpdef _flush_acks(self)
    @cython.locals(said=int)
    cpdef _on_ack(self, Session session, int first, int ident)
    cpdef bint _forget(self, Session session, int ident) except -1
    cpdef _reply(self, int first, int ident, int code)
    @cython.locals(said=int)
    cpdef _on_pubrec(self, Session session, int ident, int code)
    cpdef _on_pubrel(self, Session session, int ident)
