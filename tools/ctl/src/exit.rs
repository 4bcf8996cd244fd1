//! How the program ends: exit codes for scripts, and errors.

use std::fmt;

use memlane_api::client::ClientError;
use memlane_api::json::to_json;
use memlane_api::types::{ApiError, ErrorBody, ErrorCode, Outcome};
use memlane_keys::KeysError;

/// The exit codes, as `--help` documents them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    Completed = 0,
    Other = 1,
    Usage = 2,
    Refused = 3,
    Failed = 4,
    Cancelled = 5,
    Unreachable = 6,
    Lost = 7,
    Forbidden = 8,
    PoweredOff = 9,
    Incomplete = 10,
}

/// The reason why a command was not carried out.
#[derive(Debug)]
pub(crate) enum Error {
    /// The daemon did not answer, or refused.
    Client(ClientError),
    /// The command does not fit what the daemon is doing.
    Command(ErrorCode, String),
    /// Keys cannot be made or shown.
    Keys(KeysError),
    /// A configuration cannot be put in its place.
    Write(String),
    /// The user left before the end of the migration.
    Left(String),
}

impl Exit {
    pub(crate) fn of(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Completed => Self::Completed,
            Outcome::Failed => Self::Failed,
            Outcome::Cancelled => Self::Cancelled,
            Outcome::Refused => Self::Refused,
            Outcome::Lost => Self::Lost,
            Outcome::PoweredOff => Self::PoweredOff,
        }
    }

    fn of_code(code: ErrorCode) -> Self {
        match code {
            ErrorCode::Invalid | ErrorCode::UnknownMigration => Self::Usage,
            ErrorCode::UnknownGuest
            | ErrorCode::UnknownHost
            | ErrorCode::AlreadyMoving
            | ErrorCode::Refused
            | ErrorCode::CannotLaunch
            | ErrorCode::CannotAttach
            | ErrorCode::CannotDetach
            | ErrorCode::TooLate
            | ErrorCode::NotInDoubt => Self::Refused,
            ErrorCode::Forbidden => Self::Forbidden,
            _ => Self::Other,
        }
    }
}

impl Error {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Client(ClientError::Api(error)) => Exit::of_code(error.code),
            Self::Keys(KeysError::Name(_)) => Exit::Usage,
            Self::Client(ClientError::Denied { .. }) => Exit::Forbidden,
            Self::Client(ClientError::Foreign { .. }) | Self::Keys(_) | Self::Write(_) | Self::Left(_) => {
                Exit::Other
            }
            Self::Client(_) => Exit::Unreachable,
            Self::Command(code, _) => Exit::of_code(*code),
        }
    }

    /// Returns the error in the form that the API gives to errors.
    pub(crate) fn to_json(&self) -> String {
        let code = match self {
            Self::Client(ClientError::Api(error)) => error.code,
            Self::Client(ClientError::Denied { .. }) => ErrorCode::Forbidden,
            Self::Command(code, _) => *code,
            Self::Keys(KeysError::Name(_)) => ErrorCode::Invalid,
            _ => ErrorCode::Unavailable,
        };
        let body = ErrorBody { error: ApiError::new(code, self.to_string()) };
        to_json(&body)
    }
}

impl From<KeysError> for Error {
    fn from(error: KeysError) -> Self {
        Self::Keys(error)
    }
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(error) => error.fmt(f),
            Self::Keys(error) => error.fmt(f),
            Self::Command(_, message) | Self::Write(message) | Self::Left(message) => f.write_str(message),
        }
    }
}
