cimport cython


cpdef str decode_text(bytes data, bint strict=*)
cpdef check_text(bytes data, bint strict=*)
cdef _check_characters(str text, bint strict)
@cython.locals(point=int)
cdef bint _is_allowed(str character) except -1
