//! Running out of file descriptors, told as what it is.

use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// The error, in words that say what to do where this process, or the whole host, has run out of file
/// descriptors (`EMFILE`, `ENFILE`: open(2)); any other as it is.
pub fn told(error: io::Error) -> io::Error {
    match Errno::from_io_error(&error) {
        Some(Errno::MFILE) => exhausted(),
        Some(Errno::NFILE) => {
            io::Error::other("the host has run out of file descriptors: raise fs.file-max (sysctl)")
        }
        _ => error,
    }
}

/// Whether the error says that there are no more file descriptors.
pub fn is_exhaustion(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// This process has run out of file descriptors.
pub fn exhausted() -> io::Error {
    let limit = getrlimit(Resource::Nofile).current.map_or("none".to_owned(), |limit| limit.to_string());
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    let name = if name.is_empty() { "the process" } else { name.trim_end() };
    io::Error::other(format!(
        "{name} has run out of file descriptors (limit {limit}): raise LimitNOFILE of its unit, or `ulimit -n`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_exhaustion_stays_as_it_is() {
        let refused = told(Errno::CONNREFUSED.into());
        assert_eq!(Errno::from_io_error(&refused), Some(Errno::CONNREFUSED));
        let limit = getrlimit(Resource::Nofile).current.unwrap();
        let text = told(Errno::MFILE.into()).to_string();
        assert!(
            text.contains("run out of file descriptors") && text.contains(&format!("limit {limit}")),
            "{text}"
        );
        assert!(
            text.contains("LimitNOFILE") && told(Errno::NFILE.into()).to_string().contains("fs.file-max")
        );
    }
}
