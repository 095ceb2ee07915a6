#!/usr/bin/env python3
"""Fuzz what clients, operators and disks can hand to gos3rve.

    .ci/fuzz.py [--seconds N] [--with hypothesis|atheris|coverage]
                [--corpus DIR] [TARGET ...]

Each target takes bytes to the server in this process: a handler on a socket
that is none, over a directory of its own.  A finding is an answer of 500, a
traceback in the log, any other exception, or one second of CPU for an answer;
it is printed with its bytes, and the exit status is 1.  Whatever is found
becomes a row of a test in test_gos3rve.py.

hypothesis mixes pieces of the seeds; atheris starts from the seeds and lets
the coverage guide it, a process for each target.  coverage runs what there
is, and tells how much of the rooms of the parsers it reaches: the seeds, with
them what atheris kept in DIR, and with those the tests of the rooms in
test_gos3rve.py.  All three from PyPI.
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.parse

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
sys.path.insert(0, ROOT)
if os.environ.get("FUZZ_WITH") == "atheris":
    import atheris
    with atheris.instrument_imports(include=["gos3rve"]):
        import gos3rve
else:
    if os.environ.get("FUZZ_WITH") == "coverage":
        import coverage
        measured = coverage.Coverage(
            branch=True, data_file=None, include=["*/gos3rve.py"])
        measured.start()
    import gos3rve
import test_gos3rve                                     # noqa: E402

LIMIT_SECONDS = 1
PARSERS = range(2, 6)                   # their rooms
EVERYBODY = json.dumps({"Version": "2012-10-17", "Statement": [{
    "Effect": "Allow", "Principal": "*", "Action": "s3:*",
    "Resource": ["arn:aws:s3:::box", "arn:aws:s3:::box/*"]}]}).encode()


class Socket:
    """A connection that gives some bytes and keeps what is sent."""

    def __init__(self, data):
        self._data, self.sent = data, []

    def recv(self, size, *_):
        """Up to `size` of the bytes."""
        data, self._data = self._data[:size], self._data[size:]
        return data

    def sendall(self, data, *_):
        """Keep it."""
        self.sent.append(bytes(data))

    def fileno(self):
        """A place for sendfile() to write to."""
        return os.open(os.devnull, os.O_WRONLY)

    def _nothing(self, *_):
        return None
    setsockopt = settimeout = shutdown = close = _nothing


class World:
    """The server, its bucket `box` and a client that signs."""

    def __init__(self):
        self.said = []
        running = gos3rve.serve(buckets=["box"], key_id="ID", key_val="KEY",
                                object_ownership="ObjectWriter")
        self.server, self.running = running.server, running
        self.server.report = self.said.append
        self.server.service.store.report = self.said.append
        self.client = test_gos3rve.Client("http://localhost", "ID", "KEY")
        self.root = os.path.join(running.dir_buckets, "box")
        self.reset()

    def reset(self):
        """The bucket as it was at first."""
        for body, target in ((b"content", "/box/key"), (b"x", "/box/a/b")):
            self.signed("PUT", target, {}, body)

    def talk(self, data):
        """Hand bytes to a handler; what it sends.  Raises a finding."""
        connection = Socket(data)
        del self.said[:]
        gos3rve.Handler(connection, ("127.0.0.1", 1), self.server)
        sent = b"".join(connection.sent)
        for text in self.said:
            assert "Traceback" not in text, text
        # 500 is the word for sealed content whose record is damaged
        assert not re.search(rb"(?m)^HTTP/1\.1 500 ", sent) \
            or b"its record is lost or damaged" in sent, sent
        return sent

    def signed(self, method, target, headers, body):
        """Send a request with a good signature."""
        path, _, query = target.partition("?")
        pairs = urllib.parse.parse_qsl(query, True, errors="replace",
                                       separator="&")
        payload = headers.pop("x-amz-content-sha256", None) \
            or hashlib.sha256(body).hexdigest()
        headers["content-length"] = str(len(body))
        headers = self.client.sign(method, path, pairs, headers, payload)
        lines = ["%s %s HTTP/1.1" % (method, target)] + [
            "%s: %s" % item for item in headers.items()]
        return self.talk(("\r\n".join(lines) + "\r\n\r\n").encode(
            "latin-1", "replace") + body)


TARGETS = {}


def target(*seeds):
    """Make a function (world, bytes) a target."""
    def declare(function):
        TARGETS[function.__name__] = function, seeds
        return function
    return declare


@target(b"GET /box/key HTTP/1.1\r\nHost: a\r\nRange: bytes=0-3\r\n\r\n",
        b"PUT /box/k HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
        b"\r\n5;x=y\r\nhello\r\n0\r\nA: b\r\n\r\n",
        b"POST /box?delete HTTP/1.0\r\nContent-Length: 3\r\n\r\nabcGET /",
        b"OPTIONS /box/a HTTP/1.1\r\nHost: box.localhost\r\nOrigin: a\r\n"
        b"Access-Control-Request-Method: PUT\r\nExpect: 100-continue\r\n\r\n")
def wire(world, data):
    """All that comes over a connection, nobody having signed."""
    world.talk(data)


@target(b"GET /box?list-type=2&prefix=a&delimiter=%2F&max-keys=1\n\n",
        b"PUT /box/k?tagging\ncontent-md5: x\n\n<Tagging><TagSet/></Tagging>",
        b"PUT /box/k\nx-amz-copy-source: /box/key?versionId=null\n"
        b"x-amz-metadata-directive: REPLACE\nx-amz-meta-a: b\n\n",
        b"POST /box/k?uploads\nx-amz-checksum-algorithm: CRC32\n\n",
        b"GET /box/key?partNumber=1&response-expires=x\nrange: bytes=1-2\n"
        b"if-match: \"a\"\nif-modified-since: Mon, 01 Jan 2024 00:00:00 GMT"
        b"\n\n", b"GET /box?versions&key-marker=a&version-id-marker=b\n\n",
        b"PUT /box/k\nx-amz-object-lock-mode: GOVERNANCE\nx-amz-object-lock-"
        b"retain-until-date: 2030-01-01T00:00:00Z\nx-amz-acl: public-read\n"
        b"x-amz-server-side-encryption: aws:kms\nx-amz-tagging: a=b\n\ndata",
        b"POST /?Action=GetSessionToken&DurationSeconds=900\n\n")
def request(world, data):
    """A request with a good signature, whatever it says."""
    head, _, body = data.partition(b"\n\n")
    line, *lines = head.decode("latin-1").split("\n")
    method, _, place = line.partition(" ")
    if re.search(r"[\r\0 ]", method + place) or not place.startswith("/"):
        return
    headers = dict(line.lower().split(":", 1) for line in lines
                   if re.match(r"[A-Za-z0-9-]+:[^\r\0]*\Z", line))
    headers.pop("transfer-encoding", None)
    world.signed(method, place, headers, body)


@target(b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n",
        b"5;chunk-signature=" + b"0" * 64 + b"\r\nhello\r\n0\r\n\r\n")
def aws_chunked(world, data):
    """The framing of a body, its signatures and its trailer."""
    for payload in ("STREAMING-UNSIGNED-PAYLOAD-TRAILER",
                    "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER",
                    "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"):
        world.signed("PUT", "/box/chunked", {
            "x-amz-content-sha256": payload, "content-encoding":
            "aws-chunked", "x-amz-decoded-content-length": "5",
            "x-amz-trailer": "x-amz-checksum-crc32"}, data)


@target(b"--b\r\nContent-Disposition: form-data; name=\"key\"\r\n\r\nk\r\n"
        b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x"
        b"\"\r\nContent-Type: text/plain\r\n\r\ndata\r\n--b--\r\n")
def form(world, data):
    """The form of a browser's upload."""
    world.talk(b"POST /box HTTP/1.1\r\nHost: localhost\r\nContent-Type: mult"
               b"ipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n"
               % len(data) + data)


