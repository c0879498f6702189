"""Loading, checking and comparing conf.d."""
