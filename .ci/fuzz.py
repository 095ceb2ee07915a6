#!/usr/bin/env python3
"""Fuzz what clients, operators and disks can hand to gos3rve.

    .ci/fuzz.py [--seconds N] [--with hypothesis|atheris|bombs|coverage]
                [--corpus DIR] [TARGET ...]

Each target takes bytes to the server in this process: a handler on a socket
that is none, over a directory of its own.  A finding is an answer of 500, a
traceback in the log, any other exception, or one second of CPU for an answer;
it is printed with its bytes, and the exit status is 1.  Whatever is found
becomes a row of a test in test_gos3rve.py.

hypothesis mixes pieces of the seeds; atheris starts from the seeds and lets
the coverage guide it, a process for each target; bombs puts a MiB of one thing
(brackets, entities, digits, names ...) into the seeds.  coverage runs what
there is, and tells how much of the rooms of the parsers it reaches: the
seeds, with them what atheris kept in DIR, and with those the tests of the
rooms in test_gos3rve.py.  All from PyPI but the bombs.
"""

import argparse
import base64
import contextlib
import hashlib
import hmac
import html
import inspect
import io
import itertools
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import types
import unittest
import urllib.parse
import zlib
from unittest import mock

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
USER = "111122223333"                   # the id of the one account
PARSERS = range(2, 6)                   # their rooms
EVERYBODY = json.dumps({"Version": "2012-10-17", "Statement": [{
    "Effect": "Allow", "Principal": "*", "Action": "s3:*",
    "Resource": ["arn:aws:s3:::box", "arn:aws:s3:::box/*"]}]}).encode()


def open_and_read(path):
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


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
                                object_ownership="ObjectWriter", user_id=USER,
                                webhook=["hook=http://127.0.0.1:9/"])
        self.server, self.running = running.server, running
        self.server.report = self.said.append
        self.server.service.store.report = self.said.append
        self.client = test_gos3rve.Client("http://localhost", "ID", "KEY")
        self.root = os.path.join(running.dir_buckets, "box")
        self.signed("PUT", "/box?acl", {
            "x-amz-acl": "log-delivery-write"}, b"")
        self.signed("PUT", "/vault", {
            "x-amz-bucket-object-lock-enabled": "true"}, b"")
        self.signed("PUT", "/vault/key", {}, b"content")
        self.reset()
        self.upload = re.search(rb"<UploadId>(.*?)<", self.signed(
            "POST", "/box/key?uploads", {}, b""))[1].decode()
        self.states = {path: open_and_read(path) for path in map(
            self.state_path, ("box", "vault"))}

    def reset(self):
        """The bucket as it was at first."""
        for body, target in ((b"content", "/box/key"), (b"x", "/box/a/b")):
            self.signed("PUT", target, {}, body)

    def state_path(self, bucket):
        """Where what S3 knows of a bucket stands."""
        return os.path.join(self.running.dir_buckets, bucket, gos3rve.STATE,
                            "bucket.json")

    def forget(self):
        """The buckets' documents as they were at first."""
        for path, data in self.states.items():
            with open(path, "wb") as file:
                file.write(data)

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

    def signed(self, method, target, headers, body, service="s3"):
        """Send a request with a good signature."""
        self.client.service = service
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


VERSIONED = ("object-lock", "retention", "legal-hold", "replication")
DOCUMENTS = sorted(
    (row.name, row.method, row.level, row.subresource)
    for row in gos3rve.OPERATIONS.values()
    if row.method in ("PUT", "POST") and not row.when
    and row.level in (gos3rve.BUCKET, gos3rve.OBJECT))
