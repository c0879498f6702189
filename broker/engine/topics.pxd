cpdef Py_ssize_t levels(bytes topic)
cpdef bint is_wild(bytes topic)
cpdef bint valid_name(bytes topic)
cpdef bint valid_filter(bytes filter) except -1
cpdef bint matches(bytes filter, bytes topic) except -1
