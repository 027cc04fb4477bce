"""What is read from the bytes of video files, because no library tells it."""

MATROSKA, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # the first bytes of the file and of its one segment


def refreshed_later(packet: bytes, header: bytes) -> bool:
    """Whether an H.264 keyframe is incomplete until some frames later (gradual refresh).

    Its recovery point, an SEI message of kind 6, then states a number of frames above 0.
    """
    if header[:1] == b"\x01" and len(header) > 4:  # as in mp4: the length of each unit comes before it
        width, at, units = (header[4] & 3) + 1, 0, []
        while at < len(packet):
            start = at + width
            at = start + int.from_bytes(packet[at:start], "big")
            units.append(packet[start:at])
    else:
        units = packet.split(b"\0\0\1")
    for unit in units:
        at = 1
        while unit[:1] and unit[0] & 31 == 6 and at + 2 < len(unit):  # an SEI unit: messages of kind, length, content
            kind, at = _sei_number(unit, at)
            length, at = _sei_number(unit, at)
            if kind == 6 and at < len(unit) and not unit[at] & 128:  # the number 0 is coded as one bit, a 1
                return True
            at += length
    return False


def _sei_number(unit: bytes, at: int) -> tuple[int, int]:
    """Reads a number coded as a sum of bytes, of which all but the last are 255. Returns it and where it ends."""
    number = 0
    while at < len(unit):
        number, at = number + unit[at], at + 1
        if unit[at - 1] != 255:
            break
    return number, at


def stated_end(head: bytes) -> int:
    """The size in bytes that a file states, which tells whether it was cut off; 0 if it states none.

    AVI, Matroska and WebM files state one. The last two do not state a number of frames.
    """
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little")
    if not head.startswith(MATROSKA):
        return 0
    size, at = _number(head, 4)
    if head[at + size : at + size + 4] != SEGMENT:
        return 0
    size, at = _number(head, at + size + 4)
    return at + size


def _number(head: bytes, at: int) -> tuple[int, int]:
    """Reads a number whose length in bytes is 1 + the leading zeros of its first byte. Returns it and where it ends.

    All bits after the length set mean "unknown", which is returned as 0.
    """
    length = 9 - head[at].bit_length() if at < len(head) else 1
    bits = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
    return 0 if bits == (1 << 7 * length) - 1 else bits, at + length
