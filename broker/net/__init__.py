"""Listeners and connections: TCP, TLS, WebSocket, Unix sockets."""
