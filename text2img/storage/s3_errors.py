"""S3's error codes, by what they mean for an upload, and how to log in."""

from __future__ import annotations

from typing import Final

LOG_IN: Final = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile by AWS_PROFILE, or run under a role"
)
NO_ACLS: Final = "AccessControlListNotSupported"
CREDENTIALS: Final = frozenset(
    {
        *("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"),
        *("TokenRefreshRequired", "RequestTimeTooSkewed", "InvalidSecurity", "NotSignedUp", "AccountProblem"),
    }
)
REGION: Final = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
EVERY_OBJECT: Final = (
    CREDENTIALS | REGION | {NO_ACLS, "InvalidRequest", "InvalidBucketName", "MalformedACLError"}
)
"""A 400 with one of these codes would meet every object; one with another code concerns the object sent."""
PASSING: Final = frozenset(
    {
        *("RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "SlowDown"),
        *("ConditionalRequestConflict", "OperationAborted", "ThrottlingException", "TooManyRequests"),
    }
)
"""Codes of errors that may pass, under statuses that otherwise do not."""
