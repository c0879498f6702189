# No C types: compiling the module alone takes a third off the cost of a connection.
