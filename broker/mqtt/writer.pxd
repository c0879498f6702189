cimport cython


cpdef bytes uint16(object n)
cpdef bytes uint32(object n)
@cython.locals(size=Py_ssize_t)
cpdef bytes binary(bytes data)
cpdef bytes text(str value)
@cython.locals(size=Py_ssize_t)
cpdef bytes packet(int first_byte, bytes body)
