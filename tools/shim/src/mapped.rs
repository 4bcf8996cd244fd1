//! Finds the file behind a mapping of the program, among the program's descriptors.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::sys::ProgramDescriptors;

/// As many descriptors are looked at where the kernel does not list them.
const MOST: RawFd = 4096;
/// The error of a number that is no descriptor.
const EBADF: i32 = 9;

/// Returns the file that the program has mapped at an address, by a descriptor that the program has of it. `maps` is
/// `/proc/self/maps`.
pub(crate) fn file(address: u64, maps: File) -> Result<OwnedFd, String> {
    let Mapped { inode: wanted, name } = mapped_at(address, maps)?;
    let program = ProgramDescriptors::new()
        .map_err(|error| format!("getting at the program's descriptors: {error}"))?;
    let mut failure = None;
    for number in numbers(&name) {
        match program.copy(number).map(File::from) {
            Ok(copy) => {
                if copy.metadata().is_ok_and(|found| (found.dev(), found.ino()) == wanted) {
                    return Ok(copy.into());
                }
            }
            // Most numbers may be of none.
            Err(error) if error.raw_os_error() == Some(EBADF) => {}
            Err(error) => failure = Some(error),
        }
    }
    let why = failure.map(|error| format!(" (copying one: {error})")).unwrap_or_default();
    Err(format!("the program has no descriptor of the file that it has mapped{why}"))
}

/// A file that the program has mapped.
#[derive(Debug, PartialEq, Eq)]
struct Mapped {
    /// The device and the inode number.
    inode: (u64, u64),
    /// What the kernel calls it.
    name: String,
}

/// Finds the file that is mapped at an address.
fn mapped_at(address: u64, maps: File) -> Result<Mapped, String> {
    for line in BufReader::new(maps).lines() {
        let line = line.map_err(|error| format!("reading the mappings: {error}"))?;
        if let Some((start, end, mapped)) = parse(&line)
            && (start..end).contains(&address)
        {
            return Ok(mapped);
        }
    }
    Err("the program has mapped nothing there".to_owned())
}

/// Reads a line of `/proc/self/maps`: the addresses, and the file.
fn parse(line: &str) -> Option<(u64, u64, Mapped)> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    // The name is the rest of the line, and may have spaces in it.
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let (major, minor) = fields.nth(2)?.split_once(':')?;
    let inode = fields.next()?.parse().ok()?;
    let name = fields.next().unwrap_or_default().trim_start().to_owned();
    let inode = (device(hex(major)?, hex(minor)?), inode);
    Some((hex(start)?, hex(end)?, Mapped { inode, name }))
}

/// Returns the number of a device, as `makedev` of the C library makes it.
fn device(major: u64, minor: u64) -> u64 {
    (major & 0xffff_f000) << 32 | (major & 0xfff) << 8 | (minor & 0xffff_ff00) << 12 | minor & 0xff
}

/// Returns the numbers of the descriptors that may be of a file which the kernel calls so. To copy others, and to close the
/// copies, may make slow storage work.
fn numbers(name: &str) -> Vec<RawFd> {
    // It lists those of the program, not those of this thread.
    let Ok(listing) = std::fs::read_dir("/proc/self/fd") else { return (0..MOST).collect() };
    let is_named = |path: &Path| std::fs::read_link(path).is_ok_and(|link| link.to_str() == Some(name));
    let named =
        listing.filter_map(|entry| entry.ok().map(|entry| entry.path())).filter(|path| is_named(path));
    named.filter_map(|path| path.file_name()?.to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps_are_read() {
        let line = "7f0000000000-7f0000003000 rw-s 00000000 fe:1a 77  /dev/shm/a b";
        let mapped = Mapped { inode: (0xfe1a, 77), name: "/dev/shm/a b".to_owned() };
        assert_eq!(parse(line), Some((0x7f00_0000_0000, 0x7f00_0000_3000, mapped)));
        for line in ["", "nonsense", "1-2 rw-p 0", "1-g rw-p 0 0:0 0"] {
            assert_eq!(parse(line), None, "{line}");
        }
        assert_eq!((device(0, 1), device(8, 0x101), device(0x1003, 0)), (1, 0x10_0801, 0x1000_0000_0300));
    }
}
