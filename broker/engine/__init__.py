"""State and routing: topics, router, sessions, queues, retained messages, wills. No sockets, no await."""
