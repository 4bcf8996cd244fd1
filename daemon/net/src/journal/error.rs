//! Why the journal cannot be used.

use std::io;
use std::path::PathBuf;

/// What an operator does about a journal that cannot be believed.
const WHAT_TO_DO: &str = "It tells which guests this host has promised to run or not to run, so the daemon does not \
     start. Put the file back as it was. If that cannot be done: ask the peers (memlanectl status, \
     memlanectl guests) which guests run there or are in doubt, end the VMMs of those here, and then move the \
     journal's directory away: memlaned starts anew without it";

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file or directory cannot be read or written.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another daemon has it open.
    #[error(
        "another memlaned uses the journal in {}; stop it, or configure another `journal`",
        directory.display()
    )]
    InUse {
        /// Where the journal lies.
        directory: PathBuf,
    },
    /// The file does not hold what was written to it.
    #[error("the journal {} is damaged at byte {offset}: {found}. {WHAT_TO_DO}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it begins not to add up, in bytes from the file's beginning.
        offset: u64,
        /// What is there.
        found: String,
    },
    /// There is no journal where there was one.
    #[error(
        "the journal {} is missing, and {} says that there was one. {WHAT_TO_DO}",
        path.display(), identity.display()
    )]
    Missing {
        /// The file that should be there.
        path: PathBuf,
        /// The file that says so.
        identity: PathBuf,
    },
    /// The file is not the one that was here.
    #[error(
        "the journal {} is another one (byte 0 says journal {found}, and {} says journal {expected}): was it \
         copied from another host, or from an earlier time? {WHAT_TO_DO}",
        path.display(), identity.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The identity that it has.
        found: String,
        /// The file that says which it should have.
        identity: PathBuf,
        /// The identity that it should have.
        expected: String,
    },
    /// A later version has written it.
    #[error(
        "{} has format {format}, and this memlaned knows formats up to {known}: start the version of memlaned \
         that wrote it",
        path.display()
    )]
    Later {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u64,
        /// The last one that this version knows.
        known: u64,
    },
}

/// Where a file begins not to add up, and what is there.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is damaged.
    Damaged {
        /// In bytes from the file's beginning.
        offset: u64,
        /// What is there, without control characters.
        found: String,
    },
    /// It is of a later format.
    Later(u64),
}
