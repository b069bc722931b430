"""Backends: what turns a Program into something that runs."""

if __name__ != "nanoflow_compiler.backends":
    raise ImportError(f"import nanoflow_compiler.backends, not {__name__}: one copy only")
