cimport cython


@cython.locals(packet_type=int, flags=int)
cpdef check_flags(int first_byte, int version)
