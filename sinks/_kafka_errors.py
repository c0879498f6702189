"""What an error of Kafka means for the records: come again, send again, refuse the record, stop."""

from __future__ import annotations

import ssl
from enum import Enum

from aiokafka import errors

from broker.extend.sink import Fatal, NotConnected
from sinks._kafka_tokens import TokenMissing, TokenRefused


class Verdict(Enum):
    RETRY = "the same batch again, later"
    RESEND = "the same batch again at once, through a new producer"
    POISON = "a record of the batch can never be stored"
    FATAL = "the cluster refuses this configuration"


class InvalidRecordError(errors.BrokerResponseError):  # type: ignore[misc]
    """Kafka refuses a record: a compacted topic wants a key, or a validation failed."""

    errno = 87


class ThrottlingQuotaExceededError(errors.BrokerResponseError):  # type: ignore[misc]
    """Kafka wants us to slow down."""

    errno = 89
    retriable = True


for _error in (InvalidRecordError, ThrottlingQuotaExceededError):  # the driver knows neither and would lose the number
    errors.kafka_errors.setdefault(_error.errno, _error)

_POISON = (
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
    errors.InvalidTimestampError,
    InvalidRecordError,
)
_FATAL = (
    errors.TopicAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
    errors.TransactionalIdAuthorizationFailed,
    errors.PolicyViolationError,
    errors.InvalidTopicError,
    errors.UnsupportedForMessageFormatError,
    errors.UnsupportedVersionError,
)
_RESEND = (
    errors.OutOfOrderSequenceNumber,
    errors.UnknownProducerId,
    errors.InvalidProducerEpoch,
    errors.ProducerFenced,
    errors.ProducerClosed,
    errors.IllegalOperation,  # the driver's transaction ended under our hands: it was fenced
)
_CREDENTIALS = (
    errors.SaslAuthenticationFailed,
    errors.AuthenticationFailedError,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
)

TOO_LARGE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)
"""Poison only when the record was alone; else the batch was too large."""


def verdict(error: BaseException) -> Verdict:
    """What follows from the error of one produced batch. What is not known is tried again: nothing is lost by that."""
    if isinstance(error, _POISON):
        return Verdict.POISON
    if isinstance(error, _FATAL):
        return Verdict.FATAL
    return Verdict.RESEND if isinstance(error, _RESEND) else Verdict.RETRY


def describe(error: BaseException) -> str:
    """Kafka's name and number of an error, or what a library said."""
    return str(error) or type(error).__name__


def about_topic(topic: str, error: type[errors.KafkaError] | None) -> NotConnected | Fatal | None:
    """Why a topic of which the cluster says this cannot be written to; with None it says nothing."""
    if error is None or error is errors.UnknownTopicOrPartitionError:
        return Fatal(f"Kafka has no topic {topic!r}, or we may not see it: create it or allow it")
    if error is errors.TopicAuthorizationFailedError:
        return Fatal(f"Kafka does not let us write to topic {topic!r}: allow it")
    if error is errors.NoError:
        return None
    kind = Fatal if verdict(error()) is Verdict.FATAL else NotConnected
    return kind(f"Kafka topic {topic!r}: {describe(error())}")


def refusal(server: str, error: BaseException) -> NotConnected | Fatal:
    """Why a connection to `server` could not be made."""
    if isinstance(error, TokenRefused):
        return Fatal(f"no token for Kafka (`sasl`): {error.args[0]}")
    if isinstance(error, TokenMissing):
        return NotConnected(f"no token for Kafka (`sasl`): {error.args[0]}")
    if isinstance(error, _CREDENTIALS):
        return Fatal(f"Kafka at {server} refuses our credentials (`sasl`): {describe(error)}")
    if isinstance(error, ssl.SSLCertVerificationError):
        return Fatal(f"the certificate of Kafka at {server} is not trusted (`tls.ca`): {error.verify_message}")
    if isinstance(error, TimeoutError):
        return NotConnected(f"Kafka at {server} does not answer")
    return NotConnected(f"Kafka at {server} cannot be reached: {describe(error)}")
