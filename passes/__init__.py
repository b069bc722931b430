"""Graph passes: one function per file, file and function share a name, nothing is re-exported."""

if __name__ != "nanoflow_compiler.passes":
    raise ImportError(f"import nanoflow_compiler.passes, not {__name__}: one copy only")
