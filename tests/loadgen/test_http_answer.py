"""Answers as bytes, divided into reads in every way."""

import pytest

from loadgen.http_answer import MAX_HEAD_BYTES, Answer, BadAnswer

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"5\r\nab\r\nc\r\nA;x=1\r\n0123456789\r\n"


def read(data, sizes=None, closed=False):
    """The answer, its body and what it says of the connection, after reads of these sizes."""
    answer, body, at = Answer(), b"", 0
    for size in sizes or [len(data)]:
        body += answer.feed(data[at : at + size])
        at += size
    if closed:
        answer.closed()
    return answer.status, answer.part == "over", answer.keep_alive, body


@pytest.mark.parametrize(
    ("data", "closed", "expected"),
    [
        (CHUNKED + CHUNKS + b"0\r\n\r\n", False, (200, True, True, b"ab\r\nc0123456789")),
        (
            CHUNKED + CHUNKS + b"00\r\nX: y\r\nZ: a\r\n\r\n",
            False,
            (200, True, True, b"ab\r\nc0123456789"),
        ),
        (CHUNKED + CHUNKS, True, (200, False, False, b"ab\r\nc0123456789")),
        (CHUNKED + CHUNKS + b"0\r\nX: y\r\n", True, (200, False, False, b"ab\r\nc0123456789")),
        (CHUNKED + b"0\r\n\r\n" + OK, False, (200, True, False, b"")),
        (OK + b"content-length:  5 \r\n\r\nhello", False, (200, True, True, b"hello")),
        (
            OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
            False,
            (200, True, True, b"hello"),
        ),
        (
            OK + b"Content-Length: 5\r\nConnection: Close\r\n\r\nhello",
            False,
            (200, True, False, b"hello"),
        ),
        (OK + b"Content-Length: 5\r\n\r\nhell", True, (200, False, False, b"hell")),
        (OK + b"Content-Length: 0\r\n\r\n", False, (200, True, True, b"")),
        (OK + b"Content-Length: 2\r\n\r\nhello", False, (200, True, False, b"he")),
        (OK + b"\r\nhello", True, (200, True, False, b"hello")),
        (OK + b"\r\nhello", False, (200, False, True, b"hello")),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", True, (200, True, False, b"hello")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, (204, True, True, b"")),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + b"0\r\n\r\n", False, (200, True, True, b"")),
        (b"HTTP/1.1 429 \r\nContent-Length: 2\r\n\r\nno", False, (429, True, True, b"no")),
    ],
)
def test_every_division_into_reads_gives_the_same_answer(data, closed, expected):
    for size in range(1, len(data) + 1):
        sizes = [size] * -(-len(data) // size)
        assert read(data, sizes, closed) == expected, f"reads of {size}"
    for at in range(1, len(data)):
        assert read(data, [at, len(data) - at], closed) == expected, f"split at {at}"


def test_a_body_comes_as_soon_as_it_is_there():
    answer = Answer()
    answer.feed(CHUNKED)
    assert answer.feed(b"ff\r\nabc") == b"abc"
    assert answer.feed(b"def") == b"def"
    assert answer.part == "chunk"


def test_chunks_as_long_as_the_one_before_are_read_as_any_other():
    answer = Answer()
    answer.feed(CHUNKED)
    same = [b"4\r\nab\r\n\r\n", b"4\r\ncd\n\n\r\n", b"4\r\n4\r\n\n\r\n"]
    assert [answer.feed(read) for read in same] == [b"ab\r\n", b"cd\n\n", b"4\r\n\n"]
    # As long, of other chunks: two short ones, and one that goes on.
    assert answer.feed(b"1\r\ne\r\n1\r\n") == b"e"
    assert answer.feed(b"f\r\n8\r\nghi") == b"fghi"
    assert answer.feed(b"jklmn\r\n4\r") == b"jklmn"
    assert answer.feed(b"\nopqr\r\n") == b"opqr"
    assert answer.feed(same[0]) == b"ab\r\n"
    assert answer.feed(b"4\r\nabcdef") == b"abcd"
    with pytest.raises(BadAnswer, match="longer than its size"):
        answer.feed(b"\r\n")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP/1.1 answer"),
        (b"SSH", "no HTTP/1.1 answer"),
        (b"HTTP/2 200\r\n\r\n", "no HTTP/1.1 answer"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "no HTTP/1.1 answer"),
        (OK + b"no colon\r\n\r\n", "no header"),
        (OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", "no Content-Length"),
        (OK + b"Content-Length: -1\r\n\r\n", "no Content-Length"),
        (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "unknown Transfer-Encoding"),
        (OK + b"Content-Encoding: gzip\r\n\r\n", "compressed"),
        (CHUNKED + b"xyz\r\n", "no size of a chunk"),
        (CHUNKED + b"-5\r\nhello\r\n", "no size of a chunk"),
        (CHUNKED + b"\r\n", "no size of a chunk"),
        (CHUNKED + b"2\r\nabc\r\n", "longer than its size"),
        (OK + b"X: " + b"y" * MAX_HEAD_BYTES, "more than"),
        (CHUNKED + b"1" * (MAX_HEAD_BYTES + 1), "more than"),
    ],
)
def test_what_is_no_answer_is_refused(data, words):
    with pytest.raises(BadAnswer, match=words):
        read(data)
