from broker.engine.core cimport Core


cdef class Rights:  # may_receive is handed on as it is, which only a plain method allows
    cdef public object gate
    cdef public Core core

    cpdef bint may_publish(self, object principal, str topic, int qos, bint retain) except -1
    cpdef bint may_subscribe(self, object principal, bytes filter, int qos) except -1