LONG = "<Id>a</Id><Filter><Prefix>p</Prefix></Filter>"
HERE = "<Bucket>arn:aws:s3:::box</Bucket>"
# What an operation takes, less its root; a document that is one element
EXAMPLES = {
    "PutBucketPolicy": EVERYBODY.decode(),
    "PutBucketCors": "<CORSConfiguration><CORSRule><ID>a</ID><AllowedOrigin>*"
    "</AllowedOrigin><AllowedMethod>GET</AllowedMethod><AllowedHeader>x-*"
    "</AllowedHeader><ExposeHeader>etag</ExposeHeader><MaxAgeSeconds>1"
    "</MaxAgeSeconds></CORSRule></CORSConfiguration>",
    "DeleteObjects": "<Delete><Object><Key>a</Key><VersionId>null</VersionId>"
    "<ETag>x</ETag></Object><Quiet>true</Quiet></Delete>",
    "CreateBucket": "<CreateBucketConfiguration><LocationConstraint>EU"
    "</LocationConstraint><Tags><Tag><Key>a</Key><Value>b</Value></Tag>"
    "</Tags></CreateBucketConfiguration>",
    "CompleteMultipartUpload": "<CompleteMultipartUpload><Part><PartNumber>1"
    "</PartNumber><ETag>a</ETag></Part></CompleteMultipartUpload>",
    "PutObjectTagging": "<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value>"
    "</Tag></TagSet></Tagging>",
    "PutBucketAcl": "<AccessControlPolicy><Owner><ID>%s</ID></Owner>"
    "<AccessControlList><Grant><Grantee xmlns:xsi=\"%s\" xsi:type=\"Group\">"
    "<URI>http://acs.amazonaws.com/groups/global/AllUsers</URI></Grantee>"
    "<Permission>READ</Permission></Grant></AccessControlList>"
    "</AccessControlPolicy>" % (USER, gos3rve.XSI),
    "PutPublicAccessBlock": "<PublicAccessBlockConfiguration><BlockPublicAcls>"
    "true</BlockPublicAcls></PublicAccessBlockConfiguration>",
    "PutBucketOwnershipControls": "<OwnershipControls><Rule><ObjectOwnership>"
    "ObjectWriter</ObjectOwnership></Rule></OwnershipControls>",
    "PutBucketAccelerateConfiguration": "<AccelerateConfiguration><Status>"
    "Enabled</Status></AccelerateConfiguration>",
    "PutBucketRequestPayment": "<RequestPaymentConfiguration><Payer>Requester"
    "</Payer></RequestPaymentConfiguration>",
    "PutBucketReplication": "<ReplicationConfiguration><Role>arn:aws:iam::1:"
    "role/a</Role><Rule><ID>a</ID><Status>Enabled</Status><Priority>1"
    "</Priority><Filter/><DeleteMarkerReplication><Status>Disabled</Status>"
    "</DeleteMarkerReplication><Destination>" + HERE + "</Destination></Rule>"
    "</ReplicationConfiguration>",
    "PutBucketAnalyticsConfiguration": "<AnalyticsConfiguration>" + LONG
    + "<StorageClassAnalysis/></AnalyticsConfiguration>",
    "PutBucketInventoryConfiguration": "<InventoryConfiguration><Id>a</Id>"
    "<IsEnabled>true</IsEnabled><Destination><S3BucketDestination>" + HERE
    + "<Format>CSV</Format></S3BucketDestination></Destination><Schedule>"
    "<Frequency>Daily</Frequency></Schedule><IncludedObjectVersions>All"
    "</IncludedObjectVersions></InventoryConfiguration>",
    "PutBucketMetricsConfiguration": "<MetricsConfiguration>" + LONG
    + "</MetricsConfiguration>",
    "PutBucketIntelligentTieringConfiguration":
    "<IntelligentTieringConfiguration>" + LONG + "<Status>Enabled</Status>"
    "<Tiering><AccessTier>ARCHIVE_ACCESS</AccessTier><Days>90</Days></Tiering>"
    "</IntelligentTieringConfiguration>",
    "PutObjectLockConfiguration": "<ObjectLockConfiguration>"
    "<ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention>"
    "<Mode>GOVERNANCE</Mode><Days>1</Days></DefaultRetention></Rule>"
    "</ObjectLockConfiguration>",
    "PutObjectRetention": "<Retention><Mode>GOVERNANCE</Mode><RetainUntilDate>"
    "2030-01-01T00:00:00Z</RetainUntilDate></Retention>",
    "PutObjectLegalHold": "<LegalHold><Status>ON</Status></LegalHold>",
    "PutBucketEncryption": "<ServerSideEncryptionConfiguration><Rule>"
    "<ApplyServerSideEncryptionByDefault><SSEAlgorithm>AES256</SSEAlgorithm>"
    "</ApplyServerSideEncryptionByDefault><BucketKeyEnabled>true"
    "</BucketKeyEnabled></Rule></ServerSideEncryptionConfiguration>",
    "PutBucketLogging": "<BucketLoggingStatus><LoggingEnabled><TargetBucket>"
    "box</TargetBucket><TargetPrefix>l/</TargetPrefix></LoggingEnabled>"
    "</BucketLoggingStatus>",
    "PutBucketLifecycleConfiguration": "<LifecycleConfiguration><Rule><ID>a"
    "</ID><Filter><And><Prefix>p</Prefix><Tag><Key>a</Key><Value>b</Value>"
    "</Tag></And></Filter><Status>Enabled</Status><Expiration><Days>1</Days>"
    "</Expiration><Transition><Days>0</Days><StorageClass>GLACIER"
    "</StorageClass></Transition></Rule></LifecycleConfiguration>",
    "PutBucketNotificationConfiguration": "<NotificationConfiguration>"
    "<QueueConfiguration><Id>a</Id><Queue>arn:aws:sqs:us-east-1:" + USER
    + ":hook</Queue><Event>s3:ObjectCreated:*</Event><Filter><S3Key>"
    "<FilterRule><Name>prefix</Name><Value>p</Value></FilterRule></S3Key>"
    "</Filter></QueueConfiguration></NotificationConfiguration>",
    "PutBucketWebsite": "<WebsiteConfiguration><IndexDocument><Suffix>i"
    "</Suffix></IndexDocument><ErrorDocument><Key>e</Key></ErrorDocument>"
    "<RoutingRules><RoutingRule><Condition><KeyPrefixEquals>a"
    "</KeyPrefixEquals></Condition><Redirect><ReplaceKeyPrefixWith>b"
    "</ReplaceKeyPrefixWith></Redirect></RoutingRule></RoutingRules>"
    "</WebsiteConfiguration>",
    "PutBucketAbac": "<AbacStatus><Status>Enabled</Status></AbacStatus>",
    "PutBucketVersioning": "<VersioningConfiguration><Status>Suspended"
    "</Status></VersioningConfiguration>",
    "RestoreObject": "<RestoreRequest><Days>1</Days></RestoreRequest>"}


def document_seeds():
    """The example of each operation, and one of the root alone."""
    for index, row in enumerate(DOCUMENTS):
        yield bytes([index]) + EXAMPLES.get(row[0], "<A/>").encode()


@target(*document_seeds())
def document(world, data):
    """The document of an operation: the first byte says of which."""
    if not data:
        return
    name, method, level, subresource = DOCUMENTS[data[0] % len(DOCUMENTS)]
    place = "/vault" if subresource in VERSIONED else "/box"
    place += "/key" if level == gos3rve.OBJECT else ""
    if subresource:
        place += "?" + subresource
    if subresource == "uploadId":
        place += "=%s&partNumber=1" % world.upload
    elif subresource in ("analytics", "inventory", "metrics",
                         "intelligent-tiering"):
        place += "&id=a"
    world.signed(method, place, {"content-md5": base64.b64encode(
        hashlib.md5(data[1:]).digest()).decode()}, data[1:])
    if method == "PUT" and subresource:
        world.signed("GET", place, {}, b"")
    world.talk(b"GET /box/key HTTP/1.1\r\nHost: a\r\nReferer: b\r\n"
               b"Origin: http://c\r\n\r\n")
    world.forget()


# What a statement, or each of some, says of texts with wildcards
BOX = "arn:aws:s3:::box/"
POLICIES = (
    lambda texts: {"Resource": [BOX + text for text in texts]},
    lambda texts: [{"Resource": BOX + text} for text in texts],
    lambda texts: {"Resource": [BOX + text + "${aws:UserAgent}*${aws:Referer}"
                                for text in texts]},
    lambda texts: {"NotResource": [BOX + text + "${s3:VersionId}"
                                   for text in texts]},
    lambda texts: {"Condition": {"StringLike": {"aws:UserAgent": texts}}},
    lambda texts: [{"Condition": {"StringLike": {"aws:UserAgent": text}}}
                   for text in texts],
    lambda texts: {"Condition": {"ArnLike": {"aws:UserAgent": [
        BOX + text for text in texts]}}},
    lambda texts: [{"Condition": {
        "StringLikeIfExists": {"s3:VersionId": text},
        "StringNotLike": {"aws:Referer": text}}} for text in texts],
    lambda texts: {"Action": ["s3:*%se*" % ("?*" * (at % 4))
                              for at, _ in enumerate(texts)]})


