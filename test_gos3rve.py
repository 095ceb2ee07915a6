#!/usr/bin/env python3
"""Tests of gos3rve.  `python3 test_gos3rve.py` runs them all.

Standard library only; real clients are run where they are installed, and
with GOS3RVE_REQUIRE_CLIENTS=1 a missing one is a failure.  The rooms are
those of gos3rve.py, under the same banners:

    0. Tools
    1. Constants and errors
    2. Names, dates, ranges and headers
    3. XML
    4. Signatures
    5. Bodies and checksums
    6. Storage
    7. Access
    8. Operations
    9. HTTP
    10. Server
    11. Configuration and command line
    12. Real clients
    13. House
    14. Benchmark

`python3 test_gos3rve.py bench` measures instead.
"""

import argparse
import array
import ast
import base64
import calendar
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import hmac
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ElementTree
import zlib
from typing import Callable, NamedTuple, Optional, Tuple
from unittest import mock

import gos3rve
from gos3rve import KIB, MIB, Account, S3Error, Store

HERE = os.path.dirname(os.path.abspath(__file__))
SERVER = os.path.join(HERE, "gos3rve.py")
ALICE = Account("ALICEKEY", "alice-secret", "alice-id", "alice",
                "alice@example.com")
BOB = Account("BOBKEY", "bob-secret", "bob-id", "bob", "bob@example.com")


###############################################################################
# 0. Tools
###############################################################################
#
# A server on a free port over a temporary directory, and a client with a
# SigV4 signer of its own: nothing of it is taken from gos3rve.py, so that
# the two check each other.

class Answer:
    """status, headers (lower-case names), body; xml() is its tree."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def xml(self):
        """The document's root, namespaces dropped."""
        root = ElementTree.fromstring(self.body)
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
        return root

    def all(self, path):
        """The texts of all elements on an ElementTree path."""
        return [element.text or "" for element in self.xml().iterfind(path)]

    def one(self, path):
        """The text of the first element on a path, or None."""
        return self.xml().findtext(path)

    @property
    def code(self):
        """The <Code> of an error document; "" when there is none."""
        return (self.one("Code") or "") if self.body else ""

    @property
    def etag(self):
        """The ETag header without its quotes."""
        return self.headers["etag"].strip('"')


def quote(text, safe="-_.~"):
    """SigV4's percent-encoding."""
    return urllib.parse.quote(text, safe=safe)


def v4_key(secret, date, region="us-east-1", service="s3"):
    """SigV4's signing key."""
    key = ("AWS4" + secret).encode()
    for part in (date, region, service, "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key


def v4_canonical(method, path, query, headers, signed, payload):
    """SigV4's canonical request; path is raw, query a list of pairs."""
    pairs = sorted((quote(n), quote(v)) for n, v in query)
    return "\n".join([
        method, path, "&".join("%s=%s" % pair for pair in pairs),
        "".join("%s:%s\n" % (n, re.sub(" +", " ", headers[n].strip(" ")))
                for n in signed), ";".join(signed), payload])


def v4_signature(secret, scope, amz_date, canonical):
    """The signature of a canonical request; scope without the key id."""
    date, region, service, _ = scope.split("/")
    text = "\n".join(["AWS4-HMAC-SHA256", amz_date, scope, hashlib.sha256(
        canonical.encode("latin-1")).hexdigest()])
    return hmac.new(v4_key(secret, date, region, service), text.encode(),
                    hashlib.sha256).hexdigest()


def amz_date(when=None):
    """A time (seconds, default now) as x-amz-date has it."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(when))


class Client:
    """A signing S3 client over one keep-alive connection.

    request(method, "/bucket/key", query=[("a", "b")], body=b"") gives an
    Answer.  `path` is text and encoded here; raw_path is sent as it is.
    token: the session's, of temporary credentials.
    """

    def __init__(self, url, key_id, secret, region="us-east-1",
                 context=None, token=None, service="s3"):
        self.url, self.key_id, self.secret = url, key_id, secret
        self.region, self._context = region, context
        self.token, self.service = token, service
        self.netloc = urllib.parse.urlsplit(url).netloc
        self._connection = None

    def connect(self):
        """A new http.client connection."""
        if self.url.startswith("https"):
            return http.client.HTTPSConnection(self.netloc, timeout=60,
                                               context=self._context)
        return http.client.HTTPConnection(self.netloc, timeout=60)

    def close(self):
        """Close the connection."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def sign(self, method, raw_path, query, headers, payload, when=None):
        """The headers to add: x-amz-date, x-amz-content-sha256 and
        Authorization, over every header given and Host."""
        headers = {n.lower(): str(v) for n, v in headers.items()}
        headers.setdefault("host", self.netloc)
        headers["x-amz-date"] = amz_date(when)
        if self.service == "s3":        # the others send none
            headers["x-amz-content-sha256"] = payload
        if self.token:
            headers["x-amz-security-token"] = self.token
        scope = "%s/%s/%s/aws4_request" % (headers["x-amz-date"][:8],
                                           self.region, self.service)
        signed = sorted(headers)
        signature = v4_signature(
            self.secret, scope, headers["x-amz-date"],
            v4_canonical(method, raw_path, query, headers, signed, payload))
        headers["authorization"] = (
            "AWS4-HMAC-SHA256 Credential=%s/%s,SignedHeaders=%s,"
            "Signature=%s" % (self.key_id, scope, ";".join(signed),
                              signature))
        return headers

    def presign(self, method, path, query=(), headers=None, expires=60,
                when=None):
        """A presigned SigV4 URL."""
        raw_path, date = quote(path, "/-_.~"), amz_date(when)
        headers = dict(headers or {}, host=self.netloc)
        headers = {n.lower(): v for n, v in headers.items()}
        scope = "%s/%s/%s/aws4_request" % (date[:8], self.region,
                                           self.service)
        query = list(query)
        if self.token:
            query.append(("X-Amz-Security-Token", self.token))
        query += [
            ("X-Amz-Algorithm", "AWS4-HMAC-SHA256"),
            ("X-Amz-Credential", "%s/%s" % (self.key_id, scope)),
            ("X-Amz-Date", date), ("X-Amz-Expires", str(expires)),
            ("X-Amz-SignedHeaders", ";".join(sorted(headers)))]
        signature = v4_signature(self.secret, scope, date, v4_canonical(
            method, raw_path, query, headers, sorted(headers),
            "UNSIGNED-PAYLOAD" if self.service == "s3"
            else hashlib.sha256(b"").hexdigest()))
        query.append(("X-Amz-Signature", signature))
        return "%s%s?%s" % (self.url, raw_path, "&".join(
            "%s=%s" % (quote(n), quote(v)) for n, v in query))

    def request(self, method, path, query=(), body=b"", headers=None,
                payload=None, raw_path=None, signed=True, when=None):
        """Send a request; an Answer.  payload None: the body's SHA-256."""
        raw_path = quote(path, "/-_.~") if raw_path is None else raw_path
        query = list(query.items()) if isinstance(query, dict) \
            else list(query)
        if payload is None:
            payload = hashlib.sha256(body).hexdigest() \
                if isinstance(body, bytes) else "UNSIGNED-PAYLOAD"
        send = dict(headers or {})
        if signed:
            send = self.sign(method, raw_path, query, send, payload, when)
        send.pop("host", None) if "host" not in {
            n.lower() for n in headers or {}} else None
        target = raw_path
        if query:
            target += "?" + "&".join(
                "%s=%s" % (quote(n), quote(v)) for n, v in query)
        if isinstance(body, bytes) and (body or method in ("PUT", "POST")):
            send.setdefault("content-length", str(len(body)))
        return self.send(method, target, body, send)

    def send(self, method, target, body=b"", headers=None):
        """Send as it is, reconnecting where the server had closed."""
        for attempt in (0, 1):
            if self._connection is None:
                self._connection = self.connect()
                attempt = 1
            connection = self._connection
            try:
                connection.putrequest(method, target, skip_host="host" in {
                    n.lower() for n in headers or {}},
                    skip_accept_encoding=True)
                for name, value in (headers or {}).items():
                    connection.putheader(name, value)
                connection.endheaders(body or None)
                response = connection.getresponse()
                data = response.read()
            except (http.client.BadStatusLine, ConnectionError,
                    BrokenPipeError):
                self.close()
                if attempt:
                    raise
                continue
            answer = Answer(response.status, {
                n.lower(): v for n, v in response.getheaders()}, data)
            if response.will_close:
                self.close()
            return answer

    def get(self, path, query=(), **more):
        """GET; an Answer."""
        return self.request("GET", path, query, **more)

    def head(self, path, query=(), **more):
        """HEAD; an Answer."""
        return self.request("HEAD", path, query, **more)

    def put(self, path, body=b"", query=(), **more):
        """PUT; an Answer."""
        return self.request("PUT", path, query, body, **more)

    def post(self, path, query=(), body=b"", **more):
        """POST; an Answer."""
        return self.request("POST", path, query, body, **more)

    def delete(self, path, query=(), **more):
        """DELETE; an Answer."""
        return self.request("DELETE", path, query, **more)

    def keys(self, bucket, **query):
        """All keys of a bucket, over as many pages as it takes.  Names
        of parameters have `_` for `-`."""
        query = [(n.replace("_", "-"), v) for n, v in query.items()]
        found, token = [], None
        while True:
            more = [("continuation-token", token)] if token else []
            answer = self.get("/" + bucket, [
                ("list-type", "2"), ("encoding-type", "url")]
                + query + more)
            assert answer.status == 200, answer.body
            found += map(urllib.parse.unquote, answer.all("Contents/Key"))
            token = answer.one("NextContinuationToken")
            if not token:
                return found


def raw(port, data, timeout=10, shut=True):
    """Send bytes to 127.0.0.1:port and give all that comes back.  shut:
    say that no more will come, so that the server ends the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout) as sock:
        parts = []
        with contextlib.suppress(OSError):
            sock.sendall(data)
            if shut:
                sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while True:
                part = sock.recv(65536)
                if not part:
                    break
                parts.append(part)
        return b"".join(parts)


def digest64(name, data):
    """A base64 digest, as Content-MD5 and x-amz-checksum- carry it."""
    return base64.b64encode(hashlib.new(name, data).digest()).decode()


def crc64(data):
    """The base64 CRC-32 of x-amz-checksum-crc32."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def temporary_directory(test):
    """A new directory that goes at the end of a test case."""
    path = tempfile.mkdtemp(prefix="test-gos3rve-")
    test.addCleanup(shutil.rmtree, path, ignore_errors=True)
    return path


class ServerCase(unittest.TestCase):
    """A server with the bucket `box`, and a client of its first account.

    self.s3 is the Client, self.server the Running, self.path(...) a path
    below the bucket's directory.  `options` go to serve().
    """

    options = {}

    @classmethod
    def setUpClass(cls):
        cls.server = gos3rve.serve(buckets=["box"], **cls.options)
        cls.s3 = Client(cls.server.url, cls.server.key_id,
                        cls.server.key_val)

    @classmethod
    def tearDownClass(cls):
        cls.s3.close()
        cls.server.close(5)

    def setUp(self):
        """Every test starts with an empty bucket `box`.

        Housekeeping may take an empty directory of uploads away while this
        does: what is gone is no error, what stays is.
        """
        for path in (self.path(), self.server.dir_uploads):
            for name in os.listdir(path):
                target = os.path.join(path, name)
                if name == gos3rve.STATE:
                    target = os.path.join(target, "odd")
                if os.path.isdir(target) and not os.path.islink(target):
                    shutil.rmtree(target, ignore_errors=True)
                elif os.path.lexists(target):
                    os.unlink(target)
                self.assertFalse(os.path.lexists(target), target)

    def path(self, *parts):
        """A path in the directory of bucket `box`."""
        return os.path.join(self.server.dir_buckets, "box", *parts)

    def ok(self, answer, status=200):
        """Assert a status; the answer itself."""
        self.assertEqual(answer.status, status, answer.body[:2000])
        return answer

    def error(self, answer, code, status=None):
        """Assert an S3 error; the answer itself."""
        self.assertEqual((answer.code, answer.status), (
            code, status or gos3rve.ERRORS[code][0]), answer.body[:2000])
        return answer


def together(count, function):
    """Call function(number) in `count` threads that start at once; the
    results."""
    barrier = threading.Barrier(count)

    def one(number):
        barrier.wait()
        return function(number)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


class Drip(io.BytesIO):
    """A source that gives at most `step` bytes at a time."""

    def __init__(self, data, step=1):
        super().__init__(data)
        self._step = step

    def read(self, size=-1):
        """1 to `step` bytes."""
        return super().read(min(size, self._step))

###############################################################################
# 1. Constants and errors
###############################################################################

class Refusing(unittest.TestCase):
    """refused(code, call, ...): the S3Error that a call raises."""

    def refused(self, code, call, *values, **more):
        """Assert that the call raises S3Error `code`; the error."""
        with self.assertRaises(S3Error) as caught:
            call(*values, **more)
        self.assertEqual(caught.exception.code, code, caught.exception)
        return caught.exception


class Errors(Refusing):

    def test_status_of_a_code_is_that_of_the_aws_table(self):
        # API/ErrorResponses.html
        for code, status in (
                ("AccessDenied", 403), ("BadDigest", 400),
                ("AuthorizationHeaderMalformed", 400),
                ("BucketAlreadyExists", 409),
                ("BucketAlreadyOwnedByYou", 409), ("BucketNotEmpty", 409),
                ("EntityTooLarge", 400), ("EntityTooSmall", 400),
                ("IncompleteBody", 400), ("InternalError", 500),
                ("InvalidAccessKeyId", 403), ("InvalidArgument", 400),
                ("InvalidBucketName", 400), ("InvalidDigest", 400),
                ("InvalidPart", 400), ("InvalidPartOrder", 400),
                ("InvalidRange", 416), ("InvalidRequest", 400),
                ("InvalidToken", 400), ("KeyTooLongError", 400),
                ("MalformedXML", 400), ("MaxMessageLengthExceeded", 400),
                ("MetadataTooLarge", 400), ("MethodNotAllowed", 405),
                ("MissingContentLength", 411), ("NoSuchBucket", 404),
                ("NoSuchBucketPolicy", 404), ("NoSuchKey", 404),
                ("NoSuchUpload", 404), ("NoSuchVersion", 404),
                ("NotImplemented", 501), ("PreconditionFailed", 412),
                ("RequestTimeTooSkewed", 403), ("RequestTimeout", 400),
                ("SignatureDoesNotMatch", 403), ("SlowDown", 503),
                ("XAmzContentSHA256Mismatch", 400)):
            with self.subTest(code=code):
                self.assertEqual(S3Error(code).status, status)

    def test_every_row_is_a_code_an_http_status_and_a_message(self):
        for code, (status, message) in gos3rve.ERRORS.items():
            with self.subTest(code=code):
                self.assertRegex(code, r"\A(KMS\.)?[A-Z][A-Za-z0-9]+\Z")
                self.assertTrue(status == 304 or 400 <= status < 600)
                self.assertTrue(message.strip())

    def test_error_carries_message_fields_and_headers(self):
        error = S3Error("NoSuchKey", "gone", {"X": "y"}, Key="a/b")
        self.assertEqual(
            (error.message, error.headers, error.fields),
            ("gone", {"X": "y"}, {"Key": "a/b"}))
        self.assertEqual(S3Error("NoSuchKey").message,
                         "The specified key does not exist.")
        self.assertIn("NoSuchKey", str(error))

    def test_unknown_code_cannot_be_raised(self):
        self.assertRaises(KeyError, S3Error, "NoSuchThing")

    def test_limits_are_those_of_aws(self):
        self.assertEqual(
            (gos3rve.MAX_KEY_BYTES, gos3rve.MAX_PART_NUMBER,
             gos3rve.MIN_PART_BYTES, gos3rve.MAX_PUT_BYTES,
             gos3rve.MAX_DELETE_KEYS, gos3rve.MAX_LIST_KEYS,
             gos3rve.MAX_EXPIRES_SECONDS, gos3rve.MAX_SKEW_SECONDS,
             gos3rve.MAX_USER_METADATA_BYTES),
            (1024, 10000, 5 << 20, 5 << 30, 1000, 1000, 604800, 900, 2048))


###############################################################################
# 2. Names, dates, ranges and headers
###############################################################################

class BucketNames(unittest.TestCase):

    def test_names_that_aws_allows(self):
        for name in ("abc", "a-b", "a.b.c", "1bucket", "0.0", "a" * 63,
                     "192.168.5", "my--bucket", "docexamplewebsite.com",
                     "s3alias", "xn-a", "1.2.3.4.5"):
            with self.subTest(name=name):
                self.assertTrue(gos3rve.valid_bucket_name(name))

    def test_names_that_aws_forbids(self):
        # userguide/bucketnamingrules.html
        for name in ("", "ab", "a" * 64, "Bucket", "a_b", "-ab", "ab-",
                     ".ab", "ab.", "a..b", "192.168.5.4", "xn--abc",
                     "sthree-abc", "amzn-s3-demo-abc", "abc-s3alias",
                     "abc--ol-s3", "abc.mrap", "abc--x-s3",
                     "abc--table-s3", "a b", "a/b", "a\n", "abc\n",
                     "caf\xe9", "\u0661\u0662\u0663", "a%b"):
            with self.subTest(name=name):
                self.assertFalse(gos3rve.valid_bucket_name(name))

    def test_directory_names_that_could_lead_elsewhere_are_no_buckets(self):
        for name in ("", ".", "..", ".gos3rve", "../x", "a/b", "a\\b",
                     "a\0b", "a\n", "-a", "a" * 256, "\u212a"):
            with self.subTest(name=name):
                self.assertFalse(gos3rve.usable_bucket_name(name))

    def test_directory_made_by_hand_may_have_capitals_and_underscores(self):
        for name in ("My_Files", "a", "ab", "A" * 255, "v1.2_x-y"):
            with self.subTest(name=name):
                self.assertTrue(gos3rve.usable_bucket_name(name))

    def test_region_is_a_word(self):
        for name in ("us-east-1", "EU", "mars", "a" * 63):
            self.assertTrue(gos3rve.valid_region(name), name)
        for name in ("", "-a", "a b", "a/b", "<x>", "a\n", "a" * 64):
            self.assertFalse(gos3rve.valid_region(name), name)


class Targets(Refusing):

    def test_percent_encoding_is_that_of_sigv4(self):
        every = bytes(range(128)).decode()
        plain = ("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                 "0123456789-._~")
        expected = "".join(c if c in plain else "%%%02X" % ord(c)
                           for c in every)
        self.assertEqual(gos3rve.uri_encode(every), expected)
        self.assertEqual(gos3rve.uri_encode("\u20ac \U0001f600"),
                         "%E2%82%AC%20%F0%9F%98%80")

    def test_decoding_gives_back_what_was_encoded(self):
        for text in ("", "a b", "%", "%41", "+", "a/b", "\u20ac",
                     "\U0001f600", "e\u0301", "\xe9", "\x00\x01\n", "~"):
            with self.subTest(text=text):
                self.assertEqual(gos3rve.uri_decode(
                    gos3rve.uri_encode(text)), text)

    def test_raw_utf8_on_the_wire_is_decoded(self):
        self.assertEqual(gos3rve.uri_decode(
            "caf\xc3\xa9/%e2%82%ac"), "caf\xe9/\u20ac")

    def test_bytes_that_are_no_utf8_answer_InvalidURI(self):
        for raw_text in ("%ff", "a%C3", "\xe9", "%ED%A0%80", "%C0%AF",
                         "\u20ac"):
            with self.subTest(raw=raw_text):
                self.refused("InvalidURI", gos3rve.uri_decode, raw_text)

    def test_target_splits_into_raw_path_and_query(self):
        for target, expected in (
                ("/", ("/", "")), ("/b/k?a=b?c", ("/b/k", "a=b?c")),
                ("//b//k", ("//b//k", "")), ("/b/%2F+?", ("/b/%2F+", "")),
                ("http://h/b/k?x", ("/b/k", "x")),
                ("HTTPS://h:9/b", ("/b", "")), ("http://h", ("/", "")),
                ("http://h?list-type=2", ("/", "list-type=2")),
                ("http://h?prefix=a/b", ("/", "prefix=a/b"))):
            with self.subTest(target=target):
                self.assertEqual(gos3rve.split_target(target), expected)

    def test_target_that_is_no_path_answers_InvalidURI(self):
        for target in ("*", "", "b/k", "ftp://h/b", "h:80", "?a"):
            with self.subTest(target=target):
                self.refused("InvalidURI", gos3rve.split_target, target)

    def test_query_is_decoded_in_its_order(self):
        for query, expected in (
                ("", []), ("uploads", [("uploads", "")]),
                ("b=2&a=1&b=", [("b", "2"), ("a", "1"), ("b", "")]),
                ("&&a=b&", [("a", "b")]),
                ("p=a+b%2Bc%20d", [("p", "a b+c d")]),
                ("k=a=b==", [("k", "a=b==")]),
                ("a%3Db=%26", [("a=b", "&")]),
                ("p=%e2%82%ac", [("p", "\u20ac")])):
            with self.subTest(query=query):
                self.assertEqual(gos3rve.parse_query(query), expected)

    def test_path_names_bucket_and_key(self):
        for path, expected in (
                ("/", ("", "")), ("/b", ("b", "")), ("/b/", ("b", "")),
                ("/b/k", ("b", "k")), ("/b//k", ("b", "/k")),
                ("/b/a//b/", ("b", "a//b/")), ("/b/a%2Fb", ("b", "a/b")),
                ("/b/../c", ("b", "../c")), ("/b/a+b", ("b", "a+b")),
                ("/b/%E2%82%AC", ("b", "\u20ac")),
                ("/b/a%00", ("b", "a\0"))):
            with self.subTest(path=path):
                self.assertEqual(gos3rve.split_path(path), expected)

    def test_key_without_a_bucket_answers_InvalidBucketName(self):
        self.refused("InvalidBucketName", gos3rve.split_path, "//key")

    def test_key_has_1024_bytes_at_most(self):
        for key in ("k" * 1024, "\u20ac" * 341, "\U0001f600" * 256):
            self.assertEqual(gos3rve.checked_key(key), key)
        for key in ("k" * 1025, "\u20ac" * 342, "\U0001f600" * 257):
            error = self.refused("KeyTooLongError", gos3rve.checked_key,
                                 key)
            self.assertEqual(error.status, 400)

    def test_host_names_a_bucket_only_below_a_domain_or_localhost(self):
        for host, expected in (
                ("box.s3.test", "box"), ("box.s3.test:9000", "box"),
                ("BOX.S3.Test", "box"), ("a.b.s3.test", "a.b"),
                ("box.s3.test.", "box"), ("s3.test", ""),
                ("s3.test:80", ""), ("box-s3.test", ""), ("a.other.test", ""),
                ("box.localhost", "box"), ("a.b.localhost:9", "a.b"),
                ("localhost", ""), ("localhost:9000", ""),
                ("127.0.0.1", ""), ("127.0.0.1:9000", ""), ("[::1]", ""),
                ("[::1]:9000", ""), ("10.0.0.1.nip.io", ""), ("", ""),
                ("box.dc1", "box"), ("box.dc1:80", "box")):
            with self.subTest(host=host):
                self.assertEqual(gos3rve.host_bucket(
                    host, ("s3.test", "dc1")), expected)

    def test_copy_source_names_bucket_key_and_version(self):
        for value, expected in (
                ("b/k", ("b", "k", None)), ("/b/k", ("b", "k", None)),
                ("%2Fb%2Fk", ("b", "k", None)), ("b//k", ("b", "/k", None)),
                ("b/a%20b%2Bc", ("b", "a b+c", None)),
                ("b/a/b/", ("b", "a/b/", None)),
                ("b/%E2%82%AC", ("b", "\u20ac", None)),
                ("b/\xe2\x82\xac", ("b", "\u20ac", None)),
                ("b/k?versionId=null", ("b", "k", "null")),
                ("b/k%3FversionId=x", ("b", "k?versionId=x", None)),
                ("b/../c/k", ("b", "../c/k", None))):
            with self.subTest(value=value):
                self.assertEqual(gos3rve.parse_copy_source(value), expected)

    def test_copy_source_without_a_key_answers_InvalidArgument(self):
        for value in ("", "/", "b", "/b", "b/", "/b/", "//k",
                      "?versionId=x"):
            with self.subTest(value=value):
                self.refused("InvalidArgument", gos3rve.parse_copy_source,
                             value)


class Dates(unittest.TestCase):
    NOV_6 = 784111777                   # RFC 9110 section 5.6.7's example

    def test_dates_that_go_out(self):
        self.assertEqual(gos3rve.http_date(self.NOV_6),
                         "Sun, 06 Nov 1994 08:49:37 GMT")
        for time_ns, expected in (
                (self.NOV_6 * 10**9, "1994-11-06T08:49:37.000Z"),
                (self.NOV_6 * 10**9 + 999999999, "1994-11-06T08:49:37.999Z"),
                (0, "1970-01-01T00:00:00.000Z"),
                (1709210096007000001, "2024-02-29T12:34:56.007Z")):
            with self.subTest(time_ns=time_ns):
                self.assertEqual(gos3rve.iso_date(time_ns), expected)

    def test_http_dates_in_the_three_forms_and_iso_8601(self):
        for text in ("Sun, 06 Nov 1994 08:49:37 GMT",
                     "Sunday, 06-Nov-94 08:49:37 GMT",
                     "Sun Nov  6 08:49:37 1994",
                     "Sun, 06 Nov 1994 09:49:37 +0100",
                     "19941106T084937Z", "1994-11-06T08:49:37Z",
                     "1994-11-06T08:49:37.123Z"):
            with self.subTest(text=text):
                self.assertEqual(gos3rve.parse_http_date(text), self.NOV_6)

    def test_text_that_is_no_date_gives_none(self):
        for text in ("", " ", "\xa0", "yesterday", "0", "-1", ",", ":",
                     "1 Nov , 00:00:00 GMT", "1 Nov 94 , GMT",
                     "Sun, 06 Nov 99999 08:49:37 GMT",
                     "1994-13-06T08:49:37Z", "1994-11-06T24:49:37Z",
                     "Sun, 06 Nov 1994 24:49:37 GMT",
                     "Sun, 32 Nov 1994 08:49:37 GMT",
                     "1994-11-06 08:49:37", "\u0661994-11-06T08:49:37Z"):
            with self.subTest(text=text):
                self.assertIsNone(gos3rve.parse_http_date(text))

    def test_amz_date_is_basic_iso_8601_only(self):
        self.assertEqual(gos3rve.parse_amz_date("19941106T084937Z"),
                         self.NOV_6)
        for text in ("", "19941106T084937", "19941106 084937Z",
                     "19941106T084937z", "19941306T084937Z",
                     "19941100T084937Z", "19941106T244937Z",
                     "19941106T086037Z", "1994-11-06T08:49:37Z",
                     "-9941106T084937Z", "1994110\u0666T084937Z",
                     "19941106T0849 7Z", "19941106T084937Z "):
            with self.subTest(text=text):
                self.assertIsNone(gos3rve.parse_amz_date(text))


class Ranges(Refusing):

    def test_one_range_gives_start_and_stop(self):
        for value, size, expected in (
                ("bytes=0-0", 10, (0, 1)), ("bytes=0-9", 10, (0, 10)),
                ("bytes=4-7", 10, (4, 8)), ("bytes=4-", 10, (4, 10)),
                ("bytes=9-", 10, (9, 10)), ("bytes=5-100", 10, (5, 10)),
                ("bytes=-3", 10, (7, 10)), ("bytes=-100", 10, (0, 10)),
                ("bytes=-1", 1, (0, 1)), ("BYTES=1-2", 10, (1, 3)),
                ("bytes=0-99999999999999999999", 5, (0, 5)),
                ("bytes=00-01", 10, (0, 2))):
            with self.subTest(value=value, size=size):
                self.assertEqual(gos3rve.parse_range(value, size), expected)

    def test_malformed_or_several_ranges_are_ignored(self):
        for value in ("", "bytes", "bytes=", "bytes=-", "bytes=a-b",
                      "bytes=5-2", "bytes=0-1,3-4", "lines=0-1", "0-1",
                      "bytes=--1", "bytes=1--2", "bytes=+1-2",
                      "bytes=1.0-2", "bytes=\u0661-2", "bytes=0x1-2"):
            with self.subTest(value=value):
                self.assertIsNone(gos3rve.parse_range(value, 10))

    def test_range_behind_the_end_answers_InvalidRange(self):
        for value, size in (("bytes=10-", 10), ("bytes=10-20", 10),
                            ("bytes=-0", 10), ("bytes=0-", 0),
                            ("bytes=0-0", 0), ("bytes=99999-", 10)):
            with self.subTest(value=value, size=size):
                error = self.refused("InvalidRange", gos3rve.parse_range,
                                     value, size)
                self.assertEqual(error.status, 416)
                self.assertEqual(error.headers["Content-Range"],
                                 "bytes */%d" % size)


class Preconditions(Refusing):
    MTIME = 784111777
    BEFORE, SAME, AFTER = (
        "Sun, 06 Nov 1994 08:49:3%d GMT" % n for n in (6, 7, 8))

    def test_etag_lists_match_quoted_bare_and_star(self):
        for header, expected in (
                ('"abc"', True), ("abc", True), ("*", True),
                ('"x", "abc"', True), ('W/"abc"', True), ('"ab"', False),
                ('"x","y"', False), ("", False), ('"ABC"', False)):
            with self.subTest(header=header):
                self.assertIs(gos3rve.etag_matches(header, "abc"), expected)

    # RFC 9110 section 13.2.2: (what is sent, code or None)
    READS = (
        ({}, None),
        ({"if-match": '"abc"'}, None),
        ({"if-match": '"x"'}, "PreconditionFailed"),
        ({"if-unmodified-since": SAME}, None),
        ({"if-unmodified-since": AFTER}, None),
        ({"if-unmodified-since": BEFORE}, "PreconditionFailed"),
        ({"if-match": '"abc"', "if-unmodified-since": BEFORE}, None),
        ({"if-match": '"x"', "if-unmodified-since": AFTER},
         "PreconditionFailed"),
        ({"if-none-match": '"x"'}, None),
        ({"if-none-match": '"abc"'}, "NotModified"),
        ({"if-none-match": "*"}, "NotModified"),
        ({"if-modified-since": BEFORE}, None),
        ({"if-modified-since": SAME}, "NotModified"),
        ({"if-modified-since": AFTER}, "NotModified"),
        ({"if-none-match": '"x"', "if-modified-since": AFTER}, None),
        ({"if-none-match": '"abc"', "if-modified-since": BEFORE},
         "NotModified"),
        ({"if-match": '"x"', "if-none-match": '"abc"'},
         "PreconditionFailed"),
        ({"if-match": '"abc"', "if-none-match": '"abc"'}, "NotModified"),
        ({"if-modified-since": "garbage"}, None),
        ({"if-unmodified-since": "garbage"}, None))

    def test_reads_follow_rfc_9110_precedence(self):
        for headers, code in self.READS:
            with self.subTest(headers=headers):
                if code is None:
                    self.assertIsNone(gos3rve.check_read_conditions(
                        headers, "abc", self.MTIME))
                else:
                    self.refused(code, gos3rve.check_read_conditions,
                                 headers, "abc", self.MTIME)

    def test_copies_answer_412_to_every_condition(self):
        prefix = "x-amz-copy-source-"
        for headers, code in self.READS:
            named = {prefix + n: v for n, v in headers.items()}
            with self.subTest(headers=named):
                if code is None:
                    self.assertIsNone(gos3rve.check_read_conditions(
                        named, "abc", self.MTIME, prefix))
                else:
                    self.refused("PreconditionFailed",
                                 gos3rve.check_read_conditions,
                                 named, "abc", self.MTIME, prefix)

    def test_writes_are_conditional_on_the_current_object(self):
        info = types.SimpleNamespace(etag="abc", size=3, mtime=self.MTIME)
        for headers, current, code in (
                ({}, info, None), ({}, None, None),
                ({"if-none-match": "*"}, None, None),
                ({"if-none-match": "*"}, info, "PreconditionFailed"),
                ({"if-match": '"abc"'}, info, None),
                ({"if-match": "abc"}, info, None),
                ({"if-match": '"x"'}, info, "PreconditionFailed"),
                ({"if-match": '"abc"'}, None, "NoSuchKey")):
            with self.subTest(headers=headers, exists=bool(current)):
                conditions = gos3rve.write_conditions(headers)
                if code is None:
                    self.assertIsNone(conditions.check(current))
                else:
                    self.refused(code, conditions.check, current)

    def test_if_none_match_of_a_write_takes_only_a_star(self):
        for headers in ({"if-none-match": '"abc"'},
                        {"if-none-match": "*", "if-match": '"abc"'}):
            with self.subTest(headers=headers):
                self.refused("NotImplemented", gos3rve.write_conditions,
                             headers)

    def test_deletes_are_conditional_on_etag_size_and_time(self):
        info = types.SimpleNamespace(etag="abc", size=3, mtime=self.MTIME)
        for etag, size, mtime, code in (
                (None, None, None, None), ('"abc"', "3", self.SAME, None),
                ('"x"', None, None, "PreconditionFailed"),
                (None, "4", None, "PreconditionFailed"),
                (None, None, self.AFTER, "PreconditionFailed"),
                ("*", None, None, None)):
            with self.subTest(etag=etag, size=size, mtime=mtime):
                conditions = gos3rve.delete_conditions(etag, size, mtime)
                if code is None:
                    self.assertIsNone(conditions.check(info))
                else:
                    self.refused(code, conditions.check, info)
        for size, mtime in (("x", None), ("-1", None), (None, "never")):
            self.refused("InvalidArgument", gos3rve.delete_conditions,
                         None, size, mtime)


class Headers(Refusing):

    def test_integers_are_bounded(self):
        for text, expected in (("0", 0), ("7", 7), ("1000", 1000),
                               ("999999999999", 1000), ("007", 7)):
            self.assertEqual(gos3rve.parse_int("n", text, 0, 1000),
                             expected)
        for text in ("", "-1", "+1", "1.5", "a", " 1", "1 ", "1_0",
                     "\u0661", "9" * 30, "0x1", "1\n"):
            with self.subTest(text=text):
                error = self.refused("InvalidArgument", gos3rve.parse_int,
                                     "max-keys", text, 0, 1000)
                self.assertEqual(error.fields["ArgumentName"], "max-keys")

    def test_descriptive_headers_are_kept_by_their_names(self):
        self.assertEqual(gos3rve.kept_headers({
            "content-type": "text/html", "cache-control": "no-cache",
            "content-disposition": "inline", "content-language": "de",
            "content-encoding": "gzip", "expires": "never",
            "x-amz-website-redirect-location": "/x", "host": "h",
            "x-amz-meta-a": "b", "content-length": "3", "range": "x"}), {
            "Content-Type": "text/html", "Cache-Control": "no-cache",
            "Content-Disposition": "inline", "Content-Language": "de",
            "Content-Encoding": "gzip", "Expires": "never",
            "x-amz-website-redirect-location": "/x"})

    def test_aws_chunked_is_not_kept_as_an_encoding(self):
        for sent, kept in (("aws-chunked", None), ("gzip", "gzip"),
                           ("aws-chunked,gzip", "gzip"),
                           ("gzip, aws-chunked", "gzip"),
                           ("aws-chunked, ", None),
                           ("a,aws-chunked,b", "a,b")):
            with self.subTest(sent=sent):
                self.assertEqual(gos3rve.kept_headers(
                    {"content-encoding": sent}).get("Content-Encoding"),
                    kept)

    def test_user_metadata_is_decoded_and_bounded_to_2_KB(self):
        self.assertEqual(gos3rve.user_metadata({
            "x-amz-meta-a": "b", "x-amz-meta-": "n", "x-amz-metal": "no",
            "x-amz-meta-u": "\xe2\x82\xac", "x-amz-meta-l": "\xe9"}),
            {"a": "b", "": "n", "u": "\u20ac", "l": "\xe9"})
        fits = {"x-amz-meta-abc": "v" * 2045}
        self.assertEqual(gos3rve.user_metadata(fits), {"abc": "v" * 2045})
        fits["x-amz-meta-d"] = ""
        self.refused("MetadataTooLarge", gos3rve.user_metadata, fits)
        self.refused("MetadataTooLarge", gos3rve.user_metadata,
                     {"x-amz-meta-abc": "\xe2\x82\xac" * 682})

    def test_metadata_that_is_not_ascii_goes_out_as_rfc_2047(self):
        self.assertEqual(gos3rve.metadata_header("plain text"),
                         "plain text")
        for value in ("\u20ac", "caf\xe9", "tab\there"):
            header = gos3rve.metadata_header(value)
            match = re.match(r"=\?UTF-8\?B\?([A-Za-z0-9+/=]+)\?=\Z", header)
            self.assertEqual(base64.b64decode(match[1]).decode(), value)

    def test_storage_class_must_be_one_of_aws(self):
        for value, expected in (
                (None, None), ("STANDARD", None),
                ("GLACIER", "GLACIER"), ("STANDARD_IA", "STANDARD_IA"),
                ("REDUCED_REDUNDANCY", "REDUCED_REDUNDANCY")):
            headers = {} if value is None else {"x-amz-storage-class": value}
            self.assertEqual(gos3rve.storage_class(headers), expected)
        for value in ("", "standard", "FAST"):
            self.refused("InvalidStorageClass", gos3rve.storage_class,
                         {"x-amz-storage-class": value})


class JsonIn(unittest.TestCase):
    """What is too deep must not reach the parser of CPython 3.13, which
    ends the process in a thread with a small stack."""

    MOST = gos3rve.MAX_JSON_DEPTH

    def test_depth_is_bounded_and_strings_do_not_count(self):
        most = self.MOST
        for text, depth in (
                ("[" * most + "]" * most, most), ("[],{}" * 200, 1),
                ('{"a":[' * 3 + "]}" * 3, 6), ('"' + "[" * 500 + '"', 0),
                ('["\\"' + "[" * 500 + '"]', 1), ('["\\\\",[[]]]', 3),
                ('"' + "[" * 500, 0), ("]" * 500 + "[", 0), ("", 0)):
            with self.subTest(text=text[:20]):
                self.assertEqual(max(0, gos3rve._json_depth(text)), depth)
        text = "[" * most + "]" * most
        self.assertEqual(gos3rve.parse_json(text), json.loads(text))
        text = json.dumps({"a": ["[" * 500, "\\\"" * 99 + "{" * 99]})
        self.assertEqual(gos3rve.parse_json(text.encode()), json.loads(text))

    def test_everything_else_is_a_value_error(self):
        for text in ("[" * (self.MOST + 1) + "]" * (self.MOST + 1),
                     "[" * 10 ** 6, '{"a":' * 5000 + "1" + "}" * 5000,
                     '[{"a":' * 99999, b"\xff", b"\xff\xfe[\0", "", "x",
                     '"\\"' * 10 ** 6):
            with self.subTest(text=text[:20]), \
                    self.assertRaises(ValueError):
                gos3rve.parse_json(text)

    def test_nothing_else_parses(self):
        """But for the copy of what has been parsed: update_bucket()."""
        with open(gos3rve.__file__, encoding="utf-8") as file:
            source = file.read()
        self.assertEqual(re.findall(r"json\.loads?\(\S*", source), [
            "json.loads(text,", "json.loads(json.dumps(bucket.config))"])


###############################################################################
# 3. XML
###############################################################################

class XmlOut(unittest.TestCase):

    def test_document_has_declaration_namespace_and_children_in_order(self):
        self.assertEqual(gos3rve.xml_document("A", [
            ("B", 1), ("C", None), ("D", True), ("E", False), ("F", ""),
            ("G", [("H", "x"), ("H", "y")]), ('I t="v"', "z")]),
            b'<?xml version="1.0" encoding="UTF-8"?>\n'
            b'<A xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><B>1</B>'
            b'<D>true</D><E>false</E><F></F><G><H>x</H><H>y</H></G>'
            b'<I t="v">z</I></A>')

    def test_error_document_has_no_namespace(self):
        self.assertIn(b"\n<Error><Code>X</Code></Error>",
                      gos3rve.xml_document("Error", [("Code", "X")], None))

    def test_every_character_xml_allows_comes_back_from_a_parser(self):
        text = "\t\n\r" + "".join(map(chr, range(32, 0x2100))) \
            + "\ue000\ufffd\U0001f600\U0010ffff]]>&amp;<![CDATA["
        document = gos3rve.xml_document("A", [("Key", text)])
        self.assertEqual(ElementTree.fromstring(document)[0].text, text)

    def test_control_characters_become_references(self):
        # as AWS writes them: readable with encoding-type=url only
        text = gos3rve.xml_escape("a\x01b\x1fc\x00\r")
        self.assertEqual(text, "a&#1;b&#31;c&#0;&#13;")

    def test_document_is_utf8_whatever_the_text(self):
        for text in ("\ud800", "\udcff", "\ufffe"):
            data = gos3rve.xml_document("A", [("Key", text)])
            self.assertTrue(data.decode("utf-8").endswith("</Key></A>"))

    def test_markup_is_not_escaped_twice(self):
        inner = gos3rve.xml_fragment([("B", "<&>")])
        self.assertEqual(gos3rve.xml_fragment([("A", inner)]),
                         "<A><B>&lt;&amp;&gt;</B></A>")


class XmlIn(Refusing):

    def test_namespaces_are_dropped_from_tags_and_attributes(self):
        root = gos3rve.parse_xml(
            b'<?xml version="1.0"?><A xmlns="http://x/" xmlns:y="http://y/">'
            b'<y:B y:t="v"> a &amp; b </y:B><C/></A>', "A")
        self.assertEqual((root.tag, [e.tag for e in root]), ("A", ["B", "C"]))
        self.assertEqual(root[0].attrib, {"t": "v"})
        self.assertEqual(gos3rve.xml_text(root, "B"), "a & b")
        self.assertEqual(gos3rve.xml_text(root, "C"), "")
        self.assertEqual(gos3rve.xml_text(root, "D", "none"), "none")

    def test_text_is_kept_as_it_is(self):
        for text in (" a ", "\u20ac", "a\nb", "]]", "a\tb"):
            data = gos3rve.xml_document("A", [("Key", text)])
            self.assertEqual(gos3rve.parse_xml(data).findtext("Key"), text)

    def test_other_encodings_are_read(self):
        for name in ("utf-8", "utf-16", "iso-8859-1", "us-ascii"):
            text = '<?xml version="1.0" encoding="%s"?><A>x</A>' % name
            self.assertEqual(gos3rve.parse_xml(text.encode(name)).text, "x")

    def test_what_is_not_well_formed_answers_MalformedXML(self):
        for data in (b"", b" ", b"text", b"<A>", b"<A></B>", b"<A/><B/>",
                     b"<A/>tail", b"<A>\xff</A>", b"<A>&nbsp;</A>",
                     b"<A a='1' a='2'/>", b"<A>&#0;</A>", b"<A>\x01</A>",
                     b"\x00", b"<y:A/>", b"{}", b"<A><![CDATA[</A>",
                     b'<?xml version="1.0" encoding="hex"?><A/>',
                     b'<?xml version="1.0" encoding="utf-7"?><A/>',
                     b'<?xml version="1.0" encoding="idna"?><A/>',
                     b'<?xml version="1.0" encoding="nosuch"?><A/>'):
            with self.subTest(data=data):
                self.refused("MalformedXML", gos3rve.parse_xml, data)

    def test_another_root_answers_MalformedXML(self):
        self.refused("MalformedXML", gos3rve.parse_xml, b"<A/>", "Delete")

    def test_document_type_answers_MalformedXML(self):
        for data in (b"<!DOCTYPE A><A/>",
                     b'<!DOCTYPE A SYSTEM "file:///etc/passwd"><A/>',
                     b'<!DOCTYPE A [<!ENTITY x "y">]><A>&x;</A>',
                     b'<!DOCTYPE A [<!ENTITY x SYSTEM "/etc/passwd">]>'
                     b'<A>&x;</A>'):
            with self.subTest(data=data):
                self.refused("MalformedXML", gos3rve.parse_xml, data)

    def test_depth_is_bounded(self):
        most = gos3rve.MAX_XML_DEPTH
        self.assertEqual(gos3rve.parse_xml(
            b"<A>" * most + b"</A>" * most).tag, "A")
        for depth in (most + 1, 100000):
            self.refused("MalformedXML", gos3rve.parse_xml,
                         b"<A>" * depth + b"</A>" * depth)


###############################################################################
# 4. Signatures
###############################################################################
#
# AWS's own examples first; the rest is signed by the tools' Client.

AMAZON = Account("AKIAIOSFODNN7EXAMPLE",
                 "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
                 "amazon-id", "amazon")
MAY_24 = calendar.timegm((2013, 5, 24, 0, 0, 0))    # of the V4 examples
ACCOUNTS = {a.key_id: a for a in (ALICE, BOB, AMAZON)}


def asked(method, target, headers=(), bucket=""):
    """What room 4 wants of a request, from its parts on the wire."""
    raw_path, raw_query = gos3rve.split_target(target)
    pairs, query = gos3rve.parse_query(raw_query), {}
    for name, value in pairs:
        query.setdefault(name, value)
    return types.SimpleNamespace(
        method=method, raw_path=raw_path, pairs=pairs, query=query,
        headers={n.lower(): v for n, v in dict(headers).items()},
        host_bucket=bucket)


def example(method, target, headers, signature):
    """A request of AWS's SigV4 pages; every header given is signed."""
    headers = {n.lower(): v for n, v in headers.items()}
    headers.setdefault("host", "examplebucket.s3.amazonaws.com")
    headers["x-amz-date"] = "20130524T000000Z"
    headers.setdefault("x-amz-content-sha256",
                       hashlib.sha256(b"").hexdigest())
    headers["authorization"] = (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/"
        "us-east-1/s3/aws4_request,SignedHeaders=%s,Signature=%s"
        % (";".join(sorted(headers)), signature))
    return asked(method, target, headers)


class Signing(Refusing):
    """client: a signer; who(request): the account's key id."""

    client = Client("http://s3.test", ALICE.key_id, ALICE.secret)

    def who(self, request, now=MAY_24, **more):
        """The key id of the account that a request is signed by."""
        return gos3rve.authenticate(request, ACCOUNTS, now,
                                    **more).account.key_id

    def signed(self, method="GET", path="/box/key", query=(), headers=None,
               payload="UNSIGNED-PAYLOAD", when=MAY_24, target=None,
               client=None):
        """A request signed in its header; target: sent in path's place."""
        headers = (client or self.client).sign(
            method, path, query, headers or {}, payload, when)
        if target is None:
            target = path + "?" * bool(query) + "&".join(
                "%s=%s" % (quote(n), quote(v)) for n, v in query)
        return asked(method, target, headers)

    def presigned(self, expires=60, when=MAY_24, client=None, **more):
        """A request by a presigned URL."""
        url = (client or self.client).presign(
            "GET", "/box/key", expires=expires, when=when, **more)
        return asked("GET", url[len("http://s3.test"):], {"host": "s3.test"})


class SigV4Examples(Signing):

    def test_examples_of_sig_v4_header_based_auth(self):
        body = hashlib.sha256(b"Welcome to Amazon S3.").hexdigest()
        put = {"Date": "Fri, 24 May 2013 00:00:00 GMT",
               "x-amz-storage-class": "REDUCED_REDUNDANCY",
               "x-amz-content-sha256": body}
        stored = ("98ad721746da40c64f1a55b78f14c238"
                  "d841ea1380cd77a1b5971af0ece108bd")
        for method, target, headers, signature in (
                ("GET", "/test.txt", {"Range": "bytes=0-9"},
                 "f0e8bdb87c964420e857bd35b5d6ed31"
                 "0bd44f0170aba48dd91039c6036bdb41"),
                ("PUT", "/test%24file.text", put, stored),
                ("PUT", "/test$file.text", put, stored),
                ("GET", "/?lifecycle", {},
                 "fea454ca298b7da1c68078a5d1bdbfbb"
                 "e0d65c699e0f91ac7a200a0136783543"),
                ("GET", "/?max-keys=2&prefix=J", {},
                 "34b48302e7b5fa45bde8084f4b7868a8"
                 "6f0a534bc59db6670ed5711ef69dc6f7")):
            with self.subTest(method=method, target=target):
                request = example(method, target, headers, signature)
                self.assertEqual(self.who(request), AMAZON.key_id)
                request.headers["x-amz-date"] = "20130524T000001Z"
                self.refused("SignatureDoesNotMatch", self.who, request)

    def test_example_of_sigv4_query_string_auth(self):
        target = (
            "/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential="
            "AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2F"
            "aws4_request&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&"
            "X-Amz-SignedHeaders=host&X-Amz-Signature=aeeed9bbccd4d02ee5c01"
            "09b86d86835f995330da4c265957d157751f604d404")
        headers = {"host": "examplebucket.s3.amazonaws.com"}
        request = asked("GET", target, headers)
        self.assertEqual(self.who(request, MAY_24 + 86399), AMAZON.key_id)
        self.refused("AccessDenied", self.who, request, MAY_24 + 86401)
        for changed in (target.replace("test.txt", "other.txt"),
                        target.replace("86400", "86401"),
                        target + "&versionId=x", target[:-1] + "5"):
            with self.subTest(target=changed):
                self.refused("SignatureDoesNotMatch", self.who,
                             asked("GET", changed, headers))
        self.refused("SignatureDoesNotMatch", self.who,
                     asked("PUT", target, headers))
        self.refused("SignatureDoesNotMatch", self.who,
                     asked("GET", target, {"host": "other.test"}))

    STREAM = {"Host": "s3.amazonaws.com",
              "x-amz-storage-class": "REDUCED_REDUNDANCY",
              "Content-Encoding": "aws-chunked",
              "x-amz-decoded-content-length": "66560"}

    def decoded(self, request, wire, step=100000):
        """The body of an example, received `step` bytes at a time."""
        identity = gos3rve.authenticate(request, ACCOUNTS, MAY_24)
        frame = gos3rve.LengthReader(Drip(wire, step), len(wire))
        return gos3rve.open_body(frame, request.headers,
                                 identity).read_all()

    def stream(self, step, damage=lambda wire: wire):
        """The example of sigv4-streaming.html."""
        request = example("PUT", "/examplebucket/chunkObject.txt", dict(
            self.STREAM, **{
                "Content-Length": "66824", "x-amz-content-sha256":
                "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"}),
            "4f232c4386841ef735655705268965c4"
            "4a0e4690baa4adea153f7db9fa80a0a9")
        wire = b"".join(b"%x;chunk-signature=%s\r\n%s\r\n" % (
            size, signature, b"a" * size) for size, signature in (
                (65536, b"ad80c730a21e5b8d04586a2213dd63b9"
                        b"a0e99e0e2307b0ade35a65485a288648"),
                (1024, b"0055627c9e194cb4542bae2aa5492e3c"
                       b"1575bbb81b612b7d234b86a503ef5497"),
                (0, b"b6c6ea8a5354eaf15b3cb7646744f427"
                    b"5b71ea724fed81ceb9323e279d449df9")))
        self.assertEqual(len(wire), 66824)
        return self.decoded(request, damage(wire), step)

    def test_example_of_sigv4_streaming(self):
        for step in (1, 7, 4096, 100000):
            with self.subTest(step=step):
                self.assertEqual(self.stream(step), b"a" * 66560)

    def test_one_changed_byte_of_the_stream_is_refused(self):
        for place in (100, 65535, 65700, 66700):
            with self.subTest(place=place):
                self.refused(
                    "SignatureDoesNotMatch", self.stream, 100000,
                    lambda wire: wire[:place] + b"b" + wire[place + 1:])

    def trailed(self, step, damage=lambda wire: wire):
        """The example of sigv4-streaming-trailers.html."""
        request = example("PUT", "/examplebucket/chunkObject.txt", dict(
            self.STREAM, **{
                "x-amz-trailer": "x-amz-checksum-crc32c",
                "x-amz-content-sha256":
                "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"}),
            "106e2a8a18243abcf37539882f36619c"
            "00e2dfc72633413f02d3b74544bfeb8e")
        wire = (
            b"10000;chunk-signature=b474d8862b1487a5145d686f57f013e5"
            b"4db672cee1c953b3010fb58501ef5aa2\r\n" + b"a" * 65536
            + b"\r\n400;chunk-signature=1c1344b170168f8e65b41376b44b20fe"
            b"354e373826ccbbe2c1d40a8cae51e5c7\r\n" + b"a" * 1024
            + b"\r\n0;chunk-signature=2ca2aba2005185cf7159c6277faf8379"
            b"5951dd77a3a99e6e65d5c9f85863f992\r\n"
            b"x-amz-checksum-crc32c:sOO8/Q==\r\n"
            b"x-amz-trailer-signature:d81f82fc3505edab99d459891051a732"
            b"e8730629a2e4a59689829ca17fe2e435\r\n\r\n")
        return self.decoded(request, damage(wire), step)

    def test_example_of_sigv4_streaming_trailers(self):
        for step in (1, 100000):
            with self.subTest(step=step):
                self.assertEqual(self.trailed(step), b"a" * 66560)

    def test_trailer_is_under_its_signature(self):
        for old, new, code in (
                (b"sOO8/Q==", b"sOO8/A==", "SignatureDoesNotMatch"),
                (b"d81f82fc", b"d81f82fd", "SignatureDoesNotMatch"),
                (b"\r\nx-amz-trailer-", b"\r\nx-amz-nothing-",
                 "MalformedTrailerError"),
                (b"x-amz-checksum-crc32c:", b"x-amz-checksum-crc32x:",
                 "MalformedTrailerError"),
                (b"\r\nx-amz-trailer-", b"\r\na:b\r\nx-amz-trailer-",
                 "SignatureDoesNotMatch")):
            with self.subTest(new=new):
                self.refused(code, self.trailed, 100000,
                             lambda wire: wire.replace(old, new))


class SigV4Canonical(Signing):

    def test_odd_paths_are_encoded_once(self):
        for target, canonical in (
                ("/box/a%20b", "/box/a%20b"), ("/box/a+b", "/box/a%2Bb"),
                ("/box/a%2Bb", "/box/a%2Bb"), ("/box/a%2bb", "/box/a%2Bb"),
                ("/box/a@b", "/box/a%40b"), ("/box/a%40b", "/box/a%40b"),
                ("/box/~a", "/box/~a"), ("/box/%7Ea", "/box/~a"),
                ("/box//a//", "/box//a//"), ("//box/a", "//box/a"),
                ("/box/a%2Fb", "/box/a/b"), ("/box/a%25b", "/box/a%25b"),
                ("/box/%2541", "/box/%2541"),
                ("/box/%e2%82%ac", "/box/%E2%82%AC"),
                ("/box/\xe2\x82\xac", "/box/%E2%82%AC"),
                ("/box/../a/./b", "/box/../a/./b"),
                ("/box/(a)!'*", "/box/%28a%29%21%27%2A"),
                ("/box/a=b&c;d:e,f$", "/box/a%3Db%26c%3Bd%3Ae%2Cf%24"),
                ("/box/%0A%00", "/box/%0A%00"), ("/", "/"),
                ("/box/%61", "/box/a"), ("/box/a-._~", "/box/a-._~"),
                ("/box/e%CC%81", "/box/e%CC%81")):
            with self.subTest(target=target):
                request = self.signed(path=canonical, target=target)
                self.assertEqual(self.who(request), ALICE.key_id)
                request.raw_path += "x"
                self.refused("SignatureDoesNotMatch", self.who, request)

    def test_query_is_sorted_by_name_then_value_and_encoded(self):
        for raw_query, pairs in (
                ("uploads", [("uploads", "")]),
                ("uploads=", [("uploads", "")]),
                ("b=2&a=1", [("a", "1"), ("b", "2")]),
                ("a=2&a=1&a=", [("a", ""), ("a", "1"), ("a", "2")]),
                ("prefix=a%20b", [("prefix", "a b")]),
                ("prefix=a%2Bb", [("prefix", "a+b")]),
                ("prefix=a/b", [("prefix", "a/b")]),
                ("prefix=a%2fb", [("prefix", "a/b")]),
                ("prefix=%e2%82%ac", [("prefix", "\u20ac")]),
                ("prefix=\xe2\x82\xac", [("prefix", "\u20ac")]),
                ("marker=a=b", [("marker", "a=b")]),
                ("p=~-_.", [("p", "~-_.")]), ("B=1&a=2", [
                    ("B", "1"), ("a", "2")]),
                ("x-id=PutObject", [("x-id", "PutObject")])):
            with self.subTest(query=raw_query):
                self.assertEqual(self.who(self.signed(
                    query=pairs, target="/box/key?" + raw_query)),
                    ALICE.key_id)

    def test_name_that_begins_another_sorts_before_it(self):
        # sorted as `name=value`, `select-type=` would come before `select=`
        for names in (("select", "select-type"), ("a", "a1"), ("a", "a.b"),
                      ("a", "a b")):
            with self.subTest(names=names):
                pairs = [(name, "2") for name in names]
                self.assertEqual(self.who(self.signed(
                    query=pairs)), ALICE.key_id)

    def test_header_values_are_trimmed_and_runs_of_spaces_folded(self):
        for value in ("a  b   c", " a b ", "", "a,b", "\xc3\xa9 x"):
            with self.subTest(value=value):
                request = self.signed(headers={"x-amz-meta-a": value})
                self.assertEqual(self.who(request), ALICE.key_id)

    def test_utf8_bytes_in_a_header_are_not_spaces(self):
        # U+00E0 ends in 0xA0 and U+00C5 in 0x85, which are spaces to
        # str.split() once they were decoded as latin-1
        for text in ("voil\xe0", "\xe0  la carte", "\xc5", "a  \xc5  b"):
            value = text.encode("utf-8").decode("latin-1")
            headers = {"host": "s3.test", "x-amz-content-sha256":
                       "UNSIGNED-PAYLOAD", "x-amz-date": amz_date(MAY_24),
                       "x-amz-meta-a": value}
            scope = "20130524/us-east-1/s3/aws4_request"
            lines = ["GET", "/box/key", ""]
            lines += ["%s:%s" % (n, re.sub(" +", " ", v))
                      for n, v in sorted(headers.items())]
            canonical = "\n".join(lines + [
                "", ";".join(sorted(headers)), "UNSIGNED-PAYLOAD"])
            headers["authorization"] = (
                "AWS4-HMAC-SHA256 Credential=%s/%s,SignedHeaders=%s,"
                "Signature=%s" % (
                    ALICE.key_id, scope, ";".join(sorted(headers)),
                    v4_signature(ALICE.secret, scope, amz_date(MAY_24),
                                 canonical)))
            with self.subTest(text=text):
                self.assertEqual(self.who(asked(
                    "GET", "/box/key", headers)), ALICE.key_id)

    def test_authorization_header_may_have_spaces_after_its_commas(self):
        request = self.signed()
        text = request.headers["authorization"]
        request.headers["authorization"] = text.replace(",", ", ")
        self.assertEqual(self.who(request), ALICE.key_id)

    def test_date_header_stands_in_for_x_amz_date(self):
        date = "Fri, 24 May 2013 00:00:00 GMT"
        request = self.signed(headers={"Date": date})
        headers = request.headers
        del headers["x-amz-date"]
        names = ["date", "host", "x-amz-content-sha256"]
        scope = "20130524/us-east-1/s3/aws4_request"
        canonical = v4_canonical("GET", "/box/key", [], headers, names,
                                 "UNSIGNED-PAYLOAD")
        headers["authorization"] = (
            "AWS4-HMAC-SHA256 Credential=%s/%s,SignedHeaders=%s,"
            "Signature=%s" % (ALICE.key_id, scope, ";".join(names),
                              v4_signature(ALICE.secret, scope,
                                           "20130524T000000Z", canonical)))
        self.assertEqual(self.who(request), ALICE.key_id)
        headers["date"] = "no date"
        self.refused("AccessDenied", self.who, request)

    def test_signature_over_another_of_the_servers_names_is_taken(self):
        request = self.signed()
        request.headers["host"] = "10.0.0.1:9000"
        self.refused("SignatureDoesNotMatch", self.who, request)
        self.assertEqual(self.who(request, hosts=("a.test", "s3.test")),
                         ALICE.key_id)
        self.refused("SignatureDoesNotMatch", self.who, request,
                     hosts=("a.test",))


class SigV4Refusals(Signing):

    def test_unsigned_request_has_no_account(self):
        identity = gos3rve.authenticate(asked("GET", "/box/key", {
            "host": "s3.test"}), ACCOUNTS, MAY_24)
        self.assertIsNone(identity.account)
        self.assertIsNone(identity.chain)

    def test_key_of_nobody_answers_InvalidAccessKeyId(self):
        client = Client("http://s3.test", "NOBODY", ALICE.secret)
        self.refused("InvalidAccessKeyId", self.who,
                     self.signed(client=client))
        self.refused("InvalidAccessKeyId", self.who,
                     self.presigned(client=client))

    def test_secret_of_another_answers_SignatureDoesNotMatch(self):
        client = Client("http://s3.test", ALICE.key_id, BOB.secret)
        for request in (self.signed(client=client),
                        self.presigned(client=client)):
            error = self.refused("SignatureDoesNotMatch", self.who, request)
            self.assertEqual(error.status, 403)
            self.assertEqual(error.fields["AWSAccessKeyId"], ALICE.key_id)
            self.assertTrue(error.fields["StringToSign"].startswith(
                "AWS4-HMAC-SHA256\n20130524T000000Z\n20130524/us-east-1/s3/"
                "aws4_request\n"))
            self.assertTrue(error.fields["CanonicalRequest"].startswith(
                "GET\n/box/key\n"))
            self.assertEqual(
                bytes.fromhex(error.fields["StringToSignBytes"].replace(
                    " ", "")).decode(), error.fields["StringToSign"])
            self.assertNotIn(ALICE.secret, repr(error.fields))

    def test_clock_may_differ_by_fifteen_minutes(self):
        request = self.signed()
        for offset in (-899, -1, 0, 1, 899):
            self.assertEqual(self.who(request, MAY_24 + offset),
                             ALICE.key_id)
        for offset in (-86400, -901, 901, 86400, 10**8):
            with self.subTest(offset=offset):
                error = self.refused("RequestTimeTooSkewed", self.who,
                                     request, MAY_24 + offset)
                self.assertEqual(error.fields["RequestTime"],
                                 "20130524T000000Z")

    def test_fractions_of_seconds_do_not_matter(self):
        self.assertEqual(self.who(self.signed(), MAY_24 + 0.5),
                         ALICE.key_id)
        self.assertEqual(self.who(self.presigned(), MAY_24 + 59.5),
                         ALICE.key_id)
        self.refused("RequestTimeTooSkewed", self.who, self.signed(),
                     MAY_24 + 1000.5)
        self.refused("AccessDenied", self.who, self.presigned(),
                     MAY_24 + 100.5)

    def test_region_is_checked_only_where_one_is_set(self):
        mars = Client("http://s3.test", ALICE.key_id, ALICE.secret, "mars")
        for request, code in (
                (self.signed(client=mars), "AuthorizationHeaderMalformed"),
                (self.presigned(client=mars),
                 "AuthorizationQueryParametersError")):
            with self.subTest(code=code):
                self.assertEqual(self.who(request), ALICE.key_id)
                self.assertEqual(self.who(request, region="mars"),
                                 ALICE.key_id)
                error = self.refused(code, self.who, request,
                                     region="us-east-1")
                self.assertEqual(error.fields["Region"], "us-east-1")
                self.assertIn("mars", error.message)

    def test_scope_must_fit_the_request(self):
        code = "AuthorizationHeaderMalformed"
        for old, new in (
                ("/20130524/", "/20130525/"), ("/s3/", "/sqs/"),
                ("/aws4_request", "/aws5_request"),
                ("/20130524/us-east-1", "/us-east-1"),
                ("/20130524/us-east-1/s3/aws4_request", ""),
                ("Credential=", "Credentials="),
                ("Signature=", "Sig="), ("SignedHeaders=", "Headers="),
                (ALICE.key_id + "/", "/"), (ALICE.key_id, "")):
            request = self.signed()
            text = request.headers["authorization"]
            request.headers["authorization"] = text.replace(old, new)
            with self.subTest(new=new):
                self.assertEqual(self.refused(code, self.who,
                                              request).status, 400)

    def test_key_of_another_day_region_or_service_does_not_fit(self):
        for place, value in ((0, "20130523"), (1, "mars"), (2, "sqs")):
            parts = ["20130524", "us-east-1", "s3", "aws4_request"]
            request = self.signed()
            headers = request.headers
            names = re.search("SignedHeaders=([^,]+)",
                              headers["authorization"])[1].split(";")
            canonical = v4_canonical("GET", "/box/key", [], headers, names,
                                     "UNSIGNED-PAYLOAD")
            stated = "/".join(parts)
            parts[place] = value
            signature = hmac.new(
                v4_key(ALICE.secret, *parts[:3]), "\n".join((
                    "AWS4-HMAC-SHA256", headers["x-amz-date"], stated,
                    hashlib.sha256(canonical.encode()).hexdigest())).encode(),
                hashlib.sha256).hexdigest()
            headers["authorization"] = re.sub(
                "Signature=.*", "Signature=" + signature,
                headers["authorization"])
            with self.subTest(value=value):
                self.refused("SignatureDoesNotMatch", self.who, request)

    def test_date_must_be_one(self):
        for date in ("", "yesterday", "2013-05-24T00:00:00Z"):
            request = self.signed()
            request.headers["x-amz-date"] = date
            with self.subTest(date=date):
                self.refused("AccessDenied", self.who, request)

    def test_every_x_amz_header_and_the_host_must_be_signed(self):
        for name in ("x-amz-acl", "x-amz-meta-a", "x-amz-copy-source"):
            for request in (self.signed(), self.presigned()):
                request.headers[name] = "v"
                with self.subTest(name=name):
                    error = self.refused("AccessDenied", self.who, request)
                    self.assertEqual(error.fields["HeadersNotSigned"], name)
        request = self.signed()
        text = request.headers["authorization"]
        request.headers["authorization"] = text.replace("host;", "")
        self.refused("AccessDenied", self.who, request)

    def test_other_headers_need_not_be_signed(self):
        request = self.signed()
        request.headers.update({"range": "bytes=0-1", "accept": "*/*"})
        self.assertEqual(self.who(request), ALICE.key_id)

    def test_signed_header_that_was_changed_or_dropped_is_refused(self):
        for change in ({"x-amz-meta-a": "c"}, {"range": "bytes=0-2"}):
            request = self.signed(headers={"x-amz-meta-a": "b",
                                           "range": "bytes=0-1"})
            self.assertEqual(self.who(request), ALICE.key_id)
            request.headers.update(change)
            self.refused("SignatureDoesNotMatch", self.who, request)
        del request.headers["range"]
        self.refused("SignatureDoesNotMatch", self.who, request)

    def test_session_token_answers_InvalidToken(self):
        self.refused("InvalidToken", self.who, self.signed(
            headers={"x-amz-security-token": "t"}))
        self.refused("InvalidToken", self.who, self.presigned(
            query=[("X-Amz-Security-Token", "t")]))

    def test_payload_hash_is_needed_and_has_one_of_the_known_forms(self):
        for payload in ("UNSIGNED-PAYLOAD", "0" * 64,
                        "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
                        "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
                        "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"):
            identity = gos3rve.authenticate(self.signed(payload=payload),
                                            ACCOUNTS, MAY_24)
            self.assertEqual(identity.payload, payload)
            self.assertEqual(identity.chain is not None,
                             "AWS4" in payload, payload)
        for payload in ("", "0" * 63, "0" * 65, "g" * 64, "unsigned-payload",
                        "STREAMING-PAYLOAD", "0" * 64 + "\n"):
            with self.subTest(payload=payload):
                self.refused("InvalidArgument", self.who,
                             self.signed(payload=payload))
        self.refused("NotImplemented", self.who, self.signed(
            payload="STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD"))
        request = self.signed()
        del request.headers["x-amz-content-sha256"]
        self.refused("InvalidRequest", self.who, request)

    def test_payload_hash_of_an_unsigned_request_cannot_break_anything(self):
        request = asked("PUT", "/box/key", {
            "host": "s3.test", "x-amz-content-sha256": "z" * 64})

        def receive():
            identity = gos3rve.authenticate(request, ACCOUNTS, MAY_24)
            frame = gos3rve.LengthReader(io.BytesIO(b"abc"), 3)
            gos3rve.open_body(frame, request.headers, identity).read_all()

        self.assertRaises(S3Error, receive)

    def test_unknown_or_second_scheme_answers_InvalidArgument(self):
        for text in ("Basic YTpi", "Bearer x", "", "AWS4-ECDSA x",
                     "AWS", "AWS x"):
            with self.subTest(authorization=text):
                self.refused("InvalidArgument", self.who, asked(
                    "GET", "/box/key", {"host": "s3.test",
                                        "authorization": text}))
        request = self.presigned()
        request.headers["authorization"] = \
            self.signed().headers["authorization"]
        self.refused("InvalidArgument", self.who, request)

    def test_signature_that_is_not_ascii_is_refused(self):
        request = self.signed()
        request.headers["authorization"] += "\xe9"
        self.refused("SignatureDoesNotMatch", self.who, request)


class SigV4Presigned(Signing):

    def test_url_holds_until_it_expires(self):
        request = self.presigned(expires=60)
        for offset in (-800, 0, 59):
            self.assertEqual(self.who(request, MAY_24 + offset),
                             ALICE.key_id)
        for offset in (61, 100, 10**8):
            error = self.refused("AccessDenied", self.who, request,
                                 MAY_24 + offset)
            self.assertEqual(error.message, "Request has expired")

    def test_url_of_the_future_is_not_valid_yet(self):
        self.refused("AccessDenied", self.who, self.presigned(),
                     MAY_24 - 901)

    def test_url_may_live_for_a_week(self):
        self.assertEqual(self.who(self.presigned(expires=604800),
                                  MAY_24 + 604799), ALICE.key_id)
        for expires in ("604801", "-1", "x", "1.5", "9" * 40, "\u0661",
                        "1\n"):
            with self.subTest(expires=expires):
                self.refused("AuthorizationQueryParametersError", self.who,
                             self.presigned(expires=expires))

    def test_missing_or_wrong_parameters(self):
        names = ("X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date",
                 "X-Amz-Expires", "X-Amz-SignedHeaders", "X-Amz-Signature")
        for name in names:
            request = self.presigned()
            request.pairs = [p for p in request.pairs if p[0] != name]
            del request.query[name]
            with self.subTest(missing=name):
                self.refused("AuthorizationQueryParametersError", self.who,
                             request)
        for name, value in (
                ("X-Amz-Algorithm", "AWS4-HMAC-SHA1"),
                ("X-Amz-Credential", "ALICEKEY"),
                ("X-Amz-Credential",
                 "ALICEKEY/20130525/us-east-1/s3/aws4_request"),
                ("X-Amz-Credential",
                 "ALICEKEY/20130524/us-east-1/sqs/aws4_request"),
                ("X-Amz-Date", "yesterday"), ("X-Amz-Date", "20130524")):
            request = self.presigned()
            request.query[name] = value
            with self.subTest(name=name, value=value):
                self.refused("AuthorizationQueryParametersError", self.who,
                             request)

    def test_headers_of_the_url_must_come_as_they_were_signed(self):
        request = self.presigned(headers={"Content-Type": "text/plain"})
        self.refused("SignatureDoesNotMatch", self.who, request)
        request.headers["content-type"] = "text/html"
        self.refused("SignatureDoesNotMatch", self.who, request)
        request.headers["content-type"] = "text/plain"
        self.assertEqual(self.who(request), ALICE.key_id)

    def test_parameters_of_the_url_are_under_its_signature(self):
        request = self.presigned(query=[("response-content-type", "a/b")])
        self.assertEqual(self.who(request), ALICE.key_id)
        request.pairs = [(n, "a/c" if n.startswith("r") else v)
                         for n, v in request.pairs]
        self.refused("SignatureDoesNotMatch", self.who, request)

    def test_second_signature_parameter_does_not_override_the_first(self):
        request = self.presigned()
        bad = dict(request.query, **{"X-Amz-Signature": "0" * 64})
        request.query = bad
        self.refused("SignatureDoesNotMatch", self.who, request)


class SigV2(Signing):
    """API/RESTAuthentication.html.  AWS renamed johnsmith's bucket in its
    examples later on and left two of them wrong: both sets are used where
    they agree with the rules of the page."""

    MARCH_27 = calendar.timegm((2007, 3, 27, 19, 36, 42))

    def example(self, method, target, headers, signature, bucket=""):
        """A request of the page, and the time of its signature."""
        headers = dict(headers)
        headers.setdefault("Host", "s3.amazonaws.com")
        headers["Authorization"] = "AWS AKIAIOSFODNN7EXAMPLE:" + signature
        request = asked(method, target, headers, bucket)
        text = headers.get("x-amz-date") or headers["Date"]
        return request, calendar.timegm(time.strptime(
            text, "%a, %d %b %Y %H:%M:%S +0000"))

    EXAMPLES = (
        ("GET", "/photos/puppy.jpg",
         {"Date": "Tue, 27 Mar 2007 19:36:42 +0000"}, (
             ("johnsmith", "bWq2s1WEIj+Ydj0vQ697zp+IXMU="),
             ("awsexamplebucket1", "qgk2+6Sv9/oM7G3qLEjTH1a1l1g="))),
        ("PUT", "/photos/puppy.jpg",
         {"Content-Type": "image/jpeg", "Content-Length": "94328",
          "Date": "Tue, 27 Mar 2007 21:15:45 +0000"}, (
              ("johnsmith", "MyyxeRY7whkBe+bq8fHCL/2kKUg="),
              ("awsexamplebucket1", "iqRzw+ileNPu1fhspnRs8nOjjIA="))),
        ("GET", "/?prefix=photos&max-keys=50&marker=puppy",
         {"User-Agent": "Mozilla/5.0",
          "Date": "Tue, 27 Mar 2007 19:42:41 +0000"}, (
              ("johnsmith", "htDYFYduRNen8P9ZfE/s9SuKy0U="),
              ("awsexamplebucket1", "m0WP8eCtspQl5Ahe6L1SozdX9YA="))),
        ("GET", "/?acl", {"Date": "Tue, 27 Mar 2007 19:44:46 +0000"}, (
            ("johnsmith", "c2WLPFtWHVgbEmeEG93a4cG37dM="),
            ("awsexamplebucket1", "82ZHiFIjc+WbcwFKGUVEQspPn+0="))),
        ("DELETE", "/photos/puppy.jpg",
         {"User-Agent": "dotnet", "Date": "Tue, 27 Mar 2007 21:20:27 +0000",
          "x-amz-date": "Tue, 27 Mar 2007 21:20:26 +0000"}, (
              ("johnsmith", "R4dJ53KECjStyBO5iTBJZ4XVOaI="),)),
        ("PUT", "/db-backup.dat.gz",
         {"User-Agent": "curl/7.15.5",
          "Date": "Tue, 27 Mar 2007 21:06:08 +0000",
          "x-amz-acl": "public-read",
          "content-type": "application/x-download",
          "Content-MD5": "4gJE4saaMU4BqNR0kLY+lw==",
          "X-Amz-Meta-ReviewedBy": "joe@johnsmith.net,jane@johnsmith.net",
          "X-Amz-Meta-FileChecksum": "0x02661779",
          "X-Amz-Meta-ChecksumAlgorithm": "crc32",
          "Content-Disposition": "attachment; filename=database.dat",
          "Content-Encoding": "gzip", "Content-Length": "5913339"}, (
              ("static.johnsmith.net", "ilyl83RwaSoYIEdixDQcA4OnAnc="),)))

    def test_examples_of_the_page_in_both_styles(self):
        for method, target, headers, signatures in self.EXAMPLES:
            for bucket, signature in signatures:
                for path, host in ((target, bucket),
                                   ("/" + bucket + target, "")):
                    request, now = self.example(method, path, headers,
                                                signature, host)
                    with self.subTest(method=method, path=path):
                        self.assertEqual(self.who(request, now),
                                         AMAZON.key_id)
                        request.method = "POST"
                        self.refused("SignatureDoesNotMatch", self.who,
                                     request, now)

    def test_examples_without_a_bucket_and_with_unicode(self):
        for target, date, signature in (
                ("/", "Wed, 28 Mar 2007 01:29:59 +0000",
                 "qGdzdERIC03wnaRNKh6OqZehG9s="),
                ("/dictionary/fran%C3%A7ais/pr%c3%a9f%c3%a8re",
                 "Wed, 28 Mar 2007 01:49:49 +0000",
                 "DNEZGsoieTZ92F3bUfSPQcbGmlM=")):
            with self.subTest(target=target):
                self.assertEqual(self.who(*self.example(
                    "GET", target, {"Date": date}, signature)),
                    AMAZON.key_id)

    def test_example_of_a_presigned_url(self):
        target = ("/photos/puppy.jpg?AWSAccessKeyId=AKIAIOSFODNN7EXAMPLE"
                  "&Signature=NpgCjnDzrM%2BWFzoENXmpNDUsSn8%3D"
                  "&Expires=1175139620")
        request = asked("GET", target, {"host": "x"}, "johnsmith")
        self.assertEqual(self.who(request, 1175139619), AMAZON.key_id)
        error = self.refused("AccessDenied", self.who, request, 1175139621)
        self.assertEqual(error.message, "Request has expired")
        for old, new in (("puppy", "kitty"), ("=1175", "=1176"),
                         ("NpgC", "npgC"), ("Expires=", "expires="),
                         ("1175139620", "soon")):
            request = asked("GET", target.replace(old, new), {}, "johnsmith")
            with self.subTest(new=new):
                self.assertRaises(S3Error, self.who, request, 1175139000)

    def sign(self, method, target, headers, lines, resource):
        """A request signed by SigV2 with these x-amz- lines, resource."""
        headers = dict({"host": "s3.test",
                        "date": "Tue, 27 Mar 2007 19:36:42 +0000"},
                       **headers)
        text = "\n".join([
            method, headers.get("content-md5", ""),
            headers.get("content-type", ""), headers["date"]] + lines
            + [resource])
        headers["authorization"] = "AWS %s:%s" % (
            ALICE.key_id, base64.b64encode(hmac.new(
                ALICE.secret.encode(), text.encode("latin-1"),
                hashlib.sha1).digest()).decode())
        return asked(method, target, headers)

    def test_subresources_and_overrides_are_signed_decoded_and_sorted(self):
        utf8 = "attachment; filename=\u65e5.txt".encode().decode("latin-1")
        for query, signed in (
                ("uploads", "?uploads"),
                ("uploadId=x&partNumber=2", "?partNumber=2&uploadId=x"),
                ("prefix=a&delimiter=b", ""),
                ("response-content-type=a%2Fb%3B+c",
                 "?response-content-type=a/b; c"),
                ("versionId=null&x=y", "?versionId=null"),
                ("response-content-disposition=attachment%3B%20filename%3D"
                 "%E6%97%A5.txt", "?response-content-disposition=" + utf8)):
            with self.subTest(query=query):
                self.assertEqual(self.who(self.sign(
                    "GET", "/box/key?" + query, {}, [],
                    "/box/key" + signed), self.MARCH_27), ALICE.key_id)

    def test_names_in_other_scripts_are_not_interchangeable(self):
        override = "/box/key?response-content-disposition="
        request = self.sign("GET", override + "%E6%97%A5", {}, [],
                            override + "\xe6\x97\xa5")
        request.pairs = [(request.pairs[0][0], "\u672c")]
        self.refused("SignatureDoesNotMatch", self.who, request,
                     self.MARCH_27)
        mark = self.sign("GET", override + "%3F", {}, [], override + "?")
        mark.pairs = [(mark.pairs[0][0], "\u672c")]
        self.refused("SignatureDoesNotMatch", self.who, mark, self.MARCH_27)

    def test_spaces_inside_a_header_are_signed_as_they_are(self):
        # the page unfolds lines and trims around the colon, no more;
        # botocore's HmacV1Auth and s3cmd do the same
        for value in ("a  b", "\xc3\xa0 la carte", "voil\xc3\xa0"):
            with self.subTest(value=value):
                self.assertEqual(self.who(self.sign(
                    "PUT", "/box/key", {"x-amz-meta-a": value},
                    ["x-amz-meta-a:" + value], "/box/key"),
                    self.MARCH_27), ALICE.key_id)

    def test_bucket_may_be_signed_with_a_slash_at_its_end(self):
        # botocore's HmacV1Auth signs /box/ and sends /box
        for target, resource in (("/box", "/box/"), ("/box", "/box"),
                                 ("/box/", "/box/"),
                                 ("/box?uploads", "/box/?uploads")):
            with self.subTest(target=target, resource=resource):
                self.assertEqual(self.who(self.sign(
                    "GET", target, {}, [], resource), self.MARCH_27),
                    ALICE.key_id)
        self.refused("SignatureDoesNotMatch", self.who, self.sign(
            "GET", "/box/key", {}, [], "/box/key/"), self.MARCH_27)

    def test_clock_may_differ_by_fifteen_minutes(self):
        request = self.sign("GET", "/box/key", {}, [], "/box/key")
        for offset in (-899, 899):
            self.assertEqual(self.who(request, self.MARCH_27 + offset),
                             ALICE.key_id)
        for offset in (-901, 901, 10**8):
            self.refused("RequestTimeTooSkewed", self.who, request,
                         self.MARCH_27 + offset)

    def test_refusals(self):
        good = "Tue, 27 Mar 2007 19:36:42 +0000"
        for authorization, date, code in (
                ("AWS ALICEKEY", good, "InvalidArgument"),
                ("AWS :x", good, "InvalidArgument"),
                ("AWS NOBODY:x", good, "InvalidAccessKeyId"),
                ("AWS ALICEKEY:", good, "SignatureDoesNotMatch"),
                ("AWS ALICEKEY:\xe9", good, "SignatureDoesNotMatch"),
                ("AWS ALICEKEY:x", "", "AccessDenied"),
                ("AWS ALICEKEY:x", "noon", "AccessDenied")):
            with self.subTest(authorization=authorization, date=date):
                self.refused(code, self.who, asked("GET", "/box/key", {
                    "host": "s3.test", "date": date,
                    "authorization": authorization}), self.MARCH_27)
        self.refused("InvalidToken", self.who, self.sign(
            "GET", "/box/key", {"x-amz-security-token": "t"},
            ["x-amz-security-token:t"], "/box/key"), self.MARCH_27)


class Sessions(Signing):
    """Temporary credentials, and the tokens that stand for them."""

    ISSUED = gos3rve.Session(MAY_24, MAY_24 + 900, "path/app", "s1",
                              '{"Statement":[]}', (("a", "b"),))

    def issue(self, account=ALICE, session=ISSUED, **changed):
        """A signer with new credentials; keywords change it."""
        issued, token, _ = gos3rve.issue_session(account, session)
        client = Client("http://s3.test", issued.key_id, issued.secret,
                        token=token)
        vars(client).update(changed)
        return client

    def v2(self, client, in_url, **changed):
        """A request signed with SigV2, the token in a header or a URL."""
        expires = str(MAY_24 + 60)
        date = "Fri, 24 May 2013 00:00:00 +0000"
        lines = ["GET", "", "", expires if in_url else date]
        if client.token:
            lines.append("x-amz-security-token:" + client.token)
        signature = base64.b64encode(hmac.new(
            client.secret.encode(), "\n".join(lines + ["/box/key"]).encode(),
            hashlib.sha1).digest()).decode()
        token = changed.get("token", client.token)
        pairs = {"x-amz-security-token": token} if token else {}
        if not in_url:
            return asked("GET", "/box/key", dict(
                pairs, host="s3.test", date=date,
                authorization="AWS %s:%s" % (client.key_id, signature)))
        pairs.update(AWSAccessKeyId=client.key_id, Signature=signature,
                     Expires=expires)
        return asked("GET", "/box/key?" + urllib.parse.urlencode(pairs),
                     {"host": "s3.test"})

    def form(self, client, signer):
        """The Identity of a POST form with its token."""
        fields = signer("e30=", client)
        if client.token:
            fields["x-amz-security-token"] = client.token
        return gos3rve.authenticate_form(fields, ACCOUNTS, MAY_24)

    @staticmethod
    def v4_form(policy, client):
        """The fields of a form's SigV4."""
        scope = "20130524/us-east-1/s3/aws4_request"
        return {"policy": policy, "x-amz-algorithm": "AWS4-HMAC-SHA256",
                "x-amz-date": "20130524T000000Z",
                "x-amz-credential": "%s/%s" % (client.key_id, scope),
                "x-amz-signature": hmac.new(
                    v4_key(client.secret, "20130524"), policy.encode(),
                    hashlib.sha256).hexdigest()}

    @staticmethod
    def v2_form(policy, client):
        """The fields of a form's SigV2."""
        return {"policy": policy, "awsaccesskeyid": client.key_id,
                "signature": base64.b64encode(hmac.new(
                    client.secret.encode(), policy.encode(),
                    hashlib.sha1).digest()).decode()}

    def ways(self, client):
        """Each way to send a signature with a token: a call."""
        def who(request):
            return gos3rve.authenticate(request, ACCOUNTS, MAY_24)
        return {
            "header": lambda: who(self.signed(client=client)),
            "url": lambda: who(self.presigned(client=client)),
            "V2 header": lambda: who(self.v2(client, False)),
            "V2 url": lambda: who(self.v2(client, True)),
            "form": lambda: self.form(client, self.v4_form),
            "V2 form": lambda: self.form(client, self.v2_form)}

    def test_credentials_are_a_session_s_on_every_way(self):
        for session in (self.ISSUED, gos3rve.Session(MAY_24, MAY_24 + 1)):
            client = self.issue(session=session)
            self.assertRegex(client.key_id, r"\AASIA[A-Z2-7]{16}\Z")
            self.assertRegex(client.secret, r"\A[A-Za-z0-9+/]{40}\Z")
            for name, call in self.ways(client).items():
                with self.subTest(way=name):
                    account = call().account
                    self.assertEqual(account.session, session)
                    self.assertEqual(account[:5], (
                        client.key_id, client.secret) + ALICE[2:5])

    def test_what_is_refused_on_every_way(self):
        good, other = self.issue(), self.issue()
        forged = self.issue(ALICE._replace(secret="another server's"))
        bobs = self.issue(BOB)
        stranger = self.issue(ALICE._replace(key_id="GONE"))
        old = gos3rve.Session(MAY_24 - 901, MAY_24)
        unknown, invalid = "InvalidAccessKeyId", "InvalidToken"
        for name, code, client in (
                ("expired", "ExpiredToken", self.issue(session=old)),
                ("no token", unknown, self.issue(token=None)),
                ("no key id of a session", unknown, self.issue(key_id="AK")),
                ("another's token", invalid, self.issue(token=other.token)),
                ("another account's", invalid, self.issue(token=bobs.token)),
                ("another server's", invalid, forged),
                ("an account that has gone", invalid, stranger),
                ("a lasting key pair", invalid, self.issue(
                    key_id=ALICE.key_id, secret=ALICE.secret)),
                ("another's secret", "SignatureDoesNotMatch",
                 self.issue(secret=other.secret)),
                ("the account's secret", "SignatureDoesNotMatch",
                 self.issue(secret=ALICE.secret)),
                ("no base64", invalid, self.issue(token="a b")),
                ("no ASCII", invalid, self.issue(token="\xe9" * 80)),
                ("too short", invalid, self.issue(token="AAAA")),
                ("too long", invalid, self.issue(token=good.token + "AAAA")),
                ("nothing", invalid, self.issue(token="A" * 200))):
            for way, call in self.ways(client).items():
                with self.subTest(name, way=way):
                    self.refused(code, call)

    def test_a_changed_bit_anywhere_makes_it_invalid(self):
        client = self.issue()
        sealed = base64.urlsafe_b64decode(client.token)
        for place in range(len(sealed)):
            data = bytearray(sealed)
            data[place] ^= 1
            with self.subTest(place=place):
                self.refused("InvalidToken", gos3rve.open_session,
                             base64.urlsafe_b64encode(data).decode(),
                             client.key_id, ACCOUNTS, MAY_24)

    def test_a_token_must_be_under_the_signature(self):
        client = self.issue()
        for request in (self.signed(client=client),
                        self.v2(client, False)):
            self.assertEqual(self.who(request), client.key_id)
            token = request.headers.pop("x-amz-security-token")
            self.refused("InvalidAccessKeyId", self.who, request)
            request.headers["x-amz-security-token"] = token
            self.assertEqual(self.who(request), client.key_id)
        token, client.token = client.token, None
        request = self.signed(client=client)
        request.headers["x-amz-security-token"] = token
        self.assertEqual(self.refused("AccessDenied", self.who, request)
                         .fields["HeadersNotSigned"], "x-amz-security-token")
        for in_url in (False, True):
            self.refused("SignatureDoesNotMatch", self.who,
                         self.v2(client, in_url, token=token))
        request = self.presigned(client=client)
        request.query["X-Amz-Security-Token"] = token
        request.pairs.append(("X-Amz-Security-Token", token))
        self.refused("SignatureDoesNotMatch", self.who, request)

    def test_a_token_says_what_it_is_and_no_secret(self):
        client = self.issue()
        sealed = base64.urlsafe_b64decode(client.token)
        _, _, packed = sealed[32:].partition(b"\0")
        self.assertEqual(json.loads(zlib.decompress(packed))[:3],
                         [client.key_id, MAY_24, MAY_24 + 900])
        for secret in (ALICE.secret, client.secret):
            self.assertNotIn(secret.encode(), zlib.decompress(packed))
            self.assertNotIn(base64.b64decode(client.secret), sealed)

    def test_a_session_has_a_size(self):
        noise = "".join(map(chr, random.Random(1).choices(
            range(0x20, 0x2000), k=3000)))
        self.refused("PackedPolicyTooLarge", gos3rve.issue_session, ALICE,
                     self.ISSUED._replace(tags=(("k", noise),)))
        _, token, percent = gos3rve.issue_session(ALICE, self.ISSUED)
        self.assertTrue(0 < percent < 10)
        self.assertLess(len(token), 400)


###############################################################################
# 5. Bodies and checksums
###############################################################################

def bytewise_crcs(width, polynomial, data):
    """The reflected CRCs of all prefixes of data, the plain slow way."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ polynomial * (value & 1)
        table.append(value)
    ones = (1 << width) - 1
    crc, found = ones, [0]
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
        found.append(crc ^ ones)
    return found


class Crcs(unittest.TestCase):
    # name, width, reflected polynomial
    ALL = (("CRC32", 32, 0xEDB88320), ("CRC32C", 32, 0x82F63B78),
           ("CRC64NVME", 64, 0x9A6C9329AC4BC9B5))

    def crc(self, name, *pieces):
        """The CRC of pieces fed one after the other, as a number."""
        digest = gos3rve.DIGESTS[name].new()
        for piece in pieces:
            digest.update(piece)
        return int.from_bytes(digest.digest(), "big")

    def test_published_vectors(self):
        rising = bytes(range(256)) * 16
        read_pdu = bytes.fromhex(
            "01c00000000000000000000000000000140000000000040000000014"
            "000000182800000000000000" "0200000000000000")
        for name, data, expected in (
                ("CRC32", b"123456789", 0xCBF43926),
                # RFC 3720 section B.4
                ("CRC32C", b"123456789", 0xE3069283),
                ("CRC32C", bytes(32), 0x8A9136AA),
                ("CRC32C", b"\xff" * 32, 0x62A8AB43),
                ("CRC32C", bytes(range(32)), 0x46DD794E),
                ("CRC32C", bytes(range(31, -1, -1)), 0x113FDB5C),
                ("CRC32C", read_pdu, 0xD9963A56),
                # NVM Command Set Specification 1.0d, section 5.2.1.3.5
                ("CRC64NVME", b"123456789", 0xAE8B14860A799888),
                ("CRC64NVME", bytes(4096), 0x6482D367EB22B64E),
                ("CRC64NVME", b"\xff" * 4096, 0xC0DDBA7302ECA3AC),
                ("CRC64NVME", rising, 0x3E729F5F6750449C),
                ("CRC64NVME", rising[::-1], 0x9A2DF64B8E9E517E)):
            with self.subTest(name=name, data=data[:10]):
                self.assertEqual(self.crc(name, data), expected)

    def test_every_length_agrees_with_the_bytewise_definition(self):
        data = random.Random(1).getrandbits(8 * 140001).to_bytes(
            140001, "little")
        lengths = list(range(1200)) + list(range(1200, 140001, 1733))
        lengths += [n + d for n in (4096, 8192, 16384, 32768, 65536, 131072)
                    for d in (-1, 0, 1)]
        for name, width, polynomial in self.ALL:
            expected = bytewise_crcs(width, polynomial, data)
            wrong = [n for n in lengths
                     if self.crc(name, data[:n]) != expected[n]]
            self.assertEqual(wrong, [], name)
            for cut in (0, 1, 7, 500, 33333, 70000, 140001):
                self.assertEqual(self.crc(name, data[:cut], b"", data[cut:]),
                                 expected[-1], (name, cut))
            steps = [data[n:n + 997] for n in range(0, len(data), 997)]
            self.assertEqual(self.crc(name, *steps), expected[-1], name)

    def test_runs_of_one_byte_agree_with_the_bytewise_definition(self):
        for name, width, polynomial in self.ALL:
            for value in (0, 255, 128, 1):
                data = bytes([value]) * 70001
                expected = bytewise_crcs(width, polynomial, data)
                for length in (1, 63, 3000, 65536, 70001):
                    self.assertEqual(self.crc(name, data[:length]),
                                     expected[length], (name, value, length))

    def test_any_buffer_can_be_fed(self):
        data = bytes(range(256)) * 300
        for name, _, _ in self.ALL:
            expected = self.crc(name, data[3:-5])
            for piece in (bytearray(data[3:-5]), memoryview(data)[3:-5]):
                self.assertEqual(self.crc(name, piece), expected, name)

    def test_crc_of_two_parts_is_combined(self):
        pick = random.Random(2)
        for name, _, _ in self.ALL:
            combine = gos3rve.DIGESTS[name].crc.combine
            for _ in range(20):
                data = bytes(pick.getrandbits(8)
                             for _ in range(pick.randrange(3000)))
                cut = pick.randrange(len(data) + 1)
                self.assertEqual(
                    combine(self.crc(name, data[:cut]),
                            self.crc(name, data[cut:]), len(data) - cut),
                    self.crc(name, data), (name, len(data), cut))

    def test_parts_of_terabytes_can_be_combined_in_any_order(self):
        pick = random.Random(3)
        for name, width, _ in self.ALL:
            combine = gos3rve.DIGESTS[name].crc.combine
            for size in (1, 5 << 30, 48 << 40, (1 << 50) - 1):
                a, b, c = (pick.getrandbits(width) for _ in range(3))
                other = pick.randrange(1 << 42)
                self.assertEqual(
                    combine(combine(a, b, other), c, size),
                    combine(a, combine(b, c, size), other + size),
                    (name, size))

    def test_whole_objects_crc_comes_from_its_parts(self):
        data = bytes(range(256)) * 50
        parts = [data[:5000], data[5000:5001], b"", data[5001:]]
        for name, width, _ in self.ALL:
            digests = [(self.crc(name, part).to_bytes(width // 8, "big"),
                        len(part)) for part in parts]
            self.assertEqual(
                gos3rve.combined_crc(name, digests),
                base64.b64encode(self.crc(name, data).to_bytes(
                    width // 8, "big")).decode(), name)


class Checksums(Refusing):

    def test_composite_checksum_is_that_of_the_parts_digests(self):
        # userguide/checking-object-integrity.html, checksum of checksums
        digests = [hashlib.sha256(part).digest() for part in (b"a", b"b")]
        self.assertEqual(
            gos3rve.composite_checksum("SHA256", digests),
            digest64("sha256", b"".join(digests)) + "-2")
        crcs = [zlib.crc32(part).to_bytes(4, "big") for part in (b"a", b"b",
                                                                 b"c")]
        self.assertEqual(gos3rve.composite_checksum("CRC32", crcs),
                         crc64(b"".join(crcs)) + "-3")

    def test_algorithms_are_known_by_any_case(self):
        for name in ("CRC32", "crc32c", "Crc64Nvme", "sha1", "SHA256"):
            self.assertEqual(gos3rve.checksum_algorithm(name), name.upper())
        for name in ("", "CRC", "SHA-256", "sha3"):
            self.refused("InvalidRequest", gos3rve.checksum_algorithm, name)
        self.refused("NotImplemented", gos3rve.checksum_algorithm,
                     "XXHASH64")

    def test_digest_is_strict_base64_of_the_right_size(self):
        self.assertEqual(gos3rve.decode_digest("AAECAw==", 4),
                         b"\0\1\2\3")
        for text in ("", "AAECAw", "AAECAw=", "AAEC Aw==", "AAECAw==\n",
                     "AAECAwQ=", "AAEC", "????", "AAECA\xe9==",
                     "-_ECAw==", "00010203"):
            with self.subTest(text=text):
                self.assertIsNone(gos3rve.decode_digest(text, 4))

    # header -> its value for b"hello"
    HELLO = {
        "content-md5": digest64("md5", b"hello"),
        "x-amz-checksum-sha1": digest64("sha1", b"hello"),
        "x-amz-checksum-sha256": digest64("sha256", b"hello"),
        "x-amz-checksum-crc32": crc64(b"hello"),
        "x-amz-checksum-crc32c": base64.b64encode(
            bytewise_crcs(32, 0x82F63B78, b"hello")[-1].to_bytes(
                4, "big")).decode(),
        "x-amz-checksum-crc64nvme": base64.b64encode(
            bytewise_crcs(64, 0x9A6C9329AC4BC9B5, b"hello")[-1].to_bytes(
                8, "big")).decode()}

    def receive(self, data, headers, payload="UNSIGNED-PAYLOAD", step=2):
        """The verified body of a plain request."""
        return gos3rve.open_body(
            gos3rve.LengthReader(Drip(data, step), len(data)), headers,
            gos3rve.Identity(ALICE, payload)).read_all()

    def test_right_digest_lets_the_body_through(self):
        for name, value in self.HELLO.items():
            with self.subTest(name=name):
                self.assertEqual(self.receive(b"hello", {name: value}),
                                 b"hello")

    def test_wrong_digest_answers_BadDigest(self):
        for name, value in self.HELLO.items():
            for data in (b"hellp", b"", b"hello "):
                with self.subTest(name=name, data=data):
                    self.refused("BadDigest", self.receive, data,
                                 {name: value})

    def test_malformed_digest_is_refused_before_the_body(self):
        for name, value in self.HELLO.items():
            code = "InvalidDigest" if "md5" in name else "InvalidRequest"
            for bad in ("", "x", value[:-1], value + "AAAA",
                        base64.b64decode(value).hex()):
                with self.subTest(name=name, value=bad):
                    self.refused(code, gos3rve.body_claims, {name: bad},
                                 "UNSIGNED-PAYLOAD")

    def test_wrong_payload_hash_answers_XAmzContentSHA256Mismatch(self):
        payload = hashlib.sha256(b"hello").hexdigest()
        self.assertEqual(self.receive(b"hello", {}, payload), b"hello")
        for data in (b"hellp", b""):
            error = self.refused("XAmzContentSHA256Mismatch", self.receive,
                                 data, {}, payload)
            self.assertEqual(
                error.fields["S3ComputedContentSHA256"],
                hashlib.sha256(data).hexdigest())

    def test_all_claims_are_checked(self):
        payload = hashlib.sha256(b"hello").hexdigest()
        names = ("content-md5", "x-amz-checksum-sha256")
        good = {name: self.HELLO[name] for name in names}
        self.assertEqual(self.receive(b"hello", good, payload), b"hello")
        for name, wrong in (("content-md5", digest64("md5", b"x")),
                            ("x-amz-checksum-sha256",
                             digest64("sha256", b"x"))):
            with self.subTest(name=name):
                self.refused("BadDigest", self.receive, b"hello",
                             dict(good, **{name: wrong}), payload)

    def test_one_checksum_header_at_most(self):
        two = {name: self.HELLO[name] for name in (
            "x-amz-checksum-crc32", "x-amz-checksum-sha1")}
        self.refused("InvalidRequest", self.receive, b"hello", two)
        self.refused("InvalidRequest", gos3rve.body_claims, {
            "x-amz-checksum-crc32": self.HELLO["x-amz-checksum-crc32"],
            "x-amz-trailer": "x-amz-checksum-sha1"}, "UNSIGNED-PAYLOAD")

    def test_unknown_checksum_header_is_refused(self):
        for name, code in (("x-amz-checksum-foo", "InvalidRequest"),
                           ("x-amz-checksum-xxhash64", "NotImplemented")):
            self.refused(code, gos3rve.body_claims, {name: "AAAAAA=="},
                         "UNSIGNED-PAYLOAD")
        self.refused("InvalidRequest", gos3rve.body_claims,
                     {"x-amz-sdk-checksum-algorithm": "FOO"},
                     "UNSIGNED-PAYLOAD")

    def test_words_about_checksums_are_no_checksums(self):
        claims, algorithm = gos3rve.body_claims({
            "x-amz-checksum-algorithm": "SHA256",
            "x-amz-checksum-mode": "ENABLED",
            "x-amz-checksum-type": "FULL_OBJECT"}, "UNSIGNED-PAYLOAD")
        self.assertEqual((list(claims), algorithm), ([], None))

    def test_clients_algorithm_is_told(self):
        for name, value in self.HELLO.items():
            _, algorithm = gos3rve.body_claims({name: value},
                                               "UNSIGNED-PAYLOAD")
            self.assertEqual(algorithm, None if "md5" in name
                             else name[15:].upper())


class Bodies(Refusing):

    def body(self, data, length=None, headers=None, step=1):
        """A plain Body of `length` bytes, of which data arrives."""
        length = len(data) if length is None else length
        return gos3rve.open_body(
            gos3rve.LengthReader(Drip(data, step), length), headers or {},
            gos3rve.Identity(ALICE))

    def test_blocks_are_whole_however_the_bytes_arrive(self):
        data = bytes(range(256)) * 5
        for step in (1, 3, 100, 5000):
            for size in (1, 7, 640, 1279, 1280, 1281):
                with self.subTest(step=step, size=size):
                    blocks = list(self.body(data, step=step).blocks(size))
                    self.assertEqual(b"".join(blocks), data)
                    self.assertEqual({len(b) for b in blocks[:-1]},
                                     {size} if blocks[1:] else set())

    def test_bytes_behind_the_body_stay_in_the_source(self):
        source = Drip(b"helloGET / HTTP/1.1", 100)
        body = gos3rve.open_body(gos3rve.LengthReader(source, 5), {},
                                 gos3rve.Identity(ALICE))
        self.assertEqual(body.read_all(), b"hello")
        self.assertEqual(source.readline(100), b"GET / HTTP/1.1")

    def test_body_cut_short_answers_IncompleteBody(self):
        data = b"0123456789"
        for arrived in range(10):
            for size in (1, 4, 10, 100):
                with self.subTest(arrived=arrived, size=size):
                    body = self.body(data[:arrived], 10)
                    self.refused("IncompleteBody", list, body.blocks(size))

    def test_last_block_is_not_seen_before_the_digest_holds(self):
        for size, expected in ((100, b""), (10, b""), (4, b"01234567"),
                               (5, b"01234")):
            body = self.body(b"0123456789", headers={
                "content-md5": digest64("md5", b"other")})
            seen = []

            def take():
                for block in body.blocks(size):
                    seen.append(block)

            with self.subTest(size=size):
                self.refused("BadDigest", take)
                self.assertEqual(b"".join(seen), expected)

    def test_digests_asked_for_are_computed(self):
        body = self.body(b"hello", headers={
            "content-md5": digest64("md5", b"hello")})
        body.want("MD5", None, "SHA1")
        self.assertEqual(body.read_all(), b"hello")
        self.assertEqual(body.digest("MD5"), hashlib.md5(b"hello").digest())
        self.assertEqual(body.digest("SHA1"),
                         hashlib.sha1(b"hello").digest())
        self.assertEqual(body.received, 5)

    def test_empty_body_is_verified_too(self):
        self.assertEqual(self.body(b"").read_all(), b"")
        body = self.body(b"", headers={"content-md5":
                                       digest64("md5", b"x")})
        self.refused("BadDigest", body.read_all)

    def test_document_is_bounded_with_and_without_a_length(self):
        self.assertEqual(self.body(b"12345").read_all(5), b"12345")
        source = Drip(b"123456")
        body = gos3rve.open_body(gos3rve.LengthReader(source, 6), {},
                                 gos3rve.Identity(ALICE))
        self.refused("MaxMessageLengthExceeded", body.read_all, 5)
        self.assertEqual(source.tell(), 0)      # not a byte is asked for
        chunked = gos3rve.ChunkedReader(Drip(b"6\r\n123456\r\n0\r\n\r\n"))
        body = gos3rve.open_body(chunked, {}, gos3rve.Identity(ALICE))
        self.refused("MaxMessageLengthExceeded", body.read_all, 5)


class HttpChunked(Refusing):
    """RFC 9112 section 7.1."""

    GOOD = b"5\r\nhello\r\n0006;a=b;c\r\n world\r\nA\r\n0123456789\r\n0\r\n"

    def receive(self, wire, step=1):
        """The body, and what is left in the source behind it."""
        source = Drip(wire, step)
        body = gos3rve.open_body(gos3rve.ChunkedReader(source), {},
                                 gos3rve.Identity(ALICE))
        return body.read_all(), source.readline(1000)

    def test_chunks_extensions_and_trailers_are_read(self):
        for tail in (b"\r\n", b"a: b\r\nc: d\r\n\r\n"):
            for step in (1, 2, 1000):
                with self.subTest(tail=tail, step=step):
                    self.assertEqual(
                        self.receive(self.GOOD + tail + b"next", step),
                        (b"hello world0123456789", b"next"))
        self.assertEqual(self.receive(b"0\r\n\r\n"), (b"", b""))

    def test_body_cut_anywhere_answers_IncompleteBody(self):
        wire = self.GOOD + b"a: b\r\n\r\n"
        for cut in range(len(wire)):
            with self.subTest(cut=cut):
                self.refused("IncompleteBody", self.receive, wire[:cut])

    def test_damaged_framing_answers_400(self):
        for wire in (b"g\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n",
                     b"+5\r\nhello\r\n0\r\n\r\n",
                     b"0x5\r\nhello\r\n0\r\n\r\n",
                     b" 5\r\nhello\r\n0\r\n\r\n", b"\r\nhello\r\n0\r\n\r\n",
                     b"5_0\r\nhello\r\n0\r\n\r\n",
                     b"5\nhello\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n",
                     b"4\r\nhello\r\n0\r\n\r\n", b"6\r\nhello\r\n0\r\n\r\n",
                     b"7\r\nhello\r\n0\r\n\r\n",
                     b"5\r\nhello0\r\n\r\n", b"f" * 16 + b"\r\nx",
                     b"5;" + b"a" * 100000 + b"\r\nhello\r\n0\r\n\r\n",
                     b"0\r\n" + b"a: b\r\n" * 100000 + b"\r\n",
                     b"f" * 15 + b"\r\nhello"):
            for step in (1, 1000):
                with self.subTest(wire=wire[:30], step=step):
                    with self.assertRaises(S3Error) as caught:
                        self.receive(wire, step)
                    self.assertEqual(caught.exception.status, 400)


class AwsChunked(Refusing):
    """Unsigned chunks with a trailer, as SDKs send them by default."""

    UNSIGNED = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
    CRC = crc64(b"hello world").encode()
    LINE = b"x-amz-checksum-crc32:" + CRC + b"\r\n"
    GOOD = b"5\r\nhello\r\n6\r\n world\r\n0\r\n" + LINE + b"\r\n"
    HEADERS = {"x-amz-decoded-content-length": "11",
               "x-amz-trailer": "x-amz-checksum-crc32",
               "content-encoding": "aws-chunked"}

    def receive(self, wire, step=1, headers=None, length=None, frame=None,
                payload=UNSIGNED):
        """The body that was wrapped in aws-chunked."""
        if frame is None:
            length = len(wire) if length is None else length
            frame = gos3rve.LengthReader(Drip(wire, step), length)
        return gos3rve.open_body(
            frame, self.HEADERS if headers is None else headers,
            gos3rve.Identity(ALICE, payload)).read_all()

    @staticmethod
    def wrapped(wire, size):
        """HTTP chunked around something."""
        return b"".join(b"%x\r\n%s\r\n" % (len(wire[n:n + size]),
                                           wire[n:n + size])
                        for n in range(0, len(wire), size)) + b"0\r\n\r\n"

    def test_body_comes_out_however_it_arrives(self):
        for step in (1, 2, 3, 10, 1000):
            self.assertEqual(self.receive(self.GOOD, step), b"hello world")

    def test_http_chunked_may_wrap_it(self):
        for size in (1, 2, 7, 1000):
            for step in (1, 5, 1000):
                with self.subTest(size=size, step=step):
                    frame = gos3rve.ChunkedReader(Drip(
                        self.wrapped(self.GOOD, size), step))
                    self.assertEqual(self.receive(b"", frame=frame),
                                     b"hello world")

    def test_http_chunked_around_it_is_read_to_its_end(self):
        # else the connection cannot take the next request
        for size in (7, 1000):
            frame = gos3rve.ChunkedReader(Drip(
                self.wrapped(self.GOOD, size), 1000))
            self.receive(b"", frame=frame)
            self.assertEqual((size, frame.left), (size, 0))

    def test_content_length_around_it_is_read_to_its_end(self):
        for step in (1, 1000):
            frame = gos3rve.LengthReader(Drip(self.GOOD, step),
                                         len(self.GOOD))
            self.receive(b"", frame=frame)
            self.assertEqual(frame.left, 0)

    def test_decoded_length_may_be_unknown(self):
        headers = dict(self.HEADERS)
        del headers["x-amz-decoded-content-length"]
        self.assertEqual(self.receive(self.GOOD, headers=headers),
                         b"hello world")

    def test_empty_body(self):
        wire = b"0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
        self.assertEqual(self.receive(wire, headers=dict(
            self.HEADERS, **{"x-amz-decoded-content-length": "0"})), b"")

    def test_large_chunks_come_out_whole(self):
        data = bytes(range(256)) * 2048
        wire = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (
            data[:300000], data[300000:])) + b"0\r\n\r\n"
        self.assertEqual(self.receive(wire, 65536, headers={
            "x-amz-decoded-content-length": str(len(data))}), data)

    def test_unsigned_payload_with_a_decoded_length_is_decoded_too(self):
        self.assertEqual(self.receive(self.GOOD, payload="UNSIGNED-PAYLOAD"),
                         b"hello world")

    def test_every_checksum_can_be_in_the_trailer(self):
        for name, value in Checksums.HELLO.items():
            if name == "content-md5":
                continue
            headers = {"x-amz-trailer": name,
                       "x-amz-decoded-content-length": "5"}
            for sent, code in ((value, None),
                               ("A" + value[1:], "BadDigest"),
                               ("B" + value[1:], "BadDigest")):
                wire = b"5\r\nhello\r\n0\r\n%s: %s \r\n\r\n" % (
                    name.title().encode(), sent.encode())
                if code is None or sent == value:
                    self.assertEqual(self.receive(wire, headers=headers),
                                     b"hello")
                else:
                    self.refused(code, self.receive, wire, headers=headers)

    def test_body_cut_anywhere_is_refused(self):
        for cut in range(len(self.GOOD)):
            with self.subTest(cut=cut):
                self.refused("IncompleteBody", self.receive,
                             self.GOOD[:cut], length=len(self.GOOD))

    def test_body_that_ends_early_within_its_length_is_refused(self):
        # some SDKs leave the empty line at the very end away
        for cut in range(len(self.GOOD) - 4):
            with self.subTest(cut=cut):
                with self.assertRaises(S3Error) as caught:
                    self.receive(self.GOOD[:cut])
                self.assertEqual(caught.exception.status, 400)

    def test_http_chunks_that_end_early_are_refused(self):
        for cut in range(len(self.GOOD) - 4):
            with self.subTest(cut=cut):
                frame = gos3rve.ChunkedReader(Drip(
                    self.wrapped(self.GOOD[:cut], 9)))
                self.assertRaises(S3Error, self.receive, b"", frame=frame)

    def test_wrong_decoded_length_answers_IncompleteBody(self):
        for length in ("0", "1", "5", "10", "12", "1000"):
            with self.subTest(length=length):
                self.refused("IncompleteBody", self.receive, self.GOOD,
                             headers=dict(self.HEADERS, **{
                                 "x-amz-decoded-content-length": length}))

    def test_decoded_length_that_is_no_number_is_refused(self):
        for length in ("", "-1", "x", "1.5", "\u0661", "11, 11"):
            with self.subTest(length=length):
                with self.assertRaises(S3Error) as caught:
                    self.receive(self.GOOD, headers=dict(
                        self.HEADERS,
                        **{"x-amz-decoded-content-length": length}))
                self.assertEqual(caught.exception.status, 400)

    def test_damaged_framing_answers_400(self):
        for old, new in (
                (b"5\r\nh", b"4\r\nh"), (b"5\r\nh", b"6\r\nh"),
                (b"5\r\nh", b"7\r\nh"), (b"5\r\nh", b"8\r\nh"),
                (b"5\r\nh", b"g\r\nh"), (b"5\r\nh", b"-5\r\nh"),
                (b"5\r\nh", b"+5\r\nh"), (b"5\r\nh", b"0x5\r\nh"),
                (b"5\r\nh", b"\r\nh"), (b"5\r\nh", b"5\nh"),
                (b"5\r\nh", b"0\r\n\r\n5\r\nh"),
                (b"5\r\nh", b"f" * 15 + b"\r\nh"),
                (b"5\r\nh", b"f" * 16 + b"\r\nh"),
                (b"5\r\nh", b"5" + b" " * 100000 + b"\r\nh"),
                (b"hello\r\n", b"hello"), (b"hello\r\n", b"hello\n"),
                (b"0\r\nx", b"x"), (b"0\r\nx", b"00000000000000000\r\nx"),
                (b"x-amz-checksum-crc32:", b"x-amz-checksum-crc32"),
                (b"x-amz-checksum-crc32:", b"x-amz-checksum-sha1:"),
                (b"x-amz-checksum-crc32:", b"a" * 100000 + b":"),
                (self.LINE, b""), (self.LINE, b"x-amz-checksum-crc32:\r\n"),
                (self.LINE, b"x-amz-checksum-crc32:AAAA\r\n"),
                (self.LINE, b"x-amz-checksum-crc32:AAAAAA==\r\n"),
                (self.LINE, self.LINE[:-3] + b"\r\n"),
                (self.LINE, self.LINE[:-2] + b" " * 100000 + b"\r\n")):
            wire = self.GOOD.replace(old, new, 1)
            self.assertNotEqual(wire, self.GOOD)
            for step in (1, 1000):
                with self.subTest(old=old, new=new[:30], step=step):
                    with self.assertRaises(S3Error) as caught:
                        self.receive(wire, step)
                    self.assertEqual(caught.exception.status, 400)

    def test_missing_trailer_answers_MalformedTrailerError(self):
        self.refused("MalformedTrailerError", self.receive,
                     self.GOOD.replace(self.LINE, b""))

    def test_trailer_without_end_is_bounded(self):
        endless = self.GOOD[:-2] + b"a: b\r\n" * 100000 + b"\r\n"
        self.assertRaises(S3Error, self.receive, endless, 1000)


class SignedChunks(Signing):
    """Chunks under a chain of signatures that the test makes itself."""

    PLAIN = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"

    def setUp(self):
        headers = {"x-amz-decoded-content-length": "10"}
        self.request = self.signed("PUT", headers=headers,
                                   payload=self.PLAIN)
        self.seed = self.request.headers["authorization"][-64:]
        parts = self.parts = []
        for data in (b"01234", b"56789", b""):
            parts.append((data, self.chunk_signature(data)))

    def chunk_signature(self, data):
        """The signature of the chunk after those in self.parts."""
        previous = self.parts[-1][1] if self.parts else self.seed
        text = "\n".join((
            "AWS4-HMAC-SHA256-PAYLOAD", amz_date(MAY_24),
            "20130524/us-east-1/s3/aws4_request", previous,
            hashlib.sha256(b"").hexdigest(),
            hashlib.sha256(data).hexdigest()))
        return hmac.new(v4_key(ALICE.secret, "20130524"), text.encode(),
                        hashlib.sha256).hexdigest()

    def receive(self, parts, step=1):
        """The body made of (data, signature) chunks."""
        wire = b"".join(b"%x;chunk-signature=%s\r\n%s\r\n" % (
            len(data), signature.encode(), data)
            for data, signature in parts)
        return self.receive_wire(wire, step)

    def receive_wire(self, wire, step=1):
        """The body of bytes on the wire."""
        identity = gos3rve.authenticate(self.request, ACCOUNTS, MAY_24)
        frame = gos3rve.LengthReader(Drip(wire, step), len(wire))
        return gos3rve.open_body(frame, self.request.headers,
                                 identity).read_all()

    def test_chain_of_signatures_holds(self):
        for step in (1, 100, 1000):
            self.assertEqual(self.receive(self.parts, step), b"0123456789")

    def test_broken_chain_answers_SignatureDoesNotMatch(self):
        first, second, last = self.parts
        zeros = "0" * 64
        for name, parts in (
                ("swapped", [second, first, last]),
                ("replayed", [first, first, last]),
                ("dropped", [second, last]),
                ("changed", [(b"01235", first[1]), second, last]),
                ("merged", [(b"0123456789", first[1]), last]),
                ("forged", [first, (b"56789", zeros), last]),
                ("end forged", [first, second, (b"", zeros)]),
                ("empty", [first, (b"56789", ""), last]),
                ("not ascii", [first, (b"56789", "\xe9" * 64), last]),
                ("upper case", [(b"01234", first[1].upper()), second, last]),
                ("end early", [first, (b"", second[1])])):
            with self.subTest(name):
                error = self.refused("SignatureDoesNotMatch", self.receive,
                                     parts)
                self.assertEqual(error.status, 403)

    def test_chunk_without_a_signature_is_refused(self):
        for wire in (b"a\r\n0123456789\r\n0\r\n\r\n",
                     b"a;x=y\r\n0123456789\r\n0\r\n\r\n",
                     b"a;chunk-signature\r\n0123456789\r\n0\r\n\r\n"):
            with self.subTest(wire=wire):
                self.assertRaises(S3Error, self.receive_wire, wire)

    def test_chunks_without_an_end_are_refused(self):
        self.refused("IncompleteBody", self.receive, self.parts[:2])
        self.refused("IncompleteBody", self.receive, self.parts[:1])
        self.refused("IncompleteBody", self.receive, [])

###############################################################################
# 6. Storage
###############################################################################
#
# The Store without HTTP: keys as files, listings against a model, a shell
# beside the server, cut-off writes, threads and processes.  What records
# do is tried with extended attributes, with sidecars, and with a record
# that no attribute can hold.

ANY = gos3rve.WriteConditions()
ABSENT = gos3rve.WriteConditions(if_none_match=True)
FUTURE = 10 ** 7                    # seconds: nothing is fresh any more
LONG = "/".join(["long" * 25] * 10)[:1000] + "/" + "e" * 23
ODD_KEYS = ("..", ".", "../../etc/passwd", "a/../b", "a/./b", "./a", "a//b",
            "//", "/", "/a", "//a", "a//", "dir/", "dir/sub/", "s" * 600,
            "d/" + "s" * 256, "\u00e9" * 512, "x\0y", "\0", ".gos3rve",
            ".gos3rvex", "x/.gos3rve/y", "x/.GOS3RVE-keys.json",
            ".gos3rve/x", ".gos3rve/bucket.json", ".gos3rve/locks/00",
            ".GOS3RVE/x", "q" * 1023 + "/", "\U0001f600" * 250 + "//")
NATURAL_KEYS = ("a", "b/c", "a%2Fb", "%00", "%", "+", "a b", " ", "~",
                "'quoted'", '"quoted"', "&<>", "\\", "a\nb", "\x01", "\x7f",
                "\U0001f600", "caf\u00e9", "cafe\u0301", "\ufffe", "...",
                "..a", ".hidden", ".gos3rv/e", "x/gos3rve/y", "*?[]", LONG,
                "n" * 255, "\u00e9" * 127, "deep/" * 200 + "x", "k%2Fx",
                "con", "nul.txt", "-rf", "\U0010ffff", "\ue000")


def has_xattrs(directory):
    """True when files there can have the attribute that records use."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            os.setxattr(file.fileno(), gos3rve.XATTR, b"{}")
        return True
    except (OSError, AttributeError):
        return False


def open_files():
    """How many descriptors this process has open; 0 where none can tell."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


# These tests make and remove some 100,000 files: in memory, if that will do.
MEMORY = "/dev/shm" if has_xattrs("/dev/shm") else None
HAVE_XATTRS = has_xattrs(MEMORY)


def md5_hex(data):
    """An ETag as S3 makes it of a plain PUT."""
    return hashlib.md5(data).hexdigest()


def in_order(keys):
    """S3's order: that of the UTF-8 bytes."""
    return sorted(keys, key=str.encode)


def by_hand(path, data=b"by hand"):
    """A file as a shell would write it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def open_and_read(path):
    """The content of a file."""
    with open(path, "rb") as file:
        return file.read()


def files_below(path):
    """The files of a tree, by their relative paths, links not followed."""
    return sorted(os.path.relpath(os.path.join(at, name), path)
                  for at, _, names in os.walk(path) for name in names)


def bound(call, *args):
    """The call of a function with these arguments."""
    return lambda: call(*args)


def run_threads(*calls):
    """Run calls at the same time; [result or exception] in their order."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait(30)
        try:
            return call()
        except Exception as error:
            return error
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


class StorageCase(unittest.TestCase):
    """A Store with the bucket `box`.  Subclasses choose where records go;
    a model is a dict of key -> content, and every content is unique."""

    xattrs, padding = True, 0

    def setUp(self):
        self.reports = []
        path = tempfile.mkdtemp(prefix="test-gos3rve-", dir=MEMORY)
        self.addCleanup(shutil.rmtree, path, ignore_errors=True)
        self.start(path)

    def start(self, directory, **options):
        """A new directory, store and bucket."""
        self.directory = directory
        self.buckets = os.path.join(directory, "buckets")
        self.uploads = os.path.join(directory, "uploads")
        self.restart(**options)
        self.bucket = self.store.create_bucket("box", "alice", "us-east-1")

    def restart(self, **options):
        """The same directory in a process that knows nothing yet."""
        self.store = Store(self.buckets, self.uploads, xattrs=self.xattrs,
                           report=self.reports.append, **options)
        if os.path.isdir(self.path()):
            self.bucket = self.store.bucket("box")

    def path(self, *parts):
        """A path in the directory of bucket `box`."""
        return os.path.join(self.buckets, "box", *parts)

    def record(self, data):
        """A record as an operation makes it."""
        meta = {"md5": md5_hex(data)}
        if self.padding:
            meta["pad"] = "x" * self.padding
        return {"etag": md5_hex(data), "meta": meta,
                "headers": {"content-type": "text/x-test"}}

    def put(self, key, data, conditions=ANY, bucket=None, store=None):
        """Put an object; its Info."""
        bucket = bucket or self.bucket
        with bucket.draft() as draft:
            draft.write(data)
            return (store or self.store).put_object(
                bucket, key, draft, self.record(data), conditions)

    def copy(self, source, key):
        """Copy an object with its record, as CopyObject does."""
        info, fd = self.bucket.open(source)
        try:
            with self.bucket.draft() as draft:
                draft.copy(fd, 0, info.size)
                self.store.put_object(self.bucket, key, draft,
                                      dict(info.record), ANY)
        finally:
            os.close(fd)

    def rename(self, source, key, conditions=ANY):
        """Rename an object."""
        self.store.rename_object(self.bucket, source, key,
                                 lambda info: None, conditions)

    def delete(self, key):
        """Delete an object."""
        return self.store.delete_object(self.bucket, key).existed

    def read(self, key):
        """(Info, content) of an object."""
        info, fd = self.bucket.open(key)
        with os.fdopen(fd, "rb") as file:
            return info, file.read()

    def page(self, **query):
        """All entries of a listing, in one page."""
        return self.store.list_objects(
            self.bucket, **dict({"limit": 10 ** 6}, **query)).entries

    def keys(self, **query):
        """The keys of a listing."""
        return [entry.key for entry in self.page(**query)]

    def sweep(self, ttl=0, later=FUTURE, grace=0):
        """A sweep that takes nothing for fresh."""
        return self.store.sweep(ttl, time.time() + later, grace)

    def verify(self, model):
        """Assert that listing, find and open tell of exactly the model."""
        entries = self.page()
        self.assertEqual([entry.key for entry in entries], in_order(model))
        for entry in entries:
            info, data = self.read(entry.key)
            self.assertEqual(data, model[entry.key], entry.key)
            for told in (entry, info, self.bucket.find(entry.key)):
                self.assertEqual(
                    (told.key, told.size, told.etag,
                     told.record["meta"]["md5"]),
                    (entry.key, len(data), md5_hex(data), md5_hex(data)))

    def assert_refused(self, code, call, *args, **named):
        """Assert an S3Error of this code."""
        with self.assertRaises(S3Error) as caught:
            call(*args, **named)
        self.assertEqual(caught.exception.code, code)

    def assert_clean(self, sidecars=0):
        """Assert that no draft is left, and at most so many sidecars."""
        left = [name for name in files_below(self.path(gos3rve.STATE))
                if not name.startswith(("locks", "odd", "meta", "bucket."))]
        self.assertEqual(left, [])
        meta = self.path(gos3rve.STATE, "meta")
        names = os.listdir(meta) if os.path.isdir(meta) else []
        self.assertLessEqual(len(names), sidecars, names)
        self.assertEqual([name for name in os.listdir(self.buckets)
                          if name.startswith(".")], [])


# --- keys and paths ---

class KeyNames(unittest.TestCase):
    """is_natural and odd_name, alone."""

    @unittest.skipIf(os.name == "nt", "more names are odd there")
    def test_natural_keys_are_paths(self):
        for key in NATURAL_KEYS:
            with self.subTest(key=key[:40]):
                self.assertTrue(gos3rve.is_natural(key))
                self.assertLessEqual(len(key.encode()), 1024)

    def test_all_other_keys_are_odd(self):
        for key in ODD_KEYS + ("",):
            with self.subTest(key=key[:40]):
                self.assertFalse(gos3rve.is_natural(key))
                self.assertLessEqual(len(key.encode()), 1024)

    def test_every_odd_name_is_one_short_file_name_of_its_own(self):
        keys = set(ODD_KEYS + NATURAL_KEYS)
        keys.update(quote(key, "") for key in ODD_KEYS)
        names = {gos3rve.odd_name(key) for key in keys}
        self.assertEqual(len(names), len(keys))
        for name in names:
            self.assertRegex(name, r"\A[A-Za-z0-9][A-Za-z0-9%._~-]*\Z")
            self.assertLessEqual(len(name), 255)


class Keys(StorageCase):
    """Every key S3 allows can be stored, and none touches another."""

    def test_natural_key_is_a_plain_file_at_its_path(self):
        for number, key in enumerate(NATURAL_KEYS):
            with self.subTest(key=key[:40]):
                self.put(key, b"%d" % number)
                with open(self.path(key), "rb") as file:
                    self.assertEqual(file.read(), b"%d" % number)

    def test_odd_key_leaves_no_trace_outside_the_state_directory(self):
        for key in ODD_KEYS:
            with self.subTest(key=key[:40]):
                self.put(key, key.encode())
        outside = [name for name in files_below(self.directory)
                   if not name.startswith("buckets/box/.gos3rve/")]
        self.assertEqual(outside, [])
        self.assertEqual(self.bucket.owner, "alice")

    def test_all_keys_are_stored_listed_copied_renamed_and_removed(self):
        model = {key: b"of " + key.encode()
                 for key in ODD_KEYS + NATURAL_KEYS}
        keys = list(model)
        random.Random(1).shuffle(keys)
        for key in keys:
            self.put(key, model[key])
        self.verify(model)
        self.restart()
        self.verify(model)
        for key in keys[::3]:
            other = "copy/" + key if len(key) < 400 else key[:-1]
            self.copy(key, other)
            model[other] = model[key]
        self.verify(model)
        for key in keys[1::3]:
            other = "new//" + key if len(key) < 400 else "r" + key[1:-1]
            self.rename(key, other)
            model[other] = model.pop(key)
        self.verify(model)
        for key in list(model):
            self.assertTrue(self.delete(key))
            self.assertIsNone(self.bucket.find(key))
        self.verify({})
        self.assertEqual(os.listdir(self.path()), [gos3rve.STATE])
        self.assert_clean()
        self.store.delete_bucket(self.bucket)

    def test_a_beside_a_slash_and_below_in_every_order(self):
        names = ("a", "a/", "a/b")
        orders = [(x, y, z) for x in names for y in names for z in names
                  if len({x, y, z}) == 3]
        for coming in orders:
            for going in orders:
                with self.subTest(coming=coming, going=going):
                    self._come_and_go(coming, going)

    def _come_and_go(self, coming, going):
        model = {}
        for key in coming:
            model[key] = ("%s of %s" % (key, coming)).encode()
            self.put(key, model[key])
            self.verify(model)
        for key in going:
            del model[key]
            self.assertTrue(self.delete(key))
            self.verify(model)
        self.assertEqual(os.listdir(self.path()), [gos3rve.STATE])

    def test_random_puts_renames_and_deletes_change_nothing_else(self):
        chance = random.Random(2)
        keys = ["a", "a/", "a/b", "a/b/", "a/b/c", "a/b/c/" + "s" * 300,
                "a/b//", "a//", "b", "/", "a/" + "t" * 300, "\0" * 200]
        model = {}
        for number in range(160):
            key, data = chance.choice(keys), b"%d" % number
            if chance.random() < 0.45:
                self.put(key, data)
                model[key] = data
            elif chance.random() < 0.5:
                self.assertEqual(self.delete(key), key in model)
                model.pop(key, None)
            elif model:
                source = chance.choice(sorted(model))
                self.rename(source, key)
                model[key] = model.pop(source)
            self.verify(model)
        self.sweep()
        self.verify(model)
        self.assert_clean(len(model))

    def test_file_in_the_way_keeps_its_content_and_record(self):
        by_hand(self.path("x"), b"plain")
        self.put("y", b"put")
        self.put("x/1/2", b"below x")
        self.put("y/1", b"below y")
        self.assertEqual(self.keys(), ["x", "x/1/2", "y", "y/1"])
        self.assertEqual(self.read("x")[1], b"plain")
        self.assertEqual(self.read("y")[0].record["headers"],
                         {"content-type": "text/x-test"})
        self.assertEqual(self.read("y")[0].etag, md5_hex(b"put"))

    def test_long_key_in_the_way_is_still_listed(self):
        key = "\U0001f600" * 60 + "/" + "\U0001f601" * 60
        model = {key: b"1", key + "/x": b"2"}
        for name in model:
            self.put(name, model[name])
        self.verify(model)
        self.restart()
        self.verify(model)

    def test_directory_goes_with_its_last_object(self):
        self.put("d/e/f", b"1")
        self.put("d/g", b"2")
        self.delete("d/e/f")
        self.assertEqual(sorted(os.listdir(self.path())),
                         [gos3rve.STATE, "d"])
        self.assertEqual(os.listdir(self.path("d")), ["g"])
        self.rename("d/g", "h")
        self.assertEqual(sorted(os.listdir(self.path())),
                         [gos3rve.STATE, "h"])

    def test_key_with_a_slash_at_its_end_makes_the_directory(self):
        self.put("d/e/", b"")
        self.assertTrue(os.path.isdir(self.path("d", "e")))
        self.put("d/e/f", b"1")
        self.delete("d/e/f")
        self.assertTrue(os.path.isdir(self.path("d", "e")))
        self.delete("d/e/")
        self.assertEqual(os.listdir(self.path()), [gos3rve.STATE])

    def test_empty_directory_is_no_object(self):
        os.makedirs(self.path("empty", "below"))
        self.assertEqual(self.keys(), [])
        self.assertEqual(self.keys(delimiter="/"), [])
        for key in ("empty", "empty/", "empty/below"):
            self.assertIsNone(self.bucket.find(key))
            self.assert_refused("NoSuchKey", self.bucket.open, key)
            self.assertFalse(self.delete(key))

    def test_rename_to_a_name_above_and_below(self):
        for source, key in (("a/b/c", "a/b"), ("a/b/c", "a"), ("a", "a/b"),
                            ("a/b", "a/b/c/d"), ("a/", "a"), ("a", "a/"),
                            ("a/b/", "a/b/c"), ("a/b/c", "a/b/")):
            with self.subTest(source=source, key=key):
                self.put(source, b"1")
                self.put("a/other", b"2")
                self.rename(source, key)
                self.verify({key: b"1", "a/other": b"2"})
            for name in (source, key, "a/other"):
                self.delete(name)
            self.assertEqual(os.listdir(self.path()), [gos3rve.STATE])

    def test_rename_needs_a_source_and_replaces_the_target(self):
        self.assert_refused("NoSuchKey", self.rename, "none", "b")
        self.put("a", b"1")
        self.put("b", b"2")
        self.rename("a", "b")
        self.verify({"b": b"1"})
        self.assert_refused("NoSuchKey", self.rename, "a", "c")
        self.put("a", b"3")
        self.assert_refused("PreconditionFailed", self.rename, "a", "b",
                            ABSENT)
        self.verify({"a": b"3", "b": b"1"})

    def test_overwritten_object_has_the_new_record_only(self):
        for number in range(5):
            for key in ("k", "odd/", "h" * 300):
                self.put(key, b"%d" % number)
        self.verify({"k": b"4", "odd/": b"4", "h" * 300: b"4"})
        self.sweep()
        self.verify({"k": b"4", "odd/": b"4", "h" * 300: b"4"})
        self.assert_clean(3)


class KeysWithSidecars(Keys):
    """The same where the file system has no extended attributes."""

    xattrs = False


class KeysWithLargeRecords(Keys):
    """The same with records that no extended attribute can hold."""

    padding = 70000                 # Linux: XATTR_SIZE_MAX is 65536

    def record(self, data):
        """Only some records are large: each goes where it fits."""
        record = super().record(data)
        if len(data) % 2:
            record["meta"].pop("pad")
        return record


# --- records and a shell beside the server ---

class Shell(StorageCase):
    """Whatever a shell does between two calls, the next tells the truth."""

    def age(self, seconds=100):
        """Make every directory old, so that listings of it are kept."""
        self.aged = getattr(self, "aged", 0) + 1
        when = time.time() - seconds + self.aged / 64
        for path, _, _ in os.walk(self.path()):
            os.utime(path, (when, when))
        return when

    def keeps_xattrs(self):
        """True when a file takes its record along."""
        return HAVE_XATTRS and self.xattrs and not self.padding

    def truth(self, known):
        """Assert that all calls tell what lies on the disk; key -> ETag.
        `known`: the keys whose content is as S3 put it."""
        disk = {}
        for name in files_below(self.path()):
            if not name.startswith(gos3rve.STATE):
                with open(self.path(name), "rb") as file:
                    disk[name] = file.read()
        entries = {entry.key: entry for entry in self.page()}
        self.assertEqual(list(entries), in_order(disk))
        for key, data in disk.items():
            info, read = self.read(key)
            self.assertEqual(read, data)
            found = self.bucket.find(key)
            self.assertEqual({(told.size, told.mtime_ns, told.etag)
                              for told in (entries[key], info, found)},
                             {(len(data), os.stat(self.path(
                                 key)).st_mtime_ns, found.etag)})
            if key in known:
                self.assertEqual(found.etag, md5_hex(data))
            else:
                self.assertRegex(found.etag, r"\A[0-9a-f]{32}-[0-9]+\Z")
        self.age()
        return {key: entry.etag for key, entry in entries.items()}

    def test_file_added_is_an_object(self):
        self.truth(())
        by_hand(self.path("new"))
        self.truth(())
        by_hand(self.path("d", "e", "new"))
        self.truth(())
        by_hand(self.path("d", "e", "newer"), b"")
        self.truth(())

    def test_file_edited_loses_its_etag_and_keeps_its_headers(self):
        for name, edit in (("append", "ab"), ("overwrite", "r+b"),
                           ("truncate", "wb")):
            self.put(name, b"0123456789")
            before = self.truth({name})[name]
            with open(self.path(name), edit) as file:
                file.write(b"9876543210" if edit != "wb" else b"")
            self.assertNotEqual(self.truth(())[name], before)
            self.assertEqual(self.read(name)[0].record["headers"],
                             {"content-type": "text/x-test"})
            self.assertNotIn("etag", self.read(name)[0].record)
            os.unlink(self.path(name))

    def test_file_edited_twice_has_two_etags(self):
        by_hand(self.path("f"), b"1")
        seen = set()
        for number in range(5):
            with open(self.path("f"), "r+b") as file:
                file.write(b"%d" % number)
            os.utime(self.path("f"), ns=(1, 10 ** 18 + number))
            seen.add(self.truth(())["f"])
        self.assertEqual(len(seen), 5)

    def test_file_renamed_and_deleted(self):
        self.put("a/x", b"x")
        self.put("a/y", b"y")
        self.truth({"a/x", "a/y"})
        os.rename(self.path("a/x"), self.path("z"))
        moved = {"z"} if self.keeps_xattrs() else set()
        self.truth({"a/y"} | moved)
        os.rename(self.path("a"), self.path("b"))
        if moved:
            moved.add("b/y")
        self.truth(moved)
        os.unlink(self.path("z"))
        self.truth(moved)
        shutil.rmtree(self.path("b"))
        self.truth(())
        self.assertEqual(self.keys(), [])

    def test_file_replaced_by_a_directory_and_back(self):
        self.put("a", b"1")
        self.truth({"a"})
        os.unlink(self.path("a"))
        by_hand(self.path("a", "b"))
        self.truth(())
        self.assertIsNone(self.bucket.find("a"))
        shutil.rmtree(self.path("a"))
        by_hand(self.path("a"))
        self.truth(())

    def test_another_file_moved_over_an_object_has_its_own_etag(self):
        self.put("a", b"12345")
        self.put("b", b"54321")
        by_hand(self.path("c"), b"abcde")
        when = os.stat(self.path("a"))
        os.utime(self.path("c"), ns=(when.st_mtime_ns, when.st_mtime_ns))
        self.truth({"a", "b"})
        os.replace(self.path("c"), self.path("a"))
        self.truth({"b"})
        os.replace(self.path("b"), self.path("a"))
        self.truth({"a"} if self.keeps_xattrs() else ())

    def test_file_added_shows_though_the_directory_keeps_its_time(self):
        """tar, rsync -a and cp -a set a directory's time afterwards."""
        by_hand(self.path("d", "old"))
        when = self.age()
        self.assertEqual(self.keys(), ["d/old"])
        self.assertEqual(self.keys(), ["d/old"])
        by_hand(self.path("d", "new"))
        os.utime(self.path("d"), (when, when))
        self.assertEqual(self.keys(), ["d/new", "d/old"])

    def test_other_process_is_seen(self):
        other = Store(self.buckets, self.uploads, xattrs=self.xattrs)
        model = {}
        for number, key in enumerate(("a", "a/b", "a/", "d/e", "a")):
            model[key] = b"%d" % number
            self.put(key, model[key], bucket=other.bucket("box"),
                     store=other)
            self.verify(model)
            self.age()
            self.verify(model)
        for key in list(model):
            other.delete_object(other.bucket("box"), key)
            del model[key]
            self.verify(model)
            self.age()
            self.verify(model)

    def test_bucket_replaced_by_another_directory(self):
        self.put("a", b"1")
        self.assertEqual(self.keys(), ["a"])
        os.rename(self.path(), os.path.join(self.buckets, "old"))
        self.assert_refused("NoSuchBucket", self.store.bucket, "box")
        by_hand(self.path("b"))
        self.bucket = self.store.bucket("box")
        self.assertIsNone(self.bucket.owner)
        self.assertEqual(self.keys(), ["b"])
        self.bucket = self.store.bucket("old")
        self.assertEqual((self.bucket.owner, self.keys()), ("alice", ["a"]))


class ShellWithSidecars(Shell):
    """The same where the file system has no extended attributes."""

    xattrs = False


class ShellWithLargeRecords(Shell):
    """The same with records that no extended attribute can hold."""

    padding = 70000


class DamagedRecords(StorageCase):
    """A record that cannot be read is reported, and taken as absent."""

    DAMAGE = (b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0" * 50, b"7",
              b'{"size": "1"}', b'{"etag": 5}', b'{"headers": []}',
              b'{"meta": "x"}', b"[" * 3000, b'{"a":' * 700)

    def damage(self, data):
        """Overwrite the record of object `k`."""
        if self.xattrs and HAVE_XATTRS:
            os.setxattr(self.path("k"), gos3rve.XATTR, data)
            return
        meta = self.path(gos3rve.STATE, "meta")
        name, = os.listdir(meta)
        by_hand(os.path.join(meta, name), data)

    def test_damaged_record_of_an_object(self):
        for data in self.DAMAGE:
            with self.subTest(data=data[:20]):
                self.put("k", b"content")
                self.damage(data)
                del self.reports[:]
                info, content = self.read("k")
                self.assertEqual(content, b"content")
                self.assertEqual(info.record, {})
                self.assertEqual(info.etag[-2:], "-0")
                self.assertEqual(self.page()[0].etag, info.etag)
                self.assertIn("box/k", "".join(self.reports))

    def test_damaged_record_of_a_bucket(self):
        path = self.path(gos3rve.STATE, "bucket.json")
        self.put("k", b"content")
        for data in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100000):
            with self.subTest(data=data[:20]):
                by_hand(path + "-", data)
                os.replace(path + "-", path)
                del self.reports[:]
                self.assertIsNone(self.bucket.owner)
                self.assertEqual(self.bucket.region, "us-east-1")
                self.assertGreater(self.bucket.created_ns, 0)
                self.assertIn("bucket.json", "".join(self.reports))
                self.assertEqual(self.read("k")[1], b"content")
        self.assertEqual([b.name for b in self.store.list_buckets()],
                         ["box"])

    def test_damaged_upload_is_no_upload(self):
        for data in (b"", b"{", b"[]", b"{}", b'{"key": 1}', b"\xff",
                     b'{"key": "k", "initiated_ns": "x"}', b"[" * 100000,
                     b'{"key": "k", "initiated_ns": 1, "sse": {}}',
                     b'{"key": "k", "initiated_ns": 1, "sse": null}'):
            with self.subTest(data=data[:20]):
                upload_id = self.store.create_upload(self.bucket, "k", {})
                by_hand(os.path.join(self.uploads, "box", upload_id,
                                     "upload.json"), data)
                self.assert_refused("NoSuchUpload", self.store.upload,
                                    self.bucket, "k", upload_id)
                self.assertEqual(self.store.list_uploads(self.bucket), [])


class DamagedSidecars(DamagedRecords):
    """The same where the file system has no extended attributes."""

    xattrs = False


# --- what is no file of the bucket ---

@unittest.skipIf(os.name == "nt", "needs symlinks, FIFOs and sockets")
class Strangers(StorageCase):
    """Symlinks, FIFOs, sockets and names that are no UTF-8."""

    def setUp(self):
        super().setUp()
        self.outside = os.path.join(self.directory, "outside")
        by_hand(os.path.join(self.outside, "secret"), b"secret")
        self.put("real/x", b"1")

    def link(self, target, *name):
        """Make a symlink in the bucket."""
        os.symlink(target, self.path(*name))

    def test_link_inside_is_served(self):
        self.link("real", "link")
        self.link("real/x", "file")
        self.assertEqual(self.keys(), ["file", "link/x", "real/x"])
        for key in self.keys():
            self.assertEqual(self.read(key)[1], b"1")
        self.assertEqual(self.keys(prefix="link/"), ["link/x"])
        by_hand(self.path("real", "y"))
        self.assertIn("link/y", self.keys())
        self.put("link/z", b"3")
        self.assertEqual(self.read("real/z")[1], b"3")
        self.delete("file")
        self.assertEqual(self.read("real/x")[1], b"1")

    def test_link_outside_is_neither_read_nor_listed(self):
        self.link(self.outside, "out")
        self.link(os.path.join(self.outside, "secret"), "file")
        self.link("../../outside/secret", "real", "up")
        self.link("/", "root")
        self.link("..", "real", "above")
        self.link(gos3rve.STATE + "/bucket.json", "state")
        self.link(gos3rve.STATE, "states")
        self.assertEqual(self.keys(), ["real/x"])
        for key in ("out/secret", "file", "real/up", "root/etc/passwd",
                    "root/etc/hostname", "state", "states/bucket.json",
                    "real/above/box/real/x"):
            with self.subTest(key=key):
                self.assertIsNone(self.bucket.find(key))
                self.assert_refused("NoSuchKey", self.bucket.open, key)
                self.assertFalse(self.delete(key))
                self.assertEqual(
                    self.keys(prefix=key.rpartition("/")[0] + "/")
                    if not key.startswith("real/u") and "/" in key else [],
                    [])

    def test_link_outside_is_never_written_through(self):
        self.link(self.outside, "out")
        self.link(os.path.join(self.outside, "secret"), "file")
        self.link(os.path.join(self.directory, "nowhere"), "dangling")
        for key in ("out/secret", "out/new", "out/d/e", "dangling/x"):
            with self.subTest(key=key):
                self.assert_refused("AccessDenied", self.put, key, b"2")
        self.put("file", b"3")
        self.assertEqual(self.read("file")[1], b"3")
        self.assertEqual(files_below(self.outside), ["secret"])
        self.assertEqual(open_and_read(
            os.path.join(self.outside, "secret")), b"secret")
        self.assertEqual(sorted(os.listdir(self.directory)),
                         ["buckets", "outside"])

    def test_link_outside_is_followed_when_the_operator_says_so(self):
        self.link(self.outside, "out")
        self.restart(follow_symlinks=True)
        self.assertEqual(self.keys(), ["out/secret", "real/x"])
        self.put("out/new", b"2")
        self.sweep()
        self.assertEqual(self.read("out/new")[0].etag, md5_hex(b"2"))
        self.assertEqual(files_below(self.outside), ["new", "secret"])

    def test_loop_of_links_ends(self):
        self.link(".", "self")
        self.link("..", "real", "up")
        self.link("loop", "loop")
        self.link("pong", "ping")
        self.link("ping", "pong")
        self.assertEqual(self.keys(), ["real/x"])
        for prefix in ("self/", "real/up/", "loop/", "ping/", "s", "real/"):
            with self.subTest(prefix=prefix):
                self.assertEqual(self.keys(prefix=prefix), [
                    key for key in ["real/x"] if key.startswith(prefix)])
        for key in ("loop", "ping", "loop/x"):
            self.assertIsNone(self.bucket.find(key))
            self.assertFalse(self.delete(key))
        self.assert_refused("AccessDenied", self.put, "loop/x", b"2")

    def test_link_to_the_bucket_itself_does_not_show_its_state(self):
        self.put("odd//", b"2")
        self.link(".", "self")
        self.link("../../box", "real", "up")
        for prefix in ("", "self/", "self/.", "self/self/", "real/up/",
                       "self/.gos3rve/", "real/up/.gos3rve/locks/"):
            for delimiter in ("", "/"):
                self.assertEqual([key for key in self.keys(
                    prefix=prefix, delimiter=delimiter)
                    if gos3rve.STATE in key], [])
        for key in ("self/.gos3rve/bucket.json",
                    "real/up/.gos3rve/locks/00"):
            self.assertIsNone(self.bucket.find(key))
            self.assertFalse(self.delete(key))
            with contextlib.suppress(S3Error):
                self.put(key, b"3")
        self.assertEqual(self.bucket.owner, "alice")
        self.assertNotEqual(open_and_read(self.path(
            gos3rve.STATE, "locks", "00")) if os.path.exists(self.path(
                gos3rve.STATE, "locks", "00")) else b"", b"3")

    def test_state_of_a_bucket_within_a_bucket_is_out_of_reach(self):
        by_hand(os.path.join(self.buckets, ".gos3rve-keys.json"), b"key")
        self.put("odd//", b"2")
        for follow in (False, True):
            self.restart(mapped={"up": self.directory},
                         follow_symlinks=follow)
            up = self.store.bucket("up")
            for name in ("state", "keys"):
                with contextlib.suppress(FileExistsError):
                    os.symlink({"state": "buckets/box/.gos3rve",
                                "keys": "buckets/.gos3rve-keys.json"}[name],
                               os.path.join(self.directory, name))
            for prefix in ("", "buckets/box/.gos3rve/", "buckets/.",
                           "state/"):
                listed = [entry.key for entry in self.store.list_objects(
                    up, prefix, limit=10 ** 6).entries]
                self.assertEqual([key for key in listed if key not in (
                    "buckets/box/real/x", "outside/secret")], [])
            for number, key in enumerate((
                    "buckets/box/.gos3rve/bucket.json",
                    "buckets/.gos3rve-keys.json", "keys",
                    "buckets/.GOS3RVE-keys.json", "state/bucket.json",
                    "buckets/box/.gos3rve/odd/kodd%2F%2F")):
                with self.subTest(key=key, follow=follow):
                    self.assertIsNone(up.find(key))
                    self.assert_refused("NoSuchKey", up.open, key)
                    if "/." in key:     # the key is one like any other
                        self.put(key, b"%d" % number, bucket=up)
                        self.assertEqual(up.find(key).size, 1)
                    self.store.delete_object(up, key)
            self.assertEqual(self.bucket.owner, "alice")
            self.assertEqual(self.read("odd//")[1], b"2")
            self.assertEqual(open_and_read(os.path.join(
                self.buckets, ".gos3rve-keys.json")), b"key")

    def test_put_beside_a_linked_directory_keeps_what_lies_in_it(self):
        self.link("real", "link")
        self.put("link", b"2")
        self.assertEqual(self.read("link")[1], b"2")
        self.assertEqual(self.read("link/x")[1], b"1")
        self.assertEqual(self.keys(), ["link", "link/x", "real/x"])

    def test_linked_object_survives_a_rename(self):
        """A relative link does not lead there from another directory: a
        refusal will do, a lost object will not."""
        self.link("real/x", "file")
        self.link("x", "real", "y")
        for source, key in (("file", "far/away/file"), ("real/y", "odd//")):
            with self.subTest(source=source):
                with contextlib.suppress(S3Error):
                    self.rename(source, key)
                there = key if self.bucket.find(source) is None else source
                self.assertEqual(self.read(there)[1], b"1")
                self.assertIn(there, self.keys())
        self.assertEqual(self.read("real/x")[1], b"1")

    def test_fifos_and_sockets_are_no_objects_and_block_nothing(self):
        os.mkfifo(self.path("fifo"))
        with socket.socket(socket.AF_UNIX) as sock:
            with contextlib.suppress(OSError):
                sock.bind(self.path("sock"))
        seen = []

        def look():
            seen.append(self.keys())
            seen.append([self.bucket.find(key) for key in ("fifo", "sock")])
            seen.append([self.delete(key) for key in ("fifo", "sock")])
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        thread.join(20)
        self.assertEqual(seen, [["real/x"], [None] * 2, [False] * 2])
        self.assert_refused("AccessDenied", self.put, "fifo/x", b"2")
        self.put("fifo", b"3")
        self.assertEqual(self.read("fifo")[1], b"3")

    @unittest.skipUnless(sys.platform.startswith("linux"), "needs bytes")
    def test_names_that_are_no_utf8_are_left_alone(self):
        root = os.fsencode(self.path())
        os.mkdir(root + b"/\xff\xfe")
        for name in (b"/bad\xff", b"/\xff\xfe/x", b"/real/\xc3\x28"):
            with open(root + name, "wb") as file:
                file.write(b"2")
        self.assertEqual(self.keys(), ["real/x"])
        self.delete("real/x")
        self.assertTrue(os.path.exists(root + b"/real/\xc3\x28"))
        self.assert_refused("BucketNotEmpty", self.store.delete_bucket,
                            self.bucket)

    def test_file_whose_path_is_too_long_for_a_key_is_not_listed(self):
        path = os.path.join(*["d" * 200] * 5)
        by_hand(self.path(path, "f" * 19))
        by_hand(self.path(path, "f" * 20))
        self.assertEqual(self.keys(), [path + "/" + "f" * 19, "real/x"])


class StrangersWithSidecars(Strangers):
    """The same where the file system has no extended attributes."""

    xattrs = False


# --- listing ---

def rolled_up(keys, prefix, delimiter, after):
    """A listing as the documentation of ListObjectsV2 describes it."""
    found = []
    for key in in_order(keys):
        if not key.startswith(prefix) or key.encode() <= after.encode():
            continue
        rest = key[len(prefix):]
        if delimiter and delimiter in rest:
            key = prefix + rest.partition(delimiter)[0] + delimiter
        if key not in found:
            found.append(key)
    return found


class Listing(StorageCase):
    """Listings equal a model, whatever the keys, and page to the end."""

    SEGMENTS = ("a", "b", "a-", "a.", "a0", "ab", "\u00e9", "\uffff", "a\n",
                "\U0001f600", "\U0010ffff", "0" * 10)
    ODD = SEGMENTS + ("", "", ".", "..", "s" * 260, "\0")

    def pages(self, prefix, delimiter, after, limit):
        """All entries' keys, page by page, as a client gets them."""
        found, skip = [], ""
        for _ in range(2000):
            page = self.store.list_objects(
                self.bucket, prefix, delimiter, after, limit, skip)
            found += [entry.key for entry in page.entries]
            if not page.truncated:
                return found
            self.assertEqual(len(page.entries), limit)
            after = found[-1]
            skip = after if isinstance(page.entries[-1],
                                       gos3rve.CommonPrefix) else ""
        self.fail("the listing never ends")

    def fill(self, chance, segments):
        """Random keys, half of them put, half of them made by hand."""
        keys = set()
        while len(keys) < 60:
            key = "/".join(chance.choice(segments) for _ in range(
                chance.randint(1, 4)))
            if not key or len(key.encode()) > 1024:
                continue
            hand = chance.random() < 0.5 and gos3rve.is_natural(key)
            try:
                if hand and not os.path.isdir(self.path(key)):
                    by_hand(self.path(key))
                else:
                    self.put(key, b"x")
            except (FileExistsError, NotADirectoryError):
                self.put(key, b"x")
            keys.add(key)
        return sorted(keys)

    def compare(self, chance, keys, rounds):
        """Ask at random, and compare with the model."""
        cuts = [key[:chance.randint(0, len(key))] for key in keys] + keys
        prefixes = cuts + ["", "", "/", ".", "..", "../", "\U0010ffff",
                           "zzz", gos3rve.STATE, gos3rve.STATE + "/"]
        afters = cuts + [""] * 40 + [c + "\U0010ffff" for c in keys[:9]]
        for _ in range(rounds):
            query = (chance.choice(prefixes), chance.choice(
                ["", "/", "/", "/", "//", "-", "a", "/a", "\u00e9", "..",
                 "\U0001f600", "no such"]), chance.choice(afters))
            expected = rolled_up(keys, *query)
            for limit in (1, 2, 3, 1000):
                self.assertEqual(self.pages(*query, limit=limit), expected,
                                 (query, limit))

    def test_random_natural_keys(self):
        chance = random.Random(3)
        self.compare(chance, self.fill(chance, self.SEGMENTS), 50)

    def test_random_keys_of_all_kinds(self):
        for seed in range(4, 6):
            chance = random.Random(seed)
            self.start(os.path.join(self.directory, str(seed)))
            self.compare(chance, self.fill(chance, self.ODD), 30)

    def test_order_is_that_of_utf8_bytes(self):
        keys = ["a-b", "a/b", "a0", "a", "a.b", "a/", "A", "\U0001f600",
                "\uffee", "e\u0301", "\u00e9", "a\x01", "a//", "a//b"]
        for key in keys:
            self.put(key, b"1")
        self.assertEqual(self.keys(), in_order(keys))

    def test_common_prefix_comes_once_and_counts_as_one(self):
        for key in ("a/1", "a/2", "a/", "b", "c/1", "c//"):
            self.put(key, b"1")
        self.assertEqual(self.keys(delimiter="/"), ["a/", "b", "c/"])
        self.assertEqual(self.keys(delimiter="/", prefix="a/"),
                         ["a/", "a/1", "a/2"])
        kinds = [type(entry) for entry in self.page(delimiter="/")]
        self.assertEqual(kinds, [gos3rve.CommonPrefix, gos3rve.Info,
                                 gos3rve.CommonPrefix])
        page = self.store.list_objects(self.bucket, delimiter="/", limit=2)
        self.assertEqual((len(page.entries), page.truncated), (2, True))
        page = self.store.list_objects(self.bucket, delimiter="/", limit=3)
        self.assertFalse(page.truncated)

    def test_last_character_of_all_is_listed_under_its_prefix(self):
        keys = ["p\U0010ffff", "p\U0010ffff/", "p/\U0010ffff",
                "p/\U0010ffff/", "p/\U0010ffff\U0010ffff//"]
        for key in keys:
            self.put(key, b"1")
        for prefix in ("p", "p/", "p\U0010ffff", "p/\U0010ffff"):
            for delimiter in ("", "/"):
                for limit in (1, 1000):
                    self.assertEqual(
                        self.pages(prefix, delimiter, "", limit),
                        rolled_up(keys, prefix, delimiter, ""))

    def test_page_of_no_keys_is_empty_and_not_truncated(self):
        self.put("a", b"1")
        page = self.store.list_objects(self.bucket, limit=0)
        self.assertEqual((page.entries, page.truncated), ([], False))

    def opened(self, **query):
        """The directories that one listing reads."""
        seen, real = [], os.scandir

        def scandir(path="."):
            seen.append(os.path.relpath(os.fsdecode(path), self.path()))
            return real(path)
        with mock.patch.object(os, "scandir", scandir):
            self.keys(**query)
        return sorted(seen)

    def test_only_the_directories_that_are_needed_are_read(self):
        for key in ("a/1/x", "a/2/x", "b/1/x", "c/1/x", "d"):
            by_hand(self.path(key))
        for query, needed in (
                ({"prefix": "b/"}, ["b", "b/1"]),
                ({"prefix": "b/", "delimiter": "/"}, ["b", "b/1"]),
                ({"prefix": "b/1/"}, ["b/1"]),
                ({"after": "c/1/x"}, [".", "c", "c/1"]),
                ({"after": "c"}, [".", "c", "c/1"]),
                ({"after": "c0"}, ["."]),
                ({"prefix": "d"}, ["."])):
            with self.subTest(query=query):
                self.assertEqual(self.opened(**query), needed)

    def test_page_after_a_common_prefix_does_not_walk_through_it(self):
        for number in range(30):
            by_hand(self.path("a", str(number), "x"))
        by_hand(self.path("b"))
        query = {"delimiter": "/", "after": "a/", "skip": "a/"}
        self.assertEqual(self.keys(**query), ["b"])
        self.assertLess(len(self.opened(**query)), 4)

    def test_directory_that_cannot_be_read_fails_the_listing(self):
        """A listing without it would have `sync --delete` delete it."""
        by_hand(self.path("a", "x"))
        by_hand(self.path("b"))
        real = os.scandir

        def scandir(path="."):
            if os.path.basename(os.path.normpath(path)) == "a":
                raise OSError(errno.EMFILE, "Too many open files")
            return real(path)
        with mock.patch.object(os, "scandir", scandir):
            with self.assertRaises((OSError, S3Error)):
                self.keys()
        self.assertEqual(self.keys(), ["a/x", "b"])

    def test_object_overwritten_while_it_is_listed_has_a_true_etag(self):
        """Its record and its size must be of one and the same content."""
        self.put("k", b"old")
        etags = {md5_hex(b"old"), md5_hex(b"new!")}
        hooks = []

        def hooked(real):
            def call(*args, **named):
                while hooks:
                    hooks.pop()()
                return real(*args, **named)
            return call
        with contextlib.ExitStack() as stack:
            if hasattr(os, "getxattr"):
                stack.enter_context(mock.patch.object(
                    os, "getxattr", hooked(os.getxattr)))
            stack.enter_context(mock.patch.object(
                gos3rve, "open", hooked(open), create=True))
            for look in (lambda: self.page()[0],
                         lambda: self.bucket.find("k"),
                         lambda: self.read("k")[0]):
                self.put("k", b"old")
                hooks.append(lambda: self.put("k", b"new!"))
                info = look()
                self.assertEqual(hooks, [])
                self.assertIn(info.etag, etags)
                self.assertEqual(info.etag, info.record["meta"]["md5"])


class ListingWithSidecars(Listing):
    """The same where the file system has no extended attributes."""

    xattrs = False


# --- crash points ---

class Cut(BaseException):
    """Stands for kill -9."""


class Machine:
    """Counts the calls that change the disk, and fails the one that
    `at` says: once, with EIO; or as a kill does, with all after it."""

    NAMES = ("open", "write", "replace", "rename", "unlink", "mkdir",
             "rmdir", "utime", "setxattr", "fsync", "copy_file_range",
             "link")

    def __init__(self, at, kill):
        self.at, self.kill, self.count = at, kill, 0
        self._real = {name: getattr(os, name) for name in self.NAMES
                      if hasattr(os, name)}

    def __enter__(self):
        for name, real in self._real.items():
            setattr(os, name, self._wrap(name, real))
        return self

    def __exit__(self, *_):
        for name, real in self._real.items():
            setattr(os, name, real)

    def _wrap(self, name, real):
        def call(*args, **named):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **named)
            self.count += 1
            if self.kill and self.count >= self.at:
                raise Cut(name)
            if self.count == self.at:
                raise OSError(errno.EIO, "Input/output error")
            return None if name == "fsync" else real(*args, **named)
        return call


class CrashCase(StorageCase):
    """Acts that are cut off, each at every change that it makes, or at
    some: from the first one on in steps."""

    first = step = 1

    def each_point(self, prepare, act, outcomes):
        """Fail act() at every point; afterwards the bucket is one of the
        models in `outcomes`, the last one when act() said so."""
        points = 0
        for kill in (True, False):
            for at in range(self.first, 500, self.step):
                with Machine(0, False):
                    self.start(os.path.join(self.directory, "x"), sync=True)
                    prepare()
                done = self._cut_off(at, kill, act)
                where = "%s at call %d" % ("kill" if kill else "EIO", at)
                with self.subTest(where):
                    self._check(outcomes, done)
                shutil.rmtree(self.directory)
                self.directory = os.path.dirname(self.directory)
                if self.machine.count < at:
                    break
                points += 1
        self.assertGreaterEqual(points, self.least_points)

    def _cut_off(self, at, kill, act):
        with Machine(at, kill) as self.machine:
            try:
                act()
                return True
            except (Cut, OSError, S3Error):
                return False

    def begin(self, key, contents):
        """Start an upload with some parts."""
        upload_id = self.store.create_upload(self.bucket, key, {})
        self.upload = self.store.upload(self.bucket, key, upload_id)
        for number, data in enumerate(contents, 1):
            with self.store.part_draft(self.upload) as draft:
                draft.write(data)
                self.store.put_part(self.upload, number, draft,
                                    {"etag": md5_hex(data)})

    def complete(self, data=b"one two"):
        """Complete it."""
        with self.store.locked_upload(self.upload):
            self.store.complete_upload(
                self.bucket, self.upload, self.store.list_parts(
                    self.upload), self.record(data), ANY)


class CrashPoints(CrashCase):
    """Cut off at any change of the disk, an object is the old or the new
    one, whole; what else is left goes with the next sweep."""

    least_points = 7

    def _check(self, outcomes, done):
        self.restart()
        for _ in range(2):
            keys = set(self.keys())
            for key in {key for model in outcomes for key in model}:
                self.assertEqual(self.bucket.find(key) is not None,
                                 key in keys, key)
            seen = {key: self.read(key)[1] for key in keys}
            self.assertIn(seen, outcomes[-1:] if done else outcomes)
            outcomes = [seen]
            self.sweep()
        self.verify(seen)
        for key in seen:
            self.delete(key)
        self.sweep()
        self.assert_clean()
        for name in os.listdir(self.uploads) \
                if os.path.isdir(self.uploads) else ():
            for upload_id in os.listdir(os.path.join(self.uploads, name)):
                self.assertIn("upload.json", os.listdir(
                    os.path.join(self.uploads, name, upload_id)))

    def test_put_of_a_new_object(self):
        for key in ("d/k", "odd//" + "k" * 200):
            self.each_point(lambda: None, lambda: self.put(key, b"new"),
                            [{}, {key: b"new"}])

    def test_put_over_an_object(self):
        for key in ("k", "k/"):
            self.each_point(
                lambda: self.put(key, b"old"),
                lambda: self.put(key, b"new"), [{key: b"old"},
                                                {key: b"new"}])

    def test_put_that_moves_an_object_out_of_the_way(self):
        name = "n" * 150
        self.each_point(
            lambda: self.put(name, b"old"),
            lambda: self.put(name + "/b", b"new"),
            [{name: b"old"}, {name: b"old", name + "/b": b"new"}])

    def test_rename(self):
        for source, key in (("d/a", "e/b"), ("a", "a/b"),
                            ("a//" + "s" * 300, "b//" + "s" * 300)):
            self.each_point(
                lambda: [self.put(source, b"1"), self.put("z", b"2")],
                lambda: self.rename(source, key),
                [{source: b"1", "z": b"2"}, {key: b"1", "z": b"2"}])

    def test_rename_over_an_object(self):
        self.each_point(
            lambda: [self.put("a/", b"1"), self.put("b/c", b"2")],
            lambda: self.rename("a/", "b/c"),
            [{"a/": b"1", "b/c": b"2"}, {"b/c": b"1"}])

    def test_delete(self):
        for key in ("d/e/k", "k/"):
            self.each_point(
                lambda: [self.put(key, b"1"), self.put("z", b"2")],
                lambda: self.delete(key),
                [{key: b"1", "z": b"2"}, {"z": b"2"}])

    def test_complete_upload(self):
        def prepare():
            self.put("k", b"old")
            self.begin("k", (b"one ", b"two"))
        self.each_point(prepare, self.complete,
                        [{"k": b"old"}, {"k": b"one two"}])


class CrashPointsWithSidecars(CrashPoints):
    """The same where the file system has no extended attributes."""

    xattrs = False


# --- crash points of versions ---

# The versions of a key, the newest first: v a version, n the null version,
# M a delete marker, N the null one.
HISTORIES = (
    ("Enabled", "", "put", "v9"),
    ("Enabled", "v1", "put", "v9 v1"),
    ("Enabled", "n1", "put", "v9 n1"),
    ("Enabled", "M2 v1", "put", "v9 M2 v1"),
    ("Enabled", "N2 v1", "put", "v9 N2 v1"),
    ("Enabled", "v1", "copy", "v9 v1"),
    ("Enabled", "v1", "complete", "v9 v1"),
    ("Enabled", "", "delete", "M9"),
    ("Enabled", "v1", "delete", "M9 v1"),
    ("Enabled", "n1", "delete", "M9 n1"),
    ("Enabled", "M2 v1", "delete", "M9 M2 v1"),
    ("Enabled", "v1", "remove v1", ""),
    ("Enabled", "n1", "remove n1", ""),
    ("Enabled", "v3 v2 v1", "remove v3", "v2 v1"),
    ("Enabled", "v2 n1", "remove v2", "n1"),
    ("Enabled", "n3 v2 v1", "remove n3", "v2 v1"),
    ("Enabled", "v3 M2 v1", "remove v3", "M2 v1"),
    ("Enabled", "v3 v2 v1", "remove v2", "v3 v1"),
    ("Enabled", "v3 M2 v1", "remove M2", "v3 v1"),
    ("Enabled", "M2 v1", "remove v1", "M2"),
    ("Enabled", "M1", "remove M1", ""),
    ("Enabled", "M2 v1", "remove M2", "v1"),
    ("Enabled", "N2 v1", "remove N2", "v1"),
    ("Enabled", "M3 M2 v1", "remove M3", "M2 v1"),
    ("Enabled", "M3 M2 v1", "remove M2", "M3 v1"),
    ("Suspended", "", "put", "n9"),
    ("Suspended", "n1", "put", "n9"),
    ("Suspended", "v1", "put", "n9 v1"),
    ("Suspended", "v1", "complete", "n9 v1"),
    ("Suspended", "v2 n1", "put", "n9 v2"),
    ("Suspended", "v3 n2 v1", "copy", "n9 v3 v1"),
    ("Suspended", "N2 v1", "put", "n9 v1"),
    ("Suspended", "M3 n2 v1", "put", "n9 M3 v1"),
    ("Suspended", "v3 N2 v1", "put", "n9 v3 v1"),
    ("Suspended", "", "delete", "N9"),
    ("Suspended", "n1", "delete", "N9"),
    ("Suspended", "v1", "delete", "N9 v1"),
    ("Suspended", "n2 v1", "delete", "N9 v1"),
    ("Suspended", "v3 n2 v1", "delete", "N9 v3 v1"),
    ("Suspended", "M3 n2 v1", "delete", "N9 M3 v1"),
    ("Suspended", "N2 v1", "delete", "N9 v1"),
    ("Suspended", "n2 v1", "remove n2", "v1"),
)


class VersionCrashPoints(CrashCase):
    """Cut off at any change of the disk, the versions of a key are those
    before or those after, one of them is the latest, and any further
    write goes on from there.  GOS3RVE_CRASH_STEP=1: at every one."""

    least_points = 0
    step = int(os.environ.get("GOS3RVE_CRASH_STEP", "4"))

    def switch(self, status):
        if self.bucket.versioning != status:
            self.bucket.save({"versioning": status})

    def write(self, key, name):
        """Write a version of that name."""
        if name[0] in "vn":
            self.put(key, name.encode())
        else:
            self.store.delete_object(self.bucket, key)

    def build(self, key, names, status):
        """The history of a key, with no write cut off."""
        for name in reversed(names):
            self.switch("Enabled" if name[0] in "vM" else "Suspended")
            self.write(key, name)
        self.switch(status)

    def act(self, key, act, name, names):
        """What is cut off."""
        if act == "put":
            self.put(key, name.encode())
        elif act == "delete":
            self.store.delete_object(self.bucket, key)
        elif act == "complete":
            self.complete(name.encode())
        elif act == "copy":
            self.copy("source", key)
        else:
            self.remove(key, names, act.split()[1])

    def remove(self, key, names, name):
        """Remove a version for good."""
        number = names.index(name)
        info = self.bucket.versions(key)[number]
        self.store.delete_object(self.bucket, key,
                                 version_id=info.version_id)

    def history(self, key):
        """What the disk, by all that reads it, tells of a key's versions.
        """
        infos = self.store.list_versions(self.bucket, key, limit=99).entries
        names, ids = [], []
        for info in infos:
            self.assertEqual(info.key, key)
            found, fd = self.bucket.open_version(key, info.version_id)
            with os.fdopen(fd, "rb") as file:
                data = file.read().decode()
            for field in ("version_id", "marker", "latest", "etag", "size"):
                self.assertEqual(getattr(info, field),
                                 getattr(found, field), field)
            self.assertEqual(info.latest, not names)
            kind = "NM" if info.marker else "nv"
            self.assertEqual(data == "", info.marker)
            names.append(kind[info.version_id != "null"] + data[1:])
            self.assertIn(data[:1], ("", names[-1][0]))
            ids.append(info.version_id)
        self.assertEqual(len(set(ids)), len(ids))
        live = bool(infos) and not infos[0].marker
        self.assertEqual(self.bucket.find(key) is not None, live)
        self.assertEqual(key in self.keys(), live)
        if infos:
            info, fd = self.bucket.open_version(key)
            os.close(fd)
            self.assertEqual(info.version_id, ids[0])
        else:
            self.assert_refused("NoSuchKey", self.bucket.open_version, key)
        return names

    def _check(self, outcomes, done):
        self.restart()
        seen = self.history(self.key)
        self.assertIn([name.strip("0123456789") if name[0] in "MN"
                       else name for name in seen],
                      outcomes[-1:] if done else outcomes)
        self.sweep()
        # the next write finds nothing of it
        status = self.random.choice(("Enabled", "Suspended"))
        self.switch(status)
        name = self.random.choice(("v8", "M8"))
        if status == "Suspended":
            name = {"v8": "n8", "M8": "N8"}[name]
            seen = [one for one in seen if one[0] not in "nN"]
        self.write(self.key, name)
        seen.insert(0, name.rstrip("8") if name[0] in "MN" else name)
        self.assertEqual(self.history(self.key), seen)
        old = self.path(gos3rve.STATE, "versions", gos3rve.odd_name(self.key))
        self.assertEqual(
            len([one for one in os.listdir(old) if one != "key"])
            if os.path.isdir(old) else 0,
            len(seen) - (seen[0][0] in "vn"))
        while seen:
            name = self.random.choice(seen)
            self.remove(self.key, seen, name)
            seen.remove(name)
            if len(seen) == 1:
                self.assertEqual(self.history(self.key), seen)
        self.sweep()
        self.assertEqual(self.keys(), ["source"] * self.source)
        self.assert_clean(self.source)

    def row(self, key, status, before, act, after):
        """One row of HISTORIES, for a key."""
        before, after = before.split(), after.split()
        new = after[0] if after else ""

        def prepare():
            self.build(key, before, status)
            if act == "copy":
                self.switch(None)
                self.put("source", new.encode())
                self.switch(status)
            if act == "complete":
                self.begin(key, (b"v", b"9") if new[0] == "v"
                           else (b"n", b"9"))
        self.key, self.source = key, act == "copy"
        self.random = random.Random(1)
        self.each_point(prepare, lambda: self.act(key, act, new, before), [
            [name.rstrip("0123456789") if name[0] in "MN" else name
             for name in names] for names in (before, after)])

    def test_histories(self):
        keys = "d/k", "k/", "k//" + "x" * 200
        for number, row in enumerate(HISTORIES):
            with self.subTest(row=row):
                self.first = 1 + number % self.step
                self.row(keys[number % 3], *row)


class VersionCrashPointsWithSidecars(VersionCrashPoints):
    """The same where the file system has no extended attributes."""

    xattrs = False


# --- at the same time ---

class Together(StorageCase):
    """Threads and processes on the same few keys."""

    def test_few_keys_stay_whole(self):
        keys, tags = ["a", "a/b", "a/", "a/b/c", "q"], set()
        for number in range(40):
            tags.add(md5_hex(b"%d" % number * 50))

        def worker(seed):
            chance = random.Random(seed)
            for _ in range(60):
                self._any_act(chance, keys, tags)
        results = run_threads(*[bound(worker, seed)
                                for seed in range(6)])
        self.assertEqual(results, [None] * 6)
        model = {key: self.read(key)[1] for key in self.keys()}
        self.assertEqual([key for key in in_order(keys)
                          if self.bucket.find(key)], in_order(model))
        self.verify(model)
        self.sweep()
        self.verify(model)
        self.assert_clean(len(model))
        for key in model:
            self.delete(key)
        self.assertEqual(os.listdir(self.path()), [gos3rve.STATE])

    def _any_act(self, chance, keys, tags):
        source, key = chance.sample(keys, 2)
        data = b"%d" % chance.randrange(40) * 50

        def look():
            info, found = self.read(key)
            self.assertEqual(info.etag, md5_hex(found))

        def page():
            self.assertLessEqual({e.etag for e in self.page()}, tags)
        act = chance.choice([bound(self.put, key, data)] * 4 + [
            bound(self.delete, key), bound(self.rename, source, key), look,
            look, page])
        try:
            act()
        except S3Error as error:
            self.assertEqual(error.code, "NoSuchKey")

    def test_object_that_is_never_deleted_is_never_missed(self):
        """`a` moves between its path and odd/ as `a/b` comes and goes."""
        self.put("a", b"0")
        stop, missed = threading.Event(), []

        def change():
            try:
                for number in range(60):
                    self.put("a/b", b"1")
                    self.delete("a/b")
                    self.put("a", b"%d" % number)
            finally:
                stop.set()

        def look():
            while not stop.is_set():
                if "a" not in self.keys():
                    missed.append("list")
                if self.bucket.find("a") is None:
                    missed.append("find")
        self.assertEqual(run_threads(change, look), [None, None])
        self.assertEqual(missed, [])

    def test_object_that_moves_twice_while_it_is_looked_for_is_found(self):
        """Out of odd/ behind the first look, and back behind the next."""
        moves, busy, real = [], [], os.open
        names = ("a", gos3rve.odd_name("a"))

        def opened(path, *args, **named):
            try:
                return real(path, *args, **named)
            finally:
                if moves and not busy and os.path.basename(path) in names:
                    busy.append(True)
                    moves.pop(0)()
                    busy.pop()
        for look in (self.bucket.find, self.bucket.open):
            self.put("a", b"1")
            self.put("a/b", b"1")
            self.delete("a/b")
            moves[:] = [lambda: self.put("a", b"2"),
                        lambda: self.put("a/b", b"3")]
            with mock.patch.object(os, "open", opened):
                found = look("a")
            del moves[:]
            self.assertIsNotNone(found)
            if isinstance(found, tuple):
                os.close(found[1])
            self.delete("a/b")

    def winners(self, conditions, key="k", count=32):
        """How many of 32 conditional puts won; the rest got 412."""
        calls = [bound(self.put, key, b"by %d" % number,
                                   conditions) for number in range(count)]
        results = run_threads(*calls)
        for result in results:
            if isinstance(result, BaseException):
                self.assertIsInstance(result, S3Error)
                self.assertEqual(result.code, "PreconditionFailed")
        won = [r for r in results if isinstance(r, gos3rve.Info)]
        self.assertEqual([info.etag for info in won],
                         [self.bucket.find(key).etag])
        return len(won)

    def test_one_of_32_creates_the_object(self):
        for number in range(3):
            for key in ("k%d" % number, "k%d/" % number):
                self.assertEqual(self.winners(ABSENT, key), 1)

    def test_one_of_32_replaces_the_object(self):
        for _ in range(3):
            for key in ("k", "k/"):
                etag = self.put(key, b"first").etag
                self.assertEqual(self.winners(gos3rve.WriteConditions(
                    if_match='"%s"' % etag), key), 1)

    def test_condition_on_an_absent_object_is_404(self):
        self.assert_refused("NoSuchKey", self.put, "none", b"1",
                            gos3rve.WriteConditions(if_match="*"))
        self.verify({})

    CHILD = textwrap.dedent("""
        import sys
        sys.path.insert(0, sys.argv[1])
        import gos3rve
        store = gos3rve.Store(sys.argv[2], sys.argv[3],
                              xattrs=sys.argv[4] == "True")
        bucket = store.bucket("box")
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(int(sys.argv[5])):
            try:
                with bucket.draft() as draft:
                    draft.write(b"child")
                    store.put_object(
                        bucket, "k%d" % number, draft, {"etag": "child"},
                        gos3rve.WriteConditions(if_none_match=True))
                print(number)
            except gos3rve.S3Error as error:
                assert error.code == "PreconditionFailed", error
    """)

    def test_one_of_two_processes_creates_each_object(self):
        count = 100
        child = subprocess.Popen(
            [sys.executable, "-c", self.CHILD, HERE, self.buckets,
             self.uploads, str(self.xattrs), str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            universal_newlines=True)
        try:
            self.assertEqual(child.stdout.readline(), "ready\n")
            child.stdin.write("go\n")
            child.stdin.flush()
            ours = set()
            for number in range(count):
                with contextlib.suppress(S3Error):
                    self.put("k%d" % number, b"parent", ABSENT)
                    ours.add(number)
            output = child.communicate(timeout=30)[0]
        finally:
            child.kill()
            child.communicate()
        self.assertEqual(child.returncode, 0)
        theirs = set(map(int, output.split()))
        self.assertEqual(ours & theirs, set())
        self.assertEqual(ours | theirs, set(range(count)))
        for number in range(count):
            self.assertEqual(self.read("k%d" % number)[1],
                             b"parent" if number in ours else b"child")

    def test_bucket_deleted_beside_puts_loses_nothing_acknowledged(self):
        for _ in range(30):
            if not os.path.isdir(self.path()):
                self.store.create_bucket("box", "alice", "us-east-1")
            results = run_threads(
                lambda: self.store.delete_bucket(self.store.bucket("box")),
                *[bound(self._put_in_box, "k%d" % n)
                  for n in range(3)])
            deleted = results[0] is None
            for n, result in enumerate(results[1:]):
                if not isinstance(result, Exception):
                    self.assertFalse(deleted)
                    self.bucket = self.store.bucket("box")
                    self.assertEqual(self.read("k%d" % n)[1], b"1")
                    self.delete("k%d" % n)
                else:
                    self.assertIsInstance(result, S3Error)
                    self.assertEqual(result.code, "NoSuchBucket")
            self.assertEqual(os.path.isdir(self.path()), not deleted)

    def _put_in_box(self, key):
        return self.put(key, b"1", bucket=self.store.bucket("box"))

    def test_put_into_a_deleted_bucket_does_not_bring_it_back(self):
        for key in ("k", "d/k", "k/"):
            with self.subTest(key=key), self.bucket.draft() as draft:
                draft.write(b"1")
                self.store.delete_bucket(self.bucket)
                self.assert_refused(
                    "NoSuchBucket", self.store.put_object, self.bucket, key,
                    draft, self.record(b"1"), ANY)
                self.assert_refused("NoSuchBucket", self.put, key, b"1")
                self.assert_refused("NoSuchBucket", self.delete, key)
                self.assertFalse(os.path.exists(self.path()))
            self.bucket = self.store.create_bucket("box", "a", "us-east-1") \
                if not os.path.exists(self.path()) else self.bucket

    def test_bucket_is_made_once(self):
        def make():
            return self.store.create_bucket("once", "alice", "us-east-1")
        results = run_threads(*[make] * 8)
        made = [r for r in results if isinstance(r, gos3rve.Bucket)]
        self.assertEqual(len(made), 1)
        for result in results:
            if result is not made[0]:
                self.assertEqual(result.code, "BucketAlreadyExists")
        self.assert_clean()

    def test_uploads_come_and_go_beside_each_other(self):
        def work():
            for _ in range(40):
                upload_id = self.store.create_upload(self.bucket, "k", {})
                upload = self.store.upload(self.bucket, "k", upload_id)
                with self.store.locked_upload(upload):
                    self.store.remove_upload(upload)
        self.assertEqual(run_threads(*[work] * 4), [None] * 4)
        self.assertEqual(self.store.list_uploads(self.bucket), [])


class TogetherWithSidecars(Together):
    """The same where the file system has no extended attributes."""

    xattrs = False


# --- buckets ---

class Buckets(StorageCase):
    """Directories as buckets."""

    def test_directory_made_by_hand_is_a_bucket_without_owner(self):
        os.mkdir(os.path.join(self.buckets, "hand"))
        by_hand(os.path.join(self.buckets, "file"))
        found = self.store.list_buckets()
        self.assertEqual([b.name for b in found], ["box", "hand"])
        self.assertEqual([b.owner for b in found], ["alice", None])
        self.assert_refused("NoSuchBucket", self.store.bucket, "file")
        for name in ("..", ".", "", "box/..", "/", gos3rve.STATE, "BOX\0"):
            self.assert_refused("NoSuchBucket", self.store.bucket, name)

    def test_a_record_is_trusted_once_its_time_cannot_come_again(self):
        path = self.path(gos3rve.STATE, "bucket.json")
        with open(path, "rb") as file:
            text = file.read()
        for owner in (b"carol", b"peggy"):  # of one inode, size and time
            with open(path, "r+b") as file:
                file.write(text.replace(b"alice", owner))
            os.utime(path, (9e9, 9e9))
            self.assertEqual(self.bucket.owner, owner.decode())
        with mock.patch.object(gos3rve, "COARSE_TICK_NS", -10 ** 20):
            self.assertIs(self.bucket.config, self.bucket.config)

    def test_bucket_with_anything_in_it_is_not_deleted(self):
        for make in (lambda: by_hand(self.path("f")),
                     lambda: by_hand(self.path("d", "e", "f")),
                     lambda: self.put("odd//", b"1"),
                     lambda: self.put("dir/", b"")):
            make()
            self.assert_refused("BucketNotEmpty", self.store.delete_bucket,
                                self.bucket)
            for name in ("f", "d/e/f", "odd//", "dir/"):
                self.delete(name)
        os.makedirs(self.path("empty", "directory"))
        self.store.delete_bucket(self.bucket)
        self.assertEqual(os.listdir(self.buckets), [])

    def test_bucket_that_cannot_be_read_through_is_not_deleted(self):
        by_hand(self.path("d", "f"))
        real = os.scandir

        def scandir(path="."):
            if not isinstance(path, int) and os.path.basename(
                    os.path.normpath(path)) == "d":
                raise OSError(errno.EMFILE, "Too many open files")
            return real(path)
        with mock.patch.object(os, "scandir", scandir):
            with self.assertRaises((OSError, S3Error)):
                self.store.delete_bucket(self.bucket)
        self.assertTrue(os.path.exists(self.path("d", "f")))

    def test_uploads_go_with_their_bucket(self):
        upload_id = self.store.create_upload(self.bucket, "k", {})
        self.store.delete_bucket(self.bucket)
        self.bucket = self.store.create_bucket("box", "bob", "eu-west-1")
        self.assertEqual((self.bucket.owner, self.bucket.region),
                         ("bob", "eu-west-1"))
        self.assert_refused("NoSuchUpload", self.store.upload, self.bucket,
                            "k", upload_id)

    def test_directory_served_as_a_bucket_is_never_deleted(self):
        tree = os.path.join(self.directory, "tree")
        os.mkdir(tree)
        self.restart(mapped={"tree": tree})
        bucket = self.store.bucket("tree")
        self.put("k", b"1", bucket=bucket)
        self.assertEqual(sorted(os.listdir(tree)), [gos3rve.STATE, "k"])
        self.store.delete_object(bucket, "k")
        self.assert_refused("AccessDenied", self.store.delete_bucket, bucket)
        self.assertTrue(os.path.isdir(tree))
        self.assertEqual([b.name for b in self.store.list_buckets()],
                         ["box", "tree"])

    def test_bucket_moves_with_all_that_it_knows(self):
        model = {"a": b"1", "a/b": b"2", "a/": b"3", "s" * 600: b"4"}
        for key in model:
            self.put(key, model[key])
        os.rename(self.path(), os.path.join(self.buckets, "moved"))
        self.bucket = self.store.bucket("moved")
        self.verify(model)
        self.assertEqual(self.bucket.owner, "alice")


# --- uploads ---

class SpooledLogs(StorageCase):
    """Lines of access logs on their way."""

    def logs(self):
        return sorted(os.listdir(self.path(gos3rve.STATE, "logs")))

    def taken(self, bucket=None):
        """What all claimed files hold; they are gone then."""
        bucket, found = bucket or self.bucket, []
        for name in bucket.spooled_logs():
            bucket.take_log(name, lambda file: found.append(file.read()))
        return b"".join(found)

    def test_a_day_is_a_file_and_a_claim_closes_it(self):
        self.assertEqual(self.bucket.spooled_logs(), [])
        self.bucket.claim_logs("2026-01-03-00-00-00")
        for day, line in (("20260102", b"a\n"), ("20260103", b"b\n"),
                          ("20260102", b"c\n")):
            self.bucket.append_log(day, line)
        self.assertEqual(self.logs(), ["20260102", "20260103"])
        self.bucket.claim_logs("2026-01-03-00-00-01")
        self.bucket.append_log("20260103", b"d\n")
        names = self.bucket.spooled_logs()
        self.assertEqual([name[:29] for name in names], [
            "20260102-2026-01-03-00-00-01-", "20260103-2026-01-03-00-00-01-"])
        self.assertEqual(self.taken(), b"a\nc\nb\n")
        self.assertEqual(self.logs(), ["20260103"])

    def test_a_line_cut_short_ends_where_the_next_begins(self):
        self.bucket.append_log("20260102", b"whole\n")
        with open(self.path(gos3rve.STATE, "logs", "20260102"), "ab") as cut:
            cut.write(b"hal")
        self.bucket.append_log("20260102", b"next\n")
        self.bucket.claim_logs("2026-01-03-00-00-00")
        self.assertEqual(self.taken(), b"whole\nhal\nnext\n")

    def test_what_cannot_be_delivered_stays(self):
        def fail(file):
            raise OSError(file.read())
        self.bucket.append_log("20260102", b"a\n")
        self.bucket.claim_logs("2026-01-03-00-00-00")
        name, = self.bucket.spooled_logs()
        with self.assertRaises(OSError):
            self.bucket.take_log(name, fail)
        self.assertEqual(self.taken(), b"a\n")
        self.assertEqual(self.bucket.take_log(name, fail), 0)

    def test_one_of_two_stores_has_a_file_at_a_time(self):
        self.bucket.append_log("20260102", b"a\n")
        self.bucket.claim_logs("2026-01-03-00-00-00")
        name, = self.bucket.spooled_logs()
        other = Store(self.buckets, self.uploads).bucket("box")
        self.assertEqual(self.bucket.take_log(name, lambda _: (
            "first", other.take_log(name, lambda _: "second"))),
            ("first", 0))

    def test_no_line_is_lost_or_doubled_between_writers_and_claims(self):
        stores = [Store(self.buckets, self.uploads) for _ in range(2)]

        def write(number):
            for line in range(150):
                stores[number % 2].bucket("box").append_log(
                    "20260102", b"%d of %d\n" % (line, number))

        def claim(number):
            bucket, found = stores[number].bucket("box"), b""
            for _ in range(30):
                bucket.claim_logs("2026-01-03-00-00-00")
                found += self.taken(bucket)
            return found
        found = run_threads(*[bound(write, n) for n in range(4)],
                            *[bound(claim, n) for n in range(2)])
        self.bucket.claim_logs("2026-01-03-00-00-00")
        lines = (b"".join(filter(None, found)) + self.taken()).splitlines()
        self.assertEqual(len(lines), 600)
        self.assertEqual(len(set(lines)), 600)

    def test_the_spool_is_bounded(self):
        with mock.patch.object(gos3rve, "MAX_SPOOLED_BYTES", 30):
            for _ in range(10):
                self.bucket.append_log("20260102", b"0123456789\n")
        path = self.path(gos3rve.STATE, "logs", "20260102")
        self.assertEqual(os.path.getsize(path), 33)
        self.assertEqual(len(self.reports), 1)
        self.bucket.claim_logs("2026-01-03-00-00-00")
        self.bucket.append_log("20260102", b"0123456789\n")
        self.assertEqual(self.bucket.trim_logs(50), 0)
        self.assertEqual(self.bucket.trim_logs(40), 33)
        self.assertEqual(self.logs(), ["20260102"])

    def test_a_deleted_bucket_takes_no_line(self):
        self.bucket.append_log("20260102", b"a\n")
        self.store.delete_bucket(self.bucket)
        with self.assertRaises(S3Error):
            self.bucket.append_log("20260102", b"b\n")
        self.assertEqual(os.listdir(self.buckets), [])


class UploadCase(StorageCase):
    """Uploads of the bucket `box`."""

    def begin(self, key="k"):
        """A new upload."""
        return self.store.upload(self.bucket, key, self.store.create_upload(
            self.bucket, key, {"meta": {"a": "b"}}))

    def part(self, upload, number, data):
        """Put a part."""
        with self.store.part_draft(upload) as draft:
            draft.write(data)
            self.store.put_part(upload, number, draft,
                                {"etag": md5_hex(data)})

    def parts(self, upload):
        """number -> content, each with its own ETag and size."""
        found = {}
        for part in self.store.list_parts(upload):
            with open(part.path, "rb") as file:
                found[part.number] = data = file.read()
            self.assertEqual((part.size, part.etag),
                             (len(data), md5_hex(data)))
        return found

    def complete(self, upload, numbers=None):
        """Complete an upload with some of its parts, or all."""
        parts = [part for part in self.store.list_parts(upload)
                 if numbers is None or part.number in numbers]
        data = b"".join(open_and_read(part.path) for part in parts)
        with self.store.locked_upload(upload):
            return self.store.complete_upload(
                self.bucket, upload, parts, self.record(data), ANY)


class Uploads(UploadCase):
    """Parts are invisible until they are an object."""

    def test_parts_become_the_object_in_their_order(self):
        for key in ("k", "odd//", "d/" + "s" * 300):
            upload = self.begin(key)
            for number, data in ((10000, b"last"), (2, b"two"), (1, b"one"),
                                 (2, b"TWO"), (7, b"unused")):
                self.part(upload, number, data)
            self.assertEqual(self.parts(upload), {
                1: b"one", 2: b"TWO", 7: b"unused", 10000: b"last"})
            self.assertEqual(self.keys(), [])
            self.assertEqual(upload.record["meta"], {"a": "b"})
            self.complete(upload, (1, 2, 10000))
            self.verify({key: b"oneTWOlast"})
            self.assertEqual(files_below(self.uploads), [])
            self.assert_refused("NoSuchUpload", self.store.upload,
                                self.bucket, key, upload.upload_id)
            self.delete(key)

    def test_upload_is_that_of_its_key_and_bucket(self):
        upload = self.begin()
        other = self.store.create_bucket("other", "alice", "us-east-1")
        for bucket, key, upload_id in (
                (self.bucket, "K", upload.upload_id),
                (other, "k", upload.upload_id),
                (self.bucket, "k", "0" * 48), (self.bucket, "k", ""),
                (self.bucket, "k", "../box/" + upload.upload_id),
                (self.bucket, "k", upload.upload_id + "\n")):
            self.assert_refused("NoSuchUpload", self.store.upload, bucket,
                                key, upload_id)

    def test_uploads_are_listed_by_key_and_age(self):
        made = [self.begin(key) for key in ("b", "a", "b", "a/", "\u00e9")]
        listed = self.store.list_uploads(self.bucket)
        self.assertEqual([u.key for u in listed],
                         ["a", "a/", "b", "b", "\u00e9"])
        self.assertEqual([u.upload_id for u in listed[2:4]],
                         [made[0].upload_id, made[2].upload_id])

    def test_aborted_upload_leaves_nothing_and_harms_no_object(self):
        self.put("k", b"object")
        upload = self.begin()
        self.part(upload, 1, b"one")
        with self.store.part_draft(upload) as draft:
            draft.write(b"late")
            with self.store.locked_upload(upload):
                self.store.remove_upload(upload)
            self.assert_refused("NoSuchUpload", self.store.put_part, upload,
                                2, draft, {"etag": md5_hex(b"late")})
        self.assert_refused("NoSuchUpload", self.store.list_parts, upload)
        self.assertEqual(files_below(self.uploads), [])
        self.verify({"k": b"object"})

    def test_part_that_was_changed_on_disk_is_left_out(self):
        upload = self.begin()
        self.part(upload, 1, b"one")
        self.part(upload, 2, b"two")
        with open(os.path.join(upload.path, "00002"), "ab") as file:
            file.write(b"!")
        self.assertEqual(self.parts(upload), {1: b"one"})
        self.assertIn("00002", "".join(self.reports))

    def test_one_part_put_twice_at_once_is_one_whole_part(self):
        """The second comes between the record and the rename of the
        first."""
        upload, hooks = self.begin(), []
        real = gos3rve.fcntl.flock if gos3rve.fcntl else None
        if real is None:
            self.skipTest("no flock")

        def flock(fd, how):
            if how == gos3rve.fcntl.LOCK_EX and hooks:
                hooks.pop()()
            return real(fd, how)
        hooks.append(lambda: self.part(upload, 1, b"second"))
        with mock.patch.object(gos3rve.fcntl, "flock", flock):
            self.part(upload, 1, b"first")
        self.assertEqual(hooks, [])
        self.assertIn(self.parts(upload), ({1: b"first"}, {1: b"second"}))

    def test_parts_put_at_once_are_all_there(self):
        upload = self.begin()
        results = run_threads(*[
            bound(self.part, upload, number % 5 + 1,
                              b"part %d" % number) for number in range(20)])
        self.assertEqual(results, [None] * 20)
        parts = self.parts(upload)
        self.assertEqual(list(parts), [1, 2, 3, 4, 5])
        self.assertEqual(self.complete(upload).size,
                         sum(map(len, parts.values())))
        self.verify({"k": b"".join(parts.values())})


class UploadsWithSidecars(Uploads):
    """The same where the file system has no extended attributes."""

    xattrs = False


# --- housekeeping ---

class Sweeping(UploadCase):
    """A sweep takes what nobody will finish, and nothing else."""

    def test_draft_that_is_held_is_spared(self):
        upload = self.begin()
        with self.bucket.draft() as one, \
                self.store.part_draft(upload) as two:
            one.write(b"1")
            two.write(b"2")
            self.sweep()
            self.assertTrue(os.path.exists(one.path))
            self.assertTrue(os.path.exists(two.path))
            self.store.put_object(self.bucket, "k", one, self.record(b"1"),
                                  ANY)
            self.store.put_part(upload, 1, two, {"etag": md5_hex(b"2")})
        self.verify({"k": b"1"})
        self.assertEqual(self.parts(upload), {1: b"2"})

    def abandoned(self, directory):
        """A draft whose process is gone."""
        path = os.path.join(directory, "t" + "0" * 24)
        by_hand(path)
        return path

    def test_draft_that_nobody_holds_goes_after_the_grace(self):
        upload = self.begin()
        paths = [self.abandoned(self.path(gos3rve.STATE, "tmp")),
                 self.abandoned(self.path(gos3rve.STATE)),
                 self.abandoned(upload.path)]
        self.assertEqual(self.sweep(later=0, grace=60), 0)
        self.assertEqual(self.sweep(later=120, grace=60), 3)
        for path in paths:
            self.assertFalse(os.path.exists(path))
        self.assertEqual(self.sweep(), 0)

    def test_upload_goes_after_its_time_and_only_with_one(self):
        upload = self.begin()
        self.part(upload, 1, b"1")
        self.assertEqual(self.sweep(ttl=0), 0)
        self.assertEqual(self.sweep(ttl=600, later=500), 0)
        self.assertEqual(self.parts(upload), {1: b"1"})
        self.assertEqual(self.sweep(ttl=600, later=700), 1)
        self.assertEqual(files_below(self.uploads), [])

    def test_upload_with_activity_is_spared(self):
        upload = self.begin()
        old = time.time() - 1000
        with self.store.part_draft(upload) as draft:
            draft.write(b"a part that takes long ")
            os.utime(upload.path, (old, old))
            draft.write(b"to arrive")
            self.assertEqual(self.sweep(ttl=600, later=0, grace=60), 0)
            self.store.put_part(upload, 1, draft, {
                "etag": md5_hex(b"a part that takes long to arrive")})
        self.assertEqual(self.sweep(ttl=600, later=0, grace=60), 0)
        self.assertEqual(list(self.parts(upload)), [1])

    def test_upload_that_gets_a_part_meanwhile_is_spared(self):
        upload, locked = self.begin(), self.store.locked_upload
        old = time.time() - 1000
        for name in ("", "upload.json"):
            os.utime(os.path.join(upload.path, name), (old, old))

        def once(one):
            self.store.locked_upload = locked
            self.part(one, 1, b"1")
            return locked(one)
        self.store.locked_upload = once
        self.assertEqual(self.sweep(ttl=600, later=0), 0)
        self.assertEqual(self.parts(upload), {1: b"1"})

    def test_upload_that_cannot_be_read_just_now_is_spared(self):
        upload = self.begin()
        self.part(upload, 1, b"1")
        real = os.open

        def failing(path, *_, **__):
            raise OSError(errno.EMFILE, "Too many open files", path)
        with mock.patch.object(gos3rve, "open", failing, create=True), \
                contextlib.suppress(OSError):
            self.sweep()
        self.assertIs(os.open, real)
        self.assertEqual(self.parts(upload), {1: b"1"})

    def test_half_made_things_go(self):
        upload = self.begin()
        self.part(upload, 1, b"1")
        os.unlink(os.path.join(upload.path, "upload.json"))
        for name in (".gos3rve-new-0", ".gos3rve-old-0"):
            by_hand(os.path.join(self.buckets, name, "x"))
        self.assertEqual(self.sweep(later=0, grace=60), 0)
        self.assertEqual(self.sweep(), 3)
        self.assertEqual(os.listdir(self.buckets), ["box"])
        self.assertEqual(files_below(self.uploads), [])

    def test_objects_of_any_name_keep_their_records(self):
        model = {"a/.gos3rve/b/c": b"1", "t" + "0" * 24: b"2", "odd//": b"3",
                 "tmp/t" + "0" * 24: b"4", "s" * 600: b"5", "a": b"6",
                 "00001-1.json": b"7"}
        for key in model:
            self.put(key, model[key])
        self.sweep(ttl=1)
        self.verify(model)

    def test_records_of_files_that_are_gone_go(self):
        self.put("a", b"1")
        self.put("b", b"2")
        os.unlink(self.path("a"))
        self.sweep()
        self.verify({"b": b"2"})
        self.assert_clean(1)

    def test_directory_that_cannot_be_read_keeps_its_records(self):
        self.put("d/k", b"1")
        self.put("z", b"2")
        real = os.scandir

        def scandir(path="."):
            if os.path.basename(os.path.normpath(path)) == "d":
                raise OSError(errno.EMFILE, "Too many open files")
            return real(path)
        with mock.patch.object(os, "scandir", scandir), \
                contextlib.suppress(OSError, S3Error):
            self.sweep()
        self.verify({"d/k": b"1", "z": b"2"})

    def test_object_that_moves_aside_during_a_sweep_keeps_its_record(self):
        self.put("d/k", b"1")
        moves, real = [lambda: self.put("d/k/x", b"2")], os.walk

        def walk(top, *args, **named):
            for step in real(top, *args, **named):
                step[1].sort()          # the state directory comes first
                if step[0].endswith(os.sep + "d") and moves:
                    moves.pop()()
                    step = (step[0], step[1], os.listdir(step[0]))
                yield step
        with mock.patch.object(os, "walk", walk):
            self.sweep()
        self.verify({"d/k": b"1", "d/k/x": b"2"} if not moves
                    else {"d/k": b"1"})


class SweepingWithSidecars(Sweeping):
    """The same where the file system has no extended attributes."""

    xattrs = False

###############################################################################
# 7. Access
###############################################################################

# Pure tests of the room speak of it as `g`.

g = gos3rve
MAIN = g.Account("AKMAIN", "s", "a" * 64, "main", "main@example.com")
ALT = g.Account("AKALT", "s", "b" * 64, "alt", "alt@example.com")
THIRD = g.Account("AKTHIRD", "s", "third-id", "M. Third", "")
PEOPLE = g.Accounts([MAIN, ALT, THIRD])


def session_caller(account, *fields):
    """The Caller of temporary credentials, from a Session's fields."""
    return g.account_caller(account._replace(session=g.Session(
        MAY_24, MAY_24 + 3600, *fields)))


GET_ONLY = ('{"Statement":{"Effect":"Allow","Action":"s3:GetObject",'
            '"Resource":"*"}}')
ALL_BUT_GET = ('{"Statement":[{"Effect":"Allow","Action":"*","Resource":"*"'
               '},{"Effect":"Deny","Action":"s3:GetObject","Resource":"*"}]}')
HOME = ('{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":'
        '"s3:*","Resource":"arn:aws:s3:::b/${aws:PrincipalTag/team}/*"}}')
ROLE = session_caller(ALT, "reader", "s1", GET_ONLY)
CALLERS = {"main": g.account_caller(MAIN), "alt": g.account_caller(ALT),
           "third": g.account_caller(THIRD), "anon": g.ANONYMOUS,
           "logs": g.service_caller(g.LOGGING_SERVICE), "role": ROLE,
           "ownrole": session_caller(MAIN, "admin", "s2"),
           "limited": session_caller(MAIN, "path/app", "s3", GET_ONLY),
           "denied": session_caller(MAIN, "path/app", "s4", ALL_BUT_GET),
           "tagged": session_caller(MAIN, "path/app", "s5", HOME,
                                    (("Team", "red"),)),
           "token": session_caller(MAIN), "altrole": session_caller(
               ALT, "admin", "s2")}
APP_ARN = "arn:aws:iam::%s:role/path/app" % MAIN.user_id
APP_SESSION = "arn:aws:sts::%s:assumed-role/app/" % MAIN.user_id
BUCKET = "arn:aws:s3:::b"
OBJECTS = BUCKET + "/*"


def statement(effect="Allow", principal="*", action="s3:*",
              resource=(BUCKET, OBJECTS), **more):
    """A statement's JSON object; keyword arguments override."""
    item = {"Effect": effect, "Principal": principal, "Action": action,
            "Resource": list(resource) if isinstance(resource, tuple)
            else resource}
    item.update(more)
    return {name: value for name, value in item.items()
            if value is not None}


def document(*statements, **more):
    """A policy's text."""
    return json.dumps(dict({"Version": "2012-10-17",
                            "Statement": list(statements)}, **more))


def policy(*statements, **more):
    """A Policy on bucket b."""
    return g.parse_policy(document(*statements, **more), "b",
                          PEOPLE.by_user_id)


ALT_ARN = {"AWS": "arn:aws:iam::%s:root" % ALT.user_id}
ALT_USER = {"AWS": "arn:aws:iam:::user/alt"}
ALT_CEPH = {"AWS": ["arn:aws:iam:::user/" + ALT.user_id]}
ALT_CANON = {"CanonicalUser": ALT.user_id}
DENY_POLICY_OPS = statement("Deny", action=[
    "s3:GetBucketPolicy", "s3:PutBucketPolicy", "s3:DeleteBucketPolicy"])
POLICIES = {
    "": None,
    "all": policy(statement()),
    "get": policy(statement(action="s3:GetObject", resource=OBJECTS)),
    "list": policy(statement(action="s3:ListBucket", resource=BUCKET)),
    "put": policy(statement(action="s3:PutObject", resource=OBJECTS)),
    "delete": policy(statement(action="s3:DeleteObject",
                               resource=OBJECTS)),
    "alt": policy(statement(principal=ALT_ARN)),
    "altget": policy(statement(principal=ALT_ARN, action="s3:GetObject*",
                               resource=OBJECTS)),
    "altuser": policy(statement(principal=ALT_USER)),
    "altceph": policy(statement(principal=ALT_CEPH)),
    "altcanon": policy(statement(principal=ALT_CANON)),
    "altid": policy(statement(principal={"AWS": ALT.user_id})),
    "third": policy(statement(principal={"AWS": "third-id"})),
    "role": policy(statement(principal={
        "AWS": "arn:aws:iam::%s:role/reader" % ALT.user_id})),
    "denyall": policy(statement("Deny")),
    "denyalt": policy(statement("Deny", ALT_ARN)),
    "allbutalt": policy(statement(), statement("Deny", ALT_ARN)),
    "onlyalt": policy(statement(), statement(
        "Deny", None, NotPrincipal=ALT_ARN)),
    "denyops": policy(DENY_POLICY_OPS),
    "denyget": policy(statement(), statement(
        "Deny", action="s3:GetObject", resource=OBJECTS)),
    "notaction": policy(statement(action=None, NotAction="s3:Delete*")),
    "notresource": policy(statement(
        resource=None, NotResource=BUCKET + "/secret*")),
    "public/": policy(statement(action="s3:GetObject",
                                resource=BUCKET + "/public/*")),
    "home": policy(statement(action="s3:GetObject",
                             resource=BUCKET + "/${aws:username}/*")),
    "prefix": policy(statement(
        action="s3:ListBucket", resource=BUCKET,
        Condition={"StringLike": {"s3:prefix": "public/*"}})),
    "net": policy(statement(Condition={
        "IpAddress": {"aws:SourceIp": "10.1.0.0/16"}})),
    "tls": policy(statement(), statement("Deny", Condition={
        "Bool": {"aws:SecureTransport": "false"}})),
    "sse": policy(statement("Deny", action="s3:PutObject",
                            resource=OBJECTS, Condition={"StringNotEquals": {
                                "s3:x-amz-server-side-encryption":
                                    "aws:kms"}})),
    "bofc": policy(statement(
        principal=ALT_ARN, action="s3:PutObject", resource=OBJECTS,
        Condition={"StringEquals": {
            "s3:x-amz-acl": "bucket-owner-full-control"}})),
    "tag": policy(statement(
        action="s3:GetObject", resource=OBJECTS, Condition={
            "StringEquals": {"s3:ExistingObjectTag/level": "public"}})),
    "logs": policy(statement(
        principal={"Service": g.LOGGING_SERVICE}, action="s3:PutObject",
        resource=BUCKET + "/logs/*")),
    "app": policy(statement(principal={"AWS": APP_ARN})),
    "session": policy(statement(principal={"AWS": [
        APP_SESSION + "s3", APP_SESSION + "s4"]})),
    "mainroot": policy(statement(principal={
        "AWS": "arn:aws:iam::%s:root" % MAIN.user_id})),
    "apparn": policy(statement(Condition={
        "ArnEquals": {"aws:PrincipalArn": APP_ARN}})),
    "denyapp": policy(statement("Deny", {"AWS": APP_ARN})),
    "denys3": policy(statement("Deny", {"AWS": APP_SESSION + "s3"})),
    "denyrole": policy(statement("Deny", Condition={
        "StringEquals": {"aws:PrincipalType": "AssumedRole"}})),
    "denyid": policy(statement("Deny", Condition={
        "StringLike": {"aws:userid": "AROA*:s2"}})),
    "mfa": policy(statement("Deny", Condition={
        "Bool": {"aws:MultiFactorAuthPresent": "false"}})),
    "mfanull": policy(statement("Deny", Condition={
        "Null": {"aws:MultiFactorAuthPresent": "true"}})),
    "old": policy(statement("Deny", Condition={
        "DateLessThan": {"aws:TokenIssueTime": "2013-05-24T00:00:01Z"}})),
    "older": policy(statement("Deny", Condition={
        "DateLessThan": {"aws:TokenIssueTime": "2013-05-24T00:00:00Z"}})),
    "red": policy(statement("Deny", Condition={
        "StringEquals": {"aws:principaltag/TEAM": "red"}})),
    "nameless": policy(statement("Deny", Condition={
        "Null": {"aws:username": "true"}})),
    "bypass": policy(statement(
        principal=ALT_ARN, resource=OBJECTS,
        action=["s3:DeleteObjectVersion", "s3:BypassGovernanceRetention"])),
}
ACL_BLOCKS = {"": g.PublicAccessBlock(), "ignore": g.PublicAccessBlock(
    ignore_public_acls=True), "restrict": g.PublicAccessBlock(
    restrict_public_buckets=True), "all": g.PublicAccessBlock(*[True] * 4)}
OWNERSHIPS = {"E": g.ENFORCED, "P": g.PREFERRED, "W": g.WRITER}
USERS = {"main": MAIN.user_id, "alt": ALT.user_id, "third": THIRD.user_id,
         None: None}


def acl(name, owner):
    """Grants by a row's word: a canned ACL, or `alt:READ`."""
    if ":" not in name:
        return g.canned_acl(name, owner, MAIN.user_id)
    who, _, permission = name.partition(":")
    return g.private_acl(owner) + (g.Grant(permission, USERS[who]),)


def row(who, action, expected, key=None, bacl="private", oowner="main",
        oacl="private", policy="", own="W", block="", ctx=None, out=False):
    """One row as a tuple; the defaults are a private bucket with ACLs."""
    return (who, action, key, bacl, oowner, oacl, policy, own, block,
            ctx or {}, out, expected)


Y, N = True, False
K = "k"
GET, PUT, LIST, DEL = "GetObject", "PutObject", "ListBucket", "DeleteObject"

POLICY_MATRIX = [
    # no policy, private ACLs: only the owner (access-management.html)
    row("main", GET, Y, K), row("alt", GET, N, K), row("anon", GET, N, K),
    row("third", GET, N, K), row("ownrole", GET, Y, K),
    row("role", GET, N, K), row("logs", GET, N, K),
    row("main", PUT, Y, K), row("alt", PUT, N, K), row("anon", PUT, N, K),
    row("main", LIST, Y), row("alt", LIST, N), row("anon", LIST, N),
    row("main", DEL, Y, K), row("alt", DEL, N, K), row("anon", DEL, N, K),
    row("main", "DeleteBucket", Y), row("alt", "DeleteBucket", N),
    row("main", "PutBucketPolicy", Y), row("alt", "PutBucketPolicy", N),
    row("anon", "GetBucketAcl", N), row("main", "PutBucketVersioning", Y),
    # bucket ACLs (acl-overview.html, permissions and their mapping)
    row("anon", LIST, Y, bacl="public-read"),
    row("alt", LIST, Y, bacl="public-read"),
    row("anon", "ListBucketVersions", Y, bacl="public-read"),
    row("anon", "ListBucketMultipartUploads", Y, bacl="public-read"),
    row("anon", GET, N, K, bacl="public-read"),
    row("anon", PUT, N, K, bacl="public-read"),
    row("anon", "GetBucketAcl", N, bacl="public-read"),
    row("anon", "GetBucketLocation", N, bacl="public-read"),
    row("anon", PUT, Y, K, bacl="public-read-write"),
    row("alt", PUT, Y, K, bacl="public-read-write"),
    row("alt", DEL, N, K, bacl="public-read-write"),
    row("alt", DEL, Y, K, bacl="public-read-write", oowner="alt"),
    row("anon", DEL, N, K, bacl="public-read-write", oowner=None),
    row("alt", "DeleteObjectVersion", N, K, bacl="public-read-write",
        oowner="alt"),
    row("alt", "PutBucketVersioning", N, bacl="public-read-write"),
    row("alt", LIST, Y, bacl="authenticated-read"),
    row("anon", LIST, N, bacl="authenticated-read"),
    row("alt", PUT, N, K, bacl="authenticated-read"),
    row("alt", LIST, Y, bacl="alt:READ"),
    row("third", LIST, N, bacl="alt:READ"),
    row("alt", PUT, N, K, bacl="alt:READ"),
    row("alt", PUT, Y, K, bacl="alt:WRITE"),
    row("alt", LIST, N, bacl="alt:WRITE"),
    row("alt", "GetBucketAcl", Y, bacl="alt:READ_ACP"),
    row("alt", "PutBucketAcl", N, bacl="alt:READ_ACP"),
    row("alt", "PutBucketAcl", Y, bacl="alt:WRITE_ACP"),
    row("alt", "GetBucketAcl", N, bacl="alt:WRITE_ACP"),
    row("alt", LIST, Y, bacl="alt:FULL_CONTROL"),
    row("alt", PUT, Y, K, bacl="alt:FULL_CONTROL"),
    row("alt", "GetBucketAcl", Y, bacl="alt:FULL_CONTROL"),
    row("alt", "PutBucketAcl", Y, bacl="alt:FULL_CONTROL"),
    row("alt", "DeleteBucket", N, bacl="alt:FULL_CONTROL"),
    row("alt", "PutBucketPolicy", N, bacl="alt:FULL_CONTROL"),
    row("alt", "GetBucketPolicy", N, bacl="alt:FULL_CONTROL"),
    row("logs", PUT, Y, K, bacl="log-delivery-write"),
    row("logs", "GetBucketAcl", Y, bacl="log-delivery-write"),
    row("logs", LIST, N, bacl="log-delivery-write"),
    row("alt", PUT, N, K, bacl="log-delivery-write"),
    row("logs", PUT, N, K, bacl="public-read-write"),
    # object ACLs
    row("anon", GET, Y, K, oacl="public-read"),
    row("alt", GET, Y, K, oacl="public-read"),
    row("anon", "GetObjectVersion", Y, K, oacl="public-read"),
    row("anon", "GetObjectAcl", N, K, oacl="public-read"),
    row("anon", "GetObjectTagging", N, K, oacl="public-read"),
    row("anon", "GetObjectAttributes", N, K, oacl="public-read"),
    row("anon", PUT, N, K, oacl="public-read-write"),
    row("alt", PUT, N, K, oacl="public-read-write"),
    row("alt", DEL, N, K, oacl="public-read-write"),
    row("alt", GET, Y, K, oacl="authenticated-read"),
    row("anon", GET, N, K, oacl="authenticated-read"),
    row("alt", GET, N, K, oacl="aws-exec-read"),
    row("alt", GET, Y, K, oacl="alt:READ"),
    row("third", GET, N, K, oacl="alt:READ"),
    row("alt", GET, N, K, oacl="alt:WRITE"),
    row("alt", PUT, N, K, oacl="alt:WRITE"),
    row("alt", "GetObjectAcl", Y, K, oacl="alt:READ_ACP"),
    row("alt", GET, N, K, oacl="alt:READ_ACP"),
    row("alt", "PutObjectAcl", Y, K, oacl="alt:WRITE_ACP"),
    row("alt", "PutObjectVersionAcl", Y, K, oacl="alt:WRITE_ACP"),
    row("alt", "GetObjectAcl", N, K, oacl="alt:WRITE_ACP"),
    row("alt", "PutObjectAcl", Y, K, oacl="alt:FULL_CONTROL"),
    row("alt", DEL, N, K, oacl="alt:FULL_CONTROL"),
    row("alt", "PutObjectTagging", N, K, oacl="alt:FULL_CONTROL"),
    # an object of another account (about-object-ownership.html, and the
    # object context of access-control-auth-workflow-object-operation)
    row("alt", GET, Y, K, oowner="alt"),
    row("alt", "GetObjectAcl", Y, K, oowner="alt"),
    row("alt", "PutObjectAcl", Y, K, oowner="alt"),
    row("alt", "PutObjectTagging", Y, K, oowner="alt"),
    row("main", GET, N, K, oowner="alt"),
    row("main", "GetObjectAcl", N, K, oowner="alt"),
    row("main", "PutObjectAcl", N, K, oowner="alt"),
    row("main", DEL, Y, K, oowner="alt"),
    row("main", "DeleteObjectVersion", Y, K, oowner="alt"),
    row("main", PUT, Y, K, oowner="alt"),
    row("main", GET, Y, K, oowner="alt", oacl="bucket-owner-read"),
    row("main", "GetObjectAcl", N, K, oowner="alt",
        oacl="bucket-owner-read"),
    row("main", "PutObjectAcl", Y, K, oowner="alt",
        oacl="bucket-owner-full-control"),
    row("third", GET, N, K, oowner="alt", policy="get"),
    row("anon", GET, N, K, oowner="alt", policy="all"),
    row("anon", GET, Y, K, oowner="alt", oacl="public-read"),
    row("alt", GET, N, K, oowner="alt", policy="denyalt"),
    row("alt", GET, N, K, oowner="alt", policy="denyall"),
    row("main", GET, N, K, oowner="alt", own="P"),
    row("main", GET, Y, K, oowner="alt", own="E"),
    row("alt", GET, N, K, oowner="alt", own="E"),
    row("alt", PUT, N, K, oowner="alt"),
    row("alt", DEL, N, K, oowner="alt"),
    # uploads: the initiator (mpuoverview.html)
    row("alt", "AbortMultipartUpload", Y, K, oowner="alt"),
    row("alt", "ListMultipartUploadParts", Y, K, oowner="alt"),
    row("third", "AbortMultipartUpload", N, K, oowner="alt"),
    row("main", "AbortMultipartUpload", Y, K, oowner="alt"),
    row("alt", "AbortMultipartUpload", Y, K, oowner="alt", own="E"),
    row("alt", "AbortMultipartUpload", N, K, oowner="alt",
        policy="denyalt"),
    # ACLs are off (about-object-ownership.html, Bucket owner enforced)
    row("anon", GET, N, K, oacl="public-read", own="E"),
    row("anon", LIST, N, bacl="public-read", own="E"),
    row("alt", PUT, N, K, bacl="public-read-write", own="E"),
    row("alt", GET, N, K, oacl="alt:FULL_CONTROL", own="E"),
    row("logs", PUT, N, K, bacl="log-delivery-write", own="E"),
    row("logs", PUT, Y, "logs/1", policy="logs", own="E"),
    row("logs", PUT, N, "other", policy="logs", own="E"),
    row("anon", GET, Y, K, policy="get", own="E"),
    row("main", GET, Y, K, own="E"),
    row("anon", GET, Y, K, oacl="public-read", own="P"),
    # bucket policies (example-bucket-policies.html)
    row("anon", GET, Y, K, policy="get"), row("alt", GET, Y, K,
                                               policy="get"),
    row("anon", LIST, N, policy="get"), row("anon", PUT, N, K,
                                            policy="get"),
    row("anon", "GetObjectVersion", N, K, policy="get"),
    row("anon", GET, Y, "missing", policy="get", oowner=None),
    row("anon", LIST, Y, policy="list"), row("anon", GET, N, K,
                                              policy="list"),
    row("anon", PUT, Y, K, policy="put"), row("anon", DEL, N, K,
                                               policy="put"),
    row("anon", DEL, Y, K, policy="delete"),
    row("alt", DEL, Y, K, policy="delete", oowner="third"),
    row("anon", "DeleteObjectVersion", N, K, policy="delete"),
    row("anon", "DeleteBucket", Y, policy="all"),
    row("alt", GET, Y, K, policy="alt"), row("third", GET, N, K,
                                              policy="alt"),
    row("anon", GET, N, K, policy="alt"),
    row("alt", GET, Y, K, policy="altuser"),
    row("third", GET, N, K, policy="altuser"),
    row("alt", GET, Y, K, policy="altceph"),
    row("alt", GET, Y, K, policy="altcanon"),
    row("alt", GET, Y, K, policy="altid"),
    row("third", GET, Y, K, policy="third"),
    row("alt", GET, N, K, policy="third"),
    row("alt", "GetObjectAcl", Y, K, policy="altget"),
    row("alt", "PutObjectAcl", N, K, policy="altget"),
    row("anon", GET, Y, "public/a", policy="public/"),
    row("anon", GET, N, "private/a", policy="public/"),
    row("anon", DEL, N, K, policy="notaction"),
    row("anon", PUT, Y, K, policy="notaction"),
    row("anon", GET, N, "secret1", policy="notresource"),
    row("anon", GET, Y, "open", policy="notresource"),
    row("alt", GET, Y, "alt/f", policy="home"),
    row("alt", GET, N, "main/f", policy="home"),
    row("third", GET, Y, "M. Third/f", policy="home"),
    row("anon", GET, N, "/f", policy="home"),
    row("anon", GET, N, "${aws:username}/f", policy="home"),
    # explicit deny wins, over owners and ACLs too
    row("main", GET, N, K, policy="denyall"),
    row("ownrole", GET, N, K, policy="denyall"),
    row("anon", GET, N, K, policy="denyall", oacl="public-read"),
    row("alt", LIST, N, policy="denyalt", bacl="public-read"),
    row("third", LIST, Y, policy="denyalt", bacl="public-read"),
    row("alt", GET, N, K, policy="allbutalt"),
    row("third", GET, Y, K, policy="allbutalt"),
    row("alt", GET, Y, K, policy="onlyalt"),
    row("third", GET, N, K, policy="onlyalt"),
    row("main", GET, N, K, policy="onlyalt"),
    row("anon", GET, N, K, policy="onlyalt"),
    row("main", GET, N, K, policy="denyget"),
    row("main", "GetObjectAcl", Y, K, policy="denyget"),
    # ... but not over the root user's three (API_PutBucketPolicy.html)
    row("main", "GetBucketPolicy", Y, policy="denyall"),
    row("main", "PutBucketPolicy", Y, policy="denyall"),
    row("main", "DeleteBucketPolicy", Y, policy="denyall"),
    row("main", "PutBucketAcl", N, policy="denyall"),
    row("main", "PutBucketPolicy", Y, policy="denyops"),
    row("main", "PutBucketPolicy", N, policy="denyops", out=True),
    row("main", "DeleteBucketPolicy", N, policy="denyops", out=True),
    row("main", GET, Y, K, policy="denyops", out=True),
    row("ownrole", "PutBucketPolicy", N, policy="denyops"),
    row("alt", "PutBucketPolicy", N, policy="denyops"),
    row("alt", "PutBucketPolicy", Y, policy="alt"),
    # conditions (amazon-s3-policy-keys.html)
    row("alt", LIST, Y, policy="prefix", ctx={"s3:prefix": "public/x"}),
    row("alt", LIST, N, policy="prefix", ctx={"s3:prefix": "private/"}),
    row("alt", LIST, N, policy="prefix"),
    row("main", LIST, Y, policy="prefix"),
    row("anon", GET, Y, K, policy="net", ctx={"aws:SourceIp": "10.1.2.3"}),
    row("anon", GET, N, K, policy="net", ctx={"aws:SourceIp": "10.2.2.3"}),
    row("anon", GET, Y, K, policy="net",
        ctx={"aws:SourceIp": "::ffff:10.1.2.3"}),
    row("anon", GET, N, K, policy="net", ctx={"aws:SourceIp": "::1"}),
    row("anon", GET, N, K, policy="net"),
    row("anon", GET, N, K, policy="tls", ctx={"aws:SecureTransport": False}),
    row("anon", GET, Y, K, policy="tls", ctx={"aws:SecureTransport": True}),
    row("main", GET, N, K, policy="tls", ctx={"aws:SecureTransport": False}),
    row("main", PUT, N, K, policy="sse"),
    row("main", PUT, N, K, policy="sse",
        ctx={"s3:x-amz-server-side-encryption": "AES256"}),
    row("main", PUT, Y, K, policy="sse",
        ctx={"s3:x-amz-server-side-encryption": "aws:kms"}),
    row("alt", PUT, N, K, policy="bofc"),
    row("alt", PUT, N, K, policy="bofc", ctx={"s3:x-amz-acl": "private"}),
    row("alt", PUT, Y, K, policy="bofc",
        ctx={"s3:x-amz-acl": "bucket-owner-full-control"}),
    row("anon", GET, Y, K, policy="tag",
        ctx={"s3:ExistingObjectTag": {"level": "public"}}),
    row("anon", GET, N, K, policy="tag",
        ctx={"s3:ExistingObjectTag": {"level": "private"}}),
    row("anon", GET, N, K, policy="tag",
        ctx={"s3:ExistingObjectTag": {"Level": "public"}}),
    row("anon", GET, N, K, policy="tag"),
    row("alt", "BypassGovernanceRetention", Y, K, policy="bypass"),
    row("third", "BypassGovernanceRetention", N, K, policy="bypass"),
    row("alt", "BypassGovernanceRetention", N, K, bacl="alt:FULL_CONTROL"),
    # public access block (access-control-block-public-access.html)
    row("anon", LIST, N, bacl="public-read", block="ignore"),
    row("alt", LIST, N, bacl="authenticated-read", block="ignore"),
    row("anon", GET, N, K, oacl="public-read", block="ignore"),
    row("alt", GET, Y, K, oacl="alt:READ", block="ignore"),
    row("logs", PUT, Y, K, bacl="log-delivery-write", block="ignore"),
    row("anon", GET, Y, K, policy="get", block="ignore"),
    row("anon", GET, N, K, policy="get", block="restrict"),
    row("alt", GET, N, K, policy="get", block="restrict"),
    row("main", GET, Y, K, policy="get", block="restrict"),
    row("ownrole", GET, Y, K, policy="get", block="restrict"),
    row("alt", GET, Y, K, policy="altget", block="restrict"),
    row("logs", PUT, Y, "logs/a", policy="logs", block="all"),
    row("alt", LIST, N, policy="get", bacl="alt:READ", block="restrict"),
    row("anon", GET, N, K, policy="net", block="restrict"),
    row("anon", GET, Y, K, policy="net", block="restrict",
        ctx={"aws:SourceIp": "10.1.0.1"}),
    row("anon", LIST, Y, bacl="public-read", block="restrict"),
    row("main", PUT, Y, K, block="all"),
    # sessions: both their own policy and the account's rights
    row("role", GET, Y, K, policy="alt"), row("role", PUT, N, K,
                                               policy="alt"),
    row("role", GET, Y, K, policy="role"), row("role", LIST, N,
                                                policy="role"),
    row("alt", GET, N, K, policy="role"),
    row("role", GET, N, K, policy="denyalt", oacl="public-read"),
    row("role", GET, Y, K, oowner="alt"),
    row("altrole", GET, N, K), row("altrole", GET, Y, K, policy="alt"),
    row("altrole", "PutBucketPolicy", N, policy="altget"),
    row("limited", GET, Y, K), row("limited", PUT, N, K),
    row("limited", LIST, N), row("limited", "GetBucketPolicy", N),
    row("denied", GET, N, K), row("denied", PUT, Y, K),
    row("denied", LIST, Y), row("tagged", GET, Y, "red/f"),
    row("tagged", GET, N, "blue/f"), row("tagged", LIST, N),
    row("token", GET, Y, K), row("token", "PutBucketVersioning", Y),
    # ... a policy that names the session gives it more, one that names its
    # role or account does not (access_policies.html#policies_session)
    row("limited", PUT, N, K, policy="app"),
    row("limited", PUT, N, K, policy="mainroot"),
    row("limited", PUT, Y, K, policy="session"),
    row("limited", PUT, Y, K, policy="put"),
    row("limited", PUT, Y, K, policy="apparn"),
    row("denied", GET, N, K, policy="session"),
    row("role", PUT, N, K, policy="put"),
    row("tagged", LIST, N, policy="session"),
    # ... and a denial of any of its names is one
    row("limited", GET, N, K, policy="denyapp"),
    row("ownrole", GET, Y, K, policy="denyapp"),
    row("limited", GET, N, K, policy="denys3"),
    row("denied", PUT, Y, K, policy="denys3"),
    row("ownrole", GET, N, K, policy="denyrole"),
    row("token", GET, Y, K, policy="denyrole"),
    row("ownrole", GET, N, K, policy="denyid"),
    row("limited", GET, Y, K, policy="denyid"),
    row("token", "PutBucketPolicy", Y, policy="denyops"),
    # ... with the condition keys of temporary credentials alone
    # (reference_policies_condition-keys.html)
] + [row(who, GET, expected, key, policy=name) for name, key, answers in (
    ("mfa", K, {"main": Y, "token": N, "ownrole": N}),
    ("mfanull", K, {"main": N, "token": Y, "ownrole": Y}),
    ("old", K, {"main": Y, "token": N, "ownrole": N}),
    ("older", K, {"main": Y, "token": Y, "ownrole": Y}),
    ("red", "red/f", {"main": Y, "ownrole": Y, "tagged": N}),
    ("nameless", K, {"main": Y, "token": Y, "ownrole": N}),
) for who, expected in answers.items()]


def decide(line):
    """What is_allowed says to a row."""
    (who, action, key, bacl, oowner, oacl, name, own, block, ctx, out,
     _) = line
    caller = CALLERS[who]
    access = g.BucketAccess(
        MAIN.user_id, acl(bacl, MAIN.user_id), POLICIES[name],
        OWNERSHIPS[own], ACL_BLOCKS[block], out)
    owner = USERS[oowner] if key else None
    grants = acl(oacl, owner) if owner else None
    return g.is_allowed(caller, "s3:" + action, g.resource_arn("b", key),
                        access, g.Context(caller, facts=ctx), owner, grants)


class PolicyMatrix(unittest.TestCase):
    """POLICY_MATRIX."""

    def test_has_enough_rows_and_none_twice(self):
        self.assertGreaterEqual(len(POLICY_MATRIX), 150)
        self.assertEqual(len({repr(line) for line in POLICY_MATRIX}),
                         len(POLICY_MATRIX))

    def test_each_row_gives_what_aws_documents(self):
        for line in POLICY_MATRIX:
            with self.subTest(line):
                self.assertEqual(decide(line), line[-1])

    def test_each_named_policy_and_block_is_used(self):
        self.assertEqual({line[6] for line in POLICY_MATRIX},
                         set(POLICIES))
        self.assertEqual({line[8] for line in POLICY_MATRIX}, set(ACL_BLOCKS))

    def test_without_a_bucket_every_account_may_and_the_unsigned_not(self):
        for who, expected in (("main", True), ("alt", True),
                              ("anon", False), ("role", False),
                              ("token", True), ("denied", True)):
            caller = CALLERS[who]
            self.assertEqual(g.is_allowed(
                caller, "s3:ListAllMyBuckets", "*", None,
                g.Context(caller)), expected, who)

    def test_defaults_of_a_bucket(self):
        access = g.BucketAccess("x")
        self.assertEqual((access.acl, access.policy, access.ownership,
                          access.locked_out),
                         ((), None, "BucketOwnerEnforced", False))
        self.assertEqual(access.block, g.PublicAccessBlock(*[False] * 4))

    def test_authorize_raises_access_denied(self):
        access = g.BucketAccess(MAIN.user_id)
        g.authorize(CALLERS["main"], "s3:ListBucket", BUCKET, access,
                    g.Context())
        with self.assertRaises(g.S3Error) as caught:
            g.authorize(g.ANONYMOUS, "s3:ListBucket", BUCKET, access,
                        g.Context())
        self.assertEqual(caught.exception.code, "AccessDenied")


class AccessPeople(unittest.TestCase):
    """Accounts and callers."""

    class Bucket:
        """As far as Accounts look."""
        owner = None

    def test_owners(self):
        bucket = self.Bucket()
        self.assertEqual(PEOPLE.owner_id(bucket), MAIN.user_id)
        bucket.owner = ALT.user_id
        self.assertEqual(PEOPLE.owner_id(bucket), ALT.user_id)
        bucket.owner = "gone"
        self.assertEqual(PEOPLE.owner_id(bucket), MAIN.user_id)

    def test_lasting_ids(self):
        passing = g.Accounts([MAIN, ALT], lasting=False)
        self.assertIsNone(passing.lasting_id(MAIN))
        self.assertEqual(passing.lasting_id(ALT), ALT.user_id)
        self.assertEqual(PEOPLE.lasting_id(MAIN), MAIN.user_id)
        session = MAIN._replace(key_id="ASIA", session=g.Session(0, 1))
        self.assertIsNone(passing.lasting_id(session))

    def test_lookups(self):
        self.assertEqual(PEOPLE.name(ALT.user_id), "alt")
        self.assertEqual(PEOPLE.name("gone"), "")
        self.assertEqual(PEOPLE.with_email("ALT@example.com"), ALT)
        self.assertIsNone(PEOPLE.with_email(""))
        self.assertEqual(PEOPLE.by_key_id["AKALT"], ALT)

    def test_callers(self):
        self.assertIs(g.account_caller(None), g.ANONYMOUS)
        self.assertTrue(CALLERS["main"].is_root)
        for who in ("anon", "logs", "role"):
            self.assertFalse(CALLERS[who].is_root, who)
        self.assertTrue(CALLERS["token"].is_root)
        limited = CALLERS["limited"]
        self.assertEqual((limited.arn, limited.session_arn), (
            APP_ARN, APP_SESSION + "s3"))
        self.assertRegex(limited.unique_id, r"\AAROA[A-Z2-7]{17}:s3\Z")
        self.assertEqual(limited.unique_id[:21],
                         CALLERS["denied"].unique_id[:21])
        self.assertNotEqual(limited.unique_id[:21],
                            CALLERS["ownrole"].unique_id[:21])


class AccessCase(unittest.TestCase):
    """What the classes below share."""

    def refuses(self, code, function, *args, **fields):
        """The S3Error that a call raises, its code and fields checked."""
        with self.assertRaises(g.S3Error) as caught:
            function(*args)
        error = caught.exception
        self.assertEqual(error.code, code, error)
        for name, value in fields.items():
            self.assertEqual(error.fields.get(name), value)
        return error


ACP = ('<AccessControlPolicy xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
       '>%s<AccessControlList>%s</AccessControlList></AccessControlPolicy>')
OWNER_XML = "<Owner><ID>%s</ID></Owner>" % MAIN.user_id
GRANT_XML = ('<Grant><Grantee xmlns:xsi="http://www.w3.org/2001/'
             'XMLSchema-instance" xsi:type="%s"><%s>%s</%s></Grantee>'
             '<Permission>%s</Permission></Grant>')


def grant_xml(kind, tag, text, permission="READ"):
    return GRANT_XML % (kind, tag, text, tag, permission)


class AccessLists(AccessCase):
    """Canned ACLs, headers, documents, records."""

    def parse(self, *grants, owner=OWNER_XML):
        return g.parse_acl((ACP % (owner, "".join(grants))).encode(),
                           MAIN.user_id, PEOPLE)

    def headers(self, **headers):
        return g.headers_acl(
            {name.replace("_", "-"): value
             for name, value in headers.items()}, ALT.user_id, PEOPLE,
            MAIN.user_id)

    def test_canned(self):
        own = g.Grant("FULL_CONTROL", ALT.user_id)
        for name, more in (
                ("private", []),
                ("public-read", [("READ", g.ALL_USERS)]),
                ("public-read-write", [("READ", g.ALL_USERS),
                                       ("WRITE", g.ALL_USERS)]),
                ("authenticated-read", [("READ", g.AUTHENTICATED_USERS)]),
                ("aws-exec-read", [("READ", g.EC2_ID)]),
                ("bucket-owner-read", [("READ", MAIN.user_id)]),
                ("bucket-owner-full-control",
                 [("FULL_CONTROL", MAIN.user_id)]),
                ("log-delivery-write", [("WRITE", g.LOG_DELIVERY),
                                        ("READ_ACP", g.LOG_DELIVERY)])):
            self.assertEqual(self.headers(x_amz_acl=name),
                             (own,) + tuple(g.Grant(*m) for m in more))

    def test_canned_on_a_bucket_knows_no_bucket_owner(self):
        for name in ("bucket-owner-read", "bucket-owner-full-control"):
            self.assertEqual(g.canned_acl(name, "x"), g.private_acl("x"))

    def test_canned_unknown(self):
        self.refuses("InvalidArgument", g.canned_acl, "public-ready", "x",
                     ArgumentName="x-amz-acl",
                     ArgumentValue="public-ready")

    def test_headers_absent(self):
        self.assertIsNone(self.headers(content_type="x"))

    def test_headers(self):
        grants = self.headers(
            x_amz_grant_full_control='emailaddress="MAIN@example.com"',
            x_amz_grant_read='id="%s", uri=%s' % (ALT.user_id,
                                                  g.ALL_USERS),
            x_amz_grant_write_acp="emailAddress=alt@example.com")
        self.assertEqual(grants, (
            g.Grant("READ", ALT.user_id), g.Grant("READ", g.ALL_USERS),
            g.Grant("WRITE_ACP", ALT.user_id),
            g.Grant("FULL_CONTROL", MAIN.user_id)))

    def test_headers_refused(self):
        uri = "http://acs.amazonaws.com/groups/s3/FakeGroup"
        for value, code, message, fields in (
                ('uri="%s"' % uri, "InvalidArgument", "Invalid group uri",
                 {"ArgumentName": "uri", "ArgumentValue": uri}),
                ('fakekey="1234"', "InvalidArgument",
                 "Argument format not recognized",
                 {"ArgumentName": "x-amz-grant-write",
                  "ArgumentValue": 'fakekey="1234"'}),
                ('id="wrong-id"', "InvalidArgument", "Invalid id",
                 {"ArgumentName": "id", "ArgumentValue": "wrong-id"}),
                ("id", "InvalidArgument",
                 "Argument format not recognized", {}),
                ("", "InvalidArgument",
                 "Argument format not recognized", {}),
                ('id="', "InvalidArgument", "Invalid id",
                 {"ArgumentValue": '"'}),
                ("emailAddress=no@where", "UnresolvableGrantByEmailAddress",
                 None, {"ArgumentValue": "no@where"})):
            with self.subTest(value):
                error = self.refuses(
                    code, lambda: self.headers(x_amz_grant_write=value),
                    **fields)
                if message:
                    self.assertEqual(error.message, message)

    def test_headers_and_canned_do_not_mix(self):
        self.refuses("InvalidRequest", lambda: self.headers(
            x_amz_acl="private", x_amz_grant_read="uri=" + g.ALL_USERS))

    def test_document_in(self):
        self.assertEqual(self.parse(
            grant_xml("CanonicalUser", "ID", ALT.user_id, "WRITE"),
            grant_xml("Group", "URI", g.ALL_USERS),
            grant_xml("AmazonCustomerByEmail", "EmailAddress",
                      " main@example.com ", "READ_ACP")),
            (g.Grant("WRITE", ALT.user_id), g.Grant("READ", g.ALL_USERS),
             g.Grant("READ_ACP", MAIN.user_id)))
        self.assertEqual(self.parse(), ())
        self.assertEqual(len(self.parse(grant_xml(
            "Group", "URI", g.ALL_USERS) * 100)), 100)

    def test_document_refused_as_aws_refuses_it(self):
        group = grant_xml("Group", "URI", g.LOG_DELIVERY, "WRITE")
        bad = "<Owner><ID>wrong-id</ID></Owner>"
        for code, owner, grants, fields in (
                ("MalformedACLError", "", group, {}),
                ("MalformedACLError", OWNER_XML,
                 group.replace("WRITE", "WRONG"), {}),
                ("InvalidArgument", bad, group,
                 {"ArgumentName": "CanonicalUser/ID",
                  "ArgumentValue": "wrong-id"}),
                ("InvalidArgument", OWNER_XML,
                 group.replace("LogDelivery", "FakeGroup"),
                 {"ArgumentName": "Group/URI"}),
                ("InvalidArgument", OWNER_XML,
                 grant_xml("CanonicalUser", "ID", "wrong-id"),
                 {"ArgumentName": "CanonicalUser/ID"}),
                ("MalformedACLError", OWNER_XML,
                 grant_xml("BadType", "ID", MAIN.user_id), {}),
                ("MalformedACLError", OWNER_XML,
                 grant_xml("Group", "ID", MAIN.user_id), {}),
                ("MalformedACLError", OWNER_XML, "<Grant/>", {}),
                ("MalformedACLError", OWNER_XML, "<Gift/>", {}),
                ("MalformedACLError", OWNER_XML, group * 101, {}),
                ("UnresolvableGrantByEmailAddress", OWNER_XML,
                 grant_xml("AmazonCustomerByEmail", "EmailAddress",
                           "no@where"), {}),
                ("AccessDenied", OWNER_XML.replace(
                    MAIN.user_id, ALT.user_id), group, {})):
            with self.subTest(code=code, owner=owner, grants=grants[:200]):
                self.refuses(code, lambda: self.parse(
                    grants, owner=owner), **fields)

    def test_document_not_xml(self):
        for data in (b"", b"<a", b"<AccessControlPolicy/>",
                     b"<!DOCTYPE a><AccessControlPolicy/>", b"<x/>"):
            self.refuses("MalformedACLError", g.parse_acl, data,
                         MAIN.user_id, PEOPLE)

    def test_document_out_and_in_again(self):
        grants = g.canned_acl("public-read", MAIN.user_id) + (
            g.Grant("WRITE_ACP", ALT.user_id),)
        data = g.acl_document(grants, MAIN.user_id, PEOPLE)
        self.assertIn(b"<DisplayName>alt</DisplayName>", data)
        self.assertIn(b'xsi:type="Group"', data)
        again = g.parse_acl(data, MAIN.user_id, PEOPLE)
        self.assertEqual(sorted(again), sorted(grants))
        self.assertEqual(again[0], g.Grant("READ", g.ALL_USERS))

    def test_document_of_a_stranger_has_no_display_name(self):
        data = g.acl_document((g.Grant("READ", g.EC2_ID),), MAIN.user_id,
                              PEOPLE)
        self.assertEqual(data.count(b"<DisplayName>"), 1)

    def test_public_grants_count_unless_told(self):
        grants = g.canned_acl("public-read", "x")
        self.assertTrue(g.acl_allows(grants, "READ", g.ANONYMOUS))
        self.assertFalse(g.acl_allows(grants, "READ", g.ANONYMOUS, True))
        self.assertFalse(g.acl_allows(None, "READ", g.ANONYMOUS))

    def test_records(self):
        for grants in ((), g.canned_acl("public-read-write", "me"),
                       g.canned_acl("log-delivery-write", "me"),
                       (g.Grant("READ", "somebody else"),)):
            lines = g.dump_acl(grants, "me")
            self.assertEqual(g.load_acl(json.loads(json.dumps(lines)),
                                        "me"), grants)
        self.assertIsNone(g.dump_acl(g.private_acl("me"), "me"))
        self.assertIsNone(g.dump_acl(None, "me"))
        self.assertEqual(g.load_acl(None, "me"), g.private_acl("me"))
        self.assertEqual(g.dump_acl(g.canned_acl("public-read", "me"),
                                    "me"),
                         ["FULL_CONTROL ", "READ @AllUsers"])

    def test_spoilt_records_give_nothing(self):
        for lines in ("READ @AllUsers", {"a": 1}, ["", "OWN x", 7], 3):
            self.assertEqual(g.load_acl(lines, "me"), ())

    def test_public(self):
        for name, expected in (("private", False), ("public-read", True),
                               ("authenticated-read", True),
                               ("log-delivery-write", False),
                               ("aws-exec-read", False)):
            self.assertEqual(g.acl_is_public(g.canned_acl(name, "x")),
                             expected, name)


def bad(**more):
    """The text of a policy with one thing wrong in its statement."""
    return document(statement(**more))


class PolicyDocuments(AccessCase):
    """What parse_policy takes and refuses."""

    def test_taken(self):
        for text in (
                document(statement()),
                document(statement(), Id="x"),
                document(statement(), Version="2008-10-17"),
                '{"Statement":%s}' % json.dumps(statement()),
                document(statement(Sid="Allow Public Access")),
                document(statement(principal={"AWS": ["*"]})),
                document(statement(principal={
                    "AWS": "arn:aws:iam::s3tenant1:root"})),
                document(statement(principal={
                    "AWS": "arn:aws:iam:::user/testx tenanteduser"})),
                document(statement(principal={"AWS": "123456789012"})),
                document(statement(principal={"AWS": "third-id"})),
                document(statement(principal={
                    "Federated": "cognito-identity.amazonaws.com"})),
                document(statement(principal={
                    "AWS": "arn:aws:iam::cloudfront:user/CloudFront Origin "
                           "Access Identity E1EXAMPLE"})),
                document(statement(action="*")),
                document(statement(action="S3:getobject",
                                   resource=OBJECTS)),
                document(statement(resource="*")),
                document(statement(resource=("arn:aws:s3:::*",
                                             "arn:aws:s3:::*/*"))),
                document(statement(resource="arn:aws:s3:::b*")),
                document(statement(resource="arn:aws:s3:::?/x")),
                document(statement(resource="arn:aws:s3:::b/k")),
                document(statement(resource="arn:aws:s3:::b/?")),
                document(statement(resource="arn:aws:s3:::b/${aws:userid}",
                                   action="s3:GetObject")),
                document(statement(resource=None, NotResource=BUCKET,
                                   action="s3:GetObject")),
                document(statement(resource=BUCKET, action=None,
                                   NotAction="s3:ListBucket")),
                document(statement(Condition={})),
                document(statement(Condition={"Null": {
                    "aws:MultiFactorAuthAge": True}})),
                document(statement(Condition={"NumericLessThan": {
                    "aws:EpochTime": 1700000000}})),
                document(statement("Deny", None, NotPrincipal="*"))):
            with self.subTest(text):
                g.parse_policy(text.encode(), "b", PEOPLE.by_user_id)

    def test_refused_with_awss_words(self):
        first = "Policies must be valid JSON and the first byte must be '{'"
        json_ = "This policy contains invalid Json"
        principal = "Invalid principal in policy"
        resource = "Policy has invalid resource"
        action = "Policy has invalid action"
        nothing = "Action does not apply to any resource(s) in statement"
        combination = ("Conditions do not apply to combination of actions "
                       "and resources in statement")
        syntax = "Invalid policy syntax."
        for message, text in (
                (first, ""), (first, "invalid json"), (first, " {}"),
                (first, "[]"), (json_, "{"), (json_, '{"a":NaN}'),
                (json_, '{"Id":"1","Id":"2"}'),
                (json_, '{"a":' + "[" * 100000),
                ("Missing required field Statement", "{}"),
                ("Unknown field Owner", document(statement(), Owner="x")),
                ("The policy must contain a valid version string",
                 document(statement(), Version="2020-01-01")),
                (syntax, document(statement(), Id=1)),
                (syntax, '{"Statement":"x"}'), (syntax, '{"Statement":[1]}'),
                ("Could not parse the policy: Statement is empty!",
                 '{"Statement":[]}'),
                ("Unknown field Foo", bad(Foo=1)),
                ("Missing required field Effect", bad(effect=None)),
                ("Invalid effect: allow", bad(effect="allow")),
                ("Missing required field Principal", bad(principal=None)),
                ("Missing required field Action", bad(action=None)),
                ("Missing required field Resource", bad(resource=None)),
                ("Allow with NotPrincipal is not allowed.",
                 bad(principal=None, NotPrincipal=ALT_ARN)),
                (syntax, bad(NotPrincipal=ALT_ARN)),
                (syntax, bad(NotAction="s3:*")),
                (syntax, bad(Sid=1)), (syntax, bad(Condition=[])),
                (syntax, bad(Condition={"StringEquals": []})),
                ("Statement IDs (SID) in a single policy must be unique.",
                 document(statement(Sid="a"), statement(Sid="a"))),
                (principal, bad(principal="alt")),
                (principal, bad(principal={})),
                (principal, bad(principal={"AWS": []})),
                (principal, bad(principal={"AWS": "nobody"})),
                (principal, bad(principal={"AWS": ""})),
                (principal, bad(principal={"AWS": "arn:aws:iam::1:user/*"})),
                (principal, bad(principal={"AWS": "arn:aws:s3:::b"})),
                (principal, bad(principal={"CanonicalUser": "x"})),
                (principal, bad(principal={"Service": "*"})),
                (principal, bad(principal={"User": "x"})),
                (principal, bad(principal={"AWS": 1})),
                (action, bad(action="GetObject")),
                (action, bad(action="s3:Foo")), (action, bad(action=[])),
                (action, bad(action="ec2:*")), (action, bad(action="s3")),
                (action, bad(action={"a": 1})),
                (action, bad(action="s3:ListAllMyBuckets")),
                (resource, bad(resource="b")),
                (resource, bad(resource=[])),
                (resource, bad(resource="arn:aws:s3:::c/*")),
                (resource, bad(resource="arn:aws:s3:::b2")),
                (resource, bad(resource="arn:aws:s3:::b/")),
                (resource, bad(resource=("arn:aws:s3:::b/x",
                                         "arn:aws:s3:::c"))),
                (resource, bad(resource="arn:aws:sns:::b")),
                (nothing, bad(action="s3:GetObject", resource=BUCKET)),
                (nothing, bad(action=["s3:GetObject", "s3:ListBucket"],
                              resource=OBJECTS)),
                (combination, bad(action="s3:GetObject", Condition={
                    "StringEquals": {"s3:prefix": "x"}})),
                ("Policy has an invalid condition key - s3:foo",
                 bad(Condition={"StringEquals": {"s3:foo": "x"}})),
                ("Policy has an invalid condition key - "
                 "s3:ExistingObjectTag",
                 bad(Condition={"StringEquals": {
                     "s3:ExistingObjectTag": "x"}})),
                ("Invalid Condition type : StringIs",
                 bad(Condition={"StringIs": {"s3:prefix": "x"}})),
                ("Invalid Condition type : NullIfExists",
                 bad(Condition={"NullIfExists": {"s3:prefix": "true"}})),
                ("Invalid Condition type : ForSome:StringEquals",
                 bad(Condition={"ForSome:StringEquals": {
                     "s3:prefix": "true"}})),
                ("Invalid policy variable: ${aws:foo}",
                 bad(resource=BUCKET + "/${aws:foo}"))):
            with self.subTest(text[:300]):
                error = self.refuses("MalformedPolicy", g.parse_policy,
                                     text, "b", PEOPLE.by_user_id)
                self.assertEqual(error.message, message)

    def test_values_that_do_not_fit_their_operator(self):
        for name, key, value in (
                ("IpAddress", "aws:SourceIp", "10.0.0.0/33"),
                ("IpAddress", "aws:SourceIp", "here"),
                ("NumericEquals", "s3:max-keys", "ten"),
                ("DateLessThan", "aws:CurrentTime", "2024-13-01"),
                ("DateLessThan", "aws:CurrentTime", "yesterday"),
                ("DateLessThan", "aws:CurrentTime", "2024-01-01T10:60:00Z"),
                ("Bool", "aws:SecureTransport", "maybe"),
                ("Null", "aws:Referer", "perhaps"),
                ("BinaryEquals", "aws:Referer", "***"),
                ("ArnLike", "aws:SourceArn", "arn:aws:s3"),
                ("StringEquals", "aws:Referer", None),
                ("StringEquals", "aws:Referer", {"a": 1})):
            with self.subTest(name=name, value=value):
                self.refuses("MalformedPolicy", g.parse_policy,
                             document(statement(
                                 Condition={name: {key: value}})), "b")

    def test_size_is_that_of_the_normal_form(self):
        empty = json.dumps({"Statement": statement(Sid="")},
                           separators=(",", ":"))
        item = statement(Sid="s" * (20480 - len(empty)))
        text = json.dumps({"Statement": item})
        g.parse_policy(text.replace(" ", " " * 5000), "b")
        error = self.refuses(
            "MalformedPolicy", g.parse_policy,
            text.replace("sss", "ssss", 1), "b")
        self.assertIn("20480 bytes", error.message)
        self.refuses("MalformedPolicy", g.parse_policy,
                     text + " " * (1 << 20), "b")

    def test_without_known_ids_only_awss_shapes(self):
        text = document(statement(principal={"AWS": "third-id"}))
        self.refuses("MalformedPolicy", g.parse_policy, text, "b")

    def test_stored_policies_outlive_accounts_and_names(self):
        text = document(statement(principal={"AWS": "gone-id"}))
        self.assertEqual(g.stored_policy(text).statements[0].effect,
                         "Allow")
        self.assertIs(g.stored_policy(text), g.stored_policy(text))
        renamed = document(statement(resource="arn:aws:s3:::other/*"))
        self.assertEqual(g.evaluate(g.stored_policy(renamed), g.ANONYMOUS,
                                    "s3:GetObject", BUCKET + "/k",
                                    g.Context()), None)

    def test_spoilt_policies_deny_everything(self):
        for text in ("", "{}", "{'", document(statement(
                Condition={"StringIs": {"s3:foo": "x"}}))):
            for who in ("main", "anon", "logs"):
                self.assertEqual(g.evaluate(
                    g.stored_policy(text), CALLERS[who], "s3:GetObject",
                    BUCKET + "/k", g.Context()), "deny")

    def test_session_policies(self):
        g.parse_session_policy('{"Statement":[{"Effect":"Allow","Action":'
                               '["s3:ListAllMyBuckets","sts:*"],'
                               '"Resource":"*"}]}')
        for text in ("", document(statement()),
                     '{"Statement":{"Effect":"Allow","Action":"nonsense",'
                     '"Resource":"*"}}'):
            self.refuses("MalformedPolicyDocument", g.parse_session_policy,
                         text)


NOW = 1700000000                            # 2023-11-14T22:13:20Z


class PolicyConditions(AccessCase):
    """Operators and keys, each alone in an Allow."""

    def holds(self, name, key, wanted, facts=None, version="2012-10-17",
              **request):
        text = document(statement(
            action="*", Condition={name: {key: wanted}}), Version=version)
        caller = request.pop("caller", CALLERS["alt"])
        context = g.Context(caller, now=NOW, facts=facts, **request)
        return g.evaluate(g.parse_policy(text, "b"), caller,
                          "s3:GetObject", BUCKET + "/k",
                          context) == "allow"

    def table(self, key, rows):
        for name, wanted, given, expected in rows:
            with self.subTest(name=name, wanted=wanted, given=given):
                facts = {} if given is None else {key: given}
                self.assertEqual(self.holds(name, key, wanted, facts),
                                 expected)

    def test_strings(self):
        self.table("aws:Referer", (
            ("StringEquals", "a", "a", True),
            ("StringEquals", "a", "A", False),
            ("StringEquals", ["a", "b"], "b", True),
            ("StringEquals", "a*", "ab", False),
            ("StringEquals", "a*", "a*", True),
            ("StringEquals", "", "", True),
            ("StringEquals", [], "a", False),
            ("StringNotEquals", "a", "b", True),
            ("StringNotEquals", ["a", "b"], "b", False),
            ("StringEqualsIgnoreCase", "aB", "Ab", True),
            ("StringNotEqualsIgnoreCase", "aB", "Ab", False),
            ("StringLike", "a*c", "abbc", True),
            ("StringLike", "a?c", "abbc", False),
            ("StringLike", "a?c", "abc", True),
            ("StringLike", "*", "", True),
            ("StringLike", "http://www.example.com/*",
             "http://www.example.com/index.html", True),
            ("StringNotLike", "a*", "abc", False),
            ("StringNotLike", "a*", "bc", True)))

    def test_absent_keys(self):
        self.table("aws:Referer", (
            ("StringEquals", "a", None, False),
            ("StringNotEquals", "a", None, True),
            ("StringEqualsIfExists", "a", None, True),
            ("StringEqualsIfExists", "a", "b", False),
            ("StringNotEqualsIfExists", "a", None, True),
            ("ForAllValues:StringEquals", "a", None, True),
            ("ForAnyValue:StringEquals", "a", None, False),
            ("ForAnyValue:StringNotEquals", "a", None, False),
            ("ForAnyValue:StringEqualsIfExists", "a", None, True),
            ("Null", "true", None, True), ("Null", "false", None, False),
            ("Null", "true", "x", False), ("Null", "false", "x", True),
            ("Null", ["true", "false"], "x", True)))

    def test_several_values(self):
        self.table("s3:RequestObjectTagKeys", (
            ("ForAllValues:StringEquals", ["a", "b"], ["a", "b"], True),
            ("ForAllValues:StringEquals", ["a"], ["a", "b"], False),
            ("ForAnyValue:StringEquals", ["a"], ["a", "b"], True),
            ("ForAnyValue:StringEquals", ["c"], ["a", "b"], False),
            ("ForAllValues:StringNotEquals", ["c"], ["a", "b"], True),
            ("ForAllValues:StringNotEquals", ["a"], ["a", "b"], False),
            ("ForAnyValue:StringNotEquals", ["a"], ["a", "b"], True),
            ("ForAnyValue:StringNotEquals", ["a", "b"], ["a", "b"], False),
            ("ForAllValues:StringLike", ["a*"], ["a1", "a2"], True),
            ("ForAllValues:StringEquals", ["a"], [], True),
            ("StringEquals", ["a"], ["a", "b"], True),
            ("StringEquals", ["c"], ["a", "b"], False),
            ("StringNotEquals", ["a"], ["a", "b"], False),
            ("StringNotEquals", ["c"], ["a", "b"], True),
            ("Null", "true", [], True)))

    def test_numbers(self):
        self.table("s3:max-keys", (
            ("NumericEquals", "10", "10", True),
            ("NumericEquals", 10, "10.0", True),
            ("NumericEquals", "10", "ten", False),
            ("NumericNotEquals", "10", "11", True),
            ("NumericNotEquals", "10", "10", False),
            ("NumericLessThan", "10", "9", True),
            ("NumericLessThan", "10", "10", False),
            ("NumericLessThanEquals", "10", "10", True),
            ("NumericGreaterThan", "10", "11", True),
            ("NumericGreaterThan", "10", "10", False),
            ("NumericGreaterThanEquals", "10", "10", True),
            ("NumericGreaterThanEquals", "1.5", "1.25", False),
            ("NumericGreaterThan", "10", None, False)))

    def test_dates(self):
        for name, wanted, expected in (
                ("DateGreaterThan", "2023-11-14T22:13:19Z", True),
                ("DateGreaterThan", "2023-11-14T22:13:20Z", False),
                ("DateGreaterThanEquals", "2023-11-14T22:13:20Z", True),
                ("DateLessThan", "2023-11-15", True),
                ("DateLessThan", "2023", False),
                ("DateLessThanEquals", "2023-11-14T23:13:20+01:00", True),
                ("DateEquals", "2023-11-14T22:13:20.000Z", True),
                ("DateEquals", "2023-11-14T22:13:21Z", False),
                ("DateEquals", "2023-11-14T23:43:20+01:30", True),
                ("DateEquals", "2023-11-14T21:13:20-0100", True),
                ("DateLessThan", "2023-11-14T22:13Z", False),
                ("DateLessThan", "2023-11-14T22:14", True),
                ("DateLessThan", "2023-12", True),
                ("DateLessThan", "2023-11", False),
                ("DateEquals", str(NOW), True),
                ("DateNotEquals", str(NOW), False)):
            for key in ("aws:CurrentTime", "aws:EpochTime"):
                with self.subTest(name=name, wanted=wanted, key=key):
                    self.assertEqual(self.holds(name, key, wanted),
                                     expected)
        self.assertTrue(self.holds("NumericLessThan", "aws:EpochTime",
                                   NOW + 1))

    def test_bool_and_binary(self):
        self.table("aws:SecureTransport", (
            ("Bool", "true", True, True), ("Bool", True, "true", True),
            ("Bool", "TRUE", True, True), ("Bool", "false", True, False),
            ("Bool", "false", None, False),
            ("BoolIfExists", "false", None, True)))
        self.table("aws:Referer", (
            ("BinaryEquals", "QmluYXJ5", "QmluYXJ5", True),
            ("BinaryEquals", "QmluYXJ5", "QmluYXJ6", False)))

    def test_addresses(self):
        self.table("aws:SourceIp", (
            ("IpAddress", "203.0.113.0/24", "203.0.113.7", True),
            ("IpAddress", "203.0.113.9/24", "203.0.113.7", True),
            ("IpAddress", "203.0.113.7", "203.0.113.7", True),
            ("IpAddress", "203.0.113.7", "203.0.113.8", False),
            ("IpAddress", "2001:db8::/32", "2001:db8::1", True),
            ("IpAddress", ["2001:db8::/32", "10.0.0.0/8"], "10.1.1.1",
             True),
            ("IpAddress", "10.0.0.0/8", "::ffff:10.1.1.1", True),
            ("IpAddress", "fe80::/16", "fe80::1%eth0", True),
            ("IpAddress", "10.0.0.0/8", "nowhere", False),
            ("IpAddress", "10.0.0.0/8", None, False),
            ("NotIpAddress", "10.0.0.0/8", "10.1.1.1", False),
            ("NotIpAddress", "10.0.0.0/8", "11.1.1.1", True),
            ("NotIpAddress", "10.0.0.0/8", None, True)))

    def test_arns(self):
        self.table("aws:SourceArn", (
            ("ArnEquals", "arn:aws:s3:::src", "arn:aws:s3:::src", True),
            ("ArnLike", "arn:aws:s3:::s*", "arn:aws:s3:::src", True),
            ("ArnEquals", "arn:aws:s3:::s*", "arn:aws:s3:::src", True),
            ("ArnLike", "arn:aws:s3:*:1:x", "arn:aws:s3:r:1:x", True),
            ("ArnLike", "arn:aws:s3:*::x", "arn:aws:s3:r:1:x", False),
            ("ArnLike", "arn:aws:s3:::*", "arn:aws:s3:::a:b", True),
            ("ArnLike", "arn:aws:s3:::a:b", "arn:aws:s3:::a:b", True),
            ("ArnLike", "arn:aws:s3:::a:b", "arn:aws:s3:::a", False),
            ("ArnLike", "*", "arn:aws:s3:::a", True),
            ("ArnLike", "arn:aws:sns:*:*:*", "arn:aws:s3:::a", False),
            ("ArnLike", "arn:aws:s3:::s", "s", False),
            ("ArnLike", "arn:aws:s3::${aws:userid}:x",
             "arn:aws:s3::%s:x" % ALT.user_id, True),
            ("ArnNotLike", "arn:aws:s3:::s*", "arn:aws:s3:::src", False),
            ("ArnNotEquals", "arn:aws:s3:::x", "arn:aws:s3:::src", True)))

    def test_keys_have_no_case_but_tags_have(self):
        facts = {"S3:existingobjecttag": {"Team": "x"}}
        for key, expected in (("s3:ExistingObjectTag/Team", True),
                              ("S3:EXISTINGOBJECTTAG/Team", True),
                              ("s3:ExistingObjectTag/team", False)):
            self.assertEqual(self.holds("StringEquals", key, "x", facts),
                             expected, key)

    def test_keys_of_headers_and_queries(self):
        for key, given, value in (
                ("aws:UserAgent", {"headers": {"user-agent": "v"}}, "v"),
                ("aws:Referer", {"headers": {"referer": "v"}}, "v"),
                ("s3:x-amz-acl", {"headers": {"x-amz-acl": "v"}}, "v"),
                ("s3:x-amz-grant-read-acp",
                 {"headers": {"x-amz-grant-read-acp": "v"}}, "v"),
                ("s3:x-amz-server-side-encryption-aws-kms-key-id",
                 {"headers": {"x-amz-server-side-encryption-aws-kms-key-id":
                              "v"}}, "v"),
                ("s3:object-lock-mode",
                 {"headers": {"x-amz-object-lock-mode": "v"}}, "v"),
                ("s3:if-none-match", {"headers": {"if-none-match": "*"}},
                 "*"),
                ("s3:prefix", {"query": {"prefix": "v"}}, "v"),
                ("s3:max-keys", {"query": {"max-keys": "5"}}, "5"),
                ("s3:delimiter", {"query": {"delimiter": "/"}}, "/"),
                ("s3:VersionId", {"query": {"versionId": "v"}}, "v"),
                ("s3:x-amz-copy-source",
                 {"headers": {"x-amz-copy-source":
                              "/src/a%20b?versionId=1"}}, "src/a b")):
            with self.subTest(key):
                self.assertTrue(self.holds("StringEquals", key, value,
                                           **given))
                self.assertFalse(self.holds("StringEquals", key, value))

    def test_keys_of_the_caller_and_the_time(self):
        for key, value in (
                ("aws:username", "alt"), ("aws:userid", ALT.user_id),
                ("aws:PrincipalArn", "arn:aws:iam::%s:root" % ALT.user_id),
                ("aws:PrincipalAccount", ALT.user_id),
                ("aws:PrincipalType", "Account"),
                ("aws:PrincipalIsAWSService", "false"),
                ("aws:CurrentTime", "2023-11-14T22:13:20Z"),
                ("aws:EpochTime", str(NOW)), ("aws:ViaAWSService", "false")):
            with self.subTest(key):
                self.assertTrue(self.holds("StringEquals", key, value))
        for key in ("aws:username", "aws:PrincipalArn",
                    "aws:PrincipalAccount"):
            self.assertTrue(self.holds("Null", key, "true",
                                       caller=g.ANONYMOUS))
        self.assertTrue(self.holds("StringEquals", "aws:PrincipalType",
                                   "Anonymous", caller=g.ANONYMOUS))
        self.assertTrue(self.holds(
            "StringEquals", "aws:PrincipalServiceName", g.LOGGING_SERVICE,
            caller=CALLERS["logs"]))

    def test_remaining_retention(self):
        for until, days, expected in (
                ("2023-11-24T22:13:20Z", 10, True),
                ("2023-11-24T22:13:19Z", 10, False)):
            self.assertEqual(self.holds(
                "NumericGreaterThanEquals",
                "s3:object-lock-remaining-retention-days", days, headers={
                    "x-amz-object-lock-retain-until-date": until}),
                expected)

    def test_keys_that_no_request_here_has(self):
        for key in ("s3:object-lock-remaining-retention-days",
                    "s3:x-amz-copy-source", "aws:SourceVpce",
                    "aws:PrincipalOrgID", "aws:PrincipalTag/x",
                    "aws:MultiFactorAuthPresent"):
            self.assertTrue(self.holds("Null", key, "true"), key)
            self.assertFalse(self.holds("StringLike", key, "*"), key)
            self.assertTrue(self.holds("StringNotEquals", key, "x"), key)

    def test_facts_are_asked_for_once_and_only_when_needed(self):
        asked = []

        def tags():
            asked.append(1)
            return {"a": "b"}

        context = g.Context(facts={"s3:ExistingObjectTag": tags})
        self.assertEqual(context.get("s3:prefix"), None)
        self.assertEqual(asked, [])
        for _ in range(3):
            self.assertEqual(context.get("s3:existingobjecttag/a"), ["b"])
        self.assertEqual(asked, [1])

    def test_all_of_several_conditions_must_hold(self):
        def verdict(**facts):
            text = document(statement(action="*", Condition={
                "StringEquals": {"aws:Referer": "r", "aws:UserAgent": "u"},
                "Bool": {"aws:SecureTransport": "true"}}))
            return g.evaluate(g.parse_policy(text, "b"), g.ANONYMOUS,
                              "s3:GetObject", BUCKET + "/k", g.Context(
                                  facts={"aws:" + name: value for
                                         name, value in facts.items()}))
        self.assertEqual(verdict(Referer="r", UserAgent="u",
                                 SecureTransport=True), "allow")
        for missing in ("Referer", "UserAgent", "SecureTransport"):
            facts = {"Referer": "r", "UserAgent": "u",
                     "SecureTransport": True}
            facts[missing] = "x"
            self.assertIsNone(verdict(**facts), missing)


class PolicyPatterns(AccessCase):
    """Wildcards and variables."""

    def matches(self, pattern, text, version="2012-10-17", **facts):
        item = statement(action="s3:GetObject", resource=BUCKET + "/"
                         + pattern)
        parsed = g.parse_policy(document(item, Version=version), "b")
        context = g.Context(CALLERS["alt"], facts={
            name.replace("_", ":"): value for name, value in facts.items()})
        return g.evaluate(parsed, CALLERS["alt"], "s3:GetObject",
                          BUCKET + "/" + text, context) == "allow"

    def test_wildcards(self):
        for pattern, text, expected in (
                ("a", "a", True), ("a", "ab", False), ("*", "", True),
                ("a*", "a", True), ("*a", "ba", True), ("*a", "ab", False),
                ("a*b*c", "aXbYc", True), ("a*b*c", "acb", False),
                ("a?", "a", False), ("a?c", "abc", True),
                ("**", "x/y", True), ("?*?", "a", False),
                ("?*?", "ab", True), ("a*a", "a", False),
                ("a*a", "aa", True), ("*.jpg", "x/y.jpg", True),
                ("[a]", "a", False), ("[a]", "[a]", True),
                ("é*", "éa", True), ("a.c", "abc", False)):
            with self.subTest(pattern=pattern, text=text):
                self.assertEqual(self.matches(pattern, text), expected)

    def test_variables(self):
        for pattern, text, expected in (
                ("${aws:username}", "alt", True),
                ("${aws:username}/*", "alt/x", True),
                ("${aws:username}/*", "alto/x", False),
                ("*/${aws:username}/?", "x/y/alt/z", True),
                ("${AWS:UserName}", "alt", True),
                ("${aws:Referer}", "${aws:Referer}", False),
                ("${aws:Referer, 'none'}/x", "none/x", True),
                ("${aws:username, 'none'}/x", "alt/x", True),
                ("a${*}b", "a*b", True), ("a${*}b", "aXb", False),
                ("a${?}b", "a?b", True), ("a${?}b", "aXb", False),
                ("a${$}b", "a$b", True), ("${$}{x}", "${x}", True)):
            with self.subTest(pattern=pattern, text=text):
                self.assertEqual(self.matches(pattern, text), expected)

    def test_what_variables_stand_for_is_literal(self):
        self.assertFalse(self.matches("${aws:Referer}", "anything",
                                      aws_Referer="*"))
        self.assertTrue(self.matches("${aws:Referer}", "*",
                                     aws_Referer="*"))

    def test_a_variable_with_several_values_fits_nothing(self):
        self.assertFalse(self.matches("${aws:TagKeys}", "a",
                                      aws_TagKeys=["a", "b"]))

    def test_the_older_version_has_no_variables(self):
        old = "2008-10-17"
        self.assertFalse(self.matches("${aws:username}", "alt", old))
        self.assertTrue(self.matches("${aws:username}", "${aws:username}",
                                     old))
        self.assertTrue(self.matches("${no:such}*", "${no:such}x", old))

    def test_not_resource_with_an_unknown_value_speaks_of_nothing(self):
        parsed = g.parse_policy(document(statement(
            resource=None, NotResource=BUCKET + "/${aws:Referer}/*")), "b")
        for facts, expected in (({}, None), ({"aws:Referer": "x"}, "allow")):
            self.assertEqual(g.evaluate(
                parsed, g.ANONYMOUS, "s3:GetObject", BUCKET + "/k",
                g.Context(facts=facts)), expected)

    def test_bombs_do_not_go_off(self):
        started = time.perf_counter()
        for pattern, text in (("*a" * 4000 + "*b", "a" * 9000),
                              ("?*" * 4000, "a" * 9000),
                              ("*" * 9000 + "b", "a" * 9000)):
            self.matches(pattern, text)
        self.matches("${aws:Referer}" * 1000, "a" * 1000,
                     aws_Referer="a" * 65536)
        self.assertLess(time.perf_counter() - started, 3)

    def test_agrees_with_the_regular_expression(self):
        draw = random.Random(7)
        for _ in range(2000):
            pattern = "".join(draw.choice("ab*?") for _ in range(
                draw.randrange(8)))
            text = "".join(draw.choice("ab") for _ in range(
                draw.randrange(8)))
            regular = re.compile("(?s)" + "".join(
                {"*": ".*", "?": "."}.get(c, c) for c in pattern) + r"\Z")
            self.assertEqual(g._wild(pattern, False).matches(text),
                             bool(regular.match(text)), (pattern, text))


class PublicPolicies(AccessCase):
    """The meaning of public, and the four switches."""

    def test_policies(self):
        def only(operator, key, *values, **more):
            return statement(action="*", Condition={
                operator: {key: list(values)}}, **more)
        arn = "arn:aws:iam::123456789012:role/x"
        kms = "s3:x-amz-server-side-encryption-aws-kms-key-id"
        for expected, items in (
                (True, [statement()]),
                (True, [statement(principal={"AWS": "*"})]),
                (True, [statement(principal={"AWS": [
                    "123456789012", "*"]})]),
                (False, [statement(principal=ALT_ARN)]),
                (False, [statement(principal=ALT_CANON)]),
                (False, [statement(principal={
                    "Service": g.LOGGING_SERVICE})]),
                (False, [statement("Deny")]),
                (True, [statement(principal=ALT_ARN), statement()]),
                (False, [only("IpAddress", "aws:SourceIp", "10.0.0.0/32")]),
                (False, [only("IpAddress", "aws:SourceIp", "1.0.0.0/8")]),
                (True, [only("IpAddress", "aws:SourceIp", "0.0.0.0/1")]),
                (True, [only("IpAddress", "aws:SourceIp", "0.0.0.0/0")]),
                (True, [only("IpAddress", "aws:SourceIp", "10.0.0.0/16",
                             "::/0")]),
                (False, [only("IpAddress", "aws:SourceIp",
                              "2001:db8::/32")]),
                (True, [only("NotIpAddress", "aws:SourceIp",
                             "10.0.0.0/16")]),
                (True, [only("StringEquals", "aws:SourceIp", "10.0.0.1")]),
                (False, [only("StringEquals", "aws:SourceVpc", "vpc-1")]),
                (True, [only("StringLike", "aws:SourceVpc", "vpc-*")]),
                (False, [only("StringLike", "aws:SourceVpc", "vpc-1")]),
                (True, [only("StringEqualsIfExists", "aws:SourceVpc",
                             "vpc-1")]),
                (True, [only("StringNotEquals", "aws:SourceVpc", "vpc-1")]),
                (True, [only("ForAllValues:StringEquals", "aws:SourceVpc",
                             "vpc-1")]),
                (False, [only("ForAnyValue:StringEquals", "aws:SourceVpc",
                              "vpc-1")]),
                (True, [only("StringEquals", "aws:Referer", "x")]),
                (True, [only("Bool", "aws:SecureTransport", "true")]),
                (False, [only("StringEquals", "aws:PrincipalOrgID", "o-1")]),
                (False, [only("ArnEquals", "aws:PrincipalArn", arn)]),
                (True, [only("ArnLike", "aws:PrincipalArn", arn + "*")]),
                (True, [only("StringLike", "aws:userid", "AROAEXAMPLE:*")]),
                (False, [only("StringEquals", "aws:userid", "AIDAX")]),
                (False, [only("StringEquals", kms, "key")]),
                (True, [only("StringEquals", "aws:SourceAccount",
                             "${aws:username}")])):
            with self.subTest(items):
                self.assertEqual(g.policy_is_public(policy(*items)),
                                 expected)
        self.assertFalse(g.policy_is_public(None))

    def test_block_public_acls(self):
        for name, code in (("private", None), ("public-read",
                                               "AccessDenied"),
                           ("authenticated-read", "AccessDenied"),
                           ("log-delivery-write", None)):
            grants = g.canned_acl(name, "x")
            g.PublicAccessBlock().check_acl(grants)
            if code:
                self.refuses(code, ACL_BLOCKS["all"].check_acl, grants)
            else:
                ACL_BLOCKS["all"].check_acl(grants)

    def test_block_public_policy(self):
        self.refuses("AccessDenied", ACL_BLOCKS["all"].check_policy,
                     POLICIES["get"])
        ACL_BLOCKS["all"].check_policy(POLICIES["alt"])
        g.PublicAccessBlock().check_policy(POLICIES["get"])

    def test_document(self):
        for block in ACL_BLOCKS.values():
            root = g.parse_xml(g.public_access_block_document(block),
                               "PublicAccessBlockConfiguration")
            self.assertEqual(g.parse_public_access_block(root), block)
        for data in (b"<P><BlockPublicAcls>maybe</BlockPublicAcls></P>",
                     b"<P><Other>true</Other></P>"):
            self.refuses("MalformedXML", g.parse_public_access_block,
                         g.parse_xml(data))
        self.assertEqual(g.parse_public_access_block(g.parse_xml(
            b"<P><IgnorePublicAcls>TRUE</IgnorePublicAcls></P>")),
            ACL_BLOCKS["ignore"])


class OwnershipOfWrites(AccessCase):
    """Who owns a new object, with which ACL."""

    def new(self, who, own, block="", **headers):
        access = g.BucketAccess(MAIN.user_id, ownership=OWNERSHIPS[own],
                                block=ACL_BLOCKS[block])
        return g.new_object_acl(
            {name.replace("_", "-"): value
             for name, value in headers.items()}, CALLERS[who], access,
            PEOPLE)

    def test_owner_and_acl(self):
        main, alt = MAIN.user_id, ALT.user_id
        bofc = "bucket-owner-full-control"
        full = g.Grant("FULL_CONTROL", main)
        for who, own, headers, owner, grants in (
                ("alt", "W", {}, alt, g.private_acl(alt)),
                ("alt", "P", {}, alt, g.private_acl(alt)),
                ("alt", "E", {}, main, (full,)),
                ("alt", "W", {"x_amz_acl": bofc}, alt,
                 g.private_acl(alt) + (full,)),
                ("alt", "P", {"x_amz_acl": bofc}, main, (full,)),
                ("alt", "E", {"x_amz_acl": bofc}, main, (full,)),
                ("alt", "P", {"x_amz_acl": "private"}, alt,
                 g.private_acl(alt)),
                ("main", "E", {"x_amz_grant_full_control": "id=" + main},
                 main, (full,)),
                ("anon", "W", {}, g.ANONYMOUS_ID,
                 g.private_acl(g.ANONYMOUS_ID)),
                ("logs", "W", {}, main, (full,)),
                ("alt", "W", {"x_amz_grant_full_control": "id=" + main},
                 alt, (full,))):
            with self.subTest(who=who, own=own, headers=headers):
                self.assertEqual(self.new(who, own, **headers),
                                 (owner, grants))

    def test_acls_off(self):
        for headers in ({"x_amz_acl": "public-read"},
                        {"x_amz_acl": "aws-exec-read"},
                        {"x_amz_acl": "private"},
                        {"x_amz_grant_read": "id=" + ALT.user_id}):
            self.refuses("AccessControlListNotSupported",
                         lambda: self.new("main", "E", **headers))
        access = g.BucketAccess(MAIN.user_id)
        self.refuses("AccessControlListNotSupported", g.check_acl_change,
                     g.private_acl(MAIN.user_id), access)

    def test_blocked(self):
        self.refuses("AccessDenied", lambda: self.new(
            "main", "W", "all", x_amz_acl="public-read"))
        self.new("main", "W", "all", x_amz_acl="private")
        access = g.BucketAccess(MAIN.user_id, ownership=g.WRITER,
                                block=ACL_BLOCKS["all"])
        self.refuses("AccessDenied", g.check_acl_change,
                     g.canned_acl("public-read", MAIN.user_id), access)
        g.check_acl_change(g.private_acl(MAIN.user_id), access)

    def test_ownership_and_a_buckets_acl(self):
        public = g.canned_acl("public-read", "me")
        self.refuses("InvalidBucketAclWithObjectOwnership",
                     g.check_ownership, g.ENFORCED, public, "me")
        self.refuses("MalformedXML", g.check_ownership, "Mine", (), "me")
        g.check_ownership(g.ENFORCED, g.private_acl("me"), "me")
        g.check_ownership(g.WRITER, public, "me")

    def write(self, who, text, **headers):
        caller = CALLERS[who]
        headers = {name.replace("_", "-"): value
                   for name, value in headers.items()}
        access = g.BucketAccess(MAIN.user_id, ownership=g.WRITER,
                                policy=text and policy(*text))
        g.authorize_write(headers, caller, BUCKET + "/k", access,
                          g.Context(caller, headers))

    def test_what_headers_need_besides(self):
        put = statement(action="s3:PutObject", resource=OBJECTS)
        self.write("alt", [put], x_amz_acl="private")
        self.write("alt", [put], x_amz_grant_read="id=x")
        self.write("main", None, x_amz_tagging="a=b")
        for header, action in (
                ("x_amz_tagging", "s3:PutObjectTagging"),
                ("x_amz_object_lock_mode", "s3:PutObjectRetention"),
                ("x_amz_object_lock_legal_hold", "s3:PutObjectLegalHold")):
            self.refuses("AccessDenied",
                         lambda: self.write("alt", [put], **{header: "x"}))
            self.write("alt", [put, statement(
                action=action, resource=OBJECTS)], **{header: "x"})
        deny = statement("Deny", action="s3:PutObjectAcl", resource=OBJECTS)
        self.write("main", [deny])
        self.refuses("AccessDenied", lambda: self.write(
            "main", [deny], x_amz_acl="private"))
        self.refuses("AccessDenied", lambda: self.write("alt", None))

    def test_versions_have_their_own_actions(self):
        for action, version, expected in (
                ("s3:GetObject", None, "s3:GetObject"),
                ("s3:GetObject", "x", "s3:GetObjectVersion"),
                ("s3:PutObjectAcl", "x", "s3:PutObjectVersionAcl"),
                ("s3:GetObjectTagging", "x", "s3:GetObjectVersionTagging"),
                ("s3:DeleteObject", "x", "s3:DeleteObjectVersion"),
                ("s3:PutObjectRetention", "x", "s3:PutObjectRetention")):
            self.assertEqual(g.versioned_action(action, version), expected)
            self.assertIn(expected.lower(), g.OBJECT_ACTIONS)


class AccessTables(AccessCase):
    """Facts that stand in more than one table agree."""

    def test_actions_are_known(self):
        known = g.BUCKET_ACTIONS | g.OBJECT_ACTIONS
        for table in (g._BUCKET_ACL_NEEDS, g._OBJECT_ACL_NEEDS,
                      g._OBJECT_OWNERS_ACTIONS, g._INITIATORS_ACTIONS,
                      g._ROOTS_ACTIONS, g._VERSIONED,
                      g._VERSIONED.values(), g._HEADER_ACTIONS.values()):
            self.assertLessEqual({name.lower() for name in table}, known)
        for key in g.CONDITION_KEYS.values():
            self.assertLessEqual(key.actions or set(), known)
        self.assertFalse(g.BUCKET_ACTIONS & g.OBJECT_ACTIONS)

    def test_derived_and_fixing_keys_are_condition_keys(self):
        self.assertLessEqual(set(g._DERIVED), set(g.CONDITION_KEYS))
        self.assertLessEqual(g._FIXING_KEYS, set(g.CONDITION_KEYS))
        self.assertLessEqual(g._FIXING_OPERATORS, set(g._OPERATORS))

    def test_every_operator_of_the_iam_manual(self):
        self.assertEqual(len(g._OPERATORS), 26)


def running(**values):
    """A Running with ALICE first and BOB second; close() it with both its
    directories by close_running()."""
    top = tempfile.mkdtemp(prefix="test-gos3rve-")
    settings = {"p": 0, "bind": "127.0.0.1", "log": "none",
                "dir_buckets": os.path.join(top, "buckets"),
                "dir_uploads": os.path.join(top, "uploads"),
                "key_id": ALICE.key_id, "key_val": ALICE.secret,
                "user_id": ALICE.user_id, "user_name": ALICE.user_name}
    settings.update(values)
    server = gos3rve.Running(gos3rve.make_config(settings, users=(BOB,)))
    server.top = top
    return server


class TwoAccountRequests(unittest.TestCase):
    """ALICE owns box, BOB owns bobs, by-hand is a directory."""

    @classmethod
    def setUpClass(cls):
        cls.server = running()
        cls.addClassCleanup(shutil.rmtree, cls.server.top, True)
        cls.alice = Client(cls.server.url, ALICE.key_id, ALICE.secret)
        cls.bob = Client(cls.server.url, BOB.key_id, BOB.secret)
        assert cls.alice.put("/box").status == 200
        assert cls.bob.put("/bobs").status == 200
        os.mkdir(os.path.join(cls.server.dir_buckets, "by-hand"))
        assert cls.alice.put("/box/k", b"alice's").status == 200
        assert cls.bob.put("/bobs/k", b"bob's").status == 200

    @classmethod
    def tearDownClass(cls):
        cls.alice.close()
        cls.bob.close()
        cls.server.close(5)

    def denied(self, answer):
        """Assert a 403 AccessDenied."""
        self.assertEqual((answer.status, answer.code),
                         (403, "AccessDenied"), answer.body)

    def test_each_account_lists_its_own_buckets(self):
        for client, name, owner in ((self.alice, "box", ALICE),
                                    (self.bob, "bobs", BOB)):
            answer = client.get("/")
            names = answer.all("Buckets/Bucket/Name")
            self.assertIn(name, names)
            self.assertEqual("by-hand" in names, owner is ALICE)
            self.assertEqual(len({"box", "bobs"} & set(names)), 1)
            self.assertEqual(answer.one("Owner/ID"), owner.user_id)

    def test_a_stranger_may_do_nothing(self):
        for method, path, query, headers in (
                ("GET", "/box", {}, {}), ("GET", "/box/k", {}, {}),
                ("GET", "/box", {"location": ""}, {}),
                ("GET", "/box", {"list-type": "2"}, {}),
                ("GET", "/box", {"acl": ""}, {}),
                ("GET", "/box", {"policy": ""}, {}),
                ("GET", "/box/none", {}, {}), ("PUT", "/box/k", {}, {}),
                ("PUT", "/box/new", {}, {}), ("DELETE", "/box/k", {}, {}),
                ("DELETE", "/box", {}, {}),
                ("PUT", "/box", {"policy": ""}, {}),
                ("POST", "/box/k", {"uploads": ""}, {}),
                ("GET", "/box", {"uploads": ""}, {}),
                ("GET", "/by-hand", {}, {}),
                ("PUT", "/box/k", {"renameObject": ""},
                 {"x-amz-rename-source": "/box/k"})):
            with self.subTest(method=method, path=path, query=query):
                self.denied(self.bob.request(method, path, query,
                                             headers=headers))
        self.assertEqual(self.alice.get("/box/k").body, b"alice's")
        self.assertEqual(self.alice.keys("box"), ["k"])

    def test_the_unsigned_may_do_nothing(self):
        for method, path in (("GET", "/"), ("GET", "/box"),
                             ("GET", "/box/k"), ("PUT", "/box/new"),
                             ("PUT", "/newbucket"), ("DELETE", "/box/k"),
                             ("DELETE", "/box"),
                             ("POST", "/box/k?uploads")):
            with self.subTest(method=method, path=path):
                self.denied(self.alice.send(method, path, headers={
                    "content-length": "0"}))
        self.assertEqual(self.alice.keys("box"), ["k"])

    def test_head_of_a_foreign_bucket_tells_its_region(self):
        answer = self.bob.head("/box")
        self.assertEqual(answer.status, 403)
        self.assertEqual(answer.body, b"")
        self.assertEqual(answer.headers["x-amz-bucket-region"], "us-east-1")

    def test_a_foreign_bucket_name_is_taken(self):
        answer = self.bob.put("/box")
        self.assertEqual((answer.status, answer.code),
                         (409, "BucketAlreadyExists"))
        self.denied(self.bob.get("/box"))

    def test_a_foreign_object_is_no_copy_source(self):
        self.denied(self.bob.put("/bobs/c", headers={
            "x-amz-copy-source": "/box/k"}))
        self.denied(self.bob.put("/box/c", headers={
            "x-amz-copy-source": "/bobs/k"}))
        self.assertEqual(self.bob.keys("bobs"), ["k"])

    def test_a_foreign_object_is_no_part_copy_source(self):
        upload = self.bob.post("/bobs/c", {"uploads": ""}).one("UploadId")
        query = {"uploadId": upload, "partNumber": "1"}
        self.denied(self.bob.put("/bobs/c", query=query, headers={
            "x-amz-copy-source": "/box/k"}))
        parts = self.bob.get("/bobs/c", {"uploadId": upload})
        self.assertEqual(parts.all("Part"), [])
        self.bob.delete("/bobs/c", {"uploadId": upload})

    def test_a_foreign_upload_id_is_unknown_in_ones_own_bucket(self):
        upload = self.alice.post("/box/u", {"uploads": ""}).one("UploadId")
        for method, query in (("PUT", {"partNumber": "1"}), ("GET", {}),
                              ("DELETE", {})):
            answer = self.bob.request(method, "/bobs/u", dict(
                query, uploadId=upload))
            self.assertEqual((answer.status, answer.code),
                             (404, "NoSuchUpload"))
        self.assertEqual(self.alice.delete(
            "/box/u", {"uploadId": upload}).status, 204)

    def test_the_expected_owner_must_be_the_owner(self):
        name = "x-amz-expected-bucket-owner"
        self.denied(self.alice.get("/box/k", headers={name: BOB.user_id}))
        self.denied(self.alice.put("/box/n", b"x", headers={
            name: BOB.user_id}))
        self.denied(self.alice.put("/box/n", headers={
            "x-amz-copy-source": "/box/k",
            "x-amz-source-expected-bucket-owner": BOB.user_id}))
        self.assertEqual(self.alice.get("/box/k", headers={
            name: ALICE.user_id}).body, b"alice's")
        self.assertEqual(self.alice.keys("box"), ["k"])

    def test_the_owner_stands_in_acl_listing_and_uploads(self):
        self.assertEqual(self.bob.get("/bobs/k", {"acl": ""}).one(
            "AccessControlList/Grant/Grantee/ID"), BOB.user_id)
        answer = self.bob.get("/bobs", {"list-type": "2",
                                        "fetch-owner": "true"})
        self.assertEqual(answer.all("Contents/Owner/ID"), [BOB.user_id])
        upload = self.bob.post("/bobs/o", {"uploads": ""}).one("UploadId")
        answer = self.bob.get("/bobs", {"uploads": ""})
        self.assertEqual(answer.all("Upload/Initiator/ID"), [BOB.user_id])
        self.assertEqual(answer.all("Upload/Owner/ID"), [BOB.user_id])
        self.bob.delete("/bobs/o", {"uploadId": upload})

    def test_a_wrong_secret_or_key_id_is_refused(self):
        wrong = Client(self.server.url, ALICE.key_id, BOB.secret)
        self.addCleanup(wrong.close)
        answer = wrong.get("/box/k")
        self.assertEqual((answer.status, answer.code),
                         (403, "SignatureDoesNotMatch"))
        self.assertTrue(answer.one("StringToSign").startswith(
            "AWS4-HMAC-SHA256\n"))
        self.assertTrue(answer.one("CanonicalRequest").startswith(
            "GET\n/box/k\n"))
        wrong.key_id = "NOBODY"
        answer = wrong.get("/box/k")
        self.assertEqual((answer.status, answer.code),
                         (403, "InvalidAccessKeyId"))
        self.assertEqual(answer.one("AWSAccessKeyId"), "NOBODY")

    def test_owners_outlast_a_restart(self):
        top = self.server.top
        again = running(dir_buckets=os.path.join(top, "buckets"),
                        dir_uploads=os.path.join(top, "uploads"))
        self.addCleanup(shutil.rmtree, again.top, True)
        self.addCleanup(again.close, 5)
        bob = Client(again.url, BOB.key_id, BOB.secret)
        self.addCleanup(bob.close)
        self.assertEqual(bob.get("/bobs/k").body, b"bob's")
        self.denied(bob.get("/box/k"))


class ReadOnlyRequests(unittest.TestCase):

    def setUp(self):
        self.top = temporary_directory(self)
        os.makedirs(os.path.join(self.top, "box", "d"))
        with open(os.path.join(self.top, "box", "d", "f"), "wb") as file:
            file.write(b"data")
        self.server = gos3rve.serve(self.top, readonly=True)
        self.addCleanup(self.server.close, 5)
        self.s3 = Client(self.server.url, self.server.key_id,
                         self.server.key_val)
        self.addCleanup(self.s3.close)

    def tree(self):
        """Every path below the directory of the buckets."""
        return sorted(os.path.join(base, name) for base, dirs, files
                      in os.walk(self.top) for name in dirs + files)

    def test_reads_are_answered(self):
        self.assertEqual(self.s3.get("/box/d/f").body, b"data")
        self.assertEqual(self.s3.head("/box/d/f").status, 200)
        self.assertEqual(self.s3.keys("box"), ["d/f"])
        self.assertEqual(self.s3.get("/").all("Buckets/Bucket/Name"),
                         ["box"])

    def test_every_change_is_AccessDenied_and_changes_nothing(self):
        before = self.tree()
        delete = b"<Delete><Object><Key>d/f</Key></Object></Delete>"
        for method, path, query, body, headers in (
                ("PUT", "/box/n", {}, b"x", {}),
                ("PUT", "/other", {}, b"", {}),
                ("DELETE", "/box/d/f", {}, b"", {}),
                ("DELETE", "/box", {}, b"", {}),
                ("PUT", "/box/n", {}, b"", {"x-amz-copy-source":
                                            "/box/d/f"}),
                ("PUT", "/box/n", {"renameObject": ""}, b"",
                 {"x-amz-rename-source": "/box/d/f"}),
                ("POST", "/box", {"delete": ""}, delete,
                 {"content-md5": digest64("md5", delete)}),
                ("POST", "/box/n", {"uploads": ""}, b"", {})):
            with self.subTest(method=method, path=path, query=query):
                answer = self.s3.request(method, path, query, body,
                                         headers=headers)
                self.assertEqual((answer.status, answer.code),
                                 (403, "AccessDenied"))
        self.assertEqual(self.tree(), before)


# --- cross-origin requests ---

def cors_element(text):
    """The root of a CORSConfiguration with these rules' XML."""
    return g.parse_xml(("<CORSConfiguration>%s</CORSConfiguration>"
                        % text).encode(), "CORSConfiguration")


def rule_xml(*children):
    """A CORSRule of (tag, text) pairs."""
    return g.xml_fragment([("CORSRule", list(children))])


ORIGIN, METHOD = ("AllowedOrigin", "*"), ("AllowedMethod", "GET")
NOT_ALLOWED = g.ERRORS["AccessForbidden"][1]
LOCAL = "https://localhost:4200"


class CorsCase(unittest.TestCase):

    def refused(self, code, message, call, *args):
        """Assert the S3Error of a call; returns it."""
        with self.assertRaises(g.S3Error) as caught:
            call(*args)
        error = caught.exception
        self.assertEqual(error.code, code, error.message)
        if message is not None:
            self.assertEqual(error.message, message)
        return error


class CorsDocuments(CorsCase):

    FULL = g.CorsRule(("http://a.example", "*"), ("GET", "HEAD"),
                      ("x-amz-*", "X-Case"), ("ETag",), 0, "one & two")

    def test_it_comes_back_as_it_went_in(self):
        for rules in ((self.FULL,), (self.FULL, g.CorsRule(("",), ("PUT",))),
                      g.default_cors(["*"])[:0]):
            again = () if not rules else g.parse_cors(g.parse_xml(
                g.cors_document(rules), "CORSConfiguration"))
            self.assertEqual(again, rules)
            stored = json.loads(json.dumps(g.dump_cors(rules)))
            self.assertEqual(g.load_cors(stored), rules)
        self.assertEqual(g.load_cors(None), ())

    def test_what_is_written(self):
        self.assertEqual(
            g.cors_document((g.CorsRule(("*",), ("GET",), max_age=5),)),
            b'<?xml version="1.0" encoding="UTF-8"?>\n<CORSConfiguration '
            b'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><CORSRule>'
            b"<AllowedMethod>GET</AllowedMethod><AllowedOrigin>*"
            b"</AllowedOrigin><MaxAgeSeconds>5</MaxAgeSeconds></CORSRule>"
            b"</CORSConfiguration>")
        self.assertEqual(g.dump_cors((g.CorsRule(("*",), ("GET",)),)),
                         [{"origins": ["*"], "methods": ["GET"]}])

    def test_what_the_schema_has_not(self):
        for text in (
                "", "<Rule/>", rule_xml(), rule_xml(ORIGIN),
                rule_xml(METHOD), rule_xml(ORIGIN, METHOD) + "<x/>",
                rule_xml(ORIGIN, METHOD, ("Other", "x")),
                rule_xml(ORIGIN, METHOD, ("ID", "a"), ("ID", "b")),
                rule_xml(ORIGIN, METHOD, ("MaxAgeSeconds", "1"),
                         ("MaxAgeSeconds", "1")),
                rule_xml(METHOD, ("AllowedOrigin", [("x", "")]))) + tuple(
                    rule_xml(ORIGIN, METHOD, ("MaxAgeSeconds", age))
                    for age in ("", "x", "1.5", "1 2", "2147483648",
                                "-2147483649", "9" * 5000, "\u0661")):
            with self.subTest(text[:99]):
                self.refused("MalformedXML", None, g.parse_cors,
                             cors_element(text))

    def test_what_s3_does_not_take(self):
        for children, message in (
                ((ORIGIN, METHOD, ("AllowedMethod", "MYMETHOD")),
                 "Found unsupported HTTP method in CORS config. Unsupported "
                 "method is MYMETHOD"),
                ((ORIGIN, ("AllowedMethod", "get")),
                 "Found unsupported HTTP method in CORS config. Unsupported "
                 "method is get"),
                ((ORIGIN, ("AllowedMethod", "")),
                 "Found unsupported HTTP method in CORS config. Unsupported "
                 "method is "),
                ((METHOD, ("AllowedOrigin", "*example*.com")),
                 'AllowedOrigin "*example*.com" can not have more than one '
                 "wildcard."),
                ((ORIGIN, METHOD, ("AllowedHeader", "*-*")),
                 'AllowedHeader "*-*" can not have more than one wildcard.'),
                ((ORIGIN, METHOD, ("ExposeHeader", "x-*")),
                 'ExposeHeader "x-*" contains wildcard. We currently do not '
                 "support wildcard for ExposeHeader."),
                ((ORIGIN, METHOD, ("AllowedHeader", "a b")),
                 'AllowedHeader "a b" contains invalid character.'),
                ((ORIGIN, METHOD, ("ExposeHeader", "a\nb: c")),
                 'AllowedHeader "a\nb: c" contains invalid character.'),
                ((ORIGIN, METHOD, ("ID", "x" * 256)),
                 "The ID value can be up to 255 characters long.")):
            self.refused("InvalidRequest", message, g.parse_cors,
                         cors_element(rule_xml(*children)))

    def test_the_edges_of_what_it_takes(self):
        one = rule_xml(ORIGIN, METHOD)
        self.assertEqual(len(g.parse_cors(cors_element(one * 100))), 100)
        self.refused("InvalidRequest", "The number of CORS rules should not "
                     "exceed allowed limit of 100 rules.", g.parse_cors,
                     cors_element(one * 101))
        rule, = g.parse_cors(cors_element(rule_xml(
            ("AllowedOrigin", ""), METHOD, ("ID", "x" * 255),
            ("MaxAgeSeconds", " -100 "), ("AllowedHeader", "x-AMZ-a"))))
        self.assertEqual(rule, g.CorsRule(
            ("",), ("GET",), ("x-AMZ-a",), (), -100, "x" * 255))


class CorsMatching(CorsCase):

    def test_origins(self):
        """ceph/s3-tests test_cors_origin_response."""
        rules = (g.CorsRule(("*suffix",), ("GET",)),
                 g.CorsRule(("start*end",), ("GET",)),
                 g.CorsRule(("prefix*",), ("GET",)),
                 g.CorsRule(("*.put",), ("PUT",)))
        for origin, method, allowed in (
                ("foo.suffix", "GET", True), ("suffix", "GET", True),
                ("foo.bar", "GET", False), ("foo.suffix.get", "GET", False),
                ("startend", "GET", True), ("start1end", "GET", True),
                ("starend", "GET", False), ("0start12end", "GET", False),
                ("prefix", "GET", True), ("prefix.suffix", "GET", True),
                ("bla.prefix", "GET", False), ("foo.put", "GET", False),
                ("foo.put", "PUT", True), ("foo.suffix", "DELETE", False),
                ("foo.SUFFIX", "GET", False), ("startend\n", "GET", False)):
            with self.subTest(origin=origin, method=method):
                answer = g.actual_cors(rules, method, {"origin": origin})
                self.assertEqual(bool(answer), allowed)
                headers = {"origin": origin,
                           "access-control-request-method": method}
                if allowed:
                    self.assertEqual(
                        answer["Access-Control-Allow-Origin"], origin)
                    self.assertEqual(g.preflight(rules, headers), answer)
                else:
                    self.refused("AccessForbidden", NOT_ALLOWED,
                                 g.preflight, rules, headers)

    def test_overlapping_ends_are_no_match(self):
        rules = (g.CorsRule(("aba*aba",), ("GET",)),)
        self.assertFalse(g.actual_cors(rules, "GET", {"origin": "aba"}))
        self.assertFalse(g.actual_cors(rules, "GET", {"origin": "ababa"}))
        self.assertTrue(g.actual_cors(rules, "GET", {"origin": "abaaba"}))

    def test_an_empty_origin_pattern_matches_nothing(self):
        rules = (g.CorsRule(("",), ("GET",)),)
        self.assertEqual(g.actual_cors(rules, "GET", {"origin": ""}), {})

    def test_everything_an_answer_says(self):
        rule = g.CorsRule((LOCAL,), ("GET", "PUT"), ("*",), ("ETag", "x-b"),
                          3000)
        headers = {"origin": LOCAL, "access-control-request-method": "PUT",
                   "access-control-request-headers": "X-Amz-Date,, x-b "}
        self.assertEqual(g.preflight((rule,), headers), {
            "Access-Control-Allow-Origin": LOCAL,
            "Access-Control-Allow-Methods": "GET, PUT",
            "Access-Control-Allow-Headers": "x-amz-date, x-b",
            "Access-Control-Expose-Headers": "ETag, x-b",
            "Access-Control-Max-Age": "3000",
            "Access-Control-Allow-Credentials": "true",
            "Vary": "Origin, Access-Control-Request-Headers, "
                    "Access-Control-Request-Method"})

    def test_the_origin_star_has_no_credentials(self):
        rules = (g.CorsRule(("https://a", "*"), ("GET",)),)
        answer = g.actual_cors(rules, "GET", {"origin": "http://random:1"})
        self.assertEqual(answer, {
            "Access-Control-Allow-Origin": "*",
            "Access-Control-Allow-Methods": "GET", "Vary": g.CORS_VARY})
        answer = g.actual_cors(rules, "GET", {"origin": "https://a"})
        self.assertEqual(answer["Access-Control-Allow-Origin"], "https://a")
        self.assertEqual(answer["Access-Control-Allow-Credentials"], "true")

    def test_requested_headers(self):
        """LocalStack's test_cors_match_headers, recorded on AWS."""
        rules = (g.CorsRule((LOCAL,), ("GET",), (
            "x-amz-expected-bucket-owner", "x-AMZ-server-SIDE-encryption",
            "x-one-*")),)
        for text, answer in (
                ("x-amz-request-payer", None),
                ("x-one-, X-One-Two", "x-one-, x-one-two"),
                ("x-AMZ-expected-BUCKET-owner, x-amz-server-side-encryption",
                 "x-amz-expected-bucket-owner, "
                 "x-amz-server-side-encryption"),
                ("x-amz-expected-bucket-owner,x-amz-request-payer", None),
                ("", ""), (" , ", "")):
            headers = {"origin": LOCAL,
                       "access-control-request-method": "GET",
                       "access-control-request-headers": text}
            if answer is None:
                self.refused("AccessForbidden", NOT_ALLOWED, g.preflight,
                             rules, headers)
            else:
                self.assertEqual(g.preflight(rules, headers).get(
                    "Access-Control-Allow-Headers", ""), answer)
            self.assertEqual(bool(g.actual_cors(rules, "GET", headers)),
                             answer is not None)

    def test_no_allowed_header_allows_none(self):
        rules = (g.CorsRule(("*",), ("GET",), (), ("x-amz-meta-header1",)),)
        error = self.refused(
            "AccessForbidden", NOT_ALLOWED, g.preflight, rules, {
                "origin": "example.origin",
                "access-control-request-method": "GET",
                "access-control-request-headers": "x-amz-meta-header2"})
        self.assertEqual(error.fields,
                         {"Method": "GET", "ResourceType": "OBJECT"})

    def test_the_request_method_header_decides(self):
        rules = (g.CorsRule((LOCAL,), ("GET",)),)
        for method, asked, allowed in (
                ("GET", None, True), ("GET", "PUT", False),
                ("PUT", "GET", True), ("PUT", None, False)):
            headers = {"origin": LOCAL}
            if asked:
                headers["access-control-request-method"] = asked
            self.assertEqual(bool(g.actual_cors(rules, method, headers)),
                             allowed)

    def test_the_first_rule_that_matches_wholly_answers(self):
        rules = (g.CorsRule(("*",), ("PUT",), max_age=1),
                 g.CorsRule(("*",), ("GET",), max_age=2),
                 g.CorsRule(("*",), ("GET",), max_age=3))
        self.assertEqual(g.actual_cors(rules, "GET", {"origin": "x"})[
            "Access-Control-Max-Age"], "2")


class CorsPreflights(CorsCase):

    RULES = (g.CorsRule(("http://a",), ("GET",)),)

    def test_what_is_refused(self):
        """LocalStack's test_cors_http_options_*, recorded on AWS."""
        origin = {"origin": "http://a"}
        put = dict(origin, **{"access-control-request-method": "PUT"})
        no_origin = ("Insufficient information. Origin request header "
                     "needed.")
        for rules, headers, code, message, fields in (
                (self.RULES, {}, "BadRequest", no_origin, {}),
                ((), {}, "BadRequest", no_origin, {}),
                (None, {}, "BadRequest", no_origin, {}),
                ((), put, "AccessForbidden",
                 "CORSResponse: CORS is not enabled for this bucket.",
                 {"Method": "PUT", "ResourceType": "BUCKET"}),
                ((), origin, "AccessForbidden",
                 "CORSResponse: CORS is not enabled for this bucket.",
                 {"Method": "OPTIONS", "ResourceType": "BUCKET"}),
                (None, origin, "AccessForbidden",
                 "CORSResponse: Bucket not found",
                 {"Method": "OPTIONS", "ResourceType": "BUCKET"}),
                (self.RULES, origin, "BadRequest",
                 "Invalid Access-Control-Request-Method: null", {}),
                (self.RULES, dict(put, **{
                    "access-control-request-method": "PATCH"}), "BadRequest",
                 "Invalid Access-Control-Request-Method: PATCH", {}),
                (self.RULES, dict(put, **{
                    "access-control-request-headers": "a, b(c)"}),
                 "BadRequest", 'Access-Control-Request-Headers "b(c)" '
                 "contains invalid character.", {}),
                (self.RULES, put, "AccessForbidden", NOT_ALLOWED,
                 {"Method": "PUT", "ResourceType": "BUCKET"})):
            with self.subTest(rules=rules, headers=headers):
                error = self.refused(code, message, g.preflight, rules,
                                     headers, "BUCKET")
                self.assertEqual(error.fields, fields)
                self.assertEqual(error.status,
                                 400 if code == "BadRequest" else 403)

    def test_an_actual_request_is_never_refused(self):
        for rules in (self.RULES, (), None):
            for headers in ({}, {"origin": "http://b"},
                            {"origin": "http://a",
                             "access-control-request-method": "nonsense"}):
                self.assertEqual(g.actual_cors(rules, "GET", headers), {})


class CorsDefault(CorsCase):

    def test_it_lets_a_browser_do_everything(self):
        for origins, origin, allowed in (
                (("*",), "http://x", "*"), ((), "http://x", None),
                (("http://a", "http://*.b"), "http://c.b", "http://c.b"),
                (("http://a",), "http://b", None)):
            rules = g.default_cors(origins)
            for method in g.CORS_METHODS:
                answer = g.actual_cors(rules, method, {
                    "origin": origin,
                    "access-control-request-headers": "authorization,x-b"})
                self.assertEqual(answer.get("Access-Control-Allow-Origin"),
                                 allowed)
            if allowed:
                self.assertEqual(answer["Access-Control-Allow-Headers"],
                                 "authorization, x-b")
                self.assertIn("ETag",
                              answer["Access-Control-Expose-Headers"])

    def test_two_stars_are_an_error(self):
        with self.assertRaises(ValueError):
            g.default_cors(["http://*.*"])


###############################################################################
# 8. Operations
###############################################################################

def document_element(root, inner=""):
    """The Element of a document in S3's namespace."""
    return g.parse_xml(
        '<%s xmlns="http://s3.amazonaws.com/doc/2006-03-01/">%s</%s>' % (
            root, inner, root), root)


def plain_xml(root, children):
    """The document of `children`, less its declaration and namespace."""
    text = g.xml_document(root, children).decode()
    return text.partition("\n")[2].replace(
        ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"', "", 1)


class DocumentCase(unittest.TestCase):
    """What the tests of documents share."""

    def refused(self, code, message, function, *args, **fields):
        """The S3Error; its message begins with `message`."""
        with self.assertRaises(g.S3Error) as caught:
            function(*args)
        error = caught.exception
        self.assertEqual((error.code, error.message[:len(message)]),
                         (code, message))
        for name, value in fields.items():
            self.assertEqual(error.fields.get(name), value)
        return error

    def kept(self, value):
        """`value` itself, after JSON."""
        self.assertEqual(json.loads(json.dumps(value)), value)
        return value


class OperationCase(ServerCase):
    """ServerCase with what the families share."""

    def fill(self, *keys):
        """Put an object of one byte under each key."""
        for key in keys:
            self.ok(self.s3.put("/box/" + key, b"x"))

    def by_hand(self, path, data=b"by hand"):
        """Write a file into the bucket's directory."""
        path = self.path(*path.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        return path

    def tree(self):
        """Path -> content below the bucket's directory, state aside."""
        found = {}
        for base, dirs, files in os.walk(self.path()):
            if gos3rve.STATE in dirs:
                dirs.remove(gos3rve.STATE)
            for name in files:
                path = os.path.join(base, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, self.path())] = file.read()
        return found

    def body(self, key, data):
        """Assert the content of an object."""
        self.assertEqual(self.ok(self.s3.get("/box/" + key)).body, data)


# --- buckets ---

class BucketRequests(OperationCase):

    def tearDown(self):
        for name in self.s3.get("/").all("Buckets/Bucket/Name"):
            if name != "box":
                shutil.rmtree(os.path.join(self.server.dir_buckets, name))

    def create(self, name, region=None, status=200):
        """CreateBucket, with a LocationConstraint when given."""
        body = b"" if region is None else (
            '<CreateBucketConfiguration xmlns="http://s3.amazonaws.com/doc/'
            '2006-03-01/"><LocationConstraint>%s</LocationConstraint>'
            '</CreateBucketConfiguration>' % region).encode()
        answer = self.s3.put("/" + name, body)
        self.assertEqual(answer.status, status, answer.body)
        return answer

    def test_a_bucket_is_a_directory(self):
        answer = self.create("new-bucket")
        self.assertEqual(answer.headers["location"], "/new-bucket")
        self.assertTrue(os.path.isdir(os.path.join(
            self.server.dir_buckets, "new-bucket")))
        self.assertEqual(self.s3.head("/new-bucket").status, 200)
        self.assertEqual(self.s3.keys("new-bucket"), [])
        self.ok(self.s3.delete("/new-bucket"), 204)
        self.assertFalse(os.path.exists(os.path.join(
            self.server.dir_buckets, "new-bucket")))
        self.error(self.s3.get("/new-bucket"), "NoSuchBucket", 404)

    def test_good_names_are_taken(self):
        for name in ("abc", "a" * 63, "my.bucket", "0-9", "a.b-c.9"):
            with self.subTest(name=name):
                self.create(name)

    def test_bad_names_are_InvalidBucketName(self):
        for name in ("ab", "a" * 64, "Upper", "under_score", "-lead",
                     "trail-", ".lead", "trail.", "two..dots",
                     "192.168.0.1", "xn--puny", "sthree-x", "x-s3alias",
                     "x--ol-s3", "sp ace", "..", ".gos3rve", "a%00b",
                     "b\u00fccket"):
            with self.subTest(name=name):
                self.error(self.create(name, status=400),
                           "InvalidBucketName", 400)

    def test_a_location_is_given_back(self):
        for region in ("eu-west-1", "ap-southeast-2", "my-test-region-7"):
            with self.subTest(region=region):
                self.create("loc-" + region, region)
                answer = self.ok(self.s3.get("/loc-" + region,
                                             {"location": ""}))
                self.assertEqual(answer.xml().tag, "LocationConstraint")
                self.assertEqual(answer.xml().text, region)
                self.assertEqual(self.s3.head("/loc-" + region).headers[
                    "x-amz-bucket-region"], region)

    def test_us_east_1_is_an_empty_location(self):
        self.create("plain")
        answer = self.s3.get("/plain", {"location": ""})
        self.assertIn(answer.xml().text, (None, ""))
        self.assertEqual(self.s3.head("/plain").headers[
            "x-amz-bucket-region"], "us-east-1")

    def test_eu_is_eu_west_1(self):
        self.create("old-eu", "EU")
        self.assertIn(self.s3.get("/old-eu", {"location": ""}).xml().text,
                      ("EU", "eu-west-1"))

    def test_bad_locations_and_documents_are_refused(self):
        self.error(self.create("bad", "no/where", 400),
                   "InvalidLocationConstraint")
        for body in (b"<Other/>", b"<a", b"not xml"):
            self.error(self.s3.put("/bad", body), "MalformedXML", 400)
        self.error(self.s3.head("/bad"), "", 404)

    def test_making_it_twice(self):
        self.create("twice-east")
        self.ok(self.s3.put("/twice-east/k", b"kept"))
        self.create("twice-east")
        self.assertEqual(self.s3.get("/twice-east/k").body, b"kept")
        self.create("twice-west", "us-west-2")
        self.error(self.create("twice-west", "us-west-2", 409),
                   "BucketAlreadyOwnedByYou", 409)

    def test_head_of_a_missing_bucket_has_no_body(self):
        answer = self.s3.head("/missing")
        self.assertEqual((answer.status, answer.body), (404, b""))

    def test_a_bucket_with_objects_is_not_deleted(self):
        self.create("full")
        for key in ("k", "deep/er/k", "odd//k"):
            with self.subTest(key=key):
                self.ok(self.s3.put("/full/" + key, b"x"))
                self.error(self.s3.delete("/full"), "BucketNotEmpty", 409)
                self.assertEqual(self.s3.keys("full"), [key])
                self.ok(self.s3.delete("/full/" + key), 204)
        self.ok(self.s3.delete("/full"), 204)

    def test_a_file_put_by_hand_keeps_a_bucket(self):
        self.create("hands")
        path = os.path.join(self.server.dir_buckets, "hands", "f")
        with open(path, "wb"):
            pass
        self.error(self.s3.delete("/hands"), "BucketNotEmpty", 409)
        self.assertTrue(os.path.exists(path))

    def test_empty_directories_do_not_keep_a_bucket(self):
        self.create("hollow")
        os.makedirs(os.path.join(self.server.dir_buckets, "hollow", "a",
                                 "b"))
        self.assertEqual(self.s3.keys("hollow"), [])
        self.ok(self.s3.delete("/hollow"), 204)

    def test_uploads_do_not_keep_a_bucket_and_go_with_it(self):
        self.create("busy")
        upload = self.s3.post("/busy/k", {"uploads": ""}).one("UploadId")
        self.ok(self.s3.put("/busy/k", b"x", {"uploadId": upload,
                                              "partNumber": "1"}))
        self.ok(self.s3.delete("/busy"), 204)
        self.create("busy")
        answer = self.s3.get("/busy", {"uploads": ""})
        self.assertEqual(answer.all("Upload/Key"), [])

    def test_deleting_a_missing_bucket_is_NoSuchBucket(self):
        self.error(self.s3.delete("/missing"), "NoSuchBucket", 404)

    def test_a_query_never_lets_a_bucket_be_deleted(self):
        for query in ("anything", "prefix=x", "location", "delete", "acl",
                      "versions", "uploads", "list-type=2", "versionId=null",
                      "logging", "x-amz-foo=1",
                      "uploadId", "force", "recursive=true", "accelerate",
                      "prefix=../../x", "partNumber=1", "%61cl", "Acl"):
            with self.subTest(query=query):
                pairs = [tuple((urllib.parse.unquote(query) + "="
                                ).split("=")[:2])]
                answer = self.s3.delete("/box", pairs)
                self.assertGreaterEqual(answer.status, 400)
                self.assertEqual(self.s3.head("/box").status, 200)

    def test_the_signing_names_of_sdks_are_no_subresource(self):
        self.create("sdk")
        self.ok(self.s3.delete("/sdk", {"x-id": "DeleteBucket"}), 204)

    def test_a_stray_file_is_no_bucket(self):
        path = os.path.join(self.server.dir_buckets, "a-file")
        with open(path, "wb") as file:
            file.write(b"secret")
        self.addCleanup(os.unlink, path)
        self.assertEqual(self.s3.get("/").all("Buckets/Bucket/Name"),
                         ["box"])
        self.error(self.s3.get("/a-file"), "NoSuchBucket", 404)
        self.error(self.s3.delete("/a-file"), "NoSuchBucket", 404)


class ListBucketsRequests(OperationCase):

    NAMES = ["aa1", "aa2", "ab1", "box", "zz1"]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for name in cls.NAMES:
            cls.s3.put("/" + name)

    def names(self, **query):
        """The names of one page, and the Answer."""
        answer = self.ok(self.s3.get("/", {
            n.replace("_", "-"): v for n, v in query.items()}))
        return answer.all("Buckets/Bucket/Name"), answer

    def test_all_buckets_in_order_with_dates_and_owner(self):
        names, answer = self.names()
        self.assertEqual(names, self.NAMES)
        for date in answer.all("Buckets/Bucket/CreationDate"):
            self.assertRegex(date, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertTrue(answer.one("Owner/ID"))
        self.assertIsNone(answer.one("ContinuationToken"))

    def test_prefix(self):
        names, answer = self.names(prefix="aa")
        self.assertEqual(names, ["aa1", "aa2"])
        self.assertEqual(answer.one("Prefix"), "aa")
        self.assertEqual(self.names(prefix="none")[0], [])

    def test_pages_of_every_size_give_all(self):
        for size in (1, 2, 3, 5, 10000):
            with self.subTest(size=size):
                found, query = [], {}
                for _ in range(len(self.NAMES) + 1):
                    names, answer = self.names(max_buckets=str(size),
                                               **query)
                    self.assertLessEqual(len(names), size)
                    found += names
                    token = answer.one("ContinuationToken")
                    if not token:
                        break
                    query = {"continuation_token": token}
                self.assertEqual(found, self.NAMES)

    def test_bad_parameters_are_InvalidArgument(self):
        for query in ({"max-buckets": "0"}, {"max-buckets": "-1"},
                      {"max-buckets": "x"},
                      {"continuation-token": "!no token!"}):
            with self.subTest(query=query):
                self.error(self.s3.get("/", query), "InvalidArgument", 400)

    def test_bucket_region_filters(self):
        self.assertEqual(self.names(bucket_region="us-east-1")[0],
                         self.NAMES)
        self.assertEqual(self.names(bucket_region="eu-west-1")[0], [])


# --- listings ---

def listing_model(keys, prefix="", delimiter=""):
    """What S3 lists: [("K" or "P", key or common prefix)] in order."""
    found = []
    for key in sorted(keys, key=str.encode):
        if not key.startswith(prefix):
            continue
        cut = key.find(delimiter, len(prefix)) if delimiter else -1
        entry = ("K", key) if cut < 0 else (
            "P", key[:cut + len(delimiter)])
        if entry not in found[-1:]:
            found.append(entry)
    return found


class ListingRequests(OperationCase):

    KEYS = ["a", "a-b", "a/", "a/b", "a/b/c", "a/b/d", "a0", "b//c", "b/c",
            "photos/2006/Feb/1", "photos/2006/Jan/2", "photos/2007/x",
            "quo'te \"<&>", "sp ace+plus%25", "\u00e9t\u00e9/\U0001f600",
            "z"]
    TAGS = {"Contents": "Key", "Version": "Key",
            "CommonPrefixes": "Prefix"}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for key in cls.KEYS:
            cls.s3.put("/box/" + key, key.encode())

    def setUp(self):
        """The objects stay: no test here changes them."""

    def entries(self, answer):
        """[("K" or "P", text)] of a page, in document order."""
        decode = urllib.parse.unquote if answer.one("EncodingType") else str
        return [("P" if child.tag == "CommonPrefixes" else "K",
                 decode(child.findtext(self.TAGS[child.tag])))
                for child in answer.xml() if child.tag in self.TAGS]

    def pages(self, query, following):
        """The entries of all pages; following(answer, entries) gives the
        next page's parameters."""
        found, more = [], {}
        for _ in range(len(self.KEYS) + 2):
            answer = self.ok(self.s3.get("/box", dict(query, **more)))
            entries = self.entries(answer)
            self.assertLessEqual(len(entries), int(query["max-keys"]))
            found += entries
            if answer.one("IsTruncated") == "false":
                return found
            self.assertEqual(answer.one("IsTruncated"), "true")
            self.assertEqual(len(entries), int(query["max-keys"]))
            more = following(answer, entries)
        self.fail("the listing does not end")

    def all_ways(self, first, following):
        """Compare with the model for prefixes, delimiters, page sizes."""
        for prefix in ("", "a", "a/", "photos/2", "none", "b/", "sp ",
                       "\u00e9t"):
            for delimiter in ("", "/", "-", "20", "/b"):
                want = listing_model(self.KEYS, prefix, delimiter)
                for size in ("1", "2", "5", "1000"):
                    query = dict(first, **{"max-keys": size})
                    query.update({"prefix": prefix} if prefix else {})
                    query.update({"delimiter": delimiter}
                                 if delimiter else {})
                    with self.subTest(query=query):
                        self.assertEqual(self.pages(query, following),
                                         want)

    def test_version_2_in_all_ways(self):
        self.all_ways({"list-type": "2"}, lambda answer, _: {
            "continuation-token": answer.one("NextContinuationToken")})

    def test_version_1_in_all_ways(self):
        def following(answer, entries):
            # NextMarker comes with a delimiter only: API_ListObjects
            marker = answer.one("NextMarker")
            return {"marker": entries[-1][1] if marker is None else marker}
        self.all_ways({}, following)

    def test_versions_in_all_ways(self):
        def following(answer, _):
            return {"key-marker": answer.one("NextKeyMarker"),
                    "version-id-marker":
                        answer.one("NextVersionIdMarker") or ""}
        self.all_ways({"versions": ""}, following)

    def test_an_entry_tells_what_head_tells(self):
        head = self.s3.head("/box/a/b/c")
        for query in ({}, {"list-type": "2"}):
            answer = self.s3.get("/box", dict(query, prefix="a/b/c"))
            self.assertEqual(answer.all("Contents/ETag"),
                             [head.headers["etag"]])
            self.assertEqual(answer.all("Contents/Size"), ["5"])
            self.assertEqual(answer.all("Contents/StorageClass"),
                             ["STANDARD"])
            date = answer.one("Contents/LastModified")
            self.assertRegex(date, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
            self.assertEqual(
                calendar.timegm(time.strptime(date[:19],
                                              "%Y-%m-%dT%H:%M:%S")),
                calendar.timegm(time.strptime(
                    head.headers["last-modified"],
                    "%a, %d %b %Y %H:%M:%S GMT")))

    def test_the_parameters_come_back(self):
        answer = self.s3.get("/box", {
            "list-type": "2", "prefix": "a/", "delimiter": "/",
            "max-keys": "1", "start-after": "a-"})
        self.assertEqual(answer.xml().tag, "ListBucketResult")
        for name, value in (("Name", "box"), ("Prefix", "a/"),
                            ("Delimiter", "/"), ("MaxKeys", "1"),
                            ("KeyCount", "1"), ("StartAfter", "a-"),
                            ("IsTruncated", "true")):
            self.assertEqual(answer.one(name), value, name)
        token = answer.one("NextContinuationToken")
        answer = self.s3.get("/box", {
            "list-type": "2", "continuation-token": token})
        self.assertEqual(answer.one("ContinuationToken"), token)
        answer = self.s3.get("/box", {"marker": "a0", "prefix": "b"})
        for name, value in (("Marker", "a0"), ("Prefix", "b"),
                            ("MaxKeys", "1000"), ("IsTruncated", "false")):
            self.assertEqual(answer.one(name), value, name)
        self.assertIsNone(answer.one("KeyCount"))

    def test_owner_comes_with_v1_and_when_fetched_with_v2(self):
        for query, has in (({}, True), ({"list-type": "2"}, False),
                           ({"list-type": "2", "fetch-owner": "true"}, True),
                           ({"list-type": "2", "fetch-owner": "false"},
                            False)):
            with self.subTest(query=query):
                answer = self.s3.get("/box", dict(query, prefix="z"))
                self.assertEqual(len(answer.all("Contents/Owner/ID")), has)

    def test_start_after_and_marker_need_not_exist(self):
        keys = [key for key in sorted(self.KEYS, key=str.encode)
                if key.encode() > b"a/a"]
        for query in ({"list-type": "2", "start-after": "a/a"},
                      {"marker": "a/a"}):
            answer = self.s3.get("/box", query)
            self.assertEqual(answer.all("Contents/Key"), keys)
        for query in ({"list-type": "2", "start-after": "\u00ea"},
                      {"marker": "\u00ea"}):
            self.assertEqual(self.s3.get("/box", query).all("Contents"), [])

    def test_a_token_rules_over_start_after(self):
        first = self.s3.get("/box", {"list-type": "2", "max-keys": "3",
                                     "start-after": "b"})
        second = self.s3.get("/box", {
            "list-type": "2", "start-after": "b", "continuation-token":
            first.one("NextContinuationToken")})
        found = first.all("Contents/Key") + second.all("Contents/Key")
        self.assertEqual(found, [k for k in sorted(
            self.KEYS, key=str.encode) if k > "b"])

    def test_max_keys_zero_is_an_empty_complete_page(self):
        for query in ({}, {"list-type": "2"}, {"versions": ""},
                      {"list-type": "2", "delimiter": "/"}):
            with self.subTest(query=query):
                answer = self.ok(self.s3.get("/box", dict(
                    query, **{"max-keys": "0"})))
                self.assertEqual(self.entries(answer), [])
                self.assertEqual(answer.one("MaxKeys"), "0")
                self.assertEqual(answer.one("IsTruncated"), "false")

    def test_max_keys_is_at_most_1000(self):
        answer = self.s3.get("/box", {"list-type": "2",
                                      "max-keys": "2147483647"})
        self.assertEqual(answer.one("MaxKeys"), "1000")
        self.assertEqual(answer.one("KeyCount"), str(len(self.KEYS)))

    def test_bad_parameters_are_InvalidArgument(self):
        for query in ({"max-keys": "-1"}, {"max-keys": "x"},
                      {"max-keys": "1.5"}, {"encoding-type": "xml"},
                      {"list-type": "3"}, {"list-type": "2",
                                           "continuation-token": "no!"},
                      {"versions": "", "version-id-marker": "null"},
                      {"max-keys": "99999999999999999999999"}):
            with self.subTest(query=query):
                self.error(self.s3.get("/box", query), "InvalidArgument",
                           400)

    def test_encoding_type_url_encodes_all_but_the_plain(self):
        for first in ({}, {"list-type": "2"}, {"versions": ""}):
            with self.subTest(first=first):
                answer = self.ok(self.s3.get("/box", dict(first, **{
                    "encoding-type": "url"})))
                self.assertEqual(answer.one("EncodingType"), "url")
                tag = "Version" if "versions" in first else "Contents"
                raw = answer.all(tag + "/Key")
                for text in raw:
                    self.assertRegex(text, r"\A[A-Za-z0-9._~/*+%-]+\Z")
                self.assertEqual(
                    [urllib.parse.unquote(text) for text in raw],
                    sorted(self.KEYS, key=str.encode))
                self.assertIn("a/b/c", raw)

    def test_encoding_type_covers_prefix_delimiter_and_markers(self):
        for first, names in (
                ({"marker": "\u00e9 "}, ("Marker",)),
                ({"list-type": "2", "start-after": "\u00e9 "},
                 ("StartAfter",)),
                ({"versions": "", "key-marker": "\u00e9 "},
                 ("KeyMarker",))):
            answer = self.s3.get("/box", dict(first, **{
                "encoding-type": "url", "prefix": "\u00e9 ",
                "delimiter": "\u00e9 "}))
            for name in names + ("Prefix", "Delimiter"):
                with self.subTest(name=name):
                    self.assertEqual(answer.one(name), "%C3%A9%20")

    def test_common_prefixes_are_encoded_too(self):
        answer = self.s3.get("/box", {"list-type": "2", "delimiter": "/",
                                      "encoding-type": "url",
                                      "prefix": "\u00e9"})
        self.assertEqual(answer.all("CommonPrefixes/Prefix"),
                         ["%C3%A9t%C3%A9/"])

    def test_an_empty_delimiter_is_none(self):
        answer = self.s3.get("/box", {"list-type": "2", "delimiter": ""})
        self.assertEqual(answer.one("KeyCount"), str(len(self.KEYS)))

    def test_a_traversing_prefix_lists_nothing(self):
        for prefix in ("../", "..", "../../etc", "/", "/etc/", "./", "a/../",
                       "a/b/../../..", ".gos3rve/", ".gos3rve", "\\..\\"):
            for query in ({}, {"list-type": "2"}, {"versions": ""},
                          {"list-type": "2", "delimiter": "/"}):
                with self.subTest(prefix=prefix, query=query):
                    answer = self.ok(self.s3.get("/box", dict(
                        query, prefix=prefix)))
                    self.assertEqual(self.entries(answer), [])

    def test_a_traversing_marker_is_only_text(self):
        for query in ({"marker": "../../zz"}, {"marker": "/etc"},
                      {"list-type": "2", "start-after": "../../.."}):
            answer = self.ok(self.s3.get("/box", query))
            self.assertEqual(len(answer.all("Contents")), len(self.KEYS))

    def test_a_missing_bucket_is_NoSuchBucket(self):
        for query in ({}, {"list-type": "2"}, {"versions": ""},
                      {"uploads": ""}):
            answer = self.s3.get("/missing-bucket", query)
            self.error(answer, "NoSuchBucket", 404)
            self.assertEqual(answer.one("BucketName"), "missing-bucket")


class ListingOptionRequests(OperationCase):

    def test_state_and_empty_directories_are_not_listed(self):
        os.makedirs(self.path("empty", "er"))
        self.fill("k", "odd//k")
        for query in ({"list-type": "2"}, {"list-type": "2",
                                           "delimiter": "/"}):
            answer = self.s3.get("/box", query)
            self.assertNotIn(b"empty", answer.body)
            self.assertNotIn(b".gos3rve", answer.body)

    def test_files_put_by_hand_are_listed_at_once(self):
        self.assertEqual(self.s3.keys("box"), [])
        self.by_hand("d/one")
        self.assertEqual(self.s3.keys("box"), ["d/one"])
        self.by_hand("d/two")
        self.assertEqual(self.s3.keys("box"), ["d/one", "d/two"])
        os.unlink(self.path("d", "one"))
        self.assertEqual(self.s3.keys("box"), ["d/two"])
        answer = self.s3.get("/box")
        self.assertEqual(answer.one("Contents/ETag"),
                         self.s3.head("/box/d/two").headers["etag"])

    def test_listing_tells_the_checksum_and_the_class(self):
        self.ok(self.s3.put("/box/k", b"x", headers={
            "x-amz-checksum-crc32": crc64(b"x"),
            "x-amz-storage-class": "STANDARD_IA"}))
        for query in ({}, {"list-type": "2"}, {"versions": ""}):
            tag = "Version/" if query == {"versions": ""} else "Contents/"
            answer = self.s3.get("/box", query)
            self.assertEqual(answer.all(tag + "ChecksumAlgorithm"),
                             ["CRC32"])
            self.assertEqual(answer.all(tag + "ChecksumType"),
                             ["FULL_OBJECT"])
            self.assertEqual(answer.all(tag + "StorageClass"),
                             ["STANDARD_IA"])

    def test_optional_attributes_are_accepted(self):
        self.fill("k")
        answer = self.s3.get("/box", {"list-type": "2"}, headers={
            "x-amz-optional-object-attributes": "RestoreStatus"})
        self.assertEqual(answer.all("Contents/Key"), ["k"])

    def test_control_characters_come_through_url_encoding(self):
        keys = ["a\nb", "a\rb", "a\tb", "a\x01b"]
        self.fill(*keys)
        self.assertEqual(sorted(self.s3.keys("box")), sorted(keys))

    def test_versions_are_each_the_null_version(self):
        self.fill("a", "b")
        answer = self.ok(self.s3.get("/box", {"versions": ""}))
        self.assertEqual(answer.xml().tag, "ListVersionsResult")
        self.assertEqual(answer.all("Version/VersionId"), ["null", "null"])
        self.assertEqual(answer.all("Version/IsLatest"), ["true", "true"])
        self.assertEqual(len(answer.all("Version/Owner/ID")), 2)
        self.assertEqual(answer.all("DeleteMarker"), [])

    def test_the_null_version_can_be_read_and_deleted(self):
        self.fill("a")
        query = {"versionId": "null"}
        self.assertEqual(self.ok(self.s3.get("/box/a", query)).body, b"x")
        self.ok(self.s3.head("/box/a", query))
        other = {"versionId": "3sL4kqtJlcpXroDTDmJ.rmSpXd3dIbrHY"}
        self.error(self.s3.get("/box/a", other), "InvalidArgument", 400)
        other = {"versionId": "0123456789abcdef" * 2}
        self.error(self.s3.get("/box/a", other), "NoSuchVersion", 404)
        self.s3.delete("/box/a", other)
        self.body("a", b"x")
        self.ok(self.s3.delete("/box/a", query), 204)
        self.error(self.s3.get("/box/a"), "NoSuchKey", 404)


# --- put, get, head ---

class ObjectRequests(OperationCase):

    def test_put_answers_200_and_the_md5_as_quoted_etag(self):
        for data in (b"", b"hello", bytes(range(256)) * 2000):
            answer = self.ok(self.s3.put("/box/k", data))
            self.assertEqual(answer.body, b"")
            self.assertEqual(answer.headers["etag"], '"%s"'
                             % hashlib.md5(data).hexdigest())
            got = self.ok(self.s3.get("/box/k"))
            self.assertEqual(got.body, data)
            self.assertEqual(got.headers["etag"], answer.headers["etag"])
            self.assertEqual(got.headers["content-length"],
                             str(len(data)))
            self.assertEqual(self.tree(), {"k": data})

    def test_head_is_get_without_a_body(self):
        self.ok(self.s3.put("/box/k", b"hello", headers={
            "x-amz-meta-a": "b", "cache-control": "no-store"}))
        get, head = self.s3.get("/box/k"), self.ok(self.s3.head("/box/k"))
        self.assertEqual(head.body, b"")
        for name in set(get.headers) - {"date", "x-amz-request-id",
                                        "x-amz-id-2"}:
            self.assertEqual(head.headers[name], get.headers[name], name)
        self.assertEqual(head.headers["accept-ranges"], "bytes")

    def test_every_answer_has_a_request_id(self):
        for answer in (self.s3.put("/box/k", b"x"), self.s3.get("/box/k"),
                       self.s3.get("/box/no"), self.s3.head("/box/no"),
                       self.s3.delete("/box/k")):
            self.assertTrue(answer.headers["x-amz-request-id"])

    def test_an_error_names_code_resource_and_request(self):
        answer = self.error(self.s3.get("/box/no key"), "NoSuchKey", 404)
        self.assertEqual(answer.xml().tag, "Error")
        self.assertNotIn(b"xmlns", answer.body)
        self.assertEqual(answer.one("RequestId"),
                         answer.headers["x-amz-request-id"])
        self.assertEqual(answer.one("Key"), "no key")

    def test_head_errors_have_no_body(self):
        for path in ("/box/no", "/none/k", "/box/no/deep"):
            answer = self.s3.head(path)
            self.assertEqual((answer.status, answer.body), (404, b""))

    def test_a_put_into_a_missing_bucket_is_NoSuchBucket(self):
        self.error(self.s3.put("/missing/k", b"x"), "NoSuchBucket", 404)

    def test_descriptive_headers_come_back(self):
        headers = {"content-type": "text/x-odd; charset=utf-8",
                   "cache-control": "max-age=3, private",
                   "content-disposition": 'attachment; filename="a b.txt"',
                   "content-encoding": "gzip",
                   "content-language": "de, en",
                   "expires": "Wed, 21 Oct 2037 07:28:00 GMT",
                   "x-amz-website-redirect-location": "/other"}
        self.ok(self.s3.put("/box/k", b"x", headers=headers))
        for answer in (self.s3.get("/box/k"), self.s3.head("/box/k")):
            for name, value in headers.items():
                self.assertEqual(answer.headers[name], value)
        self.ok(self.s3.put("/box/k", b"x"))
        answer = self.s3.get("/box/k")
        for name in set(headers) - {"content-type"}:
            self.assertNotIn(name, answer.headers)

    def test_without_a_type_it_is_binary_octet_stream(self):
        self.ok(self.s3.put("/box/page.html", b"x"))
        self.assertEqual(self.s3.get("/box/page.html").headers[
            "content-type"], "binary/octet-stream")

    def test_a_form_type_is_only_a_type(self):
        form = "application/x-www-form-urlencoded"
        self.ok(self.s3.put("/box/k", b"a=b&c=d", headers={
            "content-type": form}))
        answer = self.s3.get("/box/k")
        self.assertEqual((answer.body, answer.headers["content-type"]),
                         (b"a=b&c=d", form))

    def test_the_type_of_a_file_put_by_hand_is_by_its_name(self):
        for name, kind in (("a.html", "text/html"), ("b.txt", "text/plain"),
                           ("c.png", "image/png"), ("d.json",
                                                    "application/json"),
                           ("d/e.css", "text/css"),
                           ("noext", "binary/octet-stream"),
                           ("f.tar.gz", None)):
            with self.subTest(name=name):
                self.by_hand(name)
                answer = self.ok(self.s3.get("/box/" + name))
                self.assertEqual(answer.body, b"by hand")
                self.assertNotIn("content-encoding", answer.headers)
                if kind:
                    self.assertEqual(answer.headers["content-type"], kind)

    def test_a_file_put_by_hand_has_an_etag_that_is_no_md5(self):
        self.by_hand("f")
        first = self.s3.get("/box/f").etag
        self.assertNotRegex(first, r"\A[0-9a-f]{32}\Z")
        self.assertIn("-", first)
        self.assertEqual(self.s3.head("/box/f").etag, first)
        self.by_hand("f", b"edited by hand")
        self.assertNotEqual(self.s3.head("/box/f").etag, first)

    def test_an_edited_object_loses_its_md5_and_keeps_its_headers(self):
        self.ok(self.s3.put("/box/k", b"first", headers={
            "content-type": "text/odd", "x-amz-meta-a": "b",
            "x-amz-checksum-crc32": crc64(b"first")}))
        self.by_hand("k", b"second, by hand")
        answer = self.s3.get("/box/k", headers={
            "x-amz-checksum-mode": "ENABLED"})
        self.assertEqual(answer.body, b"second, by hand")
        self.assertNotEqual(answer.etag, hashlib.md5(b"first").hexdigest())
        self.assertNotIn("x-amz-checksum-crc32", answer.headers)
        self.assertEqual(answer.headers["content-type"], "text/odd")
        self.assertEqual(answer.headers["x-amz-meta-a"], "b")

    def test_user_metadata_comes_back_in_lower_case(self):
        self.ok(self.s3.put("/box/k", b"x", headers={
            "X-Amz-Meta-CamelCase": "Keeps Case", "x-amz-meta-empty": "",
            "x-amz-meta-a.b_c": "1,2"}))
        headers = self.s3.head("/box/k").headers
        self.assertEqual(headers["x-amz-meta-camelcase"], "Keeps Case")
        self.assertEqual(headers["x-amz-meta-empty"], "")
        self.assertEqual(headers["x-amz-meta-a.b_c"], "1,2")

    def test_non_ascii_metadata_comes_back_as_rfc_2047(self):
        for text in ("\u00e9t\u00e9", "\u65e5\u672c\u8a9e", "\U0001f600"):
            with self.subTest(text=text):
                self.ok(self.s3.put("/box/k", b"x", headers={
                    "x-amz-meta-t": text.encode().decode("latin-1")}))
                value = self.s3.get("/box/k").headers["x-amz-meta-t"]
                match = re.match(r"=\?UTF-8\?([BQ])\?(.*)\?=\Z", value,
                                 re.IGNORECASE)
                self.assertTrue(match, value)
                self.assertEqual(base64.b64decode(match.group(2)).decode(),
                                 text)

    def test_metadata_of_2_kb_is_kept_and_more_is_refused(self):
        # names count too, without their prefix: UsingMetadata.html
        headers = {"x-amz-meta-k": "v" * 2047}
        self.ok(self.s3.put("/box/k", b"x", headers=headers))
        self.assertEqual(self.s3.head("/box/k").headers["x-amz-meta-k"],
                         "v" * 2047)
        headers = {"x-amz-meta-k": "v" * 2048}
        self.error(self.s3.put("/box/k", b"y", headers=headers),
                   "MetadataTooLarge", 400)
        self.body("k", b"x")

    def test_the_overrides_of_a_read(self):
        self.ok(self.s3.put("/box/k", b"x", headers={
            "content-type": "text/a", "cache-control": "b"}))
        query = {"response-content-type": "text/other",
                 "response-content-language": "nl",
                 "response-expires": "Wed, 21 Oct 2037 07:28:00 GMT",
                 "response-cache-control": "no-cache",
                 "response-content-disposition": 'inline; filename="x y"',
                 "response-content-encoding": "br"}
        for answer in (self.s3.get("/box/k", query),
                       self.s3.head("/box/k", query)):
            self.ok(answer)
            for name, value in query.items():
                self.assertEqual(answer.headers[name[9:]], value)
        self.assertEqual(self.s3.get("/box/k").headers["content-type"],
                         "text/a")

    def test_an_override_cannot_break_the_head(self):
        self.ok(self.s3.put("/box/k", b"x"))
        for text in ("a\r\nx-evil: 1", "a\nb", "a\x00b", "a\rb"):
            with self.subTest(text=text):
                answer = self.s3.get("/box/k", {
                    "response-content-type": text})
                self.assertEqual(answer.status, 400)
                self.assertNotIn("x-evil", answer.headers)

    def test_storage_class(self):
        self.ok(self.s3.put("/box/k", b"x", headers={
            "x-amz-storage-class": "GLACIER_IR"}))
        self.assertEqual(self.s3.head("/box/k").headers[
            "x-amz-storage-class"], "GLACIER_IR")
        self.ok(self.s3.put("/box/k", b"x", headers={
            "x-amz-storage-class": "STANDARD"}))
        self.assertNotIn("x-amz-storage-class",
                         self.s3.head("/box/k").headers)
        self.error(self.s3.put("/box/k", b"y", headers={
            "x-amz-storage-class": "NO_CLASS"}), "InvalidStorageClass", 400)
        self.body("k", b"x")

    def test_odd_keys_are_kept_apart(self):
        keys = ["a", "a/", "a/b", "a//b", "/lead", "//", ".", "..", "../x",
                "a/../b", "%2F", "a+b", "a b", "\u00e9", "e\u0301",
                "q'\"&<>?#", "nl\nx", "\x01", ".gos3rve/bucket.json",
                ".gos3rve", "back\\slash", "\U0001f600", "s" * 600,
                "d/" + "n" * 255 + "/" + "m" * 256, "L" * 1024, "b/./c",
                "b//", "?acl", "~tilde-_.", "*", "trail "]
        for order in (keys, keys[::-1]):
            for key in order:
                self.ok(self.s3.put("/box/" + key, key.encode()))
            for key in order:
                with self.subTest(key=key):
                    self.body(key, key.encode())
            self.assertEqual(self.s3.keys("box"), sorted(
                keys, key=str.encode))
            for key in order:
                with self.subTest(deleted=key):
                    self.ok(self.s3.delete("/box/" + key), 204)
                    self.ok(self.s3.get("/box/" + key), 404)
            self.assertEqual(self.s3.keys("box"), [])

    def test_a_key_of_1025_bytes_is_KeyTooLongError(self):
        for key in ("x" * 1025, "\u00e9" * 513):
            for method in ("PUT", "GET", "DELETE"):
                answer = self.s3.request(method, "/box/" + key, body=b"")
                self.error(answer, "KeyTooLongError", 400)
        self.ok(self.s3.put("/box/" + "\u00e9" * 512, b"x"))

    def test_a_put_without_a_length_is_MissingContentLength(self):
        headers = self.s3.sign("PUT", "/box/k", [], {}, "UNSIGNED-PAYLOAD")
        headers.pop("host")
        answer = self.s3.send("PUT", "/box/k", headers=headers)
        self.error(answer, "MissingContentLength", 411)
        self.assertEqual(self.s3.keys("box"), [])

    def test_a_wrong_payload_hash_stores_nothing(self):
        wrong = hashlib.sha256(b"other").hexdigest()
        answer = self.s3.put("/box/k", b"data", payload=wrong)
        self.error(answer, "XAmzContentSHA256Mismatch", 400)
        self.assertEqual(self.s3.keys("box"), [])

    def test_content_md5(self):
        for value, code in ((digest64("md5", b"other"), "BadDigest"),
                            ("not base64", "InvalidDigest"),
                            ("YWJj", "InvalidDigest")):
            answer = self.s3.put("/box/k", b"data", headers={
                "content-md5": value})
            self.error(answer, code, 400)
        self.assertEqual(self.s3.keys("box"), [])
        self.ok(self.s3.put("/box/k", b"data", headers={
            "content-md5": digest64("md5", b"data")}))

    def test_what_is_not_done_is_said_and_not_ignored(self):
        for name, value in (
                ("x-amz-server-side-encryption", "aws:kms:dsse"),
                ("x-amz-write-offset-bytes", "1")):
            with self.subTest(name=name):
                self.error(self.s3.put("/box/k", b"x", headers={
                    name: value}), "NotImplemented", 501)
        self.assertEqual(self.s3.keys("box"), [])
        self.ok(self.s3.put("/box/k", b"x", headers={
            "x-amz-acl": "bucket-owner-full-control"}))

    def test_unknown_parameters_do_not_matter(self):
        self.ok(self.s3.put("/box/k", b"x", {"x-id": "PutObject"}))
        self.assertEqual(self.ok(self.s3.get("/box/k", {
            "x-id": "GetObject", "unknown": "1"})).body, b"x")

    def test_an_unknown_method_is_MethodNotAllowed(self):
        for method, path in (("PATCH", "/box/k"), ("POST", "/box/k"),
                             ("DELETE", "/"), ("PUT", "/")):
            with self.subTest(method=method, path=path):
                self.error(self.s3.request(method, path),
                           "MethodNotAllowed", 405)


# --- ranges and preconditions ---

class RangeRequests(OperationCase):

    def test_ranges(self):
        self.ok(self.s3.put("/box/k", b"0123456789"))
        for value, body, told in (
                ("bytes=0-3", b"0123", "0-3"), ("bytes=5-", b"56789", "5-9"),
                ("bytes=-3", b"789", "7-9"), ("bytes=9-9", b"9", "9-9"),
                ("bytes=0-99", b"0123456789", "0-9"),
                ("bytes=0-", b"0123456789", "0-9"),
                ("bytes=-99", b"0123456789", "0-9"),
                ("bytes=10-", None, None), ("bytes=-0", None, None),
                ("bytes=20-30", None, None),
                ("bytes=3-1", b"0123456789", None),
                ("items=0-1", b"0123456789", None),
                ("bytes=0-1,3-4", b"0123456789", None),
                ("bytes=abc", b"0123456789", None),
                ("bytes=", b"0123456789", None),
                ("bytes=-", b"0123456789", None)):
            with self.subTest(value=value):
                answer = self.s3.get("/box/k", headers={"range": value})
                head = self.s3.head("/box/k", headers={"range": value})
                self.assertEqual(answer.status, head.status)
                if body is None:
                    self.error(answer, "InvalidRange", 416)
                    self.assertEqual(answer.headers["content-range"],
                                     "bytes */10")
                    self.assertEqual(answer.one("ActualObjectSize"), "10")
                    continue
                self.assertEqual(answer.body, body)
                self.assertEqual(answer.status, 206 if told else 200)
                for one in (answer, head):
                    self.assertEqual(one.headers.get("content-range"),
                                     told and "bytes %s/10" % told)
                    self.assertEqual(one.headers["content-length"],
                                     str(len(body)))

    def test_nothing_of_an_empty_object_is_satisfiable(self):
        self.ok(self.s3.put("/box/k"))
        for value in ("bytes=0-0", "bytes=0-", "bytes=40-50"):
            self.error(self.s3.get("/box/k", headers={"range": value}),
                       "InvalidRange", 416)

    def test_a_large_range_is_exact(self):
        data = random.Random(8).getrandbits(8 * 300000).to_bytes(
            300000, "big")
        self.ok(self.s3.put("/box/k", data))
        for start, stop in ((0, 300000), (1, 299999), (65535, 200001),
                            (299999, 300000)):
            answer = self.s3.get("/box/k", headers={
                "range": "bytes=%d-%d" % (start, stop - 1)})
            self.assertEqual(answer.body, data[start:stop])

    def test_if_range(self):
        answer = self.ok(self.s3.put("/box/k", b"0123456789"))
        date = self.s3.head("/box/k").headers["last-modified"]
        for value, status in ((answer.headers["etag"], 206), (date, 206),
                              ('"other"', 200),
                              ("W/" + answer.headers["etag"], 200),
                              ("Mon, 01 Jan 2001 00:00:00 GMT", 200)):
            with self.subTest(value=value):
                got = self.s3.get("/box/k", headers={
                    "range": "bytes=2-3", "if-range": value})
                self.assertEqual(got.status, status)

    def test_the_part_of_an_object_put_at_once_is_the_whole(self):
        self.ok(self.s3.put("/box/k", b"0123456789"))
        answer = self.s3.get("/box/k", {"partNumber": "1"})
        self.assertEqual((answer.status, answer.body),
                         (206, b"0123456789"))
        self.assertEqual(answer.headers["content-range"], "bytes 0-9/10")
        self.error(self.s3.get("/box/k", {"partNumber": "2"}),
                   "InvalidPartNumber", 416)
        for number in ("0", "10001", "x", "-1"):
            with self.subTest(number=number):
                self.error(self.s3.get("/box/k", {"partNumber": number}),
                           "InvalidArgument", 400)

    def test_range_and_partNumber_exclude_each_other(self):
        self.ok(self.s3.put("/box/k", b"0123456789"))
        self.error(self.s3.get("/box/k", {"partNumber": "1"}, headers={
            "range": "bytes=0-1"}), "InvalidRequest", 400)


class PreconditionRequests(OperationCase):

    def setUp(self):
        super().setUp()
        self.etag = self.ok(self.s3.put("/box/k", b"data")).headers["etag"]
        self.date = self.s3.head("/box/k").headers["last-modified"]

    def cases(self):
        """(conditions, status of a read, status of a copy)."""
        etag, same = self.etag, self.date
        before = "Mon, 01 Jan 2001 00:00:00 GMT"
        other, bare = '"%032d"' % 7, self.etag.strip('"')
        match, none_match = "if-match", "if-none-match"
        modified, unmodified = "if-modified-since", "if-unmodified-since"
        return (
            ({match: etag}, 200, 200), ({match: bare}, 200, 200),
            ({match: "*"}, 200, 200), ({match: other}, 412, 412),
            ({match: other + ", " + etag}, 200, 200),
            ({none_match: other}, 200, 200), ({none_match: etag}, 304, 412),
            ({none_match: bare}, 304, 412), ({none_match: "*"}, 304, 412),
            ({none_match: 'W/' + etag}, 304, 412),
            ({modified: before}, 200, 200), ({modified: same}, 304, 412),
            ({modified: "no date"}, 200, 200),
            ({unmodified: before}, 412, 412), ({unmodified: same}, 200, 200),
            ({unmodified: "no date"}, 200, 200),
            # RFC 9110 section 13.2.2: entity tags rule over dates
            ({match: etag, unmodified: before}, 200, 200),
            ({match: other, unmodified: same}, 412, 412),
            ({none_match: other, modified: same}, 200, 200),
            ({none_match: etag, modified: before}, 304, 412),
            ({match: other, none_match: etag}, 412, 412),
            ({match: etag, none_match: etag}, 304, 412),
            ({unmodified: before, modified: same}, 412, 412))

    def test_reads(self):
        for headers, status, _ in self.cases():
            for method in ("GET", "HEAD"):
                with self.subTest(headers=headers, method=method):
                    answer = self.s3.request(method, "/box/k",
                                             headers=headers)
                    self.assertEqual(answer.status, status)
                    if status == 304:
                        self.assertEqual(answer.body, b"")
                        self.assertEqual(answer.headers["etag"], self.etag)
                    if (status, method) == (412, "GET"):
                        self.assertEqual(answer.code, "PreconditionFailed")

    def test_copies(self):
        for headers, _, status in self.cases():
            with self.subTest(headers=headers):
                answer = self.s3.put("/box/c", headers=dict(
                    {"x-amz-copy-source-" + name: value
                     for name, value in headers.items()},
                    **{"x-amz-copy-source": "/box/k"}))
                self.assertEqual(answer.status, status, answer.body)
                self.assertEqual(self.s3.head("/box/c").status == 200,
                                 status == 200)
                self.s3.delete("/box/c")

    def test_the_connection_lives_on_after_304(self):
        for _ in range(3):
            self.assertEqual(self.s3.get("/box/k", headers={
                "if-none-match": self.etag}).status, 304)
            self.body("k", b"data")


class ConditionalWriteRequests(OperationCase):

    def setUp(self):
        super().setUp()
        self.etag = self.ok(self.s3.put("/box/k", b"old")).headers["etag"]

    def cases(self):
        """(key, conditions, status)."""
        bare, other = self.etag.strip('"'), '"%032d"' % 7
        return (("k", {"if-none-match": "*"}, 412),
                ("new", {"if-none-match": "*"}, 200),
                ("k", {"if-match": self.etag}, 200),
                ("k", {"if-match": bare}, 200),
                ("k", {"if-match": other}, 412),
                ("new", {"if-match": self.etag}, 404),
                ("k", {"if-none-match": self.etag}, 501))

    def check(self, write):
        """Each case through write(key, headers)."""
        for key, headers, status in self.cases():
            with self.subTest(key=key, headers=headers):
                self.ok(self.s3.put("/box/k", b"old"))
                self.s3.delete("/box/new")
                answer = write(key, headers)
                self.assertEqual(answer.status, status, answer.body)
                if status != 200:
                    self.assertEqual(answer.code, {
                        412: "PreconditionFailed", 404: "NoSuchKey",
                        501: "NotImplemented"}[status])
                    self.body("k", b"old")
                    self.error(self.s3.get("/box/new"), "NoSuchKey")
                else:
                    self.body(key, b"new")

    def test_put(self):
        self.check(lambda key, headers: self.s3.put(
            "/box/" + key, b"new", headers=headers))

    def test_copy(self):
        self.ok(self.s3.put("/box/source", b"new"))
        self.check(lambda key, headers: self.s3.put(
            "/box/" + key, headers=dict(headers, **{
                "x-amz-copy-source": "/box/source"})))

    def test_complete(self):
        def write(key, headers):
            path = "/box/" + key
            upload = self.s3.post(path, {"uploads": ""}).one("UploadId")
            part = self.ok(self.s3.put(path, b"new", {
                "uploadId": upload, "partNumber": "1"}))
            return self.s3.post(path, {"uploadId": upload}, (
                "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber>"
                "<ETag>%s</ETag></Part></CompleteMultipartUpload>"
                % part.etag).encode(), headers=headers)
        self.check(write)

    def test_rename(self):
        def write(key, headers):
            self.ok(self.s3.put("/box/source", b"new"))
            return self.s3.put("/box/" + key, query={"renameObject": ""},
                               headers=dict(headers, **{
                                   "x-amz-rename-source": "/box/source"}))
        self.check(write)

    def test_if_match_holds_for_files_put_by_hand(self):
        self.by_hand("f")
        etag = self.s3.head("/box/f").headers["etag"]
        self.by_hand("f", b"edited meanwhile")
        self.error(self.s3.put("/box/f", b"mine", headers={
            "if-match": etag}), "PreconditionFailed", 412)
        self.body("f", b"edited meanwhile")

    def race(self, headers):
        """[(status, body)] of concurrent PUTs of one key."""
        def write(number):
            client = Client(self.server.url, self.server.key_id,
                            self.server.key_val)
            body = b"%d under %s" % (number, str(headers).encode())
            with contextlib.closing(client):
                return client.put("/box/race", body,
                                  headers=headers).status, body
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return list(pool.map(write, range(8)))

    def test_exactly_one_of_concurrent_writers_wins(self):
        for _ in range(5):
            self.s3.delete("/box/race")
            headers = {"if-none-match": "*"}
            for _ in range(2):
                results = self.race(headers)
                winners = [b for status, b in results if status == 200]
                self.assertEqual(len(winners), 1, results)
                self.assertLessEqual({s for s, _ in results},
                                     {200, 409, 412})
                self.body("race", winners[0])
                headers = {"if-match":
                           self.s3.head("/box/race").headers["etag"]}

    def test_deletes(self):
        date = self.s3.head("/box/k").headers["last-modified"]
        for headers, status in (
                ({"if-match": '"other"'}, 412),
                ({"x-amz-if-match-size": "4"}, 412),
                ({"x-amz-if-match-last-modified-time":
                  "Mon, 01 Jan 2001 00:00:00 GMT"}, 412),
                ({"if-match": self.etag, "x-amz-if-match-size": "9"}, 412),
                ({"x-amz-if-match-size": "x"}, 400),
                ({"if-match": self.etag}, 204), ({"if-match": "*"}, 204),
                ({"x-amz-if-match-size": "3"}, 204),
                ({"x-amz-if-match-last-modified-time": date}, 204)):
            with self.subTest(headers=headers):
                date = self.s3.head("/box/k").headers.get("last-modified",
                                                          date)
                if "x-amz-if-match-last-modified-time" in headers \
                        and status == 204:
                    headers = {"x-amz-if-match-last-modified-time": date}
                answer = self.s3.delete("/box/k", headers=headers)
                self.assertEqual(answer.status, status, answer.body)
                gone = self.s3.head("/box/k").status == 404
                self.assertEqual(gone, status == 204)
                if gone:
                    self.ok(self.s3.put("/box/k", b"old"))

    def test_delete_many(self):
        self.fill("a", "b")
        body = ("<Delete><Object><Key>a</Key><ETag>%s</ETag></Object>"
                "<Object><Key>b</Key><ETag>%s</ETag></Object>"
                "<Object><Key>k</Key><Size>4</Size></Object></Delete>" % (
                    hashlib.md5(b"x").hexdigest(), "0" * 32)).encode()
        answer = self.ok(self.s3.post("/box", {"delete": ""}, body, headers={
            "content-md5": digest64("md5", body)}))
        self.assertEqual(answer.all("Deleted/Key"), ["a"])
        self.assertEqual(answer.all("Error/Key"), ["b", "k"])
        self.assertEqual(answer.all("Error/Code"),
                         ["PreconditionFailed"] * 2)
        self.assertEqual(self.s3.keys("box"), ["b", "k"])


# --- checksums and streaming uploads ---

def plain_crc(data, width, polynomial):
    """A reflected CRC, bit by bit, as the catalogues define it."""
    ones = (1 << width) - 1
    crc = ones
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (polynomial if crc & 1 else 0)
    return (crc ^ ones).to_bytes(width // 8, "big")


SUMS = {
    "CRC32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
    "CRC32C": lambda data: plain_crc(data, 32, 0x82F63B78),
    "CRC64NVME": lambda data: plain_crc(data, 64, 0x9A6C9329AC4BC9B5),
    "SHA1": lambda data: hashlib.sha1(data).digest(),
    "SHA256": lambda data: hashlib.sha256(data).digest(),
}


def checksum64(name, data):
    """The base64 checksum of data by an algorithm of S3."""
    return base64.b64encode(SUMS[name](data)).decode()


class ChecksumRequests(OperationCase):

    DATA = b"The quick brown fox" * 11

    def test_the_sums_here_are_those_of_the_catalogue(self):
        # reveng.sourceforge.io/crc-catalogue: the check values
        self.assertEqual(SUMS["CRC32C"](b"123456789").hex(), "e3069283")
        self.assertEqual(SUMS["CRC64NVME"](b"123456789").hex(),
                         "ae8b14860a799888")

    def put(self, name, value, body=DATA, **more):
        """PUT with an x-amz-checksum header."""
        headers = {"x-amz-checksum-" + name.lower(): value}
        return self.s3.put("/box/k", body, headers=dict(headers, **more))

    def test_a_checksum_is_verified_kept_and_told_when_asked(self):
        for name in SUMS:
            with self.subTest(name=name):
                header = "x-amz-checksum-" + name.lower()
                value = checksum64(name, self.DATA)
                answer = self.ok(self.put(name, value))
                self.assertEqual(answer.headers[header], value)
                for read in (self.s3.get, self.s3.head):
                    answer = read("/box/k", headers={
                        "x-amz-checksum-mode": "ENABLED"})
                    self.assertEqual(answer.headers[header], value)
                    self.assertEqual(answer.headers["x-amz-checksum-type"],
                                     "FULL_OBJECT")
                    self.assertNotIn(header, read("/box/k").headers)

    def test_a_range_never_carries_the_whole_checksum(self):
        self.ok(self.put("CRC32", crc64(self.DATA)))
        answer = self.s3.get("/box/k", headers={
            "range": "bytes=1-3", "x-amz-checksum-mode": "ENABLED"})
        self.assertEqual(answer.status, 206)
        self.assertNotIn("x-amz-checksum-crc32", answer.headers)

    def test_wrong_checksums_store_nothing(self):
        for name in SUMS:
            with self.subTest(name=name):
                self.error(self.put(name, checksum64(name, b"other")),
                           "BadDigest", 400)
                for value in ("no base64!", "YQ==", ""):
                    self.error(self.put(name, value), "InvalidRequest", 400)
        self.assertEqual(self.s3.keys("box"), [])

    def test_two_checksums_are_one_too_many(self):
        self.error(self.put("CRC32", crc64(self.DATA), **{
            "x-amz-checksum-sha1": checksum64("SHA1", self.DATA)}),
            "InvalidRequest", 400)

    def test_unknown_algorithms_are_refused(self):
        for name in ("crc31", "sha3", "xxhash64"):
            self.assertIn(self.put(name, "AAAAAA==").status, (400, 501))
        self.assertEqual(self.s3.keys("box"), [])

    def test_an_empty_body_is_verified_too(self):
        self.ok(self.put("SHA256", checksum64("SHA256", b""), b""))
        self.error(self.put("CRC32", crc64(b"x"), b""), "BadDigest", 400)


class ChunkSigner:
    """A body as STREAMING-AWS4-HMAC-SHA256-PAYLOAD wants it, by
    API/sigv4-streaming.html and sigv4-streaming-trailers.html."""

    def __init__(self, client, headers):
        self.date = headers["x-amz-date"]
        day = self.date[:8]
        self.scope = "%s/%s/s3/aws4_request" % (day, client.region)
        self.key = v4_key(client.secret, day, client.region)
        self.last = headers["authorization"].rpartition("Signature=")[2]

    def sign(self, kind, *texts):
        """The next signature of the chain."""
        text = "\n".join(("AWS4-HMAC-SHA256-" + kind, self.date, self.scope,
                          self.last) + texts)
        self.last = hmac.new(self.key, text.encode(),
                             hashlib.sha256).hexdigest()
        return self.last

    def chunk(self, data):
        """A chunk, its header before it."""
        signature = self.sign("PAYLOAD", hashlib.sha256(b"").hexdigest(),
                              hashlib.sha256(data).hexdigest())
        return b"%x;chunk-signature=%s\r\n%s" % (
            len(data), signature.encode(), data + b"\r\n" if data else b"")

    def trailer(self, line):
        """A trailer line and the signature over it."""
        signature = self.sign("TRAILER", hashlib.sha256(
            line + b"\n").hexdigest())
        return b"%s\r\nx-amz-trailer-signature:%s\r\n" % (
            line, signature.encode())


SIGNED_STREAM = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
SIGNED_TRAILER = SIGNED_STREAM + "-TRAILER"
UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"


class StreamingRequests(OperationCase):

    DATA = bytes(range(256)) * 80

    def stream(self, payload, data=DATA, trailer=None, spoil=None,
               decoded=None, http_chunked=False, size=8192, **more):
        """PUT /box/k with an aws-chunked body.

        trailer: (name, value).  spoil(body) may damage the body.
        """
        headers = {"content-encoding": "aws-chunked",
                   "x-amz-decoded-content-length": str(
                       len(data) if decoded is None else decoded)}
        if trailer:
            headers["x-amz-trailer"] = trailer[0]
        headers.update(more)
        headers = self.s3.sign("PUT", "/box/k", [], headers, payload)
        headers.pop("host")
        body = self.body_bytes(ChunkSigner(self.s3, headers), payload, data,
                               trailer, size)
        body = spoil(body) if spoil else body
        if http_chunked:
            headers["transfer-encoding"] = "chunked"
            step = 3001                 # across the chunks of aws-chunked
            body = b"".join(b"%x\r\n%s\r\n" % (
                len(body[i:i + step]), body[i:i + step])
                for i in range(0, len(body), step)) + b"0\r\n\r\n"
        else:
            headers["content-length"] = str(len(body))
        return self.s3.send("PUT", "/box/k", body, headers)

    @staticmethod
    def body_bytes(signer, payload, data, trailer, size):
        """The aws-chunked body."""
        parts = []
        for start in list(range(0, len(data), size)) + [len(data)]:
            chunk = data[start:start + size]
            if payload == UNSIGNED_TRAILER:
                parts.append(b"%x\r\n%s" % (
                    len(chunk), chunk + b"\r\n" if chunk else b""))
            else:
                parts.append(signer.chunk(chunk))
        if trailer:
            line = ("%s:%s" % trailer).encode()
            parts.append(signer.trailer(line) if payload == SIGNED_TRAILER
                         else line + b"\r\n")
        return b"".join(parts) + b"\r\n"

    def test_signed_chunks(self):
        for size in (8192, 1000, 100000):
            for http_chunked in (False, True):
                with self.subTest(size=size, http_chunked=http_chunked):
                    answer = self.ok(self.stream(
                        SIGNED_STREAM, size=size, http_chunked=http_chunked))
                    self.assertEqual(answer.etag, hashlib.md5(
                        self.DATA).hexdigest())
                    self.body("k", self.DATA)

    def test_an_empty_stream(self):
        for payload in (SIGNED_STREAM, SIGNED_TRAILER, UNSIGNED_TRAILER):
            trailer = None if payload == SIGNED_STREAM else (
                "x-amz-checksum-crc32", crc64(b""))
            for http_chunked in (False, True):
                self.ok(self.stream(payload, b"", trailer,
                                    http_chunked=http_chunked))
                self.body("k", b"")

    def test_every_checksum_as_a_trailer(self):
        for payload in (SIGNED_TRAILER, UNSIGNED_TRAILER):
            for name in SUMS:
                for http_chunked in (False, True):
                    with self.subTest(payload=payload, name=name,
                                      http_chunked=http_chunked):
                        self.check_trailer(payload, name, http_chunked)

    def check_trailer(self, payload, name, http_chunked):
        """A right trailer is kept, a wrong one stores nothing."""
        header, data = "x-amz-checksum-" + name.lower(), b"stream" * 100
        value = checksum64(name, data)
        answer = self.ok(self.stream(payload, data, (header, value),
                                     http_chunked=http_chunked))
        self.assertEqual(answer.headers[header], value)
        got = self.s3.get("/box/k", headers={
            "x-amz-checksum-mode": "ENABLED"})
        self.assertEqual((got.body, got.headers[header]), (data, value))
        self.assertNotIn("content-encoding", got.headers)
        self.s3.delete("/box/k")
        self.error(self.stream(payload, data, (
            header, checksum64(name, b"other"))), "BadDigest", 400)
        self.error(self.s3.get("/box/k"), "NoSuchKey")

    def test_only_aws_chunked_goes_from_the_encoding(self):
        for given, kept in (("aws-chunked,gzip", "gzip"),
                            ("gzip, aws-chunked", "gzip"),
                            ("aws-chunked", None)):
            with self.subTest(given=given):
                self.ok(self.stream(SIGNED_STREAM, **{
                    "content-encoding": given}))
                self.assertEqual(self.s3.head("/box/k").headers.get(
                    "content-encoding"), kept)

    def test_damage_stores_nothing(self):
        crc = ("x-amz-checksum-crc32", crc64(self.DATA))
        for name, payload, spoil, codes in (
                ("a byte", SIGNED_STREAM, lambda b: b.replace(
                    bytes(range(256)), bytes(256), 1),
                 ("SignatureDoesNotMatch",)),
                ("a signature", SIGNED_STREAM, lambda b: re.sub(
                    rb"signature=[0-9a-f]{8}", b"signature=00000000", b,
                    count=1),
                 ("SignatureDoesNotMatch",)),
                ("no signature", SIGNED_STREAM, lambda b: re.sub(
                    rb";chunk-signature=[0-9a-f]{64}", b"", b, count=1), ()),
                ("the end signature", SIGNED_STREAM, lambda b: re.sub(
                    rb"\r\n0;chunk-signature=[0-9a-f]{4}",
                    b"\r\n0;chunk-signature=0000", b),
                 ("SignatureDoesNotMatch",)),
                ("cut off", SIGNED_STREAM, lambda b: b[:9000],
                 ("IncompleteBody",)),
                ("no last chunk", UNSIGNED_TRAILER, lambda b: b[
                    :b.rindex(b"\r\n0\r\n") + 2], ("IncompleteBody",)),
                ("the trailer", SIGNED_TRAILER, lambda b: b.replace(
                    b"signature:", b"signature:00")[:-4] + b"\r\n\r\n", ()),
                ("no trailer signature", SIGNED_TRAILER, lambda b: b[
                    :b.rindex(b"x-amz-trailer")] + b"\r\n", ()),
                ("no trailer", UNSIGNED_TRAILER, lambda b: b[
                    :b.rindex(b"x-amz-checksum")] + b"\r\n", ()),
                ("a size", UNSIGNED_TRAILER, lambda b: b"zz" + b[4:], ()),
                ("a long chunk", UNSIGNED_TRAILER, lambda b: b"1fff" + b[4:],
                 ())):
            with self.subTest(name=name):
                answer = self.stream(payload, spoil=spoil, trailer=None
                                     if payload == SIGNED_STREAM else crc)
                self.assertIn(answer.status, (400, 403), answer.body)
                if codes:
                    self.assertIn(answer.code, codes)
                self.error(self.s3.get("/box/k"), "NoSuchKey")

    def test_swapped_chunks_are_SignatureDoesNotMatch(self):
        def swap(body):
            first = body.index(b"\r\n", body.index(b"\r\n") + 2 + 8192) + 2
            return body[first:2 * first] + body[:first] + body[2 * first:]
        answer = self.stream(SIGNED_STREAM, b"a" * 8192 + b"b" * 8192,
                             spoil=swap)
        self.error(answer, "SignatureDoesNotMatch", 403)
        self.assertEqual(self.s3.keys("box"), [])

    def test_another_length_than_declared_stores_nothing(self):
        for decoded in (len(self.DATA) - 1, len(self.DATA) + 1, 0):
            with self.subTest(decoded=decoded):
                answer = self.stream(SIGNED_STREAM, decoded=decoded)
                self.error(answer, "IncompleteBody", 400)
        self.assertEqual(self.s3.keys("box"), [])

    def test_a_part_can_be_streamed(self):
        upload = self.s3.post("/box/k", {"uploads": ""}).one("UploadId")
        query = [("partNumber", "1"), ("uploadId", upload)]
        trailer = ("x-amz-checksum-crc32", crc64(b"part"))
        headers = self.s3.sign("PUT", "/box/k", query, {
            "x-amz-decoded-content-length": "4",
            "x-amz-trailer": trailer[0]}, SIGNED_TRAILER)
        headers.pop("host")
        body = self.body_bytes(ChunkSigner(self.s3, headers), SIGNED_TRAILER,
                               b"part", trailer, 100)
        headers["content-length"] = str(len(body))
        answer = self.ok(self.s3.send(
            "PUT", "/box/k?partNumber=1&uploadId=" + upload, body, headers))
        self.assertEqual(answer.etag, hashlib.md5(b"part").hexdigest())
        self.assertEqual(answer.headers[trailer[0]], trailer[1])

    def test_http_chunked_alone_is_an_ordinary_body(self):
        headers = self.s3.sign("PUT", "/box/k", [], {}, "UNSIGNED-PAYLOAD")
        headers.pop("host")
        headers["transfer-encoding"] = "chunked"
        self.ok(self.s3.send("PUT", "/box/k",
                             b"3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nT: v\r\n\r\n",
                             headers))
        self.body("k", b"abcde")


# --- copy, rename, delete ---

class CopyRequests(OperationCase):

    META = {"content-type": "text/a", "cache-control": "b",
            "x-amz-meta-a": "b", "content-language": "nl"}

    def setUp(self):
        super().setUp()
        self.ok(self.s3.put("/box/source", b"content", headers=self.META))

    def copy(self, source="/box/source", target="/box/copy", **headers):
        """CopyObject; `_` in names of headers stands for `-`."""
        send = {name.replace("_", "-"): value
                for name, value in headers.items()}
        return self.s3.put(target, headers=dict(send, **{
            "x-amz-copy-source": source}))

    def test_the_answer_is_a_document(self):
        answer = self.ok(self.copy())
        self.assertEqual(answer.xml().tag, "CopyObjectResult")
        self.assertEqual(answer.one("ETag"), '"%s"' % hashlib.md5(
            b"content").hexdigest())
        self.assertRegex(answer.one("LastModified"),
                         r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertEqual(self.tree(), {"source": b"content",
                                       "copy": b"content"})

    def test_a_copy_needs_no_content_length(self):
        headers = self.s3.sign("PUT", "/box/copy", [], {
            "x-amz-copy-source": "/box/source"}, "UNSIGNED-PAYLOAD")
        headers.pop("host")
        self.ok(self.s3.send("PUT", "/box/copy", headers=headers))
        self.body("copy", b"content")

    def test_COPY_keeps_the_source_s_metadata(self):
        for directive in ({}, {"x_amz_metadata_directive": "COPY"}):
            self.ok(self.copy(x_amz_meta_a="other", content_type="text/x",
                              **directive))
            headers = self.s3.head("/box/copy").headers
            for name, value in self.META.items():
                self.assertEqual(headers[name], value)

    def test_REPLACE_takes_the_request_s(self):
        self.ok(self.copy(x_amz_metadata_directive="REPLACE",
                          x_amz_meta_new="1", content_type="text/b"))
        headers = self.s3.head("/box/copy").headers
        self.assertEqual(headers["content-type"], "text/b")
        self.assertEqual(headers["x-amz-meta-new"], "1")
        for name in ("cache-control", "x-amz-meta-a", "content-language"):
            self.assertNotIn(name, headers)

    def test_an_unknown_directive_is_InvalidArgument(self):
        self.error(self.copy(x_amz_metadata_directive="MERGE"),
                   "InvalidArgument", 400)
        self.error(self.s3.head("/box/copy"), "", 404)

    def test_onto_itself_something_must_change(self):
        self.error(self.copy(target="/box/source"), "InvalidRequest", 400)
        self.ok(self.copy(target="/box/source", x_amz_meta_n="1",
                          x_amz_metadata_directive="REPLACE"))
        answer = self.s3.get("/box/source")
        self.assertEqual(answer.body, b"content")
        self.assertEqual(answer.headers["x-amz-meta-n"], "1")
        self.assertEqual(answer.etag, hashlib.md5(b"content").hexdigest())
        self.ok(self.copy(target="/box/source",
                          x_amz_storage_class="STANDARD_IA"))
        answer = self.s3.get("/box/source")
        self.assertEqual(answer.headers["x-amz-storage-class"],
                         "STANDARD_IA")
        self.assertEqual(answer.headers["x-amz-meta-n"], "1")

    def test_the_storage_class_is_the_request_s(self):
        self.ok(self.s3.put("/box/cold", b"x", headers={
            "x-amz-storage-class": "GLACIER_IR"}))
        self.ok(self.copy("/box/cold"))
        self.assertNotIn("x-amz-storage-class",
                         self.s3.head("/box/copy").headers)

    def test_the_redirect_is_not_copied(self):
        # API_CopyObject: "This value is unique to each object and is not
        # copied when using the x-amz-metadata-directive"
        name = "x-amz-website-redirect-location"
        self.ok(self.s3.put("/box/r", b"x", headers={name: "/away"}))
        self.ok(self.copy("/box/r"))
        self.assertNotIn(name, self.s3.head("/box/copy").headers)
        self.ok(self.copy("/box/r", x_amz_website_redirect_location="/b"))
        self.assertEqual(self.s3.head("/box/copy").headers[name], "/b")

    def test_across_buckets(self):
        self.ok(self.s3.put("/other"))
        self.addCleanup(self.s3.delete, "/other")
        self.addCleanup(self.s3.delete, "/other/copy")
        self.ok(self.copy(target="/other/copy"))
        self.assertEqual(self.s3.get("/other/copy").body, b"content")
        self.assertEqual(self.s3.keys("box"), ["source"])

    def test_odd_keys(self):
        for key in ("a b", "a+b", "%2F", "\u00e9/\U0001f600", "d//e", "f/",
                    "..", "q?versionId=null", "?x=y", "/lead", "s" * 600,
                    "&<>'\""):
            with self.subTest(key=key):
                self.ok(self.s3.put("/box/" + key, key.encode()))
                for slash in ("/", ""):
                    self.ok(self.copy("%sbox/%s" % (slash, quote(
                        key, "/-_.~"))))
                    self.body("copy", key.encode())
                self.ok(self.copy("/box/source", "/box/" + key))
                self.body(key, b"content")

    def test_a_version_id_of_null_is_the_object(self):
        self.ok(self.copy("/box/source?versionId=null"))
        self.body("copy", b"content")
        answer = self.copy("/box/source?versionId=abc", "/box/not")
        self.assertIn((answer.status, answer.code), (
            (404, "NoSuchVersion"), (400, "InvalidArgument")))

    def test_a_file_put_by_hand(self):
        self.by_hand("d/page.html", b"<p>")
        answer = self.ok(self.copy("/box/d/page.html"))
        self.assertEqual(answer.one("ETag"), '"%s"' % hashlib.md5(
            b"<p>").hexdigest())
        got = self.s3.get("/box/copy")
        self.assertEqual(got.body, b"<p>")
        self.assertEqual(got.etag, hashlib.md5(b"<p>").hexdigest())

    def test_a_missing_source(self):
        self.error(self.copy("/box/none"), "NoSuchKey", 404)
        self.error(self.copy("/none/k"), "NoSuchBucket", 404)
        self.assertEqual(self.s3.keys("box"), ["source"])

    def test_a_bad_source_is_InvalidArgument(self):
        for source in ("box", "/", "/box", "/box/", "x"):
            with self.subTest(source=source):
                self.error(self.copy(source), "InvalidArgument", 400)

    def test_a_source_cannot_lead_out(self):
        secret = os.path.join(self.server.dir_buckets, "secret")
        with open(secret, "wb") as file:
            file.write(b"secret")
        self.addCleanup(os.unlink, secret)
        for source in ("/box/../secret", "../secret", "/../secret",
                       "/box/%2e%2e/secret", "/box/..%2fsecret",
                       "/box/a/../../secret", "%2e%2e/secret",
                       "/box//etc/passwd", "/./secret", "..%2f/etc/passwd",
                       "/.gos3rve/x", "/box/.gos3rve/bucket.json"):
            with self.subTest(source=source):
                answer = self.copy(source)
                self.assertIn(answer.status, (400, 404), answer.body)
                self.assertNotIn(b"secret</", answer.body.replace(
                    b"secret</Resource>", b"").replace(
                    b"secret</Key>", b"").replace(
                    b"secret</ArgumentValue>", b""))
                self.error(self.s3.head("/box/copy"), "", 404)

    def test_checksums_go_along_or_are_made(self):
        value = crc64(b"content")
        self.ok(self.s3.put("/box/summed", b"content", headers={
            "x-amz-checksum-crc32": value}))
        answer = self.ok(self.copy("/box/summed"))
        self.assertEqual(answer.one("ChecksumCRC32"), value)
        for name in SUMS:
            with self.subTest(name=name):
                answer = self.ok(self.copy(
                    "/box/summed", x_amz_checksum_algorithm=name))
                value = checksum64(name, b"content")
                self.assertEqual(answer.one("Checksum" + name), value)
                headers = self.s3.head("/box/copy", headers={
                    "x-amz-checksum-mode": "ENABLED"}).headers
                self.assertEqual(headers["x-amz-checksum-" + name.lower()],
                                 value)

    def test_an_overwritten_target_changes_as_a_whole(self):
        self.ok(self.s3.put("/box/copy", b"old", headers={
            "x-amz-meta-old": "1"}))
        self.ok(self.copy())
        answer = self.s3.get("/box/copy")
        self.assertEqual(answer.body, b"content")
        self.assertNotIn("x-amz-meta-old", answer.headers)


class RenameRequests(OperationCase):

    def rename(self, source, target, **headers):
        """RenameObject within box."""
        send = {name.replace("_", "-"): value
                for name, value in headers.items()}
        return self.s3.put("/box/" + target, query={"renameObject": ""},
                           headers=dict(send, **{
                               "x-amz-rename-source": source}))

    def test_content_and_metadata_move(self):
        put = self.ok(self.s3.put("/box/a/b", b"content", headers={
            "x-amz-meta-a": "b", "content-type": "text/a"}))
        self.ok(self.rename("/box/a/b", "c/d"))
        answer = self.ok(self.s3.get("/box/c/d"))
        self.assertEqual(answer.body, b"content")
        self.assertEqual(answer.headers["x-amz-meta-a"], "b")
        self.assertEqual(answer.headers["content-type"], "text/a")
        self.assertEqual(answer.headers["etag"], put.headers["etag"])
        self.error(self.s3.get("/box/a/b"), "NoSuchKey", 404)
        self.assertEqual(self.tree(), {os.path.join("c", "d"): b"content"})
        self.assertEqual(self.s3.keys("box"), ["c/d"])

    def test_the_source_may_leave_out_the_bucket(self):
        for source in ("/box/a b", "box/a%20b", "a%20b", "/a%20b"):
            with self.subTest(source=source):
                self.fill("a b")
                self.ok(self.rename(source, "c"))
                self.assertEqual(self.s3.keys("box"), ["c"])

    def test_odd_keys(self):
        keys = ["plain", "a//b", "dir/", "..", "\u00e9", "s" * 600, "a+b",
                "..", "deep/er/plain", "/lead", "%2F"]
        self.ok(self.s3.put("/box/" + keys[0], b"content"))
        for source, target in zip(keys, keys[1:]):
            with self.subTest(source=source, target=target):
                self.ok(self.rename("/box/" + quote(source, "/-_.~"),
                                    target))
                self.body(target, b"content")
                self.assertEqual(self.s3.keys("box"), [target])

    def test_it_replaces_the_target(self):
        self.ok(self.s3.put("/box/a", b"new"))
        self.ok(self.s3.put("/box/b", b"old"))
        self.ok(self.rename("/box/a", "b"))
        self.body("b", b"new")
        self.assertEqual(self.s3.keys("box"), ["b"])

    def test_below_itself_and_back(self):
        self.ok(self.s3.put("/box/a", b"content"))
        self.ok(self.rename("/box/a", "a/b"))
        self.assertEqual(self.s3.keys("box"), ["a/b"])
        self.ok(self.rename("/box/a/b", "a"))
        self.assertEqual(self.s3.keys("box"), ["a"])
        self.body("a", b"content")

    def test_a_file_put_by_hand(self):
        self.by_hand("hand")
        self.ok(self.rename("/box/hand", "d/renamed"))
        self.body("d/renamed", b"by hand")
        self.assertEqual(self.s3.keys("box"), ["d/renamed"])

    def test_conditions_on_the_source(self):
        etag = self.ok(self.s3.put("/box/a", b"x")).headers["etag"]
        self.error(self.rename("/box/a", "b", **{
            "x_amz_rename_source_if_match": '"other"'}),
            "PreconditionFailed", 412)
        self.error(self.rename("/box/a", "b", **{
            "x_amz_rename_source_if_none_match": etag}),
            "PreconditionFailed", 412)
        self.assertEqual(self.s3.keys("box"), ["a"])
        self.ok(self.rename("/box/a", "b", **{
            "x_amz_rename_source_if_match": etag}))
        self.assertEqual(self.s3.keys("box"), ["b"])

    def test_what_cannot_be_renamed(self):
        self.fill("a")
        self.error(self.rename("/box/none", "b"), "NoSuchKey", 404)
        for source in ("", "/box/", "/box/a"):
            answer = self.rename(source, "a")
            self.assertEqual(answer.status, 400, answer.body)
        answer = self.s3.put("/box/b", b"x", {"renameObject": ""})
        self.assertEqual(answer.status, 400)
        self.assertEqual(self.s3.keys("box"), ["a"])

    def test_a_source_cannot_lead_out(self):
        secret = os.path.join(self.server.dir_buckets, "secret")
        with open(secret, "wb"):
            pass
        self.addCleanup(os.unlink, secret)
        for source in ("/box/../secret", "../secret", "/box/%2e%2e/secret",
                       "/box/.gos3rve/bucket.json"):
            self.error(self.rename(source, "b"), "NoSuchKey", 404)
        self.assertTrue(os.path.exists(secret))


class DeleteRequests(OperationCase):

    def delete(self, body, headers=None, **more):
        """DeleteObjects with a Content-MD5."""
        if headers is None:
            headers = {"content-md5": digest64("md5", body)}
        return self.s3.post("/box", {"delete": ""}, body, headers=headers,
                            **more)

    @staticmethod
    def document(keys, quiet=None):
        """The document that names these keys."""
        return ("<Delete>%s%s</Delete>" % ("".join(
            "<Object><Key>%s</Key></Object>" % key.replace("&", "&amp;")
            .replace("<", "&lt;") for key in keys),
            "" if quiet is None else "<Quiet>%s</Quiet>" % quiet)).encode()

    def test_delete_is_204_and_again(self):
        self.fill("k")
        for _ in range(2):
            answer = self.ok(self.s3.delete("/box/k"), 204)
            self.assertEqual(answer.body, b"")
            self.assertNotIn("content-length", answer.headers)
        self.error(self.s3.delete("/none/k"), "NoSuchBucket", 404)

    def test_empty_directories_go_with_the_last_object(self):
        self.fill("a/b/c", "a/d")
        self.ok(self.s3.delete("/box/a/b/c"), 204)
        self.assertFalse(os.path.exists(self.path("a", "b")))
        self.body("a/d", b"x")
        self.ok(self.s3.delete("/box/a/d"), 204)
        self.assertFalse(os.path.exists(self.path("a")))

    def test_a_prefix_is_no_object(self):
        self.fill("a/b")
        for key in ("a", "a/", "a//b", "a/b/", "/a/b", "a/./b"):
            with self.subTest(key=key):
                self.ok(self.s3.delete("/box/" + key), 204)
                self.body("a/b", b"x")

    def test_many_at_once(self):
        keys = ["a", "b/c", "d//e", "f/", "missing", "\u00e9<&", " sp "]
        self.fill(*(key for key in keys if key != "missing"), "stays")
        answer = self.ok(self.delete(self.document(keys)))
        self.assertEqual(answer.xml().tag, "DeleteResult")
        self.assertEqual(answer.all("Deleted/Key"), keys)
        self.assertEqual(answer.all("Error"), [])
        self.assertEqual(self.s3.keys("box"), ["stays"])

    def test_Quiet_tells_errors_only(self):
        self.fill("a", "b")
        long_key = "x" * 1025
        answer = self.ok(self.delete(self.document(["a", long_key, "b"],
                                                   "true")))
        self.assertEqual(answer.all("Deleted"), [])
        self.assertEqual(answer.all("Error/Key"), [long_key])
        self.assertEqual(answer.all("Error/Code"), ["KeyTooLongError"])
        self.assertEqual(self.s3.keys("box"), [])
        answer = self.ok(self.delete(self.document(["a"], "false")))
        self.assertEqual(answer.all("Deleted/Key"), ["a"])

    def test_versions(self):
        self.fill("a", "b")
        answer = self.ok(self.delete(
            b"<Delete><Object><Key>a</Key><VersionId>null</VersionId>"
            b"</Object><Object><Key>b</Key><VersionId>other</VersionId>"
            b"</Object></Delete>"))
        self.assertEqual(answer.all("Deleted/Key"), ["a"])
        self.assertEqual(answer.all("Deleted/VersionId"), ["null"])
        self.assertEqual(self.s3.keys("box"), ["b"])

    def test_a_thousand_keys_and_not_one_more(self):
        keys = ["k%04d" % n for n in range(1001)]
        self.fill("k0000", "k0999", "k1000")
        self.error(self.delete(self.document(keys)), "MalformedXML", 400)
        self.assertEqual(len(self.s3.keys("box")), 3)
        answer = self.ok(self.delete(self.document(keys[:1000])))
        self.assertEqual(len(answer.all("Deleted")), 1000)
        self.assertEqual(self.s3.keys("box"), ["k1000"])

    def test_a_digest_is_required(self):
        self.fill("a")
        body = self.document(["a"])
        answer = self.delete(body, {})
        self.assertEqual((answer.status, answer.code),
                         (400, "InvalidRequest"))
        self.error(self.delete(body, {"content-md5": digest64(
            "md5", b"other")}), "BadDigest", 400)
        self.error(self.delete(body, {"x-amz-checksum-crc32": crc64(
            b"other")}), "BadDigest", 400)
        self.assertEqual(self.s3.keys("box"), ["a"])
        for name in SUMS:
            self.fill("a")
            self.ok(self.delete(body, {"x-amz-checksum-" + name.lower():
                                       checksum64(name, body)}))
            self.assertEqual(self.s3.keys("box"), [])

    def test_bad_documents_are_MalformedXML(self):
        self.fill("a")
        for body in (b"<Delete></Delete>", b"<Delete", b"text",
                     b"<Other><Object><Key>a</Key></Object></Other>",
                     b'<!DOCTYPE x [<!ENTITY e "a">]><Delete><Object><Key>'
                     b"&e;</Key></Object></Delete>"):
            with self.subTest(body=body):
                self.error(self.delete(body), "MalformedXML", 400)
        self.ok(self.delete(b""), 400)
        self.assertEqual(self.s3.keys("box"), ["a"])

    def test_keys_cannot_lead_out(self):
        secret = os.path.join(self.server.dir_buckets, "secret")
        with open(secret, "wb"):
            pass
        self.addCleanup(os.unlink, secret)
        state = self.path(gos3rve.STATE)
        before = sorted(os.listdir(state)) if os.path.isdir(state) else []
        keys = ["../secret", "a/../../secret", secret, "..", ".", "/",
                ".gos3rve", ".gos3rve/bucket.json", ".gos3rve/"]
        self.ok(self.delete(self.document(keys)))
        for key in keys:
            self.ok(self.s3.delete("/box/" + key), 204)
        self.assertTrue(os.path.exists(secret))
        self.ok(self.s3.head("/box"))
        if before:
            self.assertIn("bucket.json", os.listdir(state))


# --- attributes ---

class AttributesRequests(OperationCase):

    def attributes(self, key, names, **headers):
        """GetObjectAttributes."""
        headers = {name.replace("_", "-"): v for name, v in headers.items()}
        return self.s3.get("/box/" + key, {"attributes": ""}, headers=dict(
            headers, **{"x-amz-object-attributes": names}))

    def test_what_is_asked_for_and_nothing_else(self):
        value = crc64(b"content")
        self.ok(self.s3.put("/box/k", b"content", headers={
            "x-amz-checksum-crc32": value}))
        answer = self.ok(self.attributes(
            "k", "ETag,Checksum, ObjectParts,StorageClass,ObjectSize"))
        self.assertEqual(answer.xml().tag, "GetObjectAttributesResponse")
        for path, text in (("ETag", hashlib.md5(b"content").hexdigest()),
                           ("Checksum/ChecksumCRC32", value),
                           ("Checksum/ChecksumType", "FULL_OBJECT"),
                           ("StorageClass", "STANDARD"),
                           ("ObjectSize", "7"), ("ObjectParts", None)):
            self.assertEqual(answer.one(path), text, path)
        self.assertIn("last-modified", answer.headers)
        answer = self.ok(self.attributes("k", "ObjectSize"))
        self.assertEqual([child.tag for child in answer.xml()],
                         ["ObjectSize"])

    def test_bad_requests(self):
        self.fill("k")
        for names in ("", "Size", "ETag,Nothing"):
            self.error(self.attributes("k", names), "InvalidArgument", 400)
        self.error(self.s3.get("/box/k", {"attributes": ""}),
                   "InvalidArgument", 400)
        self.error(self.attributes("none", "ETag"), "NoSuchKey", 404)


# --- multipart uploads ---

class MultipartCase(OperationCase):
    """The steps of an upload; most tests take parts of a few bytes."""

    least = 4

    def setUp(self):
        super().setUp()
        patch = mock.patch.object(gos3rve, "MIN_PART_BYTES", self.least)
        patch.start()
        self.addCleanup(patch.stop)

    def start(self, key="k", **headers):
        """CreateMultipartUpload: the upload id."""
        headers = {name.replace("_", "-"): v for name, v in headers.items()}
        answer = self.ok(self.s3.post("/box/" + key, {"uploads": ""},
                                      headers=headers))
        self.assertEqual(answer.one("Key"), key)
        return answer.one("UploadId")

    def part(self, upload, number, data=b"", key="k", **headers):
        """UploadPart or UploadPartCopy: the Answer."""
        headers = {name.replace("_", "-"): v for name, v in headers.items()}
        return self.s3.put("/box/" + key, data, {
            "partNumber": str(number), "uploadId": upload}, headers=headers)

    def complete(self, upload, parts, key="k", **headers):
        """CompleteMultipartUpload; parts: (number, ETag, further XML)."""
        headers = {name.replace("_", "-"): v for name, v in headers.items()}
        body = "<CompleteMultipartUpload>%s</CompleteMultipartUpload>" % (
            "".join("<Part><PartNumber>%s</PartNumber><ETag>%s</ETag>%s"
                    "</Part>" % tuple((part + ("",))[:3]) for part in parts))
        return self.s3.post("/box/" + key, {"uploadId": upload},
                            body.encode(), headers=headers)

    def upload(self, *datas, key="k", **headers):
        """A whole upload: its id, its parts and Complete's Answer."""
        upload = self.start(key, **headers)
        parts = [(number, self.ok(self.part(upload, number, data, key)).etag)
                 for number, data in enumerate(datas, 1)]
        return upload, parts, self.complete(upload, parts, key)

    @staticmethod
    def multipart_etag(*datas):
        """The ETag of an object made of these parts."""
        return "%s-%d" % (hashlib.md5(b"".join(
            hashlib.md5(data).digest() for data in datas)).hexdigest(),
            len(datas))


class MultipartRequests(MultipartCase):

    def test_the_parts_make_the_object(self):
        datas = (b"first", b"second", b"3")
        upload, parts, answer = self.upload(*datas, x_amz_meta_a="b",
                                            content_type="text/a")
        self.assertEqual(parts[0][1], hashlib.md5(b"first").hexdigest())
        self.assertEqual(answer.xml().tag, "CompleteMultipartUploadResult")
        etag = self.multipart_etag(*datas)
        for path, text in (("Bucket", "box"), ("Key", "k"),
                           ("ETag", '"%s"' % etag),
                           ("Location", self.server.url + "/box/k")):
            self.assertEqual(answer.one(path), text)
        got = self.s3.get("/box/k")
        self.assertEqual((got.body, got.etag), (b"".join(datas), etag))
        self.assertEqual(got.headers["x-amz-meta-a"], "b")
        self.assertEqual(got.headers["content-type"], "text/a")
        self.assertEqual(self.s3.get("/box").one("Contents/ETag"),
                         '"%s"' % etag)
        self.assertEqual(self.tree(), {"k": b"".join(datas)})
        self.error(self.s3.get("/box/k", {"uploadId": upload}),
                   "NoSuchUpload", 404)

    def test_nothing_is_seen_before_the_end(self):
        self.ok(self.s3.put("/box/k", b"old"))
        upload = self.start()
        self.ok(self.part(upload, 1, b"new content"))
        self.body("k", b"old")
        self.assertEqual(self.s3.keys("box"), ["k"])
        self.assertEqual(self.tree(), {"k": b"old"})

    def test_abort_leaves_the_object_alone(self):
        self.ok(self.s3.put("/box/k", b"old"))
        upload = self.start()
        etag = self.ok(self.part(upload, 1, b"new")).etag
        answer = self.ok(self.s3.delete("/box/k", {"uploadId": upload}), 204)
        self.assertEqual(answer.body, b"")
        self.body("k", b"old")
        for answer in (self.part(upload, 2, b"x"),
                       self.complete(upload, [(1, etag)]),
                       self.s3.get("/box/k", {"uploadId": upload}),
                       self.s3.delete("/box/k", {"uploadId": upload})):
            self.error(answer, "NoSuchUpload", 404)
        self.body("k", b"old")
        self.assertEqual(self.s3.get("/box", {"uploads": ""}).all("Upload"),
                         [])

    def test_bad_upload_ids_are_NoSuchUpload(self):
        self.ok(self.s3.put("/box/k", b"old"))
        other = self.start("other")
        for upload in ("none", "", "../box", "..", other, "a" * 2000,
                       "x/../y", "%2e%2e", "\u00e9"):
            for answer in (self.part(upload, 1, b"x"),
                           self.complete(upload, [(1, "0" * 32)]),
                           self.s3.get("/box/k", {"uploadId": upload}),
                           self.s3.delete("/box/k", {"uploadId": upload})):
                with self.subTest(upload=upload):
                    self.error(answer, "NoSuchUpload", 404)
        self.body("k", b"old")
        self.ok(self.s3.get("/box/other", {"uploadId": other}))

    def test_part_numbers_are_1_to_10000(self):
        upload = self.start()
        for number in (0, 10001, -1, "x", "", "1.0", "99999999999999999999"):
            with self.subTest(number=number):
                self.error(self.part(upload, number, b"x"),
                           "InvalidArgument", 400)
        self.ok(self.part(upload, 1, b"first"))
        etag = self.ok(self.part(upload, 10000, b"last")).etag
        self.ok(self.complete(upload, [(10000, etag)]))
        self.body("k", b"last")

    def test_a_part_number_without_an_upload_stores_nothing(self):
        answer = self.s3.put("/box/k", b"x", {"partNumber": "1"})
        self.assertEqual(answer.status, 400)
        self.assertEqual(self.s3.keys("box"), [])

    def test_the_last_writer_of_a_part_wins(self):
        upload = self.start()
        old = self.ok(self.part(upload, 1, b"old")).etag
        new = self.ok(self.part(upload, 1, b"new")).etag
        self.error(self.complete(upload, [(1, old)]), "InvalidPart", 400)
        self.ok(self.complete(upload, [(1, new)]))
        self.body("k", b"new")

    def test_the_order_on_the_wire_does_not_matter_but_complete_s_does(self):
        upload = self.start()
        two = self.ok(self.part(upload, 2, b"bbbb")).etag
        one = self.ok(self.part(upload, 1, b"aaaa")).etag
        self.error(self.complete(upload, [(2, two), (1, one)]),
                   "InvalidPartOrder", 400)
        self.ok(self.complete(upload, [(1, one), (2, two)]))
        self.body("k", b"aaaabbbb")

    def test_parts_may_be_left_out(self):
        upload = self.start()
        etags = [self.ok(self.part(upload, n, b"part%d" % n)).etag
                 for n in (3, 5, 9)]
        self.ok(self.complete(upload, [(3, etags[0]), (9, etags[2])]))
        answer = self.s3.get("/box/k")
        self.assertEqual(answer.body, b"part3part9")
        self.assertEqual(answer.etag, self.multipart_etag(b"part3",
                                                          b"part9"))

    def test_wrong_parts_are_InvalidPart_and_the_upload_lives_on(self):
        upload = self.start()
        etag = self.ok(self.part(upload, 1, b"part")).etag
        for parts in ([(1, "0" * 32)], [(2, etag)], [(1, etag), (2, etag)],
                      [(10000, etag)]):
            self.error(self.complete(upload, parts), "InvalidPart", 400)
        self.error(self.s3.get("/box/k"), "NoSuchKey")
        self.ok(self.complete(upload, [(1, '"%s"' % etag)]))
        self.body("k", b"part")

    def test_bad_documents(self):
        upload = self.start()
        etag = self.ok(self.part(upload, 1, b"part")).etag
        query = {"uploadId": upload}
        for body in (b"<a/>", b"<Complete", b"x",
                     b"<CompleteMultipartUpload/>",
                     b"<CompleteMultipartUpload><Part><ETag>%s</ETag></Part>"
                     b"</CompleteMultipartUpload>" % etag.encode(),
                     b"<CompleteMultipartUpload><Part><PartNumber>x"
                     b"</PartNumber><ETag>%s</ETag></Part>"
                     b"</CompleteMultipartUpload>" % etag.encode()):
            with self.subTest(body=body):
                self.error(self.s3.post("/box/k", query, body),
                           "MalformedXML", 400)
        self.assertEqual(self.s3.post("/box/k", query, b"").status, 400)
        self.ok(self.complete(upload, [(1, etag)]))

    def test_completing_again_gives_the_same_answer(self):
        upload, parts, first = self.upload(b"aaaa", b"bb")
        again = self.ok(self.complete(upload, parts))
        for path in ("ETag", "Key", "Bucket", "Location"):
            self.assertEqual(again.one(path), first.one(path))
        self.body("k", b"aaaabb")
        self.ok(self.s3.put("/box/k", b"later"))
        self.error(self.complete(upload, parts), "NoSuchUpload", 404)
        self.body("k", b"later")

    def test_uploads_of_one_key_do_not_meet(self):
        one, two = self.start(), self.start()
        self.assertNotEqual(one, two)
        first = self.ok(self.part(one, 1, b"one")).etag
        second = self.ok(self.part(two, 1, b"two")).etag
        self.error(self.complete(one, [(1, second)]), "InvalidPart", 400)
        self.ok(self.complete(one, [(1, first)]))
        self.body("k", b"one")
        self.ok(self.complete(two, [(1, second)]))
        self.body("k", b"two")

    def test_odd_keys(self):
        for key in ("a//b", "dir/", "..", "\u00e9 +%2F&<", "s" * 600,
                    "../out", "deep/er"):
            with self.subTest(key=key):
                answer = self.upload(b"aaaa", b"b", key=key)[2]
                self.assertEqual(self.ok(answer).one("Key"), key)
                self.assertEqual(answer.one("Location"), "%s/box/%s" % (
                    self.server.url, quote(key, "/-_.~")))
                self.body(key, b"aaaab")

    def test_the_object_size_may_be_stated(self):
        for size, status in (("5", 400), ("x", 400), ("6", 200)):
            upload = self.start()
            parts = [(1, self.ok(self.part(upload, 1, b"aaaa")).etag),
                     (2, self.ok(self.part(upload, 2, b"bb")).etag)]
            answer = self.complete(upload, parts, x_amz_mp_object_size=size)
            self.assertEqual(answer.status, status, answer.body)
        self.body("k", b"aaaabb")

    def test_a_wrong_body_is_no_part(self):
        upload = self.start()
        answer = self.part(upload, 1, b"data", content_md5=digest64(
            "md5", b"other"))
        self.error(answer, "BadDigest", 400)
        self.assertEqual(self.s3.get("/box/k", {"uploadId": upload}).all(
            "Part"), [])

    def test_an_upload_of_one_empty_part(self):
        self.ok(self.upload(b"")[2])
        answer = self.s3.get("/box/k")
        self.assertEqual((answer.body, answer.etag),
                         (b"", self.multipart_etag(b"")))

    def test_the_storage_class_and_headers_are_the_upload_s(self):
        self.ok(self.upload(b"data", x_amz_storage_class="STANDARD_IA",
                            cache_control="no-store")[2])
        headers = self.s3.head("/box/k").headers
        self.assertEqual(headers["x-amz-storage-class"], "STANDARD_IA")
        self.assertEqual(headers["cache-control"], "no-store")

    def test_a_missing_bucket(self):
        self.error(self.s3.post("/none/k", {"uploads": ""}),
                   "NoSuchBucket", 404)


class MultipartSizeRequests(MultipartCase):

    least = gos3rve.MIN_PART_BYTES

    def test_a_part_but_the_last_has_5_mib(self):
        block = os.urandom(KIB) * (5 * KIB)
        upload = self.start()
        small = self.ok(self.part(upload, 1, block[1:])).etag
        last = self.ok(self.part(upload, 2, b"last")).etag
        answer = self.complete(upload, [(1, small), (2, last)])
        self.error(answer, "EntityTooSmall", 400)
        self.error(self.s3.get("/box/k"), "NoSuchKey")
        full = self.ok(self.part(upload, 1, block)).etag
        self.ok(self.complete(upload, [(1, full), (2, last)]))
        got = self.ok(self.s3.get("/box/k"))
        self.assertEqual(got.body, block + b"last")
        self.assertEqual(got.etag, self.multipart_etag(block, b"last"))


class PartReadRequests(MultipartCase):

    def test_each_part_by_its_number(self):
        datas = (b"aaaa", b"bbbb", b"cccccc", b"d")
        self.ok(self.upload(*datas)[2])
        start = 0
        for number, data in enumerate(datas, 1):
            for read in (self.s3.get, self.s3.head):
                with self.subTest(number=number):
                    answer = read("/box/k", {"partNumber": str(number)})
                    self.assertEqual(answer.status, 206)
                    self.assertEqual(answer.headers["content-range"],
                                     "bytes %d-%d/15" % (
                                         start, start + len(data) - 1))
                    self.assertEqual(answer.headers[
                        "x-amz-mp-parts-count"], "4")
                    self.assertEqual(answer.headers["content-length"],
                                     str(len(data)))
                    self.assertEqual(answer.body, data if read ==
                                     self.s3.get else b"")
            start += len(data)
        self.error(self.s3.get("/box/k", {"partNumber": "5"}),
                   "InvalidPartNumber", 416)
        self.assertNotIn("x-amz-mp-parts-count",
                         self.s3.head("/box/k").headers)

    def test_an_empty_last_part_has_no_bytes(self):
        self.ok(self.upload(b"aaaa", b"")[2])
        self.body("k", b"aaaa")
        answer = self.s3.get("/box/k", {"partNumber": "2"})
        self.assertEqual(answer.body, b"")
        self.assertEqual(self.s3.get("/box/k", {"partNumber": "1"}).body,
                         b"aaaa")

    def test_a_copy_is_one_part(self):
        self.ok(self.upload(b"aaaa", b"b")[2])
        answer = self.ok(self.s3.put("/box/c", headers={
            "x-amz-copy-source": "/box/k"}))
        self.assertEqual(answer.one("ETag"), '"%s"' % hashlib.md5(
            b"aaaab").hexdigest())
        self.assertEqual(self.s3.get("/box/c", {"partNumber": "1"}).body,
                         b"aaaab")


class PartCopyRequests(MultipartCase):

    def setUp(self):
        super().setUp()
        self.ok(self.s3.put("/box/source", b"0123456789"))
        self.upload_id = self.start()

    def copy(self, number, span=None, source="/box/source", **headers):
        """UploadPartCopy of a range."""
        if span is not None:
            headers["x_amz_copy_source_range"] = span
        return self.part(self.upload_id, number, x_amz_copy_source=source,
                         **headers)

    def test_the_whole_and_ranges(self):
        parts = []
        for number, (span, data) in enumerate((
                (None, b"0123456789"), ("bytes=0-3", b"0123"),
                ("bytes=2-9", b"23456789"), ("bytes=9-9", b"9")), 1):
            answer = self.ok(self.copy(number, span))
            self.assertEqual(answer.xml().tag, "CopyPartResult")
            etag = answer.one("ETag").strip('"')
            self.assertEqual(etag, hashlib.md5(data).hexdigest())
            self.assertTrue(answer.one("LastModified"))
            parts.append((number, etag))
        self.ok(self.complete(self.upload_id, parts))
        self.body("k", b"0123456789" b"0123" b"23456789" b"9")

    def test_bad_ranges(self):
        for span in ("bytes=0-10", "bytes=10-11", "bytes=0-99",
                     "bytes=100-200"):
            with self.subTest(span=span):
                answer = self.copy(1, span)
                self.assertIn((answer.status, answer.code), (
                    (416, "InvalidRange"), (400, "InvalidRange"),
                    (400, "InvalidArgument")))
        for span in ("bytes=5-2", "bytes=-3", "bytes=3-", "0-3", "bytes=a-b",
                     "bytes=0-1,3-4", ""):
            with self.subTest(span=span):
                self.error(self.copy(1, span), "InvalidArgument", 400)
        parts = self.s3.get("/box/k", {"uploadId": self.upload_id})
        self.assertEqual(parts.all("Part"), [])

    def test_sources(self):
        self.error(self.copy(1, source="/box/none"), "NoSuchKey", 404)
        self.error(self.copy(1, source="/none/k"), "NoSuchBucket", 404)
        self.error(self.copy(1, source="box"), "InvalidArgument", 400)
        self.error(self.copy(1, source="/box/../box/source"), "NoSuchKey",
                   404)
        self.error(self.copy(1, x_amz_copy_source_if_match='"other"'),
                   "PreconditionFailed", 412)
        self.by_hand("hand", b"by hand")
        answer = self.ok(self.copy(1, source="/box/hand"))
        self.assertEqual(answer.one("ETag").strip('"'),
                         hashlib.md5(b"by hand").hexdigest())

    def test_the_upload_s_algorithm_is_computed(self):
        self.upload_id = self.start(x_amz_checksum_algorithm="CRC32C")
        answer = self.ok(self.copy(1, "bytes=0-3"))
        self.assertEqual(answer.one("ChecksumCRC32C"),
                         checksum64("CRC32C", b"0123"))


class MultipartChecksumRequests(MultipartCase):

    DATAS = (b"first part", b"second part", b"3")

    def summed(self, name, kind=None, **headers):
        """An upload with checksums: (id, parts for Complete)."""
        more = {"x_amz_checksum_type": kind} if kind else {}
        upload = self.start(x_amz_checksum_algorithm=name, **more)
        parts = []
        for number, data in enumerate(self.DATAS, 1):
            value = checksum64(name, data)
            header = "x_amz_checksum_" + name.lower()
            answer = self.ok(self.part(upload, number, data,
                                       **{header: value}))
            self.assertEqual(answer.headers[header.replace("_", "-")],
                             value)
            parts.append((number, answer.etag, "<Checksum%s>%s</Checksum%s>"
                          % (name, value, name)))
        return upload, parts

    def composite(self, name):
        """The checksum of the parts' checksums."""
        return "%s-%d" % (checksum64(name, b"".join(
            SUMS[name](data) for data in self.DATAS)), len(self.DATAS))

    def check(self, name, kind, value, **headers):
        """Upload, complete and read one."""
        upload, parts = self.summed(name, kind)
        answer = self.ok(self.complete(upload, parts, **headers))
        self.assertEqual(answer.one("Checksum" + name), value)
        self.assertEqual(answer.one("ChecksumType"), kind)
        head = self.s3.head("/box/k", headers={
            "x-amz-checksum-mode": "ENABLED"}).headers
        self.assertEqual(head["x-amz-checksum-" + name.lower()], value)
        self.assertEqual(head["x-amz-checksum-type"], kind)
        answer = self.s3.get("/box/k", {"partNumber": "2"}, headers={
            "x-amz-checksum-mode": "ENABLED"})
        self.assertEqual(answer.headers["x-amz-checksum-" + name.lower()],
                         checksum64(name, self.DATAS[1]))

    def test_composite_and_full_object(self):
        whole = b"".join(self.DATAS)
        for name in SUMS:
            if name != "CRC64NVME":
                with self.subTest(name=name, kind="COMPOSITE"):
                    self.check(name, "COMPOSITE", self.composite(name))
            if name.startswith("CRC"):
                with self.subTest(name=name, kind="FULL_OBJECT"):
                    self.check(name, "FULL_OBJECT", checksum64(name, whole))

    def test_the_default_types(self):
        for name, kind in (("CRC32", "COMPOSITE"), ("CRC32C", "COMPOSITE"),
                           ("SHA1", "COMPOSITE"), ("SHA256", "COMPOSITE"),
                           ("CRC64NVME", "FULL_OBJECT")):
            answer = self.ok(self.s3.post("/box/k", {"uploads": ""},
                                          headers={
                "x-amz-checksum-algorithm": name}))
            self.assertEqual(answer.headers["x-amz-checksum-algorithm"],
                             name)
            self.assertEqual(answer.headers["x-amz-checksum-type"], kind)

    def test_types_that_do_not_go_together(self):
        for name, kind in (("SHA1", "FULL_OBJECT"), ("SHA256",
                           "FULL_OBJECT"), ("CRC64NVME", "COMPOSITE"),
                           ("CRC32", "OTHER"), (None, "COMPOSITE"),
                           ("NOSUM", None)):
            headers = {"x-amz-checksum-algorithm": name,
                       "x-amz-checksum-type": kind}
            with self.subTest(headers=headers):
                self.error(self.s3.post("/box/k", {"uploads": ""}, headers={
                    n: v for n, v in headers.items() if v}),
                    "InvalidRequest", 400)

    def test_complete_may_state_the_whole_s_checksum(self):
        whole = b"".join(self.DATAS)
        for name in ("CRC32", "CRC64NVME"):
            header = "x_amz_checksum_" + name.lower()
            upload, parts = self.summed(name, "FULL_OBJECT")
            self.error(self.complete(upload, parts, **{
                header: checksum64(name, b"other")}), "BadDigest", 400)
            self.error(self.s3.get("/box/k"), "NoSuchKey")
            self.check(name, "FULL_OBJECT", checksum64(name, whole),
                       **{header: checksum64(name, whole),
                          "x_amz_checksum_type": "FULL_OBJECT"})
            self.s3.delete("/box/k")
        self.check("SHA256", "COMPOSITE", self.composite("SHA256"),
                   x_amz_checksum_sha256=self.composite("SHA256"))

    def test_complete_must_not_change_the_type(self):
        upload, parts = self.summed("CRC32", "FULL_OBJECT")
        self.error(self.complete(upload, parts, **{
            "x_amz_checksum_type": "COMPOSITE"}), "InvalidRequest", 400)

    def test_a_wrong_part_checksum_is_InvalidPart(self):
        upload, parts = self.summed("CRC32")
        wrong = [parts[0][:2] + ("<ChecksumCRC32>%s</ChecksumCRC32>"
                                 % crc64(b"other"),)] + parts[1:]
        self.error(self.complete(upload, wrong), "InvalidPart", 400)
        self.ok(self.complete(upload, parts))

    def test_a_part_of_another_algorithm_is_refused(self):
        upload = self.start(x_amz_checksum_algorithm="CRC32")
        self.error(self.part(upload, 1, b"x", **{
            "x_amz_checksum_sha1": checksum64("SHA1", b"x")}),
            "InvalidRequest", 400)

    def test_a_part_without_a_checksum_gets_one(self):
        upload = self.start(x_amz_checksum_algorithm="SHA1")
        answer = self.ok(self.part(upload, 1, b"data"))
        self.assertEqual(answer.headers["x-amz-checksum-sha1"],
                         checksum64("SHA1", b"data"))
        self.ok(self.complete(upload, [(1, answer.etag)]))
        self.assertEqual(self.s3.head("/box/k", headers={
            "x-amz-checksum-mode": "ENABLED"}).headers[
            "x-amz-checksum-sha1"], "%s-1" % checksum64(
                "SHA1", SUMS["SHA1"](b"data")))

    def test_list_parts_tells_them(self):
        upload, _ = self.summed("CRC32")
        answer = self.s3.get("/box/k", {"uploadId": upload})
        self.assertEqual(answer.all("Part/ChecksumCRC32"),
                         [crc64(data) for data in self.DATAS])
        self.assertEqual(answer.one("ChecksumAlgorithm"), "CRC32")
        self.assertEqual(answer.one("ChecksumType"), "COMPOSITE")

    def test_the_attributes_list_the_parts(self):
        upload, parts = self.summed("CRC32")
        self.ok(self.complete(upload, parts))
        query, names = {"attributes": ""}, "x-amz-object-attributes"
        answer = self.ok(self.s3.get("/box/k", query, headers={
            names: "ObjectParts,Checksum"}))
        self.assertEqual(answer.one("ObjectParts/PartsCount"), "3")
        self.assertEqual(answer.all("ObjectParts/Part/PartNumber"),
                         ["1", "2", "3"])
        self.assertEqual(answer.all("ObjectParts/Part/Size"),
                         ["10", "11", "1"])
        self.assertEqual(answer.all("ObjectParts/Part/ChecksumCRC32"),
                         [crc64(data) for data in self.DATAS])
        found, marker = [], "0"
        for truncated in ("true", "true", "false"):
            answer = self.ok(self.s3.get("/box/k", query, headers={
                names: "ObjectParts", "x-amz-max-parts": "1",
                "x-amz-part-number-marker": marker}))
            self.assertEqual(answer.one("ObjectParts/IsTruncated"),
                             truncated)
            found += answer.all("ObjectParts/Part/PartNumber")
            marker = answer.one("ObjectParts/NextPartNumberMarker")
        self.assertEqual(found, ["1", "2", "3"])


class UploadListingRequests(MultipartCase):

    def test_parts_in_pages(self):
        upload = self.start()
        numbers = [1, 2, 3, 10, 9999, 10000]
        for number in reversed(numbers):
            self.ok(self.part(upload, number, b"%d" % number))
        for size in (1, 2, 5, 1000):
            found, marker = [], "0"
            for _ in range(len(numbers) + 1):
                answer = self.ok(self.s3.get("/box/k", {
                    "uploadId": upload, "max-parts": str(size),
                    "part-number-marker": marker}))
                page = answer.all("Part/PartNumber")
                self.assertLessEqual(len(page), size)
                self.assertEqual(answer.one("PartNumberMarker"), marker)
                found += page
                if answer.one("IsTruncated") == "false":
                    break
                marker = answer.one("NextPartNumberMarker")
            self.assertEqual(list(map(int, found)), numbers)

    def test_what_list_parts_tells(self):
        upload = self.start()
        self.ok(self.part(upload, 7, b"data"))
        answer = self.ok(self.s3.get("/box/k", {"uploadId": upload}))
        self.assertEqual(answer.xml().tag, "ListPartsResult")
        for path, text in (("Bucket", "box"), ("Key", "k"),
                           ("UploadId", upload), ("MaxParts", "1000"),
                           ("IsTruncated", "false"),
                           ("StorageClass", "STANDARD"),
                           ("Part/PartNumber", "7"), ("Part/Size", "4"),
                           ("Part/ETag", '"%s"' % hashlib.md5(
                               b"data").hexdigest())):
            self.assertEqual(answer.one(path), text, path)
        self.assertTrue(answer.one("Initiator/ID"))
        self.assertTrue(answer.one("Owner/ID"))
        for query in ({"max-parts": "x"}, {"max-parts": "-1"},
                      {"part-number-marker": "x"}):
            self.error(self.s3.get("/box/k", dict(query, uploadId=upload)),
                       "InvalidArgument", 400)

    def test_uploads_in_pages(self):
        keys = ["a", "a/1", "a/2", "b", "b", "b", "c/1", "\u00e9 +"]
        ids = {(key, self.start(key)) for key in keys}
        for prefix in ("", "a", "a/", "b", "none"):
            for delimiter in ("", "/"):
                for size in (1, 2, 3, 1000):
                    with self.subTest(prefix=prefix, delimiter=delimiter,
                                      size=size):
                        self.check_pages(ids, prefix, delimiter, size)

    def check_pages(self, ids, prefix, delimiter, size):
        """All pages of ListMultipartUploads against the model."""
        want = listing_model({key for key, _ in ids}, prefix, delimiter)
        found, uploads, more = [], [], {}
        for _ in range(len(ids) + 1):
            answer = self.ok(self.s3.get("/box", dict({
                "uploads": "", "prefix": prefix, "delimiter": delimiter,
                "max-uploads": str(size), "encoding-type": "url"}, **more)))
            page = [(urllib.parse.unquote(element.findtext("Key")),
                     element.findtext("UploadId"))
                    for element in answer.xml().iterfind("Upload")]
            prefixes = [("P", urllib.parse.unquote(text)) for text
                        in answer.all("CommonPrefixes/Prefix")]
            self.assertLessEqual(len(page) + len(prefixes), size)
            uploads += page
            found += prefixes + [("K", key) for key, _ in page]
            if answer.one("IsTruncated") == "false":
                break
            more = {"key-marker": urllib.parse.unquote(
                answer.one("NextKeyMarker")),
                "upload-id-marker": answer.one("NextUploadIdMarker") or ""}
        self.assertEqual(set(found), set(want))
        self.assertEqual(len(uploads), len(set(uploads)))
        self.assertEqual(set(uploads), {
            (key, upload) for key, upload in ids if ("K", key) in want})
        self.assertEqual([key for key, _ in uploads], sorted(
            [key for key, _ in uploads], key=str.encode))

    def test_what_list_uploads_tells(self):
        upload = self.start(x_amz_checksum_algorithm="CRC32",
                            x_amz_storage_class="STANDARD_IA")
        answer = self.ok(self.s3.get("/box", {"uploads": ""}))
        self.assertEqual(answer.xml().tag, "ListMultipartUploadsResult")
        for path, text in (("Bucket", "box"), ("MaxUploads", "1000"),
                           ("IsTruncated", "false"), ("Upload/Key", "k"),
                           ("Upload/UploadId", upload),
                           ("Upload/StorageClass", "STANDARD_IA"),
                           ("Upload/ChecksumAlgorithm", "CRC32")):
            self.assertEqual(answer.one(path), text, path)
        self.assertTrue(answer.one("Upload/Initiator/ID"))
        self.assertTrue(answer.one("Upload/Initiated"))
        for query in ({"max-uploads": "x"}, {"encoding-type": "x"}):
            self.error(self.s3.get("/box", dict(query, uploads="")),
                       "InvalidArgument", 400)


# --- unconfigured buckets and refused operations ---

class UnconfiguredRequests(OperationCase):

    def test_what_a_bucket_without_configuration_answers(self):
        for query, answer in (
                ("policy", "NoSuchBucketPolicy"),
                ("policyStatus", "NoSuchBucketPolicy"),
                ("cors", "NoSuchCORSConfiguration"),
                ("lifecycle", "NoSuchLifecycleConfiguration"),
                ("tagging", "NoSuchTagSet"),
                ("object-lock", "ObjectLockConfigurationNotFoundError"),
                ("website", "NoSuchWebsiteConfiguration"),
                ("replication", "ReplicationConfigurationNotFoundError"),
                ("publicAccessBlock",
                 "NoSuchPublicAccessBlockConfiguration"),
                ("encryption",
                 "ServerSideEncryptionConfigurationNotFoundError")):
            with self.subTest(query=query):
                self.error(self.s3.get("/box", {query: ""}), answer, 404)

    def test_what_is_empty_or_the_default(self):
        for query, root in (
                ("location", "LocationConstraint"),
                ("versioning", "VersioningConfiguration"),
                ("notification", "NotificationConfiguration"),
                ("logging", "BucketLoggingStatus"),
                ("accelerate", "AccelerateConfiguration")):
            with self.subTest(query=query):
                answer = self.ok(self.s3.get("/box", {query: ""}))
                self.assertEqual(answer.xml().tag, root)
                self.assertEqual(len(answer.xml()), 0)
                self.assertEqual(answer.headers["content-type"],
                                 "application/xml")
        self.assertEqual(self.s3.get("/box", {"requestPayment": ""}).one(
            "Payer"), "BucketOwner")

    def test_the_lists_of_configurations_are_empty(self):
        for query in ("inventory", "analytics", "metrics",
                      "intelligent-tiering"):
            with self.subTest(query=query):
                answer = self.ok(self.s3.get("/box", {query: ""}))
                self.assertEqual([child.tag for child in answer.xml()],
                                 ["IsTruncated"])
                self.assertEqual(answer.one("IsTruncated"), "false")
                self.error(self.s3.get("/box", {query: "", "id": "x"}),
                           "NoSuchConfiguration", 404)

    def test_the_acl_is_the_owner_s_full_control(self):
        self.fill("k")
        for path in ("/box", "/box/k"):
            answer = self.ok(self.s3.get(path, {"acl": ""}))
            self.assertEqual(answer.xml().tag, "AccessControlPolicy")
            self.assertEqual(answer.all(
                "AccessControlList/Grant/Permission"), ["FULL_CONTROL"])
            owner = answer.one("Owner/ID")
            self.assertTrue(owner)
            self.assertEqual(owner, answer.one(
                "AccessControlList/Grant/Grantee/ID"))
            self.assertIn(b'xsi:type="CanonicalUser"', answer.body)
        self.error(self.s3.get("/box/none", {"acl": ""}), "NoSuchKey", 404)

    def test_an_object_has_no_tags(self):
        self.fill("k")
        answer = self.ok(self.s3.get("/box/k", {"tagging": ""}))
        self.assertEqual(answer.xml().tag, "Tagging")
        self.assertEqual(len(answer.xml().find("TagSet")), 0)
        self.error(self.s3.get("/box/none", {"tagging": ""}), "NoSuchKey",
                   404)

    def test_a_missing_bucket_is_NoSuchBucket_to_every_probe(self):
        for query in ("location", "versioning", "acl", "policy", "cors",
                      "tagging", "uploads", "lifecycle", "encryption"):
            with self.subTest(query=query):
                self.error(self.s3.get("/missing", {query: ""}),
                           "NoSuchBucket", 404)


class RefusedRequests(OperationCase):

    # What Terraform, s3cmd and the SDKs' own tests try to set
    CHANGES = {
        "PUT bucket": ("notification",),
        "GET object": ("torrent",),
        "POST object": ("restore", "select"),
    }
    BODY = b"<AccessControlPolicy><Owner/></AccessControlPolicy>"

    def refused(self, method, path, query):
        """Assert a 501 that changes nothing; its message."""
        before = self.tree()
        answer = self.s3.request(
            method, path, query, self.BODY if method in ("PUT", "POST")
            else b"", headers={"content-md5": digest64(
                "md5", self.BODY)} if method in ("PUT", "POST") else {})
        self.error(answer, "NotImplemented", 501)
        self.assertEqual(self.tree(), before)
        self.ok(self.s3.head("/box"))
        return answer.one("Message")

    def test_changes_of_configuration(self):
        self.ok(self.s3.put("/box/k", b"stays"))
        for kind, subresources in self.CHANGES.items():
            method, level = kind.split()
            paths = ("/box",) if level == "bucket" else ("/box/k",
                                                         "/box/new")
            for subresource in subresources:
                for path in paths:
                    with self.subTest(method=method, path=path,
                                      subresource=subresource):
                        self.refused(method, path, {subresource: ""})
        self.body("k", b"stays")
        self.assertEqual(self.s3.keys("box"), ["k"])

    def test_every_refused_row_is_named(self):
        self.ok(self.s3.put("/box/k", b"stays"))
        rows = [row for row in gos3rve.OPERATIONS.values()
                if row.level != gos3rve.STS]
        done = {row[1:4] for row in rows if row.state == gos3rve.DONE}
        refused = [row for row in rows if row.state == gos3rve.REFUSED
                   and row[1:4] not in done]
        self.assertGreater(len(refused), 10)
        for row in refused:
            path = {"service": "/", "bucket": "/box",
                    "object": "/box/k"}[row.level]
            names = [other.name for other in refused
                     if other[1:4] == row[1:4]]
            with self.subTest(row=row.name):
                message = self.refused(row.method, path, {
                    row.subresource: ""} if row.subresource else {})
                self.assertTrue(any(name in message for name in names),
                                message)

    def test_two_subresources_are_one_too_many(self):
        self.ok(self.s3.put("/box/k", b"stays"))
        for method in ("PUT", "GET", "DELETE"):
            answer = self.s3.request(method, "/box/k", {
                "acl": "", "tagging": ""})
            self.error(answer, "InvalidArgument", 400)
        self.body("k", b"stays")

    def test_an_unknown_parameter_never_makes_a_bucket(self):
        for query in ({"unknown": ""}, {"acl": ""}, {"versioning": ""},
                      {"prefix": "../x"}):
            answer = self.s3.put("/not-made", query=query)
            self.assertGreaterEqual(answer.status, 400)
            self.error(self.s3.head("/not-made"), "", 404)

    def test_refused_in_a_missing_bucket_makes_nothing(self):
        for query in ("acl", "policy", "versioning"):
            answer = self.s3.put("/missing", b"x", {query: ""})
            self.assertIn(answer.status, (404, 501))
        self.assertEqual(os.listdir(self.server.dir_buckets), ["box"])


# --- what a review found ---

class ReviewedRequests(OperationCase):

    def test_deleting_a_bucket_takes_nothing_else_of_its_name(self):
        self.ok(self.s3.put("/projects"))
        thesis = os.path.join(self.server.dir_uploads, "projects", "thesis")
        os.makedirs(thesis)
        self.ok(self.s3.post("/projects/k", {"uploads": ""}))
        self.ok(self.s3.delete("/projects"), 204)
        self.assertEqual(os.listdir(os.path.dirname(thesis)), ["thesis"])

    def test_what_is_there_is_not_created_over(self):
        path = os.path.join(self.server.dir_buckets, "by-hand")
        os.mkdir(path)
        inode = os.stat(path).st_ino
        self.addCleanup(os.rmdir, path)
        self.ok(self.s3.put("/by-hand"))        # one's own, in us-east-1
        self.assertEqual(os.stat(path).st_ino, inode)
        file = os.path.join(self.server.dir_buckets, "a-file")
        with open(file, "w"):
            pass
        self.addCleanup(os.unlink, file)
        self.error(self.s3.put("/a-file"), "BucketAlreadyExists")

    def test_a_signature_does_not_move_to_another_bucket(self):
        with gos3rve.serve(buckets=["pub", "other"],
                           public_url="https://s3.example.com") as server:
            client = Client(server.url, server.key_id, server.key_val)
            self.addCleanup(client.close)
            client.put("/other/pub/k", b"other's")
            client.put("/pub/k", b"mine")
            for host, status in (("10.1.2.3", 200),
                                 ("other.localhost", 403)):
                headers = client.sign("GET", "/pub/k", [], {
                    "host": "s3.example.com"}, "UNSIGNED-PAYLOAD")
                headers["host"] = host
                answer = client.send("GET", "/pub/k", b"", headers)
                self.assertEqual(answer.status, status, host)

    def test_many_empty_lines_are_no_request(self):
        answer = raw(self.server.port, b"\r\n" * 10000)
        self.assertTrue(answer.startswith(b"HTTP/1.1 400 "), answer[:80])

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs /proc")
    def test_refused_copies_and_broken_downloads_leave_nothing_open(self):
        self.s3.put("/box/k", b"1")
        self.s3.get("/box/k")
        before = open_files()
        for _ in range(10):
            self.error(self.s3.put("/box/l", headers={
                "x-amz-copy-source": "/box/k", "if-none-match": "x"}),
                "NotImplemented")
        self.assertLessEqual(open_files(), before + 1)

    def test_a_copy_of_a_file_put_by_hand_keeps_its_type(self):
        with open(self.path("a.html"), "w") as file:
            file.write("<p>")
        self.ok(self.s3.put("/box/b", headers={
            "x-amz-copy-source": "/box/a.html"}))
        self.assertEqual(self.s3.head("/box/b").headers["content-type"],
                         "text/html")

    def test_a_document_of_a_million_elements_is_refused(self):
        body = b"<Delete>" + b"<a/>" * 1000000 + b"</Delete>"
        self.error(self.s3.post("/box", {"delete": ""}, body, headers={
            "content-md5": digest64("md5", body)}), "MalformedXML")

    def test_directories_deeper_than_any_key_break_no_listing(self):
        self.s3.put("/box/k", b"1")
        path = self.path()
        fd = os.open(path, os.O_RDONLY)
        for _ in range(600):
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        self.assertEqual(self.s3.keys("box"), ["k"])

    def test_a_presigned_object_is_served_at_the_health_path(self):
        self.ok(self.s3.put("/minio"))
        self.s3.put("/minio/health/live", b"an object")
        url = self.s3.presign("GET", "/minio/health/live")
        with urllib.request.urlopen(url) as answer:
            self.assertEqual(answer.read(), b"an object")
        self.s3.delete("/minio/health/live")
        self.ok(self.s3.delete("/minio"), 204)

    def test_no_bucket_name_makes_a_log_line(self):
        lines = []
        with mock.patch.object(self.server.server, "access_log",
                               lines.append):
            self.s3.send("GET", "/x%0Aforged%20line/k")
            self.s3.get("/box")         # the line comes after the answer
        self.assertEqual(lines[0]["resource"], "/x%0Aforged%20line/k")


# --- POST forms ---

FORM_NOW = g.parse_amz_date("20151229T010000Z")
ACCOUNT = g.Account("AKIAIOSFODNN7EXAMPLE",
                    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "id", "me")
FORM_PEOPLE = {ACCOUNT.key_id: ACCOUNT}
LATER = "2015-12-29T02:00:00Z"
BOUNDARY = "xYzZY"
TYPE = "multipart/form-data; boundary=" + BOUNDARY


class FormSource:
    """A reader of bytes that gives at most `most` of them at a time."""

    def __init__(self, data, most=1 << 30):
        self.data, self.most, self.at = data, most, 0

    def read(self, size):
        piece = self.data[self.at:self.at + min(size, self.most)]
        self.at += len(piece)
        return piece


def part(name, value, filename=None, boundary=BOUNDARY, extra=""):
    """One part of a form, its delimiter included."""
    head = '--%s\r\nContent-Disposition: form-data; name="%s"' % (
        boundary, name)
    if filename is not None:
        head += '; filename="%s"' % filename
    if isinstance(value, str):
        value = value.encode()
    return (head + extra + "\r\n\r\n").encode() + value + b"\r\n"


def form(fields, file=b"bar", filename="my-file", after=()):
    """The body of a form; `file` None for none."""
    body = b"".join(part(*pair) for pair in fields)
    if file is not None:
        body += part("file", file, filename)
    body += b"".join(part(*pair) for pair in after)
    return body + b"--%s--\r\n" % BOUNDARY.encode()


def read_all(reader, size=1 << 16):
    """All bytes of a reader, which must stay at its end."""
    pieces = []
    while True:
        data = reader.read(size)
        if not data:
            assert reader.read(size) == b""
            return b"".join(pieces)
        assert len(data) <= size
        pieces.append(data)


def encode(policy):
    """A policy, of JSON values or as text, in base64."""
    if not isinstance(policy, (str, bytes)):
        policy = json.dumps(policy)
    if isinstance(policy, str):
        policy = policy.encode()
    return base64.b64encode(policy).decode()


def v2(policy, **more):
    """The fields of a form signed with SigV2."""
    policy = encode(policy)
    signature = base64.b64encode(hmac.new(
        ACCOUNT.secret.encode(), policy.encode(), hashlib.sha1).digest())
    return dict({"AWSAccessKeyId": ACCOUNT.key_id, "policy": policy,
                 "signature": signature.decode()}, **more)


def v4(policy, region="us-east-1", date="20151229T000000Z"):
    """The fields of a form signed with SigV4; policy: as base64."""
    key = ("AWS4" + ACCOUNT.secret).encode()
    for text in (date[:8], region, "s3", "aws4_request"):
        key = hmac.new(key, text.encode(), hashlib.sha256).digest()
    return {"x-amz-algorithm": "AWS4-HMAC-SHA256",
            "x-amz-credential": "%s/%s/%s/s3/aws4_request"
                                % (ACCOUNT.key_id, date[:8], region),
            "x-amz-date": date, "policy": policy,
            "x-amz-signature": hmac.new(key, policy.encode(),
                                        hashlib.sha256).hexdigest()}


class FormCase(unittest.TestCase):

    def refused(self, code, call, *args, message=None):
        """Assert the S3Error of a call; returns it."""
        with self.assertRaises(g.S3Error) as caught:
            call(*args)
        error = caught.exception
        self.assertEqual(error.code, code, error.message)
        if message is not None:
            self.assertEqual(error.message, message)
        return error

    def post(self, fields, file=b"bar", filename="my-file", bucket="b",
             now=FORM_NOW, region=None):
        """The (PostUpload, content) of a form."""
        pairs = fields.items() if isinstance(fields, dict) else fields
        upload = g.open_post(FormSource(form(pairs, file, filename)), TYPE,
                             bucket, FORM_PEOPLE, now, region)
        return upload, read_all(upload.reader)


class FormParsing(FormCase):

    def parse(self, body, most=1 << 30, size=1 << 16):
        """(fields, filename, content) of a body."""
        read = g.read_form(FormSource(body, most), BOUNDARY.encode())
        return read.fields, read.filename, read_all(read.file, size)

    FIELDS = [("key", "a\r\nb"), ("Policy", ""),
              ("x-amz-meta-\u00e9", "\u20ac"),
              ("acl", "--xYzZ"), ("x", "\r\n--xYzZ\r\n--" + BOUNDARY[:4])]
    # content that nearly holds a delimiter, over and over
    FILE = (b"\r\n--xYzZ\r\r\n--xYz\r\n\r\n-\r\n--" * 3 + b"--xYzZY\r\n"
            + bytes(range(256)) + b"\r")

    def expected(self):
        return ({name.lower(): value for name, value in self.FIELDS},
                "n\u00e4me.txt", self.FILE)

    def test_a_byte_at_a_time_and_at_every_split(self):
        body = form(self.FIELDS, self.FILE, "n\u00e4me.txt",
                    [("submit", "Upload")])
        for most in (1, 2, 3, 7, 64, 1 << 20):
            for size in (1, 5, 1 << 16):
                self.assertEqual(self.parse(body, most, size),
                                 self.expected())
        for cut in range(1, len(body)):
            read = g.read_form(FormSplit(body, cut), BOUNDARY.encode())
            self.assertEqual((read.fields, read.filename,
                              read_all(read.file)), self.expected())

    def test_random_contents_of_the_delimiter_s_bytes(self):
        rng, delimiter = random.Random(4), b"\r\n--" + BOUNDARY.encode()
        for _ in range(300):
            data = bytes(rng.choice(b"\r\n-xYzZ") for _ in range(
                rng.randrange(60)))
            if delimiter not in data:
                self.assertEqual(self.parse(
                    form([("key", "k")], data), rng.randrange(1, 20))[2],
                    data)

    def test_an_empty_file_and_empty_fields(self):
        self.assertEqual(self.parse(form([("a", "")], b"", ""), 1),
                         ({"a": ""}, "", b""))

    def test_a_part_may_end_with_its_headers(self):
        body = form([("a", ""), ("key", "k")], b"", "").replace(
            b"\r\n\r\n\r\n", b"\r\n\r\n")
        for most in (1, 1 << 20):
            self.assertEqual(self.parse(body, most),
                             ({"a": "", "key": "k"}, "", b""))

    def test_every_truncation_is_an_error(self):
        body = form([("key", "k")], b"bar")[:-2]    # the last CRLF is free
        self.assertEqual(self.parse(body)[2], b"bar")
        for cut in range(len(body)):
            with self.subTest(body[:cut]):
                self.refused("MalformedPOSTRequest", self.parse, body[:cut])

    def test_preamble_epilogue_and_padding_are_ignored(self):
        body = form([("key", "k")]) + b"epilogue\r\n--xYzZY--"
        for before in (b"\r\n", b"pre\r\nam--xYzZYble\r\n"):
            self.assertEqual(self.parse(before + body, 1)[2], b"bar")
        body = body.replace(b"--xYzZY\r\n", b"--xYzZY \t\r\n")
        self.assertEqual(self.parse(body, 1)[0], {"key": "k"})

    def test_what_is_not_well_formed(self):
        good = part("key", "k") + part("file", "x") + b"--xYzZY--"
        self.assertEqual(self.parse(good)[2], b"x")
        for old, new in (
                (b"--xYzZY\r\n", b"--xYzZYz\r\n"),      # a longer boundary
                (b"--xYzZY\r\n", b"--xYzZY-\r\n"),
                (b"--xYzZY--", b"--xYzZY"), (b"--xYzZY--", b""),
                (b"\r\n", b"\n"), (b"Disposition:", b"Disposition"),
                (b"Content-Disposition", b" Content-Disposition"),
                (b"Content-Disposition", b"X: y\r\n Content-Disposition"),
                (b"Content-Disposition: form-data; name",
                 b"Content-Disposition: form-data\r\nname"),
                (b"Content-Disposition: ", b"X-Other: "),
                (b"form-data", b"attachment"), (b"form-data;", b"form-data"),
                (b'name="key"', b'name="key'), (b'name="key"', b'name=""'),
                (b'name="key"', b'name=k y'), (b'name="key"', b'name = "k"'),
                (b'name="key"', b'name="k"; NAME="l"'),
                (b'name="key"', b'filename="k"'), (b'name="key"', b""),
                (b'name="key"', b'name="k\0"'), (b'name="key"', b'name="\n"'),
                (b'name="key"', b'name="k" x'), (b'name="key"', b'name="k";'),
                (b'name="key"', b'name="\xff"'),
                (b"\r\nk\r\n", b"\r\n\xff\r\n"),
                (b'name="file"', b'name="file"; filename="\xc3"'),
                (b'name="key"', b'name="k"\r\nContent-Disposition: form-data'
                                b'; name="l"')):
            with self.subTest(old=old, new=new):
                bad = good.replace(old, new)
                self.assertNotEqual(bad, good)
                for most in (1, 1 << 20):
                    self.refused("MalformedPOSTRequest", self.parse, bad,
                                 most)

    def test_names_and_file_names(self):
        for text, filename in (
                (r'"a\"b"', 'a"b'), (r'"C:\dir\f.txt"', r"C:\dir\f.txt"),
                (r'"a\\b"', r"a\b"), ('"%22"', "%22"), ("token", "token"),
                ('"a;b=c"', "a;b=c"), ('""', "")):
            body = part("key", "k") + part("FILE", "x").replace(
                b'"FILE"', b'"FILE"; FileName=' + text.encode()) \
                + b"--xYzZY--"
            self.assertEqual(self.parse(body), ({"key": "k"}, filename, b"x"))
        body = part("key", "k") + b'--xYzZY\r\ncontent-disposition:Form-Data' \
            b';name=file\r\ncontent-TYPE: a/b\r\n\r\nx\r\n--xYzZY--'
        self.assertEqual(self.parse(body), ({"key": "k"}, None, b"x"))

    def test_the_name_alone_tells_the_file(self):
        """requests gives every part of files=... a filename."""
        body = part("key", "k", "key") + part("acl", "private", "acl") \
            + part("file", "x", "file") + b"--xYzZY--"
        self.assertEqual(self.parse(body), (
            {"key": "k", "acl": "private"}, "file", b"x"))

    def test_fields_of_one_name_are_joined(self):
        read = g.read_form(FormSource(form([("X-Amz-Meta-Tag", "Ninja"),
                                        ("x-amz-meta-tag", "Stallman")])),
                           BOUNDARY.encode())
        self.assertEqual(read.fields, {"x-amz-meta-tag": "Ninja,Stallman"})
        self.assertEqual(read.names, {"x-amz-meta-tag": "X-Amz-Meta-Tag"})

    def test_exactly_one_file(self):
        message = "POST requires exactly one file upload per request."
        error = self.refused("InvalidArgument", self.parse,
                             form([("key", "k")], None), message=message)
        self.assertEqual(error.fields, {"ArgumentName": "file",
                                        "ArgumentValue": "0"})
        body = form([("key", "k")], after=[("x", "y"), ("File", b"z" * 99999)])
        for most in (1, 1 << 20):
            error = self.refused("InvalidArgument", self.parse, body, most,
                                 message=message)
            self.assertEqual(error.fields["ArgumentValue"], "2")

    def test_form_data_has_20_kb(self):
        empty = len(form([("a", "")], b"", "")) - 2     # no epilogue
        for excess in (-1, 0, 1):
            value = "x" * (g.MAX_FORM_BYTES - empty + 2 + excess)
            body = form([("a", value)], b"y" * 100000, "")
            for most in (1000, 1 << 20):
                if excess <= 0:
                    self.assertEqual(self.parse(body, most)[2],
                                     b"y" * 100000)
                else:
                    error = self.refused("MaxPostPreDataLengthExceeded",
                                         self.parse, body, most)
                    self.assertEqual(
                        error.fields, {"MaxPostPreDataLengthBytes": 20480})

    def test_no_part_of_the_form_can_grow_beyond_it(self):
        big = b"x" * 300000
        head = b"--xYzZY\r\n"
        for body in (
                big, head + big, head + b"".join(
                    b"A%d: b\r\n" % i for i in range(50000)),
                head + b"A: " + big, b"--xYzZY " + b" " * 300000,
                part("a", big), part("a", "b") * 5000,
                part("file", "x") + part("a", big),
                part("a", "", "x" * 30000)):
            for most in (1 << 12, 1 << 20):
                source = FormSource(body, most)
                with self.assertRaises(g.S3Error) as caught:
                    read_all(g.read_form(source, BOUNDARY.encode()).file)
                self.assertEqual(caught.exception.code,
                                 "MaxPostPreDataLengthExceeded")
                self.assertLess(source.at, g.MAX_FORM_BYTES
                                + g.BLOCK_BYTES + 200)

    def test_a_large_file_takes_one_block_of_memory(self):
        class Endless(FormSource):
            """64 MiB between a head and a tail."""
            largest = 0

            def read(self, size):
                Endless.largest = max(Endless.largest, size)
                self.at += 1
                return (part("key", "k") + part("file", "")[:-2]
                        if self.at == 1 else bytes(g.BLOCK_BYTES)
                        if self.at < 258 else b"\r\n--xYzZY--"
                        if self.at == 258 else b"")
        read = g.read_form(Endless(b""), BOUNDARY.encode())
        parser, total, started = read.file._parser, 0, time.perf_counter()
        while True:
            data = read.file.read(g.BLOCK_BYTES)
            total += len(data)
            self.assertLess(len(parser._buffer), 2 * g.BLOCK_BYTES)
            if not data:
                break
        self.assertEqual(total, 256 * g.BLOCK_BYTES)
        self.assertEqual(Endless.largest, g.BLOCK_BYTES)
        self.assertLess(time.perf_counter() - started, 5)

    def test_the_source_s_own_error_passes(self):
        body = form([("key", "k")])
        source = g.LengthReader(FormSource(body[:-20]), len(body))
        with self.assertRaises(g.S3Error) as caught:
            read_all(g.read_form(source, BOUNDARY.encode()).file)
        self.assertEqual(caught.exception.code, "IncompleteBody")

    def test_the_content_type(self):
        for text, boundary in (
                (TYPE, b"xYzZY"), ('Multipart/FORM-data;  Boundary="a b"',
                                   b"a b"),
                ("multipart/form-data; charset=utf-8; boundary=" + "x" * 70,
                 b"x" * 70), ('multipart/form-data; boundary="=_?(,)"',
                              b"=_?(,)")):
            self.assertEqual(g.form_boundary(text), boundary)
        for text in ("", "text/html", "multipart/mixed; boundary=a",
                     "multipart/form-dat; boundary=a"):
            error = self.refused("PreconditionFailed", g.form_boundary, text)
            self.assertEqual(error.fields, {
                "Condition": "Bucket POST must be of the enclosure-type "
                             "multipart/form-data"})
        for rest in ("", ";", "; boundary", "; boundary=", '; boundary=""',
                     '; boundary="a "', "; boundary=" + "x" * 71,
                     "; boundary=a; boundary=b", '; boundary="\u00e9"',
                     '; boundary="a\r\nb"', "; boundary=a b"):
            self.refused("MalformedPOSTRequest", g.form_boundary,
                         "multipart/form-data" + rest)


class FormSplit(FormSource):
    """A reader that gives its bytes in two."""

    def __init__(self, data, cut):
        super().__init__(data)
        self.cut = cut

    def read(self, size):
        if self.at < self.cut:
            size = min(size, self.cut - self.at)
        return super().read(size)


class FormSignatures(FormCase):

    AWS_POLICY = (
        '{ "expiration": "2015-12-30T12:00:00.000Z",\r\n'
        '  "conditions": [\r\n'
        '    {"bucket": "sigv4examplebucket"},\r\n'
        '    ["starts-with", "$key", "user/user1/"],\r\n'
        '    {"acl": "public-read"},\r\n'
        '    {"success_action_redirect": "http://sigv4examplebucket.s3.'
        'amazonaws.com/successful_upload.html"},\r\n'
        '    ["starts-with", "$Content-Type", "image/"],\r\n'
        '    {"x-amz-meta-uuid": "14365123651274"},\r\n'
        '    {"x-amz-server-side-encryption": "AES256"},\r\n'
        '    ["starts-with", "$x-amz-meta-tag", ""],\r\n\r\n'
        '    {"x-amz-credential": "AKIAIOSFODNN7EXAMPLE/20151229/us-east-1/'
        's3/aws4_request"},\r\n'
        '    {"x-amz-algorithm": "AWS4-HMAC-SHA256"},\r\n'
        '    {"x-amz-date": "20151229T000000Z" }\r\n'
        "  ]\r\n}")

    def test_aws_s_example(self):
        """API/sigv4-post-example.html, its signature included."""
        redirect = ("http://sigv4examplebucket.s3.amazonaws.com/"
                    "successful_upload.html")
        fields = {
            "key": "user/user1/${filename}", "acl": "public-read",
            "success_action_redirect": redirect,
            "Content-Type": "image/jpeg",
            "x-amz-meta-uuid": "14365123651274",
            "x-amz-server-side-encryption": "AES256",
            "X-Amz-Credential": "AKIAIOSFODNN7EXAMPLE/20151229/us-east-1/s3/"
                                "aws4_request",
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Date": "20151229T000000Z", "x-amz-meta-tag": "",
            "Policy": encode(self.AWS_POLICY),
            "X-Amz-Signature": "8afdbf4008c03f22c2cd3cdb72e4afbb1f6a588f3255"
                               "ac628749a66d7f09699e"}
        upload, content = self.post(fields, bucket="sigv4examplebucket",
                                    region="us-east-1", filename="a/me.jpg")
        self.assertEqual(content, b"bar")
        self.assertEqual(upload[:3] + upload[4:], (
            g.Identity(ACCOUNT), "user/user1/me.jpg", {
                "x-amz-acl": "public-read", "content-type": "image/jpeg",
                "x-amz-meta-uuid": "14365123651274", "x-amz-meta-tag": "",
                "x-amz-server-side-encryption": "AES256"}, 204, redirect))

    def test_botocore_s_form(self):
        """generate_presigned_post of botocore 1.43, its clock stopped."""
        policy = encode(
            '{"expiration": "2015-12-29T01:00:00Z", "conditions": [{"bucket":'
            ' "sigv4examplebucket"}, {"key": "user/user1/photo.jpg"}, '
            '{"x-amz-algorithm": "AWS4-HMAC-SHA256"}, {"x-amz-credential": '
            '"AKIAIOSFODNN7EXAMPLE/20151229/us-east-1/s3/aws4_request"}, '
            '{"x-amz-date": "20151229T000000Z"}]}')
        fields = v4(policy)
        self.assertEqual(fields["x-amz-signature"], "3364624b39010d9b06f5d9b8"
                         "c9a18a6e478d261c048159c92f2fd6fa885f14e6")
        fields["key"] = "user/user1/photo.jpg"
        upload, _ = self.post(fields, bucket="sigv4examplebucket",
                              now=FORM_NOW)
        self.assertEqual(upload.identity.account, ACCOUNT)
        self.assertEqual(upload.headers, {})

    def sign(self, fields, region=None, now=FORM_NOW):
        """authenticate_form of a form's fields."""
        return g.authenticate_form(
            {name.lower(): value for name, value in fields.items()},
            FORM_PEOPLE, now, region)

    def test_a_wrong_signature(self):
        for fields, name in ((v4(encode("{}")), "x-amz-signature"),
                             (v2("{}"), "signature")):
            self.assertEqual(self.sign(fields), g.Identity(ACCOUNT))
            for wrong in ("x", "\u00e9", fields[name][::-1]):
                error = self.refused("SignatureDoesNotMatch", self.sign,
                                     dict(fields, **{name: wrong}))
                self.assertEqual(error.status, 403)
                self.assertEqual(list(error.fields.items()), [
                    ("AWSAccessKeyId", ACCOUNT.key_id),
                    ("StringToSign", fields["policy"]),
                    ("SignatureProvided", wrong),
                    ("StringToSignBytes",
                     fields["policy"].encode().hex(" "))])
            self.refused("SignatureDoesNotMatch", self.sign,
                         dict(fields, policy=fields["policy"][:-2] + "=="))

    def test_a_field_that_is_missing_is_named(self):
        """LocalStack's test_post_request_missing_signature, _fields."""
        for fields, gone, name in (
                (v4("e30="), ("x-amz-signature",), "X-Amz-Signature"),
                (v4("e30="), ("x-amz-algorithm", "x-amz-credential"),
                 "X-Amz-Algorithm"),
                (v4("e30="), ("x-amz-credential",), "X-Amz-Credential"),
                (v4("e30="), ("x-amz-date",), "X-Amz-Date"),
                (v4("e30="), ("policy",), "Policy"),
                (v2("{}"), ("signature",), "Signature"),
                (v2("{}"), ("policy",), "Policy"),
                (v2("{}"), ("AWSAccessKeyId",), "AWSAccessKeyId")):
            for field in gone:
                del fields[field]
            error = self.refused(
                "InvalidArgument", self.sign, fields, message="Bucket POST "
                "must contain a field named '%s'.  If it is specified, "
                "please check the order of the fields." % name)
            self.assertEqual(error.fields, {"ArgumentName": name,
                                            "ArgumentValue": ""})

    def test_a_policy_alone_signs_nothing(self):
        for fields in ({}, {"policy": "e30="}, {"key": "k"}):
            self.assertEqual(self.sign(fields), g.Identity(None))

    def test_the_scope(self):
        good = v4("e30=")
        for name, value, code, message in (
                ("x-amz-algorithm", "AWS4", "InvalidArgument",
                 'X-Amz-Algorithm only supports "AWS4-HMAC-SHA256"'),
                ("x-amz-date", "2015-12-29", "InvalidArgument",
                 "X-Amz-Date must be formated via ISO8601 Long format"),
                ("x-amz-date", "20151230T000000Z", "InvalidArgument", None),
                ("x-amz-credential", "x", "InvalidArgument", None),
                ("x-amz-credential", good["x-amz-credential"].replace(
                    "/s3/", "/sqs/"), "InvalidArgument",
                 'incorrect service "sqs". This endpoint belongs to "s3".'),
                ("x-amz-credential", good["x-amz-credential"].replace(
                    ACCOUNT.key_id, "foo"), "InvalidAccessKeyId", None),
                ("x-amz-security-token", "t", "InvalidToken", None)):
            error = self.refused(code, self.sign, dict(good, **{name: value}),
                                 "us-east-1", message=message)
            if code == "InvalidArgument":
                self.assertIn(error.fields["ArgumentName"], (
                    "X-Amz-Algorithm", "X-Amz-Date", "X-Amz-Credential"))
        error = self.refused("InvalidArgument", self.sign, good, "us-west-1",
                             message="the region 'us-east-1' is wrong; "
                                     "expecting 'us-west-1'")
        self.assertEqual(error.fields, {
            "Region": "us-west-1", "ArgumentName": "X-Amz-Credential",
            "ArgumentValue": good["x-amz-credential"]})
        self.refused("InvalidAccessKeyId", self.sign,
                     v2("{}", AWSAccessKeyId="foo"))

    def test_a_sigv4_signature_lasts_seven_days(self):
        then = g.parse_amz_date("20151229T000000Z")
        week = 7 * 24 * 3600
        self.sign(v4("e30="), now=then + week)
        self.refused("AccessDenied", self.sign, v4("e30="), None,
                     then + week + 1,
                     message="Invalid according to Policy: Policy expired.")


def s3_tests_policy(*more):
    """The policy of most of s3-tests' test_post_object_*."""
    return {"expiration": LATER, "conditions": [
        {"bucket": "b"}, ["starts-with", "$key", "foo"], {"acl": "private"},
        ["starts-with", "$Content-Type", "text/plain"],
        ["content-length-range", 0, 1024]] + list(more)}


S3_TESTS_FIELDS = {"key": "foo.txt", "acl": "private",
                   "Content-Type": "text/plain"}
DENIED = "Invalid according to Policy: "
FAILED = DENIED + "Policy Condition failed: "
INVALID = "Invalid Policy: "


class FormPolicies(FormCase):

    def signed(self, policy, fields=(), file=b"bar", **more):
        """A form of s3-tests' fields and these, signed."""
        fields = dict(S3_TESTS_FIELDS, **dict(fields))
        fields = {name: value for name, value in fields.items()
                  if value is not None}
        return self.post(v2(policy, **fields), file, **more)

    def test_forms_that_meet_it(self):
        """ceph/s3-tests, by the test's name after test_post_object_."""
        lower = {"expiration": LATER, "conditions": [
            {"bUcKeT": "b"}, ["StArTs-WiTh", "$KeY", "foo"],
            {"AcL": "private"}, ["StArTs-WiTh", "$CoNtEnT-TyPe", "text/plain"],
            ["content-length-range", 0, 1024]]}
        escaped = json.loads(json.dumps(s3_tests_policy()))
        escaped["conditions"][1][2] = "\\$foo"
        meta = s3_tests_policy(["starts-with", "$x-amz-meta-foo", "bar"])
        for name, policy, fields in (
                ("authenticated_request", s3_tests_policy(), {}),
                ("ignored_header", s3_tests_policy(), {"x-ignore-foo": "b"}),
                ("case_insensitive_condition_fields", lower, {}),
                ("escaped_field_values", escaped, {"key": "\\$foo.txt"}),
                ("user_specified_header", meta,
                 {"x-amz-meta-foo": "barclamp"}),
                ("a bucket field", s3_tests_policy(), {"bucket": "other"}),
                ("x-ignore-", s3_tests_policy(), {"X-Ignore-": "y"})):
            with self.subTest(name):
                upload, content = self.signed(policy, fields)
                self.assertEqual(upload.identity.account, ACCOUNT)
                self.assertEqual(content, b"bar")

    def test_forms_that_do_not(self):
        redirect = ["eq", "success_action_redirect", "http://x"]
        for policy, fields, message in (
                (s3_tests_policy(), {"key": "bar"},
                 FAILED + '["starts-with", "$key", "foo"]'),
                (s3_tests_policy(), {"key": "Foo"},
                 FAILED + '["starts-with", "$key", "foo"]'),
                (s3_tests_policy(), {"acl": "Private"},
                 FAILED + '["eq", "$acl", "private"]'),
                (s3_tests_policy(), {"acl": None},
                 FAILED + '["eq", "$acl", "private"]'),
                (s3_tests_policy(["starts-with", "$x-amz-meta-foo", "bar"]),
                 {}, FAILED + '["starts-with", "$x-amz-meta-foo", "bar"]'),
                (s3_tests_policy(["starts-with", "$utf8", ""]), {},
                 FAILED + '["starts-with", "$utf8", ""]'),
                (s3_tests_policy(["eq", "$x-amz-meta-foo", ""]),
                 {"x-amz-meta-foo": "barclamp"},
                 FAILED + '["eq", "$x-amz-meta-foo", ""]'),
                (s3_tests_policy(redirect),
                 {"success_action_redirect": "http://x"},
                 FAILED + '["eq", "success_action_redirect", "http://x"]'),
                (s3_tests_policy(
                    ["eq", "$Content-Disposition", 'a="b\u00e9"']),
                 {}, FAILED + '["eq", "$Content-Disposition", '
                              '"a=\\"b\u00e9\\""]'),
                (s3_tests_policy(["content-length-range", "test", "10"]), {},
                 FAILED + '["content-length-range", "test", "10"]'),
                (s3_tests_policy(), {"StorageClass": "x"},
                 DENIED + "Extra input fields: StorageClass"),
                (s3_tests_policy(), {"x-amz-meta-a": "b"},
                 DENIED + "Extra input fields: x-amz-meta-a"),
                (s3_tests_policy(), {"x-amz-checksum-sha256": "b"},
                 DENIED + "Extra input fields: x-amz-checksum-sha256")):
            with self.subTest(message):
                error = self.refused("AccessDenied", self.signed, policy,
                                     fields, message=message)
                self.assertEqual(error.status, 403)

    def test_the_bucket_is_a_field_that_must_be_named(self):
        policy = s3_tests_policy()
        self.refused("AccessDenied", lambda: self.signed(
            policy, {"bucket": "b"}, bucket="other"),
            message=FAILED + '["eq", "$bucket", "b"]')
        del policy["conditions"][0]
        self.refused("AccessDenied", self.signed, policy,
                     message=DENIED + "Extra input fields: bucket")

    def test_sigv4_s_own_fields_must_be_named(self):
        policy = {"expiration": LATER, "conditions": [
            {"bucket": "b"}, {"key": "k"}]}
        error = self.refused("AccessDenied", self.post,
                             dict(v4(encode(policy)), key="k"))
        self.assertEqual(error.message, DENIED + "Extra input fields: "
                         "x-amz-algorithm, x-amz-credential, x-amz-date")

    def test_the_end_of_a_policy(self):
        for now, over in ((0, False), (FORM_NOW + 3600, False),
                          (FORM_NOW + 3601, True)):
            if over:
                self.refused("AccessDenied", lambda: self.signed(
                    s3_tests_policy(), now=now),
                    message=DENIED + "Policy expired.")
            else:
                self.signed(s3_tests_policy(), now=now)
        for end in ("2015-12-29T02:00:00.000Z", "2015-12-29T02:00:00.5Z"):
            self.assertEqual(g.parse_post_policy(encode(
                {"expiration": end, "conditions": []})).expires,
                FORM_NOW + 3600)

    def test_content_types_are_lists(self):
        condition = g.parse_post_policy(encode({
            "expiration": LATER, "conditions": [
                ["starts-with", "$Content-Type", "image/"]]})).conditions[0]
        for value, holds in (
                ("image/jpg,image/png, image/gif", True), ("image/", True),
                ("image/jpg,text/plain", False), ("image/jpg,", False),
                ("Image/jpg", False)):
            self.assertEqual(condition.holds({"content-type": value}), holds)
        other = condition._replace(field="x-amz-meta-a")
        self.assertTrue(other.holds({"x-amz-meta-a": "image/a,b"}))

    def test_sizes(self):
        """LocalStack's test_s3_presigned_post_content_length_range."""
        def policy(*ranges):
            return {"expiration": LATER, "conditions": [
                {"bucket": "b"}, ["eq", "$key", "foo.txt"]] + [
                    ["content-length-range"] + list(one) for one in ranges]}
        bare = {"acl": None, "Content-Type": None}
        for ranges, size, code, fields in (
                (((5, 10),), 5, None, None), (((5, 10),), 10, None, None),
                ((("5", "10"),), 7, None, None), ((), 0, None, None),
                (((0, 0),), 0, None, None),
                (((5, 10),), 12, "EntityTooLarge",
                 {"ProposedSize": 12, "MaxSizeAllowed": 10}),
                (((5, 10),), 1, "EntityTooSmall",
                 {"ProposedSize": 1, "MinSizeAllowed": 5}),
                (((0, 0),), 3, "EntityTooLarge",
                 {"ProposedSize": 3, "MaxSizeAllowed": 0}),
                (((0, 9), (4, 99)), 3, "EntityTooSmall",
                 {"ProposedSize": 3, "MinSizeAllowed": 4}),
                (((0, 9), (4, 99)), 10, "EntityTooLarge",
                 {"ProposedSize": 10, "MaxSizeAllowed": 9}),
                (((9, 5),), 7, "EntityTooLarge",
                 {"ProposedSize": 7, "MaxSizeAllowed": 5})):
            with self.subTest(ranges=ranges, size=size):
                if code is None:
                    self.assertEqual(len(self.signed(
                        policy(*ranges), bare, b"x" * size)[1]), size)
                else:
                    error = self.refused(code, self.signed, policy(*ranges),
                                         bare, b"x" * size)
                    self.assertEqual(error.fields, fields)
                    self.assertEqual(error.status, 400)

    def test_too_large_is_said_before_all_of_it_has_come(self):
        policy = {"expiration": LATER, "conditions": [
            {"bucket": "b"}, {"key": "k"}, ["content-length-range", 0, 10]]}
        source = FormSource(form(v2(policy, key="k").items(), b"x" * 10000000))
        upload = g.open_post(source, TYPE, "b", FORM_PEOPLE, FORM_NOW)
        self.refused("EntityTooLarge", read_all, upload.reader)
        self.assertLess(source.at, 3 * g.BLOCK_BYTES)

    def test_documents_that_are_no_policy(self):
        def with_condition(*conditions):
            return {"expiration": LATER, "conditions": list(conditions)}
        for policy, message in (
                ("", "Expecting '{' but found End-of-Input"),
                ("x", "Invalid JSON."), ("[]", "Invalid JSON."),
                ("[" * 9000, "Invalid JSON."), (b"\xff", "Invalid JSON."),
                ('{"expiration": NaN}', "Invalid JSON."),
                ('{"expiration": "%s", "conditions": [],}' % LATER,
                 "Invalid JSON."),
                ({}, "Policy missing expiration."),
                ({"conditions": []}, "Policy missing expiration."),
                ({"expiration": LATER}, "Policy missing conditions."),
                ({"EXPIRATION": LATER, "conditions": []},
                 "Unexpected: 'EXPIRATION'"),
                ({"expiration": LATER, "CONDITIONS": []},
                 "Unexpected: 'CONDITIONS'"),
                ({"expiration": LATER, "conditions": {}},
                 "Invalid 'conditions' value: must be a List."),
                ({"expiration": 5, "conditions": []},
                 "Invalid 'expiration' value: '5'"),
                (with_condition({}), "Invalid Simple-Condition: Simple-"
                 "Conditions must have exactly one property specified."),
                (with_condition({"bucket": "b", "key": "k"}),
                 "Invalid Simple-Condition: Simple-Conditions must have "
                 "exactly one property specified."),
                (with_condition({"Content-Length": 6199034}),
                 "Invalid Simple-Condition: value must be a string."),
                (with_condition("x"), "Invalid condition test: must be a "
                                      "List or Object."),
                (with_condition([]), "Invalid Condition: missing operation "
                                     "identifier."),
                (with_condition(["ends-with", "$key", "x"]),
                 "Invalid Condition: unknown operation 'ends-with'."),
                (with_condition(["eq", "$key"]),
                 "Invalid eq: wrong number of arguments."),
                (with_condition(["eq", "$key", 5]), "Invalid JSON."),
                (with_condition(["eq", 5, "x"]), "Invalid JSON."),
                (with_condition(["content-length-range", 0]),
                 "Invalid content-length-range: wrong number of arguments."),
                (with_condition(["content-length-range", 0, 512.0]),
                 "Invalid JSON."),
                (with_condition(["content-length-range", True, 5]),
                 "Invalid JSON."),
                (with_condition(["content-length-range", -1, 0]), None)):
            with self.subTest(policy):
                self.refused("InvalidPolicyDocument", g.parse_post_policy,
                             encode(policy), message=message
                             and INVALID + message)
        for date in ("2016-01-01 02:00:00Z", "2011-09-13T07:52:58+02:00",
                     "2016-13-01T02:00:00Z", "2016-01-01", "x" * 99,
                     "Tue, 29 Dec 2015 02:00:00 GMT"):
            self.refused("InvalidPolicyDocument", g.parse_post_policy,
                         encode({"expiration": date, "conditions": []}),
                         message=INVALID + "Invalid 'expiration' value: '%s'"
                         % date)
        for encoded in ("a", "e30=e30=", "\u00e9", "e30*"):
            self.refused("InvalidPolicyDocument", g.parse_post_policy,
                         encoded, message=INVALID
                         + "invalid Base64 encoding.")

    def test_base64_may_be_wrapped_and_unpadded(self):
        text = encode(s3_tests_policy())
        wrapped = "\r\n".join(text[i:i + 76]
                              for i in range(0, len(text), 76))
        for encoded in (wrapped, text.rstrip("=")):
            self.assertEqual(len(g.parse_post_policy(encoded).conditions), 5)

    def test_the_documentation_s_escapes(self):
        policy = g.parse_post_policy(encode(
            r'{"expiration": "%s", "conditions": [["eq", "$key", '
            r'"\$a\v\\$\u0062\n\\v"]]}' % LATER))
        self.assertEqual(policy.conditions[0].value, "$a\x0b\\$b\n\\v")

    def test_the_signature_comes_before_the_policy(self):
        fields = v2("no policy", **S3_TESTS_FIELDS)
        self.refused("InvalidPolicyDocument", self.post, fields)
        self.refused("SignatureDoesNotMatch", self.post,
                     dict(fields, signature="x"))

    def test_the_key_comes_before_the_signature(self):
        for fields in ({}, {"acl": "private"},
                       v2(s3_tests_policy(), acl="private")):
            error = self.refused(
                "InvalidArgument", self.post, fields,
                message="Bucket POST must contain a field named 'key'.  If "
                        "it is specified, please check the order of the "
                        "fields.")
            self.assertEqual(error.fields["ArgumentName"], "key")


class FormUploads(FormCase):

    def test_an_unsigned_form(self):
        upload, content = self.post(
            {"key": "foo.txt", "acl": "public-read",
             "Content-Type": "text/plain"})
        self.assertEqual(content, b"bar")
        self.assertEqual(upload[:3] + upload[4:], (
            g.Identity(None), "foo.txt", {
                "x-amz-acl": "public-read", "content-type": "text/plain"},
            204, None))

    def test_file_names(self):
        for key, filename, expected in (
                ("${filename}", "foo.txt", "foo.txt"),
                ("a/${filename}", "C:\\Program Files\\d\\f.txt", "a/f.txt"),
                ("${filename}-${filename}", "/x/\u20ac", "\u20ac-\u20ac"),
                ("u/${filename}", "", "u/"), ("u/${filename}", "x/", "u/"),
                ("${filename}", None, "${filename}"),
                ("${Filename}", "f", "${Filename}"),
                ("${filename}", "${filename}", "${filename}")):
            upload, _ = self.post({"key": key, "x-amz-meta-n": "${filename}"},
                                  filename=filename)
            self.assertEqual(upload.key, expected)
        self.assertEqual(upload.headers["x-amz-meta-n"], "${filename}")

    def test_keys_that_cannot_be(self):
        self.refused("InvalidArgument", self.post, {"key": "${filename}"},
                     b"", "", message="User key must have a length greater "
                                      "than 0.")
        self.assertEqual(len(self.post({"key": "x" * 1024})[0].key), 1024)
        self.refused("KeyTooLongError", self.post, {"key": "x" * 1025})
        self.refused("KeyTooLongError", self.post, {"key": "\u20ac" * 342})

    def test_headers_are_those_of_a_put(self):
        headers = g.form_headers({
            "key": "k", "policy": "p", "x-amz-date": "d", "submit": "s",
            "x-amz-security-token": "t", "x-amz-copy-source": "/b/k",
            "x-amz-decoded-content-length": "5", "bucket": "b",
            "content-type": " text/html ", "content-disposition": "\u20ac",
            "cache-control": "", "content-md5": "m", "expires": "e",
            "x-amz-meta-a": "\u00e9", "x-amz-meta-b": "", "acl": "private",
            "x-amz-storage-class": "STANDARD_IA",
            "x-amz-checksum-algorithm": "CRC32",
            "x-amz-checksum-crc32": "c", "x-amz-grant-read": "g",
            "x-amz-server-side-encryption-customer-key": "k",
            "x-amz-object-lock-mode": "GOVERNANCE",
            "x-amz-website-redirect-location": "/w"})
        self.assertEqual(headers, {
            "content-type": "text/html",
            "content-disposition": "\xe2\x82\xac", "content-md5": "m",
            "expires": "e", "x-amz-meta-a": "\xc3\xa9", "x-amz-meta-b": "",
            "x-amz-acl": "private", "x-amz-storage-class": "STANDARD_IA",
            "x-amz-checksum-algorithm": "CRC32", "x-amz-checksum-crc32": "c",
            "x-amz-grant-read": "g",
            "x-amz-server-side-encryption-customer-key": "k",
            "x-amz-object-lock-mode": "GOVERNANCE",
            "x-amz-website-redirect-location": "/w"})
        self.assertEqual(g.user_metadata(headers), {"a": "\u00e9", "b": ""})
        self.assertEqual(g.kept_headers(headers)["Content-Disposition"],
                         "\xe2\x82\xac")

    def test_no_field_can_break_a_header_line(self):
        for name, value in (("content-type", "a\r\nX: y"),
                            ("content-disposition", "a\0"),
                            ("x-amz-meta-a b", "x"), ("x-amz-meta-a:b", "x"),
                            ("x-amz-meta-\u00e9", "x"),
                            ("x-amz-meta-a\nb", "x")):
            error = self.refused("InvalidArgument", g.form_headers,
                                 {name: value})
            self.assertEqual(error.fields["ArgumentName"], name)
        headers = g.form_headers({"x-amz-meta-a": "b\r\nX: y"})
        self.assertTrue(g.metadata_header(
            g.user_metadata(headers)["a"]).isprintable())

    def test_a_checksum_algorithm_needs_its_checksum(self):
        self.refused("InvalidRequest", g.form_headers,
                     {"x-amz-checksum-algorithm": "SHA256",
                      "x-amz-checksum-crc32": "AAAAAA=="})

    def test_checksums_and_md5_are_claims_of_a_put(self):
        def store(**fields):
            upload = g.open_post(
                FormSource(form(dict(fields, key="k").items(),
                                b"x" * 2000000)),
                TYPE, "b", FORM_PEOPLE, FORM_NOW)
            claims, name = g.body_claims(upload.headers, g.UNSIGNED)
            body = g.Body(upload.reader, None, claims, name)
            return name, sum(map(len, body.blocks()))
        digest = base64.b64encode(hashlib.sha256(
            b"x" * 2000000).digest()).decode()
        self.assertEqual(store(**{"x-amz-checksum-sha256": digest}),
                         ("SHA256", 2000000))
        for fields, code in (
                ({"x-amz-checksum-sha256": "sailorjerry"}, "InvalidRequest"),
                ({"x-amz-checksum-sha256": digest[::-1]}, "InvalidRequest"),
                ({"x-amz-checksum-crc32": "AAAAAA=="}, "BadDigest"),
                ({"Content-MD5": "1B2M2Y8AsgTpgAmY7PhCfg=="}, "BadDigest"),
                ({"Content-MD5": "x"}, "InvalidDigest")):
            self.refused(code, lambda: store(**fields))

    def test_tags(self):
        """LocalStack's test_post_object_with_tags, recorded on AWS."""
        one = "<Tag><Key>%s</Key><Value>%s</Value></Tag>"
        text = "<Tagging><TagSet>%s%s</TagSet></Tagging>" % (
            one % ("0", "0"), one % ("a &amp; b", "\u20ac="))
        header = self.post({"key": "k", "tagging": text})[0].headers[
            "x-amz-tagging"]
        self.assertEqual(urllib.parse.parse_qsl(header),
                         [("0", "0"), ("a & b", "\u20ac=")])
        self.assertTrue(header.isascii())
        self.assertEqual(g.form_tags("<InvalidXmlTagging/>"), "")
        self.refused("MalformedXML", g.form_tags, "not-xml")
        self.refused("MalformedXML", g.form_tags,
                     '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>')

    def test_statuses(self):
        for text, status in (("200", 200), ("201", 201), ("204", 204),
                             ("404", 204), ("", 204), ("201 ", 204)):
            self.assertEqual(self.post({"key": "k", "success_action_status":
                                        text})[0].status, status)

    def test_redirects(self):
        for fields, url in (
                ({"success_action_redirect": "http://a/b"}, "http://a/b"),
                ({"redirect": "https://a"}, "https://a"),
                ({"redirect": "http://a", "success_action_redirect":
                  "http://b"}, "http://b"),
                ({"redirect": "http://a", "success_action_redirect":
                  "/wrong/redirect/relative"}, "http://a"),
                ({"success_action_redirect": "/relative"}, None),
                ({"success_action_redirect": "//a/b"}, None),
                ({"success_action_redirect": "http:///b"}, None),
                ({"success_action_redirect": "http://[a"}, None),
                ({"success_action_redirect": "javascript:alert(1)"}, None),
                ({"success_action_redirect": "http://a/\r\nX: y"}, None),
                ({"success_action_redirect": ""}, None)):
            self.assertEqual(g.form_redirect(fields), url)
        query = "bucket=b&key=a%2Fb+c%E2%82%AC&etag=%22e%22"
        for url, expected in (
                ("http://a/b", "http://a/b?" + query),
                ("http://a/?c=d e", "http://a/?c=d e&" + query),
                ("http://a/#f", "http://a/?" + query + "#f")):
            self.assertEqual(g.redirect_url(url, "b", "a/b c\u20ac", '"e"'),
                             expected)

    def test_answers(self):
        location = "http://h/b/pr%C3%A9.jpg"
        for fields, status, headers, body in (
                ({}, 204, {"Location": location}, b""),
                ({"success_action_status": "200"}, 200,
                 {"Location": location}, b""),
                ({"success_action_status": "201"}, 201,
                 {"Location": location, "Content-Type": "application/xml"},
                 '<?xml version="1.0" encoding="UTF-8"?>\n<PostResponse>'
                 "<Location>http://h/b/pr%C3%A9.jpg</Location><Bucket>b"
                 "</Bucket><Key>pr\u00e9.jpg</Key><ETag>&quot;e&quot;</ETag>"
                 "</PostResponse>".encode()),
                ({"success_action_status": "201", "redirect":
                  "http://a/\u20ac"}, 303,
                 {"Location": "http://a/\xe2\x82\xac?bucket=b&key=pr%C3%A9"
                              ".jpg&etag=%22e%22"}, b"")):
            upload, _ = self.post(dict(fields, key="pr\u00e9.jpg"))
            response = g.post_response(upload, "b", "e", location,
                                       {"x-amz-version-id": "v"})
            self.assertEqual(response.status, status)
            self.assertEqual(response.headers, dict(
                headers, **{"ETag": '"e"', "x-amz-version-id": "v"}))
            self.assertEqual(response.body, body)


class PostFormRequests(OperationCase):
    """A browser's form, over HTTP."""

    def post(self, fields, file=b"hello", **more):
        data = form(dict(fields).items(), file, **more)
        return self.s3.send("POST", "/box", data, {
            "content-type": TYPE, "content-length": str(len(data))})

    def signed(self, *conditions, **fields):
        """Fields with a V4 signature by the server's account."""
        policy = base64.b64encode(json.dumps({
            "expiration": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(
                time.time() + 60)),
            "conditions": [{"bucket": "box"}, ["starts-with", "$key", ""],
                           ["starts-with", "$x-amz-", ""]]
            + list(conditions)}).encode()).decode()
        date = amz_date()
        scope = date[:8] + "/us-east-1/s3/aws4_request"
        policy_fields = {
            "x-amz-algorithm": "AWS4-HMAC-SHA256", "x-amz-date": date,
            "x-amz-credential": self.server.key_id + "/" + scope}
        policy = json.loads(base64.b64decode(policy))
        policy["conditions"] += [{n: v} for n, v in policy_fields.items()]
        policy["conditions"].remove(["starts-with", "$x-amz-", ""])
        policy = base64.b64encode(json.dumps(policy).encode()).decode()
        signature = hmac.new(v4_key(self.server.key_val, date[:8]),
                             policy.encode(), hashlib.sha256).hexdigest()
        return dict(fields, policy=policy, **dict(policy_fields, **{
            "x-amz-signature": signature}))

    def test_a_signed_form_makes_an_object(self):
        answer = self.post(self.signed(key="up/${filename}"),
                           filename="a.txt")
        self.ok(answer, 204)
        self.assertEqual(answer.etag, hashlib.md5(b"hello").hexdigest())
        with open(self.path("up", "a.txt"), "rb") as file:
            self.assertEqual(file.read(), b"hello")

    def test_status_and_redirect_are_as_the_form_asks(self):
        answer = self.post(self.signed(
            ["eq", "$success_action_status", "201"], key="k",
            success_action_status="201"))
        self.assertEqual((self.ok(answer, 201).one("Key"),
                          answer.one("Bucket")), ("k", "box"))
        answer = self.post(self.signed(
            ["starts-with", "$success_action_redirect", "http://"],
            key="k", success_action_redirect="http://localhost/done"))
        self.ok(answer, 303)
        self.assertTrue(answer.headers["location"].startswith(
            "http://localhost/done?bucket=box&key=k&etag=%22"))

    def test_the_policy_bounds_the_file_and_the_key(self):
        limits = ["content-length-range", 1, 4]
        self.error(self.post(self.signed(limits, key="k")),
                   "EntityTooLarge")
        self.error(self.post(self.signed(limits, key="k"), b""),
                   "EntityTooSmall")
        self.error(self.post(self.signed(
            ["starts-with", "$key", "user/"], key="k")), "AccessDenied")
        self.assertEqual(self.s3.keys("box"), [])

    def test_without_a_good_signature_nothing_is_stored(self):
        fields = self.signed(key="k")
        self.error(self.post([("key", "k")]), "AccessDenied")
        self.error(self.post(dict(fields, **{
            "x-amz-signature": "0" * 64})), "SignatureDoesNotMatch")
        self.assertEqual(self.s3.keys("box"), [])

    def test_a_large_file_streams_through(self):
        data = os.urandom(MIB) * 8
        self.ok(self.post(self.signed(key="large"), data), 204)
        self.assertEqual(self.s3.get("/box/large").body, data)


# --- documents that are kept ---

class KeptDocumentRequests(OperationCase):
    """Validated, given back, without effect; requestPayment has one."""

    DOCUMENTS = {
        "accelerate": "<AccelerateConfiguration><Status>Enabled</Status>"
                      "</AccelerateConfiguration>",
        "abac": "<AbacStatus><Status>Enabled</Status></AbacStatus>",
        "analytics": "<AnalyticsConfiguration><Id>one</Id>"
                     "<StorageClassAnalysis></StorageClassAnalysis>"
                     "</AnalyticsConfiguration>",
        "metrics": "<MetricsConfiguration><Id>one</Id><Filter><Prefix>a"
                   "</Prefix></Filter></MetricsConfiguration>",
        "inventory": "<InventoryConfiguration><Destination>"
                     "<S3BucketDestination><Bucket>arn:aws:s3:::b</Bucket>"
                     "<Format>CSV</Format></S3BucketDestination>"
                     "</Destination><IsEnabled>true</IsEnabled><Id>one</Id>"
                     "<IncludedObjectVersions>All</IncludedObjectVersions>"
                     "<Schedule><Frequency>Daily</Frequency></Schedule>"
                     "</InventoryConfiguration>",
        "intelligent-tiering": "<IntelligentTieringConfiguration><Id>one"
                               "</Id><Status>Enabled</Status><Tiering>"
                               "<Days>90</Days><AccessTier>ARCHIVE_ACCESS"
                               "</AccessTier></Tiering>"
                               "</IntelligentTieringConfiguration>",
        "replication": "<ReplicationConfiguration><Role>r</Role><Rule>"
                       "<ID>a</ID><Prefix></Prefix><Status>Enabled</Status>"
                       "<Destination><Bucket>arn:aws:s3:::b</Bucket>"
                       "</Destination></Rule></ReplicationConfiguration>",
    }
    MANY = ("analytics", "metrics", "inventory", "intelligent-tiering")

    def setUp(self):
        super().setUp()
        shutil.rmtree(self.path(gos3rve.STATE), ignore_errors=True)

    @staticmethod
    def plain(data):
        """A document without its declaration and namespace."""
        return re.sub(rb"<\?.*?\?>\s*| xmlns=\"[^\"]*\"", b"", data)

    def test_each_comes_back_as_it_was(self):
        self.s3.put("/box", b"<VersioningConfiguration><Status>Enabled"
                    b"</Status></VersioningConfiguration>",
                    {"versioning": ""})
        for name, document in self.DOCUMENTS.items():
            with self.subTest(name=name):
                query = {name: ""}
                if name in self.MANY:
                    query["id"] = "one"
                    self.error(self.s3.get("/box", query),
                               "NoSuchConfiguration")
                self.ok(self.s3.put("/box", document.encode(), query))
                answer = self.ok(self.s3.get("/box", query))
                self.assertEqual(self.plain(answer.body).decode(), document)

    def test_lists_hold_what_has_an_id_and_lose_what_is_deleted(self):
        for name in self.MANY:
            with self.subTest(name=name):
                for number in ("one", "two"):
                    document = self.DOCUMENTS[name].replace(
                        "<Id>one<", "<Id>%s<" % number)
                    self.ok(self.s3.put("/box", document.encode(), {
                        name: "", "id": number}))
                answer = self.ok(self.s3.get("/box", {name: ""}))
                self.assertEqual(answer.all("*/Id"), ["one", "two"])
                self.assertEqual(answer.one("IsTruncated"), "false")
                self.ok(self.s3.delete("/box", {
                    name: "", "id": "one"}), 204)
                self.error(self.s3.delete("/box", {
                    name: "", "id": "one"}), "NoSuchConfiguration")
                answer = self.ok(self.s3.get("/box", {name: ""}))
                self.assertEqual(answer.all("*/Id"), ["two"])

    def test_what_does_not_validate_is_refused(self):
        for name, document in self.DOCUMENTS.items():
            query = {name: ""}
            if name in self.MANY:
                query["id"] = "one"
            for bad in (b"", b"<a/>", document.encode()[:-9],
                        document.replace("</", "<x/></", 1).encode()):
                with self.subTest(name=name, bad=bad):
                    self.error(self.s3.put("/box", bad, query),
                               "MalformedXML")
        self.error(self.s3.put("/box", self.DOCUMENTS[
            "replication"].encode(), {"replication": ""}), "InvalidRequest")
        self.error(self.s3.get("/box", {"replication": ""}),
                   "ReplicationConfigurationNotFoundError")

    def test_others_must_say_that_they_pay(self):
        policy = json.dumps({"Version": "2012-10-17", "Statement": [{
            "Effect": "Allow", "Principal": "*", "Action": "s3:GetObject",
            "Resource": "arn:aws:s3:::box/*"}]}).encode()
        server = gos3rve.Running(gos3rve.make_config({
            "p": 0, "bind": "127.0.0.1", "log": "none",
            "bucket": (("box", None),),
            "dir_buckets": os.path.join(temporary_directory(self), "b"),
            "dir_uploads": os.path.join(temporary_directory(self), "u"),
            "key_id": ALICE.key_id, "key_val": ALICE.secret}, (BOB,)))
        self.addCleanup(server.close, 5)
        alice, bob = (Client(server.url, one.key_id, one.secret)
                      for one in (ALICE, BOB))
        self.addCleanup(alice.close)
        self.addCleanup(bob.close)
        alice.put("/box/k", b"1")
        self.ok(alice.put("/box", policy, {"policy": ""}), 204)
        self.assertEqual(alice.get("/box", {"requestPayment": ""}).one(
            "Payer"), "BucketOwner")
        self.ok(bob.get("/box/k"))
        self.ok(alice.put("/box", b"<RequestPaymentConfiguration><Payer>"
                          b"Requester</Payer></RequestPaymentConfiguration>",
                          {"requestPayment": ""}))
        self.error(bob.get("/box/k"), "AccessDenied")
        self.ok(bob.get("/box/k", headers={
            "x-amz-request-payer": "requester"}))
        self.error(bob.send("GET", "/box/k"), "AccessDenied")
        self.ok(alice.get("/box/k"))


# --- tags and cross-origin requests ---

class TagRequests(OperationCase):

    def setUp(self):
        super().setUp()
        shutil.rmtree(self.path(gos3rve.STATE), ignore_errors=True)

    def tagging(self, **tags):
        return ("<Tagging><TagSet>%s</TagSet></Tagging>" % "".join(
            "<Tag><Key>%s</Key><Value>%s</Value></Tag>" % pair
            for pair in tags.items())).encode()

    def tags(self, path):
        answer = self.ok(self.s3.get(path, {"tagging": ""}))
        return dict(zip(answer.all("TagSet/Tag/Key"),
                        answer.all("TagSet/Tag/Value")))

    def test_tags_of_an_object_come_and_go_and_change_nothing_else(self):
        self.ok(self.s3.put("/box/k", b"1", headers={
            "x-amz-meta-a": "b", "x-amz-tagging": "one=1&two"}))
        self.assertEqual(self.tags("/box/k"), {"one": "1", "two": ""})
        self.assertEqual(self.s3.head("/box/k").headers[
            "x-amz-tagging-count"], "2")
        before = self.s3.head("/box/k")
        self.ok(self.s3.put("/box/k", self.tagging(x="y"),
                            {"tagging": ""}))
        self.assertEqual(self.tags("/box/k"), {"x": "y"})
        after = self.s3.head("/box/k")
        self.assertEqual(
            (before.etag, before.headers["last-modified"],
             before.headers["x-amz-meta-a"]),
            (after.etag, after.headers["last-modified"],
             after.headers["x-amz-meta-a"]))
        self.ok(self.s3.delete("/box/k", {"tagging": ""}), 204)
        self.assertEqual(self.tags("/box/k"), {})
        self.assertNotIn("x-amz-tagging-count",
                         self.s3.head("/box/k").headers)

    def test_tags_follow_a_copy_as_its_directive_says(self):
        self.s3.put("/box/k", b"1", headers={"x-amz-tagging": "a=1"})
        for more, tags in (
                ({}, {"a": "1"}),
                ({"x-amz-tagging-directive": "REPLACE",
                  "x-amz-tagging": "b=2"}, {"b": "2"}),
                ({"x-amz-tagging-directive": "REPLACE"}, {})):
            self.ok(self.s3.put("/box/copy", headers=dict(
                more, **{"x-amz-copy-source": "/box/k"})))
            self.assertEqual(self.tags("/box/copy"), tags)

    def test_tags_of_an_upload_are_its_object_s(self):
        upload = self.s3.post("/box/k", {"uploads": ""}, headers={
            "x-amz-tagging": "a=1"}).one("UploadId")
        etag = self.s3.put("/box/k", b"1", {
            "partNumber": "1", "uploadId": upload}).etag
        self.ok(self.s3.post("/box/k", {"uploadId": upload}, (
            "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber>"
            "<ETag>%s</ETag></Part></CompleteMultipartUpload>"
            % etag).encode()))
        self.assertEqual(self.tags("/box/k"), {"a": "1"})

    def test_bad_tags_are_refused_and_change_nothing(self):
        self.s3.put("/box/k", b"1", headers={"x-amz-tagging": "a=1"})
        many = {"k%d" % n: "" for n in range(11)}
        for body, code in ((self.tagging(**many), "BadRequest"),
                           (self.tagging(**{"aws:x": ""}), "InvalidTag"),
                           (self.tagging(**{"x" * 129: ""}), "InvalidTag"),
                           (self.tagging(x="y" * 257), "InvalidTag"),
                           (b"<Tagging/>", "MalformedXML"),
                           (b"", "MalformedXML")):
            self.error(self.s3.put("/box/k", body, {"tagging": ""}), code)
        self.error(self.s3.put("/box/l", b"1", headers={
            "x-amz-tagging": "a=1&a=2"}), "InvalidArgument")
        self.assertEqual(self.tags("/box/k"), {"a": "1"})
        self.assertEqual(self.s3.keys("box"), ["k"])

    def test_tags_belong_to_a_version(self):
        self.s3.put("/box", b"<VersioningConfiguration><Status>Enabled"
                    b"</Status></VersioningConfiguration>",
                    {"versioning": ""})
        one = self.s3.put("/box/k", b"1", headers={
            "x-amz-tagging": "a=1"}).headers["x-amz-version-id"]
        self.s3.put("/box/k", b"2")
        self.assertEqual(self.tags("/box/k"), {})
        answer = self.ok(self.s3.put("/box/k", self.tagging(b="2"), {
            "tagging": "", "versionId": one}))
        self.assertEqual(answer.headers["x-amz-version-id"], one)
        answer = self.s3.get("/box/k", {"tagging": "", "versionId": one})
        self.assertEqual(answer.all("TagSet/Tag/Key"), ["b"])
        self.assertEqual(self.tags("/box/k"), {})

    def test_tags_of_a_bucket(self):
        self.error(self.s3.get("/box", {"tagging": ""}), "NoSuchTagSet")
        self.ok(self.s3.put("/box", self.tagging(a="1"),
                            {"tagging": ""}), 204)
        self.assertEqual(self.tags("/box"), {"a": "1"})
        self.ok(self.s3.delete("/box", {"tagging": ""}), 204)
        self.error(self.s3.get("/box", {"tagging": ""}), "NoSuchTagSet")


class CorsRequests(OperationCase):

    DOCUMENT = (b"<CORSConfiguration><CORSRule>"
                b"<AllowedOrigin>https://*.example.com</AllowedOrigin>"
                b"<AllowedMethod>PUT</AllowedMethod>"
                b"<AllowedMethod>GET</AllowedMethod>"
                b"<AllowedHeader>*</AllowedHeader>"
                b"<ExposeHeader>ETag</ExposeHeader>"
                b"<MaxAgeSeconds>60</MaxAgeSeconds>"
                b"</CORSRule></CORSConfiguration>")
    ORIGIN = "https://app.example.com"

    def setUp(self):
        super().setUp()
        shutil.rmtree(self.path(gos3rve.STATE), ignore_errors=True)

    def preflight(self, origin=ORIGIN, method="PUT", path="/box/k"):
        return self.s3.send("OPTIONS", path, headers={
            "origin": origin, "access-control-request-method": method,
            "access-control-request-headers": "X-Amz-Date, content-type"})

    def test_the_document_comes_back_and_goes(self):
        self.error(self.s3.get("/box", {"cors": ""}),
                   "NoSuchCORSConfiguration")
        self.ok(self.s3.put("/box", self.DOCUMENT, {"cors": ""}))
        answer = self.ok(self.s3.get("/box", {"cors": ""}))
        self.assertEqual(answer.all("CORSRule/AllowedMethod"),
                         ["PUT", "GET"])
        self.ok(self.s3.delete("/box", {"cors": ""}), 204)
        self.error(self.s3.get("/box", {"cors": ""}),
                   "NoSuchCORSConfiguration")

    def test_a_preflight_needs_no_signature(self):
        self.assertEqual(self.preflight().code, "AccessForbidden")
        self.ok(self.s3.put("/box", self.DOCUMENT, {"cors": ""}))
        headers = self.ok(self.preflight()).headers
        self.assertEqual(headers["access-control-allow-origin"],
                         self.ORIGIN)
        self.assertEqual(headers["access-control-max-age"], "60")
        self.assertEqual(headers["access-control-allow-headers"],
                         "x-amz-date, content-type")
        self.assertIn("Origin", headers["vary"])
        for answer in (self.preflight(method="DELETE"),
                       self.preflight("https://evil.example.org"),
                       self.preflight(path="/no-such-bucket/k")):
            self.error(answer, "AccessForbidden")
        self.error(self.s3.send("OPTIONS", "/box/k"), "BadRequest")

    def test_answers_and_errors_carry_the_headers(self):
        self.ok(self.s3.put("/box", self.DOCUMENT, {"cors": ""}))
        self.s3.put("/box/k", b"1")
        for path, status in (("/box/k", 200), ("/box/none", 404)):
            answer = self.s3.get(path, headers={"origin": self.ORIGIN})
            self.assertEqual(answer.status, status)
            self.assertEqual(answer.headers["access-control-allow-origin"],
                             self.ORIGIN)
            self.assertEqual(
                answer.headers["access-control-expose-headers"], "ETag")
        answer = self.s3.get("/box/k", headers={"origin": "https://b.org"})
        self.assertNotIn("access-control-allow-origin", answer.headers)

    def test_a_default_serves_buckets_without_a_document(self):
        with gos3rve.serve(buckets=["box"], cors=["*"]) as server:
            client = Client(server.url, server.key_id, server.key_val)
            self.addCleanup(client.close)
            answer = client.get("/box/none", headers={
                "origin": "https://anywhere.example"})
            self.assertEqual(
                answer.headers["access-control-allow-origin"], "*")
            client.put("/box", self.DOCUMENT, {"cors": ""})
            answer = client.get("/box/none", headers={
                "origin": "https://anywhere.example"})
            self.assertNotIn("access-control-allow-origin", answer.headers)


# --- access control ---

class AclCase(unittest.TestCase):
    """Two accounts and the unsigned, on a server with ACLs."""

    ownership = "ObjectWriter"

    def setUp(self):
        directory = temporary_directory(self)
        self.server = gos3rve.Running(gos3rve.make_config({
            "p": 0, "bind": "127.0.0.1", "log": "none",
            "dir_buckets": os.path.join(directory, "buckets"),
            "dir_uploads": os.path.join(directory, "uploads"),
            "key_id": ALICE.key_id, "key_val": ALICE.secret,
            "user_id": ALICE.user_id, "user_name": ALICE.user_name,
            "user_email": ALICE.email,
            "object_ownership": self.ownership}, (BOB,)))
        self.addCleanup(self.server.close, 5)
        self.alice, self.bob = (
            Client(self.server.url, account.key_id, account.secret)
            for account in (ALICE, BOB))
        self.addCleanup(self.alice.close)
        self.addCleanup(self.bob.close)
        self.alice.put("/box")

    def anonymous(self, method, target, body=b""):
        return self.bob.send(method, target, body, {
            "content-length": str(len(body))} if body else {})


class AclRequests(AclCase):

    def test_canned_acls_open_a_bucket_to_everybody(self):
        self.alice.put("/box/k", b"1", headers={"x-amz-acl": "public-read"})
        self.assertEqual(self.anonymous("GET", "/box/k").body, b"1")
        self.assertEqual(self.anonymous("GET", "/box").status, 403)
        self.assertEqual(self.anonymous("PUT", "/box/l", b"2").status, 403)
        self.assertEqual(self.alice.put("/box", query={"acl": ""}, headers={
            "x-amz-acl": "public-read-write"}).status, 200)
        self.assertEqual(self.anonymous("GET", "/box").status, 200)
        self.assertEqual(self.anonymous("PUT", "/box/l", b"2").status, 200)
        self.assertEqual(self.alice.put("/box", query={"acl": ""}, headers={
            "x-amz-acl": "private"}).status, 200)
        self.assertEqual(self.anonymous("GET", "/box").status, 403)
        self.assertEqual(self.anonymous("GET", "/box/k").status, 200)

    def test_a_missing_key_is_hidden_from_who_may_not_list(self):
        self.assertEqual(self.alice.get("/box/none").code, "NoSuchKey")
        self.assertEqual(self.bob.get("/box/none").code, "AccessDenied")
        self.alice.put("/box", query={"acl": ""}, headers={
            "x-amz-grant-read": 'id="%s"' % BOB.user_id})
        self.assertEqual(self.bob.get("/box/none").code, "NoSuchKey")
        self.assertEqual(self.bob.get("/box", {"list-type": "2"}).status,
                         200)

    def test_grants_by_mail_come_back_by_id(self):
        self.alice.put("/box/k", b"1")
        answer = self.alice.put("/box/k", query={"acl": ""}, headers={
            "x-amz-grant-full-control": 'id="%s"' % ALICE.user_id,
            "x-amz-grant-read": 'emailAddress="%s"' % BOB.email})
        self.assertEqual(answer.status, 200, answer.body)
        answer = self.alice.get("/box/k", {"acl": ""})
        self.assertEqual(sorted(zip(
            answer.all("AccessControlList/Grant/Grantee/ID"),
            answer.all("AccessControlList/Grant/Permission"))), [
                (ALICE.user_id, "FULL_CONTROL"), (BOB.user_id, "READ")])
        self.assertEqual(self.bob.get("/box/k").body, b"1")
        self.assertEqual(self.bob.get("/box/k", {"acl": ""}).status, 403)
        # an ACL is no content: the object is what it was
        self.assertEqual(self.alice.head("/box/k").etag,
                         hashlib.md5(b"1").hexdigest())

    def test_an_object_belongs_to_who_wrote_it(self):
        self.alice.put("/box", query={"acl": ""}, headers={
            "x-amz-acl": "public-read-write"})
        self.assertEqual(self.bob.put("/box/k", b"1").status, 200)
        self.assertEqual(self.alice.get("/box/k").status, 403)
        self.assertEqual(self.alice.get("/box", {"acl": ""}).one(
            "Owner/ID"), ALICE.user_id)
        self.assertEqual(self.bob.get("/box/k", {"acl": ""}).one(
            "Owner/ID"), BOB.user_id)
        self.assertEqual(self.alice.delete("/box/k").status, 204)

    def test_a_policy_allows_and_denies(self):
        self.alice.put("/box/open/k", b"1")
        self.alice.put("/box/shut/k", b"2")
        policy = json.dumps({"Version": "2012-10-17", "Statement": [
            {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject",
             "Resource": "arn:aws:s3:::box/*"},
            {"Effect": "Deny", "Principal": "*", "Action": "s3:*",
             "Resource": "arn:aws:s3:::box/shut/*"}]}).encode()
        self.assertEqual(self.alice.put("/box", policy, {
            "policy": ""}).status, 204)
        self.assertEqual(self.alice.get("/box", {"policy": ""}).body,
                         policy)
        self.assertEqual(self.alice.get("/box", {"policyStatus": ""}).one(
            "IsPublic"), "true")
        self.assertEqual(self.anonymous("GET", "/box/open/k").body, b"1")
        for who in (self.alice, self.bob):
            self.assertEqual(who.get("/box/shut/k").status, 403)
        self.assertEqual(self.alice.delete("/box", {
            "policy": ""}).status, 204)
        self.assertEqual(self.anonymous("GET", "/box/open/k").status, 403)
        self.assertEqual(self.alice.get("/box/shut/k").body, b"2")

    def test_a_policy_that_is_not_understood_is_refused(self):
        for text in ("", "{", "[]", "{}", json.dumps({
                "Version": "2012-10-17", "Statement": [{
                    "Effect": "Allow", "Principal": "*",
                    "Action": "s3:GetObject",
                    "Resource": "arn:aws:s3:::other/*"}]}), json.dumps({
                        "Version": "2012-10-17", "Statement": [{
                            "Effect": "Allow", "Principal": "*",
                            "Action": "s3:GetObject",
                            "Resource": "arn:aws:s3:::box/*",
                            "Condition": {"StringEquals": {
                                "s3:unheard-of": "1"}}}]})):
            with self.subTest(text=text):
                self.assertEqual(self.alice.put("/box", text.encode(), {
                    "policy": ""}).code, "MalformedPolicy")
        self.assertEqual(self.alice.get("/box", {"policy": ""}).code,
                         "NoSuchBucketPolicy")

    def test_the_public_access_block_holds(self):
        block = ("<PublicAccessBlockConfiguration>"
                 "<BlockPublicAcls>true</BlockPublicAcls>"
                 "<IgnorePublicAcls>true</IgnorePublicAcls>"
                 "</PublicAccessBlockConfiguration>").encode()
        self.alice.put("/box/k", b"1", headers={"x-amz-acl": "public-read"})
        self.assertEqual(self.alice.put("/box", block, {
            "publicAccessBlock": ""}).status, 200)
        self.assertEqual(self.anonymous("GET", "/box/k").status, 403)
        self.assertEqual(self.alice.put("/box/l", b"1", headers={
            "x-amz-acl": "public-read"}).status, 403)
        answer = self.alice.get("/box", {"publicAccessBlock": ""})
        self.assertEqual([e.text for e in answer.xml()],
                         ["true", "true", "false", "false"])
        self.assertEqual(self.alice.delete("/box", {
            "publicAccessBlock": ""}).status, 204)
        self.assertEqual(self.anonymous("GET", "/box/k").status, 200)

    def test_many_deletes_are_judged_one_by_one(self):
        self.alice.put("/box/k", b"1")
        body = b"<Delete><Object><Key>k</Key></Object></Delete>"
        answer = self.bob.post("/box", {"delete": ""}, body, headers={
            "content-md5": digest64("md5", body)})
        self.assertEqual(answer.all("Error/Code"), ["AccessDenied"])
        self.assertEqual(self.alice.get("/box/k").body, b"1")

    def test_a_copy_needs_the_source_too(self):
        self.alice.put("/box/k", b"1")
        self.bob.put("/bobs")
        headers = {"x-amz-copy-source": "/box/k"}
        self.assertEqual(self.bob.put("/bobs/k", headers=headers).status,
                         403)
        self.alice.put("/box/k", query={"acl": ""}, headers={
            "x-amz-acl": "authenticated-read"})
        self.assertEqual(self.bob.put("/bobs/k", headers=headers).status,
                         200)
        self.assertEqual(self.bob.get("/bobs/k").body, b"1")


class EnforcedOwnerRequests(AclRequests):
    """The default: no ACLs."""

    ownership = "BucketOwnerEnforced"
    test_canned_acls_open_a_bucket_to_everybody = None
    test_a_missing_key_is_hidden_from_who_may_not_list = None
    test_grants_by_mail_come_back_by_id = None
    test_an_object_belongs_to_who_wrote_it = None
    test_the_public_access_block_holds = None
    test_a_copy_needs_the_source_too = None

    def test_acls_are_refused(self):
        for path, query in (("/box", {"acl": ""}), ("/box/k", {})):
            for acl in ("public-read", "private"):
                self.assertEqual(self.alice.put(path, b"", query, headers={
                    "x-amz-acl": acl}).code,
                    "AccessControlListNotSupported")
        self.assertEqual(self.alice.put("/box/k", b"", headers={
            "x-amz-acl": "bucket-owner-full-control"}).status, 200)
        self.assertEqual(self.alice.put("/open", headers={
            "x-amz-acl": "public-read"}).code,
            "InvalidBucketAclWithObjectOwnership")

    def test_the_acl_that_is_in_force_may_be_put_back(self):
        """s3cmd does so after a cp."""
        self.alice.put("/box/k", b"1")
        for path in ("/box", "/box/k"):
            document = self.alice.get(path, {"acl": ""}).body
            self.assertEqual(self.alice.put(path, document, {
                "acl": ""}).status, 200)
            self.assertEqual(self.alice.put(path, document.replace(
                b"FULL_CONTROL", b"READ"), {"acl": ""}).code,
                "AccessControlListNotSupported")

    def test_ownership_can_be_changed_bucket_by_bucket(self):
        self.assertEqual(self.alice.get("/box", {
            "ownershipControls": ""}).one("Rule/ObjectOwnership"),
            "BucketOwnerEnforced")
        body = ("<OwnershipControls><Rule><ObjectOwnership>ObjectWriter"
                "</ObjectOwnership></Rule></OwnershipControls>").encode()
        self.assertEqual(self.alice.put("/box", body, {
            "ownershipControls": ""}).status, 200)
        self.assertEqual(self.alice.put("/box", query={"acl": ""}, headers={
            "x-amz-acl": "public-read"}).status, 200)
        self.assertEqual(self.anonymous("GET", "/box").status, 200)
        self.assertEqual(self.alice.delete("/box", {
            "ownershipControls": ""}).status, 204)
        self.assertEqual(self.alice.get("/box", {
            "ownershipControls": ""}).code,
            "OwnershipControlsNotFoundError")


# --- versions ---

class VersionRequests(OperationCase):
    """Versioning enabled and suspended, over HTTP and on the disk."""

    def setUp(self):
        super().setUp()
        shutil.rmtree(self.path(gos3rve.STATE), ignore_errors=True)

    def switch(self, status, code=200):
        body = ("<VersioningConfiguration><Status>%s</Status>"
                "</VersioningConfiguration>" % status).encode()
        return self.ok(self.s3.put("/box", body, {"versioning": ""}), code)

    def put_version(self, key, body):
        return self.ok(self.s3.put("/box/" + key, body)).headers.get(
            "x-amz-version-id", "null")

    def listed(self, **query):
        """(key, version id, is latest, is marker) of every entry."""
        answer = self.ok(self.s3.get("/box", dict(
            {n.replace("_", "-"): v for n, v in query.items()},
            versions="")))
        return [(e.findtext("Key"), e.findtext("VersionId"),
                 e.findtext("IsLatest") == "true", e.tag == "DeleteMarker")
                for e in answer.xml() if e.tag in ("Version",
                                                   "DeleteMarker")]

    def test_status_is_empty_until_it_is_set(self):
        answer = self.ok(self.s3.get("/box", {"versioning": ""}))
        self.assertIsNone(answer.one("Status"))
        for status in ("Enabled", "Suspended", "Enabled"):
            self.switch(status)
            answer = self.ok(self.s3.get("/box", {"versioning": ""}))
            self.assertEqual(answer.one("Status"), status)

    def test_bad_documents_are_refused(self):
        for body, code in (
                (b"", "MalformedXML"), (b"<a/>", "MalformedXML"),
                (b"<VersioningConfiguration/>",
                 "IllegalVersioningConfigurationException"),
                (b"<VersioningConfiguration><Status>On</Status>"
                 b"</VersioningConfiguration>", "MalformedXML"),
                (b"<VersioningConfiguration><Status>Enabled</Status>"
                 b"<MfaDelete>Enabled</MfaDelete>"
                 b"</VersioningConfiguration>", "NotImplemented")):
            with self.subTest(body=body):
                self.error(self.s3.put("/box", body, {"versioning": ""}),
                           code)
        self.assertIsNone(self.s3.get("/box", {"versioning": ""}).one(
            "Status"))

    def test_each_put_is_a_version_and_a_plain_file(self):
        self.s3.put("/box/k", b"before")
        self.switch("Enabled")
        ids = [self.put_version("k", b"%d" % n) for n in range(3)]
        self.assertEqual(len(set(ids)), 3)
        with open(self.path("k"), "rb") as file:
            self.assertEqual(file.read(), b"2")
        for body, version in zip((b"0", b"1", b"2", b"before"),
                                 ids + ["null"]):
            answer = self.ok(self.s3.get("/box/k", {"versionId": version}))
            self.assertEqual((answer.body,
                              answer.headers["x-amz-version-id"]),
                             (body, version))
        self.assertEqual(self.listed(), [
            ("k", version, version == ids[2], False)
            for version in ids[::-1] + ["null"]])
        self.assertEqual(self.s3.keys("box"), ["k"])

    def test_delete_leaves_a_marker_and_removing_it_brings_the_key_back(
            self):
        self.switch("Enabled")
        version = self.put_version("d/k", b"1")
        answer = self.ok(self.s3.delete("/box/d/k"), 204)
        marker = answer.headers["x-amz-version-id"]
        self.assertEqual(answer.headers["x-amz-delete-marker"], "true")
        self.assertFalse(os.path.exists(self.path("d")))
        answer = self.error(self.s3.get("/box/d/k"), "NoSuchKey")
        self.assertEqual(answer.headers["x-amz-delete-marker"], "true")
        self.assertEqual(answer.headers["x-amz-version-id"], marker)
        answer = self.error(self.s3.get("/box/d/k", {
            "versionId": marker}), "MethodNotAllowed")
        self.assertEqual(answer.headers["allow"], "DELETE")
        self.assertEqual(self.s3.keys("box"), [])
        self.assertEqual(self.listed(), [("d/k", marker, True, True),
                                         ("d/k", version, False, False)])
        answer = self.ok(self.s3.delete("/box/d/k", {
            "versionId": marker}), 204)
        self.assertEqual(answer.headers["x-amz-delete-marker"], "true")
        self.assertEqual(self.s3.get("/box/d/k").body, b"1")
        self.assertEqual(self.listed(), [("d/k", version, True, False)])

    def test_deleting_the_latest_version_uncovers_the_one_before(self):
        self.switch("Enabled")
        one, two = (self.put_version("k", b"%d" % n) for n in (1, 2))
        self.ok(self.s3.delete("/box/k", {"versionId": two}), 204)
        self.assertEqual(self.s3.get("/box/k").body, b"1")
        self.ok(self.s3.delete("/box/k", {"versionId": one}), 204)
        self.assertEqual((self.listed(), self.s3.get("/box/k").status),
                         ([], 404))
        self.ok(self.s3.delete("/box"), 204)
        self.ok(self.s3.put("/box"))

    def test_suspended_writes_replace_the_null_version_only(self):
        self.switch("Enabled")
        one = self.put_version("k", b"1")
        self.switch("Suspended")
        for body in (b"2", b"3"):
            self.assertEqual(self.put_version("k", body), "null")
        self.assertEqual(self.listed(), [("k", "null", True, False),
                                         ("k", one, False, False)])
        answer = self.ok(self.s3.delete("/box/k"), 204)
        self.assertEqual(answer.headers["x-amz-version-id"], "null")
        self.assertEqual(self.listed(), [("k", "null", True, True),
                                         ("k", one, False, False)])
        self.assertEqual(self.put_version("k", b"4"), "null")
        self.assertEqual(self.listed(), [("k", "null", True, False),
                                         ("k", one, False, False)])
        self.assertEqual(self.s3.get("/box/k", {"versionId": one}).body,
                         b"1")

    def test_a_bucket_with_versions_only_is_not_empty(self):
        self.switch("Enabled")
        self.put_version("k", b"1")
        self.s3.delete("/box/k")
        self.error(self.s3.delete("/box"), "BucketNotEmpty")

    def test_odd_keys_have_versions_too(self):
        self.switch("Enabled")
        keys = ["a", "a/b", "a/", "x" * 600, "../up", "\u00fc/\U0001f600"]
        ids = {key: [self.put_version(key, b"1"),
                     self.put_version(key, b"2")] for key in keys}
        self.assertEqual(self.listed(), [
            (key, version, version == ids[key][1], False)
            for key in sorted(keys) for version in ids[key][::-1]])
        for key in keys:
            self.ok(self.s3.delete("/box/" + key), 204)
            self.assertEqual(self.s3.get("/box/" + key, {
                "versionId": ids[key][0]}).body, b"1")
        self.assertEqual(self.s3.keys("box"), [])

    def test_listing_pages_join_to_the_whole(self):
        self.switch("Enabled")
        for key in ("a", "b/1", "b/2", "c"):
            for number in range(3):
                self.put_version(key, b"%d" % number)
        self.s3.delete("/box/c")
        whole = self.listed()
        self.assertEqual(len(whole), 13)
        for size in (1, 2, 5):
            found, query = [], {"versions": "", "max-keys": str(size)}
            while True:
                answer = self.ok(self.s3.get("/box", query))
                found += [e.findtext("VersionId") for e in answer.xml()
                          if e.tag in ("Version", "DeleteMarker")]
                if answer.one("IsTruncated") != "true":
                    break
                query["key-marker"] = answer.one("NextKeyMarker")
                query["version-id-marker"] = answer.one(
                    "NextVersionIdMarker")
            self.assertEqual(found, [entry[1] for entry in whole])
        answer = self.s3.get("/box", {"versions": "", "delimiter": "/"})
        self.assertEqual(answer.all("CommonPrefixes/Prefix"), ["b/"])
        self.assertEqual(len(answer.all("Version")), 6)

    def test_copies_name_the_version_they_read(self):
        self.switch("Enabled")
        one = self.put_version("k", b"1")
        self.put_version("k", b"2")
        answer = self.ok(self.s3.put("/box/k", headers={
            "x-amz-copy-source": "/box/k?versionId=" + one}))
        self.assertEqual(answer.headers["x-amz-copy-source-version-id"],
                         one)
        self.assertEqual(self.s3.get("/box/k").body, b"1")
        self.assertEqual(len(self.listed()), 3)

    def test_many_deletes_tell_their_markers_and_versions(self):
        self.switch("Enabled")
        one = self.put_version("k", b"1")
        body = ("<Delete><Object><Key>k</Key></Object><Object><Key>k</Key>"
                "<VersionId>%s</VersionId></Object></Delete>" % one).encode()
        answer = self.ok(self.s3.post("/box", {"delete": ""}, body, headers={
            "content-md5": digest64("md5", body)}))
        self.assertEqual(answer.all("Deleted/DeleteMarker"), ["true"])
        marker = answer.one("Deleted/DeleteMarkerVersionId")
        self.assertEqual(answer.all("Deleted/VersionId"), [one])
        self.assertEqual(self.listed(), [("k", marker, True, True)])

    def test_a_rename_is_refused(self):
        self.switch("Enabled")
        self.put_version("k", b"1")
        self.error(self.s3.put("/box/l", query={"renameObject": ""},
                               headers={"x-amz-rename-source": "k"}),
                   "InvalidRequest")
        self.assertEqual(self.s3.keys("box"), ["k"])

    def test_sixteen_writers_lose_no_version(self):
        self.switch("Enabled")
        clients = [Client(self.server.url, self.server.key_id,
                          self.server.key_val) for _ in range(16)]

        def write(number):
            return {clients[number].put("/box/k", b"%d.%d" % (
                number, turn)).headers["x-amz-version-id"]:
                b"%d.%d" % (number, turn) for turn in range(5)}
        written = {}
        for one in together(16, write):
            written.update(one)
        self.assertEqual(len(written), 80)
        for version, body in written.items():
            self.assertEqual(self.s3.get("/box/k", {
                "versionId": version}).body, body)
        listed = self.listed()
        self.assertEqual({entry[1] for entry in listed}, set(written))
        self.assertEqual([entry[2] for entry in listed],
                         [True] + [False] * 79)
        for client in clients:
            client.close()


class VersionRequestsWithSidecars(VersionRequests):
    """The same where the file system has no extended attributes."""

    @classmethod
    def setUpClass(cls):
        with mock.patch.object(gos3rve, "_HAVE_XATTR", False):
            super().setUpClass()


# --- object lock ---

SOON, THEN, FAR = map(g.parse_iso_date, (
    "2029-01-01", "2030-01-01", "2030-01-03"))
GOVERNED = {"mode": "GOVERNANCE", "until": THEN}
COMPLIANT = {"mode": "COMPLIANCE", "until": THEN}
LOCK_DEFAULT = ("<ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule>"
           "<DefaultRetention>%s</DefaultRetention></Rule>")


class ObjectLockDocuments(DocumentCase):

    def parse(self, inner):
        return g.parse_object_lock(document_element(
            "ObjectLockConfiguration", inner))

    def test_the_default_comes_back(self):
        for inner, default in (
                ("<ObjectLockEnabled>Enabled</ObjectLockEnabled>", {}),
                (LOCK_DEFAULT % "<Mode>GOVERNANCE</Mode><Days>1</Days>",
                 {"Mode": "GOVERNANCE", "Days": 1}),
                (LOCK_DEFAULT % "<Mode>COMPLIANCE</Mode><Years>100</Years>",
                 {"Mode": "COMPLIANCE", "Years": 100})):
            self.assertEqual(self.kept(self.parse(inner)), default)
            self.assertEqual(plain_xml("X", g.object_lock_children(default)),
                             "<X>%s</X>" % inner)

    def test_defaults_that_are_refused(self):
        mode = LOCK_DEFAULT % "<Mode>GOVERNANCE</Mode>%s"
        for inner, code, message in (
                ("", "MalformedXML", ""),
                ("<ObjectLockEnabled>Disabled</ObjectLockEnabled>",
                 "MalformedXML", ""),
                ("<ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule/>",
                 "MalformedXML", ""),
                (LOCK_DEFAULT % "", "MalformedXML", ""),
                (LOCK_DEFAULT % "<Days>1</Days>", "MalformedXML", ""),
                (LOCK_DEFAULT % "<Mode>governance</Mode><Days>1</Days>",
                 "MalformedXML", ""),
                (mode % "", "MalformedXML", ""),
                (mode % "<Days>1</Days><Years>1</Years>", "MalformedXML",
                 ""),
                (mode % "<Days>0</Days>", "InvalidArgument",
                 "Default retention period must be a positive integer"),
                (mode % "<Years>-1</Years>", "InvalidArgument",
                 "Default retention period must be a positive integer"),
                (mode % "<Days>36501</Days>", "InvalidArgument",
                 "Default retention period too large."),
                (mode % "<Years>101</Years>", "InvalidArgument",
                 "Default retention period too large."),
                (mode % "<DefaultEventHold/>", "NotImplemented", "")):
            with self.subTest(inner):
                self.refused(code, message, self.parse, inner)

    def test_retention(self):
        def parse(inner):
            return g.parse_retention(document_element("Retention", inner),
                                     SOON)
        text = ("<Mode>GOVERNANCE</Mode><RetainUntilDate>%s"
                "</RetainUntilDate>")
        self.assertEqual(self.kept(parse(text % "2030-01-01T00:00:00Z")),
                         GOVERNED)
        self.assertEqual(parse(text % "2140-01-01T00:00:00Z")["until"],
                         g.parse_iso_date("2140-01-01"))
        self.assertEqual(parse(""), {})
        self.assertEqual(
            plain_xml("X", g.retention_children(GOVERNED)),
            "<X>%s</X>" % text % "2030-01-01T00:00:00.000Z")
        self.refused("NoSuchObjectLockConfiguration", "The specified object",
                     g.retention_children, {"hold": "ON"})
        for inner, code in (
                ("<Mode>GOVERNANCE</Mode>", "MalformedXML"),
                ("<RetainUntilDate>2030-01-01</RetainUntilDate>",
                 "MalformedXML"),
                (text % "soon", "MalformedXML"),
                ((text % "2030-01-01").replace("GOV", "gov"),
                 "MalformedXML"),
                (text % "2029-01-01", "InvalidArgument"),
                (text % "2030-01-01" + "<EventHold>ON</EventHold>",
                 "NotImplemented")):
            with self.subTest(inner):
                self.refused(code, "", parse, inner)

    def test_legal_hold(self):
        for status in ("ON", "OFF"):
            document = document_element("LegalHold",
                                        "<Status>%s</Status>" % status)
            self.assertEqual(g.parse_legal_hold(document), status)
            self.assertEqual(g.legal_hold_children({"hold": status}),
                             [("Status", status)])
        for inner in ("", "<Status>abc</Status>", "<Status>on</Status>"):
            self.refused("MalformedXML", "", g.parse_legal_hold,
                         document_element("LegalHold", inner))
        self.refused("NoSuchObjectLockConfiguration", "",
                     g.legal_hold_children, GOVERNED)

    HEADERS = {"x-amz-object-lock-mode": "GOVERNANCE",
               "x-amz-object-lock-retain-until-date": "2030-01-01T00:00:00Z",
               "x-amz-object-lock-legal-hold": "ON"}

    def test_headers_go_in_and_out(self):
        lock = self.kept(g.parse_lock_headers(self.HEADERS, SOON))
        self.assertEqual(lock, dict(GOVERNED, hold="ON"))
        self.assertEqual(g.lock_headers(lock), dict(self.HEADERS, **{
            "x-amz-object-lock-retain-until-date":
            "2030-01-01T00:00:00.000Z"}))
        self.assertEqual(g.parse_lock_headers({"etag": "x"}, SOON), {})
        self.assertEqual(g.lock_headers({}), {})

    def test_headers_that_are_refused(self):
        mode, date, hold = self.HEADERS
        for changes, message, name in (
                ({mode: None}, "x-amz-object-lock-retain-until-date and",
                 mode),
                ({date: None}, "x-amz-object-lock-retain-until-date and",
                 date),
                ({mode: "abc"}, "Unknown wormMode directive.", mode),
                ({date: "abc"}, "The retain until date must be provided in "
                 "ISO 8601 format", date),
                ({date: "2029-01-01T00:00:00Z"}, "The retain until date "
                 "must be in the future!", date),
                ({hold: "wrong"}, "Legal Hold must be either of", hold)):
            headers = {key: value for key, value in dict(
                self.HEADERS, **changes).items() if value is not None}
            with self.subTest(changes):
                self.refused("InvalidArgument", message,
                             g.parse_lock_headers, headers, SOON,
                             ArgumentName=name)
        self.refused("NotImplemented", "", g.parse_lock_headers,
                     {"x-amz-object-lock-event-hold": "ON"}, SOON)

    def test_the_default_counts_from_now(self):
        days = {"Mode": "GOVERNANCE", "Days": 2}
        years = {"Mode": "COMPLIANCE", "Years": 1}
        for default, now, lock in (
                (None, 5, {}), ({}, 5, {}),
                (days, 5, {"mode": "GOVERNANCE", "until": 172805}),
                (days, 5.25, {"mode": "GOVERNANCE", "until": 172806}),
                (years, 0, {"mode": "COMPLIANCE", "until": 365 * 86400})):
            self.assertEqual(g.default_lock(default, now), lock)

    def test_who_may_delete(self):
        hold = dict(GOVERNED, hold="ON")
        for lock, now, bypass, may in (
                ({}, SOON, False, True), ({"hold": "OFF"}, SOON, False, True),
                ({"hold": "ON"}, SOON, True, False), (hold, SOON, True, False),
                (hold, FAR, False, False),
                (GOVERNED, SOON, False, False), (GOVERNED, SOON, True, True),
                (GOVERNED, THEN, False, True),
                (COMPLIANT, SOON, False, False),
                (COMPLIANT, SOON, True, False),
                (COMPLIANT, THEN, False, True)):
            with self.subTest((lock, now, bypass)):
                if may:
                    g.check_unlocked(lock, now, bypass)
                else:
                    self.refused("AccessDenied", "Access Denied because "
                                 "object protected by object lock.",
                                 g.check_unlocked, lock, now, bypass)

    def test_who_may_change_a_retention(self):
        longer = [dict(lock, until=FAR) for lock in (GOVERNED, COMPLIANT)]
        shorter = [dict(lock, until=THEN - g.DAY_SECONDS)
                   for lock in (GOVERNED, COMPLIANT)]
        for lock, new, may, may_bypass in (
                ({}, GOVERNED, True, True), ({}, {}, True, True),
                ({"hold": "ON"}, GOVERNED, True, True),
                (GOVERNED, longer[0], True, True),
                (GOVERNED, GOVERNED, True, True),
                (GOVERNED, shorter[0], False, True),
                (GOVERNED, {}, False, True),
                (GOVERNED, longer[1], False, True),
                (COMPLIANT, longer[1], True, True),
                (COMPLIANT, shorter[1], False, False),
                (COMPLIANT, {}, False, False),
                (COMPLIANT, longer[0], False, False)):
            for bypass, allowed in ((False, may), (True, may_bypass)):
                with self.subTest((lock, new, bypass)):
                    if allowed:
                        g.check_retention_change(lock, new, SOON, bypass)
                    else:
                        self.refused("AccessDenied", "Access Denied because",
                                     g.check_retention_change, lock, new,
                                     SOON, bypass)
        g.check_retention_change(COMPLIANT, {}, THEN)
        self.assertEqual(g.with_retention({"hold": "ON", "mode": "x"},
                                          GOVERNED),
                         dict(GOVERNED, hold="ON"))
        self.assertEqual(g.with_retention(GOVERNED, {}), {})


class LockCase(OperationCase):
    """`box` with object lock; each test with a bucket.json of its own."""

    UNTIL = "2099-01-01T00:00:00Z"

    def setUp(self):
        super().setUp()
        self.unlock_tree()
        self.addCleanup(self.unlock_tree)
        self.switch_versions()
        self.put_lock("<ObjectLockEnabled>Enabled</ObjectLockEnabled>")

    def unlock_tree(self):
        shutil.rmtree(self.path(gos3rve.STATE), ignore_errors=True)

    def switch_versions(self, status="Enabled"):
        return self.s3.put("/box", (
            "<VersioningConfiguration><Status>%s</Status>"
            "</VersioningConfiguration>" % status).encode(),
            {"versioning": ""})

    def document(self, path, name, inner, root, headers=(), **query):
        body = ("<%s>%s</%s>" % (root, inner, root)).encode()
        return self.s3.put(path, body, dict(query, **{name: ""}),
                           headers=dict(headers, **{
                               "content-md5": digest64("md5", body)}))

    def put_lock(self, inner, path="/box"):
        return self.document(path, "object-lock", inner,
                             "ObjectLockConfiguration")

    def retain(self, mode, until, key="k", bypass=False, **query):
        inner = mode and ("<Mode>%s</Mode><RetainUntilDate>%s"
                          "</RetainUntilDate>" % (mode, until))
        return self.document(
            "/box/" + key, "retention", inner, "Retention",
            {"x-amz-bypass-governance-retention": "true"} if bypass else {},
            **query)

    def hold(self, status, key="k", **query):
        return self.document("/box/" + key, "legal-hold",
                             "<Status>%s</Status>" % status, "LegalHold",
                             **query)

    def put_version(self, key="k", body=b"x", **headers):
        named = {"x-amz-object-lock-" + name.replace("_", "-"): value
                 for name, value in headers.items()}
        if named:
            named["content-md5"] = digest64("md5", body)
        return self.ok(self.s3.put("/box/" + key, body, headers=named)
                       ).headers["x-amz-version-id"]

    def delete(self, version, key="k", bypass=False):
        return self.s3.delete(
            "/box/" + key, {"versionId": version}, headers={
                "x-amz-bypass-governance-retention": "true"}
            if bypass else {})


class MetadataTableRequests(LockCase):
    """Kept and given back; no table is made, and the status says so."""

    ENABLED = ("<RecordExpiration><Expiration>ENABLED</Expiration>"
               "<Days>%d</Days></RecordExpiration>")

    def create(self, inner, name="metadataConfiguration",
               root="MetadataConfiguration", method="POST"):
        body = ("<%s>%s</%s>" % (root, inner, root)).encode()
        return self.s3.request(method, "/box", {name: ""}, body, headers={
            "content-md5": digest64("md5", body)})

    def test_it_is_made_read_changed_and_deleted(self):
        query = {"metadataConfiguration": ""}
        self.error(self.s3.get("/box", query),
                   "MetadataConfigurationNotFound", 404)
        journal = "<JournalTableConfiguration>%s" \
            "</JournalTableConfiguration>" % self.ENABLED
        self.ok(self.create(journal % 7))
        self.error(self.create(journal % 7), "InvalidBucketState", 409)
        table = "MetadataConfigurationResult/JournalTableConfigurationResult/"
        answer = self.ok(self.s3.get("/box", query))
        self.assertEqual(answer.one(table + "TableStatus"), "FAILED")
        self.assertEqual(answer.one(table + "RecordExpiration/Days"), "7")
        self.ok(self.create(self.ENABLED % 30, "metadataJournalTable",
                            "JournalTableConfiguration", "PUT"))
        self.ok(self.create("<ConfigurationState>ENABLED"
                            "</ConfigurationState>",
                            "metadataInventoryTable",
                            "InventoryTableConfiguration", "PUT"))
        answer = self.ok(self.s3.get("/box", query))
        self.assertEqual(answer.one(table + "RecordExpiration/Days"), "30")
        self.assertEqual(answer.one(
            "MetadataConfigurationResult/InventoryTableConfigurationResult/"
            "ConfigurationState"), "ENABLED")
        self.ok(self.s3.delete("/box", query), 204)
        self.error(self.s3.get("/box", query),
                   "MetadataConfigurationNotFound")

    def test_bad_ones_are_refused(self):
        self.error(self.create(""), "MalformedXML")
        self.error(self.create("<JournalTableConfiguration>%s"
                               "</JournalTableConfiguration>"
                               % self.ENABLED % 3), "InvalidArgument")
        self.error(self.create(self.ENABLED % 30, "metadataJournalTable",
                               "JournalTableConfiguration", "PUT"),
                   "MetadataConfigurationNotFound")

    def test_the_older_form(self):
        self.ok(self.create(
            "<S3TablesDestination><TableBucketArn>arn:aws:s3tables:x:1:"
            "bucket/b</TableBucketArn><TableName>t</TableName>"
            "</S3TablesDestination>", "metadataTable",
            "MetadataTableConfiguration"))
        answer = self.ok(self.s3.get("/box", {"metadataTable": ""}))
        self.assertEqual(answer.one("Status"), "FAILED")
        self.ok(self.s3.delete("/box", {"metadataTable": ""}), 204)


class ObjectLockRequests(LockCase):

    def test_configuration_needs_versions_and_stays(self):
        self.unlock_tree()
        answer = self.s3.get("/box", {"object-lock": ""})
        self.error(answer, "ObjectLockConfigurationNotFoundError", 404)
        enabled = "<ObjectLockEnabled>Enabled</ObjectLockEnabled>"
        self.error(self.put_lock(enabled), "InvalidBucketState", 409)
        self.ok(self.switch_versions())
        self.ok(self.put_lock(LOCK_DEFAULT % (
            "<Mode>GOVERNANCE</Mode><Days>3</Days>")))
        answer = self.ok(self.s3.get("/box", {"object-lock": ""}))
        self.assertEqual(answer.one("ObjectLockEnabled"), "Enabled")
        self.assertEqual(answer.one("Rule/DefaultRetention/Days"), "3")
        self.error(self.switch_versions("Suspended"), "InvalidBucketState")
        self.assertEqual(self.s3.get("/box", {"versioning": ""}).one(
            "Status"), "Enabled")

    def test_a_bucket_is_made_with_it(self):
        self.ok(self.s3.put("/locked", headers={
            "x-amz-bucket-object-lock-enabled": "true"}))
        self.addCleanup(self.s3.delete, "/locked")
        self.assertEqual(self.s3.get("/locked", {"versioning": ""}).one(
            "Status"), "Enabled")
        self.assertEqual(self.s3.get("/locked", {"object-lock": ""}).one(
            "ObjectLockEnabled"), "Enabled")

    @unittest.skipUnless(gos3rve.libcrypto(), "no libcrypto")
    def test_the_encryption_of_what_is_locked_stays(self):
        """API_UpdateObjectEncryption: the lock must go first."""
        for mode in ("GOVERNANCE", "COMPLIANCE", None):
            key = mode or "hold"
            self.ok(self.s3.put("/box/" + key, b"x", headers={
                "x-amz-server-side-encryption": "AES256"}))
            self.ok(self.hold("ON", key) if mode is None else
                    self.retain(mode, self.UNTIL, key))
            self.error(self.update_encryption(key), "AccessDenied")
            self.assertEqual(self.s3.head("/box/" + key).headers[
                "x-amz-server-side-encryption"], "AES256")
        self.ok(self.hold("OFF", "hold"))
        self.ok(self.update_encryption("hold"))

    def update_encryption(self, key):
        return self.document(
            "/box/" + key, "encryption", "<SSE-KMS><KMSKeyArn>arn:aws:kms:"
            "us-east-1:111122223333:alias/aws/s3</KMSKeyArn></SSE-KMS>",
            "ObjectEncryption",
            {"x-amz-bypass-governance-retention": "true"})

    def test_without_it_nothing_can_be_locked(self):
        self.unlock_tree()
        self.switch_versions()
        self.put_version()
        self.error(self.hold("ON"), "InvalidRequest")
        self.error(self.retain("GOVERNANCE", self.UNTIL), "InvalidRequest")
        for name in ("legal-hold", "retention"):
            self.error(self.s3.get("/box/k", {name: ""}), "InvalidRequest")
        self.error(self.s3.put("/box/k", b"y", headers={
            "x-amz-object-lock-legal-hold": "ON",
            "content-md5": digest64("md5", b"y")}), "InvalidRequest")
        self.body("k", b"x")

    def test_digests_are_insisted_on(self):
        self.error(self.s3.put("/box/k", b"y", headers={
            "x-amz-object-lock-legal-hold": "ON"}), "InvalidRequest")
        self.put_version()
        self.error(self.s3.put("/box/k", b"<LegalHold><Status>ON</Status>"
                               b"</LegalHold>", {"legal-hold": ""}),
                   "InvalidRequest")

    def test_a_legal_hold_keeps_a_version_until_it_is_off(self):
        version = self.put_version()
        self.error(self.s3.get("/box/k", {"legal-hold": ""}),
                   "NoSuchObjectLockConfiguration", 404)
        self.ok(self.hold("ON"))
        self.assertEqual(self.s3.get("/box/k", {"legal-hold": ""}).one(
            "Status"), "ON")
        for bypass in (False, True):
            self.error(self.delete(version, bypass=bypass), "AccessDenied")
        self.ok(self.hold("OFF", versionId=version))
        self.assertEqual(self.s3.head("/box/k").headers[
            "x-amz-object-lock-legal-hold"], "OFF")
        self.ok(self.delete(version), 204)

    def test_governance_is_bypassed_by_those_who_say_so(self):
        version = self.put_version(mode="GOVERNANCE",
                                   retain_until_date=self.UNTIL)
        self.error(self.delete(version), "AccessDenied")
        self.error(self.retain("GOVERNANCE", "2098-01-01T00:00:00Z"),
                   "AccessDenied")
        self.error(self.retain("", ""), "AccessDenied")
        self.ok(self.retain("GOVERNANCE", "2100-01-01T00:00:00Z"))
        self.ok(self.retain("GOVERNANCE", "2098-01-01T00:00:00Z",
                            bypass=True))
        answer = self.ok(self.s3.get("/box/k", {"retention": ""}))
        self.assertEqual(answer.one("RetainUntilDate"),
                         "2098-01-01T00:00:00.000Z")
        self.ok(self.delete(version, bypass=True), 204)

    def test_a_retention_is_taken_away_by_an_empty_one(self):
        version = self.put_version(mode="GOVERNANCE",
                                   retain_until_date=self.UNTIL)
        self.ok(self.retain("", "", bypass=True))
        self.error(self.s3.get("/box/k", {"retention": ""}),
                   "NoSuchObjectLockConfiguration")
        self.ok(self.delete(version), 204)

    def test_compliance_is_not_bypassed(self):
        version = self.put_version(mode="COMPLIANCE",
                                   retain_until_date=self.UNTIL)
        for bypass in (False, True):
            self.error(self.delete(version, bypass=bypass), "AccessDenied")
            self.error(self.retain("GOVERNANCE", self.UNTIL, bypass=bypass),
                       "AccessDenied")
            self.error(self.retain("", "", bypass=bypass), "AccessDenied")
        self.ok(self.retain("COMPLIANCE", "2100-01-01T00:00:00Z"))

    def test_no_way_round_a_lock(self):
        """Overwriting, marking, deleting many, renaming, the bucket."""
        version = self.put_version(legal_hold="ON")
        self.put_version(body=b"y")
        self.ok(self.s3.delete("/box/k"), 204)          # a marker
        body = ("<Delete><Object><Key>k</Key><VersionId>%s</VersionId>"
                "</Object></Delete>" % version).encode()
        answer = self.ok(self.s3.post("/box", {"delete": ""}, body, headers={
            "content-md5": digest64("md5", body)}))
        self.assertEqual(answer.one("Error/Code"), "AccessDenied")
        self.error(self.s3.put("/box/new", query={"renameObject": ""},
                               headers={"x-amz-rename-source": "/box/k"}),
                   "NoSuchKey")
        self.error(self.s3.delete("/box"), "BucketNotEmpty")
        self.assertEqual(self.ok(self.s3.get("/box/k", {
            "versionId": version})).body, b"x")

    def test_the_default_is_given_on_every_way_to_write(self):
        self.ok(self.put_lock(LOCK_DEFAULT % (
            "<Mode>COMPLIANCE</Mode><Years>1</Years>")))
        self.put_version("put")
        self.ok(self.s3.put("/box/copy", headers={
            "x-amz-copy-source": "/box/put"}))
        upload = self.ok(self.s3.post("/box/parts", query={
            "uploads": ""})).one("UploadId")
        etag = self.ok(self.s3.put("/box/parts", b"p", {
            "uploadId": upload, "partNumber": "1"})).etag
        body = ("<CompleteMultipartUpload><Part><PartNumber>1</PartNumber>"
                "<ETag>%s</ETag></Part></CompleteMultipartUpload>"
                % etag).encode()
        self.ok(self.s3.post("/box/parts", {"uploadId": upload}, body))
        for key in ("put", "copy", "parts"):
            with self.subTest(key=key):
                headers = self.ok(self.s3.head("/box/" + key)).headers
                self.assertEqual(headers["x-amz-object-lock-mode"],
                                 "COMPLIANCE")
                until = g.parse_iso_date(headers[
                    "x-amz-object-lock-retain-until-date"])
                self.assertLess(abs(until - time.time() - 365 * 86400), 60)
                self.error(self.delete(headers["x-amz-version-id"], key,
                                       True), "AccessDenied")

    def test_an_upload_remembers_the_lock_it_was_started_with(self):
        upload = self.ok(self.s3.post("/box/k", query={
            "uploads": ""}, headers={
                "x-amz-object-lock-legal-hold": "ON"})).one("UploadId")
        etag = self.ok(self.s3.put("/box/k", b"p", {
            "uploadId": upload, "partNumber": "1"})).etag
        body = ("<CompleteMultipartUpload><Part><PartNumber>1</PartNumber>"
                "<ETag>%s</ETag></Part></CompleteMultipartUpload>"
                % etag).encode()
        self.ok(self.s3.post("/box/k", {"uploadId": upload}, body))
        self.assertEqual(self.s3.get("/box/k", {"legal-hold": ""}).one(
            "Status"), "ON")

    def test_a_copy_does_not_inherit_a_lock(self):
        self.put_version(legal_hold="ON")
        self.ok(self.s3.put("/box/copy", headers={
            "x-amz-copy-source": "/box/k"}))
        self.assertNotIn("x-amz-object-lock-legal-hold",
                         self.s3.head("/box/copy").headers)

    def test_markers_have_no_lock(self):
        self.put_version()
        marker = self.ok(self.s3.delete("/box/k"), 204).headers[
            "x-amz-version-id"]
        self.error(self.hold("ON", versionId=marker), "MethodNotAllowed")
        self.ok(self.delete(marker), 204)

    @unittest.skipUnless(hasattr(os, "fchmod"), "needs fchmod")
    def test_the_file_is_read_only_while_locked(self):
        def mode():
            return os.stat(self.path("k")).st_mode & 0o222
        version = self.put_version()
        self.assertTrue(mode())
        self.ok(self.hold("ON"))
        self.assertFalse(mode())
        self.ok(self.s3.put("/box/k", b"<Tagging><TagSet><Tag><Key>a</Key>"
                            b"<Value>b</Value></Tag></TagSet></Tagging>",
                            {"tagging": ""}))
        self.assertFalse(mode())
        self.ok(self.hold("OFF"))
        self.assertTrue(mode())
        self.assertEqual(self.s3.head("/box/k").headers[
            "x-amz-tagging-count"], "1")
        self.ok(self.delete(version), 204)

    def test_two_shortenings_at_once_cannot_undo_a_longer_lock(self):
        """The change is checked where it is made, under the key's lock."""
        self.put_version(mode="GOVERNANCE", retain_until_date=self.UNTIL)

        def lengthen(number):
            client = Client(self.server.url, self.server.key_id,
                            self.server.key_val)
            self.addCleanup(client.close)
            body = ("<Retention><Mode>GOVERNANCE</Mode><RetainUntilDate>"
                    "21%02d-01-01T00:00:00Z</RetainUntilDate></Retention>"
                    % number).encode()
            return client.put("/box/k", body, {"retention": ""}, headers={
                "content-md5": digest64("md5", body)}).status
        statuses = together(8, lengthen)
        self.assertIn(200, statuses)
        self.assertEqual(self.s3.get("/box/k", {"retention": ""}).one(
            "RetainUntilDate"), "2107-01-01T00:00:00.000Z")


# --- access logs ---

def logging_xml(inner="", bucket="logs", prefix="x/"):
    """A LoggingEnabled with more in it."""
    return ("<LoggingEnabled><TargetBucket>%s</TargetBucket>%s"
            "<TargetPrefix>%s</TargetPrefix></LoggingEnabled>" % (
                bucket, inner, prefix))


def layout_xml(inner):
    """A log object's key format."""
    return "<TargetObjectKeyFormat>%s</TargetObjectKeyFormat>" % inner


PARTITIONED = layout_xml("<PartitionedPrefix>%s</PartitionedPrefix>")
SOURCE = "<PartitionDateSource>%s</PartitionDateSource>"


def log_grants(*grants):
    """The TargetGrants of some (kind, tag, text, permission)."""
    return "<TargetGrants>%s</TargetGrants>" % "".join(
        grant_xml(*grant) for grant in grants)


class LoggingDocuments(DocumentCase):

    ACCOUNTS = g.Accounts([ALICE, BOB])

    def parse(self, inner):
        return g.parse_logging(document_element(
            "BucketLoggingStatus", inner), ALICE.user_id, self.ACCOUNTS)

    def test_documents_that_are_kept_and_given_back(self):
        for inner in (
                "", logging_xml(), logging_xml(prefix=""),
                logging_xml(prefix=" a b/"),
                logging_xml().replace("</LoggingEnabled>", layout_xml(
                    "<SimplePrefix></SimplePrefix>") + "</LoggingEnabled>"),
                logging_xml().replace("</LoggingEnabled>", PARTITIONED % ""
                                      + "</LoggingEnabled>"),
                logging_xml().replace(
                    "</LoggingEnabled>", PARTITIONED % (
                        SOURCE % "DeliveryTime") + "</LoggingEnabled>"),
                logging_xml(log_grants(
                    ("Group", "URI", g.ALL_USERS, "READ"),
                    ("CanonicalUser", "ID", BOB.user_id, "FULL_CONTROL")))):
            with self.subTest(inner):
                logging = self.parse(inner)
                if logging:
                    self.kept(logging)
                text = plain_xml("BucketLoggingStatus", g.logging_children(
                    logging, ALICE.user_id, self.ACCOUNTS))
                self.assertEqual(re.sub(
                    "<DisplayName>.*?</DisplayName>", "", text),
                    "<BucketLoggingStatus>%s</BucketLoggingStatus>" % inner)

    def test_a_grant_to_the_owner_alone_is_kept(self):
        logging = self.parse(logging_xml(log_grants(
            ("AmazonCustomerByEmail", "EmailAddress", ALICE.email,
             "FULL_CONTROL"))))
        text = plain_xml("BucketLoggingStatus", g.logging_children(
            logging, ALICE.user_id, self.ACCOUNTS))
        self.assertIn("<ID>%s</ID>" % ALICE.user_id, text)
        self.assertNotIn(ALICE.user_id, json.dumps(logging))

    def test_documents_that_are_refused(self):
        bob = ("CanonicalUser", "ID", BOB.user_id)
        for inner in (
                "<Other/>", "text", logging_xml() * 2,
                logging_xml("<Other/>"), logging_xml(bucket=""),
                logging_xml("<TargetBucket>twice</TargetBucket>"),
                "<LoggingEnabled><TargetPrefix/></LoggingEnabled>",
                "<LoggingEnabled><TargetBucket>b</TargetBucket>"
                "</LoggingEnabled>",
                logging_xml(layout_xml("")),
                logging_xml(layout_xml("<SimplePrefix/>") * 2),
                logging_xml(layout_xml("<SimplePrefix/>"
                                       "<PartitionedPrefix/>")),
                logging_xml(layout_xml("<SimplePrefix>a</SimplePrefix>")),
                logging_xml(PARTITIONED % (SOURCE % "Noon")),
                logging_xml(PARTITIONED % (SOURCE % "EventTime" * 2)),
                logging_xml(log_grants(bob + ("WRITE_ACP",))),
                logging_xml(log_grants(bob + ("",))),
                logging_xml(log_grants(("Group", "ID", "x", "READ"))),
                logging_xml(log_grants(("Robot", "ID", "x", "READ"))),
                logging_xml(log_grants(*[bob + ("READ",)] * 100)),
                logging_xml("<TargetGrants><Grant/></TargetGrants>")):
            with self.subTest(inner):
                self.refused("MalformedXML", "", self.parse, inner)
        for kind, tag, text, code in (
                ("CanonicalUser", "ID", "nobody", "InvalidArgument"),
                ("Group", "URI", "http://x", "InvalidArgument"),
                ("AmazonCustomerByEmail", "EmailAddress", "no@example.com",
                 "UnresolvableGrantByEmailAddress")):
            self.refused(code, "", self.parse, logging_xml(log_grants(
                (kind, tag, text, "READ"))))

    def test_the_key_of_a_log_object(self):
        bucket = type("", (), {"name": "src", "region": "eu-west-1"})
        name = "20260102-2026-01-03-04-05-06-0123456789ABCDEF"
        for layout, key in (
                ("", "x/2026-01-03-04-05-06-0123456789ABCDEF"),
                (layout_xml("<SimplePrefix/>"),
                 "x/2026-01-03-04-05-06-0123456789ABCDEF"),
                (PARTITIONED % "", "x/me/eu-west-1/src/2026/01/02/"
                 "2026-01-02-00-00-00-0123456789ABCDEF"),
                (PARTITIONED % (SOURCE % "EventTime"),
                 "x/me/eu-west-1/src/2026/01/02/"
                 "2026-01-02-00-00-00-0123456789ABCDEF"),
                (PARTITIONED % (SOURCE % "DeliveryTime"),
                 "x/me/eu-west-1/src/2026/01/03/"
                 "2026-01-03-04-05-06-0123456789ABCDEF")):
            with self.subTest(layout):
                self.assertEqual(g.log_key(self.parse(logging_xml(
                    layout)), "me", bucket, name), key)


# How Athena reads logs: userguide/using-s3-access-logs-to-identify-
# requests.html
ATHENA = re.compile(
    r"([^ ]*) ([^ ]*) \[(.*?)\] ([^ ]*) ([^ ]*) ([^ ]*) ([^ ]*) "
    r'([^ ]*) ("[^"]*"|-) (-|[0-9]*) ([^ ]*) ([^ ]*) ([^ ]*) ([^ ]*) '
    r'([^ ]*) ([^ ]*) ("[^"]*"|-) ([^ ]*) ([^ ]*) ([^ ]*) ([^ ]*) '
    r"([^ ]*) ([^ ]*) ([^ ]*) ([^ ]*) ([^ ]*) ([^ ]*)\Z")


def read_log(text):
    """The lines of a log, as LogLines of texts."""
    return [g.LogLine(*ATHENA.match(line).groups())
            for line in text.splitlines()]


class LogLines(unittest.TestCase):

    # userguide/LogFormat.html; %o: the owner, %b: the bucket
    PUBLISHED = (
        '%o %b [06/Feb/2019:00:00:38 +0000] 192.0.2.3 %o 3E57427F3EXAMPLE '
        'REST.GET.VERSIONING - "GET /%b?versioning HTTP/1.1" 200 - 113 - 7 '
        '- "-" "S3Console/0.4" - s9lzHYrFp76ZVxRcpX9+5cjAnEH2ROuNkd2BHfIa6'
        'UkFVdtjf5mKR3/eTPFvsiP/XV/VLi31234= SigV4 '
        'ECDHE-RSA-AES128-GCM-SHA256 AuthHeader '
        '%b.s3.us-west-1.amazonaws.com TLSV1.2 arn:aws:s3:us-west-1:'
        '123456789012:accesspoint/example-AP Yes us-east-1',
        '%o %b [06/Feb/2019:00:00:38 +0000] 192.0.2.3 %o 891CE47D2EXAMPLE '
        'REST.GET.LOGGING_STATUS - "GET /%b?logging HTTP/1.1" 200 - 242 - '
        '11 - "-" "S3Console/0.4" - 9vKBE6vMhrNiWHZmb2L0mXOcqPGzQOI5XLnCtZ'
        'NPxev+Hf+7tpT6sxDwDty4LHBUOZJG96N1234= SigV4 '
        'ECDHE-RSA-AES128-GCM-SHA256 AuthHeader '
        '%b.s3.us-west-1.amazonaws.com TLSV1.2 - - us-east-1',
        '%o %b [06/Feb/2019:00:00:38 +0000] 192.0.2.3 %o A1206F460EXAMPLE '
        'REST.GET.BUCKETPOLICY - "GET /%b?policy HTTP/1.1" 404 '
        'NoSuchBucketPolicy 297 - 38 - "-" "S3Console/0.4" - BNaBsXZQQDbss'
        'i6xMBdBU2sLt+Yf5kZDmeBUP35sFoKa3sLLeMC78iwEIWxs99CRUrbS4n11234= '
        'SigV4 ECDHE-RSA-AES128-GCM-SHA256 AuthHeader '
        '%b.s3.us-west-1.amazonaws.com TLSV1.2 - Yes us-west-1',
        '%o %b [06/Feb/2019:00:01:57 +0000] 192.0.2.3 %o DD6CC733AEXAMPLE '
        'REST.PUT.OBJECT s3-dg.pdf "PUT /%b/s3-dg.pdf HTTP/1.1" 200 - - '
        '4406583 41754 28 "-" "S3Console/0.4" - 10S62Zv81kBW7BB6SX4XJ48o6k'
        'pcl6LPwEoizZQQxJd5qDSCTLX0TgS37kYUBKQW3+bPdrg1234= SigV4 '
        'ECDHE-RSA-AES128-SHA AuthHeader %b.s3.us-west-1.amazonaws.com '
        'TLSV1.2 - Yes us-west-1')

    def line(self, **fields):
        return g.LogLine("o", "b", 0, "::1", None, "R",
                         fields.pop("operation", "REST.GET.OBJECT"),
                         **fields)

    def text(self, **fields):
        """Such a line as it is read again."""
        line, = read_log(g.log_line_text(self.line(**fields)))
        return line

    def test_the_lines_that_aws_publishes(self):
        for text in self.PUBLISHED:
            text = text.replace("%b", "amzn-s3-demo-bucket1").replace(
                "%o", "79a59df900b949e55d96a1e698fbacedfd6e09d98eacf8f8d5218e"
                "7cd47ef2be")
            read = read_log(text)[0]
            line = g.LogLine(*[
                None if field == "-" else field.strip('"') for field in read])
            self.assertEqual(g.log_line_text(line._replace(
                time=calendar.timegm(time.strptime(
                    read.time, "%d/%b/%Y:%H:%M:%S +0000")))), text)
        self.assertEqual((read.bytes_sent, read.source_region), (
            "-", "us-west-1"))

    def test_a_key_is_encoded_twice_but_in_batches_once(self):
        for operation, key, text in (
                ("REST.GET.OBJECT", "a/b-_.~", "a/b-_.~"),
                ("REST.GET.OBJECT", "a b%\u00e9\n", "a%2520b%2525%25C3%25A9"
                 "%250A"),
                ("WEBSITE.GET.OBJECT", "a b", "a%2520b"),
                ("BATCH.DELETE.OBJECT", "a b%", "a%20b%25"),
                ("S3.EXPIRE.OBJECT", "a b\n", "a%20b%0A")):
            self.assertEqual(self.text(operation=operation, key=key).key,
                             text)

    def test_no_text_of_a_client_s_ends_a_field_or_a_line(self):
        evil = "a b\r\nc\x00\u00e9"
        fields = self.text(version_id=evil, host=evil, error_code=evil,
                           request_uri="GET /\n HTTP/1.1", referer="r\r",
                           user_agent="u\n")
        self.assertEqual(fields.version_id, "a%20b%0D%0Ac%00%C3%A9")
        self.assertEqual(fields.host, fields.version_id)
        self.assertEqual((fields.request_uri, fields.referer,
                          fields.user_agent), (
            '"GET /%0A HTTP/1.1"', '"r%0D"', '"u%0A"'))
        self.assertEqual(self.text(version_id="").version_id, "-")

    def test_signatures_and_tokens_are_not_logged(self):
        for target, logged in (
                ("/b/k?X-Amz-Signature=s3cret&x=1",
                 "/b/k?X-Amz-Signature=REDACTED&x=1"),
                ("/b/k?AWSAccessKeyId=a&Signature=s3cret%3D",
                 "/b/k?AWSAccessKeyId=a&Signature=REDACTED"),
                ("/b/k?X-Amz-Security-Token=s3cret&versionId=2",
                 "/b/k?X-Amz-Security-Token=REDACTED&versionId=2"),
                ("/b/k?x-amz-security-token=s3cret",
                 "/b/k?x-amz-security-token=REDACTED"),
                ("/b/X-Amz-Signature=key", "/b/X-Amz-Signature=key")):
            self.assertEqual(g._SECRETS.sub(r"\1=REDACTED", target), logged)

    def test_what_operations_are_called(self):
        for name, logged in (
                ("GetObject", "GET.OBJECT"), ("HeadObject", "HEAD.OBJECT"),
                ("PutObject", "PUT.OBJECT"), ("CopyObject", "COPY.OBJECT"),
                ("PostObject", "POST.OBJECT"),
                ("DeleteObject", "DELETE.OBJECT"),
                ("DeleteObjects", "POST.MULTI_OBJECT_DELETE"),
                ("ListObjects", "GET.BUCKET"), ("HeadBucket", "HEAD.BUCKET"),
                ("ListObjectsV2", "GET.BUCKET"),
                ("ListObjectVersions", "GET.BUCKETVERSIONS"),
                ("CreateMultipartUpload", "POST.UPLOADS"),
                ("UploadPart", "PUT.PART"), ("UploadPartCopy", "COPY.PART"),
                ("CompleteMultipartUpload", "POST.UPLOAD"),
                ("AbortMultipartUpload", "DELETE.UPLOAD"),
                ("ListParts", "GET.UPLOAD"),
                ("ListMultipartUploads", "GET.UPLOADS"),
                ("GetBucketVersioning", "GET.VERSIONING"),
                ("GetBucketLogging", "GET.LOGGING_STATUS"),
                ("PutBucketLogging", "PUT.LOGGING_STATUS"),
                ("GetBucketPolicy", "GET.BUCKETPOLICY"),
                ("GetBucketPolicyStatus", "GET.POLICY_STATUS"),
                ("GetBucketAcl", "GET.ACL"), ("PutObjectAcl", "PUT.ACL"),
                ("GetBucketTagging", "GET.TAGGING"),
                ("GetObjectTagging", "GET.OBJECT_TAGGING"),
                ("GetBucketRequestPayment", "GET.REQUEST_PAYMENT"),
                ("GetPublicAccessBlock", "GET.PUBLIC_ACCESS_BLOCK"),
                ("GetBucketOwnershipControls", "GET.OWNERSHIP_CONTROLS"),
                ("GetObjectLockConfiguration",
                 "GET.OBJECT_LOCK_CONFIGURATION"),
                ("GetObjectAttributes", "GET.OBJECT_ATTRIBUTES"),
                ("ListBucketIntelligentTieringConfigurations",
                 "GET.INTELLIGENT_TIERING"),
                ("GetBucketLifecycleConfiguration", "GET.LIFECYCLE")):
            row = g.OPERATIONS[name]
            self.assertEqual(g.log_operation(row, row.method, row.level),
                             "REST." + logged)
        for arguments, logged in (
                ((None, "GET", "bucket"), "REST.GET.BUCKET"),
                ((None, "OPTIONS", "object"), "REST.OPTIONS.PREFLIGHT"),
                ((g.OPERATIONS["GetObject"], "GET", "object", True),
                 "WEBSITE.GET.OBJECT")):
            self.assertEqual(g.log_operation(*arguments), logged)


class LoggingCase(OperationCase):
    """`box`, whose log may go to `logs`."""

    ALLOWED = {"Version": "2012-10-17", "Statement": [{
        "Effect": "Allow", "Principal": {"Service": g.LOGGING_SERVICE},
        "Action": "s3:PutObject", "Resource": "arn:aws:s3:::logs/x/*",
        "Condition": {"ArnLike": {"aws:SourceArn": "arn:aws:s3:::box"}}}]}

    def setUp(self):
        super().setUp()
        self.reports = []
        self.service = self.server.server.service
        self.service.store.report = self.reports.append
        self.forget()
        self.addCleanup(self.forget)
        self.ok(self.s3.put("/logs"))
        self.allow()

    def forget(self):
        """Both buckets as if they were new, or not there."""
        shutil.rmtree(self.path(gos3rve.STATE), ignore_errors=True)
        shutil.rmtree(self.path("..", "logs"), ignore_errors=True)

    def allow(self, policy=None, bucket="logs"):
        self.ok(self.s3.put("/" + bucket, json.dumps(
            policy or self.ALLOWED).encode(), {"policy": ""}), 204)

    def put_logging(self, inner="", **target):
        return self.s3.put("/box", (
            "<BucketLoggingStatus>%s</BucketLoggingStatus>" % logging_xml(
                inner, **target)).encode(), {"logging": ""})

    def stop_logging(self):
        self.ok(self.s3.put("/box", b"<BucketLoggingStatus/>",
                            {"logging": ""}))

    def deliver(self):
        """Deliver at once; how many objects."""
        self.ok(self.s3.head("/logs"))  # what came before it is spooled
        return g.deliver_logs(self.service, time.time())

    def lines(self, bucket="logs"):
        """The fields of all delivered lines, by name."""
        return read_log("".join(
            self.ok(self.s3.get("/%s/%s" % (bucket, key))).body.decode()
            for key in self.s3.keys(bucket, prefix="x/")))

    def logged(self):
        self.deliver()
        return self.lines()


class LoggingRequests(LoggingCase):

    def test_it_is_put_given_back_and_turned_off(self):
        self.ok(self.put_logging())
        answer = self.ok(self.s3.get("/box", {"logging": ""}))
        self.assertEqual(answer.one("LoggingEnabled/TargetBucket"), "logs")
        self.assertIn(logging_xml().encode(), answer.body)
        self.stop_logging()
        answer = self.ok(self.s3.get("/box", {"logging": ""}))
        self.assertEqual(len(answer.xml()), 0)

    def test_targets_that_are_refused(self):
        self.ok(self.s3.put("/far", (
            "<CreateBucketConfiguration><LocationConstraint>eu-west-1"
            "</LocationConstraint></CreateBucketConfiguration>").encode()))
        self.addCleanup(self.s3.delete, "/far")
        for bucket, code, words in (
                ("none", "InvalidTargetBucketForLogging", "does not exist"),
                ("..", "InvalidTargetBucketForLogging", "does not exist"),
                ("far", "CrossLocationLoggingProhibitted", "Cross S3")):
            answer = self.put_logging(bucket=bucket)
            self.error(answer, code)
            self.assertIn(words, answer.one("Message"))
        self.error(self.put_logging(prefix="p" * 1000), "KeyTooLongError")
        self.error(self.put_logging(log_grants(
            ("Group", "URI", g.ALL_USERS, "READ"))),
            "AccessControlListNotSupported")
        self.assertNotIn("logging", self.service.store.bucket("box").config)

    def test_a_target_that_others_pay_for_or_that_retains_is_refused(self):
        self.ok(self.s3.put("/logs", (
            "<RequestPaymentConfiguration><Payer>Requester</Payer>"
            "</RequestPaymentConfiguration>").encode(),
            {"requestPayment": ""}))
        answer = self.put_logging()
        self.error(answer, "InvalidTargetBucketForLogging")
        self.assertIn("Requester Pays", answer.one("Message"))
        shutil.rmtree(self.path("..", "logs"))
        self.ok(self.s3.put("/logs", headers={
            "x-amz-bucket-object-lock-enabled": "true"}))
        self.ok(self.put_logging())
        body = (b"<ObjectLockConfiguration><ObjectLockEnabled>Enabled"
                b"</ObjectLockEnabled><Rule><DefaultRetention><Mode>"
                b"GOVERNANCE</Mode><Days>1</Days></DefaultRetention></Rule>"
                b"</ObjectLockConfiguration>")
        self.ok(self.s3.put("/logs", body, {"object-lock": ""}, headers={
            "content-md5": digest64("md5", body)}))
        answer = self.put_logging()
        self.error(answer, "InvalidTargetBucketForLogging")
        self.assertIn("retention", answer.one("Message"))

    def test_requests_are_logged_with_their_facts(self):
        self.ok(self.put_logging())
        agent = {"user-agent": "test/1 (x)", "referer": "http://here/"}
        answers = [
            self.s3.put("/box/a b", b"hello"),
            self.s3.get("/box/a b", headers=agent),
            self.s3.get("/box/a b", headers={"range": "bytes=1-2"}),
            self.s3.get("/box/a b", {"versionId": "null"}),
            self.s3.get("/box/none"), self.s3.head("/box"),
            self.s3.get("/box/a b", signed=False),
            self.s3.send("GET", self.s3.presign("GET", "/box/a b")[
                len(self.s3.url):])]
        lines = self.logged()
        self.assertEqual([line[6:8] + line[9:13] for line in lines], [
            ("REST.PUT.OBJECT", "a%2520b", "200", "-", "-", "5"),
            ("REST.GET.OBJECT", "a%2520b", "200", "-", "5", "5"),
            ("REST.GET.OBJECT", "a%2520b", "206", "-", "2", "5"),
            ("REST.GET.OBJECT", "a%2520b", "200", "-", "5", "5"),
            ("REST.GET.OBJECT", "none", "404", "NoSuchKey",
             str(len(answers[4].body)), "-"),
            ("REST.HEAD.BUCKET", "-", "200", "-", "-", "-"),
            ("REST.GET.OBJECT", "a%2520b", "403", "AccessDenied",
             str(len(answers[6].body)), "-"),
            ("REST.GET.OBJECT", "a%2520b", "200", "-", "5", "5")])
        owner = self.service.accounts.first.user_id
        for line, answer in zip(lines, answers):
            self.assertEqual((line.bucket_owner, line.bucket,
                              line.remote_ip, line.host), (
                owner, "box", "127.0.0.1", self.s3.netloc))
            self.assertEqual(line.request_id,
                             answer.headers["x-amz-request-id"])
            self.assertEqual(line.host_id, answer.headers["x-amz-id-2"])
            self.assertLessEqual(int(line.turn_around_ms),
                                 int(line.total_ms))
            moment = time.strptime(line.time, "%d/%b/%Y:%H:%M:%S +0000")
            self.assertLess(abs(calendar.timegm(moment) - time.time()), 60)
        self.assertEqual(lines[1].request_uri, '"GET /box/a%20b HTTP/1.1"')
        self.assertEqual((lines[1].referer, lines[1].user_agent), (
            '"http://here/"', '"test/1 (x)"'))
        self.assertEqual((lines[0].referer, lines[0].user_agent),
                         ('"-"', '"-"'))
        self.assertEqual(lines[3].version_id, "null")
        for index, requester, signature, kind in (
                (0, owner, "SigV4", "AuthHeader"), (6, "-", "-", "-"),
                (7, owner, "SigV4", "QueryString")):
            line = lines[index]
            self.assertEqual((line.requester, line.signature, line.cipher,
                              line.authentication, line.tls_version),
                             (requester, signature, "-", kind, "-"))
        self.assertIn("X-Amz-Signature=REDACTED", lines[7].request_uri)
        self.assertEqual({(line.access_point_arn, line.source_region)
                          for line in lines}, {("-", "-")})

    def test_refused_before_the_bucket_was_looked_for(self):
        self.ok(self.put_logging())
        self.s3.send("GET", "/box/k", headers={
            "authorization": "AWS4-HMAC-SHA256 x"})
        self.s3.request("OPTIONS", "/box/k", headers={
            "origin": "http://x", "access-control-request-method": "GET"})
        self.s3.put("/box", query={"unknown": ""})
        self.s3.get("/none/k")
        self.assertEqual([line[6] + " " + line[10]
                          for line in self.logged()], [
            "REST.GET.OBJECT AuthorizationHeaderMalformed",
            "REST.OPTIONS.PREFLIGHT AccessForbidden",
            "REST.PUT.BUCKET NotImplemented"])

    def test_each_key_of_a_batch_and_the_source_of_a_copy(self):
        self.fill("a", "b c")
        self.ok(self.put_logging())
        self.ok(self.s3.put("/logs/copy", headers={
            "x-amz-copy-source": "/box/b%20c"}))
        body = (b"<Delete><Object><Key>b c</Key></Object><Object><Key>none"
                b"</Key></Object><Object><Key>a</Key><VersionId>bad"
                b"</VersionId></Object><Quiet>true</Quiet></Delete>")
        self.ok(self.s3.post("/box", {"delete": ""}, body, headers={
            "content-md5": digest64("md5", body)}))
        lines = self.logged()
        self.assertEqual([line[6:8] + line[9:11] + line[12:13]
                          + line[17:18] for line in lines], [
            ("REST.COPY.OBJECT_GET", "b%2520c", "200", "-", "1", "-"),
            ("REST.POST.MULTI_OBJECT_DELETE", "-", "200", "-", "-", "-"),
            ("BATCH.DELETE.OBJECT", "b%20c", "204", "-", "-", "-"),
            ("BATCH.DELETE.OBJECT", "none", "204", "-", "-", "-"),
            ("BATCH.DELETE.OBJECT", "a", "404", "NoSuchVersion", "-",
             "bad")])
        self.assertEqual(lines[0].request_uri,
                         '"PUT /logs/copy HTTP/1.1"')
        self.assertEqual(len({line.request_id for line in lines[1:]}), 1)

    def test_what_lifecycle_rules_do_is_logged(self):
        self.fill("old")
        body = ("<LifecycleConfiguration>%s</LifecycleConfiguration>" % rule(
            DAYS % 1)).encode()
        self.ok(self.s3.put("/box", body, {"lifecycle": ""}, headers={
            "content-md5": digest64("md5", body)}))
        self.ok(self.put_logging())
        g.run_lifecycle(self.service, time.time() + 3 * 86400)
        line, = self.logged()
        self.assertEqual((line.operation, line.key, line.requester,
                          line.object_size, line.request_uri), (
            "S3.EXPIRE.OBJECT", "old", "AmazonS3", "1", "-"))

    def test_a_website_s_requests_have_their_own_name(self):
        self.fill("page")
        self.ok(self.put_logging())
        self.s3.send("GET", "/page", headers={
            "host": "box.s3-website.localhost:1"})
        line, = self.logged()
        self.assertEqual((line.operation, line.status, line.error_code), (
            "WEBSITE.GET.OBJECT", "404", "NoSuchWebsiteConfiguration"))

    def test_a_new_target_gets_what_comes_after_it(self):
        self.ok(self.put_logging())
        self.fill("one")
        self.ok(self.put_logging(prefix="x/second-"))
        first = self.s3.keys("logs")
        self.assertEqual(len(first), 1)
        self.fill("two")
        self.stop_logging()
        self.fill("three")
        self.assertEqual(self.deliver(), 0)
        self.assertEqual([key.startswith("x/second-") for key in
                          self.s3.keys("logs")], [False, True])
        self.assertEqual([line.key for line in self.lines()],
                         ["one", "-", "two"])

    def test_a_request_is_answered_when_its_line_cannot_be_written(self):
        self.ok(self.put_logging())
        self.by_hand(gos3rve.STATE + "/logs", b"in the way")
        self.fill("k")
        self.body("k", b"x")
        self.assertIn("access log of box: ", self.reports[0])

    def test_nothing_is_spooled_without_a_configuration(self):
        self.fill("k")
        self.s3.get("/box/k")
        self.assertFalse(os.path.exists(self.path(gos3rve.STATE, "logs")))


class LogDelivery(LoggingCase):

    def test_the_object_is_the_target_owner_s_under_its_key(self):
        self.ok(self.put_logging())
        self.fill("k")
        self.assertEqual(self.deliver(), 1)
        self.assertEqual(self.deliver(), 0)
        key, = self.s3.keys("logs")
        self.assertRegex(key, r"\Ax/\d{4}(-\d\d){5}-[0-9A-F]{16}\Z")
        answer = self.ok(self.s3.head("/logs/" + key))
        self.assertEqual(answer.headers["content-type"], "text/plain")
        answer = self.ok(self.s3.get("/logs/" + key, {"acl": ""}))
        self.assertEqual(answer.all("AccessControlList/Grant/Grantee/ID"), [
            self.service.accounts.first.user_id])

    def test_a_partitioned_key(self):
        self.ok(self.put_logging(PARTITIONED % (SOURCE % "EventTime")))
        self.fill("k")
        self.deliver()
        key, = self.s3.keys("logs")
        self.assertRegex(key, r"\Ax/%s/us-east-1/box/(\d{4})/(\d\d)/(\d\d)"
                         r"/\1-\2-\3-00-00-00-[0-9A-F]{16}\Z"
                         % self.service.accounts.first.user_id)

    def test_the_target_may_be_the_source(self):
        self.ok(self.put_logging(bucket="box"))
        policy = json.loads(json.dumps(self.ALLOWED).replace(
            ":::logs/x/", ":::box/x/"))
        self.allow(policy, "box")
        self.fill("k")
        self.assertEqual(self.deliver(), 1)
        self.assertEqual(self.deliver(), 0)     # it does not log itself
        self.assertEqual([line.operation for line in self.lines("box")], [
            "REST.PUT.BUCKETPOLICY", "REST.PUT.OBJECT"])

    def test_versions_encryption_and_retention_of_the_target_hold(self):
        self.ok(self.put_logging())
        body = (b"<ServerSideEncryptionConfiguration><Rule>"
                b"<ApplyServerSideEncryptionByDefault><SSEAlgorithm>AES256"
                b"</SSEAlgorithm></ApplyServerSideEncryptionByDefault>"
                b"</Rule></ServerSideEncryptionConfiguration>")
        if g.libcrypto():
            self.ok(self.s3.put("/logs", body, {"encryption": ""}, headers={
                "content-md5": digest64("md5", body)}))
        self.service.store.update_bucket(
            self.service.store.bucket("logs"), lambda config: config.update(
                versioning="Enabled",
                object_lock={"Mode": "GOVERNANCE", "Days": 1}))
        self.fill("k")
        self.assertEqual(self.deliver(), 1)
        key, = self.s3.keys("logs")
        headers = self.ok(self.s3.head("/logs/" + key)).headers
        self.assertEqual(headers["x-amz-object-lock-mode"], "GOVERNANCE")
        self.assertRegex(headers["x-amz-version-id"], r"\A[0-9a-f]{32}\Z")
        if g.libcrypto():
            self.assertEqual(headers["x-amz-server-side-encryption"],
                             "AES256")
        self.assertEqual([line.key for line in self.lines()], ["k"])

    def test_it_waits_for_its_permission(self):
        self.ok(self.s3.delete("/logs", {"policy": ""}), 204)
        self.ok(self.put_logging())   # where ACLs are off S3 takes it
        self.fill("k")
        self.assertEqual(self.deliver(), 0)
        self.assertIn("not delivered: AccessDenied", self.reports[0])
        denied = json.loads(json.dumps(self.ALLOWED).replace(
            "s3:::box", "s3:::other"))
        self.allow(denied)
        self.assertEqual(self.deliver(), 0)
        self.allow()
        self.assertEqual(self.deliver(), 1)
        self.assertEqual([line.key for line in self.lines()], ["k"])

    def test_a_target_that_is_gone_costs_a_bounded_spool(self):
        self.ok(self.put_logging())
        shutil.rmtree(self.path("..", "logs"))
        with mock.patch.object(g, "MAX_SPOOLED_BYTES", 3000):
            for number in range(30):
                self.s3.put("/box/k%d" % number, b"x")
                if number % 10 == 9:
                    g.deliver_logs(self.service, time.time())
            logs = self.path(gos3rve.STATE, "logs")
            size = sum(os.path.getsize(os.path.join(logs, name))
                       for name in os.listdir(logs))
        self.assertLess(size, 2 * 3000)
        self.assertIn("NoSuchBucket", self.reports[0])

    def test_a_crash_after_the_publication_delivers_nothing_twice(self):
        class Crash(BaseException):
            pass

        def crash(request):
            real(request)
            raise Crash
        for versioning in (None, "Enabled"):
            real = g.put_object
            self.service.store.update_bucket(
                self.service.store.bucket("logs"),
                lambda config: config.update(versioning=versioning))
            self.ok(self.put_logging())
            self.fill("k")
            self.s3.head("/logs")
            with mock.patch.object(g, "put_object", crash):
                with self.assertRaises(Crash):
                    g.deliver_logs(self.service, time.time())
            self.assertEqual(len(self.service.store.bucket(
                "box").spooled_logs()), 1)
            self.deliver()
            self.assertEqual(self.service.store.bucket(
                "box").spooled_logs(), [])
        answer = self.ok(self.s3.get("/logs", {"versions": ""}))
        self.assertEqual(len(answer.all("Version")), 2)

    def test_several_deliverers_make_each_line_once(self):
        self.ok(self.put_logging())
        for number in range(8):
            self.fill("k%d" % number)
        self.s3.head("/logs")
        counts = together(6, lambda _: g.deliver_logs(
            self.service, time.time()))
        self.assertEqual(sum(counts), len(self.s3.keys("logs")))
        self.assertEqual(sorted(line.key for line in self.lines()),
                         ["k%d" % number for number in range(8)])


class LoggingWithAcls(AclCase):
    """The log delivery group, target grants, other owners."""

    def put_logging(self, inner="", client=None, bucket="box"):
        return (client or self.alice).put("/" + bucket, (
            "<BucketLoggingStatus>%s</BucketLoggingStatus>"
            % logging_xml(inner)).encode(), {"logging": ""})

    def logs(self, acl="log-delivery-write"):
        self.assertEqual(self.alice.put("/logs").status, 200)
        self.assertEqual(self.alice.put("/logs", query={"acl": ""}, headers={
            "x-amz-acl": acl}).status, 200)

    def test_the_group_needs_its_permissions(self):
        self.logs("private")
        answer = self.put_logging()
        self.assertEqual((answer.code, answer.one("Message")), (
            "InvalidTargetBucketForLogging", "You must give the log-delivery "
            "group WRITE and READ_ACP permissions to the target bucket"))
        group = 'uri="%s"' % g.LOG_DELIVERY
        self.alice.put("/logs", query={"acl": ""}, headers={
            "x-amz-grant-write": group})
        self.assertEqual(self.put_logging().status, 400)
        self.alice.put("/logs", query={"acl": ""}, headers={
            "x-amz-grant-write": group, "x-amz-grant-read-acp": group})
        self.assertEqual(self.put_logging().status, 200)
        self.alice.put("/logs", query={"acl": ""}, headers={
            "x-amz-acl": "private"})
        self.alice.put("/logs", json.dumps(LoggingCase.ALLOWED).encode(),
                       {"policy": ""})
        self.assertEqual(self.put_logging().status, 200)

    def test_the_owner_alone_and_to_a_bucket_of_the_same_owner(self):
        self.logs()
        self.alice.put("/box", json.dumps({
            "Version": "2012-10-17", "Statement": [{
                "Effect": "Allow", "Principal": "*",
                "Action": "s3:PutBucketLogging",
                "Resource": "arn:aws:s3:::box"}]}).encode(), {"policy": ""})
        self.assertEqual(self.put_logging(client=self.bob).code,
                         "AccessDenied")
        self.bob.put("/bobs")
        answer = self.put_logging(client=self.bob, bucket="bobs")
        self.assertEqual((answer.code, answer.one("Message")[:17]), (
            "InvalidTargetBucketForLogging", "The owner for the"))

    def test_grants_and_the_need_of_an_acl(self):
        self.logs()
        self.assertEqual(self.put_logging(log_grants(
            ("CanonicalUser", "ID", BOB.user_id, "READ"))).status, 200)
        self.alice.put("/box/k", b"x", headers={"x-amz-acl": "public-read"})
        for client in (self.alice, self.bob):
            client.get("/box/k")
            client.get("/none")         # the line before it is spooled
        self.assertEqual(g.deliver_logs(self.server.server.service,
                                        time.time()), 1)
        key, = self.alice.keys("logs")
        lines = read_log(self.bob.get("/logs/" + key).body.decode())
        self.assertEqual([(line.requester, line.acl_required)
                          for line in lines], [
            (ALICE.user_id, "-"), (ALICE.user_id, "-"),
            (BOB.user_id, "Yes")])
        answer = self.alice.get("/logs/" + key, {"acl": ""})
        self.assertEqual(answer.all("AccessControlList/Grant/Permission"), [
            "READ", "FULL_CONTROL"])

    def test_a_target_made_anew_by_somebody_else_gets_nothing(self):
        self.logs()
        self.assertEqual(self.put_logging().status, 200)
        self.alice.put("/box/k", b"x")
        self.assertEqual(self.alice.delete("/logs").status, 204)
        self.alice.get("/none")
        self.assertEqual(self.bob.put("/logs").status, 200)
        self.bob.put("/logs", query={"acl": ""}, headers={
            "x-amz-acl": "log-delivery-write"})
        self.assertEqual(g.deliver_logs(self.server.server.service,
                                        time.time()), 0)
        self.assertEqual(self.bob.keys("logs"), [])


# --- lifecycle: the document ---

def at(text):
    """Seconds since the epoch of `2014-01-15 10:30`."""
    return g.parse_iso_date(re.sub(
        r" (\d):", r" 0\1:", text).replace(" ", "T"))


def rule(actions, where="<Filter/>", name="r", status="Enabled"):
    return "<Rule><ID>%s</ID>%s<Status>%s</Status>%s</Rule>" % (
        name, where, status, actions)


def lifecycle(*rules, minimum=None):
    return g.parse_lifecycle(
       document_element("LifecycleConfiguration", "".join(rules)), minimum)


DAYS = "<Expiration><Days>%d</Days></Expiration>"
DATE = "<Expiration><Date>%s</Date></Expiration>"
MARKER = ("<Expiration><ExpiredObjectDeleteMarker>true"
          "</ExpiredObjectDeleteMarker></Expiration>")
ABORT = ("<AbortIncompleteMultipartUpload><DaysAfterInitiation>%d"
         "</DaysAfterInitiation></AbortIncompleteMultipartUpload>")
MOVE = ("<Transition><Days>%d</Days><StorageClass>%s</StorageClass>"
        "</Transition>")
MOVE_AT = ("<Transition><Date>%s</Date><StorageClass>%s</StorageClass>"
           "</Transition>")
OLD = ("<NoncurrentVersionExpiration><NoncurrentDays>%d</NoncurrentDays>"
       "</NoncurrentVersionExpiration>")
KEEP = ("<NoncurrentVersionExpiration><NoncurrentDays>%d</NoncurrentDays>"
        "<NewerNoncurrentVersions>%d</NewerNoncurrentVersions>"
        "</NoncurrentVersionExpiration>")
MOVE_OLD = ("<NoncurrentVersionTransition><NoncurrentDays>%d"
            "</NoncurrentDays><StorageClass>%s</StorageClass>"
            "</NoncurrentVersionTransition>")
TAG = "<Tag><Key>%s</Key><Value>%s</Value></Tag>"
LARGER = "<ObjectSizeGreaterThan>%d</ObjectSizeGreaterThan>"
SMALLER = "<ObjectSizeLessThan>%d</ObjectSizeLessThan>"


def where(*parts):
    """A Filter; of several members within And."""
    inner = "".join(parts)
    if len(parts) > 1:
        inner = "<And>%s</And>" % inner
    return "<Filter>%s</Filter>" % inner


def prefix(text):
    return "<Prefix>%s</Prefix>" % text


# rules, code, the beginning of the message
BAD_LIFECYCLES = (
    ([], "InvalidRequest", "At least one lifecycle rule"),
    ([rule(DAYS % 1, name=str(i)) for i in range(1001)], "InvalidRequest",
     "The number of lifecycle rules"),
    ([rule(DAYS % 2, name="a" * 256)], "InvalidArgument",
     "ID length should not exceed allowed limit of 255"),
    ([rule(DAYS % 1), rule(DAYS % 2)], "InvalidArgument",
     "Rule ID must be unique"),
    ([rule(DAYS % 1, status="enabled")], "MalformedXML", ""),
    ([rule(DAYS % 1, status="")], "MalformedXML", ""),
    ([rule("")], "InvalidRequest", "At least one action needs"),
    ([rule(DAYS % 1, "")], "MalformedXML", ""),
    ([rule(DAYS % 1, prefix("a") + where(prefix("a")))], "MalformedXML", ""),
    ([rule(DAYS % 1, prefix("a")), rule(DAYS % 1, name="s")],
     "InvalidRequest", "Filter element can only be used in Lifecycle V2."),
    ([rule(DAYS % 1), rule(DAYS % 1, prefix("a"), "s")], "InvalidRequest",
     "Base level prefix cannot be used in Lifecycle V2"),
    ([rule(DAYS % 1, prefix("a/b")), rule(DAYS % 2, prefix("a"), "s")],
     "InvalidRequest", "Found overlapping prefixes 'a' and 'a/b' for same "
     "action type 'Expiration'"),
    # filters
    ([rule(DAYS % 1, "<Filter>%s%s</Filter>" % (prefix("a"), LARGER % 1))],
     "MalformedXML", ""),
    ([rule(DAYS % 1, "<Filter><And>%s</And></Filter>" % prefix("a"))],
     "MalformedXML", ""),
    ([rule(DAYS % 1, "<Filter><And/></Filter>")], "MalformedXML", ""),
    ([rule(DAYS % 1, "<Filter><And>%s</And></Filter>" % (TAG % ("k", 1)))],
     "MalformedXML", ""),
    ([rule(DAYS % 1, where(LARGER % (1099511627776000 + 1)))],
     "InvalidRequest", "'ObjectSizeGreaterThan' should be between 0"),
    ([rule("<NoncurrentVersionTransition><NoncurrentDays>1</NoncurrentDays>"
           "<NewerNoncurrentVersions>0</NewerNoncurrentVersions>"
           "<StorageClass>GLACIER</StorageClass>"
           "</NoncurrentVersionTransition>")],
     "InvalidArgument", "'NewerNoncurrentVersions' for NoncurrentVersion"
     "Transition action must be a positive integer"),
    ([rule(DAYS % 1, where(TAG % ("k", 1), TAG % ("k", 2)))],
     "InvalidRequest", "Duplicate Tag Keys are not allowed."),
    ([rule(DAYS % 1, where(TAG % ("", "v")))], "MalformedXML", ""),
    ([rule(DAYS % 1, where(SMALLER % 0))], "InvalidRequest",
     "'ObjectSizeLessThan' should be between 1 and 1099511627776000."),
    ([rule(DAYS % 1, where(LARGER % -1))], "InvalidRequest",
     "'ObjectSizeGreaterThan' should be between 0"),
    ([rule(DAYS % 1, where(LARGER % 9, SMALLER % 9))], "InvalidRequest",
     "'ObjectSizeLessThan' has to be a value greater"),
    # expiration
    ([rule("<Expiration/>")], "MalformedXML", ""),
    ([rule(DAYS % 0)], "InvalidArgument",
     "'Days' for Expiration action must be a positive integer"),
    ([rule(DAYS % -1)], "InvalidArgument", "'Days' for Expiration"),
    ([rule(DATE % "1970-08-22T19:08:21Z")], "InvalidArgument",
     "'Date' must be at midnight GMT"),
    ([rule(DATE % "20200101")], "MalformedXML", ""),
    ([rule("<Expiration><Days>1</Days><ExpiredObjectDeleteMarker>false"
           "</ExpiredObjectDeleteMarker></Expiration>")], "MalformedXML", ""),
    ([rule("<Expiration><Days>1</Days><Date>2030-01-01</Date>"
           "</Expiration>")], "MalformedXML", ""),
    ([rule(MARKER, where(TAG % ("k", "v")))], "InvalidRequest",
     "ExpiredObjectDeleteMarker cannot be specified with Tags."),
    ([rule(MARKER, where(LARGER % 1))], "InvalidRequest",
     "ExpiredObjectDeleteMarker cannot be specified with Object Size."),
    # uploads
    ([rule(ABORT % 0)], "InvalidArgument", "'DaysAfterInitiation' for Abort"
     "IncompleteMultipartUpload action must be a positive integer"),
    ([rule(ABORT % 1, where(TAG % ("k", "v")))], "InvalidRequest",
     "AbortIncompleteMultipartUpload cannot be specified with Tags."),
    ([rule(ABORT % 1, where(prefix("a"), LARGER % 1))], "InvalidRequest",
     "AbortIncompleteMultipartUpload cannot be specified with Object Size"),
    ([rule("<AbortIncompleteMultipartUpload/>")], "MalformedXML", ""),
    # noncurrent versions
    ([rule("<NoncurrentVersionExpiration/>")], "MalformedXML", ""),
    ([rule(OLD % 0)], "InvalidArgument", "'NoncurrentDays' for Noncurrent"
     "VersionExpiration action must be a positive integer"),
    ([rule(KEEP % (1, 0))], "InvalidArgument", "'NewerNoncurrentVersions'"),
    ([rule(KEEP % (1, 5), prefix("a"))], "InvalidRequest",
     "NewerNoncurrentVersions element can only be used in Lifecycle V2."),
    ([rule(MOVE_OLD % (9, "GLACIER") + OLD % 9)], "InvalidArgument",
     "'NoncurrentDays' in the NoncurrentVersionExpiration action for filter "
     "'(prefix=)' must be greater than 'NoncurrentDays' in the Noncurrent"
     "VersionTransition action"),
    ([rule(MOVE_OLD % (-1, "GLACIER"))], "InvalidArgument",
     "'NoncurrentDays' in NoncurrentVersionTransition action must be non"),
    # transitions
    ([rule(MOVE % (1, "STANDARD"))], "MalformedXML", ""),
    ([rule(MOVE % (1, "LUKEWARM"))], "MalformedXML", ""),
    ([rule("<Transition><StorageClass>GLACIER</StorageClass></Transition>")],
     "MalformedXML", ""),
    ([rule("<Transition><Days>1</Days></Transition>")], "MalformedXML", ""),
    ([rule(MOVE % (-1, "GLACIER"))], "InvalidArgument",
     "'Days' in Transition action must be nonnegative"),
    ([rule(MOVE % (29, "ONEZONE_IA"))], "InvalidArgument",
     "'Days' in Transition action must be greater than or equal to 30 for "
     "storageClass 'ONEZONE_IA'"),
    ([rule(MOVE_AT % ("2022-09-27T01:00:00Z", "GLACIER"))],
     "InvalidArgument", "'Date' must be at midnight GMT"),
    ([rule(MOVE % (1, "GLACIER") + MOVE % (2, "GLACIER"))],
     "InvalidRequest", "'StorageClass' must be different for 'Transition' "
     "actions in same 'Rule' with filter '(prefix=)'"),
    ([rule(MOVE % (1, "GLACIER") + DATE % "2030-01-01")], "InvalidRequest",
     "Found mixed 'Date' and 'Days' based Expiration and Transition"),
    ([rule(MOVE % (9, "GLACIER") + MOVE % (9, "DEEP_ARCHIVE"))],
     "InvalidArgument", "'Days' in the Transition action for StorageClass "
     "'DEEP_ARCHIVE' for filter '(prefix=)' must be greater than"),
    ([rule(MOVE % (30, "STANDARD_IA") + MOVE % (59, "GLACIER"))],
     "InvalidArgument", "'Days' in the Transition action for StorageClass "
     "'GLACIER' for filter '(prefix=)' must be 30 days more than"),
    ([rule(DAYS % 9 + MOVE % (9, "GLACIER"), where(prefix("x/")))],
     "InvalidArgument", "'Days' in the Expiration action for filter "
     "'(prefix=x/)' must be greater than 'Days' in the Transition action"),
    ([rule(DATE % "2030-01-01" + MOVE_AT % ("2030-01-01", "GLACIER"))],
     "InvalidArgument", "'Date' in the Expiration action for filter"),
)

GOOD_LIFECYCLES = (
    [rule(DAYS % 1, prefix("test1/"), "rule1"),
     rule(DAYS % 2, prefix("test2/"), "rule2", "Disabled")],
    [rule(DAYS % 1, prefix("a")), rule(OLD % 1, prefix("a/b"), "s")],
    [rule(MARKER, where(prefix("foo")))],
    [rule(MARKER)], [rule(DATE % "2017-09-27")],
    [rule(DAYS % 1, where(TAG % ("a", 1), TAG % ("b", 2)))],
    [rule(DAYS % 1, where(prefix(""), SMALLER % 1))],
    [rule(DAYS % 1, where(LARGER % 0))],
    [rule(ABORT % 2 + DAYS % 1 + OLD % 1, where(prefix("a")))],
    [rule(MOVE % (0, "GLACIER_IR"))],
    [rule(MOVE_OLD % (2, "GLACIER") + MOVE_OLD % (4, "DEEP_ARCHIVE")
          + OLD % 6, prefix("test1/"))],
    [rule(MOVE % (30, "STANDARD_IA") + MOVE % (60, "GLACIER") + DAYS % 61)],
    [rule(MOVE % (0, "GLACIER") + MARKER)],
    [rule(KEEP % (1, 500))],
    [rule(DAYS % 1, name="a" * 255)],
    [rule(DAYS % 1, name=str(i)) for i in range(1000)],
    [rule(DAYS % 1, where(LARGER % 1099511627776000))],
    [rule("<NoncurrentVersionTransition><NoncurrentDays>1</NoncurrentDays>"
          "<NewerNoncurrentVersions>1</NewerNoncurrentVersions>"
          "<StorageClass>GLACIER</StorageClass>"
          "</NoncurrentVersionTransition>")],
    [rule(DATE % "2030-01-02" + MOVE_AT % ("2030-01-01", "GLACIER"))],
)


class LifecycleDocument(DocumentCase):

    def test_what_is_refused(self):
        for rules, code, message in BAD_LIFECYCLES:
            with self.subTest(rules[:2]):
                self.refused(code, message, lifecycle, *rules)

    def test_what_is_taken_comes_back(self):
        for rules in GOOD_LIFECYCLES:
            with self.subTest(rules):
                value = self.kept(lifecycle(*rules))
                text = plain_xml("LifecycleConfiguration",
                           g.lifecycle_children(value))
                again = g.parse_lifecycle(g.parse_xml(text))
                self.assertEqual(again, value)
                count = sum(len(list(item.iter())) for item in map(
                    g.parse_xml, rules))
                self.assertEqual(len(list(g.parse_xml(text).iter())) - 1,
                                 count)

    def test_elements_are_in_s3_s_order(self):
        value = lifecycle("<Rule><Transition><StorageClass>GLACIER_IR"
                          "</StorageClass><Days>0</Days></Transition>"
                          "<Status>Enabled</Status><ID>t</ID><Filter/>"
                          "</Rule>")
        self.assertEqual(plain_xml("L", g.lifecycle_children(value)), (
            "<L><Rule><ID>t</ID><Filter></Filter><Status>Enabled</Status>"
            "<Transition><Days>0</Days><StorageClass>GLACIER_IR"
            "</StorageClass></Transition></Rule></L>"))

    def test_a_rule_without_an_id_is_given_one(self):
        bare = "<Rule>%s<Filter/><Status>Enabled</Status>%s</Rule>"
        value = lifecycle(bare % ("", DAYS % 1), bare % ("<ID/>", OLD % 1))
        names = [item["ID"] for item in value["Rule"]]
        self.assertEqual([len(name) for name in names], [48, 48])
        self.assertNotEqual(*names)

    def test_the_minimum_size_has_a_default(self):
        header = g.MINIMUM_SIZE_HEADER
        for asked, given in ((None, g.ALL_128K), (g.VARIES, g.VARIES),
                             (g.ALL_128K, g.ALL_128K)):
            value = lifecycle(rule(DAYS % 1), minimum=asked)
            self.assertEqual(g.lifecycle_headers(value), {header: given})
        with self.assertRaises(S3Error) as caught:
            lifecycle(rule(DAYS % 1), minimum="value")
        self.assertEqual(caught.exception.message, "Invalid TransitionDefault"
                         "MinimumObjectSize found: value")


# --- lifecycle: what is due ---

def candidate(**facts):
    return g.Candidate(**dict({
        "key": "logs/a", "size": 1 << 20, "mtime": at("2014-01-15 10:30")},
        **facts))


OLD_VERSION = {"is_latest": False, "only_version": False, "versioned": True,
               "noncurrent_since": at("2014-01-15 10:30")}
LONE_MARKER = {"is_delete_marker": True, "size": 0, "versioned": True}

# rules, facts, now, the action (with the storage class) or None
DUE = (
    # rounded up to midnight UTC: userguide/intro-lifecycle-rules.html
    (rule(MOVE % (3, "GLACIER")), {}, "2014-01-18 23:59", None),
    (rule(MOVE % (3, "GLACIER")), {}, "2014-01-19", "transition GLACIER"),
    (rule(DAYS % 1), {"mtime": at("2014-01-02 0:05")}, "2014-01-03 23:59",
     None),
    (rule(DAYS % 1), {"mtime": at("2014-01-02 0:05")}, "2014-01-04",
     "expire"),
    (rule(DAYS % 1), {"mtime": at("2014-01-02")}, "2014-01-03", "expire"),
    # ... and from when it became noncurrent
    (rule(OLD % 5), dict(OLD_VERSION, noncurrent_since=at(
        "2014-01-02 11:30")), "2014-01-07 23:59", None),
    (rule(OLD % 5), dict(OLD_VERSION, noncurrent_since=at(
        "2014-01-02 11:30")), "2014-01-08", "remove"),
    (rule(OLD % 1), {}, "2030-01-01", None),
    (rule(DAYS % 1), OLD_VERSION, "2030-01-01", None),
    (rule(OLD % 1), dict(OLD_VERSION, is_delete_marker=True, size=0),
     "2030-01-01", "remove"),
    (rule(OLD % 1), dict(OLD_VERSION, noncurrent_since=None), "2030-01-01",
     None),
    # dates
    (rule(DATE % "2030-01-01"), {}, "2029-12-31", None),
    (rule(DATE % "2030-01-01"), {}, "2030-01-01", "expire"),
    (rule(DATE % "2015-01-01"), {"mtime": at("2020-01-01")}, "2020-01-02",
     "expire"),
    # filters
    (rule(DAYS % 1, status="Disabled"), {}, "2030-01-01", None),
    (rule(DAYS % 1, where(prefix("logs/"))), {}, "2030-01-01", "expire"),
    (rule(DAYS % 1, prefix("logs/")), {}, "2030-01-01", "expire"),
    (rule(DAYS % 1, prefix("other/")), {}, "2030-01-01", None),
    (rule(DAYS % 1, where(TAG % ("k", "v"))), {}, "2030-01-01", None),
    (rule(DAYS % 1, where(TAG % ("k", "v"))), {"tags": {
        "k": "v", "l": "w"}}, "2030-01-01", "expire"),
    (rule(DAYS % 1, where("<Tag><Key>k</Key></Tag>")), {"tags": {"k": "v"}},
     "2030-01-01", None),
    (rule(DAYS % 1, where("<Tag><Key>k</Key></Tag>")), {"tags": {"k": ""}},
     "2030-01-01", "expire"),
    (rule(DAYS % 1, where(TAG % ("k", "v"), TAG % ("l", "w"))),
     {"tags": {"k": "v", "l": "x"}}, "2030-01-01", None),
    (rule(DAYS % 1, where(LARGER % 2000)), {"size": 2000}, "2030-01-01",
     None),
    (rule(DAYS % 1, where(LARGER % 2000)), {"size": 2001}, "2030-01-01",
     "expire"),
    (rule(DAYS % 1, where(SMALLER % 2000)), {"size": 2000}, "2030-01-01",
     None),
    (rule(DAYS % 1, where(prefix("l"), SMALLER % 2000)), {"size": 1999},
     "2030-01-01", "expire"),
    # how many newer versions stay: s3-tests newer_noncurrent
    (rule(KEEP % (1, 5)), dict(OLD_VERSION, newer_count=4), "2030-01-01",
     None),
    (rule(KEEP % (1, 5)), dict(OLD_VERSION, newer_count=5), "2030-01-01",
     "remove"),
    (rule(KEEP % (1, 5)), dict(OLD_VERSION, newer_count=5),
     "2014-01-16 12:00", None),
    # delete markers
    (rule(MARKER), LONE_MARKER, "2014-01-15 10:31", "remove"),
    (rule(MARKER), dict(LONE_MARKER, only_version=False), "2030-01-01",
     None),
    (rule(MARKER), {}, "2030-01-01", None),
    (rule(MARKER.replace("true", "false")), LONE_MARKER, "2030-01-01", None),
    (rule(DAYS % 5), LONE_MARKER, "2014-01-20", None),
    (rule(DAYS % 5), LONE_MARKER, "2014-01-21", "remove"),
    (rule(DAYS % 5), dict(LONE_MARKER, only_version=False), "2030-01-01",
     None),
    (rule(OLD % 1), LONE_MARKER, "2030-01-01", None),
    # several at once: userguide/lifecycle-conflicts.html
    (rule(DAYS % 9 + MOVE % (1, "GLACIER")), {}, "2030-01-01", "expire"),
    (rule(DAYS % 9 + MOVE % (1, "GLACIER")), {"versioned": True},
     "2030-01-01", "transition GLACIER"),
    (rule(DAYS % 9 + MOVE % (1, "GLACIER")), {
        "versioned": True, "storage_class": "GLACIER"}, "2030-01-01",
     "expire"),
    (rule(OLD % 9 + MOVE_OLD % (1, "GLACIER")), OLD_VERSION, "2030-01-01",
     "remove"),
    (rule(OLD % 9 + MOVE_OLD % (1, "GLACIER")), OLD_VERSION, "2014-01-20",
     "transition GLACIER"),
    # transitions
    (rule(MOVE % (1, "GLACIER") + MOVE % (7, "DEEP_ARCHIVE")), {},
     "2014-01-18", "transition GLACIER"),
    (rule(MOVE % (1, "GLACIER") + MOVE % (7, "DEEP_ARCHIVE")), {},
     "2014-01-30", "transition DEEP_ARCHIVE"),
    (rule(MOVE % (1, "GLACIER")), {"storage_class": "DEEP_ARCHIVE"},
     "2030-01-01", None),
    (rule(MOVE % (1, "GLACIER")), {"storage_class": "REDUCED_REDUNDANCY"},
     "2030-01-01", "transition GLACIER"),
    (rule(MOVE % (30, "STANDARD_IA")), {"storage_class":
                                        "REDUCED_REDUNDANCY"},
     "2030-01-01", "transition STANDARD_IA"),
    (rule(MOVE % (1, "GLACIER")), {"storage_class": "SNOW"}, "2030-01-01",
     None),
    (rule(MOVE_AT % ("2030-01-01", "GLACIER")), {}, "2030-01-01",
     "transition GLACIER"),
    (rule(MOVE % (1, "GLACIER")), OLD_VERSION, "2030-01-01", None),
    (rule(MOVE % (1, "GLACIER")), {"size": 131071}, "2030-01-01", None),
    (rule(MOVE % (1, "GLACIER")), {"size": 131072}, "2030-01-01",
     "transition GLACIER"),
    (rule(MOVE % (1, "GLACIER"), where(LARGER % 9)), {"size": 10},
     "2030-01-01", "transition GLACIER"),
    (rule(MOVE_OLD % (1, "GLACIER")), dict(
        OLD_VERSION, is_delete_marker=True, size=0), "2030-01-01", None),
)


class LifecycleDue(DocumentCase):

    def test_what_is_due(self):
        for text, facts, now, action in DUE:
            with self.subTest((text, facts, now)):
                due = g.lifecycle_action(lifecycle(text), candidate(**facts),
                                         at(now))
                got = due and " ".join(filter(None, (due.action,
                                                     due.storage_class)))
                self.assertEqual(got, action)
                if due:
                    self.assertEqual(due.rule_id, "r")

    def test_a_short_day_is_not_rounded(self):
        value = lifecycle(rule(DAYS % 2))
        since = candidate().mtime
        for now, due in ((since + 19, None), (since + 19.9, None),
                         (since + 20, g.Due("expire", "r"))):
            self.assertEqual(g.lifecycle_action(
                value, candidate(), now, day_seconds=10), due)

    def test_small_objects_move_where_the_class_says_so(self):
        for asked, storage, small_bytes, moves in (
                (g.VARIES, "GLACIER", g.SMALL_BYTES, True),
                (g.VARIES, "DEEP_ARCHIVE", g.SMALL_BYTES, True),
                (g.VARIES, "GLACIER_IR", g.SMALL_BYTES, False),
                (g.ALL_128K, "GLACIER", g.SMALL_BYTES, False),
                (g.ALL_128K, "GLACIER", 0, True)):
            value = lifecycle(rule(MOVE % (1, storage)), minimum=asked)
            due = g.lifecycle_action(value, candidate(size=4),
                                     at("2030-01-01"), g.DAY_SECONDS,
                                     small_bytes)
            self.assertEqual(due is not None, moves, (asked, storage))

    def test_the_shortest_rule_that_holds_is_in_the_header(self):
        value = lifecycle(
            rule(DAYS % 9, name="nine"), rule(DAYS % 3, name="three"),
            rule(DAYS % 1, where(TAG % ("k", "v")), "tag"),
            rule(DAYS % 3, name="also three"),
            rule(DATE % "2014-01-02", where(prefix("x")), "date"),
            rule(MARKER, name="marker"),
            rule(DAYS % 1, name="off", status="Disabled"))
        mtime = at("2014-01-15 10:30")
        for key, tags, date, name in (
                ("a", {}, "Sun, 19 Jan 2014", "three"),
                ("a", {"k": "v"}, "Fri, 17 Jan 2014", "tag"),
                ("x", {}, "Thu, 02 Jan 2014", "date")):
            self.assertEqual(
                g.expiration_header(value, key, tags, 1, mtime),
                'expiry-date="%s 00:00:00 GMT", rule-id="%s"' % (date, name))
        self.assertIsNone(g.expiration_header(
            lifecycle(rule(MARKER)), "a", {}, 1, mtime))

    def test_the_header_can_be_sent_whatever_the_rule(self):
        for name, sent in (("Rule for testfile.txt",) * 2,
                           ("a&quot;b", "a%22b"), ("\u00e9", "%C3%A9"),
                           ("a\nb", "a%0Ab")):
            header = g.expiration_header(lifecycle(rule(
                DAYS % 2147483647, name=name)), "a", {}, 1, 1 << 40)
            self.assertEqual(header, 'expiry-date="Fri, 31 Dec 9999 00:00:00'
                             ' GMT", rule-id="%s"' % sent)

    def test_uploads(self):
        value = lifecycle(
            rule(ABORT % 2, where(prefix("test1/")), "two"),
            rule(ABORT % 1, where(prefix("test1/x")), "x one"),
            rule(ABORT % 1, where(prefix("test2/")), "off", "Disabled"))
        since = at("2014-01-15 10:30")
        for key, now, name in (
                ("test1/a", "2014-01-17", None),
                ("test1/a", "2014-01-18", "two"),
                ("test1/x", "2014-01-17", "x one"),
                ("test2/a", "2030-01-01", None)):
            self.assertEqual(g.upload_due(value, key, since, at(now)), name)
        self.assertEqual(g.upload_due(value, "test1/a", since, since + 20,
                                      10), "two")
        self.assertEqual(g.abort_headers(value, "test1/a", since), {
            "x-amz-abort-date": "Sat, 18 Jan 2014 00:00:00 GMT",
            "x-amz-abort-rule-id": "two"})
        self.assertEqual(g.abort_headers(value, "test2/a", since), {})

class LifecycleRequests(LockCase):
    """Rules put over HTTP and carried out by run_lifecycle()."""

    def setUp(self):
        super().setUp()
        self.unlock_tree()              # no versions, unless a test asks

    def put_rules(self, *rules):
        return self.document("/box", "lifecycle", "".join(rules),
                             "LifecycleConfiguration")

    def run_rules(self, days, day_seconds=86400):
        """Do what is due in so many days; how many things were done."""
        service = self.server.server.service._replace(
            day_seconds=day_seconds)
        return gos3rve.run_lifecycle(service, time.time()
                                     + days * day_seconds)

    def listed(self):
        answer = self.ok(self.s3.get("/box", {"versions": ""}))
        return [(e.tag, e.findtext("Key")) for e in answer.xml()
                if e.tag in ("Version", "DeleteMarker")]

    def test_rules_come_and_go(self):
        self.error(self.s3.get("/box", {"lifecycle": ""}),
                   "NoSuchLifecycleConfiguration", 404)
        text = rule(DAYS % 3, where(prefix("a/")))
        self.assertEqual(self.ok(self.put_rules(text)).headers[
            g.MINIMUM_SIZE_HEADER], "all_storage_classes_128K")
        answer = self.ok(self.s3.get("/box", {"lifecycle": ""}))
        self.assertEqual(answer.one("Rule/Expiration/Days"), "3")
        self.ok(self.s3.delete("/box", {"lifecycle": ""}), 204)
        self.error(self.s3.get("/box", {"lifecycle": ""}),
                   "NoSuchLifecycleConfiguration", 404)
        self.error(self.s3.put("/box", b"<LifecycleConfiguration/>",
                               {"lifecycle": ""}), "InvalidRequest")

    def test_objects_expire_and_files_by_hand_do_too(self):
        self.fill("a/old", "b/old")
        self.by_hand("a/by-hand")
        self.ok(self.put_rules(rule(DAYS % 3, where(prefix("a/")))))
        self.assertEqual(self.run_rules(2), 0)
        self.assertEqual(self.run_rules(4.1), 2)
        self.assertEqual(self.s3.keys("box"), ["b/old"])
        self.assertEqual(list(self.tree()), ["b/old"])

    def test_a_disabled_rule_does_nothing(self):
        self.fill("k")
        self.ok(self.put_rules(rule(DAYS % 1, status="Disabled")))
        self.assertEqual(self.run_rules(9), 0)

    def test_tags_and_sizes_choose(self):
        self.ok(self.s3.put("/box/tagged", b"x", headers={
            "x-amz-tagging": "t=v"}))
        self.ok(self.s3.put("/box/large", b"x" * 100))
        self.fill("small")
        self.ok(self.put_rules(
            rule(DAYS % 1, where(TAG % ("t", "v")), "tags"),
            rule(DAYS % 1, where(LARGER % 50), "sizes")))
        self.run_rules(3)
        self.assertEqual(self.s3.keys("box"), ["small"])

    def test_with_versions_a_marker_comes_first(self):
        self.switch_versions()
        self.fill("k", "k")
        self.ok(self.put_rules(
            rule(DAYS % 1, name="now"), rule(OLD % 1, name="old"),
            rule(MARKER, name="marker")))
        self.assertEqual(self.run_rules(2.1), 2)        # one old, a marker
        self.assertEqual(self.listed(), [("DeleteMarker", "k"),
                                         ("Version", "k")])
        self.assertEqual(self.run_rules(4.1), 1)
        self.assertEqual(self.run_rules(4.1), 1)        # the lone marker
        self.assertEqual(self.listed(), [])

    def test_newer_noncurrent_versions_are_kept(self):
        self.switch_versions()
        for number in range(5):
            self.ok(self.s3.put("/box/k", b"%d" % number))
        self.ok(self.put_rules(rule(KEEP % (1, 2))))
        self.assertEqual(self.run_rules(3), 2)
        self.assertEqual(len(self.listed()), 3)
        self.body("k", b"4")

    def test_a_locked_version_stays(self):
        self.switch_versions()
        self.ok(self.put_lock(
            "<ObjectLockEnabled>Enabled</ObjectLockEnabled>"))
        locked = self.put_version(legal_hold="ON")
        self.put_version()
        self.put_version()
        self.ok(self.put_rules(rule(OLD % 1)))
        self.assertEqual(self.run_rules(3), 1)
        self.assertEqual(self.ok(self.s3.get("/box/k", {
            "versionId": locked})).body, b"x")

    def run_behind(self, days, change):
        """run_rules(), and change() done after the rules' look at every
        key and upload, before what is due is done."""
        store, done = self.server.store, []

        def behind(look):
            def call(bucket):
                found = list(look(bucket))
                if not done:
                    done.append(change())
                return found
            return call
        with mock.patch.multiple(store, each_key=behind(store.each_key),
                                 list_uploads=behind(store.list_uploads)):
            return self.run_rules(days)

    def retag(self):
        self.ok(self.document("/box/k", "tagging", "<TagSet><Tag><Key>t"
                              "</Key><Value>keep</Value></Tag></TagSet>",
                              "Tagging"))

    def test_what_is_no_longer_due_under_the_lock_is_left(self):
        old = rule(OLD % 1)
        for rules, writes, change, left in (
                # the successor goes: it is the latest now
                (old, "vv", lambda ids: self.delete(ids[1]), 1),
                (old, "vM", lambda ids: self.delete(ids[1]), 1),
                # too few newer ones stand before it now
                (rule(KEEP % (1, 2)), "vvvv",
                 lambda ids: self.delete(ids[2]), 3),
                # what its rule asks for does not hold any more
                (old, "vv", lambda ids: self.ok(self.s3.delete(
                    "/box", {"lifecycle": ""}), 204), 2),
                (old, "vv", lambda ids: self.put_rules(
                    rule(OLD % 1, status="Disabled")), 2),
                (rule(DAYS % 1, where(TAG % ("t", "v"))), "v",
                 lambda ids: self.retag(), 1),
                (rule(MOVE % (1, "GLACIER"), where(
                    TAG % ("t", "v"), LARGER % 0)), "v",
                 lambda ids: self.retag(), 1),
                (rule(DAYS % 1, where(SMALLER % 2)), "v",
                 lambda ids: self.s3.put("/box/k", b"larger"), 2),
                # no longer the only version
                (rule(MARKER), "M", lambda ids: self.s3.put(
                    "/box/k", b"1"), 2)):
            with self.subTest(rules=rules, writes=writes):
                self.setUp()
                self.switch_versions()
                self.ok(self.put_rules(rules))
                ids = [(self.s3.put("/box/k", b"%d" % n, headers={
                    "x-amz-tagging": "t=v"}) if kind == "v"
                    else self.s3.delete("/box/k")).headers[
                        "x-amz-version-id"]
                       for n, kind in enumerate(writes)]
                self.assertEqual(self.run_behind(3, lambda: change(ids)), 0)
                self.assertEqual(len(self.listed()), left)
                self.assertNotIn("x-amz-storage-class", self.ok(
                    self.s3.head("/box/k")).headers)

    def test_a_hold_that_came_meanwhile_holds(self):
        self.switch_versions()
        self.ok(self.put_lock(
            "<ObjectLockEnabled>Enabled</ObjectLockEnabled>"))
        version = self.put_version()
        self.put_version()
        self.ok(self.put_rules(rule(OLD % 1)))
        self.assertEqual(self.run_behind(3, lambda: self.ok(
            self.hold("ON", versionId=version))), 0)
        self.assertEqual(len(self.listed()), 2)

    def test_an_upload_whose_rule_goes_meanwhile_is_left(self):
        upload = self.ok(self.s3.post("/box/k", {"uploads": ""})).one(
            "UploadId")
        self.ok(self.put_rules(rule(ABORT % 2)))
        self.assertEqual(self.run_behind(4, lambda: self.s3.delete(
            "/box", {"lifecycle": ""})), 0)
        self.ok(self.s3.get("/box/k", {"uploadId": upload}))

    def test_what_goes_in_one_run_is_not_counted_as_newer(self):
        self.switch_versions()
        for number in range(4):
            self.ok(self.s3.put("/box/k", b"%d" % number, headers={
                "x-amz-tagging": "t=%d" % number}))
        self.ok(self.put_rules(
            rule(OLD % 1, where(TAG % ("t", "2")), "newest"),
            rule(KEEP % (1, 1), name="behind it")))
        self.assertEqual(self.run_rules(3), 2)
        self.assertEqual(len(self.listed()), 2)     # the latest, and 1

    def test_uploads_are_aborted(self):
        upload = self.ok(self.s3.post("/box/k", {"uploads": ""})).one(
            "UploadId")
        self.ok(self.put_rules(rule(ABORT % 2)))
        answer = self.ok(self.s3.get("/box/k", {"uploadId": upload}))
        self.assertEqual(answer.headers["x-amz-abort-rule-id"], "r")
        self.assertIn("x-amz-abort-date", self.ok(self.s3.post(
            "/box/other", {"uploads": ""})).headers)
        self.assertEqual(self.run_rules(1), 0)
        self.assertEqual(self.run_rules(3.1), 2)
        self.error(self.s3.get("/box/k", {"uploadId": upload}),
                   "NoSuchUpload")

    def test_a_transition_changes_the_class_and_no_byte(self):
        self.ok(self.s3.put("/box/k", b"x" * 200000))
        self.fill("small")
        self.ok(self.put_rules(rule(MOVE % (1, "GLACIER_IR"))))
        self.assertEqual(self.run_rules(3), 1)
        answer = self.ok(self.s3.get("/box/k"))
        self.assertEqual(answer.headers["x-amz-storage-class"], "GLACIER_IR")
        self.assertEqual(answer.body, b"x" * 200000)
        self.assertEqual(self.run_rules(3), 0)

    def test_answers_name_the_expiration(self):
        self.ok(self.put_rules(rule(DAYS % 1, where(prefix("a")), "one")))
        for answer in (self.s3.put("/box/a", b"x"), self.s3.get("/box/a"),
                       self.s3.head("/box/a"),
                       self.s3.put("/box/ab", headers={
                           "x-amz-copy-source": "/box/a"})):
            self.assertRegex(self.ok(answer).headers["x-amz-expiration"],
                             r'expiry-date=".* GMT", rule-id="one"\Z')
        self.assertNotIn("x-amz-expiration",
                         self.ok(self.s3.put("/box/b", b"x")).headers)

    def test_a_server_does_it_by_itself(self):
        with gos3rve.serve(buckets=["box"], day_seconds=1) as server:
            client = Client(server.url, server.key_id, server.key_val)
            self.addCleanup(client.close)
            body = ("<LifecycleConfiguration>%s</LifecycleConfiguration>"
                    % rule(DAYS % 1)).encode()
            self.assertEqual(client.put("/box", body, {
                "lifecycle": ""}, headers={
                    "content-md5": digest64("md5", body)}).status, 200)
            client.put("/box/k", b"x")
            deadline = time.monotonic() + 20
            while client.keys("box") and time.monotonic() < deadline:
                time.sleep(0.1)
            self.assertEqual(client.keys("box"), [])


# --- websites ---

INDEX = "<IndexDocument><Suffix>index.html</Suffix></IndexDocument>"
ERROR = "<ErrorDocument><Key>error.html</Key></ErrorDocument>"
ALL = ("<RedirectAllRequestsTo><HostName>example.com</HostName>%s"
       "</RedirectAllRequestsTo>")


def routing(*rules):
    return "<RoutingRules>%s</RoutingRules>" % "".join(
        "<RoutingRule>%s<Redirect>%s</Redirect></RoutingRule>" % (
            condition and "<Condition>%s</Condition>" % condition, redirect)
        for condition, redirect in rules)


def tags(**elements):
    return "".join("<%s>%s</%s>" % (tag, value, tag)
                   for tag, value in elements.items())


def website(inner):
    return g.parse_website(document_element("WebsiteConfiguration", inner))


class WebsiteDocuments(DocumentCase):

    def test_what_is_taken_comes_back(self):
        for inner in (
                INDEX, INDEX + ERROR, ALL % "",
                ALL % "<Protocol>https</Protocol>",
                INDEX + ERROR + routing(
                    (tags(KeyPrefixEquals="docs/"),
                     tags(ReplaceKeyPrefixWith="documents/")),
                    (tags(HttpErrorCodeReturnedEquals=404),
                     tags(Protocol="https", HostName="h",
                          ReplaceKeyWith="x", HttpRedirectCode=302)),
                    ("", tags(HostName="h")))):
            with self.subTest(inner):
                value = self.kept(website(inner))
                self.assertEqual(plain_xml("X", g.website_children(value)),
                                 "<X>%s</X>" % inner)

    def test_what_is_refused(self):
        one = tags(HostName="h")
        for inner, code, message in (
                ("", "InvalidArgument", "A value for IndexDocument Suffix"),
                (ERROR, "InvalidArgument", "A value for IndexDocument"),
                (INDEX.replace("index.html", ""), "InvalidArgument",
                 "The IndexDocument Suffix is not well formed"),
                (INDEX.replace("index", "a/index"), "InvalidArgument",
                 "The IndexDocument Suffix is not well formed"),
                (INDEX + "<ErrorDocument/>", "MalformedXML", ""),
                (INDEX + ERROR.replace("error.html", ""), "InvalidArgument",
                 "The ErrorDocument Key is not well formed"),
                (ALL % "" + INDEX, "InvalidArgument",
                 "RedirectAllRequestsTo cannot be provided in conjunction"),
                (ALL.replace("example.com", "") % "", "InvalidRequest",
                 "A host name must be provided"),
                ("<RedirectAllRequestsTo/>", "MalformedXML", ""),
                (ALL % "<Protocol>ftp</Protocol>", "InvalidRequest",
                 "Invalid protocol, protocol can be http or https."),
                (INDEX + "<RoutingRules/>", "MalformedXML", ""),
                (INDEX + routing(("", "")), "MalformedXML", ""),
                (INDEX + routing((" ", one)), "InvalidRequest",
                 "Condition cannot be empty."),
                (INDEX + routing(("", tags(ReplaceKeyWith="a",
                                           ReplaceKeyPrefixWith="b"))),
                 "InvalidRequest", "You can only define ReplaceKeyPrefix or"),
                (INDEX + routing(("", tags(Protocol="x"))), "InvalidRequest",
                 "Invalid protocol"),
                (INDEX + routing((tags(HttpErrorCodeReturnedEquals=200),
                                  one)), "InvalidRequest",
                 "The provided HTTP error code (200) is not valid. Valid "
                 "codes are 4XX or 5XX."),
                (INDEX + routing(("", tags(HttpRedirectCode=300))),
                 "InvalidRequest", "The provided HTTP redirect code (300) is "
                 "not valid. Valid codes are 3XX except 300."),
                (INDEX + routing(*[("", one)] * 51), "InvalidRequest",
                 "51 routing rules provided, the number of routing rules")):
            with self.subTest(inner):
                self.refused(code, message, website, inner)

    def test_the_codes_that_a_rule_may_name(self):
        for tag, code, taken in (
                ("HttpErrorCodeReturnedEquals", 399, False),
                ("HttpErrorCodeReturnedEquals", 400, True),
                ("HttpErrorCodeReturnedEquals", 599, True),
                ("HttpErrorCodeReturnedEquals", 600, False),
                ("HttpRedirectCode", 300, False),
                ("HttpRedirectCode", 301, True),
                ("HttpRedirectCode", 399, True),
                ("HttpRedirectCode", 400, False)):
            pair = [tags(KeyPrefixEquals="a"), tags(HostName="h")]
            pair[tag == "HttpRedirectCode"] += tags(**{tag: code})
            inner = INDEX + routing(*[pair] * 50)
            with self.subTest((tag, code)):
                if taken:
                    website(inner)
                else:
                    self.refused("InvalidRequest", "The provided HTTP",
                                 website, inner)

    def page(self, inner, key, status=None, has_index=False):
        value = website(inner)
        if status is None:
            return g.website_page(value, key, "http", "site")
        return g.website_error_page(value, key, status, "http", "site",
                                    has_index)

    def test_what_is_looked_up(self):
        for key, found in (("", "index.html"), ("a/", "a/index.html"),
                           ("a", "a"), ("a/b.html", "a/b.html")):
            self.assertEqual(self.page(INDEX, key), (200, found, None))
        self.assertEqual(g.website_index(website(INDEX), "a"),
                         "a/index.html")

    def test_what_follows_a_miss(self):
        site = "http://site/"
        for inner, key, status, has_index, page in (
                (INDEX, "a", 404, False, (404, None, None)),
                (INDEX + ERROR, "a", 404, False, (404, "error.html", None)),
                (INDEX + ERROR, "a", 403, False, (403, "error.html", None)),
                (INDEX + ERROR, "a", 400, False, (400, "error.html", None)),
                (INDEX + ERROR, "a", 499, False, (499, "error.html", None)),
                (INDEX + ERROR, "a", 500, False, (500, None, None)),
                (INDEX + ERROR, "a", 304, False, (304, None, None)),
                (INDEX, "a", 405, True, (405, None, None)),
                (INDEX + ERROR, "a b", 404, True,
                 (302, None, site + "a%20b/")),
                (INDEX, "a", 403, True, (302, None, site + "a/")),
                (INDEX, "a/", 404, True, (404, None, None)),
                (INDEX, "", 404, True, (404, None, None))):
            with self.subTest((inner, key, status)):
                self.assertEqual(self.page(inner, key, status, has_index),
                                 page)

    def test_redirects(self):
        error = tags(HttpErrorCodeReturnedEquals=404)
        docs = tags(KeyPrefixEquals="docs/")
        for inner, key, status, page in (
                (ALL % "", "a/b c?", None,
                 (301, None, "http://example.com/a/b%20c%3F")),
                (ALL % "<Protocol>https</Protocol>", "", None,
                 (301, None, "https://example.com/")),
                # userguide/how-to-page-redirect.html, examples 1 to 3
                (INDEX + routing((docs, tags(
                    ReplaceKeyPrefixWith="documents/"))), "docs/a b", None,
                 (301, None, "http://site/documents/a%20b")),
                (INDEX + routing((tags(KeyPrefixEquals="images/"), tags(
                    ReplaceKeyWith="folderdeleted.html"))), "images/x", None,
                 (301, None, "http://site/folderdeleted.html")),
                (INDEX + routing((error, tags(
                    HostName="ec2.example.com",
                    ReplaceKeyPrefixWith="report-404/"))), "Page.html", 404,
                 (301, None, "http://ec2.example.com/report-404/Page.html")),
                (INDEX + routing((error, tags(HostName="h"))), "a", None,
                 (200, "a", None)),
                (INDEX + routing((error, tags(HostName="h"))), "a", 403,
                 (403, None, None)),
                (INDEX + routing((docs, tags(HostName="h"))), "a", None,
                 (200, "a", None)),
                (INDEX + routing((docs + error, tags(
                    HostName="h", HttpRedirectCode=307))), "docs/a", 404,
                 (307, None, "http://h/docs/a")),
                (INDEX + routing((docs + error, tags(HostName="h"))), "a",
                 404, (404, None, None)),
                (INDEX + routing((error, tags(ReplaceKeyPrefixWith="#!/"))),
                 "about", 404, (301, None, "http://site/#!/about")),
                (INDEX + routing(("", tags(Protocol="https"))), "a", None,
                 (301, None, "https://site/a")),
                (INDEX + routing((error, tags(ReplaceKeyWith="a&#13;&#10;b"))),
                 "x", 404, (301, None, "http://site/a%0D%0Ab"))):
            with self.subTest((inner, key, status)):
                self.assertEqual(self.page(inner, key, status), page)

class SiteRequests(OperationCase):
    """The website endpoint, by its host name, without a signature."""

    POLICY = {"Version": "2012-10-17", "Statement": [{
        "Effect": "Allow", "Principal": "*", "Action": "s3:GetObject",
        "Resource": "arn:aws:s3:::box/*"}]}

    def setUp(self):
        super().setUp()
        shutil.rmtree(self.path(gos3rve.STATE), ignore_errors=True)
        self.put_site(INDEX + ERROR)
        self.ok(self.s3.put("/box", json.dumps(self.POLICY).encode(),
                            {"policy": ""}), 204)
        for key in ("index.html", "dir/index.html", "error.html", "a.html"):
            self.ok(self.s3.put("/box/" + key, key.encode(), headers={
                "content-type": "text/html"}))

    def put_site(self, inner):
        return self.ok(self.s3.put("/box", (
            "<WebsiteConfiguration>%s</WebsiteConfiguration>"
            % inner).encode(), {"website": ""}))

    def site(self, path, method="GET", host="box.s3-website.localhost",
             **headers):
        path, _, query = path.partition("?")
        return self.s3.request(method, path, [
            (query.partition("=")[0], query.partition("=")[2])]
            if query else (), signed=False, headers=dict(
                {name.replace("_", "-"): v for name, v in headers.items()},
                host=host))

    def test_configuration_comes_and_goes(self):
        answer = self.ok(self.s3.get("/box", {"website": ""}))
        self.assertEqual(answer.one("IndexDocument/Suffix"), "index.html")
        self.ok(self.s3.delete("/box", {"website": ""}), 204)
        self.error(self.s3.get("/box", {"website": ""}),
                   "NoSuchWebsiteConfiguration", 404)
        self.assertEqual(self.site("/").status, 404)

    def test_pages_and_index_documents(self):
        for path, body in (("/", b"index.html"), ("/a.html", b"a.html"),
                           ("/dir/", b"dir/index.html")):
            answer = self.ok(self.site(path))
            self.assertEqual(answer.body, body)
            self.assertEqual(answer.headers["content-type"], "text/html")
        self.assertEqual(self.ok(self.site("/", "HEAD")).headers[
            "content-length"], "10")

    def test_each_form_of_the_host_name(self):
        for host in ("box.s3-website.localhost:1234",
                     "box.s3-website-eu-west-1.localhost",
                     "box.s3-website.us-east-1.localhost"):
            self.assertEqual(self.ok(self.site("/", host=host)).body,
                             b"index.html")

    def test_a_folder_without_its_slash_is_sent_there(self):
        answer = self.site("/dir")
        self.assertEqual((answer.status, answer.headers["location"]), (
            302, "http://box.s3-website.localhost/dir/"))

    def test_errors_are_the_error_document_or_html(self):
        answer = self.site("/none")
        self.assertEqual((answer.status, answer.body),
                         (403, b"error.html"))       # nobody may list
        self.put_site(INDEX)
        answer = self.site("/none<&>")
        self.assertEqual(answer.status, 403)
        self.assertIn(b"<li>Code: AccessDenied</li>", answer.body)
        self.assertEqual(answer.headers["x-amz-error-code"], "AccessDenied")
        self.assertNotIn(b"<&>", answer.body)
        self.assertIn(b"NoSuchBucket", self.site(
            "/", host="nobody.s3-website.localhost").body)

    def test_who_may_not_read_an_object_gets_403(self):
        self.ok(self.s3.delete("/box", {"policy": ""}), 204)
        self.assertEqual(self.site("/a.html").status, 403)

    def test_only_get_and_head(self):
        for method in ("PUT", "POST", "DELETE"):
            self.assertEqual(self.site("/a.html", method).status, 405)
        self.assertEqual(len(self.tree()), 4)

    def test_the_query_says_nothing(self):
        for query in ("?acl", "?delete", "?response-content-type=a",
                      "?versionId=x"):
            self.assertEqual(self.ok(self.site("/a.html" + query)).body,
                             b"a.html")

    def test_ranges_and_conditions(self):
        self.assertEqual(self.ok(self.site(
            "/a.html", range="bytes=0-0"), 206).body, b"a")
        etag = self.site("/a.html").headers["etag"]
        self.assertEqual(self.site("/a.html", if_none_match=etag).status,
                         304)
        self.assertEqual(self.site("/none", range="bytes=2-3").body,
                         b"error.html")

    def test_redirects(self):
        self.ok(self.s3.put("/box/old", headers={
            "x-amz-website-redirect-location": "/a.html"}))
        answer = self.site("/old")
        self.assertEqual((answer.status, answer.headers["location"]),
                         (301, "/a.html"))
        self.put_site(INDEX + routing((
            tags(KeyPrefixEquals="docs/"),
            tags(ReplaceKeyPrefixWith="new/"))))
        answer = self.site("/docs/x")
        self.assertEqual((answer.status, answer.headers["location"]), (
            301, "http://box.s3-website.localhost/new/x"))
        self.put_site(ALL % "<Protocol>https</Protocol>")
        answer = self.site("/x")
        self.assertEqual((answer.status, answer.headers["location"]),
                         (301, "https://example.com/x"))

    def test_a_requester_who_pays_cannot_be_anonymous(self):
        self.ok(self.s3.put("/box", b"<RequestPaymentConfiguration><Payer>"
                            b"Requester</Payer>"
                            b"</RequestPaymentConfiguration>",
                            {"requestPayment": ""}))
        self.assertEqual(self.site("/a.html").status, 403)


# --- encryption ---

CHUNK = g.SEAL_CHUNK_BYTES
HEADER, STEP = g.SEAL_HEADER_BYTES, CHUNK + g.SEAL_TAG_BYTES
SECRET, OTHER_SECRET = bytes(range(32)), bytes(range(1, 33))
SEQUENCE, OTHER_SEQUENCE = b"prefix00", b"prefix01"
# about every edge between 0 and 5 chunks
SEAL_SIZES = sorted({max(0, CHUNK * count + more) for count in range(6)
                   for more in (-1, 0, 1, 17)})


PINNED = (
    (0, "2218bbeff9e392e22c3b2a6c88690360"
        "d56c426dce4e6aca56011a36f90adba1"),
    (1, "ffd0f0e7fa7136be7c328c7c65583702"
        "600c0479219d1c8c88485c936adfbb32"),
    (65536, "c439c73b77698041963606ee6ee42cef"
        "24199159519193922e839f33cd01f57c"),
    (131149, "725efa1c026363977eeef28eaaf2cbfc"
        "164975396be356b28c2f3a7d32ad7f98"))


def plain_bytes(size, seed=1):
    return random.Random(seed).getrandbits(8 * size + 8).to_bytes(
        size + 1, "big")[:size]


def seal(plain, key=SECRET, prefix=SEQUENCE, step=None):
    sealer, sealed = g.Sealer(key, prefix), []
    for at in range(0, len(plain), step or len(plain) or 1):
        sealed.append(sealer.update(plain[at:at + step if step else None]))
    return b"".join(sealed + [sealer.finish()])


def reader(sealed, asked=None):
    def pread(length, offset):
        if asked is not None:
            asked.append((offset, length))
        return sealed[offset:offset + length]
    return pread


def unseal(sealed, size=None, start=0, stop=None, key=SECRET, prefix=SEQUENCE):
    size = g.plain_size(len(sealed)) if size is None else size
    return b"".join(g.open_range(
        reader(sealed), key, [g.Sequence(size, prefix)], start,
        size if stop is None else stop))


class Sealing(unittest.TestCase):

    def test_what_was_sealed_opens_at_every_size(self):
        for size in SEAL_SIZES:
            with self.subTest(size=size):
                plain = plain_bytes(size)
                sealed = seal(plain)
                self.assertEqual(len(sealed), g.sealed_size(size))
                self.assertEqual(g.plain_size(len(sealed)), size)
                self.assertEqual(unseal(sealed), plain)

    def test_the_blocks_that_plain_text_comes_in_do_not_matter(self):
        plain = plain_bytes(3 * CHUNK + 100)
        whole = seal(plain)
        for step in (1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK,
                     4 * CHUNK):
            with self.subTest(step=step):
                self.assertEqual(seal(plain, step=step), whole)
        sealer, random_, sealed, at = g.Sealer(SECRET, SEQUENCE), \
            random.Random(3), b"", 0
        while at < len(plain):
            step = random_.choice((0, 1, 7, 5000, CHUNK, 100000))
            sealed += sealer.update(memoryview(plain)[at:at + step])
            at += step
        self.assertEqual(sealed + sealer.finish(), whole)

    def test_update_with_nothing(self):
        sealer = g.Sealer(SECRET, SEQUENCE)
        self.assertEqual(sealer.update(b""), b"")
        self.assertEqual(sealer.finish(), seal(b""))

    def test_the_format_is_pinned(self):
        """Digests made with the package cryptography 48.0.0; who changes
        the format loses everybody's objects."""
        for size, digest in PINNED:
            plain = bytes(i * i % 251 for i in range(size))
            self.assertEqual(hashlib.sha256(seal(plain)).hexdigest(), digest)

    def test_a_header_tells_the_format_and_the_prefix(self):
        self.assertEqual(seal(b"x")[:HEADER],
                         b"\xffgos3\0\1\x10" + SEQUENCE)
        self.assertEqual(1 << g.SEAL_FORMAT[-1], CHUNK)
        self.assertEqual(g.read_header(seal(b"")[:HEADER]), SEQUENCE)

    def test_no_16_bytes_of_plain_text_are_in_the_sealed(self):
        plain = (b"the same words again and again, " * 5000)[:CHUNK + 5000]
        sealed = seal(plain)
        seen = {plain[at:at + 16] for at in range(64)}
        self.assertFalse(any(sealed[at:at + 16] in seen
                             for at in range(len(sealed))))

    def test_sizes_that_no_sealed_content_has(self):
        for size in (0, 1, 31, CHUNK + 33, CHUNK + 48, 2 * CHUNK + 49):
            with self.subTest(size=size), self.assertRaises(g.SealError):
                g.plain_size(size)

    def test_prefixes_of_another_length_are_refused(self):
        for prefix in (b"", SEQUENCE[1:], SEQUENCE + b"x"):
            with self.assertRaises(ValueError):
                seal(b"plain", prefix=prefix)

    def test_keys_of_another_length_are_refused(self):
        for key in (b"", bytes(16), bytes(31), bytes(33)):
            with self.assertRaises(ValueError):
                g.Sealer(key, SEQUENCE)


class SealedRanges(unittest.TestCase):

    def test_ranges_are_slices(self):
        random_ = random.Random(7)
        for size in SEAL_SIZES:
            plain = plain_bytes(size)
            sealed = seal(plain)
            edges = [0, size] + [random_.randint(0, size) for _ in range(8)]
            edges += [edge for edge in (CHUNK - 1, CHUNK, CHUNK + 1,
                                        4 * CHUNK) if edge <= size]
            for start in edges:
                for stop in edges:
                    if start <= stop:
                        self.assertEqual(
                            unseal(sealed, size, start, stop),
                            plain[start:stop], (size, start, stop))

    def test_only_the_chunks_that_a_range_meets_are_read(self):
        plain = plain_bytes(20 * CHUNK)
        asked = []
        blocks = list(g.open_range(
            reader(seal(plain), asked), SECRET,
            [g.Sequence(len(plain), SEQUENCE)], 9 * CHUNK + 5, 10 * CHUNK + 5))
        self.assertEqual(b"".join(blocks),
                         plain[9 * CHUNK + 5:10 * CHUNK + 5])
        self.assertEqual(asked, [(0, HEADER), (HEADER + 9 * STEP, 2 * STEP)])

    def test_blocks_are_bounded_and_never_empty(self):
        plain = plain_bytes(20 * CHUNK + 1)
        sizes = [len(block) for block in g.open_range(
            reader(seal(plain)), SECRET, [g.Sequence(len(plain), SEQUENCE)], 0,
            len(plain))]
        self.assertEqual(max(sizes), 4 * CHUNK)
        self.assertTrue(all(sizes))

    def test_a_reader_may_give_less_than_asked(self):
        plain = plain_bytes(2 * CHUNK + 9)
        sealed = seal(plain)
        got = b"".join(g.open_range(
            lambda length, at: sealed[at:at + min(length, 1000)], SECRET,
            [g.Sequence(len(plain), SEQUENCE)], 10, len(plain)))
        self.assertEqual(got, plain[10:])

    def test_parts_of_any_size_read_as_one(self):
        random_ = random.Random(11)
        for _ in range(12):
            sizes = [random_.choice((0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1,
                                     3 * CHUNK + 7))
                     for _ in range(random_.randint(1, 6))]
            parts = [plain_bytes(size, number)
                     for number, size in enumerate(sizes)]
            sequences = [g.Sequence(len(part), g.new_prefix())
                         for part in parts]
            plain = b"".join(parts)
            sealed = b"".join(seal(part, prefix=sequence.prefix)
                              for part, sequence in zip(parts, sequences))
            for _ in range(20):
                start = random_.randint(0, len(plain))
                stop = random_.randint(start, len(plain))
                got = g.open_range(reader(sealed), SECRET, sequences, start,
                                     stop)
                self.assertEqual(b"".join(got), plain[start:stop])
            self.assertEqual(b"".join(g.open_range(
                reader(sealed), SECRET, sequences, 0, len(plain))), plain)


class Tampering(unittest.TestCase):

    def setUp(self):
        self.plain = plain_bytes(3 * CHUNK + 100)
        self.sealed = seal(self.plain)

    def refuses(self, sealed, **options):
        with self.assertRaises(g.SealError):
            unseal(bytes(sealed), len(self.plain), **options)

    def chunks(self):
        """The header, and each chunk."""
        return [self.sealed[:HEADER]] + [
            self.sealed[at:at + STEP]
            for at in range(HEADER, len(self.sealed), STEP)]

    def test_any_changed_byte(self):
        random_ = random.Random(5)
        places = list(range(HEADER)) + [
            HEADER + at for at in (0, CHUNK - 1, CHUNK, STEP - 1, STEP)]
        places += [len(self.sealed) - 1, len(self.sealed) - 17]
        places += [random_.randrange(len(self.sealed)) for _ in range(40)]
        for place in places:
            sealed = bytearray(self.sealed)
            sealed[place] ^= 1 << random_.randrange(8)
            with self.subTest(place=place):
                self.refuses(sealed)

    def test_every_byte_of_a_short_one(self):
        sealed = seal(b"short")
        for place in range(len(sealed)):
            changed = bytearray(sealed)
            changed[place] ^= 0x80
            with self.assertRaises(g.SealError):
                unseal(bytes(changed))

    def test_chunks_before_the_changed_one_still_come(self):
        plain = plain_bytes(8 * CHUNK)
        sealed = bytearray(seal(plain))
        sealed[HEADER + 6 * STEP] ^= 1
        blocks = g.open_range(reader(bytes(sealed)), SECRET,
                                [g.Sequence(len(plain), SEQUENCE)], 0,
                                len(plain))
        self.assertEqual(next(blocks), plain[:4 * CHUNK])
        with self.assertRaises(g.SealError):
            next(blocks)

    def test_a_cut_at_any_place(self):
        for length in (0, 1, HEADER, CHUNK, HEADER + STEP,
                       HEADER + 3 * STEP, len(self.sealed) - 1):
            self.refuses(self.sealed[:length])

    def test_a_cut_at_a_chunk_even_when_the_size_is_told_so(self):
        for count in (1, 2, 3):
            sealed = self.sealed[:HEADER + count * STEP]
            with self.assertRaises(g.SealError):
                unseal(sealed, count * CHUNK)
            with self.assertRaises(g.SealError):
                unseal(sealed)

    def test_a_longer_one_is_no_size_or_no_sequence(self):
        for more in (b"x", bytes(16), bytes(17), self.chunks()[1]):
            with self.assertRaises(g.SealError):
                unseal(self.sealed + more)

    def test_chunks_in_another_order(self):
        header, first, second, third, last = self.chunks()
        self.refuses(header + second + first + third + last)
        self.refuses(header + first + first + third + last)
        self.refuses(header + first + third + last)
        self.refuses(first + second + third + last)

    def test_chunks_of_another_object(self):
        other = seal(self.plain, prefix=OTHER_SEQUENCE)
        self.refuses(other)
        for end in (HEADER, HEADER + STEP):
            self.refuses(other[:end] + self.sealed[end:])
            self.refuses(self.sealed[:end] + other[end:])
        self.refuses(seal(self.plain, key=OTHER_SECRET))

    def test_an_empty_object_is_checked_too(self):
        sealed = seal(b"")
        self.assertEqual(unseal(sealed), b"")
        with self.assertRaises(g.SealError):
            unseal(sealed, key=OTHER_SECRET)
        with self.assertRaises(g.SealError):
            unseal(sealed[:HEADER] + bytes(16))

    def test_another_version_of_the_format(self):
        for format_ in (b"\2\x10", b"\1\x11"):
            self.refuses(g.SEAL_MAGIC + format_ + self.sealed[8:])

    def test_parts_in_another_order(self):
        parts = [plain_bytes(CHUNK, 1), plain_bytes(CHUNK, 2)]
        one, two = [seal(part, prefix=prefix) for part, prefix in zip(
            parts, (SEQUENCE, OTHER_SEQUENCE))]
        sequences = [g.Sequence(CHUNK, SEQUENCE),
                     g.Sequence(CHUNK, OTHER_SEQUENCE)]
        for sealed in (two + one, one + one, two + two):
            with self.assertRaises(g.SealError):
                list(g.open_range(reader(sealed), SECRET, sequences, 0,
                                    2 * CHUNK))

    def test_a_failure_leaves_nothing_for_ssl_to_stumble_over(self):
        with self.assertRaises(g.SealError):
            g.AesGcm(SECRET, True)._tag(0x7777, None)    # no such control
        ctypes = g.libcrypto().ctypes
        function = ctypes.PyDLL(next(g._crypto_paths(
            ctypes.util))).ERR_peek_error
        function.restype = ctypes.c_ulong
        self.assertEqual(function(), 0)


class LibcryptoFound(unittest.TestCase):

    def test_it_is_loaded_at_the_first_use_only(self):
        code = ("import sys; sys.path.insert(0, %r); import gos3rve; "
                "print('ctypes' in sys.modules); gos3rve.libcrypto(); "
                "print('ctypes' in sys.modules)" % HERE)
        out = subprocess.run([sys.executable, "-c", code], check=True,
                             stdout=subprocess.PIPE).stdout.split()
        self.assertEqual(out, [b"False", b"True"])

    def test_without_it_the_answer_is_501(self):
        with mock.patch.object(g, "libcrypto", lambda: None):
            for act in (lambda: g.Sealer(SECRET, SEQUENCE),
                        lambda: g.wrap_key(SECRET, SECRET, []),
                        lambda: unseal(bytes(32))):
                with self.assertRaises(g.S3Error) as caught:
                    act()
                self.assertEqual(caught.exception.status, 501)

    def test_what_is_no_libcrypto_is_passed_over(self):
        found = g.libcrypto.__wrapped__
        with mock.patch.object(g, "_crypto_paths", lambda _: [
                "/nowhere/libcrypto.so.3", "libc.so.6"]):
            self.assertIsNone(found())

    def test_it_is_found_by_name_when_ssl_hides_its_own(self):
        paths = list(g._crypto_paths(mock.Mock()))
        self.assertTrue(set(g._CRYPTO_NAMES) < set(paths))
        self.assertNotIn("libcrypto.dylib", paths)
        with mock.patch.object(sys, "platform", "darwin"):
            util = mock.Mock()
            list(g._crypto_paths(util))
            util.find_library.assert_not_called()

    def test_a_library_that_computes_wrong_is_not_used(self):
        with mock.patch.object(g, "_knows_gcm", lambda _: False):
            self.assertIsNone(g.libcrypto.__wrapped__())

    def test_threads_do_not_disturb_each_other(self):
        plain, wrong = plain_bytes(5 * CHUNK), []

        def work(number):
            prefix = b"%08d" % number
            for _ in range(10):
                if unseal(seal(plain, prefix=prefix),
                          prefix=prefix) != plain:
                    wrong.append(number)
        threads = [threading.Thread(target=work, args=(number,))
                   for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])


class WrappedKeys(unittest.TestCase):

    def test_a_wrapped_key_unwraps(self):
        text = g.wrap_key(SECRET, OTHER_SECRET, ["b", "k"])
        self.assertEqual(len(text), 80)
        self.assertEqual(g.unwrap_key(SECRET, text, ("b", "k")), OTHER_SECRET)
        self.assertNotEqual(text, g.wrap_key(SECRET, OTHER_SECRET, ["b", "k"]))

    def test_key_text_and_context_are_bound(self):
        text = g.wrap_key(SECRET, OTHER_SECRET, ["b", "k"])
        data = bytearray(base64.b64decode(text))
        data[30] ^= 1
        for master, wrapped, context in (
                (OTHER_SECRET, text, ["b", "k"]),
                (SECRET, base64.b64encode(data).decode(), ["b", "k"]),
                (SECRET, text, ["b", "K"]), (SECRET, text, ["bk"]),
                (SECRET, text, ["b"]), (SECRET, text, ["b", "k", ""]),
                (SECRET, text, []), (SECRET, text[:-4], ["b", "k"]),
                (SECRET, "", ["b", "k"]),
                (SECRET, "no base64 \xe4", ["b", "k"])):
            with self.assertRaises(g.SealError):
                g.unwrap_key(master, wrapped, context)

    def test_an_etag_is_the_keys_own(self):
        md5 = hashlib.md5(b"x").digest()
        etag = g.sealed_etag(SECRET, md5)
        self.assertRegex(etag, r"\A[0-9a-f]{32}\Z")
        self.assertEqual(etag, g.sealed_etag(SECRET, md5))
        self.assertNotIn(etag, (md5.hex(), g.sealed_etag(OTHER_SECRET, md5)))


class KeyFiles(unittest.TestCase):

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, "new", "sse.json")

    def write(self, text, mode=0o600):
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(self.path, mode)

    def test_it_is_made_once_and_loaded_ever_after(self):
        keys, made = g.ensure_master_keys(self.path)
        self.assertTrue(made)
        self.assertEqual(len(keys.default), 32)
        self.assertEqual(g.ensure_master_keys(self.path), (keys, False))
        self.assertEqual(g.load_master_keys(self.path), keys)
        self.assertEqual(os.listdir(os.path.dirname(self.path)),
                         ["sse.json"])
        if os.name != "nt":
            self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o600)

    def race(self):
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import gos3rve;"
                "keys, made = gos3rve.ensure_master_keys(sys.argv[2]);"
                "print(keys.default.hex(), made)")
        workers = [subprocess.Popen(
            [sys.executable, "-c", code, HERE, self.path],
            stdout=subprocess.PIPE, universal_newlines=True)
            for _ in range(4)]
        return [(key, made == "True") for key, made in (
            worker.communicate(timeout=60)[0].split() for worker in workers)]

    def test_processes_that_race_end_with_one_key(self):
        results = self.race()
        self.assertEqual(len({key for key, _ in results}), 1)
        self.assertEqual(sum(made for _, made in results), 1)

    def test_the_loser_of_a_race_takes_the_winners(self):
        keys, _ = g.ensure_master_keys(self.path)
        with mock.patch("os.path.lexists", lambda path: False):
            self.assertEqual(g.ensure_master_keys(self.path),
                             (keys, False))
            with mock.patch("os.link", side_effect=PermissionError(1, "")):
                self.assertEqual(g.ensure_master_keys(self.path),
                                 (keys, False))

    def test_without_hard_links(self):
        with mock.patch("os.link", side_effect=PermissionError(1, "no")):
            keys, made = g.ensure_master_keys(self.path)
        self.assertTrue(made)
        self.assertEqual(g.load_master_keys(self.path), keys)

    def test_what_is_wrong_is_one_sentence(self):
        good = base64.b64encode(SECRET).decode()
        for text, words in (
                ("", "no JSON"), ("{", "no JSON"), ("[]", "not an object"),
                ("{}", '"default"'), ('{"default": 1}', '"default"'),
                ('{"default": "c2hvcnQ="}', "32 bytes"),
                (json.dumps({"default": good, "key": {}}), "not an object"),
                (json.dumps({"default": good, "keys": []}), "key ids"),
                (json.dumps({"default": good, "keys": {"": good}}),
                 "key ids"),
                (json.dumps({"default": good, "keys": {"a\n": good}}),
                 "key ids"),
                (json.dumps({"default": good, "keys": {"a": "x"}}), '"a"')):
            self.write(text)
            with self.subTest(text=text), self.assertRaises(
                    ValueError) as caught:
                g.load_master_keys(self.path)
            self.assertIn(words, str(caught.exception))
            self.assertIn(self.path, str(caught.exception))
            self.assertNotIn(good, str(caught.exception))

    def test_a_missing_file_is_a_sentence_too(self):
        with self.assertRaisesRegex(ValueError, "cannot be read"):
            g.load_master_keys(self.path)

    def test_a_directory_that_is_none(self):
        self.write("")
        with self.assertRaisesRegex(ValueError, "cannot be made"):
            g.ensure_master_keys(os.path.join(self.path, "below"))

    @unittest.skipIf(os.name == "nt", "no modes on Windows")
    def test_a_file_that_others_may_read_is_refused(self):
        text = json.dumps({"default": base64.b64encode(SECRET).decode()})
        for mode, good in ((0o600, True), (0o400, True), (0o440, True),
                           (0o604, False), (0o620, False), (0o601, False)):
            self.write(text, mode)
            with self.subTest(mode=oct(mode)):
                if good:
                    self.assertEqual(g.load_master_keys(self.path).default,
                                     SECRET)
                else:
                    with self.assertRaisesRegex(ValueError, "chmod 600"):
                        g.load_master_keys(self.path)

    def test_key_ids_and_their_arns(self):
        arn = "arn:aws:kms:eu-west-1:111122223333:"
        keys = g.MasterKeys(SECRET, {
            "one": OTHER_SECRET, arn + "key/two": SECRET,
            "alias/three": OTHER_SECRET})
        for key_id, key in (
                ("one", OTHER_SECRET), (arn + "key/one", OTHER_SECRET),
                (arn + "key/two", SECRET), (arn + "alias/three", OTHER_SECRET),
                ("alias/aws/s3", SECRET), (arn + "alias/aws/s3", SECRET)):
            self.assertEqual(keys.find(key_id), key)
        for key_id in ("two", "ONE", "", "three", "key/one", "arn:one",
                       arn, "aws/s3", arn.replace("eu", "eu\r\nx: y")
                       + "key/one", arn.replace("eu", "\xe4") + "key/one"):
            with self.assertRaises(g.S3Error) as caught:
                keys.find(key_id)
            self.assertEqual(caught.exception.code, "KMS.NotFoundException")
            self.assertEqual(caught.exception.status, 400)


def b64(data):
    return base64.b64encode(data).decode()


def md5_of(key):
    return b64(hashlib.md5(key).digest())


SSE = "x-amz-server-side-encryption"


def sse_c(key=SECRET, prefix=g.CUSTOMER, **changes):
    """SSE-C headers; None leaves one out."""
    headers = {"algorithm": "AES256", "key": key and b64(key),
               "key_md5": md5_of(key or SECRET)}
    headers.update(changes)
    return {prefix + name.replace("_", "-"): value
            for name, value in headers.items() if value is not None}


class EncryptionCase(unittest.TestCase):

    def refuses(self, code, status, words, act, *args, **options):
        with self.assertRaises(g.S3Error) as caught:
            act(*args, **options)
        error = caught.exception
        self.assertEqual((error.code, error.status), (code, status))
        self.assertIn(words, error.message)
        return error


class CustomerKeys(EncryptionCase):

    def test_a_key(self):
        self.assertIsNone(g.customer_key({"content-type": "x"}))
        self.assertEqual(g.customer_key(sse_c()), SECRET)
        copied = sse_c(prefix=g.COPY_CUSTOMER)
        self.assertIsNone(g.customer_key(copied))
        self.assertEqual(g.customer_key(copied, g.COPY_CUSTOMER), SECRET)

    def test_cephs_keys_and_md5s(self):
        """s3-tests, test_encryption_sse_c_other_key"""
        for key, md5 in (
                ("pO3upElrwuEXSoFwCfnZPdSsmt/xWeFa0N9KgDijwVs=",
                 "DWygnHRtgiJ77HCm+1rvHw=="),
                ("6b+WOZ1T3cqZMxgThRcXAQBrS5mXKdDUphvpxptl9/4=",
                 "arxBvwY2V4SiOne6yppVPQ==")):
            headers = dict(customer_text(key), **{
                g.CUSTOMER + "key-md5": md5})
            self.assertEqual(g.customer_key(headers),
                             base64.b64decode(key))

    def test_what_aws_answers(self):
        argument, ten = "InvalidArgument", bytes(10)
        algorithm = "InvalidEncryptionAlgorithmError"
        for code, words, headers in (
                (argument, "an appropriate secret key", sse_c(key=None)),
                (argument, "an appropriate secret key",
                 sse_c(key=None, key_md5=None)),
                (argument, "an appropriate secret key",
                 sse_c(key=None, algorithm=None)),
                (argument, "a valid encryption algorithm",
                 sse_c(algorithm=None)),
                (argument, "a valid encryption algorithm",
                 sse_c(algorithm=None, key_md5=None)),
                (algorithm, "Supported value", sse_c(algorithm="KMS")),
                (algorithm, "Supported value", sse_c(algorithm="aes256")),
                (algorithm, "Supported value", sse_c(algorithm="")),
                (argument, "calculated MD5 of", sse_c(key_md5=None)),
                (argument, "did not match", sse_c(
                    key_md5="AAAAAAAAAAAAAAAAAAAAAA==")),
                (argument, "improperly encoded", sse_c(
                    key_md5="not-valid-base64!!!")),
                (argument, "did not match", customer_text(
                    "not-valid-base64!!!")),
                (argument, "too short", customer_text("####")),
                (argument, "too short", customer_text("")),
                (argument, "invalid for the specified", sse_c(ten)),
                (argument, "invalid for the specified",
                 sse_c(bytes(33)))):
            with self.subTest(words=words, headers=headers):
                error = self.refuses(code, 400, words, g.customer_key,
                                     headers)
                self.assertEqual(error.fields["ArgumentName"], SSE)
                self.assertNotIn(b64(SECRET), str(error.fields))

    def test_reading_asks_for_no_md5_and_a_short_key_is_a_wrong_one(self):
        self.assertEqual(g.customer_key(sse_c(key_md5=None),
                                          writes=False), SECRET)
        self.refuses("AccessDenied", 403, "correct secret key",
                     g.customer_key, sse_c(bytes(10)), writes=False)
        self.refuses("InvalidArgument", 400, "did not match",
                     g.customer_key, sse_c(key_md5=md5_of(b"other")),
                     writes=False)


def customer_text(text):
    """SSE-C headers with a key that is no base64 of anything."""
    return {g.CUSTOMER + "algorithm": "AES256", g.CUSTOMER + "key": text,
            g.CUSTOMER + "key-md5": md5_of(SECRET)}


class EncryptionOfWrites(EncryptionCase):

    KMS = {SSE: "aws:kms", g.KMS_KEY_HEADER: "k1"}
    CONTEXT = b64(b'{"a": "b"}')

    def test_what_a_put_gets(self):
        s3 = g.BucketEncryption("AES256")
        kms = g.BucketEncryption("aws:kms", "k2", True)
        managed = g.BucketEncryption("aws:kms")
        for headers, default, expected in (
                ({}, None, None),
                ({}, g.BucketEncryption(), None),
                ({}, g.BucketEncryption(blocked=("SSE-C",)), None),
                ({}, s3, g.Encryption("AES256")),
                ({}, kms, g.Encryption("aws:kms", "k2", None, True)),
                ({}, managed, g.Encryption("aws:kms", "alias/aws/s3")),
                ({SSE: "AES256"}, None, g.Encryption("AES256")),
                ({SSE: "AES256"}, kms, g.Encryption("AES256")),
                ({SSE: "AES256", g.BUCKET_KEY_HEADER: "true"}, None,
                 g.Encryption("AES256")),
                (self.KMS, None, g.Encryption("aws:kms", "k1")),
                (self.KMS, kms, g.Encryption("aws:kms", "k1", None, True)),
                (dict(self.KMS, **{g.BUCKET_KEY_HEADER: "False"}), kms,
                 g.Encryption("aws:kms", "k1")),
                ({g.BUCKET_KEY_HEADER: "true"}, managed,
                 g.Encryption("aws:kms", "alias/aws/s3", None, True)),
                ({SSE: "aws:kms"}, kms,
                 g.Encryption("aws:kms", "alias/aws/s3", None, True)),
                (dict(self.KMS, **{g.KMS_CONTEXT_HEADER: self.CONTEXT}),
                 s3, g.Encryption("aws:kms", "k1", self.CONTEXT)),
                (sse_c(), kms, g.Encryption("SSE-C", customer_key=SECRET)),
                (sse_c(), g.BucketEncryption(blocked=("NONE",)),
                 g.Encryption("SSE-C", customer_key=SECRET))):
            with self.subTest(headers=headers, default=default):
                self.assertEqual(g.put_encryption(headers, default),
                                 expected)

    def test_what_is_refused(self):
        argument = "InvalidArgument"
        for code, status, words, headers in (
                (argument, 400, "is incompatible",
                 dict(sse_c(algorithm="KMS"), **{SSE: "AES256"})),
                (argument, 400, "is incompatible",
                 dict(sse_c(), **self.KMS)),
                (argument, 400, "not supported", {SSE: "aes:kms"}),
                (argument, 400, "not supported", {SSE: ""}),
                (argument, 400, "not supported", {SSE: "aws:fsx"}),
                (argument, 400, "requires HTTP header",
                 {SSE: "AES256", g.KMS_KEY_HEADER: "k1"}),
                (argument, 400, "requires HTTP header",
                 {g.KMS_KEY_HEADER: "k1"}),
                (argument, 400, "requires HTTP header",
                 {g.KMS_CONTEXT_HEADER: self.CONTEXT}),
                (argument, 400, "not a boolean",
                 dict(self.KMS, **{g.BUCKET_KEY_HEADER: "yes"})),
                ("NotImplemented", 501, "dsse", {SSE: "aws:kms:dsse"})):
            with self.subTest(headers=headers):
                self.refuses(code, status, words, g.put_encryption,
                             headers)

    def test_a_context_is_a_map_of_texts(self):
        for text in ("x", "", b64(b"[]"), b64(b"{"), b64(b'{"a": 1}'),
                     b64(b'{"a": {"b": "c"}}'), b64(b"\xff"), "\xe4",
                     b64(b'{"a":' * 5000 + b'"b"' + b"}" * 5000)):
            self.refuses("InvalidArgument", 400, "string-string map",
                         g.put_encryption, dict(
                             self.KMS, **{g.KMS_CONTEXT_HEADER: text}))

    def test_a_bucket_may_block_customer_keys(self):
        self.refuses("AccessDenied", 403, "SSE-C", g.put_encryption,
                     sse_c(), g.BucketEncryption("AES256",
                                                  blocked=("SSE-C",)))

    def test_a_copy_onto_itself_may_change_the_encryption(self):
        self.assertTrue(g.names_encryption({SSE: "AES256"}))
        self.assertTrue(g.names_encryption(sse_c()))
        self.assertFalse(g.names_encryption(
            sse_c(prefix=g.COPY_CUSTOMER)))


class EncryptionOfReads(EncryptionCase):

    def test_only_uploads_choose_an_encryption(self):
        g.check_read_headers(sse_c())
        for name in (SSE, g.KMS_KEY_HEADER, g.KMS_CONTEXT_HEADER,
                     g.BUCKET_KEY_HEADER):
            self.refuses("InvalidArgument", 400, "not supported for this",
                         g.check_read_headers, {name: "AES256"})

    def test_the_key_goes_with_the_object(self):
        for prefix in (g.CUSTOMER, g.COPY_CUSTOMER):
            headers = sse_c(prefix=prefix)
            self.assertEqual(g.read_key(headers, "SSE-C", prefix), SECRET)
            self.refuses("InvalidRequest", 400, "was stored using a form",
                         g.read_key, {}, "SSE-C", prefix)
            for algorithm in (None, "AES256", "aws:kms"):
                self.assertIsNone(g.read_key({}, algorithm, prefix))
                self.refuses("InvalidRequest", 400, "not applicable",
                             g.read_key, headers, algorithm, prefix)

    def test_parts_go_with_their_upload(self):
        words = "Subsequent part requests must include"
        self.assertEqual(g.part_key(sse_c(), "SSE-C"), SECRET)
        self.assertIsNone(g.part_key({}, "SSE-C", required=False))
        self.assertEqual(g.part_key(sse_c(), "SSE-C", required=False),
                         SECRET)
        self.refuses("InvalidRequest", 400, words, g.part_key, {},
                     "SSE-C")
        for algorithm in (None, "AES256", "aws:kms"):
            self.assertIsNone(g.part_key({}, algorithm))
            for required in (True, False):
                self.refuses("InvalidRequest", 400, words, g.part_key,
                             sse_c(), algorithm, required)

    def test_what_answers_say(self):
        kms = g.Encryption("aws:kms", "k1", "e30=", True)
        for encryption, with_context, expected in (
                (None, True, {}),
                (g.Encryption("AES256"), True, {SSE: "AES256"}),
                (kms, False, {SSE: "aws:kms", g.KMS_KEY_HEADER: "k1",
                              g.BUCKET_KEY_HEADER: "true"}),
                (kms, True, {SSE: "aws:kms", g.KMS_KEY_HEADER: "k1",
                             g.BUCKET_KEY_HEADER: "true",
                             g.KMS_CONTEXT_HEADER: "e30="}),
                (g.Encryption("aws:kms", "k1"), True,
                 {SSE: "aws:kms", g.KMS_KEY_HEADER: "k1"}),
                (g.Encryption("SSE-C"), False, {}),
                (g.Encryption("SSE-C", customer_key=SECRET), False,
                 {g.CUSTOMER + "algorithm": "AES256",
                  g.CUSTOMER + "key-MD5": md5_of(SECRET)})):
            self.assertEqual(g.encryption_headers(
                encryption, with_context), expected)


class Envelopes(EncryptionCase):

    MASTERS = g.MasterKeys(SECRET, {"k1": OTHER_SECRET})
    CASES = (g.Encryption("AES256"), g.Encryption("aws:kms", "k1"),
             g.Encryption("aws:kms", "k1", "e30=", True),
             g.Encryption("aws:kms", "alias/aws/s3"),
             g.Encryption("SSE-C", customer_key=bytes(32)))

    def test_an_envelope_opens_and_tells_its_encryption(self):
        for encryption in self.CASES:
            key, sse = g.make_envelope(encryption, self.MASTERS, ("x",))
            sse = json.loads(json.dumps(sse))
            customer_key = encryption.customer_key
            self.assertEqual(g.open_envelope(
                sse, customer_key, self.MASTERS, ("x",)), key)
            self.assertEqual(g.known_encryption(sse, customer_key),
                             encryption)
            self.assertNotIn(b64(key), json.dumps(sse))
            self.assertNotIn(b64(bytes(32)), json.dumps(sse))

    def test_every_object_has_a_key_of_its_own(self):
        keys = {g.make_envelope(self.CASES[0], self.MASTERS)[0]
                for _ in range(20)}
        self.assertEqual(len(keys), 20)

    def test_customer_keys_need_no_master_keys(self):
        key, sse = g.make_envelope(self.CASES[-1], None)
        self.assertEqual(g.open_envelope(sse, bytes(32), None), key)

    def test_the_same_data_key_can_be_wrapped_again(self):
        key, _ = g.make_envelope(self.CASES[0], self.MASTERS)
        again, sse = g.make_envelope(self.CASES[1], self.MASTERS, (), key)
        self.assertEqual(again, key)
        self.assertEqual(g.open_envelope(sse, None, self.MASTERS), key)

    def test_a_wrong_customer_key(self):
        _, sse = g.make_envelope(self.CASES[-1], None)
        self.refuses("AccessDenied", 403, "the correct secret key",
                     g.open_envelope, sse, SECRET, None)
        self.refuses("InvalidRequest", 400, "did not match the ones",
                     g.open_envelope, sse, SECRET, None,
                     wrong=g.WRONG_PART_KEY)

    def test_a_key_that_the_file_has_not(self):
        for key_id in ("testkey-not-present", "aws/s3"):
            self.refuses("KMS.NotFoundException", 400,
                         "Invalid keyId '%s'" % key_id, g.make_envelope,
                         g.Encryption("aws:kms", key_id), self.MASTERS)

    def test_a_record_names_its_master_key(self):
        for encryption in self.CASES:
            _, sse = g.make_envelope(encryption, self.MASTERS)
            if encryption.algorithm == "SSE-C":
                self.assertNotIn("master", sse)
                continue
            others = g.MasterKeys(bytes(32), {"k1": bytes(32)})
            with self.assertRaisesRegex(g.SealError, sse["master"]):
                g.open_envelope(sse, None, others)
            moved = g.MasterKeys(bytes(32), dict(
                others.keys, old=self.MASTERS.default,
                older=self.MASTERS.keys["k1"]))
            self.assertEqual(g.open_envelope(sse, None, moved),
                             g.open_envelope(sse, None, self.MASTERS))

    def test_a_changed_record_does_not_open(self):
        _, sse = g.make_envelope(self.CASES[2], self.MASTERS, ("x",))
        for change in ({"context": "e31="}, {"kms_key_id": "alias/aws/s3"},
                       {"algorithm": "AES256"}, {"key": "A" * 80}):
            with self.assertRaises(g.SealError):
                g.open_envelope(dict(sse, **change), None, self.MASTERS,
                                  ("x",))
        with self.assertRaises(g.SealError):
            g.open_envelope(sse, None, self.MASTERS, ("y",))

    def test_sequences_are_kept(self):
        for sizes in ((0,), (5,), (7, 7, 7, 3), (1, 2, 1)):
            sequences = [g.Sequence(size, g.new_prefix()) for size in sizes]
            dumped = json.loads(json.dumps(g.dump_sequences(sequences)))
            self.assertEqual(g.load_sequences(dumped), sequences)
        many = g.dump_sequences([g.Sequence(5 << 20, g.new_prefix())
                                   for _ in range(10000)])
        self.assertLess(len(json.dumps(many)), 110000)

    def test_sequences_that_do_not_fit(self):
        good = g.dump_sequences([g.Sequence(5, SEQUENCE)])
        for change in ({"sizes": [[5, 2]]}, {"prefixes": ""},
                       {"sizes": [5]}, {"prefixes": None}, {"sizes": []}):
            with self.assertRaises(g.SealError):
                g.load_sequences(dict(good, **change))
        with self.assertRaises(g.SealError):
            g.load_sequences({})


class BucketEncryptionDocuments(EncryptionCase):

    @staticmethod
    def parse(inner):
        return g.parse_bucket_encryption(g.parse_xml((
            "<ServerSideEncryptionConfiguration>%s"
            "</ServerSideEncryptionConfiguration>" % inner).encode()))

    @staticmethod
    def rule(algorithm="AES256", key_id="", more=""):
        if key_id:
            key_id = "<KMSMasterKeyID>%s</KMSMasterKeyID>" % key_id
        return ("<Rule><ApplyServerSideEncryptionByDefault><SSEAlgorithm>%s"
                "</SSEAlgorithm>%s</ApplyServerSideEncryptionByDefault>%s"
                "</Rule>" % (algorithm, key_id, more))

    BLOCKED = ("<BlockedEncryptionTypes><EncryptionType>%s</EncryptionType>"
               "</BlockedEncryptionTypes>")

    def test_good_ones_and_back_again(self):
        bucket_key = "<BucketKeyEnabled>true</BucketKeyEnabled>"
        for text, expected in (
                (self.rule(), g.BucketEncryption("AES256")),
                (self.rule("aws:kms"), g.BucketEncryption("aws:kms")),
                (self.rule("aws:kms", "k1", bucket_key),
                 g.BucketEncryption("aws:kms", "k1", True)),
                (self.rule(more=self.BLOCKED % "SSE-C"),
                 g.BucketEncryption("AES256", blocked=("SSE-C",))),
                (self.rule(more=self.BLOCKED % "NONE"),
                 g.BucketEncryption("AES256", blocked=("NONE",))),
                ("<Rule>%s</Rule>" % (self.BLOCKED % "SSE-C"),
                 g.BucketEncryption(blocked=("SSE-C",)))):
            found = self.parse(text)
            self.assertEqual(found, expected)
            document = g.xml_document("ServerSideEncryptionConfiguration",
                                    g.bucket_encryption_children(found))
            self.assertEqual(g.parse_bucket_encryption(
                g.parse_xml(document)), expected)
            stored = json.loads(json.dumps(found._asdict()))
            self.assertEqual(g.put_encryption(
                {}, g.BucketEncryption(**stored)),
                g.put_encryption({}, expected))

    def test_bucket_key_enabled_is_always_told(self):
        self.assertIn(b"<BucketKeyEnabled>false</BucketKeyEnabled>",
                      g.xml_document("X", g.bucket_encryption_children(
                          g.BucketEncryption("AES256"))))

    def test_malformed_ones(self):
        apply = ("<ApplyServerSideEncryptionByDefault>%s"
                 "</ApplyServerSideEncryptionByDefault>")
        algorithm = "<SSEAlgorithm>AES256</SSEAlgorithm>"
        for text in (
                "", "<Rule/>", "<Rules/>", self.rule() * 2,
                self.rule("aes256"), self.rule(""), self.rule("aws:fsx"),
                "<Rule>%s</Rule>" % apply % "",
                "<Rule>%s</Rule>" % apply % (algorithm * 2),
                "<Rule>%s</Rule>" % apply % (algorithm + "<Other/>"),
                "<Rule>%s</Rule>" % (apply % algorithm * 2),
                self.rule("<b>AES256</b>"), self.rule(more="<Other/>"),
                self.rule(more="<BucketKeyEnabled>1</BucketKeyEnabled>"),
                self.rule(more="<BucketKeyEnabled/>"),
                self.rule(more=self.BLOCKED % "SSE-KMS"),
                self.rule(more="<BlockedEncryptionTypes><Other/>"
                               "</BlockedEncryptionTypes>"),
                self.rule(more=self.BLOCKED % (
                    "NONE</EncryptionType><EncryptionType>SSE-C"))):
            with self.subTest(text=text):
                self.refuses("MalformedXML", 400, "", self.parse, text)

    def test_a_key_for_aes256_and_the_dual_layer(self):
        error = self.refuses("InvalidArgument", 400, "is not applicable",
                             self.parse, self.rule("AES256", "k1"))
        self.assertEqual(error.fields["ArgumentName"],
                         "ApplyServerSideEncryptionByDefault")
        self.refuses("NotImplemented", 501, "dsse", self.parse,
                     self.rule("aws:kms:dsse", "k1"))


@unittest.skipUnless(g.libcrypto(), "no libcrypto")
class EncryptionRequests(OperationCase):
    """Encryption over HTTP and on the disk."""

    CONTENT = plain_bytes(3 * CHUNK + 17)
    S3_HEADERS = {SSE: "AES256"}
    KMS_HEADERS = {SSE: "aws:kms"}
    KINDS = ("plain", "s3", "kms", "customer")

    def headers(self, kind, prefix=g.CUSTOMER):
        """What a write of that kind sends; with prefix, what a read does.
        """
        if kind == "customer":
            return sse_c(SECRET, prefix)
        return {} if prefix != g.CUSTOMER else {
            "plain": {}, "s3": self.S3_HEADERS,
            "kms": self.KMS_HEADERS}[kind]

    def reading(self, kind):
        return sse_c(SECRET) if kind == "customer" else {}

    def write(self, key, kind, data=None):
        return self.ok(self.s3.put(
            "/box/" + key, self.CONTENT if data is None else data,
            headers=self.headers(kind)))

    def sealed(self, key="k"):
        with open(self.path(key), "rb") as file:
            return file.read()

    def test_what_is_written_is_read_and_not_on_the_disk(self):
        for kind in self.KINDS[1:]:
            with self.subTest(kind=kind):
                written = self.write("k", kind).headers
                answer = self.ok(self.s3.get("/box/k",
                                             headers=self.reading(kind)))
                self.assertEqual(answer.body, self.CONTENT)
                for name in (SSE, g.CUSTOMER + "key-md5",
                             g.KMS_KEY_HEADER):
                    self.assertEqual(written.get(name),
                                     answer.headers.get(name))
                self.assertEqual(answer.headers.get(SSE), {
                    "s3": "AES256", "kms": "aws:kms"}.get(kind))
                sealed = self.sealed()
                runs = {self.CONTENT[at:at + 16]
                        for at in range(len(self.CONTENT) - 15)}
                self.assertFalse(any(sealed[at:at + 16] in runs
                                     for at in range(len(sealed) - 15)))
                self.assertEqual(
                    answer.etag.strip('"') == md5_hex(self.CONTENT),
                    kind == "s3")

    def test_sizes_are_those_of_the_content(self):
        self.write("k", "s3")
        size = str(len(self.CONTENT))
        self.assertEqual(self.s3.head("/box/k").headers["content-length"],
                         size)
        self.assertEqual(self.s3.get("/box").one("Contents/Size"), size)
        self.assertEqual(self.ok(self.s3.get("/box/k", {
            "attributes": ""}, headers={"x-amz-object-attributes":
                                        "ObjectSize"})).one("ObjectSize"),
                         size)
        self.write("empty", "s3", b"")
        self.assertEqual(self.ok(self.s3.get("/box/empty")).body, b"")

    def test_ranges(self):
        self.write("k", "customer")
        size = len(self.CONTENT)
        for start, stop in ((0, 1), (0, CHUNK), (CHUNK - 1, CHUNK + 1),
                            (CHUNK, 2 * CHUNK), (1, size), (size - 1, size),
                            (3 * CHUNK, size), (100, 3 * CHUNK + 5)):
            with self.subTest(start=start, stop=stop):
                answer = self.ok(self.s3.get("/box/k", headers=dict(
                    sse_c(SECRET), range="bytes=%d-%d" % (
                        start, stop - 1))), 206)
                self.assertEqual(answer.body, self.CONTENT[start:stop])
        self.error(self.s3.get("/box/k", headers=dict(
            sse_c(SECRET), range="bytes=%d-" % size)), "InvalidRange", 416)

    def test_keys_that_do_not_fit(self):
        self.write("k", "customer")
        self.write("plain", "plain")
        other = sse_c(OTHER_SECRET)
        for method in ("GET", "HEAD"):
            for path, headers, status in (
                    ("/box/k", {}, 400), ("/box/k", other, 403),
                    ("/box/plain", sse_c(SECRET), 400),
                    ("/box/plain", {SSE: "AES256"}, 400)):
                with self.subTest(method=method, path=path, status=status):
                    self.assertEqual(self.s3.request(
                        method, path, headers=headers).status, status)
        self.error(self.s3.get("/box/k", {"attributes": ""}, headers={
            "x-amz-object-attributes": "ETag"}), "InvalidRequest")
        self.error(self.s3.get("/box/plain", {"attributes": ""}, headers={
            "x-amz-object-attributes": "ETag", SSE: "AES256"}),
            "InvalidArgument")
        self.error(self.s3.put("/box/new", headers={
            "x-amz-copy-source": "/box/k"}), "InvalidRequest")

    def test_copies_between_all_kinds(self):
        for source in self.KINDS:
            self.write("source", source)
            for target in self.KINDS:
                with self.subTest(source=source, target=target):
                    self.ok(self.s3.put("/box/target", headers=dict(
                        self.headers(target), **dict(
                            self.headers(source, g.COPY_CUSTOMER),
                            **{"x-amz-copy-source": "/box/source"}))))
                    answer = self.ok(self.s3.get(
                        "/box/target", headers=self.reading(target)))
                    self.assertEqual(answer.body, self.CONTENT)
                    self.assertEqual(
                        self.sealed("target") == self.CONTENT,
                        target == "plain")

    def test_an_object_is_encrypted_by_a_copy_to_itself(self):
        self.write("k", "plain")
        self.ok(self.s3.put("/box/k", headers=dict(
            self.S3_HEADERS, **{"x-amz-copy-source": "/box/k"})))
        self.assertNotEqual(self.sealed(), self.CONTENT)
        self.body("k", self.CONTENT)

    def parts(self, kind, datas):
        """Upload parts and assemble them; the answer."""
        upload = self.ok(self.s3.post("/box/k", {"uploads": ""},
                                      headers=self.headers(kind))
                         ).one("UploadId")
        etags = [self.ok(self.s3.put(
            "/box/k", data, {"uploadId": upload, "partNumber": str(number)},
            headers=self.reading(kind))).etag
            for number, data in enumerate(datas, 1)]
        body = "".join("<Part><PartNumber>%d</PartNumber><ETag>%s</ETag>"
                       "</Part>" % pair for pair in enumerate(etags, 1))
        return self.ok(self.s3.post("/box/k", {"uploadId": upload}, (
            "<CompleteMultipartUpload>%s</CompleteMultipartUpload>"
            % body).encode()))

    def test_parts(self):
        datas = [plain_bytes(5 * MIB, 1), plain_bytes(CHUNK + 3, 2)]
        for kind in self.KINDS[1:]:
            with self.subTest(kind=kind):
                self.parts(kind, datas)
                reading = self.reading(kind)
                whole = b"".join(datas)
                self.assertEqual(self.ok(self.s3.get(
                    "/box/k", headers=reading)).body, whole)
                answer = self.ok(self.s3.get("/box/k", {
                    "partNumber": "2"}, headers=reading), 206)
                self.assertEqual(answer.body, datas[1])
                start = 5 * MIB - 10
                self.assertEqual(self.ok(self.s3.get(
                    "/box/k", headers=dict(reading, range="bytes=%d-%d" % (
                        start, start + 19))), 206).body,
                    whole[start:start + 20])

    def test_a_part_needs_the_key_of_its_upload(self):
        upload = self.ok(self.s3.post("/box/k", {"uploads": ""},
                                      headers=sse_c(SECRET))).one("UploadId")
        query = {"uploadId": upload, "partNumber": "1"}
        for headers in ({}, sse_c(OTHER_SECRET)):
            self.error(self.s3.put("/box/k", b"x", query, headers=headers),
                       "InvalidRequest", 400)
        upload = self.ok(self.s3.post("/box/k", {"uploads": ""})).one(
            "UploadId")
        self.error(self.s3.put("/box/k", b"x", dict(
            query, uploadId=upload), headers=sse_c(SECRET)),
            "InvalidRequest", 400)

    def damage(self, data):
        """Write other bytes into the file of `k`, its record kept."""
        with open(self.path("k"), "r+b") as file:
            file.truncate(0)
            file.write(data)

    def damaged_forms(self, kind):
        """(name, bytes) of everything that may happen to the file of `k`,
        sealed in more than one chunk."""
        sealed = self.sealed()
        self.write("other", kind)
        other = self.sealed("other")
        last = HEADER + 3 * STEP
        for name, place in (
                ("magic", 0), ("version", 6), ("size", 7), ("prefix", 15),
                ("first chunk", HEADER), ("its tag", HEADER + STEP - 1),
                ("second chunk", HEADER + STEP + 9), ("last chunk", last),
                ("last tag", len(sealed) - 1)):
            yield name, sealed[:place] + bytes([sealed[place] ^ 1]) \
                + sealed[place + 1:]
        chunks = [sealed[at:at + STEP] for at in range(HEADER, last, STEP)]
        header, end = sealed[:HEADER], sealed[last:]
        yield "swapped", header + chunks[1] + chunks[0] + chunks[2] + end
        yield "doubled", header + chunks[0] * 2 + chunks[2] + end
        yield "another object", other
        yield "its chunk", header + other[HEADER:HEADER + STEP] \
            + sealed[HEADER + STEP:]
        yield "its last chunk", sealed[:last] + other[last:]
        for cut in (0, 1, HEADER, HEADER + STEP, last, len(sealed) - 1):
            yield "cut at %d" % cut, sealed[:cut]
        yield "appended", sealed + b"x"
        yield "a chunk appended", sealed + chunks[0]
        yield "plain", self.CONTENT

    def test_a_damaged_file_is_an_error_and_no_wrong_data(self):
        for kind in self.KINDS[1:]:
            self.write("k", kind)
            reading = self.reading(kind)
            for name, damaged in list(self.damaged_forms(kind)):
                with self.subTest(kind=kind, name=name):
                    self.damage(damaged)
                    self.error(self.s3.get("/box/k", headers=reading),
                               "InternalError", 500)
                    tail = self.s3.get("/box/k", headers=dict(
                        reading, range="bytes=-9"))
                    if tail.status == 206:      # not what was damaged
                        self.assertEqual(tail.body, self.CONTENT[-9:])
                        self.assertRegex(name, "first|second|its (tag|chunk)"
                                               "|swapped|doubled")
                    else:
                        self.error(tail, "InternalError", 500)

    def test_damage_behind_good_content_cuts_the_answer_short(self):
        content, lines = plain_bytes(8 * CHUNK), []
        self.write("k", "s3", content)
        sealed = bytearray(self.sealed())
        sealed[-1] ^= 1
        self.damage(bytes(sealed))
        with mock.patch.object(self.server.server, "report", lines.append), \
                self.assertRaises(http.client.IncompleteRead) as caught:
            self.s3.get("/box/k")
        self.s3.close()
        self.assertEqual(caught.exception.partial, content[:4 * CHUNK])
        self.assertIn("damaged", "".join(lines))
        self.assertIn("not what was sealed", "".join(lines))

    def refused_unread(self, key, headers, words="lost or damaged"):
        """Assert that no way to read an object gives what is sealed."""
        lines, target = [], "/box/" + key
        copied = {"x-amz-copy-source": target}
        copied.update((name.replace("x-amz-server", "x-amz-copy-source-"
                                    "server"), value)
                      for name, value in headers.items())
        with mock.patch.object(self.server.server, "report", lines.append):
            for answer in (
                    self.s3.get(target, headers=headers),
                    self.s3.get(target, headers=dict(
                        headers, range="bytes=3-9")),
                    self.s3.get(target, {"attributes": ""}, headers=dict(
                        headers, **{"x-amz-object-attributes": "ETag"})),
                    self.s3.put("/box/copy", headers=copied)):
                self.error(answer, "InternalError", 500)
            self.assertEqual(self.s3.head(target, headers=headers).status,
                             500)
        self.assertEqual(len(lines), 5)
        self.assertTrue(all(words in line for line in lines), lines)
        self.assertEqual(self.s3.get("/box").status, 200)

    def test_cipher_text_is_never_content(self):
        """A record that is damaged or left behind, current or not."""
        for kind in self.KINDS[1:]:
            with self.subTest(kind=kind):
                reading = self.reading(kind)
                self.write("k", kind)
                for key in ("by-hand", "d/e", "odd//"):
                    self.write(key, "plain", b"y")
                    shutil.copyfile(self.path("k"), self.path(
                        gos3rve.STATE, "odd", gos3rve.odd_name(key))
                        if key == "odd//" else self.path(key))
                    self.refused_unread(key, {})
                if has_xattrs(self.path()):
                    os.setxattr(self.path("k"), gos3rve.XATTR, b"{damaged")
                    self.refused_unread("k", reading)
                shutil.copyfile(self.path("k"), self.path("d", "new"))
                self.refused_unread("d/new", reading)

    def test_a_lost_record_does_not_stand_in_the_way(self):
        self.write("k", "s3")
        shutil.copyfile(self.path("k"), self.path("copy"))
        self.assertEqual(len(self.s3.keys("box")), 2)
        self.ok(self.s3.put("/box/copy", b"new"))
        self.body("copy", b"new")
        self.ok(self.s3.put("/box/k", b"<Tagging><TagSet><Tag><Key>a</Key>"
                            b"<Value>b</Value></Tag></TagSet></Tagging>",
                            {"tagging": ""}))
        self.body("k", self.CONTENT)
        shutil.copyfile(self.path("k"), self.path("copy"))
        self.ok(self.s3.delete("/box/copy"), 204)

    def test_content_that_only_looks_sealed(self):
        data = g.SEAL_MAGIC + b"and no more"
        self.ok(self.s3.put("/box/k", data))
        self.body("k", data)
        self.by_hand("text", g.SEAL_MAGIC[:-1])
        self.body("text", g.SEAL_MAGIC[:-1])

    DAMAGES = (
        {}, {"algorithm": "AES256"}, {"algorithm": None}, {"algorithm": 5},
        {"algorithm": []}, {"algorithm": "aes"}, {"algorithm": "aws:kms"},
        {"key": None}, {"key": 5}, {"key": {}}, {"key": "\u00e4\n"},
        {"master": None}, {"master": 7}, {"kms_key_id": 7},
        {"kms_key_id": None}, {"kms_key_id": "a\r\nb: c"},
        {"context": ["x"]}, {"bound": 1}, {"bucket_key": "yes"},
        {"sizes": None}, {"sizes": 5}, {"sizes": []},
        {"sizes": [5]}, {"sizes": [[5]]}, {"sizes": [["5", 1]]},
        {"sizes": [[0, 1]]}, {"sizes": [[-5, 1]]}, {"sizes": [[5, -1]]},
        {"sizes": [[5, 0]]}, {"sizes": [[True, True]]},
        {"sizes": [[5.0, 1]]}, {"sizes": [[1, 10 ** 9]]},
        {"sizes": [[0, 10 ** 18]]}, {"sizes": [[10 ** 400, 1]]},
        {"sizes": [[196624, 1]]}, {"sizes": [[196625, 1], [0, 1]]},
        {"sizes": {"a": 1}}, {"prefixes": None}, {"prefixes": 5},
        {"prefixes": ""}, {"prefixes": "AAAA"}, {"prefixes": "A" * 12 * 9})

    def test_damaged_records_are_errors(self):
        for kind, parts in (("kms", False), ("customer", True)):
            before = open_files()
            if parts:                   # completed without the key: unbound
                self.parts(kind, [self.CONTENT])
            else:
                self.write("k", kind)
            bucket = self.server.store.bucket("box")
            good = bucket.find("k").record["sse"]
            self.assertEqual(good["sizes"], [[len(self.CONTENT), 1]])
            for change in self.DAMAGES:
                sse = dict(good, **change) if change else {}
                for name in [name for name in sse if sse[name] is None]:
                    del sse[name]
                if sse == good:
                    continue
                bucket.update_record(
                    "k", None, lambda record, sse=sse: record.update(sse=sse))
                with self.subTest(kind=kind, parts=parts, change=change):
                    self.refused_unread("k", self.reading(kind), "")
            self.assertLess(open_files() - before, 9)

    def test_older_versions_are_looked_at_as_well(self):
        versions = self.path(gos3rve.STATE, "versions")
        self.addCleanup(shutil.rmtree, versions, ignore_errors=True)
        self.ok(self.s3.put("/box", b"<VersioningConfiguration><Status>"
                            b"Suspended</Status></VersioningConfiguration>",
                            {"versioning": ""}))
        self.server.store.update_bucket(
            self.server.store.bucket("box"),
            lambda config: config.update(versioning="Enabled"))
        self.addCleanup(self.server.store.update_bucket,
                        self.server.store.bucket("box"),
                        lambda config: config.pop("versioning"))
        version = self.write("k", "s3").headers["x-amz-version-id"]
        self.write("k", "plain", b"new")
        query = {"versionId": version}
        self.assertEqual(self.ok(self.s3.get("/box/k", query)).body,
                         self.CONTENT)
        name, = os.listdir(os.path.join(versions, "kk"))
        path = os.path.join(versions, "kk", name)
        shutil.copyfile(path, path + "-")
        os.replace(path + "-", path)
        self.error(self.s3.get("/box/k", query), "InternalError", 500)
        self.body("k", b"new")

    def test_a_buckets_default(self):
        self.addCleanup(self.s3.delete, "/box", {"encryption": ""})
        self.error(self.s3.get("/box", {"encryption": ""}),
                   "ServerSideEncryptionConfigurationNotFoundError", 404)
        rule = ("<ServerSideEncryptionConfiguration><Rule>"
                "<ApplyServerSideEncryptionByDefault><SSEAlgorithm>aws:kms"
                "</SSEAlgorithm></ApplyServerSideEncryptionByDefault>"
                "<BucketKeyEnabled>true</BucketKeyEnabled></Rule>"
                "</ServerSideEncryptionConfiguration>")
        self.ok(self.s3.put("/box", rule.encode(), {"encryption": ""}))
        self.assertEqual(self.s3.get("/box", {"encryption": ""}).one(
            "Rule/ApplyServerSideEncryptionByDefault/SSEAlgorithm"),
            "aws:kms")
        self.write("k", "plain")
        answer = self.ok(self.s3.get("/box/k"))
        self.assertEqual((answer.body, answer.headers[SSE]),
                         (self.CONTENT, "aws:kms"))
        self.assertEqual(answer.headers[g.BUCKET_KEY_HEADER], "true")
        self.assertNotEqual(self.sealed(), self.CONTENT)
        self.ok(self.s3.delete("/box", {"encryption": ""}), 204)
        self.write("k", "plain")
        self.assertEqual(self.sealed(), self.CONTENT)

    def test_an_unknown_kms_key_is_refused(self):
        self.error(self.s3.put("/box/k", b"x", headers={
            SSE: "aws:kms", g.KMS_KEY_HEADER: "nobody"}),
            "KMS.NotFoundException", 400)
        self.assertEqual(self.tree(), {})

    def test_the_key_file_is_made_for_us_alone(self):
        self.write("k", "s3")
        path = os.path.join(self.server.dir_buckets, ".gos3rve-keys.json")
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        self.assertEqual(self.s3.get("/").all("Buckets/Bucket/Name"),
                         ["box"])
        self.error(self.s3.get("/.gos3rve-keys.json"), "NoSuchBucket", 404)

    def test_the_encryption_of_an_object_is_updated(self):
        self.write("k", "s3")
        before = self.sealed()
        body = ("<ObjectEncryption><SSE-KMS><KMSKeyArn>"
                "arn:aws:kms:us-east-1:111122223333:%s</KMSKeyArn></SSE-KMS>"
                "</ObjectEncryption>")
        self.ok(self.s3.put("/box/k", (body % "alias/aws/s3").encode(),
                            {"encryption": ""}))
        answer = self.ok(self.s3.get("/box/k"))
        self.assertEqual((answer.body, answer.headers[SSE]),
                         (self.CONTENT, "aws:kms"))
        self.assertEqual(self.sealed(), before)
        self.error(self.s3.put("/box/k", (body % "key/none").encode(),
                               {"encryption": ""}), "KMS.NotFoundException")
        self.write("plain", "plain")
        self.write("customer", "customer")
        for key in ("plain", "customer"):
            self.error(self.s3.put("/box/" + key, (
                body % "alias/aws/s3").encode(), {"encryption": ""}),
                "InvalidRequest")
        self.server.store.bucket("box").update_record(
            "k", None, lambda record: record.update(sse={}))
        self.error(self.s3.put("/box/k", (body % "alias/aws/s3").encode(),
                               {"encryption": ""}), "InternalError", 500)

    def test_json_that_is_too_deep_is_a_400(self):
        deep = '{"a":' * 5000 + '"b"' + "}" * 5000
        self.error(self.s3.put("/box/k", b"x", headers=dict(
            self.KMS_HEADERS, **{g.KMS_CONTEXT_HEADER: b64(
                deep.encode())})), "InvalidArgument", 400)
        for statement in (deep, "[" * 9000 + "]" * 9000):
            self.error(self.s3.put("/box", (
                '{"Version": "2012-10-17", "Statement": %s}'
                % statement).encode(), {"policy": ""}), "MalformedPolicy")
        self.assertEqual(self.tree(), {})

    def test_tags_and_versions_of_encrypted_objects(self):
        self.write("k", "s3")
        self.ok(self.s3.put("/box/k", b"<Tagging><TagSet><Tag><Key>a</Key>"
                            b"<Value>b</Value></Tag></TagSet></Tagging>",
                            {"tagging": ""}))
        self.body("k", self.CONTENT)

    def test_without_libcrypto_nothing_is_stored(self):
        path = os.path.join(self.server.dir_buckets, ".gos3rve-keys.json")
        keys = self.server.server.service.key_file
        if os.path.exists(path):
            os.rename(path, path + "-")
            self.addCleanup(os.rename, path + "-", path)
        with mock.patch.object(keys, "_keys", None), \
                mock.patch.object(gos3rve, "libcrypto", lambda: None):
            for kind in self.KINDS[1:]:
                self.error(self.s3.put("/box/k", b"x",
                                       headers=self.headers(kind)),
                           "NotImplemented", 501)
                self.error(self.s3.post("/box/k", {"uploads": ""},
                                        headers=self.headers(kind)),
                           "NotImplemented", 501)
            self.write("plain", "plain")
        self.assertEqual(list(self.tree()), ["plain"])
        self.assertFalse(os.path.exists(path))


@unittest.skipUnless(g.libcrypto(), "no libcrypto")
class KeyFileServers(unittest.TestCase):

    def test_a_named_key_file_is_read_and_has_its_kms_keys(self):
        directory = temporary_directory(self)
        path = os.path.join(directory, "keys.json")
        with self.assertRaisesRegex(gos3rve.ConfigError, "cannot be read"):
            gos3rve.serve(sse_key=path)
        text = base64.b64encode(SECRET).decode()
        with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600),
                  "w") as file:
            json.dump({"default": text, "keys": {"mine": text}}, file)
        with gos3rve.serve(sse_key=path, buckets=["box"]) as server:
            client = Client(server.url, server.key_id, server.key_val)
            self.addCleanup(client.close)
            self.assertEqual(client.put("/box/k", b"x", headers={
                SSE: "aws:kms", g.KMS_KEY_HEADER: "mine"}).status, 200)
            self.assertEqual(client.get("/box/k").body, b"x")
            self.assertEqual(os.listdir(server.dir_buckets), ["box"])

    def server(self, **options):
        """A server of the directory `self.directory`; its client."""
        server = gos3rve.serve(self.directory, dir_uploads=self.uploads,
                               buckets=["box"], **options)
        self.addCleanup(server.close)
        self.lines = []
        server.server.report = server.server.service.key_file._report = \
            self.lines.append
        client = Client(server.url, server.key_id, server.key_val)
        self.addCleanup(client.close)
        return client

    def setUp(self):
        self.directory = temporary_directory(self)
        self.uploads = temporary_directory(self)
        self.path = os.path.join(self.directory, ".gos3rve-keys.json")

    def put(self, client, key="k", **headers):
        return client.put("/box/" + key, b"x", headers=headers or {
            SSE: "AES256"})

    def unavailable(self, answer, *words):
        """Assert a 500 whose reason is in the log alone."""
        self.assertEqual((answer.code, answer.status),
                         ("InternalError", 500))
        self.assertNotIn(self.directory.encode(), answer.body)
        line = self.lines.pop()
        for word in words:
            self.assertIn(word, line)

    def test_a_lost_key_file_is_an_error_and_no_new_one_is_made(self):
        client = self.server()
        self.assertEqual(self.put(client).status, 200)
        os.rename(self.path, self.path + "-")
        client = self.server()
        self.unavailable(client.get("/box/k"), self.path, "cannot be read")
        self.unavailable(self.put(client), self.path, "bucket box")
        self.unavailable(client.post("/box/k", {"uploads": ""}, headers={
            SSE: "aws:kms"}), self.path, "bucket box")
        self.assertFalse(os.path.exists(self.path))
        self.assertEqual(client.put("/box/c", b"x", headers=sse_c()).status,
                         200)
        os.rename(self.path + "-", self.path)
        self.assertEqual(client.get("/box/k").body, b"x")
        self.assertEqual(self.put(client).status, 200)

    def test_while_the_file_is_gone_objects_open_and_none_is_sealed(self):
        client = self.server()
        self.put(client)
        os.rename(self.path, self.path + "-")
        for _ in range(2):
            self.assertEqual(client.get("/box/k").body, b"x")
            self.unavailable(self.put(client), self.path, "is gone")
        os.rename(self.path + "-", self.path)
        self.assertEqual(self.put(client).status, 200)

    def test_a_key_file_may_change_while_the_server_runs(self):
        client = self.server()
        self.put(client)
        with open(self.path) as file:
            keys = json.load(file)
        keys.update(default=b64(SECRET), keys={"2025": keys["default"]})
        with open(os.open(self.path + "-", os.O_CREAT | os.O_WRONLY, 0o600),
                  "w") as file:
            json.dump(keys, file)
        os.replace(self.path + "-", self.path)
        self.put(client, "new")
        for key in ("k", "new"):
            self.assertEqual(client.get("/box/" + key).body, b"x")
        del keys["keys"]["2025"]
        with open(self.path, "w") as file:
            json.dump(keys, file)
        self.unavailable(client.get("/box/k"), "fingerprint")
        self.assertEqual(client.get("/box/new").body, b"x")

    def test_customer_keys_make_no_key_file_and_need_none(self):
        client = self.server()
        self.assertEqual(self.put(client, **sse_c()).status, 200)
        self.assertFalse(os.path.exists(self.path))
        self.assertEqual(self.put(client).status, 200)
        self.assertTrue(os.path.exists(self.path))

    def test_another_key_file_is_told_from_a_damaged_record(self):
        client = self.server()
        self.put(client)
        fingerprint = gos3rve.key_fingerprint(
            gos3rve.load_master_keys(self.path).default)
        os.unlink(self.path)
        gos3rve.ensure_master_keys(self.path)
        client = self.server()
        self.unavailable(client.get("/box/k"), fingerprint)
        self.assertEqual(self.put(client, "new").status, 200)
        self.assertEqual(client.get("/box/new").body, b"x")

    def test_a_key_file_that_cannot_be_used_is_named_in_the_log_only(self):
        for text in ("", "{", "{}"):
            with open(self.path, "w") as file:
                file.write(text)
            os.chmod(self.path, 0o600)
            client = self.server()
            self.unavailable(self.put(client), self.path, "not in order")

    def test_a_key_file_in_a_bucket_is_refused(self):
        inside = os.path.join(self.directory, "box", "d")
        os.makedirs(inside)
        os.symlink(self.uploads, os.path.join(self.directory, "linked"))
        for path, mapped, name in (
                (os.path.join(inside, "keys.json"), (), "box"),
                (os.path.join(self.uploads, "keys.json"), (), "linked"),
                (os.path.join(self.directory, "keys.json"),
                 ["up=" + self.directory], "up")):
            gos3rve.ensure_master_keys(path)
            with self.subTest(path=path), self.assertRaisesRegex(
                    gos3rve.ConfigError, "must not lie in the bucket "
                    + name):
                gos3rve.serve(self.directory, sse_key=path, bucket=mapped)

    def test_a_key_file_above_the_buckets_is_in_none(self):
        gos3rve.ensure_master_keys(self.path)
        client = self.server(sse_key=self.path,
                             bucket=["up=" + os.path.dirname(self.path)])
        self.assertEqual(self.put(client).status, 200)
        for key in (".gos3rve-keys.json", "box/.gos3rve/bucket.json"):
            self.assertEqual(client.get("/up/" + key).code, "NoSuchKey")
        self.assertEqual(client.keys("up"), ["box/k"])


# --- temporary credentials: STS ---

class StsCase(OperationCase):
    """A server whose account has an id of AWS's form, and another one.

    self.sts is a client of its query API; options of the server aside.
    """

    ACCOUNT = "123456789012"
    ROLE_ARN = "arn:aws:iam::123456789012:role/path/app"
    options = {"user_id": ACCOUNT, "user_name": "owner"}

    def setUp(self):
        super().setUp()
        self.sts = self.sts_client(self.s3)
        self.who = {"RoleArn": self.ROLE_ARN, "RoleSessionName": "tests"}

    def sts_client(self, client):
        """The same credentials, for STS."""
        found = Client(client.url, client.key_id, client.secret,
                       client.region, token=client.token, service="sts")
        self.addCleanup(found.close)
        return found

    def call(self, action, client=None, headers=(), signed=True, **values):
        """An Answer of the query API.  Names have `__` for `.`."""
        body = urllib.parse.urlencode(dict({
            "Action": action, "Version": "2011-06-15"}, **{
                name.replace("__", "."): value
                for name, value in values.items()})).encode()
        return (client or self.sts).post("/", (), body, headers=dict({
            "content-type": "application/x-www-form-urlencoded; "
            "charset=utf-8"}, **dict(headers)), signed=signed)

    def role(self, policy=None, client=None, **values):
        """An S3 client of a role's session; policy: statements."""
        if policy is not None:
            values["Policy"] = document(*policy)
        return self.session(self.call("AssumeRole", client,
                                      **dict(self.who, **values)))

    def session(self, answer):
        """An S3 client with the credentials of an Answer."""
        self.ok(answer)
        keys = {name: answer.one(".//" + name) for name in (
            "AccessKeyId", "SecretAccessKey", "SessionToken")}
        client = Client(self.s3.url, keys["AccessKeyId"],
                        keys["SecretAccessKey"], token=keys["SessionToken"])
        self.addCleanup(client.close)
        return client

    def refused(self, answer, code, status, message=None):
        """Assert an error of STS; its message."""
        self.assertEqual((answer.one("Error/Code"), answer.status),
                         (code, status), answer.body)
        self.assertEqual(answer.headers["content-type"], "text/xml")
        self.assertEqual(answer.one("Error/Type"),
                         "Sender" if status < 500 else "Receiver")
        self.assertEqual(answer.one("RequestId"),
                         answer.headers["x-amz-request-id"])
        if message:
            self.assertIn(message, answer.one("Error/Message"))


def allow(action, resource="*", effect="Allow", **more):
    """A statement of a session policy."""
    return statement(effect, None, action, resource, **more)


class StsRequests(StsCase):
    """The query API itself."""

    XMLNS = "https://sts.amazonaws.com/doc/2011-06-15/"

    def identity(self, client):
        """GetCallerIdentity's three values."""
        answer = self.ok(self.call("GetCallerIdentity",
                                   self.sts_client(client)))
        return [answer.one("GetCallerIdentityResult/" + name)
                for name in ("Account", "UserId", "Arn")]

    def test_who_asks(self):
        root = [self.ACCOUNT, self.ACCOUNT,
                "arn:aws:iam::123456789012:root"]
        self.assertEqual(self.identity(self.s3), root)
        self.assertEqual(self.identity(self.session(
            self.call("GetSessionToken"))), root)
        account, user_id, arn = self.identity(self.role())
        self.assertEqual((account, arn), (
            self.ACCOUNT,
            "arn:aws:sts::123456789012:assumed-role/app/tests"))
        self.assertRegex(user_id, r"\AAROA[A-Z2-7]{17}:tests\Z")
        # no permission is needed, even where it is denied
        self.assertEqual(self.identity(self.role([allow(
            "*", effect="Deny")]))[2], arn)

    def test_the_document_is_sts_s(self):
        answer = self.call("GetCallerIdentity")
        self.assertEqual(ElementTree.fromstring(answer.body).tag,
                         "{%s}GetCallerIdentityResponse" % self.XMLNS)
        self.assertEqual(answer.one("ResponseMetadata/RequestId"),
                         answer.headers["x-amzn-requestid"])
        answer = self.call("Unknown")
        self.assertEqual(ElementTree.fromstring(answer.body).tag,
                         "{%s}ErrorResponse" % self.XMLNS)

    def test_a_query_does_for_a_form(self):
        query = [("Action", "GetCallerIdentity"), ("Version", "2011-06-15")]
        for method in ("GET", "POST"):
            answer = self.sts.request(method, "/", query)
            self.assertEqual(self.ok(answer).one(".//Account"), self.ACCOUNT)
            client = self.sts_client(self.role())
            url = client.presign(method, "/", query)
            answer = client.send(method, url[len(client.url):])
            self.assertTrue(self.ok(answer).one(".//Arn").endswith("/tests"))
            self.refused(client.send(method, url[len(client.url):].replace(
                "GetCallerIdentity", "GetSessionToken")),
                "SignatureDoesNotMatch", 403)

    def test_credentials_have_a_time(self):
        for action, given, expected in (
                ("GetSessionToken", None, 43200),
                ("GetSessionToken", 900, 900),
                ("GetSessionToken", 129600, 129600),
                ("AssumeRole", None, 3600), ("AssumeRole", 900, 900),
                ("AssumeRole", 43200, 43200)):
            values = self.who if action == "AssumeRole" else {}
            if given:
                values = dict(values, DurationSeconds=given)
            before = time.time()
            answer = self.ok(self.call(action, **values))
            until = gos3rve.parse_iso_date(answer.one(
                ".//Credentials/Expiration"))
            self.assertTrue(before - 1 <= until - expected <= time.time())

    def test_a_role_s_answer(self):
        answer = self.ok(self.call("AssumeRole", ExternalId="x:/y",
                                   Tags="", **self.who))
        self.assertEqual(answer.one(".//AssumedRoleUser/Arn"),
                         "arn:aws:sts::123456789012:assumed-role/app/tests")
        self.assertRegex(answer.one(".//AssumedRoleUser/AssumedRoleId"),
                         r"\AAROA\w+:tests\Z")
        self.assertIsNone(answer.one(".//PackedPolicySize"))
        answer = self.ok(self.call("AssumeRole", Policy=document(allow(
            "s3:*")), **self.who))
        self.assertTrue(0 < int(answer.one(".//PackedPolicySize")) < 10)

    def test_parameters_are_checked(self):
        long_policy = document(*[allow("s3:Get*", "arn:aws:s3:::%d" % i)
                                 for i in range(40)])
        for code, status, changes in (
                ("ValidationError", 400, {"RoleArn": None}),
                ("ValidationError", 400, {"RoleArn": "arn:aws:iam::1:x"}),
                ("ValidationError", 400, {"RoleArn": "a" * 2049}),
                ("ValidationError", 400, {"RoleArn": "arn:\0\uffff" * 9}),
                ("ValidationError", 400, {"RoleArn": "a" * 30}),
                ("ValidationError", 400, {
                    "RoleArn": self.ROLE_ARN.replace("role", "user")}),
                ("ValidationError", 400, {"RoleArn": self.ROLE_ARN + "/"}),
                ("AccessDenied", 403, {
                    "RoleArn": self.ROLE_ARN.replace("12:", "13:")}),
                ("ValidationError", 400, {"RoleSessionName": None}),
                ("ValidationError", 400, {"RoleSessionName": "x"}),
                ("ValidationError", 400, {"RoleSessionName": "a b"}),
                ("ValidationError", 400, {"RoleSessionName": "x" * 65}),
                ("ValidationError", 400, {"RoleSessionName": "xx\n"}),
                ("ValidationError", 400, {"DurationSeconds": "899"}),
                ("ValidationError", 400, {"DurationSeconds": "43201"}),
                ("ValidationError", 400, {"DurationSeconds": "9" * 5000}),
                ("ValidationError", 400, {"DurationSeconds": "x"}),
                ("ValidationError", 400, {"DurationSeconds": ""}),
                ("ValidationError", 400, {"ExternalId": "x"}),
                ("ValidationError", 400, {"Policy": ""}),
                ("ValidationError", 400, {"Policy": long_policy}),
                ("ValidationError", 400, {"Policy": '{"\u0436":1}'}),
                ("MalformedPolicyDocument", 400, {"Policy": "{}"}),
                ("MalformedPolicyDocument", 400, {"Policy": "x"}),
                ("MalformedPolicyDocument", 400, {
                    "Policy": document(statement())}),
                ("ValidationError", 400, {"Tags": "x"}),
                ("ValidationError", 400, {"Tags__member__1__Key": "k"}),
                ("ValidationError", 400, {"Tags__member__1__Key": "aws:k",
                                          "Tags__member__1__Value": "v"}),
                ("NotImplemented", 501, {"Tags__member__0__Key": "k"}),
                ("NotImplemented", 501, {"PolicyArns__member__1__arn": "a"}),
                ("NotImplemented", 501, {"SerialNumber": "1"}),
                ("NotImplemented", 501, {"TokenCode": "123456"}),
                ("NotImplemented", 501, {"SourceIdentity": "me"}),
                ("NotImplemented", 501, {"TransitiveTagKeys__member__1":
                                         "k"})):
            values = {name: value for name, value in dict(
                self.who, **changes).items() if value is not None}
            with self.subTest(**changes):
                answer = self.call("AssumeRole", **values)
                self.refused(answer, code, status, next(iter(
                    changes)).partition("__")[0] if status == 501 else None)

    def test_tags_are_checked(self):
        tags = {}
        for number in range(1, 52):
            tags.update({"Tags__member__%d__Key" % number: "k%d" % number,
                         "Tags__member__%d__Value" % number: ""})
        self.refused(self.call("AssumeRole", **dict(self.who, **tags)),
                     "ValidationError", 400)
        for name in list(tags)[-2:]:
            del tags[name]
        self.ok(self.call("AssumeRole", **dict(self.who, **tags)))
        tags["Tags__member__2__Key"] = "K1"
        self.refused(self.call("AssumeRole", **dict(self.who, **tags)),
                     "InvalidParameterValue", 400)
        for number in range(1, 51):
            tags.update({
                "Tags__member__%d__Key" % number: "%030d" % number,
                "Tags__member__%d__Value" % number: base64.b64encode(
                    os.urandom(96)).decode()})
        self.refused(self.call("AssumeRole", **dict(self.who, **tags)),
                     "PackedPolicyTooLarge", 400)

    def test_actions_that_are_not_there_are_refused_by_name(self):
        refused = [row.name for row in gos3rve.OPERATIONS.values()
                   if row.level == gos3rve.STS and not row.function]
        self.assertIn("GetFederationToken", refused)
        for action in refused + ["CreateUser", "ListTopics", "GetObject",
                                 "<x>"]:
            for signed in (True, False):
                self.refused(self.call(action, signed=signed),
                             "NotImplemented", 501, action + " is not")

    def test_a_session_gets_no_session_token(self):
        for client in (self.role(), self.session(self.call(
                "GetSessionToken"))):
            self.refused(self.call("GetSessionToken", self.sts_client(
                client)), "AccessDenied", 403, "session credentials")
        for name in ("SerialNumber", "TokenCode", "Policy"):
            self.refused(self.call("GetSessionToken", **{name: "x"}),
                         "NotImplemented", 501, name)

    def test_calls_that_are_none(self):
        post = self.sts.post
        self.error(post("/"), "MethodNotAllowed")
        form = {"content-type": "application/x-www-form-urlencoded"}
        self.refused(post("/", (), b"", headers=form), "MissingAction", 400)
        self.refused(post("/", (), b"Action=", headers=form),
                     "MissingAction", 400)
        self.refused(post("/", (), b"Action=%ff", headers=form),
                     "InvalidURI", 400)
        self.refused(post("/", (), b"Action=GetCallerIdentity",
                          headers=form), "InvalidAction", 400,
                     "NO_VERSION_SPECIFIED")
        self.refused(self.call("GetCallerIdentity", Version="2011-06-14"),
                     "InvalidAction", 400)
        self.refused(post("/", (), b"x" * (gos3rve.MAX_STS_BYTES + 1),
                          headers=form), "MaxMessageLengthExceeded", 400)
        self.refused(post("/", (), b"&=&" * 40000, headers=form),
                     "MissingAction", 400)

    def test_the_signature_is_checked(self):
        ask = self.call
        self.refused(ask("GetCallerIdentity", signed=False),
                     "MissingAuthenticationToken", 403)
        good = self.sts
        for code, status, changes in (
                ("SignatureDoesNotMatch", 403, {"secret": "x"}),
                ("InvalidClientTokenId", 403, {"key_id": "NOBODY"}),
                ("InvalidClientTokenId", 403, {"token": "x"}),
                ("InvalidClientTokenId", 403, {"key_id": "ASIAX"}),
                ("IncompleteSignature", 400, {"service": "iam"})):
            client = self.sts_client(good)
            vars(client).update(changes)
            with self.subTest(**changes):
                self.refused(ask("GetCallerIdentity", client), code, status)
        old = self.expired()
        self.refused(ask("GetCallerIdentity", self.sts_client(old)),
                     "ExpiredToken", 403)
        body = b"Action=GetCallerIdentity&Version=2011-06-15"
        form = {"content-type": "application/x-www-form-urlencoded"}
        self.refused(good.post("/", (), body, headers=form,
                               when=time.time() - 3600),
                     "SignatureDoesNotMatch", 403)
        headers = good.sign("POST", "/", (), form, hashlib.sha256(
            body).hexdigest())
        headers["content-length"] = str(len(body))
        self.ok(good.send("POST", "/", body, headers))
        self.refused(good.send("POST", "/", body[:-1] + b"6", headers),
                     "InvalidAction", 400)
        self.refused(good.send("POST", "/", body.replace(b"Get", b"Got"),
                               headers), "NotImplemented", 501)
        self.refused(good.send("POST", "/", body + b"&", dict(
            headers, **{"content-length": str(len(body) + 1)})),
            "SignatureDoesNotMatch", 403)
        self.refused(ask("GetCallerIdentity", headers={
            "authorization": "AWS a:b"}, signed=False),
            "IncompleteSignature", 400)

    def expired(self):
        """An S3 client whose credentials have run out."""
        account, token, _ = gos3rve.issue_session(
            Account(self.s3.key_id, self.s3.secret, "", ""),
            gos3rve.Session(0, int(time.time()) - 1))
        client = Client(self.s3.url, account.key_id, account.secret,
                        token=token)
        self.addCleanup(client.close)
        return client

    def test_s3_knows_an_expired_token(self):
        self.error(self.expired().get("/box"), "ExpiredToken", 400)

    def test_roles_in_chains(self):
        chained = {"DurationSeconds": 3601}
        free = self.sts_client(self.role())
        self.ok(self.call("AssumeRole", free, **self.who))
        self.refused(self.call("AssumeRole", free, **dict(
            self.who, **chained)), "ValidationError", 400, "chaining")
        token = self.sts_client(self.session(self.call("GetSessionToken")))
        self.ok(self.call("AssumeRole", token, **dict(
            self.who, **chained)))
        tags = {"Tags__member__1__Key": "k", "Tags__member__1__Value": "v"}
        for action, resource, allowed, tagged in (
                ("s3:*", "*", False, False), ("*", "*", True, True),
                ("sts:AssumeRole", self.ROLE_ARN, True, False),
                ("sts:*", "arn:aws:iam::*:role/path/*", True, True),
                ("sts:AssumeRole", self.ROLE_ARN + "x", False, False)):
            client = self.sts_client(self.role([allow(action, resource)]))
            for values, expected in ((self.who, allowed), (
                    dict(self.who, **tags), tagged)):
                with self.subTest(action, resource=resource,
                                  tagged=values is not self.who):
                    answer = self.call("AssumeRole", client, **values)
                    self.assertEqual(answer.status, 200 if expected else 403)

    def test_what_a_chain_gives_up_stays_given_up(self):
        limited = self.role([allow("sts:*"), allow("s3:GetObject")])
        again = self.role([allow("s3:*", self.ROLE_ARN)],
                          self.sts_client(limited))
        self.error(again.put("/box/k", b"x"), "AccessDenied")


class SessionRequests(StsCase):
    """Sessions at S3: their policies, signatures and owners."""

    HOME = allow(["s3:GetObject", "s3:PutObject"], "arn:aws:s3:::box/home/*")

    def test_an_access_log_names_the_session(self):
        self.addCleanup(shutil.rmtree, self.path(gos3rve.STATE))
        self.ok(self.s3.put("/logs"))
        self.addCleanup(self.s3.delete, "/logs")
        self.ok(self.s3.put("/box", (
            "<BucketLoggingStatus>%s</BucketLoggingStatus>"
            % logging_xml()).encode(), {"logging": ""}))
        role = self.role()
        role.head("/box")
        role.head("/none")              # the line before it is spooled
        logs = self.path(gos3rve.STATE, "logs")
        with open(os.path.join(logs, os.listdir(logs)[0])) as file:
            line, = read_log(file.read())
        self.assertEqual(line.requester, "arn:aws:sts::%s:assumed-role/app/"
                         "tests" % self.ACCOUNT)

    def test_a_session_policy_limits_every_operation(self):
        self.fill("home/k", "k")
        client = self.role([self.HOME])
        for method, path, query, allowed in (
                ("GET", "/box/home/k", {}, True),
                ("HEAD", "/box/home/k", {}, True),
                ("PUT", "/box/home/new", {}, True),
                ("GET", "/box/k", {}, False), ("PUT", "/box/k", {}, False),
                ("DELETE", "/box/home/k", {}, False),
                ("GET", "/box", {}, False), ("HEAD", "/box", {}, False),
                ("GET", "/box", {"versioning": ""}, False),
                ("GET", "/box", {"policy": ""}, False),
                ("PUT", "/box", {"versioning": ""}, False),
                ("DELETE", "/box", {}, False),
                ("POST", "/box/home/k", {"uploads": ""}, True),
                ("GET", "/box/home/k", {"tagging": ""}, False),
                ("GET", "/box/home/k", {"acl": ""}, False),
                ("GET", "/", {}, False), ("PUT", "/new-box", {}, False)):
            with self.subTest(method=method, path=path, query=query):
                answer = client.request(method, path, query)
                self.assertEqual(answer.status, 200 if allowed else 403)
        copy = {"x-amz-copy-source": "/box/k"}
        self.error(client.put("/box/home/c", headers=copy), "AccessDenied")
        copy["x-amz-copy-source"] = "/box/home/k"
        self.ok(client.put("/box/home/c", headers=copy))
        self.error(client.put("/box/home/t", b"x", headers={
            "x-amz-tagging": "a=b"}), "AccessDenied")
        answer = self.ok(client.post("/box", {"delete": ""}, (
            b"<Delete><Object><Key>home/k</Key></Object></Delete>"),
            headers={"x-amz-checksum-crc32": crc64(
                b"<Delete><Object><Key>home/k</Key></Object></Delete>")}))
        self.assertEqual(answer.all("Error/Code"), ["AccessDenied"])

    def test_the_list_of_buckets(self):
        for resource, allowed in (("*", True), ("arn:aws:s3:::*", True),
                                  ("arn:aws:s3:::box", False)):
            for action in ("s3:ListAllMyBuckets", "s3:ListBucket"):
                answer = self.role([allow(action, resource)]).get("/")
                self.assertEqual(
                    answer.status == 200,
                    allowed and action == "s3:ListAllMyBuckets")
        client = self.role([allow("s3:ListAllMyBuckets", Condition={
            "IpAddress": {"aws:SourceIp": "127.0.0.0/8"}})])
        self.ok(client.get("/"))

    def test_a_new_bucket(self):
        there = b"<CreateBucketConfiguration><LocationConstraint>eu-west-1" \
            b"</LocationConstraint></CreateBucketConfiguration>"
        create = allow("s3:CreateBucket", "arn:aws:s3:::made-*")
        fixed = dict(create, Condition={"StringEquals": {
            "s3:LocationConstraint": "eu-west-1"}})
        for name, policy, path, body, headers, allowed in (
                ("name", create, "/made-1", b"", {}, True),
                ("another", create, "/other", b"", {}, False),
                ("location", fixed, "/made-2", there, {}, True),
                ("no location", fixed, "/made-3", b"", {}, False),
                ("acl", create, "/made-4", b"", {
                    "x-amz-acl": "private"}, False),
                ("grant", create, "/made-4", b"", {
                    "x-amz-grant-read": "id=" + self.ACCOUNT}, False),
                ("ownership", create, "/made-4", b"", {
                    "x-amz-object-ownership": "ObjectWriter"}, False),
                ("lock", create, "/made-4", b"", {
                    "x-amz-bucket-object-lock-enabled": "true"}, False),
                ("all", allow("s3:*"), "/made-4", b"", {
                    "x-amz-bucket-object-lock-enabled": "true"}, True)):
            with self.subTest(name):
                answer = self.role([policy]).put(path, body, headers=headers)
                self.assertEqual(answer.status, 200 if allowed else 403)
                self.assertEqual(self.s3.head(path).status,
                                 200 if allowed else 404)
                self.s3.delete(path)

    def test_what_a_session_makes_is_the_account_s(self):
        for client in (self.role(), self.session(self.call(
                "GetSessionToken"))):
            self.ok(client.put("/made"))
            self.ok(client.put("/made/k", b"x"))
            self.assertEqual(client.get("/made", {"acl": ""}).one(
                "Owner/ID"), self.ACCOUNT)
            self.assertIn("made", self.s3.get("/").all(
                "Buckets/Bucket/Name"))
            self.ok(self.s3.delete("/made/k"), 204)
            self.ok(self.s3.delete("/made"), 204)

    def test_bucket_policies_see_the_session(self):
        self.fill("k")
        tags = {"Tags__member__1__Key": "team",
                "Tags__member__1__Value": "red"}
        red = self.role(**tags)
        policy = document(statement(
            "Deny", {"AWS": self.ROLE_ARN}, "s3:GetObject",
            "arn:aws:s3:::box/*", Condition={
                "StringNotEquals": {"aws:PrincipalTag/team": "blue"}}))
        self.ok(self.s3.put("/box", policy.encode(), {"policy": ""}), 204)
        self.addCleanup(self.s3.delete, "/box", {"policy": ""})
        self.error(red.get("/box/k"), "AccessDenied")
        self.error(self.role().get("/box/k"), "AccessDenied")
        self.ok(self.role(**dict(tags, Tags__member__1__Value="blue")).get(
            "/box/k"))
        self.ok(self.role(RoleArn=self.ROLE_ARN + "2").get("/box/k"))
        self.ok(self.s3.get("/box/k"))

    def test_a_url_is_presigned_with_the_token(self):
        self.fill("home/k", "k")
        client = self.role([self.HOME])
        for path, status in (("/box/home/k", 200), ("/box/k", 403)):
            url = client.presign("GET", path)[len(client.url):]
            self.assertEqual(self.s3.send("GET", url).status, status)
            self.error(self.s3.send("GET", re.sub(
                "X-Amz-Security-Token=[^&]*&", "", url)),
                "InvalidAccessKeyId")
            self.error(self.s3.send("GET", url.replace(
                "X-Amz-Security-Token=", "X-Amz-Security-Token=A")),
                "InvalidToken")

    def test_a_url_of_sigv2_carries_the_token(self):
        client, expires = self.role(), str(int(time.time()) + 60)
        for method, path, status in (("PUT", "/made", 200),
                                     ("PUT", "/made/k", 200),
                                     ("DELETE", "/made/k", 204),
                                     ("DELETE", "/made", 204)):
            text = "%s\n\n\n%s\nx-amz-security-token:%s\n%s" % (
                method, expires, client.token, path)
            url = path + "?" + urllib.parse.urlencode({
                "AWSAccessKeyId": client.key_id, "Expires": expires,
                "Signature": base64.b64encode(hmac.new(
                    client.secret.encode(), text.encode(),
                    hashlib.sha1).digest()).decode(),
                "x-amz-security-token": client.token})
            self.ok(self.s3.send(method, url, headers={
                "content-length": "0"}), status)
            self.assertNotEqual(self.s3.send(method, url.replace(
                "token=", "token=A"), headers={
                    "content-length": "0"}).status, status)

    def test_a_form_carries_the_token(self):
        client = self.role([self.HOME])

        def post(key, *more):
            date = amz_date()
            fields = {
                "x-amz-algorithm": "AWS4-HMAC-SHA256", "x-amz-date": date,
                "x-amz-credential": "%s/%s/us-east-1/s3/aws4_request" % (
                    client.key_id, date[:8])}
            if "bare" not in more:
                fields["x-amz-security-token"] = client.token
            conditions = [{"bucket": "box"}, {"key": key}] + [
                {name: value} for name, value in fields.items()
                if not ("unnamed" in more and name.endswith("token"))]
            fields["policy"] = base64.b64encode(json.dumps({
                "expiration": "2999-01-01T00:00:00Z",
                "conditions": conditions}).encode()).decode()
            fields["x-amz-signature"] = hmac.new(
                v4_key(client.secret, date[:8]), fields["policy"].encode(),
                hashlib.sha256).hexdigest()
            data = form(dict(fields, key=key).items(), b"hello")
            return self.s3.send("POST", "/box", data, {
                "content-type": TYPE, "content-length": str(len(data))})
        self.ok(post("home/form"), 204)
        self.error(post("form"), "AccessDenied")
        self.error(post("home/form2", "bare"), "InvalidAccessKeyId")
        self.error(post("home/form2", "unnamed"), "AccessDenied")
        self.assertEqual(self.s3.keys("box"), ["home/form"])

    def test_the_chunks_of_a_session_are_signed_with_its_key(self):
        client = self.role()
        headers = client.sign("PUT", "/box/k", (), {
            "content-encoding": "aws-chunked",
            "x-amz-decoded-content-length": "5"}, SIGNED_STREAM)
        signer = ChunkSigner(client, headers)
        body = signer.chunk(b"hello") + signer.chunk(b"") + b"\r\n"
        headers["content-length"] = str(len(body))
        self.ok(client.send("PUT", "/box/k", body, headers))
        self.body("k", b"hello")


class StsServers(StsCase):
    """Tokens at other servers and of other accounts, other settings."""

    def serve(self, **values):
        """(a server, clients of STS for ALICE and for BOB)."""
        server = running(**values)
        self.addCleanup(shutil.rmtree, server.top, True)
        self.addCleanup(server.close, 5)
        return server, [self.sts_client(Client(
            server.url, account.key_id, account.secret,
            values.get("region", "us-east-1"))) for account in (ALICE, BOB)]

    def token(self, sts, answer):
        """An S3 client of another server, with an Answer's credentials."""
        client = self.session(answer)
        client.url, client.netloc = sts.url, sts.netloc
        return client

    def test_every_server_with_the_account_takes_its_tokens(self):
        _, (alice, bob) = self.serve()
        _, (there, _) = self.serve()
        for sts, who in ((alice, ALICE), (bob, BOB)):
            client = self.token(there, self.call("GetSessionToken", sts))
            self.ok(client.put("/of-" + who.user_id))
            answer = self.ok(client.get("/"))
            self.assertEqual((answer.one("Owner/ID"), answer.all(
                "Buckets/Bucket/Name")), (
                    who.user_id, ["of-" + who.user_id]))
        _, (stranger, _) = self.serve(key_val="another")
        client = self.token(stranger, self.call("GetSessionToken", alice))
        self.error(client.get("/"), "InvalidToken")

    def test_two_key_pairs_of_one_account(self):
        with mock.patch.dict(globals(), BOB=BOB._replace(
                user_id=ALICE.user_id)):
            _, (first, second) = self.serve()
        self.ok(self.token(first, self.call("GetSessionToken", first)).put(
            "/made"))
        client = self.token(second, self.call(
            "AssumeRole", second, RoleSessionName="x1",
            RoleArn="arn:aws:iam::%s:role/app" % ALICE.user_id))
        self.assertEqual(client.get("/").all("Buckets/Bucket/Name"),
                         ["made"])
        self.ok(client.delete("/made"), 204)

    def test_the_roles_of_an_account_are_its_own(self):
        _, clients = self.serve()
        for sts, who, expected in zip(clients * 2, (ALICE, BOB, BOB, ALICE),
                                      (200, 200, 403, 403)):
            answer = self.call(
                "AssumeRole", sts, RoleSessionName="x1",
                RoleArn="arn:aws:iam::%s:role/app" % who.user_id)
            self.assertEqual(answer.status, expected)
            if expected == 403:
                self.refused(answer, "AccessDenied", 403, "sts:AssumeRole on "
                             "resource: arn:aws:iam::%s:role/app"
                             % who.user_id)

    def test_a_made_up_user_id_is_not_written_down(self):
        server = gos3rve.serve()
        self.addCleanup(server.close, 5)
        sts = self.sts_client(Client(server.url, server.key_id,
                                     server.key_val))
        account = self.call("GetCallerIdentity", sts).one(".//Account")
        client = self.token(sts, self.call(
            "AssumeRole", sts, RoleSessionName="x1",
            RoleArn="arn:aws:iam::%s:role/app" % account))
        self.ok(client.put("/made"))
        upload = self.ok(client.post("/made/k", {"uploads": ""}))
        self.assertEqual(client.get("/made", {"acl": ""}).one("Owner/ID"),
                         account)
        self.assertIsNone(server.store.bucket("made").owner)
        self.ok(client.delete("/made/k", {
            "uploadId": upload.one("UploadId")}), 204)

    def test_a_readonly_server_gives_credentials(self):
        _, (sts, _) = self.serve(readonly=True)
        client = self.token(sts, self.call("GetSessionToken", sts))
        self.ok(client.get("/"))
        self.error(client.put("/no"), "AccessDenied")

    def test_the_region_is_the_server_s(self):
        _, (sts, _) = self.serve(region="eu-west-1")
        self.ok(self.call("GetCallerIdentity", sts))
        sts.region = "us-east-1"
        self.refused(self.call("GetCallerIdentity", sts),
                     "IncompleteSignature", 400, "eu-west-1")

    def test_a_page_elsewhere_may_read_the_answer(self):
        _, (sts, _) = self.serve(cors=("*",))
        for signed, status in ((True, 200), (False, 403)):
            answer = self.call("GetCallerIdentity", sts, signed=signed,
                               headers={"origin": "http://page.test"})
            self.assertEqual(answer.status, status)
            self.assertEqual(answer.headers["access-control-allow-origin"],
                             "*")


# --- regions, names and addresses ---

class RegionRequests(unittest.TestCase):

    def serve(self, **options):
        """A server and its Client."""
        server = gos3rve.serve(buckets=["box"], **options)
        self.addCleanup(server.close, 5)
        client = Client(server.url, server.key_id, server.key_val)
        self.addCleanup(client.close)
        return client

    @staticmethod
    def constraint(region):
        """CreateBucket's document."""
        return ("<CreateBucketConfiguration><LocationConstraint>%s"
                "</LocationConstraint></CreateBucketConfiguration>"
                % region).encode()

    def test_without_a_region_every_scope_is_taken(self):
        client = self.serve()
        for region in ("us-east-1", "eu-central-1", "auto", "x"):
            client.region = region
            self.assertEqual(client.put("/box/" + region, b"x").status, 200)
            url = urllib.parse.urlsplit(client.presign("GET",
                                                       "/box/" + region))
            self.assertEqual(client.send("GET", "%s?%s" % (
                url.path, url.query)).body, b"x")

    def test_a_given_region_is_the_only_one(self):
        client = self.serve(region="eu-west-1")
        answer = client.get("/box")
        self.assertEqual((answer.status, answer.code),
                         (400, "AuthorizationHeaderMalformed"))
        self.assertEqual(answer.one("Region"), "eu-west-1")
        url = urllib.parse.urlsplit(client.presign("GET", "/box"))
        answer = client.send("GET", "%s?%s" % (url.path, url.query))
        self.assertEqual((answer.status, answer.code),
                         (400, "AuthorizationQueryParametersError"))
        client.region = "eu-west-1"
        answer = client.get("/box", {"location": ""})
        self.assertEqual(answer.status, 200, answer.body)
        self.assertEqual(answer.xml().text, "eu-west-1")
        self.assertEqual(client.head("/box").headers[
            "x-amz-bucket-region"], "eu-west-1")

    def test_a_bucket_elsewhere_is_refused_where_a_region_is_given(self):
        client = self.serve(region="eu-west-1")
        client.region = "eu-west-1"
        answer = client.put("/elsewhere", self.constraint("us-west-2"))
        self.assertEqual((answer.status, answer.code),
                         (400, "IllegalLocationConstraintException"))
        self.assertEqual(client.head("/elsewhere").status, 404)
        self.assertEqual(client.put("/here", self.constraint(
            "eu-west-1")).status, 200)
        answer = client.put("/here", self.constraint("eu-west-1"))
        self.assertEqual((answer.status, answer.code),
                         (409, "BucketAlreadyOwnedByYou"))


class VirtualHostRequests(OperationCase):

    options = {"domain": ("s3.example.test", "other.test")}

    def host(self, host, method="GET", path="/", query=(), body=b"",
             **headers):
        """A signed request under another Host."""
        return self.s3.request(method, path, query, body,
                               headers=dict(headers, host=host))

    def test_the_host_names_the_bucket(self):
        for number, host in enumerate((
                "box.s3.example.test", "box.s3.example.test:9000",
                "BOX.S3.Example.Test", "box.other.test", "box.localhost",
                "box.localhost:%d" % self.server.port)):
            with self.subTest(host=host):
                data = b"%d" % number
                self.ok(self.host(host, "PUT", "/a b/k", body=data))
                self.body("a b/k", data)
                self.assertEqual(self.host(host, path="/a b/k").body, data)
                answer = self.ok(self.host(host, query={"list-type": "2"}))
                self.assertEqual(answer.one("Name"), "box")
                self.assertEqual(answer.all("Contents/Key"), ["a b/k"])

    def test_a_key_may_look_like_a_bucket_or_be_odd(self):
        for key in ("box/k", "/lead", "a//b", ".."):
            with self.subTest(key=key):
                self.ok(self.host("box.s3.example.test", "PUT", "/" + key,
                                  body=b"x"))
                self.assertEqual(self.s3.keys("box"), [key])
                self.ok(self.host("box.s3.example.test", "DELETE",
                                  "/" + key), 204)

    def test_other_hosts_are_path_style(self):
        self.fill("k")
        for host in ("127.0.0.1", "box.example.com", "s3.example.test",
                     "box.unknown.test", "localhost", "10.0.0.1:80",
                     "notother.test", "[::1]:80"):
            with self.subTest(host=host):
                self.assertEqual(self.ok(self.host(
                    host, path="/box/k")).body, b"x")

    def test_buckets_are_made_and_deleted(self):
        for name in ("virtual", "with.dots"):
            host = name + ".s3.example.test"
            self.ok(self.host(host, "PUT"))
            self.ok(self.s3.head("/" + name))
            self.error(self.host(host, "DELETE", query={"acl": ""}),
                       "NotImplemented", 501)
            self.ok(self.host(host, "DELETE"), 204)
            self.error(self.host(host), "NoSuchBucket", 404)

    def test_a_bad_bucket_in_the_host_harms_nothing(self):
        for host in ("...s3.example.test", "..s3.example.test",
                     "a/b.s3.example.test",
                     "%2e%2e.s3.example.test", ".gos3rve.localhost"):
            for method in ("GET", "PUT", "DELETE"):
                with self.subTest(host=host, method=method):
                    answer = self.host(host, method)
                    self.assertIn(answer.status, (400, 403, 404, 405))
        self.assertEqual(os.listdir(self.server.dir_buckets), ["box"])

    def test_the_location_of_an_upload_names_the_bucket_once(self):
        host = "box.s3.example.test"
        upload = self.host(host, "POST", "/k", {"uploads": ""}).one(
            "UploadId")
        etag = self.host(host, "PUT", "/k", {
            "uploadId": upload, "partNumber": "1"}, b"x").etag
        answer = self.ok(self.host(host, "POST", "/k", {
            "uploadId": upload}, (
            "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>"
            "%s</ETag></Part></CompleteMultipartUpload>" % etag).encode()))
        self.assertIn(answer.one("Location"), (
            "http://s3.example.test/box/k", "http://box.s3.example.test/k"))


class PresignedRequests(OperationCase):

    def fetch(self, url, method="GET", body=b"", **headers):
        """An unsigned request for a URL of this server."""
        parts = urllib.parse.urlsplit(url)
        if method == "PUT":
            headers["content-length"] = str(len(body))
        return self.s3.send(method, "%s?%s" % (parts.path, parts.query),
                            body, headers)

    def v2(self, method, path, expires, query=""):
        """A URL presigned with SigV2 (RESTAuthentication.html)."""
        path = quote(path, "/-_.~")
        text = "%s\n\n\n%d\n%s%s" % (method, expires, path,
                                     query and "?" + query)
        signature = base64.b64encode(hmac.new(
            self.s3.secret.encode(), text.encode(), hashlib.sha1).digest())
        return "%s%s?%sAWSAccessKeyId=%s&Expires=%d&Signature=%s" % (
            self.server.url, path, query and query + "&",
            self.s3.key_id, expires, quote(signature.decode()))

    def test_put_get_head_delete(self):
        for key in ("k", "a b+c", "\u00e9/%2F", "d//e"):
            path = "/box/" + key
            for sign in (self.s3.presign, lambda method, path: self.v2(
                    method, path, int(time.time()) + 60)):
                with self.subTest(key=key):
                    self.ok(self.fetch(sign("PUT", path), "PUT", b"data"))
                    self.assertEqual(self.ok(self.fetch(
                        sign("GET", path))).body, b"data")
                    self.ok(self.fetch(sign("HEAD", path), "HEAD"))
                    self.ok(self.fetch(sign("DELETE", path), "DELETE"), 204)
                    self.assertEqual(self.s3.keys("box"), [])

    def test_with_further_parameters(self):
        self.fill("k")
        name = "response-content-type"
        url = self.s3.presign("GET", "/box/k", [(name, "text/odd")])
        self.assertEqual(self.fetch(url).headers["content-type"],
                         "text/odd")
        url = self.v2("GET", "/box/k", int(time.time()) + 60,
                      name + "=text/odd")
        self.assertEqual(self.fetch(url).headers["content-type"],
                         "text/odd")
        url = self.s3.presign("GET", "/box", [("list-type", "2"),
                                              ("prefix", "k")])
        self.assertEqual(self.fetch(url).all("Contents/Key"), ["k"])

    def test_a_range_needs_no_signature(self):
        self.ok(self.s3.put("/box/k", b"0123456789"))
        answer = self.fetch(self.s3.presign("GET", "/box/k"),
                            range="bytes=2-3")
        self.assertEqual((answer.status, answer.body), (206, b"23"))

    def test_changed_urls_are_SignatureDoesNotMatch(self):
        self.fill("k", "other")
        good = self.s3.presign("GET", "/box/k")
        old = self.v2("GET", "/box/k", int(time.time()) + 60)
        for url in (good.replace("/box/k", "/box/other"),
                    good.replace("Expires=60", "Expires=61"),
                    good + "&response-content-type=text/html",
                    good + "&versionId=null",
                    old.replace("/box/k", "/box/other"),
                    old + "&response-content-type=text/html"):
            with self.subTest(url=url):
                self.error(self.fetch(url), "SignatureDoesNotMatch", 403)
        for url in (good, old):
            self.error(self.fetch(url, "PUT", b"evil"),
                       "SignatureDoesNotMatch", 403)
        self.body("k", b"x")

    def test_old_and_early_urls_are_AccessDenied(self):
        self.fill("k")
        now = time.time()
        for url in (self.s3.presign("GET", "/box/k", when=now - 100),
                    self.s3.presign("GET", "/box/k", expires=3600,
                                    when=now + 1800),
                    self.v2("GET", "/box/k", int(now) - 10)):
            with self.subTest(url=url):
                self.error(self.fetch(url), "AccessDenied", 403)
        self.ok(self.fetch(self.s3.presign("GET", "/box/k", expires=3600,
                                           when=now - 1800)))
        for expires in (604801, -1):
            self.error(self.fetch(self.s3.presign(
                "GET", "/box/k", expires=expires)),
                "AuthorizationQueryParametersError", 400)
        self.ok(self.fetch(self.s3.presign("GET", "/box/k",
                                           expires=604800)))

    def test_signed_headers_must_be_sent_as_signed(self):
        url = self.s3.presign("PUT", "/box/k", headers={
            "content-type": "text/a", "x-amz-meta-a": "b"})
        more = {"content-type": "text/a", "x-amz-meta-a": "b"}
        self.error(self.fetch(url, "PUT", b"x"), "SignatureDoesNotMatch",
                   403)
        self.error(self.fetch(url, "PUT", b"x", **dict(
            more, **{"x-amz-meta-a": "c"})), "SignatureDoesNotMatch", 403)
        self.ok(self.fetch(url, "PUT", b"x", **more))
        self.assertEqual(self.s3.head("/box/k").headers["x-amz-meta-a"],
                         "b")

    def test_a_header_of_amazon_s_that_was_not_signed_is_refused(self):
        url = self.s3.presign("PUT", "/box/k")
        self.error(self.fetch(url, "PUT", b"x", **{"x-amz-meta-a": "b"}),
                   "AccessDenied", 403)
        self.assertEqual(self.s3.keys("box"), [])

    def test_sigv2_in_the_header(self):
        self.fill("k")
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        text = "GET\n\n\n%s\n/box/k" % date
        signature = base64.b64encode(hmac.new(
            self.s3.secret.encode(), text.encode(), hashlib.sha1).digest())
        authorization = "AWS %s:%s" % (self.s3.key_id, signature.decode())
        headers = {"date": date, "authorization": authorization}
        self.assertEqual(self.ok(self.s3.send(
            "GET", "/box/k", headers=headers)).body, b"x")
        self.error(self.s3.send("GET", "/box/other", headers=headers),
                   "SignatureDoesNotMatch", 403)

    def test_two_ways_of_signing_at_once_are_refused(self):
        self.fill("k")
        url = self.s3.presign("GET", "/box/k")
        headers = self.s3.sign("GET", "/box/k", [], {}, "UNSIGNED-PAYLOAD")
        headers.pop("host")
        answer = self.fetch(url, **headers)
        self.error(answer, "InvalidArgument", 400)


class PublicUrlRequests(OperationCase):

    options = {"public_url": "https://files.example.test"}

    def setUp(self):
        super().setUp()
        self.fill("k")
        self.outside = Client("https://files.example.test", self.s3.key_id,
                              self.s3.secret)

    def through(self, client, method="GET", path="/box/k", query=(),
                body=b"", **headers):
        """What a proxy makes of a request to the public URL."""
        sent = client.sign(method, path, list(query), {}, hashlib.sha256(
            body).hexdigest())
        sent.pop("host")
        sent.update({n.replace("_", "-"): v for n, v in headers.items()})
        sent["content-length"] = str(len(body))
        target = path + ("?" + "&".join("%s=%s" % (quote(n), quote(v))
                                        for n, v in query) if query else "")
        return self.s3.send(method, target, body, sent)

    def test_signatures_under_the_public_name_hold(self):
        for headers in ({"x_forwarded_host": "files.example.test"}, {}):
            answer = self.through(self.outside, **headers)
            self.assertEqual(self.ok(answer).body, b"x")
        url = urllib.parse.urlsplit(self.outside.presign("GET", "/box/k"))
        self.assertEqual(self.ok(self.s3.send(
            "GET", "%s?%s" % (url.path, url.query), headers={
                "x-forwarded-host": "files.example.test"})).body, b"x")

    def test_the_forwarded_host_may_be_another_name(self):
        other = Client("https://other.example.test", self.s3.key_id,
                       self.s3.secret)
        self.ok(self.through(other, x_forwarded_host="other.example.test"))
        self.error(self.through(other), "SignatureDoesNotMatch", 403)

    def test_direct_requests_go_on(self):
        self.body("k", b"x")

    def test_the_location_of_an_upload_is_public(self):
        upload = self.s3.post("/box/u", {"uploads": ""}).one("UploadId")
        etag = self.s3.put("/box/u", b"x", {"uploadId": upload,
                                            "partNumber": "1"}).etag
        answer = self.ok(self.s3.post("/box/u", {"uploadId": upload}, (
            "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>"
            "%s</ETag></Part></CompleteMultipartUpload>" % etag).encode()))
        self.assertEqual(answer.one("Location"),
                         "https://files.example.test/box/u")


class OutsideRequests(OperationCase):
    """Health URLs, and paths that try to lead out of a bucket."""

    def test_the_health_urls_need_no_signature(self):
        for path in ("/-/health", "/minio/health/live"):
            for method in ("GET", "HEAD"):
                with self.subTest(path=path, method=method):
                    answer = self.ok(self.s3.send(method, path))
                    self.assertNotIn(b"box", answer.body)

    def test_near_the_health_urls_there_is_nothing(self):
        for path in ("/-/", "/-/healthy", "/-/health/x", "/minio/",
                     "/minio/health/cluster"):
            self.assertIn(self.s3.send("GET", path).status, (400, 403, 404))

    def test_a_forwarded_host_means_nothing_without_a_public_url(self):
        self.fill("k")
        other = Client("https://other.example.test", self.s3.key_id,
                       self.s3.secret)
        headers = other.sign("GET", "/box/k", [], {}, "UNSIGNED-PAYLOAD")
        headers.pop("host")
        headers["x-forwarded-host"] = "other.example.test"
        self.error(self.s3.send("GET", "/box/k", headers=headers),
                   "SignatureDoesNotMatch", 403)

    def test_no_path_leads_out_of_a_bucket(self):
        secret = os.path.join(self.server.dir_buckets, "secret")
        with open(secret, "wb") as file:
            file.write(b"top secret")
        self.addCleanup(os.unlink, secret)
        self.by_hand("d/f")
        for raw_path in (
                "/box/../secret", "/box/%2e%2e/secret", "/box/..%2fsecret",
                "/box/d/../../secret", "/box/d/%2e%2e/%2e%2e/secret",
                "/../secret", "/%2e%2e/secret", "/..%2fsecret", "/secret",
                "/box/..", "/box/.", "/.", "/..", "/./secret",
                "/box%2f..%2fsecret", "//secret", "/box//secret",
                "/box/%2f" + secret.lstrip("/"), "/box/" + secret,
                "/box/..%5csecret", "/box/.gos3rve/../../secret",
                "/.gos3rve/secret", "/box/d/f/../../../secret"):
            for method in ("GET", "HEAD", "DELETE"):
                with self.subTest(method=method, raw_path=raw_path):
                    answer = self.s3.request(method, "", raw_path=raw_path)
                    self.assertNotIn(b"top secret", answer.body)
                    self.assertNotEqual(answer.status, 200)
                    self.assertLess(answer.status, 500)
            with open(secret, "rb") as file:
                self.assertEqual(file.read(), b"top secret")
        self.assertEqual(self.tree(), {os.path.join("d", "f"): b"by hand"})

    def test_what_is_put_there_stays_in_the_bucket(self):
        top = os.path.dirname(self.server.dir_buckets)
        before = {base: sorted(names) for base, _, names in os.walk(top)
                  if not base.startswith(self.path())}
        for key in ("../out", "d/../../out", "..", "/out", "a/..",
                    ".gos3rve/bucket.json", ".gos3rve/tmp/x"):
            with self.subTest(key=key):
                self.ok(self.s3.put("/box/" + key, b"mine"))
                self.body(key, b"mine")
        self.assertEqual({base: sorted(names) for base, _, names
                          in os.walk(top) if not base.startswith(
                              self.path())}, before)
        self.assertEqual(self.tree(), {})

    def test_the_state_directory_is_no_object(self):
        self.fill("odd//key")           # so that there is one
        self.assertTrue(os.path.isdir(self.path(gos3rve.STATE)))
        for base, _, names in os.walk(self.path(gos3rve.STATE)):
            for name in names:
                key = os.path.relpath(os.path.join(base, name), self.path())
                with self.subTest(key=key):
                    self.error(self.s3.get("/box/" + key), "NoSuchKey", 404)
                    self.ok(self.s3.delete("/box/" + key), 204)
        self.body("odd//key", b"x")

    def test_a_symlink_that_leads_out_is_no_object(self):
        outside = temporary_directory(self)
        with open(os.path.join(outside, "f"), "wb") as file:
            file.write(b"top secret")
        os.symlink(os.path.join(outside, "f"), self.path("file"))
        os.symlink(outside, self.path("dir"))
        for key in ("file", "dir/f"):
            self.error(self.s3.get("/box/" + key), "NoSuchKey", 404)
            self.error(self.s3.put("/box/copy", headers={
                "x-amz-copy-source": "/box/" + key}), "NoSuchKey", 404)
        self.assertEqual(self.s3.keys("box"), [])
        self.s3.put("/box/dir/new", b"x")
        self.s3.delete("/box/dir/f")
        self.s3.delete("/box/file")
        self.assertEqual(os.listdir(outside), ["f"])

    def test_malformed_targets_are_refused(self):
        for raw_path in ("/box/%ff%fe", "/%ff"):
            with self.subTest(raw_path=raw_path):
                answer = self.s3.send("GET", raw_path)
                self.assertIn((answer.status, answer.code), (
                    (400, "InvalidURI"), (403, "AccessDenied")))

    def test_a_nul_in_a_key_harms_nothing(self):
        answer = self.s3.request("PUT", "", raw_path="/box/a%00b",
                                 body=b"x")
        self.assertIn(answer.status, (200, 400))
        self.assertEqual(self.tree(), {})

###############################################################################
# 9. HTTP
###############################################################################

def read_answer(file, method="GET"):
    """The next Answer on a stream, taken apart as strictly as RFC 9112
    writes it; None at its end.  Raises ValueError for anything else."""
    line = file.readline()
    if not line:
        return None
    match = re.match(rb"HTTP/1\.1 ([1-5]\d\d) [ -~]*\r\n\Z", line)
    if not match:
        raise ValueError("no status line: %r" % line)
    status, headers = int(match.group(1)), {}
    while True:
        line = file.readline()
        if line == b"\r\n":
            break
        match = re.match(rb"([A-Za-z0-9-]+): ?([ -~\x80-\xff]*)\r\n\Z", line)
        if not match:
            raise ValueError("no header line: %r" % line)
        name, value = (text.decode("latin-1") for text in match.groups())
        if name.lower() in headers:
            raise ValueError("%s comes twice" % name)
        headers[name.lower()] = value.strip()
    body = b""
    if method != "HEAD" and status >= 200 and status not in (204, 304):
        body = file.read(int(headers["content-length"]))
        if len(body) != int(headers["content-length"]):
            raise ValueError("the body is cut short")
    return Answer(status, headers, body)


class Peer:
    """A raw connection to a server: bytes out, strict Answers in."""

    def __init__(self, port, context=None):
        self.sock = socket.create_connection(("127.0.0.1", port), 20)
        if context:
            self.sock = context.wrap_socket(
                self.sock, server_hostname="localhost",
                suppress_ragged_eofs=False)
        self._file = self.sock.makefile("rb")

    def send(self, data):
        """Send bytes; itself."""
        self.sock.sendall(data)
        return self

    def answer(self, method="GET"):
        """The next Answer, None at the end; 1xx ones too."""
        return read_answer(self._file, method)

    def rest(self):
        """What comes until the server closes."""
        return self._file.read()

    def close(self):
        """Close the connection."""
        self._file.close()
        self.sock.close()

    def reset(self):
        """Vanish without a good-bye."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                             struct_linger(1, 0))
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def struct_linger(on, seconds):
    """C's struct linger."""
    size = 4 if os.name == "posix" else 2
    return on.to_bytes(size, sys.byteorder) + seconds.to_bytes(
        size, sys.byteorder)


def wait_for(condition, seconds=20):
    """The first true value of a function; its last one when time is up."""
    deadline = time.monotonic() + seconds
    value = condition()
    while not value and time.monotonic() < deadline:
        time.sleep(0.01)
        value = condition()
    return value


class Lines(list):
    """A list that a server's threads append to."""

    def take(self, count):
        """The first `count` entries, once there are as many."""
        wait_for(lambda: len(self) >= count, 3)
        return self[:count]


class HttpCase(ServerCase):
    """Raw connections, presigned targets, and a report that must stay
    empty of tracebacks."""

    context = None

    def setUp(self):
        super().setUp()
        self.reports = Lines()
        self.server.server.report = self.reports.append
        self.addCleanup(setattr, self.server.server, "report",
                        lambda line: None)

    def tearDown(self):
        faults = [line for line in self.reports if "Traceback" in line]
        self.assertEqual(faults, [])

    def peer(self):
        """A Peer of the server, closed at the end of the test."""
        peer = Peer(self.server.port, self.context)
        self.addCleanup(peer.close)
        return peer

    def head(self, method, path, query=(), headers=(), version="1.1",
             good=True):
        """The bytes of a presigned request's head."""
        url = self.s3.presign(method, path, query)
        target = url[len(self.s3.url):] + ("" if good else "0")
        lines = ["%s %s HTTP/%s" % (method, target, version),
                 "Host: " + self.s3.netloc]
        lines += ["%s: %s" % pair for pair in headers]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def put_bytes(self, path, body, *headers, **more):
        """The bytes of a presigned PUT with its body."""
        return self.head("PUT", path, headers=[
            ("Content-Length", len(body))] + list(headers), **more) + body

    def alive(self, peer):
        """Assert that a connection is still in step."""
        answer = peer.send(HEALTH).answer()
        self.assertEqual(answer and answer.status, 200)

    def closed(self, peer):
        """Assert that the server closes and says no more."""
        self.assertEqual(peer.rest(), b"")


HEALTH = b"GET /-/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
GET = b"GET /box/k HTTP/1.1\r\nHost: localhost\r\n"
PUT = b"PUT /box/k HTTP/1.1\r\nHost: localhost\r\n"

# What RFC 9112 does not allow: name, bytes, status
MALFORMED = (
    ("nothing but an empty line's half", b"\r", 400),
    ("garbage", b"\x00" * 5000, 400),
    ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("another protocol", b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400),
    ("HTTP/0.9", b"GET /\r\n\r\n", 400),
    ("a word too many", b"GET / HTTP/1.1 x\r\nHost: a\r\n\r\n", 400),
    ("no target", b"GET  HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("two spaces", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("tabs", b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("a space before", b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("lower case", b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("a method of odd bytes", b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("NUL in the target", b"GET /a\0b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("CR in the target", b"GET /a\rb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("no number", b"GET / HTTP/x.y\r\nHost: a\r\n\r\n", 400),
    ("lower-case http", b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    ("three numbers", b"GET / HTTP/1.1.1\r\nHost: a\r\n\r\n", 400),
    ("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    ("HTTP/3.0", b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("no Host", b"GET / HTTP/1.1\r\n\r\n", 400),
    ("two Hosts", GET + b"Host: localhost\r\n\r\n", 400),
    ("no colon", GET + b"Colonless\r\n\r\n", 400),
    ("space before the colon", GET + b"X-A : 1\r\n\r\n", 400),
    ("no name", GET + b": 1\r\n\r\n", 400),
    ("a space in a name", GET + b"X A: 1\r\n\r\n", 400),
    ("a bracket in a name", GET + b"X(A: 1\r\n\r\n", 400),
    ("a high byte in a name", GET + b"X\xe9: 1\r\n\r\n", 400),
    ("a folded line", GET + b"X-A: 1\r\n 2\r\n\r\n", 400),
    ("a line folded by tab", GET + b"X-A: 1\r\n\t2\r\n\r\n", 400),
    ("a first line folded", b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    ("NUL in a value", GET + b"X-A: 1\x002\r\n\r\n", 400),
    ("bell in a value", GET + b"X-A: 1\x072\r\n\r\n", 400),
    ("CR in a value", GET + b"X-A: 1\r2\r\n\r\n", 400),
    ("LF after a header", GET + b"X-A: 1\nX-B: 2\r\n\r\n", 400),
    ("LF only", b"GET / HTTP/1.1\nHost: a\n\n", 400),
    ("LF after the request line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    ("half a head", GET + b"X-A: 1\r\n", 400),
    ("two lengths", PUT + b"Content-Length: 5\r\n"
     b"Content-Length: 6\r\n\r\nhello!", 400),
    ("a length twice", PUT + b"Content-Length: 5\r\n"
     b"content-length: 5\r\n\r\nhello", 400),
    ("a list of lengths", PUT + b"Content-Length: 5, 5\r\n\r\nhello", 400),
    ("a signed length", PUT + b"Content-Length: +5\r\n\r\nhello", 400),
    ("a negative length", PUT + b"Content-Length: -5\r\n\r\nhello", 400),
    ("a length in hex", PUT + b"Content-Length: 0x5\r\n\r\nhello", 400),
    ("a length of Python", PUT + b"Content-Length: 1_0\r\n\r\n", 400),
    ("an empty length", PUT + b"Content-Length:\r\n\r\nhello", 400),
    ("a length no number", PUT + b"Content-Length: \xb2\r\n\r\nhello", 400),
    ("a length of 40 digits", PUT + b"Content-Length: "
     + b"9" * 40 + b"\r\n\r\n", 400),
    ("length and coding", PUT + b"Content-Length: 5\r\n"
     b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("coding and length", PUT + b"Transfer-Encoding: chunked\r\n"
     b"Content-Length: 5\r\n\r\n0\r\n\r\n", 400),
    ("two codings", PUT + b"Transfer-Encoding: chunked\r\n"
     b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("a coding in HTTP/1.0", b"PUT /box/k HTTP/1.0\r\n"
     b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("an unknown coding", PUT + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    ("a coding before", PUT + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
     501),
    ("chunked is not last", PUT + b"Transfer-Encoding: chunked, gzip\r\n"
     b"\r\n0\r\n\r\n", 501),
    ("two Authorizations", GET + b"Authorization: a\r\n"
     b"Authorization: b\r\n\r\n", 400),
    ("an endless request line", b"GET /" + b"a" * 100000, 400),
    ("an endless header", GET + b"X-A: " + b"a" * 100000, 400),
    ("a huge header", GET + b"X-A: " + b"a" * 100000 + b"\r\n\r\n", 400),
    ("2,000 headers", GET + b"".join(
        b"X-%d: 1\r\n" % i for i in range(2000)) + b"\r\n", 400),
    ("20,000 headers", GET + b"".join(
        b"X-%d: 1\r\n" % i for i in range(20000)) + b"\r\n", 400),
)

# What it does allow, however odd; all ask for what needs no signature
TOLERATED = (
    ("an empty line before", b"\r\n\r\nGET /-/health HTTP/1.1\r\n"
     b"Host: a\r\n\r\n"),
    ("HTTP/1.0 without Host", b"GET /-/health HTTP/1.0\r\n\r\n"),
    ("an empty Host", b"GET /-/health HTTP/1.1\r\nHost:\r\n\r\n"),
    ("no space after the colon", b"GET /-/health HTTP/1.1\r\n"
     b"Host:a\r\n\r\n"),
    ("tabs and spaces around a value", b"GET /-/health HTTP/1.1\r\n"
     b"Host:\t a \t\r\n\r\n"),
    ("an empty value", HEALTH[:-2] + b"X-A:\r\n\r\n"),
    ("a value of high bytes", HEALTH[:-2] + b"X-A: \xff\xe9\r\n\r\n"),
    ("every character of a token",
     HEALTH[:-2] + b"!#$%&'*+-.^_`|~09azAZ: 1\r\n\r\n"),
    ("a header twice", HEALTH[:-2] + b"X-A: 1\r\nX-A: 2\r\n\r\n"),
    ("100 headers", HEALTH[:-2] + b"".join(
        b"X-%d: 1\r\n" % i for i in range(100)) + b"\r\n"),
    ("a header of 16,000 bytes",
     HEALTH[:-2] + b"X-A: " + b"a" * 16000 + b"\r\n\r\n"),
    ("an unknown expectation", HEALTH[:-2] + b"Expect: tea\r\n\r\n"),
    ("an empty body", HEALTH[:-2] + b"Content-Length: 0\r\n\r\n"),
    ("a query", HEALTH.replace(b"health ", b"health?x=1&y ")),
    ("MinIO's path",
     HEALTH.replace(b"/-/health", b"/minio/health/live")),
)


class HttpRequests(HttpCase):

    def error_document(self, answer, status):
        """Assert an S3 error with request ids that agree."""
        self.assertIsNotNone(answer, "closed without an answer")
        self.assertEqual(answer.status, status, answer.body)
        self.assertEqual(answer.headers["content-type"], "application/xml")
        self.assertTrue(answer.code)
        self.assertEqual(answer.xml().tag, "Error")
        self.assertTrue(answer.headers["x-amz-request-id"])
        self.assertEqual(answer.one("RequestId"),
                         answer.headers["x-amz-request-id"])

    def test_malformed_requests_get_one_error_and_a_closed_connection(self):
        for name, data, status in MALFORMED:
            with self.subTest(name):
                file = io.BytesIO(raw(self.server.port, data))
                answer = read_answer(file)
                self.error_document(answer, status)
                self.assertEqual(answer.headers["connection"], "close")
                self.assertEqual(file.read(), b"")

    def test_what_follows_a_malformed_request_is_never_served(self):
        for name, data, _ in MALFORMED:
            if not data.endswith(b"\r\n\r\n"):
                continue
            with self.subTest(name):
                file = io.BytesIO(raw(self.server.port, data + HEALTH * 2))
                self.assertGreaterEqual(read_answer(file).status, 400)
                self.assertEqual(file.read(), b"")

    def test_a_malformed_request_is_answered_while_the_client_waits(self):
        for name, data, status in MALFORMED:
            if not data.endswith((b"\r\n\r\n", b"a" * 100000)):
                continue
            with self.subTest(name), Peer(self.server.port) as peer:
                answer = peer.send(data).answer()
                self.error_document(answer, status)
                self.closed(peer)

    def test_odd_but_lawful_requests_are_served(self):
        for name, data in TOLERATED:
            with self.subTest(name):
                file = io.BytesIO(raw(self.server.port, data))
                answer = read_answer(file)
                self.assertEqual((answer.status, answer.body), (200, b""))
                self.assertEqual(file.read(), b"")

    def test_a_malformed_body_is_a_400_and_leaves_nothing(self):
        head = self.head("PUT", "/box/k", headers=[
            ("Transfer-Encoding", "chunked")])
        for body in (b"x\r\n", b"-1\r\n", b"0x5\r\nhello\r\n0\r\n\r\n",
                     b"5\r\nhello!!\r\n0\r\n\r\n", b"5\nhello\n0\n\n",
                     b"5\r\nhello\r\n", b"5\r\nhel", b"\r\n\r\n",
                     b"F" * 17 + b"\r\n", b"5;" + b"a" * 20000,
                     b"5 5\r\nhello\r\n0\r\n\r\n"):
            with self.subTest(body[:30]):
                file = io.BytesIO(raw(self.server.port, head + body))
                self.error_document(read_answer(file), 400)
                self.assertEqual(file.read(), b"")
        self.assertEqual(self.s3.keys("box"), [])

    def test_a_chunked_body_with_extensions_and_trailer_is_stored(self):
        peer = self.peer().send(self.head("PUT", "/box/k", headers=[
            ("Transfer-Encoding", "Chunked")])
            + b"5;name=value\r\nhello\r\n6\r\n world\r\n0\r\nX-A: 1\r\n\r\n")
        self.ok(peer.answer())
        self.alive(peer)
        self.assertEqual(self.s3.get("/box/k").body, b"hello world")

    def test_unknown_methods_are_refused_and_the_connection_goes_on(self):
        peer = self.peer()
        for method in ("PATCH", "TRACE", "PROPFIND", "LINK"):
            with self.subTest(method):
                answer = peer.send(b"%s /box/k HTTP/1.1\r\nHost: a\r\n\r\n"
                                   % method.encode()).answer()
                self.error_document(answer, 405)
        self.alive(peer)

    def test_CONNECT_and_OPTIONS_star_do_no_harm(self):
        for line in (b"CONNECT a:443", b"OPTIONS *"):
            with self.subTest(line), Peer(self.server.port) as peer:
                answer = peer.send(line + b" HTTP/1.1\r\nHost: a\r\n"
                                   b"Connection: close\r\n\r\n").answer()
                self.assertIn(answer.status, (200, 400, 403, 405))
                self.closed(peer)

    def test_an_absolute_target_is_its_path(self):
        self.s3.put("/box/k", b"hello")
        for prefix in (self.s3.url, "HTTP://other.example:80"):
            data = self.head("GET", "/box/k").replace(
                b"GET ", b"GET " + prefix.encode(), 1)
            self.assertEqual(self.ok(self.peer().send(data).answer()).body,
                             b"hello")

    def test_double_slashes_are_part_of_the_key(self):
        for key in ("/k", "a//b", "//", "/box/k"):
            self.ok(self.s3.put("/box/" + key, key.encode()))
        self.assertEqual(sorted(self.s3.keys("box")),
                         ["//", "/box/k", "/k", "a//b"])
        self.assertEqual(self.s3.get("/box//k").body, b"/k")
        self.assertEqual(self.s3.get("/box//box/k").body, b"/box/k")

    def test_a_leading_double_slash_names_no_bucket(self):
        self.s3.put("/box/k", b"secret")
        for path in ("//box/k", "//-/health", "///box/k"):
            with self.subTest(path):
                answer = self.s3.get(path, raw_path=path)
                self.assertEqual(answer.status, 400, answer.body)

    def test_dots_in_a_target_are_not_resolved(self):
        self.s3.put("/box/k", b"hello")
        for path in ("/box/x/../k", "/box/./k", "/x/../box/k"):
            answer = self.s3.get(path, raw_path=path)
            self.assertEqual(answer.status, 404, path)

    def test_health_needs_no_signature_and_tells_nothing(self):
        for path in ("/-/health", "/minio/health/live"):
            for method in ("GET", "HEAD"):
                answer = self.ok(self.s3.request(method, path,
                                                 signed=False))
                self.assertEqual(answer.body, b"")
                self.assertNotIn(self.server.key_id, str(answer.headers))
        self.assertNotEqual(self.s3.request(
            "PUT", "/-/health", signed=False).status, 200)

    def test_every_answer_has_a_date_and_an_id_of_its_own(self):
        self.s3.put("/box/k", b"hello")
        answers = [self.s3.get("/box/k"), self.s3.get("/box/none"),
                   self.s3.head("/box/none"), self.s3.delete("/box/k"),
                   self.s3.get("/", signed=False), self.s3.get("/nobox"),
                   self.s3.get("/-/health", signed=False)]
        ids = {answer.headers["x-amz-request-id"] for answer in answers}
        self.assertEqual(len(ids), len(answers))
        for answer in answers:
            self.assertTrue(answer.headers["x-amz-id-2"])
            self.assertRegex(answer.headers["date"], r"\A(Mon|Tue|Wed|Thu|"
                             r"Fri|Sat|Sun), \d\d \w{3} \d{4} [\d:]{8} GMT")
            if answer.status >= 400 and answer.body:
                self.assertEqual(answer.one("RequestId"),
                                 answer.headers["x-amz-request-id"])
                self.assertTrue(answer.one("HostId"))

    def test_an_error_names_the_resource(self):
        answer = self.s3.get("/box/a%20b", raw_path="/box/a%20b")
        self.error(answer, "NoSuchKey")
        self.assertEqual(answer.one("Resource"), "/box/a%20b")
        self.assertEqual(answer.one("Key"), "a b")


class HttpConnections(HttpCase):

    def test_bytes_may_drip_in_one_at_a_time(self):
        peer = self.peer()
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = self.put_bytes("/box/k", b"hello") + self.head(
            "PUT", "/box/c", headers=[("Transfer-Encoding", "chunked")]) \
            + b"5\r\nhello\r\n0\r\n\r\n" + self.head("GET", "/box/k")
        for byte in data:
            peer.sock.send(bytes((byte,)))
        self.ok(peer.answer())
        self.ok(peer.answer())
        self.assertEqual(self.ok(peer.answer()).body, b"hello")
        self.assertEqual(self.s3.get("/box/c").body, b"hello")

    def test_pipelined_requests_are_answered_in_their_order(self):
        self.s3.put("/box/a", b"first")
        methods = ("GET", "HEAD", "PUT", "GET", "GET", "GET")
        data = (self.head("GET", "/box/a") + self.head("HEAD", "/box/a")
                + self.put_bytes("/box/b", b"x" * 100000)
                + self.head("GET", "/box/none") + self.head("GET", "/box/b")
                + HEALTH)
        peer = self.peer().send(data)
        answers = [peer.answer(method) for method in methods]
        self.assertEqual([answer.status for answer in answers],
                         [200, 200, 200, 404, 200, 200])
        self.assertEqual(answers[0].body, b"first")
        self.assertEqual(answers[1].headers["content-length"], "5")
        self.assertEqual(answers[4].body, b"x" * 100000)

    def test_keep_alive_survives_errors_with_documents(self):
        peer = self.peer()
        for _ in range(3):
            answer = peer.send(self.head("GET", "/box/none")).answer()
            self.error(answer, "NoSuchKey")
            answer = peer.send(self.head("DELETE", "/nobox")).answer()
            self.error(answer, "NoSuchBucket")
        self.alive(peer)

    def test_Connection_close_is_said_and_done(self):
        peer = self.peer().send(HEALTH[:-2] + b"Connection: close\r\n\r\n")
        self.assertEqual(peer.answer().headers["connection"], "close")
        self.closed(peer)

    def test_HTTP_1_0_closes_unless_asked_to_keep_alive(self):
        line = b"GET /-/health HTTP/1.0\r\n"
        peer = self.peer().send(line + b"\r\n")
        self.ok(peer.answer())
        self.closed(peer)
        peer = self.peer()
        for _ in range(2):
            # RFC 9112 appendix C.2.2: the server has to say so as well
            answer = peer.send(line + b"Connection: Keep-Alive\r\n\r\n")
            answer = self.ok(answer.answer())
            self.assertEqual(answer.headers.get("connection", "").lower(),
                             "keep-alive")

    def test_a_small_unwanted_body_does_not_end_the_connection(self):
        peer = self.peer()
        for path, code in (("/nobox/k", "NoSuchBucket"),
                           ("/box/" + "k" * 1025, "KeyTooLongError")):
            answer = peer.send(self.put_bytes(path, b"x" * 1000)).answer()
            self.error(answer, code)
        answer = peer.send(self.put_bytes("/box/k", b"GET / HTTP/1.1\r\n"
                                          b"Host: a\r\n\r\n", good=False))
        self.error(answer.answer(), "SignatureDoesNotMatch")
        answer = peer.send(b"DELETE /box HTTP/1.1\r\nHost: localhost\r\n"
                           b"Content-Length: 5\r\n\r\nhello").answer()
        self.error(answer, "AccessDenied")
        self.alive(peer)

    def test_a_large_unwanted_body_ends_it_but_the_answer_arrives(self):
        body = b"x" * (8 << 20)
        peer = self.peer().send(self.put_bytes("/nobox/k", body))
        answer = peer.answer()
        self.error(answer, "NoSuchBucket")
        self.assertEqual(answer.headers["connection"], "close")
        self.closed(peer)

    def test_an_unwanted_chunked_body_leaves_no_request_behind(self):
        smuggled = b"GET /box HTTP/1.1\r\nHost: localhost\r\n\r\n"
        peer = self.peer().send(self.head("PUT", "/nobox/k", headers=[
            ("Transfer-Encoding", "chunked")]) + b"%x\r\n%s\r\n0\r\n\r\n"
            % (len(smuggled), smuggled) + HEALTH)
        self.error(peer.answer(), "NoSuchBucket")
        following = peer.answer()
        if following is not None:       # read away: the next one is served
            self.assertEqual((following.status, following.body), (200, b""))
            self.assertIsNone(peer.answer())

    def test_GET_with_a_body_is_served_and_stays_in_step(self):
        self.s3.put("/box/k", b"hello")
        smuggled = self.head("DELETE", "/box/k")
        peer = self.peer().send(self.head("GET", "/box/k", headers=[
            ("Content-Length", len(smuggled))]) + smuggled)
        self.assertEqual(peer.answer().body, b"hello")
        self.alive(peer)
        self.assertEqual(self.s3.get("/box/k").body, b"hello")

    def test_truncated_uploads_leave_nothing_visible(self):
        self.s3.put("/box/old", b"old")
        chunked = [("Transfer-Encoding", "chunked")]
        for path in ("/box/new", "/box/old", "/box/d/e/f"):
            for data in (
                    self.put_bytes(path, b"x" * 100)[:-1],
                    self.put_bytes(path, b"x" * (1 << 20))[:-(1 << 19)],
                    self.head("PUT", path, headers=chunked) + b"5\r\nhello",
                    self.head("PUT", path, headers=chunked)
                    + b"5\r\nhello\r\n"):
                answer = read_answer(io.BytesIO(raw(self.server.port, data)))
                self.error(answer, "IncompleteBody")
        self.assertEqual(self.s3.keys("box"), ["old"])
        self.assertEqual(self.s3.get("/box/old").body, b"old")
        self.assertFalse(os.path.exists(self.path("d")))
        drafts = self.path(gos3rve.STATE, "tmp")
        self.assertEqual(os.listdir(drafts) if os.path.isdir(drafts)
                         else [], [])

    def test_a_client_that_vanishes_in_an_upload_leaves_nothing(self):
        log = Lines()
        self.server.server.access_log = log.append
        self.addCleanup(setattr, self.server.server, "access_log", None)
        peer = self.peer().send(self.put_bytes(
            "/box/k", b"x" * (1 << 20))[:-1000])
        peer.reset()
        self.assertEqual(log.take(1)[0]["operation"], "PutObject")
        self.assertNotEqual(log[0]["status"], 200)
        self.assertEqual(self.s3.keys("box"), [])

    def test_a_client_that_vanishes_in_a_download_stops_nobody(self):
        self.s3.put("/box/k", b"x" * (8 << 20))
        log = Lines()
        self.server.server.access_log = log.append
        self.addCleanup(setattr, self.server.server, "access_log", None)
        peers = [self.peer().send(self.head("GET", "/box/k"))
                 for _ in range(4)]
        for peer in peers:
            self.assertEqual(len(peer.sock.recv(1000)), 1000)
            peer.reset()
        self.assertEqual(len(log.take(4)), 4)
        self.assertTrue(all(row["bytes_out"] < 8 << 20 for row in log))
        self.assertEqual(len(self.ok(self.s3.get("/box/k")).body), 8 << 20)

    def test_a_client_that_vanishes_after_a_bad_head_is_no_news(self):
        send, reports = gos3rve.Handler._send_all, []

        def too_late(handler, data):
            handler.connection.shutdown(socket.SHUT_RDWR)
            send(handler, data)
        server = gos3rve.serve()
        server.server.report = reports.append
        with mock.patch.object(gos3rve.Handler, "_send_all", too_late):
            for data in (b"GET /" + b"a" * 100000, GET, GET + b"X\r\n\r\n"):
                self.assertEqual(raw(server.port, data), b"")
            self.assertTrue(server.close(5))    # all threads have ended
        self.assertEqual(reports, [])

    def test_half_a_head_is_not_waited_for_beyond_its_time(self):
        with mock.patch.object(gos3rve, "HEAD_SECONDS", 1):
            peer = self.peer().send(GET)
            peer.sock.settimeout(5)
            self.error(peer.answer(), "RequestTimeout")
            self.closed(peer)

    def test_downloads_larger_than_any_buffer_arrive_whole(self):
        data = random.Random(1).getrandbits(8 * 3000001).to_bytes(
            3000001, "big")
        self.s3.put("/box/k", data)
        peer = self.peer().send(self.head("GET", "/box/k") * 2 + HEALTH)
        for _ in range(2):
            self.assertEqual(self.ok(peer.answer()).body, data)
        self.ok(peer.answer())


class HttpContinue(HttpCase):

    expect = ("Expect", "100-continue")

    def ask(self, path, *headers, **more):
        """Send a PUT's head of 5 bytes that expects; the Peer."""
        return self.peer().send(self.put_bytes(
            path, b"hello", self.expect, *headers, **more)[:-5])

    def test_a_good_upload_is_asked_for_its_body(self):
        peer = self.ask("/box/k")
        self.assertEqual(peer.answer().status, 100)
        self.ok(peer.send(b"hello").answer())
        self.alive(peer)
        self.assertEqual(self.s3.get("/box/k").body, b"hello")

    def test_a_refused_upload_is_not_asked_for_its_body(self):
        self.s3.put("/box/old", b"old")
        for code, peer in (
                ("SignatureDoesNotMatch", self.ask("/box/k", good=False)),
                ("NoSuchBucket", self.ask("/nobox/k")),
                ("KeyTooLongError", self.ask("/box/" + "k" * 1025)),
                ("PreconditionFailed",
                 self.ask("/box/old", ("If-None-Match", "*"))),
                ("InvalidDigest", self.ask("/box/k", ("Content-MD5", "x"))),
                ("AccessDenied", self.peer().send(
                    PUT + b"Content-Length: 5\r\n"
                    b"Expect: 100-continue\r\n\r\n"))):
            with self.subTest(code):
                self.error(peer.answer(), code)
                self.closed(peer)
        self.assertEqual(self.s3.keys("box"), ["old"])

    def test_a_body_that_did_not_wait_is_taken(self):
        peer = self.peer().send(self.put_bytes("/box/k", b"hello",
                                               self.expect))
        answer = peer.answer()
        if answer.status == 100:
            answer = peer.answer()
        self.ok(answer)
        self.alive(peer)

    def test_no_100_without_an_expectation_or_HTTP_1_1(self):
        for data in (self.put_bytes("/box/k", b"hello"),
                     self.put_bytes("/box/k", b"hello", self.expect,
                                    version="1.0")):
            self.ok(self.peer().send(data).answer())

    def test_an_empty_body_is_asked_for_too(self):
        """botocore before boto/botocore#3755 was mended takes the next
        answer for this one's where a success comes without a 100."""
        peer = self.peer().send(self.put_bytes("/box/k", b"", self.expect))
        self.assertEqual(peer.answer().status, 100)
        self.ok(peer.answer())
        self.alive(peer)
        peer = self.peer().send(self.put_bytes("/nobox/k", b"",
                                               self.expect))
        answer = self.error(peer.answer(), "NoSuchBucket")
        self.assertEqual(answer.headers["connection"], "close")

    def test_a_chunked_body_is_asked_for_once(self):
        peer = self.peer().send(self.head("PUT", "/box/k", headers=[
            ("Transfer-Encoding", "chunked"), self.expect]))
        self.assertEqual(peer.answer().status, 100)
        for piece in (b"5\r\nhe", b"llo\r\n", b"0\r\n", b"\r\n"):
            peer.send(piece)
        self.ok(peer.answer())
        self.alive(peer)

    def test_the_next_request_expects_for_itself(self):
        peer = self.ask("/box/k")
        self.assertEqual(peer.answer().status, 100)
        peer.send(b"hello" + self.put_bytes("/box/l", b"hello")[:-5])
        self.ok(peer.answer())
        self.ok(peer.send(b"hello").answer())


class HttpHead(HttpCase):

    def test_HEAD_never_has_a_body(self):
        etag = self.s3.put("/box/k", b"hello").headers["etag"]
        peer = self.peer()
        for status, path, headers, more in (
                (200, "/box/k", [], {}),
                (206, "/box/k", [("Range", "bytes=1-2")], {}),
                (304, "/box/k", [("If-None-Match", etag)], {}),
                (412, "/box/k", [("If-Match", '"x"')], {}),
                (416, "/box/k", [("Range", "bytes=9-")], {}),
                (404, "/box/none", [], {}),
                (404, "/nobox", [], {}),
                (400, "/box/" + "k" * 1025, [], {}),
                (403, "/box/k", [], {"good": False}),
                (405, "/", [], {}),
                (501, "/box/k", [], {"query": [("acl", "")]}),
                (200, "/box", [], {})):
            with self.subTest(path=path, status=status):
                peer.send(self.head("HEAD", path, headers=headers, **more))
                answer = peer.answer("HEAD")
                self.assertEqual(answer.status, status)
                self.alive(peer)

    def test_HEAD_tells_the_length_that_GET_would_send(self):
        self.s3.put("/box/k", b"hello")
        for headers in ({}, {"range": "bytes=1-2"}):
            head = self.s3.head("/box/k", headers=headers)
            got = self.s3.get("/box/k", headers=headers)
            for name in ("content-length", "etag", "content-type",
                         "last-modified", "accept-ranges"):
                self.assertEqual(head.headers[name], got.headers[name])

    def test_a_malformed_HEAD_has_no_body_either(self):
        for lines in (b"Host: a\r\nHost: b\r\n", b"", b"Host: a\r\nX y\r\n",
                      b"Host: a\r\nContent-Length: x\r\n"):
            with self.subTest(lines):
                data = raw(self.server.port,
                           b"HEAD /box/k HTTP/1.1\r\n" + lines + b"\r\n")
                file = io.BytesIO(data)
                self.assertEqual(read_answer(file, "HEAD").status, 400)
                self.assertEqual(file.read(), b"")

    def test_204_and_304_have_neither_body_nor_length(self):
        etag = self.s3.put("/box/k", b"hello").headers["etag"]
        peer = self.peer().send(self.head("GET", "/box/k", headers=[
            ("If-None-Match", etag)]))
        answer = peer.answer()
        self.assertEqual((answer.status, answer.headers["etag"]),
                         (304, etag))
        answer = peer.send(self.head("DELETE", "/box/k")).answer()
        self.assertEqual(answer.status, 204)
        self.assertNotIn("content-length", answer.headers)
        self.alive(peer)


class HttpInjection(HttpCase):

    parameters = ("content-disposition", "content-type", "cache-control",
                  "content-language", "content-encoding", "expires")

    def test_an_override_cannot_break_out_of_its_header(self):
        self.s3.put("/box/k", b"hello")
        for value in ("a\r\nX-Evil: 1", "a\nX-Evil: 1", "a\rX-Evil: 1",
                      "a\r\n\r\n<html>", "a\0b", "\r\nX-Evil: 1"):
            for name in self.parameters:
                with self.subTest(name=name, value=value):
                    peer = self.peer().send(self.head("GET", "/box/k", [
                        ("response-" + name, value)]))
                    answer = peer.answer()      # strict about its lines
                    self.assertIsNotNone(answer, "closed without answer")
                    self.assertIn(answer.status, (200, 400))
                    self.assertNotIn("x-evil", answer.headers)
                    self.alive(peer)

    def test_a_lawful_override_is_sent_as_it_is(self):
        self.s3.put("/box/k", b"hello")
        value = "attachment; filename=\"a b.txt\"; x='1'"
        for name in self.parameters:
            if name == "expires":
                continue
            answer = self.s3.get("/box/k", [("response-" + name, value)])
            self.assertEqual(self.ok(answer).headers[name], value)

    def test_a_header_beyond_latin_1_is_refused_or_kept(self):
        # AWS: InvalidArgument, "Header value cannot be represented using
        # ISO-8859-1"; never a silent question mark
        self.s3.put("/box/k", b"hello")
        answer = self.s3.get("/box/k", [
            ("response-content-disposition", "filename=\u4e2d.txt")])
        if answer.status == 200:
            self.assertNotIn("?", answer.headers["content-disposition"])
        else:
            self.error(answer, "InvalidArgument")

    def test_a_stored_header_or_key_cannot_break_out(self):
        key = "a\r\nX-Evil: 1\r\n\r\n"
        self.ok(self.s3.put("/box/" + key, b"hello", headers={
            "x-amz-meta-a": "=?utf-8?q?a=0d=0aX-Evil:_1?="}))
        for method in ("GET", "HEAD"):
            peer = self.peer().send(self.head(method, "/box/" + key))
            answer = self.ok(peer.answer(method))
            self.assertNotIn("x-evil", answer.headers)
            self.alive(peer)
        answer = self.s3.get("/box/" + key, [("uploadId", "a\r\nb")])
        self.assertEqual(answer.status // 100, 4)


class HttpLog(HttpCase):

    def setUp(self):
        super().setUp()
        self.log = Lines()
        self.server.server.access_log = self.log.append
        self.addCleanup(setattr, self.server.server, "access_log", None)

    def test_a_request_is_one_entry_with_its_facts(self):
        put = self.s3.put("/box/k", b"hello" * 50000)
        get = self.s3.get("/box/k")
        head = self.s3.head("/box/k")
        none = self.s3.get("/box/none")
        rows = self.log.take(4)
        self.assertEqual(
            [(row["operation"], row["method"], row["resource"],
              row["status"], row["bytes_in"], row["bytes_out"])
             for row in rows], [
                 ("PutObject", "PUT", "/box/k", 200, 250000, 0),
                 ("GetObject", "GET", "/box/k", 200, 0, 250000),
                 ("HeadObject", "HEAD", "/box/k", 200, 0, 0),
                 ("GetObject", "GET", "/box/none", 404, 0,
                  len(none.body))])
        for row, answer in zip(rows, (put, get, head, none)):
            self.assertEqual(row["request_id"],
                             answer.headers["x-amz-request-id"])
            self.assertEqual(row["client"], "127.0.0.1")
            self.assertEqual(row["account"], self.server.key_id)
            self.assertGreaterEqual(row["ms"], 0)
            self.assertRegex(row["time"],
                             r"\A\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z\Z")

    def test_a_refused_request_names_no_account(self):
        self.s3.get("/box/k", signed=False)
        self.s3.send("GET", "/box/k", headers={
            "authorization": "AWS4-HMAC-SHA256 Credential=%s/20200101/"
            "us-east-1/s3/aws4_request,SignedHeaders=host,Signature=%s"
            % (self.server.key_id, "0" * 64)})
        rows = self.log.take(2)
        self.assertEqual([row["account"] for row in rows], ["-", "-"])
        self.assertTrue(all(row["status"] in (400, 403) for row in rows))

    def test_every_malformed_request_is_logged_with_its_id(self):
        expected = {}
        for name, data, status in MALFORMED:
            answer = read_answer(io.BytesIO(raw(self.server.port, data)))
            expected[answer.headers["x-amz-request-id"]] = status, name
        rows = self.log.take(len(MALFORMED))
        logged = {row["request_id"]: row["status"] for row in rows}
        for request_id, (status, name) in expected.items():
            with self.subTest(name):
                self.assertEqual(logged.get(request_id), status)

    def test_a_signature_is_not_logged(self):
        self.ok(self.peer().send(self.head("GET", "/box")).answer())
        row = self.log.take(1)[0]
        self.assertEqual(row["resource"].rstrip("/"), "/box")
        self.assertNotIn("Signature", str(row))

    def test_a_virtual_host_s_bucket_is_logged(self):
        host = "box.localhost:%d" % self.server.port
        self.ok(self.s3.request("PUT", "/k", body=b"x",
                                headers={"host": host}))
        row = self.log.take(1)[0]
        self.assertIn("box", row["resource"])
        self.assertTrue(row["resource"].endswith("/k"))

    def test_an_entry_fits_a_pipe_s_atomic_write(self):
        longest = "/box/" + "%E6%97%A5" * 341
        targets = [longest, "/box/" + "k" * 16000, "/box/" + "\x9b" * 9000]
        for target in targets:
            for method in ("GET", "BREW"):
                raw(self.server.port, ("%s %s HTTP/1.1\r\nHost: x\r\n\r\n" % (
                    method, target)).encode("latin-1"))
        rows = self.log.take(6)
        self.assertEqual(len(rows), 6)
        for row in rows:
            self.assertLess(len(json.dumps(row)), 4096)
            self.assertRegex(row["resource"], r"\A/box/[!-~]+\Z")
        self.assertIn(longest, [row["resource"] for row in rows])

    def test_an_entry_is_one_line_whatever_the_key(self):
        self.s3.put("/box/a b\nc\x1b[1m\u2028", b"x")
        row = self.log.take(1)[0]
        self.assertEqual(row["status"], 200)
        self.assertRegex(row["resource"], r"\A[!-~]+\Z")


###############################################################################
# 10. Server
###############################################################################

def clean_environment(**more):
    """This process's environment without a setting of gos3rve."""
    return dict({name: value for name, value in os.environ.items()
                 if not name.startswith(("GOS3RVE_", "MINIO_"))}, **more)


def children(pid):
    """The pids of a process's children, the oldest first."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")
                       if gos3rve.have_workers() else ()):
        with contextlib.suppress(OSError), \
                open("/proc/%s/stat" % name) as file:
            state, parent, *rest = file.read().rpartition(")")[2].split()
            if int(parent) == pid and state != "Z":
                found.append((int(rest[17]), int(name)))    # started at
    return [name for _, name in sorted(found)]


def alive(pid):
    """True while a process runs."""
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Process:
    """gos3rve.py as a process of its own, in a directory of its own; it
    ends with its test.  text: its banner; stderr(): what it said there.
    patch: what to change in gos3rve before it runs."""

    def __init__(self, test, *arguments, environment=None, wait=True,
                 patch=None):
        self.directory = temporary_directory(test)
        self._stderr = open(os.path.join(temporary_directory(test),
                                         "stderr"), "wb")
        program = [SERVER]
        if patch:
            program = ["-B", "-c", "import sys; sys.path.insert(0, %r)\n"
                       "import gos3rve\n%s\nsys.exit(gos3rve.main())"
                       % (HERE, patch)]
        self.process = subprocess.Popen(
            [sys.executable] + program + [str(word) for word in arguments],
            cwd=self.directory, env=clean_environment(**environment or {}),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=self._stderr, universal_newlines=True)
        test.addCleanup(self.kill)
        self.text = self.url = ""
        while wait and not self.url:
            self._read(test)
        self.port = urllib.parse.urlsplit(self.url).port

    def _read(self, test):
        """A line of the banner."""
        line = self.process.stdout.readline()
        if not line:
            test.fail("no banner; stderr: " + self.stderr())
        self.text += line
        match = re.search(r"https?://[\w.\[\]:-]+:\d+", line)
        self.url = match.group() if match else ""

    def client(self, key_id="KEY", secret="hush-hush"):
        """A Client of it."""
        return Client(self.url, key_id, secret)

    def workers(self):
        """The pids of its workers."""
        return children(self.process.pid)

    def stderr(self):
        """What it said on stderr so far."""
        with open(self._stderr.name, encoding="utf-8") as file:
            return file.read()

    def end(self, number=signal.SIGTERM):
        """Ask it to stop; its exit status and the rest of stdout."""
        self.process.send_signal(number)
        return self.status()

    def status(self):
        """Its exit status, once it has ended; text is then whole."""
        status = self.process.wait(20)
        self.text += self.process.stdout.read()
        return status

    def kill(self):
        """End it, if it has not ended yet."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self._stderr.close()


KEYS = ("-bind", "127.0.0.1", "-p", "0", "-key_id", "KEY",
        "-key_val", "hush-hush")


def refused(port):
    """True when nothing listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionError:
        return True
    return False


class EndCase(HttpCase):

    def upload(self, server, client):
        """A Peer in the middle of an upload that the server waits for."""
        url = client.presign("PUT", "/box/k")
        peer = Peer(server.port)
        self.addCleanup(peer.close)
        peer.send(("PUT %s HTTP/1.1\r\nHost: %s\r\nContent-Length: 10\r\n"
                   "Expect: 100-continue\r\n\r\n" % (
                       url[len(client.url):], client.netloc)).encode())
        self.assertEqual(peer.answer().status, 100)
        return peer.send(b"hello")


class ServerEnd(EndCase):

    @unittest.skipUnless(os.name == "posix", "signals of POSIX")
    def test_a_signal_lets_a_running_request_finish_and_exits_0(self):
        cases = [(signal.SIGINT, 0), (signal.SIGTERM, 0)]
        if gos3rve.have_workers():
            cases += [(signal.SIGINT, 2), (signal.SIGTERM, 2)]
        servers = [Process(self, "-bucket", "box", "-workers", workers or 1,
                           *KEYS) for _, workers in cases]
        for (number, workers), server in zip(cases, servers):
            with self.subTest(number, workers=workers):
                self.assertEqual(len(server.workers()), workers)
                idle = Peer(server.port)
                self.addCleanup(idle.close)
                self.ok(idle.send(HEALTH).answer())
                peer = self.upload(server, server.client())
                self.signal_all(server, number)
                self.assertTrue(wait_for(lambda: refused(server.port)))
                self.assertIsNone(server.process.poll())
                answer = peer.send(b"world").answer()
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.headers["connection"], "close")
                peer.close()
                self.assertEqual(server.status(), 0)
                path = os.path.join(server.directory, "buckets/box/k")
                with open(path, "rb") as file:
                    self.assertEqual(file.read(), b"helloworld")
                self.assertNotIn("gos3rve:", server.stderr())

    def signal_all(self, server, number):
        """Send a signal as a terminal and a service manager do: to the
        server and its workers, too."""
        server.process.send_signal(number)
        for pid in server.workers():
            os.kill(pid, number)

    def test_close_waits_for_a_running_request_in_bounds(self):
        server = gos3rve.serve(buckets=["box"])
        client = Client(server.url, server.key_id, server.key_val)
        peer = self.upload(server, client)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            closing = pool.submit(server.close, 20)
            self.assertTrue(wait_for(lambda: refused(server.port)))
            self.assertFalse(closing.done())
            self.ok(peer.send(b"world").answer())
            peer.close()
            self.assertIs(closing.result(), True)

    def test_close_gives_up_on_a_request_that_never_ends(self):
        server = gos3rve.serve(buckets=["box"])
        self.upload(server, Client(server.url, server.key_id,
                                   server.key_val))
        self.assertIs(server.close(0.1), False)

    def test_idle_and_silent_connections_do_not_delay_the_end(self):
        server = gos3rve.serve()
        peers = [Peer(server.port) for _ in range(4)]
        for peer in peers:
            self.addCleanup(peer.close)
        self.ok(peers[0].send(HEALTH).answer())     # between two requests
        peers[1].send(b"GET / HT")                  # within a head
        self.ok(peers[2].send(HEALTH + b"GET").answer())
        self.assertIs(server.close(5), True)        # and peers[3]: silent
        self.assertEqual(peers[0].rest(), b"")

    def test_a_server_may_be_closed_twice(self):
        server = gos3rve.serve()
        self.assertTrue(server.close(5))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            again = pool.submit(server.close, 5)
            self.assertTrue(again.result(timeout=10))

    def start(self, *argv):
        """(exit status, stdout, stderr) of a start that has to fail."""
        argv = ["-dir_buckets", os.path.join(self.server.dir_uploads, "b"),
                "-dir_uploads", self.server.dir_uploads] + list(argv)
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.object(gos3rve, "banner", side_effect=AssertionError(
                "it serves")), contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(err):
            status = gos3rve.main(argv)
        return status, out.getvalue(), err.getvalue()

    def test_a_port_in_use_is_one_sentence_and_status_1(self):
        status, out, err = self.start("-bind", "127.0.0.1", "-p",
                                      str(self.server.port))
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(err, r"\Agos3rve: [^\n]*in use[^\n]*\n\Z")

    def test_an_address_that_is_not_here_is_one_sentence(self):
        for name in ("203.0.113.1", "no such host", "nowhere.invalid",
                     "a..b", "x" * 70, "300.1.1.1"):
            with self.subTest(name):
                status, out, err = self.start("-p", "0", "-bind", name)
                self.assertIn(status, (1, 2))
                self.assertEqual(out, "")
                self.assertRegex(err, r"\Agos3rve: [^\n]+\n\Z")

    def test_directories_that_cannot_be_are_one_sentence(self):
        buckets = temporary_directory(self)
        path = os.path.join(buckets, "mine")
        with open(path, "w") as file:
            file.write("no directory")
        for words in (["-dir_buckets", path], ["-dir_uploads", path],
                      ["-dir_buckets", os.path.join(path, "below")],
                      ["-dir_buckets", buckets, "-bucket", "mine"]):
            with self.subTest(words):
                status, out, err = self.start("-p", "0", *words)
                self.assertIn(status, (1, 2))
                self.assertEqual(out, "")
                self.assertRegex(err, r"\Agos3rve: [^\n]+\n\Z")


class WorkerRules(unittest.TestCase):
    """What holds for workers without any."""

    def test_the_default_is_one_a_core_within_four(self):
        for cores, system, gil, threads, count in (
                (1, "linux", True, 1, 1), (3, "linux", True, 1, 3),
                (96, "linux", True, 1, 4), (8, "linux", False, 1, 1),
                (8, "linux", True, 2, 1), (8, "darwin", True, 1, 1),
                (8, "win32", True, 1, 1), (None, "linux", True, 1, 2)):
            affinity = mock.Mock(return_value=range(cores or 0),
                                 side_effect=None if cores else OSError)
            with self.subTest((cores, system, gil, threads)), \
                    mock.patch.object(sys, "platform", system), \
                    mock.patch.object(sys, "_is_gil_enabled", lambda: gil,
                                      create=True), \
                    mock.patch.object(threading, "active_count",
                                      lambda: threads), \
                    mock.patch.object(os, "sched_getaffinity", affinity,
                                      create=True), \
                    mock.patch.object(os, "cpu_count", lambda: 2):
                self.assertEqual(gos3rve.default_workers(), count)

    def test_more_than_one_is_refused_where_it_cannot_be(self):
        with mock.patch.object(sys, "platform", "darwin"):
            self.assertEqual(gos3rve.make_config(
                {"workers": 1}).values["workers"], 1)
            with self.assertRaises(gos3rve.ConfigError):
                gos3rve.make_config({"workers": 2})
        with self.assertRaises(gos3rve.ConfigError):
            gos3rve.serve(workers=2)
        gos3rve.serve(workers=1).close(5)

    def test_a_worker_that_keeps_dying_is_given_time(self):
        worker = gos3rve.Worker(0)
        with mock.patch.object(time, "monotonic", lambda: now):
            for now, since, pause in (
                    (100, 10, 0), (110, 100, 0.1), (120, 110, 0.2),
                    (130, 130, 0.4), (1000, 140, 0), (1001, 1000, 0.1)):
                worker.pid, worker.since = 1, since
                self.assertEqual(worker.ended(), pause)
                self.assertEqual(worker.due, now + pause)
                self.assertIsNone(worker.pid)
            pauses = [worker.ended() for _ in range(20)]
        self.assertEqual(pauses[-1], 30)

    def bound(self):
        """A Running for two workers, which nobody has started."""
        return gos3rve.Running(gos3rve.make_config({
            "dir_buckets": temporary_directory(self),
            "dir_uploads": temporary_directory(self), "p": 0,
            "bind": "127.0.0.1"}), workers=2)

    def test_the_first_worker_keeps_house(self):
        for number, kept in ((0, 1), (1, 0)):
            with mock.patch.object(gos3rve.Server, "_housekeeping") as house:
                server = self.bound()
                server.server.start(number)
                server.close(5)
                self.assertEqual(house.call_count, kept)

    def test_a_connection_is_left_to_a_worker_that_has_fewer(self):
        with self.bound().server as server:
            for own, other, change, pauses in (
                    (0, 0, 0, 0), (3, 4, 0, 0), (5, gos3rve.GONE, 0, 0),
                    (4, 3, 1, 1), (5, 3, 1, 2), (5, 4, 0, 6)):
                server.loads[0], server.loads[1] = own, other

                def sleep(_):
                    slept.append(1)
                    server.loads[1] += change
                slept = []
                with mock.patch.object(time, "sleep", sleep):
                    self.assertRaises(BlockingIOError, server.get_request)
                self.assertEqual(len(slept), pauses, (own, other, change))


@unittest.skipUnless(gos3rve.have_workers(), "no workers here")
class ServerWorkers(EndCase):
    """One server with two workers and keys that it made, for all tests
    that leave it running."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.made = unittest.TestCase()
        cls.two = Process(cls.made, "-workers", "2", "-bucket", "box",
                          "-log", "json", "-p", "0", "-bind", "127.0.0.1")
        while "secret key" not in cls.two.text:
            cls.two.text += cls.two.process.stdout.readline()
        cls.keys = re.findall(r"(?:access|secret) key +(\S+)", cls.two.text)

    @classmethod
    def tearDownClass(cls):
        cls.made.doCleanups()
        super().tearDownClass()

    def client(self):
        """A Client of the server."""
        client = self.two.client(*self.keys)
        self.addCleanup(client.close)
        return client

    def begin(self, server, data):
        """A connection to a server that has sent something."""
        peer = Peer(server.port)
        self.addCleanup(peer.close)
        return peer.send(data)

    def replaced(self, victim):
        """Kill a worker; the workers once there are two again."""
        os.kill(victim, signal.SIGKILL)
        self.assertTrue(wait_for(
            lambda: victim not in self.two.workers()
            and len(self.two.workers()) == 2))
        return self.two.workers()

    @staticmethod
    def sockets(pid):
        """How many sockets a process has open."""
        directory, count = "/proc/%d/fd" % pid, 0
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):
                count += os.readlink(os.path.join(
                    directory, name)).startswith("socket:")
        return count

    def test_connections_are_spread_and_know_the_same_account(self):
        workers = self.two.workers()
        self.assertEqual(len(workers), 2)
        before = [self.sockets(pid) for pid in workers]
        clients = [self.client() for _ in range(16)]
        answers = together(16, lambda number: clients[number].get("/"))
        shares = [self.sockets(pid) - count
                  for pid, count in zip(workers, before)]
        self.assertEqual(sum(shares), 16)
        self.assertGreaterEqual(min(shares), 2, shares)
        owners = {self.ok(answer).one("Owner/ID") for answer in answers}
        self.assertEqual(len(owners), 1)

    def test_a_killed_worker_is_replaced_under_load(self):
        victim, other = self.two.workers()
        done, faults = [], []

        def load(number):
            client = self.client()
            while len(done) < 300:
                key = "/box/%d-%d" % (number, len(done))
                with contextlib.suppress(OSError,
                                         http.client.HTTPException):
                    answer = client.put(key, b"x")
                    done.append(key)
                    if answer.status != 200:
                        faults.append(answer.body)
                    continue
                client.close()                  # and try again
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            loads = [pool.submit(load, number) for number in range(4)]
            self.assertTrue(wait_for(lambda: len(done) > 50))
            self.assertIn(other, self.replaced(victim))
            for future in loads:
                future.result()
        self.assertEqual(faults, [])
        self.assertLessEqual(set(done), {
            "/box/" + key for key in self.client().keys("box")})
        self.assertIn("worker %d ended with signal 9; it is replaced"
                      % victim, self.two.stderr())

    def test_a_killed_housekeeper_s_successor_keeps_house(self):
        directory = os.path.join(self.two.directory,
                                 "buckets/box/.gos3rve/tmp")
        path = os.path.join(directory, "t" + "0" * 24)
        os.makedirs(directory, exist_ok=True)
        with open(path, "w") as file:
            file.write("left by a crash")
        os.utime(path, (1, 1))
        for pid in self.two.workers():
            self.replaced(pid)
        self.assertTrue(wait_for(lambda: not os.path.exists(path)))

    def test_lines_of_several_workers_are_not_mixed(self):
        clients = [self.client() for _ in range(8)]
        keys = [["/box/%d-%d-" % (number, turn) + "\u65e5" * 300
                 for turn in range(20)] for number in range(8)]
        together(8, lambda number: [clients[number].head(key)
                                    for key in keys[number]])
        expected = {quote(key, "/-_.~") for row in keys for key in row}

        def rows():
            return [json.loads(line)
                    for line in self.two.stderr().splitlines(True)
                    if line.startswith("{") and line.endswith("\n")]
        self.assertTrue(wait_for(lambda: expected <= {
            row["resource"] for row in rows()}))
        ids = [row["request_id"] for row in rows()]
        self.assertEqual(len(ids), len(set(ids)))

    def start(self, *words, **more):
        """A server of its own with two workers."""
        return Process(self, "-bucket", "box", "-workers", "2", *words, *KEYS,
                       **more)

    def test_workers_end_with_their_killed_supervisor(self):
        server = self.start()
        workers = server.workers()
        self.begin(server, b"PUT /box/k HTTP/1.1\r\n")   # amid a request
        server.process.kill()
        server.process.wait()
        self.assertTrue(wait_for(lambda: refused(server.port)))
        self.assertTrue(wait_for(lambda: not any(map(alive, workers))))

    def test_a_second_signal_ends_them_all_at_once(self):
        server = self.start()
        workers = server.workers()
        self.upload(server, server.client())
        server.process.send_signal(signal.SIGTERM)
        self.assertTrue(wait_for(lambda: refused(server.port)))
        self.assertIsNone(server.process.poll())
        self.assertEqual(server.end(), 1)
        self.assertTrue(wait_for(lambda: not any(map(alive, workers))))

    def test_workers_that_cannot_start_are_one_sentence_and_status_1(self):
        start = "def start(self, worker=0):\n    %s\ngos3rve.Server" \
                ".start = start"
        cases = (
            ("def fork():\n    raise BlockingIOError(11, 'not now')\n"
             "gos3rve.os.fork = fork", "not now"),
            (start % "raise RuntimeError('no new thread')", "no new thread"),
            (start % "gos3rve.os._exit(3)", "it died"))
        servers = [self.start(patch=patch, wait=False) for patch, _ in cases]
        for (_, word), server in zip(cases, servers):
            with self.subTest(word):
                self.assertEqual(server.status(), 1)
                self.assertEqual(server.text, "")
                self.assertRegex(server.stderr(), r"\Agos3rve: cannot serve:"
                                 r" [^\n]*%s\n\Z" % word)

    def test_a_replacement_that_cannot_start_is_tried_again(self):
        server = self.start(patch=(
            "forks, fork = [], gos3rve.os.fork\n"
            "def sometimes():\n    forks.append(1)\n"
            "    if len(forks) in (3, 4):\n"
            "        raise BlockingIOError(11, 'not now')\n"
            "    return fork()\ngos3rve.os.fork = sometimes"))
        victim, other = server.workers()
        os.kill(victim, signal.SIGKILL)
        self.assertTrue(wait_for(lambda: len(server.workers()) == 2
                                 and victim not in server.workers()))
        self.assertIn(other, server.workers())
        self.assertEqual(server.stderr().count("not now"), 2)
        self.ok(self.begin(server, HEALTH).answer())
        self.assertEqual(server.end(), 0)

    def test_the_cap_of_connections_is_that_of_all_workers(self):
        server = self.start(patch="gos3rve.MAX_CONNECTIONS = 4")
        peers = [self.begin(server, HEALTH) for _ in range(4)]
        for peer in peers:              # busy until their bodies have come
            self.ok(peer.answer())
            peer.send(b"PUT /box/k HTTP/1.1\r\nHost: x\r\n"
                      b"Content-Length: 5\r\n\r\n")
        fifth = self.begin(server, HEALTH)
        fifth.sock.settimeout(0.5)
        with self.assertRaises(socket.timeout):
            fifth.sock.recv(1)
        for peer in peers:
            peer.send(b"hello")         # refused, and idle from then on
        fifth.sock.settimeout(20)
        self.assertEqual(fifth.sock.recv(12), b"HTTP/1.1 200")


class ServerConnections(HttpCase):

    def test_connections_beyond_the_cap_wait_for_their_turn(self):
        with mock.patch.object(gos3rve, "MAX_CONNECTIONS", 2):
            server = gos3rve.serve()
        self.addCleanup(server.close, 5)
        peers = [Peer(server.port) for _ in range(3)]
        for peer in peers:
            self.addCleanup(peer.close)
        for peer in peers[:2]:          # busy until their bodies have come
            peer.send(b"PUT /box/k HTTP/1.1\r\nHost: x\r\n"
                      b"Content-Length: 5\r\n\r\n")
        peers[2].send(HEALTH)
        peers[2].sock.settimeout(0.5)
        with self.assertRaises(socket.timeout):
            peers[2].sock.recv(1)
        peers[0].send(b"hello")         # refused, and idle from then on
        peers[2].sock.settimeout(20)
        self.assertEqual(peers[2].sock.recv(12), b"HTTP/1.1 200")

    def test_fifty_connections_at_once_are_all_served(self):
        self.s3.put("/box/k", b"hello")
        data = self.head("GET", "/box/k")
        peers = [self.peer().send(data) for _ in range(50)]
        for peer in peers:
            self.assertEqual(self.ok(peer.answer()).body, b"hello")

    def test_silent_connections_stop_nobody(self):
        for _ in range(20):
            self.peer().send(b"GET")
        self.ok(self.s3.get("/box"))

    def test_IPv6_is_served_and_named_in_the_url(self):
        try:
            server = gos3rve.serve(bind="::1", buckets=["box"])
        except OSError as error:
            self.skipTest("no IPv6 here: %s" % error)
        self.addCleanup(server.close, 5)
        self.assertEqual(server.url, "http://[::1]:%d" % server.port)
        client = Client(server.url, server.key_id, server.key_val)
        self.addCleanup(client.close)
        self.ok(client.put("/box/k", b"hello"))

    def test_all_interfaces_take_IPv4_and_log_it_as_such(self):
        log = Lines()
        server = gos3rve.serve(bind="")
        self.addCleanup(server.close, 5)
        server.server.access_log = log.append
        with Peer(server.port) as peer:
            self.ok(peer.send(HEALTH).answer())
        self.assertEqual(log.take(1)[0]["client"], "127.0.0.1")

    def test_a_fault_of_the_server_is_a_500_and_told_the_operator(self):
        store = type(self.server.store)
        with mock.patch.object(store, "put_object",
                               side_effect=RuntimeError("secret detail")):
            answer = self.s3.put("/box/k", b"x")
        self.error(answer, "InternalError")
        self.assertNotIn(b"secret detail", answer.body)
        request_id = answer.headers["x-amz-request-id"]
        self.assertTrue(any(
            request_id in line and "secret detail" in line
            for line in self.reports), self.reports)
        self.reports.clear()
        self.ok(self.s3.put("/box/k", b"x"))

    def test_a_full_disk_is_said_and_the_server_goes_on(self):
        with mock.patch.object(gos3rve.os, "write", side_effect=OSError(
                errno.ENOSPC, "No space left on device")):
            answer = self.s3.put("/box/k", b"x" * 100000)
        self.assertEqual(answer.status, 507, answer.body)
        self.assertEqual(self.s3.keys("box"), [])
        self.ok(self.s3.put("/box/k", b"x"))


class ServerLog(HttpCase):

    def test_log_text_is_one_line_a_request(self):
        server = Process(self, "-bucket", "box", *KEYS)
        client = server.client()
        put = client.put("/box/a b", b"hello")
        client.get("/box/none")
        urllib.request.urlopen(client.presign("GET", "/box")).close()
        client.close()
        self.assertEqual(server.end(), 0)
        lines = sorted(server.stderr().splitlines(),
                       key=lambda line: "PutObject" not in line)
        self.assertEqual(len(lines), 3, lines)
        for word in ("PutObject", "/box/a%20b", "KEY", "127.0.0.1", "200",
                     "5", put.headers["x-amz-request-id"]):
            self.assertIn(word, lines[0].split())
        self.assertIn("404", (lines[1] + " " + lines[2]).split())
        self.assertNotIn("Signature", server.stderr())
        self.assertIn("KEY", server.text)
        self.assertNotIn("hush-hush", server.text + server.stderr())

    def test_log_json_is_one_object_a_request(self):
        server = Process(self, "-bucket", "box", "-log=json", *KEYS)
        client = server.client()
        put = client.put("/box/k", b"hello")
        raw(server.port, b"\x80\xff\r\n\r\n")
        client.get("/box/\u4e2d")
        client.close()
        self.assertEqual(server.end(), 0)
        rows = {row["status"]: row for row in map(
            json.loads, server.stderr().splitlines())}
        self.assertEqual(sorted(rows), [200, 400, 404])
        self.assertEqual(
            [rows[200][name] for name in ("operation", "resource",
                                          "account", "bytes_in",
                                          "request_id")],
            ["PutObject", "/box/k", "KEY", 5,
             put.headers["x-amz-request-id"]])

    def test_a_log_nobody_reads_does_not_stop_the_server(self):
        with mock.patch.object(gos3rve.os, "write", side_effect=OSError(
                errno.EPIPE, "Broken pipe")):
            gos3rve.access_writer("text")({"status": 200})
            gos3rve.access_writer("json")({"status": 200})
            gos3rve.operator_log("a line")
        self.assertIsNone(gos3rve.access_writer("none"))


def make_certificate(test, name="localhost"):
    """(certificate, key): paths of a self-signed one, or skip the test."""
    if not shutil.which("openssl"):
        test.skipTest("no openssl command to make a certificate with")
    directory = temporary_directory(test)
    paths = [os.path.join(directory, part) for part in ("cert", "key")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=" + name, "-addext",
         "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-out", paths[0], "-keyout", paths[1]],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return paths


def trusting(*certificates):
    """A client's SSLContext that trusts these certificates only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for path in certificates:
        context.load_verify_locations(path)
    return context


class ServerTls(HttpCase):

    @classmethod
    def setUpClass(cls):
        """A server over TLS; the certificate goes when the class ends."""
        cls.made = unittest.TestCase()
        try:
            cls.cert, cls.key = make_certificate(cls.made)
            cls.options = {"tls_cert": cls.cert, "tls_key": cls.key}
            super().setUpClass()
            cls.context = trusting(cls.cert)
            cls.s3._context = cls.context
        except BaseException:
            cls.made.doCleanups()
            raise

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        cls.made.doCleanups()

    def test_the_url_is_https_and_objects_pass(self):
        self.assertTrue(self.server.url.startswith("https://"))
        data = os.urandom(3000001)
        self.ok(self.s3.put("/box/k", data))
        self.assertEqual(self.ok(self.s3.get("/box/k")).body, data)
        answer = self.s3.get("/box/k", headers={"range": "bytes=5-9"})
        self.assertEqual(self.ok(answer, 206).body, data[5:10])
        self.assertEqual(self.s3.keys("box"), ["k"])

    def test_the_access_log_of_a_bucket_names_cipher_and_version(self):
        for path, body in (("/logs", b""), ("/box", (
                "<BucketLoggingStatus>%s</BucketLoggingStatus>"
                % logging_xml()).encode())):
            self.ok(self.s3.put(path, body, {"logging": ""} if body else {}))
        self.s3.head("/box")
        self.s3.head("/none")
        logs = self.path(gos3rve.STATE, "logs")
        with open(os.path.join(logs, os.listdir(logs)[0])) as file:
            line = read_log(file.read())[0]
        shutil.rmtree(self.path(gos3rve.STATE))
        self.assertEqual(line.operation, "REST.HEAD.BUCKET")
        self.assertRegex(line.tls_version, r"\ATLSv1\.[23]\Z")
        self.assertRegex(line.cipher, r"\A[A-Z][A-Z0-9_-]+\Z")

    def test_trailers_are_checked(self):
        data = b"hello world" * 1000
        for checksum, status in ((crc64(data), 200), (crc64(b"x"), 400)):
            body = b"%x\r\n%s\r\n0\r\nx-amz-checksum-crc32:%s\r\n\r\n" % (
                len(data), data, checksum.encode())
            answer = self.s3.put(
                "/box/k%d" % status, body,
                payload="STREAMING-UNSIGNED-PAYLOAD-TRAILER", headers={
                    "x-amz-trailer": "x-amz-checksum-crc32",
                    "content-encoding": "aws-chunked",
                    "x-amz-decoded-content-length": len(data)})
            self.ok(answer, status)
        self.assertEqual(self.s3.keys("box"), ["k200"])
        answer = self.s3.get("/box/k200")
        self.assertEqual(answer.body, data)
        self.assertNotIn("content-encoding", answer.headers)

    def test_the_end_is_said_with_close_notify(self):
        self.s3.put("/box/k", b"x" * 300000)
        peer = self.peer()      # raises SSLEOFError at an end without
        peer.send(self.head("GET", "/box/k", headers=[
            ("Connection", "close")]))
        self.assertEqual(len(self.ok(peer.answer()).body), 300000)
        self.assertEqual(peer.rest(), b"")

    def test_a_large_unwanted_body_ends_it_but_the_answer_arrives(self):
        peer = self.peer()
        peer.send(self.put_bytes("/nobox/k", b"x" * (4 << 20)))
        answer = peer.answer()
        self.error(answer, "NoSuchBucket")
        self.assertEqual(answer.headers["connection"], "close")

    def test_a_good_upload_is_asked_for_its_body(self):
        peer = self.peer().send(self.put_bytes(
            "/box/k", b"hello", ("Expect", "100-continue"))[:-5])
        self.assertEqual(peer.answer().status, 100)
        self.ok(peer.send(b"hello").answer())
        self.alive(peer)

    def test_pipelined_requests_are_answered(self):
        self.s3.put("/box/k", b"hello")
        peer = self.peer().send(self.head("GET", "/box/k") * 20)
        for _ in range(20):
            self.assertEqual(self.ok(peer.answer()).body, b"hello")

    def test_plain_HTTP_and_garbage_on_its_port_do_no_harm(self):
        for data in (HEALTH, b"\x00" * 1000, b"", b"\x16\x03\x01\x00\x05"):
            answer = b""
            with Peer(self.server.port) as peer:
                with contextlib.suppress(OSError):
                    peer.send(data).sock.shutdown(socket.SHUT_WR)
                    answer = peer.rest()
            self.assertNotIn(b"HTTP/1.1 200", answer)
            self.ok(self.s3.get("/box"))

    def test_a_client_that_delays_its_hello_stops_nobody(self):
        with Peer(self.server.port), Peer(self.server.port):
            self.ok(self.s3.get("/box"))

    def test_a_client_without_a_hello_does_not_delay_the_end(self):
        server = gos3rve.serve(**self.options)
        with Peer(server.port), Peer(server.port) as halfway:
            halfway.send(b"\x16\x03\x01\x02\x00")
            self.shown(server.port, self.cert)      # accepted after them
            self.assertIs(server.close(3), True)

    def test_idle_connections_get_their_close_notify_at_the_end(self):
        server = gos3rve.serve(**self.options)
        with Peer(server.port, self.context) as idle, \
                Peer(server.port, self.context) as halfway:
            self.ok(idle.send(HEALTH).answer())
            self.ok(halfway.send(HEALTH + b"GET / HT").answer())
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                closing = pool.submit(server.close, 5)
                self.assertEqual(idle.rest(), b"")      # or SSLEOFError
                idle.close()
                answer = halfway.answer()   # encrypted, if there is one
                self.assertIn(answer and answer.status, (None, 400))
                self.assertEqual(halfway.rest(), b"")
                halfway.close()
                self.assertIs(closing.result(), True)

    def shown(self, port, *certificates):
        """The certificate (DER) that the server shows."""
        with Peer(port, trusting(*certificates)) as peer:
            self.assertEqual(peer.send(HEALTH).answer().status, 200)
            return peer.sock.getpeercert(True)

    def test_a_failed_reload_keeps_the_old_certificate(self):
        directory = temporary_directory(self)
        cert = shutil.copy(self.cert, os.path.join(directory, "cert"))
        key = shutil.copy(self.key, os.path.join(directory, "key"))
        server = gos3rve.serve(tls_cert=cert, tls_key=key)
        self.addCleanup(server.close, 5)
        before = self.shown(server.port, self.cert)
        other = make_certificate(self)
        shutil.copy(other[0], cert)         # its key has not come yet
        with contextlib.suppress(OSError, gos3rve.ConfigError):
            server.reload_certificate()
        self.assertEqual(self.shown(server.port, self.cert), before)
        shutil.copy(other[1], key)
        server.reload_certificate()
        self.assertNotEqual(self.shown(server.port, other[0]), before)

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "no SIGHUP here")
    def test_SIGHUP_reads_the_certificate_again(self):
        directory = temporary_directory(self)
        both = os.path.join(directory, "both.pem")
        new = make_certificate(self)

        def write(*paths):
            with open(both + ".new", "wb") as target:
                for path in paths:
                    with open(path, "rb") as source:
                        target.write(source.read())
            os.replace(both + ".new", both)
        write(self.cert, self.key)
        server = Process(self, "-tls_cert", both, *KEYS)
        self.assertTrue(server.url.startswith("https://"))
        before = self.shown(server.port, self.cert)
        write(os.devnull)
        server.process.send_signal(signal.SIGHUP)
        self.assertTrue(wait_for(lambda: "certificate" in server.stderr()))
        self.assertEqual(self.shown(server.port, self.cert), before)
        write(*new)
        server.process.send_signal(signal.SIGHUP)
        self.assertTrue(wait_for(lambda: self.shown(
            server.port, self.cert, new[0]) != before))
        self.assertEqual(server.end(), 0)
        self.assertNotIn("Traceback", server.stderr())

    @unittest.skipUnless(gos3rve.have_workers(), "no workers here")
    def test_SIGHUP_is_for_every_worker_and_its_successor(self):
        directory = temporary_directory(self)
        cert = shutil.copy(self.cert, os.path.join(directory, "cert"))
        key = shutil.copy(self.key, os.path.join(directory, "key"))
        server = Process(self, "-workers", "2", "-tls_cert", cert,
                         "-tls_key", key, *KEYS)
        new = make_certificate(self)
        context = trusting(self.cert, new[0])

        def shown():
            """What four connections at once are shown: two a worker."""
            with contextlib.ExitStack() as stack:
                return {stack.enter_context(Peer(
                    server.port, context)).sock.getpeercert(True)
                    for _ in range(4)}
        old = shown()
        self.assertEqual(len(old), 1)
        shutil.copy(new[0], cert)           # its key has not come yet
        server.process.send_signal(signal.SIGHUP)
        self.assertTrue(wait_for(lambda: "reloaded" in server.stderr()))
        self.assertEqual(shown(), old)
        shutil.copy(new[1], key)
        server.process.send_signal(signal.SIGHUP)
        self.assertTrue(wait_for(lambda: not old & shown()))
        victim = server.workers()[0]
        os.kill(victim, signal.SIGKILL)
        self.assertTrue(wait_for(lambda: victim not in server.workers()
                                 and len(server.workers()) == 2))
        self.assertFalse(old & shown())
        self.assertEqual(server.stderr().count("reloaded"), 1)
        self.assertEqual(server.end(), 0)

class ServerProcess:
    """gos3rve.py as a process of its own over some directories."""

    def __init__(self, directory, *arguments, interpreter=sys.executable):
        self.directory = directory
        self.buckets = os.path.join(directory, "buckets")
        ready = os.path.join(directory, "ready-" + os.urandom(4).hex())
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [interpreter, SERVER, "-p", "0", "-bind", "127.0.0.1",
             "-key_id", "KEY", "-key_val", "SECRET", "-log", "none",
             "-dir_buckets", self.buckets,
             "-dir_uploads", os.path.join(directory, "uploads"),
             "-ready_file", ready] + list(arguments),
            stdout=subprocess.DEVNULL, stderr=self.errors)
        self.workers = []
        deadline = time.monotonic() + 20
        while not os.path.exists(ready):
            if self.process.poll() is not None \
                    or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError("the server did not start: %s"
                                   % self.said())
            time.sleep(0.01)
        with open(ready) as file:
            self.url = file.read().strip()
        self.workers = children(self.process.pid)

    def client(self):
        """A new Client of it."""
        return Client(self.url, "KEY", "SECRET")

    def said(self):
        """What it wrote on stderr."""
        self.errors.seek(0)
        return self.errors.read().decode()

    def kill(self):
        """End it and its workers as a power cut would."""
        self.process.kill()
        for pid in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_for(lambda: not any(map(alive, self.workers)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.errors.close()


class KilledServer(unittest.TestCase):
    """kill -9 at random moments: what was acknowledged is whole, what was
    not is the old object or the new one, and a sweep leaves nothing."""

    rounds = int(os.environ.get("GOS3RVE_KILLS", "12"))

    def setUp(self):
        self.directory = temporary_directory(self)
        self.random = random.Random(os.environ.get("GOS3RVE_SEED"))
        self.sure = {}                  # key -> content that must be there
        self.maybe = {}                 # key -> contents it may have, too

    def content(self):
        """New content of random length."""
        size = self.random.choice((0, 10, 5000, 300000, 6 * MIB))
        return os.urandom(16) * (size // 16)

    def write(self, client, key, body):
        """One PUT, multipart upload or copy of `body` under `key`."""
        kind = self.random.choice(("put", "put", "copy", "multipart"))
        path = "/box/" + key
        self.maybe.setdefault(key, set()).add(body)
        if kind == "put":
            answer = client.put(path, body, payload="UNSIGNED-PAYLOAD")
        elif kind == "copy":
            source = "source-" + key
            self.maybe.setdefault(source, set()).add(body)
            answer = client.put("/box/" + source, body)
            self.acknowledge(answer, source, body)
            answer = client.put(path, headers={
                "x-amz-copy-source": "/box/" + source})
        else:
            answer = self.multipart(client, path, body)
        self.acknowledge(answer, key, body)

    def acknowledge(self, answer, key, body):
        self.assertEqual(answer.status, 200, answer.body)
        self.sure[key] = body
        self.maybe[key] = {body}

    def multipart(self, client, path, body):
        parts = [body[:5 * MIB], body[5 * MIB:]]
        upload = client.post(path, [("uploads", "")]).one("UploadId")
        document = ""
        for number, part in enumerate(filter(None, parts), 1):
            etag = client.put(path, part, [
                ("partNumber", str(number)), ("uploadId", upload)],
                payload="UNSIGNED-PAYLOAD").etag
            document += ("<Part><PartNumber>%d</PartNumber><ETag>%s</ETag>"
                         "</Part>" % (number, etag))
        if not document:
            return client.put(path, body)
        return client.post(path, [("uploadId", upload)], (
            "<CompleteMultipartUpload>%s</CompleteMultipartUpload>"
            % document).encode())

    def test_nothing_acknowledged_is_lost_and_nothing_torn_is_seen(self):
        for _ in range(self.rounds):
            with ServerProcess(self.directory, "-bucket",
                               "box") as server:
                self.check(server)
                timer = threading.Timer(self.random.uniform(0, 0.15),
                                        server.kill)
                timer.start()
                with contextlib.suppress(
                        OSError, http.client.HTTPException), \
                        contextlib.closing(server.client()) as client:
                    while True:
                        key = "key%d" % self.random.randrange(8)
                        self.write(client, key, self.content())
                timer.join()
        with ServerProcess(self.directory) as server:
            self.check(server)
        self.check_swept()

    def check(self, server):
        """Every key has one of its possible contents."""
        client = server.client()
        self.addCleanup(client.close)
        for key, contents in sorted(self.maybe.items()):
            answer = client.get("/box/" + key)
            if answer.status == 404 and key not in self.sure:
                continue
            allowed = contents | {self.sure.get(key)}
            self.assertEqual(answer.status, 200, key)
            self.assertIn(answer.body, allowed, "%s is torn" % key)
            if "-" not in answer.etag:
                self.assertEqual(answer.etag, hashlib.md5(
                    answer.body).hexdigest())
            self.sure[key], self.maybe[key] = answer.body, {answer.body}

    def check_swept(self):
        """A sweep, an hour later, leaves objects and nothing else."""
        store = Store(os.path.join(self.directory, "buckets"),
                      os.path.join(self.directory, "uploads"))
        store.sweep(60, now=time.time() + 3600)
        self.assertEqual(os.listdir(store.dir_uploads), [])
        state = os.path.join(store.dir_buckets, "box", gos3rve.STATE)
        self.assertEqual(os.listdir(os.path.join(state, "tmp")), [])
        self.assertEqual(set(os.listdir(os.path.join(
            store.dir_buckets, "box"))) - {gos3rve.STATE}, set(self.sure))


class ConcurrentWrites(unittest.TestCase):
    """Of writers who make the same condition exactly one wins, across
    threads and across processes on the same directory."""

    rounds = int(os.environ.get("GOS3RVE_RACES", "10"))

    def test_one_winner_of_32(self):
        directory = temporary_directory(self)
        workers = ("-workers", "2") if gos3rve.have_workers() else ()
        with ServerProcess(directory, "-bucket", "box", *workers) as one, \
                ServerProcess(directory, "-bucket", "box") as two:
            clients = [(one, two)[number % 2].client()
                       for number in range(32)]
            for number in range(self.rounds):
                key = "/box/key%d" % number
                etag = self.race(clients, key, {"if-none-match": "*"}, 0)
                for more in range(2):
                    etag = self.race(clients, key, {"if-match": etag},
                                     more + 1)
            for client in clients:
                client.close()

    def race(self, clients, key, headers, turn):
        """32 PUTs at once; the winner's ETag."""
        answers = together(len(clients), lambda number: clients[number].put(
            key, b"%d of turn %d" % (number, turn), headers=headers))
        won = [a for a in answers if a.status == 200]
        self.assertEqual(len(won), 1)
        self.assertEqual({a.code for a in answers if a.status != 200},
                         {"PreconditionFailed"})
        self.assertEqual(clients[0].get(key).etag, won[0].etag)
        return won[0].headers["etag"]


class LogsOfTwoServers(unittest.TestCase):
    """Two servers on one directory, one of them killed: every line that
    was spooled is delivered, and none twice."""

    def configure(self, client):
        """`box` logs to `logs`."""
        for path, query, body in (
                ("/logs", "policy", json.dumps(LoggingCase.ALLOWED)),
                ("/box", "logging", "<BucketLoggingStatus>%s"
                 "</BucketLoggingStatus>" % logging_xml())):
            answer = client.put(path, body.encode(), {query: ""})
            self.assertIn(answer.status, (200, 204), answer.body)

    def delivered(self, client):
        """The request ids of all delivered lines."""
        text = "".join(client.get("/logs/" + key).body.decode()
                       for key in client.keys("logs"))
        return [line.split()[6] for line in text.splitlines()]

    def test_each_line_is_delivered_once(self):
        directory, ids = temporary_directory(self), []
        options = ("-bucket", "box", "-bucket", "logs", "-day_seconds", "1")
        with ServerProcess(directory, *options) as one, \
                ServerProcess(directory, *options) as two:
            clients = [one.client(), two.client()]
            self.configure(clients[0])
            for number in range(60):
                answer = clients[number % 2].put("/box/k%d" % number, b"x")
                ids.append(answer.headers["x-amz-request-id"])
            for client in clients:
                client.get("/none")     # the lines before it are spooled
                client.close()
            one.kill()
            client = two.client()
            self.addCleanup(client.close)
            wait_for(lambda: set(ids) <= set(self.delivered(client)))
            found = self.delivered(client)
            self.assertEqual(len(found), len(set(found)))


###############################################################################
# 11. Configuration and command line
###############################################################################

# Option -> (text, value) as every source gives it; {dir} is a directory
SAMPLES = {
    "p": ("9000", 9000),
    "bind": ("127.0.0.1", "127.0.0.1"),
    "dir_buckets": ("some/buckets", "some/buckets"),
    "dir_uploads": ("some/uploads", "some/uploads"),
    "bucket": ("mine", (("mine", None),)),
    "key_id": ("AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    "key_val": ("wJalrXUtnFEMI/K7M+bPx=", "wJalrXUtnFEMI/K7M+bPx="),
    "user_id": ("c5dbe9e2", "c5dbe9e2"),
    "user_name": ("A B", "A B"),
    "user_email": ("a@example.com", "a@example.com"),
    "region": ("eu-west-1", "eu-west-1"),
    "domain": ("S3.example.com", ("s3.example.com",)),
    "public_url": ("https://s3.example.com", "https://s3.example.com"),
    "tls_cert": ("cert.pem", "cert.pem"),
    "tls_key": ("key.pem", "key.pem"),
    "day_seconds": ("10", 10),
    "sse_key": ("keys.json", "keys.json"),
    "sync": ("true", True),
    "readonly": ("true", True),
    "follow_symlinks": ("true", True),
    "upload_ttl": ("15m", 900),
    "log": ("json", "json"),
    "object_ownership": ("ObjectWriter", "ObjectWriter"),
    "cors": ("https://a.example", ("https://a.example",)),
    "workers": ("3", 3),
    "ready_file": ("ready", "ready"),
}
SWITCHES = ("sync", "readonly", "follow_symlinks")
# What an option cannot do without
COMPANIONS = {"tls_key": ("tls_cert", "cert.pem")}
SEED_FLAGS = ("p", "dir_buckets", "dir_uploads", "key_id", "key_val",
              "region", "user_id", "user_name", "config", "help")
SEED_CONFIG = """<root>
    <AccessKeyId>any</AccessKeyId>
    <SecretAccessKey>key</SecretAccessKey>
    <Region>us-east-1</Region>
    <UploadsPath>./uploads</UploadsPath>
    <BucketsPath>./buckets</BucketsPath>
    <Port>8080</Port>
</root>
"""


class ConfigCase(unittest.TestCase):

    def setUp(self):
        """Each test runs in an empty directory, in no environment."""
        self.directory = temporary_directory(self)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)
        patch = mock.patch.dict(os.environ, clean_environment(), clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def read(self, *argv, environment=None):
        """The values of a Config."""
        return gos3rve.read_config(list(argv), environment or {}).values

    def write(self, text, name="config.xml"):
        """Write a file into the directory; its name."""
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
        return name

    def main(self, *argv):
        """(exit status, stdout, stderr) of the command, in this process;
        it fails the test if that begins to serve."""
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.object(gos3rve, "run", side_effect=AssertionError(
                "it would serve")):
            with contextlib.redirect_stdout(out):
                with contextlib.redirect_stderr(err):
                    status = gos3rve.main(list(argv))
        return status, out.getvalue(), err.getvalue()


class ConfigSources(ConfigCase):

    def test_the_samples_are_all_options(self):
        self.assertEqual(sorted(SAMPLES), sorted(
            option.name for option in gos3rve.OPTIONS))

    def test_every_flag_has_four_spellings(self):
        for name, (text, value) in SAMPLES.items():
            more = ["-%s=%s" % COMPANIONS[name]] if name in COMPANIONS \
                else []
            for words in (["-" + name, text], ["--" + name, text],
                          ["-%s=%s" % (name, text)],
                          ["--%s=%s" % (name, text)]):
                with self.subTest(words):
                    self.assertEqual(self.read(*more + words)[name], value)

    def test_switches_need_no_value(self):
        for name in SWITCHES:
            for word in ("-" + name, "--" + name, "-%s=1" % name,
                         "-%s=TRUE" % name, "-%s=yes" % name):
                self.assertIs(self.read(word)[name], True, word)
                self.assertIs(self.read(word, "-p", "1")[name], True, word)
            for word in ("-%s=false", "--%s=0", "-%s=no", "-%s=off"):
                self.assertIs(self.read(word % name)[name], False, word)

    def test_every_option_is_an_environment_variable(self):
        for name, (text, value) in SAMPLES.items():
            with self.subTest(name):
                environment = {"GOS3RVE_" + name.upper(): text}
                if name in COMPANIONS:
                    other, path = COMPANIONS[name]
                    environment["GOS3RVE_" + other.upper()] = path
                self.assertEqual(
                    self.read(environment=environment)[name], value)

    def test_every_option_is_an_element_of_config_xml(self):
        elements = {option.name: option.element
                    for option in gos3rve.OPTIONS}
        for name, (text, value) in SAMPLES.items():
            with self.subTest(name):
                text = "<%s> %s\n</%s>" % (elements[name], text,
                                           elements[name])
                if name in COMPANIONS:
                    other, path = COMPANIONS[name]
                    text += "<%s>%s</%s>" % (elements[other], path,
                                             elements[other])
                self.write("<root>%s</root>" % text)
                self.assertEqual(self.read()[name], value)

    def test_command_line_over_environment_over_file_over_default(self):
        for name, element, default, texts, values in (
                ("p", "Port", 8080, "123", (1, 2, 3)),
                ("region", "Region", None, "xyz", "xyz"),
                ("readonly", "ReadOnly", False, ("0", "1", "0"),
                 (False, True, False)),
                ("bucket", "Bucket", (), ("one", "two", "three"), (
                    (("one", None),), (("two", None),),
                    (("three", None),)))):
            with self.subTest(name):
                os.path.exists("config.xml") and os.unlink("config.xml")
                self.assertEqual(self.read()[name], default)
                self.write("<root><%s>%s</%s></root>" % (
                    element, texts[0], element))
                self.assertEqual(self.read()[name], values[0])
                environment = {"GOS3RVE_" + name.upper(): texts[1]}
                self.assertEqual(self.read(
                    environment=environment)[name], values[1])
                self.assertEqual(self.read(
                    "-%s=%s" % (name, texts[2]),
                    environment=environment)[name], values[2])

    def test_MinIO_s_variables_are_aliases(self):
        environment = {"MINIO_ROOT_USER": "minio",
                       "MINIO_ROOT_PASSWORD": "minio123"}
        values = self.read(environment=environment)
        self.assertEqual((values["key_id"], values["key_val"]),
                         ("minio", "minio123"))
        environment["GOS3RVE_KEY_ID"] = "own"
        values = self.read(environment=environment)
        self.assertEqual((values["key_id"], values["key_val"]),
                         ("own", "minio123"))
        self.write(SEED_CONFIG)
        self.assertEqual(self.read(environment=environment)["key_val"],
                         "minio123")

    def test_an_empty_variable_is_none(self):
        self.assertEqual(self.read(environment={"GOS3RVE_P": ""})["p"],
                         8080)

    def test_the_environment_names_the_file(self):
        self.write("<root><Port>1234</Port></root>", "other.xml")
        environment = {"GOS3RVE_CONFIG": "other.xml"}
        self.assertEqual(self.read(environment=environment)["p"], 1234)
        self.write("<root><Port>4321</Port></root>", "third.xml")
        self.assertEqual(self.read("--config", "third.xml",
                                   environment=environment)["p"], 4321)

    def test_the_seed_s_config_xml_is_read(self):
        for argv in ((), ("-config", "config.xml"),
                     ("--config=./config.xml",)):
            self.write(SEED_CONFIG)
            values = self.read(*argv)
            self.assertEqual(
                [values[name] for name in (
                    "key_id", "key_val", "region", "dir_uploads",
                    "dir_buckets", "p")],
                ["any", "key", "us-east-1", "./uploads", "./buckets",
                 8080])

    def test_the_seed_s_defaults_hold(self):
        values = self.read()
        self.assertEqual([values[name] for name in (
            "p", "dir_buckets", "dir_uploads", "user_name")],
            [8080, "./buckets/", "./uploads/", "s3user@amazon.com"])

    def test_keys_that_nobody_gave_are_new_each_time(self):
        first, second = self.read(), self.read()
        for name in ("key_id", "key_val", "user_id"):
            self.assertNotEqual(first[name], second[name])
            self.assertGreaterEqual(len(first[name]), 10)
        self.assertRegex(first["key_val"], r"\A[A-Za-z0-9]{40}\Z")

    def test_what_may_be_repeated_is_collected(self):
        os.mkdir("tree")
        buckets = (("one", None), ("two", "tree"))
        self.assertEqual(self.read("-bucket", "one", "--bucket=two=tree")
                         ["bucket"], buckets)
        self.assertEqual(self.read(environment={
            "GOS3RVE_BUCKET": "one,two=tree"})["bucket"], buckets)
        self.write("<root><Bucket>one</Bucket><Bucket>two=tree</Bucket>"
                   "</root>")
        self.assertEqual(self.read()["bucket"], buckets)

    def test_durations_have_units(self):
        for text, seconds in (("90", 90), ("90s", 90), ("15m", 900),
                              ("24h", 86400), ("7d", 604800), ("0", 0)):
            self.assertEqual(self.read("-upload_ttl", text)["upload_ttl"],
                             seconds)

    def test_config_xml_names_further_accounts(self):
        self.write("""<root><AccessKeyId>first</AccessKeyId>
            <User><AccessKeyId>BOB</AccessKeyId>
                <SecretAccessKey>bob-secret</SecretAccessKey>
                <UserId>bob-id</UserId><UserName>bob</UserName>
                <Email>bob@example.com</Email></User>
            <User><AccessKeyId>EVE</AccessKeyId>
                <SecretAccessKey>eve-secret</SecretAccessKey></User>
            </root>""")
        config = gos3rve.read_config([], {})
        self.assertEqual(config.users[0], gos3rve.Account(
            "BOB", "bob-secret", "bob-id", "bob", "bob@example.com"))
        self.assertEqual(config.users[1][:2], ("EVE", "eve-secret"))
        self.assertNotIn(config.users[1].user_id, ("", "bob-id"))


# What is wrong: arguments, environment, config.xml, a word of the sentence
WRONG = (
    (["-nonsense"], {}, None, "nonsense"),
    (["--nonsense=1"], {}, None, "nonsense"),
    (["-port", "80"], {}, None, "-port"),
    (["-hello"], {}, None, "-hello"),
    (["-p8080"], {}, None, "-p8080"),
    (["-key", "x"], {}, None, "-key"),
    (["-read"], {}, None, "-read"),
    (["extra"], {}, None, "extra"),
    (["-p", "1", "extra"], {}, None, "extra"),
    (["-sync", "extra"], {}, None, "extra"),
    (["-p"], {}, None, "-p"),
    (["-p", "x"], {}, None, "'x'"),
    (["-p", ""], {}, None, "-p"),
    (["-p", "-1"], {}, None, "-p"),
    (["-p", "65536"], {}, None, "65536"),
    (["-p", "8080.0"], {}, None, "8080.0"),
    (["-p", "\u0663"], {}, None, "-p"),
    (["-log", "xml"], {}, None, "xml"),
    (["-sync=maybe"], {}, None, "maybe"),
    (["-upload_ttl", "soon"], {}, None, "soon"),
    (["-upload_ttl", "-5"], {}, None, "-upload_ttl"),
    (["-upload_ttl", "5w"], {}, None, "5w"),
    (["-bucket", "No"], {}, None, "No"),
    (["-bucket", "a"], {}, None, "'a'"),
    (["-bucket", "../x"], {}, None, "../x"),
    (["-bucket", "a/b"], {}, None, "a/b"),
    (["-bucket", "192.168.1.1"], {}, None, "192.168.1.1"),
    (["-bucket", "mine=nowhere"], {}, None, "nowhere"),
    (["-bucket", "mine="], {}, None, "mine="),
    (["-bucket", "..=."], {}, None, "..=."),
    (["-bucket", "one", "-bucket", "one"], {}, None, "twice"),
    (["-domain", "a b"], {}, None, "a b"),
    (["-domain", ""], {}, None, "-domain"),
    (["-public_url", "s3.example.com"], {}, None, "s3.example.com"),
    (["-public_url", "ftp://a"], {}, None, "ftp"),
    (["-public_url", "http://a/path"], {}, None, "path"),
    (["-public_url", "http://["], {}, None, "http://["),
    (["-region", "not a region"], {}, None, "not a region"),
    (["-key_id", ""], {}, None, "-key_id"),
    (["-key_val="], {}, None, "-key_val"),
    (["-dir_buckets", ""], {}, None, "-dir_buckets"),
    (["-tls_key", "key.pem"], {}, None, "-tls_cert"),
    (["-dir_buckets", "d", "-dir_uploads", "d"], {}, None, "-dir_uploads"),
    (["-dir_uploads", "./buckets/x"], {}, None, "-dir_uploads"),
    (["-config", "missing.xml"], {}, None, "missing.xml"),
    (["-config", "."], {}, None, "."),
    ([], {"GOS3RVE_CONFIG": "missing.xml"}, None, "missing.xml"),
    (["-workers", "0"], {}, None, "-workers"),
    (["-workers", "x"], {}, None, "-workers"),
    (["-workers", "65"], {}, None, "-workers"),
    (["-workers", "-1"], {}, None, "-workers"),
    ([], {"GOS3RVE_WORKERS": "many"}, None, "GOS3RVE_WORKERS"),
    ([], {"GOS3RVE_P": "x"}, None, "GOS3RVE_P"),
    ([], {"GOS3RVE_SYNC": "maybe"}, None, "GOS3RVE_SYNC"),
    ([], {"GOS3RVE_BUCKET": "fine,No"}, None, "No"),
    ([], {}, "", "config.xml"),
    ([], {}, "no XML", "config.xml"),
    ([], {}, "<root><Port>1</Port>", "config.xml"),
    ([], {}, "<wrong/>", "config.xml"),
    ([], {}, "<!DOCTYPE root [<!ENTITY a 'b'>]><root>&a;</root>",
     "config.xml"),
    ([], {}, "<root><Prot>1</Prot></root>", "Prot"),
    ([], {}, "<root><Port><X/></Port></root>", "Port"),
    ([], {}, "<root><Port>x</Port></root>", "Port"),
    ([], {}, "<root><Port>1</Port><Port>2</Port></root>", "Port"),
    ([], {}, "<root>stray text</root>", "stray"),
    ([], {}, "<root><User><AccessKeyId>a</AccessKeyId></User></root>",
     "SecretAccessKey"),
    ([], {}, "<root><User><SecretAccessKey>a</SecretAccessKey></User>"
     "</root>", "AccessKeyId"),
    ([], {}, "<root><User><AccessKeyId>a</AccessKeyId><SecretAccessKey>b"
     "</SecretAccessKey><Shoe>9</Shoe></User></root>", "Shoe"),
    ([], {}, "<root><User><AccessKeyId>a</AccessKeyId><AccessKeyId>c"
     "</AccessKeyId><SecretAccessKey>b</SecretAccessKey></User></root>",
     "AccessKeyId"),
    (["-key_id", "a"], {}, "<root><User><AccessKeyId>a</AccessKeyId>"
     "<SecretAccessKey>b</SecretAccessKey></User></root>", "access key"),
)


class ConfigErrors(ConfigCase):

    def test_what_is_wrong_is_one_sentence_and_status_2(self):
        for argv, environment, config, word in WRONG:
            with self.subTest(argv=argv, env=environment, config=config):
                if os.path.exists("config.xml"):
                    os.unlink("config.xml")
                if config is not None:
                    self.write(config)
                before = os.listdir(".")
                with mock.patch.dict(os.environ, environment):
                    status, out, err = self.main(*argv)
                self.assertEqual((status, out), (2, ""), err)
                self.assertRegex(err, r"\Agos3rve: [^\n]+\n\Z")
                self.assertIn(word, err)
                self.assertEqual(os.listdir("."), before)

    def test_a_wrong_secret_is_not_repeated(self):
        for argv, environment in ((["-key_val=hush", "-p", "x"], {}),
                                  (["-p", "x"],
                                   {"GOS3RVE_KEY_VAL": "hush"})):
            with mock.patch.dict(os.environ, environment):
                self.assertNotIn("hush", self.main(*argv)[2])

    def test_the_process_says_it_and_starts_nothing(self):
        path = os.path.join(self.directory, self.write("garbage", "pem"))
        cases = [["-config", "none.xml"], ["-p", "0", "-tls_cert", path]]
        servers = [Process(self, *words, wait=False) for words in cases]
        for words, server in zip(cases, servers):
            with self.subTest(words):
                self.assertEqual(server.status(), 2)
                self.assertRegex(server.stderr(), r"\Agos3rve: [^\n]+\n\Z")
                self.assertEqual(server.text, "")
                self.assertEqual(os.listdir(server.directory), [])

    def test_a_ready_file_that_cannot_be_is_one_sentence_too(self):
        path = os.path.join(self.directory, "ready")
        os.mkdir(path)
        server = Process(self, "-ready_file", path, *KEYS, wait=False)
        self.assertIn(server.status(), (1, 2))
        self.assertRegex(server.stderr(), r"\Agos3rve: [^\n]+\n\Z")
        self.assertEqual(os.listdir(self.directory), ["ready"])


class ConfigCommands(ConfigCase):

    def test_help_lists_every_option(self):
        for flag in ("-help", "--help", "-h", "--h"):
            status, out, err = self.main(flag)
            self.assertEqual((status, err), (0, ""))
            listed = set(re.findall(r"^  -(\w+)", out, re.MULTILINE))
            names = {option.name for option in gos3rve.OPTIONS}
            self.assertEqual(listed, names | {"config", "help", "version",
                                              "operations"})
            self.assertLessEqual(set(SEED_FLAGS), listed)
            for option in gos3rve.OPTIONS:
                self.assertIn(option.help, out)
        for words in ('"./buckets/"', "8080", '"s3user@amazon.com"'):
            self.assertIn(words, out)

    def test_version_is_one_line(self):
        for flag in ("-version", "--version"):
            self.assertEqual(self.main(flag), (
                0, "gos3rve %s\n" % gos3rve.__version__, ""))

    def test_operations_lists_every_operation_once_with_its_state(self):
        status, out, err = self.main("-operations")
        self.assertEqual((status, err), (0, ""))
        rows = [line.split() for line in out.splitlines()]
        self.assertEqual(sorted(row[0] for row in rows),
                         sorted(gos3rve.OPERATIONS))
        for _, state, method, path in rows:
            self.assertIn(state, ("done", "stored", "refused"))
            self.assertIn(method, ("GET", "HEAD", "PUT", "POST", "DELETE"))
            self.assertTrue(path.startswith("/"))
        self.assertIn(["GetObject", "done", "GET", "/Bucket/Key"], rows)

    def test_commands_start_nothing(self):
        for flag in ("-help", "-version", "-operations"):
            self.main(flag)
        self.assertEqual(os.listdir("."), [])

    def test_a_command_works_as_a_process(self):
        server = Process(self, "-operations", wait=False)
        self.assertEqual(server.status(), 0)
        self.assertIn("GetObject", server.text)
        self.assertEqual(server.stderr(), "")


class ConfigRun(ConfigCase):

    def test_the_banner_shows_a_generated_secret_that_works(self):
        server = Process(self, "-p", "0", "-bind", "127.0.0.1")
        while "rclone" not in server.text:      # the last block
            server.text += server.process.stdout.readline()
        keys = dict(re.findall(r"(access|secret) key +(\S+)", server.text))
        client = server.client(keys["access"], keys["secret"])
        self.assertEqual(client.get("/").status, 200)
        client.close()
        self.assertEqual(server.end(), 0)
        self.assertIn("127.0.0.1:%d" % server.port, server.text)
        self.assertIn(os.path.join(os.path.realpath(server.directory),
                                   "buckets"), server.text)
        self.assertIn("us-east-1", server.text)
        for word in ("aws", "s3cmd", "boto3", "rclone", "access_key = ",
                     "endpoint_url=", "AWS_ACCESS_KEY_ID=",
                     "secret_access_key = "):
            self.assertIn(word, server.text)
        secrets = re.findall(r"(?:SECRET_ACCESS_KEY=|secret_key = |"
                             r"secret key +|secret_access_key = |"
                             r'secret_access_key=")([^\s"]+)', server.text)
        self.assertEqual(len(secrets), 5)
        self.assertEqual(len(set(secrets)), 1)
        self.assertNotIn("\033", server.text)

    def test_a_secret_of_any_source_counts_as_given(self):
        self.write("<root><SecretAccessKey>hush-hush</SecretAccessKey>"
                   "</root>", "secret.xml")
        with gos3rve.serve(key_val="hush-hush") as s3:
            for argv, environment in (
                    (["-key_val", "hush-hush"], {}),
                    (["-config", "secret.xml"], {}),
                    ([], {"GOS3RVE_KEY_VAL": "hush-hush"})):
                text = gos3rve.banner(s3, gos3rve.read_config(
                    argv, environment))
                self.assertIn(s3.key_id, text)
                self.assertNotIn("hush-hush", text)
                self.assertNotIn("\033", text)
            config = gos3rve.read_config([], {})
            self.assertIn("\033[1m", gos3rve.banner(s3, config, True))

    def test_the_seed_s_config_serves_the_seed_s_keys(self):
        path = os.path.join(self.directory,
                            self.write(SEED_CONFIG, "seed.xml"))
        server = Process(self, "-config", path, "-p", "0",
                         "-bind", "127.0.0.1")
        client = server.client("any", "key")
        self.addCleanup(client.close)
        self.assertEqual(client.put("/mine").status, 200)
        self.assertEqual(client.put("/mine/k", b"x").status, 200)
        self.assertEqual(sorted(os.listdir(server.directory)),
                         ["buckets", "uploads"])
        self.assertTrue(os.path.isfile(os.path.join(
            server.directory, "buckets", "mine", "k")))

    def test_a_ready_file_has_the_url_and_goes_at_the_end(self):
        path = os.path.join(self.directory, "ready")
        server = Process(self, "-ready_file", path, *KEYS, wait=False)
        self.assertTrue(wait_for(lambda: os.path.exists(path)),
                        server.stderr())
        with open(path) as file:
            url = file.read().strip()
        with urllib.request.urlopen(url + "/-/health", timeout=20) as got:
            self.assertEqual(got.status, 200)
        self.assertEqual(server.end(), 0)
        self.assertEqual(os.listdir(self.directory), [])

    def test_a_bucket_may_be_a_directory_elsewhere(self):
        tree = temporary_directory(self)
        os.mkdir(os.path.join(tree, "d"))
        with open(os.path.join(tree, "d", "file"), "w") as file:
            file.write("hello")
        with gos3rve.serve("buckets", ["new", "Old_Tree=" + tree]) as s3:
            client = Client(s3.url, s3.key_id, s3.key_val)
            self.assertEqual(client.get("/").all("Buckets/Bucket/Name"),
                             ["Old_Tree", "new"])
            self.assertEqual(client.keys("Old_Tree"), ["d/file"])
            self.assertEqual(client.put("/Old_Tree/d/k", b"x").status, 200)
            client.close()
        self.assertEqual(sorted(os.listdir(os.path.join(tree, "d"))),
                         ["file", "k"])
        self.assertEqual(os.listdir("buckets"), ["new"])

    def test_a_restart_finds_its_buckets(self):
        for _ in range(2):
            with gos3rve.serve("buckets", ["mine"], user_id="me") as s3:
                client = Client(s3.url, s3.key_id, s3.key_val)
                self.assertEqual(client.put("/mine/k", b"x").status, 200)
                client.close()

    def test_readonly_creates_nothing_and_refuses_changes(self):
        tree = temporary_directory(self)
        with open(os.path.join(tree, "file"), "w") as file:
            file.write("hello")
        with gos3rve.serve("buckets", ["tree=" + tree], readonly=True,
                           dir_uploads="uploads") as s3:
            client = Client(s3.url, s3.key_id, s3.key_val)
            self.assertEqual(client.get("/tree/file").body, b"hello")
            self.assertEqual(client.keys("tree"), ["file"])
            for answer in (client.put("/tree/k", b"x"), client.put("/new"),
                           client.delete("/tree/file"),
                           client.delete("/tree"),
                           client.post("/tree/k", [("uploads", "")])):
                self.assertEqual((answer.status, answer.code),
                                 (403, "AccessDenied"))
            client.close()
        self.assertEqual(os.listdir("."), [])
        self.assertEqual(os.listdir(tree), ["file"])


class ConfigServe(unittest.TestCase):

    def client(self, server):
        """A Client of a Running, closed at the end."""
        client = Client(server.url, server.key_id, server.key_val)
        self.addCleanup(client.close)
        return client

    def test_serve_is_a_server_on_a_free_port_until_its_end(self):
        with gos3rve.serve(buckets=["mine", "yours"]) as s3:
            self.assertEqual(s3.url, "http://127.0.0.1:%d" % s3.port)
            client = self.client(s3)
            self.assertEqual(client.get("/").all("Buckets/Bucket/Name"),
                             ["mine", "yours"])
            self.assertEqual(client.put("/mine/a/k", b"x").status, 200)
            path = os.path.join(s3.dir_buckets, "mine", "a", "k")
            self.assertTrue(os.path.isfile(path))
            self.assertEqual(s3.region, "us-east-1")
        self.assertFalse(os.path.exists(s3.dir_buckets))
        self.assertFalse(os.path.exists(s3.dir_uploads))
        self.assertFalse(os.path.exists(os.path.dirname(s3.dir_buckets)))
        self.assertTrue(refused(s3.port))

    def test_a_given_directory_is_served_and_kept(self):
        directory = temporary_directory(self)
        os.mkdir(os.path.join(directory, "mine"))
        with gos3rve.serve(directory) as s3:
            uploads = s3.dir_uploads
            self.assertEqual(self.client(s3).put("/mine/k", b"x").status,
                             200)
        self.assertTrue(os.path.isfile(os.path.join(directory, "mine",
                                                    "k")))
        self.assertFalse(os.path.exists(uploads))

    def test_options_are_those_of_the_command_line(self):
        tree = temporary_directory(self)
        with gos3rve.serve(key_id="me", key_val="hush", readonly=True,
                           region="eu-west-1", user_id="my-id",
                           buckets=["tree=" + tree]) as s3:
            self.assertEqual((s3.key_id, s3.key_val, s3.region),
                             ("me", "hush", "eu-west-1"))
            client = Client(s3.url, "me", "hush", "eu-west-1")
            self.addCleanup(client.close)
            answer = client.get("/")
            self.assertEqual(answer.one("Owner/ID"), "my-id")
            self.assertEqual(answer.all("Buckets/Bucket/Name"), ["tree"])
            self.assertEqual(client.put("/tree/k", b"x").status, 403)
            client.region = "us-east-1"
            self.assertEqual(client.get("/").code,
                             "AuthorizationHeaderMalformed")

    def test_servers_know_nothing_of_each_other(self):
        with gos3rve.serve(buckets=["mine"]) as one:
            with gos3rve.serve() as two:
                self.assertNotEqual(one.key_val, two.key_val)
                client = self.client(two)
                self.assertEqual(client.get("/mine").status, 404)
                client.key_id = one.key_id
                self.assertEqual(client.get("/").code, "InvalidAccessKeyId")

    def test_a_wrong_option_is_a_ConfigError(self):
        directory = temporary_directory(self)
        for options in ({"nonsense": 1}, {"buckets": ["No"]},
                        {"tls_cert": "missing.pem"}, {"tls_key": "x"},
                        {"log": "xml"}, {"p": 65536}, {"p": "x"},
                        {"region": "not a region"}, {"key_id": ""},
                        {"upload_ttl": "soon"}, {"domain": "a b"}):
            with self.subTest(options):
                with mock.patch.object(tempfile, "tempdir", directory):
                    with self.assertRaises(gos3rve.ConfigError):
                        gos3rve.serve(**options).close(1)

    def test_a_serve_that_fails_leaves_nothing(self):
        directory = temporary_directory(self)
        for options in ({"buckets": ["No"]}, {"tls_cert": "missing.pem"},
                        {"nonsense": 1}, {"tls_key": "x"}):
            with mock.patch.object(tempfile, "tempdir", directory):
                with self.assertRaises(gos3rve.ConfigError):
                    gos3rve.serve(**options).close(1)
            self.assertEqual(os.listdir(directory), [], options)

    def test_a_port_in_use_is_an_OSError_and_leaves_nothing(self):
        directory = temporary_directory(self)
        with gos3rve.serve() as s3:
            with mock.patch.object(tempfile, "tempdir", directory):
                with self.assertRaises(OSError):
                    gos3rve.serve(p=s3.port)
        self.assertEqual(os.listdir(directory), [])

###############################################################################
# 12. Real clients
###############################################################################
#
# Every recipe of the README, word for word, by the client that it is for,
# over HTTP and over TLS; trees up and down; the keys that break servers.  A
# client is looked for beside sys.executable, then on PATH.  Those that are
# not there are named in one line and skipped; GOS3RVE_REQUIRE_CLIENTS=1
# makes that a failure, =0 runs none.

# name: (a command that only an installed one carries out, what it says)
CLIENTS = {
    "aws": (["aws", "--version"], r"aws-cli/"),
    "boto3": ([sys.executable, "-c", "import boto3"], r""),
    "curl": (["curl", "--version"], r"curl (7\.8[89]|7\.9|[89]\.|\d\d)"),
    "mc": (["mc", "--version"], r"RELEASE\."),      # not Midnight Commander
    "minio": ([sys.executable, "-c", "import minio"], r""),
    "openssl": (["openssl", "version"], r"OpenSSL"),
    "pytest": ([sys.executable, "-c", "import boto3, pytest"], r""),
    "rclone": (["rclone", "version"], r"rclone v"),
    "s3cmd": (["s3cmd", "--version"], r"s3cmd version"),
    "s5cmd": (["s5cmd", "version"], r"v\d"),
}
# What .ci/run cannot or need not install
OPTIONAL_CLIENTS = ("mc", "pytest")
# s3api rename-object came with botocore 1.38.37, in the middle of 2025
AWS_WITH_RENAME = r"aws-cli/(1\.(4[1-9]|[5-9]\d)|2\.(2[89]|[3-9]\d)|[3-9])"

# The operations a whole session consists of; each row is "one of"
SESSION = (("CreateBucket",), ("PutObject",), ("GetObject",),
           ("ListObjects", "ListObjectsV2"), ("CopyObject",), ("UploadPart",),
           ("CompleteMultipartUpload",), ("DeleteObject", "DeleteObjects"),
           ("DeleteBucket",))
# What moves content, or removes it
TRANSFERS = {"PutObject", "GetObject", "CopyObject", "UploadPart",
             "UploadPartCopy", "CompleteMultipartUpload", "DeleteObject",
             "DeleteObjects"}


def recipes():
    """The README's recipes: name -> (language, text)."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        found = re.findall(r"^<!-- recipe: (\S+) -->\n```(\w+)\n(.*?)^```$",
                           file.read(), re.MULTILINE | re.DOTALL)
    return {name: (language, text) for name, language, text in found}


def client_environment(home, server=None, cert=None):
    """What a client sees: nothing of this machine's own settings."""
    kept = ("LD_LIBRARY_PATH", "PYENV_ROOT", "PYENV_VERSION", "SYSTEMROOT",
            "TMPDIR", "VIRTUAL_ENV")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env.update(
        PATH=os.path.dirname(sys.executable) + os.pathsep
        + os.environ.get("PATH", os.defpath),
        HOME=home, LANG="C.UTF-8", PYTHONPATH=HERE,
        PYTHONUSERBASE=os.path.expanduser("~/.local"),
        AWS_EC2_METADATA_DISABLED="true", AWS_DEFAULT_REGION="us-east-1")
    if server:
        env.update(AWS_ENDPOINT_URL=server.url,
                   AWS_ACCESS_KEY_ID=server.key_id,
                   AWS_SECRET_ACCESS_KEY=server.key_val)
    if cert:
        env.update(AWS_CA_BUNDLE=cert, SSL_CERT_FILE=cert,
                   CURL_CA_BUNDLE=cert, RCLONE_CA_CERT=cert)
    return env


def run_client(command, directory, env):
    """(exit status, stdout, both outputs as text) of a command."""
    # `which` knows the PATH of env, and Popen that of this process only
    path = shutil.which(command[0], path=env["PATH"])
    if path is None:
        return 127, "", "%s: not found" % command[0]
    done = subprocess.run([path] + command[1:], cwd=directory, env=env,
                          stdin=subprocess.DEVNULL, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = (data.decode("utf-8", "backslashreplace")
                  for data in (done.stdout, done.stderr))
    return done.returncode, out, out + error


class _Found:
    """Which clients are there, looked up once, all at a time."""

    said = None                         # name -> what it says, None: absent

    @classmethod
    def look(cls):
        if cls.said is None:
            with tempfile.TemporaryDirectory() as home, \
                    concurrent.futures.ThreadPoolExecutor() as pool:
                env = client_environment(home)
                cls.said = dict(zip(CLIENTS, pool.map(
                    lambda row: cls._ask(row, home, env),
                    CLIENTS.values())))
            missing = sorted(n for n in CLIENTS if cls.said[n] is None)
            if missing:
                print("clients that are not installed, skipped: "
                      + ", ".join(missing), file=sys.stderr)
        return cls.said

    @staticmethod
    def _ask(row, home, env):
        command, pattern = row
        if os.environ.get("GOS3RVE_REQUIRE_CLIENTS") == "0":
            return None
        status, _, said = run_client(command, home, env)
        return said if not status and re.search(pattern, said) else None


def need_client(test, *names):
    """Skip the test, or fail it, unless these clients are there."""
    for name in names:
        if _Found.look()[name] is not None:
            continue
        if os.environ.get("GOS3RVE_REQUIRE_CLIENTS") == "1" \
                and name not in OPTIONAL_CLIENTS:
            test.fail("%s is not installed" % name)
        test.skipTest("%s is not installed" % name)


class ClientCase(unittest.TestCase):
    """A server and a home for the client.

    self.done: the operations that the server carried out, each noted
    before its answer leaves; self.failed: those answered with a 5xx.
    """

    options = {}
    cert = None

    @classmethod
    def setUpClass(cls):
        cls.server = gos3rve.serve(**cls.options)

    @classmethod
    def tearDownClass(cls):
        cls.server.close(5)

    def setUp(self):
        self.home = os.path.realpath(temporary_directory(self))
        self.env = client_environment(self.home, self.server, self.cert)
        self.done, self.failed = [], []
        respond = gos3rve.respond
        noting = mock.patch.object(
            gos3rve, "respond", lambda request: self._noted(respond, request))
        noting.start()
        self.addCleanup(noting.stop)

    def _noted(self, respond, request):
        status = 500
        try:
            response = respond(request)
            status = response.status
            return response
        except S3Error as error:
            status = error.status
            raise
        finally:
            name = request.operation.name if request.operation else "-"
            self.done.append(name)
            if status >= 500:
                self.failed.append((name, status))

    def client(self, *command):
        """Run a client in its home; what it prints on stdout."""
        status, out, said = run_client(list(command), self.home, self.env)
        self.assertEqual(status, 0, "%s\n%s" % (command, said[-3000:]))
        return out

    def recipe(self, name):
        """Carry out a recipe as it stands in the README; its stdout."""
        language, text = recipes()[name]
        if language == "sh":
            return self.client("sh", "-e", "-c", text)
        path = os.path.join(self.home, "test_recipe.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        if name == "pytest":
            return self.client(sys.executable, "-m", "pytest", "-q",
                               "-p", "no:cacheprovider", path)
        return self.client(sys.executable, path)

    def session(self, name):
        """Carry out the recipe of a whole session, and see on the server
        that it was one; its stdout."""
        out = self.recipe(name)
        for names in SESSION:
            self.assertTrue(set(names) & set(self.done), (names, self.done))
        self.assertGreater(self.done.count("UploadPart"), 1)
        # s3cmd ends a copy with a PutObjectAcl, and takes the 501
        self.assertLessEqual(set(self.failed), {("PutObjectAcl", 501)})
        self.assertEqual(os.listdir(self.server.dir_buckets), [])
        self.assertEqual(os.listdir(self.server.dir_uploads), [])
        return out


class RecipesOverHTTP(ClientCase):
    """Each client's session of the README."""

    def test_aws(self):
        need_client(self, "aws", "curl")
        self.assertEqual(self.session("aws").splitlines().count("hello"), 2)

    def test_aws_renames_in_one_request(self):
        need_client(self, "aws")
        if not re.search(AWS_WITH_RENAME, _Found.look()["aws"]):
            self.skipTest("this aws has no rename-object")
        self.recipe("aws-rename")
        self.assertIn("RenameObject", self.done)
        self.assertNotIn("CopyObject", self.done)
        self.assertEqual(self.failed, [])

    def test_boto3(self):
        need_client(self, "boto3")
        self.session("boto3")
        self.assertIn("RenameObject", self.done)

    def test_boto3_and_aws_at_sts(self):
        need_client(self, "boto3", "aws")
        self.recipe("sts")
        self.assertEqual(self.failed, [])
        said = json.loads(self.client(
            "aws", "sts", "get-caller-identity", "--output", "json",
            "--endpoint-url", self.env.pop("AWS_ENDPOINT_URL")))
        self.assertTrue(said["Arn"].endswith(":root"))
        self.env["AWS_ENDPOINT_URL"] = self.server.url
        keys = json.loads(self.client(
            "aws", "sts", "assume-role", "--role-arn",
            "arn:aws:iam::%s:role/x" % said["Account"],
            "--role-session-name", "tests", "--tags", "Key=k,Value=a b",
            "--output", "json"))["Credentials"]
        self.env.update(AWS_ACCESS_KEY_ID=keys["AccessKeyId"],
                        AWS_SECRET_ACCESS_KEY=keys["SecretAccessKey"],
                        AWS_SESSION_TOKEN=keys["SessionToken"])
        said = json.loads(self.client("aws", "sts", "get-caller-identity",
                                      "--output", "json"))
        self.assertTrue(said["Arn"].endswith(":assumed-role/x/tests"))
        self.client("aws", "s3", "mb", "s3://mine")
        self.client("aws", "s3", "rb", "s3://mine")
        self.assertIn("DeleteBucket", self.done)

    def test_curl(self):
        need_client(self, "curl")
        self.assertIn("hello\n", self.session("curl"))
        self.assertIn("RenameObject", self.done)

    def test_mc(self):
        need_client(self, "mc")
        if self.cert:
            trusted = os.path.join(self.home, ".mc", "certs", "CAs")
            os.makedirs(trusted)
            shutil.copy(self.cert, trusted)
        self.session("mc")

    def test_minio(self):
        need_client(self, "minio")
        self.session("minio")

    def test_rclone(self):
        need_client(self, "rclone", "curl")
        self.assertEqual(self.session("rclone").count("hello\n"), 2)

    def s3cmd_setup(self):
        """Configure s3cmd as the README does, and for TLS."""
        self.recipe("s3cmd-setup")
        if self.cert:
            with open(os.path.join(self.home, ".s3cfg"), "a") as file:
                file.write("use_https = True\nsignurl_use_https = True\n"
                           "ca_certs_file = %s\n" % self.cert)

    def test_s3cmd(self):
        need_client(self, "s3cmd", "curl")
        self.s3cmd_setup()
        self.assertIn("hello\n", self.session("s3cmd"))

    def test_access_logs(self):
        need_client(self, "aws", "s3cmd")
        self.s3cmd_setup()
        self.assertIn("Target prefix: s3://logs/mine/",
                      self.recipe("access-logs"))
        self.client("sh", "-ec", "echo x > x; s3cmd put x s3://mine/x; "
                    "s3cmd accesslog s3://mine --no-access-logging")
        log = self.client("sh", "-ec", "mkdir down; s3cmd get -r --quiet "
                          "s3://logs/mine/ down/ >&2; cat down/*")
        self.client("s3cmd", "rb", "-rf", "s3://mine", "s3://logs")
        self.assertIn("REST.PUT.OBJECT",
                      [line.operation for line in read_log(log)])

    def test_s5cmd(self):
        need_client(self, "s5cmd", "curl")
        self.assertEqual(self.session("s5cmd").splitlines().count("hello"),
                         2)


class RecipesOverTLS(RecipesOverHTTP):
    """The same over TLS, with the certificate of the README."""

    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.mkdtemp(prefix="test-gos3rve-")
        cls.server = None
        if _Found.look()["openssl"] is None:
            return
        status, _, said = run_client(
            ["sh", "-e", "-c", recipes()["certificate"][1]], cls.directory,
            client_environment(cls.directory))
        assert status == 0, said
        cls.cert = os.path.join(cls.directory, "cert.pem")
        cls.options = {"tls_cert": cls.cert, "tls_key": os.path.join(
            cls.directory, "key.pem")}
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        if cls.server:
            super().tearDownClass()
        shutil.rmtree(cls.directory)

    def setUp(self):
        need_client(self, "openssl")
        super().setUp()

    def test_boto3_sends_trailers(self):
        need_client(self, "boto3")
        with mock.patch.object(gos3rve, "open_body",
                               wraps=gos3rve.open_body) as opened:
            self.session("boto3")
        sent = [call[0][1] for call in opened.call_args_list]
        trailers = [headers["x-amz-trailer"] for headers in sent
                    if headers.get("x-amz-content-sha256")
                    == "STREAMING-UNSIGNED-PAYLOAD-TRAILER"]
        self.assertIn("x-amz-checksum-crc32", trailers)

    test_boto3 = None                   # test_boto3_sends_trailers is it


class RecipesOfTheServer(unittest.TestCase):
    """What the README says of starting it."""

    def setUp(self):
        self.home = temporary_directory(self)
        shutil.copy(SERVER, self.home)
        self.env = dict(
            client_environment(self.home), GOS3RVE_P="0",
            GOS3RVE_BIND="127.0.0.1", GOS3RVE_KEY_ID="me",
            GOS3RVE_KEY_VAL="secret", GOS3RVE_READY_FILE="url.txt")

    def start(self, name):
        """Start the server as a recipe does; its URL."""
        path = os.path.join(self.home, "url.txt")
        with open(os.path.join(self.home, "log"), "wb") as log:
            server = subprocess.Popen(
                ["sh", "-c", "exec " + recipes()[name][1]], cwd=self.home,
                env=self.env, stdout=log, stderr=log)
        self.addCleanup(server.wait, 30)
        self.addCleanup(server.terminate)
        deadline = time.monotonic() + 30
        while not os.path.exists(path) and time.monotonic() < deadline:
            self.assertIsNone(server.poll(), "it ended")
            time.sleep(0.02)
        with open(path) as file:
            return file.read().strip()

    def client(self, url, context=None):
        """A Client that is closed before its server ends."""
        client = Client(url, "me", "secret", context=context)
        self.addCleanup(client.close)
        return client

    def test_an_existing_directory_readonly(self):
        os.mkdir(os.path.join(self.home, "photos"))
        with open(os.path.join(self.home, "photos", "one.txt"), "w") as file:
            file.write("one")
        s3 = self.client(self.start("serve-readonly"))
        self.assertEqual(s3.get("/photos/one.txt").body, b"one")
        self.assertEqual(s3.put("/photos/two.txt", b"two").status, 403)
        self.assertEqual(os.listdir(os.path.join(self.home, "photos")),
                         ["one.txt"])

    def test_a_free_port_and_a_ready_file(self):
        del self.env["GOS3RVE_READY_FILE"], self.env["GOS3RVE_P"]
        url = self.start("serve-free-port")
        with urllib.request.urlopen(url + "/-/health") as answer:
            self.assertEqual((answer.status, answer.read()), (200, b""))

    def test_https_with_a_certificate_of_ones_own(self):
        need_client(self, "openssl")
        status, _, said = run_client(
            ["sh", "-e", "-c", recipes()["certificate"][1]], self.home,
            self.env)
        self.assertEqual(status, 0, said)
        s3 = self.client(
            self.start("serve-https"), ssl.create_default_context(
                cafile=os.path.join(self.home, "cert.pem")))
        self.assertTrue(s3.url.startswith("https://"))
        self.assertEqual(s3.put("/mine").status, 200)

    def test_the_first_screen(self):
        need_client(self, "curl")
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            block = re.search(r"^```console\n(.*?)^```$", file.read(),
                              re.MULTILINE | re.DOTALL)[1]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        script, output = re.sub(r"^\$ ", "", block, flags=re.M).rsplit(
            "\n", 2)[:2]
        del self.env["GOS3RVE_READY_FILE"]
        done = run_client(
            ["sh", "-e", "-c", "trap 'kill $!; wait $!' EXIT\n"
             + script.replace("8080", port) + "\n"],
            self.home, dict(self.env, GOS3RVE_P=port))
        self.assertEqual(done, (0, output + "\n", output + "\n"))

    def test_config_xml(self):
        path = os.path.join(self.home, "config.xml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(recipes()["config.xml"][1])
        values, users = gos3rve.load_config(path)
        self.assertEqual((values["p"], values["key_id"]), (8080, "me"))
        self.assertEqual(values["bucket"], (("mine", None), ("yours", None)))
        self.assertEqual(users[0][:5], (
            "alice", "her-secret", "alice-id", "Alice", "alice@example.com"))
        self.assertEqual([user.key_id for user in users], ["alice", "bob"])

    def test_serve_in_python(self):
        path = os.path.join(self.home, "recipe.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(recipes()["serve-python"][1])
        status, out, said = run_client([sys.executable, path], self.home,
                                       client_environment(self.home))
        self.assertEqual(status, 0, said)
        self.assertRegex(out, r"^http://127\.0\.0\.1:\d+ \w{20} \w{40}\n$")

    def test_a_pytest_fixture(self):
        need_client(self, "pytest")
        path = os.path.join(self.home, "test_recipe.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(recipes()["pytest"][1])
        status, out, said = run_client(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
             path], self.home, client_environment(self.home))
        self.assertEqual(status, 0, said)
        self.assertIn("1 passed", out)

    def test_every_recipe_is_run_by_a_test(self):
        with open(os.path.join(HERE, "test_gos3rve.py")) as file:
            tests = file.read()
        for name in recipes():
            with self.subTest(name):
                self.assertIn('"%s"' % name, tests)


def make_tree(root):
    """Some 300 files of all sizes and names, at fixed old times."""
    chance = random.Random(12)
    words = ["a", "B", "c d", "e+f", "100%", "g&h", "\u00e9t\u00e9", "\u65e5",
             ".hidden", "i'j", "k=l", "m~n", "(o)", "p@q,r"]
    for number in range(300):
        depth = chance.randrange(4)
        directory = os.path.join(root, *(
            "%s-%d" % (chance.choice(words), chance.randrange(3))
            for _ in range(depth)))
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, "%s.%d" % (chance.choice(words),
                                                  number))
        size = 9 * MIB if number == 7 else chance.choice(
            (0, 1, 100, 4096, 70000))
        with open(path, "wb") as file:
            file.write((b"%08d" % number) * (size // 8) + b"x" * (size % 8))
        when = 1600000000 + chance.randrange(100000000) + number / 1000
        os.utime(path, (when, when))


def read_tree(root):
    """Relative path -> content of every file but the server's own."""
    found = {}
    for path, directories, files in os.walk(root):
        if path == root and gos3rve.STATE in directories:
            directories.remove(gos3rve.STATE)
        for name in files:
            full = os.path.join(path, name)
            with open(full, "rb") as file:
                found[os.path.relpath(full, root)] = file.read()
    return found


class TreesUpAndDown(ClientCase):
    """A tree of files put there by hand comes down and goes up again into
    a second bucket, byte for byte; doing it again moves nothing."""

    def setUp(self):
        super().setUp()
        self.tree = os.path.join(self.server.dir_buckets, "tree")
        self.copy = os.path.join(self.server.dir_buckets, "copy")

    def check(self, down, up, down_again=None, up_again=None):
        """Carry out the commands, and look at the trees."""
        if not os.path.exists(self.tree):       # made once, for them all
            make_tree(self.tree)
        expected = read_tree(self.tree)
        self.assertEqual(len(expected), 300)
        os.mkdir(self.copy)
        self.addCleanup(shutil.rmtree, self.copy)
        os.mkdir(os.path.join(self.home, "down"))
        self.client(*down)
        self.assertTrue(read_tree(os.path.join(self.home, "down"))
                        == expected, "not the same")
        self.client(*up)
        self.assertTrue(read_tree(self.copy) == expected, "not the same")
        del self.done[:]
        self.client(*(down_again or down))
        self.client(*(up_again or up))
        self.assertEqual(set(self.done) & TRANSFERS, set())
        self.assertTrue(self.done, "nobody asked")
        self.assertTrue(read_tree(self.tree) == expected, "it changed")

    def test_aws_sync(self):
        need_client(self, "aws")
        self.check(("aws", "s3", "sync", "s3://tree", "down"),
                   ("aws", "s3", "sync", "down", "s3://copy"))

    def test_s3cmd_sync(self):
        need_client(self, "s3cmd")
        self.client("sh", "-e", "-c", recipes()["s3cmd-setup"][1])
        self.check(("s3cmd", "sync", "s3://tree/", "down/"),
                   ("s3cmd", "sync", "down/", "s3://copy/"))

    def test_rclone_sync(self):
        need_client(self, "rclone")
        self.env.update(rclone_environment(self.server))
        self.check(("rclone", "sync", "gos3rve:tree", "down"),
                   ("rclone", "sync", "down", "gos3rve:copy"))

    def test_s5cmd_cp(self):
        need_client(self, "s5cmd")
        self.env["S3_ENDPOINT_URL"] = self.server.url
        self.check(("s5cmd", "cp", "s3://tree/*", "down/"),
                   ("s5cmd", "cp", "down/", "s3://copy/"),
                   ("s5cmd", "sync", "s3://tree/*", "down/"),
                   ("s5cmd", "sync", "down/", "s3://copy/"))


def rclone_environment(server):
    """The remote `gos3rve:` as variables."""
    prefix = "RCLONE_CONFIG_GOS3RVE_"
    return {prefix + "TYPE": "s3", prefix + "PROVIDER": "Other",
            prefix + "ENDPOINT": server.url, prefix + "ENV_AUTH": "true",
            prefix + "REGION": "us-east-1", prefix + "ENCODING": "None"}


# Keys that are no path, or stand in each other's way, or break what is
# quoted carelessly.  DESIGN 3, "Keys are total".
TORTURE_KEYS = (
    "k" * 200 + "/" + "\u00fc" * 100 + "/" + "z" * 622,     # 1,024 bytes
    "s" * 600, "..", ".", "up/../down", "here/./there", "../box/out",
    "two//slashes", "/leading", "//leading", "trailing/", "double//",
    "a", "a/b", "a/", "a/b/c", "a-b", "a0", "per%2Fcent", "%", "%zz",
    "plus+plus", "a space", " ", "it's \"quoted\"", "a&b<c>d", "q?r=s#t",
    "back\\slash", "*", "\U0001f600", "caf\u00e9", "cafe\u0301",
    "new\nline", "tab\tand\rreturn", "\x01", ".gos3rve/x", ".gos3rve",
    "~tilde", "x=y;z,w:v@u!$()'")


class EveryOperation(unittest.TestCase):
    """Every operation of botocore's model, called through boto3."""

    VALUES = {"Bucket": "box", "Key": "k", "UploadId": "none", "Id": "one",
              "CopySource": "box/k", "RenameSource": "box/k",
              "KMSKeyArn": "arn:aws:kms:us-east-1:111122223333:key/k",
              "Policy": "{}", "RequestRoute": "route", "PartNumber": 1,
              "Suffix": "index.html", "VersioningConfiguration": {
                  "Status": "Enabled"}}
    # On one route, told apart by version only
    SAME = {"GetBucketNotification": "GetBucketNotificationConfiguration",
            "PutBucketNotification": "PutBucketNotificationConfiguration",
            "GetBucketLifecycle": "GetBucketLifecycleConfiguration",
            "PutBucketLifecycle": "PutBucketLifecycleConfiguration",
            "ListObjectAnnotations": "GetObjectAnnotation"}
    # SDKs sign them for s3express and s3-object-lambda, which is refused
    FOREIGN = ("ListDirectoryBuckets", "WriteGetObjectResponse")

    def value(self, name, shape):
        """The least that the model takes for a member."""
        if name in self.VALUES:
            return self.VALUES[name]
        if shape.type_name == "structure":
            return {name: self.value(name, shape.members[name])
                    for name in shape.required_members}
        if shape.type_name == "list":
            return [self.value("", shape.member)]
        if shape.type_name == "string":
            return shape.enum[0] if shape.enum else "text"
        return {"integer": 1, "long": 1, "boolean": True, "map": {},
                "timestamp": 2000000000, "blob": b"x"}[shape.type_name]

    def test_each_answers_what_operations_says(self):
        need_client(self, "boto3")
        import boto3
        import botocore.config
        import botocore.exceptions
        asked, find = [], gos3rve.find_operation

        def find_and_note(request):
            asked.append(find(request).name)
            return find(request)
        with gos3rve.serve() as server, mock.patch.object(
                gos3rve, "find_operation", find_and_note):
            s3 = boto3.client(
                "s3", endpoint_url=server.url, region_name="us-east-1",
                aws_access_key_id=server.key_id,
                aws_secret_access_key=server.key_val,
                config=botocore.config.Config(
                    retries={"total_max_attempts": 1},
                    inject_host_prefix=False, parameter_validation=False,
                    s3={"addressing_style": "path"}))
            model = s3.meta.service_model
            self.assertGreater(len(model.operation_names), 100)
            for name in model.operation_names:
                with self.subTest(operation=name):
                    self.call(s3, model.operation_model(name), asked,
                              botocore.exceptions.ClientError)

    def test_so_does_each_of_sts(self):
        need_client(self, "boto3")
        import boto3
        import botocore.config
        import botocore.exceptions
        with gos3rve.serve(user_id="111122223333") as server:
            sts = boto3.client(
                "sts", endpoint_url=server.url, region_name="us-east-1",
                aws_access_key_id=server.key_id,
                aws_secret_access_key=server.key_val,
                config=botocore.config.Config(
                    retries={"total_max_attempts": 1},
                    parameter_validation=False))
            for name in sts.meta.service_model.operation_names:
                shape = sts.meta.service_model.operation_model(
                    name).input_shape
                values = dict(self.value("", shape) if shape else {})
                values.update({"RoleArn": "arn:aws:iam::111122223333:role/r"}
                              if "RoleArn" in values else {})
                with self.subTest(operation=name):
                    status, message = 200, ""
                    try:
                        sts._make_api_call(name, values)
                    except botocore.exceptions.ClientError as error:
                        message = str(error)
                        status = error.response["ResponseMetadata"][
                            "HTTPStatusCode"]
                    self.assertEqual(
                        status, 200 if gos3rve.OPERATIONS[name].state
                        == gos3rve.DONE else 501, message)

    def call(self, s3, operation, asked, refusal):
        """Call one in a bucket that holds `k`; the state must be kept."""
        s3.create_bucket(Bucket="box")
        s3.put_object(Bucket="box", Key="k", Body=b"x")
        values = self.value("", operation.input_shape) \
            if operation.input_shape else {}
        del asked[:]
        status, message = 200, ""
        try:
            s3._make_api_call(operation.name, values)
        except refusal as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            message = str(error)
        state = gos3rve.OPERATIONS[operation.name].state
        if operation.name in self.FOREIGN:
            self.assertEqual(state, gos3rve.REFUSED)
            self.assertIn("AuthorizationHeaderMalformed", message)
            return
        self.assertEqual(status == 501, state == gos3rve.REFUSED, message)
        self.assertTrue(status < 500 or status == 501, message)
        self.assertEqual(self.SAME.get(asked[-1], asked[-1]),
                         self.SAME.get(operation.name, operation.name))


class TortureKeys(ClientCase):
    """All of them at once, in either order of arrival: each is put,
    listed, read, copied, moved and deleted, and no other changes."""

    def setUp(self):
        super().setUp()
        os.mkdir(os.path.join(self.server.dir_buckets, "box"))
        self.addCleanup(shutil.rmtree,
                        os.path.join(self.server.dir_buckets, "box"))

    def check(self, keys, client):
        """client: an object with put, get, keys, copy, move, delete."""
        for order in (keys, keys[::-1]):
            self._check_order(order, client)

    def _check_order(self, keys, client):
        content = {key: ("<%d>%r" % (number, key)).encode()
                   for number, key in enumerate(keys)}
        for key in keys:
            client.put(key, content[key])
        everything = sorted(keys, key=str.encode)
        self.assertEqual(client.keys(), everything)
        for key in keys:
            with self.subTest(key=key):
                self.assertEqual(client.get(key), content[key])
                client.copy(key, "target")
                self.assertEqual(client.get("target"), content[key])
                client.delete("target")
                client.move(key, "target")
                self.assertEqual(client.get("target"), content[key])
                client.move("target", key)
                self.assertEqual(client.get(key), content[key])
        self.assertEqual(client.keys(), everything)
        for key in keys[1::2] + keys[::2]:
            client.delete(key)
            everything.remove(key)
            self.assertEqual(client.keys(), everything)
            if everything:
                other = everything[len(everything) // 2]
                self.assertEqual(client.get(other), content[other])

    def test_boto3(self):
        need_client(self, "boto3")
        with mock.patch.dict(os.environ, self.env, clear=True):
            client = _WithBoto3()
            self.addCleanup(client.s3.close)
            self.check(TORTURE_KEYS, client)

    def test_minio(self):
        need_client(self, "minio")
        client = _WithMinio(self.server)
        self.addCleanup(client.close)
        self.check(client.possible(TORTURE_KEYS), client)

    def test_rclone(self):
        need_client(self, "rclone")
        self.env.update(rclone_environment(self.server))
        client = _WithRclone(self)
        self.check(client.possible(TORTURE_KEYS), client)


class _WithBoto3:
    """The six acts, by boto3, all in bucket `box`."""

    def __init__(self):
        import boto3
        self.s3 = boto3.client("s3")

    def put(self, key, data):
        self.s3.put_object(Bucket="box", Key=key, Body=data)

    def get(self, key):
        return self.s3.get_object(Bucket="box", Key=key)["Body"].read()

    def keys(self):
        pages = self.s3.get_paginator("list_objects_v2").paginate(
            Bucket="box", PaginationConfig={"PageSize": 7})
        return [item["Key"] for page in pages
                for item in page.get("Contents", ())]

    def copy(self, key, target):
        self.s3.copy_object(Bucket="box", Key=target,
                            CopySource={"Bucket": "box", "Key": key})

    def move(self, key, target):
        self.s3.rename_object(Bucket="box", Key=target,
                              RenameSource="box/" + quote(key, "/-_.~"))

    def delete(self, key):
        self.s3.delete_object(Bucket="box", Key=key)


class _WithMinio:
    """The six acts, by minio-py."""

    def __init__(self, server):
        import minio
        import minio.commonconfig
        self._source = minio.commonconfig.CopySource
        self.s3 = minio.Minio(
            urllib.parse.urlsplit(server.url).netloc, secure=False,
            access_key=server.key_id, secret_key=server.key_val)

    def close(self):
        self.s3._http.clear()

    @staticmethod
    def possible(keys):
        """Not those whose dot segments the client folds away, nor one of
        spaces only, which it takes for empty."""
        return [key for key in keys if key.strip()
                and not {".", ".."} & set(key.split("/"))]

    def put(self, key, data):
        self.s3.put_object("box", key, io.BytesIO(data), len(data))

    def get(self, key):
        answer = self.s3.get_object("box", key)
        try:
            return answer.read()
        finally:
            answer.close()
            answer.release_conn()

    def keys(self):
        return [item.object_name
                for item in self.s3.list_objects("box", recursive=True)]

    def copy(self, key, target):
        self.s3.copy_object("box", target, self._source("box", key))

    def move(self, key, target):
        self.copy(key, target)
        self.delete(key)

    def delete(self, key):
        self.s3.remove_object("box", key)


class _WithRclone:
    """The six acts, by one rclone that is told them over HTTP."""

    def __init__(self, test):
        self._home, log = test.home, os.path.join(test.home, "log")
        rclone = subprocess.Popen(
            [shutil.which("rclone", path=test.env["PATH"]), "rcd",
             "--rc-no-auth", "--rc-addr", "127.0.0.1:0", "--log-file", log,
             "--low-level-retries", "1"], cwd=test.home, env=test.env)
        test.addCleanup(rclone.wait, 30)
        test.addCleanup(rclone.terminate)
        deadline, found = time.monotonic() + 30, None
        while not found and time.monotonic() < deadline:
            test.assertIsNone(rclone.poll(), "rclone ended")
            time.sleep(0.02)
            if os.path.exists(log):
                with open(log, encoding="utf-8") as file:
                    found = re.search(r"http://127\.0\.0\.1:\d+/",
                                      file.read())
        self._url = found[0]

    def _call(self, name, **values):
        request = urllib.request.Request(
            self._url + "operations/" + name, json.dumps(values).encode(),
            {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    @staticmethod
    def possible(keys):
        """Not those that it takes for directories, or folds together."""
        return [key for key in keys if all(key.split("/"))]

    @staticmethod
    def _name(key):
        """A key as rclone writes it: rclone.org/overview/#encoding."""
        key = re.sub(r"[\x00-\x1f]", lambda m: chr(0x2400 + ord(m[0])), key)
        return re.sub(r"(?<![^/])\.\.?(?![^/])",
                      lambda m: "\uff0e" * len(m[0]), key)

    def put(self, key, data):
        with open(os.path.join(self._home, "up"), "wb") as file:
            file.write(data)
        self._call("copyfile", srcFs=self._home, srcRemote="up",
                   dstFs="gos3rve:box", dstRemote=self._name(key))

    def get(self, key):
        path = os.path.join(self._home, "down")
        self._call("copyfile", srcFs="gos3rve:box", dstFs=self._home,
                   srcRemote=self._name(key), dstRemote="down")
        with open(path, "rb") as file:
            data = file.read()
        os.unlink(path)
        return data

    def keys(self):
        plain = {0x2400 + code: code for code in range(32)}
        plain[0xff0e] = "."
        found = self._call("list", fs="gos3rve:box", remote="",
                           opt={"recurse": True, "filesOnly": True})
        return sorted((item["Path"].translate(plain)
                       for item in found["list"]), key=str.encode)

    def copy(self, key, target):
        self._call("copyfile", srcFs="gos3rve:box", dstFs="gos3rve:box",
                   srcRemote=self._name(key), dstRemote=self._name(target))

    def move(self, key, target):
        self._call("movefile", srcFs="gos3rve:box", dstFs="gos3rve:box",
                   srcRemote=self._name(key), dstRemote=self._name(target))

    def delete(self, key):
        self._call("deletefile", fs="gos3rve:box", remote=self._name(key))

###############################################################################
# 13. House
###############################################################################

HOUSE_FILES = (SERVER, os.path.abspath(__file__))
README = os.path.join(HERE, "README.md")
MAX_FUNCTION_LINES, MAX_NESTING = 60, 4
# Functions that may be longer: name -> reason
LONG_FUNCTIONS = {
    "test_refused_with_awss_words": "one table: policies and their errors",
}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def read_text(path):
    """A file's text."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def functions(tree):
    """Every def of a tree."""
    return [node for node in ast.walk(tree)
            if isinstance(node, FUNCTIONS[:2])]


def nesting(node):
    """How deep blocks stand in blocks below a node, functions within it
    aside; an elif is no deeper than its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS + (ast.ClassDef,)):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] \
            and isinstance(child, ast.If)
        is_block = isinstance(child, BLOCKS) and not is_elif
        deepest = max(deepest, nesting(child) + is_block)
    return deepest


def banners(text):
    """[(line number, "6. Storage")] of a file's banners."""
    found = re.finditer(r"^#{79}\n# (\d+\. [^\n]+)\n#{79}$", text,
                        re.MULTILINE)
    return [(text.count("\n", 0, match.start()) + 1, match.group(1))
            for match in found]


def stored_names(node, into_functions):
    """The names that a node's statements bind."""
    names, todo = set(), [node]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.arg, ast.alias)):
            names.add(getattr(node, "asname", None) or getattr(
                node, "arg", None) or node.name.partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, FUNCTIONS[:2] + (ast.ClassDef,)):
            names.add(node.name)
            if not into_functions:
                continue
        todo.extend(ast.iter_child_nodes(node))
    return names


def free_names(node, bound=frozenset()):
    """(name, line number) of each name read below a node that no function
    around it binds."""
    if isinstance(node, FUNCTIONS):
        inner = set()
        for child in ast.iter_child_nodes(node):
            inner |= stored_names(child, True)
        for child in ast.walk(node):
            if isinstance(child, ast.Global):
                inner -= set(child.names)
        bound = bound | inner
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) \
            and node.id not in bound:
        yield node.id, node.lineno
    for child in ast.iter_child_nodes(node):
        yield from free_names(child, bound)


def call_codes(tree):
    """{code} of every S3Error("...") of a tree."""
    codes = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args \
                and getattr(node.func, "id", "") == "S3Error":
            codes |= {leaf.value for leaf in ast.walk(node.args[0])
                      if isinstance(leaf, ast.Constant)
                      and isinstance(leaf.value, str)}
    return codes


class House(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        """texts and trees of the files, by path."""
        cls.texts = {path: read_text(path) for path in HOUSE_FILES}
        cls.trees = {path: ast.parse(text)
                     for path, text in cls.texts.items()}

    def test_lines_have_at_most_79_columns(self):
        for path, text in self.texts.items():
            for number, line in enumerate(text.split("\n"), 1):
                where = "%s, line %d" % (os.path.basename(path), number)
                self.assertLessEqual(len(line), 79, where)
                self.assertEqual(line, line.rstrip(), where)
                self.assertNotIn("\t", line, where)

    def test_functions_have_at_most_60_lines(self):
        long = set()
        for tree in self.trees.values():
            for node in functions(tree):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.add(node.name)
        self.assertEqual(long, set(LONG_FUNCTIONS))

    def test_blocks_nest_at_most_four_deep(self):
        for tree in self.trees.values():
            for node in functions(tree):
                self.assertLessEqual(nesting(node), MAX_NESTING, node.name)

    def test_nesting_is_counted_as_it_is_read(self):
        for text, depth in (
                ("pass", 0), ("if a: pass", 1),
                ("if a: pass\nelif b: pass\nelse: pass", 1),
                ("for a in b:\n if c:\n  with d: pass", 3),
                ("try:\n if a: pass\nexcept b:\n if c:\n  if d: pass", 3),
                ("def f():\n if a: pass", 0)):
            self.assertEqual(nesting(ast.parse(text)), depth, text)

    def test_the_contents_are_the_banners(self):
        for path, text in self.texts.items():
            contents = re.findall(r"^    (\d+\. .+)$", ast.get_docstring(
                self.trees[path]), re.MULTILINE)
            self.assertEqual([title for _, title in banners(text)],
                             contents, path)
            self.assertGreater(len(contents), 10)

    def test_the_tests_rooms_are_the_server_s(self):
        own, tests = ([title for _, title in banners(self.texts[path])]
                      for path in HOUSE_FILES)
        self.assertEqual([title for title in tests if title in own], own)
        self.assertEqual(len(own), 11)

    def test_a_room_names_only_its_own_and_earlier_rooms(self):
        for path, tree in self.trees.items():
            starts, home = banners(self.texts[path]), {}
            for statement in tree.body:
                for name in stored_names(statement, False):
                    home.setdefault(name, statement.lineno)
            for name, line in free_names(tree):
                room, other = (
                    sum(first <= number for first, _ in starts)
                    for number in (line, home.get(name, 0)))
                self.assertLessEqual(other, room, "%s, line %d: %s" % (
                    os.path.basename(path), line, name))

    def test_that_walk_sees_what_it_should(self):
        names = {name for name, _ in free_names(ast.parse(
            "def f(a, *b, c=d):\n e = a; g(e, b, c)\n"
            " return [h for h in i if (lambda j: j + k)(h)]"))}
        self.assertEqual(names, {"d", "g", "i", "k"})
        self.assertEqual(stored_names(ast.parse(
            "a = 1\ndef b(c): d = 2\nfor e, f in g: h = 3\nclass i: pass"),
            False), set("abefhi"))

    def test_imports_are_the_standard_library_s(self):
        imported = set()
        for node in ast.walk(self.trees[SERVER]):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0)
                imported.add(node.module)
        known = getattr(sys, "stdlib_module_names", None)   # new in 3.10
        if known:
            self.assertLessEqual({name.partition(".")[0]
                                  for name in imported}, set(known))
        self.assertIn("http.server", imported)
        done = subprocess.run(              # -S: without site-packages
            [sys.executable, "-E", "-S", "-c", "import "
             + os.path.basename(__file__)[:-3]], cwd=HERE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((done.returncode, done.stdout), (0, b""))

    def test_errors_and_raises_agree(self):
        tree, known = self.trees[SERVER], set(gos3rve.ERRORS)
        self.assertEqual(call_codes(tree) - known, set())
        used = set()
        for statement in tree.body:
            targets = getattr(statement, "targets", [])
            if [getattr(target, "id", "") for target in targets] \
                    != ["ERRORS"]:
                used |= {node.value for node in ast.walk(statement)
                         if isinstance(node, ast.Constant)
                         and isinstance(node.value, str)}
        self.assertEqual(known - used, set(), "nothing raises these")

    def test_errors_have_an_error_s_status_and_a_message(self):
        for code, (status, message) in gos3rve.ERRORS.items():
            self.assertRegex(code, r"\A(KMS\.)?[A-Z][A-Za-z0-9]+\Z")
            self.assertTrue(300 < status < 600, code)
            self.assertTrue(message, code)

    def test_the_text_is_finished(self):
        for path, text in self.texts.items():
            self.assertIsNone(re.search(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b",
                                        text))
            self.assertTrue(text.endswith("\n"))
            bare = [node.lineno for node in ast.walk(self.trees[path])
                    if isinstance(node, ast.ExceptHandler)
                    and node.type is None]
            self.assertEqual(bare, [], path)

    def test_it_parses_on_3_8(self):
        for text in self.texts.values():
            tree = ast.parse(text, feature_version=(3, 8))
            self.assertGreater(len(tree.body), 50)


class HouseTables(unittest.TestCase):

    def rows(self):
        """The README's table rows: lists of cells."""
        if not os.path.exists(README):
            if os.path.isdir(os.path.join(HERE, ".git")):
                self.fail("README.md is missing")
            self.skipTest("README.md is not beside the test file")
        return [[cell.strip() for cell in line.strip("|\n ").split("|")]
                for line in read_text(README).splitlines()
                if line.startswith("|")]

    def test_the_README_has_a_row_for_each_option(self):
        flags = [flag for row in self.rows()
                 for flag in re.findall(r"\A`-(\w+)", row[0])]
        names = [option.name for option in gos3rve.OPTIONS]
        self.assertEqual(set(names) - set(flags), set())
        self.assertEqual(set(flags) - set(names), {
            "config", "help", "version", "operations"} & set(flags))
        self.assertEqual(len(flags), len(set(flags)))

    def test_the_README_has_each_operation_with_its_state(self):
        rows, listed = self.rows(), {}
        for row in rows:
            state = {"done", "stored", "refused"} & set(
                re.findall(r"\w+", " ".join(row[1:])))
            for name in re.findall(r"\w+", row[0]) if state else ():
                if re.match(r"[A-Z]\w+[A-Z]", name):
                    listed.setdefault(name, state)
        self.assertEqual({name: listed.get(name) for name in
                          gos3rve.OPERATIONS}, {
            name: {row.state} for name, row in gos3rve.OPERATIONS.items()})
        self.assertEqual(set(listed) - set(gos3rve.OPERATIONS), set())

    def test_option_names_elements_and_helps_are_whole(self):
        names = [option.name for option in gos3rve.OPTIONS]
        elements = [option.element for option in gos3rve.OPTIONS]
        for values in (names, elements):
            self.assertEqual(len(values), len(set(values)))
        for option in gos3rve.OPTIONS:
            self.assertRegex(option.name, r"\A[a-z][a-z_]*\Z")
            self.assertRegex(option.element, r"\A([A-Z][a-z]*)+\Z")
            self.assertTrue(option.help)

    def test_operations_are_those_of_botocore(self):
        try:
            import botocore.loaders
        except ImportError:
            self.skipTest("botocore is not installed")
        names = {"PostObject"}
        for service in ("s3", "sts"):
            names |= set(botocore.loaders.Loader().load_service_model(
                service, "service-2")["operations"])
        self.assertEqual(names - set(gos3rve.OPERATIONS), set())
        version = tuple(map(int, botocore.__version__.split(".")[:2]))
        if version < (1, 44):           # an older one knows fewer
            self.skipTest("botocore %d.%d is too old to name all" % version)
        self.assertEqual(set(gos3rve.OPERATIONS), names)

    def test_operations_have_a_function_unless_refused(self):
        for name, row in gos3rve.OPERATIONS.items():
            self.assertEqual(row.name, name)
            self.assertEqual(row.function is None, row.state == "refused",
                             name)
            self.assertRegex(row.action, r"\A%s:[A-Z]\w+\Z" % (
                "sts" if row.level == gos3rve.STS else "s3"))


###############################################################################
# 14. Benchmark
###############################################################################
#
# `python3 test_gos3rve.py bench [URL KEY SECRET]`: the load, for this server
# or any other S3 endpoint.  Requests are signed before the clock starts, and
# sent from processes of their own over raw keep-alive sockets, so that the
# server is what is measured: in the same run the load measures itself
# against a server that does nothing, and the machine its hashes and files.
# An answer that is not what it has to be fails its case.
#
# The parent decides and counts; a Crew of processes carries a load out (a
# Requests or a Streams), each its share.

SAMPLE = 16             # one answer in so many is compared as a whole
SILENT_SECONDS = 60     # without any answer: the server hangs
RECEIVE_BYTES = 96 * KIB            # a range of 64 KiB, and its head
PART_BYTES = 16 * MIB
PUT_KEYS = 4000
LIST_PAGE = 1000
TREE_FILES = 100                    # keys a directory in --growth's tree
GROWTH_KEYS = 1000000
NULL_PATH = "/null/%d"              # answered with so many bytes


class BenchError(Exception):
    """What fails a case, in words."""


# what an endpoint can do to a Client, too
BENCH_ERRORS = (BenchError, OSError, http.client.HTTPException,
                ElementTree.ParseError, AssertionError)


@functools.lru_cache(maxsize=1)
def pattern():
    """Noise that large bodies repeat.  Its length is a prime, so that no
    two blocks, parts or ranges that a server might mix up are alike."""
    size = 1048573
    return random.Random(4).getrandbits(8 * size).to_bytes(size, "big")


def content(offset, size):
    """Bytes of the endless repetition of pattern()."""
    start = offset % len(pattern())
    repeats = (start + size) // len(pattern()) + 1
    return (pattern() * repeats)[start:start + size]


def pattern_blocks(size):
    """content(0, size) in views of at most pattern()'s length."""
    view = memoryview(pattern())
    for start in range(0, size, len(view)):
        yield view[:size - start]


@functools.lru_cache(maxsize=8)
def pattern_digest(name, size):
    """The hexadecimal digest of content(0, size)."""
    digest = hashlib.new(name)
    for block in pattern_blocks(size):
        digest.update(block)
    return digest.hexdigest()


class Endpoint(NamedTuple):
    """Where the server is, and the keys to sign with."""
    url: str
    key_id: str
    secret: str
    region: str = "us-east-1"


class Ask(NamedTuple):
    """A small request, and what its answer has to be: length is that of
    the body (of HEAD: the header), content the body, keys the number of
    its <Key>.  The headers are not signed."""
    method: str
    path: str
    query: Tuple[Tuple[str, str], ...] = ()
    headers: Tuple[Tuple[str, str], ...] = ()
    body: bytes = b""
    status: int = 200
    length: Optional[int] = None
    content: Optional[bytes] = None
    keys: Optional[int] = None


class Stream(NamedTuple):
    """A large body to PUT, or to GET: content(0, size); md5: its digest
    where what comes is to be compared."""
    method: str
    path: str
    size: int
    query: Tuple[Tuple[str, str], ...] = ()
    payload: str = "UNSIGNED-PAYLOAD"
    md5: Optional[str] = None


def request_bytes(client, ask):
    """The signed request of an Ask."""
    raw_path = quote(ask.path, "/-_.~")
    headers = client.sign(ask.method, raw_path, ask.query, {},
                          "UNSIGNED-PAYLOAD")
    headers.update(ask.headers)
    if ask.body or ask.method in ("PUT", "POST"):
        headers["content-length"] = len(ask.body)
    target = raw_path
    if ask.query:
        target += "?" + "&".join("%s=%s" % (quote(n), quote(v))
                                 for n, v in ask.query)
    return ("%s %s HTTP/1.1\r\n%s\r\n" % (
        ask.method, target, "".join("%s: %s\r\n" % pair for pair in
                                    headers.items()))).encode() + ask.body


# --- answers ---

class Reply:
    """An answer in the making: feed() it until that is True."""

    def __init__(self, method):
        self._method, self._data = method, b""
        self._start = self._next = 0    # of the body, of the next chunk
        self.status, self.headers, self.body = 0, {}, b""

    def feed(self, data):
        """Take bytes, b"" for the connection's end; True when the answer
        is whole.  BenchError when it cannot be one."""
        self._data += data
        if not self._start and not self._read_head():
            whole = False
        elif self._method == "HEAD" or self.status in (204, 304):
            return True
        elif "chunked" in self.headers.get("transfer-encoding", ""):
            whole = self._read_chunks()
        elif "content-length" in self.headers:
            self.body = self._data[self._start:]
            whole = len(self.body) >= int(self.headers["content-length"])
        else:
            self.body, whole = self._data[self._start:], not data
        if not whole and not data:
            raise BenchError("the connection ended within an answer: %r"
                             % self._data[:300])
        return whole

    def _read_head(self):
        """Status and headers, once they are there; False until then."""
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return False
        self._start = self._next = end + 4
        first, *lines = self._data[:end].decode("latin-1").split("\r\n")
        match = re.match(r"HTTP/1\.[01] (\d{3})", first)
        if not match:
            raise BenchError("not an HTTP answer: %r" % first)
        self.status = int(match.group(1))
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        return True

    def _read_chunks(self):
        """Move whole chunks into body; True behind the last one."""
        while True:
            end = self._data.find(b"\r\n", self._next)
            if end < 0:
                return False
            size = int(self._data[self._next:end].partition(b";")[0], 16)
            if not size:                # and trailers
                return self._data.find(b"\r\n\r\n", end) >= 0
            if len(self._data) < end + size + 4:
                return False
            self.body += self._data[end + 2:end + 2 + size]
            self._next = end + size + 4

    def check(self, ask):
        """BenchError unless this is the answer that an Ask has to get."""
        length = len(self.body) if ask.method != "HEAD" \
            else int(self.headers.get("content-length", 0))
        for name, got, due in (
                ("status", self.status, ask.status),
                ("length", length, ask.length),
                ("number of keys", ask.keys is not None
                 and self.body.count(b"<Key>"), ask.keys)):
            if due is not None and got != due:
                raise BenchError("%s %s: %s %s, not %s: %r" % (
                    ask.method, ask.path, name, got, due, self.body[:300]))
        if ask.content not in (None, self.body):
            raise BenchError("%s %s: another content" % (ask.method,
                                                         ask.path))


class Link:
    """A connection that has one request under way: ask(), then take()
    whenever it is readable, until that is True.

    usual: method -> length of the latest answer, shared by a load's links.
    """

    def __init__(self, url, usual):
        self._url, self._usual = urllib.parse.urlsplit(url), usual
        self._reply, self._count = None, 0
        self.socket = None
        self.connect()

    def connect(self):
        """Connect, again if need be."""
        self.close()
        secure = self._url.scheme == "https"
        self.socket = socket.create_connection(
            (self._url.hostname, self._url.port or (443 if secure else 80)),
            SILENT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._receive = self.socket.recv
        if secure:
            self.socket = ssl.create_default_context().wrap_socket(
                self.socket, server_hostname=self._url.hostname)
            self._receive = self._receive_decrypted
        self.fresh = True

    def close(self):
        """Close the connection."""
        if self.socket is not None:
            self.socket.close()

    def _receive_decrypted(self, size):
        """What has come, all of it: select() does not see the rest."""
        data = self.socket.recv(size)
        while self.socket.pending():
            data += self.socket.recv(size)
        return data

    def ask(self, data, ask):
        """Send a request."""
        self._data, self._ask, self._reply = data, ask, None
        self.sent = time.perf_counter()
        try:
            self.socket.sendall(data)
        except ConnectionError:
            if self.fresh:
                raise
            self.connect()              # it had ended between requests
            self.socket.sendall(data)

    def take(self):
        """Read what has come; True when the answer is whole, and right.

        Most answers are one piece, as long as the last one: of those only
        the status is looked at.  A load in Python has to be this lazy: to
        parse each one costs as much as to send and to receive it.
        """
        try:
            data = self._receive(RECEIVE_BYTES)
        except ConnectionError:
            data = b""
        self._count += 1
        if self._reply is None and self._count % SAMPLE \
                and len(data) == self._usual.get(self._ask.method) \
                and data[9:12] == b"%d" % self._ask.status:
            self.fresh = False
            return True
        return self._take_whole(data)

    def _take_whole(self, data):
        """The slow and thorough part of take()."""
        if not data and self._reply is None and not self.fresh:
            self.connect()              # the same, seen only now
            self.ask(self._data, self._ask)
            return False
        if self._reply is None:
            self._reply, self._pieces = Reply(self._ask.method), 0
        self._pieces += 1
        if not self._reply.feed(data):
            return False
        self._reply.check(self._ask)
        self.fresh = False
        if not data or "close" in self._reply.headers.get("connection", ""):
            self.connect()
        elif self._pieces == 1:
            self._usual[self._ask.method] = len(data)
        return True


# --- loads ---

class Requests:
    """Small requests over `connections` links, each with one under way."""

    def __init__(self, endpoint, asks, connections):
        client, usual = Client(*endpoint), {}
        self._asks = [(request_bytes(client, ask), ask) for ask in asks]
        self._links = [Link(endpoint.url, usual)
                       for _ in range(min(connections, len(asks)))]

    def run(self, seconds):
        """Go round the requests for so long, or, None, send each once.

        (number of answers, seconds, seconds of CPU, [seconds an answer
        took]).
        """
        asks = iter(self._asks) if seconds is None \
            else itertools.cycle(self._asks)
        taken, cpu = array.array("d"), time.process_time()
        start = time.perf_counter()
        try:
            with selectors.DefaultSelector() as selector:
                for link in self._links:
                    selector.register(link.socket, selectors.EVENT_READ,
                                      link)
                    link.ask(*next(asks))
                end = self._rotate(selector, asks, taken,
                                   start + (seconds or math.inf))
        finally:
            for link in self._links:
                link.close()
        return (len(taken), end - start, time.process_time() - cpu, taken)

    def _rotate(self, selector, asks, taken, deadline):
        """Take answers and send the next requests up to a perf_counter();
        that of the last answer."""
        now = 0
        while selector.get_map():
            ready = selector.select(SILENT_SECONDS)
            if not ready:
                raise BenchError("no answer in %d s" % SILENT_SECONDS)
            for key, _ in ready:
                link, pair = key.data, ()
                if link.take():
                    now = time.perf_counter()
                    taken.append(now - link.sent)
                    pair = next(asks, None) if now < deadline else None
                    if pair is not None:
                        link.ask(*pair)
                if pair is None or link.socket is not key.fileobj:
                    selector.unregister(key.fileobj)
                if pair is not None and link.socket is not key.fileobj:
                    selector.register(link.socket, selectors.EVENT_READ,
                                      link)
        return now


class Streams:
    """Large bodies; queues: a list of Streams for each connection."""

    def __init__(self, endpoint, queues):
        self._client, self._queues = Client(*endpoint), queues

    def run(self, _):
        """(seconds, [ETags of a queue's answers, for each queue])."""
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(
                len(self._queues)) as pool:
            etags = list(pool.map(self._run_queue, self._queues))
        return time.perf_counter() - start, etags

    def _run_queue(self, queue):
        with contextlib.closing(self._client.connect()) as connection:
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP,
                                       socket.TCP_NODELAY, 1)
            return [self._transfer(connection, stream) for stream in queue]

    def _transfer(self, connection, stream):
        """Send and receive; the answer's ETag."""
        raw_path = quote(stream.path, "/-_.~")
        headers = self._client.sign(stream.method, raw_path, stream.query,
                                    {}, stream.payload)
        query = urllib.parse.urlencode(stream.query)
        connection.putrequest(
            stream.method, raw_path + ("?" + query if query else ""),
            skip_host=True, skip_accept_encoding=True)
        if stream.method == "PUT":
            headers["content-length"] = str(stream.size)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        if stream.method == "PUT":
            for block in pattern_blocks(stream.size):
                connection.sock.sendall(block)
        response = connection.getresponse()
        if response.status != 200:
            raise BenchError("%s %s: %d %r" % (
                stream.method, stream.path, response.status,
                response.read(300)))
        self._receive(response, stream)
        return response.headers.get("ETag", "")

    @staticmethod
    def _receive(response, stream):
        """Read an answer's body away; that of a GET has to be right."""
        digest = hashlib.md5() if stream.md5 else None
        view, got = memoryview(bytearray(MIB)), 0
        while True:
            count = response.readinto(view)
            if not count:
                break
            got += count
            if digest is not None:
                digest.update(view[:count])
        if stream.method == "GET" and got != stream.size:
            raise BenchError("GET %s: %d bytes, not %d" % (
                stream.path, got, stream.size))
        if digest is not None and digest.hexdigest() != stream.md5:
            raise BenchError("GET %s: another content" % stream.path)


class NullServer:
    """Answers GET /null/N with N bytes, and PUT once the body is there,
    without a further look: what is left is the load's own cost."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0),
                                              backlog=1024)
        self.url = "http://127.0.0.1:%d" % self._listener.getsockname()[1]
        self._answers, self._buffer = {}, bytearray(MIB)

    def run(self, _):
        """Serve until the process ends."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    self._turn(selector, key.fileobj)

    def _turn(self, selector, ready):
        """Accept, or answer, or see a client off."""
        if ready is self._listener:
            connection, _ = ready.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(connection, selectors.EVENT_READ)
            return
        try:
            data = ready.recv(RECEIVE_BYTES)
            if data:
                self._answer(ready, data)
                return
        except OSError:
            pass
        selector.unregister(ready)
        ready.close()

    def _answer(self, connection, data):
        method, target, _ = data.split(b" ", 2)
        if method == b"PUT":
            head, _, body = data.partition(b"\r\n\r\n")
            left = int(re.search(rb"content-length: (\d+)", head).group(1)
                       ) - len(body)
            while left > 0:
                left -= connection.recv_into(self._buffer)
        answer = self._answers.get(target)
        if answer is None:
            size = int(target.rpartition(b"/")[2])
            answer = self._answers[target] = [(
                "HTTP/1.1 200 OK\r\nServer: null\r\nContent-Type: binary/"
                "octet-stream\r\nx-amz-request-id: 0123456789ABCDEF\r\n"
                "ETag: \"%s\"\r\nContent-Length: %d\r\n\r\n"
                % ("0" * 32, size)).encode()]
            if size <= MIB:
                answer[0] += content(0, size)
            else:
                answer.extend(pattern_blocks(size))
        for block in answer:
            connection.sendall(block)


def load_process(pipe):
    """One process of a crew: makes the load it is sent, says so, runs it
    when told to and sends what came of it.  Ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        while not pipe.poll(1):
            if not multiprocessing.parent_process().is_alive():
                return
        try:
            load, arguments = pipe.recv()
            load = load(*arguments)
            pipe.send(getattr(load, "url", None))
            result = load.run(pipe.recv())
        except EOFError:
            return
        except (BenchError, OSError, http.client.HTTPException) as error:
            result = error if isinstance(error, BenchError) else BenchError(
                "%s: %s" % (type(error).__name__, error))
        pipe.send(result)


class Crew:
    """Processes that carry out loads at the same time."""

    def __init__(self, count):
        # what forks is at once there, and finds this module's classes
        context = multiprocessing.get_context(
            "fork" if sys.platform == "linux" else "spawn")
        self._members = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=load_process, args=(theirs,),
                                      daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def __len__(self):
        return len(self._members)

    def prepare(self, load, shares):
        """Make a load (a class) in as many processes as there are shares,
        each a tuple of arguments; the URLs of those that are servers."""
        self._running = [pipe for _, pipe in self._members[:len(shares)]]
        for pipe, share in zip(self._running, shares):
            pipe.send((load, share))
        return self._results()

    def start(self, seconds=None):
        """Let it run."""
        for pipe in self._running:
            pipe.send(seconds)

    def go(self, seconds=None):
        """Let it run to its end; the list of results."""
        self.start(seconds)
        return self._results()

    def _results(self):
        """One message of each process; a BenchError among them is raised,
        once nobody is at work any more."""
        try:
            results = [pipe.recv() for pipe in self._running]
        except EOFError:
            raise BenchError("a process of the load is gone") from None
        failed = [result for result in results
                  if isinstance(result, BenchError)]
        if failed and len(failed) < len(results):
            self._calm(results)
        if failed:
            raise failed[0]
        return results

    def _calm(self, results):
        """Where some processes failed to prepare, the others wait for the
        word: let them run for nothing."""
        for pipe, result in zip(self._running, results):
            if result is None:
                pipe.send(0.001)
                pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process, pipe in self._members:
            process.terminate()
            process.join()
            pipe.close()


# --- cases ---

class Case(NamedTuple):
    """A row of the table: run(bench) is one round of it, a dict of numbers
    with its "rate"."""
    name: str
    title: str
    unit: str
    run: Callable


class Bench:
    """The cases, against one server.

    options: those of the command line.  place: the directory of a server
    of our own, None where it is another's.  started: a function that
    starts one more server of our own, or None.
    """

    def __init__(self, endpoint, crew, options, place=None, start=None):
        self.endpoint, self.crew, self.options = endpoint, crew, options
        self.place, self.start = place, start
        self.client = Client(*endpoint)
        self.bucket = options.bucket or "bench-%d" % (time.time() % 1e6)
        self.large_bytes = options.large * MIB
        self._made, self._buckets = set(), []
        self._deleted = 0

    # what the cases need

    def _first(self, what):
        """True the first time that this is asked."""
        fresh = what not in self._made
        self._made.add(what)
        return fresh

    def expect(self, answer, status=200):
        """BenchError unless an Answer has the status; the answer."""
        if answer.status != status:
            raise BenchError("%d, not %d: %r" % (
                answer.status, status, answer.body[:300]))
        return answer

    def need_bucket(self, name=None):
        """Make a bucket, unless it is one that --bucket brought."""
        name = name or self.bucket
        if self._first(("bucket", name)) and name != self.options.bucket:
            self.expect(self.client.put("/" + name))
            self._buckets.append(name)

    def has(self, ask):
        """True where --bucket brought the object of a GET."""
        if not self.options.bucket:
            return False
        answer = self.client.head(ask.path)
        return answer.status == 200 and answer.headers.get(
            "content-length") == str(ask.length)

    def requests(self, asks, seconds=None):
        """A round of requests: rate, p50_ms and p99_ms of an answer's
        time, client_us of CPU that the load took for each.  seconds None:
        each request once."""
        wanted = self.options.connections
        count = min(len(self.crew), wanted, len(asks))
        self.crew.prepare(Requests, [
            (self.endpoint, asks[turn::count],
             wanted * (turn + 1) // count - wanted * turn // count)
            for turn in range(count)])
        results = self.crew.go(seconds)
        times = sorted(t for result in results for t in result[3])
        total = len(times)
        if seconds is None:
            rate = total / max(result[1] for result in results)
        else:
            rate = sum(result[0] / result[1] for result in results)
        return {"rate": rate, "answers": total,
                "p50_ms": times[total // 2] * 1e3,
                "p99_ms": times[total * 99 // 100] * 1e3,
                "client_us": sum(r[2] for r in results) / total * 1e6}

    def streams(self, streams, connections):
        """Large bodies over some connections: (seconds, [ETag])."""
        queues = [streams[turn::connections] for turn in range(connections)]
        count = min(len(self.crew), connections)
        self.crew.prepare(Streams, [
            (self.endpoint, queues[turn::count])
            for turn in range(count)])
        results = self.crew.go()
        etags = [None] * len(streams)
        for turn, (_, found) in enumerate(results):
            for number, tags in enumerate(found):
                etags[turn + number * count::connections] = tags
        return max(result[0] for result in results), etags

    def gets(self):
        """The Asks of the small objects, which are there then."""
        asks = [Ask("GET", "/%s/get/o%05d" % (self.bucket, number),
                    length=KIB, content=content(number * KIB, KIB))
                for number in range(self.options.objects)]
        self.need_bucket()
        if self._first("gets") and not self.has(asks[-1]):
            self.requests([Ask("PUT", ask.path, body=ask.content)
                           for ask in asks])
        return asks

    def puts(self, name, count=PUT_KEYS):
        """The Asks that write `count` small objects."""
        self.need_bucket()
        return [Ask("PUT", "/%s/%s/o%06d" % (self.bucket, name, number),
                    body=content(number * KIB, KIB))
                for number in range(count)]

    def large(self):
        """The path of the large object, which is there, and right."""
        path = "/%s/large" % self.bucket
        self.need_bucket()
        if self._first("large"):
            size = self.large_bytes
            if not self.has(Ask("GET", path, length=size)):
                self.streams([Stream("PUT", path, size)], 1)
            self.streams([Stream("GET", path, size, md5=pattern_digest(
                "md5", size))], 1)
        return path

    # small objects

    def get(self):
        return self.requests(self.gets(), self.options.seconds)

    def head(self):
        return self.requests([
            Ask("HEAD", ask.path, length=KIB) for ask in self.gets()],
            self.options.seconds)

    def put(self):
        """Over PUT_KEYS keys again and again; the first ones, which have
        been sent for certain, are then read back."""
        asks = self.puts("put")
        figures = self.requests(asks, self.options.seconds)
        self.requests([Ask("GET", ask.path, length=KIB, content=ask.body)
                       for ask in asks[:self.options.connections]])
        return figures

    def mixed(self):
        asks = self.gets()
        asks += self.puts("mixed", len(asks) // 4)
        random.Random(4).shuffle(asks)
        return self.requests(asks, self.options.seconds)

    def delete(self):
        """Of as many new objects as are written in the time of a round;
        after that they are not there."""
        name = "delete-%d" % self._deleted
        self._deleted += 1
        rate = self.requests(self.puts(name, 100))["rate"]
        asks = self.puts(name, 101 + int(rate * self.options.seconds))
        self.requests(asks[100:])
        figures = self.requests([Ask("DELETE", ask.path, status=204)
                                 for ask in asks])
        self.requests([Ask("HEAD", ask.path, status=404)
                       for ask in asks[::len(asks) // 8]])
        return figures

    def range(self):
        size = self.large_bytes
        asks, path = [], self.large()
        for number in range(1000):
            start = number * 7919 % max(1, size // (64 * KIB)) * 64 * KIB
            asks.append(Ask(
                "GET", path, headers=(("range", "bytes=%d-%d" % (
                    start, start + 64 * KIB - 1)),), status=206,
                length=64 * KIB, content=content(start, 64 * KIB)))
        return self.requests(asks, self.options.seconds)

    def list(self):
        """Pages of LIST_PAGE keys, from places all over the bucket."""
        bucket, keys = self.bucket + "-list", self.options.keys
        self.need_bucket(bucket)
        if self._first("list"):
            names = ["k%07d" % number for number in range(keys)]
            self.requests([Ask("PUT", "/%s/%s" % (bucket, name), body=b"x")
                           for name in names])
            if self.client.keys(bucket) != names:
                raise BenchError("the pages are not all keys in order")
        starts = (number * 997 % max(1, keys - LIST_PAGE)
                  for number in range(200))
        return self.requests([self.page(bucket, "k%07d" % start, min(
            LIST_PAGE, keys - 1 - start)) for start in starts],
            self.options.seconds)

    @staticmethod
    def page(bucket, after, keys=LIST_PAGE):
        """The Ask of a page of a listing."""
        return Ask("GET", "/" + bucket, (
            ("list-type", "2"), ("max-keys", str(LIST_PAGE)))
            + ((("start-after", after),) if after else ()), keys=keys)

    # large objects

    def _large_round(self, streams, connections):
        seconds, _ = self.streams(streams, connections)
        return {"rate": sum(stream.size for stream in streams)
                / MIB / seconds}

    def put_large(self):
        return self._large_round([Stream(
            "PUT", self.large(), self.large_bytes)], 1)

    def put_signed(self):
        """The payload's SHA-256 is in the signature, so has to be found
        right, too."""
        return self._large_round([Stream(
            "PUT", self.large(), self.large_bytes, payload=pattern_digest(
                "sha256", self.large_bytes))], 1)

    def get_large(self):
        return self._large_round([Stream(
            "GET", self.large(), self.large_bytes)], 1)

    def put_large_4(self):
        self.need_bucket()
        return self._large_round([Stream(
            "PUT", "/%s/large-%d" % (self.bucket, turn),
            self.large_bytes // 4) for turn in range(4)], 4)

    def get_large_4(self):
        return self._large_round([Stream(
            "GET", self.large(), self.large_bytes)] * 4, 4)

    def multipart(self):
        """Parts over four connections, and Complete."""
        path = "/%s/parts" % self.bucket
        self.need_bucket()
        upload = self.expect(self.client.post(path, [("uploads", "")])
                             ).one("UploadId")
        sizes = [min(PART_BYTES, self.large_bytes - start) for start in
                 range(0, self.large_bytes, PART_BYTES)]
        seconds, etags = self.streams([Stream(
            "PUT", path, size, (("partNumber", str(number)),
                                ("uploadId", upload)))
            for number, size in enumerate(sizes, 1)], 4)
        document = "".join(
            "<Part><PartNumber>%d</PartNumber><ETag>%s</ETag></Part>"
            % (number, etag) for number, etag in enumerate(etags, 1))
        start = time.perf_counter()
        done = self.expect(self.client.post(path, [("uploadId", upload)], (
            "<CompleteMultipartUpload>%s</CompleteMultipartUpload>"
            % document).encode()))
        complete = time.perf_counter() - start
        if done.xml().tag != "CompleteMultipartUploadResult":
            raise BenchError("Complete: %r" % done.body[:300])
        size = sum(sizes)
        self.streams([Stream("GET", path, size)], 1)
        return {"rate": size / MIB / (seconds + complete),
                "complete_s": complete}

    # the server as a process

    def cold(self):
        """From the command to the first answer."""
        began = time.perf_counter()
        with self.start() as server:
            self.expect(server.client().get("/"))
            return {"rate": time.perf_counter() - began}

    # the end

    def remove(self):
        """Delete the buckets that this made, but for --keep."""
        if self.place is not None or self.options.keep:
            return
        for bucket in self._buckets:
            keys = self.client.keys(bucket)
            self.requests([Ask("DELETE", "/%s/%s" % (bucket, key),
                               status=204) for key in keys])
            self.expect(self.client.delete("/" + bucket), 204)


CASES = (
    Case("get", "GET 1 KiB", "requests/s", Bench.get),
    Case("head", "HEAD 1 KiB", "requests/s", Bench.head),
    Case("put", "PUT 1 KiB", "requests/s", Bench.put),
    Case("mixed", "GET 80 %, PUT 20 %", "requests/s", Bench.mixed),
    Case("delete", "DELETE 1 KiB", "requests/s", Bench.delete),
    Case("range", "GET ranges of 64 KiB", "requests/s", Bench.range),
    Case("list", "LIST, 1,000 keys a page", "pages/s", Bench.list),
    Case("put_large", "PUT large", "MiB/s", Bench.put_large),
    Case("put_signed", "PUT large, signed", "MiB/s", Bench.put_signed),
    Case("put_large_4", "PUT large, 4 at once", "MiB/s",
         Bench.put_large_4),
    Case("get_large", "GET large", "MiB/s", Bench.get_large),
    Case("get_large_4", "GET large, 4 at once", "MiB/s",
         Bench.get_large_4),
    Case("multipart", "multipart, 4 at once", "MiB/s", Bench.multipart),
    Case("cold", "start to first answer", "s", Bench.cold),
)


# --- what surrounds it ---

def per_second(call, seconds=0.2):
    """How often a second a function can be called."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - start)


def floors(directory):
    """What one core makes of hashes (MiB/s), and of files of 1 KiB in a
    directory: written, with an attribute, and renamed; read, with it."""
    found = {}
    for name in ("md5", "sha256"):
        digest = hashlib.new(name)
        found[name + "_mib_s"] = per_second(
            lambda: digest.update(pattern())) * len(pattern()) / MIB
    path, data = os.path.join(directory, "floor"), content(0, KIB)

    def write():
        fd = os.open(path + ".new", os.O_CREAT | os.O_WRONLY)
        os.write(fd, data)
        os.setxattr(fd, "user.floor", data[:200])
        os.close(fd)
        os.rename(path + ".new", path)

    def read():
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size
        os.getxattr(fd, "user.floor")
        os.read(fd, size)
        os.close(fd)
    with contextlib.suppress(OSError, AttributeError):
        found["file_writes_s"] = per_second(write)
        found["file_reads_s"] = per_second(read)
    return found


def ceiling(crew, options):
    """What the load itself can do, against a server of one process that
    does nothing: requests a second, CPU of the load for each, MiB/s."""
    with Crew(1) as null:
        url, = null.prepare(NullServer, [()])
        null.start()
        bench = Bench(Endpoint(url, "KEY", "SECRET"), crew, options)
        small = bench.requests([Ask("GET", NULL_PATH % KIB, length=KIB)]
                               * options.connections, options.seconds)
        found = {"requests_s": small["rate"],
                 "client_us": small["client_us"]}
        for method in ("GET", "PUT"):
            size = bench.large_bytes if method == "GET" else 0
            seconds, _ = bench.streams([Stream(
                method, NULL_PATH % size, bench.large_bytes)], 1)
            found[method.lower() + "_mib_s"] = options.large / seconds
    return found


def family(pid):
    """The ids of a process and all its live descendants (Linux)."""
    found = [pid]
    for parent in found:
        found += children(parent)
    return found


def peak_memory(pid):
    """[peak resident MiB of each process of a family]; [] where /proc
    does not tell."""
    peaks = []
    for one in family(pid):
        with contextlib.suppress(OSError):
            match = re.search(r"VmHWM:\s+(\d+)", read_text(
                "/proc/%d/status" % one))
            if match:
                peaks.append(int(match.group(1)) / KIB)
    return peaks


def growth(bench):
    """Listing pages of a bucket with very many keys, for two shapes of
    it: one directory, and a tree.  For each: what the directories' own
    names cost to read and to sort, the first page ever, then pages a
    second at the start and at other places."""
    total, found = bench.options.growth, {}
    for shape, name in (("flat", "k%07d"), ("tree", "d%05d/k%02d")):
        bucket = "bench-" + shape
        root = os.path.join(bench.place, "buckets", bucket)

        def key(number, shape=shape, name=name):
            return name % (number if shape == "flat"
                           else divmod(number, TREE_FILES))
        bench.need_bucket(bucket)
        for number in range(0, total, TREE_FILES):
            os.makedirs(os.path.dirname(os.path.join(root, key(number))),
                        exist_ok=True)
            for turn in range(number, min(total, number + TREE_FILES)):
                os.close(os.open(os.path.join(root, key(turn)),
                                 os.O_CREAT | os.O_WRONLY))
        start = time.perf_counter()
        for _, directories, files in os.walk(root):
            directories.sort()
            files.sort()
        walked = time.perf_counter()
        bench.expect(bench.client.get("/" + bucket, [("list-type", "2")]))
        row = {"walk_s": walked - start,
               "cold_s": time.perf_counter() - walked}
        for place, after in (("first", -1), ("middle", total // 2),
                             ("last", total - LIST_PAGE - 1)):
            ask = bench.page(bucket, key(after) if after >= 0 else "",
                             min(LIST_PAGE, total - 1 - max(after, -1)))
            asks = [ask] * bench.options.connections
            bench.requests(asks)        # every process of the server
            row[place + "_pages_s"] = bench.requests(
                asks, bench.options.seconds)["rate"]
        found[shape] = row
    return found


# --- the command ---

def bench_options(argv):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="test_gos3rve.py bench", description="Measure an S3 server: "
        "this one, started for it with its data in /dev/shm when there is "
        "one, or the one at URL.")
    add = parser.add_argument
    add("endpoint", nargs="*", metavar="URL KEY SECRET")
    add("--cases", default=",".join(case.name for case in CASES),
        help="which of %(default)s")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=2, help="of a case in a round")
    add("--connections", type=int, default=16)
    add("--processes", type=int, default=2, help="that send requests")
    add("--large", type=int, default=256, help="size, in MiB")
    add("--objects", type=int, default=1000, help="to GET, of 1 KiB")
    add("--keys", type=int, default=10000, help="in the bucket of LIST")
    add("--growth", type=int, nargs="?", const=GROWTH_KEYS, help="list "
        "buckets of so many keys, too (%d; takes minutes)" % GROWTH_KEYS)
    add("--region", default="us-east-1")
    add("--bucket", help="use this bucket, with what is in it from a run "
        "with --keep, and leave it there")
    add("--keep", action="store_true", help="leave the buckets there")
    add("--pid", type=int, help="process of the server, for its memory")
    add("--server", default="", help="more options for this server, as "
        "one word: \"-sync -p 8080\"")
    add("--python", default=sys.executable, help="interpreter for it")
    add("--json", help="write the figures into this file, too")
    options = parser.parse_args(argv)
    if len(options.endpoint) not in (0, 3):
        parser.error("URL, KEY and SECRET go together")
    if options.endpoint and options.growth:
        parser.error("--growth makes its files by hand: not with URL")
    options.cases = options.cases.split(",")
    unknown = set(options.cases) - {case.name for case in CASES}
    if unknown:
        parser.error("no case " + ", ".join(sorted(unknown)))
    if options.endpoint:
        options.cases = [name for name in options.cases if name != "cold"]
    return options


@contextlib.contextmanager
def measured_server(options):
    """The server to measure: (Endpoint, pid or None, directory or None,
    function that starts another one or None)."""
    if options.endpoint:
        yield (Endpoint(*options.endpoint, options.region), options.pid,
               None, None)
        return
    memory = "/dev/shm"
    parent = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="gos3rve-bench-",
                                     dir=parent) as place:
        def start(name="cold"):
            directory = os.path.join(place, name)
            os.makedirs(directory, exist_ok=True)
            return ServerProcess(
                directory, "-log", "text", *shlex.split(options.server),
                interpreter=options.python)
        with start("data") as server:
            yield (Endpoint(server.url, "KEY", "SECRET"),
                   server.process.pid, server.directory, start)
            server.process.terminate()
            server.process.wait(SILENT_SECONDS)


def run_rounds(bench, say):
    """name -> list of rounds, or the text of what failed.

    A round of every case, then the next: what else the machine does then
    meets all of them."""
    found = {}
    for turn in range(bench.options.rounds):
        for case in CASES:
            rounds = found.setdefault(case.name, [])
            if case.name not in bench.options.cases \
                    or isinstance(rounds, str):
                continue
            try:
                rounds.append(case.run(bench))
                text = "%.5g %s" % (rounds[-1]["rate"], case.unit)
            except BENCH_ERRORS as error:
                found[case.name] = text = "failed: %s" % error
            say("%d/%d %-24s %s" % (turn + 1, bench.options.rounds,
                                    case.title, text))
    return {name: rounds for name, rounds in found.items() if rounds}


def summary(case, rounds):
    """The figures of a case: median, min, max and the single rounds of
    its rate, the median of the others; or its failure."""
    row = {"title": case.title, "unit": case.unit}
    if isinstance(rounds, str):
        return dict(row, failed=rounds.partition(": ")[2])
    rates = [figures["rate"] for figures in rounds]
    row.update(median=statistics.median(rates), min=min(rates),
               max=max(rates), rounds=rates)
    for name in sorted(set(rounds[0]) - {"rate"}):
        row[name] = statistics.median(figures[name] for figures in rounds)
    return row


def machine():
    """What it ran on, in one line."""
    model = ""
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*: (.+)", read_text("/proc/cpuinfo"))
        model = match.group(1) + ", " if match else ""
    return "%s%d cores, %s, Python %s" % (
        model, os.cpu_count(), platform.platform(terse=True),
        platform.python_version())


def number(value):
    """A figure to read: three digits that tell, and no more than it has."""
    if value >= 100:
        return "{:,.0f}".format(value)
    return "%.3g" % value if value >= 1 else "%.3f" % value


FLOORS = (("md5_mib_s", "MD5 MiB/s"), ("sha256_mib_s", "SHA-256 MiB/s"),
          ("file_writes_s", "files written a second"),
          ("file_reads_s", "files read a second"))


def bench_table(report):
    """A report as text."""
    settings, lines = report["settings"], [report["machine"]]
    lines.append("%(connections)d connections of %(processes)d processes, "
                 "%(rounds)d rounds of %(seconds)g s, large: %(large)d MiB"
                 % settings)
    lines += ["", "%-24s %9s %9s %9s  %-11s %s" % (
        "", "median", "min", "max", "", "also")]
    for row in report["cases"].values():
        if "failed" in row:
            lines.append("%-24s failed: %s" % (row["title"], row["failed"]))
            continue
        also = ", ".join(text % number(row[name]) for name, text in (
            ("p99_ms", "p99 %s ms"), ("complete_s", "Complete %s s"))
            if name in row)
        lines.append(("%-24s %9s %9s %9s  %-11s %s" % (
            row["title"], number(row["median"]), number(row["min"]),
            number(row["max"]), row["unit"], also)).rstrip())
    lines.append("")
    if report["memory_mib"]:
        lines.append("peak memory, MiB a process: " + ", ".join(
            map(number, report["memory_mib"])))
    load = report["load"]
    lines.append(
        "the load itself: %s requests/s, %s us of CPU each; GET %s, PUT %s "
        "MiB/s" % tuple(number(load[name]) for name in (
            "requests_s", "client_us", "get_mib_s", "put_mib_s")))
    lines.append("floors, one core: " + ", ".join(
        "%s %s" % (title, number(report["floors"][name]))
        for name, title in FLOORS if name in report["floors"]))
    for shape, row in report.get("growth", {}).items():
        lines.append("%s keys, %s: %s" % (
            "{:,}".format(settings["growth"]), shape, ", ".join(
                "%s %s" % (name, number(value))
                for name, value in row.items())))
    return "\n".join(lines)


def bench(argv):
    """The command: print the table, and write the JSON; the exit status,
    1 when a case failed.

    {"machine", "server", "settings": {option: value}, "floors", "load",
    "memory_mib": [a process], "cases": {name: {"title", "unit", "median",
    "min", "max", "rounds", "answers", "p50_ms", "p99_ms", "client_us",
    "complete_s"}, or {"title", "unit", "failed"}}, "growth": {shape: ...}}
    """
    options = bench_options(argv)

    def say(text):
        print(text, file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew(options.processes))
        endpoint, pid, place, start = stack.enter_context(
            measured_server(options))
        report = {"machine": machine(), "server": endpoint.url,
                  "settings": dict(vars(options))}
        del report["settings"]["endpoint"]      # it has the secret
        report["floors"] = floors(place or tempfile.gettempdir())
        report["load"] = ceiling(crew, options)
        bench = Bench(endpoint, crew, options, place, start)
        stack.callback(bench.client.close)
        rounds = run_rounds(bench, say)
        if options.growth:
            report["growth"] = growth(bench)
        report["memory_mib"] = peak_memory(pid) if pid else []
        try:
            bench.remove()
        except BENCH_ERRORS as error:
            say("the buckets were not removed: %s" % error)
    report["cases"] = {case.name: summary(case, rounds[case.name])
                       for case in CASES if case.name in rounds}
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    print(bench_table(report))
    return any("failed" in row for row in report["cases"].values())


# --- tests of it ---

class BenchReplies(unittest.TestCase):
    """What the load takes for an answer, and what for the right one."""

    HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

    def fed(self, data, method="GET", step=1, end=False):
        """The Reply that some bytes make; it is whole at the last one."""
        reply = Reply(method)
        pieces = [data[start:start + step]
                  for start in range(0, len(data), step)]
        pieces += [b""] * end
        self.assertEqual([reply.feed(piece) for piece in pieces],
                         [False] * (len(pieces) - 1) + [True])
        return reply

    def test_an_answer_is_whole_when_its_framing_says_so(self):
        for data, method, end, status, body in (
                (self.HEAD + b"hello", "GET", False, 200, b"hello"),
                (self.HEAD, "HEAD", False, 200, b""),
                (b"HTTP/1.1 204 No Content\r\n\r\n", "DELETE", False, 204,
                 b""),
                (b"HTTP/1.0 404 No\r\n\r\nhello", "GET", True, 404,
                 b"hello"),
                (self.CHUNKED + b"3\r\nhel\r\n2;a=b\r\nlo\r\n0\r\n\r\n",
                 "GET", False, 200, b"hello"),
                (self.CHUNKED + b"5\r\nhello\r\n0\r\na: b\r\n\r\n",
                 "GET", False, 200, b"hello")):
            for step in (1, 7, len(data)):
                reply = self.fed(data, method, step, end)
                self.assertEqual((reply.status, reply.body), (status, body))

    def test_an_answer_that_is_cut_short_or_none_is_an_error(self):
        for data in (self.HEAD + b"hell", self.HEAD[:20], b"",
                     self.CHUNKED + b"5\r\nhel", b"SSH-2.0\r\n\r\n"):
            reply = Reply("GET")
            with self.assertRaises(BenchError, msg=data):
                reply.feed(data)
                reply.feed(b"")

    def test_an_answer_has_to_be_the_one_that_is_due(self):
        reply = self.fed(self.HEAD + b"<Key>")
        due = Ask("GET", "/b/k", length=5, content=b"<Key>", keys=1)
        reply.check(due)
        for change in ({"status": 206}, {"length": 4}, {"keys": 2},
                       {"content": b"<kEy>"}):
            with self.assertRaises(BenchError, msg=change):
                reply.check(due._replace(**change))
        reply = self.fed(self.HEAD, "HEAD")
        reply.check(Ask("HEAD", "/b/k", length=5))
        with self.assertRaises(BenchError):
            reply.check(Ask("HEAD", "/b/k", length=0))

    def test_the_pattern_has_no_two_ranges_alike(self):
        size = 3 * MIB + 7
        whole = b"".join(pattern_blocks(size))
        self.assertEqual(whole, content(0, size))
        self.assertEqual(len(whole), size)
        self.assertEqual(content(MIB + 5, 999), whole[MIB + 5:][:999])
        pieces = [whole[start:start + KIB] for start in range(0, size, KIB)]
        self.assertEqual(len(set(pieces)), len(pieces))
        self.assertEqual(pattern_digest("md5", size), md5_hex(whole))


class BenchLoads(unittest.TestCase):
    """A load counts what was answered, and fails for what was not."""

    def serving(self, answer, once=False):
        """An Endpoint at which every request is answered with some bytes;
        once: after which the connection ends.  self.seen has them."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        self.seen = []

        def one(connection):
            with connection, contextlib.suppress(OSError):
                while True:
                    data = connection.recv(65536)
                    if not data:
                        return
                    self.seen.append(data)
                    connection.sendall(answer)
                    if once:
                        return

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=one, daemon=True, args=(
                        listener.accept()[0],)).start()
        threading.Thread(target=accept, daemon=True).start()
        return Endpoint("http://127.0.0.1:%d" % listener.getsockname()[1],
                        "KEY", "SECRET")

    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"

    def test_each_request_once_is_each_request_once(self):
        asks = [Ask("GET", "/box/%02d" % number, length=3, content=b"abc")
                for number in range(50)]
        for once in (False, True):
            endpoint = self.serving(self.ANSWER, once)
            count, seconds, _, taken = Requests(endpoint, asks, 4).run(None)
            self.assertEqual((count, len(taken)), (50, 50))
            self.assertGreater(seconds, 0)
            self.assertEqual(sorted(data.split()[1] for data in self.seen),
                             [ask.path.encode() for ask in asks])

    def test_an_answer_that_is_not_due_fails_the_load(self):
        ask = Ask("GET", "/box/key", length=3, content=b"abc")
        answer = self.ANSWER
        for wrong in (answer.replace(b"200", b"404"), answer[:-1] + b"d",
                      answer.replace(b"3", b"2")[:-1], b"NO\r\n\r\n"):
            endpoint = self.serving(wrong)
            with self.assertRaises(BenchError, msg=wrong):
                Requests(endpoint, [ask] * 40, 2).run(None)

    def test_a_failure_in_the_midst_of_equal_answers_is_seen(self):
        for wrong in (b"HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\nabc",
                      self.ANSWER + b"d"):
            endpoint = self.serving(self.ANSWER)
            load = Requests(endpoint, [Ask("GET", "/", length=3)] * 9, 1)
            link = load._links[0]
            link._usual["GET"] = len(self.ANSWER)
            link._ask, link._receive = load._asks[0][1], lambda _: wrong
            with self.assertRaises(BenchError):
                link.take()
            link.close()

    def test_streams_send_and_check_whole_bodies(self):
        size = 2 * MIB + 3
        with gos3rve.serve(buckets=["box"]) as server:
            endpoint = Endpoint(server.url, server.key_id, server.key_val)
            digest = pattern_digest("md5", size)
            put, get = (Stream(method, "/box/key", size)
                        for method in ("PUT", "GET"))
            _, etags = Streams(endpoint, [[put, put], [put]]).run(None)
            self.assertEqual(etags, [['"%s"' % digest] * 2,
                                     ['"%s"' % digest]])
            Streams(endpoint, [[get._replace(md5=digest)]]).run(None)
            for wrong in (get._replace(size=5), get._replace(md5="0" * 32),
                          get._replace(path="/box/none"),
                          put._replace(payload="0" * 64)):
                with self.assertRaises(BenchError, msg=wrong):
                    Streams(endpoint, [[wrong]]).run(None)


class BenchRuns(unittest.TestCase):
    """The command itself, for moments; how fast it was is not asked."""

    SMALL = ("get", "head", "put", "mixed", "delete", "range", "list")

    def run_bench(self, *arguments, status=0):
        """The table and the report of a run."""
        path = os.path.join(temporary_directory(self), "report")
        done = subprocess.run(
            [sys.executable, os.path.abspath(__file__), "bench",
             "--seconds", "0.2", "--large", "1", "--connections", "4",
             "--objects", "60", "--json", path] + list(arguments),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            universal_newlines=True, env=clean_environment(), timeout=200)
        self.assertEqual(done.returncode, status, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done.stdout, json.loads(read_text(path))

    def test_every_case_runs_against_this_server(self):
        text, report = self.run_bench("--rounds", "1", "--keys", "1050",
                                      "--growth", "1100")
        self.assertEqual(list(report["cases"]),
                         [case.name for case in CASES])
        for name, row in report["cases"].items():
            self.assertNotIn("failed", row)
            self.assertEqual(row["rounds"], [row["median"]])
            self.assertLess(0, row["min"])
            self.assertLessEqual(row["min"], row["median"])
            self.assertLessEqual(row["median"], row["max"])
            self.assertIn(row["title"], text)
            if name in self.SMALL:
                self.assertGreaterEqual(row["answers"], 4)
                self.assertLessEqual(row["p50_ms"], row["p99_ms"])
        self.assertGreater(report["cases"]["multipart"]["complete_s"], 0)
        self.assertEqual(set(report["growth"]), {"flat", "tree"})
        for row in report["growth"].values():
            self.assertGreater(min(row.values()), 0)
        self.assertGreater(report["floors"]["md5_mib_s"], 0)
        self.assertGreater(min(report["load"].values()), 0)
        if sys.platform == "linux":
            self.assertGreater(min(report["memory_mib"]), 1)

    def test_another_endpoint_is_left_as_it_was(self):
        lines = []
        with gos3rve.serve() as server:
            server.server.access_log = lines.append
            where = [server.url, server.key_id, server.key_val,
                     "--rounds", "1", "--cases"]
            _, report = self.run_bench(*where, "get,mixed,cold")
            self.assertEqual(list(report["cases"]), ["get", "mixed"])
            self.assertNotIn(server.key_val, json.dumps(report))
            self.assertEqual(os.listdir(server.dir_buckets), [])
            reads = sum(line["operation"] == "GetObject"
                        and line["status"] == 200 for line in lines)
            self.assertGreater(reads, report["cases"]["get"]["answers"])
            writes = sum(line["operation"] == "PutObject" for line in lines)
            self.assertGreaterEqual(writes, 60)
            self.assertEqual(len(lines), sum(
                line["status"] < 300 for line in lines), "no 404 of a HEAD")

    def test_a_bucket_with_the_objects_is_used_as_it_is(self):
        lines = []
        with gos3rve.serve(buckets=["mine"]) as server:
            for number in range(60):
                by_hand(os.path.join(
                    server.dir_buckets, "mine", "get", "o%05d" % number),
                    content(number * KIB, KIB))
            server.server.access_log = lines.append
            self.run_bench(
                server.url, server.key_id, server.key_val, "--rounds", "1",
                "--bucket", "mine", "--cases", "get")
        self.assertEqual({line["operation"] for line in lines},
                         {"HeadObject", "GetObject"})

    def test_a_refusal_is_a_failed_case_and_not_a_figure(self):
        with gos3rve.serve() as server:
            text, report = self.run_bench(
                server.url, server.key_id, "another", "--rounds", "2",
                "--cases", "get,list", status=1)
        for row in report["cases"].values():
            self.assertIn("SignatureDoesNotMatch", row["failed"])
            self.assertNotIn("median", row)
        self.assertEqual(text.count("failed: "), 2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        sys.exit(bench(sys.argv[2:]))
    unittest.main()
