cimport cython


cpdef bytes uint16(int n)
cpdef bytes uint32(long long n)
@cython.locals(size=Py_ssize_t)
cpdef bytes binary(bytes data)
cpdef bytes text(str value)
@cython.locals(size=Py_ssize_t)
cpdef bytes packet(int first_byte, bytes body)
