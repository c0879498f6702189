cimport cython
from broker.mqtt.framing cimport encode_length
from broker.mqtt.reader cimport Reader

cdef int _FLAG, _UINT16, _UINT32, _VARINT, _TEXT, _BINARY, _PAIR
cdef int _CONNECT, _CONNACK, _PUBLISH, _SUBSCRIBE, _DISCONNECT, _AUTH, _WILL, _INBOUND
cdef int _UNKNOWN, _LAST, _RESPONSE_TOPIC, _SUBSCRIPTION_IDENTIFIER, _TOPIC_ALIAS
cdef unsigned long long _BIT, _FORWARDED, _NOT_ZERO
cdef bytes _FORMS
cdef tuple _NAMES, _PLACES


cdef class Properties:
    cdef public object payload_format_indicator
    cdef public object message_expiry_interval
    cdef public str content_type
    cdef public str response_topic
    cdef public bytes correlation_data
    cdef public list subscription_identifiers
    cdef public object session_expiry_interval
    cdef public str assigned_client_identifier
    cdef public object server_keep_alive
    cdef public str authentication_method
    cdef public bytes authentication_data
    cdef public object request_problem_information
    cdef public object will_delay_interval
    cdef public object request_response_information
    cdef public str response_information
    cdef public str server_reference
    cdef public str reason_string
    cdef public object receive_maximum
    cdef public object topic_alias_maximum
    cdef public object topic_alias
    cdef public object maximum_qos
    cdef public object retain_available
    cdef public list user_properties
    cdef public object maximum_packet_size
    cdef public object wildcard_subscription_available
    cdef public object subscription_identifier_available
    cdef public object shared_subscription_available
    cdef public bytes forward

cpdef tuple decode_properties(
    bytes data, Py_ssize_t offset, Py_ssize_t end, int packet_type, int max_user_properties=*, bint strict=*
)
@cython.locals(
    length=Py_ssize_t, outer=Py_ssize_t, end=Py_ssize_t, properties=Properties, forwards=bint, pieces=bytes, run=Py_ssize_t,
    seen=cython.ulonglong, start=Py_ssize_t, number=int, form=int, repeated=bint, place=cython.ulonglong
)
cpdef Properties read_properties(Reader reader, int packet_type, int max_user_properties, bint strict)
cdef object _refusal(int number, str text)
@cython.locals(text=str)
cdef object _read_value(Reader reader, int number, int form, bint strict)
@cython.locals(pairs=list, key=str)
cdef _read_pair(Reader reader, Properties properties, int limit, bint strict)
@cython.locals(value=int)
cdef _read_subscription_identifier(Reader reader, Properties properties)
@cython.locals(out=list, block=bytes)
cpdef bytes encode_properties(Properties p)
cpdef bytes user_property(str key, str value)
cdef _put_flag(list out, bytes number, object value)
cdef _put_uint16(list out, bytes number, object value)
cdef _put_uint32(list out, bytes number, object value)
cdef _put_text(list out, bytes number, str value)
cdef _put_binary(list out, bytes number, bytes value)
