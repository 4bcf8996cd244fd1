//! This module says why the journal cannot be used.

use std::io;
use std::path::PathBuf;

/// This tells operators what to do about a journal that cannot be believed.
const WHAT_TO_DO: &str = "It tells which guests this host has promised to run or not to run, so the daemon does not \
     start. Put the file back as it was. If that cannot be done: ask the peers (memlanectl status, \
     memlanectl guests) which guests run there or are in doubt, end the VMMs of those here, and then move the \
     journal's directory away: memlaned starts anew without it";

/// The journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file or directory cannot be read or written.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// This was being done.
        doing: &'static str,
        /// This is the file or directory.
        path: PathBuf,
        /// This is what the kernel said.
        source: io::Error,
    },
    /// Another daemon has it open.
    #[error(
        "another memlaned uses the journal in {}; stop it, or configure another `journal`",
        directory.display()
    )]
    InUse {
        /// The journal lies in this directory.
        directory: PathBuf,
    },
    /// The file does not hold what was written to it.
    #[error("the journal {} is damaged at byte {offset}: {found}. {WHAT_TO_DO}", path.display())]
    Damaged {
        /// This is the file.
        path: PathBuf,
        /// From this byte on, counted from the file's beginning, it does not add up.
        offset: u64,
        /// This is what was found there.
        found: String,
    },
    /// There is no journal where there was one.
    #[error(
        "the journal {} is missing, and {} says that there was one. {WHAT_TO_DO}",
        path.display(), identity.display()
    )]
    Missing {
        /// This file should be there.
        path: PathBuf,
        /// This file says that it was there.
        identity: PathBuf,
    },
    /// The file is not the one that was here.
    #[error(
        "the journal {} is another one (byte 0 says journal {found}, and {} says journal {expected}): was it \
         copied from another host, or from an earlier time? {WHAT_TO_DO}",
        path.display(), identity.display()
    )]
    Foreign {
        /// This is the file.
        path: PathBuf,
        /// The file has this identity.
        found: String,
        /// This file says which identity it should have.
        identity: PathBuf,
        /// It should have this identity.
        expected: String,
    },
    /// A later version of memlaned has written it.
    #[error(
        "{} has format {format}, and this memlaned knows formats up to {known}: start the version of memlaned \
         that wrote it",
        path.display()
    )]
    Later {
        /// This is the file.
        path: PathBuf,
        /// It has this format.
        format: u64,
        /// This version knows formats up to this one.
        known: u64,
    },
}

/// The bytes of a journal cannot be believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The file is damaged.
    #[error("it is damaged at byte {offset}: {found}")]
    Damaged {
        /// The damage is at this byte, counted from the file's beginning.
        offset: u64,
        /// This is what was found there, without control characters.
        found: String,
    },
    /// The file has this format, which is a later one.
    #[error("it has format {0}, which is a later one")]
    Later(u64),
}
