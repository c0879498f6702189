"""Life of anything long-lived: logs, back-off, supervision, the worker process."""
