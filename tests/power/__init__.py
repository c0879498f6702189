"""Proof that a power cut loses nothing that was acknowledged; knows the broker's promises, not its store.

`shim.c` logs what the broker does to its data folder, `record.py` builds the shim and reads its log, `replay.py`
rebuilds the folder as a power cut could have left it, `load.py` publishes and notes when each promise arrived,
`verify.py` compares what a broker on a rebuilt folder still has, `rounds.py` puts them together, `ext4.py` pulls the
plug of a real file system. `python -m tests.power --help`.
"""
