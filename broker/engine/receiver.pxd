cimport cython
from broker.engine.message cimport Message
from broker.engine.outbox cimport Flag, Outbox


cdef class Hold:
    cdef public object owner
    cdef public int count
    cdef public int code
    cdef public bint done


cdef class Receiver:
    cdef public str client_id
    cdef public Outbox outbox
    cdef public Flag v5
    cdef public Flag special
    cdef public Flag durable
    cdef public Flag stored
    cdef public unsigned int max_packet
    cdef public object origin
    cdef public object principal

    cpdef int deliver(self, Message message, Target target, Hold hold) except -1
    cpdef int refuses(self, Py_ssize_t size) except -1


@cython.final
cdef class Subscription:
    cdef public Receiver receiver
    cdef public bytes filter
    cdef public Flag no_local
    cdef public Flag rap
    cdef public unsigned char qos
    cdef public int ident
    cdef public object group


@cython.final
cdef class Target:
    cdef public Receiver receiver
    cdef public int qos
    cdef public bint no_local
    cdef public bint rap
    cdef public tuple idents
    cdef public object group
