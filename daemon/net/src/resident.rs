//! The daemon's program stays in memory.
//!
//! On a host that is short of memory the kernel drops the code that has not run for a while. To run it again is to wait
//! for a disk: seconds on a busy one, perhaps in the pause of a guest, and for all that the control thread does.

use std::fs;
use std::io;
use std::ops::Range;

use rustix::mm::mlock;

/// Reads the whole program and its libraries into memory, and has the kernel keep them there. Returns their size in
/// bytes.
///
/// # Errors
///
/// Fails if the kernel does not tell what is mapped (`/proc/self/maps`), or if the process may not lock so much memory
/// (`RLIMIT_MEMLOCK`). Parts of the program may be locked then.
pub fn keep_program() -> io::Result<usize> {
    let mut bytes = 0;
    for range in fs::read_to_string("/proc/self/maps")?.lines().filter_map(of_program) {
        // SAFETY: to lock memory changes nothing in it, and code and constants stay mapped until the process ends.
        unsafe { mlock(std::ptr::with_exposed_provenance_mut(range.start), range.len()) }?;
        bytes += range.len();
    }
    Ok(bytes)
}

/// Returns what a line of `/proc/PID/maps` maps, if that is code or constants of a file.
fn of_program(line: &str) -> Option<Range<usize>> {
    let mut fields = line.split_ascii_whitespace();
    let (range, access) = (fields.next()?, fields.next()?);
    let path = fields.nth(3)?;
    if !path.starts_with('/') || !["r-xp", "r--p"].contains(&access) {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    Some(address(start)?..address(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_constants_of_files_are_kept() {
        let of = |line| of_program(line).map(|range| range.len());
        assert_eq!(of("7f00000000-7f00003000 r-xp 00001000 fd:00 131 /usr/sbin/memlaned"), Some(0x3000));
        assert_eq!(
            of("7f00000000-7f00001000 r--p 00001000 fd:00 131 /usr/lib/with a space.so"),
            Some(0x1000)
        );
        assert_eq!(of("7f00000000-7f00001000 rw-p 00001000 fd:00 131 /usr/sbin/memlaned"), None);
        assert_eq!(of("7f00000000-7f00001000 rw-s 00000000 00:01 9 /memfd:ram (deleted)"), None);
        assert_eq!(of("7f00000000-7f00001000 r-xp 00000000 00:00 0 [vdso]"), None);
        assert_eq!(of("7f00000000-7f00001000 rw-p 00000000 00:00 0"), None);
        assert_eq!(of("nonsense"), None);
    }

    #[test]
    fn the_kernel_keeps_what_it_is_told_to() {
        let Ok(bytes) = keep_program() else {
            // Seen where a user may lock 8 MiB: a program with its tests is larger.
            return assert!(!rustix::process::geteuid().is_root(), "root may lock any memory");
        };
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")?.trim().strip_suffix(" kB"));
        assert!(locked.unwrap().parse::<usize>().unwrap() >= bytes / 1024, "{bytes} bytes: {status}");
    }
}
