"""Streams that run for good: sources that come back, slots, one engine, sinks with threads of their own (docs/streams.md)."""