def repeated(text, size):
    """Some characters of the same kind."""
    text = text or "a"
    return (text * (1 + size // len(text)))[:size]


def fullest_policy(make, text):
    """The largest policy that `make` makes of pieces of a text."""
    texts = ["*%s*%d" % (text[at:at + 48], at)
             for at in range(0, min(len(text), 48 * 400), 48)]
    while True:
        made = make(texts)
        data = json.dumps({"Version": "2012-10-17", "Statement": [
            dict({"Effect": "Deny", "Principal": "*"}, **dict(
                {} if "Action" in one else {"Action": "s3:*"}, **dict(
                    {} if {"Resource", "NotResource"} & one.keys() else {
                        "Resource": BOX + "*"}, **one)))
            for one in (made if isinstance(made, list) else [made])]},
            ensure_ascii=False, separators=(",", ":")).encode()
        if len(data) <= gos3rve.MAX_POLICY_BYTES:
            return data
        texts = texts[:len(texts) * 9 // 10]


@target(*(bytes([kind]) + b"a*" for kind in range(len(POLICIES))))
def policy(world, data):
    """A policy of a text, and the deletion of a key of a KiB for each four
    of it."""
    if not data:
        return
    text = re.sub("[^!-~\xa1-\ud7ff]", "", data[1:].decode(
        "utf-8", "replace")) or "a"
    world.signed("PUT", "/box?policy", {}, fullest_policy(
        POLICIES[data[0] % len(POLICIES)], text))
    plain = repeated(re.sub("[*?]", "", text)[:1000], 1000)
    letters = repeated(re.sub("[^ -~]", "", plain), 40000)
    body = ("<Delete>%s</Delete>" % "".join(
        "<Object><Key>%d%s</Key><VersionId>%032x</VersionId></Object>" % (
            number, html.escape(plain.encode()[:1000].decode(
                "utf-8", "ignore")), number)
        for number in range(min(1000, 1 + (len(data) >> 12))))).encode()
    world.signed("POST", "/box?delete", {
        "user-agent": BOX + letters, "referer": letters[:500],
        "content-md5": base64.b64encode(hashlib.md5(body).digest()).decode()},
        body)
    world.forget()


@target(b"a", b"content-type")
def cors(world, data):
    """The headers that a bucket allows, and those that a page asks for."""
    heads = re.findall("[a-z]{1,5}", re.sub(
        "[^a-z]", "", data.decode("latin-1")))[:1500] or ["a"]
    world.signed("PUT", "/box?cors", {}, b"<CORSConfiguration><CORSRule>"
                 b"<AllowedOrigin>*</AllowedOrigin><AllowedMethod>GET"
                 b"</AllowedMethod>%s</CORSRule></CORSConfiguration>"
                 % "".join("<AllowedHeader>%s*-%d</AllowedHeader>" % pair
                           for pair in zip(heads, range(1500))).encode())
    world.talk(b"OPTIONS /box/key HTTP/1.1\r\nHost: a\r\nOrigin: b\r\n"
               b"Access-Control-Request-Method: GET\r\n"
               b"Access-Control-Request-Headers: %s\r\n\r\n" % ",".join(
                   "%s%d-%d" % (heads[-1], number, len(heads) - 1)
                   for number in range(2 * len(heads))).encode())
    world.forget()


ASSUME = b"Action=AssumeRole&Version=2011-06-15&RoleSessionName=name&RoleArn" \
    b"=arn:aws:iam::%s:role/a&" % USER.encode()


@target(b"Action=GetSessionToken&Version=2011-06-15&DurationSeconds=900",
        b"Action=GetCallerIdentity&Version=2011-06-15",
        ASSUME + b"Tags.member.1.Key=a&Tags.member.1.Value=b&Policy="
        + urllib.parse.quote(EVERYBODY.replace(
            b'"Principal": "*", ', b"")).encode(),
        ASSUME + b"&".join(
            b"Tags.member.%d.Key=%d&Tags.member.%d.Value=%s" % (
                n, n, n, hashlib.shake_256(b"%d" % n).hexdigest(
                    128).encode()) for n in range(1, 51)))
def token(world, data):
    """What is asked of STS."""
    world.signed("POST", "/", {
        "content-type": "application/x-www-form-urlencoded"}, data, "sts")


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


@target(b"bytes=0-1", b"bytes=5-", b"bytes=-5", b"bytes=5-1", b"bytes=-",
        b"bytes=200-300", b"Mon, 01 Jan 2024 00:00:00 GMT",
        b"Mon, 01 Jan 2024 99:00:00 GMT", b"2024-01-01T00:00:00.000Z",
        b"2024-13-01", b"2024-01-01T25:00:00Z", b"2024-01-01T00:00:00+05:30",
        b"2024-01-01T00:00:00.5-01:00", b"20240101T000000Z", b"20240101T0",
        b"2024a101T000000Z", b"20249901T000000Z", b'"a", W/"b", *', b"*",
        b'W/"b"', b"/box/" + b"k" * 300, b"/box/" + b"k" * 1025,
        b"/box/a%20b?versionId=3", b"//a", b"/box/%C3%A9?a+b=%FF", b"?", b"7",
        b"https://host/box/a?b", b"ftp://host/", b"a=b&c=d", b"0.0.0.0/8",
        b"box", b"a..b", b"A-", b"us-east-1", b"box.localhost:80",
        b"a.s3.test.", b"[::1]:80", b"-1", b"99999999999999999999", b"gzip",
        b"gzip, aws-chunked", b"aws-chunked", b"STANDARD_IA", b"STANDARD",
        b"a\xc3\xa9", b"\xe9", b"m" * 3000, b"k" * 1025,
        b"form-data; name=\"a\\\"b\"; filename=c", b"form-data; a=b; a=c",
        b"form-data; =", b"multipart/form-data; boundary=b", b"XXHASH64",
        b"multipart/form-data",
        b"sha256", b"1B2M2Y8AsgTpgAmY7PhCfg==", b' {"a": ["]\\"", {}]} ',
        b"[" * 70 + b"]" * 70, b"[" * 200, b"[]" * 100, b'"' + b"[" * 200)
def values(world, data):
    """What headers, queries and documents say: pure parsers."""
    text = data.decode("latin-1")
    conditions = dict.fromkeys(gos3rve.CONDITIONS, text)
    meta = {"x-amz-meta-a": text, "x-amz-storage-class": text}
    meta.update(dict.fromkeys((
        "content-type", "content-encoding"), text))
    redirect = {"x-amz-website-redirect-location": text}
    calls = [lambda call=call: call(text) for call in (
        gos3rve.parse_http_date, gos3rve.parse_iso_date,
        gos3rve.parse_amz_date, gos3rve.parse_copy_source,
        gos3rve.parse_query, gos3rve.parse_tagging_header,
        gos3rve.split_target, gos3rve.split_path, gos3rve.canonical_path,
        gos3rve.parse_post_policy, gos3rve.parse_json,
        gos3rve.metadata_header, gos3rve.valid_bucket_name,
        gos3rve.usable_bucket_name, gos3rve.valid_region,
        gos3rve.form_boundary, gos3rve.checksum_algorithm)] + [
        lambda: gos3rve.parse_range(text, 100),
        lambda: gos3rve.parse_range(text, 0),
        lambda: gos3rve.parse_int("a", text, 0),
        lambda: gos3rve.decode_digest(text, 16),
        lambda: gos3rve.form_parameters(data),
        lambda: gos3rve.parse_json(data, parse_int=str),
        lambda: gos3rve.host_bucket(text, ("s3.test",)),
        lambda: gos3rve.kept_headers(meta),
        lambda: gos3rve.kept_headers(redirect),
        lambda: gos3rve.user_metadata(meta),
        lambda: gos3rve.storage_class(meta),
        lambda: gos3rve.write_conditions({"if-none-match": text}),
        lambda: gos3rve.write_conditions(conditions),
        lambda: gos3rve.delete_conditions(text, text, None),
        lambda: gos3rve.delete_conditions(None, None, text)]
    for prefix in ("", "x-amz-copy-source-"):
        for name in conditions:
            for mtime in (0, 1 << 40):
                calls.append(
                    lambda prefix=prefix, name=name, mtime=mtime:
                    gos3rve.check_read_conditions(
                        {prefix + name: text}, "a", mtime, 1 << 40, prefix))
    for row in ((), (text,), (None, True), (None, False, 1),
                (None, False, None, 1)):
        for info in (None, types.SimpleNamespace(etag="a", size=2, mtime=2)):
            calls.append(lambda row=row, info=info: gos3rve.WriteConditions(
                *row).check(info, "key"))
    for call in calls:
        with contextlib.suppress(gos3rve.S3Error, ValueError):
            call()


@target(b"<A><B> c </B></A>", b"<A xmlns='x'><y:B xmlns:y='z' y:c='d'/></A>",
        b"<!DOCTYPE A [<!ENTITY b 'c'>]><A>&b;</A>", b"<A>" * 40, b"<B/>",
        b"<A>\r\n\xe2\x82\xac&amp;&#13;<![CDATA[<]]></A>", b"a\rb\x7f\1",
        b"<?xml version='1.0' encoding='x'?><A/>", b"")
def xml(world, data):
    """Documents in, and what was written out in again."""
    for root in (None, "A"):
        with contextlib.suppress(gos3rve.S3Error):
            element = gos3rve.parse_xml(data, root)
            gos3rve.xml_text(element, "B"), gos3rve.xml_text(element, "C")
    text = data.decode("latin-1")
    written = gos3rve.xml_document("A", [
        ("B c=\"d\"", text), ("C", True), ("D", None), ("E", [("F", 1)]),
        ("G", gos3rve.Markup("<H/>"))], gos3rve.XMLNS if data else None)
    if not re.search("[\0-\x08\x0b\x0c\x0e-\x1f]", text):
        assert gos3rve.parse_xml(written, "A").findtext("B") == text


def request_text(request):
    """A request of the tests' Client or of AWS, as a seed."""
    target = request.raw_path + "?" * bool(request.pairs) \
        + urllib.parse.urlencode(request.pairs)
    return ("%s %s\n%s" % (request.method, target, "".join(
        "%s:%s\n" % item for item in request.headers.items()))).encode(
            "latin-1")


def signed_requests():
    """Requests with good signatures of every kind."""
    signing, sessions = test_gos3rve.Signing(), test_gos3rve.Sessions()
    yield signing.signed("GET", query=[("a b", "c"), ("d", "")], headers={
        "x-amz-a": "b  c"})
    yield signing.signed("PUT", payload=gos3rve.STREAMING_SIGNED[1])
    yield signing.presigned()
    issued = sessions.issue()
    for client in (signing.client, issued):
        yield sessions.v2(client, False)
        yield sessions.v2(client, True)
    yield signing.signed(client=issued)
    yield signing.presigned(client=issued)
    old = sessions.issue(session=sessions.ISSUED._replace(
        expires=test_gos3rve.MAY_24))
    yield signing.signed(client=old)
    yield signing.signed(client=test_gos3rve.Client(
        "http://s3.test", "ALICEKEY", "alice-secret", service="sts"))
    for amz, path in (("x-amz-content-sha256:%s\n" % gos3rve.STREAMING_SIGNED[
            0], "/box/key"), ("", "/box/key?acl&tagging=%C3%A9")):
        date = "Fri, 24 May 2013 00:00:00 +0000"
        yield ("GET %s\nhost:box.s3.test\ndate:%s\n%sauthorization:AWS "
               "ALICEKEY:%s\n" % (
                   path[4:], date, amz, gos3rve._v2_signature(
                       "alice-secret", "GET\n\n\n%s\n%s%s" % (
                           date, amz, urllib.parse.unquote(
                               path, "latin-1"))))).encode()
    for request in (signing.signed(), signing.presigned(),
                    sessions.v2(issued, True), sessions.v2(issued, False)):
        for old, new in DAMAGE:
            changed = request_text(request).replace(old, new)
            if changed != request_text(request):
                yield changed


# What makes a good signature a bad one
DAMAGE = (
    (b"GET", b"PUT"), (b"s3.test", b"proxy"), (b"ALICE", b"ALICF"),
    (b"ASIA", b"ASIB"), (b"20130524/", b"20130523/"), (b"host", b"hosu"),
    (b"20130524%2F", b"20130523%2F"),
    (b"/s3/", b"/ec2/"), (b"us-east-1", b"eu-west-1"), (b"Signature=", b"S="),
    (b"aws4_request", b"aws4"), (b"Credential=", b"C="), (b"HMAC", b"ECDSA"),
    (b"x-amz-date", b"date"), (b"x-amz-date:", b"x-amz-d:"), (b"AWS ", b"A "),
    (b"Expires=60", b"Expires=-1"), (b"Expires=60", b"Expires=x"),
    (b"Expires=60", b"Expires=999999"), (b"Expires=13", b"Expires=x"),
    (b"Expires=13", b"Expires=12"), (b"T000000Z", b"T003000Z"),
    (b"T000000Z", b"T"), (b"24 May", b"23 May"), (b"24 May", b"x"),
    (b"UNSIGNED-PAYLOAD", b"STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD"),
    (b"UNSIGNED-PAYLOAD", b"x"), (b"x-amz-content-sha256:", b"x-amz-c:"),
    (b"Signature=", b"Signature=\xe9"), (b"ASIA", b"ALICEKEY"),
    (b"security-token:", b"security-token:AAAA"), (b"SignedHeaders=", b"S="),
    (b"Security-Token=", b"Security-Token=%C3%A9"), (b"HMAC", b"HMAD"),
    (b"X-Amz-Signature", b"X-Amz-Signature=a&X-Amz-Signature"),
    (b"authorization:", b"x-amz-b:c\nauthorization:"),
    (b"authorization:", b"a-x-amz-b:c\nauthorization:"),
    (b"authorization:", b"x:"), (b"/box/key", b"/box/key?X-Amz-Signature=a"),
    (b"/box/key", b"/box?uploads&acl=a"), (b"/box/key", b"/box/%C3%A9"),
    (b"Signature=", b"Signature=a, "),
    (b"SignedHeaders=", b"SignedHeaders=" + b";" * 200),
    (b"SignedHeaders=", b"SignedHeaders=" + b"a" * 9000),
    (b"AWS ALICEKEY:", b"AWS x"), (b"AWS ASIA", b"AWS ASIAA"),
    (b"authorization:AWS ", b"authorization:AWS x\nb:"),
    (b"authorization:AWS ", b"x-amz-content-sha256:STREAMING-AWS4-HMAC-"
     b"SHA256-PAYLOAD\nauthorization:AWS "))


@target(*(one if isinstance(one, bytes) else request_text(one)
          for one in signed_requests()))
def signature(world, data):
    """Who asks, at the time at which the seeds are signed."""
    line, *lines = data.decode("latin-1").split("\n")
    method, _, place = line.partition(" ")
    headers = dict(line.split(":", 1) for line in lines
                   if re.match(r"[a-z0-9-]+:[^\r\0]*\Z", line))
    for more in ({}, {"region": "us-east-1", "hosts": ("s3.test",)},
                 {"service": "sts", "payload": gos3rve.EMPTY_SHA256}):
        with contextlib.suppress(gos3rve.S3Error):
            gos3rve.authenticate(
                test_gos3rve.asked(method, place, headers,
                                   gos3rve.host_bucket(headers.get(
                                       "host", ""), ("s3.test",))),
                test_gos3rve.ACCOUNTS, test_gos3rve.MAY_24, **more)


CHUNKS = test_gos3rve.SignedChunks("test_chain_of_signatures_holds")
CHUNKS.setUp()
CHAIN = (gos3rve.signing_key("alice-secret", "20130524", "us-east-1", "s3"),
         test_gos3rve.amz_date(test_gos3rve.MAY_24),
         "20130524/us-east-1/s3/aws4_request", CHUNKS.seed)


def framed():
    """Bodies in every framing, as heads and what comes after them."""
    wire = b"".join(b"%x;chunk-signature=%s\r\n%s\r\n" % (
        len(data), signature.encode(), data)
        for data, signature in CHUNKS.parts)
    trailer = b"x-amz-checksum-crc32:puEbZg==\n"
    signature = CHAIN[0].sign("AWS4-HMAC-SHA256-TRAILER\n%s\n%s\n%s\n%s" % (
        CHAIN[1], CHAIN[2], CHUNKS.parts[-1][1],
        hashlib.sha256(trailer).hexdigest())).encode()
    aws = b"content-encoding:aws-chunked\nx-amz-decoded-content-length:10\n"
    promise = aws + b"x-amz-trailer:x-amz-checksum-crc32\n"
    signed = b"x-amz-content-sha256:%s\n"
    plain = b"5\r\n01234\r\n5\r\n56789\r\n0\r\n"
    crc32 = trailer[:-1] + b"\r\n"
    first = signed % gos3rve.STREAMING_SIGNED[0].encode() + aws
    second = signed % gos3rve.STREAMING_SIGNED[1].encode() + promise
    third = signed % gos3rve.STREAMING_UNSIGNED.encode() + promise
    yield first + b"\n" + wire
    yield first + b"\n" + wire.replace(b"01234", b"01235")
    yield first + b"\n" + wire.replace(b"chunk-s", b"chunk-t")
    yield first + b"\n" + wire[:60]
    yield first + b"\n" + wire[:86]
    for end in (b"x-amz-trailer-signature:" + signature + b"\r\n\r\n",
                b"x-amz-trailer-signature:a\r\n", b""):
        yield second + b"\n" + wire[:-2] + crc32 + end
    for end in (crc32 + b"\r\n", crc32[:-2] + b"\n", b"\r\n", b"a\r\n\r\n",
                b"a:b\r\n" * 300, b"a" * 9000, crc32.replace(b"p", b"q"),
                crc32.replace(b"p", b"*")):
        yield third + b"\n" + plain + end
    yield third + b"\n" + plain.replace(b"9\r\n", b"9a\r\n")
    yield aws + b"\n" + plain + b"\r\n"
    chunked = b"transfer-encoding:chunked\n"
    for end in (b"\r\n", b"A: b\r\n\r\n", b"A b\r\n\r\n", b"A:b\r\n" * 300,
                b"", b"A: b\n"):
        yield chunked + b"\n" + plain + end
    for cut in (b"5;x=y\r\n01234\r\n0\r\n\r\n", b"5\r\n012345\r\n", b"5\r\n",
                b"5\r\n01", b"x\r\n", b"5\n01234", b"5" * 9000, b"5;\1\r\n",
                b"7d0\r\n" + b"a" * 2000 + b"\r\n0\r\n\r\n"):
        yield chunked + b"\n" + cut
    for head in (
            b"content-md5:eB5eJF1ptWaXm4bijSPyxw==", b"content-md5:x",
            b"content-md5:AAAAAAAAAAAAAAAAAAAAAA==", b"content-length:11",
            b"x-amz-checksum-sha256:x", b"x-amz-checksum-crc32:puEbZg==",
            b"x-amz-checksum-crc32:AAAAAA==", b"x-amz-checksum-xxhash3:a",
            b"x-amz-checksum-crc32:a\nx-amz-checksum-sha1:b",
            b"x-amz-sdk-checksum-algorithm:CRC32C",
            b"x-amz-sdk-checksum-algorithm:SHA1\nx-amz-checksum-crc32:puEbZg==",
            b"x-amz-checksum-type:a",
            b"x-amz-content-sha256:" + b"0" * 64, b"x-amz-content-sha256:"
            + hashlib.sha256(b"0123456789").hexdigest().encode()):
        yield head + b"\n\n0123456789"
    yield b"\n\n"
    yield b"x-amz-decoded-content-length:x\n" + aws[:29] + b"\n0"
    yield b"\n\n" + b"0123456789" * 200


PAYLOADS = gos3rve.STREAMING_SIGNED + (
    gos3rve.UNSIGNED, gos3rve.STREAMING_UNSIGNED)


@target(*framed())
def framing(world, data):
    """Bodies, slow and fast, with a thread for the digests and without."""
    head, _, wire = data.partition(b"\n\n")
    headers = dict(line.split(":", 1) for line in head.decode(
        "latin-1").split("\n") if re.match(r"[a-z0-9-]+:[^\r\0]*\Z", line))
    payload = headers.get("x-amz-content-sha256", gos3rve.UNSIGNED)
    if payload not in PAYLOADS and not re.match("[0-9a-f]{64}\\Z", payload):
        return                          # authenticate() refuses it
    length = headers.get("content-length", "")
    for step, most in ((1, gos3rve.MIB), (1 << 20, 8)):
        source = test_gos3rve.Drip(wire, step if len(wire) < 4096 else 1000)
        frame = gos3rve.ChunkedReader(source) \
            if "transfer-encoding" in headers else gos3rve.LengthReader(
                source, int(length) if re.match("[0-9]{1,18}\\Z", length)
                else len(wire))
        identity = gos3rve.Identity(None, payload, gos3rve.ChunkChain(
            *CHAIN) if payload in gos3rve.STREAMING_SIGNED else None)
        with contextlib.suppress(gos3rve.S3Error), \
                mock.patch.object(
                    gos3rve, "OVERLAP_BYTES", most):
            body = gos3rve.open_body(frame, headers, identity)
            body.want("MD5", body.checksum)
            if step == 1:
                body.read_all(1500)
            for block in body.blocks(7 if len(wire) < 4096 else 7000):
                assert block
            body.digest("MD5")


@target(*(b"%d\n%s" % (at, data) for at, data in (
    (0, b""), (3, b"abcdefgh"), (1000, bytes(5000)), (70000, b"ab" * 50000))))
def digests(world, data):
    """Cyclic redundancy checks of a whole and of its parts."""
    head, _, data = data.partition(b"\n")
    at = int(head) if re.match(rb"\d{1,9}\Z", head) else 1
    first, second = data[:at], data[at:]
    for name in ("CRC32", "CRC32C", "CRC64NVME"):
        new = gos3rve.DIGESTS[name].new
        whole = new(first)
        whole.update(second)
        assert whole.digest() == new(data).digest()
        assert gos3rve.decode_digest(gos3rve.combined_crc(name, [
            (new(part).digest(), len(part)) for part in (first, second)]),
            whole._crc.width // 8) == whole.digest()
    assert int.from_bytes(gos3rve.DIGESTS["CRC32"].new(data).digest(),
                          "big") == zlib.crc32(data)
    gos3rve.composite_checksum("SHA256", [first, second])


def forms(client, when):
    """Forms of a client, with good signatures or a fault, as seeds."""
    policy = test_gos3rve.encode({
        "expiration": "2100-01-01T00:00:00Z", "conditions": [
            ["starts-with", "$key", ""], {"bucket": "box"},
            ["content-length-range", 0, 10]]})
    date = test_gos3rve.amz_date(when)
    v4 = test_gos3rve.v4(policy, date=date)
    v2 = test_gos3rve.Sessions.v2_form(policy, client)
    v4.update({
        "x-amz-credential": "%s/%s/us-east-1/s3/aws4_request" % (
            client.key_id, date[:8]),
        "x-amz-signature": hmac.new(
            test_gos3rve.v4_key(client.secret, date[:8]), policy.encode(),
            hashlib.sha256).hexdigest()})
    for fields in (
            {}, v2, dict(v2, signature="\xe9"), {"awsaccesskeyid": "a"}, v4,
            dict(v4, key="a/${filename}", bucket="box", file2="x"),
            dict(v4, **{"x-amz-algorithm": "a"}),
            dict(v4, **{"x-amz-date": "a"}),
            dict(v4, **{"x-amz-credential": "a"}),
            dict(v4, **{"x-amz-security-token": "a"}),
            dict(v4, **{"x-amz-signature": "a"})):
        yield test_gos3rve.form([("key", "k")] + list(fields.items()))
    yield test_gos3rve.form([("key", "k"), ("Key", "l")], after=[("a", "b")])
    yield test_gos3rve.form([("key", "k")], after=[("file", "b")])
    yield test_gos3rve.form([("key", "k")], None)
    yield test_gos3rve.form([("key", "k")], b"")
    yield test_gos3rve.form([("key", "k" * 30000)])
    yield test_gos3rve.form([("key", "k")], b"0123456789a")
    part = b"--xYzZY\r\nContent-Disposition: form-data; name=\"a\""
    for data in (
            b"preamble\r\n" + part + b"\r\n\r\n\r\n--xYzZY--",
            part + b"\r\n\r\n--xYzZY--\r\n", part + b"\r\n\r\n--xYzZ",
            part + b"\r\nA: b\r\n\r\n\r\n--xYzZY--", part[:7] + b" x\r\n",
            part + b"\r\nA: b\r\na: c\r\n\r\n", part + b"\r\n b\r\n\r\n",
            part + b"; filename=b\r\n\r\n\xff\r\n--xYzZY--",
            part.replace(b"a", b"\xff") + b"\r\n\r\n", part[:50],
            part.replace(b"form-data", b"x") + b"\r\n\r\n",
            part + b"a" * 30000, b"", b"--xYzZY\r\n\r\n\r\n--xYzZY--"):
        yield data


@target(*forms(test_gos3rve.Client("", "ID", "KEY"), time.time()))
def form(world, data):
    """The form of a browser's upload."""
    world.talk(b"POST /box HTTP/1.1\r\nHost: localhost\r\nContent-Type: mult"
               b"ipart/form-data; boundary=xYzZY\r\nContent-Length: %d\r\n\r\n"
               % len(data) + data)


@target(*forms(test_gos3rve.Sessions.client, test_gos3rve.MAY_24))
def form_parts(world, data):
    """A form's parts and its signature, slow and fast."""
    for step in (1, 7, 1 << 20):
        if step < 7 < 1 << 12 < len(data):
            continue
        with contextlib.suppress(gos3rve.S3Error):
            form = gos3rve.read_form(test_gos3rve.Drip(data, step), b"xYzZY")
            with contextlib.suppress(gos3rve.S3Error):
                for now in (test_gos3rve.MAY_24, 1 << 40):
                    gos3rve.authenticate_form(
                        form.fields, test_gos3rve.ACCOUNTS, now, "us-east-1")
            content = gos3rve.SizedReader(form.file, 1, 10)
            while content.read(3):
                pass


SEALED = tuple(
    (size, test_gos3rve.seal(test_gos3rve.plain_bytes(size), step=step))
    for size, step in ((0, None), (1, None), (1 << 16, 4000), (300000, 70000)))
WRAPPED = gos3rve.wrap_key(test_gos3rve.SECRET, bytes(32), ["a", "b"])


@target(b"\0" * 13, b"\3\0\0\0\1\xff\xff\xff\xff",
        b"\1\0\0\0\0\0\0\0\1\0\0\0\x09a",
        b"\2\0\0\0\0\0\1\0\0\0\0\2\0a", b"\3\0\2\0\0\0\3\0\0\0\0\2\0a",
        b"\3\0\1\0\0\0\4\xff\0cut", b"\2\0\0\0\0\0\0\0\4\0\0\0\7a",
        WRAPPED.encode(), WRAPPED.encode()[:-4] + b"AAAA", gos3rve.SEAL_FORMAT)
def sealed(world, data):
    """Sealed content opens to what was sealed, or not at all.

    Two sequences in a file, the range to be read, then bytes to change:
    their place and value; a file that ends before.
    """
    with contextlib.suppress(gos3rve.SealError):
        gos3rve.unwrap_key(test_gos3rve.SECRET, data.decode("latin-1"),
                           ["a", "b"])
    with contextlib.suppress(gos3rve.SealError):
        gos3rve.read_header(data)
    with contextlib.suppress(gos3rve.SealError):
        size = int.from_bytes(data[:6], "big")
        assert gos3rve.sealed_size(gos3rve.plain_size(size)) == size
    for key, nonce in ((data, bytes(12)), (test_gos3rve.SECRET, data[:12]),
                       (test_gos3rve.SECRET, data[:9])):
        with contextlib.suppress(gos3rve.SealError, ValueError):
            gos3rve.AesGcm(key, False).run([(nonce, data, len(data) // 2)])
    if len(data) < 9:
        return
    size, content = SEALED[data[0] % len(SEALED)]
    start, stop = struct.unpack(">II", data[1:9])
    content = bytearray(content + SEALED[1][1])
    for at in range(9, len(data) - 4, 5):
        place, value = struct.unpack(">IB", data[at:at + 5])
        content[place % len(content)] ^= value
    if data.endswith(b"cut"):
        del content[-len(data):]
    plain = test_gos3rve.plain_bytes(size) + test_gos3rve.plain_bytes(1)
    pieces = []
    with contextlib.suppress(gos3rve.SealError):
        for piece in gos3rve.open_range(
                lambda length, offset: bytes(content[
                    offset:offset + min(length, 50000)]),
                test_gos3rve.SECRET, [
                    gos3rve.Sequence(size, test_gos3rve.SEQUENCE),
                    gos3rve.Sequence(1, test_gos3rve.SEQUENCE)], start, stop):
            pieces.append(piece)
    assert plain[start:stop].startswith(b"".join(pieces))


@target(b'["00000000000000000000000000000000",7,1,"a/b",{"m":{"a":"b"}}]',
        b'{"etag":"x-2","size":7,"mtime_ns":1,"parts":[[3,1],[4,1]],"meta":'
        b'{"a":"b"},"lock":{"mode":"GOVERNANCE","until":1},"acl":["x"]}',
        b'{"marker":true,"key":"key"}', b'{"tags":{"a":"b"},"sse":{"algorit'
        b'hm":"SSE-C","key":"AAAA","sizes":[[1,1]],"prefixes":"AAAA"}}')
def record(world, data):
    """A record on the disk, and one of a version."""
    try:
        os.setxattr(os.path.join(world.root, "key"), gos3rve.XATTR, data)
    except OSError:                     # more than the file system takes
        return
    for place in ("/box/key", "/box?list-type=2", "/box/key?attributes",
                  "/box/key?tagging", "/box/key?acl", "/box?versions",
                  "/box/key?retention"):
        world.signed("GET", place, {"x-amz-object-attributes": "ETag,"
                                    "ObjectParts,Checksum"}, b"")
    world.signed("PUT", "/box/copy", {"x-amz-copy-source": "/box/key"}, b"")
    world.reset()


@target(b'\0{"owner":"a","created_ns":1,"versioning":"Enabled","cors":[{"meth'
        b'ods":["GET"],"origins":["*"]}],"policy":"{}","acl":["a"]}',
        b'\0{"object_ownership":"ObjectWriter","tags":{"a":"b"},"region":7}',
        b'\1{"object_lock":{"Mode":"GOVERNANCE","Days":1},"lock":true}',
        b'\2{"key":"key","initiated_ns":1,"headers":{"Content-Type":"a"},'
        b'"meta":{},"checksum":"CRC32","owner":"a"}', b"\2[]", b"\0", b"\1{",
        b'\3["00000000000000000000000000000000",7,1,"a/b",{"m":{"a":"b"}}]')
def state(world, data):
    """What stands beside the objects: of a bucket, an upload, a sidecar."""
    if not data:
        return
    key = os.path.join(world.root, "key")
    bucket = world.server.service.store.bucket("box")
    path = (world.state_path("box"), world.state_path("vault"), os.path.join(
        world.server.service.store.dir_uploads, "box", world.upload,
        "upload.json"), bucket._sidecar("key", os.stat(key).st_ino))[
            data[0] % 4]
    before = open_and_read(path) if os.path.exists(path) else None
    if data[0] % 4 == 3:
        os.removexattr(key, gos3rve.XATTR)
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data[1:])
    place = "/vault" if data[0] % 4 == 1 else "/box"
    for query in ("", "?list-type=2", "?uploads", "?versions") + tuple(
            "?" + row[3] for row in DOCUMENTS
            if row[2] == gos3rve.BUCKET and row[3]):
        world.signed("GET", place + query, {}, b"")
    world.signed("PUT", place + "/key", {}, b"content")
    for query in ("", "?acl", "?tagging", "?retention", "?attributes",
                  "?uploadId=" + world.upload):
        world.signed("GET", place + "/key" + query, {
            "x-amz-object-attributes": "ETag"}, b"")
    world.signed("PUT", "/box/key?partNumber=1&uploadId=" + world.upload,
                 {}, b"part")
    world.talk(("GET %s/key HTTP/1.1\r\nHost: a\r\nOrigin: http://c\r\n\r\n"
                % place).encode())
    if before is not None:
        with open(path, "wb") as file:
            file.write(before)
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
        print("%s: a finding for %d bytes: %r"
              % (name, len(data), data[:10000]), flush=True)
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
        words = stack.enter_context(tempfile.NamedTemporaryFile("w"))
        words.write("\n".join(sorted(set(re.findall(
            r'"[A-Za-z0-9:*-]{3,40}"', inspect.getsource(gos3rve))))))
        words.flush()
        atheris.Setup([name, corpus, "-max_total_time=%d" % options.seconds,
                       "-dict=" + words.name,
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
                run_one(world, name, open_and_read(os.path.join(
                    folder, file)))
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
        lines = range(first, first + len(lines))
        missed = [{(start, to) for start, to in found["missing_branches"]
                   if start in lines} for found in columns]
        count = len(missed[0]) + sum(
            start in lines for start, _ in columns[0]["executed_branches"])
        print("%d. %-37s %8d %8.1f %8.1f %8.1f %8.1f" % (
            (number, title, count) + tuple(
                100 - 100 * len(some) / count for some in missed)))
        for what, arcs in (("by the tests alone", missed[1] - missed[3]),
                           ("not at all", missed[3])):
            print("   %s: %s" % (what, ", ".join("%s %d->%d" % (
                (function_at(start), start, to))
                for start, to in sorted(arcs)) or "none"))


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


def function_at(line):
    """The name of the function that a line of gos3rve stands in."""
    lines = inspect.getsource(gos3rve).split("\n")[:line]
    return next(match[1] for match in map(
        re.compile(r" *def (\w+)").match, reversed(lines)) if match)


def branches(contexts):
    """coverage's account of some contexts together."""
    with tempfile.NamedTemporaryFile("r") as file:
        measured.json_report(outfile=file.name, contexts=[
            "^%s$" % context for context in contexts])
        found, = json.load(file)["files"].values()
    return found


# What bombs are made of: brackets and elements to be nested, entities,
# separators, digits, names that are all different, what regular expressions
# may go back over
BOMBS = (
    b"[", b"[]", b'{"%d":', b"<A>", b"<A%d/>", b"<A a='%d'/>", b"&lt;",
    b"&#9;", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&a%d=b", b"%25", b"%FF",
    b"a%d:b\n", b"a%d:b\r\n", b"9", b"0", b" ", b"\r\n", b"\n", b",", b";",
    b"; a=b", b"; a%d=b", b"/", b"../", b"\\", b'"', b"=", b":", b"-", b"*",
    b"?", b"a*", b"--xYzZY\r\n", b"1\r\na\r\n", b"1;a", b"\xe9", b"\xc3\xa9",
    b"\0", b"--xYzZY\r\nContent-Disposition: form-data; name=\"a%d\"\r\n\r\n"
    b"\r\n")


def with_bombs(names, options):
    """A MiB of something in the midst of a seed or at its end, until all
    have been tried or some seconds have gone."""
    name, = names
    # no more comes to the parsers of headers
    size = gos3rve.MAX_HEAD_BYTES if name == "values" else gos3rve.MIB
    pairs = [(seed, piece) for seed in TARGETS[name][1] for piece in BOMBS]
    random.Random(0).shuffle(pairs)
    world, ended = World(), time.monotonic() + options.seconds
    made, tried, most = {}, 0, (0, b"", b"")
    with world.running:
        for tried, (seed, piece) in enumerate(pairs, 1):
            at = len(seed) // (1 + tried % 2)
            bomb = made.get(piece) or b"".join(
                piece.replace(b"%d", b"%d" % number)
                for number in range(size // len(piece)))
            made[piece] = bomb
            began = time.process_time()
            run_one(world, name, seed[:at] + bomb + seed[at:])
            most = max(most, (time.process_time() - began, piece, seed[:40]))
            if time.monotonic() >= ended:
                break
    print("%s: %d of %d bombs, no finding; at most %.2f s, with %r in %r"
          % ((name, tried, len(pairs)) + most), flush=True)


ENGINES = {"hypothesis": with_hypothesis, "atheris": with_atheris,
           "bombs": with_bombs, "coverage": with_coverage}


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
