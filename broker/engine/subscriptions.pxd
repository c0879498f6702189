cimport cython
from broker.engine.channel cimport Channel
from broker.engine.core cimport Core, Limits
from broker.engine.receiver cimport Subscription
from broker.engine.rights cimport Rights
from broker.engine.router cimport Router
from broker.engine.session cimport Session
from broker.mqtt.properties cimport Properties
from broker.mqtt.subscribe cimport Subscribe


cdef class Subscriptions:
    cdef public Core core
    cdef public Rights rights
    cdef public Router router
    cdef public object retained
    cdef public object legacies
    cdef public dict sessions
    cdef public dict groups
    cdef public dict _unwritten
    cdef public object owed

    @cython.locals(props=Properties, codes=list, retained=list, known=dict, older=dict)
    cpdef tuple subscribe(self, Channel channel, Session session, Subscribe packet)
    cpdef _note(self, Session session, bytes filter, Subscription made, long long owed=*)
    @cython.locals(limits=Limits, v5=bint, qos=int, no_local=bint, rap=bint, handling=int, key=tuple, target=bytes, old=Subscription, made=Subscription, retained=list)
    cpdef tuple _subscribe_one(self, Channel channel, Session session, bytes filter, int options, int ident, dict known)
    @cython.locals(subscription=Subscription)
    cpdef Subscription _add(self, Session session, bytes filter, tuple key, int qos, bint no_local, bint rap, int ident)
