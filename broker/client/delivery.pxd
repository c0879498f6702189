cimport cython
from broker.mqtt.publish cimport Publish

ctypedef const unsigned char* View


cdef bytes _ONLY
cdef Py_ssize_t _NAMED


cdef class Delivery(Publish):
    cdef public bytes metadata


@cython.locals(
    size=Py_ssize_t, view=View, named=Py_ssize_t, at=Py_ssize_t, length=Py_ssize_t, end=Py_ssize_t, start=Py_ssize_t,
    packet_id=int, delivery=Delivery
)
cpdef Publish decode_delivery(int first, bytes body)
