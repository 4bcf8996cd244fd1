//! This module says what is wrong with a file that was read.

use std::path::PathBuf;

/// A TOML file does not say what it should. Each error names the file, the line, what was found and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file is no TOML.
    #[error("{}:{line}: this is no TOML: {message}", file.display())]
    Syntax {
        /// This is the file.
        file: PathBuf,
        /// This is the line, counted from 1.
        line: usize,
        /// This is what the parser says.
        message: String,
    },
    /// A key stands there that does not exist.
    #[error("{}:{line}: unknown key {key}; allowed here: {known}", file.display())]
    Unknown {
        /// This is the file.
        file: PathBuf,
        /// This is the line, counted from 1.
        line: usize,
        /// This is the key that was found.
        key: String,
        /// These are the keys that exist.
        known: String,
    },
    /// A key without a default is not there.
    #[error("{}:{line}: {key} is missing; give it {allowed}", file.display())]
    Missing {
        /// This is the file.
        file: PathBuf,
        /// This is the line of the table that lacks the key, counted from 1.
        line: usize,
        /// This is the key.
        key: String,
        /// This may stand there.
        allowed: String,
    },
    /// A value is not allowed.
    #[error("{}:{line}: {key} = {found} is not allowed; give it {allowed}", file.display())]
    Value {
        /// This is the file.
        file: PathBuf,
        /// This is the line, counted from 1.
        line: usize,
        /// This is the key.
        key: String,
        /// This stands there.
        found: String,
        /// This may stand there.
        allowed: String,
    },
    /// A value must be unique and stands there a second time.
    #[error("{}:{line}: {key} = {found} stands on line {first} already; give each its own", file.display())]
    Duplicate {
        /// This is the file.
        file: PathBuf,
        /// This is the line, counted from 1.
        line: usize,
        /// This is the key.
        key: String,
        /// This stands there.
        found: String,
        /// The value stood on this line first.
        first: usize,
    },
}
