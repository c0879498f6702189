cimport cython
from broker.mqtt cimport writer
from broker.mqtt.properties cimport Properties, encode_properties, read_properties
from broker.mqtt.reader cimport Reader
from broker.mqtt.text cimport check_text

cdef int _SUBSCRIBE, _SUBACK, _UNSUBSCRIBE, _UNSUBACK, _NO_LOCAL


cdef class Subscribe:
    cdef public int packet_id
    cdef public list filters
    cdef public Properties properties


cdef class Unsubscribe:
    cdef public int packet_id
    cdef public list filters
    cdef public Properties properties


cdef class Suback:
    cdef public int packet_id
    cdef public list codes
    cdef public Properties properties


@cython.locals(reader=Reader, packet_id=int, properties=Properties, filters=list, name=bytes, options=int)
cpdef Subscribe decode_subscribe(bytes body, int version, bint strict=*, int max_user_properties=*)
@cython.locals(packet_id=int)
cdef int _read_packet_id(Reader reader) except -1
cdef _check_options(bytes name, int options, int version)
@cython.locals(parts=list)
cpdef bytes encode_subscribe(int packet_id, int version, list filters, Properties properties=*)
cpdef bytes encode_suback(int packet_id, int version, list codes, Properties properties=*)
@cython.locals(reader=Reader, packet_id=int, properties=Properties, codes=list)
cpdef Suback decode_suback(bytes body, int version, bint strict=*)
@cython.locals(codes=list)
cdef list _read_codes(Reader reader, object allowed)
@cython.locals(reader=Reader, packet_id=int, properties=Properties, filters=list, name=bytes)
cpdef Unsubscribe decode_unsubscribe(bytes body, int version, bint strict=*, int max_user_properties=*)
@cython.locals(parts=list)
cpdef bytes encode_unsubscribe(int packet_id, int version, list filters, Properties properties=*)
cpdef bytes encode_unsuback(int packet_id, int version, list codes, Properties properties=*)
@cython.locals(reader=Reader, packet_id=int, properties=Properties)
cpdef Suback decode_unsuback(bytes body, int version, bint strict=*)
