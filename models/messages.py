"""What our errors quote from the errors of others."""

__all__ = ["one_line"]


def one_line(error: Exception) -> str:
    """The message of ``error`` without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
