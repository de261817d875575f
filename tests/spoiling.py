"""What happens to files: cut short, emptied, altered, replaced."""

from pathlib import Path


def spoil(path: Path, how: str) -> None:
    """Damage a file in one of the ways below."""
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "empty":
        content.clear()
    elif how == "flipped bit":
        content[-1000] ^= 1
    elif how == "foreign":
        content = b"nothing that belongs here"
    else:
        raise ValueError(how)
    path.write_bytes(content)
