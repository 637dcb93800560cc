"""What lies where a file should be: a git-LFS pointer, a web page, nothing.

A copy that went wrong leaves a file of the right name with other content. Its reader's own message
("unknown format", "header too large") sends people to look in the wrong place.
"""

LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html")


def describe(head: bytes) -> str | None:
    """What a file's first bytes show that it is instead, and what to do; None where it may be what
    its name says.

    >>> describe(b"")
    'is empty: fetch it again'
    """
    if head.startswith(LFS):
        return "is a git-LFS pointer, not the file that it stands for: run `git lfs pull` there"
    if not head:
        return "is empty: fetch it again"
    if head[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        return "is a web page, perhaps an error's or a login's: fetch the file again"
    return None
