# No C types, as in engine.pxd.
