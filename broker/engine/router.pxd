cimport cython
from broker.engine.message cimport Message
from broker.engine.receiver cimport Hold, Receiver, Subscription, Target


@cython.final
cdef class Node:
    cdef public dict children
    cdef public Node plus
    cdef public list here
    cdef public list below


@cython.final
cdef class Route:
    cdef public list targets
    cdef public list groups
    cdef public bint simple
    cdef public bint holding
    cdef public bint guarded
    cdef object __weakref__


@cython.final
cdef class Entry:
    cdef public bytes topic
    cdef public int code
    cdef public Route route
    cdef public bint live


cdef class Router:
    cdef public object may_receive
    cdef public Py_ssize_t cache_bytes
    cdef public dict exact
    cdef public Node root
    cdef public dict entries
    cdef public dict index
    cdef public Py_ssize_t cached
    cdef public Py_ssize_t count
    cdef public object routes

    @cython.locals(node=Node, child=Node)
    cpdef add(self, Subscription subscription)
    cpdef remove(self, Subscription subscription)
    @cython.locals(entry=Entry)
    cpdef touch(self, bytes filter)
    cpdef Entry entry(self, bytes topic)
    @cython.locals(node=Node, child=Node, found=list, nodes=list, below=list, parts=list, last=Py_ssize_t, level=Py_ssize_t, system=bint, hidden=bint)
    cpdef list matching(self, bytes topic)
    @cython.locals(subscription=Subscription, target=Target, receiver=Receiver, route=Route)
    cpdef Route fill(self, Entry entry)
    @cython.locals(target=Target, said=int, answer=int)
    cpdef int room(self, Route route, Message message) except -1
    @cython.locals(target=Target, receiver=Receiver, count=int)
    cpdef int publish(self, Route route, Message message, object publisher, Hold hold) except -1
