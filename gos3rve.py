#!/usr/bin/env python3
"""gos3rve: an S3 server for a directory tree, in one file.

Run ``python3 gos3rve.py`` and the directories under ``./buckets/`` are S3
buckets: files put there by hand are objects at once, objects put over S3
are plain files at once.  Standard library only, Python 3.8 to 3.14.

The rooms of this file, in order.  A room uses only rooms above it.

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

A request is read by 9, given its operation by 8, its account by 4, its
permission by 7, carried out by 8 on the bodies of 5 and the files of 6,
and sent by 9.  In a test, ``with gos3rve.serve() as s3:`` runs a server
on a free port over a temporary directory.
"""

import base64
import binascii
import bisect
import calendar
import collections
import contextlib
import copy
import email.utils
import errno
import functools
import hashlib
import heapq
import hmac
import html
import http.client
import http.server
import ipaddress
import itertools
import json
import mimetypes
import mmap
import operator
import os
import queue
import random
import re
import secrets
import selectors
import shutil
import signal
import socket
import ssl
import stat
import string
import struct
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import urllib.parse
import uuid
import xml.etree.ElementTree as ElementTree
import xml.parsers.expat
import zlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

try:
    import fcntl                # absent on Windows: locks hold in-process
    import resource
except ImportError:
    fcntl = resource = None

__version__ = "1.0.0"


###############################################################################
# 1. Constants and errors
###############################################################################
#
# What S3 fixes and what we bound, each with its source; then every error
# this server can answer.  Knows nothing of the rest of the file.

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
MAX_KEY_BYTES = 1024
# .../userguide/UsingMetadata.html: 2 KB of user-defined metadata
MAX_USER_METADATA_BYTES = 2 * KIB
# .../userguide/qfacts.html (multipart limits) and upload-objects.html
MAX_PART_NUMBER = 10000
MIN_PART_BYTES = 5 * MIB
MAX_PUT_BYTES = 5 * GIB
# .../API/API_PutObject.html, x-amz-website-redirect-location
MAX_REDIRECT_BYTES = 2 * KIB
# .../API/API_DeleteObjects.html, API_ListObjectsV2.html, API_ListBuckets.html
MAX_DELETE_KEYS = 1000
MAX_LIST_KEYS = 1000
MAX_LIST_BUCKETS = 10000
# API/RESTObjectPOST.html: "The form data and boundaries (excluding the
# contents of the file) cannot exceed 20KB"
MAX_FORM_BYTES = 20 * KIB
# .../API/sigv4-query-string-auth.html
MAX_EXPIRES_SECONDS = 7 * 24 * 3600
# .../API/RESTAuthentication.html#RESTAuthenticationTimeStamp
MAX_SKEW_SECONDS = 15 * 60

# Ours.  AWS bounds a request header at 8 KB; presigned URLs that carry
# session tokens and percent-encoded keys need more than that in one line.
MAX_HEAD_BYTES = 64 * KIB
MAX_HEADERS = 200
# 1,000 keys of 1,024 bytes, every byte written as an entity, in a Delete
MAX_XML_BYTES = 8 * MIB
MAX_XML_DEPTH = 32
MAX_JSON_DEPTH = 64
# 10,000 parts, each with its number, ETag and checksums
MAX_XML_ELEMENTS = 1 << 17
# Ours, of a bucket.json: to read 1 MiB takes up to 0.2 s, which each process
# does after each change.  A thousand rules of each kind take 2 MiB, unless
# they have many tags or long texts
MAX_CONFIG_BYTES = 3 * MIB
MAX_LINE_BYTES = 8 * KIB            # a chunk header or trailer line
MAX_SIGNATURE_CHARS = 8 * KIB       # what says who signs which headers
MAX_HOST_CHARS = 1 * KIB
BLOCK_BYTES = 256 * KIB             # unit of every large read and write
MAX_FILE_NAME_BYTES = 255           # NAME_MAX of every common file system
MAX_PATH_BYTES = 4000               # PATH_MAX, less room for `.gos3rve/...`

# hashlib's MD5 is refused in FIPS mode unless it says that it guards
# nothing; the keyword is new in 3.9.
if sys.version_info >= (3, 9):
    new_md5 = functools.partial(hashlib.md5, usedforsecurity=False)
    new_sha1 = functools.partial(hashlib.sha1, usedforsecurity=False)
else:
    new_md5, new_sha1 = hashlib.md5, hashlib.sha1

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()

# S3's code -> (HTTP status, message).  Codes and messages are those of
# docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html where AWS
# has the code, or as S3 sends them (LocalStack's snapshots).
ERRORS = {
    "AccessForbidden": (
        403, "CORSResponse: This CORS request is not allowed. This is "
             "usually because the evalution of Origin, request method / "
             "Access-Control-Request-Method or "
             "Access-Control-Request-Headers are not whitelisted by the "
             "resource's CORS spec."),
    "AccessControlListNotSupported": (
        400, "The bucket does not allow ACLs"),
    "AccessDenied": (403, "Access Denied"),
    "AuthorizationHeaderMalformed": (
        400, "The authorization header you provided is invalid."),
    "AuthorizationQueryParametersError": (
        400, "The authorization query parameters you provided are invalid."),
    "BadDigest": (
        400, "The Content-MD5 or checksum value that you specified did not "
             "match what the server received."),
    "BadRequest": (400, "Bad Request"),
    "BucketAlreadyExists": (
        409, "The requested bucket name is not available. The bucket "
             "namespace is shared by all users of the system. Select a "
             "different name and try again."),
    "BucketAlreadyOwnedByYou": (
        409, "Your previous request to create the named bucket succeeded "
             "and you already own it."),
    "BucketNotEmpty": (409, "The bucket you tried to delete is not empty"),
    "CrossLocationLoggingProhibitted": (        # so spelled by S3
        403, "Cross S3 location logging not allowed."),
    "EntityTooLarge": (
        400, "Your proposed upload exceeds the maximum allowed size"),
    "EntityTooSmall": (
        400, "Your proposed upload is smaller than the minimum allowed "
             "size"),
    "ExpiredToken": (400, "The provided token has expired."),
    "IllegalLocationConstraintException": (
        400, "The specified location constraint is incompatible with the "
             "region specific endpoint this request was sent to."),
    "IdMismatch": (
        400, "Document ID does not match the specified configuration ID."),
    "IllegalVersioningConfigurationException": (
        400, "The Versioning element must be specified"),
    "IncompleteBody": (
        400, "You did not provide the number of bytes specified by the "
             "Content-Length HTTP header."),
    "InsufficientStorage": (
        507, "There is no room left to store what you sent."),
    "InternalError": (
        500, "We encountered an internal error. Please try again."),
    "InvalidAccessKeyId": (
        403, "The AWS Access Key Id you provided does not exist in our "
             "records."),
    "InvalidArgument": (400, "Invalid Argument"),
    "InvalidBucketAclWithObjectOwnership": (
        400, "Bucket cannot have ACLs set with ObjectOwnership's "
             "BucketOwnerEnforced setting"),
    "InvalidBucketName": (400, "The specified bucket is not valid."),
    "InvalidBucketState": (
        409, "The request is not valid for the current state of the "
             "bucket."),
    "InvalidDigest": (
        400, "The Content-MD5 or checksum value that you specified is not "
             "valid."),
    "InvalidEncryptionAlgorithmError": (
        400, "The Encryption request you specified is not valid. Supported "
             "value: AES256."),
    "InvalidLocationConstraint": (
        400, "The specified location-constraint is not valid"),
    "InvalidAction": (
        400, "Could not find operation for the version requested"),
    "InvalidParameterValue": (
        400, "A value that you provided is out of its range."),
    "InvalidPart": (
        400, "One or more of the specified parts could not be found.  The "
             "part may not have been uploaded, or the specified entity tag "
             "may not match the part's entity tag."),
    "InvalidPartNumber": (
        416, "The requested partnumber is not satisfiable"),
    "InvalidPartOrder": (
        400, "The list of parts was not in ascending order. Parts must be "
             "ordered by part number."),
    "InvalidPolicyDocument": (
        400, "The content of the form does not meet the conditions "
             "specified in the policy document."),
    "InvalidRange": (416, "The requested range is not satisfiable"),
    "InvalidRedirectLocation": (
        400, "The website redirect location must have a prefix of 'http://' "
             "or 'https://' or '/'."),
    "InvalidRequest": (400, "Invalid Request"),
    "InvalidS3DestinationBucket": (400, "Invalid bucket ARN."),
    "InvalidStorageClass": (
        400, "The storage class you specified is not valid"),
    "InvalidTag": (
        400, "The tag provided was not a valid tag. This error can occur if "
             "the tag did not pass input validation."),
    "InvalidTargetBucketForLogging": (
        400, "The target bucket for logging does not exist"),
    "InvalidToken": (
        400, "The provided token is malformed or otherwise not valid."),
    "InvalidURI": (400, "Couldn't parse the specified URI."),
    "KMS.NotFoundException": (
        400, "The request was rejected because the specified entity or "
             "resource could not be found."),
    "KeyTooLongError": (400, "Your key is too long."),
    "MalformedXML": (
        400, "The XML you provided was not well-formed or did not validate "
             "against our published schema"),
    "MaxPostPreDataLengthExceeded": (
        400, "Your POST request fields preceeding the upload file was too "
             "large."),
    "MaxMessageLengthExceeded": (400, "Your request was too large."),
    "MetadataConfigurationNotFound": (
        404, "The metadata configuration does not exist."),
    "MetadataTooLarge": (
        400, "Your metadata headers exceed the maximum allowed metadata "
             "size."),
    "MalformedACLError": (
        400, "The XML you provided was not well-formed or did not validate "
             "against our published schema"),
    "MalformedPOSTRequest": (
        400, "The body of your POST request is not well-formed "
             "multipart/form-data."),
    "MalformedPolicy": (400, "Policy has invalid resource"),
    "MalformedPolicyDocument": (
        400, "The policy document was malformed."),
    "MalformedTrailerError": (
        400, "The request contained trailing data that was not well-formed "
             "or did not conform to our published schema."),
    "MethodNotAllowed": (
        405, "The specified method is not allowed against this resource."),
    "MissingAction": (
        400, "The request is missing an action or a required parameter"),
    "MissingAuthenticationToken": (
        403, "Request is missing Authentication Token"),
    "MissingContentLength": (
        411, "You must provide the Content-Length HTTP header."),
    "MissingRequestBodyError": (400, "Request Body is empty"),
    "MissingSecurityHeader": (
        400, "Your request was missing a required header"),
    "NoSuchBucket": (404, "The specified bucket does not exist"),
    "NoSuchBucketPolicy": (404, "The bucket policy does not exist"),
    "NoSuchCORSConfiguration": (
        404, "The CORS configuration does not exist"),
    "NoSuchConfiguration": (
        404, "The specified configuration does not exist."),
    "NoSuchKey": (404, "The specified key does not exist."),
    "NoSuchLifecycleConfiguration": (
        404, "The lifecycle configuration does not exist"),
    "NoSuchObjectLockConfiguration": (
        404, "The specified object does not have a ObjectLock "
             "configuration"),
    "NoSuchPublicAccessBlockConfiguration": (
        404, "The public access block configuration was not found"),
    "NoSuchTagSet": (404, "The TagSet does not exist"),
    "NoSuchUpload": (
        404, "The specified upload does not exist. The upload ID may be "
             "invalid, or the upload may have been aborted or completed."),
    "NoSuchVersion": (404, "The specified version does not exist."),
    "NoSuchWebsiteConfiguration": (
        404, "The specified bucket does not have a website configuration"),
    "NotImplemented": (
        501, "A header you provided implies functionality that is not "
             "implemented"),
    "NotModified": (304, "Not Modified"),
    "ObjectLockConfigurationNotFoundError": (
        404, "Object Lock configuration does not exist for this bucket"),
    "OperationAborted": (
        409, "A conflicting conditional operation is currently in progress "
             "against this resource. Try again."),
    "OwnershipControlsNotFoundError": (
        404, "The bucket ownership controls were not found"),
    "PackedPolicyTooLarge": (
        400, "Packed size of session tags and policy is too large."),
    "PreconditionFailed": (
        412, "At least one of the pre-conditions you specified did not "
             "hold"),
    "ReplicationConfigurationNotFoundError": (
        404, "The replication configuration was not found"),
    "RequestHeaderSectionTooLarge": (
        400, "Your request header section exceeds the maximum allowed "
             "size."),
    "RequestTimeTooSkewed": (
        403, "The difference between the request time and the server's "
             "time is too large."),
    "RequestTimeout": (
        400, "Your socket connection to the server was not read from or "
             "written to within the timeout period."),
    "ServerSideEncryptionConfigurationNotFoundError": (
        404, "The server side encryption configuration was not found"),
    "SignatureDoesNotMatch": (
        403, "The request signature we calculated does not match the "
             "signature you provided. Check your key and signing method."),
    "SlowDown": (503, "Please reduce your request rate."),
    "UnsupportedHTTPVersion": (
        505, "The HTTP version of the request is not supported."),
    "TooManyConfigurations": (
        400, "You are attempting to create a new configuration but have "
             "already reached the 1,000-configuration limit."),
    "UnexpectedContent": (400, "This request does not support content"),
    "UnresolvableGrantByEmailAddress": (
        400, "The email address you provided does not match any account on "
             "record."),
    "ValidationError": (
        400, "The input fails to satisfy the constraints of the service."),
    "XAmzContentSHA256Mismatch": (
        400, "The provided 'x-amz-content-sha256' header does not match "
             "what was computed."),
}


class S3Error(Exception):
    """An answer other than success, raised where the fault is seen.

    `code` is a key of ERRORS; `fields` are further elements of the
    <Error> document by name; `headers` go out with the answer.
    """

    def __init__(self, code, message=None, headers=None, **fields):
        self.code = code
        self.status, default = ERRORS[code]
        self.message = default if message is None else message
        self.headers = headers or {}
        self.fields = fields
        super().__init__("%s: %s" % (code, self.message))


###############################################################################
# 2. Names, dates, ranges and headers
###############################################################################
#
# Pure parsers of what stands in a request line and its headers: text in,
# plain values or S3Error out.  No files, no sockets, and no clock: the
# time is an argument.  Safe from any thread.

# docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_BUCKET_BAD = re.compile(
    r"xn--|sthree-|amzn-s3-demo-|\d+\.\d+\.\d+\.\d+\Z"
    r"|.*(?:\.\.|-s3alias\Z|--ol-s3\Z|\.mrap\Z|--x-s3\Z|--table-s3\Z)")
# A directory made by hand may bear any name that is one plain segment.
_BUCKET_DIRECTORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}\Z")


def valid_bucket_name(name):
    """True when CreateBucket may make a bucket of this name."""
    return bool(_BUCKET_NAME.match(name)) and not _BUCKET_BAD.match(name)


def usable_bucket_name(name):
    """True when a directory of this name can be served as a bucket."""
    return bool(_BUCKET_DIRECTORY.match(name))


def valid_region(name):
    """True when `name` has the shape of an AWS region or location."""
    return bool(re.match(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}\Z", name))


# --- targets, paths and queries ---

UNRESERVED = re.compile(r"[A-Za-z0-9._~/-]*\Z")
_PLAIN = re.compile(r"[A-Za-z0-9._~-]*\Z")


def uri_encode(text, safe="-_.~"):
    """Percent-encode as SigV4 and encoding-type=url do.

    Every byte of the UTF-8 form except A-Z a-z 0-9 and `safe`.
    """
    # 0.2 us, where quote() takes 1.3
    if (UNRESERVED if "/" in safe else _PLAIN).match(text):
        return text
    return urllib.parse.quote(text, safe=safe)


def uri_decode(raw):
    """The text that a percent-encoded string names; InvalidURI if none."""
    if "%" not in raw and raw.isascii():
        return raw
    try:
        # the header block was decoded as latin-1: give the bytes back
        raw = raw.encode("latin-1")
        return urllib.parse.unquote_to_bytes(raw).decode("utf-8")
    except UnicodeError:
        raise S3Error("InvalidURI") from None


def canonical_path(raw_path):
    """The canonical URI of SigV4 for a path as it stood on the wire."""
    if UNRESERVED.match(raw_path):
        return raw_path
    return uri_encode(uri_decode(raw_path), "/-_.~")


def split_target(target):
    """The raw (path, query) of a request target, RFC 9112 section 3.2."""
    if not target.startswith("/"):
        scheme, separator, rest = target.partition("://")
        if not separator or scheme.lower() not in ("http", "https"):
            raise S3Error("InvalidURI")
        rest = re.sub(r"\A[^/?]*", "", rest)
        target = rest if rest.startswith("/") else "/" + rest
    path, _, query = target.partition("?")
    return path, query


def parse_query(raw_query):
    """The (name, value) pairs of a raw query, decoded, in their order."""
    pairs = []
    for item in raw_query.split("&"):
        if item:
            name, _, value = item.replace("+", " ").partition("=")
            pairs.append((uri_decode(name), uri_decode(value)))
    return pairs


def split_path(raw_path):
    """The (bucket, key) that a path-style raw path names; "" for none."""
    bucket, _, key = raw_path[1:].partition("/")
    if not bucket and key:
        raise S3Error("InvalidBucketName")
    if "%" in raw_path or not raw_path.isascii():
        bucket, key = uri_decode(bucket), uri_decode(key)
    return bucket, checked_key(key)


def checked_key(key):
    """`key` itself when S3 allows its length, else KeyTooLongError."""
    if len(key) * 4 > MAX_KEY_BYTES:        # the cheap bound comes first
        size = len(key.encode("utf-8", "surrogatepass"))
        if size > MAX_KEY_BYTES:
            raise S3Error("KeyTooLongError", Size=size,
                          MaxSizeAllowed=MAX_KEY_BYTES)
    return key


@functools.lru_cache(maxsize=256)
def host_bucket(host, domains):
    """The bucket that a Host header names, or "" (path style).

    Only below one of `domains`, the longest one that fits, and below
    `localhost`: never for an IP address or a foreign name, so that a
    proxy's own name stays path style.
    """
    if len(host) > MAX_HOST_CHARS:      # it would be kept
        raise S3Error("BadRequest", "The Host header is too long")
    name = re.sub(r":\d*\Z", "", host).lower().rstrip(".")
    found = [domain for domain in domains + ("localhost",)
             if ("." + name).endswith("." + domain)]
    return name[:-len(max(found, key=len)) - 1] if found else ""


def parse_copy_source(value):
    """The (bucket, key, version_id or None) of x-amz-copy-source, in which
    a space may be a + (LocalStack's test_copy_object_special_character_plus_
    for_space, recorded on AWS)."""
    raw, _, version = value.partition("?versionId=")
    path = uri_decode(raw.replace("+", " "))
    bucket, _, key = path[path.startswith("/"):].partition("/")
    if not bucket or not key:
        raise S3Error(
            "InvalidArgument",
            "Copy Source must mention the source bucket and key: "
            "sourcebucket/sourcekey",
            ArgumentName="x-amz-copy-source", ArgumentValue=value)
    return bucket, checked_key(key), version or None


# --- dates ---

@functools.lru_cache(maxsize=1024)
def http_date(seconds):
    """The RFC 9110 form of a time in whole seconds since the epoch."""
    return email.utils.formatdate(_dated(seconds), usegmt=True)


@functools.lru_cache(maxsize=4096)
def iso_date(seconds):
    """The ISO 8601 form of S3's XML: with milliseconds, which are 0 as in
    Last-Modified, so that a listing and a HEAD tell the same time."""
    return "%04d-%02d-%02dT%02d:%02d:%02d.000Z" % time.gmtime(
        _dated(seconds))[:6]


def iso_time(time_ns):
    """The same with the milliseconds that there are."""
    return "%s%03dZ" % (iso_date(time_ns // 1000000000)[:-4],
                        time_ns // 1000000 % 1000)


def _dated(seconds):
    """The nearest time in the years 1 to 9999; a file may bear any."""
    return max(FIRST_DATE, min(seconds, LAST_DATE))


def parse_amz_date(text):
    """Seconds since the epoch of `YYYYMMDD'T'HHMMSS'Z'`, or None."""
    return _amz_seconds(text) if len(text) == 16 else None


@functools.lru_cache(maxsize=256)
def _amz_seconds(text):
    if text[8] != "T" or text[15] != "Z":
        return None
    digits = text[:8] + text[9:15]
    if not (digits.isascii() and digits.isdigit()):
        return None
    return _timegm(*(int(digits[i:j]) for i, j in (
        (0, 4), (4, 6), (6, 8), (8, 10), (10, 12), (12, 14))))


def _timegm(year, month, day, hour, minute, second):
    """As calendar.timegm, but None for a field out of its range."""
    if not (1970 <= year and 1 <= month <= 12 and 1 <= day <= 31
            and hour <= 23 and minute <= 59 and second <= 60):
        return None
    return calendar.timegm((year, month, day, hour, minute, second))


# 0001-01-01 and 9999-12-31: a date beyond them has no HTTP form
FIRST_DATE, LAST_DATE = -62135596800, 253402214400
_ISO_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:T(\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?"
    r"(?:Z|([+-])(\d\d):?(\d\d))?)?\Z", re.ASCII)


def parse_iso_date(text):
    """Seconds since the epoch of an ISO 8601 date or time, or None.

    A fraction is rounded up, so that no retention ends early; without a
    zone it is UTC.
    """
    match = _ISO_DATE.match(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = (
        int(number or 0) for number in match.groups()[:6])
    if not 1 <= month <= 12 or day > calendar.monthrange(year, month)[1]:
        return None
    seconds = _timegm(year, month, day, hour, minute, second)
    if seconds is None:
        return None
    fraction, sign, hours, minutes = match.groups()[6:]
    if sign:
        offset = int(hours) * 3600 + int(minutes) * 60
        seconds -= offset if sign == "+" else -offset
    return seconds + bool(int(fraction or 0))


def parse_http_date(text):
    """Seconds since the epoch of an HTTP date, or None.

    The three forms of RFC 9110 section 5.6.7, and ISO 8601 as some
    clients send it in x-amz-date.
    """
    try:
        fields = email.utils.parsedate_tz(text)
    except (IndexError, TypeError, ValueError):     # 3.8 and 3.9
        return None
    if fields is None:
        match = re.match(r"(\d{4})-?(\d\d)-?(\d\d)T(\d\d):?(\d\d):?(\d\d)"
                         r"(?:\.\d{1,9})?Z\Z", text, re.ASCII)
        return match and _timegm(*map(int, match.groups()))
    try:
        seconds = _timegm(*fields[:6])
        return None if seconds is None else seconds - fields[9]
    except (ValueError, OverflowError):
        return None


# --- ranges, entity tags and preconditions ---

_RANGE = re.compile(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*\Z",
                    re.ASCII | re.IGNORECASE)


def parse_range(value, size):
    """The (start, stop) that a Range header asks of `size` bytes.

    None when the header is to be ignored, as RFC 9110 section 14.2 asks
    for a malformed one and S3 does for several ranges (AWS: GetObject).
    InvalidRange when nothing in the object answers it.
    """
    match = _RANGE.match(value)
    if not match or len(value) > 64:
        return None
    first, last = match.groups()
    if first:
        start = int(first)
        stop = min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    elif last:
        start, stop = max(0, size - int(last)), size
        if int(last) and not size:
            return None             # satisfiable, and no 206 can say so
    else:
        return None
    if start >= size or start >= stop:
        raise S3Error("InvalidRange",
                      headers={"Content-Range": "bytes */%d" % size},
                      RangeRequested=value, ActualObjectSize=size)
    return start, stop


def etag_matches(header, etag):
    """True when an If-Match or If-None-Match list names this ETag.

    `etag` is bare; the list's may be quoted, bare or weak.
    """
    for item in header.split(","):
        item = item.strip()
        if item.startswith("W/"):
            item = item[2:]
        if item == "*" or item.strip('"') == etag:
            return True
    return False


# What a read may be made conditional on
CONDITIONS = frozenset(("if-match", "if-none-match", "if-modified-since",
                        "if-unmodified-since"))


def check_read_conditions(headers, etag, mtime, now, prefix=""):
    """Raise NotModified or PreconditionFailed as RFC 9110 13.2.2 orders.

    `mtime` is in whole seconds.  With the prefix `x-amz-copy-source-` the
    conditions are those of a copy, whose answer is 412 for all of them.
    S3 ignores an If-Modified-Since of the future, as RFC 2616 had it:
    LocalStack's test_s3_get_object_preconditions, recorded on AWS.
    """
    unchanged = "PreconditionFailed" if prefix else "NotModified"
    match = headers.get(prefix + "if-match")
    if match is not None:
        if not etag_matches(match, etag):
            raise S3Error("PreconditionFailed", Condition=prefix + "If-Match")
    else:
        limit = _condition_date(headers, prefix + "if-unmodified-since")
        if limit is not None and mtime > limit:
            raise S3Error("PreconditionFailed",
                          Condition=prefix + "If-Unmodified-Since")
    none_match = headers.get(prefix + "if-none-match")
    if none_match is not None:
        if etag_matches(none_match, etag):
            raise S3Error(unchanged, Condition=prefix + "If-None-Match")
    else:
        limit = _condition_date(headers, prefix + "if-modified-since")
        if limit is not None and mtime <= limit <= now:
            raise S3Error(unchanged, Condition=prefix + "If-Modified-Since")


def _condition_date(headers, name):
    value = headers.get(name)
    return parse_http_date(value) if value is not None else None


class WriteConditions(NamedTuple):
    """What must hold of the current object when a write is published.

    if_match: an ETag list, or None.  if_none_match: True for `*`.
    size, mtime: of the object, for DeleteObject's own headers, or None.
    """
    if_match: Optional[str] = None
    if_none_match: bool = False
    size: Optional[int] = None
    mtime: Optional[int] = None

    def check(self, info, key):
        """Raise unless they hold; `info` is the key's Info or None.

        An If-Match on a key that is absent answers 404, not 412:
        userguide/conditional-writes.html.
        """
        if self.if_none_match and info is not None:
            raise S3Error("PreconditionFailed", Condition="If-None-Match")
        if self == ALWAYS or self.if_none_match:
            return
        if info is None:
            raise S3Error("NoSuchKey", Key=key)
        if self.if_match is not None and not etag_matches(
                self.if_match, info.etag):
            raise S3Error("PreconditionFailed", Condition="If-Match")
        if self.size is not None and self.size != info.size:
            raise S3Error("PreconditionFailed",
                          Condition="x-amz-if-match-size")
        if self.mtime is not None and self.mtime != info.mtime:
            raise S3Error("PreconditionFailed",
                          Condition="x-amz-if-match-last-modified-time")


ALWAYS = WriteConditions()          # no condition at all


def write_conditions(headers):
    """The WriteConditions that a PUT, Complete or copy asks for: an
    If-Match of an ETag, or an If-None-Match of `*`."""
    match, none_match = headers.get("if-match"), headers.get("if-none-match")
    if match is None and none_match is None:
        return ALWAYS
    if match is not None and none_match is not None:
        raise S3Error("NotImplemented", Header="If-Match,If-None-Match",
                      additionalMessage="Multiple conditional request headers "
                      "present in the request")
    for name, is_bad in (
            ("If-Match", match is not None and match.strip() == "*"),
            ("If-None-Match", none_match is not None
             and none_match.strip() != "*")):
        if is_bad:
            raise S3Error("NotImplemented", Header=name,
                          additionalMessage="We don't accept the provided "
                          "value of %s header for this API" % name)
    return WriteConditions(match, none_match is not None)


def delete_conditions(if_match=None, size=None, mtime=None):
    """The WriteConditions of a delete, from header or element texts."""
    if size is not None:
        size = parse_int("Size", size, 0)
    if mtime is not None:
        mtime = parse_http_date(mtime)
        if mtime is None:
            raise S3Error("InvalidArgument",
                          "The last modified time is not a date")
    return WriteConditions(if_match, False, size, mtime)


# --- headers ---

def parse_int(name, text, low, high=1 << 62):
    """The integer in `text`, or InvalidArgument naming the parameter."""
    try:
        if not re.match(r"-?\d{1,19}\Z", text, re.ASCII):
            raise ValueError
        value = int(text)
        if value < low:
            raise ValueError
    except ValueError:
        raise S3Error("InvalidArgument",
                      "Provided %s not an integer or within integer range"
                      % name, ArgumentName=name,
                      ArgumentValue=text) from None
    return min(value, high)


# What a client may set, S3 keeps, and GET and HEAD give back.
KEPT_HEADERS = ("Content-Type", "Cache-Control", "Content-Disposition",
                "Content-Encoding", "Content-Language", "Expires",
                "x-amz-website-redirect-location")
_KEPT_HEADERS = {name.lower(): name for name in KEPT_HEADERS}

# botocore's enum StorageClass, less the ones of other services' buckets
STORAGE_CLASSES = frozenset((
    "STANDARD", "REDUCED_REDUNDANCY", "STANDARD_IA", "ONEZONE_IA",
    "INTELLIGENT_TIERING", "GLACIER", "DEEP_ARCHIVE", "GLACIER_IR",
    "EXPRESS_ONEZONE", "OUTPOSTS", "SNOW", "FSX_OPENZFS", "FSX_ONTAP"))


def kept_headers(headers):
    """The descriptive headers to store, by their standard names.

    InvalidRedirectLocation for a redirect that API_PutObject rules out.
    `aws-chunked` is a transfer coding in disguise and is not kept
    (API/sigv4-streaming.html).
    """
    if _KEPT_HEADERS.keys().isdisjoint(headers):
        return {}
    kept = {name: headers[lower] for lower, name in _KEPT_HEADERS.items()
            if headers.get(lower)}
    encoding = kept.get("Content-Encoding")
    if encoding and "aws-chunked" in encoding:
        codings = [c.strip() for c in encoding.split(",")]
        kept["Content-Encoding"] = ",".join(
            c for c in codings if c not in ("aws-chunked", ""))
        if not kept["Content-Encoding"]:
            del kept["Content-Encoding"]
    redirect = kept.get("x-amz-website-redirect-location", "/")
    if not redirect.startswith(("/", "http://", "https://")) \
            or len(redirect) > MAX_REDIRECT_BYTES:
        raise S3Error("InvalidRedirectLocation")
    return kept


def user_metadata(headers):
    """The x-amz-meta-* headers: lower-case names without the prefix."""
    if "x-amz-meta-" not in "".join(headers):   # one search is the fastest
        return {}
    meta = {name[11:]: _from_wire(value) for name, value in headers.items()
            if name.startswith("x-amz-meta-")}
    size = sum(len(n.encode()) + len(v.encode()) for n, v in meta.items())
    if size > MAX_USER_METADATA_BYTES:
        raise S3Error("MetadataTooLarge", Size=size,
                      MaxSizeAllowed=MAX_USER_METADATA_BYTES)
    return meta


def _from_wire(value):
    """A header's text: UTF-8 when its bytes are that, else latin-1."""
    if value.isascii():
        return value
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value


def metadata_header(value):
    """A user metadata value for the wire: RFC 2047 when not ASCII."""
    if value.isascii() and value.isprintable():
        return value
    encoded = base64.b64encode(value.encode("utf-8")).decode()
    return "=?UTF-8?B?%s?=" % encoded


def storage_class(headers):
    """The storage class asked for, or None for the default."""
    name = headers.get("x-amz-storage-class")
    if name is None or name == "STANDARD":
        return None
    if name not in STORAGE_CLASSES:
        raise S3Error("InvalidStorageClass", StorageClassRequested=name)
    return name


# --- JSON ---

# a string, to its end or to that of the text; else a bracket
_JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


def parse_json(text, **hooks):
    """The value of a JSON text, or of its bytes in UTF-8; hooks: those of
    json.loads.  ValueError when it is none, or deeper than MAX_JSON_DEPTH.

    json.loads recurses: RecursionError at 1,000 brackets, and in 3.13 the
    end of the process where a thread's stack is small.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    # what is nested deeper than that, and ends, takes two brackets a level
    if len(text) > 2 * MAX_JSON_DEPTH \
            and text.count("[") + text.count("{") > MAX_JSON_DEPTH \
            and _json_depth(text) > MAX_JSON_DEPTH:
        raise ValueError("nested too deep")
    if not hooks:
        try:
            value, end = _scan_json(text, 0)    # a third of what follows
            if end == len(text):
                return value
        except StopIteration:           # no JSON, or blanks before it
            pass
    return json.loads(text, **hooks)


_scan_json = json.JSONDecoder().scan_once


def fits(value, shape):
    """True for a JSON value of a shape.

    shape: a type, or a tuple of some; [shape], a list of such values;
    {name: shape}, an object where these, as far as they are there, are such
    values, and so are all others where there is the name "*"; else a
    function that tells.
    """
    kind = type(shape)
    if kind is type or kind is tuple:
        return isinstance(value, shape)
    if kind is list:
        return isinstance(value, list) and all(
            fits(item, shape[0]) for item in value)
    if kind is dict:
        others = shape.get("*", object)
        return isinstance(value, dict) and all(
            fits(item, shape.get(name, others))
            for name, item in value.items())
    return shape(value)


def is_date(value):
    """True for whole seconds since the epoch that have an HTTP form."""
    return type(value) is int and 0 <= value <= LAST_DATE


def is_word(value):
    """True for a text that breaks no header's line."""
    return isinstance(value, str) and "\n" not in value \
        and "\r" not in value


def _json_depth(text):
    """How deep the brackets of a JSON text are nested."""
    depth = most = 0
    for token in _JSON_TOKEN.findall(text):
        if token in "[{":
            depth += 1
            most = max(most, depth)
        elif token in "]}":
            depth -= 1
    return most


###############################################################################
# 3. XML
###############################################################################
#
# Documents out and in.  Knows nothing of S3's rules.  Documents are written
# here and not by xml.etree, which writes a carriage return or a control
# character of a key as it is: a parser would give another key back, or
# refuse the document.  Documents are read by expat into xml.etree's tree.

XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"
XSI = "http://www.w3.org/2001/XMLSchema-instance"
_XML_SPECIAL = re.compile("[&<>\"\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_XML_NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;",
              "\t": "\t", "\n": "\n"}


class Markup(str):
    """Text that is XML already."""


def xml_escape(text):
    """`text` as character data.  C0 controls become references, as AWS
    writes them (they need encoding-type=url to be read by most parsers).
    """
    if _XML_SPECIAL.search(text) is None:
        return text
    return _XML_SPECIAL.sub(
        lambda m: _XML_NAMED.get(m[0]) or "&#%d;" % ord(m[0]), text)


def xml_fragment(children):
    """The XML of (tag, value) pairs, as Markup.

    A value is None (no element), text, a number, a bool, Markup, or a
    list of pairs.  A tag may carry attributes: `Grantee a="b"`.
    """
    parts = []
    for tag, value in children:
        if value is None:
            continue
        if value is True or value is False:
            value = "true" if value else "false"
        elif isinstance(value, (list, tuple)):
            value = xml_fragment(value)
        elif not isinstance(value, Markup):
            value = xml_escape(str(value))
        name = tag.partition(" ")[0]
        parts.append("<%s>%s</%s>" % (tag, value, name))
    return Markup("".join(parts))


def xml_document(tag, children, xmlns=XMLNS):
    """A whole document as bytes; `children` as a value of xml_fragment."""
    root = '%s xmlns="%s"' % (tag, xmlns) if xmlns else tag
    text = '<?xml version="1.0" encoding="UTF-8"?>\n%s' % (
        xml_fragment([(root, children)]))
    return text.encode("utf-8", "replace")


def parse_xml(data, root=None):
    """The root Element of a document, its namespaces dropped.

    MissingRequestBodyError for nothing at all.  MalformedXML when it is
    not well-formed, has a DTD, nests deeper than MAX_XML_DEPTH, has more
    than MAX_XML_ELEMENTS, or has another root than `root`.
    """
    if not data:
        raise S3Error("MissingRequestBodyError")
    builder = ElementTree.TreeBuilder()
    depth = count = 0

    def start(tag, attributes):
        nonlocal depth, count
        depth += 1
        count += 1
        if depth > MAX_XML_DEPTH or count > MAX_XML_ELEMENTS:
            raise S3Error("MalformedXML")
        builder.start(tag.rpartition("}")[2], {
            name.rpartition("}")[2]: value
            for name, value in attributes.items()})

    def end(tag):
        nonlocal depth
        depth -= 1
        builder.end(tag.rpartition("}")[2])

    def refuse(*_):
        raise S3Error("MalformedXML")

    parser = xml.parsers.expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
        element = builder.close()
    except (xml.parsers.expat.ExpatError, ValueError, LookupError):
        raise S3Error("MalformedXML") from None
    if root is not None and element.tag != root:
        raise S3Error("MalformedXML")
    return element


def xml_text(element, tag, default=None):
    """The stripped text of a child, `default` when there is none."""
    child = element.find(tag)
    if child is None:
        return default
    return (child.text or "").strip()


###############################################################################
# 4. Signatures
###############################################################################
#
# Who is asking: SigV4 and SigV2, in the header and presigned, temporary
# credentials, and the chain of chunk signatures of a streaming body.  Works
# on a request's method, raw path, query and headers as they stood on the
# wire; `now` is an argument.  Any object with these attributes will do as
# `request`: method, raw_path, pairs (decoded query, in order), query (a
# dict of the first ones), headers (lower-case names, no space around their
# values), host_bucket ("" for path style).
#
# API/sig-v4-header-based-auth.html, sigv4-query-string-auth.html,
# sigv4-streaming.html, RESTAuthentication.html (SigV2).

V4 = "AWS4-HMAC-SHA256"
TOKEN_HEADER = "x-amz-security-token"
UNSIGNED = "UNSIGNED-PAYLOAD"
STREAMING_SIGNED = ("STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
                    "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER")
STREAMING_UNSIGNED = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}\Z")

# botocore's HmacV1Auth.QSAOfInterest: what SigV2 signs of a query.  Room 8
# adds what else selects an operation: a URL for one must not do for another.
V2_SIGNED = {
    "accelerate", "acl", "analytics", "cors", "defaultObjectAcl", "delete",
    "inventory", "lifecycle", "location", "logging", "metrics",
    "notification", "object-lock", "partNumber", "policy", "replication",
    "requestPayment", "response-cache-control",
    "response-content-disposition", "response-content-encoding",
    "response-content-language", "response-content-type",
    "response-expires", "restore", "select", "select-type", "storageClass",
    "tagging", "torrent", "uploadId", "uploads", "versionId", "versioning",
    "versions", "website"}


class Session(NamedTuple):
    """What temporary credentials stand for.

    issued, expires: seconds since the epoch.  role: the path and name of
    the role that was assumed, "" where the account acts as itself; name:
    the role session's.  policy: the text of a session policy, or "".
    tags: the session's, (key, value) pairs.
    """
    issued: int
    expires: int
    role: str = ""
    name: str = ""
    policy: str = ""
    tags: Tuple[Tuple[str, str], ...] = ()


class Account(NamedTuple):
    """Somebody with a key pair.  `user_id` is the canonical user id;
    session: None for a key pair that lasts."""
    key_id: str
    secret: str
    user_id: str
    user_name: str
    email: str = ""
    session: Optional[Session] = None


class Identity(NamedTuple):
    """Who sent a request, and how its body is vouched for.

    account: None for an unsigned request.  payload: the value of
    x-amz-content-sha256, or UNSIGNED-PAYLOAD.  chain: the ChunkChain of a
    body whose chunks are signed, else None.  amz_date: when SigV4 says that
    it was signed, None for SigV2.
    """
    account: Optional[Account]
    payload: str = UNSIGNED
    chain: Any = None
    amz_date: Optional[str] = None


class Scope(NamedTuple):
    """A SigV4 credential: who, and for which day, region and service."""
    key_id: str
    date: str
    region: str
    service: str

    def __str__(self):
        return "%s/%s/%s/aws4_request" % self[1:]


class Signed(NamedTuple):
    """What is the same in all SigV4 signatures of a client and a day: the
    scope, the names of the signed headers, and what follows from them.

    template: of the canonical request, for method, path, query, the
    headers' values and the payload.  blanks: values of headers that are
    not there.
    """
    scope: Scope
    scope_text: str
    names: Tuple[str, ...]
    name_set: frozenset
    template: str
    blanks: Tuple[str, ...]


@functools.lru_cache(maxsize=256)
def make_signed(scope, names):
    """The Signed of a Scope and the text of SignedHeaders."""
    # kept before anybody is known
    if names.count(";") >= MAX_HEADERS \
            or len(names) + sum(map(len, scope)) > MAX_SIGNATURE_CHARS:
        raise S3Error("RequestHeaderSectionTooLarge")
    names = tuple(names.split(";"))
    lines = [name.replace("%", "%%") for name in names]
    return Signed(scope, str(scope), names, frozenset(names), "\n".join(
        ["%s\n%s\n%s"] + [line + ":%s" for line in lines] + [
            "", ";".join(lines), "%s"]), ("",) * len(names))


def hmac_sha256(key, text):
    """The HMAC-SHA256 of a text, as bytes."""
    return hmac.digest(key, text.encode("utf-8", "surrogateescape"),
                       "sha256")


class SigningKey:
    """HMAC-SHA256 under a key of 32 bytes, of which a state is kept.

    hmac.digest() has OpenSSL look its algorithms up by name each time:
    10 us of a GET, what it drives out of the processor's caches included,
    where copies of two states take 2.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, key):
        block = int.from_bytes(key.ljust(64, b"\0"), "big")
        self._inner, self._outer = (hashlib.sha256(
            (block ^ int.from_bytes(pad * 64, "big")).to_bytes(64, "big"))
            for pad in (b"\x36", b"\x5c"))

    def sign(self, text):
        """The HMAC of a text, in hexadecimal digits."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(text.encode("utf-8", "surrogateescape"))
        outer.update(inner.digest())
        return outer.hexdigest()


@functools.lru_cache(maxsize=256)
def signing_key(secret, date, region, service):
    """The SigningKey of SigV4; it changes once a day, hence the cache."""
    key = hmac_sha256(("AWS4" + secret).encode(), date)
    for part in (region, service, "aws4_request"):
        key = hmac_sha256(key, part)
    return SigningKey(key)


def canonical_query(pairs):
    """The canonical query string of decoded pairs."""
    return "&".join("%s=%s" % pair for pair in sorted(
        (uri_encode(name), uri_encode(value)) for name, value in pairs))


def canonical_request(request, signed, payload, host=None):
    """The canonical request as text; `host` replaces the Host header."""
    pairs, values = request.pairs, map(
        request.headers.get, signed.names, signed.blanks)
    if host is not None:
        values = [host if name == "host" else value
                  for name, value in zip(signed.names, values)]
    if pairs:
        pairs = [pair for pair in pairs if pair[0] != "X-Amz-Signature"]
    text = signed.template % (
        request.method, canonical_path(request.raw_path),
        canonical_query(pairs) if pairs else "", *values, payload)
    # only values have spaces; no split(), for the sake of U+00A0
    return re.sub("  +", " ", text) if "  " in text else text


_NEW_SHA256 = hashlib.sha256()


def string_to_sign(amz_date, scope, canonical):
    """The string to sign of a canonical request."""
    # latin-1 is how the wire was decoded: this gives its bytes back
    digest = _NEW_SHA256.copy()         # sooner made than by its name
    digest.update(canonical.encode("latin-1", "replace"))
    return "%s\n%s\n%s\n%s" % (V4, amz_date, scope, digest.hexdigest())


class ChunkChain:
    """The chunk signatures of one streaming body, each over the last."""

    def __init__(self, key, amz_date, scope, seed):
        self._key, self._previous = key, seed
        self._prefix = "%s\n%s\n" % (amz_date, scope)

    def check(self, signature, sha256_hex):
        """Take the next chunk's signature, or raise."""
        self._next(signature, "%s-PAYLOAD\n%s%s\n%s\n%s" % (
            V4, self._prefix, self._previous, EMPTY_SHA256, sha256_hex))

    def check_trailer(self, signature, trailer):
        """Take the signature over the trailer's canonical bytes."""
        self._next(signature, "%s-TRAILER\n%s%s\n%s" % (
            V4, self._prefix, self._previous,
            hashlib.sha256(trailer).hexdigest()))

    def _next(self, signature, text):
        expected = self._key.sign(text)
        if not hmac.compare_digest(expected, _ascii(signature)):
            raise S3Error("SignatureDoesNotMatch", StringToSign=text,
                          SignatureProvided=signature)
        self._previous = expected


def _ascii(text):
    """compare_digest refuses other text; no signature has it anyway."""
    return text if text.isascii() else ""


def authenticate(request, accounts, now, region=None, hosts=(),
                 service="s3", payload=None):
    """The Identity behind a request, or the S3Error that AWS would give.

    accounts: key id -> Account.  now: seconds since the epoch.  region:
    the only one a scope may name, None for any.  hosts: further names
    under which a client may have signed (behind a proxy).  service: the
    one that a scope must name; others than S3 have SigV4 alone, and sign
    the SHA-256 of the body, in hex, as `payload`.
    """
    expected = accounts, now, region, hosts, service, payload
    authorization = request.headers.get("authorization")
    query, is_s3 = request.query, service == "s3"
    if authorization is not None:
        if query and ("X-Amz-Signature" in query
                      or is_s3 and "Signature" in query):
            raise S3Error("InvalidArgument",
                          "Only one auth mechanism allowed; only the "
                          "X-Amz-Algorithm query parameter, Signature "
                          "query string parameter or the Authorization "
                          "header should be specified")
        if authorization.startswith(V4):
            return _v4_header(request, expected)
        if authorization.startswith("AWS ") and is_s3:
            return _v2_header(request, accounts, now)
        raise S3Error("InvalidArgument", "Unsupported Authorization Type",
                      ArgumentName="Authorization")
    if "X-Amz-Signature" in query or "X-Amz-Algorithm" in query:
        return _v4_query(request, expected)
    if "Signature" in query and "AWSAccessKeyId" in query and is_s3:
        return _v2_query(request, accounts, now)
    payload = request.headers.get("x-amz-content-sha256", UNSIGNED)
    return Identity(None, _checked_payload(payload))


# --- temporary credentials ---

# Nothing of a session is stored.  Its token says all of it, under an HMAC
# keyed by the secret of the account that asked for it, and its secret key
# is another HMAC of the same: any process that knows the account can check
# both, and nobody else can make or change either.

TEMPORARY = "ASIA"                  # how the key ids of sessions begin
# Ours.  AWS has such a limit, and does not say which: a token has to go
# into a header or a URL.
MAX_PACKED_BYTES = 4 * KIB


def _session_hmac(account, purpose, data):
    """An HMAC under a key of the account's for this purpose alone."""
    key = hmac_sha256(account.secret.encode(),
                      "gos3rve session 1 " + purpose)
    return hmac.digest(key, data, "sha256")


def _temporary(account, key_id, session, data):
    """The Account that acts with a session's key pair."""
    secret = base64.b64encode(
        _session_hmac(account, "secret", data)[:30]).decode()
    return account._replace(key_id=key_id, secret=secret, session=session)


def issue_session(account, session):
    """New credentials of an Account for a Session: (Account, token, the
    share of MAX_PACKED_BYTES that the token takes, in percent);
    PackedPolicyTooLarge when that is over 100."""
    key_id = TEMPORARY + base64.b32encode(secrets.token_bytes(10)).decode()
    packed = zlib.compress(json.dumps((key_id,) + session).encode(), 9)
    percent = -(-100 * len(packed) // MAX_PACKED_BYTES)
    if percent > 100:
        raise S3Error("PackedPolicyTooLarge", "Packed size of session tags "
                      "consumes %d%% of allotted space." % percent)
    data = account.key_id.encode() + b"\0" + packed
    token = base64.urlsafe_b64encode(
        _session_hmac(account, "token", data) + data).decode()
    return _temporary(account, key_id, session, data), token, percent


def open_session(token, key_id, accounts, now):
    """The Account that a token and the key id with it stand for;
    InvalidToken, or ExpiredToken."""
    invalid = S3Error("InvalidToken", **{"Token-0": token})
    try:
        sealed = base64.b64decode(token.encode("ascii"), b"-_",
                                  validate=True)
    except ValueError:
        raise invalid from None
    mac, data = sealed[:32], sealed[32:]
    issuer, _, packed = data.partition(b"\0")
    account = accounts.get(issuer.decode("utf-8", "replace"))
    if account is None or not hmac.compare_digest(
            mac, _session_hmac(account, "token", data)):
        raise invalid
    # ours from here on: neither a bomb nor malformed
    own_key_id, *fields, tags = parse_json(zlib.decompress(packed))
    session = Session(*fields, tuple(map(tuple, tags)))
    if own_key_id != key_id:
        raise invalid
    if now >= session.expires:
        raise S3Error("ExpiredToken", **{"Token-0": token})
    return _temporary(account, key_id, session, data)


def _credentials(accounts, key_id, token, now):
    """The Account of a key id, and of the session token that came with it
    (None or "" for none): a lasting key pair has none, a session's is
    nothing without its own."""
    account = accounts.get(key_id)
    if account is None and token and key_id.startswith(TEMPORARY):
        return open_session(token, key_id, accounts, now)
    if account is None:
        raise S3Error("InvalidAccessKeyId", AWSAccessKeyId=key_id)
    if token:
        raise S3Error("InvalidToken", **{"Token-0": token})
    return account


# --- SigV4 ---

def _v4_header(request, expected):
    """SigV4 in the Authorization header.  expected: authenticate()'s other
    arguments, in their order."""
    accounts, now, region, hosts, service, payload = expected
    headers = request.headers
    signed, signature = _v4_authorization(headers["authorization"])
    scope = signed.scope
    payload = payload or headers.get("x-amz-content-sha256")
    if payload is None:
        raise S3Error("InvalidRequest", "Missing required header for this "
                      "request: x-amz-content-sha256")
    amz_date = headers.get("x-amz-date")
    if amz_date is None:
        amz_date = _amz_date(headers.get("date", ""))
    then = parse_amz_date(amz_date)
    if then is None:
        raise S3Error("AccessDenied", "AWS authentication requires a valid "
                      "Date or x-amz-date header")
    _check_scope(scope, amz_date, region, service,
                 "AuthorizationHeaderMalformed",
                 "The authorization header is malformed; ")
    account = _credentials(accounts, scope.key_id, headers.get(TOKEN_HEADER),
                           now)
    if abs(now - then) > MAX_SKEW_SECONDS:
        raise _too_skewed(amz_date, now)
    return _v4_verify(request, account, signed, signature, amz_date,
                      _checked_payload(payload), hosts)


def _amz_date(date):
    """An x-amz-date for a Date header; "" when it is none."""
    seconds = parse_http_date(date)
    if seconds is None:
        return ""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


def _v4_authorization(header):
    """(Signed, signature) of the header.

    What stands before the signature, which every client has last, is read
    once.
    """
    known, _, signature = header.rpartition("Signature=")
    if len(signature) != 64 or not signature.isalnum() \
            or known[-1:] not in (" ", ","):
        known, signature = header, _v4_fields(header).get("Signature")
    signed = _v4_credential(known)
    if not signature:
        raise S3Error("AuthorizationHeaderMalformed", _V4_INCOMPLETE)
    return signed, signature


_V4_INCOMPLETE = (
    "The authorization header is malformed; the authorization header "
    "requires three components: Credential, SignedHeaders, and Signature.")


def _v4_fields(header):
    """{name: value} of an Authorization header."""
    items = [item.strip().partition("=")
             for item in header[len(V4):].split(",")]
    return {name: value for name, _, value in items}


@functools.lru_cache(maxsize=256)
def _v4_credential(header):
    """The Signed of an Authorization header."""
    if len(header) > MAX_SIGNATURE_CHARS:
        raise S3Error("RequestHeaderSectionTooLarge")
    fields = _v4_fields(header)
    if not fields.get("Credential") or not fields.get("SignedHeaders"):
        raise S3Error("AuthorizationHeaderMalformed", _V4_INCOMPLETE)
    return make_signed(_scope(
        fields["Credential"], "AuthorizationHeaderMalformed",
        "The authorization header is malformed; "), fields["SignedHeaders"])


def _scope(credential, code, prefix):
    """The Scope of a credential text."""
    parts = credential.rsplit("/", 4)
    if len(parts) != 5 or not parts[0] or parts[4] != "aws4_request":
        raise S3Error(code, prefix + "the Credential is mal-formed; "
                      "expecting \"<YOUR-AKID>/YYYYMMDD/REGION/SERVICE/"
                      "aws4_request\".")
    return Scope(*parts[:4])


def _check_scope(scope, amz_date, region, service, code, prefix):
    """Raise `code` when day, region or service are not the right ones."""
    if scope.service != service:
        raise S3Error(code, prefix + "incorrect service \"%s\". This "
                      "endpoint belongs to \"%s\"."
                      % (scope.service, service))
    if region is not None and scope.region != region:
        raise S3Error(code, prefix + "the region '%s' is wrong; expecting "
                      "'%s'" % (scope.region, region), Region=region)
    if scope.date != amz_date[:8]:
        raise S3Error(code, prefix + "Invalid credential date \"%s\". This "
                      "date is not the same as X-Amz-Date: \"%s\"."
                      % (scope.date, amz_date[:8]))


def _too_skewed(text, now):
    """The S3Error for a request of another time than now."""
    return S3Error("RequestTimeTooSkewed", RequestTime=text,
                   ServerTime=iso_date(int(now)),
                   MaxAllowedSkewMilliseconds=MAX_SKEW_SECONDS * 1000)


def _checked_payload(payload):
    """x-amz-content-sha256 itself, when it is one of the known forms."""
    if (payload == UNSIGNED or _HEX_SHA256.match(payload)
            or payload == STREAMING_UNSIGNED or payload in STREAMING_SIGNED):
        return payload
    if payload.startswith("STREAMING-AWS4-ECDSA"):
        raise S3Error("NotImplemented", "SigV4A payloads are not "
                      "implemented", Header="x-amz-content-sha256")
    raise S3Error(
        "InvalidArgument", "x-amz-content-sha256 must be UNSIGNED-PAYLOAD, "
        "STREAMING-UNSIGNED-PAYLOAD-TRAILER, "
        "STREAMING-AWS4-HMAC-SHA256-PAYLOAD, "
        "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER or a valid sha256 "
        "value.", ArgumentName="x-amz-content-sha256",
        ArgumentValue=payload)


def _v4_verify(request, account, signed, signature, amz_date, payload,
               hosts):
    """Compare the signature; the Identity when it is right."""
    _check_signed_headers(request, signed)
    key = signing_key(account.secret, *signed.scope[1:])
    signature = _ascii(signature)
    first = None
    for host in (None, *hosts):
        canonical = canonical_request(request, signed, payload, host)
        text = string_to_sign(amz_date, signed.scope_text, canonical)
        if hmac.compare_digest(key.sign(text), signature):
            chain = None
            if payload in STREAMING_SIGNED:
                chain = ChunkChain(key, amz_date, signed.scope_text,
                                   signature)
            return Identity(account, payload, chain, amz_date)
        first = first or (canonical, text)
    canonical, text = first
    raise S3Error("SignatureDoesNotMatch", AWSAccessKeyId=account.key_id,
                  StringToSign=text, SignatureProvided=signature,
                  StringToSignBytes=_hex_bytes(text),
                  CanonicalRequest=canonical,
                  CanonicalRequestBytes=_hex_bytes(canonical))


def _hex_bytes(text):
    return text.encode("latin-1", "replace").hex(" ")


def _check_signed_headers(request, signed):
    """Host and every x-amz- header must be under the signature; a URL's
    does not know x-amz-content-sha256, which then says nothing (LocalStack's
    test_s3_ignored_special_headers, recorded on AWS)."""
    headers = request.headers
    unsigned = headers.keys() - signed.name_set
    if "host" not in signed.name_set:
        raise S3Error("AccessDenied", "There were headers present in the "
                      "request which were not signed",
                      HeadersNotSigned="host")
    if "x-amz-" in " ".join(unsigned):  # one search is the fastest
        if "X-Amz-Signature" in request.query and not headers.get(
                "x-amz-content-sha256", "").startswith("STREAMING"):
            unsigned -= {"x-amz-content-sha256"}
        unsigned = [name for name in headers if name in unsigned
                    and name.startswith("x-amz-")]
        if unsigned:
            raise S3Error("AccessDenied", "There were headers present in "
                          "the request which were not signed",
                          HeadersNotSigned=", ".join(unsigned))


def _v4_query(request, expected):
    """A URL presigned with SigV4."""
    accounts, now, region, hosts, service, payload = expected
    code, query = "AuthorizationQueryParametersError", request.query
    for name in ("X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Signature",
                 "X-Amz-Date", "X-Amz-SignedHeaders", "X-Amz-Expires"):
        if not query.get(name):
            raise S3Error(code, "Query-string authentication version 4 "
                          "requires the X-Amz-Algorithm, X-Amz-Credential, "
                          "X-Amz-Signature, X-Amz-Date, X-Amz-SignedHeaders,"
                          " and X-Amz-Expires parameters.")
    if [name for name, _ in request.pairs].count("X-Amz-Signature") > 1:
        raise S3Error(code, "X-Amz-Signature came more than once")
    if query["X-Amz-Algorithm"] != V4:
        raise S3Error(code, "X-Amz-Algorithm only supports "
                      "\"AWS4-HMAC-SHA256\"")
    prefix = "Error parsing the X-Amz-Credential parameter; "
    scope = _scope(query["X-Amz-Credential"], code, prefix)
    amz_date = query["X-Amz-Date"]
    then = parse_amz_date(amz_date)
    if then is None:
        raise S3Error(code, "X-Amz-Date must be in the ISO8601 Long Format "
                      "\"yyyyMMdd'T'HHmmss'Z'\"")
    _check_scope(scope, amz_date, region, service, code, prefix)
    token = query.get("X-Amz-Security-Token") or request.headers.get(
        TOKEN_HEADER)
    account = _credentials(accounts, scope.key_id, token, now)
    _check_expiry(query["X-Amz-Expires"], then, now, code)
    signed = make_signed(scope, query["X-Amz-SignedHeaders"])
    payload = payload or query.get("X-Amz-Content-Sha256")
    if not payload and "x-amz-content-sha256" in signed.name_set:
        payload = request.headers.get("x-amz-content-sha256")
    return _v4_verify(request, account, signed, query["X-Amz-Signature"],
                      amz_date, _checked_payload(payload or UNSIGNED), hosts)


def _check_expiry(expires, then, now, code):
    """Raise unless a presigned URL made at `then` is valid at `now`."""
    if not re.match(r"-?\d{1,12}\Z", expires, re.ASCII):
        raise S3Error(code, "X-Amz-Expires should be a number")
    seconds = int(expires)
    if seconds < 0:
        raise S3Error(code, "X-Amz-Expires must be non-negative")
    if seconds > MAX_EXPIRES_SECONDS:
        raise S3Error(code, "X-Amz-Expires must be less than a week (in "
                      "seconds); that is, the given X-Amz-Expires must be "
                      "less than 604800 seconds")
    if then - now > MAX_SKEW_SECONDS:
        raise S3Error("AccessDenied", "Request is not valid yet",
                      ServerTime=iso_date(int(now)))
    _check_expired(then + seconds, now, expires)


def _check_expired(end, now, expires):
    if now > end:
        raise S3Error("AccessDenied", "Request has expired",
                      **{"X-Amz-Expires": expires,
                         "Expires": iso_date(end),
                         "ServerTime": iso_date(int(now))})


# --- SigV2 ---

def _v2_header(request, accounts, now):
    """SigV2 in the Authorization header: `AWS key_id:signature`."""
    headers = request.headers
    key_id, separator, signature = headers["authorization"][4:] \
        .strip().rpartition(":")
    if not separator or not key_id:
        raise S3Error("InvalidArgument", "AWS authorization header is "
                      "invalid.  Expected AwsAccessKeyId:signature",
                      ArgumentName="Authorization")
    account = _credentials(accounts, key_id,
                           headers.get(TOKEN_HEADER), now)
    text = headers.get("x-amz-date", headers.get("date", ""))
    then = parse_http_date(text)
    if then is None or then < 0:
        raise S3Error("AccessDenied", "AWS authentication requires a valid "
                      "Date or x-amz-date header")
    if abs(now - then) > MAX_SKEW_SECONDS:
        raise _too_skewed(text, now)
    date = "" if "x-amz-date" in headers else headers.get("date", "")
    return _v2_verify(request, account, date, signature)


def is_presigned(query):
    """True for the query of a presigned URL."""
    return "X-Amz-Signature" in query or "Signature" in query


def url_headers(request):
    """The headers that a presigned URL carries in its query.

    S3 takes them from there as if they had been sent: SDKs for JavaScript,
    Java, Ruby and Go put metadata and the like into the URL (aws-sdk-js-v3
    issue 4694, aws-sdk-ruby issue 1808), botocore with SigV2 too.  A
    checksum is none of them: no SDK can know it (LocalStack's
    presigned_url.py).
    """
    headers, known = {}, ("if-match", "if-none-match")
    if "Signature" in request.query:
        known += "content-type", "content-md5"
    for name, value in request.pairs:
        lower = name.lower()
        if lower not in known and (
                not lower.startswith("x-amz-") or lower in _URL_OWN
                or lower.startswith("x-amz-checksum-")):
            continue
        if not value.isprintable():
            raise S3Error("InvalidArgument", ArgumentName=name,
                          ArgumentValue=value)
        headers.setdefault(lower, value.encode("utf-8").decode("latin-1"))
    return headers


# Parameters that say how a URL is signed or a body is framed
_URL_OWN = frozenset((
    "x-amz-algorithm", "x-amz-credential", "x-amz-date", "x-amz-expires",
    "x-amz-signedheaders", "x-amz-signature", "x-amz-content-sha256",
    "x-amz-decoded-content-length", "x-amz-sdk-checksum-algorithm",
    "x-amz-trailer", "x-amz-user-agent"))


def _v2_query(request, accounts, now):
    """A URL presigned with SigV2."""
    query = request.query
    token = query.get(TOKEN_HEADER) or request.headers.get(TOKEN_HEADER)
    account = _credentials(accounts, query["AWSAccessKeyId"], token, now)
    expires = query.get("Expires", "")
    if not re.match(r"\d{1,12}\Z", expires, re.ASCII):
        raise S3Error("AccessDenied", "Invalid date (should be seconds "
                      "since epoch): %s" % expires)
    _check_expired(int(expires), now, expires)
    return _v2_verify(request, account, expires, query["Signature"],
                      url_headers(request))


def _v2_verify(request, account, date, signature, more=()):
    """Compare a SigV2 signature; the Identity when it is right.

    more: a URL's headers, which are signed as if they had been sent
    (botocore's HmacV1QueryAuth)."""
    headers = dict(more, **request.headers)
    lines = [request.method, headers.get("content-md5", ""),
             headers.get("content-type", ""), date]
    lines += ["%s:%s" % (name, headers[name].strip(" "))
              for name in sorted(headers) if name.startswith("x-amz-")]
    texts = ["\n".join(lines + [resource])
             for resource in _v2_resources(request)]
    expected = [_v2_signature(account.secret, text) for text in texts]
    if not any(hmac.compare_digest(one, _ascii(signature))
               for one in expected):
        raise S3Error("SignatureDoesNotMatch", StringToSign=texts[0],
                      AWSAccessKeyId=account.key_id,
                      SignatureProvided=signature,
                      StringToSignBytes=_hex_bytes(texts[0]))
    payload = headers.get("x-amz-content-sha256", UNSIGNED)
    if payload in STREAMING_SIGNED:
        raise S3Error("InvalidRequest", "A streaming payload needs an "
                      "AWS4-HMAC-SHA256 signature")
    return Identity(account, _checked_payload(payload))


def _v2_signature(secret, text):
    return base64.b64encode(hmac.digest(
        secret.encode(), text.encode("latin-1", "replace"), "sha1")).decode()


def _v2_resources(request):
    """The CanonicalizedResource of RESTAuthentication.html, as the target
    has it and, for a bucket, with the `/` at its end that botocore signs
    (HmacV1Auth, auth_path) whether it sends it or not."""
    path, query = request.raw_path, ""
    if request.host_bucket:
        path = "/%s%s" % (request.host_bucket, path)
    signed = sorted(p for p in request.pairs if p[0] in V2_SIGNED)
    if signed:
        query = "?" + "&".join(
            "%s=%s" % pair if pair[1] else pair[0]
            for pair in signed).encode("utf-8").decode("latin-1")
    paths = [path] if "/" in path[1:] else [path, path + "/"]
    return [path + query for path in paths]


# --- POST forms ---

def missing_field(name):
    """The S3Error for a form without a field that it needs."""
    return S3Error("InvalidArgument", "Bucket POST must contain a field "
                   "named '%s'.  If it is specified, please check the order "
                   "of the fields." % name,
                   ArgumentName=name, ArgumentValue="")


# What a signed form carries, in the order in which S3 misses them
_V4_FIELDS = ("X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date",
              "X-Amz-Signature", "Policy")
_V2_FIELDS = ("AWSAccessKeyId", "Signature", "Policy")


def authenticate_form(fields, accounts, now, region=None):
    """The Identity behind a form, or the S3Error that AWS would give.

    fields: lower-case name -> text.  accounts, now, region: as for
    authenticate().  Unsigned when none of the fields of a signature is
    there, the policy aside.  The string to sign is the policy as it came:
    API/sigv4-authentication-HTTPPOST.html.
    """
    for names, verify in ((_V4_FIELDS, _v4_form), (_V2_FIELDS, _v2_form)):
        if any(name.lower() in fields for name in names[:-1]):
            for name in names:
                if not fields.get(name.lower()):
                    raise missing_field(name)
            return Identity(verify(fields, accounts, now, region),
                            amz_date=fields.get("x-amz-date"))
    return Identity(None)


def _v4_form(fields, accounts, now, region):
    """The Account whose SigV4 a form carries."""
    algorithm, credential = fields["x-amz-algorithm"], fields[
        "x-amz-credential"]
    if algorithm != V4:
        raise S3Error("InvalidArgument", "X-Amz-Algorithm only supports "
                      "\"AWS4-HMAC-SHA256\"", ArgumentName="X-Amz-Algorithm",
                      ArgumentValue=algorithm)
    amz_date = fields["x-amz-date"]
    then = parse_amz_date(amz_date)
    if then is None:
        raise S3Error("InvalidArgument", "X-Amz-Date must be formated via "
                      "ISO8601 Long format", ArgumentName="X-Amz-Date",
                      ArgumentValue=amz_date)
    try:
        scope = _scope(credential, "InvalidArgument", "")
        _check_scope(scope, amz_date, region, "s3", "InvalidArgument", "")
    except S3Error as error:
        error.fields.update(ArgumentName="X-Amz-Credential",
                            ArgumentValue=credential)
        raise
    account = _credentials(accounts, scope.key_id,
                           fields.get(TOKEN_HEADER), now)
    key = signing_key(account.secret, *scope[1:])
    _compare_form(fields["x-amz-signature"],
                  key.sign(fields["policy"]), account, fields)
    # userguide/bucket-policy-s3-sigv4-conditions.html: "the signatures are
    # also valid for up to seven days"
    if now - then > MAX_EXPIRES_SECONDS:
        raise policy_refusal("Policy expired.")
    return account


def _v2_form(fields, accounts, now, _region):
    """The Account whose SigV2 a form carries."""
    account = _credentials(accounts, fields["awsaccesskeyid"],
                           fields.get(TOKEN_HEADER), now)
    _compare_form(fields["signature"],
                  _v2_signature(account.secret, fields["policy"]), account,
                  fields)
    return account


def _compare_form(signature, expected, account, fields):
    """Raise SignatureDoesNotMatch unless they are the same."""
    if not hmac.compare_digest(expected, _ascii(signature)):
        raise S3Error("SignatureDoesNotMatch", AWSAccessKeyId=account.key_id,
                      StringToSign=fields["policy"],
                      SignatureProvided=signature,
                      StringToSignBytes=_hex_bytes(fields["policy"]))


def policy_refusal(text):
    """The S3Error for a form that its own policy refuses."""
    return S3Error("AccessDenied", "Invalid according to Policy: " + text)


###############################################################################
# 5. Bodies and checksums
###############################################################################
#
# From the bytes on the wire to the bytes of an object.  Readers take a
# `source` with read(n) -> 1 to n bytes, b"" at its end, and
# readline(limit); they give bytes, hold one block at most, and say
# IncompleteBody when the source ends too soon.  No files, no sockets.

# --- digests ---

# CRC-32C and CRC-64/NVME have no C code in the standard library.  A CRC is
# a remainder of polynomials over GF(2), and int.from_bytes(data, "little")
# is the data as such a polynomial: bit 0 is the highest power, one bit to
# the left divides by x.  Python's integers shift and XOR long runs of bits
# at the speed of C, so the first k bits of a message are folded onto the
# bits after them by a few shifts, as x^k == product of (1 + x^-s + ...)
# modulo the CRC's polynomial (a sparse multiple of it).  The multiples were
# found offline: CRC-32C's by a meet in the middle on the XORs of two halves
# of the shifts, CRC-64's by adding discrete logarithms of the factors
# (2^64-1 is smooth) until the sum is a small k.  Squaring an equation
# doubles k and all the shifts, so that each stands for a ladder of them.

class Crc:
    """A reflected CRC whose initial and final XOR are all ones.

    Its tables are made at the first use: that of all would cost every
    start 2 ms.
    """

    def __init__(self, width, polynomial, largest, multiples):
        self.width, self.ones = width, (1 << width) - 1
        self._polynomial = polynomial
        self._largest, self._multiples = largest, multiples

    @functools.cached_property
    def table(self):
        """The remainder of each byte."""
        table = []
        for value in range(256):
            for _ in range(8):
                value = value >> 1 ^ (self._polynomial if value & 1 else 0)
            table.append(value)
        return table

    @functools.cached_property
    def powers(self):
        """x^8, its square, and so on."""
        powers = [1 << self.width - 9]
        for _ in range(63):
            powers.append(self._multiply(powers[-1], powers[-1]))
        return powers

    @functools.cached_property
    def steps(self):
        """All (least bits, bits folded, their mask, factors), long first."""
        steps, limit = [], self._largest
        for bits, factors in sorted(self._multiples, reverse=True):
            scale, rungs = 1, []
            while bits * scale <= limit:
                scaled = [tuple(s * scale for s in f) for f in factors]
                k, reach = bits * scale, sum(map(max, scaled))
                rungs.append((2 * k + reach, k, (1 << k) - 1, scaled))
                scale *= 2
            steps += rungs[::-1]
            limit = bits - 1
        return steps

    @staticmethod
    def _fold(message, step):
        """The message without its first bits, which are folded onto it."""
        _, bits, mask, factors = step
        low = message & mask
        for shifts in factors:
            total = low
            for shift in shifts:
                total ^= low << shift
            low = total
        return message >> bits ^ low

    def update(self, data, value=0):
        """The CRC of data, or of more data after that of `value`."""
        fold, view = self._fold, memoryview(data).cast('B')
        left, start = 8 * view.nbytes, 0
        message = value ^ self.ones
        least, bits = self.steps[0][:2]
        while left >= least:                    # in pieces the caches hold
            end = start + bits // 8
            message ^= int.from_bytes(view[start:end], 'little')
            message = fold(message, self.steps[0])
            start, left = end, left - bits
        message ^= int.from_bytes(view[start:], 'little')
        for step in self.steps:
            while left >= step[0]:
                message = fold(message, step)
                left -= step[1]
        return self._remainder(message, left) ^ self.ones

    def _remainder(self, message, bits):
        """The register after the first bits of the message, bytewise."""
        table, crc, count = self.table, 0, bits // 8
        for byte in (message & (1 << bits) - 1).to_bytes(count, 'little'):
            crc = table[(crc ^ byte) & 255] ^ crc >> 8
        return crc ^ message >> bits

    def _multiply(self, a, b):
        """a * b modulo the polynomial."""
        product = 0
        while a:
            bit = a & -a
            product ^= b * bit
            a ^= bit
        return self._remainder(product << 1, self.width)

    def combine(self, first, second, length):
        """The CRC of two parts, from theirs and the second one's length."""
        for n in range(0, length.bit_length(), 8):
            if length >> n & 255:
                first = self._multiply(first, _shift(
                    self, n, length >> n & 255))
        return first ^ second


@functools.lru_cache(maxsize=4096)
def _shift(crc, n, count):
    """What moves a register over count * 2 ** n zero bytes, count < 256:
    bit by bit 10,000 parts of as many sizes took 1.3 s."""
    return functools.reduce(crc._multiply, (
        crc.powers[n + bit] for bit in range(8) if count >> bit & 1))


CRC32 = Crc(32, 0xEDB88320, 0, [])        # to combine; zlib has update
CRC32C = Crc(32, 0x82F63B78, 1 << 18, [
    (176, [(13, 21, 28, 29, 44, 68)]),
    (1224, [(9, 23, 84, 119)]),
    (29024, [(625, 1120)])])
CRC64NVME = Crc(64, 0x9A6C9329AC4BC9B5, 1 << 18, [
    (256, [(4, 63), (17, 34), (33, 110), (1, 38), (82, 87), (18, 33)]),
    (7376, [(115, 147), (87, 340), (8, 254), (124, 278)]),
    (129168, [(6902,), (4279,), (3135,), (16352,)])])


class CrcDigest:
    """A Crc with hashlib's manner: update(data), digest()."""

    def __init__(self, crc, data=b""):
        self._crc, self._value = crc, 0
        self.update(data)

    def update(self, data):
        """Take more data."""
        if self._crc is CRC32:
            self._value = zlib.crc32(data, self._value)
        else:
            self._value = self._crc.update(data, self._value)

    def digest(self):
        """The big-endian bytes, as S3 encodes them."""
        return self._value.to_bytes(self._crc.width // 8, "big")


class Algorithm(NamedTuple):
    """A digest that S3 knows: its maker, its bytes, its Crc or None."""
    new: Callable
    size: int
    crc: Any = None


DIGESTS = {
    "MD5": Algorithm(new_md5, 16),
    "SHA1": Algorithm(new_sha1, 20),
    "SHA256": Algorithm(hashlib.sha256, 32),
    "SHA512": Algorithm(hashlib.sha512, 64),
    "CRC32": Algorithm(functools.partial(CrcDigest, CRC32), 4, CRC32),
    "CRC32C": Algorithm(functools.partial(CrcDigest, CRC32C), 4, CRC32C),
    "CRC64NVME": Algorithm(functools.partial(CrcDigest, CRC64NVME), 8,
                           CRC64NVME),
}
# userguide/checking-object-integrity.html.  botocore names three more: the
# standard library has none of them.
CHECKSUMS = ("CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256", "SHA512",
             "MD5")
UNDONE_CHECKSUMS = ("XXHASH64", "XXHASH3", "XXHASH128")
CHECKSUM_HEADERS = {"x-amz-checksum-" + name.lower(): name
                    for name in CHECKSUMS}
_CHECKSUM_WORDS = frozenset((
    "x-amz-checksum-algorithm", "x-amz-checksum-mode",
    "x-amz-checksum-type"))


def checksum_algorithm(name):
    """`name` in S3's spelling; raise when it is unknown or not done."""
    upper = name.upper()
    if upper in CHECKSUMS:
        return upper
    if upper in UNDONE_CHECKSUMS:
        raise S3Error("NotImplemented",
                      "The checksum algorithm %s is not implemented" % upper)
    raise S3Error("InvalidRequest", "Checksum algorithm provided is "
                  "unsupported. Please try again with any of the valid "
                  "types: [%s]" % ", ".join(CHECKSUMS))


def composite_checksum(name, digests):
    """S3's checksum of checksums, as `base64-N`."""
    data = DIGESTS[name].new(b"".join(digests)).digest()
    return "%s-%d" % (base64.b64encode(data).decode(), len(digests))


def combined_crc(name, parts):
    """The base64 CRC of a whole from its parts' (digest, size)."""
    crc, value = DIGESTS[name].crc, 0
    for digest, size in parts:
        value = crc.combine(value, int.from_bytes(digest, "big"), size)
    return base64.b64encode(value.to_bytes(
        DIGESTS[name].size, "big")).decode()


def decode_digest(text, size):
    """The bytes of a base64 digest of `size` bytes, or None."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeError, binascii.Error):
        return None
    return data if len(data) == size else None


# --- readers ---

class LengthReader:
    """`length` bytes of a source."""

    def __init__(self, source, length):
        self._source, self.left = source, length

    def read(self, size):
        """1 to `size` bytes, b"" at the end."""
        if not self.left:
            return b""
        data = self._source.read(min(size, self.left))
        if not data:
            raise S3Error("IncompleteBody")
        self.left -= len(data)
        return data


class LineReader:
    """read and readline over a reader that has only read."""

    def __init__(self, reader):
        self._reader, self._buffer = reader, b""

    def read(self, size):
        """1 to `size` bytes, b"" at the end."""
        data = self._buffer
        if not data:
            return self._reader.read(size)
        self._buffer = data[size:]
        return data[:size]

    def readline(self, limit):
        """A line with its end, or what there is up to `limit` bytes."""
        line = self._buffer
        while b"\n" not in line and len(line) < limit:
            data = self._reader.read(limit)
            if not data:
                break
            line += data
        end = line.find(b"\n") + 1 or min(limit, len(line))
        self._buffer = line[end:]
        return line[:end]


def read_line(source):
    """A CRLF line without its end; raise when there is none."""
    line = source.readline(MAX_LINE_BYTES)
    if not line.endswith(b"\r\n"):
        if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
            raise S3Error("IncompleteBody")
        raise S3Error("InvalidRequest", "A line of the chunked body is "
                      "malformed")
    return line[:-2]


def chunk_size(text):
    """The number that a chunk header's hexadecimal digits say."""
    if not re.match(rb"[0-9A-Fa-f]{1,15}\Z", text):
        raise S3Error("InvalidRequest", "A chunk size of the body is "
                      "malformed")
    return int(text, 16)


# RFC 9110 section 5: a token, a colon, visible text
FIELD_LINE = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*"
_TRAILER_LINE = re.compile(FIELD_LINE + rb"\Z")
# What stands in an extension is left alone, but for control characters: a
# bare CR in it ends the line for some readers ("Funky chunks", 2025)
_CHUNK_HEADER = re.compile(
    rb"([^\t ;]*)[\t ]*(?:;[\t\x20-\x7e\x80-\xff]*)?\Z")


class ChunkedReader:
    """Transfer-Encoding: chunked, RFC 9112 section 7.1."""

    def __init__(self, source):
        self._source = source
        self._chunk = None              # bytes left in this chunk
        self.left = None                # unknown; 0 after the last chunk

    def read(self, size):
        """1 to `size` bytes, b"" at the end."""
        if self.left == 0:
            return b""
        if self._chunk is None:
            header = _CHUNK_HEADER.match(read_line(self._source))
            self._chunk = chunk_size(header[1] if header else b"")
            if self._chunk == 0:
                self._trailer()
                return b""
        data = self._source.read(min(size, self._chunk))
        if not data:
            raise S3Error("IncompleteBody")
        self._chunk -= len(data)
        if self._chunk == 0:
            if read_line(self._source):
                raise S3Error("InvalidRequest", "A chunk of the body is "
                              "longer than its size")
            self._chunk = None
        return data

    def _trailer(self):
        for _ in range(MAX_HEADERS):
            line = read_line(self._source)
            if not line:
                self.left = 0
                return
            if not _TRAILER_LINE.match(line):
                raise S3Error("InvalidRequest", "A trailer of the body is "
                              "malformed")
        raise S3Error("RequestHeaderSectionTooLarge")


class AwsChunkedReader:
    """The aws-chunked coding, API/sigv4-streaming.html and -trailers.

    chain: a ChunkChain when the chunks are signed.  trailers: the names
    that x-amz-trailer promised; after the end they stand in `trailer`.
    """

    def __init__(self, source, chain=None, trailers=(), signed_trailer=False):
        self._source, self._chain = source, chain
        self._promised, self._signed_trailer = trailers, signed_trailer
        self._chunk, self._sha256, self._signature = None, None, ""
        self._ended = False
        self.trailer = {}

    def read(self, size):
        """1 to `size` bytes, b"" at the end."""
        if self._ended:
            return b""
        if self._chunk is None:
            self._header()
            if self._chunk == 0:
                self._finish_chunk()
                self._read_trailer()
                self._source.read(1)    # the end of chunks around us
                self._ended = True
                return b""
        data = self._source.read(min(size, self._chunk))
        if not data:
            raise S3Error("IncompleteBody")
        self._chunk -= len(data)
        if self._chain:
            self._sha256.update(data)
        if self._chunk == 0:
            self._finish_chunk()
            if read_line(self._source):
                raise S3Error("InvalidRequest", "A chunk of the body is "
                              "longer than its size")
            self._chunk = None
        return data

    def _header(self):
        size, _, rest = read_line(self._source).partition(b";")
        self._chunk = chunk_size(size)
        if self._chain:
            name, _, value = rest.partition(b"=")
            if name != b"chunk-signature":
                raise S3Error("InvalidRequest",
                              "A chunk of the body has no signature")
            self._signature = value.decode("latin-1")
            self._sha256 = hashlib.sha256()

    def _finish_chunk(self):
        if self._chain:
            self._chain.check(self._signature, self._sha256.hexdigest())

    def _read_trailer(self):
        """Trailer lines up to the empty one (or the end of the body)."""
        canonical, signature = b"", None
        signed = self._chain and self._signed_trailer
        for _ in range(MAX_HEADERS):
            # minio-go 7 ends a line with \n\r\n before the signature's
            line = self._trailer_line() or (
                signed and signature is None and self._trailer_line())
            if not line:
                break
            name, separator, value = line.partition(b":")
            name = name.strip().lower().decode("latin-1")
            value = value.strip()
            if not separator:
                raise S3Error("MalformedTrailerError")
            if name == "x-amz-trailer-signature":
                signature = value.decode("latin-1")
                continue
            self.trailer[name] = value.decode("latin-1")
            canonical += b"%s:%s\n" % (name.encode("latin-1"), value)
        else:
            raise S3Error("MalformedTrailerError")
        if set(self.trailer) != set(self._promised):
            raise S3Error("MalformedTrailerError")
        if signed:
            if signature is None:
                raise S3Error("MalformedTrailerError")
            self._chain.check_trailer(signature, canonical)

    def _trailer_line(self):
        # Some SDKs end the trailer with the body and not with an empty
        # line, or the line before it with a bare LF (minio-go's notes).
        line = self._source.readline(MAX_LINE_BYTES)
        if len(line) >= MAX_LINE_BYTES:
            raise S3Error("MalformedTrailerError")
        return line.rstrip(b"\r\n")


# --- bodies ---

OVERLAP_BYTES = MIB                 # from here on a thread for the digests
MAX_HASH_BLOCKS = 4                 # that wait for it
# The cores that this process may use, as it was started; none where the
# system, or a filter of system calls, does not tell.
CORES = []
with contextlib.suppress(AttributeError, OSError):
    CORES = sorted(os.sched_getaffinity(0))


def run_on(cores):
    """Keep the calling thread, and those that it starts, to some cores;
    nothing happens where that is not to be had."""
    if cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)


class HashThread:
    """Digests a body in a thread of its own, while the next block is
    received and the last one is written: hashlib lets go of the GIL.

    MD5 alone, at 0.7 GB/s, takes more time than all the rest of a large
    PUT; with this it is all that a PUT takes, as long as there is a
    second core.
    """

    def __init__(self, digests):
        self._digests, self._error = list(digests), None
        self._blocks = queue.SimpleQueue()
        self._room = threading.Semaphore(MAX_HASH_BLOCKS)
        self._thread = threading.Thread(target=self._run, name="digests",
                                        daemon=True)

    @classmethod
    def start(cls, digests):
        """A running one; False where no more threads are to be had."""
        found = cls(digests)
        try:
            found._thread.start()
        except RuntimeError:
            return False
        return found

    def update(self, block):
        """Take the next block, which must not change any more."""
        self._room.acquire()
        self._blocks.put(block)

    def finish(self):
        """Wait until all blocks are in the digests."""
        if self._thread.is_alive():
            self._blocks.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self):
        run_on(CORES)                   # not on the core of its worker alone
        for block in iter(self._blocks.get, None):
            try:
                for digest in self._digests:
                    digest.update(block)
            except Exception as error:      # MemoryError: finish() tells
                self._error = error
            self._room.release()


class Claim(NamedTuple):
    """What the client says a digest of the body is.

    expected: the digest's bytes, or None when the trailer tells.
    header: the name that said so.
    """
    algorithm: str
    expected: Optional[bytes]
    header: str


class Body:
    """The payload of one request: read once, verified before its end.

    length: the bytes to come, None when unknown.  claims: the Claims to
    verify.  checksum: the name of the x-amz-checksum algorithm that the
    client uses, or None.
    """

    def __init__(self, reader, length, claims=(), checksum=None):
        self._reader, self.length = reader, length
        self._claims, self.checksum = claims, checksum
        self._hashes = {}
        for claim in claims:
            self._hashes[claim.algorithm] = DIGESTS[claim.algorithm].new()
        self._thread = None
        self.received = 0

    def want(self, *algorithms):
        """Compute these digests too; before the first block."""
        for name in algorithms:
            if name and name not in self._hashes:
                self._hashes[name] = DIGESTS[name].new()

    def digest(self, algorithm):
        """A digest of the whole body, as bytes; after the last block."""
        return self._hashes[algorithm].digest()

    def blocks(self, size=BLOCK_BYTES):
        """The body in blocks of `size` bytes, the last one shorter.

        The last block comes only once every claim about the body has held:
        what fits one block is never seen unverified.
        """
        try:
            block = self._block(size)
            while block:
                following = self._block(size) if len(block) == size else b""
                if not following:
                    self._verify()
                yield block
                block = following
            if not self.received:
                self._verify()
        finally:
            self._end_thread()

    def _block(self, size):
        """`size` bytes, fewer at the end; digested."""
        data = self._reader.read(size)
        if 0 < len(data) < size and self.received + len(data) != self.length:
            pieces, have = [data], len(data)
            while have < size:
                data = self._reader.read(size - have)
                if not data:
                    break
                pieces.append(data)
                have += len(data)
                if len(pieces) > 1000:  # each takes 33 bytes, and its own
                    pieces = [b"".join(pieces)]
            data = b"".join(pieces)
        self.received += len(data)
        if self._thread is None and self.received > OVERLAP_BYTES:
            self._thread = HashThread.start(self._hashes.values())
        if self._thread:
            self._thread.update(data)
        else:
            for digest in self._hashes.values():
                digest.update(data)
        return data

    def _end_thread(self):
        """Wait for the digests of what was read."""
        if self._thread:
            self._thread.finish()

    def read_all(self, limit=MAX_XML_BYTES):
        """The whole verified body, or MaxMessageLengthExceeded."""
        if self.length is not None and self.length > limit:
            raise S3Error("MaxMessageLengthExceeded", MaxSizeAllowed=limit)
        parts = []
        for block in self.blocks():
            parts.append(block)
            if self.received > limit:
                raise S3Error("MaxMessageLengthExceeded",
                              MaxSizeAllowed=limit)
        return b"".join(parts)

    def _verify(self):
        """Raise unless length, trailer and claims hold."""
        if self._reader.read(1) or (self.length is not None
                                    and self.received != self.length):
            raise S3Error("IncompleteBody")
        self._end_thread()
        trailer = getattr(self._reader, "trailer", {})
        for name, expected, header in self._claims:
            actual = self._hashes[name].digest()
            if expected is None:
                expected = decode_digest(trailer.get(header, ""),
                                         DIGESTS[name].size)
            if expected != actual:
                raise _mismatch(name, expected, actual, header)


def _mismatch(name, expected, actual, header):
    """The S3Error for a digest that is not what the client claimed."""
    if header == "x-amz-content-sha256":
        return S3Error("XAmzContentSHA256Mismatch",
                       ClientComputedContentSHA256=expected.hex(),
                       S3ComputedContentSHA256=actual.hex())
    encoded = base64.b64encode(actual).decode()
    if header == "content-md5":
        return S3Error("BadDigest", "The Content-MD5 you specified did not "
                       "match what we received.",
                       ExpectedDigest=base64.b64encode(expected).decode(),
                       CalculatedDigest=encoded)
    if expected is None:
        return S3Error("InvalidRequest",
                       "Value for %s trailing header is invalid." % header)
    return S3Error("BadDigest", "The %s you specified did not match the "
                   "calculated checksum." % name, CalculatedDigest=encoded)


def body_claims(headers, payload, with_checksum=True):
    """The (claims, checksum algorithm or None) that the headers make.

    with_checksum: x-amz-checksum-* speak of this body.
    """
    claims = []
    if len(payload) == 64:
        claims.append(Claim("SHA256", bytes.fromhex(payload),
                            "x-amz-content-sha256"))
    md5 = headers.get("content-md5")
    if md5 is not None:
        expected = decode_digest(md5, 16)
        if expected is None:
            raise S3Error("InvalidDigest", "The Content-MD5 you specified "
                          "was invalid.", **{"Content-MD5": md5})
        claims.append(Claim("MD5", expected, "content-md5"))
    claim = _checksum_claim(headers) if with_checksum else None
    if claim:
        claims.append(claim)
        return claims, claim.algorithm
    return claims, None


def _checksum_claim(headers):
    """The Claim of an x-amz-checksum- header or promised trailer."""
    found, promised = (), ()
    if "x-amz-checksum-" in "".join(headers):   # one search is the fastest
        found = [name for name in headers if name not in _CHECKSUM_WORDS
                 and name.startswith("x-amz-checksum-")]
    if "x-amz-trailer" in headers:
        promised = [name for name in trailer_names(headers)
                    if name.startswith("x-amz-checksum-")]
    if len(found) + len(promised) > 1:
        raise S3Error("InvalidRequest", "Expecting a single x-amz-checksum- "
                      "header. Multiple checksum Types are not allowed.")
    algorithm = headers.get("x-amz-sdk-checksum-algorithm")
    if algorithm:
        algorithm = checksum_algorithm(algorithm)
    if not found and not promised:
        if algorithm:
            raise S3Error("InvalidRequest", "x-amz-sdk-checksum-algorithm "
                          "specified, but no corresponding x-amz-checksum-* "
                          "or x-amz-trailer headers were found.")
        return None
    header = (found or promised)[0]
    name = CHECKSUM_HEADERS.get(header)
    if name is None:
        name = checksum_algorithm(header[15:])
    if algorithm not in (None, "", name):
        raise S3Error("BadDigest", "Value for x-amz-sdk-checksum-algorithm "
                      "header is invalid.")
    if promised:
        return Claim(name, None, header)
    expected = decode_digest(headers[header], DIGESTS[name].size)
    if expected is None:
        raise S3Error("InvalidRequest",
                      "Value for %s header is invalid." % header)
    return Claim(name, expected, header)


def trailer_names(headers):
    """The names that x-amz-trailer promises, in lower case."""
    return [name.strip().lower() for name in
            headers.get("x-amz-trailer", "").split(",") if name.strip()]


_EMPTY_PAYLOADS = frozenset((UNSIGNED, EMPTY_SHA256))
# What says anything of a body besides x-amz-content-sha256
_BODY_HEADERS = frozenset(CHECKSUM_HEADERS) | {
    "content-md5", "content-encoding", "x-amz-trailer",
    "x-amz-sdk-checksum-algorithm", "x-amz-decoded-content-length"}


def open_body(frame, headers, identity, with_checksum=True):
    """The Body of a request; XAmzContentSHA256Mismatch for one that is
    empty and was signed as another, or the other way round.

    frame: the LengthReader or ChunkedReader of its HTTP framing.
    with_checksum: as for body_claims.
    """
    payload, reader, length = identity.payload, frame, frame.left
    if length == 0 and payload in _EMPTY_PAYLOADS \
            and _BODY_HEADERS.isdisjoint(headers):
        return Body(frame, 0)           # as every GET, HEAD and DELETE has
    claims, checksum = body_claims(headers, payload, with_checksum)
    if payload.startswith("STREAMING-") or _is_aws_chunked(headers):
        decoded = headers.get("x-amz-decoded-content-length")
        length = decoded if decoded is None else parse_int(
            "x-amz-decoded-content-length", decoded, 0)
        reader = AwsChunkedReader(
            LineReader(reader), identity.chain, trailer_names(headers),
            payload == STREAMING_SIGNED[1])
    if len(payload) == 64 and length is not None \
            and (length == 0) != (payload == EMPTY_SHA256):
        # many operations read no body
        more = {} if length else {"S3ComputedContentSHA256": EMPTY_SHA256}
        raise S3Error("XAmzContentSHA256Mismatch",
                      ClientComputedContentSHA256=payload, **more)
    return Body(reader, length, claims, checksum)


def _is_aws_chunked(headers):
    """True for an aws-chunked body under UNSIGNED-PAYLOAD (SigV2, and
    presigned URLs of some SDKs)."""
    return ("x-amz-decoded-content-length" in headers
            and "aws-chunked" in headers.get("content-encoding", ""))


# --- forms ---

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(
    rb'[ \t]*;[ \t]*(' + _TOKEN + rb')=(?:"((?:[^"\\]|\\.)*)"|('
    + _TOKEN + rb'))[ \t]*', re.DOTALL)
_PART_HEADER = re.compile(
    rb"(" + _TOKEN + rb"):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)\Z")
_BOUNDARY = re.compile(rb"[ -~]{0,69}[!-~]\Z")      # RFC 2046, 5.1.1


def _bad_form():
    return S3Error("MalformedPOSTRequest")


def form_parameters(text):
    """The (lower-case value, parameters) of a header such as
    `form-data; name="a"`, as bytes; RFC 2045 section 5.1.

    A backslash escapes a quote and a backslash only: browsers escape
    neither, and old ones send whole Windows paths (WHATWG HTML, 4.10.22.8).
    """
    value, separator, rest = text.partition(b";")
    rest, position, parameters = separator + rest, 0, {}
    while position < len(rest):
        match = _PARAMETER.match(rest, position)
        if not match or match[1].lower() in parameters:
            raise _bad_form()
        quoted = match[2]
        parameters[match[1].lower()] = match[3] if quoted is None \
            else re.sub(rb'\\(["\\])', rb"\1", quoted)
        position = match.end()
    return value.strip(b" \t").lower(), parameters


def form_boundary(content_type):
    """The boundary that a form's Content-Type names, as bytes.

    PreconditionFailed for another type: S3's answer, where its list of
    errors has RequestIsNotMultiPartContent.
    """
    text = content_type.encode("latin-1", "replace")
    if text.partition(b";")[0].strip().lower() != b"multipart/form-data":
        raise S3Error("PreconditionFailed", Condition="Bucket POST must be "
                      "of the enclosure-type multipart/form-data")
    boundary = form_parameters(text)[1].get(b"boundary", b"")
    if not _BOUNDARY.match(boundary):
        raise _bad_form()
    return boundary


class FormParser:
    """The parts of a multipart/form-data body, RFC 7578, one after the
    other.

    Holds one block of the source.  What is not the file's content, from
    first to last, may have MAX_FORM_BYTES: MaxPostPreDataLengthExceeded.
    MalformedPOSTRequest for whatever is not well-formed, and when the
    source ends before the closing delimiter.
    """

    def __init__(self, source, boundary):
        self._source = source
        self._delimiter = b"\r\n--" + boundary
        # the first delimiter stands at the very start: lend it its CRLF
        self._buffer, self._left = bytearray(b"\r\n"), MAX_FORM_BYTES + 2
        # bytes of content at the buffer's start; the delimiter follows them
        self._ready, self._found = 0, False

    def next_part(self):
        """The (name, filename or None) of the next part, as text; None
        after the last one.  What was not read of the present part, or
        stands before the first, is dropped.
        """
        self.value()
        self._spend(len(self._delimiter))
        while len(self._buffer) < 2:
            self._receive()
        if self._buffer.startswith(b"--"):
            return None
        if self._line().strip(b" \t"):
            raise _bad_form()
        part = self._part_headers()
        self._begin_content()
        return part

    def _begin_content(self):
        """Pass the empty line, unless its CRLF belongs to the delimiter: a
        part may end with its headers (RFC 2046 section 5.1.1)."""
        self._buffer[:0] = b"\r\n"
        self._left += 2
        while self._delimiter.startswith(self._buffer[:len(
                self._delimiter) - 1]) \
                and len(self._buffer) < len(self._delimiter):
            self._receive()
        if not self._buffer.startswith(self._delimiter):
            self._spend(2)
        self._look()

    def read(self, size):
        """1 to `size` bytes of the part's content, b"" at its end."""
        while not self._ready and not self._found:
            self._receive()
            self._look()
        count = min(size, self._ready)
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._ready -= count
        return data

    def value(self):
        """The rest of the part's content; it counts as form data."""
        pieces = []
        while True:
            piece = self.read(BLOCK_BYTES)
            if not piece:
                return b"".join(pieces)
            self._count(len(piece))
            pieces.append(piece)

    def _look(self):
        """Find the delimiter, or what of the buffer cannot be part of it."""
        at = self._buffer.find(self._delimiter)
        self._found = at >= 0
        self._ready = at if self._found else max(
            0, len(self._buffer) - len(self._delimiter) + 1)

    def _receive(self):
        data = self._source.read(BLOCK_BYTES)
        if not data:
            raise _bad_form()
        self._buffer += data

    def _count(self, size):
        self._left -= size
        if self._left < 0:
            raise S3Error("MaxPostPreDataLengthExceeded",
                          MaxPostPreDataLengthBytes=MAX_FORM_BYTES)

    def _spend(self, size):
        """Drop what has been parsed of the buffer."""
        self._count(size)
        del self._buffer[:size]

    def _line(self):
        """The next line, without its CRLF."""
        while True:
            at = self._buffer.find(b"\r\n", 0, self._left + 1)
            if at >= 0:
                line = bytes(self._buffer[:at])
                self._spend(at + 2)
                return line
            if len(self._buffer) > self._left:
                self._count(len(self._buffer))
            self._receive()

    def _part_headers(self):
        """The (name, filename or None) that a part's headers give.

        Only Content-Disposition has a meaning (RFC 7578 section 4.8).  A
        folded line, a second one of a name and a control character are
        refused.
        """
        headers = {}
        while True:
            line = self._line()
            if not line:
                break
            match = _PART_HEADER.match(line)
            if not match or match[1].lower() in headers:
                raise _bad_form()
            headers[match[1].lower()] = match[2]
        kind, parameters = form_parameters(
            headers.get(b"content-disposition", b""))
        name = parameters.get(b"name")
        if kind != b"form-data" or not name:
            raise _bad_form()
        filename = parameters.get(b"filename")
        return form_text(name), (
            None if filename is None else form_text(filename))


def form_text(data):
    """Bytes of a form as text: "The form and policy must be UTF-8
    encoded" (API/sigv4-HTTPPOSTForms.html)."""
    try:
        return data.decode("utf-8")
    except UnicodeError:
        raise _bad_form() from None


class FormFile:
    """The content of a form's file part, as a reader.

    At its end the rest of the form is read: its fields are ignored (the
    file is the last that counts), a second file is InvalidArgument.
    """

    def __init__(self, parser):
        self._parser, self._ended = parser, False

    def read(self, size):
        """1 to `size` bytes, b"" at the end."""
        data = b"" if self._ended else self._parser.read(size)
        if not data and not self._ended:
            self._read_rest()
            self._ended = True
        return data

    def _read_rest(self):
        files, part = 1, self._parser.next_part()
        while part:
            files += part[0].lower() == "file"
            if files > 1:
                raise _file_count(files)
            part = self._parser.next_part()


def _file_count(count):
    return S3Error("InvalidArgument", "POST requires exactly one file upload "
                   "per request.", ArgumentName="file",
                   ArgumentValue=str(count))


class Form(NamedTuple):
    """A form up to its file.

    fields: lower-case name -> text; several of one name are joined by
    commas (API/HTTPPOSTForms.html).  names: lower-case name -> the name as
    it came.  filename: None when the file part has none.  file: a reader.
    """
    fields: Dict[str, str]
    names: Dict[str, str]
    filename: Optional[str]
    file: FormFile


def read_form(source, boundary):
    """The Form that a source holds, read up to its file's first byte.

    Only the name tells the file from a field: some clients give every
    part a filename.  InvalidArgument when there is no file.
    """
    parser, fields, names = FormParser(source, boundary), {}, {}
    part = parser.next_part()
    while part:
        name, lower = part[0], part[0].lower()
        if lower == "file":
            return Form(fields, names, part[1], FormFile(parser))
        value = form_text(parser.value())
        fields[lower] = fields[lower] + "," + value \
            if lower in fields else value
        names.setdefault(lower, name)
        part = parser.next_part()
    raise _file_count(0)


class SizedReader:
    """A reader whose content must have `low` to `high` bytes (None: any):
    the content-length-range of a POST policy, both ends included.

    EntityTooLarge at the first byte too many, EntityTooSmall at the end.
    """

    def __init__(self, reader, low, high):
        self._reader, self._low, self._high = reader, low, high
        self._received = 0

    def read(self, size):
        """1 to `size` bytes, b"" at the end."""
        data = self._reader.read(size)
        self._received += len(data)
        if self._high is not None and self._received > self._high:
            raise S3Error("EntityTooLarge", ProposedSize=self._received,
                          MaxSizeAllowed=self._high)
        if not data and self._received < self._low:
            raise S3Error("EntityTooSmall", ProposedSize=self._received,
                          MinSizeAllowed=self._low)
        return data


# --- sealing ---

# Content at rest is a sequence: a header of 16 bytes, then chunks of 64 KiB,
# each sealed with AES-256-GCM: cipher text, then a tag of 16 bytes.
#
#     ff 67 6f 73 33 00   magic: nothing in UTF-8 starts so
#     01                  version of the format
#     10                  a chunk's size, as a power of two
#     8 random bytes      the sequence's prefix
#
# A chunk's nonce is the prefix, the chunk's number, and one bit that says
# "last" (STREAM: Hoang, Reyhanitabar, Rogaway, Vizar, "Online Authenticated
# Encryption and its Nonce-Reuse Misuse-Resistance", 2015); the header is
# bound to every chunk as associated data.  So a chunk that is changed,
# moved, dropped, or put in from elsewhere does not open, nor does a sequence
# that was cut at a chunk's end; and a file whose record is lost can still be
# told from content.  An object is one sequence, a multipart object one for
# each part, all under the object's own data key: parts are joined as they
# lie, and any range opens from the chunks it meets.

SEAL_MAGIC = b"\xffgos3\0"
SEAL_FORMAT = SEAL_MAGIC + b"\1\x10"
SEAL_CHUNK_BYTES = 64 * KIB
SEAL_TAG_BYTES = 16
SEAL_KEY_BYTES = 32
# Random, once a sequence.  10,000 parts, each sent twice, under one data
# key: two prefixes are the same once in 10^11 such objects.
SEAL_PREFIX_BYTES = 8
SEAL_HEADER_BYTES = len(SEAL_FORMAT) + SEAL_PREFIX_BYTES
_SEALED_CHUNK_BYTES = SEAL_CHUNK_BYTES + SEAL_TAG_BYTES
_LAST_CHUNK = 1 << 31               # so a sequence ends at 128 TiB
_NONCE_BYTES = 12
_OPEN_CHUNKS = 4                    # read and opened at a time: 256 KiB

# What ssl is linked with comes first; these are for Pythons where that
# cannot be seen: Windows (python.org's names, then OpenSSL's own), and
# builds with OpenSSL inside.  Bare libcrypto.dylib must not be among them:
# macOS kills a process that loads its own one.
_CRYPTO_NAMES = (
    "libcrypto.so.3", "libcrypto.so.1.1", "libcrypto.3.dylib",
    "libcrypto.1.1.dylib", "/opt/homebrew/lib/libcrypto.3.dylib",
    "libcrypto-3.dll", "libcrypto-3-x64.dll", "libcrypto-3-arm64.dll",
    "libcrypto-1_1.dll", "libcrypto-1_1-x64.dll")
# OpenSSL 1.1 and 3, LibreSSL: name, result, arguments; p is a pointer, i an
# int, s the address of a bytes object.  docs.openssl.org/3.0/man3/
# EVP_EncryptInit
_CRYPTO_FUNCTIONS = (
    ("EVP_aes_256_gcm", "p", ""),
    ("EVP_CIPHER_CTX_new", "p", ""),
    ("EVP_CIPHER_CTX_free", "", "p"),
    ("EVP_CIPHER_CTX_ctrl", "i", "piip"),
    ("EVP_CipherInit_ex", "i", "pppssi"),
    ("EVP_CipherUpdate", "i", "ppppi"),
    ("EVP_CipherFinal_ex", "i", "ppp"),
    ("ERR_clear_error", "", ""))
_CTRL_GET_TAG, _CTRL_SET_TAG = 0x10, 0x11
_KEEP = -1                          # EVP_CipherInit_ex: same direction


class SealError(Exception):
    """What was sealed does not open: damaged, cut, or another's key."""


class Sequence(NamedTuple):
    """A sealed sequence in a file.  size: of its plain text, in bytes."""
    size: int
    prefix: bytes


def _crypto_paths(util):
    """Where libcrypto may be, likeliest first.

    Through the handle of ssl's own module its dependencies can be searched
    (dlsym(3); not on Windows): the very library that Python uses.
    """
    linked = getattr(ssl._ssl, "__file__", None)
    if linked:
        yield linked
        for name in _CRYPTO_NAMES:
            yield os.path.join(os.path.dirname(linked), name)
    yield from _CRYPTO_NAMES
    if sys.platform != "darwin":    # there: the library that kills
        found = util.find_library("crypto")
        if found:
            yield found


class Libcrypto:
    """The functions of one libcrypto, as attributes.

    They hold the GIL: a chunk takes 25 us, getting it back up to 5 ms.
    Measured with a busy second thread: 1,270 MB/s held, 55 MB/s not; two
    threads that seal, on two cores: 2,480 MB/s held, 2,230 MB/s not.
    OSError or AttributeError when `path` is not that library.
    """

    def __init__(self, ctypes, path):
        self.ctypes = ctypes
        types = {"p": ctypes.c_void_p, "i": ctypes.c_int,
                 "s": ctypes.c_char_p, "": None}
        library = ctypes.PyDLL(path)
        for name, result, arguments in _CRYPTO_FUNCTIONS:
            function = getattr(library, name)
            function.restype = types[result]
            function.argtypes = [types[letter] for letter in arguments]
            setattr(self, name, function)

    def address(self, data):
        """Where the content of a bytes object lies, as long as it lives."""
        ctypes = self.ctypes
        return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value


@functools.lru_cache(maxsize=None)
def libcrypto():
    """The Libcrypto of this machine, or None.  Looked for once, at the
    first use: ctypes would cost every start 5 ms."""
    try:
        import ctypes
        import ctypes.util
    except ImportError:
        return None
    for path in _crypto_paths(ctypes.util):
        try:
            library = Libcrypto(ctypes, path)
        except (OSError, AttributeError):
            continue
        if _knows_gcm(library):
            return library
    return None


def _knows_gcm(library):
    """Test case 14 of McGrew and Viega, "The Galois/Counter Mode of
    Operation", 2005: what cannot do this must not touch anybody's data."""
    sealed = AesGcm(bytes(32), True, library).run([
        (bytes(12), bytes(16), 0)])
    return sealed.hex() == ("cea7403d4d606b6e074ec5d3baf39d18"
                            "d0d1c8a799996bf0265b98b5d48ab919")


def need_libcrypto():
    """The Libcrypto, or NotImplemented."""
    library = libcrypto()
    if library is None:
        raise S3Error("NotImplemented", "Encryption needs OpenSSL's "
                      "libcrypto, which this server does not find")
    return library


class AesGcm:
    """AES-256-GCM under one key, in one direction, one thread at a time.

    seals: True to encrypt, False to decrypt.  NotImplemented where there
    is no libcrypto.
    """

    _context = _room = None

    def __init__(self, key, seals, library=None):
        self._library = library = library or need_libcrypto()
        if len(key) != SEAL_KEY_BYTES:
            raise ValueError("an AES-256 key has 32 bytes")
        self._seals = seals
        self._done = library.ctypes.c_int()
        self._done_at = library.ctypes.byref(self._done)
        self._context = library.EVP_CIPHER_CTX_new()
        self._need(self._context and library.EVP_CipherInit_ex(
            self._context, library.EVP_aes_256_gcm(), None, key, None,
            int(seals)))

    def __del__(self):
        if self._context:
            self._library.EVP_CIPHER_CTX_free(self._context)

    def run(self, pieces, aad=b""):
        """Seal or open chunks, joined.  A piece is (nonce, data, offset):
        the chunk that lies there in a bytes object, whole or up to its
        end.  SealError when one does not open."""
        step, more = (SEAL_CHUNK_BYTES, SEAL_TAG_BYTES) if self._seals \
            else (_SEALED_CHUNK_BYTES, -SEAL_TAG_BYTES)
        lengths = [min(step, len(data) - offset)
                   for _, data, offset in pieces]
        if min(lengths) < max(0, -more):
            raise SealError("a chunk is shorter than its tag")
        size = sum(lengths) + more * len(pieces)
        start = target = self._target(size)
        for (nonce, data, offset), length in zip(pieces, lengths):
            source = self._library.address(data) + offset
            self._chunk(nonce, source, target, length, aad)
            target += length + more
        return self._library.ctypes.string_at(start, size)

    def _target(self, size):
        """The address of room for `size` bytes.  It is kept: new memory
        for each block made sealing five times slower (page faults)."""
        ctypes = self._library.ctypes
        if self._room is None or len(self._room) < size:
            self._room = ctypes.create_string_buffer(max(1, size))
        return ctypes.addressof(self._room)

    def _chunk(self, nonce, source, target, length, aad):
        """One chunk of `length` bytes from one address to another."""
        if self._seals:
            self._start(nonce, aad)
            self._update(target, source, length)
            self._finish(target + length)
            self._tag(_CTRL_GET_TAG, target + length)
            return
        length -= SEAL_TAG_BYTES
        self._start(nonce, aad)
        self._update(target, source, length)
        self._tag(_CTRL_SET_TAG, source + length)
        self._finish(target + length)

    def _start(self, nonce, aad):
        if len(nonce) != _NONCE_BYTES:
            raise ValueError("a nonce of GCM has 12 bytes here")
        self._need(self._library.EVP_CipherInit_ex(
            self._context, None, None, None, nonce, _KEEP))
        if aad:
            self._update(None, self._library.address(aad), len(aad))

    def _update(self, target, source, length):
        if length:
            self._need(self._library.EVP_CipherUpdate(
                self._context, target, self._done_at, source, length))

    def _finish(self, target):
        self._need(self._library.EVP_CipherFinal_ex(
            self._context, target, self._done_at))

    def _tag(self, control, address):
        self._need(self._library.EVP_CIPHER_CTX_ctrl(
            self._context, control, SEAL_TAG_BYTES, address))

    def _need(self, result):
        """SealError unless libcrypto is content.  Its queue of errors is
        this thread's, and ssl's too: nothing may be left there."""
        if not result or result < 0:
            self._library.ERR_clear_error()
            raise SealError("the content is not what was sealed")


def _nonce(prefix, number, last):
    return prefix + struct.pack(">I", number | (_LAST_CHUNK if last else 0))


def sealed_size(size):
    """The bytes that a sequence of `size` bytes of plain text takes."""
    return SEAL_HEADER_BYTES + size + SEAL_TAG_BYTES * max(
        1, -(-size // SEAL_CHUNK_BYTES))


def plain_size(sealed):
    """The bytes of plain text in a sequence of `sealed` bytes, or
    SealError when no sequence has that size."""
    rest = sealed - SEAL_HEADER_BYTES
    chunks = max(1, -(-rest // _SEALED_CHUNK_BYTES))
    size = rest - SEAL_TAG_BYTES * chunks
    if size < 0 or sealed_size(size) != sealed:
        raise SealError("no sealed content has %d bytes" % sealed)
    return size


def new_prefix():
    """A prefix for one sequence, never to be used for another."""
    return secrets.token_bytes(SEAL_PREFIX_BYTES)


def read_header(data):
    """The prefix in a sequence's header, or SealError when that is none,
    or one of a format that this version does not know."""
    if len(data) != SEAL_HEADER_BYTES or not data.startswith(SEAL_FORMAT):
        raise SealError("this is no header of sealed content")
    return data[len(SEAL_FORMAT):]


class Sealer:
    """Seals one sequence, block by block."""

    def __init__(self, key, prefix):
        self._cipher, self._prefix = AesGcm(key, True), prefix
        self._header = SEAL_FORMAT + prefix
        self._number, self._rest = 0, b""

    def update(self, data):
        """The sealed bytes that are certain once `data` has come; none,
        often: a chunk waits until it is known not to be the last."""
        data, used = bytes(data), 0
        if self._rest:
            used = SEAL_CHUNK_BYTES - len(self._rest)
            self._rest += data[:used]
        if used >= len(data):
            return b""
        chunks = [(self._rest, 0)] if self._rest else []
        end = len(data) - 1
        end -= (end - used) % SEAL_CHUNK_BYTES
        chunks += [(data, at) for at in range(used, end, SEAL_CHUNK_BYTES)]
        self._rest = data[end:]
        return self._run(chunks, False) if chunks else b""

    def finish(self):
        """The last sealed bytes.  The Sealer is spent."""
        return self._run([(self._rest, 0)], True)

    def _run(self, chunks, last):
        number = self._number
        self._number += len(chunks)
        sealed = self._cipher.run([
            (_nonce(self._prefix, index, last), data, at)
            for index, (data, at) in enumerate(chunks, number)],
            self._header)
        return sealed if number else self._header + sealed


def open_range(pread, key, sequences, start, stop):
    """The plain bytes from `start` to `stop`, in blocks of up to 256 KiB.

    pread: takes (length, offset), gives bytes of the file.  sequences: the
    Sequences in the file, in their order.  Only the chunks that the range
    meets are read, and no byte comes out before its chunk has held:
    SealError then.  An empty sequence within the range is checked as well.
    """
    cipher, offset = AesGcm(key, False), 0
    for sequence in sequences:
        size = sequence.size
        low, high = max(start, 0), min(stop, size)
        if low < high or low == high == size == 0:
            yield from _open_chunks(cipher, pread, offset, sequence, low,
                                    high)
        start, stop = start - size, stop - size
        offset += sealed_size(size)


def _open_chunks(cipher, pread, offset, sequence, low, high):
    """The same within the one Sequence that lies at `offset`."""
    size, prefix = sequence
    header = _read_exactly(pread, SEAL_HEADER_BYTES, offset)
    if read_header(header) != prefix:
        raise SealError("another sequence lies there")
    offset += SEAL_HEADER_BYTES
    last = max(0, size - 1) // SEAL_CHUNK_BYTES
    number, end = low // SEAL_CHUNK_BYTES, max(
        0, high - 1) // SEAL_CHUNK_BYTES + 1
    while number < end:
        following = min(number + _OPEN_CHUNKS, end)
        begin = number * SEAL_CHUNK_BYTES
        length = min(following * SEAL_CHUNK_BYTES, size) - begin
        data = _read_exactly(
            pread, length + (following - number) * SEAL_TAG_BYTES,
            offset + number * _SEALED_CHUNK_BYTES)
        block = cipher.run([
            (_nonce(prefix, index, index == last), data,
             (index - number) * _SEALED_CHUNK_BYTES)
            for index in range(number, following)], header)
        if block:
            yield block[max(0, low - begin):high - begin]
        number = following


def _read_exactly(pread, length, offset):
    """`length` bytes of a file, or SealError when it ends before."""
    data = pread(length, offset)
    while len(data) < length:
        more = pread(length - len(data), offset + len(data))
        if not more:
            raise SealError("the sealed content is cut off")
        data += more
    return data


def wrap_key(master, key, context):
    """A data key sealed under a master key, as 80 characters of base64.

    context: a list of texts, bound to it and not contained in it.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = AesGcm(master, True).run([(nonce, key, 0)], _bound(context))
    return base64.b64encode(nonce + sealed).decode()


def unwrap_key(master, text, context):
    """The data key, or SealError when key, text or context is another."""
    data = decode_digest(
        text, _NONCE_BYTES + SEAL_KEY_BYTES + SEAL_TAG_BYTES)
    if data is None:
        raise SealError("this is no wrapped key")
    return AesGcm(master, False).run(
        [(data[:_NONCE_BYTES], data, _NONCE_BYTES)],
        _bound(context))


def _bound(context):
    """A list of texts as bytes, so that no two lists are alike."""
    return json.dumps(list(context), separators=(",", ":")).encode()


def key_fingerprint(master):
    """What a record calls its master key by; tells nothing of it."""
    return hmac.new(master, b"gos3rve master key", "sha256").hexdigest()[:16]


def sealed_etag(key, md5):
    """An ETag for content under a data key: looks like an MD5 and is none,
    as AWS has it for SSE-C and SSE-KMS (API_Object.html): equal content
    cannot be told from equal ETags."""
    return hmac.new(key, md5, "sha256").hexdigest()[:32]


###############################################################################
# 6. Storage
###############################################################################
#
# Buckets, objects and uploads as directories and files.  Speaks S3 (names,
# keys, records, S3Error), not HTTP, XML or identities.  Every method may be
# called from any thread of any number of processes on one file system: what
# changes a key holds that key's lock (a striped flock), and only to publish.
# Publishing is one rename; a crash leaves the old object or the new one,
# and at most a file in tmp/ that the next sweep removes.
#
#     <bucket>/<key as a path>       the object, a plain file
#     <bucket>/.gos3rve/bucket.json  what S3 knows of the bucket
#                       tmp/         drafts: not visible yet
#                       meta/        records that no xattr can hold
#                       odd/         objects whose key is no path here
#                       versions/    <key's name>/<version>: noncurrent
#                                    versions and delete markers; `key`
#                                    where the name is a hash
#                       logs/        lines of the access log that are not
#                                    delivered yet
#                       events/      <webhook>/<event>: not delivered yet
#                       locks/       a file a stripe, with the number of
#                                    its last event
#     <uploads>/<bucket>/<id>/       a multipart upload: upload.json, 00001

STATE = ".gos3rve"
KEY_FILE = "key"                    # in a directory named by a key's hash
XATTR = "user.gos3rve"
FIDEDUPERANGE = 0xC0189436              # linux/fs.h
MAX_SHARED_BYTES = 16 * MIB             # a call: btrfs takes no more
MIN_SHARED_BYTES = 4 * KIB              # less than a block saves none
LOCK_STRIPES = 32
MAX_ODD_NAME = 140                  # longer encoded keys are hashed
MAX_RETRIES = 100                   # of a step that another writer undid
LISTING_PATIENCE_SECONDS = 0.3      # with others who keep moving files
MAX_REREADS = 3                     # of a directory that others change
# File systems where a file that replaces another takes its place
_IN_PLACE_TYPES = frozenset(("ext2", "ext3", "ext4", "tmpfs", "xfs"))
MAX_LOOKS = 50                      # for a file that others move about
# The names that the listing cache keeps, over all directories.  A million
# of 10 characters take 13 MB in one directory, 20 MB in 10,000 of them.
MAX_CACHED_NAMES_BYTES = 32 * MIB
# In about microseconds: beyond it a page with anything in it ends, full or
# not, since each of a thousand keys may lie 500 directories deep
MAX_PAGE_WORK = 800000
# What listings show of files, kept over all buckets: about 650 bytes each.
MAX_CACHED_FILES = 12500
# A time on the disk is trusted once it is older than its clock's tick: 10 ms
# on Linux (HZ=100), 2 s where the stamp has whole seconds (FAT, ext3).
TICK_NS, COARSE_TICK_NS = 50000000, 2500000000
SWEEP_GRACE_SECONDS = 60            # between making a file and locking it
# Of a bucket's, and how often: 40 us each
MAX_SWEPT_HINTS, HINTS_SECONDS = 10000, 3600
FULL_SWEEP_SECONDS = 24 * 3600      # from one look at all sidecars to the next
# Of a bucket's access log, while it cannot be delivered
MAX_SPOOLED_BYTES = 256 * MIB

_HAVE_DIR_FD = (os.open in os.supports_dir_fd
                and os.rename in os.supports_dir_fd
                and os.unlink in os.supports_dir_fd
                and os.mkdir in os.supports_dir_fd
                and hasattr(os, "O_DIRECTORY"))
_HAVE_UTIME_FD = os.utime in os.supports_fd
_HAVE_SCANDIR_FD = os.scandir in os.supports_fd
_HAVE_XATTR = hasattr(os, "getxattr")
_OPEN_READ = (os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
              | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)
              | getattr(os, "O_BINARY", 0))
# no link at the end of the path; None where that cannot be asked for
_OPEN_NO_LINK = _OPEN_READ | os.O_NOFOLLOW \
    if hasattr(os, "O_NOFOLLOW") else None
_OPEN_NEW = (os.O_RDWR | os.O_CREAT | os.O_EXCL
             | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
_OPEN_DIRECTORY = (os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
                   | getattr(os, "O_CLOEXEC", 0))
# NFS locks nothing that is not open for writing: flock(2)
_OPEN_HELD = os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
_OPEN_LOCK = _OPEN_HELD | os.O_CREAT
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# what a path that names no regular file answers to open(2), besides these
_ABSENT_ERRNO = frozenset((errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG,
                           errno.ENODEV))
# what passes: too much at once, or a file of a network file system that
# another machine has just replaced
_PASSING_ERRNO = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM,
                            errno.EAGAIN, errno.ENOLCK, errno.ETIMEDOUT,
                            errno.ESTALE, errno.ENOTCONN))
# what a directory of keys may answer that listings leave out
_UNSEEN_ERRNO = _ABSENT_ERRNO | {errno.EACCES}
_WINDOWS_BAD = re.compile(
    r"[<>:\"\\|?*\x00-\x1f]|[. ]\Z|(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|\Z)",
    re.IGNORECASE)


def storage_error(error):
    """The S3Error to answer for an OSError of this room."""
    code = error.errno
    if isinstance(error, LeadsOut):
        return S3Error("AccessDenied", "The key leads out of the bucket "
                       "through a symbolic link")
    if code == errno.EXDEV:             # by a mount, or a link that leads out
        return S3Error("AccessDenied", "The key lies on another file system "
                       "than its bucket, where none can be put")
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return S3Error("InsufficientStorage")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP):
        return S3Error("AccessDenied", "The server may not do this to its "
                       "files")
    if code in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
        return S3Error("AccessDenied", "Something that is none of the "
                       "server's files stands in their place")
    if code in _PASSING_ERRNO:
        return S3Error("SlowDown")
    return S3Error("InternalError")


# --- keys and paths ---

# A file name that no key leads to: STATE and whatever else some file system
# takes for it.  Case (ext4's casefold has the long s), characters that are
# ignored (HFS+, CVE-2014-9390; here all that are not ASCII), and the short
# names of VFAT and NTFS, six letters or two and a hash.
# re.IGNORECASE would take a millisecond of each start.
_RESERVED = re.compile(
    "[^\0-\x7f]*".join(("", r"\.", "[Gg]", "[Oo]", "[Ss\u017f]", "3", "[Rr]",
                       "[Vv]", "[Ee]"))
    + "|[Gg][Oo](?:[Ss\u017f]3[Rr][Vv]|[0-9A-Fa-f]{4})~\\d")
# No segment that may be such a name or could be too long: nearly every key
_PLAINLY_NATURAL = re.compile(
    r"(?:S[^/\0]{,62}/)*S[^/\0]{,62}\Z".replace(
        "S", r"(?![^\0-\x7f]*\.|[Gg][Oo][^/]{4}~)[^/\0]"))


def is_natural(key):
    """True when a key can be a relative path as it is."""
    if os.name != "nt" and _PLAINLY_NATURAL.match(key):
        return True
    if not key or key[0] == "/" or key[-1] == "/" or "\0" in key:
        return False
    for segment in key.split("/"):
        if not segment or segment == "." or segment == ".." \
                or is_reserved(segment):
            return False
        if len(segment) > 63 and len(segment.encode()) > MAX_FILE_NAME_BYTES:
            return False
        if os.name == "nt" and _WINDOWS_BAD.search(segment):
            return False
    return True


def is_reserved(name):
    """True for a file name that no key leads to, in any directory: what is
    one bucket's state may lie far below another bucket."""
    return bool(_RESERVED.match(name))


def odd_name(key):
    """The file name under odd/ of a key: itself encoded, or its hash."""
    if len(key) < MAX_ODD_NAME:
        name = "k" + (key.replace("/", "%2F") if UNRESERVED.match(key)
                      else urllib.parse.quote(key, safe=""))
        if len(name) <= MAX_ODD_NAME:
            return name
    return "h" + hashlib.sha256(key.encode()).hexdigest()


def _is_hashed(key):
    """True when the odd_name() of a key does not tell it."""
    return 3 * len(key.encode()) >= MAX_ODD_NAME and odd_name(key)[0] == "h"


# --- versions ---

NULL_VERSION = "null"
ENABLED, SUSPENDED = "Enabled", "Suspended"
_VERSION_ID = re.compile(r"[0-9a-f]{32}\Z")
_VERSION_NAMES = re.compile(        # among names with \0 between them
    r"(?<![^\0])[0-9a-f]{16}(?:[0-9a-f]{16}|null)(?:\.pending)?(?![^\0])")
_HEX_DIGITS = b"0123456789abcdef"
_END_OF_TIME_NS = 1 << 63
PENDING = ".pending"                # see Bucket.add_marker()


def new_version_id(names=()):
    """An id that no other version has and that sorts before those of the
    key's other versions, `names`: in this order they were acknowledged."""
    return _version_stamp(time.time_ns(), names) + secrets.token_hex(8)


def _version_stamp(now_ns, names):
    """The first half of an id.  The clock may have been set back since
    the newest of `names`, or may not have ticked."""
    stamp = _END_OF_TIME_NS - now_ns
    if names:
        stamp = min(stamp, int(names[0][:16], 16) - 1)
    return "%016x" % max(stamp, 0)


def _version_of(name):
    """The version id of a file under versions/."""
    return NULL_VERSION if NULL_VERSION in name else name[:32]


def _name_of(version_id, names):
    """The file name, the first among sorted `names`, of a version; None
    when it is not there."""
    if version_id == NULL_VERSION:
        return next((name for name in names if NULL_VERSION in name), None)
    for name in (version_id, version_id + PENDING):
        if name in names:
            return name
    return None


def _version_names(names, current):
    """Those of a directory's names that are versions, the newest first.
    current: the key has a file, and so no marker pending is in force."""
    names = sorted(names)
    text = "\0".join(names)
    # nearly always each is an id: to find that out takes a tenth
    if len(text) == 33 * len(names) - 1 and os.fsencode(
            text).translate(None, _HEX_DIGITS) == os.fsencode(text[32::33]):
        return names
    found = _VERSION_NAMES.findall(text)
    if current and PENDING in text:
        found = [name for name in found if not name.endswith(PENDING)]
    return found


def _up_to_version(ids, version_id):
    """The ids up to one of them; when that is not there any more, up to
    the last that is surely newer."""
    stop = 0
    for number, one in enumerate(ids, 1):
        if one == version_id:
            return ids[:number]
        if NULL_VERSION not in (one, version_id) and one < version_id:
            stop = number
    return ids[:stop]


def valid_version_id(text):
    """True for `null` and for what new_version_id() makes."""
    return text == NULL_VERSION or bool(_VERSION_ID.match(text))


# --- records ---

# The fields of a record that describe the content and not the object: they
# hold only while size and mtime_ns are those of the file.
_CONTENT_FIELDS = ("etag", "checksums", "checksum_type", "parts",
                   "part_checksums", "upload_id")


_of_texts = frozenset((str,)).issuperset


def _are_texts(value):
    """As of the shape {"*": str}: there is a record for every read."""
    return type(value) is dict and _of_texts(map(type, value.values()))


def _are_checksums(value):
    return _are_texts(value) and all(map(str.isalnum, value))


def _is_lock(value):
    """True for what room 8 calls a version's lock."""
    return fits(value, {"mode": is_word, "until": is_date, "hold": is_word}) \
        and ("mode" in value) == ("until" in value)


def _is_version(value):
    return isinstance(value, str) and valid_version_id(value)


_RECORD_SHAPES = {
    "size": int, "mtime_ns": int, "etag": str, "headers": _are_texts,
    "meta": _are_texts, "class": str, "checksums": _are_checksums,
    "key": str, "was": str, "version": _is_version, "marker": bool,
    "tags": _are_texts, "replaces": str, "owner": str, "acl": list,
    "lock": _is_lock, "sse": dict, "checksum_type": str, "parts": list,
    "upload_id": str, "part_checksums": [str]}


def _breaks_lines(record):
    """True when what headers are made of would end their lines: of a
    record that has been written with an escape."""
    texts = [record.get(name, "") for name in ("etag", "class",
                                               "checksum_type")]
    texts += record.get("part_checksums", ())
    for name in ("headers", "meta", "checksums"):
        texts += record.get(name, ())
    for name in ("headers", "checksums"):
        texts += record.get(name, {}).values()
    return not all(map(is_word, texts))


def _check_escaped(value):
    """ValueError for half a character in a JSON value: only an escape can
    bring it there."""
    json.dumps(value, ensure_ascii=False).encode()


def load_json(data):
    """The dict in some JSON bytes, or ValueError."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    _check_escaped(value)
    return value


# What is written of a record with an ETag, as nearly all have, is
#     [etag, size, mtime_ns, headers, {other fields}]
# headers: the Content-Type alone where there is no other, "" for none, null
# where the record has no such field.  The other fields, if any, go by their
# names but for these two; `c` is "<algorithm> <digest>", a single checksum of
# the type FULL_OBJECT.
# CPython's os.getxattr() tries 128 bytes before it allocates 64 KiB: 2.2 us,
# and 6.  A small PUT's record takes 90 to 127 here, 140 to 210 as an object
# of all the fields by their names, which is read as well: once all were that.
_LONG_NAMES = {"m": "meta", "v": "version"}


# `in` takes 0.2 us less for a byte's number than for a byte
_BACKSLASH = ord("\\")


def load_record(data):
    """The record in some JSON bytes; {} when it is damaged."""
    try:
        value = parse_json(data)
        if type(value) is list:
            value = _unpacked(*value)
        elif not fits(value, _RECORD_SHAPES):
            return {}
        if _BACKSLASH in data:
            _check_escaped(value)
            return {} if _breaks_lines(value) else value
    except (ValueError, TypeError):     # TypeError: too many, or no text
        return {}
    return value


def _unpacked(etag, size, mtime_ns, headers, others=None):
    """The record that dump_record() wrote as an array, or ValueError."""
    if type(headers) is str:
        headers = {"Content-Type": headers} if headers else {}
    elif headers is not None and not _are_texts(headers):
        raise ValueError("wrong type of the headers")
    if not (type(etag) is str and type(size) is type(mtime_ns) is int):
        raise ValueError("wrong type of a field")
    record = {"etag": etag, "size": size, "mtime_ns": mtime_ns,
              "headers": headers}
    if headers is None:
        del record["headers"]
    if others is not None:
        if type(others) is not dict:
            raise ValueError("no fields")
        if "c" in others:
            name, digest = str.split(others.pop("c"), " ")
            if not name.isalnum():
                raise ValueError("no checksum")
            record["checksums"] = {name: digest}
            record["checksum_type"] = "FULL_OBJECT"
        for short, value in others.items():
            name = _LONG_NAMES.get(short, short)
            shape = _RECORD_SHAPES.get(name, object)
            if not (isinstance(value, shape) if type(shape) is type
                    else fits(value, shape)):       # the first is as good
                raise ValueError("wrong type of a field")
            record[name] = value
    return record


# json.dumps() makes one of these a call: 5 us.  Nothing here goes in rings.
_COMPACT = json.JSONEncoder(separators=(",", ":"), check_circular=False)


def dump_record(record):
    """A record as compact JSON bytes."""
    others = record.copy()
    try:
        packed = [others.pop("etag"), others.pop("size"),
                  others.pop("mtime_ns"), others.pop("headers", None)]
    except KeyError:                    # of a delete marker, say
        return _COMPACT.encode(record).encode()
    headers = packed[3]
    if headers == {}:
        packed[3] = ""
    elif headers and len(headers) == 1:
        content_type = headers.get("Content-Type")
        if content_type and type(content_type) is str:
            packed[3] = content_type
    if others:
        packed.append(_shortened(others))
    return _COMPACT.encode(packed).encode()


def _shortened(fields):
    """Some fields of a record by their short names, in place."""
    if "checksums" in fields and len(fields["checksums"]) == 1 \
            and fields.get("checksum_type") == "FULL_OBJECT":
        (name, digest), = fields["checksums"].items()
        if type(digest) is str and " " not in name + digest:
            del fields["checksums"], fields["checksum_type"]
            fields["c"] = name + " " + digest
    if "meta" in fields:
        fields["m"] = fields.pop("meta")
    if "version" in fields:
        fields["v"] = fields.pop("version")
    return fields


# How content is kept: botocore's enum ServerSideEncryption, less aws:fsx
# (other services' buckets) and aws:kms:dsse, and our own name for customer
# keys.  The member `sse` of a record tells it, of an upload's without the
# last three: the sequences in the file.
SSE_C, SSE_S3, SSE_KMS = "SSE-C", "AES256", "aws:kms"
_SSE_TYPES = {"algorithm": str, "key": str, "master": str,
              "kms_key_id": str, "context": str, "bucket_key": bool,
              "bound": bool, "sizes": list, "prefixes": str}
_SSE_NEEDS = {SSE_C: {"key"}, SSE_S3: {"key", "master"},
              SSE_KMS: {"key", "master", "kms_key_id"}}


def valid_sse(sse):
    """True when some JSON value says how a data key is wrapped."""
    if not isinstance(sse, dict) or not all(
            isinstance(value, _SSE_TYPES.get(name, object))
            for name, value in sse.items()):
        return False
    needs = _SSE_NEEDS.get(sse.get("algorithm"))
    return needs is not None and needs <= sse.keys() and all(
        value.isascii() and value.isprintable()
        for value in sse.values() if isinstance(value, str))


def opened_size(sse, stored):
    """The bytes of plain text in a file of `stored` bytes that is kept so;
    None when the sse is damaged, or not this file's.

    sizes: runs [[size, count], ...]; prefixes: base64, all of them.
    """
    if not valid_sse(sse) or not {"sizes", "prefixes"} <= sse.keys() \
            or not valid_runs(sse["sizes"]):
        return None
    sealed = sum(sealed_size(size) * count for size, count in sse["sizes"])
    count = sum(count for _, count in sse["sizes"])
    if sealed != stored or len(
            sse["prefixes"]) != -(-count * SEAL_PREFIX_BYTES // 3) * 4:
        return None
    return sum(size * count for size, count in sse["sizes"])


def valid_runs(runs):
    """True for the sizes of parts as a record has them, as runs [[size,
    count], ...]: whoever spells them out gets no more than there may be."""
    return all(isinstance(run, list) and [type(n) for n in run] == [int] * 2
               and run[0] >= 0 and run[1] >= 1 for run in runs) \
        and sum(count for _, count in runs) <= MAX_PART_NUMBER


def _fitting_parts(record, size):
    """A record without what it says of parts, when they are not those of
    `size` bytes in all."""
    runs, checksums = record["parts"], record.get("part_checksums")
    if valid_runs(runs) and sum(n * count for n, count in runs) == size \
            and (checksums is None
                 or len(checksums) == sum(count for _, count in runs)):
        return record
    return {name: value for name, value in record.items()
            if name not in ("parts", "part_checksums")}


class Info:
    """What HEAD tells of an object.

    key; size in bytes; mtime_ns; etag without quotes; record: headers,
    meta, class, checksums, parts and the like, as far as they hold.
    version_id: `null` where the bucket had no versions; marker: True for
    a delete marker; latest: True for the version that a GET finds;
    damaged: True for sealed content whose record does not tell how it
    opens, and for what a power cut has left of any.
    """

    __slots__ = ("key", "size", "mtime_ns", "etag", "record", "version_id",
                 "marker", "latest", "damaged")

    def __init__(self, key, status, record, latest=True):
        self.key, self.latest = key, latest
        self.version_id = record.get("version", NULL_VERSION)
        self.marker = record.get("marker", False)
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns
        self.damaged = False
        if (record.get("mtime_ns") != self.mtime_ns
                or record.get("size") != self.size):
            self.damaged = _is_torn(status, record)
            record = {name: value for name, value in record.items()
                      if name not in _CONTENT_FIELDS}
        if "sse" in record:
            size = opened_size(record["sse"], self.size)
            self.damaged = size is None
            self.size = self.size if size is None else size
        if "parts" in record:
            record = _fitting_parts(record, self.size)
        self.record = record
        self.etag = record.get("etag") or _stat_etag(status)

    @property
    def mtime(self):
        """Whole seconds since the epoch, as HTTP's headers have it."""
        return self.mtime_ns // 1000000000


def _is_torn(status, record):
    """True for a file that is shorter than its record says and bears that
    record's very time: nobody has edited it.

    Without -sync a power cut leaves such: record, time and name are in the
    journal, and the end of the content is not on the disk (ext4 with
    data=ordered, XFS).  Where times are whole seconds it cannot be told
    from an edit.
    """
    time_ns = record.get("mtime_ns")
    return time_ns == status.st_mtime_ns and time_ns % 1000000000 != 0 \
        and record.get("size", 0) > status.st_size


def _stat_etag(status):
    """An ETag for content that nobody hashed: changes with the file, and
    has a `-` so that no client takes it for an MD5."""
    text = "%d:%d:%d" % (status.st_ino, status.st_size, status.st_mtime_ns)
    return new_md5(text.encode()).hexdigest() + "-0"


def marker_error(info, version_id):
    """What a read of a delete marker answers: 404, and 405 when it was
    asked for by its id (userguide/DeleteMarker.html)."""
    headers = {"x-amz-delete-marker": "true",
               "x-amz-version-id": info.version_id,
               "Last-Modified": http_date(info.mtime)}
    if version_id is None:
        return S3Error("NoSuchKey", headers=headers, Key=info.key)
    headers["Allow"] = "DELETE"
    return S3Error("MethodNotAllowed", headers=headers, Method="GET",
                   ResourceType="DeleteMarker")


class Removed(NamedTuple):
    """What a delete did: the version it removed or the delete marker it
    made (None in a bucket without versions); marker: it was a marker;
    existed: False when there was nothing to delete."""
    version_id: Optional[str]
    marker: bool
    existed: bool = True


class Part(NamedTuple):
    """One part of an upload.  checksums: algorithm -> base64 digest.

    prefix: of the sealed sequence that it is; None when plain.  size: of
    the plain content.
    """
    number: int
    size: int
    mtime_ns: int
    etag: str
    checksums: Dict[str, str]
    path: str
    prefix: Optional[bytes] = None


class LeadsOut(FileNotFoundError):
    """A path that leaves the bucket through a symbolic link."""


class InTheWay(Exception):
    """A file stands where a key needs a directory; `key` is the file's."""

    def __init__(self, key):
        super().__init__(key)
        self.key = key


# --- drafts ---

class Draft:
    """Content in flight: a file in a tmp/ directory, locked as long as its
    writer lives, so that no sweep takes it.  Made at the first write.

    Close it in the end, published or not.  make(): makes the directory
    where that may be missing.  status: of the sealed file.  digest: a
    SHA-256 of what is written, for who wants to know it.
    """

    def __init__(self, directory, make=None, digest=None):
        self._directory, self._make = directory, make
        self.path = self.fd = self.status = None
        self.size, self.digest = 0, digest

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def open(self):
        """Make the file, once."""
        if self.fd is not None:
            return
        # no secret, and not from the kernel; O_EXCL tells of a collision
        path = "%s/t%024x" % (self._directory, random.getrandbits(96))
        for _ in range(MAX_RETRIES):
            try:
                self.fd = os.open(path, _OPEN_NEW, 0o666)
                break
            except FileNotFoundError:
                if self._make is None:
                    raise
                self._make()            # or say that all of it is gone
        else:
            raise S3Error("SlowDown")
        self.path = path
        if fcntl:
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def write(self, data):
        """Append bytes."""
        self.open()
        if self.digest is not None:
            self.digest.update(data)
        while data:
            done = os.write(self.fd, data)
            self.size += done
            data = memoryview(data)[done:] if done < len(data) else b""

    def copy(self, source, offset, length):
        """Append `length` bytes of a file descriptor from `offset` on, in
        the kernel (by reflink where the file system can)."""
        self.open()
        self.digest = None              # it does not pass through here
        end, done = offset + length, 1
        try:
            while done and offset < end:
                done = _copy_range(source, self.fd, offset, end - offset)
                offset += done
                self.size += done
        except OSError as error:
            if error.errno not in _NO_COPY_RANGE:
                raise
        # 0 is also what overlayfs says where it cannot: Rust's std::io::copy
        for block in read_blocks(source, offset, end - offset):
            self.write(block)

    def seal(self, record):
        """Put size and time into the record: the content is complete.

        The time is set, not left to the kernel, whose clock ticks too
        slowly to tell a later edit from this write.
        """
        self.open()
        now = time.time_ns()
        os.utime(self.fd if _HAVE_UTIME_FD else self.path, ns=(now, now))
        self.status = status = os.fstat(self.fd)
        record["size"] = status.st_size
        record["mtime_ns"] = status.st_mtime_ns
        return status

    def flush(self, sync):
        """Have what was written and the record taken, or raise; `sync`: on
        the disk.

        NFS, SMB and FUSE send what they hold when any descriptor of the
        file is closed, and first tell of a full disk then: too late, once
        the file is published.  Others do nothing.
        """
        if sync:
            sync_file(self.fd)
        else:
            os.close(os.dup(self.fd))

    def publish(self, path):
        """Rename the file to where it stays."""
        os.replace(self.path, path)
        self.path = None

    def close(self):
        """Let go of the file, and remove it unless it was published."""
        close_fd(self.fd)
        self.fd = None
        if self.path is not None:
            _unlink(self.path)
            self.path = None


# EINVAL may be about two files alone, of which one is not to be shared
_NO_SHARING = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)
_NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP,
                  errno.EBADF, errno.EPERM, errno.ETXTBSY)


def _copy_range(source, target, offset, length):
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "no copy_file_range")
    return os.copy_file_range(source, target, min(length, GIB), offset)


def share_content(source, target, length):
    """Have the file `target` share the first `length` bytes of `source`,
    its whole content, on the disk; False when they differ.

    The kernel compares them while nobody can change either, and each file
    stays independent of the other: ioctl_fideduperange(2).  OSError where
    the file system cannot share.
    """
    offset = 0
    while offset < length:
        step = min(length - offset, MAX_SHARED_BYTES)
        call = bytearray(struct.pack("=QQHHIqQQiI", offset, step, 1, 0, 0,
                                     target, offset, 0, 0, 0))
        fcntl.ioctl(source, FIDEDUPERANGE, call)
        done, status = struct.unpack_from("=Qi", call, 40)
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        if status or not done:
            return False
        offset += done
    return True


def _seek_and_read(fd, length, offset):
    """As os.pread, which Windows lacks."""
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, length)


_pread = getattr(os, "pread", _seek_and_read)


def read_blocks(fd, offset, length, size=BLOCK_BYTES):
    """`length` bytes of a file from `offset` on, in blocks.

    OperationAborted when the file ends before them.
    """
    while length:
        block = _pread(fd, min(size, length), offset)
        if not block:
            raise S3Error("OperationAborted", "The source changed while it "
                          "was read")
        yield block
        offset += len(block)
        length -= len(block)


def read_range(fd, offset, length):
    """`length` bytes of a file from `offset` on, as one: what nearly
    always is one read.  Raises as read_blocks()."""
    data = _pread(fd, length, offset) if length else b""
    if len(data) < length:
        data = b"".join(read_blocks(fd, offset, length))
    return data


def read_state(path):
    """The bytes of one of the server's own small files.

    A FIFO in its place has none and keeps nobody waiting.
    """
    fd = os.open(path, _OPEN_READ)
    try:
        return b"".join(iter(lambda: os.read(fd, 16 * KIB), b""))
    except OSError as error:
        error.filename = path           # a directory, which opens
        raise
    finally:
        close_fd(fd)


def _open_fresh(path):
    """Open a file to read.

    Over a network the file that a name was found to be may be gone when it
    is opened, since another one replaced it: look again.
    """
    for _ in range(MAX_LOOKS):
        try:
            return os.open(path, _OPEN_READ)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    raise S3Error("SlowDown")


def _unlink(path):
    try:
        os.unlink(path)
        return True
    except _ABSENT:
        return False


def _remove_tree(path):
    """Remove a directory and what is in it, as far as that can be done
    now: a sweep does the rest."""
    with contextlib.suppress(OSError):      # rmtree does not ignore close's
        shutil.rmtree(path, ignore_errors=True)


def close_fd(fd):
    """Close a descriptor, if it is not None.  An error is none: it is
    closed then, too, and what was written had to be taken before."""
    if fd is not None:
        try:
            os.close(fd)
        except OSError:
            pass


def _leads_to_directory(path):
    """True for a directory and a link to one: as os.path.isdir(), without
    the exception for what is not there.  The slash makes the kernel look
    for a directory."""
    if os.name == "nt":
        return os.path.isdir(path)
    return os.access(path + "/", os.F_OK)


def _is_there(path):
    """True when something is there.

    The answer on nearly every write is no, and access(2) says it without
    an exception: 1 us, os.path.exists() 4.
    """
    return os.access(path, os.F_OK)


def _is_surely_there(path, dir_fd=None):
    """The same, where an error must not pass for a no."""
    try:
        os.stat(path, dir_fd=dir_fd)
    except _ABSENT:
        return False
    return True


def _is_open(path, fd):
    """True while a path still names an open file, whatever its times:
    where it lies on several machines, these may differ."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except _ABSENT:
        return False


def _is_link(path):
    """As os.path.islink(), which takes an error for a no, too."""
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except _ABSENT:
        return False


def _json_lines(value):
    """A dict as JSON, a field a line."""
    # indent=1 would do without json's C code: 0.1 s for 1 MiB, and not 0.02
    return "{\n%s\n}" % ",\n".join(" %s: %s" % (
        json.dumps(name), json.dumps(item)) for name, item in value.items())


def write_json(path, value, sync=False, whole=False):
    """Replace a small state file by a dict's _json_lines()."""
    write_state(path, _json_lines(value), sync, whole)


def write_state(path, text, sync, whole):
    """Replace a small state file by one rename; mode 0600.  whole: after a
    power cut, too, even if not `sync`, it is the old or the new."""
    directory = os.path.dirname(path)
    with Draft(directory) as draft:
        draft.write(text.encode())
        draft.seal({})
        if hasattr(os, "fchmod"):
            os.fchmod(draft.fd, 0o600)
        draft.flush(sync or whole)
        draft.publish(path)
    if sync:
        sync_directory(directory)


def sync_file(fd):
    """Have a file, or the entries of a directory, on the disk."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        # macOS: fsync(2) leaves it in the drive's cache
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError as error:        # not every file system knows it
            if error.errno not in (errno.ENOTSUP, errno.ENOTTY,
                                   errno.EINVAL):
                raise
    os.fsync(fd)


def make_tree(path, sync=False, mode=0o777):
    """Make a directory, of that mode, and those above it, where they are
    missing."""
    if not os.path.isdir(path):
        above = os.path.dirname(path)
        make_tree(above, sync)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, mode)
        if sync:
            sync_directory(above)


def sync_directory(path):
    """Make the entries of a directory durable, where it can be opened."""
    if os.name == "nt":
        return
    fd = os.open(path, _OPEN_DIRECTORY)
    try:
        sync_file(fd)
    finally:
        close_fd(fd)


def try_flock(fd):
    """Take the lock of an open file; False when somebody holds it."""
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- buckets ---

_LOGS = "logs"                      # what their lock is called
_SPOOLED_LOG = re.compile(r"\d{8}\Z", re.ASCII)
_CLAIMED_LOG = re.compile(r"\d{8}-[\d-]{19}-[0-9A-F]{16}\Z", re.ASCII)


def _looked_at(info, fd):
    """The Info of an open file, damaged when no record of it holds and its
    first bytes are those of sealed content.  With a record nothing is read.
    """
    if "etag" not in info.record and "sse" not in info.record \
            and _pread(fd, len(SEAL_MAGIC), 0) == SEAL_MAGIC:
        info.damaged = True
    return info


def _settled(status, now_ns=None):
    """True when any change from now on must show as another time."""
    changed, mtime_ns = status.st_ctime_ns, status.st_mtime_ns
    if mtime_ns > changed:              # tar and rsync set it back
        changed = mtime_ns
    return (now_ns or time.time_ns()) - changed > (
        TICK_NS if changed % 1000000000 else COARSE_TICK_NS)


def _stripe(key):
    """The number of the lock that a key shares with others."""
    return zlib.crc32(key.encode()) % LOCK_STRIPES


class Stripes:
    """Holds some of a bucket's locks, against every thread and process, in
    a with statement.

    A class and no generator with an ExitStack: they took 12 us of a PUT.
    """

    __slots__ = ("_numbers", "_threads", "_flock", "_held", "_fds")

    def __init__(self, numbers, threads, flock):
        self._numbers, self._threads, self._flock = numbers, threads, flock
        self._held, self._fds = [], []

    def __enter__(self):
        try:
            for number in self._numbers:
                self._threads[number].acquire()
                self._held.append(self._threads[number])
                self._fds.append(self._flock(number))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        for fd in self._fds:
            close_fd(fd)
        for thread in self._held:
            thread.release()


# A field of bucket.json -> its shape; room 8 adds those of its documents
CONFIG_SHAPES = {
    "owner": (str, type(None)), "region": (str, type(None)),
    "created_ns": lambda value: type(value) is int
    and is_date(value // 10 ** 9),
    "versioning": (ENABLED, SUSPENDED).__contains__, "policy": str,
    "locked_out": bool}
# Who reads without these would give away or lose what they guard
_GUARDING = frozenset((
    "owner", "versioning", "policy", "locked_out", "ownership",
    "public_access_block", "object_lock", "encryption"))
_SHUT = "; nobody is let in until the owner puts or deletes the policy"


def parse_settings(data):
    """(What some bytes of a bucket.json say, what is wrong with them: a
    text for each fault).

    What is damaged is left out.  Where that is no safe reading of the rest
    the policy is one that nobody can have put, which denies everything,
    and no lifecycle rule is carried out.
    """
    try:
        config = load_json(data)
    except ValueError as error:
        return {"policy": False}, [str(error) + _SHUT]
    wrong = [name for name, shape in CONFIG_SHAPES.items()
             if name in config and not fits(config[name], shape)]
    for name in wrong:
        del config[name]
    if not _GUARDING.isdisjoint(wrong):
        config["policy"] = False
        config.pop("lifecycle", None)
    return config, ["%s is not what it has to be%s" % (
        name, _SHUT if name in _GUARDING else "")
        for name in wrong]


class Bucket:
    """One bucket's directory: where its keys lie, its locks, its record.

    Holds no S3 state that the disk does not; made anew when the directory
    is replaced.
    """

    def __init__(self, name, root, store, identity):
        self.name, self.root = name, root
        self._root_slash = os.path.join(root, "")
        # characters of a key: none takes more than four bytes
        self._surely_fitting = MAX_PATH_BYTES // 4 - len(root)
        self.identity = identity
        self._sync, self._follow = store.sync, store.follow_symlinks
        self._xattrs = store.xattrs
        self._report = store.report
        self._unique = store.unique and fcntl is not None
        self._real = os.path.realpath(root)
        self._real_slash = os.path.join(self._real, "")
        self._real_state = os.path.join(self._real, STATE, "")
        self._state = os.path.join(root, STATE)
        self._config_path = os.path.join(self._state, "bucket.json")
        self._odd = os.path.join(self._state, "odd")
        self._meta = os.path.join(self._state, "meta")
        self._versions = os.path.join(self._state, "versions")
        self._tmp = os.path.join(self._state, "tmp")
        self._same = os.path.join(self._state, "unique")
        self._logs = os.path.join(self._state, "logs")
        self._locks = os.path.join(self._state, "locks", "")
        self._threads = [threading.Lock() for _ in range(LOCK_STRIPES)]
        self._config, self._no_config = (None, {}), {}
        self._hints_due = 0             # when a sweep looks at unique/
        self._swept = (0, 0)    # sidecars: before when, and all of them when
        self.derived = (None, None)     # room 8's: (config, what follows)
        self.listed = {}        # ListedCache's: show -> (stamp, key -> Listed)

    @functools.cached_property
    def replaces_in_place(self):
        """False where a read of a directory may miss what is replaced."""
        return self._file_system in _IN_PLACE_TYPES

    @property
    def is_local(self):
        """True where a name leads to its file, the old or the new, at every
        moment, and the times are those of our clock."""
        return self._file_system in _LOCAL_TYPES

    @functools.cached_property
    def _file_system(self):
        """Its type; "" where that is not told."""
        return mount_of(self.root)[0]

    # what S3 knows of the bucket

    @property
    def config(self):
        """bucket.json as a dict, read again whenever it was replaced.

        Other processes replace it, too: an inode is soon used again, so
        that two of its contents may differ in nothing but the time.
        """
        path = self._config_path
        try:
            status = os.stat(path)
        except _ABSENT:
            return self._no_config
        stamp = status.st_ino, status.st_mtime_ns, status.st_size
        known, config = self._config
        if known != stamp:
            settled = _settled(status)
            try:
                data = read_state(path)
            except _ABSENT:             # with its bucket, just now
                return self._no_config
            config, faults = parse_settings(data)
            for fault in faults:
                self._report("what is damaged of %s counts as absent: %s"
                             % (path, fault))
            if settled:
                self._config = stamp, config
        return config

    def known_config(self):
        """bucket.json as it was read last; None when that was another one,
        or none."""
        try:
            status = os.stat(self._config_path)
        except OSError:
            return None
        known, config = self._config
        return config if known == (status.st_ino, status.st_mtime_ns,
                                   status.st_size) else None

    def save(self, config, most=None):
        """Replace bucket.json, or EntityTooLarge beyond `most` bytes.  The
        caller holds lock_all()."""
        text = _json_lines(config)
        if most is not None and len(text) > most:
            raise S3Error("EntityTooLarge", "All that is configured of a "
                          "bucket would take more than %d bytes" % most,
                          ProposedSize=len(text), MaxSizeAllowed=most)
        write_state(self._config_path, text, self._sync, True)

    @property
    def owner(self):
        """The user id of the owner; None for a directory made by hand."""
        return self.config.get("owner")

    @property
    def versioning(self):
        """ENABLED, SUSPENDED, or None when it never had versions."""
        return self.config.get("versioning")

    @property
    def region(self):
        """The location the bucket was created with."""
        return self.config.get("region") or "us-east-1"

    @property
    def created_ns(self):
        """When the bucket was created, as far as the disk tells."""
        created = self.config.get("created_ns")
        return created or _modified_ns(self.root)

    # where things lie

    def draft(self):
        """A Draft on the bucket's own file system."""
        return Draft(self._tmp, functools.partial(self._make_state, "tmp"),
                     hashlib.sha256() if self._unique else None)

    def _make_state(self, name):
        """Make a directory of the bucket's state, but never the bucket:
        it may just have been deleted."""
        for path in (self._state, os.path.join(self._state, name)):
            try:
                self._make_directory(path, 0o700)
            except FileNotFoundError:
                raise S3Error("NoSuchBucket",
                              BucketName=self.name) from None

    def _make_directory(self, path, mode=0o777):
        """Make a directory where it is missing.  FileExistsError when
        something else stands in its place."""
        try:
            os.mkdir(path, mode)
            self._sync_directory(os.path.dirname(path))
        except FileExistsError:
            if not _is_surely_there(os.path.join(path, "")) \
                    and os.path.lexists(path):
                raise

    def _open_state(self, name, path, flags):
        """A descriptor of a file in a directory of the bucket's state,
        both made where they are missing."""
        for _ in range(MAX_RETRIES):
            try:
                return os.open(path, flags, 0o600)
            except FileNotFoundError:
                self._make_state(name)
        raise S3Error("SlowDown")

    def _fits(self, key):
        """True when a natural key's whole path can be named."""
        return len(os.fsencode(self.root)) + len(
            key.encode()) < MAX_PATH_BYTES

    def _path(self, key):
        """The natural path of a key, or None."""
        if is_natural(key) and (len(key) < self._surely_fitting
                                or self._fits(key)):
            return self._root_slash + key
        return None

    def _odd_path(self, key):
        return os.path.join(self._odd, odd_name(key))

    def _is_odd(self, key):
        """True when a key has a file under odd/.

        The disk is asked every time: another process may have made odd/
        just now.  Only who holds the key's lock adds or removes its file,
        so that to its holder the answer stays true.
        """
        return _is_there(self._odd) and _is_there(self._odd_path(key))

    def _is_inside(self, real):
        """True for a real path in the bucket, or where links may lead, and
        in no bucket's state."""
        if real == self._real:
            return True
        if real.startswith(self._real_slash):
            real = real[len(self._real_slash):]
        elif not self._follow:
            return False
        return not any(map(is_reserved, filter(None, real.split(os.sep))))

    def _check_inside(self, fd, path):
        """Raise FileNotFoundError when an open file lies elsewhere.

        The kernel tells where the descriptor is: nothing can be swapped
        between the check and the use.
        """
        try:
            real = os.readlink("/proc/self/fd/%d" % fd)
        except OSError:
            real = os.path.realpath(path)
        if real == path:                # no link on the way to it
            return
        if path.startswith(self._state) and real.startswith(
                self._real_state):
            return                      # a path of ours, not of a key
        if not self._is_inside(real):
            raise LeadsOut(errno.ENOENT, "leads out", path)

    def resolve_inside(self, path):
        """The real path of a symlink that may be followed, or None."""
        try:
            real = os.path.realpath(path)
        except OSError:                 # it changes just now
            return None
        return real if self._is_inside(real) else None

    # reading

    @contextlib.contextmanager
    def scan(self, path, stamp):
        """As os.scandir(), of a directory that is proved to be inside and
        the one of that _stamp(); or one of _ABSENT."""
        if not _HAVE_SCANDIR_FD:
            with os.scandir(path) as found:
                yield found
            return
        fd = os.open(path, _OPEN_DIRECTORY)
        try:
            self._check_inside(fd, path)
            if _stamp(os.fstat(fd))[:2] != stamp[:2]:
                raise FileNotFoundError(errno.ENOENT, "replaced", path)
            with os.scandir(fd) as found:
                yield found
        finally:
            os.close(fd)

    def _open_path(self, path):
        """(fd, status) of a regular file, or one of _ABSENT."""
        try:
            fd = _open_fresh(path)
        except OSError as error:
            if error.errno in _ABSENT_ERRNO:
                raise FileNotFoundError(error.errno, "no file",
                                        path) from None
            if os.name == "nt" and os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, "no file",
                                        path) from None
            raise
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError(errno.ENOENT, "no file", path)
            self._check_inside(fd, path)
        except BaseException:
            close_fd(fd)
            raise
        return fd, status

    def _open_in_root(self, path):
        """(fd, status) of a regular file that is no link and lies right in
        the bucket's directory, where nothing can have led out; None for
        anything else, FileNotFoundError for nothing.  _check_inside()
        would be 9 us of a GET."""
        try:
            fd = os.open(path, _OPEN_NO_LINK)
        except FileNotFoundError:
            raise
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode):
                return fd, status
        except OSError:                 # stale, since it was replaced
            pass
        os.close(fd)
        return None

    def _see_in_root(self, key):
        """(path, status, path) of a regular file that lies right in the
        bucket's directory and has its record in it, or None: what
        _open_key() gives, but for the descriptor.  Only for the holder of
        the key's lock does the path lead to the same file later, and a
        hand may remove that."""
        path = self._path(key)
        if path is None or "/" in key or not self._xattrs:
            return None                 # the record tells who may read it
        try:
            status = os.lstat(path)
        except OSError:
            return None
        return (path, status, path) if stat.S_ISREG(status.st_mode) else None

    def _open_key(self, key):
        """(fd, status, path) of a key's file, or None.

        The natural path first, then odd/; again as long as odd/ has just
        changed, because a file may have moved from the second to the
        first, or there and back, in between.
        """
        path = self._path(key)
        for _ in range(MAX_LOOKS):
            began = time.time_ns()      # we may sleep at any moment
            if path is not None:        # nearly always there is its file
                try:
                    found = self._open_in_root(path) \
                        if _OPEN_NO_LINK is not None and "/" not in key \
                        else None
                    fd, status = found or self._open_path(path)
                    return fd, status, path
                except _ABSENT:
                    pass
            odd = self._odd_path(key)
            try:
                return self._open_path(odd) + (odd,)
            except _ABSENT:
                pass
            if path is None or self._odd_stood_still(began):
                return None
        return None

    def _odd_stood_still(self, began_ns):
        """True when nothing has come to odd/ or left it since then."""
        try:
            return _settled(os.stat(self._odd), began_ns)
        except OSError:
            return True

    def _look(self, key):
        """(Info, fd) of an object, or None.

        Where a sidecar was to be read and was not there, the file may
        have been replaced meanwhile: look again.
        """
        for _ in range(MAX_LOOKS):
            found = self._open_key(key)
            if found is None:
                return None
            fd, status, path = found
            try:
                record = self._read_record(fd, status, key)
                if "etag" in record or _same_file(path, status):
                    return _looked_at(Info(key, status, record), fd), fd
            except BaseException:
                close_fd(fd)
                raise
            close_fd(fd)
        raise S3Error("SlowDown")

    def open(self, key):
        """(Info, fd) of an object, or NoSuchKey.  The caller closes."""
        found = self._look(key)
        if found is None:
            raise S3Error("NoSuchKey", Key=key)
        return found

    def find(self, key):
        """The Info of an object, or None."""
        found = self._look(key)
        if found is None:
            return None
        close_fd(found[1])
        return found[0]

    def look_once(self, key, status, path=None):
        """(As find(), status), for listings: without opening the file.
        status: lstat's of the natural path, or None; given back when
        nothing else but a new name in meta/ could make it another Info.
        path: the natural one where it is known to be that."""
        path = path or self._path(key)
        if path is None or status is None \
                or not stat.S_ISREG(status.st_mode):
            return self.find(key), None
        try:
            # where nobody may see the record the listing goes on without
            record, alone = self._find_record(path, status, key,
                                              _UNSEEN_RECORD)
        except OSError:                 # gone, say
            return self.find(key), None
        info = Info(key, status, record)
        if "etag" not in info.record and not _same_file(path, status):
            return self.find(key), None
        return info, status if alone else None

    # records

    def _sidecar(self, key, inode):
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return os.path.join(self._meta, "%s-%x" % (name, inode))

    def _read_record(self, file, status, key):
        """The record of a file (descriptor or path); {} for none.

        What is damaged never fails a read.  OSError where there is one that
        cannot be had: nothing is told of an object, or written, for want of
        its record.
        """
        return self._find_record(file, status, key)[0]

    def _find_record(self, file, status, key, unseen=()):
        """(_read_record(), True when the file itself has it, or there
        surely is none).  unseen: the errnos that count as none."""
        sure = True
        if self._xattrs:
            try:
                return self._loaded(os.getxattr(file, XATTR), key), True
            except OSError as error:
                if error.errno not in _NO_XATTR_YET + unseen:
                    raise
                sure = error.errno in _NO_XATTR_YET
        if not _is_surely_there(self._meta):
            return {}, sure             # as in most buckets
        try:
            return self._loaded(read_state(self._sidecar(
                key, status.st_ino)), key), False
        except OSError as error:
            if error.errno not in (errno.ENOENT,) + unseen:
                raise
            return {}, sure and error.errno == errno.ENOENT

    def has_record(self, file, status, key):
        """True when a file (descriptor or path) has a record, be it a
        damaged one."""
        if self._xattrs:
            with contextlib.suppress(OSError):
                return bool(os.getxattr(file, XATTR))
        return os.path.exists(self._sidecar(key, status.st_ino))

    def sidecars_stamp(self, now_ns):
        """What no sidecar can come or go without changing, () while there
        is no directory of them.  None when that is not to be told: it has
        just changed, or cannot be seen."""
        try:
            status = os.stat(self._meta)
        except FileNotFoundError:
            return ()
        except OSError:
            return None
        return _stamp(status) if _settled(status, now_ns) else None

    def _loaded(self, data, key):
        record = load_record(data)
        if not record:
            self._report("the record of %s/%s is damaged and taken as absent"
                         % (self.name, uri_encode(key, "/-_.~")))
        return record

    def _write_record(self, fd, status, key, record):
        """Give a file its record; the sidecar's path if it took one.

        A locked version is read-only: a hint to people, no more.
        """
        lock = record.get("lock")
        if lock is None and status.st_mode & stat.S_IWUSR:
            return self._store_record(fd, status, key, record)
        mode = stat.S_IMODE(status.st_mode)
        _change_mode(fd, mode | stat.S_IWUSR)
        try:
            return self._store_record(fd, status, key, record)
        finally:
            if lock is None:
                _change_mode(fd, mode)
            elif "mode" in lock or lock.get("hold") == "ON":
                _change_mode(fd, mode & ~0o222)

    def _rewrite_record(self, fd, status, key, record):
        """The same for a file that is there already."""
        self._write_record(fd, status, key, record)
        if self._sync:
            sync_file(fd)

    def _store_record(self, fd, status, key, record):
        if self._xattrs:
            try:
                os.setxattr(fd, XATTR, dump_record(record))
                return None
            except OSError as error:
                if error.errno not in _NO_XATTR:
                    raise
        path = self._sidecar(key, status.st_ino)
        record["key"] = key             # so that a sweep can tell whose it is
        with self.draft() as draft:
            draft.write(dump_record(record))
            draft.flush(self._sync)
            self._make_state("meta")
            draft.publish(path)
        self._sync_directory(self._meta)
        self._drop_xattr(fd)
        return path

    def _drop_xattr(self, fd):
        """Remove the record that a file had before it got a sidecar, which
        else would not be looked for."""
        if self._xattrs:
            try:
                os.removexattr(fd, XATTR)
            except OSError as error:
                if error.errno not in _NO_XATTR_YET:
                    raise

    def _drop_sidecar(self, key, inode):
        """Remove a sidecar, unless a version still has that inode."""
        if not _is_there(self._meta):
            return
        path = self._sidecar(key, inode)
        with contextlib.suppress(OSError):      # a sweep will do it
            if _is_there(path) and not self._describes(
                    key, os.path.basename(path)):
                _unlink(path)

    # locks

    def lock(self, *keys):
        """Hold the write locks of some keys, against every thread and
        process; stripes in one order, so that no two wait in a ring."""
        numbers = map(_stripe, keys)
        if len(keys) > 1:
            numbers = sorted(set(numbers))
        return Stripes(numbers, self._threads, self._flock)

    def lock_all(self):
        """Hold every write lock of the bucket."""
        return Stripes(range(LOCK_STRIPES), self._threads, self._flock)

    def _stripe_path(self, stripe):
        return self._locks + "%02d" % stripe

    def _flock(self, stripe):
        """A descriptor that holds a stripe's flock until it is closed.

        The file is opened every time: one kept open would go on locking
        what was removed or moved away, while others lock its successor.
        So may one that was opened just before its bucket was deleted, and
        made anew.
        """
        path = self._stripe_path(stripe)
        for _ in range(MAX_RETRIES):
            fd = self._open_state("locks", path, _OPEN_LOCK)
            try:
                if not try_flock(fd):
                    fcntl.flock(fd, fcntl.LOCK_EX)
                if not fcntl or _is_open(path, fd):
                    return fd
            except BaseException:
                close_fd(fd)
                raise
            close_fd(fd)
        raise S3Error("SlowDown")

    def next_number(self, key):
        """A number above all that this key was given before: nanoseconds
        since the epoch, or one more than the last.  The caller holds the
        key's lock; its file keeps the last one, for all processes and for
        a clock that is set back."""
        fd = self._open_state("locks", self._stripe_path(_stripe(key)),
                              _OPEN_LOCK)
        try:
            try:
                last = int(os.read(fd, 16), 16)
            except ValueError:          # the first one
                last = 0
            number = max(time.time_ns(), last + 1)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, b"%016x" % number)
            return number
        finally:
            close_fd(fd)

    # writing; the caller holds the key's lock

    def _place(self, key, make=False):
        """(dir_fd, name) of a natural key, its directory open and proved
        to be inside; made first if `make`.  InTheWay when it cannot be.
        The caller closes, unless that is (None, path)."""
        parent, _, name = key.rpartition("/")
        if not parent and not self._sync:
            # the root itself is inside; and nothing is to be fsynced
            return None, self._root_slash + name
        path = self._root_slash + parent if parent else self.root
        if not _HAVE_DIR_FD:
            if make:
                self._make_directories(parent)
            if self.resolve_inside(path) is None:
                raise LeadsOut(errno.ENOENT, "leads out", path)
            return None, os.path.join(path, name)
        try:
            fd = os.open(path, _OPEN_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            if not make:
                raise
            self._make_directories(parent)
            fd = os.open(path, _OPEN_DIRECTORY)
        try:
            self._check_inside(fd, path)
        except BaseException:
            close_fd(fd)
            raise
        return fd, name

    @contextlib.contextmanager
    def _at(self, key, path):
        """(dir_fd, name) of a key's file at `path`, natural or under odd/.
        """
        if path == self._odd_path(key):
            yield None, path
            return
        fd, name = self._place(key)
        try:
            yield fd, name
        finally:
            close_fd(fd)

    def _sync_directory(self, path):
        """Make the entries of a directory durable, where asked to."""
        if self._sync:
            sync_directory(path)

    def _sync_place(self, fd):
        """Make a change in a _place() durable."""
        if self._sync and fd is not None:
            sync_file(fd)

    def _make_directories(self, parent):
        """mkdir -p below the root, no step of it leading out: each is made
        in the place that was proved to be inside."""
        done = ""
        for segment in parent.split("/") if parent else ():
            done = done + "/" + segment if done else segment
            path = self._root_slash + done
            fd, name = self._place(done)
            try:
                os.mkdir(name, dir_fd=fd)
                self._sync_place(fd)
            except FileExistsError:
                if self.resolve_inside(path) is None:
                    raise LeadsOut(errno.ENOENT, "leads out", path) from None
                if not os.path.isdir(path):
                    raise InTheWay(done) from None
            finally:
                close_fd(fd)

    def publish(self, draft, key, record):
        """Make a sealed draft the object `key`, by one rename."""
        status = draft.status
        if _is_hashed(key):
            record["key"] = key
        sidecar = self._write_record(draft.fd, status, key, record)
        try:
            draft.flush(self._sync)
            replaced = self._inode(key)
            self._move(draft.path, key)
            draft.path = None
        except BaseException:
            if sidecar and os.path.exists(draft.path):
                _unlink(sidecar)
            raise
        if replaced is not None and replaced != status.st_ino:
            self._drop_sidecar(key, replaced)
        return Info(key, status, record)

    def _inode(self, key):
        """The inode of a key's file when it may have a sidecar."""
        if _is_there(self._meta):
            found = self._open_key(key)
            if found:
                close_fd(found[0])
                return found[1].st_ino
        return None

    def _move(self, source, key, source_fd=None):
        """Rename a file of this file system, a path or a _place(), to where
        `key` lies."""
        path = self._path(key)
        if path is not None and self._move_natural(source, key, path,
                                                   source_fd):
            if self._is_odd(key) and _unlink(self._odd_path(key)):
                self._sync_directory(self._odd)
            return
        odd = self._odd_path(key)
        try:
            os.replace(source, odd, src_dir_fd=source_fd)
        except FileNotFoundError:
            self._make_state("odd")
            if not _is_surely_there(source, source_fd):
                raise S3Error("NoSuchBucket",       # it was another one
                              BucketName=self.name) from None
            os.replace(source, odd, src_dir_fd=source_fd)
        self._sync_directory(self._odd)
        if key[-1] == "/" and is_natural(key[:-1]):
            with contextlib.suppress(OSError, InTheWay, S3Error):
                self._make_directories(key[:-1])

    def _move_natural(self, source, key, path, source_fd):
        """Rename to the natural path; False when a directory is there."""
        for _ in range(MAX_RETRIES):
            try:
                if _leads_to_directory(path):
                    return False        # a link's too: keys lie behind it
                fd, name = self._place(key, make=True)
                try:
                    os.replace(source, name, src_dir_fd=source_fd,
                               dst_dir_fd=fd)
                    self._sync_place(fd)
                finally:
                    close_fd(fd)
                return True
            except IsADirectoryError:
                return False
            except PermissionError:         # Windows, a directory there
                if os.path.isdir(path):
                    return False
                raise
            except LeadsOut as error:
                raise storage_error(error) from None
            except (FileNotFoundError, NotADirectoryError):
                # a delete next to us pruned the directory, and a file may
                # have taken its place: make it again
                if not _is_surely_there(source, source_fd):
                    raise S3Error("NoSuchBucket",
                                  BucketName=self.name) from None
            except OSError as error:
                # the source lies below the target, or the name is longer
                # than this file system takes
                if error.errno == errno.ELOOP:
                    raise storage_error(error) from None
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST,
                                       errno.ENAMETOOLONG):
                    raise
                return False
        raise S3Error("OperationAborted")

    def demote(self, key):
        """Move a file out of the way of a directory of its name.

        Readers look at odd/ after the natural path: none misses it.  The
        caller holds the lock of `key`, and not of what needs the place.
        """
        found, path = self._open_key(key), self._path(key)
        try:
            movable = found is not None and found[2] == path \
                and not _is_link(path)
            if movable:
                self._name_record(found[0], found[1], key)
        finally:
            if found:
                close_fd(found[0])
        if not movable:
            if os.path.lexists(path) and not os.path.isdir(path):
                raise S3Error("AccessDenied", "Something that is no object "
                              "stands in the way of this key")
            return
        self._make_state("odd")
        with self._at(key, path) as (place, name):
            os.replace(name, self._odd_path(key), src_dir_fd=place)
        self._sync_directory(self._odd)     # before its place is taken

    def _name_record(self, fd, status, key, old_key=None):
        """Write the record of a file anew when its name under odd/ will
        not tell its key, or when its sidecar has to change its name."""
        record = self._read_record(fd, status, old_key or key)
        hashed = _is_hashed(key) or _is_hashed(old_key or key)
        renamed = old_key is not None and _is_surely_there(
            self._sidecar(old_key, status.st_ino))
        if hashed or renamed:
            # until the rename the file still bears its old name
            record["key"], record["was"] = key, old_key or key
            self._rewrite_record(fd, status, key, record)
        return renamed

    def remove(self, key, allow=None):
        """Remove an object's file; True when there was one.

        allow(info) may raise before that.
        """
        found = self._see_in_root(key) or self._open_key(key)
        if found is None:
            return False
        file, status, path = found
        try:
            # no _look() again for a sidecar: the lock keeps it
            record = self._read_record(file, status, key) if allow else {}
        except _ABSENT:                 # by hand, just now
            record = {}
        finally:
            if file is not path:
                close_fd(file)
        if allow:
            allow(Info(key, status, record))
        try:
            self._unlink_key(key, path)
        except _ABSENT:                 # by hand, just now
            pass
        self._drop_sidecar(key, status.st_ino)
        return True

    def _drop_twin(self, key):
        """Remove the older file under odd/ that a crash may have left of a
        key, before its file at the natural path ceases to hide it."""
        if self._drop(key, self._odd_path(key)):
            self._sync_directory(self._odd)

    def _drop(self, key, path):
        """Remove a file and its sidecar; False when it is not there."""
        try:
            inode = os.stat(path).st_ino
        except _ABSENT:
            return False
        _unlink(path)
        self._drop_sidecar(key, inode)
        return True

    def _unlink_key(self, key, path):
        """Remove the file of a key, which lies there: at the natural path
        or under odd/."""
        if path == self._root_slash + key:
            self._drop_twin(key)
            fd, name = self._place(key)
            try:
                os.unlink(name, dir_fd=fd)
                self._sync_place(fd)
            finally:
                close_fd(fd)
        else:
            os.unlink(path)
            self._sync_directory(self._odd)
        self._prune(key)

    def _prune(self, key):
        """Remove the directories above a key that hold nothing more."""
        if "/" not in key:
            return
        parent = key.rstrip("/") + "/" if key.endswith("/") else key
        parent = parent.rpartition("/")[0]
        while parent and is_natural(parent):
            if self._is_odd(parent + "/"):
                return
            if not self._remove_directory(parent):
                return
            parent = parent.rpartition("/")[0]

    def _remove_directory(self, key):
        """Remove a directory when it is empty; True when it was."""
        try:
            fd, name = self._place(key)
        except OSError:
            return False
        try:
            try:
                os.rmdir(name, dir_fd=fd)
            except OSError:
                return False
            self._sync_place(fd)
            return True
        finally:
            close_fd(fd)

    def rename(self, source, key):
        """Make the object `source` the object `key`, by one rename."""
        found = self._open_key(source)
        if found is None:
            raise S3Error("NoSuchKey", Key=source)
        fd, status, path = found
        try:
            if _is_link(path):
                raise S3Error("AccessDenied", "A symbolic link would lead "
                              "elsewhere from its new place")
            replaced = self._inode(key)
            renamed = self._name_record(fd, status, key, source)
        finally:
            close_fd(fd)
        if path != self._odd_path(source):
            self._drop_twin(source)
        with self._at(source, path) as (place, name):
            self._move(name, key, place)
            if place is None:
                self._sync_directory(os.path.dirname(path))
            self._sync_place(place)
        if renamed:
            self._drop_sidecar(source, status.st_ino)
        if replaced is not None:
            self._drop_sidecar(key, replaced)
        self._prune(source)

    def retry(self, key, step, *others):
        """Run step() under the key's lock, moving files that stand in the
        way of a directory out of it, each under its own lock."""
        for _ in range(MAX_RETRIES):
            try:
                with self.lock(key, *others):
                    return step()
            except InTheWay as obstacle:
                with self.lock(obstacle.key):
                    self.demote(obstacle.key)
        raise S3Error("OperationAborted")

    def sweep(self, now, before):
        """Remove drafts and sidecars, unchanged since `before`, that serve
        nobody any more, and now and then hints; how many."""
        count = (_sweep_drafts(self._tmp, before)
                 + _sweep_drafts(self._state, before)
                 + self._sweep_sidecars(before))
        if now >= self._hints_due:
            self._hints_due = now + HINTS_SECONDS
            count += self.sweep_hints(MAX_SWEPT_HINTS)
        return count

    def _sweep_sidecars(self, before):
        """Remove the sidecars, unchanged since `before`, that no longer
        describe their key's file; how many.

        A look at one takes 60 us: at first and once a day all of them have
        it, else those that have come or changed since the last time.
        """
        count, since, first = 0, *self._swept
        if not 0 <= before - first < FULL_SWEEP_SECONDS:
            since, first = 0, before
        for name in _listdir(self._meta) \
                if _modified(self._meta) >= since else ():
            path = os.path.join(self._meta, name)
            if _modified(path) < since:
                continue
            try:
                record = load_record(read_state(path))
            except OSError:
                continue
            key = record.get("key")     # without it it may be anyone's
            if key and _modified(path) < before \
                    and not self._describes(key, name):
                with self.lock(key):    # nobody is about to publish it
                    if not self._describes(key, name) \
                            and not self.fitting(key, record):
                        count += _unlink(path)
        self._swept = before, first
        return count

    def fitting(self, key, record):
        """The sidecars, there or not, of the files of a key that a record
        fits: {sidecar: whether its file has a record}.  In a copy of the
        bucket, which has other inodes, it may lie under another name."""
        found = {}
        for path in self._files_of(key):
            status = os.stat(path)
            if (record.get("size"), record.get("mtime_ns")) == (
                    status.st_size, status.st_mtime_ns):
                found[self._sidecar(key, status.st_ino)] = self.has_record(
                    path, status, key)
        return found

    def _describes(self, key, name):
        """True when a sidecar of that name is that of the key's file or of
        a version, or when that is not to be told just now."""
        found = self._open_key(key)
        if found is not None:
            close_fd(found[0])
            if self._sidecar(key, found[1].st_ino).endswith(name):
                return True
        directory = self._version_directory(key)
        for version in _listdir(directory):
            try:
                inode = os.stat(os.path.join(directory, version)).st_ino
            except _ABSENT:
                continue
            except OSError:
                return True
            if self._sidecar(key, inode).endswith(name):
                return True
        return False

    # versions; the caller holds the key's lock to change any

    def _version_directory(self, key):
        return os.path.join(self._versions, odd_name(key))

    def version_names(self, key, current=True):
        """The file names of a key's noncurrent versions and markers, the
        newest first; current: False when the key has no file."""
        return _version_names(_listdir(self._version_directory(key)),
                              current)

    def _load_version(self, key, name, latest=False):
        """(Info, fd) of a noncurrent version or marker; None if gone."""
        path = os.path.join(self._version_directory(key), name)
        try:
            fd, status = self._open_path(path)
        except _ABSENT:
            return None
        try:
            record = self._read_record(fd, status, key)
            if record or _same_file(path, status):
                # its name is sure, even where its record is damaged
                record["version"] = _version_of(name)
                info = _looked_at(Info(key, status, record), fd)
                info.latest = latest and info.marker
                return info, fd
        except BaseException:
            close_fd(fd)
            raise
        close_fd(fd)
        return None

    def open_version(self, key, version_id=None, names=None):
        """(Info, fd) of a version, the latest for None.  The caller
        closes.  NoSuchKey, NoSuchVersion; a marker is given like others.
        names: version_names(), for who knows them and holds the lock.
        """
        for _ in range(MAX_LOOKS):
            found = self._seek_version(key, version_id, names)
            if found:
                return found
            # gone, or moved behind our back?  Never among the versions
            # where there are none; what is in odd/ _open_key() has seen to
            names, (current, seen) = None, self._snapshot(key) \
                if not self.is_local or _is_surely_there(self._versions) \
                else (None, ())
            if version_id is None:
                if current is None and not (
                        seen and self._is_marker(key, seen[0])):
                    raise S3Error("NoSuchKey", Key=key)
            elif (current is None or current.version_id != version_id) \
                    and _name_of(version_id, seen) is None:
                raise S3Error("NoSuchVersion", Key=key,
                              VersionId=version_id)
        name = version_id and self._version_name(key, version_id)
        with contextlib.suppress(*_ABSENT):
            # put there by hand
            if name and not stat.S_ISREG(os.lstat(os.path.join(
                    self._version_directory(key), name)).st_mode):
                raise S3Error("NoSuchVersion", Key=key,
                              VersionId=version_id)
        raise S3Error("SlowDown")

    def _seek_version(self, key, version_id, names=None):
        """As open_version(), in one look; None when it was not there."""
        found = self._look(key)
        if found:
            if version_id is None or version_id == found[0].version_id:
                return found
            close_fd(found[1])
            if _VERSION_ID.match(version_id):
                # not the latest: no need to look at thousands of names
                return self._load_version(key, version_id)
        if names is None:
            names = self.version_names(key, bool(found))
        name = _name_of(version_id, names) if version_id \
            else names[:1] and names[0]
        version = name and self._load_version(
            key, name, not found and name == names[0])
        if version and version_id is None and not version[0].marker:
            close_fd(version[1])        # its successor went by hand
            return None
        return version

    def _snapshot(self, key):
        """(Info of the current version or None, version_names) as they
        were at one moment: seen twice in turn."""
        directory, before = self._version_directory(key), None
        for _ in range(MAX_LOOKS):
            current, names = self.find(key), _listdir(directory)
            now = names, current and (current.version_id, current.mtime_ns,
                                      current.size)
            if now == before:
                break
            before = now
        return current, _version_names(names, current is not None)

    def _version_name(self, key, version_id):
        """The file name of a noncurrent version, or None."""
        return _name_of(version_id, self.version_names(key))

    def _is_marker(self, key, name):
        found = self._load_version(key, name)
        if found:
            close_fd(found[1])
        return bool(found) and found[0].marker

    def versions(self, key, most=None, after=None):
        """The Infos of all versions and markers, or of so many, or of those
        behind one, the newest first, as they were at one moment."""
        for _ in range(MAX_LOOKS):
            (current, names), passed = self._snapshot(key), ()
            if after:
                ids = [current.version_id] if current else []
                passed = _up_to_version(list(dict.fromkeys(
                    ids + list(map(_version_of, names)))), after)
            infos = self._load_versions(key, current, names, most, passed)
            if passed or not names or infos[:1] and infos[0].version_id in (
                    current and current.version_id, _version_of(names[0])):
                break                   # else the latest went meanwhile
        return infos

    def _load_versions(self, key, current, names, most, passed):
        """versions(), less those that have gone since the _snapshot() and
        the ids that are `passed`."""
        found = [current] if current and not passed else []
        known = {info.version_id for info in found}.union(passed)
        for name in names:
            if len(found) == most:
                break
            # a crash may have left the current one here as well
            version_id = _version_of(name)
            if version_id in known:
                continue
            known.add(version_id)
            version = self._load_version(key, name) \
                or self._seek_version(key, version_id)
            if version:
                info, fd = version
                close_fd(fd)
                info.latest = info.marker and not (found or passed)
                found.append(info)
        return found

    def settle(self, key):
        """Finish or undo what a crash has cut off among the versions of a
        key; version_names() then.  Every change of them starts here."""
        names = self.version_names(key, False)
        text = " ".join(names)          # there may be thousands
        if PENDING not in text and NULL_VERSION not in text:
            return names
        pending = [name for name in names if name.endswith(PENDING)]
        null = _name_of(NULL_VERSION, names)
        current = self.find(key)
        if current is None and pending:
            self._finish_marker(key, pending[0])
        elif current:
            for name in pending:
                self.drop_version(key, name)
            if null and null == current.record.get("replaces"):
                self.drop_version(key, null)
        return self.version_names(key)

    def is_unsettled(self, key, names):
        """True when settle() has something to do.  names: with those that
        are pending."""
        null = _name_of(NULL_VERSION, names)
        current = null and self.find(key)
        return any(name.endswith(PENDING) for name in names) or bool(
            current and current.record.get("replaces") == null)

    def archive(self, key, names, keep_null=True):
        """Link the current version in among the noncurrent ones, `names`,
        the newest first; the names then.  It stays where it is, too.
        keep_null: also when it is the null version."""
        found = self._open_key(key)
        if found is None:
            return names
        fd, status, path = found
        try:
            record = self._read_record(fd, status, key)
            name = record.get("version", NULL_VERSION)
            if name == NULL_VERSION and not keep_null:
                return names
            twin = _name_of(name, names)
            directory = self._make_versions(key)
            if twin and _is_like(os.path.join(directory, twin), status):
                name = None             # a crash left it there
            elif twin:
                # a file put here by hand replaces no other version
                name = record["version"] = new_version_id(names)
                self._rewrite_record(fd, status, key, record)
            elif name == NULL_VERSION:
                name = _version_stamp(min(
                    status.st_mtime_ns, time.time_ns()), names) + name
            target = name and os.path.join(directory, name)
            if name and not self._link(key, path, target):
                self._copy_version(fd, status, key, record, target)
        finally:
            close_fd(fd)
        self._sync_directory(directory)
        return sorted(names + [name]) if name else names

    def _link(self, key, path, target):
        """Make a hard link of a key's file; False where there can be none.
        One of a symlink would lead elsewhere from its new place."""
        if _is_link(path):
            return False
        try:
            with self._at(key, path) as (fd, name):
                os.link(name, target, src_dir_fd=fd,
                        follow_symlinks=fd is None)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            return False
        return True

    def _copy_version(self, fd, status, key, record, target):
        """Copy a version, its time and record with it, to `target`."""
        with self.draft() as draft:
            draft.copy(fd, 0, status.st_size)
            os.utime(draft.path, ns=(status.st_mtime_ns,) * 2)
            self._write_record(draft.fd, os.fstat(draft.fd), key, record)
            draft.flush(self._sync)
            draft.publish(target)

    def _make_versions(self, key):
        """The directory for a key's versions, made; it stays as long as
        the key has any version, for the sake of listings."""
        directory = self._version_directory(key)
        if not _leads_to_directory(directory):
            self._make_state("versions")
            self._make_directory(directory)
        if _is_hashed(key) and not os.path.exists(
                os.path.join(directory, KEY_FILE)):
            self.write_key_file(key)
        return directory

    def write_key_file(self, key):
        """Have the directory of a key's versions tell the key."""
        with self.draft() as draft:
            draft.write(dump_record({"key": key}))
            draft.flush(self._sync)
            draft.publish(os.path.join(
                self._version_directory(key), KEY_FILE))
        os.utime(self._versions)        # no listing without it is good

    def add_marker(self, key, names, version_id):
        """Publish a delete marker as the newest version, and remove the
        key's file.

        That is the moment at which it comes into force: one that is
        PENDING counts only while there is no file.
        """
        record = {"marker": True, "key": key}
        name = version_id
        if version_id == NULL_VERSION:
            name = _version_stamp(time.time_ns(), names) + name
        directory = self._make_versions(key)
        with self.draft() as draft:
            status = draft.seal(record)
            self._write_record(draft.fd, status, key, record)
            draft.flush(self._sync)
            draft.publish(os.path.join(directory, name + PENDING))
        self._sync_directory(directory)
        self.remove(key)
        self._finish_marker(key, name + PENDING)

    def _finish_marker(self, key, pending):
        """Make a marker in force one like others.  The null version that a
        null one replaces goes first."""
        name = pending[:-len(PENDING)]
        if NULL_VERSION in name:
            old = self._version_name(key, NULL_VERSION)
            if old:
                self.drop_version(key, old)
        directory = self._version_directory(key)
        os.replace(os.path.join(directory, pending),
                   os.path.join(directory, name))
        self._sync_directory(directory)

    def drop_version(self, key, name):
        """Remove a noncurrent version or marker by its file name."""
        directory = self._version_directory(key)
        if self._drop(key, os.path.join(directory, name)):
            self._sync_directory(directory)

    def promote(self, key, name):
        """Make a noncurrent version current, over what is there."""
        replaced = self._inode(key)
        path = os.path.join(self._version_directory(key), name)
        fd, status = self._open_path(path)
        try:
            self._name_record(fd, status, key)
        finally:
            close_fd(fd)
        self._move(path, key)
        self._sync_directory(os.path.dirname(path))
        if replaced not in (None, status.st_ino):
            self._drop_sidecar(key, replaced)

    def remove_version(self, key, info, names):
        """Remove one version: the latest makes way for the one before.
        names: what settle() gave."""
        name = _name_of(info.version_id, names)
        others = [other for other in names if other != name]
        if info.marker and info.latest:
            self._uncover(key, name, others)
        elif name:                      # or its twin, after a crash
            self.drop_version(key, name)
        if info.latest and not info.marker:
            heir = self._heir(key, others)
            if heir:
                self.promote(key, heir)
            else:
                self.remove(key)
        if len(others) < 2:             # one may have been the heir
            self._prune_versions(key)

    def _heir(self, key, names):
        """The file name of the newest version among `names`, unless that
        is a marker; or None.  What is no file was put there by hand."""
        for name in names:
            found = self._load_version(key, name)
            if found:
                close_fd(found[1])
                return None if found[0].marker else name
        return None

    def _uncover(self, key, marker, others):
        """Remove the latest version, a marker: it is out of force when the
        one before it, of the `others`, has become the key's file."""
        heir = self._heir(key, others)
        if heir:
            directory = self._version_directory(key)
            os.replace(os.path.join(directory, marker),
                       os.path.join(directory, marker + PENDING))
            self._sync_directory(directory)
            self.promote(key, heir)
            marker += PENDING
        self.drop_version(key, marker)

    def _prune_versions(self, key):
        """Remove the directory of a key that has no version any more."""
        directory = self._version_directory(key)
        if set(_listdir(directory)) <= {KEY_FILE} and not self.find(key):
            _unlink(os.path.join(directory, KEY_FILE))
            with contextlib.suppress(OSError):
                os.rmdir(directory)

    def update_record(self, key, version_id, change, done=None):
        """Change the record of a version in place, change(record) being
        given it; its new Info, which done(info) is given under the lock.
        MethodNotAllowed for a delete marker."""
        with self.lock(key):
            return self.change_record(key, version_id, change, done)

    def change_record(self, key, version_id, change, done=None):
        """The same; the caller holds the key's lock."""
        info, fd = self.open_version(key, version_id)
        try:
            if info.marker:             # 405, however it was named
                raise marker_error(info, info.version_id)
            status = os.fstat(fd)
            record = self._read_record(fd, status, key)
            if info.version_id != NULL_VERSION:     # should it be damaged
                record["version"] = info.version_id
            change(record)
            self._rewrite_record(fd, status, key, record)
            info = Info(key, status, record, info.latest)
            if done:
                done(info)
            return info
        finally:
            close_fd(fd)

    # content that is there already: under unique/ a file for each SHA-256
    # and size, with the key that had that content last.  It is a hint: what
    # shares content is compared in the kernel first, so all of it may be
    # wrong, or be removed at any time.

    def share(self, draft):
        """Have the content of a draft take no room where the bucket has
        the same; its name under unique/, None when that is not to be kept.
        """
        if not self._unique or draft.size < MIN_SHARED_BYTES:
            return None
        digest = draft.digest
        if digest is None:
            digest = hashlib.sha256()
            for block in read_blocks(draft.fd, 0, draft.size):
                digest.update(block)
        name = "%s-%x" % (digest.hexdigest(), draft.size)
        with contextlib.suppress(OSError):
            key = load_record(read_state(os.path.join(
                self._same, name))).get("key")
            for path in self._files_of(key) if key else ():
                if self._shares(path, draft):
                    break
        return name if self._unique else None

    def _files_of(self, key):
        """Where the versions of a key lie, the newest first."""
        found = self._open_key(key)
        if found:
            close_fd(found[0])
            yield found[2]
        directory = self._version_directory(key)
        for name in self.version_names(key, False):
            yield os.path.join(directory, name)

    def _shares(self, path, draft):
        """True when a draft has the content of another file, and has it
        by reflink now."""
        fd, status = self._open_path(path)
        try:
            return status.st_size == draft.size and share_content(
                fd, draft.fd, draft.size)
        except OSError as error:
            if error.errno in _NO_SHARING:
                self._unique = False
                self._report("-unique: the file system of %s cannot share "
                             "content: all is stored in full" % self.root)
            return False
        finally:
            close_fd(fd)

    def note_content(self, name, key):
        """Tell under unique/ which key has some content."""
        with contextlib.suppress(OSError, S3Error), self.draft() as draft:
            draft.write(dump_record({"key": key}))
            path = os.path.join(self._same, name)
            try:
                draft.publish(path)
            except FileNotFoundError:
                self._make_state("unique")
                draft.publish(path)

    def sweep_hints(self, limit=None):
        """Remove the hints, at most `limit` that chance picks, to content
        that no key has any more; how many."""
        names, count = _listdir(self._same), 0
        if limit is not None and len(names) > limit:
            names = random.sample(names, limit)
        for name in names:
            path, size = os.path.join(self._same, name), name[65:]
            with contextlib.suppress(OSError):
                key = load_record(read_state(path)).get("key", "")
                if not any("%x" % os.stat(place).st_size == size
                           for place in self._files_of(key)):
                    count += _unlink(path)
        return count

    # access logs: a file a day, which a deliverer claims by renaming it

    def append_log(self, day, lines):
        """Add lines (bytes) to the spool of a day, YYYYMMDD; they are lost
        where MAX_SPOOLED_BYTES lie there already.

        A line that a crash or a full disk has cut short ends where the
        next one begins.
        """
        path = os.path.join(self._logs, day)
        flags = (os.O_RDWR | os.O_CREAT | os.O_APPEND
                 | getattr(os, "O_NONBLOCK", 0)
                 | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        with self.lock(_LOGS):
            fd = self._open_state("logs", path, flags)
            try:
                size = os.fstat(fd).st_size
                if size and _pread(fd, 1, size - 1) != b"\n":
                    lines = b"\n" + lines
                if size < MAX_SPOOLED_BYTES <= size + len(lines):
                    self._report("the access log of %s is full: lines are "
                                 "lost until it is delivered" % self.name)
                if size < MAX_SPOOLED_BYTES:
                    os.write(fd, lines)
            finally:
                close_fd(fd)

    def spooled_logs(self):
        """The names of the claimed files, the oldest first."""
        return sorted(filter(_CLAIMED_LOG.match, _listdir(self._logs)))

    def claim_logs(self, stamp):
        """Rename what has been spooled to <day>-<stamp>-<unique>, which
        nobody will write to any more."""
        for day in filter(_SPOOLED_LOG.match, _listdir(self._logs)):
            path = os.path.join(self._logs, day)
            with self.lock(_LOGS), contextlib.suppress(FileNotFoundError):
                os.rename(path, "%s-%s-%s" % (
                    path, stamp, secrets.token_hex(8).upper()))

    def take_log(self, name, deliver):
        """Call deliver(file) with a claimed file, and remove the file; what
        deliver() said, 0 when another process has or had the file.  It
        stays when deliver() raises."""
        path = os.path.join(self._logs, name)
        try:
            file = open(path, "r+b")    # see _OPEN_HELD
        except _ABSENT:
            return 0
        with file:
            if not try_flock(file.fileno()):
                return 0
            if not _same_file(path, os.fstat(file.fileno())):
                return 0                # somebody else was quicker
            done = deliver(file)
            if fcntl:
                _unlink(path)           # before anybody else can lock it
        _unlink(path)                   # where an open file stays
        return done

    def trim_logs(self, limit=MAX_SPOOLED_BYTES):
        """Remove the oldest files of the spool beyond `limit` bytes; how
        many bytes are gone."""
        gone = 0
        # of one day, what is not claimed yet is the newest
        for name in sorted(_listdir(self._logs), reverse=True,
                           key=lambda name: name[:8] + (name[8:] or "~")):
            path = os.path.join(self._logs, name)
            with contextlib.suppress(FileNotFoundError):
                size = os.stat(path).st_size
                limit -= size
                if limit < 0:
                    os.unlink(path)
                    gone += size
        return gone

    def is_empty(self):
        """True when the directory holds no object and no other file."""
        def refuse(error):
            raise error
        for path, directories, files in os.walk(self.root, onerror=refuse):
            if path == self.root and STATE in directories:
                directories.remove(STATE)
            if files or any(_is_link(os.path.join(path, name))
                            for name in directories):
                return False
        for path, no_content in ((self._odd, ()),
                                 (self._versions, (KEY_FILE,))):
            for _, _, files in os.walk(path, onerror=refuse) \
                    if _is_surely_there(path) else ():
                if set(files).difference(no_content):
                    return False
        return True


def _is_like(path, status):
    """True for a file of the same size and time."""
    found = os.stat(path)
    return (found.st_size, found.st_mtime_ns) == (status.st_size,
                                                  status.st_mtime_ns)


# ENOENT: an open file whose name went by hand can still be copied
_NO_LINK = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP,
            errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.ENOENT)


def _change_mode(fd, mode):
    if hasattr(os, "fchmod"):           # not on Windows before 3.13
        with contextlib.suppress(OSError):      # somebody else's file
            os.fchmod(fd, mode)


_NO_XATTR_YET = (errno.ENODATA, errno.ENOTSUP, errno.EOPNOTSUPP,
                 errno.ENOSYS)
_NO_XATTR = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.E2BIG, errno.ENOSPC,
             errno.ERANGE, errno.EPERM, errno.EACCES, errno.ENOSYS,
             errno.EDQUOT)
_UNSEEN_RECORD = (errno.EACCES, errno.EPERM)
# There is no record; anything else may pass
_NO_RECORD = _NO_XATTR_YET + (
    errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def _record_inside(path, unseen=()):
    """The record that a file itself has, {} for none; OSError where it
    cannot be had, but for the errnos `unseen`."""
    try:
        return load_record(os.getxattr(path, XATTR))
    except OSError as error:
        if error.errno not in _NO_RECORD + unseen:
            raise
        return {}


# --- listing ---

class Names(NamedTuple):
    """A directory as read: its entries in S3's order, directories with a
    `/` at their end; `links`: those of them that are symlinks."""
    stamp: Tuple[int, int, int, int]
    entries: Any                        # a list, or PackedNames
    links: frozenset


class PackedNames:
    """Sorted file names, in a quarter of a list's memory: 64 to a string.

    What takes a list, such as bisect, takes them; since() is for walking.
    """

    __slots__ = ("blocks", "_count")

    def __init__(self, names):
        self._count = len(names)
        self.blocks = ["\0".join(names[start:start + 64])
                       for start in range(0, len(names), 64)]

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return self.blocks[index >> 6].split("\0")[index & 63]

    def since(self, index):
        """The names from an index on."""
        first = index >> 6
        names = itertools.chain.from_iterable(
            block.split("\0") for block in self.blocks[first:])
        return itertools.islice(names, index & 63, None)


def _stamp(status):
    """What a directory cannot change without."""
    return (status.st_dev, status.st_ino, status.st_mtime_ns,
            status.st_ctime_ns)


class Reading:
    """A directory being read, by one thread at a time: sixteen took 630
    MiB, each for a list of a million names."""

    __slots__ = ("lock", "begun", "names")

    def __init__(self):
        self.lock = threading.Lock()
        self.begun, self.names = -1, None


class DirectoryCache:
    """Sorted directory listings, each good while its mtime stands still.

    The racily-clean rule of version control: a listing is kept only if the
    directory's mtime was old enough, when it was read, that any later
    change must show as another mtime.
    """

    def __init__(self, limit=MAX_CACHED_NAMES_BYTES):
        self._limit, self._bytes = limit, 0
        self._lock = threading.Lock()
        self._known = collections.OrderedDict()
        self._readings = {}             # path -> Reading

    def get(self, path, read):
        """The Names of a directory; read(path, stamp) makes them anew."""
        names = self._find(path, os.stat(path))
        if names is not None:
            return names
        asked = time.monotonic_ns()
        with self._lock:
            reading = self._readings.setdefault(path, Reading())
        try:
            with reading.lock:
                if reading.begun <= asked:      # else that is new enough
                    begun = time.monotonic_ns()
                    reading.names = self._read(path, read)
                    reading.begun = begun
                return reading.names
        finally:
            with self._lock:
                self._readings.pop(path, None)

    def _read(self, path, read):
        status = os.stat(path)
        names = self._find(path, status)
        if names is None:
            settled = _settled(status)
            names = read(path, _stamp(status))
            if settled and not names.links:
                self._keep(path, names)
        return names

    def _find(self, path, status):
        """The Names that are kept of a directory, None when it changed."""
        with self._lock:
            names = self._known.get(path)
            if names is None or names.stamp != _stamp(status):
                return None
            self._known.move_to_end(path)
            return names

    def _keep(self, path, names):
        with self._lock:
            old = self._known.pop(path, None)
            if old is not None:
                self._bytes -= _memory(old)
            self._known[path] = names
            self._bytes += _memory(names)
            while self._bytes > self._limit and len(self._known) > 1:
                _, old = self._known.popitem(last=False)
                self._bytes -= _memory(old)


def _memory(names):
    """About how many bytes some Names take, and what leads to them."""
    texts = getattr(names.entries, "blocks", names.entries)
    return 600 + sum(map(sys.getsizeof, texts)) + 8 * len(texts)


class Listed:
    """A key in a listing.  shown: what the listing's show(Info) made of it.

    The rest is what the file was then; see ListedCache.
    """

    __slots__ = ("key", "shown", "inode", "size", "mtime_ns", "ctime_ns")

    def __init__(self, key, shown, status=None):
        self.key, self.shown = key, shown
        if status is not None:
            self.inode, self.size = status.st_ino, status.st_size
            self.mtime_ns = status.st_mtime_ns
            self.ctime_ns = status.st_ctime_ns


class ListedCache:
    """What listings showed of files, each good while one lstat finds inode,
    size, mtime and ctime as they were.

    ctime alone tells of every change, an xattr's included, if it was
    settled when the record was read.  No change of a sidecar touches the
    file: what has one is not kept, and what has none is kept as long as the
    directory of sidecars stands still.

    When it is full it stays as it is for as many files again, and then
    starts anew: a listing of twice its size, over and over, finds the half.
    """

    def __init__(self, limit=MAX_CACHED_FILES):
        self._limit, self._offered = limit, 0
        self._lock = threading.Lock()
        self._used = []                 # the dicts that have anything in them

    @contextlib.contextmanager
    def looker(self, bucket, show, natural=False):
        """look(key) -> Listed, or None for a key that is gone; for one
        page.  show(info): depends on the Info only.  natural: True when
        all keys come from natural paths.

        A key that is known costs one lstat, which is half the time that it
        takes in all; to read and show it anew takes five times as long.
        """
        with contextlib.closing(Looker(bucket)) as looker:
            yield self._look(bucket, show, natural, looker.status)

    def _look(self, bucket, show, natural, status_of):
        now_ns = time.time_ns()
        stamp = bucket.sidecars_stamp(now_ns)
        known = {}
        if stamp is not None:
            found = bucket.listed.get(show)
            if found is None or found[0] != stamp:
                found = bucket.listed[show] = stamp, known
            known = found[1]
        root = bucket._root_slash

        def look(key):
            listed, status = known.get(key), status_of(key)
            if (listed is not None and status is not None
                    and status.st_ctime_ns == listed.ctime_ns
                    and status.st_ino == listed.inode
                    and status.st_mtime_ns == listed.mtime_ns
                    and status.st_size == listed.size):
                return listed
            info, status = bucket.look_once(
                key, status, natural and root + key)
            if info is None:
                return None
            listed = Listed(key, show(info), status)
            if status is not None and _settled(status, now_ns):
                self._keep(known, listed)
            return listed
        return look

    def _keep(self, known, listed):
        with self._lock:
            if self._offered >= 2 * self._limit:
                while self._used:
                    self._used.pop().clear()
                self._offered = 0
            if self._offered < self._limit:
                if not known:
                    self._used.append(known)
                known[listed.key] = listed
            self._offered += 1


class Looker:
    """lstat for a page of keys, in a directory that is proved to be inside
    of the bucket and kept open until the next key lies in another one."""

    def __init__(self, bucket):
        self._bucket, self._root = bucket, bucket._root_slash
        self._parent = self._fd = None

    def status(self, key):
        """The status of the file at a key's natural path, or None."""
        parent, _, name = key.rpartition("/")
        try:
            if not parent:
                return os.lstat(self._root + key)
            if parent != self._parent:
                self.close()
                self._fd, _ = self._bucket._place(key)
                self._parent = parent
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except (OSError, ValueError):   # no such path; none can have a NUL
            return None

    def close(self):
        """Close the directory."""
        close_fd(self._fd)
        self._parent = self._fd = None


class CommonPrefix(NamedTuple):
    """Keys rolled up by a delimiter."""
    key: str


class Page(NamedTuple):
    """entries: in order, CommonPrefix and Listed, or Info where versions
    are listed; truncated: there are more."""
    entries: List[Any]
    truncated: bool


class Walker:
    """One listing of one bucket: its keys in order from any point on."""

    def __init__(self, bucket, cache):
        self._bucket, self._cache = bucket, cache
        self.work = 0                   # about microseconds, in directories
        self._seen = {}                 # read once a request
        self._chains = {}               # the same of directories' chains
        self._given = None              # a key that no walk has led to

    def keys(self, prefix, after):
        """The keys that start with `prefix` and come after `after`."""
        natural = self._natural(prefix, after)
        odd = self.odd_keys()
        if not odd:
            return natural
        start = bisect.bisect_left(odd, prefix)
        if after:
            start = max(start, bisect.bisect_right(odd, after))
        return self._merge(natural, itertools.takewhile(
            lambda key: key.startswith(prefix),
            itertools.islice(odd, start, None)))

    def version_keys(self, prefix, after, inclusive):
        """As keys(), and those that have noncurrent versions only; `after`
        itself, too, when `inclusive`."""
        old = self._versioned_keys()
        start = max(bisect.bisect_left(old, prefix),
                    bisect.bisect_left(old, after) if inclusive
                    else bisect.bisect_right(old, after))
        current = self.keys(prefix, after)
        if inclusive and after.startswith(prefix):
            self._given = after
            current = itertools.chain([after], current)
        return self._merge(current, itertools.takewhile(
            lambda key: key.startswith(prefix),
            itertools.islice(old, start, None)))

    def _versioned_keys(self):
        """The keys that have a directory of noncurrent versions."""
        names = self._names(self._bucket._versions, self._read_versions)
        return names.entries if names else ()

    def versions(self, key, most=None, after=None):
        """Bucket.versions() of a key that version_keys() gave.

        Most keys have no directory of versions: a look by path, and that
        there is none after it, tell as much as _snapshot() in a seventh of
        the time.  A version that was not current at the look lay in that
        directory then, and has been deleted since.
        """
        old, bucket = self._versioned_keys(), self._bucket
        place = bisect.bisect_left(old, key)
        if key != self._given and (place == len(old) or old[place] != key):
            with contextlib.closing(Looker(bucket)) as looker:
                info = bucket.look_once(
                    key, looker.status(key), not self.odd_keys()
                    and bucket._root_slash + key)[0]
            if not _is_there(bucket._version_directory(key)):
                return [info] if info else []
        return bucket.versions(key, most, after)

    def _read_versions(self, path, stamp):
        return self._read_names(path, stamp, self._versioned_key)

    def _read_odd(self, path, stamp):
        return self._read_names(path, stamp, self._hashed_key)

    @staticmethod
    def _read_names(path, stamp, hashed_key):
        """The keys of a directory of odd_name()s.  hashed_key(path): of
        one that is a hash."""
        keys = []
        for name in os.listdir(path):
            if not name.isascii():      # none of ours
                continue
            if name[:1] == "k":
                keys.append(urllib.parse.unquote(name[1:]))
            elif name[:1] == "h":
                with contextlib.suppress(*_ABSENT):
                    keys.append(hashed_key(os.path.join(path, name)))
        return Names(stamp, sorted(filter(None, keys)), frozenset())

    @staticmethod
    def _versioned_key(path):
        """The key that a directory of versions tells."""
        return load_record(read_state(os.path.join(
            path, KEY_FILE))).get("key")

    def _hashed_key(self, path):
        """The key of that odd_name() that a file's record tells, or None.
        """
        name = os.path.basename(path)
        record = _record_inside(path, _UNSEEN_RECORD) \
            if self._bucket._xattrs else {}
        for key in (record.get("key", ""), record.get("was", "")):
            if odd_name(key) == name:
                return key
        ending = "-%x" % os.stat(path).st_ino
        for sidecar in os.listdir(self._bucket._meta):
            if sidecar.endswith(ending) and sidecar[:32] == name[1:33]:
                path = os.path.join(self._bucket._meta, sidecar)
                return load_record(read_state(path)).get("key")
        return None

    def missed(self, prefix, after, last, entries):
        """True when some key up to `last` may have been given by none of
        the looks at odd/, at the versions and at the files, in this order:
        its file came to odd/ behind the first one, or it got its first
        noncurrent version, and lost its file, behind the second.  entries:
        what was made of the keys that were given."""
        late = {key for key in self._late(self._bucket._odd, self._read_odd)
                + self._late(self._bucket._versions, self._read_versions)
                if key.startswith(prefix) and key > after
                and (last is None or key < last)}
        if late:
            late.difference_update(entry.key for entry in entries)
            rolled = tuple(entry.key for entry in entries
                           if isinstance(entry, CommonPrefix))
            late = {key for key in late if not key.startswith(rolled)}
        return bool(late)

    def _late(self, path, read):
        """The keys that have come to a directory since it was read."""
        old = self._seen.get(path, False)
        new = old is not False and Walker(
            self._bucket, self._cache)._names(path, read)
        if not new or new is old:
            return []
        return list(set(new.entries).difference(old.entries if old else ()))

    @staticmethod
    def _merge(natural, odd):
        last = None
        for key in heapq.merge(natural, odd):
            if key != last:
                yield key
            last = key

    def odd_keys(self):
        """The keys that lie in odd/, in order."""
        names = self._names(self._bucket._odd, self._read_odd)
        return names.entries if names else ()

    def odd_stamp(self):
        """Changes whenever a file came to or left odd/."""
        try:
            return os.stat(self._bucket._odd).st_mtime_ns
        except _ABSENT:
            return None

    def _names(self, path, read):
        """The Names of a directory, None when it is none (any more)."""
        if path not in self._seen:
            self.work += 100 + len(path) // 4
            try:
                self._seen[path] = self._cache.get(path, read)
            except _ABSENT + (ValueError,):
                self._seen[path] = None
            except OSError as error:
                # lost+found, say; but never all that a bucket has
                if read != self._read or path == self._bucket._root_slash \
                        or error.errno not in _UNSEEN_ERRNO:
                    raise
                self._bucket._report("%s is left out of listings: %s"
                                     % (path, error.strerror))
                self._seen[path] = None
        return self._seen[path]

    def _natural(self, prefix, after):
        """The keys that lie at their natural path."""
        base = prefix.rpartition("/")[0]
        chain = (self._bucket._real,)
        if base:
            # each common prefix comes here: at 500 directories 11 ms
            if base not in self._chains:
                self._chains[base] = self._chain(base) \
                    if is_natural(base) else None
            chain = self._chains[base]
            base += "/"
        if chain is None or (after and after > base
                             and not after.startswith(base)):
            return iter(())
        return self._below(base, prefix, after, chain)

    def _chain(self, base):
        """The chain of a directory, as the walk to it would make it."""
        path, chain = self._bucket.root, (self._bucket._real,)
        for segment in base.split("/"):
            try:
                linked = _is_link(os.path.join(path, segment))
            except OSError as error:    # longer than a path can be, say
                if error.errno not in _ABSENT_ERRNO:
                    raise
                return None
            chain = self._descend(path, segment + "/",
                                  (segment + "/",) if linked else (), chain)
            if chain is None:
                return None
            path = os.path.join(path, segment)
        return chain

    def _below(self, base, prefix, after, chain):
        """The keys below one directory.  `chain`: the real directories
        that symlinks led through, the last one being this one's."""
        self.work += 15
        path = os.path.join(self._bucket.root, base)
        names = self._names(path, self._read)
        if names is None:
            return
        entries = names.entries
        tail = prefix[len(base):]
        start = bisect.bisect_left(entries, tail) if tail else 0
        if after.startswith(base):
            start = max(start, _position(entries, after[len(base):]))
        for name in entries.since(start):
            if tail and not name.startswith(tail):
                return
            key = base + name
            if name[-1] != "/":
                if len(key) < 256 or len(key.encode()) <= MAX_KEY_BYTES:
                    yield key
            elif len(key) < MAX_KEY_BYTES:      # else no key lies below
                below = self._descend(path, name, names.links, chain)
                if below:
                    yield from self._below(key, prefix, after, below)

    def _descend(self, path, name, links, chain):
        """The chain below an entry; None for a link that leads back."""
        real = os.path.join(chain[-1], name[:-1])
        if name not in links:
            return chain[:-1] + (real,)
        real = self._bucket.resolve_inside(os.path.join(path, name[:-1]))
        if real is None or any((link + "/").startswith(real + "/")
                               for link in chain):
            return None
        return chain + (real,)

    def _read(self, path, stamp):
        """Read a directory of objects, again as long as it changes
        meanwhile, and unite what each read shows.

        btrfs gives a file that is replaced a new place at the end, behind
        what the present read will come to: it shows neither.  A name too
        many does no harm, since every key is looked at.
        """
        links, last = [], stamp
        names = self._scan(links, path, stamp)
        for _ in range(0 if self._bucket.replaces_in_place else MAX_REREADS):
            now = _stamp(os.stat(path))
            if now == last:
                break
            last, before = now, names
            names = self._scan(links, path, now)
            names.update(name for name in before if name[-1] != "/")
        return Names(stamp, PackedNames(sorted(names)), frozenset(links))

    def _scan(self, links, path, stamp):
        """The names of files, directories and symlinks to such, `links`;
        nothing else in a directory can be an object."""
        entries = set()
        links.clear()
        with self._bucket.scan(path, stamp) as found:
            for entry in found:
                name = entry.name
                if not name.isascii() and not is_utf8(name):
                    continue
                if is_reserved(name):
                    continue
                if entry.is_file(follow_symlinks=False):
                    entries.add(name)        # as nearly all are
                    continue
                if entry.is_symlink():
                    if self._bucket.resolve_inside(
                            os.path.join(path, name)) is None:
                        continue
                    links.append(name + "/")
                try:
                    if entry.is_dir():
                        entries.add(name + "/")
                    elif entry.is_file():
                        entries.add(name)
                except OSError as error:        # a link to itself, say
                    if error.errno not in _ABSENT_ERRNO:
                        raise
        return entries


def _same_file(path, status):
    """True while a path still names the file of that status."""
    try:
        now = os.stat(path)
    except OSError:
        return False
    return (now.st_ino, now.st_mtime_ns, now.st_size) == (
        status.st_ino, status.st_mtime_ns, status.st_size)


def is_utf8(text):
    """True for a text that UTF-8 has bytes for."""
    try:
        text.encode()
        return True
    except UnicodeError:
        return False


def _position(entries, rest):
    """Where the keys after `rest` start among sorted entries: the entry
    of a directory comes before the keys that lie in it."""
    index = bisect.bisect_right(entries, rest)
    if index and entries[index - 1][-1] == "/" and rest.startswith(
            entries[index - 1]):
        index -= 1
    return index


def collect_page(walker, look, prefix, delimiter, after, limit, skip):
    """A Page of the keys behind `after`.

    look(key) -> entry or None (gone).  `skip` is a common prefix not to
    give again.
    """
    entries, last = [], skip
    keys_after = functools.partial(walker.keys, prefix)
    keys = keys_after(skip + "\U0010ffff" if skip else after)
    while limit:
        if walker.work > MAX_PAGE_WORK and entries:
            return Page(entries, True)
        key = next(keys, None)
        if key is None:
            return Page(entries, False)
        cut = key.find(delimiter, len(prefix)) if delimiter else -1
        if cut < 0:
            entry = look(key)
        else:
            common = key[:cut + len(delimiter)]
            entry = CommonPrefix(common) if common != last else None
        if entry is None:
            continue
        if len(entries) == limit:
            return Page(entries, True)
        entries.append(entry)
        if cut >= 0:
            # never descend below what is rolled up: go on behind it
            last = common
            keys = keys_after(common + "\U0010ffff")
    return Page(entries, False)


def _collect_versions(walker, roll, marker, limit, skip):
    """(Page, the key where it ended or None).  roll: prefix and delimiter;
    marker: a key and a version of it, behind which the page starts; skip: a
    common prefix not to give again.  Of a key, which may have a million
    versions, no more are read than are shown."""
    entries, (prefix, delimiter), last = [], roll, skip
    keys_after = functools.partial(walker.version_keys, prefix)
    look = walker.versions
    keys = keys_after(skip + "\U0010ffff", False) if skip \
        else keys_after(marker[0], bool(marker[1]))
    while True:
        if walker.work > MAX_PAGE_WORK and entries:
            return Page(entries, True), entries[-1].key
        key = next(keys, None)
        if key is None:
            return Page(entries, False), None
        cut = key.find(delimiter, len(prefix)) if delimiter else -1
        common = key[:cut + len(delimiter)] if cut >= 0 else None
        if common is not None and common == last:
            continue
        if common is not None:
            found = look(key, 1) and [CommonPrefix(common)]
        else:
            found = look(key, limit + 1 - len(entries),
                         marker[1] if key == marker[0] else None)
        for entry in found:
            if len(entries) == limit:
                return Page(entries, bool(limit)), key
            entries.append(entry)
        if common is not None and found:
            last = common               # as collect_page()
            keys = keys_after(common + "\U0010ffff", False)


# --- multipart uploads ---

class Upload:
    """A multipart upload: its directory, and upload.json as `record`."""

    def __init__(self, upload_id, path, record):
        self.upload_id, self.path, self.record = upload_id, path, record

    @property
    def key(self):
        """The key that it will become."""
        return self.record["key"]

    @property
    def initiated_ns(self):
        """When it was created."""
        return self.record["initiated_ns"]

    def is_to(self, created_ns):
        """False when it is one to an earlier bucket than that created then,
        as a crash may leave it; None: when is not known."""
        date = self.record.get("bucket")
        return date is None or created_ns in (None, date)


_UPLOAD_SHAPES = dict(
    _RECORD_SHAPES, initiated_ns=lambda value: type(value) is int
    and is_date(value // 10 ** 9), initiator=(str, type(None)), sse=valid_sse,
    algorithm=CHECKSUMS.__contains__, bucket=(int, type(None)))
_UPLOAD_ID = re.compile(r"[0-9a-f]{48}\Z")
_PART_NAME = re.compile(r"\d{5}\Z", re.ASCII)


# --- events that wait ---

# What one bucket keeps for one webhook: beyond it the oldest events go
MAX_SPOOLED_EVENTS = 100000
EVENT_SECONDS = 24 * 3600           # then one that is refused is given up
_EVENT_FILE = re.compile(r"[0-9a-f]{32}\Z")


class Spool:
    """The events of one bucket that wait for one webhook, a file each.

    Its name is a number of next_number() and a hash of the key, 16
    hexadecimal digits each: sorted, the events of a key are in the order
    of its changes.
    """

    def __init__(self, bucket, webhook):
        self._bucket = bucket
        self._path = os.path.join(bucket.root, STATE, "events", webhook)
        self._directory = None          # its descriptor, once claimed

    def add(self, key, number, data):
        """Keep an event, whole at once.  The caller holds the key's lock,
        under which it was given the number."""
        name = "%016x%s" % (number, hashlib.sha256(
            key.encode()).hexdigest()[:16])
        with self._bucket.draft() as draft:
            draft.write(data)
            draft.flush(self._bucket._sync)
            path = os.path.join(self._path, name)
            try:
                draft.publish(path)
            except FileNotFoundError:
                self._bucket._make_state("events")
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self._path)
                draft.publish(path)
        for directory in (self._path, os.path.dirname(self._path)):
            self._bucket._sync_directory(directory)

    def names(self):
        """The names of the events, in their order."""
        return sorted(filter(_EVENT_FILE.match, _listdir(self._path)))

    def read(self, name):
        """The bytes of an event; None when it is gone."""
        try:
            fd = os.open(self._place(name), _OPEN_READ,
                         dir_fd=self._directory)
        except _ABSENT:
            return None
        with os.fdopen(fd, "rb") as file:
            return file.read()

    def drop(self, name):
        """Forget an event; True when it was there."""
        try:
            os.unlink(self._place(name), dir_fd=self._directory)
            return True
        except _ABSENT:
            return False

    def _place(self, name):
        return os.path.join(self._path, name) \
            if self._directory is None else name

    @contextlib.contextmanager
    def claim(self):
        """Be the only one, of all processes, who delivers from here, and
        go on with it when the bucket is deleted, which moves the files.
        False when another one is, None when nothing was ever here."""
        with contextlib.ExitStack() as stack:
            try:
                fd = os.open(os.path.join(self._path, "lock"), _OPEN_LOCK,
                             0o600)
                stack.callback(close_fd, fd)
                if _HAVE_DIR_FD:
                    self._directory = os.open(self._path, _OPEN_DIRECTORY)
                    stack.callback(close_fd, self._directory)
                mine = try_flock(fd)
            except _ABSENT:
                mine = None
            try:
                yield mine
            finally:
                self._directory = None


def is_old_event(name, now):
    """True for the name of an event that waits for longer than it may;
    now: seconds since the epoch."""
    return now - int(name[:16], 16) / 1e9 > EVENT_SECONDS


class Outbox:
    """The webhooks (name -> URL), and which buckets have new events for
    them: what requests tell the threads that deliver."""

    def __init__(self, webhooks=()):
        self.webhooks = dict(webhooks)
        self.closed = False
        self._buckets = {name: set() for name in self.webhooks}
        self._changed = threading.Condition()

    def add(self, webhook, bucket_name):
        """A bucket has an event for a webhook."""
        with self._changed:
            self._buckets[webhook].add(bucket_name)
            self._changed.notify_all()

    def take(self, webhook, seconds):
        """The names of the buckets that got events since the last call,
        as soon as there are any or the time is up."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.closed or self._buckets[webhook], seconds)
            found, self._buckets[webhook] = self._buckets[webhook], set()
            return found

    def rest(self, seconds):
        """Let the time go by, whatever is added meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed, seconds)

    def close(self):
        """Let everybody who waits go."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


# --- the store ---

# In the directory of the buckets: one being made, what is left of one
_NEW, _OLD = ".gos3rve-new-", ".gos3rve-old-"


class Store:
    """All buckets and uploads.

    dir_buckets, dir_uploads: directories.  mapped: bucket name -> further
    directory served as that bucket.  sync: fsync before an answer.
    xattrs: False keeps every record in a sidecar.  report: takes a line
    for the operator.  unique: content that a bucket has already takes no
    further room, where the file system can share it.
    """

    def __init__(self, dir_buckets, dir_uploads, mapped=None, sync=False,
                 follow_symlinks=False, xattrs=True, report=None,
                 unique=False):
        self.dir_buckets = os.path.abspath(dir_buckets)
        self.dir_uploads = os.path.abspath(dir_uploads)
        self.mapped = {name: os.path.abspath(path)
                       for name, path in (mapped or {}).items()}
        self.sync, self.follow_symlinks = sync, follow_symlinks
        self.unique = unique
        self.xattrs = xattrs and _HAVE_XATTR
        self.report = report or (lambda line: None)
        self._cache, self._listed = DirectoryCache(), ListedCache()
        self._buckets = {}

    # buckets

    def look_up(self, name):
        """(Bucket, its config), or NoSuchBucket.

        Nearly always bucket.json has not changed since it was read: then
        the bucket is still there, too, and one stat tells both.
        """
        bucket = self._buckets.get(name)
        config = bucket and bucket.known_config()
        if config is None:
            bucket = self.bucket(name)
            config = bucket.config
        return bucket, config

    def bucket(self, name):
        """The Bucket of that name, or NoSuchBucket."""
        root = self.mapped.get(name)
        if root is None:
            if not usable_bucket_name(name):
                raise S3Error("NoSuchBucket", BucketName=name)
            root = os.path.join(self.dir_buckets, name)
        try:
            status = os.stat(root)
        except _ABSENT:
            status = None
        if status is None or not stat.S_ISDIR(status.st_mode):
            self._buckets.pop(name, None)
            raise S3Error("NoSuchBucket", BucketName=name)
        identity = status.st_dev, status.st_ino
        bucket = self._buckets.get(name)
        if bucket is None or bucket.identity != identity:
            if name not in self.mapped and self._is_misspelt(name, identity):
                raise S3Error("NoSuchBucket", BucketName=name)
            bucket = Bucket(name, root, self, identity)
            self._buckets[name] = bucket
        return bucket

    def _is_misspelt(self, name, identity):
        """True for the name of a bucket in another case, on a file system
        that finds it all the same: policies would not."""
        try:
            status = os.stat(os.path.join(self.dir_buckets, name.swapcase()))
        except OSError:
            return False
        return identity == (status.st_dev, status.st_ino) \
            and name not in os.listdir(self.dir_buckets)

    def list_buckets(self, unseen=None):
        """Every Bucket, by name.  unseen(name, error): what is done about
        one that cannot be seen; it is reported where that is None."""
        known, names = set(self._buckets), set(self.mapped)
        with contextlib.suppress(FileNotFoundError):
            names.update(filter(usable_bucket_name,
                                os.listdir(self.dir_buckets)))
        for name in known.difference(names):
            self._buckets.pop(name, None)       # deleted, by whatever hand
        found = []
        for name in sorted(names):
            try:
                found.append(self.bucket(name))
            except S3Error:             # a file of that name, say
                continue
            except OSError as error:    # one disk of several, say
                (unseen or self._report_unseen)(name, error)
        return found

    def _report_unseen(self, name, error):
        self.report("the bucket %s cannot be seen and is left out: %s"
                    % (name, error))

    def create_bucket(self, name, owner, region, config=None):
        """Make a bucket with its record in it, by one rename.

        config: further fields of bucket.json.

        BucketAlreadyExists when somebody made it first.
        """
        if name in self.mapped or os.path.lexists(
                os.path.join(self.dir_buckets, name)):
            raise S3Error("BucketAlreadyExists", BucketName=name)
        make_tree(self.dir_buckets, self.sync)
        path = os.path.join(self.dir_buckets,
                            _NEW + secrets.token_hex(8))
        try:
            make_tree(os.path.join(path, STATE), self.sync, 0o700)
            write_json(os.path.join(path, STATE, "bucket.json"), dict(
                config or {}, owner=owner, region=region,
                created_ns=time.time_ns()), self.sync, True)
            os.rename(path, os.path.join(self.dir_buckets, name))
        except OSError as error:
            _remove_tree(path)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST,
                               errno.ENOTDIR):
                raise S3Error("BucketAlreadyExists",
                              BucketName=name) from None
            raise
        if self.sync:
            sync_directory(self.dir_buckets)
        return self.bucket(name)

    def delete_bucket(self, bucket):
        """Remove an empty bucket and its uploads, or BucketNotEmpty.

        Whoever waits to publish into it meanwhile gets NoSuchBucket.  The
        name for spool() is returned if some of its events still wait; what
        is left of the bucket goes with them.
        """
        if bucket.name in self.mapped or _is_link(bucket.root) \
                or os.path.ismount(bucket.root):
            raise S3Error("AccessDenied", "This bucket is a directory that "
                          "the server's operator set up")
        aside = _OLD + secrets.token_hex(8)
        path = os.path.join(self.dir_buckets, aside)
        with bucket.lock_all():
            if not bucket.is_empty():
                raise S3Error("BucketNotEmpty", "The bucket you tried to "
                              "delete is not empty. You must delete all "
                              "versions in the bucket."
                              if bucket.versioning else None,
                              BucketName=bucket.name)
            os.rename(bucket.root, path)
            if not Bucket(bucket.name, path, self, None).is_empty():
                os.rename(path, bucket.root)    # somebody put a file there
                raise S3Error("BucketNotEmpty", BucketName=bucket.name)
            if self.sync:               # before its uploads are gone
                sync_directory(self.dir_buckets)
            self._set_uploads_aside(bucket.name, aside)
        _remove_tree(os.path.join(self.dir_uploads, aside))
        if _has_events(path, time.time()):
            return aside
        _remove_tree(path)
        return None

    def _set_uploads_aside(self, name, aside):
        """Move a deleted bucket's uploads, and nothing else that may lie
        under its name in the uploads' directory, out of the way."""
        directory = os.path.join(self.dir_uploads, name)
        found = list(filter(_UPLOAD_ID.match, _listdir(directory)))
        if found:
            target = os.path.join(self.dir_uploads, aside)
            with contextlib.suppress(OSError):      # the disk may be full
                os.mkdir(target)
            for upload_id in found:
                path = os.path.join(directory, upload_id)
                try:
                    os.rename(path, os.path.join(target, upload_id))
                except FileNotFoundError:
                    _remove_tree(path)
            if self.sync:
                sync_directory(directory)
        with contextlib.suppress(OSError):
            os.rmdir(directory)

    # objects; done(...), where given, is called with what is returned,
    # once the change is made and before the key's lock is given back

    def put_object(self, bucket, key, draft, record, conditions, done=None):
        """Publish a draft as an object; its Info.

        Atomic: `conditions` (WriteConditions) are checked and the file
        renamed under the key's lock.  Raises what they raise.
        """
        content = None if "sse" in record else bucket.share(draft)
        draft.seal(record)

        def step():
            if conditions != ALWAYS:
                conditions.check(bucket.find(key), key)
            info = self._put_version(bucket, key, draft, record) \
                if bucket.versioning else bucket.publish(draft, key, record)
            if done:
                done(info)
            return info
        info = bucket.retry(key, step)
        if content:
            bucket.note_content(content, key)
        return info

    @staticmethod
    def _put_version(bucket, key, draft, record):
        """Publish a draft as the newest version.  What a null version
        replaces goes after it has come; its record tells what that is."""
        enabled = bucket.versioning == ENABLED
        names = bucket.archive(key, bucket.settle(key), enabled)
        replaced = None if enabled else _name_of(NULL_VERSION, names)
        for field in ("version", "replaces"):
            record.pop(field, None)     # of a step that was in the way
        if enabled:
            record["version"] = new_version_id(names)
        elif replaced:
            record["replaces"] = replaced
        info = bucket.publish(draft, key, record)
        if replaced:
            bucket.drop_version(key, replaced)
        return info

    def delete_object(self, bucket, key, conditions=ALWAYS,
                      version_id=None, allow=None, done=None):
        """Remove an object or one version of it, or add a delete marker;
        what was Removed.  Nothing happens when there is none.

        allow(info) may raise before that version is removed for good.
        """
        return bucket.retry(key, lambda: self._delete(
            bucket, key, conditions, version_id, allow, done))

    def _delete(self, bucket, key, conditions=ALWAYS, version_id=None,
                allow=None, done=None):
        """delete_object() for who holds the key's lock."""
        if version_id is not None:
            removed = self._delete_version(bucket, key, version_id, allow,
                                           conditions)
        else:
            removed = self._delete_latest(bucket, key, allow, conditions)
        if done:
            done(removed)
        return removed

    def _delete_latest(self, bucket, key, allow, conditions):
        if conditions != ALWAYS:
            conditions.check(bucket.find(key), key)
        versioning = bucket.versioning
        if versioning is not None:
            return self._add_marker(bucket, key, versioning, allow)
        return Removed(None, False, bucket.remove(key, allow))

    @staticmethod
    def _add_marker(bucket, key, versioning, allow):
        current = bucket.find(key) if allow and versioning != ENABLED \
            else None
        if current and current.version_id == NULL_VERSION:
            allow(current)
        names = bucket.archive(key, bucket.settle(key),
                               versioning == ENABLED)
        marker = new_version_id(names) if versioning == ENABLED \
            else NULL_VERSION
        bucket.add_marker(key, names, marker)
        return Removed(marker, True)

    @staticmethod
    def _delete_version(bucket, key, version_id, allow, conditions):
        names = bucket.settle(key)
        try:
            info, fd = bucket.open_version(key, version_id, names)
        except S3Error as error:
            if error.code != "NoSuchVersion":
                raise
            return Removed(version_id, False, False)
        close_fd(fd)
        conditions.check(info, key)
        if allow:
            allow(info)
        bucket.remove_version(key, info, names)
        return Removed(version_id, info.marker)

    def revise(self, bucket, key, choose):
        """Delete versions of a key or change their records.

        choose(infos) gets all of them, the newest first, while nobody else
        can change any, yields (version id, changes, done) and goes on when
        that is done.  Without changes it is delete_object(), for good or,
        the id being None, not.
        """
        def step():
            bucket.settle(key)
            for version_id, changes, done in choose(bucket.versions(key)):
                if changes:
                    bucket.change_record(
                        key, version_id,
                        operator.methodcaller("update", changes), done)
                else:
                    self._delete(bucket, key, version_id=version_id,
                                 done=done)
        bucket.retry(key, step)

    def rename_object(self, bucket, source, key, source_check, conditions,
                      done=None):
        """Rename atomically, replacing what `key` was; done(info) is given
        what it is now.

        source_check(info) may raise, as may the conditions on `key`.
        """
        def step():
            info = bucket.find(source)
            if info is None:
                raise S3Error("NoSuchKey", Key=source)
            if bucket.versioning:
                raise S3Error("NotImplemented", "RenameObject does not work "
                              "in a bucket that has versions")
            source_check(info)
            conditions.check(bucket.find(key), key)
            if source != key:
                bucket.rename(source, key)
            info = bucket.find(key) if done else None
            if info:
                done(info)
        bucket.retry(key, step, source)

    def list_objects(self, bucket, show, prefix="", delimiter="", after="",
                     limit=MAX_LIST_KEYS, skip=""):
        """A Page of the objects after `after`, in UTF-8 order of keys.

        show(info): what is to be Listed of an object.  It is kept, and so
        may depend on the Info only.
        """
        def walk(walker):
            with self._listed.looker(
                    bucket, show, not walker.odd_keys()) as look:
                page = collect_page(walker, look, prefix, delimiter, after,
                                    limit, skip)
            return page, page.entries[-1].key if page.truncated else None
        return self._whole_page(bucket, walk, prefix, skip + "\U0010ffff"
                                if skip else after)

    def _whole_page(self, bucket, walk, prefix, after):
        """The Page of walk(walker), which gives it and where it ends;
        again as long as something has moved behind its back.

        While others keep moving files, what surely moved behind it: what
        went to odd/ and back between two looks could still be missed.
        """
        deadline = time.monotonic() + LISTING_PATIENCE_SECONDS
        for number in range(MAX_RETRIES):
            walker = Walker(bucket, self._cache)
            stamp = walker.odd_stamp()
            page, last = walk(walker)
            if (walker.odd_stamp() == stamp
                    or number > 2 and time.monotonic() > deadline) \
                    and not walker.missed(prefix, after, last,
                                          page.entries):
                break
        return page

    def list_versions(self, bucket, prefix="", delimiter="", key_marker="",
                      version_marker="", limit=MAX_LIST_KEYS, skip=""):
        """A Page of all versions and delete markers, by key and then the
        newest first, behind a key or behind one version of it."""
        return self._whole_page(bucket, lambda walker: _collect_versions(
            walker, (prefix, delimiter), (key_marker, version_marker), limit,
            skip), prefix, skip + "\U0010ffff" if skip else key_marker)

    def spool(self, name, webhook):
        """The Spool of a bucket, or of one that was deleted, by the name
        that spooled() or delete_bucket() gave; or NoSuchBucket."""
        if not name.startswith(_OLD):
            return Spool(self.bucket(name), webhook)
        path = os.path.join(self.dir_buckets, name)
        return Spool(Bucket(name, path, self, None), webhook)

    def spooled(self, webhook):
        """The names, for spool(), of the buckets with events that wait for
        a webhook."""
        names = [bucket.name for bucket in self.list_buckets()]
        names += [name for name in _listdir(self.dir_buckets)
                  if name.startswith(_OLD)]
        found = set()
        for name in names:
            with contextlib.suppress(S3Error, OSError):
                if self.spool(name, webhook).names():
                    found.add(name)
        return found

    def each_key(self, bucket):
        """The Infos of every key, its versions and delete markers, the
        newest first, key by key."""
        walker = Walker(bucket, self._cache)
        for key in walker.version_keys("", "", ""):
            found = walker.versions(key)
            if found:
                yield found

    def update_bucket(self, bucket, change, limited=True):
        """Change bucket.json: change(config) is given a copy of it.
        EntityTooLarge when it grows too large, unless not `limited`: a
        note of the server's own always has room."""
        with bucket.lock_all():
            config = dict(bucket.config)
            if "created_ns" not in config:
                config["created_ns"] = self._created_ns(bucket)
            before = _json_lines(config)
            config = json.loads(before)
            change(config)
            bucket.save(config, max(len(before), MAX_CONFIG_BYTES)
                        if limited else None)

    def _created_ns(self, bucket):
        """When a bucket whose record does not tell, or was lost, was
        created: the uploads to it know, and stay uploads to it."""
        dates = [upload.record.get("bucket")
                 for upload in self.list_uploads(bucket)]
        return max(filter(None, dates), default=bucket.created_ns)

    # uploads

    def create_upload(self, bucket, key, record):
        """Start an upload; its id.  `record` is kept and given back."""
        now = time.time_ns()
        upload_id = "%016x%s" % (now, secrets.token_hex(16))
        path = os.path.join(self.dir_uploads, bucket.name, upload_id)
        record = dict(record, key=key, initiated_ns=now,
                      bucket=bucket.config.get("created_ns"))
        for _ in range(MAX_RETRIES):
            try:
                make_tree(path, self.sync, 0o700)
                write_json(os.path.join(path, "upload.json"), record,
                           self.sync)
                return upload_id
            except FileNotFoundError:   # the last upload beside it ended;
                continue                # a network may tell us a second later
        raise S3Error("SlowDown")

    def upload(self, bucket, key, upload_id):
        """The Upload, or NoSuchUpload."""
        upload = None
        if _UPLOAD_ID.match(upload_id):
            upload = self._load_upload(os.path.join(
                self.dir_uploads, bucket.name, upload_id))
        if upload is None or upload.key != key \
                or not upload.is_to(bucket.config.get("created_ns")):
            raise S3Error("NoSuchUpload", UploadId=upload_id)
        return upload

    @staticmethod
    def _load_upload(path):
        """The Upload in a directory, None when it is none or damaged."""
        try:
            record = load_json(read_state(os.path.join(path,
                                                       "upload.json")))
        except _ABSENT + (ValueError,):
            return None
        if _is_upload(record):
            return Upload(os.path.basename(path), path, record)
        return None

    def list_uploads(self, bucket):
        """Every Upload of a bucket, by key and then by age."""
        directory = os.path.join(self.dir_uploads, bucket.name)
        found = []
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(directory):
                if _UPLOAD_ID.match(name):
                    found.append(self._load_upload(
                        os.path.join(directory, name)))
        created_ns = bucket.config.get("created_ns")
        return sorted((upload for upload in found
                       if upload and upload.is_to(created_ns)),
                      key=lambda u: (u.key, u.initiated_ns, u.upload_id))

    @contextlib.contextmanager
    def locked_upload(self, upload):
        """Hold an upload: one Complete, Abort or new part at a time."""
        path = os.path.join(upload.path, "upload.json")
        try:
            fd = os.open(path, _OPEN_HELD)
        except _ABSENT:
            raise S3Error("NoSuchUpload", UploadId=upload.upload_id) \
                from None
        try:
            if fcntl:
                fcntl.flock(fd, fcntl.LOCK_EX)
            if not _is_surely_there(path):
                raise S3Error("NoSuchUpload", UploadId=upload.upload_id)
            yield
        finally:
            close_fd(fd)

    def put_part(self, upload, number, draft, record):
        """Publish a draft (of part_draft) as a part of an upload."""
        status = draft.seal(record)
        path = os.path.join(upload.path, "%05d" % number)
        with self.locked_upload(upload):
            sidecar = self._write_part_record(draft, path, status, record)
            draft.flush(self.sync)
            draft.publish(path)
            if sidecar:
                _drop_other_sidecars(sidecar)
        if self.sync:
            sync_directory(upload.path)

    def _write_part_record(self, draft, path, status, record):
        """As for an object; the path of the sidecar beside the part."""
        if self.xattrs:
            try:
                os.setxattr(draft.fd, XATTR, dump_record(record))
                return None
            except OSError as error:
                if error.errno not in _NO_XATTR:
                    raise
        sidecar = "%s-%x.json" % (path, status.st_ino)
        write_json(sidecar, record, self.sync)
        return sidecar

    @staticmethod
    def part_draft(upload):
        """A Draft beside the parts."""
        def gone():
            raise S3Error("NoSuchUpload", UploadId=upload.upload_id)
        return Draft(upload.path, gone)

    def list_parts(self, upload):
        """Every Part, by number."""
        try:
            names = sorted(filter(_PART_NAME.match,
                                  os.listdir(upload.path)))
        except FileNotFoundError:
            raise S3Error("NoSuchUpload", UploadId=upload.upload_id) \
                from None
        return [part for part in (self._part(upload, name)
                                  for name in names) if part]

    def _part(self, upload, name):
        """The Part in a file, None when its record does not fit it; again
        when it was replaced meanwhile."""
        path = os.path.join(upload.path, name)
        for _ in range(MAX_LOOKS):
            try:
                fd = os.open(path, _OPEN_READ)
            except _ABSENT:
                return None
            try:
                status = os.fstat(fd)
                part = self._part_in(fd, status, upload, path)
            finally:
                close_fd(fd)
            if part or _same_file(path, status):
                break
        if part is None:
            self.report("%s is damaged and left out" % path)
        return part

    def _part_in(self, fd, status, upload, path):
        """The Part in an open file, or None."""
        size, prefix = status.st_size, None
        record = _record_inside(fd) if self.xattrs else {}
        if not record:
            with contextlib.suppress(*_ABSENT):
                record = load_record(read_state(
                    "%s-%x.json" % (path, status.st_ino)))
        if (record.get("size"), record.get("mtime_ns")) != (
                size, status.st_mtime_ns) or not _is_part(record):
            return None
        if "sse" in upload.record:
            try:
                size, prefix = plain_size(size), read_header(
                    _pread(fd, SEAL_HEADER_BYTES, 0))
            except SealError:
                return None
        return Part(int(os.path.basename(path)), size, status.st_mtime_ns,
                    record["etag"], record.get("checksums", {}), path,
                    prefix)

    def complete_upload(self, bucket, upload, parts, record, conditions,
                        done=None):
        """Publish the parts, in their order, as the object; its Info.

        The caller holds locked_upload.  The upload's directory goes last:
        until then a second call does the same again.
        """
        with bucket.draft() as draft:
            draft.open()
            for part in parts:
                fd = os.open(part.path, _OPEN_READ)
                try:
                    draft.copy(fd, 0, os.fstat(fd).st_size)
                finally:
                    close_fd(fd)
            info = self.put_object(bucket, upload.key, draft, record,
                                   conditions, done)
        self.remove_upload(upload)
        return info

    def remove_upload(self, upload):
        """Forget an upload and its parts.  The caller holds it."""
        _unlink(os.path.join(upload.path, "upload.json"))
        if self.sync:
            sync_directory(upload.path)
        _remove_tree(upload.path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(upload.path))

    # housekeeping

    def sweep(self, upload_ttl_seconds, now=None,
              grace_seconds=SWEEP_GRACE_SECONDS):
        """Remove what nobody will finish; how many things went.

        Drafts that no live process holds, uploads without activity for
        `upload_ttl_seconds` (0: never), half-made and half-removed buckets
        and uploads, sidecars without their file, hints to what is gone.
        """
        now = time.time() if now is None else now
        count = 0
        before = now - grace_seconds
        for bucket in self.list_buckets():
            with self._sweeping(bucket.root):
                count += bucket.sweep(now, before)
        with self._sweeping(self.dir_buckets):
            for path, has_objects in self.leftovers(now, grace_seconds):
                if not has_objects:
                    _remove_tree(path)
                    count += 1
        # on a disk of its own there is a lost+found beside them
        for name in filter(usable_bucket_name, _listdir(self.dir_uploads)):
            with self._sweeping(os.path.join(self.dir_uploads, name)):
                count += self._sweep_uploads(name, now, upload_ttl_seconds,
                                             grace_seconds)
        return count

    @contextlib.contextmanager
    def _sweeping(self, path):
        """What cannot be swept keeps nobody from sweeping the rest."""
        try:
            yield
        except PermissionError:         # not ours to sweep
            pass
        except (OSError, S3Error) as error:
            self.report("%s cannot be swept: %s" % (path, error))

    def leftovers(self, now, grace_seconds=SWEEP_GRACE_SECONDS):
        """(path, has objects) of half-made and half-removed buckets and
        uploads: delete_bucket() may have been cut off when it had found
        that somebody had put a file there."""
        for directory in (self.dir_buckets, self.dir_uploads):
            for name in _listdir(directory):
                path = os.path.join(directory, name)
                if name.startswith((_NEW, _OLD)) \
                        and _modified(path) < now - grace_seconds \
                        and not _has_events(path, now):
                    yield path, directory == self.dir_buckets \
                        and name.startswith(_OLD) and self._has_objects(path)

    def _has_objects(self, path):
        """True for a deleted bucket that is not empty, or may be such."""
        try:
            return not Bucket("", path, self, None).is_empty()
        except OSError:
            return True

    def _sweep_uploads(self, bucket_name, now, ttl, grace):
        directory = os.path.join(self.dir_uploads, bucket_name)
        created_ns, count = None, 0
        with contextlib.suppress(S3Error, OSError):     # on another disk, say
            created_ns = self.bucket(bucket_name).config.get("created_ns")
        for name in filter(_UPLOAD_ID.match, _listdir(directory)):
            path = os.path.join(directory, name)
            try:
                upload = self._load_upload(path)
            except OSError:
                continue                # not now: it may well be whole
            idle = now - _last_change(path)
            if upload:
                stays = upload.is_to(created_ns)
            else:                       # where its record is damaged
                stays = not 0 < ttl < idle and _is_there(
                    os.path.join(path, "upload.json"))
            if idle > grace and not stays:
                _remove_tree(path)
                count += 1
            elif upload is not None and ttl and idle > ttl:
                with contextlib.suppress(S3Error), \
                        self.locked_upload(upload):
                    if now - _last_change(path) > ttl:
                        self.remove_upload(upload)
                        count += 1
            else:
                count += _sweep_drafts(path, now - grace)
        with contextlib.suppress(OSError):
            os.rmdir(directory)         # what a crash left of the last one
        return count


def _is_upload(record):
    """True for an upload's record from which an object can be made."""
    if not {"key", "initiated_ns"} <= record.keys() \
            or not fits(record, _UPLOAD_SHAPES) or _breaks_lines(record):
        return False
    algorithm, kind = map(record.get, ("algorithm", "checksum_type"))
    return algorithm is kind is None or bool(algorithm) and (
        kind == "COMPOSITE" or kind == "FULL_OBJECT"
        and DIGESTS[algorithm].crc is not None)


def _is_part(record):
    """True for a part's record from which an object's can be made."""
    return bool(re.match(r"[0-9a-f]{32}\Z", record.get("etag", ""))) and all(
        name in CHECKSUMS and decode_digest(digest, DIGESTS[name].size)
        for name, digest in record.get("checksums", {}).items())


def _last_change(path):
    """The newest mtime, in seconds, of a directory and what lies in it."""
    return max([_modified(path)] + [_modified(os.path.join(path, name))
                                    for name in _listdir(path)])


def _has_events(path, now):
    """True when events that may still be delivered wait in the directory
    of a bucket."""
    path = os.path.join(path, STATE, "events")
    return any(not is_old_event(name, now) for webhook in _listdir(path)
               for name in _listdir(os.path.join(path, webhook))
               if _EVENT_FILE.match(name))


def _drop_other_sidecars(sidecar):
    """Remove the sidecars of the parts that one replaced."""
    directory, name = os.path.split(sidecar)
    for other in os.listdir(directory):
        if other.startswith(name[:6]) and other != name:
            _unlink(os.path.join(directory, other))


def _listdir(path):
    try:
        return os.listdir(path)
    except _ABSENT:
        return []


def _modified_ns(path):
    """The mtime in nanoseconds; 0 when there is nothing."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _modified(path):
    """The mtime in seconds; now when it is gone, so that it is spared."""
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return time.time()


def _sweep_drafts(directory, before, remove=_unlink):
    """Remove the drafts of a directory that no process holds; how many.
    remove(path): what is done with each, True when it counts."""
    count = 0
    for name in _listdir(directory):
        path = os.path.join(directory, name)
        if not re.match(r"t[0-9a-f]{24}\Z", name) \
                or _modified(path) >= before:
            continue
        with contextlib.suppress(OSError):
            fd = os.open(path, _OPEN_HELD)
            try:
                if fcntl:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                count += bool(remove(path))
            finally:
                close_fd(fd)
    return count


# --- the self-test of a file system ---
#
# What this room, and the sending of bodies, want of a file system, tried in
# a directory that goes again.  The name of that starts like a bucket's that
# is being made: should it be left, a sweep takes it.

_TRIAL = _NEW + "trial-"
BEAT_SECONDS = 0.05                 # between the signs of life of a self-test
MAX_LAG_SECONDS = 0.8               # caches of attributes live for 1 s or more
WATCH_SECONDS = 4                   # nfs(5): acregmin is 3
MEETING_SECONDS = 10
_HOSTS = "other machines"
# No other machine has these
_LOCAL_TYPES = frozenset(("bcachefs", "btrfs", "exfat", "ext2", "ext3",
                          "ext4", "f2fs", "jfs", "ntfs3", "overlay", "tmpfs",
                          "vfat", "xfs", "zfs"))
# Types, options: flock stays on the machine.  nfs(5), mount.cifs(8), and
# Lustre's mount.lustre(8)
_LOCAL_LOCKS = (("nfs nfs4", "nolock local_lock=flock local_lock=all"),
                ("lustre", "localflock"), ("cifs smb3", "nobrl"))


class Lacks(Exception):
    """What a self-test saw that should not be."""


class Property(NamedTuple):
    """Something wanted of a file system.  test(trial) -> what there is to
    say, or None; Lacks or OSError where it is missing, and `lack` is what
    follows.  needed: cannot be done without."""
    name: str
    test: Callable
    lack: str
    needed: bool


class Found(NamedTuple):
    """What came out.  ok: None when it cannot be told."""
    name: str
    ok: Optional[bool]
    text: str
    needed: bool = False


class Trial:
    """The directory of one self-test, below the one that it is about.

    OSError when that takes no directory.
    """

    def __init__(self, parent):
        os.stat(parent)                 # "" is not this directory
        self.parent = os.path.abspath(parent)
        self.path = os.path.join(self.parent, _TRIAL + secrets.token_hex(8))
        os.mkdir(self.path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.path)

    def at(self, *names):
        """A path in it."""
        return os.path.join(self.path, *names)

    def make(self, name, data=b""):
        """The path of a new file in it."""
        fd = os.open(self.at(name), _OPEN_NEW, 0o666)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        return self.at(name)

    def publish(self, name, data=b""):
        """The path of a file, new or replaced."""
        os.replace(self.make(name + ".new", data), self.at(name))
        return self.at(name)

    def run(self, needed=()):
        """The Found of each Property, one by one.  needed: names of further
        ones that cannot be done without."""
        for name, test, lack, always in PROPERTIES:
            must = always or name in needed
            try:
                yield Found(name, True, test(self) or "", must)
            except (Lacks, OSError) as error:
                seen = getattr(error, "strerror", None) or str(error)
                yield Found(name, False, "%s: %s" % (seen, lack), must)


PROPERTIES = []


def wanted(name, lack, needed=True):
    """Make a function the test of a Property."""
    def declare(test):
        PROPERTIES.append(Property(name, test, lack, needed))
        return test
    return declare


@wanted("files made once", "two uploads may write into one file")
def _try_exclusive(trial):
    path = trial.make("once")
    try:
        os.close(os.open(path, _OPEN_NEW, 0o666))
    except FileExistsError:
        return
    raise Lacks("one that was there was made again")


@wanted("rename over a file",
        "while an object is replaced, readers find none or a torn one")
def _try_rename(trial):
    old, new = bytes(4096), b"\1" * 4096
    path, seen, ended = trial.publish("file", old), [], threading.Event()

    def read():
        while not seen and not ended.is_set():
            try:
                with open(path, "rb") as file:
                    if file.read() not in (old, new):
                        seen.append("a reader found something else")
            except OSError as error:
                if error.errno != errno.ESTALE:     # see _open_path()
                    seen.append("a reader got %s" % error.strerror)
    reader = threading.Thread(target=read, name="reader")
    reader.start()
    try:
        for _ in range(25):
            trial.publish("file", new)
            trial.publish("file", old)
    finally:
        ended.set()
        reader.join()
    with open(path, "rb") as file:
        if file.read() != old or os.path.exists(path + ".new"):
            seen.append("it replaced nothing")
    if seen:
        raise Lacks(seen[0])


@wanted("directories with files not replaced",
        "of two clients that make a bucket at once one may lose its own")
def _try_directories(trial):
    for name in ("one", "other"):
        os.mkdir(trial.at(name))
        trial.make(os.path.join(name, "file"))
    try:
        os.rename(trial.at("one"), trial.at("other"))
    except OSError:
        return
    raise Lacks("one was")


@wanted("files readable while open",
        "a download breaks off when its object is replaced or removed")
def _try_open_files(trial):
    path = trial.publish("open", b"old")
    fd = os.open(path, _OPEN_READ)
    try:
        trial.publish("open", b"new")
        replaced = _pread(fd, 8, 0)
        os.unlink(path)
        if (replaced, _pread(fd, 8, 0)) != (b"old", b"old"):
            raise Lacks("its content is not what it was")
    finally:
        os.close(fd)


@wanted("locks (flock)",
        "conditional writes hold within one process: run one, -workers 1")
def _try_locks(trial):
    if not fcntl:
        raise Lacks("this system has none")
    path = trial.make("lock")
    fd = os.open(path, _OPEN_LOCK)
    try:
        if not try_flock(fd) or _child_locks(path):
            raise Lacks("two processes do not exclude each other")
    finally:
        os.close(fd)
    if not _child_locks(path):
        raise Lacks("one stays when its holder has closed it")


def _child_locks(path):
    """True when another process gets the lock of a file.  Not by fork():
    there may be threads."""
    pid = os.posix_spawn(sys.executable, [
        sys.executable, "-I", "-S", "-c", "import fcntl, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\ntry:\n"
        "    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError:\n    sys.exit(1)", path], os.environ)
    return os.waitpid(pid, 0)[1] == 0


@wanted("times kept as set", "objects lose their ETag and checksums")
def _try_times(trial):
    path, set_ns = trial.make("time"), time.time_ns() // 1000 * 1000 + 789
    fd = os.open(path, os.O_RDWR)
    try:
        os.utime(fd if _HAVE_UTIME_FD else path, ns=(set_ns, set_ns))
        kept_ns = os.fstat(fd).st_mtime_ns
    finally:
        os.close(fd)
    os.replace(path, path + ".moved")
    if _modified_ns(path + ".moved") != kept_ns:
        raise Lacks("a rename changed one")
    for unit_ns, unit in ((1, "1 ns"), (100, "100 ns"), (1000, "1 us"),
                          (1000000, "1 ms"), (1000000000, "1 s")):
        if kept_ns == set_ns // unit_ns * unit_ns:
            return "in units of " + unit
    return "roughly"


@wanted("times of directories", "listings leave out what others wrote")
def _try_directory_times(trial):
    path = trial.at("directory")
    os.mkdir(path)
    made, moved = os.path.join(path, "made"), os.path.join(path, "moved")
    outside = trial.make("outside")
    for what, step in (
            ("made", lambda: trial.make(made)),
            ("moved in", lambda: os.rename(outside, moved)),
            ("removed", lambda: os.unlink(moved)),
            ("made a directory", lambda: os.mkdir(moved))):
        os.utime(path, (1, 1))
        step()
        if os.stat(path).st_mtime == 1:
            raise Lacks("none changed when an entry was " + what)


@wanted("times of changes (ctime)",
        "listings show metadata that others have changed since")
def _try_change_times(trial):
    path = trial.make("change")
    before, ended = os.stat(path), time.monotonic() + COARSE_TICK_NS / 1e9
    while time.monotonic() < ended:
        os.utime(path, ns=(before.st_mtime_ns,) * 2)
        if os.stat(path).st_ctime_ns != before.st_ctime_ns:
            return
        time.sleep(0.005)
    raise Lacks("none changes")


@wanted("clock of the files",
        "listings that are no longer true may be kept: set the clocks")
def _try_clock(trial):
    before_ns = time.time_ns()
    made_ns = _modified_ns(trial.make("clock"))
    tick_ns = TICK_NS if made_ns % 1000000000 else COARSE_TICK_NS
    off_ns = max(before_ns - made_ns, made_ns - time.time_ns())
    if off_ns > tick_ns:
        raise Lacks("it is off by %.2f s" % (off_ns / 1e9))


@wanted("numbers of files (inodes)",
        "objects that nobody hashed change their ETag, and records outside "
        "of extended attributes are lost")
def _try_inodes(trial):
    path = trial.make("inode")
    inode = os.stat(path).st_ino
    os.replace(path, path + ".moved")
    fd = os.open(path + ".moved", _OPEN_READ)
    try:
        if {os.fstat(fd).st_ino, os.stat(path + ".moved").st_ino} != {inode}:
            raise Lacks("a rename changed one")
    finally:
        os.close(fd)


def _try_names(trial, *names):
    """Lacks unless there can be a file of each name."""
    directory = secrets.token_hex(8)
    os.mkdir(trial.at(directory))
    for name in names:
        trial.make(os.path.join(directory, name), name.encode())
    if sorted(os.listdir(trial.at(directory))) != sorted(names):
        raise Lacks("one became another")


@wanted("names that differ in case",
        "keys that differ in nothing else are one object")
def _try_case(trial):
    _try_names(trial, "k", "K")


@wanted("names in any Unicode form",
        "keys that differ in nothing else are one object, or are listed as "
        "others")
def _try_unicode(trial):
    _try_names(trial, "\u00e9", "e\u0301")


@wanted("names of any characters",
        "keys with one of \\ : * ? \" < > |, a control character, or a dot "
        "or space at an end, are refused or become others")
def _try_characters(trial):
    _try_names(trial, "\\:*?\"<>|", "\1\x7f", "dot.", "dot", "space ",
               "space", "con")


@wanted("names of 255 bytes",
        "objects with a longer one are no plain files but lie under odd/",
        False)
def _try_long_names(trial):
    _try_names(trial, "n" * MAX_FILE_NAME_BYTES)


@wanted("extended attributes (user.*)",
        "each record is a file of its own, in .gos3rve/meta/", False)
def _try_xattrs(trial):
    if not _HAVE_XATTR:
        raise Lacks("this system has none")
    kept, path = 0, trial.make("xattr")
    for size in (256, 1024, 3900, 60000):
        fd = os.open(path, os.O_RDWR)
        try:
            os.setxattr(fd, XATTR, bytes(size))
        except OSError as error:
            if not kept or error.errno not in _NO_XATTR:
                raise
            break
        finally:
            os.close(fd)
        os.replace(path, path + "x")
        path, kept = path + "x", size
        if os.getxattr(path, XATTR) != bytes(size):
            raise Lacks("a rename changed one")
    return "of %d bytes" % kept


@wanted("hard links", "older versions are copies", False)
def _try_links(trial):
    os.link(trial.make("link", b"linked"), trial.at("linked"))
    os.unlink(trial.at("link"))
    with open(trial.at("linked"), "rb") as file:
        if file.read() != b"linked":
            raise Lacks("one has another content")


def _try_transfer(trial, transfer):
    """Lacks unless transfer(source, target, length) copies a file."""
    data, name = b"transfer" * 1000, secrets.token_hex(8)
    source = os.open(trial.make(name, data), _OPEN_READ)
    target = os.open(trial.make(name + ".copy"), os.O_RDWR)
    try:
        transfer(source, target, len(data))
        if _pread(target, 2 * len(data), 0) != data:
            raise Lacks("what comes is something else")
    finally:
        os.close(source)
        os.close(target)


@wanted("copy_file_range",
        "copies, and parts put together, go through the server's memory",
        False)
def _try_copies(trial):
    _try_transfer(trial, lambda source, target, length: _copy_range(
        source, target, 0, length))


@wanted("sendfile", "large downloads without TLS fail")
def _try_sendfile(trial):
    def send(source, target, length):
        ours, other = socket.socketpair()
        with ours, other:
            sent = os.sendfile(ours.fileno(), source, 0, length)
            os.write(target, other.recv(sent, socket.MSG_WAITALL))
    if not hasattr(os, "sendfile"):
        return "not used on this system"
    return _try_transfer(trial, send)


@wanted("fsync", "with -sync no write would be answered", False)
def _try_sync(trial):
    fd = os.open(trial.make("sync"), os.O_RDWR)
    try:
        sync_file(fd)
    finally:
        os.close(fd)
    sync_directory(trial.path)


@wanted("modes of files", "other users of the machine can read what is kept "
        "of buckets", False)
def _try_modes(trial):
    path = trial.make("mode")
    os.chmod(path, 0o600)
    if stat.S_IMODE(os.stat(path).st_mode) != 0o600:
        raise Lacks("0600 is not kept")


@wanted("room", "nothing can be written")
def _try_room(trial):
    usage = shutil.disk_usage(trial.path)
    text = "%.1f of %.1f GiB are free" % (usage.free / GIB,
                                          usage.total / GIB)
    files = os.statvfs(trial.path) if hasattr(os, "statvfs") else None
    if files and files.f_files:         # where their number is fixed
        text += ", and %d files" % files.f_favail
    if usage.free < MIB or files and files.f_files and not files.f_favail:
        raise Lacks(text)
    return text


# --- self-tests on two machines ---

def mount_of(path):
    """(type, set of options) of the file system where a path lies; the type
    is "" where Linux does not tell."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8",
                  errors="surrogateescape") as file:
            return find_mount(file.read(), os.path.realpath(path))
    except OSError:
        return "", frozenset()


def find_mount(text, path):
    """mount_of() a real path, by proc(5)'s mountinfo."""
    longest, found = 0, ("", frozenset())
    for line in text.splitlines():
        ours, _, theirs = line.partition(" - ")
        point, options = ours.split(" ")[4:6]
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)),
                       point)
        if (path + "/").startswith(point.rstrip("/") + "/") \
                and len(point) >= longest:      # a later one covers it
            kind, _, more = theirs.split(" ")[:3]
            longest = len(point)
            found = kind, frozenset((options + "," + more).split(","))
    return found


def meet(trial, report, seconds=None):
    """The Found of other machines: of one whose self-test of the same
    directory runs at the same time, too.

    Both wait for the other, and then watch what is seen of it.  seconds:
    how long to wait; None: MEETING_SECONDS where the file system may be a
    shared one.  report: takes a line that says so.
    """
    kind, options = mount_of(trial.path)
    for kinds, local in _LOCAL_LOCKS:
        if kind in kinds.split() and options.intersection(local.split()):
            return Found(_HOSTS, False, "its locks are not theirs, by a mount "
                         "option: all servers must run on this one")
    if seconds is None and (kind in _LOCAL_TYPES or not fcntl):
        return Found(_HOSTS, None, "not on this file system")
    if seconds is None:
        seconds = MEETING_SECONDS
        report("waiting %d s for -check_dir on another machine" % seconds)
    path = trial.make("held", socket.gethostname().encode())
    fd, ended = os.open(path, _OPEN_HELD), threading.Event()
    beating = threading.Thread(target=_beat, args=(trial, ended))
    try:
        try_flock(fd)
        beating.start()
        other = _other_trial(trial, seconds)
        if other is None:
            return Found(_HOSTS, None, "none ran -check_dir on it at the same "
                         "time")
        return _watch(trial, other)
    except (OSError, S3Error) as error:
        return Found(_HOSTS, False, str(error), True)
    finally:
        ended.set()
        beating.join()
        os.close(fd)


def _beat(trial, ended):
    """Show signs of life: a file that is replaced, and ever new ones."""
    number = 0
    with contextlib.suppress(OSError):
        while not ended.wait(BEAT_SECONDS):
            number += 1
            trial.publish("beat", b"%d" % number)
            trial.make("beat%d" % number)


def _beat_of(path):
    """The number of the last sign of life in the directory of a Trial."""
    try:
        with open(os.path.join(path, "beat"), "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _other_trial(trial, seconds):
    """The directory of another one that is alive, or None."""
    known, ended = {}, time.monotonic() + seconds
    while time.monotonic() < ended:
        for name in _listdir(trial.parent):
            path = os.path.join(trial.parent, name)
            if name.startswith(_TRIAL) and path != trial.path:
                number = _beat_of(path)
                if number > known.setdefault(name, number):
                    return path
        time.sleep(BEAT_SECONDS)
    return None


def _watch(trial, other):
    """The Found of what is seen of another Trial for a while."""
    path = os.path.join(other, "held")
    held = os.open(path, _OPEN_HELD)
    opened = _open_fresh(os.path.join(other, "beat"))   # to be replaced
    try:
        name = os.read(held, 255).decode(errors="replace")
        alone, lag = try_flock(held), _lag_of(other)
        try:
            kept = _pread(opened, 1, 0)
        except OSError:
            kept = b""
    finally:
        os.close(held)
        os.close(opened)
    trial.make("seen")                  # and be there until it has seen us
    ended = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < ended and _is_there(path) \
            and not _is_there(os.path.join(other, "seen")):
        time.sleep(BEAT_SECONDS)
    lacks = [text for text, lacking in (
        ("its lock did not keep us out: conditional writes hold on one "
         "machine only", alone),
        ("an open file that it replaced could not be read: downloads break "
         "off", not kept),
        ("what it changed was seen %.2f s later: conditional writes may go "
         "by what was before" % lag, lag >= MAX_LAG_SECONDS)) if lacking]
    return Found(_HOSTS, not lacks, "%s: %s" % (name, "; ".join(
        lacks or ["its locks hold, what it changed was seen %.2f s later at "
                  "most" % lag])), True)


def _lag_of(other):
    """The most seconds without a new sign of life, by its name or by its
    time."""
    lag, stamp, number = 0, 0, _beat_of(other) + 1
    named = beaten = now = time.monotonic()
    ended = now + WATCH_SECONDS
    while now < ended:
        if _is_there(os.path.join(other, "beat%d" % number)):
            number, named = number + 1, now
        last, stamp = stamp, _modified_ns(os.path.join(other, "beat"))
        beaten = now if stamp != last else beaten
        lag = max(lag, now - min(named, beaten))
        time.sleep(BEAT_SECONDS / 10)
        now = time.monotonic()
    return lag


# --- checking ---
#
# What a crash, a restore from a backup or a careless copy may leave behind,
# looked for and mended beside servers that run: what is changed is looked
# at again under the key's lock, and what lives is locked.

MENDED, LEFT, NOTE = "mended", "fault", "note"


class Checker:
    """Goes over all that a Store keeps.

    tell(where, what, state): takes each finding; LEFT is a fault that
    stays, NOTE something in order that is no object.  mend: also mend what
    can be.  verify: read every object that is not encrypted, and compare
    it with its ETag.  progress(counts): called after each key.  counts: of
    what was looked at, and of each state.
    """

    def __init__(self, store, tell, mend=False, verify=False,
                 progress=lambda counts: None):
        self._store, self._tell, self._progress = store, tell, progress
        self._mend, self._verify = mend, verify
        self._now = time.time()
        self._before = self._now - SWEEP_GRACE_SECONDS
        self.counts = collections.Counter()
        self._untold, self._spared = [], set()

    def run(self):
        """Check everything; the counts."""
        for bucket in self._store.list_buckets(self._tell_unseen):
            self.counts["buckets"] += 1
            with self._telling(_quoted(bucket.root)), \
                    _as_owner(bucket._state, bucket.root):
                self._check_bucket(bucket)
        with self._telling(_quoted(self._store.dir_buckets)):
            for path, has_objects in self._store.leftovers(self._now):
                with self._telling(_quoted(path)):
                    if has_objects:
                        self._found(_quoted(path), "is a deleted bucket into "
                                    "which somebody has put a file")
                        continue
                    self._found(_quoted(path), "is left of a bucket that was "
                                "being made or deleted", lambda path=path:
                                shutil.rmtree(path))
        for name in _listdir(self._store.dir_uploads):
            directory = os.path.join(self._store.dir_uploads, name)
            with self._telling(_quoted(directory)), _as_owner(directory):
                self._check_uploads(name)
        return self.counts

    def _found(self, where, fault, mend=None):
        """Tell a fault; mend() is how to mend it."""
        state = LEFT
        if mend and self._mend:
            mend()
            state = MENDED
        self.counts[state] += 1
        self._untold.append((where, fault, state))

    def _tell_unseen(self, name, error):
        with self._telling(_quoted(self._store.mapped.get(name, os.path.join(
                self._store.dir_buckets, name)))):
            raise error

    @contextlib.contextmanager
    def _telling(self, where):
        """What cannot be read or mended is a fault, too.  It is told at the
        end, with no lock held: who reads it may take their time."""
        try:
            yield
        except FileNotFoundError:
            pass                        # gone meanwhile
        except (OSError, S3Error) as error:
            self._found(where, "cannot be checked or mended: %s"
                        % (getattr(error, "strerror", None) or error))
        finally:
            while self._untold:
                self._tell(*self._untold.pop(0))

    def _check_bucket(self, bucket):
        with contextlib.suppress(FileNotFoundError):
            for fault in parse_settings(read_state(bucket._config_path))[1]:
                self._found(_quoted(bucket._config_path), "is damaged: the "
                            "bucket has lost its settings: " + fault)
        for directory in (bucket._versions, bucket._odd):
            for name in _listdir(directory):
                with self._telling(_quoted(os.path.join(directory, name))):
                    self._check_hashed(bucket, directory, name)
        for name in _listdir(bucket._meta):
            with self._telling(_quoted(os.path.join(bucket._meta, name))):
                self._check_place(bucket, name)
        walker = Walker(bucket, self._store._cache)
        for key in walker.version_keys("", "", ""):
            with self._telling(_key_text(bucket, key)):
                self._check_key(bucket, key)
            self._progress(self.counts)
        for name in _listdir(bucket._meta):
            with self._telling(_quoted(os.path.join(bucket._meta, name))):
                self._check_sidecar(bucket, name)
        for directory in (bucket._tmp, bucket._state):
            self._check_drafts(directory)
        if self._mend:
            bucket.sweep_hints()        # no fault: any of them may be wrong
        self._note_others(bucket)

    # names that do not tell their key

    def _check_hashed(self, bucket, directory, name):
        """A name under versions/ or odd/ that is a hash: a file there must
        tell the key."""
        path = os.path.join(directory, name)
        if name[0] == "k" or _modified(path) >= self._before:
            return                      # the latter is just being made
        files, key_file = [path], os.path.join(path, KEY_FILE)
        if directory == bucket._versions:
            if odd_name(_key_in(key_file)) == name:
                return
            files = [os.path.join(path, version) for version
                     in _listdir(path) if version != KEY_FILE]
        key = next((key for file in files
                    for key in self._told_keys(bucket, file)
                    if key and odd_name(key) == name), None)
        if directory == bucket._versions:
            self._found(_quoted(path), "has the versions of a key that it "
                        "does not tell", key and (
                            lambda: bucket.write_key_file(key)))
        elif key is None:
            self._found(_quoted(path), "is an object whose key is lost")

    @staticmethod
    def _told_keys(bucket, path):
        """The keys that the records of a file tell: while it is renamed it
        still has the old one."""
        record = _record_inside(path) if bucket._xattrs else {}
        if record:
            return [record.get("key"), record.get("was")]
        ending = "-%x" % os.stat(path).st_ino
        return [_key_in(os.path.join(bucket._meta, sidecar))
                for sidecar in _listdir(bucket._meta)
                if sidecar.endswith(ending)]

    # keys

    def _check_key(self, bucket, key):
        """The files of a key, and how they belong together."""
        directory = bucket._version_directory(key)
        where = _key_text(bucket, key)
        found = bucket._open_key(key)
        if found:
            close_fd(found[0])
            self.counts["objects"] += 1
            self._check_file(bucket, key, found[2])
        for name in bucket.version_names(key, False):
            self.counts["versions"] += 1
            with self._telling(where):
                self._check_file(bucket, key, os.path.join(directory, name))
        if os.path.isdir(directory) or bucket._is_odd(key):
            with bucket.lock(key):
                for fault, mend in self._key_faults(bucket, key):
                    self._found(where, fault, mend)

    @staticmethod
    def _key_faults(bucket, key):
        """(fault, what mends it) of the files of a key, whose lock the
        caller holds, one after the other."""
        found = bucket._open_key(key)
        if found:
            close_fd(found[0])
            if found[2] != bucket._odd_path(key) and bucket._is_odd(key):
                older = _modified_ns(bucket._odd_path(key)) \
                    <= found[1].st_mtime_ns
                yield ("hides %s file of its key, under odd/" % (
                    "an older" if older else "a newer"),
                    (lambda: bucket._drop_twin(key)) if older else None)
        names = bucket.version_names(key, False)
        if bucket.is_unsettled(key, names):
            yield ("has a change that was cut off among its versions",
                   lambda: bucket.settle(key))
            names = bucket.version_names(key, False)
            if bucket.is_unsettled(key, names):
                return                  # the rest follows from it
        current = bucket.find(key)
        twin = current and _name_of(current.version_id, names)
        if twin and found and _is_like(os.path.join(
                bucket._version_directory(key), twin), found[1]):
            yield ("has its current version among the others, too",
                   lambda: bucket.drop_version(key, twin))
        elif twin:                      # archive() will tell them apart
            yield ("has a file put here by hand that hides an older version "
                   "of the same id", None)
        elif names and not current and not bucket._is_marker(key, names[0]):
            yield ("has versions, but none is current: the file was removed "
                   "by hand, or lost; mended by a delete marker",
                   lambda: bucket.add_marker(key, names,
                                             new_version_id(names)))
        elif not names and not current and os.path.isdir(
                bucket._version_directory(key)):
            yield ("has no version any more",
                   lambda: bucket._prune_versions(key))

    # files and their records

    def _check_file(self, bucket, key, path):
        """The record of one file; its content when that is asked for."""
        fd, status = bucket._open_path(path)
        try:
            self.counts["bytes"] += status.st_size
            before = bucket._read_record(fd, status, key)
            fault, record = self._judge(bucket, key, fd, status)
            if fault is None:
                return
            if record is None:          # what is left of one stays, too
                self._spared.add(bucket._sidecar(key, status.st_ino))
                self._found(_key_text(bucket, key), fault)
                return
            directory, name = os.path.split(path)
            if directory == bucket._version_directory(key) \
                    and _version_of(name) != NULL_VERSION:
                record["version"] = _version_of(name)   # should it come back

            def mend():
                with bucket.lock(key):
                    if not _same_file(path, status) or bucket._read_record(
                            fd, status, key) != before:
                        raise S3Error("OperationAborted")
                    bucket._rewrite_record(fd, status, key, record)
            self._found(_key_text(bucket, key), fault, mend)
        finally:
            close_fd(fd)

    def _judge(self, bucket, key, fd, status):
        """(What is wrong with an open file or its record, or None; the
        record that would be right, None where that is not to be told)."""
        record = bucket._read_record(fd, status, key)
        info = _looked_at(Info(key, status, dict(record)), fd)
        if _is_torn(status, record):
            return "is shorter than its record says: a power cut", None
        if info.damaged:
            return "is encrypted, and no record tells how it opens", None
        if not record:
            if not bucket.has_record(fd, status, key):
                return None, None       # put here by hand
            return "has a damaged record", self._described(
                {"key": key} if _is_hashed(key) else {}, fd, status) \
                if status.st_size else None     # else it may be a marker
        if "etag" in record and "etag" not in info.record:
            return ("has a record of other content",
                    self._described(record, fd, status))
        if "parts" in record and "parts" not in info.record:
            return "has a record of other parts", info.record
        if self._verify and "sse" not in record and "etag" in record \
                and _content_etag(fd, status, record) != record["etag"]:
            return "has not the content that its ETag tells of", None
        return None, None

    @staticmethod
    def _described(record, fd, status):
        """A record made to fit the content.  Whose digest is the same was
        copied without its time, what is sealed tells of every change when
        it is opened; of others the digests are dropped."""
        if "parts" in record:
            record = _fitting_parts(record, status.st_size)
        same = record.get("size") == status.st_size and (
            "sse" in record or _content_etag(
                fd, status, record) == record.get("etag"))
        if not same:
            record = {name: value for name, value in record.items()
                      if name not in _CONTENT_FIELDS}
            record["etag"] = _content_etag(fd, status)
        record["size"] = status.st_size
        record["mtime_ns"] = status.st_mtime_ns
        return record

    def _check_place(self, bucket, name):
        """A file under meta/ that lies where that of another file of its
        key belongs, in a copy of the bucket: it makes room, and
        _check_sidecar() finds its place."""
        path = os.path.join(bucket._meta, name)
        record = load_record(read_state(path))
        key = record.get("key")
        if not key or _modified(path) >= self._before:
            return
        with bucket.lock(key):
            places = bucket.fitting(key, record)
            if places and path not in places and bucket._describes(key, name):
                self._found(_quoted(path), "is the record of another file "
                            "of its key", lambda: os.replace(
                                path, path + "-moved"))

    def _check_sidecar(self, bucket, name):
        """A file under meta/: whose record is it?  A copy of the bucket has
        other inodes, and the old ones in the names."""
        path = os.path.join(bucket._meta, name)
        if _modified(path) >= self._before or path in self._spared:
            return                      # its file may come in a moment
        record = load_record(read_state(path))
        key = record.get("key", "")
        with bucket.lock(key):
            if not bucket._describes(key, name):
                heir = key and next(
                    (sidecar for sidecar, has in bucket.fitting(
                        key, record).items() if not has), None)
                self._found(
                    _quoted(path), "is the record of a file that has "
                    "another inode now" if heir else "is the record of no "
                    "file" if key else "is a damaged record", lambda:
                    os.replace(path, heir) if heir else _unlink(path))

    # what else lies there

    def _check_drafts(self, directory):
        def find(path):
            self._found(_quoted(path), "is an upload that nobody writes any "
                        "more", lambda: _unlink(path))
        _sweep_drafts(directory, self._before, find)

    def _note_others(self, bucket):
        """Tell of what lies in a bucket and is no object."""
        def unread(error):
            with self._telling(_quoted(error.filename)):
                raise error
        for path, directories, files in os.walk(bucket.root, onerror=unread):
            if path == bucket.root and STATE in directories:
                directories.remove(STATE)
            for name in files + [name for name in directories
                                 if os.path.islink(os.path.join(path, name))]:
                place = os.path.join(path, name)
                reason = self._no_object(bucket, place)
                if reason:
                    self.counts[NOTE] += 1
                    self._tell(_quoted(place), reason, NOTE)

    @staticmethod
    def _no_object(bucket, path):
        """Why a file is no object, or None."""
        name = os.path.relpath(path, bucket.root)
        if not is_utf8(name):
            return "is no object: its name is not UTF-8"
        if not is_natural(name.replace(os.sep, "/")):
            return "is no object: its name is reserved, or none for a key"
        if len(name.encode()) > MAX_KEY_BYTES:
            return "is no object: its key would be too long"
        if os.path.islink(path) and bucket.resolve_inside(path) is None:
            return "is no object: it leads out of the bucket"
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            return "is no object: %s" % error.strerror
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return "is no object: it is no regular file"
        return None

    def _check_uploads(self, name):
        """The uploads to the bucket of a name."""
        directory = os.path.join(self._store.dir_uploads, name)
        bucket = None
        with contextlib.suppress(S3Error):
            if usable_bucket_name(name):
                bucket = self._store.bucket(name)
        for upload_id in filter(_UPLOAD_ID.match, _listdir(directory)):
            path = os.path.join(directory, upload_id)
            with self._telling(_quoted(path)):
                self._check_upload(path, bucket)

    def _check_upload(self, path, bucket):
        """One upload, to a Bucket or, where that is None, to none."""
        self.counts["uploads"] += 1
        upload = self._store._load_upload(path)
        if _last_change(path) >= self._before:
            return                      # somebody is at it
        if upload is None and _is_there(os.path.join(path, "upload.json")):
            self._found(_quoted(path), "is an upload whose upload.json is "
                        "damaged")
        elif upload is None:
            self._found(_quoted(path), "is no upload: its upload.json is "
                        "missing", lambda: shutil.rmtree(path))
        elif bucket is None:
            # which may be on a disk that is not, or have a flag of its own
            self._found(_quoted(path), "is an upload to a bucket that is not "
                        "there")
        elif not upload.is_to(bucket.config.get("created_ns")):
            self._found(_quoted(path), "is an upload to an earlier bucket of "
                        "that name", lambda: shutil.rmtree(path))
        else:
            self._check_parts(upload)

    def _check_parts(self, upload):
        known = {part.path for part in self._store.list_parts(upload)}
        self.counts["parts"] += len(known)
        for name in filter(_PART_NAME.match, os.listdir(upload.path)):
            path = os.path.join(upload.path, name)
            if path not in known:
                self._found(_quoted(path), "is a part without a record of its "
                            "content: send it again")
        self._check_drafts(upload.path)


@contextlib.contextmanager
def _as_owner(*paths):
    """Be, as root, the user whose is the first of the paths that is there:
    what is made there is for a server which may run as that user.  OSError
    where root may not, in a container, say."""
    owner = next((os.stat(path) for path in paths if _is_there(path)), None)
    if owner is None or not hasattr(os, "seteuid") or os.geteuid() != 0 \
            or not owner.st_uid:
        yield
        return
    group = os.getegid()
    try:
        try:
            os.setegid(owner.st_gid)
            os.seteuid(owner.st_uid)
        except OSError as error:
            raise OSError(error.errno, "root may not act as its owner here, "
                          "user %d: run it as that user"
                          % owner.st_uid) from None
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


def _content_etag(fd, status, record=None):
    """The ETag that the content of an open file has: its MD5, or one of
    parts when the record tells of such."""
    runs = (record or {}).get("parts") or [[status.st_size, 1]]
    digests, offset = [], 0
    for size, count in runs:
        for _ in range(count):
            digest = new_md5()
            for block in read_blocks(fd, offset, size):
                digest.update(block)
            digests.append(digest)
            offset += size
    if not (record or {}).get("parts"):
        return digests[0].hexdigest()
    return "%s-%d" % (new_md5(b"".join(digest.digest() for digest in digests)
                              ).hexdigest(), len(digests))


def _key_in(path):
    """The key that a sidecar or KEY_FILE tells; "" for none."""
    try:
        return load_record(read_state(path)).get("key", "")
    except OSError:
        return ""


def _key_text(bucket, key):
    """A key, for people."""
    return "%s/%s" % (bucket.name, uri_encode(key, "/-_.~"))


def _quoted(path):
    """A path, for people, whatever bytes its name has."""
    return urllib.parse.quote(os.fsencode(path), "/-_.~ :\\")


# --- master keys ---

# The key file, as JSON:  {"default": "<base64 of 32 bytes>",
#                          "keys": {"<KMS key id>": "<the same>", ...}}
# `default` wraps the data keys of SSE-S3, and of SSE-KMS when no key is
# named.  Whoever loses the file loses the objects.

# the alias of AWS's own key: userguide/UsingKMSEncryption.html#aws-managed-
# customer-managed-keys
DEFAULT_KMS_KEY = "alias/aws/s3"
MAX_KMS_KEY_ID = 2048               # KMS: API_GenerateDataKey.html, KeyId
_KMS_ARN = re.compile(r"arn:[^:]*:kms:[^:]*:[^:]*:(?:key/)?(.+)\Z")


class MasterKeys(NamedTuple):
    """What the key file holds."""
    default: bytes
    keys: Dict[str, bytes]

    def fingerprinted(self, fingerprint):
        """The key of that fingerprint, whatever its name; SealError."""
        for key in itertools.chain((self.default,), self.keys.values()):
            if key_fingerprint(key) == fingerprint:
                return key
        raise SealError("the key file has no key of the fingerprint "
                        + fingerprint)

    def find(self, key_id):
        """The key of a KMS key id, or of its ARN; KMS.NotFoundException
        when the file has none of that name."""
        name = key_id
        if name not in self.keys:
            arn = key_id.isascii() and key_id.isprintable() \
                and _KMS_ARN.match(key_id)
            name = arn[1] if arn else key_id
        if name in self.keys:
            return self.keys[name]
        if name == DEFAULT_KMS_KEY:
            return self.default
        raise S3Error("KMS.NotFoundException", "Invalid keyId '%s'" % key_id)


def _opened_to_read(path, _):
    """A descriptor for open(), which a FIFO does not keep waiting."""
    return os.open(path, _OPEN_READ)


def load_master_keys(path):
    """The MasterKeys in a key file; ValueError, one sentence, when there
    is none, it is not in order, or others may read or change it."""
    try:
        with open(path, "rb", opener=_opened_to_read) as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read()
    except OSError as error:
        raise ValueError("the key file %s cannot be read: %s"
                         % (path, error.strerror)) from None
    if os.name != "nt" and mode & 0o027:
        raise ValueError("the key file %s is open to others; run chmod 600 "
                         "on it" % path)
    try:
        return _parse_master_keys(parse_json(data))
    except ValueError as error:
        reason = error.args[0] if type(error) is ValueError else "no JSON"
        raise ValueError("the key file %s is not in order: %s"
                         % (path, reason)) from None


def _parse_master_keys(document):
    if not isinstance(document, dict) or set(document) - {"default", "keys"}:
        raise ValueError('it is not an object of "default" and "keys"')
    keys = document.get("keys", {})
    if not isinstance(keys, dict) or not all(
            0 < len(name) <= MAX_KMS_KEY_ID and name.isprintable()
            and name.isascii() for name in keys):
        raise ValueError('"keys" is not an object of key ids')
    return MasterKeys(_master_key("default", document.get("default")), {
        name: _master_key(name, text) for name, text in keys.items()})


def _master_key(name, text):
    key = decode_digest(text, SEAL_KEY_BYTES) if isinstance(text, str) \
        else None
    if key is None:
        raise ValueError('"%s" is not 32 bytes in base64' % name)
    return key


def ensure_master_keys(path):
    """(MasterKeys, made): those in the key file, which is made, with a
    random default key, when there is none.

    Of several processes that find none one makes it, and all load that
    one.  It is on the disk before it is loaded.  ValueError as for
    load_master_keys.
    """
    made = False
    if not os.path.lexists(path):
        try:
            made = _make_key_file(os.path.abspath(path))
        except OSError as error:
            raise ValueError("the key file %s cannot be made: %s"
                             % (path, error.strerror)) from None
    return load_master_keys(path), made


def _make_key_file(path):
    """Make a key file; False when somebody was faster."""
    key = base64.b64encode(secrets.token_bytes(SEAL_KEY_BYTES)).decode()
    data = json.dumps({"default": key, "keys": {}}, indent=1).encode()
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    temporary = "%s.%s" % (path, secrets.token_hex(8))
    try:
        _write_new(temporary, data)
        try:
            os.link(temporary, path)
        except OSError:                 # somebody was faster, or no links
            _write_new(path, data)      # here: exclusive, not whole at once
        sync_directory(directory)
        return True
    except FileExistsError:
        return False
    finally:
        _unlink(temporary)


def _write_new(path, data):
    with open(os.open(path, _OPEN_NEW, 0o600), "wb") as file:
        file.write(data + b"\n")
        file.flush()
        sync_file(file.fileno())


class KeyFile:
    """The master keys of a server, read when they are first needed, and
    again when the file was changed.

    named: the operator named the file, so it is never made here.  report:
    takes a line for the log.
    """

    def __init__(self, path, named, report):
        self.path, self._named, self._report = path, named, report
        self._keys = self._stamp = None
        self._lock = threading.Lock()

    def get(self, store=None):
        """The MasterKeys.  InternalError when there are none in order.

        store: the Store to be written to, for which a key file may be
        made.  While the file is gone, those that were read before still
        open objects, and seal none that nobody could open hereafter.
        """
        with self._lock:
            stamp = self._present_stamp()
            if self._keys is None or stamp != self._stamp and (
                    stamp or store):
                try:
                    self._keys = self._load(store)
                except ValueError as error:
                    raise S3Error("InternalError", "The server's master "
                                  "keys cannot be had") from error
                self._stamp = stamp
            return self._keys

    def _present_stamp(self):
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _load(self, store):
        if store is None or self._named or os.path.lexists(self.path):
            return load_master_keys(self.path)
        for bucket in store.list_buckets():
            if bucket.config.get("sealed"):
                raise ValueError(
                    "the key file %s is gone, and without it the encrypted "
                    "objects in the bucket %s do not open; put it back, or "
                    "name another with -sse_key" % (self.path, bucket.name))
        keys, made = ensure_master_keys(self.path)
        if made:
            self._report("made the key file %s: whoever loses it loses the "
                         "encrypted objects" % self.path)
        return keys


###############################################################################
# 7. Access
###############################################################################
#
# Who may do what: accounts, access control lists, bucket policies, the
# public access block, and authorize(), which weighs them.  Plain values and
# the XML of grants in, plain values or S3Error out; no sockets, no bodies,
# no files, no clock.  Everything here is immutable once made, but for a
# Context, which belongs to one request: safe from any thread.
#
# userguide/how-s3-evaluates-access-control.html, acl-overview.html,
# access-control-block-public-access.html, about-object-ownership.html and
# IAM/latest/UserGuide/reference_policies_elements.html.

# userguide/add-bucket-policy.html: "limited to 20 KB", white space aside
MAX_POLICY_BYTES = 20 * KIB
# Ours: what is read of a policy before its white space is taken out
MAX_POLICY_TEXT_BYTES = 256 * KIB
# Ours: steps through patterns of wildcards and variables, times the length of
# what they are compared with, that one Context may ask for: half a second.
# One key takes a sixth of it with the longest of policies and headers.
MAX_POLICY_WORK = 8 * 10 ** 9
# userguide/acl-overview.html: "An ACL can have up to 100 grants"
MAX_GRANTS = 100

ENFORCED, PREFERRED, WRITER = OWNERSHIPS = (
    "BucketOwnerEnforced", "BucketOwnerPreferred", "ObjectWriter")
CONFIG_SHAPES["ownership"] = (OWNERSHIPS + (None,)).__contains__

# userguide/acl-overview.html#specifying-grantee: who writes unsigned
ANONYMOUS_ID = "65a011a29cdf8ec533ec3d1ccaae921c"
# The grantee of aws-exec-read: Amazon EC2, as GetObjectAcl shows it
EC2_ID = "6aa5a366c34c1cbe25dc49211496e913e0351eb0e8c37aa3477e40942ec6b97c"


# --- accounts and callers ---

class Accounts:
    """Every account, by key id.

    The first one owns what has no owner or one that is no account here.
    lasting: False when its user id was made up for this run, and must not
    be written down.
    """

    def __init__(self, accounts, lasting=True):
        self.first, self._lasting = accounts[0], lasting
        self.by_key_id = {account.key_id: account for account in accounts}
        self.by_user_id = {account.user_id: account
                           for account in reversed(accounts)}
        self._by_email = {account.email.lower(): account
                          for account in reversed(accounts)
                          if account.email}

    def owner_id(self, bucket):
        """The user id of a bucket's owner."""
        owner = bucket.owner
        return owner if owner in self.by_user_id else self.first.user_id

    def lasting_id(self, account):
        """The user id to write down as an owner; None for the first."""
        if account.user_id == self.first.user_id and not self._lasting:
            return None
        return account.user_id

    def name(self, user_id):
        """The display name of a user id; "" for a stranger's."""
        account = self.by_user_id.get(user_id)
        return account.user_name if account else ""

    def with_email(self, email):
        """The Account with that e-mail address, or None."""
        return self._by_email.get(email.lower())


class Caller(NamedTuple):
    """Who asks, as policies and ACLs see them.

    user_id: the account's, None for the unsigned and for a service.
    principals: every (kind, text) by which a Principal may name it.
    arn and kind: aws:PrincipalArn and aws:PrincipalType.  session_arn:
    of a role's session.  limits: the Policy that it must stay within, or
    None.  tags: a session's, by key in lower case.  issued: when its
    temporary credentials were, in seconds, None for lasting ones.
    """
    user_id: Optional[str] = None
    principals: frozenset = frozenset()
    arn: Optional[str] = None
    kind: str = "Anonymous"
    user_name: Optional[str] = None
    unique_id: Optional[str] = None
    service: Optional[str] = None
    session_arn: Optional[str] = None
    limits: Any = None
    tags: Optional[Dict[str, str]] = None
    issued: Optional[int] = None

    @property
    def is_root(self):
        """True for an account itself, not for a role or a service."""
        return self.kind == "Account"


ANONYMOUS = Caller(unique_id="anonymous")


@functools.lru_cache(maxsize=1024)
def account_caller(account):
    """The Caller of a request that `account` signed; None: unsigned.

    An account is its own root user.  It is also known as a user of its
    own name, and by the form arn:aws:iam:::user/<id> of Ceph's s3-tests.
    aws:username is its name, which on AWS a root user does not have.
    """
    if account is None:
        return ANONYMOUS
    user_id, name, session = account.user_id, account.user_name, \
        account.session
    if session and session.role:
        return _role_caller(user_id, session)
    root = "arn:aws:iam::%s:root" % user_id
    names = [user_id, root] + [
        "arn:aws:iam::%s:user/%s" % pair for pair in (
            (user_id, name), ("", name), ("", user_id))]
    principals = [("AWS", text) for text in names]
    principals.append(("CanonicalUser", user_id))
    return Caller(user_id, frozenset(principals), root, "Account", name,
                  user_id, issued=session and session.issued)


def _role_caller(user_id, session):
    """The Caller of temporary credentials that AssumeRole gave.

    It acts for the account, within its policy, and is not its root user.
    It has no aws:username, and its aws:PrincipalArn is the role's: IAM
    reference_policies_condition-keys.html, reference_policies_variables.
    html#principaltable and reference_policies_elements_principal.html
    """
    arn = "arn:aws:iam::%s:role/%s" % (user_id, session.role)
    session_arn = "arn:aws:sts::%s:assumed-role/%s/%s" % (
        user_id, session.role.rpartition("/")[2], session.name)
    names = (user_id, session_arn, "arn:aws:iam::%s:root" % user_id, arn)
    principals = [("AWS", text) for text in names]
    principals.append(("CanonicalUser", user_id))
    role_id = "AROA" + base64.b32encode(
        hashlib.sha256(arn.encode()).digest()).decode()[:17]
    return Caller(
        user_id, frozenset(principals), arn, "AssumedRole",
        unique_id="%s:%s" % (role_id, session.name), session_arn=session_arn,
        limits=parse_session_policy(session.policy) if session.policy
        else None, issued=session.issued,
        tags={key.lower(): value for key, value in session.tags})


LOGGING_SERVICE = "logging.s3.amazonaws.com"


def service_caller(service):
    """The Caller of what the server itself does, such as log delivery."""
    return Caller(principals=frozenset([("Service", service)]),
                  kind="Service", service=service)


# --- access control lists ---

ALL_USERS = "http://acs.amazonaws.com/groups/global/AllUsers"
AUTHENTICATED_USERS = \
    "http://acs.amazonaws.com/groups/global/AuthenticatedUsers"
LOG_DELIVERY = "http://acs.amazonaws.com/groups/s3/LogDelivery"
# What records call the groups -> URI
_GROUPS = {"@AllUsers": ALL_USERS,
           "@AuthenticatedUsers": AUTHENTICATED_USERS,
           "@LogDelivery": LOG_DELIVERY}
_GROUP_NAMES = {uri: name for name, uri in _GROUPS.items()}
_PUBLIC_GROUPS = frozenset((ALL_USERS, AUTHENTICATED_USERS))

PERMISSIONS = ("READ", "WRITE", "READ_ACP", "WRITE_ACP", "FULL_CONTROL")


class Grant(NamedTuple):
    """One line of an ACL: a permission, and a user id or a group's URI."""
    permission: str
    grantee: str


# userguide/acl-overview.html#canned-acl: what each gives besides
# FULL_CONTROL to the owner.  "bucket" stands for the bucket's owner.
_CANNED_ACLS = {
    "private": (),
    "public-read": (Grant("READ", ALL_USERS),),
    "public-read-write": (Grant("READ", ALL_USERS),
                          Grant("WRITE", ALL_USERS)),
    "authenticated-read": (Grant("READ", AUTHENTICATED_USERS),),
    "aws-exec-read": (Grant("READ", EC2_ID),),
    "bucket-owner-read": (Grant("READ", "bucket"),),
    "bucket-owner-full-control": (Grant("FULL_CONTROL", "bucket"),),
    "log-delivery-write": (Grant("WRITE", LOG_DELIVERY),
                           Grant("READ_ACP", LOG_DELIVERY)),
}

# Header -> permission, in the order in which grants are listed
_GRANT_HEADERS = {"x-amz-grant-" + name.lower().replace("_", "-"): name
                  for name in PERMISSIONS}


def private_acl(owner_id):
    """The grants of what nobody gave an ACL."""
    return (Grant("FULL_CONTROL", owner_id),)


def canned_acl(name, owner_id, bucket_owner_id=None):
    """The grants that a canned ACL stands for, the owner's first.

    bucket_owner_id: None for a bucket's own ACL, where the two
    bucket-owner- ones are the same as private.
    """
    if name not in _CANNED_ACLS:
        raise S3Error("InvalidArgument", ArgumentName="x-amz-acl",
                      ArgumentValue=name)
    grants = list(private_acl(owner_id))
    for permission, grantee in _CANNED_ACLS[name]:
        if grantee == "bucket":
            grantee = bucket_owner_id
        if grantee not in (None, owner_id):
            grants.append(Grant(permission, grantee))
    return tuple(grants)


def names_acl(headers):
    """True when a request says who may do what with what it makes."""
    return "x-amz-acl" in headers \
        or not _GRANT_HEADERS.keys().isdisjoint(headers)


def headers_acl(headers, owner_id, accounts, bucket_owner_id=None):
    """The grants that x-amz-acl or x-amz-grant-* ask for, None for none.

    With x-amz-grant-* the owner gets nothing that is not written there
    (userguide/acl-overview.html#setting-acls, "headers").
    """
    canned = headers.get("x-amz-acl")
    named = [name for name in _GRANT_HEADERS if name in headers]
    if not named:
        return None if canned is None else canned_acl(
            canned, owner_id, bucket_owner_id)
    if canned is not None:
        raise S3Error("InvalidRequest", "Specifying both Canned ACLs and "
                      "Header Grants is not allowed")
    grants = [Grant(_GRANT_HEADERS[name], grantee) for name in named
              for grantee in _header_grantees(name, headers[name], accounts)]
    return _bounded(grants)


def _bounded(grants):
    """`grants` as a tuple, or MalformedACLError when there are too many."""
    if len(grants) > MAX_GRANTS:
        raise S3Error("MalformedACLError", "An ACL can have up to %d grants"
                      % MAX_GRANTS)
    return tuple(grants)


def _header_grantees(name, value, accounts):
    """The grantees in `id="...", uri=..., emailAddress=...`.

    The AWS CLI's documents write emailaddress: kinds have no case.
    """
    for item in value.split(","):
        kind, equals, text = item.strip().partition("=")
        find = _GRANTEE_KINDS.get(kind.strip().lower())
        if find is None or not equals:
            raise S3Error("InvalidArgument", "Argument format not "
                          "recognized", ArgumentName=name,
                          ArgumentValue=item.strip())
        text = text.strip()
        if text[:1] == '"' == text[-1:] and len(text) > 1:
            text = text[1:-1]
        yield find(text, accounts, kind.strip())


def _user_grantee(user_id, accounts, argument):
    """`user_id` itself, when it can be granted something."""
    if user_id not in accounts.by_user_id \
            and user_id not in (ANONYMOUS_ID, EC2_ID):
        raise S3Error("InvalidArgument", "Invalid id",
                      ArgumentName=argument, ArgumentValue=user_id)
    return user_id


def _email_grantee(email, accounts, argument):
    """The user id of the account with that address."""
    account = accounts.with_email(email)
    if account is None:
        raise S3Error("UnresolvableGrantByEmailAddress",
                      ArgumentName=argument, ArgumentValue=email)
    return account.user_id


def _group_grantee(uri, _accounts, argument):
    """`uri` itself, when it is one of the three groups."""
    if uri not in _GROUP_NAMES:
        raise S3Error("InvalidArgument", "Invalid group uri",
                      ArgumentName=argument, ArgumentValue=uri)
    return uri


_GRANTEE_KINDS = {"id": _user_grantee, "emailaddress": _email_grantee,
                  "uri": _group_grantee}
# xsi:type -> (child element, its meaning)
_GRANTEE_TYPES = {
    "CanonicalUser": ("ID", _user_grantee),
    "AmazonCustomerByEmail": ("EmailAddress", _email_grantee),
    "Group": ("URI", _group_grantee)}


def parse_acl(data, owner_id, accounts):
    """The grants of an AccessControlPolicy document (bytes).

    AccessDenied when it names another owner: an ACL gives no ownership.
    API_PutBucketAcl.html; codes and ArgumentNames as recorded from AWS in
    LocalStack's test_s3_bucket_acl_exceptions.
    """
    try:
        document = parse_xml(data, "AccessControlPolicy")
    except S3Error:
        raise S3Error("MalformedACLError") from None
    owner, listed = document.find("Owner"), document.find("AccessControlList")
    if owner is None or listed is None:
        raise S3Error("MalformedACLError")
    named = xml_text(owner, "ID", "")
    if named != owner_id:
        _user_grantee(named, accounts, "CanonicalUser/ID")
    grants = _bounded([_parse_grant(element, accounts)
                       for element in listed])
    if named != owner_id:
        raise S3Error("AccessDenied")
    return grants


def _parse_grant(element, accounts):
    """The Grant that one element says."""
    grantee = element.find("Grantee")
    permission = xml_text(element, "Permission")
    if element.tag != "Grant" or grantee is None \
            or permission not in PERMISSIONS:
        raise S3Error("MalformedACLError")
    found = find_grantee(grantee.get("type"), functools.partial(
        xml_text, grantee), accounts)
    if found is None:
        raise S3Error("MalformedACLError")
    return Grant(permission, found)


def find_grantee(kind, text, accounts):
    """The user id or group URI of a Grantee element, None when it names
    none.  kind: its xsi:type; text(tag): what a child of it says."""
    tag, find = _GRANTEE_TYPES.get(kind, (None, None))
    named = tag and text(tag)
    if named is None:
        return None
    return find(named, accounts, "%s/%s" % (kind, tag))


def acl_document(grants, owner_id, accounts):
    """The AccessControlPolicy document of grants, as bytes."""
    return xml_document("AccessControlPolicy", [
        ("Owner", _person(owner_id, accounts)),
        ("AccessControlList", grant_children(grants, accounts))])


def _person(user_id, accounts):
    return [("ID", user_id), ("DisplayName", accounts.name(user_id) or None)]


def grant_children(grants, accounts):
    """The Grant children of a document.

    Groups stand first: Ceph's s3-tests look for the owner's grant last,
    and AWS promises no order.
    """
    children = []
    for permission, grantee in sorted(
            grants, key=lambda grant: grant.grantee not in _GROUP_NAMES):
        group = grantee in _GROUP_NAMES
        tag = 'Grantee xmlns:xsi="%s" xsi:type="%s"' % (
            XSI, "Group" if group else "CanonicalUser")
        children.append(("Grant", [
            (tag, [("URI", grantee)] if group
             else _person(grantee, accounts)),
            ("Permission", permission)]))
    return children


def acl_headers(grants, accounts):
    """The x-amz-grant-* headers that headers_acl() reads as these grants,
    but for those of accounts that are no more."""
    headers = {}
    for permission, grantee in grants:
        name = "x-amz-grant-" + permission.lower().replace("_", "-")
        if grantee in _GROUP_NAMES:
            text = 'uri="%s"' % grantee
        elif grantee in accounts.by_user_id:
            text = 'id="%s"' % grantee
        else:
            continue
        headers[name] = ", ".join(filter(None, (headers.get(name), text)))
    return headers


def dump_acl(grants, owner_id):
    """Grants as a record keeps them: ["READ @AllUsers", ...].

    None for the private ACL.  The owner is written as nothing, so that
    the record holds no id which was made up for this run.
    """
    if grants is None or tuple(grants) == private_acl(owner_id):
        return None
    return ["%s %s" % (permission, "" if grantee == owner_id else
                       _GROUP_NAMES.get(grantee, grantee))
            for permission, grantee in grants]


CONFIG_SHAPES["acl"] = (list, type(None))


def load_acl(lines, owner_id):
    """The grants that dump_acl wrote.

    A line that it cannot have written gives nobody anything.
    """
    if lines is None:
        return private_acl(owner_id)
    grants = []
    for line in lines if isinstance(lines, list) else ():
        permission, _, name = str(line).partition(" ")
        if permission in PERMISSIONS:
            grants.append(Grant(permission, _GROUPS.get(name, name)
                                or owner_id))
    return tuple(grants)


def acl_is_public(grants):
    """True when a group that anybody can be in is granted anything.

    access-control-block-public-access.html#access-control-block-public-
    access-policy-status, "ACLs"
    """
    return any(grant.grantee in _PUBLIC_GROUPS for grant in grants)


def acl_allows(grants, permission, caller, ignore_public=False):
    """True when an ACL gives a Caller a permission."""
    groups = set()
    if not ignore_public and caller.service is None:
        groups.add(ALL_USERS)
        if caller.user_id is not None:
            groups.add(AUTHENTICATED_USERS)
    if caller.service == LOGGING_SERVICE:
        groups.add(LOG_DELIVERY)
    return any(grant.permission in (permission, "FULL_CONTROL")
               and (grant.grantee in groups
                    or grant.grantee == caller.user_id)
               for grant in grants or ())


# --- resources and patterns ---

def resource_arn(bucket, key=None):
    """The ARN of a bucket, or of an object in it."""
    return "arn:aws:s3:::" + (bucket if key is None
                              else "%s/%s" % (bucket, key))


class _Wild(NamedTuple):
    """A wildcard in a pattern."""
    sign: str


_STAR, _ONE = _Wild("*"), _Wild("?")
_WILDCARDS = {"*": _STAR, "?": _ONE}


class _Variable(NamedTuple):
    """A policy variable: a condition key, and its default or None."""
    key: str
    default: Optional[str]


_WILDCARD = re.compile(r"[*?]")
_VARIABLE_OR_WILDCARD = re.compile(r"\$\{([^}]*)\}|[*?]")
_VARIABLE = re.compile(r"([^,\s]+)\s*(?:,\s*'([^']*)'\s*)?\Z")


def _union(sets):
    """Sets of numbers, as the bits of integers, made one."""
    return functools.reduce(operator.or_, sets, 0)


# The condition keys that differ between the objects of one request
OBJECT_KEYS = ("s3:versionid", "s3:existingobjecttag")


class Patterns:
    """Lists of texts of a policy with wildcards and policy variables.

    What a variable stands for is compared literally, wildcards in it
    included.  IAM reference_policies_variables.html

    All are matched at once, so that a text takes time in the product of
    its length and that of all of them over a machine word's, never more:
    one request may ask a policy about a thousand keys.
    """

    __slots__ = ("of_object", "_fold", "_count", "_literals", "_prefixes",
                 "_walked", "_loose", "_variable", "_program")

    def __init__(self, fold=False, lists=()):
        """lists: to add().  fold: upper and lower case are the same."""
        self._fold, self._count, self.of_object = fold, 0, False
        self._literals, self._prefixes = {}, {}
        self._walked, self._loose, self._variable = [], 0, []
        self._program = None            # until it is needed
        for patterns in lists:
            self.add(patterns)

    def add(self, patterns):
        """Add a list, the items of its patterns; its bit among those of
        find()."""
        one = 1 << self._count
        self._count += 1
        for items in patterns:
            if self._fold:
                items = [item.lower() if type(item) is str else item
                         for item in items]
            *start, end = items or [""]
            variables = {item for item in items if type(item) is _Variable}
            if variables:
                self._variable.append((items, variables, one))
                self.of_object |= any(variable.key.startswith(OBJECT_KEYS)
                                      for variable in variables)
            elif _ONE in items or _STAR in start:
                self._walked.append((items, one))
                self._loose |= one
            else:
                table = self._literals
                if end is _STAR:
                    table, end = self._prefixes, ""
                text = "".join(start) + end
                table[text] = table.get(text, 0) | one
        return one

    def find(self, text, context=None, among=-1):
        """Which lists have a pattern that the whole of `text` fits, as the
        bits of an integer.

        among: those that matter.  A variable without one value in
        `context` fits nothing.
        """
        if self._fold:
            text = text.lower()
        found = self._literals.get(text, 0)
        for prefix, one in self._prefixes.items():
            if text.startswith(prefix):
                found |= one
        once = _call if context is None else context.once
        if self._loose & among & ~found:
            found |= once(self._walk, text)
        if self._variable:
            values = _Values(context, self._fold)
            places = once(_Places, text)
            places.spend = values.spend
            for items, variables, one in self._variable:
                if among & one & ~found and _fits(items, variables, values,
                                                  places):
                    found |= one
        return found

    def _walk(self, text):
        """find(), among the patterns with wildcards and no variables."""
        program, found = self._program, 0
        if program is None:
            program = self._program = _compile(self._walked)
        state = _reach(program, text)
        for one, ends in program.ends:
            if state & ends:
                found |= one
        return found


def _call(make, text):
    """As Context.once(), where there is none."""
    return make(text)


# What a step of _fits() takes besides, in characters of the text
_STEP = 2000


class _Values(dict):
    """What variables stand for."""

    def __init__(self, context, fold):
        super().__init__()
        self._context, self._fold = context, fold

    def __missing__(self, variable):
        self[variable] = found = _value(variable, self._context, self._fold)
        return found

    def spend(self, work):
        """Context.spend()."""
        if self._context is not None:
            self._context.spend(work)


class _Places(dict):
    """Where pieces begin in a text: the end of the text is the lowest bit
    of an integer and its start the highest.  spend: Context's."""

    def __init__(self, text):
        super().__init__()
        self.text, self._characters = text, {}

    def __missing__(self, piece):
        table = self._characters
        if not table:
            for at, character in enumerate(reversed(self.text), 1):
                table[character] = table.get(character, 0) | 1 << at
        found, steps = (2 << len(self.text)) - 1, 0
        for character in reversed(piece):
            steps += 1
            found = found << 1 & table.get(character, 0)
            if not found:
                break
        self.spend(steps * (_STEP // 2 + len(self.text)))
        # each is as long as the text, and a short piece is soon found again
        if len(self) < (2048 if len(piece) > 16 else 256):
            self[piece] = found
        return found


def _fits(items, variables, values, places):
    """True when the text of _Places fits items.  variables: those in them.

    What a variable stands for may be longer by far than the text of a
    policy.  So a set of positions in the text is kept, not one in the
    patterns; what stands before the first wildcard has but one.
    """
    text, at, rest = places.text, 0, iter(items)
    for item in rest:
        if type(item) is _Wild:
            break
        piece = item if type(item) is str else values[item]
        if piece is None or not text.startswith(piece, at):
            return False
        at += len(piece)
    else:
        return at == len(text)
    if None in [values[variable] for variable in variables]:
        return False
    values.spend(len(items) * (_STEP + len(text)))
    state = 1 << len(text) - at
    for piece in itertools.chain((item,), rest):
        if piece is _STAR:
            state = (1 << state.bit_length()) - 1
            continue
        if piece is _ONE:
            state >>= 1
        else:
            if type(piece) is not str:
                piece = values[piece]
            state = (state & places[piece]) >> len(piece)
        if not state:
            return False
    return bool(state & 1)


def _value(variable, context, fold=False):
    """The one text that a variable stands for, or None."""
    values = context.get(variable.key) if context is not None else None
    values = values or [variable.default]
    if len(values) > 1 or values[0] is None:
        return None
    return values[0].lower() if fold else values[0]


class _Program(NamedTuple):
    """Compiled patterns: for each character the set of positions that
    take it, those that take any, those that stay, the first ones, and for
    each list, by its bit, the last ones; sets of positions are the bits
    of an integer."""
    takes: Dict[str, int]
    takes_any: int
    stays: int
    starts: int
    ends: Tuple[Tuple[int, int], ...]


def _compile(patterns):
    """The _Program of (texts and wildcards, the bit of a list) pairs."""
    takes, takes_any, stays, starts, bit, ends = {}, 0, 0, 0, 1, {}
    for items, one in patterns:
        starts |= bit
        for item in items:
            if type(item) is str:
                for character in item:
                    takes[character] = takes.get(character, 0) | bit
                    bit <<= 1
            elif item is _ONE:
                takes_any |= bit
                bit <<= 1
            else:
                stays |= bit
        ends[one] = ends.get(one, 0) | bit
        bit <<= 1                       # from which no way leads on
    return _Program({character: those | takes_any
                     for character, those in takes.items()},
                    takes_any, stays, starts, tuple(ends.items()))


def _reach(program, text):
    """The set of positions in the patterns that `text` can lead to.

    All ways are followed at once (the Shift-And method): no backtracking,
    so no pattern that explodes.
    """
    takes, takes_any, stays, state, _ = program
    for character in text:
        state = ((state & takes.get(character, takes_any)) << 1
                 | state & stays)
        if not state:
            break
    return state


def _levels(items, name):
    """Which resources of bucket `name` can fit the items of a pattern: a
    set of "bucket" and "object".  A variable may stand for anything."""
    program = _compile([([_STAR if type(item) is _Variable
                         else item for item in items], 1)])
    arn, found = resource_arn(name), set()
    (_, end), = program.ends
    if _reach(program, arn) & end:
        found.add("bucket")
    # a key has at least one character more
    if _reach(program, arn + "/") & (end - 1 | program.stays):
        found.add("object")
    return found


def _items(text, wild, variables):
    """The items of a pattern.  wild: `*` and `?` are wildcards.
    variables: `${...}` counts, which it does from 2012-10-17 on."""
    items, position = [], 0
    splitter = _VARIABLE_OR_WILDCARD if variables else _WILDCARD
    for match in splitter.finditer(text):
        if match.start() > position:
            items.append(text[position:match.start()])
        position = match.end()
        if match[0] in _WILDCARDS:
            items.append(_WILDCARDS[match[0]] if wild else match[0])
        elif match[1] in ("*", "?", "$"):
            items.append(match[1])
        else:
            items.append(_parse_variable(match[1]))
    if position < len(text):
        items.append(text[position:])
    return _joined(items)


def _joined(items):
    """Items with neighbouring texts made one."""
    joined = []
    for item in items:
        if type(item) is str and joined and type(joined[-1]) is str:
            joined[-1] += item
        else:
            joined.append(item)
    return joined


def _parse_variable(text):
    """The _Variable that stands between `${` and `}`."""
    match = _VARIABLE.match(text)
    key = match and find_condition_key(match[1])
    if not key:
        raise _malformed("Invalid policy variable: ${%s}" % text)
    return _Variable(key.name, match[2])


# --- policies: condition keys ---

HEADER, QUERY, FACT, NEVER = "header", "query", "fact", "never"


class ConditionKey(NamedTuple):
    """A key that a Condition or a variable may name.

    name: in lower case, the part behind a `/` (a tag's key) as it is.
    source: HEADER or QUERY of the request under the name `where`, FACT
    that the operation tells, or NEVER: no request here has it, as on AWS
    no request has it from outside a VPC or an organization.  actions:
    those it goes with, None for all.
    """
    name: str
    source: str
    where: str
    actions: Optional[frozenset]


def _actions(text):
    return frozenset("s3:" + name.lower() for name in text.split())


# The service authorization reference for S3 (list_amazons3.html), actions
# on buckets and on objects
BUCKET_ACTIONS = _actions("""
    CreateBucket CreateBucketMetadataTableConfiguration DeleteBucket
    DeleteBucketMetadataTableConfiguration DeleteBucketPolicy
    DeleteBucketWebsite GetAccelerateConfiguration
    GetAnalyticsConfiguration GetBucketAbac GetBucketAcl GetBucketCORS
    GetBucketLocation GetBucketLogging GetBucketMetadataTableConfiguration
    GetBucketNotification GetBucketObjectLockConfiguration
    GetBucketOwnershipControls GetBucketPolicy GetBucketPolicyStatus
    GetBucketPublicAccessBlock GetBucketRequestPayment GetBucketTagging
    GetBucketVersioning GetBucketWebsite GetEncryptionConfiguration
    GetIntelligentTieringConfiguration GetInventoryConfiguration
    GetLifecycleConfiguration GetMetricsConfiguration
    GetReplicationConfiguration ListBucket ListBucketMultipartUploads
    ListBucketVersions ListTagsForResource PauseReplication
    PutAccelerateConfiguration PutAnalyticsConfiguration PutBucketAbac
    PutBucketAcl PutBucketCORS PutBucketLogging PutBucketNotification
    PutBucketObjectLockConfiguration PutBucketOwnershipControls
    PutBucketPolicy PutBucketPublicAccessBlock PutBucketRequestPayment
    PutBucketTagging PutBucketVersioning PutBucketWebsite
    PutEncryptionConfiguration PutIntelligentTieringConfiguration
    PutInventoryConfiguration PutLifecycleConfiguration
    PutMetricsConfiguration PutReplicationConfiguration TagResource
    UntagResource UpdateBucketMetadataInventoryTableConfiguration
    UpdateBucketMetadataJournalTableConfiguration""")
OBJECT_ACTIONS = _actions("""
    AbortMultipartUpload BypassGovernanceRetention DeleteObject
    DeleteObjectTagging DeleteObjectVersion DeleteObjectVersionTagging
    GetObject GetObjectAcl GetObjectAttributes GetObjectLegalHold
    GetObjectRetention GetObjectTagging GetObjectTorrent GetObjectVersion
    GetObjectVersionAcl GetObjectVersionAttributes
    GetObjectVersionForReplication GetObjectVersionTagging
    GetObjectVersionTorrent InitiateReplication ListMultipartUploadParts
    ObjectOwnerOverrideToBucketOwner PutObject PutObjectAcl
    PutObjectLegalHold PutObjectRetention PutObjectTagging
    PutObjectVersionAcl PutObjectVersionTagging ReplicateDelete
    ReplicateObject ReplicateTags RestoreObject UpdateObjectEncryption""")

_PUTS = _actions("PutObject BypassGovernanceRetention")
_ENCRYPTS = _PUTS | _actions("ReplicateObject UpdateObjectEncryption")
_ACL_PUTS = _PUTS | _actions("CreateBucket PutBucketAcl PutObjectAcl "
                             "PutObjectVersionAcl")
_LISTS = _actions("ListBucket ListBucketVersions")
_VERSION_ACTIONS = _actions("""
    DeleteObjectVersion DeleteObjectVersionTagging GetObjectVersion
    GetObjectVersionAcl GetObjectVersionAttributes GetObjectVersionTagging
    GetObjectVersionTorrent PutObjectVersionAcl PutObjectVersionTagging""")
_TAG_PUTS = _PUTS | _actions("PutObjectTagging PutObjectVersionTagging")
_TAGGED = _actions("""
    DeleteObjectTagging DeleteObjectVersionTagging GetObject GetObjectAcl
    GetObjectAttributes GetObjectTagging GetObjectVersion
    GetObjectVersionAcl GetObjectVersionAttributes GetObjectVersionTagging
    PutObjectAcl PutObjectTagging PutObjectVersionAcl
    PutObjectVersionTagging""")
_RETAINS = _actions("PutObject PutObjectRetention")
_CREATES = _actions("CreateBucket")

# (source, actions, keys); the same reference, and IAM
# reference_policies_condition-keys.html.  A key that ends in `/` goes on
# with a tag's key.
_CONDITION_KEYS = (
    (FACT, None, """
        aws:CurrentTime aws:EpochTime aws:MultiFactorAuthPresent
        aws:PrincipalAccount aws:PrincipalArn aws:PrincipalIsAWSService
        aws:PrincipalServiceName aws:PrincipalTag/ aws:PrincipalType
        aws:RequestedRegion aws:RequestTag/
        aws:ResourceAccount aws:ResourceTag/ aws:SecureTransport
        aws:SourceAccount aws:SourceArn aws:SourceIp aws:TagKeys
        aws:TokenIssueTime aws:userid aws:username aws:ViaAWSService
        s3:authType s3:BucketTag/ s3:ResourceAccount s3:signatureAge
        s3:signatureversion s3:TlsVersion"""),
    (NEVER, None, """
        aws:CalledVia aws:CalledViaFirst aws:CalledViaLast
        aws:FederatedProvider aws:MultiFactorAuthAge aws:PrincipalOrgID
        aws:PrincipalOrgPaths aws:PrincipalServiceNamesList
        aws:ResourceOrgID aws:ResourceOrgPaths
        aws:SourceOrgID aws:SourceOrgPaths aws:SourceOwner aws:SourceVpc
        aws:SourceVpcArn aws:SourceVpce aws:VpceAccount aws:VpceOrgID
        aws:VpceOrgPaths aws:VpcSourceIp s3:AccessGrantsInstanceArn
        s3:AccessPointNetworkOrigin s3:AccessPointTag/
        s3:DataAccessPointAccount s3:DataAccessPointArn"""),
    (HEADER, None, "aws:Referer aws:UserAgent s3:x-amz-content-sha256"),
    (QUERY, _LISTS, "s3:delimiter s3:max-keys s3:prefix"),
    (FACT, _VERSION_ACTIONS, "s3:VersionId"),
    (FACT, _TAGGED, "s3:ExistingObjectTag/"),
    (FACT, _TAG_PUTS, "s3:RequestObjectTag/ s3:RequestObjectTagKeys"),
    (FACT, _CREATES, "s3:LocationConstraint"),
    (HEADER, _CREATES,
     "s3:x-amz-bucket-namespace s3:x-amz-object-ownership"),
    (HEADER, _actions("DeleteObject PutObject"), "s3:if-match"),
    (HEADER, _actions("PutObject"), "s3:if-none-match"),
    (FACT, _actions("PutObject"), "s3:ObjectCreationOperation"),
    (FACT, _actions("PutInventoryConfiguration"),
     "s3:InventoryAccessibleOptionalFields"),
    (NEVER, _actions("PauseReplication"), "s3:destinationRegion"),
    (NEVER, _actions("PutReplicationConfiguration"),
     "s3:isReplicationPauseRequest"),
    (HEADER, _actions("PutObject PutObjectLegalHold"),
     "s3:object-lock-legal-hold"),
    (HEADER, _RETAINS,
     "s3:object-lock-mode s3:object-lock-retain-until-date"),
    (FACT, _RETAINS, "s3:object-lock-remaining-retention-days"),
    (HEADER, _ACL_PUTS, """
        s3:x-amz-acl s3:x-amz-grant-full-control s3:x-amz-grant-read
        s3:x-amz-grant-read-acp s3:x-amz-grant-write
        s3:x-amz-grant-write-acp"""),
    (HEADER, _PUTS | _actions("PutObjectAcl PutObjectVersionAcl"),
     "s3:x-amz-storage-class"),
    (FACT, _PUTS, "s3:x-amz-copy-source"),
    (HEADER, _PUTS, """
        s3:x-amz-metadata-directive s3:x-amz-website-redirect-location"""),
    (HEADER, _ENCRYPTS, """
        s3:x-amz-server-side-encryption
        s3:x-amz-server-side-encryption-aws-kms-key-id
        s3:x-amz-server-side-encryption-customer-algorithm"""),
)
# Where the header or query name is not what stands behind the `:`
_PLACES = {"aws:useragent": "user-agent"}


def _make_condition_keys():
    """Every ConditionKey by its name in lower case."""
    keys = {}
    for source, actions, names in _CONDITION_KEYS:
        for name in names.lower().split():
            place = name.partition(":")[2]
            if place.startswith("object-lock-"):
                place = "x-amz-" + place
            keys[name] = ConditionKey(name, source,
                                      _PLACES.get(name, place), actions)
    return keys


CONDITION_KEYS = _make_condition_keys()


def find_condition_key(text):
    """The ConditionKey that a policy names, or None: keys have no case,
    but what follows a `/` is a tag's key and has, a principal's aside
    (IAM id_session-tags.html)."""
    family, slash, tag = text.partition("/")
    if family.lower() == "aws:principaltag":
        tag = tag.lower()
    key = CONDITION_KEYS.get(family.lower() + slash)
    if key is None or (slash and not tag):
        return None
    return key._replace(name=key.name + tag)


class Context:
    """What one request says of itself, by condition key.

    headers: lower-case names.  query: a dict.  now: seconds since the
    epoch.  facts: further keys, under any case and without the `/` and
    what follows it; these come before what headers and query say.  A
    fact is None, text, a number, a bool, a list of texts, for a family of
    tags a dict, or a callable that gives one of these when a policy first
    asks.  action: the one that is judged, in lower case; what a client may
    send along with any request counts only for the actions it goes with.
    """

    action = None

    def __init__(self, caller=ANONYMOUS, headers=None, query=None, now=None,
                 facts=None):
        self._headers, self._query = headers or {}, query or {}
        self._now, self._caller, self._cache = now, caller, {}
        self._facts = {name.lower(): value
                       for name, value in (facts or {}).items()}
        self._object_cache = {}         # of what differs between objects
        self._left = [MAX_POLICY_WORK]  # one for all objects

    def about(self, facts):
        """The Context of one of many objects of this request.  facts: of
        OBJECT_KEYS; all else is worked out once for all of them."""
        other = copy.copy(self)
        other._facts = dict(self._facts, **{
            name.lower(): value for name, value in facts.items()})
        other._object_cache = {}
        return other

    def spend(self, work):
        """Count this work, a step's on a character, for the request;
        AccessDenied beyond MAX_POLICY_WORK."""
        self._left[0] -= work
        if self._left[0] < 0:
            raise S3Error("AccessDenied", "The policy has too many wildcards "
                          "beside variables to be compared with so many keys "
                          "at once")

    def find(self, matcher, text):
        """What a policy's Patterns, Arns or Compared find for a text."""
        cache = self._object_cache if matcher.of_object else self._cache
        name = matcher, text, self.action
        if name not in cache:
            cache[name] = matcher.find(text, self)
        return cache[name]

    def once(self, make, text):
        """make(text); of a text that is longer than any key, once for all
        objects of this request."""
        if len(text) <= 2 * MAX_KEY_BYTES:
            return make(text)
        name = make, text
        if name not in self._cache:
            self._cache[name] = make(text)
        return self._cache[name]

    def get(self, name):
        """The texts under a ConditionKey's name; None for an absent key."""
        family, slash, tag = name.partition("/")
        key = CONDITION_KEYS[family + slash]
        if key.actions is not None and self.action not in key.actions:
            return None
        cache = self._object_cache if name.startswith(OBJECT_KEYS) \
            else self._cache
        if name not in cache:
            cache[name] = self._texts(key, family, slash, tag)
        return cache[name]

    def _texts(self, key, family, slash, tag):
        if family in self._facts:
            value = self._facts[family]
            value = value() if callable(value) else value
        elif key.source == HEADER:
            value = self._headers.get(key.where)
        elif key.source == QUERY:
            value = self._query.get(key.where)
        else:
            value = _DERIVED.get(key.name, lambda context: None)(self)
        if slash and value is not None:
            value = value.get(tag)
        if value is None:
            return None
        values = value if isinstance(value, (list, tuple)) else [value]
        return [str(v).lower() if isinstance(v, bool) else str(v)
                for v in values] or None

    @staticmethod
    def _time(seconds):
        return None if seconds is None else time.strftime(
            "%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

    def _remaining_days(self):
        until = self.get("s3:object-lock-retain-until-date")
        until = until and parse_policy_date(until[0])
        if until is None or self._now is None:
            return None
        return int((until - self._now) // 86400)

    def _copy_source(self):
        source = self._headers.get("x-amz-copy-source")
        return source and "%s/%s" % parse_copy_source(source)[:2]


# Key -> what follows from the caller, the time and other headers
_DERIVED = {
    "aws:currenttime": lambda c: c._time(c._now),
    "aws:epochtime": lambda c: None if c._now is None else int(c._now),
    # no second factor is known here, and a lasting key pair says nothing
    "aws:multifactorauthpresent":
        lambda c: None if c._caller.issued is None else False,
    "aws:principalaccount": lambda c: c._caller.user_id or (
        None if c._caller.service else "anonymous"),
    "aws:principalarn": lambda c: c._caller.arn,
    "aws:principalisawsservice": lambda c: c._caller.service is not None,
    "aws:principalservicename": lambda c: c._caller.service,
    "aws:principaltag/": lambda c: c._caller.tags,
    "aws:principaltype": lambda c: c._caller.kind,
    "aws:tokenissuetime": lambda c: c._time(c._caller.issued),
    "aws:userid": lambda c: c._caller.unique_id,
    "aws:username": lambda c: c._caller.user_name,
    "aws:viaawsservice": lambda c: False,
    "s3:object-lock-remaining-retention-days":
        lambda c: c._remaining_days(),
    "s3:x-amz-copy-source": lambda c: c._copy_source(),
}


# --- policies: condition operators ---

_DATE = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:T(\d\d):([0-5]\d)"
    r"(?::(\d\d)(?:\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?)?)?\Z", re.ASCII)


def parse_policy_date(text):
    """Seconds since the epoch of a W3C date or of epoch seconds; None."""
    if re.match(r"-?\d{5,15}\Z", text, re.ASCII):
        return int(text)
    match = _DATE.match(text)
    if match is None:
        return None
    year, month, day, hour, minute, second, zone = match.groups()
    seconds = parse_amz_date("%s%s%sT%s%s%sZ" % (
        year, month or "01", day or "01", hour or "00", minute or "00",
        second or "00"))
    if seconds is None or zone in (None, "Z"):
        return seconds
    offset = int(zone[1:3]) * 3600 + int(zone[-2:]) * 60
    return seconds - offset if zone[0] == "+" else seconds + offset


def _parse_number(text):
    """The number in a text, or None."""
    if not re.match(r"[+-]?\d{1,30}(\.\d{1,30})?\Z", text, re.ASCII):
        return None
    return float(text) if "." in text else int(text)


def _parse_bool(text):
    return {"true": True, "false": False}.get(text.lower())


def _parse_binary(text):
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except ValueError:
        return None


def _parse_network(text):
    """The network that an IpAddress condition names, or None."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _parse_address(text):
    """A client's address, or None; IPv4 inside IPv6 counts as IPv4."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _in_network(address, network):
    return address in network


def _arn_items(text, variables):
    """The items of the six parts of an ARN, which are compared one by
    one."""
    parts = [[]]
    for item in _items(text, True, variables):
        if type(item) is not str:
            parts[-1].append(item)
            continue
        first, *rest = item.split(":", 6 - len(parts))
        parts[-1].append(first)
        parts.extend([part] for part in rest)
    if parts == [[_STAR]]:
        parts = parts * 6
    return [[item for item in part if item != ""]
            for part in parts] if len(parts) == 6 else None


class Arns:
    """As Patterns, of ARNs: the items of the six parts of each."""

    def __init__(self):
        self._parts = [Patterns() for _ in range(6)]

    @property
    def of_object(self):
        return any(patterns.of_object for patterns in self._parts)

    def add(self, arns):
        return _union(patterns.add([part]) for arn in arns
                      for patterns, part in zip(self._parts, arn))

    def find(self, text, context=None):
        parts, found = text.split(":", 5), -1
        for patterns, part in zip(self._parts, parts):
            found &= patterns.find(part, context, found)
        return found if len(parts) == 6 else 0


class Compared:
    """As Patterns, of values that a parsed text compares with; there are
    no variables in these."""

    of_object = False

    def __init__(self, parse, compare):
        self._parse, self._compare, self._lists = parse, compare, []

    def add(self, values):
        self._lists.append(values)
        return 1 << len(self._lists) - 1

    def find(self, text, _context=None):
        value = self._parse(text)
        if value is None:
            return 0
        compare, found = functools.partial(self._compare, value), 0
        for number, values in enumerate(self._lists):
            if any(map(compare, values)):
                found |= 1 << number
        return found


class Operator(NamedTuple):
    """A condition operator.

    prepare(text, variables): a policy's value made ready, None when it
    has no such form.  make: gives the Patterns, Arns or Compared that
    take lists of these.  negated: true where nothing fits.
    """
    prepare: Callable
    make: Callable
    negated: bool = False


def _comparing(parse, compare, prepare=None):
    return Operator(lambda text, variables: (prepare or parse)(text),
                    functools.partial(Compared, parse, compare))


def _exact(text, variables):
    return _items(text, False, variables)


def _wild(text, variables):
    return _items(text, True, variables)


def _make_operators():
    """Every operator by name.

    IAM reference_policies_elements_condition_operators.html
    """
    table = {
        "StringEquals": Operator(_exact, Patterns),
        "StringEqualsIgnoreCase": Operator(
            _exact, functools.partial(Patterns, True)),
        "StringLike": Operator(_wild, Patterns),
        "ArnEquals": Operator(_arn_items, Arns),
        "ArnLike": Operator(_arn_items, Arns),
        "Bool": _comparing(_parse_bool, operator.eq),
        "BinaryEquals": _comparing(_parse_binary, operator.eq),
        "IpAddress": _comparing(_parse_address, _in_network,
                                _parse_network),
    }
    for kind, parse in (("Numeric", _parse_number),
                        ("Date", parse_policy_date)):
        for name, compare in (
                ("Equals", operator.eq), ("LessThan", operator.lt),
                ("LessThanEquals", operator.le),
                ("GreaterThan", operator.gt),
                ("GreaterThanEquals", operator.ge)):
            table[kind + name] = _comparing(parse, compare)
    for name, other in (
            ("StringNotEquals", "StringEquals"),
            ("StringNotEqualsIgnoreCase", "StringEqualsIgnoreCase"),
            ("StringNotLike", "StringLike"), ("ArnNotLike", "ArnLike"),
            ("ArnNotEquals", "ArnEquals"), ("NotIpAddress", "IpAddress"),
            ("NumericNotEquals", "NumericEquals"),
            ("DateNotEquals", "DateEquals")):
        table[name] = table[other]._replace(negated=True)
    return table


_OPERATORS = _make_operators()
_OPERATOR_NAME = re.compile(r"(?:(ForAllValues|ForAnyValue):)?"
                            r"([A-Za-z]+?)(IfExists)?\Z")


class Condition(NamedTuple):
    """One operator on one key.

    operator: its name without additions.  each: "ForAllValues",
    "ForAnyValue" or None.  wanted: prepared values, for Null bools.
    matcher: the Patterns, Arns or Compared that its policy has for this
    key and kind of values.  lists: the bits of its own.
    """
    operator: str
    each: Optional[str]
    if_exists: bool
    key: ConditionKey
    wanted: List
    matcher: Any
    lists: int

    def holds(self, context):
        """True when a request meets it.

        Of an absent key: IfExists and ForAllValues hold, ForAnyValue does
        not, a negated operator holds, any other does not.
        IAM reference_policies_condition-single-vs-multi-valued-context-
        keys.html
        """
        values = context.get(self.key.name)
        if self.operator == "Null":
            return (values is None) in self.wanted
        negated = _OPERATORS[self.operator].negated
        every = self.each == "ForAllValues" if self.each else negated
        if values is None:
            return self.if_exists or every
        return (all if every else any)([
            bool(context.find(self.matcher, value) & self.lists) != negated
            for value in values])


# --- policies: documents ---

class Principals(NamedTuple):
    """Whom a statement names: everyone, or (kind, text) pairs."""
    everyone: bool
    names: frozenset

    def include(self, caller):
        """True when a Caller is one of them."""
        return self.everyone or not self.names.isdisjoint(caller.principals)

    def spare(self, caller):
        """True when they are NotPrincipal's, and a Caller one of them: a
        session only where it, its role and its account are all named (IAM
        reference_policies_elements_notprincipal.html)."""
        own = {("AWS", caller.arn), ("AWS", caller.session_arn)} \
            if caller.session_arn else set()
        return self.everyone or own <= self.names and not \
            self.names.isdisjoint(caller.principals - own)


class Statement(NamedTuple):
    """One statement of a policy; the not_ flags turn a list round.

    principals: None in a session's policy, which has none.  actions and
    resources: the items of patterns.  needs: the variables in a
    NotResource; where one has no value, the statement speaks of nothing
    (IAM reference_policies_variables.html).
    """
    sid: Optional[str]
    effect: str
    principals: Optional[Principals]
    not_principal: bool
    actions: Tuple[List, ...]
    not_action: bool
    resources: Tuple[List, ...]
    not_resource: bool
    needs: frozenset
    conditions: Tuple[Condition, ...]

    def names(self, caller):
        """True when it speaks of this Caller."""
        return self.principals is None or (
            not self.principals.spare(caller) if self.not_principal
            else self.principals.include(caller))

    def holds(self, context):
        """True when all that it asks for is so."""
        for condition in self.conditions:
            if not condition.holds(context):
                return False
        return None not in [_value(variable, context)
                            for variable in self.needs]


class Policy(NamedTuple):
    """A policy that has been read and found right.

    actions, resources: those of its statements, a list for each; not_
    actions, not_resources: which lists are turned round, as Patterns has
    lists.
    """
    version: str
    statements: Tuple[Statement, ...]
    actions: Patterns
    resources: Patterns
    not_actions: int
    not_resources: int

    def speaking(self, caller, action, resource, context):
        """The statements that speak of a request, conditions aside."""
        among = self.actions.find(action) ^ self.not_actions
        one = 1
        for statement in self.statements:
            if among & one and not statement.names(caller):
                among ^= one
            one <<= 1
        if among:
            among &= self.not_resources ^ self.resources.find(
                resource, context, among)
        return [statement for number, statement
                in enumerate(self.statements) if among >> number & 1]


def make_policy(version, statements):
    """The Policy of these Statements."""
    def turned(field):
        return sum(getattr(statement, field) << number
                   for number, statement in enumerate(statements))
    return Policy(
        version, statements,
        Patterns(True, (one.actions for one in statements)),
        Patterns(False, (one.resources for one in statements)),
        turned("not_action"), turned("not_resource"))


def evaluate(policy, caller, action, resource, context):
    """What a policy says of a request: "deny", "allow" or None.

    action: as `s3:GetObject`.  resource: an ARN.  An explicit deny wins.
    IAM reference_policies_evaluation-logic.html
    """
    verdict = None
    if policy is None:
        return None
    context.action = action.lower()
    for statement in policy.speaking(caller, context.action, resource,
                                     context):
        if (verdict == "allow" and statement.effect == "Allow"
                or not statement.holds(context)):
            continue
        if statement.effect == "Deny":
            return "deny"
        verdict = "allow"
    return verdict


def _malformed(message):
    return S3Error("MalformedPolicy", message)


def parse_policy(data, bucket, known_ids=()):
    """The Policy in a document put on `bucket`, or MalformedPolicy.

    data: bytes or text.  bucket: None for any.  known_ids: user ids that
    a Principal may name as they are.  Refuses every field, operator, key
    and action it does not know, a resource outside the bucket, an action
    without a resource of its kind, and a condition that goes with none of
    the actions.  Messages are those of AWS where it has one.
    """
    return _policy(_policy_json(data), functools.partial(
        _parse_bucket_statement, bucket=bucket, known_ids=known_ids))


def parse_session_policy(data):
    """The Policy that limits a session, or MalformedPolicyDocument.

    It names no principals, and may speak of other services.
    STS/latest/APIReference/API_AssumeRole.html, "Policy"
    """
    try:
        return _policy(_policy_json(data), _parse_session_statement)
    except S3Error as error:
        raise S3Error("MalformedPolicyDocument", error.message) from None


@functools.lru_cache(maxsize=64)       # of at most some 7 MB each
def stored_policy(text):
    """The Policy of a text that was checked when it was put.

    It may name accounts and, after its directory was renamed, a bucket
    that are no more.  One that has been spoilt on disk denies everything,
    as a policy that is not understood must; its owner can replace it.
    """
    try:
        return parse_policy(text, None, _AnyId())
    except S3Error:
        anything = _items("*", True, False),
        return make_policy("2012-10-17", (Statement(
            None, "Deny", Principals(True, frozenset()), False,
            anything, False, anything, False, frozenset(), ()),))


class _AnyId:
    """Contains every id: accounts may have gone since a policy was put."""

    def __contains__(self, _):
        return True


def _policy_json(data):
    """The JSON object in a policy's bytes or text."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    if data[:1] != b"{":
        raise _malformed("Policies must be valid JSON and the first byte "
                         "must be '{'")
    if len(data) <= MAX_POLICY_TEXT_BYTES:
        try:
            document = parse_json(data, object_pairs_hook=_unique,
                                  parse_constant=_no_constant)
        except ValueError:
            raise _malformed("This policy contains invalid Json") from None
        normal = json.dumps(document, separators=(",", ":"),
                            ensure_ascii=False)
        if len(normal.encode("utf-8", "replace")) <= MAX_POLICY_BYTES:
            return document
    raise _malformed("Normalized policy document exceeds the maximum "
                     "allowed size of %d bytes." % MAX_POLICY_BYTES)


def _unique(pairs):
    """A dict of pairs; ValueError when a name stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _no_constant(name):
    raise ValueError("%s is no JSON" % name)


def _check_fields(document, known):
    for name in document:
        if name not in known:
            raise _malformed("Unknown field %s" % name)


def _policy(document, parse_statement):
    """The Policy of a JSON object."""
    _check_fields(document, ("Version", "Id", "Statement"))
    version = document.get("Version", "2008-10-17")
    if version not in ("2008-10-17", "2012-10-17"):
        raise _malformed("The policy must contain a valid version string")
    if not isinstance(document.get("Id", ""), str):
        raise _malformed("Invalid policy syntax.")
    if "Statement" not in document:
        raise _malformed("Missing required field Statement")
    items = document["Statement"]
    items = [items] if isinstance(items, dict) else items
    if not isinstance(items, list) \
            or not all(isinstance(item, dict) for item in items):
        raise _malformed("Invalid policy syntax.")
    if not items:
        raise _malformed("Could not parse the policy: Statement is empty!")
    matchers = {}
    statements = tuple(
        parse_statement(item, version == "2012-10-17", matchers)
        for item in items)
    sids = [statement.sid for statement in statements if statement.sid]
    if len(set(sids)) != len(sids):
        raise _malformed("Statement IDs (SID) in a single policy must be "
                         "unique.")
    return make_policy(version, statements)


_STATEMENT_FIELDS = ("Sid", "Effect", "Principal", "NotPrincipal", "Action",
                     "NotAction", "Resource", "NotResource", "Condition")


def _either(item, name):
    """What `name` or Not`name` says, and whether it was the latter."""
    other = "Not" + name
    if name in item and other in item:
        raise _malformed("Invalid policy syntax.")
    if name not in item and other not in item:
        raise _malformed("Missing required field %s" % name)
    return item.get(name, item.get(other)), other in item


def _texts(value, message):
    """A text or a list of texts, as a non-empty list."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) for v in values):
        raise _malformed(message)
    return values


def _parse_bucket_statement(item, variables, matchers, bucket, known_ids):
    """The Statement of one JSON object in a bucket's policy."""
    sid, effect = _parse_head(item)
    value, not_principal = _either(item, "Principal")
    if not_principal and effect == "Allow":
        raise _malformed("Allow with NotPrincipal is not allowed.")
    principals = _parse_principals(value, known_ids)
    actions, not_action, known = _parse_actions(item)
    resources, not_resource, needs = _parse_resources(item, variables)
    conditions = _parse_conditions(item.get("Condition"), variables,
                                   matchers)
    if bucket is not None:
        levels = [_levels(items, bucket) for items in resources]
        if not all(levels):
            raise _malformed("Policy has invalid resource")
        if not (not_action or not_resource):
            _check_actions(len(actions), known, set().union(*levels))
    if not not_action:
        _check_combination(known, conditions)
    return Statement(sid, effect, principals, not_principal, actions,
                     not_action, resources, not_resource, needs,
                     conditions)


def _parse_session_statement(item, variables, matchers):
    """The Statement of one JSON object in a session's policy."""
    sid, effect = _parse_head(item)
    if "Principal" in item or "NotPrincipal" in item:
        raise _malformed("Policy document should not specify a principal.")
    actions, not_action, _ = _parse_actions(item, others=True)
    resources, not_resource, needs = _parse_resources(item, variables)
    return Statement(sid, effect, None, False, actions, not_action,
                     resources, not_resource, needs,
                     _parse_conditions(item.get("Condition"), variables,
                                       matchers))


def _parse_head(item):
    """The (sid, effect) of a statement whose fields are all known."""
    _check_fields(item, _STATEMENT_FIELDS)
    sid = item.get("Sid")
    if sid is not None and not isinstance(sid, str):
        raise _malformed("Invalid policy syntax.")
    if "Effect" not in item:
        raise _malformed("Missing required field Effect")
    if item["Effect"] not in ("Allow", "Deny"):
        raise _malformed("Invalid effect: %s" % (item["Effect"],))
    return sid, item["Effect"]


# IAM reference_policies_elements_principal.html and, for ids of other
# shapes than AWS's twelve digits, the accounts of this server
_PRINCIPAL_ARN = re.compile(
    r"arn:aws[a-z-]*:(?:"
    r"iam::[\w.@$+-]*:(?:root|(?:user|role)/[\w+=,.@$/ :-]+)"
    r"|sts::[\w.@$+-]*:(?:assumed-role|federated-user)/[\w+=,.@$/ :-]+"
    r"|iam::cloudfront:user/CloudFront Origin Access Identity \w+)\Z")
_PRINCIPAL_ID = re.compile(r"(?:\d{12}|A(?:IDA|ROA|NPA)[A-Z0-9]{12,})\Z",
                           re.ASCII)
_CANONICAL_ID = re.compile(r"[0-9a-f]{32}(?:[0-9a-f]{32})?\Z")
_SERVICE_NAME = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)+\Z")
_PROVIDER = re.compile(r"arn:aws[a-z-]*:iam::[\w.@$+-]*:"
                       r"(?:saml|oidc)-provider/\S+\Z"
                       r"|[a-z0-9.-]+\.[a-z]+\Z")


def _is_aws_name(text, known_ids):
    return bool(_PRINCIPAL_ARN.match(text) or _PRINCIPAL_ID.match(text)
                or _is_user_id(text, known_ids))


def _is_user_id(text, known_ids):
    return bool(text and (_CANONICAL_ID.match(text) or text in known_ids))


# Kind -> whether a text can be such a principal
_PRINCIPAL_KINDS = {
    "AWS": _is_aws_name,
    "CanonicalUser": _is_user_id,
    "Service": lambda text, _: bool(_SERVICE_NAME.match(text)),
    "Federated": lambda text, _: bool(_PROVIDER.match(text)),
}


def _parse_principals(value, known_ids):
    """The Principals of `"*"` or {"AWS": ...}."""
    message = "Invalid principal in policy"
    if value == "*":
        value = {"AWS": "*"}
    if not isinstance(value, dict) or not value:
        raise _malformed(message)
    everyone, names = False, []
    for kind, listed in value.items():
        for text in _texts(listed, message):
            if kind == "AWS" and text == "*":
                everyone = True
            elif kind in _PRINCIPAL_KINDS \
                    and _PRINCIPAL_KINDS[kind](text, known_ids):
                names.append((kind, text))
            else:
                raise _malformed(message)
    return Principals(everyone, frozenset(names))


def _parse_actions(item, others=False):
    """The items of its actions, whether these are excepted, and what each
    known action fits that fits any: the bits of an integer.

    others: actions of other services are let through."""
    value, inverted = _either(item, "Action")
    texts = _texts(value, "Policy has invalid action")
    actions = tuple(_items(text, True, False) for text in texts)
    patterns = Patterns(True, ([items] for items in actions))
    known = {name: patterns.find(name)
             for name in BUCKET_ACTIONS | OBJECT_ACTIONS}
    fitting = _union(known.values())
    for number, text in enumerate(texts):
        if not (fitting >> number & 1 or others and re.match(
                r"(?!s3:)[a-z0-9-]+:[A-Za-z0-9*?]+\Z|s3:\w+\Z", text)):
            raise _malformed("Policy has invalid action")
    return actions, inverted, known


def _parse_resources(item, variables):
    """The items of its resources, whether these are excepted, and the
    variables that must have a value then."""
    value, inverted = _either(item, "Resource")
    texts = _texts(value, "Policy has invalid resource")
    if not all(text == "*" or text.startswith("arn:") for text in texts):
        raise _malformed("Policy has invalid resource")
    resources = tuple(_items(text, True, variables) for text in texts)
    return resources, inverted, frozenset(
        item for items in resources for item in items
        if inverted and type(item) is _Variable)


def _check_actions(count, known, levels):
    """Every action needs a resource of its kind in the statement."""
    fitting = 0
    for level, names in (("bucket", BUCKET_ACTIONS),
                         ("object", OBJECT_ACTIONS)):
        if level in levels:
            fitting |= _union(map(known.get, names))
    if fitting != (1 << count) - 1:
        raise _malformed("Action does not apply to any resource(s) in "
                         "statement")


def _check_combination(known, conditions):
    """Every condition must go with one of the actions."""
    for condition in conditions:
        allowed = condition.key.actions
        if allowed is not None and not any(map(known.get, allowed)):
            raise _malformed("Conditions do not apply to combination of "
                             "actions and resources in statement")


def _parse_conditions(block, variables, matchers):
    """The Conditions of a Condition element, or of none.  matchers: those
    of the policy so far, by kind and key."""
    if block is None:
        return ()
    if not isinstance(block, dict):
        raise _malformed("Invalid policy syntax.")
    conditions = []
    for text, keys in block.items():
        match = _OPERATOR_NAME.match(text)
        if match is None or not (match[2] in _OPERATORS
                                 or text == "Null"):
            raise _malformed("Invalid Condition type : %s" % text)
        if not isinstance(keys, dict):
            raise _malformed("Invalid policy syntax.")
        for name, value in keys.items():
            conditions.append(_parse_condition(match, name, value,
                                               variables, matchers))
    return tuple(conditions)


def _parse_condition(match, name, value, variables, matchers):
    """The Condition of one key under one operator."""
    each, operator_name, if_exists = match.groups()
    key = find_condition_key(name)
    if key is None:
        raise _malformed("Policy has an invalid condition key - %s" % name)
    prepare, make, _ = _OPERATORS[
        operator_name if operator_name != "Null" else "Bool"]
    wanted = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, bool):
            item = "true" if item else "false"
        elif isinstance(item, (int, float)):
            item = repr(item)
        prepared = prepare(item, variables) if isinstance(item, str) \
            else None
        if prepared is None:
            raise _malformed("Invalid value for condition %s on %s"
                             % (match[0], name))
        wanted.append(prepared)
    matcher = matchers.setdefault((make, key.name), make())
    return Condition(operator_name, each, bool(if_exists), key, wanted,
                     matcher, matcher.add(wanted))


# --- what is public ---

# access-control-block-public-access.html, "The meaning of public": a
# fixed value of one of these limits a grant to somebody in particular
_FIXING_KEYS = frozenset(name.lower() for name in (
    "aws:PrincipalOrgID", "aws:PrincipalOrgPaths", "aws:PrincipalArn",
    "aws:PrincipalAccount", "aws:SourceArn", "aws:SourceVpc",
    "aws:SourceVpce", "aws:SourceOwner", "aws:SourceAccount", "aws:userid",
    "aws:SourceIp", "s3:x-amz-server-side-encryption-aws-kms-key-id",
    "s3:DataAccessPointArn", "s3:DataAccessPointAccount"))
_FIXING_OPERATORS = frozenset((
    "StringEquals", "StringEqualsIgnoreCase", "StringLike", "ArnEquals",
    "ArnLike", "IpAddress"))
# The same page: networks broader than these are as good as everyone
_BROADEST = {4: 8, 6: 32}


def policy_is_public(policy):
    """True when a bucket policy gives the world something.

    It does unless every Allow is for fixed principals, or under a
    condition that only fixed values of certain keys meet.
    """
    return policy is not None and any(
        statement.effect == "Allow" and statement.principals.everyone
        and not any(_fixes(condition) for condition in statement.conditions)
        for statement in policy.statements)


def _fixes(condition):
    """True when a Condition lets only particular requests through."""
    if (condition.key.name not in _FIXING_KEYS or condition.if_exists
            or condition.operator not in _FIXING_OPERATORS
            or condition.each == "ForAllValues"):
        return False
    if condition.operator == "IpAddress":
        return condition.key.name == "aws:sourceip" and all(
            network.prefixlen >= _BROADEST[network.version]
            for network in condition.wanted)
    if condition.key.name == "aws:sourceip":
        return False
    return all(type(item) is str for wanted in condition.wanted
               for item in (itertools.chain(*wanted) if condition.operator
                            in ("ArnEquals", "ArnLike") else wanted))


class PublicAccessBlock(NamedTuple):
    """The four switches of API_PublicAccessBlockConfiguration.html."""
    block_public_acls: bool = False
    ignore_public_acls: bool = False
    block_public_policy: bool = False
    restrict_public_buckets: bool = False

    def check_acl(self, grants):
        """AccessDenied for a new ACL that is public, where blocked."""
        if self.block_public_acls and acl_is_public(grants):
            raise S3Error("AccessDenied")

    def check_policy(self, policy):
        """AccessDenied for a new policy that is public, where blocked."""
        if self.block_public_policy and policy_is_public(policy):
            raise S3Error("AccessDenied")


# Field -> element, in the document's order
_BLOCK_ELEMENTS = {
    "block_public_acls": "BlockPublicAcls",
    "ignore_public_acls": "IgnorePublicAcls",
    "block_public_policy": "BlockPublicPolicy",
    "restrict_public_buckets": "RestrictPublicBuckets"}
CONFIG_SHAPES["public_access_block"] = {"*": bool}


def parse_public_access_block(root):
    """The PublicAccessBlock of a PublicAccessBlockConfiguration Element;
    what it leaves out is off."""
    values = {}
    for field, tag in _BLOCK_ELEMENTS.items():
        value = _parse_bool(xml_text(root, tag, "false"))
        if value is None:
            raise S3Error("MalformedXML")
        values[field] = value
    if any(child.tag not in _BLOCK_ELEMENTS.values() for child in root):
        raise S3Error("MalformedXML")
    return PublicAccessBlock(**values)


def public_access_block_document(block):
    """The PublicAccessBlockConfiguration of a block, as bytes."""
    return xml_document("PublicAccessBlockConfiguration", [
        (tag, getattr(block, field))
        for field, tag in _BLOCK_ELEMENTS.items()])


# --- the decision ---

class BucketAccess(NamedTuple):
    """What guards a bucket and its objects.

    acl: grants.  policy: a Policy or None.  locked_out: the policy was
    put with x-amz-confirm-remove-self-bucket-access, so that its denials
    bind the owner's root user too (API_PutBucketPolicy.html).
    """
    owner_id: str
    acl: Tuple[Grant, ...] = ()
    policy: Optional[Policy] = None
    ownership: str = ENFORCED
    block: PublicAccessBlock = PublicAccessBlock()
    locked_out: bool = False


# userguide/acl-overview.html#acl-access-policy-permission-mapping: which
# permission in an ACL stands for which action
_BUCKET_ACL_NEEDS = {
    "s3:ListBucket": "READ", "s3:ListBucketVersions": "READ",
    "s3:ListBucketMultipartUploads": "READ", "s3:PutObject": "WRITE",
    "s3:GetBucketAcl": "READ_ACP", "s3:PutBucketAcl": "WRITE_ACP"}
_OBJECT_ACL_NEEDS = {
    "s3:GetObject": "READ", "s3:GetObjectVersion": "READ",
    "s3:GetObjectAcl": "READ_ACP", "s3:GetObjectVersionAcl": "READ_ACP",
    "s3:PutObjectAcl": "WRITE_ACP", "s3:PutObjectVersionAcl": "WRITE_ACP"}

# Where another account owns the object, it decides on these, and the
# bucket's owner can only deny them; on everything else the bucket's owner
# decides (access-control-auth-workflow-object-operation.html, "Object
# context"; about-object-ownership.html).
_OBJECT_OWNERS_ACTIONS = frozenset(_OBJECT_ACL_NEEDS) | frozenset((
    "s3:GetObjectAttributes", "s3:GetObjectVersionAttributes",
    "s3:GetObjectTagging", "s3:GetObjectVersionTagging",
    "s3:PutObjectTagging", "s3:PutObjectVersionTagging",
    "s3:DeleteObjectTagging", "s3:DeleteObjectVersionTagging",
    "s3:GetObjectTorrent", "s3:GetObjectVersionTorrent"))

# userguide/mpuoverview.html#mpuAndPermissions: the initiator of an upload
# may do these by default
_INITIATORS_ACTIONS = frozenset((
    "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"))

# API_PutBucketPolicy.html: "the root principal in a bucket owner's
# account can perform [these] even if their bucket policy explicitly
# denies the root principal's access"
_ROOTS_ACTIONS = frozenset((
    "s3:GetBucketPolicy", "s3:PutBucketPolicy", "s3:DeleteBucketPolicy"))

# The same action on one version (API_GetObject.html and its sisters)
_VERSIONED = {
    "s3:" + name: "s3:" + name.replace("Object", "ObjectVersion", 1)
    for name in ("GetObject", "GetObjectAcl", "GetObjectAttributes",
                 "GetObjectTagging", "GetObjectTorrent", "DeleteObject",
                 "DeleteObjectTagging", "PutObjectAcl",
                 "PutObjectTagging")}

# Header of a write -> what it needs besides (API_PutObject.html,
# "Permissions"; object-lock-managing.html)
_HEADER_ACTIONS = {
    "x-amz-tagging": "s3:PutObjectTagging",
    "x-amz-object-lock-mode": "s3:PutObjectRetention",
    "x-amz-object-lock-legal-hold": "s3:PutObjectLegalHold"}


def versioned_action(action, version_id):
    """The action that a request with `version_id` (or None) needs."""
    return action if version_id is None else _VERSIONED.get(action, action)


def is_plain_owner(caller, access):
    """True where is_allowed() is sure to be: the bucket's owner, and neither
    a bucket policy nor limits of a session to say otherwise."""
    return (access.policy is None and caller.limits is None
            and caller.user_id is not None
            and caller.user_id == access.owner_id)


def is_allowed(caller, action, resource, access, context, object_owner=None,
               object_acl=None):
    """True when a Caller may do `action` on `resource`, an ARN.

    In AWS's order: the session's own policy, an explicit deny, the public
    access block, the bucket's owner and policy, the object's owner, ACLs.
    access: the BucketAccess, None where no bucket is concerned.
    object_owner: the user id of the object's owner or, of an upload, its
    initiator; None where there is none yet.  object_acl: its grants.
    """
    if caller.limits is not None:
        verdict = evaluate(caller.limits, caller, action, resource, context)
        if verdict == "deny" or verdict is None and not _grants_session(
                caller, action, resource, access, context):
            return False
    if access is None:
        return caller.user_id is not None
    verdict = evaluate(access.policy, caller, action, resource, context)
    owns = caller.user_id is not None and caller.user_id == access.owner_id
    if verdict == "deny":
        return (owns and caller.is_root and not access.locked_out
                and action in _ROOTS_ACTIONS)
    if (access.block.restrict_public_buckets and not owns
            and caller.service is None and policy_is_public(access.policy)):
        return False
    acls = access.ownership != ENFORCED
    foreign = acls and object_owner not in (None, access.owner_id)
    if not (foreign and action in _OBJECT_OWNERS_ACTIONS):
        if owns or verdict == "allow":
            return True
    if caller.user_id is not None and caller.user_id == object_owner and (
            action in _INITIATORS_ACTIONS
            or foreign and action in _OBJECT_OWNERS_ACTIONS):
        return True
    return acls and _acls_allow(caller, action, access, object_owner,
                                object_acl)


def _grants_session(caller, action, resource, access, context):
    """True when a bucket policy of the session's own account gives the
    session itself `action`: that is beyond what its own policy says.

    "*" does, too; what is given to the role or the account stays within
    it.  IAM reference_policies_elements_principal.html#principal-roles,
    access_policies.html#policies_session
    """
    return (access is not None and caller.user_id == access.owner_id
            and evaluate(access.policy, caller._replace(
                principals=frozenset([("AWS", caller.session_arn)])),
                action, resource, context) == "allow")


def _acls_allow(caller, action, access, object_owner, object_acl):
    """True when the ACL that speaks of `action` gives it.

    WRITE on a bucket lets everybody put, but delete only what is one's
    own: "for the bucket and object owners of existing objects" (acl-
    overview.html#permissions).
    """
    ignore = access.block.ignore_public_acls
    if action in _BUCKET_ACL_NEEDS:
        return acl_allows(access.acl, _BUCKET_ACL_NEEDS[action], caller,
                          ignore)
    if action in _OBJECT_ACL_NEEDS:
        return acl_allows(object_acl, _OBJECT_ACL_NEEDS[action], caller,
                          ignore)
    return (action == "s3:DeleteObject" and caller.user_id is not None
            and caller.user_id == object_owner
            and acl_allows(access.acl, "WRITE", caller, ignore))


def authorize(caller, action, resource, access, context, object_owner=None,
              object_acl=None):
    """Raise AccessDenied unless is_allowed(), with the same arguments."""
    if not is_allowed(caller, action, resource, access, context,
                      object_owner, object_acl):
        raise S3Error("AccessDenied")


def authorize_write(headers, caller, resource, access, context):
    """Raise AccessDenied unless a Caller may write a new object with
    these headers.

    Who writes an object and gives it an ACL does so as its owner: for
    that, s3:PutObjectAcl must not be denied, but need not be allowed by
    the bucket's owner (userguide/example-bucket-policies.html, "Require
    the bucket-owner-full-control canned ACL", allows s3:PutObject alone).
    """
    for action in ["s3:PutObject"] + [
            needed for name, needed in _HEADER_ACTIONS.items()
            if name in headers]:
        authorize(caller, action, resource, access, context)
    if names_acl(headers):
        for policy, refusals in ((access.policy, ("deny",)),
                                 (caller.limits, ("deny", None))):
            if policy is not None and evaluate(
                    policy, caller, "s3:PutObjectAcl", resource,
                    context) in refusals:
                raise S3Error("AccessDenied")


# --- ownership of what is written ---

_OWNERS_ACL = "bucket-owner-full-control"


def new_object_acl(headers, caller, access, accounts):
    """The (owner's user id, grants) of an object that a Caller writes.

    AccessControlListNotSupported where ACLs are off and another is asked
    for than full control of the bucket's owner, `private` included;
    AccessDenied for a public one, where blocked.
    userguide/object-ownership-error-responses.html
    """
    bucket_owner = access.owner_id
    writer = caller.user_id or (bucket_owner if caller.service
                                else ANONYMOUS_ID)
    if access.ownership == ENFORCED or (
            access.ownership == PREFERRED
            and headers.get("x-amz-acl") == _OWNERS_ACL):
        writer = bucket_owner
    grants = headers_acl(headers, writer, accounts, bucket_owner)
    if grants is None:
        return writer, private_acl(writer)
    if access.ownership == ENFORCED and (
            headers.get("x-amz-acl", _OWNERS_ACL) != _OWNERS_ACL
            or any(grant != Grant("FULL_CONTROL", bucket_owner)
                   for grant in grants)):
        raise S3Error("AccessControlListNotSupported")
    access.block.check_acl(grants)
    return writer, grants


def check_acl_change(grants, access):
    """Raise unless the ACL of a bucket or an object may be set so.

    Where ACLs are off none may be, not even the one that is in force.
    """
    if access.ownership == ENFORCED:
        raise S3Error("AccessControlListNotSupported")
    access.block.check_acl(grants)


def check_ownership(ownership, acl, owner_id):
    """InvalidBucketAclWithObjectOwnership when ACLs shall be off for a
    bucket whose own ACL gives others something."""
    if ownership not in OWNERSHIPS:
        raise S3Error("MalformedXML")
    if ownership == ENFORCED and any(grant.grantee != owner_id
                                     for grant in acl):
        raise S3Error("InvalidBucketAclWithObjectOwnership")


# --- POST policies ---

# API/sigv4-HTTPPOSTConstructPolicy.html and API/HTTPPOSTForms.html: every
# field must be named by a condition but these.
_UNCONDITIONED = frozenset(("x-amz-signature", "file", "policy",
                            "awsaccesskeyid", "signature"))
_UNCONDITIONED_PREFIX = "x-ignore-"
_POLICY_DATE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z\Z", re.ASCII)


class PostCondition(NamedTuple):
    """One condition of a POST policy.

    operator: `eq`, `starts-with` or `content-length-range`.  field: in
    lower case, "" for a name without its `$` (nothing meets that).  value:
    text, or a (least, most) that is None when it has no numbers.  text:
    the condition as S3 shows it.
    """
    operator: str
    field: str
    value: Any
    text: str

    def holds(self, fields):
        """True when the fields meet it.  A field that is absent meets
        nothing, not even a prefix of "" (S3's answer in
        waynehoover/s3_direct_upload issues 29 and 221)."""
        if self.operator == "content-length-range":
            return self.value is not None
        actual = fields.get(self.field)
        if actual is None:
            return False
        if self.operator == "eq":
            return actual == self.value
        if self.field == "content-type":    # a list: each of it must do
            return all(item.strip().startswith(self.value)
                       for item in actual.split(","))
        return actual.startswith(self.value)


class PostPolicy(NamedTuple):
    """A POST policy: its end in seconds since the epoch, its conditions."""
    expires: int
    conditions: Tuple[PostCondition, ...]

    def check(self, fields, names, bucket, now):
        """Raise AccessDenied unless the form meets the policy.

        fields: of the Form, `${filename}` expanded.  names: as in Form.
        The bucket counts as a field: a policy that does not name it lets
        nothing through (S3's answer in aws/aws-sdk-php issue 3292).
        """
        if now > self.expires:
            raise policy_refusal("Policy expired.")
        fields = dict(fields, bucket=bucket)
        for condition in self.conditions:
            if not condition.holds(fields):
                raise policy_refusal("Policy Condition failed: "
                                     + condition.text)
        covered = {condition.field for condition in self.conditions}
        extra = [names.get(name, name) for name in fields
                 if name not in covered and name not in _UNCONDITIONED
                 and not name.startswith(_UNCONDITIONED_PREFIX)]
        if extra:
            raise policy_refusal("Extra input fields: " + ", ".join(extra))

    def size_range(self):
        """The (least, most) bytes that the file may have; most: or None."""
        ranges = [condition.value for condition in self.conditions
                  if condition.operator == "content-length-range"]
        return (max((low for low, _ in ranges), default=0),
                min((high for _, high in ranges), default=None))


def _invalid_policy(text):
    return S3Error("InvalidPolicyDocument", "Invalid Policy: " + text)


def parse_post_policy(encoded):
    """The PostPolicy that a policy field holds, or InvalidPolicyDocument.

    Its own two names are case-sensitive, the conditions' operators and
    fields are not (ceph/s3-tests test_post_object_case_insensitive_
    condition_fields, _condition_is_case_sensitive).
    """
    policy = _load_policy(encoded)
    for name in policy:
        if name not in ("expiration", "conditions"):
            raise _invalid_policy("Unexpected: '%s'" % name)
    for name in ("expiration", "conditions"):
        if name not in policy:
            raise _invalid_policy("Policy missing %s." % name)
    expiration, conditions = policy["expiration"], policy["conditions"]
    expires = None
    if isinstance(expiration, str) and _POLICY_DATE.match(expiration):
        expires = parse_http_date(expiration)
    if expires is None:
        raise _invalid_policy("Invalid 'expiration' value: '%s'"
                              % (expiration,))
    if not isinstance(conditions, list):
        raise _invalid_policy("Invalid 'conditions' value: must be a List.")
    return PostPolicy(expires, tuple(map(_condition, conditions)))


def _load_policy(encoded):
    """The JSON object in a policy field.

    JSON with two escapes more: the documentation's table has backslash-$
    and backslash-v, too.
    """
    encoded = "".join(encoded.split())
    if not encoded:
        raise _invalid_policy("Expecting '{' but found End-of-Input")
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4),
                                validate=True)
    except ValueError:
        raise _invalid_policy("invalid Base64 encoding.") from None
    try:
        text = re.sub(r"\\(.)", _policy_escape, data.decode("utf-8"),
                      flags=re.DOTALL)
        policy = parse_json(text, parse_constant=_no_json,
                            parse_float=_no_json)
        if not isinstance(policy, dict):
            raise ValueError
    except ValueError:
        raise _invalid_policy("Invalid JSON.") from None
    return policy


def _policy_escape(match):
    return {"$": "$", "v": "\\u000b"}.get(match[1], match[0])


def _no_json(_):
    """Numbers other than integers are Invalid JSON to S3
    (repost.aws/questions/QUo27u4OYpTA-XvAWr72xeRg)."""
    raise ValueError


def _condition(item):
    """The PostCondition of one element of `conditions`."""
    if isinstance(item, dict):
        if len(item) != 1:
            raise _invalid_policy("Invalid Simple-Condition: Simple-"
                                  "Conditions must have exactly one "
                                  "property specified.")
        (name, value), = item.items()
        if not isinstance(value, str):
            raise _invalid_policy("Invalid Simple-Condition: value must be "
                                  "a string.")
        item = ["eq", "$" + name, value]
    if not isinstance(item, list):
        raise _invalid_policy("Invalid condition test: must be a List or "
                              "Object.")
    if not item or not isinstance(item[0], str):
        raise _invalid_policy("Invalid Condition: missing operation "
                              "identifier.")
    operator, text = item[0].lower(), json.dumps(item, ensure_ascii=False)
    if operator not in ("eq", "starts-with", "content-length-range"):
        raise _invalid_policy("Invalid Condition: unknown operation '%s'."
                              % item[0])
    if len(item) != 3:
        raise _invalid_policy("Invalid %s: wrong number of arguments."
                              % operator)
    if operator == "content-length-range":
        return PostCondition(operator, "", _bounds(item[1:]), text)
    if not all(isinstance(argument, str) for argument in item):
        raise _invalid_policy("Invalid JSON.")
    field = item[1][1:].lower() if item[1].startswith("$") else ""
    return PostCondition(operator, field, item[2], text)


def _bounds(arguments):
    """The (least, most) of a content-length-range; None when they are
    texts without a number, which S3 refuses only with the form."""
    if any(isinstance(argument, bool) or not isinstance(argument, (int, str))
           for argument in arguments):
        raise _invalid_policy("Invalid JSON.")
    texts = [str(argument) for argument in arguments]
    if not all(re.match(r"-?\d{1,19}\Z", text, re.ASCII) for text in texts):
        return None
    low, high = map(int, texts)
    if low < 0 or high < 0:
        raise _invalid_policy("Invalid content-length-range: a bound is "
                              "negative.")
    return low, high


# --- cross-origin requests ---

# A bucket's CORS configuration and what follows from it.
# API/API_CORSRule.html, API_PutBucketCors.html, RESTOPTIONSobject.html,
# userguide/ManageCorsUsing.html; S3's answers as LocalStack's
# test_s3_cors.py recorded them on AWS.

# API/API_PutBucketCors.html: "The document is limited to 64 KB in size";
# API_CORSConfiguration.html: "up to 100 rules"; API_CORSRule.html: an ID
# "cannot be longer than 255 characters"
MAX_CORS_BYTES = 64 * KIB
MAX_CORS_RULES = 100
MAX_CORS_ID_CHARS = 255

CORS_METHODS = ("GET", "PUT", "POST", "DELETE", "HEAD")
CORS_VARY = ("Origin, Access-Control-Request-Headers, "
             "Access-Control-Request-Method")
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]*\Z")
# What SDKs and browsers want to see of an answer, for -cors; `*` stands
# for all others where a request has no credentials (Fetch, section 3.3.4).
_DEFAULT_EXPOSED = (
    "ETag", "Accept-Ranges", "Content-Disposition", "Content-Encoding",
    "Content-Range", "x-amz-bucket-region", "x-amz-delete-marker",
    "x-amz-request-id", "x-amz-id-2", "x-amz-version-id", "*")


class CorsRule(NamedTuple):
    """One CORSRule.  Origins and headers may have one `*` each."""
    origins: Tuple[str, ...]
    methods: Tuple[str, ...]
    headers: Tuple[str, ...] = ()
    exposed: Tuple[str, ...] = ()
    max_age: Optional[int] = None
    rule_id: Optional[str] = None


# CorsRule's field -> (element, may there be several); in the order in
# which they are written
_CORS_ELEMENTS = (
    ("rule_id", "ID", False), ("headers", "AllowedHeader", True),
    ("methods", "AllowedMethod", True), ("origins", "AllowedOrigin", True),
    ("exposed", "ExposeHeader", True), ("max_age", "MaxAgeSeconds", False))
_CORS_SHAPES = {
    "rule_id": str, "max_age": int, "headers": [is_word],
    "methods": [is_word], "origins": [is_word], "exposed": [is_word]}
CONFIG_SHAPES["cors"] = [lambda rule: fits(rule, _CORS_SHAPES)
                         and {"origins", "methods"} <= rule.keys()
                         <= _CORS_SHAPES.keys()]


def parse_cors(root):
    """The CorsRules of a CORSConfiguration Element.

    MalformedXML for what S3's schema has not, InvalidRequest for the rest.
    """
    if not len(root) or any(child.tag != "CORSRule" for child in root):
        raise S3Error("MalformedXML")
    if len(root) > MAX_CORS_RULES:
        raise S3Error("InvalidRequest", "The number of CORS rules should not "
                      "exceed allowed limit of %d rules." % MAX_CORS_RULES)
    return tuple(map(_parse_rule, root))


def _parse_rule(element):
    """The checked CorsRule of a CORSRule Element."""
    texts = {tag: [] for _, tag, _ in _CORS_ELEMENTS}
    for child in element:
        if child.tag not in texts or len(child):
            raise S3Error("MalformedXML")
        texts[child.tag].append((child.text or "").strip())
    values = {}
    for field, tag, several in _CORS_ELEMENTS:
        if several:
            values[field] = tuple(texts[tag])
        elif len(texts[tag]) > 1:
            raise S3Error("MalformedXML")
        elif texts[tag]:
            values[field] = texts[tag][0]
    if "max_age" in values:
        values["max_age"] = _max_age(values["max_age"])
    rule = CorsRule(**values)
    _check_rule(rule)
    return rule


def _max_age(text):
    """A MaxAgeSeconds: an int of the schema; S3 takes negative ones."""
    if not re.match(r"[+-]?\d{1,10}\Z", text, re.ASCII) \
            or not -1 << 31 <= int(text) < 1 << 31:
        raise S3Error("MalformedXML")
    return int(text)


def _check_rule(rule):
    """Raise for what S3 does not take; an origin may be empty."""
    if not rule.origins or not rule.methods:
        raise S3Error("MalformedXML")
    for method in rule.methods:
        if method not in CORS_METHODS:
            raise S3Error("InvalidRequest", "Found unsupported HTTP method "
                          "in CORS config. Unsupported method is " + method)
    for tag, patterns in (("AllowedOrigin", rule.origins),
                          ("AllowedHeader", rule.headers)):
        for pattern in patterns:
            if pattern.count("*") > 1:
                raise S3Error("InvalidRequest", '%s "%s" can not have more '
                              "than one wildcard." % (tag, pattern))
    for name in rule.exposed:
        if "*" in name:
            raise S3Error("InvalidRequest", 'ExposeHeader "%s" contains '
                          "wildcard. We currently do not support wildcard "
                          "for ExposeHeader." % name)
    for name in rule.headers + rule.exposed:
        if not _FIELD_NAME.match(name):     # S3 says so of both elements
            raise S3Error("InvalidRequest", 'AllowedHeader "%s" contains '
                          "invalid character." % name)
    if rule.rule_id and len(rule.rule_id) > MAX_CORS_ID_CHARS:
        raise S3Error("InvalidRequest", "The ID value can be up to %d "
                      "characters long." % MAX_CORS_ID_CHARS)


def cors_document(rules):
    """The CORSConfiguration document of CorsRules, as bytes."""
    document = []
    for rule in rules:
        children = []
        for field, tag, several in _CORS_ELEMENTS:
            value = getattr(rule, field)
            children += [(tag, item) for item in value] if several \
                else [(tag, value)]
        document.append(("CORSRule", children))
    return xml_document("CORSConfiguration", document)


def dump_cors(rules):
    """CorsRules as JSON values, for bucket.json: what is empty is left
    out."""
    return [{field: list(value) if isinstance(value, tuple) else value
             for field, value in rule._asdict().items()
             if value not in ((), None)} for rule in rules]


def load_cors(value):
    """The CorsRules that dump_cors() wrote; () for None."""
    return tuple(
        CorsRule(**{field: tuple(item) if isinstance(item, list) else item
                    for field, item in rule.items()})
        for rule in value or ())


def default_cors(origins):
    """The CorsRules of `-cors`: all methods and headers for these origins
    (`*` for every one).  ValueError for an origin with two `*`.
    """
    for origin in origins:
        if origin.count("*") > 1:
            raise ValueError("%s has more than one *" % origin)
    if not origins:
        return ()
    return (CorsRule(tuple(origins), CORS_METHODS, ("*",), _DEFAULT_EXPOSED,
                     3600),)


def _matches(pattern, text):
    """True when `text` is `pattern`, whose one `*` is any text or none."""
    head, star, tail = pattern.partition("*")
    if not star:
        return text == pattern
    return (len(text) >= len(head) + len(tail) and text.startswith(head)
            and text.endswith(tail))


def cors_headers(rules, origin, method, requested=()):
    """The headers of an answer to `origin`, by the first rule that matches;
    None when none does.

    requested: header names, in lower case.  The methods are all of the
    rule's.  Credentials are not for everybody: none with the origin `*`.
    """
    for rule in rules:
        found = next((pattern for pattern in rule.origins
                      if _matches(pattern, origin)), None)
        if found is not None and method in rule.methods \
                and _take_names(rule.headers, set(requested)):
            return _rule_headers(rule, "*" if found == "*" else origin,
                                 requested)
    return None


def _take_names(patterns, names):
    """True when AllowedHeaders take all of a set of names in lower case:
    either may be thousands, so these are not compared one by one."""
    patterns = {pattern.lower() for pattern in patterns}
    if "*" in patterns or names <= patterns:
        return True
    tails = {}                          # by what stands before the `*`
    for pattern in patterns:
        head, star, tail = pattern.partition("*")
        if star:
            tails.setdefault(head, []).append(tail)
    tails = {head: tuple(those) for head, those in tails.items()}
    sizes = set(map(len, tails))
    return all(any(name.endswith(tails.get(name[:size], ()), size)
                   for size in sizes) for name in names - patterns)


def _rule_headers(rule, origin, requested):
    headers = {"Access-Control-Allow-Origin": origin,
               "Access-Control-Allow-Methods": ", ".join(rule.methods)}
    if requested:
        headers["Access-Control-Allow-Headers"] = ", ".join(requested)
    exposed = ", ".join(name for name in rule.exposed if name)
    if exposed:
        headers["Access-Control-Expose-Headers"] = exposed
    if rule.max_age is not None:
        headers["Access-Control-Max-Age"] = str(rule.max_age)
    if origin != "*":
        headers["Access-Control-Allow-Credentials"] = "true"
    headers["Vary"] = CORS_VARY
    return headers


def requested_headers(headers):
    """The names in Access-Control-Request-Headers, in lower case and in
    their order."""
    names = [name.strip().lower() for name in headers.get(
        "access-control-request-headers", "").split(",")]
    return tuple(name for name in names if name)


def preflight(rules, headers, resource="OBJECT"):
    """The headers of the answer to an OPTIONS request, or S3Error.

    rules: CorsRules, () for a bucket without a configuration, None where
    there is no bucket.  headers: of the request.  resource: BUCKET or
    OBJECT, what the target names.  No signature is asked for, and no key
    is looked up.
    """
    origin = headers.get("origin")
    method = headers.get("access-control-request-method")
    if not origin:
        raise S3Error("BadRequest", "Insufficient information. Origin "
                      "request header needed.")
    if not rules:
        raise S3Error("AccessForbidden", "CORSResponse: Bucket not found"
                      if rules is None else "CORSResponse: CORS is not "
                      "enabled for this bucket.", Method=method or "OPTIONS",
                      ResourceType="BUCKET")
    if method not in CORS_METHODS:
        raise S3Error("BadRequest", "Invalid Access-Control-Request-Method: "
                      + (method or "null"))
    requested = requested_headers(headers)
    for name in requested:
        if not _FIELD_NAME.match(name):
            raise S3Error("BadRequest", 'Access-Control-Request-Headers "%s" '
                          "contains invalid character." % name)
    answer = cors_headers(rules, origin, method, requested)
    if answer is None:
        raise S3Error("AccessForbidden", Method=method,
                      ResourceType=resource)
    return answer


def actual_cors(rules, method, headers):
    """The headers to add to the answer of an actual request, errors too;
    {} when it is not cross-origin or no rule matches.

    The Access-Control-Request- headers decide where there are any, as on
    S3; the request's own headers do not matter.
    """
    origin = headers.get("origin")
    if not origin or not rules:
        return {}
    method = headers.get("access-control-request-method") or method
    return cors_headers(rules, origin, method,
                        requested_headers(headers)) or {}


###############################################################################
# 8. Operations
###############################################################################
#
# One function per S3 operation, under S3's own name; its decorator row is
# the one place that says how it is reached, under which permission, and
# with which status it succeeds.  Takes a Request, gives a Response or what
# as_response() makes into one.  No sockets, no paths.

SERVICE, BUCKET, OBJECT, STS = "service", "bucket", "object", "sts"
CONTROL = "s3control"
DONE, STORED, REFUSED = "done", "stored", "refused"


class Service(NamedTuple):
    """What all requests share.

    region: the only one that a scope or location may name, None for any.
    domains: below them a Host names a bucket.  hosts: names under which
    clients behind a proxy sign.  key_file: a KeyFile.
    day_seconds: what lifecycle rules take for a day.  outbox: where events
    go.
    """
    store: Store
    accounts: Accounts
    region: Optional[str] = None
    domains: Tuple[str, ...] = ()
    public_host: Optional[str] = None
    public_url: Optional[str] = None
    readonly: bool = False
    object_ownership: str = ENFORCED
    cors: Tuple[CorsRule, ...] = ()
    key_file: Any = None
    day_seconds: float = 86400
    outbox: Outbox = Outbox()


class Request:
    """One S3 request: its target and headers as they came, and, once
    respond() has got there, its operation, identity, bucket and body."""

    # until they are known
    operation = identity = bucket = body = config = guard = None
    caller = ANONYMOUS
    tls_version = None                  # a function that gives it, over TLS
    host_bucket, is_site, is_control, is_charged = "", False, False, False
    pairs = facts = noted = ()          # the last two: for policies, for logs
    contexts = None             # by Bucket, where it is about many objects
    recorder = None             # of its events
    query = {}

    def __init__(self, service, method, target, headers, frame, now,
                 request_id, scheme="http", client=None):
        self.service, self.method, self.headers = service, method, headers
        self.frame, self.now, self.request_id = frame, now, request_id
        self.scheme, self.client = scheme, client
        self._guards = {}               # Bucket -> (config, BucketAccess)
        self.raw_path, raw_query = split_target(target)
        if raw_query:
            self.pairs = parse_query(raw_query)
            self.query = dict(reversed(self.pairs))
        self.host = headers.get("host", "")
        named = host_bucket(self.host, service.domains)
        if named or self.raw_path.startswith(CONTROL_TAGS):
            self.bucket_name, self.key = self._named(named)
        else:
            self.bucket_name, self.key = split_path(self.raw_path)

    def _named(self, host_bucket):
        """(bucket, key) where the target's path alone does not tell."""
        site = _SITE.match(host_bucket) \
            if ".s3-website" in host_bucket else None
        if site:
            host_bucket, self.is_site = site[1], True
        self.host_bucket = host_bucket
        self.is_control = not site and is_control(self.raw_path,
                                                  self.headers)
        if self.is_control:
            return control_bucket(self.raw_path), ""
        if host_bucket:
            return host_bucket, checked_key(uri_decode(self.raw_path[1:]))
        return split_path(self.raw_path)

    @property
    def level(self):
        """SERVICE, BUCKET, OBJECT or CONTROL, by what the target names."""
        if self.key:
            return OBJECT
        if self.is_control:
            return CONTROL
        return BUCKET if self.bucket_name else SERVICE

    @property
    def store(self):
        """The Store."""
        return self.service.store

    @property
    def account(self):
        """The Account that signed."""
        return self.identity.account

    def enter(self, bucket):
        """Make a Bucket the one that the request is about."""
        self.config, self.guard = self._guard(bucket)
        self.bucket = bucket

    def find_bucket(self, name, expected="x-amz-expected-bucket-owner"):
        """The Bucket of that name, its owner the one the client expects."""
        bucket, config = self.store.look_up(name)
        guard = self._guards[bucket] = self._derive(bucket, config)
        owner = self.headers.get(expected)
        if owner is not None and owner != guard[1].owner_id:
            raise S3Error("AccessDenied", headers={
                "x-amz-bucket-region": bucket.region})
        return bucket

    def _guard(self, bucket):
        """(config, BucketAccess) of a bucket; bucket.json is looked at
        once a request, and the rest made anew when it has changed."""
        guard = self._guards.get(bucket)
        if guard is None:
            guard = self._derive(bucket, bucket.config)
            self._guards[bucket] = guard
        return guard

    def _derive(self, bucket, config):
        """(config, BucketAccess), the second made anew when the first is
        another one."""
        guard = bucket.derived
        if guard[0] is not config:
            guard = config, bucket_access(self.service, bucket, config)
            bucket.derived = guard
        return guard

    def access(self, bucket):
        """The BucketAccess of a bucket."""
        return self._guard(bucket)[1]

    def setting(self, name, default=None):
        """A field of bucket.json, of this request's bucket."""
        return self.config.get(name, default)

    def allow(self, action, key=None, bucket=None, owner=None, acl=None,
              facts=None):
        """Raise AccessDenied unless the caller may do this to a key (None:
        to the bucket itself).  owner, acl: the object's, where it has its
        own.  facts: for a Context, what only the operation knows."""
        bucket = bucket or self.bucket
        if not self.allowed(action, key, bucket, owner, acl, facts):
            raise S3Error("AccessDenied", headers={
                "x-amz-bucket-region": bucket.region})

    def allowed(self, action, key=None, bucket=None, owner=None, acl=None,
                facts=None):
        """As allow(), but True or False."""
        bucket = bucket or self.bucket
        access, caller = self._guard(bucket)[1], self.caller
        if owner is None and is_plain_owner(caller, access):
            return True
        return is_allowed(caller, action, resource_arn(bucket.name, key),
                          access, self._context(bucket, key, facts),
                          owner, acl)

    def _context(self, bucket, key, facts=None):
        """The policy_context(), None where no policy will look at it."""
        return policy_context(self, bucket, key, facts) \
            if self.has_policy(bucket) else None

    def has_policy(self, bucket):
        """True where a policy has a say in what the caller may do."""
        return (self.access(bucket).policy is not None
                or self.caller.limits is not None)

    def allow_write(self, key):
        """Raise AccessDenied unless the caller may write an object."""
        if is_plain_owner(self.caller, self.guard):
            return                      # whatever the headers give away
        authorize_write(self.headers, self.caller, resource_arn(
            self.bucket.name, key), self.guard,
            self._context(self.bucket, key))

    def allow_object(self, action, key, version_id=None, bucket=None,
                     facts=None):
        """Raise AccessDenied unless the caller may do this to an object
        that may have an owner and an ACL of its own.

        Who may list, and asks for a key that is not there, is told so: a
        404 tells no more than the listing (API_GetObject.html, _HeadObject,
        _GetObjectAttributes).
        """
        bucket = bucket or self.bucket
        owner = acl = None
        if self.access(bucket).ownership != ENFORCED:
            owner, acl = object_guard(self, bucket, key, version_id)
        facts = dict(facts or {})
        facts["s3:VersionId"] = version_id
        if self.allowed(versioned_action(action, version_id), key, bucket,
                        owner, acl, facts):
            return
        if action in ("s3:GetObject", "s3:GetObjectAttributes") \
                and version_id is None and self.allowed(
                    "s3:ListBucket", None, bucket, facts={"s3:prefix": key}):
            close_fd(open_readable(bucket, key)[1])
        raise S3Error("AccessDenied", headers={
            "x-amz-bucket-region": bucket.region})

    def allow_change(self, facts):
        """Raise AccessDenied unless the caller may do what the operation
        does to the version asked for.  facts: for a Context, what the
        request's document says."""
        self.allow_object(self.operation.action, self.key,
                          asked_version(self), facts=facts)

    def note(self, *fields):
        """Keep a Noted for the access log of its bucket, if it has one."""
        noted = Noted(*fields)
        if "logging" in self._guard(noted.bucket)[0]:
            self.noted += (noted,)

    def xml(self, root, required=True, limit=MAX_XML_BYTES):
        """The root Element of the body; None when empty and allowed."""
        data = self.body.read_all(limit)
        if not data and not required:
            return None
        return parse_xml(data, root)

    def flag(self, name):
        """True when a boolean header says so."""
        return self.headers.get(name, "").lower() == "true"


# Where S3 Control has the tags of a resource, by its ARN
CONTROL_TAGS = "/v20180820/tags/"


def is_control(raw_path, headers):
    """True for a request of S3 Control, whose clients put the account's
    number into this header and before the host's name; its operations are
    no subresources of a bucket, and no key can be mistaken for one."""
    return raw_path.startswith(CONTROL_TAGS) \
        and "x-amz-account-id" in headers


def control_bucket(raw_path):
    """The bucket whose ARN a target of S3 Control ends with; "" for
    another resource."""
    match = re.match(r"arn:aws[a-z-]*:s3:::([a-z0-9._-]+)\Z",
                     urllib.parse.unquote(raw_path[len(CONTROL_TAGS):]))
    return match[1] if match else ""


def bucket_access(service, bucket, config):
    """The BucketAccess that bucket.json and the server's defaults say."""
    owner = service.accounts.owner_id(bucket)
    policy = config.get("policy")
    ownership = config.get("ownership", service.object_ownership)
    block = config.get("public_access_block") or {}
    return BucketAccess(
        owner, load_acl(config.get("acl"), owner),
        None if policy is None else stored_policy(str(policy)),
        ownership or WRITER, PublicAccessBlock(*(
            block.get(name) is True for name in PublicAccessBlock._fields)),
        config.get("locked_out") is True)


def object_guard(request, bucket, key, version_id=None):
    """The (owner's user id, grants) of an object; (None, None) for none.
    """
    try:
        info, fd = bucket.open_version(key, version_id)
    except S3Error:
        return None, None
    close_fd(fd)
    owner = object_owner(request, info, bucket)
    return owner, load_acl(info.record.get("acl"), owner)


def open_readable(bucket, key, version_id=None, to_change=False):
    """(Info, fd) of a version that can be read, the latest for None; its
    delete marker is an error."""
    info, fd = bucket.open_version(key, version_id)
    if info.marker:
        close_fd(fd)
        raise marker_error(info, info.version_id if to_change
                           else version_id)
    return info, fd


def object_owner(request, info, bucket=None):
    """The user id of an object's owner."""
    access = request.access(bucket or request.bucket)
    if access.ownership == ENFORCED:
        return access.owner_id
    return info.record.get("owner") or access.owner_id


def signing(request):
    """(signed by an account, with SigV4, in the query) of a request."""
    identity = request.identity
    if identity is None or identity.account is None:
        return False, False, False
    return True, identity.amz_date is not None, is_presigned(request.query)


def policy_context(request, bucket, key=None, facts=None):
    """The Context that a policy's conditions see.  bucket: None where
    none is there yet."""
    def tags():
        try:
            info, fd = bucket.open_version(key, known.get("s3:VersionId"))
        except S3Error:
            return None
        close_fd(fd)
        return info.record.get("tags", {})
    known = {"s3:ExistingObjectTag": tags if key else None}
    known.update(request.facts)
    known.update(facts or {})
    shared = request.contexts
    if shared is None or any(name.lower() not in OBJECT_KEYS
                             for name in known):
        return _request_context(request, bucket, known)
    if bucket not in shared:
        shared[bucket] = _request_context(request, bucket, {})
    return shared[bucket].about(known)


def _request_context(request, bucket, facts):
    """The Context of these facts and of those of the request itself."""
    query, (signed, v4, presigned) = request.query, signing(request)

    def asked_tags():
        text = request.headers.get("x-amz-tagging")
        return text and parse_tagging_header(text)
    kind = "REST-QUERY-STRING" if presigned else "REST-HEADER"
    if request.operation.name == "PostObject":
        kind = "POST"
    age = 0                             # always, with SigV2
    if v4:
        age = request.now - parse_amz_date(request.identity.amz_date)
    owner = bucket and request.access(bucket).owner_id
    known = {
        "s3:RequestObjectTag": asked_tags,
        "s3:RequestObjectTagKeys": lambda: list(asked_tags() or ()),
        "aws:SourceIp": request.client,
        "aws:SecureTransport": request.scheme == "https",
        "s3:authType": kind if signed else None,
        "s3:signatureversion": None if not signed else (
            V4 if v4 else "AWS"),
        "s3:signatureAge": int(age * 1000) if signed else None,
        "s3:TlsVersion": request.tls_version
        and request.tls_version()[len("TLSv"):],
        "aws:RequestedRegion": lambda: bucket.region if bucket
        else request.service.region or "us-east-1",
        "aws:ResourceAccount": owner, "s3:ResourceAccount": owner}
    known.update(facts)
    return Context(request.caller, request.headers, query, request.now,
                   known)


class Response:
    """An answer: status, headers, and a body in memory or in a file.

    file: a descriptor that the sender closes; of it `length` bytes from
    `offset` on, or `blocks` of bytes, `length` in all.  code: an error's.
    """

    file = blocks = code = None
    offset = 0

    def __init__(self, status=200, headers=None, body=b"", length=None):
        self.status, self.headers, self.body = status, headers or {}, body
        self.length = len(body) if length is None else length


class Noted(NamedTuple):
    """What a request did besides its own act, as access logs name it: a
    key of DeleteObjects, the reading of a copy's source."""
    operation: str
    bucket: Bucket
    key: str
    version_id: Optional[str]
    status: int
    code: Optional[str] = None
    size: Optional[int] = None


class Operation(NamedTuple):
    """One row: how an operation is reached, and what carries it out."""
    name: str
    method: str
    level: str
    subresource: Optional[str]
    when: Optional[str]
    action: str
    status: int
    state: str
    function: Optional[Callable]


OPERATIONS = {}                     # name -> Operation
SUBRESOURCES = set()                # every query name that selects a row
_ROUTES = {}                        # (method, level, subresource) -> rows


# IAM's name for what an operation needs, where that is not `s3:` and the
# operation's own and its row does not say: service-authorization/latest/
# reference/list_amazons3.html
_ACTIONS = {
    "PostObject": "s3:PutObject",
    "SelectObjectContent": "s3:GetObject",
    "GetBucketCors": "s3:GetBucketCORS",
    "PutBucketCors": "s3:PutBucketCORS",
    "DeleteBucketCors": "s3:PutBucketCORS",
    "DeleteBucketTagging": "s3:PutBucketTagging",
    "GetBucketLifecycle": "s3:GetLifecycleConfiguration",
    "GetBucketLifecycleConfiguration": "s3:GetLifecycleConfiguration",
    "PutBucketLifecycle": "s3:PutLifecycleConfiguration",
    "PutBucketLifecycleConfiguration": "s3:PutLifecycleConfiguration",
    "DeleteBucketLifecycle": "s3:PutLifecycleConfiguration",
    "GetBucketEncryption": "s3:GetEncryptionConfiguration",
    "PutBucketEncryption": "s3:PutEncryptionConfiguration",
    "DeleteBucketEncryption": "s3:PutEncryptionConfiguration",
    "GetBucketReplication": "s3:GetReplicationConfiguration",
    "PutBucketReplication": "s3:PutReplicationConfiguration",
    "DeleteBucketReplication": "s3:PutReplicationConfiguration",
    "GetPublicAccessBlock": "s3:GetBucketPublicAccessBlock",
    "PutPublicAccessBlock": "s3:PutBucketPublicAccessBlock",
    "DeletePublicAccessBlock": "s3:PutBucketPublicAccessBlock",
    "DeleteBucketOwnershipControls": "s3:PutBucketOwnershipControls",
    "GetObjectLockConfiguration": "s3:GetBucketObjectLockConfiguration",
    "PutObjectLockConfiguration": "s3:PutBucketObjectLockConfiguration",
    "GetBucketNotificationConfiguration": "s3:GetBucketNotification",
    "PutBucketNotificationConfiguration": "s3:PutBucketNotification",
    "GetBucketAccelerateConfiguration": "s3:GetAccelerateConfiguration",
    "PutBucketAccelerateConfiguration": "s3:PutAccelerateConfiguration",
    "GetBucketAnalyticsConfiguration": "s3:GetAnalyticsConfiguration",
    "ListBucketAnalyticsConfigurations": "s3:GetAnalyticsConfiguration",
    "PutBucketAnalyticsConfiguration": "s3:PutAnalyticsConfiguration",
    "DeleteBucketAnalyticsConfiguration": "s3:PutAnalyticsConfiguration",
    "GetBucketInventoryConfiguration": "s3:GetInventoryConfiguration",
    "ListBucketInventoryConfigurations": "s3:GetInventoryConfiguration",
    "PutBucketInventoryConfiguration": "s3:PutInventoryConfiguration",
    "DeleteBucketInventoryConfiguration": "s3:PutInventoryConfiguration",
    "GetBucketMetricsConfiguration": "s3:GetMetricsConfiguration",
    "ListBucketMetricsConfigurations": "s3:GetMetricsConfiguration",
    "PutBucketMetricsConfiguration": "s3:PutMetricsConfiguration",
    "DeleteBucketMetricsConfiguration": "s3:PutMetricsConfiguration",
    "GetBucketIntelligentTieringConfiguration":
        "s3:GetIntelligentTieringConfiguration",
    "ListBucketIntelligentTieringConfigurations":
        "s3:GetIntelligentTieringConfiguration",
    "PutBucketIntelligentTieringConfiguration":
        "s3:PutIntelligentTieringConfiguration",
    "DeleteBucketIntelligentTieringConfiguration":
        "s3:PutIntelligentTieringConfiguration",
    "CreateBucketMetadataConfiguration":
        "s3:CreateBucketMetadataTableConfiguration",
    "GetBucketMetadataConfiguration":
        "s3:GetBucketMetadataTableConfiguration",
    "DeleteBucketMetadataConfiguration":
        "s3:DeleteBucketMetadataTableConfiguration",
}


def iam_action(name, level=None):
    """The IAM action that an operation needs."""
    return _ACTIONS.get(name, ("sts:" if level == STS else "s3:") + name)


def add_operation(row):
    """Put a row into the tables, those with a condition first."""
    OPERATIONS[row.name] = row
    if row.subresource:
        SUBRESOURCES.add(row.subresource)
        V2_SIGNED.add(row.subresource)
    rows = _ROUTES.setdefault((row.method, row.level, row.subresource), [])
    rows.insert(0 if row.when else len(rows), row)


def operation(method, level, subresource=None, when=None, action=None,
              status=200):
    """Declare the function below as the S3 operation of its name.

    subresource: the query name that selects it.  when: a further header
    or query name that must be there.  action: the IAM action.  STS's are
    selected by their name.
    """
    def declare(function):
        name = "".join(word.capitalize()
                       for word in function.__name__.split("_"))
        add_operation(Operation(name, method, level, subresource, when,
                                action or iam_action(name, level), status,
                                DONE, function))
        return function
    return declare


# The names that a query may carry besides an operation's own
_SIGNING_NAMES = frozenset((
    "x-id", "AWSAccessKeyId", "Signature", "Expires", "X-Amz-Algorithm",
    "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires",
    "X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Security-Token",
    TOKEN_HEADER, "X-Amz-Content-Sha256", "X-Amz-User-Agent"))


def find_operation(request):
    """The Operation that a request asks for.

    A known subresource without a row is NotImplemented: it never falls
    through to the plain operation.  Nor does an unknown one, where that
    would change a bucket.
    """
    query, method, level = request.query, request.method, request.level
    if level == CONTROL and not request.bucket_name:
        raise S3Error("NotImplemented", "Only buckets have tags here")
    subresource = _selected(query, method, level) if query else None
    for row in _ROUTES.get((method, level, subresource), ()):
        when = row.when
        if when is None or when in query or when[:2] == "x-" and (
                when in request.headers     # the rest: see url_headers()
                or query and when in map(str.lower, query)):
            return row
    if subresource:
        raise S3Error("NotImplemented", "%s ?%s is not implemented"
                      % (method, subresource))
    raise S3Error("MethodNotAllowed", Method=method,
                  ResourceType=level.upper(),
                  headers={"Allow": "GET, HEAD, PUT, POST, DELETE"})


def _selected(query, method, level):
    """The one subresource that a query names, or None."""
    names = [name for name in query if name in SUBRESOURCES]
    if len(names) > 1:
        raise S3Error("InvalidArgument", "Conflicting query parameters: "
                      + ", ".join(sorted(names)))
    if names:
        return names[0]
    if level == BUCKET and method in ("PUT", "DELETE", "POST"):
        for name in query:
            if name not in _SIGNING_NAMES and not (
                    is_presigned(query) and name[:6].lower() == "x-amz-"):
                raise S3Error("NotImplemented",
                              "?%s is not implemented" % name)
    return None


# Headers that ask for what is not done -> their harmless values
_UNDONE_HEADERS = {"x-amz-write-offset-bytes": (), "x-amz-mfa": (),
                   "x-amz-bucket-namespace": ("global",)}
_UNDONE_HEADERS.update(("x-amz-checksum-" + name.lower(), ())
                       for name in UNDONE_CHECKSUMS)


def check_undone(headers):
    """NotImplemented for a header that must not be ignored."""
    if _UNDONE_HEADERS.keys().isdisjoint(headers):
        return
    for name, harmless in _UNDONE_HEADERS.items():
        if name in headers and headers[name] not in harmless:
            raise S3Error("NotImplemented", Header=name)


# Their x-amz-checksum- headers speak of the object, not of the body
_OBJECT_CHECKSUMS = frozenset(("CompleteMultipartUpload",))


def respond(request):
    """Carry out a request: the Response, or S3Error.

    Signature, permission and everything else that needs no body come
    before the first byte of it is asked for.
    """
    service = request.service
    row = request.operation = find_operation(request)
    request.identity = identity = authenticate(
        request, service.accounts.by_key_id, request.now, service.region,
        signing_hosts(request))
    request.caller = account_caller(identity.account)
    if request.query and is_presigned(request.query):
        request.headers = dict(url_headers(request), **request.headers)
    _authorize_row(request, row)
    if row.function is None:
        raise S3Error("NotImplemented", "%s is not implemented" % row.name)
    if service.readonly and row.method not in ("GET", "HEAD"):
        raise S3Error("AccessDenied", "This server is read-only")
    check_undone(request.headers)
    request.body = open_body(request.frame, request.headers, identity,
                             row.name not in _OBJECT_CHECKSUMS)
    try:
        response = as_response(row.function(request), row.status)
    except S3Error as error:
        if error.code == "NoSuchKey" and row.method in ("GET", "HEAD"):
            _hide_missing(request)
        if error.fields.get("ResourceType") == "DeleteMarker":
            error.fields["Method"] = request.method
        raise
    if request.is_charged:
        response.headers["x-amz-request-charged"] = "requester"
    return response


def signing_hosts(request):
    """Further names under which a client may have signed, behind a proxy;
    one under which the target would be another bucket's is none."""
    service = request.service
    if not service.public_host:
        return ()
    hosts = service.public_host, request.headers.get("x-forwarded-host")
    return tuple(host for host in hosts if host and host_bucket(
        host, service.domains) == request.host_bucket)


# What asks for its permissions itself: for each key, or for more than one
_OWN_CHECKS = frozenset((
    "DeleteObjects", "PutObject", "CopyObject",
    "CreateMultipartUpload", "AbortMultipartUpload", "ListParts"))
# ... once it knows what its document says, where a policy may ask for that
_DOCUMENT_CHECKS = frozenset((
    "PutObjectTagging", "PutObjectRetention", "PutObjectLegalHold",
    "TagResource", "UntagResource"))


def _authorize_row(request, row):
    """Find the bucket and check the permission that the row names."""
    if row.level == SERVICE or row.name == "CreateBucket":
        if request.account is None:
            raise S3Error("AccessDenied")
        if row.level == SERVICE:
            authorize(request.caller, row.action, resource_arn("*"), None,
                      policy_context(request, None))
        return
    request.enter(request.find_bucket(request.bucket_name))
    if request.guard.ownership == ENFORCED and is_plain_owner(
            request.caller, request.guard):
        return                          # all that follows says yes
    if row.name == "PostObject":        # its form says who asks
        return
    _check_payer(request)
    if row.function is None:            # refused: the owner is told so
        request.allow("s3:ListBucket")
    elif row.name in _OWN_CHECKS or (row.name in _DOCUMENT_CHECKS
                                     and request.has_policy(request.bucket)):
        pass
    elif row.level in (BUCKET, CONTROL):
        request.allow(row.action)
    else:
        request.allow_object(row.action, request.key,
                             request.query.get("versionId"))


def _check_payer(request):
    """AccessDenied for others who do not say that they pay, where the
    requester does: userguide/RequesterPaysBuckets.html."""
    payer = request.setting("requestPayment", {}).get("Payer")
    if payer != "Requester" or request.caller.user_id == bucket_owner(
            request):
        return
    if request.caller.user_id is None or request.headers.get(
            "x-amz-request-payer") != "requester":
        raise S3Error("AccessDenied")
    request.is_charged = True


def _hide_missing(request):
    """AccessDenied instead of NoSuchKey for who may not list: API_
    GetObject.html, "Permissions"."""
    if request.level == OBJECT and not request.allowed(
            "s3:ListBucket", facts={"s3:prefix": request.key}):
        raise S3Error("AccessDenied") from None


def as_response(result, status):
    """What an operation returned, as a Response."""
    if isinstance(result, Response):
        return result
    if isinstance(result, bytes):
        return Response(status, {"Content-Type": "application/xml"}, result)
    return Response(status, result)


def error_response(error, request_id, resource="", in_envelope=False):
    """The Response for an S3Error; <Error> is the one root without an
    xmlns.  in_envelope: as S3 Control has it."""
    headers = dict(error.headers)
    if error.status == 304:
        return Response(304, headers)
    headers["Content-Type"] = "application/xml"
    fields = [("Code", error.code), ("Message", error.message)]
    fields += error.fields.items()
    fields += [("Resource", resource), ("RequestId", request_id),
               ("HostId", request_id)]
    tag = "Error"
    if in_envelope:
        tag, fields = "ErrorResponse", [(tag, fields),
                                        ("RequestId", request_id)]
    response = Response(error.status, headers,
                        xml_document(tag, fields, xmlns=None))
    response.code = error.code
    return response


# --- shared by operations ---

def owner_element(request, user_id, tag="Owner"):
    """An Owner or Initiator child for a document."""
    name = request.service.accounts.name(user_id)
    return tag, [("ID", user_id), ("DisplayName", name)]


def bucket_owner(request):
    """The user id of the owner of this request's bucket."""
    return request.access(request.bucket).owner_id


def quoted(etag):
    """An ETag as headers and documents carry it."""
    return '"%s"' % etag


def object_record(headers):
    """The record of a new object, as far as headers describe it."""
    record = {"headers": kept_headers(headers)}
    meta = user_metadata(headers)
    if meta:
        record["meta"] = meta
    name = storage_class(headers)
    if name:
        record["class"] = name
    if "x-amz-tagging" in headers:
        tags = parse_tagging_header(headers["x-amz-tagging"])
        if tags:
            record["tags"] = tags
    return record


def asked_version(request):
    """The versionId of a request, None when it names none."""
    return checked_version(request.query.get("versionId"))


def checked_version(version_id):
    """A version id as a client gave it, or None for None."""
    if version_id is not None and not valid_version_id(version_id):
        raise S3Error("InvalidArgument", "Invalid version id specified"
                      if version_id else "Version id cannot be the empty "
                      "string", ArgumentName="versionId",
                      ArgumentValue=version_id)
    return version_id


def version_header(request, info):
    """The x-amz-version-id of an answer, in a bucket with versions; a
    write while they are suspended makes none and names none."""
    versioning = request.setting("versioning")
    if versioning is None or (versioning == SUSPENDED and request.method
                              not in ("GET", "HEAD")):
        return {}
    return {"x-amz-version-id": info.version_id}


def open_asked(request):
    """(Info, fd) of the version that a request reads."""
    return open_readable(request.bucket, request.key, asked_version(request),
                         request.method not in ("GET", "HEAD")
                         or request.operation.subresource == "tagging")


def find_asked(request):
    """The Info of the version that a request reads."""
    info, fd = open_asked(request)
    close_fd(fd)
    return info


def encode_type(request):
    """The function that encoding-type asks for, and its name or None."""
    name = request.query.get("encoding-type")
    if name is None:
        return str, None
    if name != "url":
        raise S3Error("InvalidArgument", "Invalid Encoding Method specified "
                      "in Request", ArgumentName="encoding-type",
                      ArgumentValue=name)
    return functools.partial(uri_encode, safe="/-_.~"), "url"


def page_size(request, name, most=MAX_LIST_KEYS):
    """A max-... parameter, at most `most`."""
    text = request.query.get(name)
    return most if not text else parse_int(name, text, 0, most)


def make_token(text):
    """An opaque continuation token for a place in a list."""
    return base64.urlsafe_b64encode(text.encode()).decode()


def read_token(request):
    """The place that the continuation token stands for; "" for none."""
    token = request.query.get("continuation-token", "")
    try:
        return base64.b64decode(token.encode("ascii"), b"-_",
                                validate=True).decode()
    except ValueError:
        raise S3Error("InvalidArgument", "The continuation token provided "
                      "is incorrect", ArgumentName="continuation-token"
                      ) from None


def need_digest(request, message="Missing required header for this "
                "request: Content-MD5 OR x-amz-checksum-*"):
    """Several operations insist on a digest of what they are sent."""
    if request.body.checksum is None \
            and "content-md5" not in request.headers:
        raise S3Error("InvalidRequest", message)


# --- documents: the schema ---
#
# A document of a bucket or object is a table of Fields.  read_document()
# makes an Element into plain values that JSON can keep, in the table's
# order, and refuses all that the table does not name, so that nothing a
# client asked for is dropped in silence; document_children() gives the
# document back.  What a table cannot say is a check_ function.  Pure: no
# clock, no store; the caller raises what depends on the bucket.

class Leaf(NamedTuple):
    """How an element's text becomes a value, and back.

    read(text) gives the value, or raises ValueError.  shape: the value's.
    """
    read: Callable
    write: Callable = str
    shape: Any = str


class Field(NamedTuple):
    """One element: its tag, its kind, and how often it may stand there.

    kind: a Leaf, or the Fields inside.  A tag `@name` is an attribute.
    With high > 1 the value is a list.
    """
    tag: str
    kind: Any
    low: int = 0
    high: int = 1


MANY = 1 << 30                      # bounded by MAX_XML_BYTES
MAX_RULE_ID = 255

# int of XML Schema; AWS: Integer
_INT = re.compile(r"[+-]?\d{1,10}\Z", re.ASCII)
_LONG = re.compile(r"[+-]?\d{1,19}\Z", re.ASCII)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def _read_int(text):
    value = int(text) if _INT.match(text.strip()) else 1 << 31
    if not -(1 << 31) <= value < 1 << 31:
        raise ValueError(text)
    return value


def _read_long(text):
    if not _LONG.match(text.strip()):
        raise ValueError(text)
    return int(text)


def _is_long(value):
    return type(value) is int and abs(value) < 1 << 63


def _read_boolean(text):
    if text.strip() not in _BOOLEANS:
        raise ValueError(text)
    return _BOOLEANS[text.strip()]


def _read_date(text):
    seconds = parse_iso_date(text.strip())
    if seconds is None:
        raise ValueError(text)
    return seconds


def _read_filled(text):
    if not text.strip():
        raise ValueError(text)
    return text


TEXT = Leaf(str)                    # as it is: a prefix may begin with " "
FILLED = Leaf(_read_filled)
INT = Leaf(_read_int, shape=_is_long)
LONG = Leaf(_read_long, shape=_is_long)
BOOLEAN = Leaf(_read_boolean, bool, bool)
DATE = Leaf(_read_date, iso_date, is_date)


def one_of(*words):
    """A Leaf that takes these words only."""
    def read(text):
        if text.strip() not in words:
            raise ValueError(text)
        return text.strip()
    return Leaf(read)


def need(tag, kind):
    """The Field of an element that must be there."""
    return Field(tag, kind, 1)


def many(tag, kind, low=0, high=MANY):
    """The Field of an element that is repeated, without a list around."""
    return Field(tag, kind, low, high)


ON_OFF = one_of(ENABLED, "Disabled")
STATUS = (need("Status", ON_OFF),)


def read_document(element, fields):
    """The value of an Element that the Fields describe: {tag: value}.

    MalformedXML for an element that is unknown, missing, repeated or
    wrong, and for text between elements.
    """
    found = {field.tag: [] for field in fields}
    if (element.text or "").strip():
        raise S3Error("MalformedXML")
    for child in element:
        if child.tag not in found or (child.tail or "").strip():
            raise S3Error("MalformedXML")
        found[child.tag].append(child)
    value = {}
    for field in fields:
        texts = found[field.tag]
        if field.tag[0] == "@":
            texts = [text for text in (element.get(field.tag[1:]),)
                     if text is not None]
        if not field.low <= len(texts) <= field.high:
            raise S3Error("MalformedXML")
        values = [_read_kind(text, field.kind) for text in texts]
        if values:
            value[field.tag] = values if field.high > 1 else values[0]
    return value


def _read_kind(item, kind):
    """The value of a child Element, or of an attribute's text."""
    if not isinstance(kind, Leaf):
        return read_document(item, kind)
    if not isinstance(item, str):
        if len(item):
            raise S3Error("MalformedXML")
        item = item.text or ""
    try:
        return kind.read(item)
    except ValueError:
        raise S3Error("MalformedXML") from None


def document_shape(fields, **others):
    """The shape of what read_document() gives, and of other names that
    have to be there; in bucket.json somebody may have changed it."""
    shape = dict({field.tag: _kind_shape(field) for field in fields},
                 **others)
    needed = set(others).union(field.tag for field in fields if field.low)
    return lambda value: fits(value, shape) and needed <= value.keys()


def _kind_shape(field):
    shape = field.kind.shape if isinstance(field.kind, Leaf) \
        else document_shape(field.kind)
    return [shape] if field.high > 1 else shape


def document_children(value, fields):
    """The (tag, value) pairs of what read_document() gave."""
    pairs = []
    for field in fields:
        items = value.get(field.tag)
        if items is None or field.tag[0] == "@":
            continue
        for item in items if field.high > 1 else (items,):
            if isinstance(field.kind, Leaf):
                pairs.append((field.tag, field.kind.write(item)))
            else:
                pairs.append((field.tag + _xsi_type(item),
                              document_children(item, field.kind)))
    return pairs


def _xsi_type(value):
    """The one attribute that S3's documents have, as it follows a tag."""
    if "@type" not in value:
        return ""
    return ' xmlns:xsi="%s" xsi:type="%s"' % (XSI, value["@type"])


def bad_argument(message, name, value=None):
    """The S3Error for an argument that the schema allows but S3 does not."""
    fields = {"ArgumentName": name}
    if value is not None:
        fields["ArgumentValue"] = value
    return S3Error("InvalidArgument", message, **fields)


# --- tags ---

# userguide/object-tagging.html, CostAllocTagging.html
MAX_OBJECT_TAGS, MAX_BUCKET_TAGS = 10, 50
MAX_TAG_KEY, MAX_TAG_VALUE = 128, 256       # UTF-16 code units

# kind -> (most, too many, a key with the prefix aws:), as S3 answers:
# terraform-provider-aws issue 19895; moto's and LocalStack's tests that
# are verified against AWS
_TAG_RULES = {
    "object": (MAX_OBJECT_TAGS, "Object tags cannot be greater than 10",
               "Your TagKey cannot be prefixed with aws:"),
    "bucket": (MAX_BUCKET_TAGS, "Bucket tag count cannot be greater than 50",
               "System tags cannot be added/updated by requester"),
}
CONFIG_SHAPES["tags"] = {"*": str}
TAGS = (many("Tag", (need("Key", TEXT), need("Value", TEXT))),)
_TAGGING = (need("TagSet", TAGS),)


def parse_tagging(element, kind="object"):
    """The tags in a Tagging Element: {key: value}, in the keys' order.

    API_PutObjectTagging.html, API_PutBucketTagging.html; kind: `object` or
    `bucket`.  MalformedXML, InvalidTag or BadRequest.
    """
    return read_tags(read_document(element, _TAGGING)["TagSet"], kind)


def read_tags(value, kind):
    """The tags of a document of TAGS, as parse_tagging()."""
    return checked_tags([(tag["Key"], tag["Value"])
                         for tag in value.get("Tag", ())], kind)


def tag_facts(tags):
    """What a Context has of the tags that a request gives a bucket."""
    return {"aws:RequestTag": tags, "aws:TagKeys": list(tags)}


def tagging_children(tags):
    """The children of a Tagging document."""
    return [("TagSet", tag_children(tags))]


def tag_children(tags):
    """The elements of {key: value}."""
    return [("Tag", [("Key", key), ("Value", value)])
            for key, value in tags.items()]


def parse_tagging_header(text):
    """The tags in x-amz-tagging (API_PutObject.html), as parse_tagging().

    A key without `=` has the empty value, and the set is given back in the
    keys' order: s3-tests' test_put_obj_with_tags.
    """
    pairs = []
    for item in filter(None, text.split("&")):
        key, _, value = item.replace("+", " ").partition("=")
        if "=" in value or not key or re.search(
                r"%(?![0-9A-Fa-f]{2})", item):
            raise _tagging_header_error(text)
        try:
            pairs.append((uri_decode(key), uri_decode(value)))
        except S3Error:
            raise _tagging_header_error(text) from None
    if len({key for key, _ in pairs}) < len(pairs):
        raise _tagging_header_error(text)
    return checked_tags(pairs, "object")


def _tagging_header_error(text):
    """github.com/aws/aws-cli issue 2841."""
    return bad_argument(
        "The header 'x-amz-tagging' shall be encoded as UTF-8 then "
        "URLEncoded URL query parameters without tag name duplicates.",
        "x-amz-tagging", text)


def checked_tags(pairs, kind):
    """{key: value} of (key, value) pairs; InvalidTag or BadRequest."""
    most, too_many, reserved = _TAG_RULES[kind]
    if len(pairs) > most:
        raise S3Error("BadRequest", too_many)
    tags = {}
    for key, value in pairs:
        if key in tags:
            raise S3Error("InvalidTag", "Cannot provide multiple Tags with "
                          "the same key", TagKey=key)
        if key[:4].lower() == "aws:":
            raise S3Error("InvalidTag", reserved, TagKey=key)
        if not key or not _is_tag_text(key, MAX_TAG_KEY):
            raise S3Error("InvalidTag", "The TagKey you have provided is "
                          "invalid", TagKey=key)
        if not _is_tag_text(value, MAX_TAG_VALUE):
            raise S3Error("InvalidTag", "The TagValue you have provided is "
                          "invalid", TagKey=key, TagValue=value)
        tags[key] = value
    return dict(sorted(tags.items()))


def _is_tag_text(text, most):
    """True when `text` is short enough and of a tag's characters.

    Letters, numbers, separators and _.:/=+-@ (IAM API_Tag.html has the
    pattern; a combining mark is refused), counted in UTF-16.
    """
    return len(text.encode("utf-16-le", "surrogatepass")) <= 2 * most and all(
        char in "_.:/=+-@" or unicodedata.category(char)[0] in "LNZ"
        for char in text)


# --- buckets ---

@operation("GET", SERVICE, action="s3:ListAllMyBuckets")
def list_buckets(request):
    """API_ListBuckets: the buckets of the account that asks."""
    query, accounts = request.query, request.service.accounts
    prefix, after = query.get("prefix", ""), read_token(request)
    region = query.get("bucket-region")
    limit = parse_int("max-buckets", query.get("max-buckets")
                      or str(MAX_LIST_BUCKETS), 1, MAX_LIST_BUCKETS + 1)
    if limit > MAX_LIST_BUCKETS:
        raise S3Error("InvalidArgument", ArgumentName="max-buckets")
    found = [bucket for bucket in request.store.list_buckets()
             if bucket.name.startswith(prefix) and bucket.name > after
             and region in (None, bucket.region)
             and accounts.owner_id(bucket) == request.account.user_id]
    shown = found[:limit]
    token = make_token(shown[-1].name) if len(found) > limit else None
    return xml_document("ListAllMyBucketsResult", [
        owner_element(request, request.account.user_id),
        ("Buckets", [("Bucket", [
            ("Name", bucket.name),
            ("CreationDate", iso_date(bucket.created_ns // 1000000000)),
            ("BucketRegion", bucket.region),
            ("BucketArn", resource_arn(bucket.name))]) for bucket in shown]),
        ("ContinuationToken", token),
        ("Prefix", query.get("prefix"))])


@operation("PUT", BUCKET)
def create_bucket(request):
    """API_CreateBucket.  Making one's own bucket again is 200 in
    us-east-1 and BucketAlreadyOwnedByYou elsewhere, or with tags."""
    name = request.bucket_name
    if not valid_bucket_name(name):
        raise S3Error("InvalidBucketName", BucketName=name)
    asked = _asked_configuration(request)
    # first: a policy may compare it with patterns, however long it is
    region = _location_constraint(request, asked.get("LocationConstraint"))
    _authorize_create(request, asked)
    config = _new_bucket_config(request, asked)
    try:
        bucket = request.store.create_bucket(
            name, request.service.accounts.lasting_id(request.account),
            region, config)
    except S3Error as error:
        if error.code != "BucketAlreadyExists":
            raise
        try:
            bucket = request.store.bucket(name)
        except S3Error:                 # something else has that name
            raise error from None
        owner = request.service.accounts.owner_id(bucket)
        if owner != request.account.user_id:
            raise
        if bucket.region != "us-east-1" or asked.get("Tags"):
            raise S3Error("BucketAlreadyOwnedByYou",
                          BucketName=name) from None
    return {"Location": "/" + name, "x-amz-bucket-arn": resource_arn(name)}


_CREATE_BUCKET = (Field("LocationConstraint", TEXT), Field("Tags", TAGS))


def _asked_configuration(request):
    """What CreateBucket's document says: {tag: value}."""
    document = request.xml("CreateBucketConfiguration", required=False)
    if document is None:
        return {}
    for tag in ("Bucket", "Location"):
        if document.find(tag) is not None:
            raise S3Error("NotImplemented", "There are no directory buckets")
    asked = read_document(document, _CREATE_BUCKET)
    if "Tags" in asked:
        asked["Tags"] = read_tags(asked["Tags"], "bucket")
    return asked


def _new_bucket_config(request, asked):
    """What CreateBucket's headers say of ownership, ACL and object lock,
    and its document of tags, for bucket.json."""
    owner, config = request.account.user_id, {}
    if "Tags" in asked:
        config["tags"] = asked["Tags"]
    ownership = request.headers.get("x-amz-object-ownership")
    if ownership is not None:
        if ownership not in OWNERSHIPS:
            raise bad_argument("Invalid x-amz-object-ownership header: "
                               + ownership, "x-amz-object-ownership")
        config["ownership"] = ownership
    acl = headers_acl(request.headers, owner, request.service.accounts)
    if acl is not None:
        check_ownership(ownership or request.service.object_ownership, acl,
                        owner)
        config["acl"] = dump_acl(acl, owner)
    if request.flag("x-amz-bucket-object-lock-enabled"):
        config.update(versioning=ENABLED, object_lock={})
    return config


# Header of CreateBucket -> what it needs besides (API_CreateBucket.html,
# "Permissions")
_CREATE_ACTIONS = {
    "x-amz-acl": ("s3:PutBucketAcl",),
    "x-amz-bucket-object-lock-enabled": (
        "s3:PutBucketObjectLockConfiguration", "s3:PutBucketVersioning"),
    "x-amz-object-ownership": ("s3:PutBucketOwnershipControls",)}


def _authorize_create(request, asked):
    """Raise AccessDenied unless the caller may make the bucket.

    Any account may: it is a question of a session's policy only.
    """
    context = policy_context(request, None, facts=dict(
        tag_facts(asked.get("Tags", {})),
        **{"s3:LocationConstraint": asked.get("LocationConstraint")}))
    actions = {"s3:CreateBucket"}
    if "Tags" in asked:
        actions.add("s3:TagResource")
    for name in request.headers:
        actions.update(_CREATE_ACTIONS.get(
            "x-amz-acl" if name.startswith("x-amz-grant-") else name, ()))
    for action in actions:
        authorize(request.caller, action, resource_arn(request.bucket_name),
                  None, context)


def _location_constraint(request, asked):
    """The region of a new bucket: the one that is asked for, or here."""
    here = request.service.region
    region = {"EU": "eu-west-1", "": None}.get(asked, asked)
    if region is None:
        return here or "us-east-1"
    if not valid_region(region):
        raise S3Error("InvalidLocationConstraint",
                      LocationConstraint=region)
    if here is not None and region != here:
        raise S3Error("IllegalLocationConstraintException",
                      "The %s location constraint is incompatible for the "
                      "region specific endpoint this request was sent to."
                      % region)
    return region


@operation("HEAD", BUCKET, action="s3:ListBucket")
def head_bucket(request):
    """API_HeadBucket."""
    return {"x-amz-bucket-region": request.bucket.region,
            "x-amz-bucket-arn": resource_arn(request.bucket_name),
            "x-amz-access-point-alias": "false"}


@operation("DELETE", BUCKET, status=204)
def delete_bucket(request):
    """API_DeleteBucket: only an empty one; its uploads go with it, and
    its events are still delivered."""
    left, outbox = request.store.delete_bucket(
        request.bucket), request.service.outbox
    for webhook in outbox.webhooks if left else ():
        outbox.add(webhook, left)


@operation("GET", BUCKET, "location")
def get_bucket_location(request):
    """API_GetBucketLocation: empty stands for us-east-1."""
    region = request.bucket.region
    return xml_document("LocationConstraint",
                        "" if region == "us-east-1" else region)


# --- listings ---

@operation("GET", BUCKET, action="s3:ListBucket")
def list_objects(request):
    """API_ListObjects (version 1)."""
    query = request.query
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    marker, limit = query.get("marker", ""), page_size(request, "max-keys")
    encode, encoding = encode_type(request)
    page = request.store.list_objects(
        request.bucket, _shown, prefix, delimiter, marker, limit,
        _rolled_up(marker, prefix, delimiter))
    next_marker = None
    if page.truncated and delimiter:
        next_marker = encode(page.entries[-1].key)
    return _bucket_listing(request, [
        ("Name", request.bucket_name), ("Prefix", encode(prefix)),
        ("Marker", encode(marker)), ("NextMarker", next_marker),
        ("MaxKeys", limit), ("Delimiter", encode(delimiter) or None),
        ("EncodingType", encoding), ("IsTruncated", page.truncated)],
        page, encode)


def _rolled_up(marker, prefix, delimiter):
    """The common prefix that a marker lies in: it was given already."""
    if delimiter and marker.startswith(prefix):
        cut = marker.find(delimiter, len(prefix))
        if cut >= 0:
            return marker[:cut + len(delimiter)]
    return ""


@operation("GET", BUCKET, when="list-type", action="s3:ListBucket")
def list_objects_v2(request):
    """API_ListObjectsV2."""
    query = request.query
    if query["list-type"] != "2":
        raise S3Error("InvalidArgument", "Invalid List Type specified in "
                      "Request", ArgumentName="list-type")
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    start_after = query.get("start-after")
    limit = page_size(request, "max-keys")
    encode, encoding = encode_type(request)
    after = read_token(request)
    page = request.store.list_objects(
        request.bucket, _shown, prefix, delimiter,
        after or start_after or "", limit,
        _rolled_up(after, prefix, delimiter))
    owner = query.get("fetch-owner", "").lower() == "true"
    token = make_token(page.entries[-1].key) if page.truncated else None
    return _bucket_listing(request, [
        ("Name", request.bucket_name), ("Prefix", encode(prefix)),
        ("ContinuationToken", query.get("continuation-token")),
        ("NextContinuationToken", token),
        ("StartAfter", None if start_after is None
         else encode(start_after)),
        ("KeyCount", len(page.entries)), ("MaxKeys", limit),
        ("Delimiter", encode(delimiter) or None),
        ("EncodingType", encoding), ("IsTruncated", page.truncated)],
        page, encode, owner)


def _bucket_listing(request, head, page, encode, with_owner=True):
    return Response(200, {"Content-Type": "application/xml",
                          "x-amz-bucket-region": request.bucket.region},
                    _listing(request, "ListBucketResult", head, page, encode,
                             _contents, with_owner))


def _listing(request, root, head, page, encode, element, with_owner=True):
    """The document of a page: the children `head`, then its entries in one
    pass; element(entry, key as it is to stand there, owner_of) -> text.

    Nested pairs took 10 us a key, twice all the rest of a known one.
    """
    owner_of = _owner_texts(request) if with_owner else lambda user_id: ""
    parts = [xml_fragment(head)]
    keys = [entry.key for entry in page.entries]
    if not UNRESERVED.match("".join(keys)):     # else they stay as they are
        keys = [xml_escape(encode(key)) for key in keys]
    for entry, key in zip(page.entries, keys):
        if isinstance(entry, CommonPrefix):
            parts.append("<CommonPrefixes><Prefix>%s</Prefix>"
                         "</CommonPrefixes>" % key)
        else:
            parts.append(element(entry, key, owner_of))
    return xml_document(root, Markup("".join(parts)))


def _owner_texts(request):
    """owner_of(user id, or None for the bucket's) -> an object's Owner
    element."""
    access = request.access(request.bucket)

    @functools.lru_cache(maxsize=None)
    def owner_of(user_id):
        if access.ownership == ENFORCED or not user_id:
            user_id = access.owner_id
        return xml_fragment([owner_element(request, user_id)])
    return owner_of


def _shown(info):
    """(all that a listing shows of an object between its key and its owner,
    its own owner or None): depends on the Info only, so that it can be
    kept."""
    record, etag = info.record, info.etag
    checksums = record.get("checksums")
    return ("<LastModified>%s</LastModified><ETag>&quot;%s&quot;</ETag>"
            "<Size>%d</Size><StorageClass>%s</StorageClass>%s" % (
                iso_date(info.mtime),
                etag if etag.isalnum() else xml_escape(etag), info.size,
                xml_escape(record["class"]) if "class" in record
                else "STANDARD",
                _checksum_texts(tuple(checksums), record.get("checksum_type"))
                if checksums else "")), record.get("owner")


@functools.lru_cache(maxsize=64)
def _checksum_texts(names, kind):
    """What a listing shows of an object's checksums."""
    text = "".join("<ChecksumAlgorithm>%s</ChecksumAlgorithm>"
                   % xml_escape(name) for name in names)
    if kind is not None:
        text += "<ChecksumType>%s</ChecksumType>" % xml_escape(kind)
    return text


def _contents(listed, key, owner_of):
    """The element of a Listed whose `shown` _shown() made."""
    text, owner = listed.shown
    return "<Contents><Key>%s</Key>%s%s</Contents>" % (
        key, text, owner_of(owner))


def _version(info, key, owner_of):
    """The element of one version or delete marker."""
    tag, (text, owner) = "Version", _shown(info)
    if info.marker:
        tag, text = "DeleteMarker", text[:text.index("<ETag>")]
    return ("<%s><Key>%s</Key>%s<VersionId>%s</VersionId>"
            "<IsLatest>%s</IsLatest>%s</%s>" % (
                tag, key, text, xml_escape(info.version_id),
                "true" if info.latest else "false", owner_of(owner), tag))


@operation("GET", BUCKET, "versions", action="s3:ListBucketVersions")
def list_object_versions(request):
    """API_ListObjectVersions."""
    query = request.query
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    marker, version = query.get("key-marker", ""), query.get(
        "version-id-marker", "")
    limit = page_size(request, "max-keys")
    if version and not marker:
        raise bad_argument("A version-id marker cannot be specified without "
                           "a key marker.", "version-id-marker", version)
    encode, encoding = encode_type(request)
    page = request.store.list_versions(
        request.bucket, prefix, delimiter, marker, version, limit,
        _rolled_up(marker, prefix, delimiter))
    last = page.entries[-1] if page.truncated else None
    return _listing(request, "ListVersionsResult", [
        ("Name", request.bucket_name), ("Prefix", encode(prefix)),
        ("KeyMarker", encode(marker)), ("VersionIdMarker", version),
        ("NextKeyMarker", last and encode(last.key)),
        ("NextVersionIdMarker", last.version_id
         if isinstance(last, Info) else None),
        ("MaxKeys", limit), ("Delimiter", encode(delimiter) or None),
        ("EncodingType", encoding), ("IsTruncated", page.truncated)],
        page, encode, _version)


# --- objects: writing ---

def receive(body, draft, limit=MAX_PUT_BYTES):
    """Take a body into a draft; its MD5, and what else it was asked for,
    can be had afterwards.  EntityTooLarge beyond `limit` bytes."""
    body.want("MD5")
    if body.length is not None and body.length > limit:
        raise S3Error("EntityTooLarge", ProposedSize=body.length,
                      MaxSizeAllowed=limit)
    for block in body.blocks():
        if draft.size + len(block) > limit:
            raise S3Error("EntityTooLarge", MaxSizeAllowed=limit)
        draft.write(block)


def need_length(request):
    """A PUT that carries an object says how long it is."""
    headers = request.headers
    if "content-length" not in headers and not headers.get(
            "transfer-encoding"):
        raise S3Error("MissingContentLength")


def own_record(request, record):
    """Put the owner, the ACL and the lock of a new object into its record,
    as far as they are not those of its bucket."""
    access, headers = request.guard, request.headers
    if access.ownership != ENFORCED or names_acl(headers):
        owner, grants = new_object_acl(headers, request.caller, access,
                                       request.service.accounts)
        if owner != access.owner_id:
            record["owner"] = owner
        lines = dump_acl(grants, owner)
        if lines is not None:
            record["acl"] = lines
    lock = asked_lock(request)
    if lock:
        record["lock"] = lock


def body_checksums(body, record):
    """Put a body's digests into a record."""
    record["etag"] = body.digest("MD5").hex()
    if body.checksum:
        digest = base64.b64encode(body.digest(body.checksum)).decode()
        record["checksums"] = {body.checksum: digest}
        record["checksum_type"] = "FULL_OBJECT"


def checksum_headers(record):
    """The headers that tell an object's checksums."""
    headers = {"x-amz-checksum-" + name.lower(): value
               for name, value in record.get("checksums", {}).items()}
    if headers and record.get("checksum_type"):
        headers["x-amz-checksum-type"] = record["checksum_type"]
    return headers


def checksum_children(record):
    """The same as children of a document."""
    children = [("Checksum" + name, value)
                for name, value in record.get("checksums", {}).items()]
    if children and record.get("checksum_type"):
        children.append(("ChecksumType", record["checksum_type"]))
    return children


@operation("PUT", OBJECT)
def put_object(request):
    """API_PutObject."""
    if "partNumber" in request.query:
        raise S3Error("InvalidArgument", "This operation does not accept "
                      "partNumber without uploadId",
                      ArgumentName="partNumber")
    request.allow_write(request.key)
    need_length(request)
    record = object_record(request.headers)
    own_record(request, record)
    if "lock" in record:
        need_digest(request, "Content-MD5 OR x-amz-checksum- HTTP header is "
                    "required for Put Object requests with Object Lock "
                    "parameters")
    conditions = write_conditions(request.headers)
    bucket, key = request.bucket, request.key
    if conditions != ALWAYS:
        conditions.check(bucket.find(key), key)     # before the body comes
    encryption = asked_encryption(request)
    with bucket.draft() as draft:
        target = content_draft(draft, encryption)
        receive(request.body, target)
        body_checksums(request.body, record)
        seal_content(request, encryption, target, record)
        give_lock(request, record)
        info = request.store.put_object(bucket, key, draft, record,
                                        conditions,
                                        note_created(request, "Put"))
    headers, config = {"ETag": quoted(info.etag)}, request.config
    if "checksums" in record:
        headers.update(checksum_headers(record))
    if "versioning" in config:
        headers.update(version_header(request, info))
    if encryption:
        headers.update(encryption_headers(encryption, True))
    if "lifecycle" in config:
        headers.update(expiration_headers(request, info))
    return headers


@operation("PUT", OBJECT, when="x-amz-copy-source", action="s3:PutObject")
def copy_object(request):
    """API_CopyObject: in the kernel when the ETag is known already."""
    request.allow_write(request.key)
    conditions, key = write_conditions(request.headers), request.key
    encryption, source = asked_encryption(request), open_copy_source(request)
    with source, request.bucket.draft() as draft:
        if conditions != ALWAYS:
            conditions.check(request.bucket.find(key), key)
        record = _copied_record(request, source)
        own_record(request, record)
        target = content_draft(draft, encryption)
        _copy_content(request, source, target, record)
        seal_content(request, encryption, target, record)
        give_lock(request, record)
        info = request.store.put_object(request.bucket, key, draft, record,
                                        conditions,
                                        note_created(request, "Copy"))
    headers = {"Content-Type": "application/xml"}
    if request.bucket.versioning:       # "null" while they are suspended
        headers["x-amz-version-id"] = info.version_id
    headers.update(encryption_headers(encryption, True))
    headers.update(expiration_headers(request, info))
    headers.update(source.headers)
    return Response(200, headers, xml_document("CopyObjectResult", [
        ("LastModified", iso_date(info.mtime)),
        ("ETag", quoted(info.etag))] + checksum_children(record)))


# What access logs call the reading of the source
COPY_READS = {"CopyObject": "REST.COPY.OBJECT_GET",
              "UploadPartCopy": "REST.COPY.PART_GET"}


class CopySource(NamedTuple):
    """An open object to copy from.  key: its data key, if it has one."""
    info: Info
    fd: int
    key: Optional[bytes]
    same: bool                      # it is the target, too
    headers: Dict[str, str]         # which version it is

    def __enter__(self):
        return self

    def __exit__(self, *_):
        close_fd(self.fd)


def open_copy_source(request):
    """The CopySource of x-amz-copy-source, its conditions checked."""
    name, key, version = parse_copy_source(
        request.headers.get("x-amz-copy-source", ""))
    bucket = request.find_bucket(name,
                                 "x-amz-source-expected-bucket-owner")
    request.allow_object("s3:GetObject", key, version, bucket)
    info, fd = bucket.open_version(key, checked_version(version))
    try:
        if info.marker:
            raise S3Error("InvalidRequest", "The source of a copy request "
                          "may not specifically refer to a delete marker by "
                          "version id.") if version else S3Error(
                              "NoSuchKey", Key=key)
        check_read_conditions(request.headers, info.etag, info.mtime,
                              request.now, "x-amz-copy-source-")
        data = data_key(request, info, COPY_CUSTOMER)
        headers = {"x-amz-copy-source-version-id": info.version_id} \
            if bucket.versioning else {}
    except BaseException:
        close_fd(fd)
        raise
    request.note(COPY_READS[request.operation.name], bucket, key, version,
                 200, None, info.size)
    return CopySource(info, fd, data, info.latest and (name, key) == (
        request.bucket_name, request.key), headers)


# What a copy of an object to itself may name, were it as before
_COPY_CHANGES = frozenset(("x-amz-storage-class", "x-amz-checksum-algorithm"))


def _copied_record(request, source):
    """The record of a copy, by x-amz-metadata-directive."""
    headers = request.headers
    directive = headers.get("x-amz-metadata-directive", "COPY")
    if directive not in ("COPY", "REPLACE"):
        raise S3Error("InvalidArgument", "Unknown metadata directive.",
                      ArgumentName="x-amz-metadata-directive",
                      ArgumentValue=directive)
    record = object_record(headers)
    _copy_tags(headers, source.info.record, record)
    if source.info.size > MAX_PUT_BYTES:
        raise S3Error("InvalidRequest", "The specified copy source is larger "
                      "than the maximum allowable size for a copy source: "
                      "%d" % MAX_PUT_BYTES)
    if directive == "REPLACE":
        return record
    known = source.info.record
    redirect = record["headers"].get("x-amz-website-redirect-location")
    if source.same and not redirect and not names_encryption(headers) \
            and _COPY_CHANGES.isdisjoint(headers) \
            and bucket_encryption(request) is None:
        raise S3Error("InvalidRequest", "This copy request is illegal "
                      "because it is trying to copy an object to itself "
                      "without changing the object's metadata, storage "
                      "class, website redirect location or encryption "
                      "attributes.")
    kept = dict(known["headers"] if "headers" in known else {
        "Content-Type": guess_type(source.info.key)})
    kept.pop("x-amz-website-redirect-location", None)
    if redirect:
        kept["x-amz-website-redirect-location"] = redirect
    record["headers"] = kept
    record["meta"] = known.get("meta", {})
    return record


def _copy_tags(headers, known, record):
    """The tags of a copy, by x-amz-tagging-directive."""
    directive = headers.get("x-amz-tagging-directive", "COPY")
    if directive not in ("COPY", "REPLACE"):
        raise S3Error("InvalidArgument", "Unknown tagging directive.",
                      ArgumentName="x-amz-tagging-directive",
                      ArgumentValue=directive)
    if directive == "COPY":
        record.pop("tags", None)
        if "tags" in known:
            record["tags"] = known["tags"]


def _copy_content(request, source, draft, record):
    """The source's bytes, ETag and checksums into a draft and record.

    Bytes are read only to encrypt or decrypt them, or when a digest is
    wanted that nobody knows: the MD5 of a file put there by hand or of a
    multipart object, or another checksum than the one it has.
    """
    info, known = source.info, source.info.record
    wanted = request.headers.get("x-amz-checksum-algorithm")
    wanted = wanted and checksum_algorithm(wanted)
    checksums = known.get("checksums", {})
    if known.get("checksum_type") == "COMPOSITE":
        wanted = wanted or next(filter(DIGESTS.get, checksums), None)
        checksums = {}
    if wanted and wanted not in checksums:
        checksums = {}
    is_md5 = "etag" in known and "-" not in info.etag \
        and known.get("sse", {}).get("algorithm") in (None, SSE_S3)
    names = [] if is_md5 else ["MD5"]
    if wanted and not checksums:
        names.append(wanted)
    digests = copy_bytes(source, draft, 0, info.size, names)
    record["etag"] = digests["MD5"].hex() if "MD5" in names else info.etag
    if wanted in digests:
        digest = base64.b64encode(digests[wanted]).decode()
        checksums = {wanted: digest}
    if checksums:
        record["checksums"] = checksums
        record["checksum_type"] = "FULL_OBJECT"


def copy_bytes(source, draft, offset, length, names):
    """Copy a range into a Draft or SealedDraft; algorithm -> digest for
    `names`."""
    if not names and source.key is None and isinstance(draft, Draft):
        draft.copy(source.fd, offset, length)
        return {}
    hashes = {name: DIGESTS[name].new() for name in names}
    for block in opened_blocks(source.info, source.fd, source.key, offset,
                               offset + length):
        for digest in hashes.values():
            digest.update(block)
        draft.write(block)
    return {name: digest.digest() for name, digest in hashes.items()}


@operation("PUT", OBJECT, "renameObject", action="s3:PutObject")
def rename_object(request):
    """API_RenameObject, here in any bucket: one atomic rename."""
    headers = request.headers
    source = headers.get("x-amz-rename-source")
    if not source:
        raise S3Error("InvalidArgument", "x-amz-rename-source is missing",
                      ArgumentName="x-amz-rename-source")
    source = uri_decode(source)
    prefix = "/%s/" % request.bucket_name
    if source.startswith(prefix):
        source = source[len(prefix):]
    elif source.startswith(prefix[1:]):
        source = source[len(prefix) - 1:]
    else:
        source = source[source.startswith("/"):]
    source = checked_key(source)
    if source == request.key or not source:
        raise S3Error("InvalidRequest", "The source and the destination of "
                      "a rename must be two keys")

    request.allow_write(request.key)
    for action in ("s3:GetObject", "s3:DeleteObject"):
        request.allow_object(action, source)

    def check(info):
        check_read_conditions(headers, info.etag, info.mtime, request.now,
                              "x-amz-rename-source-")
    request.store.rename_object(request.bucket, source, request.key, check,
                                write_conditions(headers),
                                note_renamed(request, source))


@operation("DELETE", OBJECT, status=204)
def delete_object(request):
    """API_DeleteObject; deleting what is not there succeeds."""
    headers = request.headers
    conditions = delete_conditions(
        headers.get("if-match"), headers.get("x-amz-if-match-size"),
        headers.get("x-amz-if-match-last-modified-time"))
    version_id = asked_version(request)
    removed = request.store.delete_object(
        request.bucket, request.key, conditions, version_id,
        lock_guard(request, request.key),
        note_removed(request, request.key, version_id))
    if request.setting("versioning") is None:
        return {}
    answer = {"x-amz-version-id": removed.version_id}
    if removed.marker:
        answer["x-amz-delete-marker"] = "true"
    return answer


BATCH_DELETE = "BATCH.DELETE.OBJECT"    # in access logs


@operation("POST", BUCKET, "delete", action="s3:DeleteObject")
def delete_objects(request):
    """API_DeleteObjects: up to 1,000 keys, each with its own result."""
    need_digest(request)
    document = request.xml("Delete")
    objects = document.findall("Object")
    if not 1 <= len(objects) <= MAX_DELETE_KEYS:
        raise S3Error("MalformedXML")
    quiet = xml_text(document, "Quiet", "").lower() == "true"
    children, request.contexts = [], {}
    for element in objects:
        key = element.findtext("Key") or ""
        version = xml_text(element, "VersionId")
        try:
            removed = _delete_one(request, element, key, version)
            request.note(BATCH_DELETE, request.bucket, key, version, 204)
        except S3Error as error:
            request.note(BATCH_DELETE, request.bucket, key, version,
                         error.status, error.code)
            children.append(("Error", [
                ("Key", key), ("VersionId", version),
                ("Code", error.code), ("Message", error.message)]))
            continue
        if not quiet:
            children.append(("Deleted", [
                ("Key", key), ("VersionId", version),
                ("DeleteMarker", removed.marker or None),
                ("DeleteMarkerVersionId", removed.version_id
                 if removed.marker else None)]))
    return xml_document("DeleteResult", children)


def _delete_one(request, element, key, version):
    """Delete what one Object element names; what was Removed."""
    if not key:
        raise S3Error("MalformedXML")
    if version is not None and not valid_version_id(version):
        raise S3Error("NoSuchVersion")
    request.allow_object("s3:DeleteObject", checked_key(key), version)
    conditions = delete_conditions(
        xml_text(element, "ETag"), xml_text(element, "Size"),
        xml_text(element, "LastModifiedTime"))
    try:
        return request.store.delete_object(
            request.bucket, key, conditions, version,
            lock_guard(request, key), note_removed(request, key, version))
    except OSError as error:
        failure = storage_error(error)
        request.store.report("%s %s: %s" % (request.request_id, failure,
                                            error))
        raise failure from error


# --- objects: POST uploads ---

# The fields that say what a PUT's headers say, API/RESTObjectPOST.html
_FORM_HEADERS = frozenset((
    "cache-control", "content-type", "content-disposition",
    "content-encoding", "content-language", "content-md5", "expires",
    "x-amz-storage-class", "x-amz-website-redirect-location",
    "x-amz-expected-bucket-owner", "x-amz-request-payer"))
_FORM_HEADER_PREFIXES = (
    "x-amz-meta-", "x-amz-checksum-", "x-amz-grant-", "x-amz-object-lock-",
    "x-amz-server-side-encryption")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_POST_STATUSES = {"200": 200, "201": 201}


class PostUpload(NamedTuple):
    """What a form asks for.

    headers: those of a PUT of the same, by lower-case name, in the text
    that the wire would have given.  reader: the file's content, its size
    under the policy's eye.  redirect: a URL or None; it goes before status.
    """
    identity: Identity
    key: str
    headers: Dict[str, str]
    reader: Any
    status: int
    redirect: Optional[str]


def open_post(source, content_type, bucket, accounts, now, region=None):
    """The PostUpload that a form-data body asks for, read up to its file.

    bucket: the name in the target.  accounts, now, region: as for
    authenticate().  Everything about the form has been checked, and the
    policy has been met as far as the size of the file is not concerned;
    what the identity may do has not.
    """
    form = read_form(source, form_boundary(content_type))
    if "key" not in form.fields:
        raise missing_field("key")
    identity = authenticate_form(form.fields, accounts, now, region)
    fields, reader = expand_filename(form), form.file
    if identity.account is not None:
        policy = parse_post_policy(form.fields["policy"])
        policy.check(fields, form.names, bucket, now)
        reader = SizedReader(reader, *policy.size_range())
    if not fields["key"]:
        raise S3Error("InvalidArgument", "User key must have a length "
                      "greater than 0.", ArgumentName="key",
                      ArgumentValue="")
    return PostUpload(
        identity, checked_key(fields["key"]), form_headers(fields), reader,
        _POST_STATUSES.get(fields.get("success_action_status"), 204),
        form_redirect(fields))


def expand_filename(form):
    """The fields of a Form with `${filename}` replaced by the file's name,
    any path before it dropped.

    API/sigv4-HTTPPOSTForms.html; but left as it is when the file part has
    no filename, as S3 does (LocalStack, test_post_object_with_file_as_
    string).
    """
    if form.filename is None:
        return dict(form.fields)
    name = re.split(r"[/\\]", form.filename)[-1]
    return {field: value if field == "policy"
            else value.replace("${filename}", name)
            for field, value in form.fields.items()}


def form_headers(fields):
    """The headers of the PUT that the fields describe.

    The tags come as `x-amz-tagging`, the acl as `x-amz-acl`.  A control
    character is InvalidArgument, but in user metadata: what is kept here
    is sent as a header later.
    """
    headers = {}
    for name, value in fields.items():
        if name.startswith("x-amz-meta-"):
            if not _HEADER_NAME.match(name):
                raise _bad_field(name, value)
            headers[name] = _to_wire(value.strip())
        elif value and (name in _FORM_HEADERS
                        or name.startswith(_FORM_HEADER_PREFIXES)):
            value = value.strip()
            if _CONTROL.search(value):
                raise _bad_field(name, value)
            headers[name] = _to_wire(value)
    if fields.get("acl"):
        headers["x-amz-acl"] = _to_wire(fields["acl"].strip())
    if fields.get("tagging"):
        headers["x-amz-tagging"] = form_tags(fields["tagging"])
    algorithm = headers.get("x-amz-checksum-algorithm")
    if algorithm and "x-amz-checksum-" + algorithm.lower() not in headers:
        raise S3Error("InvalidRequest", "x-amz-checksum-algorithm specified, "
                      "but no corresponding x-amz-checksum-* field was "
                      "found.")
    return headers


def _bad_field(name, value):
    return S3Error("InvalidArgument", "A form field cannot be a header",
                   ArgumentName=name, ArgumentValue=value)


def _to_wire(text):
    """Text as a header block decoded it: UTF-8 bytes, read as latin-1."""
    return text.encode("utf-8").decode("latin-1")


def form_tags(text):
    """The x-amz-tagging header for a Tagging document; MalformedXML when
    it is not well-formed, "" for one without tags, as S3 has it."""
    tags = parse_xml(text.encode("utf-8")).iterfind("TagSet/Tag")
    return urllib.parse.urlencode([
        (tag.findtext("Key", ""), tag.findtext("Value", ""))
        for tag in tags])


def form_redirect(fields):
    """The URL of success_action_redirect, or of `redirect`, its old name.

    "If Amazon S3 cannot interpret the URL, it acts as if the field is not
    present": an absolute http or https URL is understood.
    """
    for name in ("success_action_redirect", "redirect"):
        url = fields.get(name, "")
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme in ("http", "https") and parts.hostname \
                    and not _CONTROL.search(url):
                return url
        except ValueError:
            pass
    return None


def redirect_url(url, bucket, key, etag):
    """A redirect with the upload's bucket, key and quoted ETag, after the
    query that it has (layervault/layervault_ruby_client issue 8)."""
    url, mark, fragment = url.partition("#")
    query = urllib.parse.urlencode(
        [("bucket", bucket), ("key", key), ("etag", etag)])
    return url + ("&" if "?" in url else "?") + query + mark + fragment


def post_response(upload, bucket, etag, location, headers=()):
    """The Response to a form whose object has been stored.

    etag: bare.  location: the object's URL.  headers: further ones
    (checksums, version, encryption).  PostResponse has no xmlns; API/
    RESTObjectPOST.html.
    """
    etag, body = quoted(etag), b""
    headers = dict(headers, ETag=etag, Location=location)
    status = 303 if upload.redirect else upload.status
    if status == 303:
        headers["Location"] = _to_wire(
            redirect_url(upload.redirect, bucket, upload.key, etag))
    elif status == 201:
        headers["Content-Type"] = "application/xml"
        body = xml_document("PostResponse", [
            ("Location", location), ("Bucket", bucket), ("Key", upload.key),
            ("ETag", etag)], xmlns=None)
    return Response(status, headers, body)


# Of the form's own request: what a policy's conditions may ask
_FORM_REQUEST_HEADERS = ("host", "user-agent", "referer", "origin")


@operation("POST", BUCKET)
def post_object(request):
    """API/RESTObjectPOST: a browser's form, its signature in its fields.

    The file goes to the disk as it comes; the fields stand for headers.
    """
    accounts = request.service.accounts
    upload = open_post(request.frame, request.headers.get(
        "content-type", ""), request.bucket_name, accounts.by_key_id,
        request.now, request.service.region)
    request.identity, request.key = upload.identity, upload.key
    request.caller = account_caller(upload.identity.account)
    headers = {name: request.headers[name] for name in _FORM_REQUEST_HEADERS
               if name in request.headers}
    headers.update(upload.headers)
    request.headers = headers
    request.enter(request.find_bucket(request.bucket_name))
    _check_payer(request)
    check_undone(headers)
    request.allow_write(upload.key)
    record = object_record(headers)
    own_record(request, record)
    encryption = asked_encryption(request)
    request.body = body = Body(upload.reader, None,
                               *body_claims(headers, UNSIGNED))
    with request.bucket.draft() as draft:
        target = content_draft(draft, encryption)
        receive(body, target)
        body_checksums(body, record)
        seal_content(request, encryption, target, record)
        give_lock(request, record)
        info = request.store.put_object(request.bucket, upload.key, draft,
                                        record, ALWAYS,
                                        note_created(request, "Post"))
    answer_headers = checksum_headers(record)
    answer_headers.update(version_header(request, info))
    answer_headers.update(encryption_headers(encryption, True))
    return post_response(upload, request.bucket_name, info.etag,
                         object_url(request, upload.key), answer_headers)


# --- objects: reading ---

@operation("GET", OBJECT)
def get_object(request):
    """API_GetObject."""
    info, fd = open_asked(request)
    try:
        response = object_response(request, info)
        if "sse" in info.record:
            response.blocks = _checked_blocks(request, info, fd, response)
    except BaseException:
        close_fd(fd)
        raise
    response.file = fd
    return response


def _checked_blocks(request, info, fd, response):
    """The blocks of an encrypted object; the first has been opened, so
    that what is damaged at once is an error and no broken answer."""
    start = response.offset
    blocks = opened_blocks(info, fd, data_key(request, info), start,
                           start + response.length)
    return itertools.chain([next(blocks, b"")], blocks)


@operation("HEAD", OBJECT, action="s3:GetObject")
def head_object(request):
    """API_HeadObject: GetObject's answer without its body."""
    return object_response(request, find_asked(request))


def object_response(request, info):
    """The Response to GET and HEAD, but for the file."""
    headers, config = object_headers(info), request.config
    if "versioning" in config:
        headers.update(version_header(request, info))
    if "lock" in info.record:
        headers.update(shown_lock(request, info.record["lock"]))
    headers.update(shown_encryption(request, info))
    if "lifecycle" in config and "versionId" not in request.query:
        headers.update(expiration_headers(request, info))
    request_headers = request.headers
    if not CONDITIONS.isdisjoint(request_headers):
        _check_conditions(request, info, headers)
    status, start, stop = 200, 0, info.size
    part = request.query.get("partNumber")
    span = None
    if part is not None:
        span = _part_range(request, info, part, headers)
    elif "range" in request_headers and _range_holds(request, info):
        span = parse_range(request_headers["range"], info.size)
    if span:
        start, stop = span
        if start < stop:                # an empty part has no range
            status = 206
            headers["Content-Range"] = "bytes %d-%d/%d" % (
                start, stop - 1, info.size)
    if part is None and stop - start == info.size \
            and "x-amz-checksum-mode" in request_headers:
        headers.update(checksum_headers(info.record))
    if request.pairs:
        _override_headers(request, headers)
    response = Response(status, headers, b"", stop - start)
    response.offset = start
    return response


def _check_conditions(request, info, headers):
    """Raise unless the conditions of a read hold; headers: its answer's,
    of which a 304 has some."""
    try:
        check_read_conditions(request.headers, info.etag, info.mtime,
                              request.now)
    except S3Error as error:
        if error.code == "NotModified":
            error.headers.update(
                (name, headers[name]) for name in (
                    "ETag", "Last-Modified", "Cache-Control", "Expires")
                if name in headers)
        raise


def object_headers(info):
    """The headers that tell what an object is."""
    record = info.record
    headers = {"Last-Modified": http_date(info.mtime),
               "ETag": '"%s"' % info.etag, "Accept-Ranges": "bytes"}
    kept = record.get("headers")
    if kept is None:
        headers["Content-Type"] = guess_type(info.key)
    else:
        headers["Content-Type"] = "binary/octet-stream"
        headers.update(kept)
    if "meta" in record:
        for name, value in record["meta"].items():
            headers["x-amz-meta-" + name] = metadata_header(value)
    if "class" in record:
        headers["x-amz-storage-class"] = record["class"]
    if record.get("tags"):
        headers["x-amz-tagging-count"] = str(len(record["tags"]))
    return headers


@functools.lru_cache(maxsize=None)
def _known_types():
    """The built-in table alone: the same answer on every machine.  Made at
    the first use: it reads the machine's own as well, which takes 3 ms."""
    return mimetypes.MimeTypes()


def guess_type(key):
    """The content type of a file that was put there by hand."""
    name, encoding = _known_types().guess_type("/" + key.rpartition("/")[2])
    if name is None or encoding:
        return "binary/octet-stream"
    return name


def _range_holds(request, info):
    """If-Range, RFC 9110 section 13.1.5."""
    value = request.headers.get("if-range")
    if value is None:
        return True
    if value.startswith('"'):
        return value.strip('"') == info.etag
    return parse_http_date(value) == info.mtime


def _are_parts_summed(record):
    """True when the parts have their checksums, of which the whole's is
    made."""
    return record.get("checksum_type") == "COMPOSITE" and bool(
        record.get("checksums") and record.get("part_checksums"))


def _part_range(request, info, text, headers):
    """The range of one part, its headers set.

    parts are kept as runs: [[size, count], ...].
    """
    if "range" in request.headers:
        raise S3Error("InvalidRequest", "Cannot specify both Range header "
                      "and partNumber query parameter")
    number = parse_int("partNumber", text, 1, MAX_PART_NUMBER + 1)
    if number > MAX_PART_NUMBER:
        raise S3Error("InvalidArgument", "Part number must be an integer "
                      "between 1 and 10000, inclusive",
                      ArgumentName="partNumber", ArgumentValue=text)
    runs = info.record.get("parts")
    sizes = [info.size] if runs is None else [
        size for size, count in runs for _ in range(count)]
    if number > len(sizes):
        raise S3Error("InvalidPartNumber", PartNumberRequested=number,
                      ActualPartCount=len(sizes))
    start = sum(sizes[:number - 1])
    if "x-amz-checksum-mode" in request.headers:
        told = checksum_headers(info.record)
        if runs is None:
            headers.update(told)
        elif _are_parts_summed(info.record):
            checksum = info.record["part_checksums"][number - 1]
            told[next(iter(told))] = checksum   # the algorithm comes first
            headers.update(told)
    if runs is not None:
        headers["x-amz-mp-parts-count"] = str(len(sizes))
    return start, start + sizes[number - 1]


_OVERRIDES = {"response-" + name.lower(): name for name in (
    "Content-Type", "Content-Language", "Expires", "Cache-Control",
    "Content-Disposition", "Content-Encoding")}


def _override_headers(request, headers):
    """The response-* parameters, for signed requests only."""
    for parameter, name in _OVERRIDES.items():
        value = request.query.get(parameter)
        if value is None:
            continue
        if request.account is None:
            raise S3Error("InvalidRequest", "Request specific response "
                          "headers cannot be used for anonymous GET "
                          "requests.")
        if not value.isprintable():
            raise S3Error("InvalidArgument", ArgumentName=parameter,
                          ArgumentValue=value)
        headers[name] = value.encode("utf-8").decode("latin-1")


@operation("GET", OBJECT, "attributes")
def get_object_attributes(request):
    """API_GetObjectAttributes: who may not read learns nothing by it."""
    request.allow_object("s3:GetObject", request.key, asked_version(request))
    names = {name.strip() for name in request.headers.get(
        "x-amz-object-attributes", "").split(",")} - {""}
    known = {"ETag", "Checksum", "ObjectParts", "StorageClass", "ObjectSize"}
    if not names:
        raise S3Error("InvalidRequest", "The x-amz-object-attributes header "
                      "specifying the attributes to be retrieved is either "
                      "missing or empty")
    if names - known:
        raise S3Error("InvalidArgument", "Invalid attribute name specified.",
                      ArgumentName="x-amz-object-attributes")
    check_read_headers(request.headers)
    info = find_asked(request)
    check_read_conditions(request.headers, info.etag, info.mtime,
                          request.now)
    data_key(request, info)             # or it is a customer's secret
    record = info.record
    values = [("ETag", info.etag),
              ("Checksum", [(name, value.partition("-")[0]) for name, value
                            in checksum_children(record)] or None),
              ("ObjectParts", _object_parts(request, record)
               if "ObjectParts" in names else None),
              ("StorageClass", record.get("class", "STANDARD")),
              ("ObjectSize", info.size)]
    body = xml_document("GetObjectAttributesResponse", [
        value for value in values if value[0] in names])
    headers = {"Content-Type": "application/xml",
               "Last-Modified": http_date(info.mtime)}
    headers.update(version_header(request, info))
    return Response(200, headers, body)


def _object_parts(request, record):
    """The ObjectParts children; None unless it came in parts.  The parts
    themselves are told where each has its checksum, as S3 has it."""
    runs = record.get("parts")
    if runs is None:
        return None
    sizes = [size for size, count in runs for _ in range(count)]
    marker = parse_int("x-amz-part-number-marker", request.headers.get(
        "x-amz-part-number-marker") or "0", 0)
    limit = parse_int("x-amz-max-parts", request.headers.get(
        "x-amz-max-parts") or "1000", 0, 1000)
    if not _are_parts_summed(record):
        return [("PartsCount", len(sizes))]
    name, checksums = next(iter(record["checksums"])), record["part_checksums"]
    numbers = range(marker + 1, len(sizes) + 1)[:limit]
    more = bool(numbers) and numbers[-1] < len(sizes)
    children = [("PartsCount", len(sizes)), ("PartNumberMarker", marker),
                ("NextPartNumberMarker", numbers[-1] if numbers else 0),
                ("MaxParts", limit), ("IsTruncated", more)]
    return children + [("Part", [
        ("PartNumber", number), ("Size", sizes[number - 1]),
        ("Checksum" + name, checksums[number - 1])]) for number in numbers]


# --- multipart uploads ---

# Which checksum types an algorithm can have, the default first:
# userguide/checking-object-integrity.html
def checksum_types(name):
    """The checksum types of an algorithm, the default first."""
    if name == "CRC64NVME":
        return ("FULL_OBJECT",)
    if DIGESTS[name].crc:
        return ("COMPOSITE", "FULL_OBJECT")
    return ("COMPOSITE",)


@operation("POST", OBJECT, "uploads", action="s3:PutObject")
def create_multipart_upload(request):
    """API_CreateMultipartUpload."""
    request.allow_write(request.key)
    record = object_record(request.headers)
    own_record(request, record)
    record["initiator"] = request.account and \
        request.service.accounts.lasting_id(request.account)
    name = request.headers.get("x-amz-checksum-algorithm")
    kind = request.headers.get("x-amz-checksum-type")
    headers = {"Content-Type": "application/xml"}
    if kind and not name:
        raise S3Error("InvalidRequest", "The x-amz-checksum-type header can "
                      "only be used with the x-amz-checksum-algorithm "
                      "header.")
    if name:
        name = checksum_algorithm(name)
        kind = kind or checksum_types(name)[0]
        if kind not in checksum_types(name):
            raise S3Error("InvalidRequest", "The %s checksum type cannot be "
                          "used with the %s checksum algorithm."
                          % (kind, name.lower()))
        record["algorithm"], record["checksum_type"] = name, kind
        headers["x-amz-checksum-algorithm"] = name
        headers["x-amz-checksum-type"] = kind
    encryption = asked_encryption(request)
    upload_envelope(request, encryption, record)
    headers.update(encryption_headers(encryption, True))
    headers.update(upload_abort_headers(request, request.key,
                                        int(request.now * 1e9)))
    upload_id = request.store.create_upload(request.bucket, request.key,
                                            record)
    return Response(200, headers, xml_document(
        "InitiateMultipartUploadResult", [
            ("Bucket", request.bucket_name), ("Key", request.key),
            ("UploadId", upload_id)]))


def requested_upload(request, action=None):
    """The Upload that uploadId names; action: what is to be allowed to
    its initiator, too."""
    try:
        upload = request.store.upload(request.bucket, request.key,
                                      request.query["uploadId"])
    except S3Error:
        if action:
            request.allow(action, request.key)
        raise
    if action:
        request.allow(action, request.key,
                      owner=upload.record.get("initiator"))
    return upload


def requested_part(request):
    """The part number of a request."""
    text = request.query.get("partNumber")
    if text is None or not re.match(r"\d{1,5}\Z", text, re.ASCII) \
            or not 1 <= int(text) <= MAX_PART_NUMBER:
        raise S3Error("InvalidArgument", "Part number must be an integer "
                      "between 1 and 10000, inclusive",
                      ArgumentName="partNumber", ArgumentValue=text or "")
    return int(text)


@operation("PUT", OBJECT, "uploadId", action="s3:PutObject")
def upload_part(request):
    """API_UploadPart."""
    number, upload = requested_part(request), requested_upload(request)
    need_length(request)
    body, algorithm = request.body, upload.record.get("algorithm")
    # of FULL_OBJECT the parts may come without: S3 computes theirs
    if algorithm and body.checksum != algorithm and (
            body.checksum
            or upload.record.get("checksum_type") == "COMPOSITE"):
        raise S3Error("InvalidRequest", "Checksum Type mismatch occurred, "
                      "expected checksum Type: %s, actual checksum Type: %s"
                      % (algorithm.lower(), (body.checksum or "null").lower()))
    body.checksum = body.checksum or algorithm
    body.want(body.checksum)
    record = {}
    with request.store.part_draft(upload) as draft:
        target = part_draft(request, upload, draft)
        receive(body, target)
        body_checksums(body, record)
        seal_part(upload, target, record)
        request.store.put_part(upload, number, draft, record)
    headers = {"ETag": quoted(record["etag"])}
    headers.update(checksum_headers(record))
    headers.update(upload_encryption(request, upload))
    headers.pop("x-amz-checksum-type", None)
    return headers


@operation("PUT", OBJECT, "uploadId", when="x-amz-copy-source",
           action="s3:PutObject")
def upload_part_copy(request):
    """API_UploadPartCopy."""
    number, upload = requested_part(request), requested_upload(request)
    algorithm = upload.record.get("algorithm")
    with open_copy_source(request) as source, \
            request.store.part_draft(upload) as draft:
        start, stop = _copy_range_asked(request, source.info.size)
        if stop - start > MAX_PUT_BYTES:
            raise S3Error("EntityTooLarge", MaxSizeAllowed=MAX_PUT_BYTES)
        names = ["MD5", algorithm] if algorithm else ["MD5"]
        target = part_draft(request, upload, draft)
        digests = copy_bytes(source, target, start, stop - start, names)
        record = {"etag": digests["MD5"].hex()}
        if algorithm:
            digest = base64.b64encode(digests[algorithm]).decode()
            record["checksums"] = {algorithm: digest}
        seal_part(upload, target, record)
        request.store.put_part(upload, number, draft, record)
    headers = {"Content-Type": "application/xml"}
    headers.update(source.headers)
    headers.update(upload_encryption(request, upload))
    return Response(200, headers, xml_document("CopyPartResult", [
        ("LastModified", iso_date(record["mtime_ns"] // 1000000000)),
        ("ETag", quoted(record["etag"]))] + checksum_children(record)))


def _copy_range_asked(request, size):
    """The (start, stop) of x-amz-copy-source-range, which is strict."""
    text = request.headers.get("x-amz-copy-source-range")
    if text is None:
        return 0, size
    match = re.match(r"bytes=(\d{1,19})-(\d{1,19})\Z", text, re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise S3Error("InvalidArgument", "The x-amz-copy-source-range value "
                      "must be of the form bytes=first-last where first and "
                      "last are the zero-based offsets of the first and "
                      "last bytes to copy",
                      ArgumentName="x-amz-copy-source-range",
                      ArgumentValue=text)
    if int(match[1]) >= size:
        raise S3Error("InvalidRequest", "The specified copy range is invalid "
                      "for the source object size")
    if int(match[2]) >= size:
        raise S3Error("InvalidArgument", "Range specified is not valid for "
                      "source object of size: %d" % size,
                      ArgumentName="x-amz-copy-source-range",
                      ArgumentValue=text)
    return int(match[1]), int(match[2]) + 1


@operation("POST", OBJECT, "uploadId", action="s3:PutObject")
def complete_multipart_upload(request):
    """API_CompleteMultipartUpload.  A second call gives the same answer,
    as long as the object is still the one that the first call made."""
    conditions = write_conditions(request.headers)
    asked = _asked_parts(request)
    store, bucket = request.store, request.bucket
    done = note_created(request, "CompleteMultipartUpload")
    try:
        upload = requested_upload(request)
        with store.locked_upload(upload):
            info = _completed_before(request)
            if info is None:
                _need_part_checksums(upload, asked)
                parts = _checked_parts(store.list_parts(upload), asked)
                record = _assembled_record(request, upload, parts)
                info = store.complete_upload(bucket, upload, parts, record,
                                             conditions, done)
            else:
                _finish_completion(request, upload, info, done)
    except S3Error as error:
        info = _completed_before(request) \
            if error.code == "NoSuchUpload" else None
        if info is None:
            raise
    location = object_url(request, request.key)
    headers = {"Content-Type": "application/xml"}
    headers.update(version_header(request, info))
    sse = kept_sse(info)
    headers.update(encryption_headers(sse and known_encryption(sse)))
    headers.update(expiration_headers(request, info))
    return Response(200, headers, xml_document(
        "CompleteMultipartUploadResult", [
            ("Location", location), ("Bucket", request.bucket_name),
            ("Key", request.key), ("ETag", quoted(info.etag))]
        + checksum_children(info.record)))


def object_url(request, key):
    """The path-style URL of an object."""
    return "%s/%s" % (service_url(request), uri_encode(
        "%s/%s" % (request.bucket_name, key), "/-_.~"))


def service_url(request):
    """The URL under which clients reach this server, without a bucket."""
    if request.service.public_url:
        return request.service.public_url
    host = request.host
    if request.host_bucket:
        host = host[len(request.host_bucket) + 1:]
    return "%s://%s" % (request.scheme, host)


def _completed_before(request):
    """The object's Info when it came from this very upload, or None; of
    its versions the last thousand are asked, each for 40 us."""
    upload_id = request.query["uploadId"]
    for info in request.bucket.versions(request.key, MAX_LIST_KEYS):
        if info.record.get("upload_id") == upload_id:
            return info
    return None


def _finish_completion(request, upload, info, done):
    """What a crash kept from being done once the object was there; its
    event may have been recorded, but rather twice than never."""
    if done:
        with request.bucket.lock(request.key):
            done(info)
    request.store.remove_upload(upload)


class AskedPart(NamedTuple):
    """One Part element of CompleteMultipartUpload's document."""
    number: int
    etag: str
    checksums: Dict[str, str]


def _asked_parts(request):
    """The AskedParts of the document, in their order."""
    document = request.xml("CompleteMultipartUpload")
    parts, last = {}, 0
    for element in document.findall("Part"):
        number, etag = xml_text(element, "PartNumber"), xml_text(
            element, "ETag")
        if not number or not etag or not re.match(
                r"\d{1,5}\Z", number, re.ASCII):
            raise S3Error("MalformedXML")
        checksums = {child.tag[8:]: (child.text or "").strip()
                     for child in element
                     if child.tag.startswith("Checksum")}
        part = AskedPart(int(number), etag.strip('"'), checksums)
        if part.number < last:
            raise S3Error("InvalidPartOrder")
        last = part.number
        parts[last] = part              # a part named twice: the last one
    if not parts:
        raise S3Error("InvalidRequest", "You must specify at least one part")
    if len(parts) > MAX_PART_NUMBER:
        raise S3Error("MalformedXML")
    return list(parts.values())


def _need_part_checksums(upload, asked):
    """API_CompletedPart: "present if the multipart upload request was
    created with the ... checksum algorithm"; with FULL_OBJECT it may miss."""
    name = upload.record.get("algorithm")
    if not name or upload.record.get("checksum_type") != "COMPOSITE":
        return
    for part in asked:
        if name not in part.checksums:
            raise S3Error("InvalidRequest", "The upload was created using a "
                          "%s checksum. The complete request must include "
                          "the checksum for each part. It was missing for "
                          "part %d in the request."
                          % (name.lower(), part.number))


def _checked_parts(known, asked):
    """The Parts to assemble, each as the client describes it."""
    by_number = {part.number: part for part in known}
    parts = []
    for want in asked:
        part = by_number.get(want.number)
        if part is None or part.etag != want.etag or any(
                part.checksums.get(name) != value
                for name, value in want.checksums.items()):
            raise S3Error("InvalidPart", PartNumber=want.number,
                          ETag=want.etag)
        if want is not asked[-1] and part.size < MIN_PART_BYTES:
            raise S3Error("EntityTooSmall", ProposedSize=part.size,
                          MinSizeAllowed=MIN_PART_BYTES,
                          PartNumber=want.number, ETag=want.etag)
        parts.append(part)
    return parts


def _assembled_record(request, upload, parts):
    """The record of the object that the parts make."""
    known, headers = upload.record, request.headers
    size = headers.get("x-amz-mp-object-size")
    if size is not None and parse_int("x-amz-mp-object-size", size, 0) \
            != sum(part.size for part in parts):
        raise S3Error("InvalidRequest", "The provided "
                      "'x-amz-mp-object-size' header does not match what "
                      "was computed.")
    record = {name: known[name] for name in (
        "headers", "meta", "class", "owner", "acl", "tags", "lock")
        if name in known}
    give_lock(request, record)
    digest = new_md5(b"".join(bytes.fromhex(p.etag) for p in parts))
    record["etag"] = "%s-%d" % (digest.hexdigest(), len(parts))
    record["parts"] = _size_runs(parts)
    record["upload_id"] = upload.upload_id
    seal_assembled(request, upload, parts, record)
    algorithm, kind = known.get("algorithm"), known.get("checksum_type")
    if headers.get("x-amz-checksum-type", kind) != kind:
        raise S3Error("InvalidRequest", "The upload was created using the "
                      "%s checksum mode. The complete request must use the "
                      "same checksum mode." % (kind or "null"))
    if algorithm:       # else what the request states counts for nothing:
        # LocalStack's test_complete_multipart_parts_checksum_default
        record["checksum_type"] = kind
        record["checksums"] = {algorithm: _assembled_checksum(
            algorithm, kind, parts)}
        record["part_checksums"] = [p.checksums[algorithm] for p in parts]
        _check_assembled(headers, record["checksums"])
    return record


def _size_runs(parts):
    """The sizes of parts, as runs [[size, count], ...]."""
    runs = []
    for part in parts:
        if runs and runs[-1][0] == part.size:
            runs[-1][1] += 1
        else:
            runs.append([part.size, 1])
    return runs


def _assembled_checksum(algorithm, kind, parts):
    """The whole's checksum from the parts': combined, not recomputed."""
    try:
        digests = [base64.b64decode(part.checksums[algorithm])
                   for part in parts]
    except KeyError:
        raise S3Error("InvalidPart") from None
    if kind == "COMPOSITE":
        return composite_checksum(algorithm, digests)
    return combined_crc(algorithm, zip(digests,
                                       (part.size for part in parts)))


def _check_assembled(headers, checksums):
    """Compare the checksum that the Complete request itself states, with
    or without the number of parts; one of another algorithm than the
    upload's cannot be right."""
    for header, name in CHECKSUM_HEADERS.items():
        actual = checksums.get(name, "")
        if header in headers and headers[header] not in (
                actual, actual.partition("-")[0]):
            raise S3Error("BadDigest", "The %s you specified did not match "
                          "the calculated checksum." % name.lower())


@operation("DELETE", OBJECT, "uploadId", status=204)
def abort_multipart_upload(request):
    """API_AbortMultipartUpload."""
    upload = requested_upload(request, "s3:AbortMultipartUpload")
    initiated = request.headers.get("x-amz-if-match-initiated-time")
    if initiated is not None and parse_http_date(
            initiated) != upload.initiated_ns // 1000000000:
        raise S3Error("PreconditionFailed",
                      Condition="x-amz-if-match-initiated-time")
    with request.store.locked_upload(upload):
        request.store.remove_upload(upload)


@operation("GET", OBJECT, "uploadId", action="s3:ListMultipartUploadParts")
def list_parts(request):
    """API_ListParts."""
    upload = requested_upload(request, "s3:ListMultipartUploadParts")
    limit = page_size(request, "max-parts", 1000)
    marker = parse_int("part-number-marker", request.query.get(
        "part-number-marker") or "0", 0)
    encode, encoding = encode_type(request)
    parts = [part for part in request.store.list_parts(upload)
             if part.number > marker]
    shown = parts[:limit]
    record = upload.record
    owner = record.get("owner") or bucket_owner(request)
    initiator = record.get("initiator") or owner
    headers = {"Content-Type": "application/xml"}
    headers.update(upload_abort_headers(request, upload.key,
                                        upload.initiated_ns))
    return Response(200, headers, xml_document("ListPartsResult", [
        ("Bucket", request.bucket_name), ("Key", encode(upload.key)),
        ("UploadId", upload.upload_id), ("PartNumberMarker", marker),
        ("NextPartNumberMarker", shown[-1].number if shown else 0),
        ("MaxParts", limit), ("IsTruncated", len(parts) > limit > 0),
        ("EncodingType", encoding)] + [("Part", [
            ("PartNumber", part.number),
            ("LastModified", iso_date(part.mtime_ns // 1000000000)),
            ("ETag", quoted(part.etag)), ("Size", part.size)]
            + checksum_children({"checksums": part.checksums}))
            for part in shown] + [
        owner_element(request, initiator, "Initiator"),
        owner_element(request, owner),
        ("StorageClass", record.get("class", "STANDARD")),
        ("ChecksumAlgorithm", record.get("algorithm")),
        ("ChecksumType", record.get("checksum_type"))]))


@operation("GET", BUCKET, "uploads", action="s3:ListBucketMultipartUploads")
def list_multipart_uploads(request):
    """API_ListMultipartUploads."""
    query = request.query
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    key_marker = query.get("key-marker", "")
    id_marker = query.get("upload-id-marker", "") if key_marker else ""
    limit = page_size(request, "max-uploads", 1000)
    encode, encoding = encode_type(request)
    uploads = [u for u in request.store.list_uploads(request.bucket)
               if u.key.startswith(prefix) and _after_marker(
                   u, key_marker, id_marker)]
    entries, more = _roll_uploads(uploads, prefix, delimiter, limit,
                                  _rolled_up(key_marker, prefix, delimiter))
    last = entries[-1] if more else None
    children = [
        ("Bucket", request.bucket_name), ("KeyMarker", encode(key_marker)),
        ("UploadIdMarker", id_marker),
        ("NextKeyMarker", encode(last.key) if last else ""),
        ("NextUploadIdMarker", last.upload_id
         if isinstance(last, Upload) else ""),
        ("Prefix", encode(prefix)),
        ("Delimiter", encode(delimiter) or None),
        ("MaxUploads", limit), ("EncodingType", encoding),
        ("IsTruncated", more)]
    for entry in entries:
        if isinstance(entry, CommonPrefix):
            children.append(("CommonPrefixes",
                             [("Prefix", encode(entry.key))]))
        else:
            children.append(("Upload", _upload_entry(request, entry,
                                                     encode)))
    return xml_document("ListMultipartUploadsResult", children)


def _after_marker(upload, key_marker, id_marker):
    """True for an upload behind key-marker and upload-id-marker."""
    if upload.key == key_marker and id_marker:
        return upload.upload_id > id_marker
    return upload.key > key_marker


def _roll_uploads(uploads, prefix, delimiter, limit, skip):
    """(entries, more): uploads and common prefixes, at most `limit`."""
    entries = []
    for upload in uploads:
        entry = upload
        cut = upload.key.find(delimiter, len(prefix)) if delimiter else -1
        if cut >= 0:
            entry = CommonPrefix(upload.key[:cut + len(delimiter)])
            if entry.key == skip:
                continue
            skip = entry.key
        if len(entries) == limit:
            return entries, bool(limit)
        entries.append(entry)
    return entries, False


def _upload_entry(request, upload, encode):
    """The children of one Upload."""
    record = upload.record
    owner = record.get("owner") or bucket_owner(request)
    initiator = record.get("initiator") or owner
    return [("Key", encode(upload.key)), ("UploadId", upload.upload_id),
            owner_element(request, initiator, "Initiator"),
            owner_element(request, owner),
            ("StorageClass", record.get("class", "STANDARD")),
            ("Initiated", iso_date(upload.initiated_ns // 1000000000)),
            ("ChecksumAlgorithm", record.get("algorithm")),
            ("ChecksumType", record.get("checksum_type"))]


# --- tags and cross-origin requests ---

@operation("GET", OBJECT, "tagging")
def get_object_tagging(request):
    """API_GetObjectTagging."""
    info = find_asked(request)
    headers = {"Content-Type": "application/xml"}
    headers.update(version_header(request, info))
    return Response(200, headers, xml_document(
        "Tagging", tagging_children(info.record.get("tags", {}))))


@operation("PUT", OBJECT, "tagging")
def put_object_tagging(request):
    """API_PutObjectTagging."""
    tags = parse_tagging(request.xml("Tagging"))
    request.allow_change({"s3:RequestObjectTag": tags,
                          "s3:RequestObjectTagKeys": list(tags)})
    return _set_tags(request, tags, "Put")


@operation("DELETE", OBJECT, "tagging", status=204)
def delete_object_tagging(request):
    """API_DeleteObjectTagging."""
    return _set_tags(request, {}, "Delete")


def _set_tags(request, tags, kind):
    """Give the version asked for these tags; the answer's headers."""
    def change(record):
        record.pop("tags", None)
        if tags:
            record["tags"] = tags
    info = request.bucket.update_record(
        request.key, asked_version(request), change,
        note_changed(request, "ObjectTagging:" + kind))
    return version_header(request, info)


@operation("GET", BUCKET, "tagging")
def get_bucket_tagging(request):
    """API_GetBucketTagging."""
    tags = request.bucket.config.get("tags")
    if not tags:
        raise S3Error("NoSuchTagSet", BucketName=request.bucket_name)
    return xml_document("Tagging", tagging_children(tags))


@operation("PUT", BUCKET, "tagging", status=204)
def put_bucket_tagging(request):
    """API_PutBucketTagging."""
    tags = parse_tagging(request.xml("Tagging"), "bucket")
    request.store.update_bucket(request.bucket,
                                lambda config: config.update(tags=tags))


@operation("DELETE", BUCKET, "tagging", status=204)
def delete_bucket_tagging(request):
    """API_DeleteBucketTagging."""
    _forget(request, "tags")


# Terraform's AWS provider reads and writes a bucket's tags by these since
# 6.23: terraform-provider-aws issue 45292.  The accounts here have no
# numbers, so it does not matter which one a client names.

CONTROL_XMLNS = "http://awss3control.amazonaws.com/doc/2018-08-20/"
_TAG_RESOURCE = (need("Tags", TAGS),)


@operation("GET", CONTROL)
def list_tags_for_resource(request):
    """API_control_ListTagsForResource."""
    return xml_document("ListTagsForResourceResult", [
        ("Tags", tag_children(request.bucket.config.get("tags", {})))],
        CONTROL_XMLNS)


@operation("POST", CONTROL, status=204)
def tag_resource(request):
    """API_control_TagResource: the other tags stay."""
    tags = read_tags(read_document(request.xml("TagResourceRequest"),
                                   _TAG_RESOURCE)["Tags"], "bucket")
    request.allow("s3:TagResource", facts=tag_facts(tags))

    def change(config):
        config["tags"] = checked_tags(
            dict(config.get("tags", {}), **tags).items(), "bucket")
    request.store.update_bucket(request.bucket, change)


@operation("DELETE", CONTROL, status=204)
def untag_resource(request):
    """API_control_UntagResource: a key that is not there is none to miss."""
    keys = {value for name, value in request.pairs if name == "tagKeys"}
    request.allow("s3:UntagResource", facts={"aws:TagKeys": list(keys)})

    def change(config):
        config["tags"] = {key: value for key, value in config.get(
            "tags", {}).items() if key not in keys}
    request.store.update_bucket(request.bucket, change)


@operation("GET", BUCKET, "cors")
def get_bucket_cors(request):
    """API_GetBucketCors."""
    if "cors" not in request.bucket.config:
        raise S3Error("NoSuchCORSConfiguration",
                      BucketName=request.bucket_name)
    return cors_document(load_cors(request.bucket.config["cors"]))


@operation("PUT", BUCKET, "cors")
def put_bucket_cors(request):
    """API_PutBucketCors."""
    data = request.body.read_all(MAX_CORS_BYTES)
    rules = dump_cors(parse_cors(parse_xml(data, "CORSConfiguration")))
    request.store.update_bucket(request.bucket,
                                lambda config: config.update(cors=rules))


@operation("DELETE", BUCKET, "cors", status=204)
def delete_bucket_cors(request):
    """API_DeleteBucketCors."""
    _forget(request, "cors")


def cors_rules(request):
    """The CorsRules for what a request names, the server's own where its
    bucket has none; None where there is no bucket and no such rule."""
    service = request.service
    try:
        config = service.store.bucket(request.bucket_name).config
    except S3Error:
        return service.cors or None
    return load_cors(config["cors"]) if "cors" in config else service.cors


def answer(request):
    """respond(), serve_site() or serve_sts(), and what CORS adds to the
    answer, to errors too."""
    respond_to = serve_site if request.is_site \
        else serve_sts if not request.key and is_sts(request) else respond
    if request.method == "OPTIONS":     # no signature, no key looked up
        return Response(200, preflight(cors_rules(request), request.headers,
                                       request.level.upper()))
    if "origin" not in request.headers:
        return respond_to(request)
    headers = actual_cors(cors_rules(request), request.method,
                          request.headers)
    try:
        response = respond_to(request)
    except S3Error as error:
        error.headers.update(headers)
        raise
    response.headers.update(headers)
    return response


# --- access control ---

def _asked_acl(request, owner_id):
    """The grants that a PutBucketAcl or PutObjectAcl asks for, in headers
    or in its document; MissingSecurityHeader when in neither."""
    accounts, access = request.service.accounts, request.access(
        request.bucket)
    grants = headers_acl(request.headers, owner_id, accounts,
                         access.owner_id)
    data = request.body.read_all()
    if grants is not None and data:
        raise S3Error("UnexpectedContent")
    if grants is None:
        if not data:
            raise S3Error("MissingSecurityHeader",
                          MissingHeaderName="x-amz-acl")
        grants = parse_acl(data, owner_id, accounts)
        if grants == private_acl(owner_id):
            # s3cmd 2.4 sends back after a cp or mv what it has read, and
            # AWS refuses even that where ACLs are off: it changes nothing
            return grants
    check_acl_change(grants, access)
    return grants


@operation("GET", BUCKET, "acl")
def get_bucket_acl(request):
    """API_GetBucketAcl."""
    access = request.access(request.bucket)
    return acl_document(access.acl, access.owner_id,
                        request.service.accounts)


@operation("PUT", BUCKET, "acl")
def put_bucket_acl(request):
    """API_PutBucketAcl."""
    owner = bucket_owner(request)
    lines = dump_acl(_asked_acl(request, owner), owner)
    request.store.update_bucket(request.bucket, lambda config:
                                config.update(acl=lines))


@operation("GET", OBJECT, "acl")
def get_object_acl(request):
    """API_GetObjectAcl."""
    info = find_asked(request)
    owner = object_owner(request, info)
    acl = info.record.get("acl")
    if request.access(request.bucket).ownership == ENFORCED:
        acl = None
    headers = {"Content-Type": "application/xml"}
    headers.update(version_header(request, info))
    return Response(200, headers, acl_document(
        load_acl(acl, owner), owner, request.service.accounts))


@operation("PUT", OBJECT, "acl")
def put_object_acl(request):
    """API_PutObjectAcl."""
    owner = object_owner(request, find_asked(request))
    lines = dump_acl(_asked_acl(request, owner), owner)
    note, before = note_changed(request, "ObjectAcl:Put"), []

    def change(record):
        before.append(record.pop("acl", None))
        if lines is not None:
            record["acl"] = lines

    def done(info):
        if note and before[-1] != lines:
            note(info)
    info = request.bucket.update_record(request.key, asked_version(request),
                                        change, done)
    return version_header(request, info)


@operation("GET", BUCKET, "policy")
def get_bucket_policy(request):
    """API_GetBucketPolicy: the text as it was put."""
    return Response(200, {"Content-Type": "application/json"},
                    _policy_text(request).encode())


def _policy_text(request):
    text = request.bucket.config.get("policy")
    if not isinstance(text, str):
        raise S3Error("NoSuchBucketPolicy", BucketName=request.bucket_name)
    return text


@operation("PUT", BUCKET, "policy", status=204)
def put_bucket_policy(request):
    """API_PutBucketPolicy: refused unless all of it is understood."""
    data = request.body.read_all(MAX_POLICY_TEXT_BYTES)
    policy = parse_policy(data, request.bucket_name,
                          request.service.accounts.by_user_id)
    request.access(request.bucket).block.check_policy(policy)
    locked = request.flag("x-amz-confirm-remove-self-bucket-access")
    request.store.update_bucket(request.bucket, lambda config: config.update(
        policy=data.decode("utf-8"), locked_out=locked))


@operation("DELETE", BUCKET, "policy", status=204)
def delete_bucket_policy(request):
    """API_DeleteBucketPolicy."""
    _forget(request, "policy", "locked_out")


def _forget(request, *names):
    """Take fields out of bucket.json, where they are in it."""
    if any(name in request.bucket.config for name in names):
        request.store.update_bucket(request.bucket, lambda config: [
            config.pop(name, None) for name in names])


@operation("GET", BUCKET, "policyStatus")
def get_bucket_policy_status(request):
    """API_GetBucketPolicyStatus."""
    _policy_text(request)
    public = policy_is_public(request.access(request.bucket).policy)
    return xml_document("PolicyStatus", [("IsPublic", public)])


@operation("GET", BUCKET, "publicAccessBlock")
def get_public_access_block(request):
    """API_GetPublicAccessBlock."""
    if "public_access_block" not in request.bucket.config:
        raise S3Error("NoSuchPublicAccessBlockConfiguration",
                      BucketName=request.bucket_name)
    return public_access_block_document(
        request.access(request.bucket).block)


@operation("PUT", BUCKET, "publicAccessBlock")
def put_public_access_block(request):
    """API_PutPublicAccessBlock."""
    block = parse_public_access_block(
        request.xml("PublicAccessBlockConfiguration"))
    request.store.update_bucket(request.bucket, lambda config: config.update(
        public_access_block=dict(block._asdict())))


@operation("DELETE", BUCKET, "publicAccessBlock", status=204)
def delete_public_access_block(request):
    """API_DeletePublicAccessBlock."""
    _forget(request, "public_access_block")


@operation("GET", BUCKET, "ownershipControls")
def get_bucket_ownership_controls(request):
    """API_GetBucketOwnershipControls; the default is the server's."""
    ownership = request.bucket.config.get(
        "ownership", request.service.object_ownership)
    if ownership is None:
        raise S3Error("OwnershipControlsNotFoundError",
                      BucketName=request.bucket_name)
    return xml_document("OwnershipControls", [
        ("Rule", [("ObjectOwnership", ownership)])])


@operation("PUT", BUCKET, "ownershipControls")
def put_bucket_ownership_controls(request):
    """API_PutBucketOwnershipControls."""
    document = request.xml("OwnershipControls")
    rules = document.findall("Rule")
    if len(rules) != 1 or len(document) != 1:
        raise S3Error("MalformedXML")
    ownership = xml_text(rules[0], "ObjectOwnership")
    access = request.access(request.bucket)
    check_ownership(ownership, access.acl, access.owner_id)
    request.store.update_bucket(request.bucket, lambda config:
                                config.update(ownership=ownership))


@operation("DELETE", BUCKET, "ownershipControls", status=204)
def delete_bucket_ownership_controls(request):
    """API_DeleteBucketOwnershipControls: ACLs count from then on."""
    request.store.update_bucket(request.bucket, lambda config:
                                config.update(ownership=None))


# --- documents: filters ---

_TAG = (need("Key", FILLED), Field("Value", TEXT))


def filter_fields(*more):
    """The Fields of a Filter: a prefix, a tag, others, or several in And."""
    return (Field("Prefix", TEXT), Field("Tag", _TAG)) + more + (
        Field("And", (Field("Prefix", TEXT), many("Tag", _TAG)) + more),)


class Terms(NamedTuple):
    """What a rule's filter asks of an object; None: nothing."""
    prefix: str = ""
    tags: Dict[str, str] = {}
    larger_than: Optional[int] = None
    smaller_than: Optional[int] = None

    def hold(self, key, tags, size):
        """True when an object with this key, tags and size is meant."""
        return (key.startswith(self.prefix)
                and all(tags.get(name) == value
                        for name, value in self.tags.items())
                and (self.larger_than is None or size > self.larger_than)
                and (self.smaller_than is None or size < self.smaller_than))

    @property
    def sized(self):
        """True when the filter names a size."""
        return (self.larger_than, self.smaller_than) != (None, None)


def filter_terms(rule):
    """The Terms of a rule, from its Filter or its own old Prefix.

    A tag without a value means one whose value is empty
    (userguide/intro-lifecycle-filters.html).
    """
    where = rule.get("Filter", rule)
    where = where.get("And", where)
    tags = where.get("Tag", [])
    tags = [tags] if isinstance(tags, dict) else tags
    return Terms(where.get("Prefix", ""),
                 {tag["Key"]: tag.get("Value", "") for tag in tags},
                 where.get("ObjectSizeGreaterThan"),
                 where.get("ObjectSizeLessThan"))


def check_filter(rule):
    """A Filter has at most one member, an And at least two.

    API_LifecycleRuleFilter.html; LocalStack recorded S3's answers to
    several members and to equal tag keys.
    """
    where = rule.get("Filter", {})
    if len(where) > 1:
        raise S3Error("MalformedXML")
    terms = where.get("And")
    if terms is None:
        return
    keys = [tag["Key"] for tag in terms.get("Tag", ())]
    if len(terms) - bool(keys) + len(keys) < 2:
        raise S3Error("MalformedXML")
    if len(set(keys)) < len(keys):
        raise S3Error("InvalidRequest",
                      "Duplicate Tag Keys are not allowed.")


# --- configurations that are kept and given back ---
#
# A row each of CONFIGURATIONS: validated like S3, and without effect here
# (requestPayment is read elsewhere).  The pages are
# API_PutBucket<...>.html; element names and order are botocore's.

MAX_CONFIGURATIONS = 1000
MAX_REPLICATION_RULES = 1000
_CONFIGURATION_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_BUCKET_ARN = re.compile(r"arn:[\w-]+:s3:::[^/:\s]+\Z", re.ASCII)
_MINUTES = (Field("Minutes", INT),)

_REPLICATION = (need("Role", FILLED), many("Rule", (
    Field("ID", TEXT),
    Field("Priority", INT),
    Field("Prefix", TEXT),
    Field("Filter", filter_fields()),
    need("Status", ON_OFF),
    Field("SourceSelectionCriteria", (
        Field("SseKmsEncryptedObjects", STATUS),
        Field("ReplicaModifications", STATUS))),
    Field("ExistingObjectReplication", STATUS),
    need("Destination", (
        need("Bucket", FILLED),
        Field("Account", FILLED),
        Field("StorageClass", one_of(*sorted(STORAGE_CLASSES))),
        Field("AccessControlTranslation", (
            need("Owner", one_of("Destination")),)),
        Field("EncryptionConfiguration", (
            Field("ReplicaKmsKeyID", FILLED),)),
        Field("ReplicationTime", STATUS + (need("Time", _MINUTES),)),
        Field("Metrics", STATUS + (Field("EventThreshold", _MINUTES),)))),
    Field("DeleteMarkerReplication", (Field("Status", ON_OFF),)),
), 1, MAX_REPLICATION_RULES))

_ANALYTICS = (
    need("Id", TEXT),
    Field("Filter", filter_fields()),
    need("StorageClassAnalysis", (Field("DataExport", (
        need("OutputSchemaVersion", one_of("V_1")),
        need("Destination", (need("S3BucketDestination", (
            need("Format", one_of("CSV")),
            Field("BucketAccountId", TEXT),
            need("Bucket", FILLED),
            Field("Prefix", TEXT))),)))),)))

_INVENTORY = (
    need("Destination", (need("S3BucketDestination", (
        Field("AccountId", TEXT),
        need("Bucket", FILLED),
        need("Format", one_of("CSV", "ORC", "Parquet")),
        Field("Prefix", TEXT),
        Field("Encryption", (
            Field("SSE-S3", ()),
            Field("SSE-KMS", (need("KeyId", FILLED),)))))),)),
    need("IsEnabled", BOOLEAN),
    Field("Filter", (need("Prefix", TEXT),)),
    need("Id", TEXT),
    need("IncludedObjectVersions", one_of("All", "Current")),
    Field("OptionalFields", (many("Field", one_of(
        "Size", "LastModifiedDate", "StorageClass", "ETag",
        "IsMultipartUploaded", "ReplicationStatus", "EncryptionStatus",
        "ObjectLockRetainUntilDate", "ObjectLockMode",
        "ObjectLockLegalHoldStatus", "ObjectLockEventHoldStatus",
        "ObjectLockEventHoldDuration", "IntelligentTieringAccessTier",
        "BucketKeyStatus", "ChecksumAlgorithm", "ObjectAccessControlList",
        "ObjectOwner", "LifecycleExpirationDate",
        "IntelligentTieringReferenceDate")),)),
    need("Schedule", (need("Frequency", one_of("Daily", "Weekly")),)))

_ACCESS_POINT = Field("AccessPointArn", FILLED)
_METRICS = (need("Id", TEXT),
            Field("Filter", (Field("Prefix", TEXT), Field("Tag", _TAG),
                             _ACCESS_POINT, Field("And", (
                                 Field("Prefix", TEXT), many("Tag", _TAG),
                                 _ACCESS_POINT)))))

_TIERING = (
    need("Id", TEXT),
    Field("Filter", filter_fields()),
    need("Status", ON_OFF),
    many("Tiering", (
        need("Days", INT),
        need("AccessTier", one_of("ARCHIVE_ACCESS",
                                  "DEEP_ARCHIVE_ACCESS"))), 1))


def _check_replication(value):
    """userguide/replication-add-config.html; a Filter is the schema V2,
    which says what becomes of delete markers."""
    seen, priorities = set(), set()
    for rule in value["Rule"]:
        _check_replication_rule(rule)
        name, priority = rule.get("ID"), rule.get("Priority")
        if name and name in seen:
            raise bad_argument("Rule Id must be unique", "ID", name)
        if priority is not None and priority in priorities:
            raise S3Error("InvalidRequest", "Found overlapping priority %d "
                          "in replication configuration" % priority)
        seen.add(name)
        priorities.add(priority)


def _check_replication_rule(rule):
    if len(rule.get("ID", "")) > MAX_RULE_ID:
        raise bad_argument("ID length should not exceed allowed limit of "
                           "255", "ID", rule["ID"])
    if "Prefix" in rule and "Filter" in rule:
        raise S3Error("MalformedXML")
    check_filter(rule)
    if "Filter" in rule:
        markers = rule.get("DeleteMarkerReplication", {}).get("Status")
        for name, present in (("Priority", "Priority" in rule),
                              ("DeleteMarkerReplication", markers)):
            if not present:
                raise S3Error(
                    "InvalidRequest", name + " must be specified for this "
                    "version of Cross Region Replication configuration "
                    "schema. Please refer to S3 Developer Guide for more "
                    "information.")
        if markers == ENABLED and filter_terms(rule).tags:
            raise S3Error("InvalidRequest", "Delete marker replication is "
                          "not supported if any Tag filter is specified.")
    _check_replication_target(rule["Destination"])


def _check_replication_target(target):
    if not _BUCKET_ARN.match(target["Bucket"].strip()):
        raise bad_argument("Invalid bucket ARN", "Bucket", target["Bucket"])
    if "AccessControlTranslation" in target and "Account" not in target:
        raise S3Error("InvalidRequest", "Account must be specified with "
                      "AccessControlTranslation")
    if "ReplicationTime" in target and "Metrics" not in target:
        raise S3Error("InvalidRequest", "Metrics must be specified with "
                      "ReplicationTime")
    for limit in (target.get("ReplicationTime", {}).get("Time", {}),
                  target.get("Metrics", {}).get("EventThreshold", {})):
        if limit.get("Minutes", 15) != 15:      # API_ReplicationTimeValue
            raise bad_argument("Minutes must be 15", "Minutes",
                               limit["Minutes"])


def _check_analytics(value):
    check_filter(value)
    export = value["StorageClassAnalysis"].get("DataExport")
    if export is not None:
        _check_destination(export["Destination"])


def _check_inventory(value):
    _check_destination(value["Destination"])
    encryption = value["Destination"]["S3BucketDestination"].get(
        "Encryption", {})
    if len(encryption) > 1:
        raise S3Error("MalformedXML")


def _check_destination(destination):
    if not _BUCKET_ARN.match(
            destination["S3BucketDestination"]["Bucket"].strip()):
        raise S3Error("InvalidS3DestinationBucket")


def _check_tiering(value):
    """API_Tiering.html: 90 or 180 days at least, 730 at most."""
    check_filter(value)
    tiers = [item["AccessTier"] for item in value["Tiering"]]
    if len(set(tiers)) < len(tiers):
        raise S3Error("MalformedXML")
    for item in value["Tiering"]:
        low = 90 if item["AccessTier"] == "ARCHIVE_ACCESS" else 180
        if not low <= item["Days"] <= 730:
            raise bad_argument("'Days' for AccessTier '%s' must be between "
                               "%d and 730" % (item["AccessTier"], low),
                               "Days", item["Days"])


class Configuration(NamedTuple):
    """One row: the subresource's document, its Fields and further check.

    mismatch: the error when the document's Id is not the query's; None
    for a document that has no id.
    """
    root: str
    fields: Tuple[Field, ...]
    check: Optional[Callable] = None
    mismatch: Optional[str] = None


_UPPER = one_of("ENABLED", "DISABLED")
_TABLE_KEY = Field("EncryptionConfiguration", (
    need("SseAlgorithm", one_of("aws:kms", "AES256")),
    Field("KmsKeyArn", FILLED)))
_JOURNAL_TABLE = (need("RecordExpiration", (
    need("Expiration", _UPPER), Field("Days", INT))),)
_INVENTORY_TABLE = (need("ConfigurationState", _UPPER), _TABLE_KEY)
_ANNOTATION_TABLE = _INVENTORY_TABLE + (Field("Role", FILLED),)
_METADATA = (
    need("JournalTableConfiguration", _JOURNAL_TABLE + (_TABLE_KEY,)),
    Field("InventoryTableConfiguration", _INVENTORY_TABLE),
    Field("AnnotationTableConfiguration", _ANNOTATION_TABLE))


def _check_metadata(value):
    for table in value.values():
        key = table.get("EncryptionConfiguration", {})
        if key and (key["SseAlgorithm"] == "aws:kms") != (
                "KmsKeyArn" in key):
            raise S3Error("MalformedXML")
    _check_journal(value["JournalTableConfiguration"])


def _check_journal(value):
    """API_RecordExpiration.html: 7 days at least, only when enabled."""
    expiration = value["RecordExpiration"]
    if (expiration["Expiration"] == "ENABLED") != ("Days" in expiration):
        raise S3Error("MalformedXML")
    if expiration.get("Days", 7) < 7:
        raise bad_argument("Days must be at least 7", "Days",
                           expiration["Days"])


CONFIGURATIONS = {
    "requestPayment": Configuration("RequestPaymentConfiguration", (
        need("Payer", one_of("Requester", "BucketOwner")),)),
    "accelerate": Configuration("AccelerateConfiguration", (
        need("Status", one_of(ENABLED, SUSPENDED)),)),
    "abac": Configuration("AbacStatus", STATUS),
    "replication": Configuration(
        "ReplicationConfiguration", _REPLICATION, _check_replication),
    "analytics": Configuration(
        "AnalyticsConfiguration", _ANALYTICS, _check_analytics,
        "MalformedXML"),
    "inventory": Configuration(
        "InventoryConfiguration", _INVENTORY, _check_inventory,
        "IdMismatch"),
    "metrics": Configuration(
        "MetricsConfiguration", _METRICS, check_filter, "MalformedXML"),
    "intelligent-tiering": Configuration(
        "IntelligentTieringConfiguration", _TIERING, _check_tiering,
        "MalformedXML"),
    "metadataConfiguration": Configuration(
        "MetadataConfiguration", _METADATA, _check_metadata),
    "metadataTable": Configuration("MetadataTableConfiguration", (
        need("S3TablesDestination", (need("TableBucketArn", FILLED),
                                     need("TableName", FILLED))),)),
    "metadataJournalTable": Configuration(
        "JournalTableConfiguration", _JOURNAL_TABLE, _check_journal),
    "metadataInventoryTable": Configuration(
        "InventoryTableConfiguration", _INVENTORY_TABLE),
    "metadataAnnotationTable": Configuration(
        "AnnotationTableConfiguration", _ANNOTATION_TABLE),
}


CONFIG_SHAPES.update(
    (_name, {"*": document_shape(_row.fields)} if _row.mismatch
     else document_shape(_row.fields))
    for _name, _row in CONFIGURATIONS.items())


def parse_configuration(name, element, config_id=None):
    """The value of the document of a subresource, as a row describes it.

    config_id: the query's `id`, where the row has ids.  MalformedXML,
    InvalidArgument, IdMismatch, InvalidRequest, InvalidS3DestinationBucket.
    """
    row = CONFIGURATIONS[name]
    value = read_document(element, row.fields)
    if row.mismatch:
        if not _CONFIGURATION_ID.match(config_id or ""):
            raise bad_argument("The specified configuration id is invalid.",
                               "id", config_id)
        if value["Id"] != config_id:
            raise S3Error(row.mismatch)
    if row.check is not None:
        row.check(value)
    return value


def configuration_children(name, value):
    """The children of that document."""
    return document_children(value, CONFIGURATIONS[name].fields)


def check_configuration_count(kept, config_id):
    """TooManyConfigurations when one more id would be too many."""
    if config_id not in kept and len(kept) >= MAX_CONFIGURATIONS:
        raise S3Error("TooManyConfigurations")


def check_replication_bucket(versioning):
    """InvalidRequest unless a bucket may replicate."""
    if versioning != ENABLED:
        raise S3Error("InvalidRequest", "Versioning must be 'Enabled' on "
                      "the bucket to apply a replication configuration")


def check_accelerated_name(bucket_name):
    """InvalidRequest for a name that has no accelerated host name."""
    if "." in bucket_name:
        raise S3Error("InvalidRequest", "S3 Transfer Acceleration is not "
                      "supported for buckets with periods (.) in their "
                      "names")


# What has one document a bucket: subresource -> (name, the answer to a GET
# of none, may it be deleted).  Of what has several, each with its id, the
# names, and the root of their list.
_KEPT_ONE = {
    "accelerate": ("AccelerateConfiguration", "", False),
    "abac": ("Abac", "Disabled", False),
    "requestPayment": ("RequestPayment", "BucketOwner", False),
    "replication": ("Replication",
                    "ReplicationConfigurationNotFoundError", True),
}
_KEPT_MANY = {
    "analytics": ("Analytics", "ListBucketAnalyticsConfigurationResult"),
    "inventory": ("Inventory", "ListInventoryConfigurationsResult"),
    "metrics": ("Metrics", "ListMetricsConfigurationsResult"),
    "intelligent-tiering": (
        "IntelligentTiering",
        "ListBucketIntelligentTieringConfigurationsResult"),
}
MAX_LISTED_CONFIGURATIONS = 100


def _kept_row(name, method, subresource, function, status=200, when=None):
    state = STORED if subresource != "requestPayment" else DONE
    add_operation(Operation(name, method, BUCKET, subresource, when,
                            iam_action(name), status, state, function))


def _keep_one(subresource, name, none, deletable):
    """The rows of a document that a bucket has one of."""
    row = CONFIGURATIONS[subresource]

    def put(request):
        if subresource == "accelerate":
            check_accelerated_name(request.bucket_name)
        value = parse_configuration(subresource, request.xml(row.root))
        if subresource == "replication":
            check_replication_bucket(request.bucket.versioning)
        request.store.update_bucket(request.bucket, lambda config:
                                    config.update({subresource: value}))

    def get(request):
        value = request.bucket.config.get(subresource)
        if value is None and none in ERRORS:
            raise S3Error(none)
        if value is None:
            tag = row.fields[0].tag
            return xml_document(row.root, [(tag, none or None)])
        return xml_document(row.root, configuration_children(
            subresource, value))
    _kept_row("PutBucket" + name, "PUT", subresource, put)
    _kept_row("GetBucket" + name, "GET", subresource, get)
    if deletable:
        _kept_row("DeleteBucket" + name, "DELETE", subresource,
                  lambda request: _forget(request, subresource), 204)


def _keep_many(subresource, name, list_root):
    """The rows of a document that a bucket has many of, each by its id."""
    row = CONFIGURATIONS[subresource]

    def kept(request):
        return request.bucket.config.get(subresource, {})

    def put(request):
        config_id = request.query.get("id")
        value = parse_configuration(subresource, request.xml(row.root),
                                    config_id)

        def change(config):
            found = config.setdefault(subresource, {})
            check_configuration_count(found, config_id)
            found[config_id] = value
        request.store.update_bucket(request.bucket, change)

    def get(request):
        value = kept(request).get(request.query["id"])
        if value is None:
            raise S3Error("NoSuchConfiguration")
        return xml_document(row.root, configuration_children(
            subresource, value))

    def delete(request):
        def change(config):
            if config.get(subresource, {}).pop(request.query.get("id"),
                                               None) is None:
                raise S3Error("NoSuchConfiguration")
        request.store.update_bucket(request.bucket, change)

    def list_all(request):
        found, after = kept(request), read_token(request)
        ids = sorted(one for one in found if one > after)
        shown = ids[:MAX_LISTED_CONFIGURATIONS]
        more = len(ids) > len(shown)
        return xml_document(list_root, [
            ("ContinuationToken", request.query.get("continuation-token")),
            ("IsTruncated", more),
            ("NextContinuationToken",
             make_token(shown[-1]) if more else None)] + [
            (row.root, configuration_children(subresource, found[one]))
            for one in shown])
    name += "Configuration"
    _kept_row("PutBucket" + name, "PUT", subresource, put, 204)
    _kept_row("GetBucket" + name, "GET", subresource, get, when="id")
    _kept_row("DeleteBucket" + name, "DELETE", subresource, delete, 204)
    _kept_row("ListBucket%ss" % name, "GET", subresource, list_all)


for _subresource, _row in _KEPT_ONE.items():
    _keep_one(_subresource, *_row)
for _subresource, _row in _KEPT_MANY.items():
    _keep_many(_subresource, *_row)


# --- metadata tables: kept and given back ---

# Further tables of a metadataConfiguration: subresource -> its member there
_METADATA_TABLES = {"metadataInventoryTable": "InventoryTableConfiguration",
                    "metadataJournalTable": "JournalTableConfiguration",
                    "metadataAnnotationTable": "AnnotationTableConfiguration"}


_TABLE_ERROR = [("ErrorCode", "NotImplemented"),
                ("ErrorMessage", "This server keeps the configuration and "
                                 "makes no table.")]


def metadata_children(name, value):
    """The children of a GetBucketMetadata...ConfigurationResult, for
    `metadataConfiguration` or `metadataTable`.

    No table is made here, and the status says so: FAILED.
    """
    if name == "metadataTable":
        target = value["S3TablesDestination"]
        arn = target["TableBucketArn"]
        return [("MetadataTableConfigurationResult", [
            ("S3TablesDestinationResult", [
                ("TableBucketArn", arn), ("TableName", target["TableName"]),
                ("TableArn", "%s/table/%s" % (arn, target["TableName"])),
                ("TableNamespace", "aws_s3_metadata")])]),
            ("Status", "FAILED"), ("Error", _TABLE_ERROR)]
    tables = []
    for kind in ("Journal", "Inventory", "Annotation"):
        table = value.get(kind + "TableConfiguration")
        if table is not None:
            tables.append((kind + "TableConfigurationResult",
                           _table_result(kind.lower(), table)))
    return [("MetadataConfigurationResult", [
        ("DestinationResult", [("TableBucketType", "aws")])] + tables)]


def _table_result(name, table):
    expiration = table.get("RecordExpiration")
    return [
        ("ConfigurationState", table.get("ConfigurationState")),
        ("TableStatus", "FAILED"), ("Error", _TABLE_ERROR),
        ("TableName", name),
        ("RecordExpiration", expiration and list(expiration.items())),
        ("Role", table.get("Role"))]


def _keep_metadata(subresource, name):
    """The rows of a configuration that is made once, read and deleted."""
    row = CONFIGURATIONS[subresource]

    def create(request):
        need_digest(request)
        value = parse_configuration(subresource, request.xml(row.root))

        def change(config):
            if subresource in config:
                raise S3Error("InvalidBucketState", "The bucket has a "
                              "metadata configuration already")
            config[subresource] = value
        request.store.update_bucket(request.bucket, change)

    def get(request):
        return xml_document(
            "GetBucket%sResult" % name,
            metadata_children(subresource, _kept_metadata(
                request.bucket.config, subresource)))
    _kept_row("CreateBucket" + name, "POST", subresource, create)
    _kept_row("GetBucket" + name, "GET", subresource, get)
    _kept_row("DeleteBucket" + name, "DELETE", subresource,
              lambda request: _forget(request, subresource), 204)


def _kept_metadata(config, subresource):
    """The configuration in bucket.json, or MetadataConfigurationNotFound.
    """
    if subresource not in config:
        raise S3Error("MetadataConfigurationNotFound")
    return config[subresource]


def _keep_metadata_table(subresource, tag):
    """The row that changes one table of a metadataConfiguration."""
    def put(request):
        need_digest(request)
        value = parse_configuration(subresource, request.xml(tag))

        def change(config):
            kept = _kept_metadata(config, "metadataConfiguration")
            kept[tag] = dict(kept.get(tag, {}), **value)
        request.store.update_bucket(request.bucket, change)
    _kept_row("UpdateBucketMetadata" + tag, "PUT", subresource, put)


_keep_metadata("metadataConfiguration", "MetadataConfiguration")
_keep_metadata("metadataTable", "MetadataTableConfiguration")
for _subresource, _tag in _METADATA_TABLES.items():
    _keep_metadata_table(_subresource, _tag)


# --- object lock ---
#
# userguide/object-lock.html and object-lock-managing.html.  A version's
# lock is a dict of what is set: mode, until (seconds since the epoch) and
# hold (ON or OFF); {} when it has none.  Messages: LocalStack's tests
# recorded against S3, issues 1733 to 1775 of versity/versitygw.

GOVERNANCE = "GOVERNANCE"
LOCK_MODES = (GOVERNANCE, "COMPLIANCE")
HOLDS = ("ON", "OFF")
MAX_LOCK_DAYS, MAX_LOCK_YEARS = 36500, 100
DAY_SECONDS = 86400
LOCK_HEADER = "x-amz-object-lock-"
_EVENT_HOLD = "Event holds of object lock are not implemented"

_DURATION = (Field("Days", INT), Field("Years", INT))
_OBJECT_LOCK = (need("ObjectLockEnabled", one_of(ENABLED)), Field("Rule", (
    need("DefaultRetention", (
        need("Mode", one_of(*LOCK_MODES)),) + _DURATION + (
        Field("DefaultEventHold", _DURATION),)),)))
_RETENTION = (Field("Mode", one_of(*LOCK_MODES)),
              Field("RetainUntilDate", DATE), Field("EventHold", TEXT),
              Field("EventHoldDuration", _DURATION))
_LEGAL_HOLD = (need("Status", one_of(*HOLDS)),)
CONFIG_SHAPES["object_lock"] = lambda default: default == {} or fits(
    default, {"Mode": LOCK_MODES.__contains__,
              "Days": range(1, MAX_LOCK_DAYS + 1).__contains__,
              "Years": range(1, MAX_LOCK_YEARS + 1).__contains__}) \
    and "Mode" in default and ("Days" in default) != ("Years" in default)


def parse_object_lock(element):
    """The default retention in an ObjectLockConfiguration Element.

    API_PutObjectLockConfiguration.html.  {"Mode": ..., "Days" or "Years":
    n}, or {} for none.  A period below 1 is InvalidArgument on S3, where
    s3-tests wants InvalidRetentionPeriod (its issue 344).
    """
    rule = read_document(element, _OBJECT_LOCK).get("Rule")
    if rule is None:
        return {}
    default = rule["DefaultRetention"]
    if "DefaultEventHold" in default:
        raise S3Error("NotImplemented", _EVENT_HOLD)
    if ("Days" in default) == ("Years" in default):
        raise S3Error("MalformedXML")
    name, most = (("Days", MAX_LOCK_DAYS) if "Days" in default
                  else ("Years", MAX_LOCK_YEARS))
    if default[name] < 1:
        raise bad_argument("Default retention period must be a positive "
                           "integer value.", name, default[name])
    if default[name] > most:
        raise bad_argument("Default retention period too large.", name,
                           default[name])
    return default


def object_lock_children(default):
    """The children of an ObjectLockConfiguration document."""
    value = {"ObjectLockEnabled": ENABLED}
    if default:
        value["Rule"] = {"DefaultRetention": default}
    return document_children(value, _OBJECT_LOCK)


def need_object_lock(request):
    """InvalidRequest for a bucket without object lock."""
    if request.setting("object_lock") is None:
        raise S3Error("InvalidRequest",
                      "Bucket is missing Object Lock Configuration")


def parse_retention(element, now):
    """The mode and until of a Retention Element; {} when it is empty.

    API_PutObjectRetention.html: an empty one takes the retention away.
    MalformedXML, InvalidArgument or NotImplemented.
    """
    value = read_document(element, _RETENTION)
    if "EventHold" in value or "EventHoldDuration" in value:
        raise S3Error("NotImplemented", _EVENT_HOLD)
    if not value:
        return {}
    if len(value) < 2:
        raise S3Error("MalformedXML")
    _check_future(value["RetainUntilDate"], now, "RetainUntilDate",
                  iso_date(value["RetainUntilDate"]))
    return {"mode": value["Mode"], "until": value["RetainUntilDate"]}


def _check_future(until, now, name, text):
    if until <= now:
        raise bad_argument("The retain until date must be in the future!",
                           name, text)


def retention_children(lock):
    """The children of a Retention document; NoSuchObjectLockConfiguration
    when the version has none."""
    if "mode" not in lock:
        raise S3Error("NoSuchObjectLockConfiguration")
    return [("Mode", lock["mode"]),
            ("RetainUntilDate", iso_date(lock["until"]))]


def parse_legal_hold(element):
    """ON or OFF, of a LegalHold Element (API_PutObjectLegalHold.html)."""
    return read_document(element, _LEGAL_HOLD)["Status"]


def legal_hold_children(lock):
    """The children of a LegalHold document; NoSuchObjectLockConfiguration
    when the version never had one."""
    if "hold" not in lock:
        raise S3Error("NoSuchObjectLockConfiguration")
    return [("Status", lock["hold"])]


def parse_lock_headers(headers, now):
    """The lock that a PutObject, CopyObject or CreateMultipartUpload names
    in its x-amz-object-lock- headers; {} for none (API_PutObject.html)."""
    if LOCK_HEADER not in "".join(headers):     # one search is the fastest
        return {}
    if any(name.startswith(LOCK_HEADER + "event-hold") for name in headers):
        raise S3Error("NotImplemented", _EVENT_HOLD)
    names = [LOCK_HEADER + name
             for name in ("mode", "retain-until-date", "legal-hold")]
    mode, date, hold = map(headers.get, names)
    lock = {}
    if hold is not None:
        if hold not in HOLDS:
            raise bad_argument("Legal Hold must be either of 'ON' or 'OFF'",
                               names[2], hold)
        lock["hold"] = hold
    if mode is None and date is None:
        return lock
    if mode is None or date is None:
        raise bad_argument(
            "x-amz-object-lock-retain-until-date and x-amz-object-lock-mode "
            "must both be supplied", names[mode is not None])
    if mode not in LOCK_MODES:
        raise bad_argument("Unknown wormMode directive.", names[0], mode)
    until = parse_iso_date(date)
    if until is None:
        raise bad_argument("The retain until date must be provided in ISO "
                           "8601 format", names[1], date)
    _check_future(until, now, names[1], date)
    return dict(lock, mode=mode, until=until)


def default_lock(default, now):
    """The lock that a bucket's default retention gives a version made now;
    {} for none.  A year has 365 days (userguide/object-lock.html)."""
    if not default:
        return {}
    days = default.get("Days") or 365 * default["Years"]
    return {"mode": default["Mode"],
            "until": int(-(-now // 1)) + days * DAY_SECONDS}


def lock_headers(lock):
    """The headers of GetObject and HeadObject for a version's lock."""
    headers = {}
    if "mode" in lock:
        headers[LOCK_HEADER + "mode"] = lock["mode"]
        headers[LOCK_HEADER + "retain-until-date"] = iso_date(lock["until"])
    if "hold" in lock:
        headers[LOCK_HEADER + "legal-hold"] = lock["hold"]
    return headers


def with_retention(lock, retention):
    """A version's lock with its retention replaced; a hold stays."""
    kept = {"hold": lock["hold"]} if "hold" in lock else {}
    return dict(kept, **retention)


def _is_retained(lock, now):
    return "mode" in lock and lock["until"] > now


def _locked():
    return S3Error("AccessDenied", "Access Denied because object protected "
                   "by object lock.")


def check_unlocked(lock, now, bypass=False):
    """AccessDenied unless a version may be deleted for good, or replaced.

    bypass: x-amz-bypass-governance-retention was given, and the caller may
    s3:BypassGovernanceRetention.  It is no help against a legal hold.
    """
    if lock.get("hold") == "ON":
        raise _locked()
    if _is_retained(lock, now) and not (
            bypass and lock["mode"] == GOVERNANCE):
        raise _locked()


def check_retention_change(lock, retention, now, bypass=False):
    """AccessDenied unless a version's retention may become `retention`.

    Anybody who may set one may make it longer; to shorten it, end it or
    change its mode takes GOVERNANCE and the bypass (as check_unlocked).
    """
    if not _is_retained(lock, now):
        return
    longer = (retention.get("mode") == lock["mode"]
              and retention["until"] >= lock["until"])
    if not longer and not (bypass and lock["mode"] == GOVERNANCE):
        raise _locked()


def asked_lock(request):
    """The lock that a write's headers ask for; {} for none.

    InvalidRequest in a bucket without object lock.
    """
    lock = parse_lock_headers(request.headers, time.time())
    if lock:
        need_object_lock(request)
    return lock


def give_lock(request, record):
    """Complete the lock of a new version with the bucket's default."""
    lock = record.pop("lock", {})
    default = request.setting("object_lock")
    if default and "mode" not in lock:
        lock = dict(lock, **default_lock(default, time.time()))
    if lock:
        record["lock"] = lock


def may_bypass(request, key):
    """True when the request bypasses GOVERNANCE; AccessDenied when it asks
    to and may not."""
    if not request.flag("x-amz-bypass-governance-retention"):
        return False
    request.allow("s3:BypassGovernanceRetention", key)
    return True


def lock_guard(request, key):
    """What Store.delete_object() asks before a version goes for good."""
    def allow(info):
        if "lock" in info.record:
            check_unlocked(info.record["lock"], time.time(),
                           may_bypass(request, key))
    return allow


def shown_lock(request, lock):
    """The headers of a version's lock, as far as the caller may see it:
    API_GetObject.html."""
    headers = lock_headers(lock)
    for action, name in (("s3:GetObjectRetention", "mode"),
                         ("s3:GetObjectRetention", "retain-until-date"),
                         ("s3:GetObjectLegalHold", "legal-hold")):
        if not request.allowed(action, request.key):
            headers.pop(LOCK_HEADER + name, None)
    return headers


@operation("GET", BUCKET, "object-lock")
def get_object_lock_configuration(request):
    """API_GetObjectLockConfiguration."""
    default = request.setting("object_lock")
    if default is None:
        raise S3Error("ObjectLockConfigurationNotFoundError",
                      BucketName=request.bucket_name)
    return xml_document("ObjectLockConfiguration",
                        object_lock_children(default))


@operation("PUT", BUCKET, "object-lock")
def put_object_lock_configuration(request):
    """API_PutObjectLockConfiguration: it cannot be taken back."""
    need_digest(request)
    default = parse_object_lock(request.xml("ObjectLockConfiguration"))

    def change(config):
        if config.get("versioning") != ENABLED:
            raise S3Error("InvalidBucketState", "Versioning must be "
                          "'Enabled' on the bucket to apply a Object Lock "
                          "configuration")
        config["object_lock"] = default
    request.store.update_bucket(request.bucket, change)


@operation("GET", OBJECT, "retention")
def get_object_retention(request):
    """API_GetObjectRetention."""
    need_object_lock(request)
    lock = find_asked(request).record.get("lock", {})
    return xml_document("Retention", retention_children(lock))


@operation("PUT", OBJECT, "retention")
def put_object_retention(request):
    """API_PutObjectRetention."""
    need_digest(request)
    retention = parse_retention(request.xml("Retention"), time.time())
    until = retention.get("until")
    request.allow_change({
        "s3:object-lock-mode": retention.get("mode"),
        "s3:object-lock-retain-until-date": until and iso_date(until)})
    need_object_lock(request)
    bypass = may_bypass(request, request.key)

    def change(record):
        lock = record.get("lock", {})
        check_retention_change(lock, retention, time.time(), bypass)
        record["lock"] = with_retention(lock, retention)
    request.bucket.update_record(request.key, asked_version(request), change,
                                 note_changed(request, "ObjectRetention:Put"))


@operation("GET", OBJECT, "legal-hold")
def get_object_legal_hold(request):
    """API_GetObjectLegalHold."""
    need_object_lock(request)
    lock = find_asked(request).record.get("lock", {})
    return xml_document("LegalHold", legal_hold_children(lock))


@operation("PUT", OBJECT, "legal-hold")
def put_object_legal_hold(request):
    """API_PutObjectLegalHold."""
    need_digest(request)
    hold = parse_legal_hold(request.xml("LegalHold"))
    request.allow_change({"s3:object-lock-legal-hold": hold})
    need_object_lock(request)

    def change(record):
        record["lock"] = dict(record.get("lock", {}), hold=hold)
    request.bucket.update_record(request.key, asked_version(request), change)


# --- encryption ---

SSE_HEADER = "x-amz-server-side-encryption"
KMS_KEY_HEADER = SSE_HEADER + "-aws-kms-key-id"
KMS_CONTEXT_HEADER = SSE_HEADER + "-context"
BUCKET_KEY_HEADER = SSE_HEADER + "-bucket-key-enabled"
CUSTOMER = SSE_HEADER + "-customer-"
COPY_CUSTOMER = "x-amz-copy-source-server-side-encryption-customer-"
_CUSTOMER_NAMES = ("algorithm", "key", "key-md5")

DSSE_KMS = "aws:kms:dsse"

# Codes and messages are AWS's: LocalStack's snapshots of
# test_put_object_validation_sse_c, test_object_retrieval_sse_c and
# test_multipart_upload_sse_c_validation; API/ErrorResponses.html.
_CUSTOMER_ERRORS = {
    name: "Requests specifying Server Side Encryption with Customer "
          "provided keys must provide " + rest for name, rest in (
              ("key", "an appropriate secret key."),
              ("algorithm", "a valid encryption algorithm."),
              ("key-md5", "the client calculated MD5 of the secret key."))}
WRONG_READ_KEY = (
    "AccessDenied", "Requests specifying Server Side Encryption with "
                    "Customer provided keys must provide the correct "
                    "secret key.")
WRONG_PART_KEY = (
    "InvalidRequest", "The provided encryption parameters did not match the "
                      "ones used originally.")


class Encryption(NamedTuple):
    """How an object is to be kept.

    algorithm: SSE_C, SSE_S3 or SSE_KMS.  context: base64, as it came.
    customer_key: SSE-C's 32 bytes, never stored.
    """
    algorithm: str
    kms_key_id: Optional[str] = None
    context: Optional[str] = None
    bucket_key: bool = False
    customer_key: Optional[bytes] = None


class BucketEncryption(NamedTuple):
    """A bucket's default encryption.  algorithm: None for none.  blocked:
    EncryptionTypes that no upload may ask for."""
    algorithm: Optional[str] = None
    kms_key_id: Optional[str] = None
    bucket_key: bool = False
    blocked: Tuple[str, ...] = ()


CONFIG_SHAPES["encryption"] = document_shape(
    (), algorithm=(None, SSE_S3, SSE_KMS).__contains__,
    kms_key_id=(str, type(None)), bucket_key=bool, blocked=[str])


def _sse_error(message, value=None):
    """AWS names this one header in all these errors, whichever it was."""
    fields = {} if value is None else {"ArgumentValue": value}
    return S3Error("InvalidArgument", message, ArgumentName=SSE_HEADER,
                   **fields)


def customer_key(headers, prefix=CUSTOMER, writes=True):
    """The key that SSE-C headers carry, None when there are none, or
    S3Error as AWS answers, and in its order.

    prefix: CUSTOMER or COPY_CUSTOMER.  writes: False for reading, where
    AWS does not ask for the MD5, and a key of another length is just a
    wrong key.  userguide/ServerSideEncryptionCustomerKeys.html: AWS takes
    these headers over HTTPS only; here plain HTTP is allowed, for tests.
    """
    algorithm, text, md5 = [headers.get(prefix + name)
                            for name in _CUSTOMER_NAMES]
    if algorithm is None and text is None and md5 is None:
        return None
    if text is None:
        raise _sse_error(_CUSTOMER_ERRORS["key"])
    if algorithm is None:
        raise _sse_error(_CUSTOMER_ERRORS["algorithm"])
    if algorithm != SSE_S3:
        raise S3Error("InvalidEncryptionAlgorithmError",
                      ArgumentName=SSE_HEADER, ArgumentValue=algorithm)
    if md5 is None and writes:
        raise _sse_error(_CUSTOMER_ERRORS["key-md5"])
    key = _decode_key(text)
    if md5 is not None:
        _check_key_md5(key, md5)
    if len(key) != SEAL_KEY_BYTES:
        if writes:
            raise _sse_error("The secret key was invalid for the specified "
                             "algorithm.")
        raise S3Error(*WRONG_READ_KEY)
    return key


def _decode_key(text):
    """The bytes of a customer key: AWS skips what is not base64, and does
    not miss padding."""
    try:
        key = base64.b64decode(text.encode("latin-1", "replace") + b"==")
    except binascii.Error:
        key = b""
    if not key:
        raise _sse_error("The secret key was invalid - too short.")
    return key


def _check_key_md5(key, md5):
    expected = decode_digest(md5, 16)
    if expected is None:
        raise _sse_error("The MD5 hash of the secret key was improperly "
                         "encoded. The MD5 hash must be Base64 encoded.")
    if not hmac.compare_digest(new_md5(key).digest(), expected):
        raise _sse_error("The calculated MD5 hash of the key did not match "
                         "the hash that was provided.")


def names_encryption(headers):
    """True when a request itself says how to encrypt: enough of a change
    for a copy of an object to itself (API_CopyObject.html)."""
    return SSE_HEADER in headers or CUSTOMER + "key" in headers


def put_encryption(headers, default=None):
    """The Encryption of what PutObject, CopyObject, CreateMultipartUpload
    or a form makes, None for none; a request's own word goes before the
    bucket's `default` (a BucketEncryption or None).

    API_PutObject.html; userguide/blocking-unblocking-s3-c-encryption-
    gpb.html.  Whether the KMS key exists is not looked at.
    """
    default = default or BucketEncryption()
    algorithm = _asked_algorithm(headers)
    key = customer_key(headers)
    if key is not None:
        if SSE_C in default.blocked:
            raise S3Error("AccessDenied", "The bucket's configuration blocks "
                          "uploads with SSE-C")
        return Encryption(SSE_C, customer_key=key)
    asked = algorithm is not None
    key_id = headers.get(KMS_KEY_HEADER) if asked else default.kms_key_id
    algorithm = algorithm if asked else default.algorithm
    if algorithm in (None, SSE_S3):
        return algorithm and Encryption(algorithm)
    return Encryption(
        algorithm, key_id or DEFAULT_KMS_KEY, _kms_context(headers),
        _bucket_key(headers.get(BUCKET_KEY_HEADER), default.bucket_key))


def _asked_algorithm(headers):
    """What x-amz-server-side-encryption says, None when it is not there;
    checked against the headers that go with it."""
    algorithm = headers.get(SSE_HEADER)
    if algorithm is not None and any(
            CUSTOMER + name in headers for name in _CUSTOMER_NAMES):
        raise _sse_error("Server Side Encryption with Customer provided key "
                         "is incompatible with the encryption method "
                         "specified", algorithm)
    if algorithm not in (None, SSE_S3, SSE_KMS, DSSE_KMS):
        raise _sse_error("The encryption method specified is not supported",
                         algorithm)
    if algorithm in (None, SSE_S3) and (
            KMS_KEY_HEADER in headers or KMS_CONTEXT_HEADER in headers):
        raise _sse_error("Server Side Encryption with AWS KMS managed key "
                         "requires HTTP header x-amz-server-side-encryption "
                         ": aws:kms", algorithm)
    _refuse_dual_layer(algorithm)
    return algorithm


def _refuse_dual_layer(algorithm):
    """Content is sealed once here, so DSSE-KMS would be a lie."""
    if algorithm == DSSE_KMS:
        raise S3Error("NotImplemented", "Dual-layer encryption "
                      "(aws:kms:dsse) is not implemented", Header=SSE_HEADER)


def _kms_context(headers):
    """The encryption context, as it came: base64 of a JSON object of
    texts.  userguide/UsingKMSEncryption.html#encryption-context"""
    text = headers.get(KMS_CONTEXT_HEADER)
    if text is None:
        return None
    try:
        context = parse_json(base64.b64decode(text.encode("ascii"),
                                              validate=True))
    except ValueError:
        context = None
    if not isinstance(context, dict) or not all(
            isinstance(value, str) for value in context.values()):
        raise S3Error("InvalidArgument", "The header "
                      "'x-amz-server-side-encryption-context' shall be "
                      "Base64-encoded UTF-8 string holding JSON which "
                      "represents a string-string map",
                      ArgumentName=KMS_CONTEXT_HEADER, ArgumentValue=text)
    return text


def _bucket_key(text, default):
    """The value of x-amz-server-side-encryption-bucket-key-enabled."""
    if text is None:
        return default
    if text.lower() not in ("true", "false"):
        raise S3Error("InvalidArgument", "The header value is not a boolean",
                      ArgumentName=BUCKET_KEY_HEADER, ArgumentValue=text)
    return text.lower() == "true"


# reading and parts

def check_read_headers(headers):
    """Only an upload can choose an encryption: GetObject, HeadObject and
    GetObjectAttributes with such a header are errors (API_GetObject.html).
    """
    for name in (SSE_HEADER, KMS_KEY_HEADER, KMS_CONTEXT_HEADER,
                 BUCKET_KEY_HEADER):
        if name in headers:
            raise S3Error("InvalidArgument", "%s header is not supported for "
                          "this operation." % name, ArgumentName=name,
                          ArgumentValue=headers[name])


def read_key(headers, algorithm, prefix=CUSTOMER):
    """The customer key to read an object with, None when it needs none.

    algorithm: how the object is kept, None for plain.  prefix:
    COPY_CUSTOMER for the source of a copy.
    """
    key = customer_key(headers, prefix, writes=False)
    if algorithm == SSE_C and key is None:
        raise S3Error("InvalidRequest", "The object was stored using a form "
                      "of Server Side Encryption. The correct parameters "
                      "must be provided to retrieve the object.")
    if algorithm != SSE_C and key is not None:
        raise S3Error("InvalidRequest", "The encryption parameters are not "
                      "applicable to this object.")
    return key


def part_key(headers, algorithm, required=True):
    """The customer key of a part; as the upload began, so must its parts
    be (API_UploadPart.html).

    required: False for CompleteMultipartUpload and ListParts of an upload
    without a checksum algorithm (API_CompleteMultipartUpload.html).
    """
    key = customer_key(headers)
    if (algorithm == SSE_C) != (key is not None) and (
            required or key is not None):
        raise S3Error("InvalidRequest", "The multipart upload initiate "
                      "requested encryption. Subsequent part requests must "
                      "include the appropriate encryption parameters.")
    return key


def encryption_headers(encryption, with_context=False):
    """What an answer says of an Encryption or None.

    with_context: for PutObject, CopyObject and CreateMultipartUpload, the
    only ones whose answer repeats the context.
    """
    if encryption is None:
        return {}
    if encryption.algorithm == SSE_C:
        if encryption.customer_key is None:
            return {}               # Complete, without the key
        md5 = base64.b64encode(new_md5(encryption.customer_key).digest())
        return {CUSTOMER + "algorithm": "AES256",
                CUSTOMER + "key-MD5": md5.decode()}
    headers = {SSE_HEADER: encryption.algorithm}
    if encryption.kms_key_id:
        headers[KMS_KEY_HEADER] = encryption.kms_key_id
    if encryption.context and with_context:
        headers[KMS_CONTEXT_HEADER] = encryption.context
    if encryption.bucket_key:
        headers[BUCKET_KEY_HEADER] = "true"
    return headers


# envelopes: the member `sse` of a record

def kept_sse(info):
    """The sse of an object, None for a plain one; InternalError for what
    is sealed and does not say, or not rightly, how it opens."""
    if info.damaged:
        raise S3Error("InternalError", "The content of this object is not "
                      "all there, or encrypted, and its record is lost or "
                      "damaged")
    return info.record.get("sse")


def make_envelope(encryption, masters, bound=(), key=None):
    """(data key, sse): a new data key, or `key`, and the part of a record
    that keeps it, wrapped.

    masters: the MasterKeys, not looked at for SSE-C, whose data keys the
    customer's key wraps.  bound: texts that open_envelope must be given
    again.  KMS.NotFoundException for a KMS key that there is not.
    """
    sse = {"algorithm": encryption.algorithm}
    if encryption.kms_key_id:
        sse["kms_key_id"] = encryption.kms_key_id
    if encryption.context:
        sse["context"] = encryption.context
    if encryption.bucket_key:
        sse["bucket_key"] = True
    key = key or secrets.token_bytes(SEAL_KEY_BYTES)
    wrapping = encryption.customer_key
    if encryption.algorithm != SSE_C:
        wrapping = _master_of(encryption, masters)
        sse["master"] = key_fingerprint(wrapping)
    sse["key"] = wrap_key(wrapping, key,
                          _envelope_context(encryption, bound))
    return key, sse


def open_envelope(sse, customer, masters, bound=(), wrong=WRONG_READ_KEY):
    """The data key in an sse.

    customer: what read_key or part_key gave.  wrong: the S3Error's
    arguments when it is not the right one.  SealError when the key file
    has not the master key, or when the record was changed.
    """
    encryption = known_encryption(sse, customer)
    wrapping = customer
    if encryption.algorithm != SSE_C:
        _master_of(encryption, masters)
        wrapping = masters.fingerprinted(sse["master"])
    try:
        return unwrap_key(wrapping, sse["key"],
                          _envelope_context(encryption, bound))
    except SealError:
        if customer is None:
            raise
        raise S3Error(*wrong) from None


def known_encryption(sse, customer=None):
    """The Encryption that an sse tells of."""
    return Encryption(sse["algorithm"], sse.get("kms_key_id"),
                      sse.get("context"), sse.get("bucket_key", False),
                      customer)


def _master_of(encryption, masters):
    if encryption.algorithm == SSE_KMS:
        return masters.find(encryption.kms_key_id)
    return masters.default


def _envelope_context(encryption, bound):
    return (encryption.algorithm, encryption.kms_key_id or "",
            encryption.context or "") + tuple(bound)


def dump_sequences(sequences):
    """Sequences for a record: {"sizes": [[size, count], ...],
    "prefixes": base64}."""
    prefixes = b"".join(sequence.prefix for sequence in sequences)
    return {"sizes": _size_runs(sequences),
            "prefixes": base64.b64encode(prefixes).decode()}


def load_sequences(dumped):
    """The Sequences again; SealError when that is not what it is."""
    try:
        sizes = [size for size, count in dumped["sizes"]
                 for _ in range(count)]
        prefixes = decode_digest(dumped["prefixes"],
                                 len(sizes) * SEAL_PREFIX_BYTES)
        return [Sequence(size, prefixes[at:at + SEAL_PREFIX_BYTES])
                for size, at in zip(sizes, range(
                    0, len(prefixes), SEAL_PREFIX_BYTES))]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SealError("the record does not tell the parts") from None


# the bucket's default

def parse_bucket_encryption(document):
    """The BucketEncryption in a ServerSideEncryptionConfiguration Element.

    API_PutBucketEncryption.html: one rule; a KMS key id is not looked up.
    MalformedXML, InvalidArgument or NotImplemented.
    """
    rules = list(document)
    if len(rules) != 1 or rules[0].tag != "Rule" or not len(rules[0]):
        raise S3Error("MalformedXML")
    rule = _only_children(rules[0], (
        "ApplyServerSideEncryptionByDefault", "BucketKeyEnabled",
        "BlockedEncryptionTypes"))
    algorithm, key_id = _default_algorithm(
        rule.get("ApplyServerSideEncryptionByDefault"))
    bucket_key = _element_text(rule.get("BucketKeyEnabled"), "false")
    if bucket_key not in ("true", "false"):
        raise S3Error("MalformedXML")
    return BucketEncryption(algorithm, key_id, bucket_key == "true",
                            _blocked_types(rule.get(
                                "BlockedEncryptionTypes")))


def _only_children(element, names):
    """tag -> child; MalformedXML for another child or a second one."""
    children = {child.tag: child for child in element}
    if len(children) != len(element) or not set(children) <= set(names):
        raise S3Error("MalformedXML")
    return children


def _element_text(element, default=None):
    """The stripped text of a leaf, `default` when there is none."""
    if element is None:
        return default
    if len(element):
        raise S3Error("MalformedXML")
    return (element.text or "").strip()


def _default_algorithm(element):
    """(algorithm, KMS key id or None) of the rule's first member."""
    if element is None:
        return None, None
    children = _only_children(element, ("SSEAlgorithm", "KMSMasterKeyID"))
    algorithm = _element_text(children.get("SSEAlgorithm"))
    if algorithm not in (SSE_S3, SSE_KMS, DSSE_KMS):
        raise S3Error("MalformedXML")
    key_id = _element_text(children.get("KMSMasterKeyID"))
    if key_id is not None and algorithm == SSE_S3:
        raise S3Error("InvalidArgument", "a KMSMasterKeyID is not applicable "
                      "if the default sse algorithm is not aws:kms or "
                      "aws:kms:dsse",
                      ArgumentName="ApplyServerSideEncryptionByDefault")
    _refuse_dual_layer(algorithm)
    return algorithm, key_id or None


def _blocked_types(element):
    """API_BlockedEncryptionTypes.html: SSE-C, or NONE to block nothing."""
    if element is None:
        return ()
    if any(child.tag != "EncryptionType" for child in element):
        raise S3Error("MalformedXML")
    types = tuple(_element_text(child) for child in element)
    if types not in ((), ("NONE",), (SSE_C,)):
        raise S3Error("MalformedXML")
    return types


def bucket_encryption_children(default):
    """A BucketEncryption as the children of its document."""
    rule = []
    if default.algorithm:
        rule.append(("ApplyServerSideEncryptionByDefault", [
            ("SSEAlgorithm", default.algorithm),
            ("KMSMasterKeyID", default.kms_key_id)]))
    rule.append(("BucketKeyEnabled", default.bucket_key))
    if default.blocked:
        rule.append(("BlockedEncryptionTypes", [
            ("EncryptionType", name) for name in default.blocked]))
    return [("Rule", rule)]


# content

class SealedDraft:
    """Takes plain bytes, as a Draft does, and writes them to one, sealed
    under a new data key or `key`.  size: of the plain bytes."""

    def __init__(self, draft, key=None):
        self.key = key or secrets.token_bytes(SEAL_KEY_BYTES)
        self.size, self._draft, self._prefix = 0, draft, new_prefix()
        self._sealer = Sealer(self.key, self._prefix)

    def write(self, data):
        """Append bytes."""
        self.size += len(data)
        self._draft.write(self._sealer.update(data))

    def finish(self):
        """Write what is left; the Sequence that the draft holds now."""
        self._draft.write(self._sealer.finish())
        return Sequence(self.size, self._prefix)


def bucket_encryption(request):
    """The BucketEncryption of the request's bucket, or None."""
    kept = request.setting("encryption")
    return kept and BucketEncryption(
        kept["algorithm"], kept["kms_key_id"], kept["bucket_key"],
        tuple(kept["blocked"]))


def asked_encryption(request):
    """The Encryption of what a request writes, None for none; that it can
    be done is known before the body is asked for."""
    default = bucket_encryption(request)
    if default is None and SSE_HEADER not in "".join(request.headers):
        return None                     # nearly always: one search says so
    encryption = put_encryption(request.headers, default)
    if encryption is not None:
        need_libcrypto()                # before a key file is made
        make_envelope(encryption, _masters(request, encryption))
    return encryption


def _masters(request, encryption, make=True):
    """The MasterKeys that an Encryption needs; None for SSE-C."""
    if encryption.algorithm == SSE_C:
        return None
    return request.service.key_file.get(request.store if make else None)


def _note_sealed(request, encryption):
    """Have bucket.json tell that master keys are needed here, so that
    nobody makes new ones when they are lost."""
    if encryption.algorithm != SSE_C and not request.setting("sealed"):
        request.store.update_bucket(request.bucket, lambda config:
                                    config.update(sealed=True), False)


def content_draft(draft, encryption):
    """What content is to be written to: the draft itself, or around it a
    SealedDraft."""
    return draft if encryption is None else SealedDraft(draft)


def seal_content(request, encryption, sealed, record):
    """Finish a SealedDraft, and give the record its envelope and an ETag
    that tells nothing of the content.  Nothing for a plain Draft."""
    if encryption is None:
        return
    _note_sealed(request, encryption)
    record["sse"] = _bound_envelope(
        encryption, _masters(request, encryption), [sealed.finish()],
        sealed.key)
    if encryption.algorithm != SSE_S3:
        record["etag"] = sealed_etag(sealed.key,
                                     bytes.fromhex(record["etag"]))


def _bound_envelope(encryption, masters, sequences, key):
    """An sse for a whole object: how its parts follow is bound to it."""
    dumped = dump_sequences(sequences)
    _, sse = make_envelope(encryption, masters, (json.dumps(dumped),), key)
    return dict(sse, bound=True, **dumped)


def _bound_texts(sse):
    """What _bound_envelope() bound."""
    if not sse.get("bound"):
        return ()
    return (json.dumps({name: sse.get(name)
                        for name in ("sizes", "prefixes")}),)


def open_key(request, sse, customer, wrong=WRONG_READ_KEY):
    """The data key in an sse.  InternalError when key file or record is
    not the one that it was sealed with."""
    masters = _masters(request, known_encryption(sse), False)
    try:
        return open_envelope(sse, customer, masters, _bound_texts(sse),
                             wrong)
    except SealError as error:
        raise S3Error("InternalError", "The data key of this object does "
                      "not open with the key file's keys") from error


def data_key(request, info, prefix=CUSTOMER):
    """The key that an object opens with, None for a plain one.

    prefix: COPY_CUSTOMER for the source of a copy.
    """
    sse = kept_sse(info)
    customer = read_key(request.headers, sse and sse["algorithm"], prefix)
    return sse and open_key(request, sse, customer)


def opened_blocks(info, fd, key, start, stop):
    """The plain bytes of an object from start to stop, in blocks.

    InternalError where the file is not what was written.
    """
    if key is None:
        yield from read_blocks(fd, start, stop - start)
        return
    try:
        yield from open_range(functools.partial(_pread, fd), key,
                              load_sequences(info.record["sse"]), start,
                              stop)
    except SealError as error:
        raise S3Error("InternalError", "The stored content of this object "
                      "is damaged") from error


def shown_encryption(request, info):
    """The headers of GetObject and HeadObject for how an object is kept;
    the customer's key is checked."""
    if "sse" not in info.record and not info.damaged \
            and SSE_HEADER not in "".join(request.headers):
        return {}                       # nearly always: one search says so
    check_read_headers(request.headers)
    sse = kept_sse(info)
    data_key(request, info)
    return encryption_headers(sse and known_encryption(
        sse, customer_key(request.headers, writes=False)))


# parts

def upload_envelope(request, encryption, record):
    """Give the record of a new upload the key of all its parts."""
    if encryption is not None:
        _note_sealed(request, encryption)
        record["sse"] = make_envelope(encryption,
                                      _masters(request, encryption))[1]


def part_draft(request, upload, draft):
    """What a part is to be written to: the draft, or around it a
    SealedDraft under the upload's key.

    Headers that choose an encryption are errors to AWS here as well.
    Clients that send them along everywhere, and ceph/s3-tests, count on a
    200: they get it when that is how the upload is encrypted.
    """
    sse = upload.record.get("sse")
    if sse is None or request.headers.get(SSE_HEADER) != sse["algorithm"]:
        check_read_headers(request.headers)
    customer = part_key(request.headers, sse and sse["algorithm"])
    if sse is None:
        return draft
    return SealedDraft(draft, open_key(request, sse, customer,
                                       WRONG_PART_KEY))


def seal_part(upload, sealed, record):
    """Finish a part: as seal_content(), the key being the upload's, and
    its prefix in the file."""
    sse = upload.record.get("sse")
    if sse is None:
        return
    sealed.finish()
    if sse["algorithm"] != SSE_S3:
        record["etag"] = sealed_etag(sealed.key,
                                     bytes.fromhex(record["etag"]))


def upload_encryption(request, upload):
    """The headers of an answer that speaks of an upload's parts."""
    sse = upload.record.get("sse")
    return encryption_headers(sse and known_encryption(
        sse, customer_key(request.headers)))


def seal_assembled(request, upload, parts, record):
    """Give the record of an object made of sealed parts its envelope.

    SSE-C's key need not come with CompleteMultipartUpload; the parts'
    order is bound to the envelope when it does.
    """
    sse = upload.record.get("sse")
    if sse is None:
        part_key(request.headers, None)
        return
    sequences = [Sequence(part.size, part.prefix) for part in parts]
    customer = part_key(request.headers, sse["algorithm"],
                        "algorithm" in upload.record)
    if sse["algorithm"] == SSE_C and customer is None:
        record["sse"] = dict(sse, **dump_sequences(sequences))
        return
    key = open_key(request, sse, customer, WRONG_PART_KEY)
    encryption = known_encryption(sse, customer)
    record["sse"] = _bound_envelope(encryption, _masters(
        request, encryption), sequences, key)


# operations

@operation("GET", BUCKET, "encryption")
def get_bucket_encryption(request):
    """API_GetBucketEncryption: none until one is put, since a file that
    anybody can read is what this server is for."""
    default = bucket_encryption(request)
    if default is None:
        raise S3Error("ServerSideEncryptionConfigurationNotFoundError",
                      BucketName=request.bucket_name)
    return xml_document("ServerSideEncryptionConfiguration",
                        bucket_encryption_children(default))


@operation("PUT", BUCKET, "encryption")
def put_bucket_encryption(request):
    """API_PutBucketEncryption."""
    default = parse_bucket_encryption(
        request.xml("ServerSideEncryptionConfiguration"))
    if default.algorithm:
        need_libcrypto()
    request.store.update_bucket(request.bucket, lambda config: config.update(
        encryption=default._asdict()))


@operation("DELETE", BUCKET, "encryption", status=204)
def delete_bucket_encryption(request):
    """API_DeleteBucketEncryption."""
    _forget(request, "encryption")


_OBJECT_ENCRYPTION = (need("SSE-KMS", (
    need("KMSKeyArn", FILLED), Field("BucketKeyEnabled", BOOLEAN))),)


@operation("PUT", OBJECT, "encryption")
def update_object_encryption(request):
    """API_UpdateObjectEncryption: the data key is wrapped anew, under a
    KMS key; the content stays as it is."""
    asked = read_document(request.xml("ObjectEncryption"),
                          _OBJECT_ENCRYPTION)["SSE-KMS"]
    if not asked["KMSKeyArn"].strip().startswith("arn:"):
        raise bad_argument("The KMS key must be named by its ARN.",
                           "KMSKeyArn", asked["KMSKeyArn"])
    encryption = Encryption(
        SSE_KMS, asked["KMSKeyArn"].strip(),
        bucket_key=asked.get("BucketKeyEnabled", False))
    kept_sse(find_asked(request))       # what is damaged is left alone

    def change(record):
        check_unlocked(record.get("lock", {}), time.time())
        sse = record.get("sse")
        if sse is None or sse["algorithm"] == SSE_C:
            raise S3Error("InvalidRequest", "Only an object that is "
                          "encrypted with SSE-S3 or SSE-KMS can be updated")
        masters = _masters(request, encryption, False)
        record["sse"] = _bound_envelope(
            encryption, masters, load_sequences(sse),
            open_key(request, sse, None))
    info = request.bucket.update_record(request.key, asked_version(request),
                                        change)
    return version_header(request, info)


# --- access logs: the document ---
#
# API_PutBucketLogging.html, userguide/ServerLogs.html and
# enable-server-access-logging.html; the errors are those of
# troubleshooting-server-access-logging.html.

EVENT_TIME, DELIVERY_TIME = "EventTime", "DeliveryTime"

_LOGGING = (Field("LoggingEnabled", (
    need("TargetBucket", FILLED),
    Field("TargetGrants", (many("Grant", (
        need("Grantee", (
            need("@type", TEXT), Field("DisplayName", TEXT),
            Field("EmailAddress", FILLED), Field("ID", FILLED),
            Field("URI", FILLED))),
        need("Permission", one_of("FULL_CONTROL", "READ", "WRITE"))),
        0, MAX_GRANTS - 1),)),          # the owner's grant comes on top
    need("TargetPrefix", TEXT),
    Field("TargetObjectKeyFormat", (
        Field("SimplePrefix", ()),
        Field("PartitionedPrefix", (Field("PartitionDateSource", one_of(
            EVENT_TIME, DELIVERY_TIME)),)))))),)
CONFIG_SHAPES["logging"] = document_shape(tuple(
    field for field in _LOGGING[0].kind if field.tag != "TargetGrants"))


def parse_logging(element, owner_id, accounts):
    """What a BucketLoggingStatus asks for, as bucket.json keeps it: its
    elements by name, the grants as dump_acl() writes them for the owner of
    the target.  None when it turns logging off."""
    logging = read_document(element, _LOGGING).get("LoggingEnabled")
    if logging is None:
        return None
    layout = logging.get("TargetObjectKeyFormat")
    if layout is not None and len(layout) != 1:
        raise S3Error("MalformedXML")
    grants = []
    for item in logging.pop("TargetGrants", {}).get("Grant", ()):
        grantee = find_grantee(item["Grantee"]["@type"],
                               item["Grantee"].get, accounts)
        if grantee is None:
            raise S3Error("MalformedXML")
        grants.append(Grant(item["Permission"], grantee))
    if grants:
        logging["TargetGrants"] = dump_acl(grants, owner_id)
    return logging


def logging_children(logging, owner_id, accounts):
    """The children of a BucketLoggingStatus."""
    if logging is None:
        return []
    children = document_children({"LoggingEnabled": {
        name: value for name, value in logging.items()
        if name != "TargetGrants"}}, _LOGGING)
    if "TargetGrants" in logging:
        children[0][1].insert(1, ("TargetGrants", grant_children(
            load_acl(logging["TargetGrants"], owner_id), accounts)))
    return children


def log_key(logging, owner_id, bucket, name):
    """The key of a log object in the target bucket.

    name: that of the claimed file, <day>-<YYYY-mm-dd-HH-MM-SS>-<unique>:
    the day of the requests, the time of the delivery.
    API_PartitionedPrefix.html.
    """
    day, rest = name[:8], name[9:]
    layout = logging.get("TargetObjectKeyFormat", {}).get(
        "PartitionedPrefix")
    if layout is None:
        return logging["TargetPrefix"] + rest
    if layout.get("PartitionDateSource", EVENT_TIME) == EVENT_TIME:
        rest = "%s-%s-%s-00-00-00%s" % (day[:4], day[4:6], day[6:],
                                        rest[19:])
    return "%s%s/%s/%s/%s/%s/%s/%s" % (
        logging["TargetPrefix"], owner_id, bucket.region, bucket.name,
        rest[:4], rest[5:7], rest[8:10], rest)


def _bad_target(name, message=None):
    return S3Error("InvalidTargetBucketForLogging", message,
                   TargetBucket=name)


def check_log_target(request, logging):
    """Raise unless logs of the request's bucket may go to the target.

    That the log delivery may write there is checked where ACLs are on, as
    S3 does and s3cmd expects; where they are off it shows at delivery.
    """
    service, source, name = request.service, request.bucket, \
        logging["TargetBucket"]
    try:
        target = service.store.bucket(name)
    except S3Error:
        raise _bad_target(name) from None
    if service.accounts.owner_id(target) != bucket_owner(request):
        raise _bad_target(name, "The owner for the bucket to be logged and "
                          "the target bucket must be the same.")
    if target.region != source.region:
        raise S3Error("CrossLocationLoggingProhibitted",
                      SourceBucketLocation=source.region,
                      TargetBucketLocation=target.region)
    config = target.config
    if config.get("requestPayment", {}).get("Payer") == "Requester":
        raise _bad_target(name, "The target bucket for logging cannot be a "
                          "Requester Pays bucket")
    if config.get("object_lock"):
        raise _bad_target(name, "The target bucket for logging cannot have "
                          "a default retention period")
    checked_key(log_key(logging, bucket_owner(request), source, "0" * 45))
    delivery = log_delivery(service, source, target,
                            logging["TargetPrefix"])
    access = delivery.access(target)
    if access.ownership == ENFORCED:
        if "TargetGrants" in logging:
            raise S3Error("AccessControlListNotSupported", "Target grants "
                          "not allowed for bucket owner enforced buckets")
    elif not without_acl(delivery, "s3:PutObject") and not (
            delivery.allowed("s3:PutObject", delivery.key)
            and acl_allows(access.acl, "READ_ACP", delivery.caller)):
        raise _bad_target(name, "You must give the log-delivery group WRITE "
                          "and READ_ACP permissions to the target bucket")


def without_acl(request, action):
    """True when a caller may do what it asks for without any ACL."""
    access = request.access(request.bucket)._replace(ownership=ENFORCED)
    key = request.key or None
    return is_allowed(request.caller, action, resource_arn(
        request.bucket.name, key), access, policy_context(
            request, request.bucket, key))


@operation("GET", BUCKET, "logging")
def get_bucket_logging(request):
    """API_GetBucketLogging: empty when there is none."""
    return xml_document("BucketLoggingStatus", logging_children(
        request.setting("logging"), bucket_owner(request),
        request.service.accounts))


@operation("PUT", BUCKET, "logging")
def put_bucket_logging(request):
    """API_PutBucketLogging; "you must be the bucket owner".

    What has been logged so far still goes where it was meant to go.
    """
    owner = bucket_owner(request)
    if request.caller.user_id != owner:
        raise S3Error("AccessDenied")
    logging = parse_logging(request.xml("BucketLoggingStatus"), owner,
                            request.service.accounts)
    if logging is not None:
        check_log_target(request, logging)
    deliver_log(request.service, request.bucket, request.now)

    def change(config):
        config.pop("logging", None)
        if logging is not None:
            config["logging"] = logging
    request.store.update_bucket(request.bucket, change)


# --- access logs: lines ---
#
# userguide/LogFormat.html.  A line is spooled after its request has been
# answered; a bucket without logging pays for one look into its document,
# which has been read anyway.

class LogLine(NamedTuple):
    """The fields of a line, in their order; None stands as `-`.

    time: seconds since the epoch.  key: the key itself.
    """
    bucket_owner: str
    bucket: str
    time: float
    remote_ip: Optional[str]
    requester: Optional[str]
    request_id: str
    operation: str
    key: Optional[str] = None
    request_uri: Optional[str] = None
    status: Optional[int] = None
    error_code: Optional[str] = None
    bytes_sent: Optional[int] = None
    object_size: Optional[int] = None
    total_ms: Optional[int] = None
    turn_around_ms: Optional[int] = None
    referer: Optional[str] = None
    user_agent: Optional[str] = None
    version_id: Optional[str] = None
    host_id: Optional[str] = None
    signature: Optional[str] = None
    cipher: Optional[str] = None
    authentication: Optional[str] = None
    host: Optional[str] = None
    tls_version: Optional[str] = None
    access_point_arn: Optional[str] = None
    acl_required: Optional[str] = None
    source_region: Optional[str] = None


class OnWire(NamedTuple):
    """What only its connection knows of a request: the head as it came,
    what was sent, times in milliseconds."""
    method: str
    target: str
    version: Tuple[int, int]
    headers: Dict[str, str]
    sent: int
    total_ms: float
    turn_around_ms: float
    cipher: Optional[str] = None
    tls_version: Optional[str] = None


_QUOTED = frozenset(("request_uri", "referer", "user_agent"))
_UNSAFE_IN_FIELD = re.compile(r"[^!-~]")
_SAFE_IN_FIELD = string.ascii_letters + string.digits + string.punctuation
_UNSAFE_IN_QUOTES = re.compile(r"[\x00-\x1f\x7f]+")
# What gives whoever reads it a right: it is not logged, however it is
# written, and not in the Referer that a page behind a presigned URL sends
_SECRET_NAMES = frozenset((
    "signature", "x-amz-signature", "x-amz-security-token"))
_QUERY_ITEM = re.compile(r"(?<=[?&])([^=&]*)=[^&]*")

# Subresource -> what the operation's name ends in, where that is not the
# subresource's own name in capitals
_LOG_NAMES = {
    "attributes": "OBJECT_ATTRIBUTES", "delete": "MULTI_OBJECT_DELETE",
    "legal-hold": "OBJECT_LOCK_LEGALHOLD", "logging": "LOGGING_STATUS",
    "object-lock": "OBJECT_LOCK_CONFIGURATION", "policy": "BUCKETPOLICY",
    "retention": "OBJECT_LOCK_RETENTION", "uploadId": "UPLOAD",
    "versions": "BUCKETVERSIONS"}
_LOG_OPERATIONS = {
    "CopyObject": "REST.COPY.OBJECT", "PostObject": "REST.POST.OBJECT",
    "UploadPart": "REST.PUT.PART", "UploadPartCopy": "REST.COPY.PART"}


def log_operation(row, method, level, is_site=False):
    """The name of an Operation (None: none was found) in access logs."""
    if is_site:
        return "WEBSITE.%s.OBJECT" % method
    if method == "OPTIONS":
        return "REST.OPTIONS.PREFLIGHT"
    if row is None or row.subresource is None:
        name = level.upper()
    elif (row.level, row.subresource) == (OBJECT, "tagging"):
        name = "OBJECT_TAGGING"
    else:
        name = _LOG_NAMES.get(row.subresource) or re.sub(
            r"(?<=[a-z])(?=[A-Z])|-", "_", row.subresource).upper()
    return _LOG_OPERATIONS.get(row and row.name) or "REST.%s.%s" % (
        method, name)


def log_line_text(line):
    """A LogLine as text, without its newline.

    The key is encoded twice, but once only in BATCH and S3 operations, as
    readers of S3's logs know it (engineeringblog.yelp.com/2025/09, "S3
    server access logs at scale").
    """
    fields = line._asdict()
    fields["time"] = time.strftime("[%d/%b/%Y:%H:%M:%S +0000]",
                                   time.gmtime(line.time))
    if line.key is not None:
        fields["key"] = uri_encode(line.key, "/-_.~")
        if line.operation.startswith(("REST.", "WEBSITE.")):
            fields["key"] = uri_encode(fields["key"], "/-_.~")
    return " ".join(_field_text(*field) for field in fields.items())


def _field_text(name, value):
    """One field: no text of a client's can end it, or the line."""
    if value is None:
        return "-"
    if name in _QUOTED:
        return '"%s"' % _UNSAFE_IN_QUOTES.sub(_escaped, value)
    if name == "time":
        return value
    text = str(value)
    if _UNSAFE_IN_FIELD.search(text):   # all at once: each takes 3 us
        text = uri_encode(text, _SAFE_IN_FIELD)
    return text or "-"


def _escaped(match):
    return uri_encode(match[0])


def log_access(request, response, on_wire):
    """Spool the lines of an answered request, in each bucket that it
    concerns and that has a log.  on_wire(): the OnWire."""
    if request.bucket is None:
        if not request.bucket_name or response.code == "NoSuchBucket":
            return
        try:                # refused before its bucket was looked for
            request.enter(request.store.bucket(request.bucket_name))
        except S3Error:
            return
    is_logged = request.config.get("logging") is not None
    if not (is_logged or request.noted) or request.service.readonly:
        return
    wire, lines = on_wire(), {}
    # once a bucket: it looks at all of a head, for a thousand keys perhaps
    shared = functools.lru_cache(maxsize=None)(
        functools.partial(_common_fields, request, wire=wire))
    if is_logged:
        lines[request.bucket] = [_request_line(
            request, response, wire, shared(request.bucket))]
    for noted in request.noted:
        lines.setdefault(noted.bucket, []).append(
            _noted_line(noted, shared(noted.bucket)))
    for logged, its_lines in lines.items():
        spool_lines(request.store, logged, its_lines)


def spool_lines(store, bucket, lines):
    """Append LogLines of one day to the spool of a bucket."""
    try:
        bucket.append_log(
            time.strftime("%Y%m%d", time.gmtime(lines[0].time)), "".join(
                log_line_text(line) + "\n" for line in lines).encode(
                    "latin-1", "replace"))
    except S3Error:
        pass                            # the bucket has been deleted
    except OSError as error:
        store.report("access log of %s: %s" % (bucket.name, error))


def _redacted(url):
    """A URL or target without the secrets in its query."""
    return _QUERY_ITEM.sub(
        lambda item: item[1] + "=REDACTED" if urllib.parse.unquote(
            item[1]).lower() in _SECRET_NAMES else item[0], url)


def _common_fields(request, bucket, wire):
    """The fields that all lines of a request share."""
    caller = request.caller
    signed, v4, presigned = signing(request)
    is_form = request.operation is not None \
        and request.operation.name == "PostObject"
    return LogLine(
        request.access(bucket).owner_id, bucket.name, request.now,
        request.client, caller.user_id if caller.is_root
        else caller.session_arn or caller.arn, request.request_id, "",
        host_id=request.request_id,
        signature=("SigV4" if v4 else "SigV2") if signed else None,
        cipher=wire.cipher, authentication=None if is_form or not signed
        else "QueryString" if presigned else "AuthHeader",
        host=wire.headers.get("host"), tls_version=wire.tls_version,
        request_uri="%s %s HTTP/%d.%d" % (
            (wire.method, _redacted(wire.target)) + wire.version),
        referer=_redacted(wire.headers.get("referer", "-")),
        user_agent=wire.headers.get("user-agent", "-"))


def _request_line(request, response, wire, line):
    """The LogLine of a request itself, from its _common_fields()."""
    row = request.operation
    return line._replace(
        operation=log_operation(row, wire.method, request.level,
                                request.is_site),
        key=request.key or None, status=response.status,
        error_code=response.code, bytes_sent=wire.sent or None,
        object_size=_object_size(request, response),
        total_ms=int(wire.total_ms), turn_around_ms=int(wire.turn_around_ms),
        version_id=request.query.get("versionId"),
        acl_required="Yes" if _needed_acl(request, response) else None)


def _noted_line(noted, line):
    """The LogLine of a Noted, from its request's _common_fields()."""
    line = line._replace(
        operation=noted.operation, key=noted.key, status=noted.status,
        error_code=noted.code, object_size=noted.size,
        version_id=noted.version_id)
    if noted.operation == BATCH_DELETE:         # these have none of their own
        return line._replace(request_uri=None, referer=None, user_agent=None)
    return line


def _object_size(request, response):
    """The size of the object that was read or written, where the answer
    tells; None otherwise."""
    name = request.operation.name if request.operation else ""
    if name in ("PutObject", "UploadPart", "PostObject"):
        return request.body.received if response.status < 304 else None
    if name not in ("GetObject", "HeadObject") or response.code:
        return None
    span = response.headers.get("Content-Range")
    if span:
        return int(span.rpartition("/")[2])
    return response.length if response.status == 200 else None


def _needed_acl(request, response):
    """True when only an ACL allowed what was done."""
    access, row = request.access(request.bucket), request.operation
    return (response.status < 400 and row is not None
            and access.ownership != ENFORCED
            and request.caller.user_id != access.owner_id
            and not without_acl(request, versioned_action(
                row.action, request.query.get("versionId"))))


# userguide/lifecycle-and-other-bucket-config.html#lifecycle-general-
# considerations-logging
EXPIRED, MARKED, ABORTED = (
    "S3.EXPIRE.OBJECT", "S3.CREATE.DELETEMARKER", "S3.DELETE.UPLOAD")
MOVED = {
    "STANDARD_IA": "S3.TRANSITION_SIA.OBJECT",
    "ONEZONE_IA": "S3.TRANSITION_ZIA.OBJECT",
    "INTELLIGENT_TIERING": "S3.TRANSITION_INT.OBJECT",
    "GLACIER_IR": "S3.TRANSITION_GIR.OBJECT",
    "GLACIER": "S3.TRANSITION.OBJECT",
    "DEEP_ARCHIVE": "S3.TRANSITION_GDA.OBJECT"}


def log_lifecycle(service, bucket, operation_name, key, version_id=None,
                  size=None):
    """Spool the line of what a lifecycle rule did, where that is logged."""
    if "logging" in bucket.config:
        spool_lines(service.store, bucket, [LogLine(
            service.accounts.owner_id(bucket), bucket.name, time.time(),
            None, "AmazonS3", "%016X" % random.getrandbits(64),
            operation_name, key, object_size=size, version_id=version_id)])


# --- access logs: delivered ---

LOG_SECONDS = 300                   # from one delivery to the next
# userguide/ServerLogs.html#server-log-keyname-format
_LOG_STAMP = "%Y-%m-%d-%H-%M-%S"


def log_pause(day_seconds):
    """Seconds from one delivery of the access logs to the next."""
    return min(LOG_SECONDS, lifecycle_pause(day_seconds))


def deliver_logs(service, now, stopped=lambda: False):
    """Deliver what is spooled in every bucket; how many objects it made.

    Several servers may do so at once: each file is claimed by one.
    """
    count = 0
    for bucket in service.store.list_buckets():
        if stopped():
            break
        count += deliver_log(service, bucket, now)
    return count


def deliver_log(service, bucket, now):
    """Deliver what is spooled in one bucket; how many objects it made.

    Where that fails the operator is told, and the spool kept within its
    bound.  Nothing new is claimed before what was claimed has gone.
    """
    count = 0
    try:
        count += _deliver_claimed(service, bucket)
        bucket.claim_logs(time.strftime(_LOG_STAMP, time.gmtime(now)))
        count += _deliver_claimed(service, bucket)
    except (S3Error, OSError) as error:
        service.store.report("access log of %s: not delivered: %s" % (
            bucket.name, error))
        gone = bucket.trim_logs()
        if gone:
            service.store.report("access log of %s: %d bytes are lost"
                                 % (bucket.name, gone))
    return count


def _deliver_claimed(service, bucket):
    """Make a log object of each claimed file; how many."""
    count = 0
    for name in bucket.spooled_logs():
        count += bucket.take_log(name, functools.partial(
            _deliver_file, service, bucket, name))
    return count


def _deliver_file(service, bucket, name, file):
    """Put a claimed file into the target bucket, in the way of every
    PutObject: permission, encryption, versioning and lock of the target
    hold.  Its key is its own, so that a file which a crash left behind
    is not delivered again.  Target grants are left out where ACLs have
    been turned off since.  1, or 0 for a file that nobody wants."""
    logging = bucket.config.get("logging")
    size = os.fstat(file.fileno()).st_size
    if logging is None or not size:
        return 0
    accounts, name_of_target = service.accounts, logging["TargetBucket"]
    owner, target = accounts.owner_id(bucket), service.store.bucket(
        name_of_target)
    if accounts.owner_id(target) != owner:
        raise _bad_target(name_of_target, "The target bucket has another "
                          "owner now")
    request = log_delivery(service, bucket, target, log_key(
        logging, owner, bucket, name))
    request.body = Body(file, size)
    request.headers.update({
        "content-length": str(size), "content-type": "text/plain",
        "if-none-match": "*"})
    if "TargetGrants" in logging \
            and request.access(target).ownership != ENFORCED:
        request.headers.update(acl_headers(
            private_acl(owner) + load_acl(logging["TargetGrants"], owner),
            accounts))
    try:
        put_object(request)
    except S3Error as error:
        if error.code != "PreconditionFailed":
            raise
    return 1


def log_delivery(service, source, target, key):
    """The Request by which the log delivery service writes a key."""
    request = Request(service, "PUT", "/", {}, None, time.time(), "")
    request.operation = OPERATIONS["PutObject"]
    request.enter(target)
    request.bucket_name = target.name
    request.key, request.caller = key, service_caller(LOGGING_SERVICE)
    request.facts = {
        "aws:SourceArn": resource_arn(source.name),
        "aws:SourceAccount": service.accounts.owner_id(source)}
    return request


# --- lifecycle: the document ---
#
# userguide/intro-lifecycle-rules.html and API_LifecycleRule.html; messages
# as S3 has been seen to answer (LocalStack's tests recorded against S3,
# issues of terraform-provider-aws and of noobaa-core).

MAX_LIFECYCLE_RULES = 1000
MAX_OBJECT_SIZE_FILTER = 1099511627776000   # S3's message gives it
MIN_IA_DAYS = 30
# From warm to cold: userguide/lifecycle-transition-general-considerations
TRANSITION_ORDER = ("STANDARD", "STANDARD_IA", "INTELLIGENT_TIERING",
                    "ONEZONE_IA", "GLACIER_IR", "GLACIER", "DEEP_ARCHIVE")
_IA_CLASSES = ("STANDARD_IA", "ONEZONE_IA")
MINIMUM_SIZE_HEADER = "x-amz-transition-default-minimum-object-size"
VARIES, ALL_128K = "varies_by_storage_class", "all_storage_classes_128K"

_TRANSITION_CLASS = one_of(*TRANSITION_ORDER[1:])
_LIFECYCLE = (many("Rule", (
    Field("ID", TEXT),
    Field("Prefix", TEXT),
    Field("Filter", filter_fields(Field("ObjectSizeGreaterThan", LONG),
                                  Field("ObjectSizeLessThan", LONG))),
    need("Status", ON_OFF),
    Field("Expiration", (
        Field("Date", DATE), Field("Days", INT),
        Field("ExpiredObjectDeleteMarker", BOOLEAN))),
    many("Transition", (
        Field("Date", DATE), Field("Days", INT),
        need("StorageClass", _TRANSITION_CLASS))),
    many("NoncurrentVersionTransition", (
        need("NoncurrentDays", INT), Field("NewerNoncurrentVersions", INT),
        need("StorageClass", _TRANSITION_CLASS))),
    Field("NoncurrentVersionExpiration", (
        need("NoncurrentDays", INT),
        Field("NewerNoncurrentVersions", INT))),
    Field("AbortIncompleteMultipartUpload", (
        need("DaysAfterInitiation", INT),)),
)),)
_LIFECYCLE_ACTIONS = tuple(
    field.tag for field in _LIFECYCLE[0].kind[4:])


def _is_lifecycle(value):
    """True for a lifecycle as bucket.json keeps it."""
    return document_shape(_LIFECYCLE)(value) and all(
        "ID" in rule and all("Days" in item or "Date" in item
                             for item in rule.get("Transition", ()))
        for rule in value.get("Rule", ())) and "Rule" in value


CONFIG_SHAPES["lifecycle"] = _is_lifecycle


def new_document_id():
    """An id for a rule that came without one.

    S3's own are base64 of a UUID's text: github.com/aws/aws-sdk-go-v2
    issue 3165.
    """
    return base64.b64encode(str(uuid.uuid4()).encode()).decode()


def parse_lifecycle(element, minimum=None, new_id=new_document_id):
    """The lifecycle in a LifecycleConfiguration Element.

    API_PutBucketLifecycleConfiguration.html and the older
    API_PutBucketLifecycle.html.  {"Rule": [...], "minimum": ...}; minimum:
    the text of MINIMUM_SIZE_HEADER.  A rule without an id is given one.
    MalformedXML, InvalidRequest or InvalidArgument.
    """
    if minimum not in (None, VARIES, ALL_128K):
        raise S3Error("InvalidRequest", "Invalid TransitionDefaultMinimum"
                      "ObjectSize found: " + minimum)
    value = read_document(element, _LIFECYCLE)
    rules = value.get("Rule", [])
    if not rules:
        raise S3Error("InvalidRequest", "At least one lifecycle rule must "
                      "be specified.")
    if len(rules) > MAX_LIFECYCLE_RULES:
        raise S3Error("InvalidRequest", "The number of lifecycle rules must "
                      "not exceed the allowed limit of 1000 rules.")
    for rule in rules:
        for check in _LIFECYCLE_CHECKS:
            check(rule)
    _check_rule_ids(rules)
    _check_rule_forms(rules)
    _check_prefix_overlap(rules)
    for i, rule in enumerate(rules):
        if not rule.get("ID"):
            rules[i] = dict(rule, ID=new_id())
    return {"Rule": rules, "minimum": minimum or ALL_128K}


def lifecycle_children(lifecycle):
    """The children of a LifecycleConfiguration document."""
    return document_children(lifecycle, _LIFECYCLE)


def lifecycle_headers(lifecycle):
    """The headers of the answers to its PUT and GET."""
    return {MINIMUM_SIZE_HEADER: lifecycle.get("minimum", ALL_128K)}


def _check_rule_ids(rules):
    seen = set()
    for rule in rules:
        name = rule.get("ID")
        if name and len(name) > MAX_RULE_ID:
            raise bad_argument("ID length should not exceed allowed limit "
                               "of 255", "ID", name)
        if name and name in seen:
            raise bad_argument("Rule ID must be unique. Found same ID for "
                               "more than one rule", "ID", name)
        seen.add(name)


def _check_rule_forms(rules):
    """All rules have a Filter, or all have the old Prefix."""
    old = "Prefix" in rules[0]
    for rule in rules:
        if old and "Filter" in rule:
            raise S3Error("InvalidRequest", "Filter element can only be "
                          "used in Lifecycle V2.")
        if not old and "Prefix" in rule:
            raise S3Error("InvalidRequest", "Base level prefix cannot be "
                          "used in Lifecycle V2, prefixes are only "
                          "supported in the Filter.")


def _check_prefix_overlap(rules):
    """Rules of the old form must not meet in one action."""
    for action in _LIFECYCLE_ACTIONS:
        last = None
        for prefix in sorted(rule["Prefix"] for rule in rules
                             if "Prefix" in rule and action in rule):
            if last is not None and prefix.startswith(last):
                raise S3Error("InvalidRequest", "Found overlapping prefixes "
                              "'%s' and '%s' for same action type '%s'"
                              % (last, prefix, action))
            last = prefix


def _check_lifecycle_rule(rule):
    if ("Filter" in rule) == ("Prefix" in rule):
        raise S3Error("MalformedXML")
    if not any(action in rule for action in _LIFECYCLE_ACTIONS):
        raise S3Error("InvalidRequest", "At least one action needs to be "
                      "specified in a rule")


def _check_sizes(rule):
    terms = filter_terms(rule)
    for name, size, low in (
            ("ObjectSizeGreaterThan", terms.larger_than, 0),
            ("ObjectSizeLessThan", terms.smaller_than, 1)):
        if size is not None and not low <= size <= MAX_OBJECT_SIZE_FILTER:
            raise S3Error("InvalidRequest", "'%s' should be between %d and "
                          "%d." % (name, low, MAX_OBJECT_SIZE_FILTER))
    if None not in terms[2:] and terms.larger_than >= terms.smaller_than:
        raise S3Error("InvalidRequest", "'ObjectSizeLessThan' has to be a "
                      "value greater than 'ObjectSizeGreaterThan'.")


def _check_untagged(rule, action):
    """An action that takes a prefix only."""
    terms = filter_terms(rule)
    for present, what in ((terms.tags, "Tags"),
                          (terms.sized, "Object Size")):
        if present:
            raise S3Error("InvalidRequest", "%s cannot be specified with %s."
                          % (action, what))


def _check_positive(rule, action, name):
    value = rule.get(action, {}).get(name)
    if value is not None and value < 1:
        raise bad_argument("'%s' for %s action must be a positive integer"
                           % (name, action), name, value)


def _check_midnight(value):
    if value.get("Date", 0) % DAY_SECONDS:
        raise bad_argument("'Date' must be at midnight GMT", "Date",
                           iso_date(value["Date"]))


def _check_expiration(rule):
    expiration = rule.get("Expiration")
    if expiration is None:
        return
    if len(expiration) != 1:
        raise S3Error("MalformedXML")
    _check_positive(rule, "Expiration", "Days")
    _check_midnight(expiration)
    if "ExpiredObjectDeleteMarker" in expiration:
        _check_untagged(rule, "ExpiredObjectDeleteMarker")


def _check_abort(rule):
    action = "AbortIncompleteMultipartUpload"
    if action in rule:
        _check_positive(rule, action, "DaysAfterInitiation")
        _check_untagged(rule, action)


def _check_noncurrent(rule):
    """NewerNoncurrentVersions has no upper bound: S3 takes more than the
    100 that its pages name."""
    action = "NoncurrentVersionExpiration"
    for name in ("NoncurrentDays", "NewerNoncurrentVersions"):
        _check_positive(rule, action, name)
    for item in rule.get("NoncurrentVersionTransition", ()):
        if item.get("NewerNoncurrentVersions", 1) < 1:
            raise bad_argument(
                "'NewerNoncurrentVersions' for NoncurrentVersionTransition "
                "action must be a positive integer",
                "NewerNoncurrentVersions", item["NewerNoncurrentVersions"])
    if "Prefix" in rule and any(
            "NewerNoncurrentVersions" in item for item in [
                rule.get(action, {})]
            + rule.get("NoncurrentVersionTransition", [])):
        raise S3Error("InvalidRequest", "NewerNoncurrentVersions element "
                      "can only be used in Lifecycle V2.")


def _check_transitions(rule):
    """Days or Date, one of each class, colder ones later, then the end."""
    items = rule.get("Transition", ())
    expiration = rule.get("Expiration", {})
    for item in items:
        if ("Days" in item) == ("Date" in item):
            raise S3Error("MalformedXML")
        _check_midnight(item)
    kinds = {name for item in list(items) + [expiration]
             for name in ("Days", "Date") if name in item}
    if items and len(kinds) > 1:
        raise S3Error("InvalidRequest", "Found mixed 'Date' and 'Days' "
                      "based Expiration and Transition actions in lifecycle "
                      "rule for filter '%s'" % _filter_text(rule))
    for name in kinds:
        _check_steps(rule, "Transition", name,
                     "Expiration", expiration.get(name))


def _check_noncurrent_transitions(rule):
    end = "NoncurrentVersionExpiration"
    _check_steps(rule, "NoncurrentVersionTransition", "NoncurrentDays",
                 end, rule.get(end, {}).get("NoncurrentDays"))


def _check_steps(rule, action, name, end_action, end):
    """The transitions of one rule, all by `name`, and their end or None."""
    where = _filter_text(rule)
    items = sorted(rule.get(action, ()), key=lambda item:
                   TRANSITION_ORDER.index(item["StorageClass"]))
    for item in items:
        _check_transition_days(item, action, name)
    for last, item in zip(items, items[1:]):
        if item["StorageClass"] == last["StorageClass"]:
            raise S3Error("InvalidRequest", "'StorageClass' must be "
                          "different for '%s' actions in same 'Rule' with "
                          "filter '%s'" % (action, where))
        _check_step(last, item, action, name, where)
    if items and end is not None and end <= max(
            item[name] for item in items):
        raise bad_argument(
            "'%s' in the %s action for filter '%s' must be greater than "
            "'%s' in the %s action" % (name, end_action, where, name,
                                       action), name)


def _check_step(last, item, action, name, where):
    """From one class to a colder one; from an infrequent access class
    after 30 days (userguide/lifecycle-transition-general-considerations).
    """
    gap = MIN_IA_DAYS if last["StorageClass"] in _IA_CLASSES else 1
    unit = DAY_SECONDS if name == "Date" else 1
    if item[name] - last[name] < gap * unit:
        raise bad_argument(
            "'%s' in the %s action for StorageClass '%s' for filter '%s' "
            "must be %s '%s' in the %s action for StorageClass '%s' for "
            "filter '%s'" % (
                name, action, item["StorageClass"], where,
                "greater than" if gap == 1 else "%d days more than" % gap,
                name, action, last["StorageClass"], where), name)


def _check_transition_days(item, action, name):
    """API_Transition.html: from 30 days on for infrequent access."""
    days, storage = item.get(name), item["StorageClass"]
    if name == "Date":
        return
    if days < 0:
        raise bad_argument("'%s' in %s action must be nonnegative"
                           % (name, action), name, days)
    if storage in _IA_CLASSES and days < MIN_IA_DAYS:
        raise bad_argument(
            "'%s' in %s action must be greater than or equal to %d for "
            "storageClass '%s'" % (name, action, MIN_IA_DAYS, storage),
            name, days)


def _filter_text(rule):
    """A rule's filter as S3's messages show it."""
    return "(prefix=%s)" % filter_terms(rule).prefix


_LIFECYCLE_CHECKS = (
    _check_lifecycle_rule, check_filter, _check_sizes, _check_expiration,
    _check_abort, _check_noncurrent, _check_transitions,
    _check_noncurrent_transitions)


# --- lifecycle: what is due ---

# userguide/lifecycle-transition-general-considerations.html
SMALL_BYTES = 128 * KIB
EXPIRE, REMOVE, TRANSITION = "expire", "remove", "transition"


class Candidate(NamedTuple):
    """A version, as lifecycle rules see it; times in seconds.

    noncurrent_since: when its successor was made.  newer_count: noncurrent
    versions newer than it.  only_version: the key has no other.
    versioned: the bucket's versioning is or was enabled.
    """
    key: str
    size: int
    mtime: int
    tags: Dict[str, str] = {}
    storage_class: Optional[str] = None
    is_latest: bool = True
    is_delete_marker: bool = False
    noncurrent_since: Optional[int] = None
    newer_count: int = 0
    only_version: bool = True
    versioned: bool = False


class Due(NamedTuple):
    """An action that is due, and the rule that asks for it.

    EXPIRE: delete the current object, which leaves a delete marker where
    versions are kept.  REMOVE: delete this version for good.  TRANSITION:
    to storage_class.
    """
    action: str
    rule_id: str
    storage_class: Optional[str] = None


def due_time(since, days, day_seconds=DAY_SECONDS):
    """When something is `days` old: the next midnight UTC after that.

    userguide/intro-lifecycle-rules.html.  A day of another length, which
    is for tests, is not rounded: nothing would be due before midnight.
    """
    due = since + days * day_seconds
    if day_seconds == DAY_SECONDS:
        due = int(-(-due // DAY_SECONDS)) * DAY_SECONDS
    return min(due, LAST_DATE)


def lifecycle_action(lifecycle, candidate, now, day_seconds=DAY_SECONDS,
                     small_bytes=SMALL_BYTES):
    """The Due for a Candidate at `now`, or None.

    Deleting for good goes before a transition, and that before a delete
    marker (userguide/lifecycle-conflicts.html).  What the object's lock
    allows is for the caller to see.
    """
    rules = [rule for rule in lifecycle["Rule"] if rule["Status"] == ENABLED
             and filter_terms(rule).hold(candidate.key, candidate.tags,
                                         candidate.size)]
    if not candidate.is_latest:
        due = _noncurrent_due(rules, candidate, now, day_seconds)
    elif candidate.is_delete_marker:
        return _marker_due(rules, candidate, now, day_seconds)
    else:
        due = _expiration_due(rules, candidate, now, day_seconds)
    if due and (due.action == REMOVE or not candidate.versioned):
        return due
    return _transition_due(rules, candidate, now, day_seconds, small_bytes,
                           lifecycle.get("minimum")) or due


def _expiration_time(rule, mtime, day_seconds=DAY_SECONDS):
    """When a rule's Expiration is due, or None."""
    expiration = rule.get("Expiration", {})
    if "Days" in expiration:
        return due_time(mtime, expiration["Days"], day_seconds)
    return expiration.get("Date")


def _expiration_due(rules, candidate, now, day_seconds):
    for rule in rules:
        when = _expiration_time(rule, candidate.mtime, day_seconds)
        if when is not None and when <= now:
            return Due(EXPIRE, rule["ID"])
    return None


def _marker_due(rules, candidate, now, day_seconds):
    """A delete marker with nothing behind it goes, at once where
    ExpiredObjectDeleteMarker says so, else at its own expiration."""
    if not candidate.only_version:
        return None
    for rule in rules:
        when = _expiration_time(rule, candidate.mtime, day_seconds)
        at_once = rule.get("Expiration", {}).get("ExpiredObjectDeleteMarker")
        if at_once or (when is not None and when <= now):
            return Due(REMOVE, rule["ID"])
    return None


def _noncurrent_time(item, candidate, day_seconds):
    """When a Noncurrent... action is due, or None while too few newer
    versions stand before it."""
    if candidate.noncurrent_since is None \
            or candidate.newer_count < item.get("NewerNoncurrentVersions", 0):
        return None
    return due_time(candidate.noncurrent_since, item["NoncurrentDays"],
                    day_seconds)


def _noncurrent_due(rules, candidate, now, day_seconds):
    for rule in rules:
        item = rule.get("NoncurrentVersionExpiration")
        when = item and _noncurrent_time(item, candidate, day_seconds)
        if when is not None and when <= now:
            return Due(REMOVE, rule["ID"])
    return None


def _transition_due(rules, candidate, now, day_seconds, small_bytes,
                    minimum):
    """The coldest class that is due and colder than the present one."""
    rank = _rank(candidate.storage_class)
    best = None
    if candidate.is_delete_marker:
        return None
    for rule in rules:
        may_be_small = filter_terms(rule).sized \
            or candidate.size >= small_bytes
        for item, when in _transition_times(rule, candidate, day_seconds):
            storage = item["StorageClass"]
            if not may_be_small and not (
                    minimum == VARIES
                    and storage in ("GLACIER", "DEEP_ARCHIVE")):
                continue
            if when is not None and when <= now and _rank(storage) > rank:
                rank = _rank(storage)
                best = Due(TRANSITION, rule["ID"], storage)
    return best


def _transition_times(rule, candidate, day_seconds):
    """(item, time or None) of the transitions for such a version."""
    if not candidate.is_latest:
        for item in rule.get("NoncurrentVersionTransition", ()):
            yield item, _noncurrent_time(item, candidate, day_seconds)
        return
    for item in rule.get("Transition", ()):
        yield item, item["Date"] if "Date" in item else due_time(
            candidate.mtime, item["Days"], day_seconds)


def _rank(storage_class):
    """The place of a storage class between warm and cold."""
    if storage_class in (None, "REDUCED_REDUNDANCY"):
        return 0
    if storage_class not in TRANSITION_ORDER:
        return len(TRANSITION_ORDER)            # nothing leads out of it
    return TRANSITION_ORDER.index(storage_class)


def expiration_header(lifecycle, key, tags, size, mtime):
    """x-amz-expiration of a current object, or None.

    API_HeadObject.html.  In days of 24 hours, whatever length a day has
    for tests: s3-tests' test_lifecycle_expiration_header_put.
    """
    best = None
    for rule in lifecycle["Rule"]:
        when = _expiration_time(rule, mtime)
        if rule["Status"] == ENABLED and when is not None and (
                best is None or when < best[0]) \
                and filter_terms(rule).hold(key, tags, size):
            best = when, rule["ID"]
    if best is None:
        return None
    return 'expiry-date="%s", rule-id="%s"' % (
        http_date(best[0]), _header_id(best[1]))


def _header_id(name):
    """A rule's id for a header: as it is, as S3 sends it, when it can be."""
    if re.match(r"[ !#-~]*\Z", name):
        return name
    return uri_encode(name)


def _abort_rule(lifecycle, key, initiated, day_seconds=DAY_SECONDS):
    """(time, rule id) of the first AbortIncompleteMultipartUpload that
    falls due on an upload, or None."""
    times = []
    for rule in lifecycle["Rule"]:
        abort = rule.get("AbortIncompleteMultipartUpload")
        if abort and rule["Status"] == ENABLED \
                and key.startswith(filter_terms(rule).prefix):
            times.append((due_time(initiated, abort["DaysAfterInitiation"],
                                   day_seconds), rule["ID"]))
    return min(times, key=lambda pair: pair[0]) if times else None


def upload_due(lifecycle, key, initiated, now, day_seconds=DAY_SECONDS):
    """The id of the rule by which an upload is to be aborted, or None."""
    due = _abort_rule(lifecycle, key, initiated, day_seconds)
    return due[1] if due and due[0] <= now else None


def abort_headers(lifecycle, key, initiated):
    """x-amz-abort-date and -rule-id (API_CreateMultipartUpload.html)."""
    due = _abort_rule(lifecycle, key, initiated)
    if due is None:
        return {}
    return {"x-amz-abort-date": http_date(due[0]),
            "x-amz-abort-rule-id": _header_id(due[1])}


# --- lifecycle: carried out ---

def lifecycle_pause(day_seconds):
    """Seconds from one run of the lifecycle rules to the next."""
    return min(3600, max(1, day_seconds / 10))


def run_lifecycle(service, now, stopped=lambda: False):
    """Do what is due in every bucket; how many things were done.

    Several servers may do so at once, beside any writer: what seems due
    is looked at again while nobody can change the key.
    """
    count = 0
    for bucket in service.store.list_buckets():
        try:
            if bucket.config.get("lifecycle"):
                count += _run_rules(service, bucket, now, stopped)
        except (S3Error, OSError) as error:     # of one bucket, not of all
            service.store.report("lifecycle of %s: %s" % (bucket.name, error))
    return count


def _run_rules(service, bucket, now, stopped):
    """Do what is due in one bucket; how many things were done."""
    count = 0
    due = functools.partial(_due_of_key, bucket, now, service.day_seconds)
    for infos in service.store.each_key(bucket):
        if stopped():
            return count
        if any(due(infos)):
            count += _carry_out(service, bucket, infos[0].key, due)
    return count + _abort_due(service, bucket, now)


def _due_of_key(bucket, now, day_seconds, infos):
    """(Info, Due) of the versions of one key, the newest first, as its
    bucket's rules say now.  What is locked is left."""
    lifecycle = bucket.config.get("lifecycle")
    versioned, newer = bucket.versioning is not None, 0
    for index, info in enumerate(infos if lifecycle else ()):
        due = lifecycle_action(lifecycle, Candidate(
            info.key, info.size, info.mtime, info.record.get("tags", {}),
            info.record.get("class"), info.latest, info.marker,
            infos[index - 1].mtime if index else None, newer,
            len(infos) == 1, versioned), now, day_seconds)
        if due and due.action != TRANSITION and not _is_free(
                info, due, bucket):
            due = None
        if due:
            yield info, due
        # what goes in this run is no newer version to those behind it
        newer += index > 0 and not (due and due.action == REMOVE)


def _is_free(info, due, bucket):
    """True when no lock keeps a version from what is due."""
    if due.action == EXPIRE and bucket.versioning == ENABLED:
        return True                     # it stays, behind a marker
    try:
        check_unlocked(info.record.get("lock", {}), time.time())
    except S3Error:
        return False
    return True


def _carry_out(service, bucket, key, due):
    """Do what is due on the versions of a key; how many things."""
    done, recorder = [], own_recorder(service, bucket)

    def choose(infos):
        for info, (action, _, storage_class) in due(infos):
            removed = info.version_id if action == REMOVE else None
            version_id = None if action == EXPIRE else info.version_id
            note = recorder and (functools.partial(
                recorder.moved, storage_class) if action == TRANSITION
                else functools.partial(
                    recorder.removed, "LifecycleExpiration:", key,
                    version_id))
            yield version_id, action == TRANSITION and {
                "class": storage_class}, note
            name = MOVED[storage_class] if action == TRANSITION else \
                MARKED if action == EXPIRE and bucket.versioning else EXPIRED
            done.append((name, key, removed, info.size))
    try:
        service.store.revise(bucket, key, choose)
    except (S3Error, OSError) as error:
        service.store.report("lifecycle of %s/%s: %s" % (
            bucket.name, uri_encode(key, "/-_.~"), error))
    for line in done:
        log_lifecycle(service, bucket, *line)
    return len(done)


def _abort_due(service, bucket, now):
    """Abort the uploads that are due; how many."""
    store, count = service.store, 0

    def is_due(upload):
        lifecycle = bucket.config.get("lifecycle")
        return lifecycle and upload_due(
            lifecycle, upload.key, upload.initiated_ns // 10 ** 9, now,
            service.day_seconds)
    for upload in filter(is_due, store.list_uploads(bucket)):
        with contextlib.suppress(S3Error), store.locked_upload(upload):
            if is_due(upload):
                store.remove_upload(upload)
                count += 1
                log_lifecycle(service, bucket, ABORTED, upload.key)
    return count


def expiration_headers(request, info):
    """x-amz-expiration of a current version, where a rule names it."""
    lifecycle = request.setting("lifecycle")
    if lifecycle is None or not info.latest:
        return {}
    text = expiration_header(lifecycle, info.key, info.record.get(
        "tags", {}), info.size, info.mtime)
    return {"x-amz-expiration": text} if text else {}


def upload_abort_headers(request, upload_key, initiated_ns):
    """x-amz-abort-date and -rule-id of an upload."""
    lifecycle = request.setting("lifecycle")
    return {} if lifecycle is None else abort_headers(
        lifecycle, upload_key, initiated_ns // 10 ** 9)


@operation("GET", BUCKET, "lifecycle")
def get_bucket_lifecycle_configuration(request):
    """API_GetBucketLifecycleConfiguration."""
    lifecycle = request.setting("lifecycle")
    if lifecycle is None:
        raise S3Error("NoSuchLifecycleConfiguration",
                      BucketName=request.bucket_name)
    headers = {"Content-Type": "application/xml"}
    headers.update(lifecycle_headers(lifecycle))
    return Response(200, headers, xml_document(
        "LifecycleConfiguration", lifecycle_children(lifecycle)))


@operation("PUT", BUCKET, "lifecycle")
def put_bucket_lifecycle_configuration(request):
    """API_PutBucketLifecycleConfiguration."""
    need_digest(request)
    lifecycle = parse_lifecycle(request.xml("LifecycleConfiguration"),
                                request.headers.get(MINIMUM_SIZE_HEADER))
    request.store.update_bucket(
        request.bucket, lambda config: config.update(lifecycle=lifecycle))
    return lifecycle_headers(lifecycle)


@operation("DELETE", BUCKET, "lifecycle", status=204)
def delete_bucket_lifecycle(request):
    """API_DeleteBucketLifecycle."""
    _forget(request, "lifecycle")


# The names of an older version, on the same routes
for _name, _newer in (
        ("GetBucketLifecycle", "GetBucketLifecycleConfiguration"),
        ("PutBucketLifecycle", "PutBucketLifecycleConfiguration")):
    add_operation(OPERATIONS[_newer]._replace(name=_name))


# --- events: the document ---
#
# userguide/EventNotifications.html, notification-how-to-event-types-and-
# destinations.html and notification-how-to-filtering.html; messages as S3
# has been seen to answer (LocalStack's tests recorded against S3, issues of
# aws-cdk and aws-cli).  A destination's ARN names a webhook of this server.

MAX_NOTIFICATION_RULES = 100
SKIP_VALIDATION_HEADER = "x-amz-skip-destination-validation"
# Those of botocore's model 1.44: what this server does makes the first
# ones, nothing that it does the others
SENT_EVENTS = frozenset("s3:" + name for name in """
    ObjectCreated:* ObjectCreated:Put ObjectCreated:Post ObjectCreated:Copy
    ObjectCreated:CompleteMultipartUpload ObjectRemoved:*
    ObjectRemoved:Delete ObjectRemoved:DeleteMarkerCreated ObjectTagging:*
    ObjectTagging:Put ObjectTagging:Delete ObjectAcl:Put ObjectRetention:Put
    LifecycleExpiration:* LifecycleExpiration:Delete
    LifecycleExpiration:DeleteMarkerCreated LifecycleTransition TestEvent
    """.split())
UNSENT_EVENTS = frozenset("s3:" + name for name in """
    ReducedRedundancyLostObject ObjectRestore:* ObjectRestore:Post
    ObjectRestore:Completed ObjectRestore:Delete IntelligentTiering
    Replication:* Replication:OperationFailedReplication
    Replication:OperationNotTracked Replication:OperationMissedThreshold
    Replication:OperationReplicatedAfterThreshold ObjectAnnotation:*
    ObjectAnnotation:Put ObjectAnnotation:Delete""".split())
_AMBIGUOUS = ("Configuration is ambiguously defined. Cannot have overlapping "
              "suffixes in two rules if the prefixes are overlapping for the "
              "same event type.")
_OVERLAP = ("Configurations overlap. Configurations on the same bucket "
            "cannot share a common event type.")


class Target(NamedTuple):
    """One of the three kinds of destinations.

    tag: of its ARN's element.  arn: its form; the groups are region and
    webhook.  tested: it gets an s3:TestEvent.  absent: what S3 says when
    there is no such one.
    """
    tag: str
    arn: Any
    tested: bool
    absent: str


def _target(tag, service, resource, tested, what):
    return Target(tag, re.compile(r"arn:aws[a-z-]*:%s:([a-z0-9-]+):\d{12}:%s"
                                  r"\Z" % (service, resource), re.ASCII),
                  tested, "The destination %s does not exist" % what)


TARGETS = {
    "TopicConfiguration": _target(
        "Topic", "sns", r"([\w-]{1,256})", True, "topic"),
    "QueueConfiguration": _target(
        "Queue", "sqs", r"([\w-]{1,80})", True, "queue"),
    "CloudFunctionConfiguration": _target(
        "CloudFunction", "lambda",
        r"function:([\w-]{1,140})(?::[\w$-]{1,129})?", False, "Lambda")}
_NOTIFICATION = tuple(many(tag, (
    Field("Id", TEXT), need(target.tag, FILLED), many("Event", TEXT, 1),
    Field("Filter", (Field("S3Key", (many("FilterRule", (
        need("Name", TEXT), need("Value", TEXT))),)),))))
    for tag, target in TARGETS.items())


def _is_notification(value):
    """True for a notification as bucket.json keeps it."""
    return document_shape(_NOTIFICATION)(value) and all(
        "Id" in rule and target.arn.match(rule[target.tag])
        and all(rule["Event"]) for target, rule in _rules(value))


CONFIG_SHAPES["notification"] = _is_notification


def parse_notification(element, region, new_id=new_document_id):
    """The notification in a NotificationConfiguration Element.

    API_PutBucketNotificationConfiguration.html.  {"TopicConfiguration":
    [...], ...}, {} for none; region: the bucket's.  A rule without an id
    is given one.  MalformedXML, InvalidRequest or InvalidArgument;
    NotImplemented for EventBridge.
    """
    if element.find("EventBridgeConfiguration") is not None:
        raise S3Error("NotImplemented", "EventBridgeConfiguration is not "
                      "implemented: there is no EventBridge here")
    notification = read_document(element, _NOTIFICATION)
    rules = list(_rules(notification))
    if len(rules) > MAX_NOTIFICATION_RULES:
        raise S3Error("InvalidRequest", "Too many configurations submitted. "
                      "The maximum number of configurations is 100")
    for target, rule in rules:
        _check_target(target, rule[target.tag], region)
        _check_events(rule["Event"])
        for item in _filter_rules(rule):
            item["Name"] = _filter_name(item["Name"], item["Value"])
        _check_filter_names(rule)
        rule["Id"] = rule.get("Id") or new_id()
    _check_notification_ids([rule["Id"] for _, rule in rules])
    for (_, one), (_, other) in itertools.combinations(rules, 2):
        _check_apart(one, other)
    return notification


def notification_children(notification):
    """The children of a NotificationConfiguration document."""
    return document_children(notification, _NOTIFICATION)


def _rules(notification):
    """(Target, rule) of each configuration."""
    for tag, target in TARGETS.items():
        for rule in notification.get(tag, ()):
            yield target, rule


def _check_target(target, arn, region):
    match = target.arn.match(arn)
    if not match:
        raise bad_argument("The ARN could not be parsed", target.tag, arn)
    if match[1] != region:
        raise bad_argument("The notification destination service region is "
                           "not valid for the bucket location constraint",
                           target.tag, arn)


def _check_events(events):
    for index, event in enumerate(events):
        if event not in SENT_EVENTS and event not in UNSENT_EVENTS:
            raise bad_argument("A specified event is not supported for "
                               "notifications.", "Event", event)
        if _share_event([event], events[:index]):
            raise bad_argument(_OVERLAP, "Event", event)


def _filter_rules(rule):
    return rule.get("Filter", {}).get("S3Key", {}).get("FilterRule", ())


def _filter_name(name, value):
    """`Prefix` or `Suffix`, as S3 gives it back."""
    if name.lower() not in ("prefix", "suffix"):
        raise bad_argument("filter rule name must be either prefix or "
                           "suffix", name, value)
    if not value:
        raise bad_argument("filter value cannot be empty", name, value)
    if len(value.encode()) > MAX_KEY_BYTES:
        raise bad_argument("Size of filter rule value cannot exceed 1024 "
                           "bytes in UTF-8 representation", name, value)
    return name.capitalize()


def _check_filter_names(rule):
    names = [item["Name"] for item in _filter_rules(rule)]
    for name in set(names):
        if names.count(name) > 1:
            raise bad_argument("Cannot specify more than one %s rule in a "
                               "filter." % name.lower(), name)


def _check_notification_ids(ids):
    for rule_id in ids:
        if len(rule_id) > MAX_RULE_ID:
            raise bad_argument("ID length should not exceed allowed limit "
                               "of 255", "Id", rule_id)
        if ids.count(rule_id) > 1:
            raise bad_argument("Same ID used for multiple configurations. "
                               "IDs must be unique.", "Id", rule_id)


# Each rule is held against each other one
_unquoted = functools.lru_cache(maxsize=1024)(urllib.parse.unquote_plus)


def key_filter(rule):
    """The (prefix, suffix) that a rule asks of a key.  In the document
    they are URL-encoded, as keys are in events."""
    found = {item["Name"]: _unquoted(item["Value"])
             for item in _filter_rules(rule)}
    return found.get("Prefix", ""), found.get("Suffix", "")


def _asks(asked, event):
    """True when an event's name, or one with a `*`, names this event."""
    return asked == event or (asked[-1] == "*"
                              and event.startswith(asked[:-1]))


def _share_event(events, others):
    return any(_asks(one, other) or _asks(other, one)
               for one in events for other in others)


def _check_apart(rule, other):
    """No event of a key must be asked for by two rules."""
    if not _share_event(rule["Event"], other["Event"]):
        return
    prefixes, suffixes = zip(key_filter(rule), key_filter(other))
    if (prefixes[0].startswith(prefixes[1])
            or prefixes[1].startswith(prefixes[0])) and (
                suffixes[0].endswith(suffixes[1])
                or suffixes[1].endswith(suffixes[0])):
        filtered = _filter_rules(rule) or _filter_rules(other)
        raise S3Error("InvalidArgument", _AMBIGUOUS if filtered
                      else _OVERLAP)


def check_webhooks(notification, webhooks):
    """InvalidArgument unless each destination is among the webhooks."""
    for target, rule in _rules(notification):
        arn = rule[target.tag]
        if target.arn.match(arn)[2] not in webhooks:
            raise bad_argument("Unable to validate the following destination "
                               "configurations", arn, target.absent)


def tested_webhooks(notification):
    """The names of the webhooks that get an s3:TestEvent: S3 tries a
    function's permissions instead."""
    return sorted({target.arn.match(rule[target.tag])[2]
                   for target, rule in _rules(notification)
                   if target.tested})


def event_rules(notification, event):
    """(prefix, suffix, webhook, Id) of the rules that ask for an event."""
    return [key_filter(rule) + (target.arn.match(rule[target.tag])[2],
                                rule["Id"])
            for target, rule in _rules(notification)
            if any(_asks(asked, event) for asked in rule["Event"])]


def find_rule(rules, key):
    """The (webhook, Id) of the one of event_rules() that asks for a key;
    None when there is none."""
    for prefix, suffix, webhook, rule_id in rules:
        if key.startswith(prefix) and key.endswith(suffix):
            return webhook, rule_id
    return None


# --- events: what is recorded ---
#
# userguide/notification-content-structure.html, version 2.5.  An event is
# recorded in the bucket's Spool when its change is made, under the key's
# lock and before the answer leaves; a thread of room 10 delivers it.

EVENT_VERSION = "2.5"
EMPTY_MD5 = "d41d8cd98f00b204e9800998ecf8427e"
OWN_SERVICE = "s3.amazonaws.com"


class Cause(NamedTuple):
    """Who made a change, from where, and by which request."""
    principal: Optional[str]
    address: Optional[str]
    request_id: str


class Recorder:
    """Records the events of one Cause in a bucket that has a notification.

    Its methods are called under the key's lock, the change just made.
    """

    def __init__(self, service, bucket, notification, cause):
        self._outbox, self._bucket = service.outbox, bucket
        self._owner = service.accounts.owner_id(bucket)
        self._notification, self._cause = notification, cause
        # event -> event_rules(): a request may delete a thousand keys
        self._rules = {}

    def created(self, kind, info):
        """ObjectCreated:<kind> of the object `info`."""
        self._record("ObjectCreated:" + kind, info.key, info.version_id,
                     {"size": info.size, "eTag": info.etag})

    def removed(self, prefix, key, version_id, removed):
        """<prefix>Delete or DeleteMarkerCreated, if anything was Removed;
        version_id: the one that was to be removed."""
        if removed.marker and version_id is None:
            self._record(prefix + "DeleteMarkerCreated", key,
                         removed.version_id, {"eTag": EMPTY_MD5})
        elif removed.existed:
            self._record(prefix + "Delete", key, removed.version_id, {})

    def renamed(self, source, info):
        """A rename, which S3's buckets with events do not have."""
        self.removed("ObjectRemoved:", source, None, Removed(None, False))
        self.created("Copy", info)

    def changed(self, event, info):
        """An event of what is not content; it is in no sequence."""
        self._record(event, info.key, info.version_id,
                     {"eTag": info.etag}, sequence=False)

    def moved(self, storage_class, info):
        """LifecycleTransition."""
        self._record("LifecycleTransition", info.key, info.version_id, {
            "size": info.size, "eTag": info.etag}, {"lifecycleEventData": {
                "transitionEventData": {
                    "destinationStorageClass": storage_class}}}, False)

    def tested(self, webhook):
        """s3:TestEvent to a webhook; of the bucket, so the key is ""."""
        with self._bucket.lock(""):
            self._keep(webhook, "", self._bucket.next_number(""), {
                "Service": "Amazon S3", "Event": "s3:TestEvent",
                "Time": iso_time(time.time_ns()),
                "Bucket": self._bucket.name,
                "RequestId": self._cause.request_id,
                "HostId": self._cause.request_id})

    def _record(self, event, key, version_id, facts, more=None,
                sequence=True):
        if event not in self._rules:
            self._rules[event] = event_rules(self._notification,
                                             "s3:" + event)
        found = find_rule(self._rules[event], key)
        if found is None or found[0] not in self._outbox.webhooks:
            return
        webhook, rule_id = found
        number = self._bucket.next_number(key)
        about = {"key": urllib.parse.quote_plus(key, safe="/")}
        about.update(facts)
        if version_id not in (None, NULL_VERSION):
            about["versionId"] = version_id
        if sequence:
            about["sequencer"] = "%018X" % number
        record = self._envelope(event, rule_id, about)
        record.update(more or {})
        self._keep(webhook, key, number, {"Records": [record]})

    def _envelope(self, event, rule_id, about):
        """What is the same in every event, around what it is about."""
        bucket, cause = self._bucket, self._cause
        return {
            "eventVersion": EVENT_VERSION, "eventSource": "aws:s3",
            "awsRegion": bucket.region,
            "eventTime": iso_time(time.time_ns()), "eventName": event,
            "userIdentity": {"principalId": cause.principal},
            "requestParameters": {"sourceIPAddress": cause.address},
            "responseElements": {"x-amz-request-id": cause.request_id,
                                 "x-amz-id-2": cause.request_id},
            "s3": {
                "s3SchemaVersion": "1.0", "configurationId": rule_id,
                "bucket": {"name": bucket.name,
                           "ownerIdentity": {"principalId": self._owner},
                           "arn": resource_arn(bucket.name)},
                "object": about}}

    def _keep(self, webhook, key, number, document):
        data = json.dumps(document, separators=(",", ":")).encode()
        Spool(self._bucket, webhook).add(key, number, data)
        self._outbox.add(webhook, self._bucket.name)


def request_recorder(request, notification):
    """The Recorder of what a request does, or the delivery of a log."""
    caller = request.caller
    return Recorder(request.service, request.bucket, notification, Cause(
        caller.unique_id or caller.service, request.client or OWN_SERVICE,
        request.request_id or secrets.token_hex(8).upper()))


def own_recorder(service, bucket):
    """The Recorder of what the server does of itself; None in a bucket
    without notification."""
    notification = bucket.config.get("notification")
    return notification and Recorder(service, bucket, notification, Cause(
        OWN_SERVICE, OWN_SERVICE, secrets.token_hex(8).upper()))


def _note(request, method, *args):
    """The done() to give to the store: a Recorder's method with its first
    arguments; None in a bucket without notification."""
    notification = request.config.get("notification")
    if not notification:
        return None
    if request.recorder is None:
        request.recorder = request_recorder(request, notification)
    return functools.partial(method, request.recorder, *args)


def note_created(request, kind):
    """The done(info) of a write."""
    return _note(request, Recorder.created, kind)


def note_removed(request, key, version_id):
    """The done(removed) of a delete."""
    return _note(request, Recorder.removed, "ObjectRemoved:", key,
                 version_id)


def note_renamed(request, source):
    """The done(info) of a rename."""
    return _note(request, Recorder.renamed, source)


def note_changed(request, event):
    """The done(info) of a change of tags, ACL or retention."""
    return _note(request, Recorder.changed, event)


@operation("GET", BUCKET, "notification")
def get_bucket_notification_configuration(request):
    """API_GetBucketNotificationConfiguration: empty when there is none."""
    return xml_document("NotificationConfiguration", notification_children(
        request.setting("notification", {})))


@operation("PUT", BUCKET, "notification")
def put_bucket_notification_configuration(request):
    """API_PutBucketNotificationConfiguration; an empty one ends it."""
    notification = parse_notification(
        request.xml("NotificationConfiguration"), request.bucket.region)
    webhooks = request.service.outbox.webhooks
    skip = request.flag(SKIP_VALIDATION_HEADER)
    if not skip:
        check_webhooks(notification, webhooks)

    def change(config):
        config.pop("notification", None)
        if notification:
            config["notification"] = notification
    request.store.update_bucket(request.bucket, change)
    for webhook in () if skip else tested_webhooks(notification):
        request_recorder(request, notification).tested(webhook)


# The names of an older version, on the same routes
for _name in ("GetBucketNotification", "PutBucketNotification"):
    add_operation(OPERATIONS[_name + "Configuration"]._replace(name=_name))


# --- websites ---
#
# userguide/WebsiteHosting.html, how-to-page-redirect.html and
# IndexDocumentSupport.html; messages: LocalStack's tests recorded against
# S3, and Ceph's rgw, which copies them.

MAX_ROUTING_RULES = 50
MAX_WEBSITE_BYTES = 128 * KIB       # API_PutBucketWebsite.html

_WEBSITE = (
    Field("RedirectAllRequestsTo", (
        need("HostName", TEXT), Field("Protocol", TEXT))),
    Field("IndexDocument", (need("Suffix", TEXT),)),
    Field("ErrorDocument", (need("Key", TEXT),)),
    Field("RoutingRules", (many("RoutingRule", (
        Field("Condition", (Field("KeyPrefixEquals", TEXT),
                            Field("HttpErrorCodeReturnedEquals", INT))),
        need("Redirect", (
            Field("Protocol", TEXT), Field("HostName", FILLED),
            Field("ReplaceKeyPrefixWith", TEXT),
            Field("ReplaceKeyWith", TEXT),
            Field("HttpRedirectCode", INT))),
    ), 1),)),
)


CONFIG_SHAPES["website"] = lambda value: document_shape(_WEBSITE)(value) \
    and not value.keys().isdisjoint(("RedirectAllRequestsTo",
                                     "IndexDocument"))


def parse_website(element):
    """The value of a WebsiteConfiguration Element.

    API_PutBucketWebsite.html.  MalformedXML, InvalidArgument or
    InvalidRequest.
    """
    website = read_document(element, _WEBSITE)
    everything = website.get("RedirectAllRequestsTo")
    if everything is not None:
        if len(website) > 1:
            raise bad_argument("RedirectAllRequestsTo cannot be provided in "
                               "conjunction with other Routing Rules.",
                               "RedirectAllRequestsTo", "not null")
        _check_redirect_host(everything)
        return website
    _check_site_documents(website)
    rules = _routing_rules(website)
    if len(rules) > MAX_ROUTING_RULES:
        raise S3Error("InvalidRequest", "%d routing rules provided, the "
                      "number of routing rules in a website configuration "
                      "is limited to 50." % len(rules))
    for rule in rules:
        _check_routing_rule(rule)
    return website


def website_children(website):
    """The children of a WebsiteConfiguration document."""
    return document_children(website, _WEBSITE)


def _routing_rules(website):
    return website.get("RoutingRules", {}).get("RoutingRule", ())


def _check_protocol(redirect):
    if redirect.get("Protocol", "http") not in ("http", "https"):
        raise S3Error("InvalidRequest", "Invalid protocol, protocol can be "
                      "http or https. If not defined the protocol will be "
                      "selected automatically.")


def _check_redirect_host(redirect):
    _check_protocol(redirect)
    if not redirect["HostName"].strip():
        raise S3Error("InvalidRequest", "A host name must be provided to "
                      "redirect all requests (e.g. \"example.com\").")


def _check_site_documents(website):
    index = website.get("IndexDocument")
    if index is None:
        raise bad_argument("A value for IndexDocument Suffix must be "
                           "provided if RedirectAllRequestsTo is empty",
                           "IndexDocument", "null")
    if not index["Suffix"] or "/" in index["Suffix"]:
        raise bad_argument("The IndexDocument Suffix is not well formed",
                           "IndexDocument", index["Suffix"])
    if "ErrorDocument" in website and not website["ErrorDocument"]["Key"]:
        raise bad_argument("The ErrorDocument Key is not well formed",
                           "ErrorDocument", "")


def _check_routing_rule(rule):
    redirect, condition = rule["Redirect"], rule.get("Condition")
    if not redirect:
        raise S3Error("MalformedXML")
    if condition == {}:
        raise S3Error("InvalidRequest", "Condition cannot be empty. To "
                      "redirect all requests without a condition, the "
                      "condition element shouldn't be present.")
    if "ReplaceKeyWith" in redirect and "ReplaceKeyPrefixWith" in redirect:
        raise S3Error("InvalidRequest", "You can only define "
                      "ReplaceKeyPrefix or ReplaceKey but not both.")
    _check_protocol(redirect)
    code = (condition or {}).get("HttpErrorCodeReturnedEquals", 404)
    if not 400 <= code <= 599:
        raise S3Error("InvalidRequest", "The provided HTTP error code (%d) "
                      "is not valid. Valid codes are 4XX or 5XX." % code)
    code = redirect.get("HttpRedirectCode", 301)
    if not 301 <= code <= 399:
        raise S3Error("InvalidRequest", "The provided HTTP redirect code "
                      "(%d) is not valid. Valid codes are 3XX except 300."
                      % code)


class SitePage(NamedTuple):
    """What a website does: serve the object at `key` with `status`, or
    send `location` with it; with neither, an error page of its own."""
    status: int
    key: Optional[str] = None
    location: Optional[str] = None


def website_page(website, key, scheme, host):
    """The SitePage for a request for `key`, before anything is looked up.

    Its key is the object to look up, with the index document's name after
    "" and "/".
    """
    everything = website.get("RedirectAllRequestsTo")
    if everything is not None:
        return SitePage(301, None, _location(everything, key, scheme, host))
    page = _routed(website, key, None, scheme, host)
    if page is None:
        page = SitePage(200, key)
        if not key or key.endswith("/"):
            page = SitePage(200, key + website["IndexDocument"]["Suffix"])
    return page


def website_index(website, key):
    """The key whose existence turns a miss of `key` into a redirect."""
    return key + "/" + website["IndexDocument"]["Suffix"]


def website_error_page(website, key, status, scheme, host, has_index=False):
    """The SitePage when looking up what website_page() named gave an error.

    key: of the request; status: 403, 404, ...; has_index: website_index()
    exists.  A routing rule goes first, then the folder's index document
    (302, userguide/IndexDocumentSupport.html), then the error document,
    which is for 4xx only.
    """
    page = _routed(website, key, status, scheme, host)
    if page is not None:
        return page
    if has_index and status in (403, 404) and key and key[-1] != "/":
        return SitePage(302, None, "/" + uri_encode(key + "/", "/-_.~"))
    if "ErrorDocument" in website and 400 <= status <= 499:
        return SitePage(status, website["ErrorDocument"]["Key"])
    return SitePage(status)


def _routed(website, key, status, scheme, host):
    """The SitePage of the first routing rule that holds; status None:
    before the look-up, when rules for an error code do not."""
    for rule in _routing_rules(website):
        condition, redirect = rule.get("Condition", {}), rule["Redirect"]
        prefix = condition.get("KeyPrefixEquals", "")
        if condition.get("HttpErrorCodeReturnedEquals") != status \
                or not key.startswith(prefix):
            continue
        new_key = None
        if "ReplaceKeyWith" in redirect:
            new_key = _encode_replacement(redirect["ReplaceKeyWith"])
        elif "ReplaceKeyPrefixWith" in redirect:
            new_key = _encode_replacement(redirect["ReplaceKeyPrefixWith"]) \
                + uri_encode(key[len(prefix):], "/-_.~")
        return SitePage(redirect.get("HttpRedirectCode", 301),
                    location=_location(redirect, key, scheme, host, new_key))
    return None


def _encode_replacement(text):
    """A replacement for a Location: `#!/` and `?` keep their meaning,
    which is what single-page sites use them for; no line ends."""
    return uri_encode(text, "!#$%&'()*+,/:;=?@[]-_.~")


def _location(redirect, key, scheme, host, encoded=None):
    """An absolute URL, of the request's scheme and host where `redirect`
    names none; encoded: the path, when it is not that of `key`."""
    if encoded is None:
        encoded = uri_encode(key, "/-_.~")
    return "%s://%s/%s" % (redirect.get("Protocol") or scheme,
                           redirect.get("HostName") or host, encoded)


@operation("GET", BUCKET, "website")
def get_bucket_website(request):
    """API_GetBucketWebsite."""
    website = request.setting("website")
    if website is None:
        raise S3Error("NoSuchWebsiteConfiguration",
                      BucketName=request.bucket_name)
    return xml_document("WebsiteConfiguration", website_children(website))


@operation("PUT", BUCKET, "website")
def put_bucket_website(request):
    """API_PutBucketWebsite."""
    website = parse_website(request.xml("WebsiteConfiguration",
                                        limit=MAX_WEBSITE_BYTES))
    request.store.update_bucket(
        request.bucket, lambda config: config.update(website=website))


@operation("DELETE", BUCKET, "website", status=204)
def delete_bucket_website(request):
    """API_DeleteBucketWebsite."""
    _forget(request, "website")


# --- websites: the endpoint ---

# What a Host names below a domain: <bucket>.s3-website, with or without a
# region (userguide/WebsiteEndpoints.html)
_SITE = re.compile(r"(.+)\.s3-website(?:[.-][a-z0-9-]+)?\Z")


def serve_site(request):
    """Answer a request to a bucket's website endpoint.

    Everybody is anonymous there, errors are HTML, the query says nothing:
    userguide/WebsiteEndpoints.html.
    """
    request.operation = OPERATIONS["GetObject"]
    request.query, request.pairs = {}, []
    try:
        if request.method not in ("GET", "HEAD"):
            raise S3Error("MethodNotAllowed", Method=request.method,
                          ResourceType="OBJECT",
                          headers={"Allow": "GET, HEAD"})
        return _site_response(request)
    except S3Error as error:
        if error.status == 304:
            raise
        return _site_error_response(request, error)


def _site_response(request):
    """The page, redirect or error document that is asked for."""
    request.enter(request.find_bucket(request.bucket_name))
    _check_payer(request)
    website, key = request.setting("website"), request.key
    if website is None:
        raise S3Error("NoSuchWebsiteConfiguration",
                      BucketName=request.bucket_name)
    try:
        return _site_page(request, website_page(
            website, key, request.scheme, request.host))
    except S3Error as error:
        if not 400 <= error.status <= 599 or error.status == 412:
            raise
        page = website_error_page(
            website, key, error.status, request.scheme, request.host,
            _has_index(request, website, key))
        if not (page.key or page.location):
            raise
        request.headers = {"host": request.host}    # for all of it
        try:
            return _site_page(request, page)
        except S3Error:
            raise error from None


def _site_page(request, page):
    """The Response for a SitePage that names a key or a location."""
    if page.location:
        return Response(page.status, {"Location": page.location})
    request.key = checked_key(page.key)
    request.allow_object("s3:GetObject", request.key)
    try:
        response = get_object(request)
    except S3Error as error:
        if error.code == "NoSuchKey":
            _hide_missing(request)
        raise
    target = response.headers.get("x-amz-website-redirect-location")
    if target:
        close_fd(response.file)
        return Response(301, {"Location": target})
    if page.status != 200:
        response.status = page.status
    return response


def _has_index(request, website, key):
    """True when the index document of the folder `key` can be read."""
    if not key or key.endswith("/") or "IndexDocument" not in website:
        return False
    index = website_index(website, key)
    try:
        request.allow_object("s3:GetObject", index)
    except S3Error:
        return False
    return request.bucket.find(index) is not None


def _site_error_response(request, error):
    """An S3Error as the HTML that the website endpoint sends."""
    phrase = "%d %s" % (error.status, http.HTTPStatus(error.status).phrase)
    items = [("Code", error.code), ("Message", error.message)]
    items += list(error.fields.items())
    items += [("RequestId", request.request_id),
              ("HostId", request.request_id)]
    text = "<html>\n<head><title>%s</title></head>\n<body>\n<h1>%s</h1>\n" \
        "<ul>\n%s</ul>\n<hr/>\n</body>\n</html>\n" % (
            phrase, phrase, "".join("<li>%s: %s</li>\n" % (
                name, html.escape(str(value))) for name, value in items))
    headers = {"x-amz-error-code": error.code,
               "x-amz-error-message": " ".join(error.message.split()),
               "Content-Type": "text/html; charset=utf-8"}
    headers.update(error.headers)
    response = Response(error.status, headers,
                        text.encode("utf-8", "replace"))
    response.code = error.code
    return response


# --- versioning ---

@operation("GET", BUCKET, "versioning")
def get_bucket_versioning(request):
    """API_GetBucketVersioning: empty until it is enabled once."""
    return xml_document("VersioningConfiguration", [
        ("Status", request.bucket.versioning)])


_VERSIONING = (Field("MfaDelete", ON_OFF),
               Field("Status", one_of(ENABLED, SUSPENDED)))


@operation("PUT", BUCKET, "versioning")
def put_bucket_versioning(request):
    """API_PutBucketVersioning; MFA delete is not implemented."""
    asked = read_document(request.xml("VersioningConfiguration"),
                          _VERSIONING)
    if asked.get("MfaDelete") == ENABLED:
        raise S3Error("NotImplemented", "MFA delete is not implemented")
    if not asked:
        raise S3Error("IllegalVersioningConfigurationException")
    status = asked.get("Status")
    if status is None:
        raise S3Error("MalformedXML")

    def change(config):
        if status == SUSPENDED and "object_lock" in config:
            raise S3Error("InvalidBucketState", "An Object Lock configuration "
                          "is present on this bucket, so the versioning state "
                          "cannot be changed.")
        config["versioning"] = status
    request.store.update_bucket(request.bucket, change)


# --- temporary credentials: STS ---
#
# The query API of AWS's Security Token Service, at the server's root: an
# Action and its parameters in a form or a query, a document of its own for
# answers and for errors.  STS/latest/APIReference/.  There are no roles:
# one of any name acts for its account, without a policy but the session's.

STS_VERSION = "2011-06-15"
STS_XMLNS = "https://sts.amazonaws.com/doc/%s/" % STS_VERSION
# Ours: a policy of 2,048 characters and 50 tags, percent-encoded
MAX_STS_BYTES = 128 * KIB
# API_AssumeRole.html: "maximum of one hour" for a role that assumes one
MAX_CHAINED_SECONDS = 3600

# S3's code for what room 4 finds -> STS's, status and message (None: as it
# is), APIReference/CommonErrors.html
_STS_ERRORS = {
    "InvalidAccessKeyId": (
        "InvalidClientTokenId", 403,
        "The security token included in the request is invalid."),
    "InvalidToken": (
        "InvalidClientTokenId", 403,
        "The security token included in the request is invalid."),
    "ExpiredToken": (
        "ExpiredToken", 403,
        "The security token included in the request is expired"),
    "RequestTimeTooSkewed": ("SignatureDoesNotMatch", 403, None),
    "AuthorizationHeaderMalformed": ("IncompleteSignature", 400, None),
    "AuthorizationQueryParametersError": ("IncompleteSignature", 400, None),
    "InvalidArgument": ("IncompleteSignature", 400, None),
}


def is_sts(request):
    """True for a request of the query API: at the root, S3 has no POST,
    and no Action."""
    return request.level == SERVICE and (
        request.method in ("GET", "POST") and "Action" in request.query
        or request.method == "POST" and request.headers.get(
            "content-type", "").lower().startswith(
                "application/x-www-form-urlencoded"))


def serve_sts(request):
    """Answer a request of the query API, errors included."""
    try:
        children = _sts_result(request)
    except S3Error as error:
        return _sts_error_response(request, error)
    name = request.operation.name
    return _sts_response(request, 200, name + "Response", [
        (name + "Result", children),
        ("ResponseMetadata", [("RequestId", request.request_id)])])


def _sts_response(request, status, tag, children):
    return Response(status, {"Content-Type": "text/xml",
                             "x-amzn-RequestId": request.request_id},
                    xml_document(tag, children, STS_XMLNS))


def _sts_error_response(request, error):
    """An S3Error as STS's clients know it; what a message repeats of a
    request must be text that an XML parser takes."""
    code, status, message = _STS_ERRORS.get(
        error.code, (error.code, error.status, None))
    message = "".join(char if char.isprintable() else "?"
                      for char in message or error.message)
    return _sts_response(request, status, "ErrorResponse", [
        ("Error", [("Type", "Sender" if status < 500 else "Receiver"),
                   ("Code", code), ("Message", message)]),
        ("RequestId", request.request_id)])


def _sts_result(request):
    """What the asked operation returns, as children of its Result.

    The operation is looked up before the signature: those that are not
    there are refused by name to everybody, as some need none.
    """
    service = request.service
    data = Body(request.frame, request.frame.left).read_all(MAX_STS_BYTES)
    pairs = [*request.pairs, *parse_query(data.decode("latin-1"))]
    parameters = dict(reversed(pairs))
    name = parameters.get("Action")
    if not name:
        raise S3Error("MissingAction")
    row = OPERATIONS.get(name)
    if row is not None and row.level == STS:
        request.operation = row
    if request.operation is None or row.function is None:
        raise S3Error("NotImplemented", "%s is not implemented" % name)
    version = parameters.get("Version", "NO_VERSION_SPECIFIED")
    if version != STS_VERSION:
        raise S3Error("InvalidAction", "Could not find operation %s for "
                      "version %s" % (name, version))
    request.identity = authenticate(
        request, service.accounts.by_key_id, request.now, service.region,
        signing_hosts(request), "sts", hashlib.sha256(data).hexdigest())
    if request.account is None:
        raise S3Error("MissingAuthenticationToken")
    request.caller = account_caller(request.account)
    request.query = parameters
    return row.function(request)


_STS_TAG = re.compile(r"Tags\.member\.([1-9]\d{0,3})\.(Key|Value)\Z",
                      re.ASCII)


def _check_sts_names(request, *known):
    """NotImplemented for a parameter that would be ignored: MFA, managed
    policies, the source identity and the like."""
    for name, value in request.query.items():
        if not (name in known or name in ("Action", "Version")
                or name in _SIGNING_NAMES
                or "Tags" in known and _STS_TAG.match(name)):
            raise S3Error("NotImplemented", "%s is not implemented"
                          % name.partition(".")[0])
        if name == "Tags" and value:    # how botocore writes an empty list
            raise _sts_invalid(name, value, "be a list")


def _sts_invalid(name, value, rule):
    """The ValidationError for a parameter that breaks a rule."""
    shown = "null" if value is None else "'%s'" % value
    return S3Error("ValidationError", "1 validation error detected: Value "
                   "%s at '%s' failed to satisfy constraint: Member must %s"
                   % (shown, name[:1].lower() + name[1:], rule))


# Parameter -> (least and most characters, pattern); API_AssumeRole.html
_STS_TEXTS = {
    "RoleArn": (20, 2048, r"[\t\n\r\x20-\x7e\x85\xa0-\U0010ffff]+"),
    "RoleSessionName": (2, 64, r"[\w+=,.@-]*"),
    "ExternalId": (2, 1224, r"[\w+=,.@:\/-]*"),
    "Policy": (1, 2048, r"[\t\n\r\x20-\xff]+")}


def _sts_text(request, name, required=False):
    """A parameter, its length and characters checked; "" for none."""
    value = request.query.get(name)
    if value is None and not required:
        return ""
    low, high, pattern = _STS_TEXTS[name]
    if value is None:
        raise _sts_invalid(name, value, "not be null")
    if len(value) < low:
        raise _sts_invalid(name, value, "have length greater than or equal "
                           "to %d" % low)
    if len(value) > high:
        raise _sts_invalid(name, value, "have length less than or equal to "
                           "%d" % high)
    if not re.match(pattern + r"\Z", value, re.ASCII):
        raise _sts_invalid(name, value, "satisfy regular expression "
                           "pattern: " + pattern)
    return value


def _sts_duration(request, most, default):
    """DurationSeconds, from 900 to `most`."""
    text = request.query.get("DurationSeconds")
    if text is None:
        return default
    if not re.match(r"-?\d{1,10}\Z", text, re.ASCII):
        raise _sts_invalid("DurationSeconds", text, "be an integer")
    seconds = int(text)
    if seconds < 900:
        raise _sts_invalid("DurationSeconds", text, "have value greater than "
                           "or equal to 900")
    if seconds > most:
        raise _sts_invalid("DurationSeconds", text, "have value less than or "
                           "equal to %d" % most)
    return seconds


def _sts_tags(request):
    """The session tags of a request, as (key, value) pairs."""
    members = {}
    for name, value in request.query.items():
        match = _STS_TAG.match(name)
        if match:
            members.setdefault(int(match[1]), {})[match[2]] = value
    for number, member in members.items():
        if len(member) < 2:
            raise _sts_invalid("Tags.%d.member" % number, None,
                               "have a key and a value")
    pairs = [(members[number]["Key"], members[number]["Value"])
             for number in sorted(members)]
    if len({key.lower() for key, _ in pairs}) < len(pairs):
        raise S3Error("InvalidParameterValue", "Duplicate tag keys found. "
                      "Please note that Tag keys are case insensitive.")
    try:
        return tuple(checked_tags(pairs, "bucket").items())
    except S3Error as error:
        raise S3Error("ValidationError", error.message) from None


def _credentials_children(request, session, account):
    """(children of an answer, percent): new Credentials for a Session."""
    issued, token, percent = issue_session(account, session)
    return [("Credentials", [
        ("AccessKeyId", issued.key_id), ("SecretAccessKey", issued.secret),
        ("SessionToken", token),
        ("Expiration", iso_date(session.expires))])], percent


@operation("POST", STS)
def get_caller_identity(request):
    """API_GetCallerIdentity: needs no permission."""
    _check_sts_names(request)
    caller = request.caller
    return [("Arn", caller.session_arn or caller.arn),
            ("UserId", caller.unique_id), ("Account", caller.user_id)]


@operation("POST", STS)
def get_session_token(request):
    """API_GetSessionToken, with the durations of an IAM user."""
    _check_sts_names(request, "DurationSeconds")
    now = int(request.now)
    if request.account.session is not None:
        raise S3Error("AccessDenied", "Cannot call GetSessionToken with "
                      "session credentials")
    seconds = _sts_duration(request, 129600, 43200)
    return _credentials_children(request, Session(now, now + seconds),
                                 request.account)[0]


_ROLE_ARN = re.compile(r"arn:aws:iam::([^/]*):role/"
                       r"((?:[!-~]{1,510}/)?[\w+=,.@-]{1,64})\Z", re.ASCII)


@operation("POST", STS)
def assume_role(request):
    """API_AssumeRole: an account may assume any role of its own; so may a
    session of it that its own policy lets."""
    caller, now = request.caller, int(request.now)
    _check_sts_names(request, "RoleArn", "RoleSessionName", "Policy",
                     "DurationSeconds", "ExternalId", "Tags")
    arn = _sts_text(request, "RoleArn", True)
    name = _sts_text(request, "RoleSessionName", True)
    _sts_text(request, "ExternalId")    # no trust policy asks for one
    policy, tags = _sts_text(request, "Policy"), _sts_tags(request)
    seconds = _sts_duration(request, 43200, 3600)
    match = _ROLE_ARN.match(arn)
    if not match:
        raise S3Error("ValidationError", "%s is invalid" % arn)
    if policy:
        parse_session_policy(policy)
    for action in ["sts:AssumeRole"] + ["sts:TagSession"] * bool(tags):
        if match[1] != caller.user_id or not is_allowed(
                caller, action, arn, None, policy_context(request, None)):
            raise S3Error("AccessDenied", "User: %s is not authorized to "
                          "perform: %s on resource: %s" % (
                              caller.session_arn or caller.arn, action, arn))
    if caller.session_arn and seconds > MAX_CHAINED_SECONDS:
        raise S3Error("ValidationError", "The requested DurationSeconds "
                      "exceeds the 1 hour session limit for roles assumed "
                      "by role chaining")
    session = Session(now, now + seconds, match[2], name, policy, tags)
    account = request.service.accounts.by_user_id[caller.user_id]
    children, percent = _credentials_children(request, session, account)
    assumed = account_caller(account._replace(session=session))
    return children + [
        ("AssumedRoleUser", [("AssumedRoleId", assumed.unique_id),
                             ("Arn", assumed.session_arn)]),
        ("PackedPolicySize", percent if policy or tags else None)]


# --- what is refused by name ---

# Every further operation of botocore's service model: method, level and
# subresource -> names.  Those on one route are told apart by version only.
for _method, _level, _subresource, _name in (
        ("DELETE", OBJECT, "annotation", "DeleteObjectAnnotation"),
        ("GET", OBJECT, "annotation", "GetObjectAnnotation"),
        ("GET", OBJECT, "annotation", "ListObjectAnnotations"),
        ("PUT", OBJECT, "annotation", "PutObjectAnnotation"),
        ("POST", OBJECT, "restore", "RestoreObject"),
        ("POST", OBJECT, "select", "SelectObjectContent"),
        ("GET", BUCKET, "session", "CreateSession"),
        ("GET", OBJECT, "torrent", "GetObjectTorrent"),
        ("POST", BUCKET, "WriteGetObjectResponse",
         "WriteGetObjectResponse"),
        ("GET", SERVICE, "directory-buckets", "ListDirectoryBuckets")):
    add_operation(Operation(_name, _method, _level, _subresource, None,
                            iam_action(_name), 501, REFUSED, None))
for _name in ("AssumeRoleWithSAML", "AssumeRoleWithWebIdentity",
              "AssumeRoot", "DecodeAuthorizationMessage",
              "GetAccessKeyInfo", "GetDelegatedAccessToken",
              "GetFederationToken", "GetScopedCredentials",
              "GetWebIdentityToken"):
    add_operation(Operation(_name, "POST", STS, None, None,
                            iam_action(_name, STS), 501, REFUSED, None))


###############################################################################
# 9. HTTP
###############################################################################
#
# One connection: heads in, answers out.  Knows no paths, no documents and
# no rules of S3.  Runs in the connection's own thread.

LINGER_SECONDS = 5                  # for a body that nobody wants
MAX_EMPTY_LINES = 8                 # before a request line
# Of a head, and of a body as long as that much has not come: who waits in
# recv(2) holds a buffer of that size.
FIRST_READ_BYTES = 16 * KIB
MAX_DRAIN_BYTES = 256 * KIB         # read away to keep the connection
MAX_LINGER_BYTES = 64 * MIB
MAX_INLINE_BYTES = 64 * KIB         # file bytes sent along with the head
# The longest key takes less.  A line of the log stays below PIPE_BUF, 4,096:
# up to that size what several processes write into a pipe is not mixed.
MAX_LOGGED_CHARS = 3300

_REQUEST_LINE = re.compile(
    r"([A-Z]{1,16}) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9]\.[0-9])\Z")
_HTTP_VERSIONS = {"1.0": (1, 0), "1.1": (1, 1)}
_HEADER_LINES = re.compile(
    r"(?:" + FIELD_LINE.decode("ascii") + r"\r\n)*\Z")
# Headers that may come once only: two of them are a smuggling attempt
_SINGLE_HEADERS = frozenset((
    "authorization", "content-length", "content-type", "host",
    "transfer-encoding", "expect", "range", "x-amz-content-sha256",
    "x-amz-date", "x-amz-copy-source", "x-amz-decoded-content-length"))
# How every answer begins
_ANSWER = ("HTTP/1.1 %d %s\r\nServer: gos3rve\r\nDate: %s\r\n"
           "x-amz-request-id: %s\r\nx-amz-id-2: %s")
_METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS")
_VISIBLE = string.ascii_letters + string.digits + string.punctuation
_HEALTH_PATHS = ("/-/health", "/minio/health/live")
_WAIT_ERRORS = (BlockingIOError, socket.timeout, ssl.SSLWantReadError,
                ssl.SSLWantWriteError)


class Disconnected(Exception):
    """The client is gone: there is nobody to answer."""


class Limits(NamedTuple):
    """connections: at once, each with a thread; further ones wait.  Seconds
    for a whole request head, for the next bytes of a body to come or to be
    taken, and between two requests."""
    connections: int = 2500
    head_seconds: float = 30
    body_seconds: float = 60
    idle_seconds: float = 60


LIMITS = Limits()


class Head(NamedTuple):
    """A parsed request head; headers by lower-case name."""
    method: str
    target: str
    version: Tuple[int, int]
    headers: Dict[str, str]


def parse_head(data):
    """The Head of a request's bytes, the empty line included.

    BadRequest for whatever RFC 9112 does not allow: bare LF, folded
    lines, bad names, doubled Host or Content-Length, no Host.
    """
    line, _, rest = data.decode("latin-1").partition("\r\n")
    match = _REQUEST_LINE.match(line)
    if not match:
        raise S3Error("BadRequest", "The request line is malformed")
    method, target, version = match.groups()
    version = _HTTP_VERSIONS.get(version)
    if version is None:
        raise S3Error("UnsupportedHTTPVersion")
    if not _HEADER_LINES.match(rest, 0, len(rest) - 2):
        raise S3Error("BadRequest", "A request header is malformed")
    headers, lines = {}, rest.split("\r\n")[:-2]
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip(" \t")
    if len(headers) < len(lines):
        headers = _joined_headers(lines)
    if len(headers) > MAX_HEADERS:
        raise S3Error("RequestHeaderSectionTooLarge")
    if "host" not in headers and version == (1, 1):
        raise S3Error("BadRequest", "The Host header is missing")
    return Head(method, target, version, headers)


def _joined_headers(lines):
    """The headers of some lines where a name comes again."""
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in _SINGLE_HEADERS:
                raise S3Error("BadRequest", "The header %s came twice"
                              % name)
            value = headers[name] + "," + value
        headers[name] = value
    return headers


def open_frame(head, wire):
    """The reader of a request's body, as HTTP frames it."""
    coding = head.headers.get("transfer-encoding")
    length = head.headers.get("content-length")
    if coding is None:
        if length is None:
            return LengthReader(wire, 0)
        if not (length.isdigit() and length.isascii() and len(length) < 19):
            raise S3Error("BadRequest", "The Content-Length is malformed")
        return LengthReader(wire, int(length))
    if length is not None or head.version == (1, 0):
        raise S3Error("BadRequest", "Transfer-Encoding cannot be combined "
                      "with Content-Length or HTTP/1.0")
    if coding.lower() != "chunked":
        raise S3Error("NotImplemented", Header="Transfer-Encoding")
    return ChunkedReader(wire)


class Wire:
    """The receiving side of a connection, buffered.

    `before_body` is called once before the next body byte is waited for:
    it sends 100 Continue.  wanted(): False once nobody is to wait for a
    request any more; given where nothing else can wake who does.  last:
    the time.perf_counter() of the last bytes that came.
    """

    def __init__(self, connection, limits, wanted=None):
        self._connection, self._recv = connection, connection.recv
        self._limits = limits
        # one time-out for all that comes: to change it is a system call
        self._patience = limits.body_seconds
        if _has_two_timeouts(connection):
            self._patience = min(self._patience, limits.idle_seconds)
        self._rest()
        # a block in one call and one piece; TLS sockets know no flags
        self._flags = 0 if isinstance(connection, ssl.SSLSocket) \
            else getattr(socket, "MSG_WAITALL", 0)
        self._wanted = wanted
        self._buffer = b""
        self.before_body = None
        self.received = self.last = 0

    def _receive(self, size, flags=0):
        try:
            data = self._recv(size, flags)
            self.last = time.perf_counter()
            return data
        except _WAIT_ERRORS:
            raise S3Error("RequestTimeout") from None
        except OSError as error:
            raise Disconnected(str(error)) from None

    def _receive_body(self, size, flags=0):
        """Bytes of a body, or RequestTimeout."""
        if self.before_body:
            self.before_body()
        try:
            return self._receive(size, flags)
        except S3Error:
            more = self._limits.body_seconds - self._patience
            if more <= 0:
                raise
            return self._receive_until(time.monotonic() + more, None, size,
                                       flags)

    def read(self, size):
        """1 to `size` bytes of a body, b"" at the end."""
        data = self._buffer
        if data:
            self._buffer = data[size:]
            data = data[:size]
        else:
            if self.received < FIRST_READ_BYTES:
                size = min(size, FIRST_READ_BYTES)
            data = self._receive_body(size, self._flags)
        self.received += len(data)
        return data

    def readline(self, limit):
        """A line of a body, or what there is up to `limit` bytes."""
        while b"\n" not in self._buffer and len(self._buffer) < limit:
            data = self._receive_body(MAX_LINE_BYTES)
            if not data:
                break
            self._buffer += data
        end = self._buffer.find(b"\n") + 1 or min(limit, len(self._buffer))
        line, self._buffer = self._buffer[:end], self._buffer[end:]
        self.received += end
        return line

    def drain(self, size):
        """Read so many bytes of a body away, or RequestTimeout: all of them
        have the time that the next one has otherwise."""
        deadline = time.monotonic() + self._limits.body_seconds
        left = size - len(self._buffer)
        self._buffer = self._buffer[size:]
        while left > 0:
            data = self._receive_until(deadline, None, left, self._flags)
            if not data:
                raise S3Error("IncompleteBody")
            left -= len(data)
        self.received += size

    def _first_bytes(self):
        """The first bytes of a head; b"" when none come in time, nobody
        waits for them any more, or the client has gone."""
        idle = self._limits.idle_seconds
        try:
            if self._wanted is None and idle == self._patience:
                return self._receive(FIRST_READ_BYTES)
            return self._receive_until(time.monotonic() + idle,
                                       self._wanted, FIRST_READ_BYTES)
        except (S3Error, Disconnected):
            return b""

    def head(self):
        """The bytes of the next request head; b"" when there is none.

        The first byte may take idle_seconds, the whole head head_seconds
        from then on.
        """
        data, start = self._buffer or self._first_bytes(), 0
        if not data:
            return data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4 or data.startswith(b"\r\n"):     # as good as never
            data, start, end = self._whole_head(data)
        if end > MAX_HEAD_BYTES:
            raise S3Error("RequestHeaderSectionTooLarge")
        self._buffer = data[end:]
        return data[start:end]

    def _whole_head(self, data):
        """(bytes, start, end of the head in them) of a head that has begun,
        its rest received."""
        deadline = time.monotonic() + self._limits.head_seconds
        start, end = _head_span(data)
        while end < 0:
            if len(data) > MAX_HEAD_BYTES:
                raise S3Error("RequestHeaderSectionTooLarge")
            more = self._receive_until(deadline, self._wanted,
                                       FIRST_READ_BYTES)
            if not more:
                raise S3Error("BadRequest", "The request head is incomplete")
            data += more
            start, end = _head_span(data)
        return data, start, end

    def _receive_until(self, deadline, wanted, size, flags=0):
        """Bytes before a time.monotonic(), and while they are wanted, or
        RequestTimeout."""
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0:           # though bytes may come fast enough
                    raise S3Error("RequestTimeout")
                set_timeout(self._connection,
                            min(left, 0.5) if wanted else left)
                try:
                    return self._receive(size, flags)
                except S3Error:
                    if wanted is not None and not wanted():
                        raise
        finally:
            self._rest()

    def _rest(self):
        """Give the connection its usual time-outs."""
        set_timeout(self._connection, self._patience,
                    self._limits.body_seconds)


def _head_span(data):
    """(start, end) of the head in some bytes, its end -1 when that has not
    come.  Empty lines may stand before it: RFC 9112, section 2.2."""
    start = 0
    while data.startswith(b"\r\n", start):
        start += 2
        if start > MAX_EMPTY_LINES * 2:
            raise S3Error("BadRequest", "Empty lines stand before the "
                          "request")
    end = data.find(b"\r\n\r\n", start)
    return start, (end + 4 if end >= 0 else -1)


def _has_two_timeouts(connection):
    """True where to send may take another time than to receive."""
    return os.name == "posix" and not isinstance(connection, ssl.SSLSocket)


def set_timeout(connection, seconds, send_seconds=None):
    """Bound every wait on a socket: to receive, and, where that is given
    and there are two, to send.

    In the kernel where that works: a Python time-out costs a poll(2)
    before each recv and send.
    """
    if _has_two_timeouts(connection):
        for option, bound in ((socket.SO_RCVTIMEO, seconds),
                              (socket.SO_SNDTIMEO, send_seconds)):
            if bound is not None:
                whole = int(bound)
                connection.setsockopt(socket.SOL_SOCKET, option, struct.pack(
                    "ll", whole, int((bound - whole) * 999999) or not whole))
    else:
        connection.settimeout(seconds)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection's requests, one after the other.

    Of the present one: `head` (Head or None), `asked` (Request or None),
    `method`, `request_id`, when it `started` and was `answered`, and the
    bytes `sent` of its answer.
    """

    protocol_version = "HTTP/1.1"

    def setup(self):
        """Take the connection; a TLS handshake happens here, in its own
        thread, so that a slow client stops nobody."""
        self.connection = self.request
        self.close_connection = self.unread = False
        self.tls = isinstance(self.connection, ssl.SSLSocket)
        idle, limits = self.server.idle, self.server.limits
        idle[self.connection] = time.monotonic(), True
        try:
            self.connection.setsockopt(socket.IPPROTO_TCP,
                                       socket.TCP_NODELAY, 1)
            if self.tls:
                set_timeout(self.connection, limits.head_seconds)
                self.connection.do_handshake()
            # shutting a TLS connection's socket down would break its end
            self.wire = Wire(self.connection, limits, (
                lambda: self.connection in idle) if self.tls else None)
        except (OSError, ValueError):
            self.close_connection = self.unread = True
        idle.pop(self.connection, None)

    def handle(self):
        """Serve requests until one side has had enough."""
        while not self.close_connection and not self.server.stopping:
            self.handle_one_request()

    def handle_one_request(self):
        """Read, parse, run, send and log one request."""
        self.head = self.asked = self.method = None
        self.request_id = new_request_id()
        self.wire.received = self.sent = 0
        try:
            response = self._answer()
            if response is None:
                self.close_connection = True
                return
            self.answered = time.perf_counter()
            self.send(response)
        except Disconnected:
            self.close_connection = True
            self.answered = time.perf_counter()
            response = Response(499)
        self.log(response)

    def _answer(self):
        """The Response to the next request; None when there is none."""
        self.started = None
        try:
            data = self._next_head()
            if not data:
                return None
            self.method = "HEAD" if data.startswith(b"HEAD ") else None
            self.head = head = parse_head(data)
            self.method = head.method
            frame = open_frame(head, self.wire)
            if self.is_shut and frame.left != 0:
                raise S3Error("SlowDown")   # its body could not come
        except S3Error as error:
            self.close_connection = self.unread = True
            return error_response(error, self.request_id)
        self.wire.before_body = None
        if head.version == (1, 0) or "connection" in head.headers \
                or "expect" in head.headers:
            self._keep_alive(head)
        response = self._run(head, frame)
        if frame.left == 0 and not self.wire.before_body:
            return response
        try:
            self._finish_body(frame, response.status)
        except BaseException:
            if response.file is not None:
                close_fd(response.file)
            raise
        return response

    def _next_head(self):
        """The bytes of a request head; b"" at the connection's end."""
        idle = self.server.idle
        idle[self.connection] = time.monotonic(), not self.tls
        try:
            return b"" if self.server.stopping else self.wire.head()
        finally:
            # ended in the very moment that a request came
            self.is_shut = idle.pop(self.connection, None) is None \
                and not self.tls
            self.started, self.now = time.perf_counter(), time.time()

    def _keep_alive(self, head):
        """What Connection and Expect ask for."""
        headers = head.headers
        connection = headers.get("connection", "").lower()
        if "close" in connection or (head.version == (1, 0)
                                     and "keep-alive" not in connection):
            self.close_connection = True
        if headers.get("expect", "").lower() == "100-continue" \
                and head.version > (1, 0):
            self.wire.before_body = self._send_continue

    def _send_continue(self):
        self.wire.before_body = None
        self._send_all(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _run(self, head, frame):
        """The Response of one parsed request."""
        resource = head.target.partition("?")[0]
        try:
            if resource in _HEALTH_PATHS and head.method in (
                    "GET", "HEAD") and "authorization" not in head.headers \
                    and "Signature=" not in head.target:
                return Response(200)
            if head.method not in _METHODS:
                raise S3Error("MethodNotAllowed", Method=head.method)
            self.asked = Request(
                self.server.service, head.method, head.target, head.headers,
                frame, self.now, self.request_id,
                "https" if self.tls else "http", self.client_address[0])
            if self.tls:
                self.asked.tls_version = self.connection.version
            return _loaded(answer(self.asked), head.method)
        except S3Error as error:
            failure = error
            if error.__cause__ or error.status in (500, 503, 507):
                self._report(error)
        except OSError as error:
            failure = storage_error(error)
            self.server.report("%s %s: %s" % (self.request_id, failure,
                                              error))
        except Disconnected:
            raise
        except Exception:
            failure = S3Error("InternalError")
            self.server.report("%s %s" % (self.request_id,
                                          traceback.format_exc()))
        return error_response(failure, self.request_id, resource,
                              self.asked is not None
                              and self.asked.is_control)

    def _report(self, error):
        """Tell the operator of an error, and why: its cause."""
        text = "%s %s" % (self.request_id, error)
        if error.__cause__:
            text += ": %s" % error.__cause__
        self.server.report(text)

    def _finish_body(self, frame, status):
        """Read a small rest of the body away, else give up the connection:
        what follows on it would be taken for a request.

        botocore (AWSConnection in 1.44) mistakes the next answer on a
        connection where a final one came instead of 100 Continue: say 100
        before a success that needed no body, and close after a failure.
        """
        if self.wire.before_body:
            if status < 300 and frame.left == 0:
                self._send_continue()
            else:
                self.close_connection = True
        if frame.left == 0:
            return
        try:
            if not (self.wire.before_body or frame.left is None
                    or frame.left > MAX_DRAIN_BYTES):
                self.wire.drain(frame.left)
                return
        except S3Error:
            pass
        self.close_connection = self.unread = True

    def send(self, response):
        """Put an answer on the wire: the one place that does."""
        fd = response.file
        try:
            head = self._head_bytes(response)
            if self.method == "HEAD" or response.status in (204, 304):
                self._send_all(head)
            elif fd is None:
                self._send_all(head + response.body)
                self.sent = len(response.body)
            elif response.blocks is not None:
                self._send_blocks(head, response.blocks)
            else:
                self._send_file(head, fd, response.offset, response.length)
        except (S3Error, OSError) as error:
            # the head may be out: all that is left to say is to cut short
            if not isinstance(error, _CLIENT_ERRORS):
                self._report(error)
            raise Disconnected(str(error)) from None
        finally:
            if fd is not None:
                close_fd(fd)

    def _head_bytes(self, response):
        """The status line and headers of an answer."""
        status = response.status
        if self.server.stopping or self.server.crowded_since:
            self.close_connection = True
        lines = [_ANSWER % (status, _PHRASES.get(status, ""),
                            http_date(int(time.time())), self.request_id,
                            self.request_id)]
        lines += map("%s: %s".__mod__, response.headers.items())
        if status not in (204, 304):
            lines.append("Content-Length: %d" % (
                # an error's document stays unsaid
                0 if self.method == "HEAD" and response.body
                else response.length))
        if self.close_connection:
            lines.append("Connection: close")
        elif self.head.version == (1, 0):
            lines.append("Connection: keep-alive")
        text = "\r\n".join(lines)
        if text.count("\n") != len(lines) + 3:     # four in the first one
            raise S3Error("InternalError", "A header would break its line")
        return (text + "\r\n\r\n").encode("latin-1", "replace")

    def _send_all(self, data):
        try:
            self.connection.sendall(data)
        except OSError as error:
            raise Disconnected(str(error)) from None

    def _send_blocks(self, head, blocks):
        self._send_all(head)
        for block in blocks:
            self._send_all(block)
            self.sent += len(block)

    def _send_file(self, head, fd, offset, length):
        """A large body: from the page cache to the socket in the kernel."""
        if self.tls or not hasattr(os, "sendfile"):
            self._send_blocks(head, read_blocks(fd, offset, length))
            return
        self.connection.sendall(head, getattr(socket, "MSG_MORE", 0))
        out = self.connection.fileno()
        while length:
            done = os.sendfile(out, fd, offset, min(length, GIB))
            if not done:
                raise Disconnected("the file became shorter")
            offset += done
            length -= done
            self.sent += done

    def _on_wire(self):
        """The OnWire of the present request."""
        now, ready = time.perf_counter(), max(self.started, self.wire.last)
        secure = self.connection if self.tls else None
        return OnWire(
            *self.head, self.sent, (now - self.started) * 1000,
            max(0, self.answered - ready) * 1000,
            (secure.cipher() or (None,))[0] if secure else None,
            secure and secure.version())

    def log(self, response):
        """One line of the access log, and those of the bucket's own."""
        if self.asked is not None:
            try:
                log_access(self.asked, response, self._on_wire)
            except (S3Error, OSError) as error:
                self.server.report("%s access log: %s" % (self.request_id,
                                                          error))
        if not self.server.access_log:
            return
        asked, account = self.asked, None
        resource = "-"
        if asked is not None:
            account = asked.identity and asked.identity.account
            resource = "/" + uri_encode(asked.bucket_name)
            if asked.key:
                resource += "/" + uri_encode(asked.key, "/-_.~")
        elif self.head:
            resource = urllib.parse.quote(self.head.target.partition("?")[0],
                                          _VISIBLE, "latin-1")
        self.server.access_log({
            "time": iso_time(int(self.now * 1e9)),
            "client": self.client_address[0],
            "account": account.key_id if account else "-",
            "operation": asked.operation.name
            if asked is not None and asked.operation else "-",
            "method": self.method or "-",
            "resource": resource[:MAX_LOGGED_CHARS],
            "status": response.status, "bytes_in": self.wire.received,
            "bytes_out": self.sent,
            "ms": int((time.perf_counter() - self.started) * 1e6) / 1000,
            "request_id": self.request_id})

    def finish(self):
        """Close so that the client still reads the last answer.

        A close with unread bytes would reset the connection under it; TLS
        wants its close_notify.
        """
        with contextlib.suppress(OSError, ValueError):
            if self.tls:
                self._linger()
                self.connection.settimeout(1)
                self.connection.unwrap()
            self.connection.shutdown(socket.SHUT_WR)
            if not self.tls:
                self._linger()

    def _linger(self):
        """Read what the client still sends of an unwanted body, within
        bounds: until then it does not read its answer."""
        if not self.unread:
            return
        left, deadline = MAX_LINGER_BYTES, time.monotonic() + LINGER_SECONDS
        set_timeout(self.connection, 1)
        with contextlib.suppress(OSError):
            while left > 0 and time.monotonic() < deadline:
                data = self.connection.recv(BLOCK_BYTES)
                if not data:
                    return
                left -= len(data)


# Of what sendfile(2) may answer, that which is not the file's fault
_CLIENT_ERRORS = (ConnectionError, BlockingIOError, InterruptedError,
                  TimeoutError, socket.timeout)
_PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
_PHRASES[416] = "Requested Range Not Satisfiable"


def refusal(request_id):
    """The bytes of a SlowDown, for who asked for whatever it was."""
    response = error_response(S3Error("SlowDown"), request_id)
    return ((_ANSWER + "\r\nContent-Type: application/xml\r\n"
             "Content-Length: %d\r\nConnection: close\r\n\r\n") % (
                 response.status, _PHRASES[response.status],
                 http_date(int(time.time())), request_id, request_id,
                 response.length)).encode() + response.body


def _loaded(response, method):
    """A Response with the small part of a file that it sends read into its
    body: what cannot be read can still be said."""
    if response.file is not None and response.blocks is None \
            and response.length <= MAX_INLINE_BYTES and method != "HEAD":
        try:
            response.body = read_range(response.file, response.offset,
                                       response.length)
        finally:
            close_fd(response.file)
        response.file = None
    return response


def new_request_id():
    """Sixteen hexadecimal digits; not a secret."""
    return "%016X" % random.getrandbits(64)


###############################################################################
# 10. Server
###############################################################################
#
# The listening socket, a thread for each connection up to a cap, TLS (the
# certificate is read in 11), the housekeeping thread, a thread for each
# webhook and an orderly end.  Knows nothing of what a request says.
#
# With workers the first process binds the socket and serves nothing; it has
# one thread, so that it may fork at any time:
#
#     supervisor -- pipe --> worker 0: connections, webhooks, housekeeping
#      (signals)  -- pipe --> worker 1: connections, webhooks
#
# A worker that dies takes its own connections with it and nothing else: the
# socket and its queue are everybody's, all else is on the disk.  The pipe
# ends with the supervisor, however it ends, and every worker with the pipe.

GRACE_SECONDS = 1       # for a request to come, though others wait
QUEUE_SECONDS = 10                  # to wait for a slot before a SlowDown
DRAIN_SECONDS = 30                  # for running requests at the end
HOUSEKEEPING_SECONDS = 60
THREAD_STACK_BYTES = 512 * KIB      # address space: 2,000 of them in 1 GB
MAX_WORKERS = 64
MAX_DEFAULT_WORKERS = 4
GONE = (1 << 31) - 1                # the load of a worker that takes nothing
TRIM_SECONDS = 10
M_ARENA_MAX = -8                    # of glibc's malloc.h
ACCEPT_PAUSES = (0.0002, 0.0005, 0.001, 0.003, 0.006, 0.02)     # seconds
WEBHOOK_SECONDS = 10        # to connect, and for each step of an answer
MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1, 60
MAX_UNREACHED = 3                   # in a row: the webhook is down
MAX_VISIT_EVENTS = 1000             # then it is the next bucket's turn
MAX_REPLY_BYTES = 64 * KIB
MAX_SAID = 20                       # different lines, until all is well
LOOK_SECONDS = 60                   # for events that others left
CLAIM_SECONDS = 0.2                 # while another process delivers
REST_SECONDS = 0.1                  # while some key of a bucket waits
LAST_WORD_SECONDS = 1
_DOWN_STATUSES = (429, 502, 503, 504)   # of a webhook or what is before it


class Sender:
    """Delivers the events of one webhook, by run() in a thread of its own.

    Per bucket one process at a time; per key in order: after a failure the
    key's later events wait, with exponential backoff, and other keys go
    on.  An event is removed once the webhook has answered 2xx, so that it
    may come twice after a crash, and never not at all, but for those that
    fail for EVENT_SECONDS or are more than MAX_SPOOLED_EVENTS.
    """

    def __init__(self, name, url, store, outbox, report):
        self._name, self._store, self._outbox = name, store, outbox
        self._report = report
        parts = urllib.parse.urlsplit(url)
        self._address = parts.hostname, parts.port
        self._target = (parts.path or "/") + (
            "?" + parts.query if parts.query else "")
        self._tls = ssl.create_default_context() \
            if parts.scheme == "https" else None
        self._connection = None
        self._backoff = {}      # bucket -> {key's hash: (failures, due)}
        self._unreached = 0             # times in a row
        self._said = set()              # in the log, since all was well

    def run(self):
        """Deliver until the outbox is closed."""
        waiting, pause, looked = set(), 0, -LOOK_SECONDS
        while not self._outbox.closed:
            try:
                if time.monotonic() >= looked + LOOK_SECONDS:
                    looked = time.monotonic()
                    waiting |= self._store.spooled(self._name)
                waiting, pause = self._round(
                    waiting | self._outbox.take(self._name, pause))
            except Exception:
                self._say(traceback.format_exc())
                self._outbox.rest(MAX_BACKOFF_SECONDS)
            if self._is_down:
                self._outbox.rest(pause)
                pause = 0
            elif waiting:
                self._outbox.rest(REST_SECONDS)

    @property
    def _is_down(self):
        return self._unreached >= MAX_UNREACHED

    def _say(self, text):
        if not self._outbox.closed:
            self._report("webhook %s: %s" % (self._name, text))

    def _round(self, waiting):
        """Visit some buckets: those to visit again, and in how many
        seconds at the latest."""
        left, pause = set(), LOOK_SECONDS
        for bucket_name in sorted(waiting):
            try:
                spool = self._store.spool(bucket_name, self._name)
            except S3Error:             # deleted, or removed by hand
                self._backoff.pop(bucket_name, None)
                continue
            try:
                wait = self._visit(spool, bucket_name)
            except OSError as error:    # looked at again with the others'
                self._say_once("bucket %s: %s" % (bucket_name, error))
                continue
            if wait is not None:
                left.add(bucket_name)
                pause = min(pause, wait)
            if self._is_down:
                self._disconnect()
                return waiting, backoff(self._unreached - MAX_UNREACHED)
        self._disconnect()
        if self._said and not left:
            self._said.clear()
            self._say("has taken all events that waited")
        return left, pause

    def _visit(self, spool, bucket_name):
        """Deliver what is due; None when nothing is left, else the seconds
        until something is due."""
        with spool.claim() as mine:
            if mine is False:
                return CLAIM_SECONDS
            names = spool.names()
            if not names:
                return None
            self._drop(spool, names[:-MAX_SPOOLED_EVENTS], "too many wait")
            return self._deliver(spool, names[-MAX_SPOOLED_EVENTS:],
                                 self._backoff.setdefault(bucket_name, {}))

    def _drop(self, spool, names, why):
        """Give events up, and say so."""
        count = sum(map(spool.drop, names))
        if count:
            self._say("%d events dropped: %s" % (count, why))

    def _deliver(self, spool, names, later):
        """As _visit(), of events that are ours to deliver.  later: key's
        hash -> (failures, time of the next attempt)."""
        held, attempts = {}, 0
        for name in names:
            key, now = name[16:], time.monotonic()
            failures, due = later.get(key, (0, 0))
            if key in held or due > now:
                held.setdefault(key, (failures, due))
                continue
            if attempts == MAX_VISIT_EVENTS or self._outbox.closed:
                return 0
            attempts, was_down = attempts + 1, self._is_down
            if self._attempt(spool, name):
                later.pop(key, None)
                if was_down:            # the others need not wait longer
                    held = dict.fromkeys(held, (0, now))
                continue
            later[key] = held[key] = failures + 1, now + backoff(failures)
            if self._is_down:
                break
        self._drop(spool, [name for name in itertools.takewhile(
            lambda name: is_old_event(name, time.time()), names)
            if name[16:] in held or self._is_down], "not delivered in time")
        later.clear()                   # of what others delivered, too
        later.update(held)
        return max(0, min(due for _, due in held.values())
                   - time.monotonic()) if held else None

    def _attempt(self, spool, name):
        """Deliver one event; False when it has to stay."""
        data = spool.read(name)
        try:
            load_json(data or b"")
        except ValueError:
            self._drop(spool, [name], "damaged on the disk")
            return True
        error = self._post(data)
        if error is None:
            spool.drop(name)
            return True
        self._say_once("%s; events wait and are tried again" % error)
        return False

    def _say_once(self, text):
        """Say what is wrong, once until all is well."""
        if text not in self._said and len(self._said) < MAX_SAID:
            self._said.add(text)
            self._say(text)

    def _post(self, data):
        """What went wrong with a POST of an event; None if nothing did."""
        try:
            if self._connection is None:
                self._connection = self._connect()
            self._connection.request("POST", self._target, data, {
                "Content-Type": "application/json",
                "User-Agent": "gos3rve"})
            response = self._connection.getresponse()
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._disconnect()          # ValueError: a host that is no name
            self._unreached += 1
            return "no answer (%s)" % (str(error) or type(error).__name__)
        with contextlib.suppress(OSError, http.client.HTTPException):
            response.read(MAX_REPLY_BYTES)
        if not response.isclosed():
            self._disconnect()
        if response.status in _DOWN_STATUSES:
            self._unreached += 1
        else:
            self._unreached = 0
        return None if 200 <= response.status < 300 \
            else "answers %d" % response.status

    def _connect(self):
        """A new connection, whatever proxy the environment names."""
        if self._tls:
            return http.client.HTTPSConnection(
                *self._address, timeout=WEBHOOK_SECONDS, context=self._tls)
        return http.client.HTTPConnection(*self._address,
                                          timeout=WEBHOOK_SECONDS)

    def _disconnect(self):
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def backoff(failures):
    """Seconds until the next attempt."""
    return min(MIN_BACKOFF_SECONDS * 2 ** min(failures, 16),
               MAX_BACKOFF_SECONDS)


class Server(http.server.ThreadingHTTPServer):
    """Listens on (host, port); start() serves in threads, close() ends.

    access_log: takes the fields of each request as a dict, or None.
    report: takes a line for the operator.  workers: the processes that
    will serve, each of which calls start(); the connections' cap is shared
    out among them.

    Where a connection finds no slot it waits in the system's queue.  To
    make room, those that have waited longest for a request are ended, and
    every answer is the last one on its connection, until the queue is
    empty.  Where it has not been for QUEUE_SECONDS, whoever finds no slot
    gets a SlowDown.  Requests that run are left alone.

    idle: connection -> since when it waits for a request, and whether it
    can be shut down for that to end.  crowded_since: the time.monotonic()
    from which somebody waited for a slot, else None.  trims: whether the
    process is this server's alone, and so its memory to be kept in order.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 4096           # where the system allows that

    def __init__(self, address, service, tls=None, access_log=None,
                 report=None, upload_ttl=0, workers=1, limits=LIMITS):
        self.service, self.tls = service, tls
        self.access_log = access_log
        self.report = report or (lambda line: None)
        self.limits, self.idle = limits, {}
        self.stopping, self.crowded_since = False, None
        self.trims, self._trim_due = False, 0
        self._shares = [(limits.connections + number) // workers
                        for number in reversed(range(workers))]
        self._slots = threading.BoundedSemaphore(self._shares[0])
        self._upload_ttl = upload_ttl
        self._ended = threading.Event()
        self._senders = []
        self._running = 0
        self._changed = threading.Condition()
        # how many connections each worker has, in memory that all of them
        # see: a hint to whose turn it is, and nothing more
        self.loads = memoryview(mmap.mmap(-1, 4 * workers)).cast("i")
        for number in range(workers):
            self.loads[number] = GONE
        self._worker = 0
        host = address[0]
        if ":" in host or (host == "" and socket.has_ipv6
                           and _has_dual_stack()):
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)
        if workers > 1:                 # another one may be faster
            self.socket.setblocking(False)

    def server_bind(self):
        """Bind without the name look-up that http.server does."""
        if self.address_family == socket.AF_INET6 \
                and self.server_address[0] == "":
            self.socket.setsockopt(socket.IPPROTO_IPV6,
                                   socket.IPV6_V6ONLY, 0)
        if self.allow_reuse_address and os.name == "posix":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR,
                                   1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def start(self, worker=0):
        """Serve in background threads, as the worker of that number; the
        first of them keeps house for all."""
        self._worker = worker
        self._slots = threading.BoundedSemaphore(self._shares[worker])
        self.loads[worker] = 0
        self._trim_due = time.monotonic() + 0.2     # not amid a start
        threading.Thread(target=self.serve_forever, args=(0.1,),
                         name="accept", daemon=True).start()
        if self.service.readonly:
            return
        if worker == 0:
            threading.Thread(target=self._housekeeping,
                             name="housekeeping", daemon=True).start()
        for name, url in self.service.outbox.webhooks.items():
            sender = Sender(name, url, self.service.store,
                            self.service.outbox,
                            lambda line: self.report(line))
            thread = threading.Thread(target=sender.run,
                                      name="webhook " + name, daemon=True)
            thread.start()
            self._senders.append(thread)

    def _leave_to_others(self):
        """Wait, within bounds, while another worker has fewer connections
        and so should accept.

        All workers wake for a connection, and the first one takes it.  Of
        16 connections at once two workers then had from 8 and 8 to 14 and 2
        in 100 runs, with this wait 8 and 8 in all of them.  EPOLLEXCLUSIVE
        wakes one of them, who could not leave it to another.  A socket each
        (SO_REUSEPORT) spreads by chance, 4 connections as 4 and 0 in one run
        of eight, and loses the queue of a worker that dies.
        """
        loads = self.loads
        for pause in ACCEPT_PAUSES:
            if loads[self._worker] <= min(loads):
                return
            time.sleep(pause)

    def service_actions(self):
        """See whether the queue is empty; called after every look at it,
        and ten times a second."""
        if self.trims and time.monotonic() >= self._trim_due:
            self._trim_due = time.monotonic() + TRIM_SECONDS
            trim_memory()
        if self.crowded_since:
            with _POLL() as poll:
                poll.register(self.socket, selectors.EVENT_READ)
                if not poll.select(0):
                    self.crowded_since = None

    def get_request(self):
        """Accept, once there is a slot; the TLS handshake is left to the
        connection's thread."""
        self._leave_to_others()
        self._take_slot()
        try:
            connection, address = self._accept()
            if self.tls is not None:
                connection = self.tls.wrap_socket(
                    connection, server_side=True,
                    do_handshake_on_connect=False, suppress_ragged_eofs=True)
        except BaseException:
            self._slots.release()
            raise
        if address[0].startswith("::ffff:"):
            address = (address[0][7:],) + address[1:]
        return connection, address

    def _accept(self):
        try:
            return super().get_request()
        except BlockingIOError:         # another worker took it
            raise
        except OSError:                 # no descriptor left: do not spin
            self._make_room()
            self._ended.wait(0.05)
            raise

    def _take_slot(self):
        """Take a slot, or BlockingIOError: who waits may come in later, by
        another worker, or was refused."""
        if self._slots.acquire(blocking=False):
            return
        now = time.monotonic()
        self.crowded_since = self.crowded_since or now
        waited = now - self.crowded_since
        if waited < GRACE_SECONDS and any(
                load < share for load, share in zip(self.loads,
                                                    self._shares)):
            self._ended.wait(0.005)     # that worker is faster
            raise BlockingIOError
        self._make_room()
        patient = waited < QUEUE_SECONDS
        if self._slots.acquire(timeout=0.1 if patient else 0.005):
            return
        if not patient:
            self._refuse(self._accept()[0])
        raise BlockingIOError

    def _make_room(self):
        """End the connections that have waited longest for a request."""
        most = max(1, self._shares[self._worker] // 64)
        end = time.monotonic() - GRACE_SECONDS
        for connection, (since, _) in list(self.idle.items())[:most]:
            if since < end:
                self._end_wait(connection)

    def _end_wait(self, connection):
        """End a connection that waits for a request."""
        _, can_shut = self.idle.pop(connection, (0, False))
        if can_shut:                    # the others look for themselves
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RD)

    def _refuse(self, connection):
        """Say SlowDown, as far as that goes without waiting."""
        with connection, contextlib.suppress(OSError):
            if self.tls is None:
                connection.setblocking(False)
                connection.send(refusal(new_request_id()))
                connection.shutdown(socket.SHUT_WR)
                connection.recv(MAX_HEAD_BYTES)     # else it is a reset

    def process_request(self, request, client_address):
        """A thread for the connection, which has a slot."""
        self._count(1)
        try:
            super().process_request(request, client_address)
        except RuntimeError:            # no more threads to be had
            self._leave()
            self._make_room()
            self._refuse(request)

    def process_request_thread(self, request, client_address):
        """As in socketserver, and give the slot back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave()

    def _leave(self):
        self._slots.release()
        self._count(-1)

    def _count(self, change):
        with self._changed:
            self._running += change
            if not self.stopping:
                self.loads[self._worker] = self._running
            self._changed.notify_all()

    def shutdown_request(self, request):
        """Close only: Handler.finish said good-bye already."""
        self.close_request(request)

    def handle_error(self, request, client_address):
        """A connection's thread failed outside of any request."""
        self.report("connection from %s: %s"
                    % (client_address[0], traceback.format_exc()))

    def _housekeeping(self):
        """Sweep at once, and then every now and again."""
        wait = HOUSEKEEPING_SECONDS
        if self._upload_ttl:
            wait = max(1, min(wait, self._upload_ttl / 4))
        day, ended = self.service.day_seconds, self._ended
        chores = (
            (wait, "swept %d leftovers",
             lambda: self.service.store.sweep(self._upload_ttl)),
            (lifecycle_pause(day), "lifecycle rules: %d changes",
             lambda: run_lifecycle(self.service, time.time(), ended.is_set)),
            (log_pause(day), "access logs: %d objects delivered",
             lambda: deliver_logs(self.service, time.time(), ended.is_set)))
        due = [time.monotonic()] * len(chores)
        while True:
            for index, (pause, text, work) in enumerate(chores):
                clock = time.monotonic()
                if clock >= due[index]:
                    due[index] = clock + pause
                    self._do(text, work)
            if ended.wait(min(pause for pause, _, _ in chores)):
                return

    def _do(self, text, work):
        """One round of housekeeping; never the thread's end."""
        try:
            count = work()
            if count:
                self.report(text % count)
        except Exception:
            self.report("housekeeping: " + traceback.format_exc())

    def close(self, drain_seconds=DRAIN_SECONDS):
        """Stop accepting, let running requests finish, close; True when
        all of them did in time."""
        with self._changed:
            self.stopping = True
            self.loads[self._worker] = GONE
        self._ended.set()
        self.shutdown()
        self.socket.close()
        deadline = time.monotonic() + drain_seconds
        with self._changed:
            while self._running and time.monotonic() < deadline:
                for connection in list(self.idle):
                    self._end_wait(connection)
                self._changed.wait(0.1)
            finished = not self._running
        self.service.outbox.close()
        deadline = time.monotonic() + LAST_WORD_SECONDS
        for thread in self._senders:    # so that little is delivered twice
            thread.join(max(0, deadline - time.monotonic()))
        return finished


# without a descriptor of its own: there may be none left
_POLL = getattr(selectors, "PollSelector", selectors.SelectSelector)


def _has_dual_stack():
    try:
        return socket.has_dualstack_ipv6()
    except AttributeError:
        return False


def trim_memory():
    """Give the memory that is free between pieces in use back to the
    system, where the C library is glibc; 1 ms.

    It lets threads have eight arenas a core, each of which keeps what was
    ever freed in it: beside 300 slow connections a worker had 67 MiB after
    two minutes, and grew.  With this, and one arena, which suffices where
    threads take turns anyway, it has 35, and stands still.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.lru_cache(maxsize=None)
def _malloc_trim():
    """malloc_trim(3), or None.  Not looked for at the start: see
    libcrypto()."""
    try:
        import ctypes
        library = ctypes.CDLL(None)
        if _takes_turns():
            library.mallopt(M_ARENA_MAX, 1)
        return library.malloc_trim
    except (ImportError, AttributeError, OSError, TypeError):
        return None                     # TypeError: Windows


# --- workers ---

def have_workers():
    """True where a server may have several processes: fork, signals and
    sockets as they are on Linux."""
    return sys.platform.startswith("linux")


def _takes_turns():
    """True where only one thread of a process runs Python at a time."""
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def default_workers():
    """How many processes serve when nobody said: one a core, within
    MAX_DEFAULT_WORKERS; one where threads use all cores, or where a fork
    would copy their locks."""
    threads_suffice = not _takes_turns()
    if not have_workers() or threads_suffice or threading.active_count() > 1:
        return 1
    try:
        cores = len(os.sched_getaffinity(0))
    except OSError:                     # a filter of system calls
        cores = os.cpu_count() or 1
    return min(cores, MAX_DEFAULT_WORKERS)


class Worker:
    """A worker process, as its supervisor sees it: its number, the pid
    (None: it does not run), since when, and when to start it again."""

    FIRST_PAUSE, LAST_PAUSE = 0.1, 30   # seconds
    LONG_LIFE = 30                      # after which all is forgiven

    def __init__(self, number):
        self.number, self.pid = number, None
        self.since = self.due = 0
        self._pause = 0

    def ended(self):
        """Note its end; the seconds until it is due again: the longer, the
        more often it ended soon."""
        now = time.monotonic()
        if self.pid and now - self.since > self.LONG_LIFE:
            self._pause = 0
        pause, self.pid = self._pause, None
        self._pause = min(max(pause * 2, self.FIRST_PAUSE), self.LAST_PAUSE)
        self.due = now + pause
        return pause


class Supervisor:
    """Keeps workers running around one Server that is not started here.

    start() returns when all of them serve, wait() when a signal asks for
    the end, stop() when they have ended.  A context manager: it has to do
    with signals as long as that lasts.  report: takes a line for the
    operator.

    Signals are blocked and waited for, so that none comes amiss, and no
    handler runs in the midst of a fork.  The workers inherit that: Ctrl-C,
    which a terminal sends to all processes, is for the supervisor, and a
    second SIGTERM (a service manager's, besides the supervisor's) does not
    cut short what the first one lets finish.
    """

    def __init__(self, workers, report):
        self._workers = [Worker(number) for number in range(workers)]
        self._report = report
        self._server = self._reload = None
        self._ends = frozenset((signal.SIGINT, signal.SIGTERM))
        self._signals = self._ends | {signal.SIGHUP, signal.SIGCHLD}
        self._alive, self._lifeline = os.pipe()

    def __enter__(self):
        # a shell may have some of them ignored
        self._handlers = {number: signal.signal(number, signal.SIG_DFL)
                          for number in self._signals}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        return self

    def __exit__(self, *_):
        self.stop()
        os.close(self._alive)
        os.close(self._lifeline)
        while self._await(0) is not None:
            pass                        # asked again, when all had ended
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    # in a worker

    def _serve(self, number, ready):
        """A worker's life; does not return.  ready: a pipe that takes "+"
        once requests are served, else the reason why not."""
        status = 1
        try:
            self._begin(number, ready)
            while signal.sigwait((signal.SIGTERM, signal.SIGHUP)) \
                    == signal.SIGHUP:
                self._reload()
            self._server.close()
            status = 0
        except BaseException:
            self._report("worker %d: %s" % (os.getpid(),
                                            traceback.format_exc()))
        finally:
            os._exit(status)

    def _begin(self, number, ready):
        os.close(self._lifeline)
        run_on(self._core(number))
        try:
            threading.Thread(target=self._end_with_supervisor,
                             name="lifeline", daemon=True).start()
            self._server.start(number)
            ready.write(b"+")
        except (OSError, RuntimeError) as error:    # no memory, no threads
            ready.write(str(error).encode()[:200])
            os._exit(1)
        ready.close()

    @staticmethod
    def _core(number):
        """The core of a worker.

        Its threads take turns with the interpreter at every system call,
        and a turn that goes to another core costs more than the call: on
        two cores 4,700 GETs a second without this, 7,400 with it (16
        connections, 1 KiB).  Servers side by side begin at other cores.
        """
        if len(CORES) < 2 or not _takes_turns():
            return []
        return [CORES[(os.getppid() + number) % len(CORES)]]

    def _end_with_supervisor(self):
        os.read(self._alive, 1)
        os._exit(1)

    # in the supervisor

    def start(self, server, reload):
        """Start every worker; OSError when one of them cannot serve.

        reload: reads the certificate again, True when that went well.
        """
        self._server, self._reload = server, reload
        self._start(self._workers)

    def _start(self, workers):
        """Fork workers, side by side, and wait until all of them serve, or
        OSError."""
        with contextlib.ExitStack() as stack:
            sources = []
            for worker in workers:
                reader, writer = os.pipe()
                sources.append(stack.enter_context(open(reader, "rb", 0)))
                with open(writer, "wb", 0) as ready:
                    pid = os.fork()
                    if pid == 0:
                        stack.close()
                        self._serve(worker.number, ready)
                worker.pid, worker.since = pid, time.monotonic()
            for said in [source.read(200) for source in sources]:
                if said != b"+":
                    raise OSError("a worker could not start: " + (
                        said.decode("utf-8", "replace") or "it died"))

    def _await(self, until):
        """The number of the next signal; None when time is up."""
        if until is None:
            return signal.sigwait(self._signals)
        found = signal.sigtimedwait(self._signals, max(
            until - time.monotonic(), 0))
        return found and found.si_signo

    def _kill(self, number):
        """Send a signal to every worker."""
        for worker in self._workers:
            if worker.pid:
                os.kill(worker.pid, number)

    def _reap(self):
        """[(Worker, how it ended)] of those that have."""
        found = []
        for worker in self._workers:
            pid, status = os.waitpid(worker.pid, os.WNOHANG) \
                if worker.pid else (0, 0)
            if pid:
                self._server.loads[worker.number] = GONE
                how = "status %d" % os.WEXITSTATUS(status)
                if os.WIFSIGNALED(status):
                    how = "signal %d" % os.WTERMSIG(status)
                found.append((worker, how))
        return found

    def wait(self):
        """Replace workers that end and pass SIGHUP on, until SIGINT or
        SIGTERM comes."""
        number = None
        while number not in self._ends:
            if number == signal.SIGHUP and self._reload():
                self._kill(signal.SIGHUP)
            for worker, how in self._reap():
                pid, pause = worker.pid, worker.ended()
                self._report("worker %d ended with %s; it is replaced%s" % (
                    pid, how, pause and " in %.1f s" % pause or ""))
            self._replace()
            number = self._await(min((
                worker.due for worker in self._workers if not worker.pid),
                default=None))

    def _replace(self):
        """Start the workers that are due."""
        for worker in self._workers:
            if worker.pid or worker.due > time.monotonic():
                continue
            try:
                self._start([worker])
            except OSError as error:
                self._report(str(error))
                if not worker.pid:      # else there is one to be reaped
                    worker.ended()

    def stop(self):
        """End the workers; running requests have DRAIN_SECONDS to finish.

        A second SIGINT or SIGTERM ends this process, and so all of them.
        """
        self._kill(signal.SIGTERM)
        until = time.monotonic() + DRAIN_SECONDS + 5
        while True:
            for worker, _ in self._reap():
                worker.pid = None
            if not any(worker.pid for worker in self._workers):
                return
            number = self._await(until)
            if number in self._ends:
                os._exit(1)
            if number is None:          # stuck
                self._kill(signal.SIGKILL)
                return


###############################################################################
# 11. Configuration and command line
###############################################################################
#
# One table of options makes the command line, the environment, config.xml,
# -help and the README.  Precedence: command line, environment, file,
# default.  Whatever is wrong with them is one sentence and exit status 2.

class ConfigError(Exception):
    """What is wrong with the configuration, as one sentence."""


def _text(value):
    return value


def _filled(value):
    if not value:
        raise ValueError("must not be empty")
    return value


def _number(low, high, wrong):
    """A cast to a whole number; wrong: what it says of others."""
    def cast(value):
        if not re.match(r"\d{1,6}\Z", value, re.ASCII) \
                or not low <= int(value) <= high:
            raise ValueError(wrong)
        return int(value)
    return cast


_port = _number(0, 65535, "is no port number")
_workers = _number(1, MAX_WORKERS, "is no number from 1 to %d" % MAX_WORKERS)
_connections = _number(1, 999999, "is no number from 1 to 999999")
_day = _number(1, 86400, "is no number of seconds from 1 to 86400")


def _choice(*words):
    """A cast that takes these words only."""
    def cast(value):
        if value not in words:
            raise ValueError("is not one of " + ", ".join(words))
        return value
    return cast


_SWITCHES = {"true": True, "1": True, "yes": True, "on": True,
             "false": False, "0": False, "no": False, "off": False}


def _switch(value):
    if value.lower() not in _SWITCHES:
        raise ValueError("is neither true nor false")
    return _SWITCHES[value.lower()]


def _region(value):
    if not valid_region(value):
        raise ValueError("is no region")
    return value


def _duration(value):
    """Seconds of `90`, `90s`, `15m`, `24h` or `7d`."""
    match = re.match(r"(\d{1,9})([smhd]?)\Z", value, re.ASCII)
    if not match:
        raise ValueError("is no duration like 24h or 7d")
    unit = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    return int(match[1]) * unit


def _timeout(value):
    """Seconds of a duration up to a day."""
    seconds = _duration(value)
    if not 1 <= seconds <= 86400:
        raise ValueError("is not between 1s and 24h")
    return seconds


def _bucket(value):
    """(name, directory or None) of NAME or NAME=DIR."""
    name, separator, directory = value.partition("=")
    if not separator:
        if not valid_bucket_name(name):
            raise ValueError("is no bucket name")
        return name, None
    if not usable_bucket_name(name):
        raise ValueError("is no bucket name")
    if not os.path.isdir(directory):
        raise ValueError("names no directory")
    return name, directory


def _domain(value):
    value = value.lower().strip(".")
    if not re.match(r"[a-z0-9.-]+\Z", value):
        raise ValueError("is no domain name")
    return value


def _url(value):
    parts = urllib.parse.urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname \
            or parts.port == 0 or parts.username is not None \
            or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("is no URL like https://s3.example.com")
    return "%s://%s" % (parts.scheme, parts.netloc)


def _webhook(value):
    """(name, URL) of NAME=URL."""
    name, _, url = value.partition("=")
    if not re.match(r"[A-Za-z0-9_-]{1,128}\Z", name) \
            or not re.match(r"https?://[!-~]+\Z", url):
        raise ValueError("is no NAME=URL with a URL of http or https")
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname or parts.port == 0 or parts.username is not None \
            or parts.fragment:
        raise ValueError("is no NAME=URL with host, path and query only")
    return name, url


def _origin(value):
    default_cors((value,))
    return _filled(value)


class Option(NamedTuple):
    """A setting: flag, what reads its text, default, element of
    config.xml, help; many: may be given again and again."""
    name: str
    cast: Callable
    default: Any
    element: str
    help: str
    many: bool = False


OPTIONS = (
    Option("p", _port, 8080, "Port",
           "port to listen on; 0 picks a free one"),
    Option("bind", _text, "", "Bind",
           "address to listen on (default: all interfaces)"),
    Option("dir_buckets", _filled, "./buckets/", "BucketsPath",
           "directory whose directories are the buckets"),
    Option("dir_uploads", _filled, "./uploads/", "UploadsPath",
           "directory for the parts of multipart uploads"),
    Option("bucket", _bucket, (), "Bucket",
           "NAME: make this bucket at the start; NAME=DIR: serve an "
           "existing directory as this bucket", True),
    Option("key_id", _filled, None, "AccessKeyId",
           "access key id (default: a new one each start)"),
    Option("key_val", _filled, None, "SecretAccessKey",
           "secret access key (default: a new one each start)"),
    Option("user_id", _filled, None, "UserId",
           "canonical user id (default: a new one each start)"),
    Option("user_name", _filled, "s3user@amazon.com", "UserName",
           "display name of the user"),
    Option("user_email", _text, "", "Email",
           "e-mail address of the user"),
    Option("region", _region, None, "Region",
           "the one region to accept (default: any; us-east-1 where one "
           "must be named)"),
    Option("domain", _domain, (), "Domain",
           "serve BUCKET.DOMAIN as virtual-host style, besides "
           "BUCKET.localhost", True),
    Option("public_url", _url, None, "PublicUrl",
           "URL under which clients reach the server through a proxy"),
    Option("tls_cert", _filled, None, "TlsCert",
           "serve HTTPS with this certificate chain (PEM); read again on "
           "SIGHUP"),
    Option("tls_key", _filled, None, "TlsKey",
           "private key of the certificate (default: in the same file)"),
    Option("day_seconds", _day, 86400, "DaySeconds",
           "length of a day of lifecycle rules, for tests"),
    Option("sse_key", _filled, None, "SseKey",
           "file of the master keys of encrypted objects (default: "
           ".gos3rve-keys.json in the directory of the buckets, made when "
           "it is first needed)"),
    Option("webhook", _webhook, (), "Webhook",
           "NAME=URL: POST the events of buckets to this http or https URL, "
           "where NAME is the last part of a destination's ARN", True),
    Option("sync", _switch, False, "Sync",
           "flush every change to the disk before answering"),
    Option("unique", _switch, False, "Unique",
           "an object whose content its bucket has already takes no further "
           "room, where the file system can share it (btrfs, XFS)"),
    Option("readonly", _switch, False, "ReadOnly",
           "refuse every change"),
    Option("follow_symlinks", _switch, False, "FollowSymlinks",
           "follow symbolic links that lead out of a bucket"),
    Option("upload_ttl", _duration, 7 * 86400, "UploadTtl",
           "remove multipart uploads without activity for so long (90s, "
           "15m, 24h, 7d; 0: never; default 7d)"),
    Option("object_ownership", _choice(*OWNERSHIPS), ENFORCED,
           "ObjectOwnership",
           "object ownership of buckets that have no setting of their own: "
           "BucketOwnerEnforced (no ACLs), BucketOwnerPreferred or "
           "ObjectWriter"),
    Option("cors", _origin, (), "Cors",
           "answer cross-origin requests from this origin (`*`: from any) "
           "in buckets without a CORS configuration", True),
    Option("log", _choice("text", "json", "none"), "text", "Log",
           "access log on stderr: text, json or none"),
    Option("workers", _workers, None, "Workers",
           "processes that serve (default: on Linux one a core, at most 4; "
           "elsewhere 1), no more than `-max_conns`"),
    Option("max_conns", _connections, LIMITS.connections,
           "MaxConnections",
           "connections at once, in all processes, each with a thread; "
           "further ones wait, and get 503 SlowDown after ten seconds"),
    Option("head_timeout", _timeout, LIMITS.head_seconds, "HeadTimeout",
           "time for a whole request head (default 30s)"),
    Option("body_timeout", _timeout, LIMITS.body_seconds, "BodyTimeout",
           "time without a byte of a body sent or taken (default 60s)"),
    Option("idle_timeout", _timeout, LIMITS.idle_seconds, "IdleTimeout",
           "time between two requests on a connection (default 60s)"),
    Option("ready_file", _filled, None, "ReadyFile",
           "write the URL into this file once requests are served"),
)
SPARE_FILES = 256                   # besides those of the connections
_COMMANDS = (("help", "show this help"), ("version", "show the version"),
             ("operations", "list every S3 operation and its state"),
             ("fsck", "check all buckets and uploads, and end"),
             ("repair", "with -fsck: mend what can be"),
             ("verify", "with -fsck: also compare every object with its "
              "ETag"))
# Besides OPTIONS, with a value, on the command line: name, kind, help
_VALUED = (("config", "configuration file (default \"./config.xml\", which "
            "need not exist)"),
           ("check_dir", "test what is needed of the file system of this "
            "directory, and end; with -sync also what that needs; run on "
            "two machines at once it tests what they see of each other"))
# Compose files that lost their MinIO keep working
_ENVIRONMENT_ALIASES = {"key_id": "MINIO_ROOT_USER",
                        "key_val": "MINIO_ROOT_PASSWORD"}


class Config(NamedTuple):
    """values: option name -> value.  given: the names that somebody set.
    users: the further Accounts of config.xml."""
    values: Dict[str, Any]
    given: frozenset
    users: Tuple[Account, ...]


def cast_option(option, text, where):
    """An option's value from its text, or ConfigError."""
    try:
        return option.cast(text)
    except ValueError as error:
        raise ConfigError("%s: %r %s" % (where, text, error)) from None


def load_config(path):
    """The settings of a config.xml: {name: value}, and its Accounts."""
    try:
        with open(path, "rb") as file:
            root = parse_xml(file.read(MAX_XML_BYTES), "root")
    except OSError as error:
        raise ConfigError("%s: %s" % (path, error.strerror)) from None
    except S3Error:
        raise ConfigError("%s: is no well-formed XML document with a "
                          "<root>" % path) from None
    by_element = {option.element: option for option in OPTIONS}
    values, users = {}, []
    _check_no_text(path, root)
    for element in root:
        if element.tag == "User":
            users.append(_load_user(path, element))
            continue
        option = by_element.get(element.tag)
        if option is None or len(element):
            raise ConfigError("%s: unknown element <%s>"
                              % (path, element.tag))
        value = cast_option(option, (element.text or "").strip(),
                            "%s: <%s>" % (path, element.tag))
        if option.many:
            values[option.name] = values.get(option.name, ()) + (value,)
        elif option.name in values:
            raise ConfigError("%s: <%s> stands twice" % (path, element.tag))
        else:
            values[option.name] = value
    return values, tuple(users)


def _check_no_text(path, element):
    """Text between elements is a slip of the pen: say so."""
    texts = [element.text] + [child.tail for child in element]
    for text in texts:
        if text and text.strip():
            raise ConfigError("%s: stray text %r in <%s>" % (
                path, text.strip()[:40], element.tag))


def _load_user(path, element):
    """The Account of a <User> element."""
    _check_no_text(path, element)
    fields = {child.tag: (child.text or "").strip() for child in element}
    if len(fields) < len(element):
        raise ConfigError("%s: a <User> has an element twice, of <%s>" % (
            path, ">, <".join(fields)))
    known = ("AccessKeyId", "SecretAccessKey", "UserId", "UserName",
             "Email")
    for name in fields:
        if name not in known:
            raise ConfigError("%s: unknown element <%s> in <User>"
                              % (path, name))
    for name in known[:2]:
        if not fields.get(name):
            raise ConfigError("%s: a <User> has no <%s>" % (path, name))
    return make_user(*(fields.get(name, "") for name in known))


def make_user(key_id, key_val, user_id="", user_name="", user_email=""):
    """A further Account; its user id follows from its key id."""
    if not key_id or not key_val:
        raise ConfigError("a user needs a key_id and a key_val")
    _check_keys(key_id, key_val)
    return Account(key_id, key_val, user_id or hashlib.sha256(
        key_id.encode()).hexdigest(), user_name or key_id, user_email)


def _check_keys(key_id, key_val):
    """ConfigError for a key pair that no client could sign with."""
    if not re.match(r"[!-+\--~]+\Z", key_id):
        raise ConfigError("the access key id %r is not of visible ASCII "
                          "characters other than the comma" % key_id)
    if not is_utf8(key_val):
        raise ConfigError("the secret access key of %s is not UTF-8"
                          % key_id)


def _parse_arguments(argv):
    """{name: text, or list of texts} of a command line.

    Go's syntax, as the Go original had it: one dash or two, `-flag value`
    or `-flag=value`, a switch alone or with `=value`.  argparse reads
    another one: to it `-port 80` is `-p ort`, and `-hello` asks for help.
    """
    known = {option.name: option for option in OPTIONS}
    switches = {name for name, _ in _COMMANDS} | {"h"} | {
        option.name for option in OPTIONS if option.cast is _switch}
    found, rest = {}, list(argv)
    while rest:
        argument = rest.pop(0)
        match = re.match(r"--?([a-z_]+)(?:=(.*))?\Z", argument, re.DOTALL)
        name, value = match.groups() if match else (None, None)
        if name not in switches and name not in known \
                and name not in dict(_VALUED):
            raise ConfigError("unknown argument %s" % argument)
        if value is None and name in switches:
            value = rest.pop(0) if rest and rest[0].lower() in _SWITCHES \
                else "true"
        elif value is None:
            if not rest:
                raise ConfigError("-%s needs a value" % name)
            value = rest.pop(0)
        if name in switches and value.lower() not in _SWITCHES:
            raise ConfigError("-%s: %r is neither true nor false"
                              % (name, value))
        if name in known and known[name].many:
            found.setdefault(name, []).append(value)
        else:
            found[name] = value
    return found


def _parse_environment(environ):
    """{name: text} of the GOS3RVE_ variables and their aliases."""
    found = {}
    names = {"GOS3RVE_" + option.name.upper(): option.name
             for option in OPTIONS}
    names["GOS3RVE_CONFIG"] = "config"
    for name, alias in _ENVIRONMENT_ALIASES.items():
        if environ.get(alias):
            found[name] = environ[alias]
    for variable, name in names.items():
        if environ.get(variable):
            found[name] = environ[variable]
    return found


def read_config(argv, environ):
    """The Config of a command line, an environment and a file."""
    arguments, environment = (_parse_arguments(argv),
                              _parse_environment(environ))
    path = arguments.get("config", environment.get("config"))
    values, users = {}, ()
    if path is not None or os.path.exists("./config.xml"):
        values, users = load_config(path or "./config.xml")
    for option in OPTIONS:
        text = arguments.get(option.name)
        where = "-" + option.name
        if text is None:
            text = environment.get(option.name)
            where = "GOS3RVE_" + option.name.upper()
            if text is not None and option.many:
                text = text.split(",")
        if text is None:
            continue
        if option.many:
            values[option.name] = tuple(
                cast_option(option, item, where) for item in text)
        else:
            values[option.name] = cast_option(option, text, where)
    return make_config(values, users)


def make_config(values, users=()):
    """A Config with its defaults filled in and its parts checked."""
    given = frozenset(values)
    for option in OPTIONS:
        values.setdefault(option.name, option.default)
    if values["key_id"] is None:
        values["key_id"] = _random_text(20)
    if values["key_val"] is None:
        values["key_val"] = _random_text(40)
    if values["user_id"] is None:
        values["user_id"] = str(uuid.uuid4())
    _check_keys(values["key_id"], values["key_val"])
    key_ids = [values["key_id"]] + [user.key_id for user in users]
    if len(set(key_ids)) != len(key_ids):
        raise ConfigError("two accounts have the same access key id")
    if values["workers"] not in (None, 1) and not have_workers():
        raise ConfigError("-workers: more than one process needs Linux")
    if values["tls_key"] and not values["tls_cert"]:
        raise ConfigError("-tls_key needs -tls_cert")
    for option in ("bucket", "webhook"):
        names = [name for name, _ in values[option]]
        if len(set(names)) != len(names):
            raise ConfigError("-%s names the same %s twice"
                              % (option, option))
    buckets = os.path.realpath(values["dir_buckets"])
    uploads = os.path.realpath(values["dir_uploads"])
    if (uploads + os.sep).startswith(buckets + os.sep):
        raise ConfigError("-dir_uploads must not lie in -dir_buckets")
    if values["sse_key"]:
        _check_key_place(values)
    return Config(values, given, tuple(users))


def _check_key_place(values):
    """ConfigError when a key of a bucket leads to the key file."""
    path = os.path.realpath(values["sse_key"])
    directory = values["dir_buckets"]
    roots = [(name, root) for name, root in values["bucket"] if root]
    with contextlib.suppress(OSError):          # there may be none yet
        roots += [(name, os.path.join(directory, name))
                  for name in os.listdir(directory)
                  if usable_bucket_name(name)]
    for name, root in roots:
        root = os.path.join(os.path.realpath(root), "")
        if path.startswith(root) and is_natural(
                path[len(root):].replace(os.sep, "/")):
            raise ConfigError("-sse_key must not lie in the bucket %s, whose "
                              "readers could read it" % name)


def _random_text(length):
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(length))


def load_tls(values):
    """The SSLContext of the configured certificate, or None."""
    if not values["tls_cert"]:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(values["tls_cert"], values["tls_key"])
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("the certificate or its key cannot be loaded: %s"
                          % error) from None
    return context


def load_key_file(values, report):
    """The KeyFile; one that is named is read at once."""
    path = values["sse_key"]
    if path:
        try:
            load_master_keys(path)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return KeyFile(path or os.path.join(
        values["dir_buckets"], ".gos3rve-keys.json"), bool(path), report)


# --- running ---

def make_store(values, report=None):
    """The Store of some settings."""
    return Store(values["dir_buckets"], values["dir_uploads"],
                 {name: path for name, path in values["bucket"] if path},
                 values["sync"], values["follow_symlinks"], report=report,
                 unique=values["unique"])


class Running:
    """A server that runs, as serve() gives it.

    url; key_id and key_val; region; dir_buckets and dir_uploads; server.
    A context manager that closes at its end.  With more than one of
    `workers` the server is only bound: a Supervisor starts it.
    """

    def __init__(self, config, access_log=None, report=None, workers=1):
        values = config.values
        self.key_id, self.key_val = values["key_id"], values["key_val"]
        self.region = values["region"] or "us-east-1"
        tls = load_tls(values)
        report = report or (lambda line: None)
        self.store = make_store(values, report)
        self.dir_buckets = self.store.dir_buckets
        self.dir_uploads = self.store.dir_uploads
        first = Account(self.key_id, self.key_val, values["user_id"],
                        values["user_name"], values["user_email"])
        public = values["public_url"]
        service = Service(
            self.store, Accounts((first,) + config.users,
                                 "user_id" in config.given),
            values["region"], tuple(values["domain"]),
            public and urllib.parse.urlsplit(public).netloc, public,
            values["readonly"], values["object_ownership"],
            default_cors(values["cors"]), load_key_file(values, report),
            values["day_seconds"], Outbox(values["webhook"]))
        self._make_directories(values)
        self.server = Server((values["bind"], values["p"]), service, tls,
                             access_log, report, values["upload_ttl"],
                             workers, Limits(
                                 values["max_conns"], values["head_timeout"],
                                 values["body_timeout"],
                                 values["idle_timeout"]))
        self.port = self.server.server_port
        self.url = "%s://%s:%d" % ("https" if tls else "http",
                                   _reachable(values["bind"]), self.port)
        self._values, self._temporary = values, None
        if workers == 1:
            self.server.start()

    def _make_directories(self, values):
        """The directories and the buckets asked for."""
        if values["readonly"]:
            return
        for path in (self.dir_buckets, self.dir_uploads):
            os.makedirs(path, exist_ok=True)
        for name, path in values["bucket"]:
            if path is None and not os.path.isdir(
                    os.path.join(self.dir_buckets, name)):
                self.store.create_bucket(name, None,
                                         values["region"] or "us-east-1")

    def reload_certificate(self):
        """Read the certificate again, for connections to come; the old
        one stays when that raises ConfigError."""
        self.server.tls = load_tls(self._values)

    def close(self, drain_seconds=DRAIN_SECONDS):
        """End the server; True when every running request could finish."""
        finished = self.server.close(drain_seconds)
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)
        return finished

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _reachable(bind):
    """A host part for URLs of a server bound to that address."""
    if bind in ("", "0.0.0.0", "::"):
        return "127.0.0.1"
    return "[%s]" % bind if ":" in bind else bind


def serve(dir_buckets=None, buckets=(), users=(), **options):
    """Start a server in this process, for tests: a Running.

    dir_buckets: an existing or new directory, None for a temporary one
    that goes with the server.  buckets: names to make.  users: further
    accounts, each a dict of `key_id` and `key_val` and, if you like,
    `user_id`, `user_name` and `user_email`.  options: those of the command
    line by name (`p` is 0, `bind` 127.0.0.1 and `log` none unless given),
    as text, number or bool, a list where one may be given more than once.
    ConfigError when wrong.

        with gos3rve.serve(buckets=["mine"]) as s3:
            boto3.client("s3", endpoint_url=s3.url,
                         aws_access_key_id=s3.key_id,
                         aws_secret_access_key=s3.key_val)
    """
    known = {option.name: option for option in OPTIONS}
    values = {"p": 0, "bind": "127.0.0.1", "log": "none"}
    if options.get("workers") not in (None, 1, "1"):
        raise ConfigError("serve() serves in this process: no workers")
    for name, value in options.items():
        if name not in known:
            raise ConfigError("serve() has no option %s" % name)
        option = known[name]
        if option.many:
            values[name] = tuple(cast_option(option, str(item), name)
                                 for item in value)
        elif value is not None:
            values[name] = cast_option(option, str(value), name)
    values["bucket"] = tuple(values.get("bucket", ())) + tuple(
        cast_option(known["bucket"], name, "buckets") for name in buckets)
    try:
        users = [make_user(**user) for user in users]
    except TypeError as error:
        raise ConfigError("users: %s" % error) from None
    temporary = None
    if dir_buckets is None or "dir_uploads" not in options:
        temporary = tempfile.mkdtemp(prefix="gos3rve-")
    values["dir_buckets"] = str(dir_buckets or os.path.join(
        temporary, "buckets"))
    values.setdefault("dir_uploads", os.path.join(temporary or "",
                                                  "uploads"))
    try:
        config = make_config(values, users)
        running = Running(config, access_writer(values["log"]),
                          operator_log if values["log"] != "none" else None)
    except BaseException:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    running._temporary = temporary
    return running


# --- logs ---

def operator_log(line):
    """A line for the operator, on stderr."""
    _write_stderr("gos3rve: %s\n" % line.rstrip())


def _write_stderr(text):
    try:
        os.write(2, text.encode("utf-8", "backslashreplace"))
    except OSError:                     # nobody reads
        pass


def access_writer(log_format):
    """The access log function of a -log format, or None."""
    return {"text": _log_text, "json": _log_json, "none": None}[log_format]


def _log_text(fields):
    _write_stderr(" ".join(map(str, fields.values())) + "\n")


def _log_json(fields):
    _write_stderr(json.dumps(fields) + "\n")


# --- texts ---

def help_text():
    """What -help prints, and the README repeats."""
    lines = ["Usage of gos3rve.py:"]
    for name, text in _VALUED:
        lines += ["  -%s string" % name, "    \t" + text]
    for option in OPTIONS:
        kind = {_switch: "", _port: " int", _workers: " int", _day: " int",
                _connections: " int", _duration: " duration",
                _timeout: " duration"}.get(option.cast, " string")
        text = option.help
        if option.default not in (None, "", (), False) \
                and "default" not in text:
            text += " (default %s)" % json.dumps(option.default)
        lines += ["  -%s%s" % (option.name, kind), "    \t" + text]
    for name, text in _COMMANDS:
        lines += ["  -" + name, "    \t" + text]
    lines.append("Each can be set in the environment as GOS3RVE_<OPTION>, "
                 "or in the file.")
    return "\n".join(lines)


def operations_text():
    """Every operation, its state and its route, as -operations prints."""
    rows = []
    for row in sorted(OPERATIONS.values()):
        path = {SERVICE: "/", BUCKET: "/Bucket", OBJECT: "/Bucket/Key",
                STS: "/?Action=" + row.name,
                CONTROL: CONTROL_TAGS + "BucketARN"}[row.level]
        if row.subresource:
            path += "?" + row.subresource
        rows.append("%-52s %-8s %-6s %s" % (row.name, row.state,
                                            row.method, path))
    return "\n".join(rows)


def banner(running, config, color=False):
    """What the command line shows at the start: where, what, and blocks
    to paste.  A secret that the user gave is not repeated."""
    values = config.values
    secret = "(as given)" if "key_val" in config.given else running.key_val
    paste = "YOUR_SECRET_KEY" if "key_val" in config.given \
        else running.key_val
    bold, plain = ("\033[1m", "\033[0m") if color else ("", "")
    everywhere = "" if values["bind"] else " (all interfaces)"
    return _BANNER.format(
        bold=bold, plain=plain, version=__version__, url=running.url,
        everywhere=everywhere, buckets=running.dir_buckets,
        uploads=running.dir_uploads, region=running.region,
        any="" if values["region"] else " (any is accepted)",
        key=running.key_id, secret=secret, paste=paste,
        host=running.url.partition("://")[2],
        https="True" if running.url.startswith("https") else "False")


PROGRESS_SECONDS = 5
_BANNER = """\
{bold}gos3rve {version}{plain}
  url         {url}{everywhere}
  buckets     {buckets}
  uploads     {uploads}
  region      {region}{any}
  access key  {key}
  secret key  {secret}

{bold}aws{plain}
  export AWS_ACCESS_KEY_ID={key} AWS_SECRET_ACCESS_KEY={paste}
  export AWS_DEFAULT_REGION={region} AWS_ENDPOINT_URL={url}
  aws s3 mb s3://mine

{bold}boto3{plain}
  s3 = boto3.client("s3", endpoint_url="{url}", region_name="{region}",
                    aws_access_key_id="{key}",
                    aws_secret_access_key="{paste}")

{bold}s3cmd{plain} (~/.s3cfg)
  [default]
  access_key = {key}
  secret_key = {paste}
  host_base = {host}
  host_bucket = {host}
  use_https = {https}

{bold}rclone{plain} (rclone.conf)
  [gos3rve]
  type = s3
  provider = Other
  access_key_id = {key}
  secret_access_key = {paste}
  endpoint = {url}
  region = {region}
"""


# --- the command ---

def main(argv=None):
    """The command line; its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        commands = {"h": help_text, "help": help_text,
                    "version": lambda: "gos3rve " + __version__,
                    "operations": operations_text}
        arguments = _parse_arguments(argv)
        for name, text in commands.items():
            if _switch(arguments.get(name, "false")):
                print(text())
                return 0
        config = read_config(argv, os.environ)
        asked = {name for name in ("fsck", "repair", "verify")
                 if _switch(arguments.get(name, "false"))}
        if asked:
            return fsck(config, asked)
        if "check_dir" in arguments:
            return check_dir(arguments["check_dir"], config.values["sync"])
        return run(config)
    except ConfigError as error:
        print("gos3rve: %s" % error, file=sys.stderr)
        return 2


def check_dir(path, sync, seconds=None):
    """Print what a Trial finds in a directory, a line each: 1 when something
    needed is missing, else 0.  seconds: as meet() has them."""
    lacking = []

    def tell(found):
        print("%-8s %s%s" % (
            {True: "ok", False: "missing", None: "-"}[found.ok], found.name,
            found.text and ": " + found.text), flush=True)
        if found.ok is False and found.needed:
            lacking.append(found.name)
    try:
        with Trial(path) as trial:
            for found in trial.run(("fsync",) if sync else ()):
                tell(found)
            tell(meet(trial, operator_log, seconds))
    except OSError as error:
        raise ConfigError("-check_dir: %s: %s" % (path, error.strerror)) \
            from None
    except KeyboardInterrupt:
        return 130
    print("%s: %s" % (path, "needed and missing: " + ", ".join(lacking)
                      if lacking else "all that is needed is there"))
    return 1 if lacking else 0


def fsck(config, asked):
    """Print what a Checker finds, a line each: 1 when a fault is left,
    else 0.  asked: which of `fsck`, `repair` and `verify`."""
    if "fsck" not in asked:
        raise ConfigError("-%s goes with -fsck" % sorted(asked)[0])
    if "repair" in asked and config.values["readonly"]:
        raise ConfigError("-repair changes what -readonly protects")
    store = make_store(config.values)
    if not os.path.isdir(store.dir_buckets):
        raise ConfigError("-fsck: there is no directory "
                          + store.dir_buckets)
    said = [time.monotonic()]

    def progress(counts):
        if time.monotonic() >= said[0] + PROGRESS_SECONDS:
            said[0] = time.monotonic()
            operator_log("checked %d objects and %d versions, %d MiB so far"
                         % (counts["objects"], counts["versions"],
                            counts["bytes"] // MIB))
    try:
        counts = Checker(
            store, lambda where, what, state: print(
                "%-7s %s %s" % (state, where, what), flush=True),
            "repair" in asked, "verify" in asked, progress).run()
    except KeyboardInterrupt:
        return 130
    except OSError as error:            # nobody reads any more, say
        print("gos3rve: -fsck ends early: %s" % error, file=sys.stderr)
        return 1
    print("checked %s, %s bytes%s: %s" % (
        ", ".join("%d %s" % (counts[what], what) for what in (
            "buckets", "objects", "versions", "uploads", "parts")),
        counts["bytes"], " read" if "verify" in asked else "",
        "%d faults mended, %d left" % (counts[MENDED], counts[LEFT])))
    return 1 if counts[LEFT] else 0


def raise_file_limit(connections):
    """Let each process have as many descriptors as the connections may
    need; tell the operator where it may not."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections * 4 + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        operator_log("%d connections may need %d open files, of which the "
                     "system allows %d" % (connections, wanted, hard))
        wanted = hard
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(config):
    """Serve until a signal comes; the exit status."""
    values = config.values
    workers = min(values["workers"] or default_workers(),
                  values["max_conns"])  # each has a connection, at least
    raise_file_limit(values["max_conns"])
    try:
        if values["ready_file"]:        # a kill may have left it
            _unlink(values["ready_file"])
        if workers == 1:
            _serve_alone(config)
        else:
            _serve_with_workers(config, workers)
    except (OSError, S3Error) as error:
        print("gos3rve: cannot serve: %s" % error, file=sys.stderr)
        return 1
    if values["ready_file"]:
        _unlink(values["ready_file"])
    return 0


def _serve_alone(config):
    """Serve in threads of this process until a signal comes."""
    stop = []

    def end(number, _):
        if stop:                        # asked twice: at once
            os._exit(1)
        stop.append(number)
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), end)
    with Running(config, access_writer(config.values["log"]),
                 operator_log) as running:
        running.server.trims = True
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda *_: _reload(running))
        _announce(running, config)
        while not stop:
            # The kernel may hand a signal to any thread; Python runs its
            # handler in this one, but does not wake it from a lock for that.
            time.sleep(0.1)


def _serve_with_workers(config, workers):
    """Serve in processes of their own until a signal comes."""
    with Supervisor(workers, operator_log) as supervisor:
        running = Running(config, access_writer(config.values["log"]),
                          operator_log, workers)
        running.server.trims = True
        with running.server.socket:
            supervisor.start(running.server, lambda: _reload(running))
            _announce(running, config)
            trim_memory()               # of what compiling this file left
            supervisor.wait()


def _announce(running, config):
    """Say that requests are served."""
    if config.values["ready_file"]:
        _write_ready(config.values["ready_file"], running)
    text = banner(running, config, sys.stdout.isatty())
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding),
          flush=True)                   # whatever bytes a path is of


def _write_ready(path, running):
    """Write the URL into a file, whole at once."""
    try:
        with open(path + ".new", "w") as file:
            file.write(running.url + "\n")
        os.replace(path + ".new", path)
    except OSError:
        _unlink(path + ".new")
        raise


def _reload(running):
    """Read the certificate again; True when that went well."""
    try:
        running.reload_certificate()
    except ConfigError as error:
        operator_log("the certificate was not reloaded: %s" % error)
        return False
    return True


if __name__ == "__main__":
    threading.stack_size(THREAD_STACK_BYTES)
    sys.exit(main())