DOCUMENTS = sorted(
    (row.method, row.level, row.subresource, row.name)
    for row in gos3rve.OPERATIONS.values()
    if row.method in ("PUT", "POST") and row.subresource
    and row.level in (gos3rve.BUCKET, gos3rve.OBJECT) and not row.when)


@target(*(b"\0<A/>", b"\1" + EVERYBODY, b"\2<Delete><Object><Key>a</Key>"
          b"</Object><Quiet>true</Quiet></Delete>",
          b"\3<CORSConfiguration><CORSRule><AllowedOrigin>*</AllowedOrigin>"
          b"<AllowedMethod>GET</AllowedMethod></CORSRule>"
          b"</CORSConfiguration>"))
def document(world, data):
    """The document of an operation: the first byte says of which."""
    if not data:
        return
    method, level, subresource, _ = DOCUMENTS[data[0] % len(DOCUMENTS)]
    place = "/box" + ("/key" if level == gos3rve.OBJECT else "")
    world.signed(method, "%s?%s" % (place, subresource), {}, data[1:])
    if subresource == "policy":
        world.talk(b"GET /box/key HTTP/1.1\r\nHost: a\r\nReferer: b\r\n\r\n")


@target(b"AWS4-HMAC-SHA256 Credential=ID/20260101/us-east-1/s3/aws4_request, "
        b"SignedHeaders=host;x-amz-date, Signature=" + b"0" * 64,
        b"AWS ID:AAAAAAAAAAAAAAAAAAAAAAAAAAA=", b"AWS4-ECDSA-P256-SHA256 a")
