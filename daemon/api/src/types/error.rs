//! The errors of the API.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An error that the API answers with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// This is the kind of error, for programs.
    pub code: ErrorCode,
    /// This says what went wrong and what can be done, for people.
    pub message: String,
}

/// Kinds of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The caller may not do this; the message says who may (403).
    Forbidden,
    /// The path does not exist (404).
    UnknownRoute,
    /// The path exists, but not for this method (405).
    UnknownMethod,
    /// No guest of this name is attached (404).
    UnknownGuest,
    /// No peer of this name is configured (404).
    UnknownHost,
    /// No migration of this identity is remembered (404).
    UnknownMigration,
    /// The guest is already being moved (409).
    AlreadyMoving,
    /// The preflight found a reason not to move the guest (409).
    Refused,
    /// No QEMU could be started from the guest file; none was left behind (409).
    CannotLaunch,
    /// The QEMU cannot be attached, and nothing about it has changed (409).
    CannotAttach,
    /// The guest cannot be detached (409).
    CannotDetach,
    /// The migration cannot be cancelled any more (409).
    TooLate,
    /// The guest is not in doubt, so that there is nothing to resolve (409).
    NotInDoubt,
    /// The request is not understood, or a value is out of range (400).
    Invalid,
    /// The body of the request is too large (413).
    TooLarge,
    /// The request did not arrive in time (408).
    Slow,
    /// The daemon cannot do it now (503).
    Unavailable,
    /// The daemon failed (500).
    Internal,
}

/// The body of every answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// This is the error.
    pub error: ApiError,
}

impl ApiError {
    /// Makes an error of this kind.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl ErrorCode {
    /// Returns the status code of the HTTP answer.
    pub fn http_status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Forbidden => 403,
            Self::UnknownRoute | Self::UnknownGuest | Self::UnknownHost | Self::UnknownMigration => 404,
            Self::UnknownMethod => 405,
            Self::Slow => 408,
            Self::AlreadyMoving
            | Self::Refused
            | Self::CannotLaunch
            | Self::CannotAttach
            | Self::CannotDetach
            | Self::TooLate
            | Self::NotInDoubt => 409,
            Self::TooLarge => 413,
            Self::Internal => 500,
            Self::Unavailable => 503,
        }
    }
}
