cimport cython
from broker.mqtt cimport writer
from broker.mqtt.properties cimport Properties, encode_properties, read_properties
from broker.mqtt.reader cimport Reader
from broker.mqtt.text cimport check_text

cdef int _CONNECT, _CONNACK, _WILL, _BRIDGE


cdef class Will:
    cdef public bytes topic
    cdef public bytes payload
    cdef public int qos
    cdef public bint retain
    cdef public Properties properties


cdef class Connect:
    cdef public int version
    cdef public str client_id
    cdef public bint clean_start
    cdef public int keep_alive
    cdef public str username
    cdef public bytes password
    cdef public Will will
    cdef public Properties properties
    cdef public bint bridge


cdef class Connack:
    cdef public bint session_present
    cdef public int code
    cdef public Properties properties


@cython.locals(reader=Reader, level=int, version=int)
cpdef Connect decode_connect(bytes body, bint strict=*, int max_user_properties=*)
@cython.locals(name=bytes, level=int, version=int)
cdef int _read_level(Reader reader) except -1
@cython.locals(
    flags=int, keep_alive=int, properties=Properties, client_id=str, will=Will, username=str, password=bytes
)
cdef Connect _read_connect(Reader reader, int version, bint bridge, bint strict, int max_user_properties)
cdef _check_connect_flags(int flags, int version)
@cython.locals(properties=Properties, topic=bytes, payload=bytes)
cdef Will _read_will(Reader reader, int flags, int version, bint strict, int max_user_properties)
@cython.locals(version=int, will=Will, flags=int, parts=list)
cpdef bytes encode_connect(Connect connect)
@cython.locals(flags=int)
cpdef bytes encode_connack(int version, bint session_present, int code, Properties properties=*)
@cython.locals(reader=Reader, flags=int, code=int, properties=Properties)
cpdef Connack decode_connack(bytes body, int version, bint strict=*)
