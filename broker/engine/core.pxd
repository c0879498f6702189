from broker.engine.outbox cimport Flusher


cdef class Limits:
    cdef public Py_ssize_t max_packet_size
    cdef public int receive_maximum
    cdef public int max_inflight
    cdef public Py_ssize_t max_queued_messages
    cdef public Py_ssize_t max_queued_bytes
    cdef public double max_queued_age
    cdef public str queue_overflow
    cdef public double session_expiry
    cdef public double connect_timeout
    cdef public int max_topic_levels
    cdef public int max_topic_length
    cdef public int max_clientid_length
    cdef public int max_subscriptions
    cdef public int max_user_properties
    cdef public double max_keepalive
    cdef public str max_keepalive_policy
    cdef public int topic_alias_maximum
    cdef public Py_ssize_t max_retained_messages
    cdef public Py_ssize_t max_retained_bytes
    cdef public Py_ssize_t max_retained_per_client
    cdef public double stall_timeout
    cdef public int takeover_rate
    cdef public double ack_timeout
    cdef public Py_ssize_t route_cache_bytes
    cdef public bint shared_client_ids
    cdef public str shared_strategy
    cdef public bint check_retain_source
    cdef public str receive_maximum_policy
    cdef public bint strict


cdef class Core:
    cdef public Flusher flusher
    cdef public Limits limits
    cdef public double now
    cdef public long long wall_ms
    cdef public str node
    cdef public long long received
    cdef public long long sent
    cdef public long long received_bytes
    cdef public dict dropped
    cdef public dict refused
    cdef public object on_drop
    cdef public dict events
    cdef public set stalled
    cdef public long long room
    cdef public object journal
    cdef public object withholds
    cdef public object observer
    cdef public double clock_base
    cdef public long long _sequence
    cdef public str _tail
    cdef object __weakref__

    cpdef drop(self, str reason, long long count=*, object session=*)
    cpdef count(self, str event, long long count=*)
    cpdef stamp(self, object message)
    cpdef long long clock(self)
