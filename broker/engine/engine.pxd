cimport cython
from broker.engine.channel cimport Channel
from broker.engine.core cimport Core, Limits
from broker.engine.rights cimport Rights
from broker.engine.router cimport Router
from broker.engine.session cimport Session
from broker.engine.subscriptions cimport Subscriptions
from broker.engine.timers cimport Wheel
from broker.mqtt.connect cimport Connect, encode_connack
from broker.mqtt.properties cimport Properties


cdef class Engine:
    cdef public object clock
    cdef public Core core
    cdef public object report
    cdef public Rights rights
    cdef public dict sessions
    cdef public dict groups
    cdef public object legacies
    cdef public set holding
    cdef public Router router
    cdef public object retained_store
    cdef public Subscriptions subscriptions
    cdef public object wills
    cdef public object instances
    cdef public Wheel wheel
    cdef public object timers
    cdef public int connected
    cdef public object pressure
    cdef public dict _claims
    cdef public dict _takeovers
    cdef public object _half_closed
    cdef public object _lingering
    cdef public double _next_sweep
    cdef public double _next_look
    cdef public object on_connected
    cdef public object on_disconnected
    cdef public object on_denied
    cdef object __weakref__

    @cython.locals(core=Core, client_id=str, session=Session, code=int, expiry=double, present=bint, anew=bint, connack=bytes)
    cpdef attach(self, Channel channel, Connect connect, object principal)
    @cython.locals(core=Core, session=Session, stranger=bint, strict=bint)
    cpdef int _admit(self, Channel channel, str client_id, Connect connect, object principal) except -1
    @cython.locals(session=Session)
    cpdef tuple _session_of(self, str client_id, bint clean_start, object principal)
    @cython.locals(expiry=double, longest=double)
    cpdef double _expiry_of(self, Session session, Connect connect, object principal) except -1
    @cython.locals(asked=int, longest=double)
    cpdef int _keep_alive_of(self, Connect connect, object principal) except -1
    @cython.locals(limits=Limits, props=Properties, keep_alive=int, alias_out=int, privileged=bint)
    cpdef object _agree(self, Channel channel, Session session, Connect connect, object principal)
    cpdef _welcome(self, Channel channel, Session session, bytes connack)