def authorization(world, data):
    """The header that signs."""
    value = re.sub(rb"[\r\n\0]", b" ", data)
    world.talk(b"GET /box/key HTTP/1.1\r\nHost: localhost\r\nx-amz-date: 2026"
               b"0101T000000Z\r\nAuthorization: " + value + b"\r\n\r\n")


@target(b"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=ID%2F20260101%2F"
        b"us-east-1%2Fs3%2Faws4_request&X-Amz-Date=20260101T000000Z&X-Amz-"
        b"Expires=60&X-Amz-SignedHeaders=host&X-Amz-Signature=" + b"0" * 64,
        b"AWSAccessKeyId=ID&Expires=1&Signature=A%3D")
def presigned(world, data):
    """The query of a presigned URL."""
    query = re.sub(rb"[^!-~]", b"", data)
    world.talk(b"GET /box/key?" + query + b" HTTP/1.1\r\nHost: localhost\r\n"
               b"\r\n")


@target(b"bytes=0-1", b"Mon, 01 Jan 2024 00:00:00 GMT",
        b"2024-01-01T00:00:00.000Z", b"20240101T000000Z", b'"a", W/"b", *',
        b"/box/a%20b?versionId=3", b"a=b&c=d", b"0.0.0.0/8", b"box")
def values(world, data):
    """What headers say: ranges, dates, tags of entities, sources."""
    text = data.decode("latin-1")
    for call in (
            lambda: gos3rve.parse_range(text, 100),
            lambda: gos3rve.parse_http_date(text),
            lambda: gos3rve.parse_iso_date(text),
            lambda: gos3rve.parse_amz_date(text),
            lambda: gos3rve.parse_copy_source(text),
            lambda: gos3rve.parse_query(text),
            lambda: gos3rve.parse_tagging_header(text),
            lambda: gos3rve.split_target(text),
            lambda: gos3rve.parse_post_policy(text),
            lambda: gos3rve.check_read_conditions({
                "if-match": text, "if-none-match": text, "if-modified-since":
                text, "if-unmodified-since": text}, "a", 1)):
        with contextlib.suppress(gos3rve.S3Error, ValueError):
            call()


