cdef class Wheel:
    cdef public dict buckets
    cdef public long long next

    cpdef put(self, object channel, double when)
    cpdef remove(self, object channel)
    cpdef list due(self, double now)
