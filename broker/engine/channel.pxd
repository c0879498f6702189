cimport cython
from broker.engine.core cimport Limits
from broker.engine.inbox cimport Inbox
from broker.engine.outbox cimport Flag
from broker.engine.router cimport Entry, Route
from broker.engine.session cimport Session
from broker.mqtt.connect cimport Connect, Will, decode_connect, encode_connack
from broker.mqtt.control cimport check_flags
from broker.mqtt.subscribe cimport Subscribe, Unsubscribe, decode_subscribe, decode_unsubscribe, encode_suback, encode_unsuback

ctypedef const unsigned char* Bytes


@cython.final
cdef class Channel(Inbox):
    cdef public object listener
    cdef public dict identity
    cdef public object connect
    cdef public list pieces
    cdef public Flag parsing
    cdef public Flag paused
    cdef public Flag resting
    cdef public Flag graceful
    cdef public Flag bridge
    cdef public int bucket
    cdef public int have
    cdef public int taken
    cdef public int need
    cdef public int max_packet
    cdef public float keep_alive
    cdef public double last_read
    cdef public double deadline
    cdef public double held_until

    cpdef eof_received(self)
    cpdef connection_lost(self, object error)
    cpdef feed(self, bytes data)
    cpdef _rest(self)
    cpdef _read_ahead(self)
    cpdef _guard(self, bytes data)
    @cython.locals(p=Bytes, n=Py_ssize_t, i=Py_ssize_t, end=Py_ssize_t, at=Py_ssize_t, size=Py_ssize_t, found=Py_ssize_t, first=int, kind=int, v5=bint, session=Session, route=Route, run_route=Route, run_start=Py_ssize_t, run_end=Py_ssize_t, run_count=Py_ssize_t, largest=Py_ssize_t, topic_at=Py_ssize_t, topic_end=Py_ssize_t, length=Py_ssize_t, entry=Entry, said=int)
    cpdef _parse(self, bytes data)
    cpdef _on_packet(self, int kind, int first, bytes body)
    @cython.locals(limits=Limits, subscribe=Subscribe)
    cpdef _on_subscribe(self, Session session, bytes body)
    cpdef subscribed(self, Session session, int packet_id, list codes, list retained)
    cpdef push_live(self, bytes data)
    @cython.locals(limits=Limits, connect=Connect, will=Will, name=bytes)
    cpdef _on_connect(self, bytes body)
    cpdef accept(self, object principal)


@cython.locals(size=Py_ssize_t, used=int, byte=int)
cdef Py_ssize_t _remaining_length(Bytes p, Py_ssize_t at, Py_ssize_t n) noexcept