@target(b'["00000000000000000000000000000000",7,1,"a/b",{"m":{"a":"b"}}]',
        b'{"etag":"x-2","size":7,"mtime_ns":1,"parts":[[3,1],[4,1]],"meta":'
        b'{"a":"b"},"lock":{"mode":"GOVERNANCE","until":1},"acl":["x"]}',
        b'{"marker":true,"key":"key"}', b'{"tags":{"a":"b"},"sse":{"algorit'
        b'hm":"SSE-C","key":"AAAA","sizes":[[1,1]],"prefixes":"AAAA"}}')
def record(world, data):
    """A record on the disk, and one of a version."""
    os.setxattr(os.path.join(world.root, "key"), gos3rve.XATTR, data)
    for place in ("/box/key", "/box?list-type=2", "/box/key?attributes",
                  "/box/key?tagging", "/box/key?acl", "/box?versions",
                  "/box/key?retention"):
        world.signed("GET", place, {"x-amz-object-attributes": "ETag,"
                                    "ObjectParts,Checksum"}, b"")
    world.signed("PUT", "/box/copy", {"x-amz-copy-source": "/box/key"}, b"")
    world.reset()


@target(b"<root><Port>1</Port><Bucket>a=b</Bucket><User><AccessKeyId>a"
        b"</AccessKeyId><SecretAccessKey>b</SecretAccessKey></User></root>")
