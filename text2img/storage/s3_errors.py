"""S3's error codes, grouped by what they mean for an upload, and the login hint."""

from __future__ import annotations

from typing import Final

LOGIN_HINT: Final = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a profile with AWS_PROFILE, or run under a role"
)
ACLS_UNSUPPORTED: Final = "AccessControlListNotSupported"
CREDENTIAL_ERRORS: Final = frozenset(
    {
        *("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"),
        *("TokenRefreshRequired", "RequestTimeTooSkewed", "InvalidSecurity", "NotSignedUp", "AccountProblem"),
    }
)
REGION_ERRORS: Final = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
BUCKET_ERRORS: Final = (
    CREDENTIAL_ERRORS
    | REGION_ERRORS
    | {ACLS_UNSUPPORTED, "InvalidRequest", "InvalidBucketName", "MalformedACLError"}
)
"""A 400 with one of these codes applies to every object; with another code, only to the uploaded one."""
TRANSIENT_ERRORS: Final = frozenset(
    {
        *("RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "SlowDown"),
        *("ConditionalRequestConflict", "OperationAborted", "ThrottlingException", "TooManyRequests"),
    }
)
"""Codes of transient errors whose status alone would make them permanent."""
