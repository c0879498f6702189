"""What a broker may do besides: each feature is one file that watches the engine and acts through it."""
