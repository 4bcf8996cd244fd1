//! What is wrong with a file that was read.

use std::path::PathBuf;

/// A TOML file does not say what it should. Each error names the file, the line, what was found and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file is no TOML.
    #[error("{}:{line}: this is no TOML: {message}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A key that does not exist.
    #[error("{}:{line}: unknown key {key}; allowed here: {known}", file.display())]
    Unknown {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key found.
        key: String,
        /// The keys that exist.
        known: String,
    },
    /// A key without a default is not there.
    #[error("{}:{line}: {key} is missing; give it {allowed}", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
        /// The line of the table that lacks it.
        line: usize,
        /// The key.
        key: String,
        /// What may stand there.
        allowed: String,
    },
    /// A value that is not allowed.
    #[error("{}:{line}: {key} = {found} is not allowed; give it {allowed}", file.display())]
    Value {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// What stands there.
        found: String,
        /// What may stand there.
        allowed: String,
    },
    /// A value that must be unique.
    #[error("{}:{line}: {key} = {found} stands on line {first} already; give each its own", file.display())]
    Duplicate {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// What stands there.
        found: String,
        /// The line where it stood first.
        first: usize,
    },
}
