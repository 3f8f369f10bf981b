"""The coordinator: engine (queue, scheduler, ranks) and frontends (public API, text)."""
