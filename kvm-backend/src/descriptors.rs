//! The process's table of file descriptors: making room in it once, and explaining that it is full.

use std::io;

use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{Resource, getrlimit};

/// The largest number of descriptors that [`make_room`] makes room for: the kernel takes 8 bytes for each.
const MAX_ROOM: u64 = 65536;

/// Makes the kernel reserve room for as many descriptors as this process may have (getrlimit(2), `RLIMIT_NOFILE`),
/// up to 65536.
///
/// Otherwise the kernel makes the table larger at the 65th, 129th, 257th descriptor and so on. In a process of
/// several threads it then waits until every processor has let go of the old table (`synchronize_rcu`): 8 to 31 ms
/// were measured, in the system call that happens to need the descriptor. So the process must call this before it
/// starts threads.
///
/// # Errors
///
/// The kernel refused.
pub fn make_room() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(MAX_ROOM);
    let last = i32::try_from(limit.min(MAX_ROOM)).unwrap_or(i32::MAX).saturating_sub(1);
    let any = std::fs::File::open("/dev/null")?;
    // The descriptor is closed at once; the table keeps its size.
    fcntl_dupfd_cloexec(&any, last)?;
    Ok(())
}

/// Returns how many more descriptors this process may have. It reads `/proc/self/fd`, which takes a while if there are many.
///
/// # Errors
///
/// `/proc` cannot be read.
pub fn left() -> io::Result<u64> {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return Ok(u64::MAX) };
    // The directory is one of them, and is closed again.
    let open = std::fs::read_dir("/proc/self/fd")?.count().saturating_sub(1) as u64;
    Ok(limit.saturating_sub(open))
}

/// Returns the error in words that say what to do, if this process or the whole host has run out of file
/// descriptors (`EMFILE`, `ENFILE`: open(2)). Any other error is returned as it is.
pub fn explain(error: io::Error) -> io::Error {
    match Errno::from_io_error(&error) {
        Some(Errno::MFILE) => exhausted(),
        Some(Errno::NFILE) => {
            io::Error::other("the host has run out of file descriptors: raise fs.file-max (sysctl)")
        }
        _ => error,
    }
}

/// Returns whether the error says that this process or the host has run out of file descriptors (`EMFILE`,
/// `ENFILE`).
pub fn is_exhaustion(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// Returns the error that this process has run out of file descriptors, in words that say what to do.
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
    fn room_is_made_once() {
        make_room().unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(MAX_ROOM);
        assert!(size.trim().parse::<u64>().unwrap() >= limit.min(MAX_ROOM), "{size}");
    }

    #[test]
    fn what_is_open_is_not_left() {
        let before = left().unwrap();
        let limit = getrlimit(Resource::Nofile).current.unwrap();
        assert!(before < limit);
        let files: Vec<_> = (0..100).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        // Other tests open and close some.
        assert!(left().unwrap() < before - 50, "{} files", files.len());
    }

    #[test]
    fn what_is_no_exhaustion_stays_as_it_is() {
        let refused = explain(Errno::CONNREFUSED.into());
        assert_eq!(Errno::from_io_error(&refused), Some(Errno::CONNREFUSED));
        let limit = getrlimit(Resource::Nofile).current.unwrap();
        let text = explain(Errno::MFILE.into()).to_string();
        assert!(
            text.contains("run out of file descriptors") && text.contains(&format!("limit {limit}")),
            "{text}"
        );
        assert!(
            text.contains("LimitNOFILE") && explain(Errno::NFILE.into()).to_string().contains("fs.file-max")
        );
    }
}
