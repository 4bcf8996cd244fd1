//! The reasons why keys cannot be made or shown.

use std::io;
use std::path::PathBuf;

/// The reason why keys cannot be made or shown.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// A file or directory cannot be made.
    #[error("cannot make {}: {source}", path.display())]
    Make {
        /// The path.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// A file is there already, and is not replaced.
    #[error("{} is there already; nothing was changed. Use another directory, or move it away if it is of no use", .0.display())]
    There(PathBuf),
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The path.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// There is no authority in the directory.
    #[error("there is no authority in {}; make one with `memlanectl keys init`", .0.display())]
    NoAuthority(PathBuf),
    /// A file does not contain what it should.
    #[error("{} cannot be used: {reason}", path.display())]
    Contents {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The name of a host cannot stand in a certificate.
    #[error(
        "{0:?} cannot be the name of a host; give a name like host-a or host-a.example, as the host's configuration has it"
    )]
    Name(String),
    /// A key or certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}