def config_xml(world, data):
    """The configuration of the operator."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(gos3rve.ConfigError):
            values, users = gos3rve.load_config(file.name)
            gos3rve.make_config(values, users)


def run_one(world, name, data):
    """Run a target on some bytes; a finding is an exception."""
    began = time.process_time()         # whatever else the machine does
    try:
        TARGETS[name][0](world, data)
        taken = time.process_time() - began
        assert taken < LIMIT_SECONDS * (1 + len(data) / (1 << 20)), \
            "it took %.1f s" % taken
    except BaseException:
        print("%s: a finding for %r" % (name, data), flush=True)
        raise


def with_hypothesis(names, options):
    """Mix pieces of the seeds of a target, for some seconds."""
    name, = names
    import hypothesis
    from hypothesis import strategies
    seeds = TARGETS[name][1]
    pieces = sorted({piece for seed in seeds
                     for piece in re.findall(rb"\w+|\W", seed)})
    mixed = strategies.lists(strategies.one_of(
        strategies.sampled_from(pieces), strategies.sampled_from(seeds),
        strategies.binary(max_size=6)), max_size=40).map(b"".join)
    world, ended, runs = World(), time.monotonic() + options.seconds, [0]

    @hypothesis.settings(
        max_examples=200, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(mixed)
    def run(data):
        runs[0] += 1
        if time.monotonic() < ended:
            run_one(world, name, data)
    with world.running:
        for seed in itertools.count():
            if time.monotonic() >= ended:
                break
            hypothesis.seed(seed)(run)()
    print("%s: %d inputs, no finding" % (name, runs[0]), flush=True)


def with_atheris(names, options):
    """Let the coverage guide, for some seconds; never comes back."""
    name, = names
    world = World()
    with contextlib.ExitStack() as stack:
        if options.corpus:
            corpus = os.path.join(options.corpus, name)
            os.makedirs(corpus, exist_ok=True)
        else:
            corpus = stack.enter_context(tempfile.TemporaryDirectory())
        for number, seed in enumerate(TARGETS[name][1]):
            with open(os.path.join(corpus, "seed%d" % number), "wb") as file:
                file.write(seed)
        atheris.Setup([name, corpus, "-max_total_time=%d" % options.seconds,
                       "-max_len=4096", "-timeout=60", "-rss_limit_mb=4000",
                       "-artifact_prefix=%s/" % tempfile.gettempdir()],
                      lambda data: run_one(world, name, data))
        atheris.Fuzz()


def with_coverage(names, options):
    """Run the corpus once, and print how much of the rooms it reaches."""
    for name in names:
        world = World()
        folder = os.path.join(options.corpus or os.devnull, name)
        with world.running:
            measured.switch_context("seeds")
            for seed in TARGETS[name][1]:
                run_one(world, name, seed)
            measured.switch_context("kept")
            for file in os.listdir(folder) if os.path.isdir(folder) else ():
                with open(os.path.join(folder, file), "rb") as opened:
                    run_one(world, name, opened.read())
    measured.switch_context("tests")
    unittest.TextTestRunner(stream=io.StringIO()).run(room_tests())
    measured.stop()
    columns = [branches(contexts) for contexts in (
        ["", "seeds"], ["", "seeds", "kept"], ["", "tests"],
        ["", "seeds", "kept", "tests"])]
    print("%-40s %8s %8s %8s %8s %8s" % (
        "share of branches, in percent", "branches", "seeds", "+ kept",
        "tests", "all"))
    for number, title, first, lines in rooms(gos3rve):
        if number not in PARSERS:
            continue
        lines, shares = range(first, first + len(lines)), []
        for reached, missed in columns:
            reached, missed = (
                [arc for arc in arcs if abs(arc[0]) in lines]
                for arcs in (reached, missed))
            shares.append(100 * len(reached) / len(reached + missed))
        print("%d. %-37s %8d %8.1f %8.1f %8.1f %8.1f" % (
            (number, title, len(reached + missed)) + tuple(shares)))
        print("   not reached: %s" % (", ".join(
            "%d->%d" % tuple(arc) for arc in missed) or "none"))


def rooms(module):
    """(number, title, first line, lines) of each room of a module."""
    lines = inspect.getsource(module).split("\n")
    starts = [(index, re.match(r"# (\d+)\. (.*)", line))
              for index, line in enumerate(lines)
              if lines[index - 1] == "#" * 79]
    starts = [(at, match) for at, match in starts if match]
    ends = [at for at, _ in starts[1:]] + [len(lines)]
    return [(int(match[1]), match[2], at + 1, lines[at:end])
            for (at, match), end in zip(starts, ends)]


def room_tests():
    """The tests of the rooms of the parsers."""
    cases = [getattr(test_gos3rve, match[1])
             for number, _, _, lines in rooms(test_gos3rve)
             if number in PARSERS for line in lines
             for match in [re.match(r"class (\w+)", line)] if match]
    return unittest.TestSuite(map(
        unittest.defaultTestLoader.loadTestsFromTestCase,
        (case for case in cases if issubclass(case, unittest.TestCase))))


def branches(contexts):
    """The branches that were reached in some contexts, and the others."""
    with tempfile.NamedTemporaryFile("r") as file:
        measured.json_report(outfile=file.name, contexts=[
            "^%s$" % context for context in contexts])
        found, = json.load(file)["files"].values()
    return found["executed_branches"], found["missing_branches"]


ENGINES = {"hypothesis": with_hypothesis, "atheris": with_atheris,
           "coverage": with_coverage}


def main():
    """Run the targets one after the other; 1 when there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=60,
                        help="for each target")
    parser.add_argument("--with", dest="engine", default="hypothesis",
                        choices=sorted(ENGINES))
    parser.add_argument("--corpus", metavar="DIR",
                        help="where atheris keeps what it found worth it, "
                        "and goes on from")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    engine = os.environ.get("FUZZ_WITH")
    if engine:                          # the process that does it
        ENGINES[engine](names, options)
        return 0
    found = []
    for some in [names] if options.engine == "coverage" else [
            [name] for name in names]:
        if subprocess.run(
                [sys.executable, __file__] + some + ["--seconds",
                 str(options.seconds)] + (
                     ["--corpus", options.corpus] if options.corpus else []),
                env=dict(os.environ, FUZZ_WITH=options.engine)).returncode:
            found += some
    print("findings: %s" % (", ".join(found) or "none"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
