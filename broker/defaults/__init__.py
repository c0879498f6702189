"""The shipped fragments, the same files as `conf.d/` of the repository; used when no other folder is found."""
