cimport cython
from broker.mqtt cimport writer
from broker.mqtt.framing cimport encode_length
from broker.mqtt.properties cimport Properties, encode_properties, read_properties
from broker.mqtt.reader cimport Reader
from broker.mqtt.text cimport check_text

cdef int _PUBLISH, _INBOUND, _PUBREL


cdef class Publish:
    cdef public bytes topic
    cdef public bytes payload
    cdef public int qos
    cdef public bint retain
    cdef public bint dup
    cdef public int packet_id
    cdef public Properties properties


cdef class Ack:
    cdef public int packet_id
    cdef public int code
    cdef public Properties properties


@cython.locals(qos=int, dup=bint, reader=Reader, topic=bytes, packet_id=int, properties=Properties)
cpdef Publish decode_publish(
    int first_byte, bytes body, int version, int max_user_properties=*, bint strict=*, bint from_client=*
)
@cython.locals(packet_id=int)
cdef int _read_packet_id(Reader reader) except -1
@cython.locals(head=bytes, first=int)
cpdef bytes encode_publish(
    bytes topic, bytes payload, int qos, bint retain, bint dup, int packet_id, int version, bytes properties=*
)
@cython.locals(reader=Reader, packet_id=int, code=int, properties=Properties)
cpdef Ack decode_ack(bytes body, int version, int packet_type, bint strict=*)
@cython.locals(first=int)
cpdef bytes encode_ack(int packet_type, int packet_id, int version, int code=*, Properties properties=*)
